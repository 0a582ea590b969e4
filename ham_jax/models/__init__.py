"""Pixels -> logits: networks as pure functions of plain dicts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from ham_jax.models import convnext, efficientnet, resnet
from ham_jax.models.classifier import Classifier

Tree = dict[str, Any]
"""Nested dicts of arrays with string keys."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A network's pure functions.

    Attributes:
      name: such as resnet18.
      init: seed -> (params, batch_stats), float32. `params` has the parts `backbone`, `head` and,
        where metadata are used, `fusion`; `batch_stats` has `backbone` (where it has BatchNorm)
        and `normalize`: the mean and std of RGB in [0, 1] that the weights expect.
      apply: (params, batch_stats, image float32 [B, H, W, 3] in [0, 1], train, key=None,
        metadata=None) -> (logits float32 [B, C], new batch_stats). The network normalises the
        image itself. In training BatchNorm looks at the whole global batch, and dropout and
        stochastic depth, where they are on, need a `key`. metadata: float32 [B, M], for a network
        built with M > 0 of them.
      features: (params, batch_stats, image) -> float32 [B, F], the backbone's features as the head
        sees them in evaluation, before metadata.
      class_maps: (params, batch_stats, image, classes int [B], metadata=None) -> (map, gradient),
        float32 [B, h, w, K] each: the backbone's last map, whose average over all places becomes
        the features, and the derivative of the logit of each image's class with respect to it.
    """

    name: str
    init: Callable[[int], tuple[Tree, Tree]]
    apply: Callable[..., tuple[jax.Array, Tree]]
    features: Callable[[Tree, Tree, jax.Array], jax.Array]
    class_maps: Callable[..., tuple[jax.Array, jax.Array]]


def build(config: ml_collections.ConfigDict, num_classes: int, num_metadata: int = 0) -> Network:
    """Returns the network that the section `model` names.

    Args:
      config: the section `model`.
      num_classes: C.
      num_metadata: M, the numbers known of each image beside its pixels; 0: none are used.
    """
    dtype = _dtype(config.dtype)
    random = config.dropout > 0 or config.drop_path > 0

    def make(rngs: nnx.Rngs) -> Classifier:
        if config.name in efficientnet.SCALES:
            family = efficientnet
            backbone = efficientnet.EfficientNetLite(config.name, config.drop_path, dtype, rngs)
        elif config.name in convnext.SCALES:
            family = convnext
            backbone = convnext.ConvNeXt(config.name, config.drop_path, dtype, rngs)
        else:
            family = resnet
            backbone = resnet.ResNet(
                config.name, config.stem, config.zero_init_residual, config.drop_path, dtype, rngs
            )
        return Classifier(
            backbone,
            num_classes,
            family.MEAN,
            family.STD,
            dropout=config.dropout,
            num_metadata=num_metadata,
            rngs=rngs,
        )

    def init(seed: int) -> tuple[Tree, Tree]:
        @jax.jit
        def initial(key):
            _, params, stats = nnx.split(make(nnx.Rngs(key)), nnx.Param, nnx.BatchStat)
            return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

        return initial(jax.random.key(seed))

    shape = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graphs = {
        train: nnx.split(
            # Not every backbone has BatchNorm.
            nnx.view(
                shape,
                deterministic=not train,
                use_running_average=not train,
                raise_if_not_found=False,
            ),
            nnx.Param,
            nnx.BatchStat,
        )[0]
        for train in (True, False)
    }

    def check(metadata: jax.Array | None) -> None:
        if (metadata is None) != (num_metadata == 0):
            raise ValueError(f"the network was built for {num_metadata} metadata")

    def apply(
        params: Tree,
        batch_stats: Tree,
        image: jax.Array,
        train: bool,
        key: jax.Array | None = None,
        metadata: jax.Array | None = None,
    ):
        if train and random and key is None:
            raise ValueError("dropout and stochastic depth need a key in training")
        check(metadata)
        net = nnx.merge(graphs[train], params, batch_stats, copy=True)
        rngs = nnx.Rngs(dropout=key) if train and random else None
        logits = net(image, metadata, rngs)
        if train:
            batch_stats = nnx.to_pure_dict(nnx.state(net, nnx.BatchStat))
        return logits, batch_stats

    def features(params: Tree, batch_stats: Tree, image: jax.Array) -> jax.Array:
        net = nnx.merge(graphs[False], params, batch_stats, copy=True)
        return net.backbone(net.normalize(image))

    def class_maps(
        params: Tree,
        batch_stats: Tree,
        image: jax.Array,
        classes: jax.Array,
        metadata: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        check(metadata)

        def logits_of_classes(offset):
            net = nnx.merge(graphs[False], params, batch_stats, copy=True)
            pool, maps = net.backbone.pool, []

            def tapped(x):
                maps.append(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
                return pool(maps[0] + offset)

            net.backbone.pool = tapped
            logits = net(image, metadata)
            chosen = jnp.take_along_axis(logits, jnp.asarray(classes)[:, None], axis=-1)
            # In evaluation no image depends on another, so that the sum's derivative is each one's.
            return chosen.sum(), maps[0]

        _, shape = jax.eval_shape(logits_of_classes, 0.0)
        gradient, last = jax.grad(logits_of_classes, has_aux=True)(
            jnp.zeros(shape.shape, shape.dtype)
        )
        return last, gradient

    return Network(config.name, init, apply, features, class_maps)


def _dtype(name: str) -> jnp.dtype:
    """Returns the dtype to compute in; bfloat16 gains on GPU and TPU and loses on CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)
