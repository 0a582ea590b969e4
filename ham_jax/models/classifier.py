"""What all networks share: normalised pixels -> a backbone's features -> logits."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

_WIDTH = 64  # of the metadata's layers


class Normalize(nnx.Module):
    """Subtracts a mean and divides by a standard deviation, of RGB in [0, 1].

    They are statistics that training never changes, so that every checkpoint holds what its
    weights expect of an image.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean = nnx.BatchStat(jnp.array(mean, jnp.float32))
        self.std = nnx.BatchStat(jnp.array(std, jnp.float32))

    def __call__(self, image: jax.Array) -> jax.Array:
        """[B, H, W, 3] -> the same shape."""
        return (image - self.mean[...]) / self.std[...]


class Fusion(nnx.Module):
    """Two layers over an image's metadata, to stand beside the image's features."""

    def __init__(self, num_metadata: int, rngs: nnx.Rngs):
        self.layer1 = nnx.Linear(num_metadata, _WIDTH, rngs=rngs)
        self.layer2 = nnx.Linear(_WIDTH, _WIDTH, rngs=rngs)

    def __call__(self, metadata: jax.Array) -> jax.Array:
        """[B, M] -> [B, 64]."""
        return jax.nn.relu(self.layer2(jax.nn.relu(self.layer1(metadata))))


class Classifier(nnx.Module):
    """Normalisation, backbone, dropout, metadata where the network takes it, and a linear head.

    Args:
      backbone: (normalised image [B, H, W, 3], rngs) -> features float32 [B, F], with the
        attribute `num_features`, F.
      normalize: of the image, as the backbone's weights expect it.
      num_classes: C.
      dropout: share of the features set to zero in training (Srivastava et al., JMLR 2014).
      num_metadata: M; 0: the network sees the image only.
      rngs: for the initial weights.
    """

    def __init__(
        self,
        backbone: Any,
        normalize: Normalize,
        num_classes: int,
        *,
        dropout: float = 0.0,
        num_metadata: int = 0,
        rngs: nnx.Rngs,
    ):
        self.normalize = normalize
        self.backbone = backbone
        self.dropout = nnx.Dropout(dropout)
        self.fusion = Fusion(num_metadata, rngs) if num_metadata else None
        num_features = backbone.num_features + (_WIDTH if num_metadata else 0)
        self.head = nnx.Linear(num_features, num_classes, rngs=rngs)

    def __call__(
        self, image: jax.Array, metadata: jax.Array | None = None, rngs: nnx.Rngs | None = None
    ) -> jax.Array:
        """RGB in [0, 1], [B, H, W, 3], and metadata [B, M] -> logits float32 [B, C].

        `rngs` has the stream `dropout`; only training with dropout or stochastic depth needs it.
        """
        features = self.backbone(self.normalize(image), rngs)
        return self.classify(self.dropout(features, rngs=rngs), metadata)

    def classify(self, features: jax.Array, metadata: jax.Array | None = None) -> jax.Array:
        """Features [B, F] and metadata [B, M] -> logits float32 [B, C]."""
        if self.fusion is not None and metadata is not None:
            features = jnp.concatenate([features, self.fusion(metadata)], -1)
        return self.head(features)
