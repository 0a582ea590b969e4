"""Losses for unequal classes: HAM10000 has 58 images of nevi to each one of dermatofibroma.

A new loss is a function and an entry of `LOSSES`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ham_jax import config as configuration
from ham_jax.config import InputError

Loss = Callable[[jax.Array, jax.Array], jax.Array]
"""(logits [B, C], target [B, C] whose rows sum to 1) -> loss of each example in nats, [B]."""

PerClass = Callable[[jax.Array], jax.Array]
"""logits [B, C] -> the loss if class c is the true one, [B, C]."""

Builder = Callable[[ml_collections.ConfigDict, np.ndarray], tuple[PerClass, np.ndarray]]
"""(section `loss`, training images of each class, float64 [C]) -> (the loss, how label smoothing
spreads over the classes [C], which need not sum to 1)."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A value of `loss.imbalance`.

    Attributes:
      build: the loss.
      needs_all_classes: it divides by class frequencies.
      balances_batches: the feed is to draw the classes evenly.
    """

    build: Builder
    needs_all_classes: bool = False
    balances_batches: bool = False


def faults(config: ml_collections.ConfigDict) -> list[str]:
    """Returns a sentence if there is no such loss.

    Args:
      config: the whole configuration.
    """
    return configuration.choice_faults("loss.imbalance", config.loss.imbalance, LOSSES)


def make_loss(
    config: ml_collections.ConfigDict, class_counts: np.ndarray, class_names: Sequence[str]
) -> Loss:
    """Returns the loss that the section `loss` describes.

    Targets are smoothed first: (1 - s) target + s spread, where the classes' spread is even except
    for the losses that favour rare classes. There an even one would be favoured likewise, and the
    outputs for every image drawn to the rare classes; so `logit_adjusted` spreads by
    prior^logit_tau and the weighted losses by 1 / weight, each scaled to a sum of 1. Every loss is
    a sum over the classes, so that mixed and smoothed targets need no special case.

    Args:
      config: the section `loss`.
      class_counts: images of each class in the training split, int [C].
      class_names: C of them.

    Raises:
      InputError: a class has no image, and the loss divides by class frequencies.
    """
    kind = LOSSES[config.imbalance]
    counts = np.asarray(class_counts, np.float64)
    if kind.needs_all_classes and not counts.all():
        empty = [name for name, count in zip(class_names, counts, strict=True) if not count]
        raise InputError(_no_images(config.imbalance, empty))
    per_class, spread = kind.build(config, counts)
    spread = spread / spread.sum()

    def loss(logits: jax.Array, target: jax.Array) -> jax.Array:
        smoothing = config.label_smoothing
        target = (1 - smoothing) * target + (smoothing * spread).astype(np.float32)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return (target * per_class(logits)).sum(-1)

    return loss


def _no_images(imbalance: str, empty: Sequence[str]) -> str:
    others = [repr(name) for name, kind in LOSSES.items() if not kind.needs_all_classes]
    return (
        f"loss.imbalance = {imbalance!r} divides by class frequencies, but the training split has"
        f" no image of {', '.join(empty)}: use one of {', '.join(others)}, or a split with images"
        " of every class."
    )


def _plain(config, counts):
    """-log p_c."""
    return cross_entropy, np.ones(len(counts))


def _weighted(config, counts):
    """-log p_c / n_c, of a class with n_c images, scaled to a mean weight of 1 over the images."""
    return _with_weights(1 / counts, counts)


def _sqrt_weighted(config, counts):
    """-log p_c / sqrt(n_c), scaled likewise."""
    return _with_weights(1 / np.sqrt(counts), counts)


def _focal(config, counts):
    """-(1 - p_c)^gamma log p_c; Lin et al., Focal Loss, ICCV 2017, eq. 4."""

    def per_class(logits: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(logits)
        # log(1 - p_c) summed over the other classes: 1 - p_c would round to 0 for a sure class,
        # where a power below 1 has no finite gradient.
        is_self = np.eye(logits.shape[-1], dtype=bool)
        log_rest = jax.nn.logsumexp(jnp.where(is_self, -jnp.inf, log_p[..., None, :]), axis=-1)
        return -jnp.exp(config.focal_gamma * log_rest) * log_p

    return per_class, np.ones(len(counts))


def _logit_adjusted(config, counts):
    """-log softmax(logits + tau log prior)_c; Menon et al., Logit Adjustment, ICLR 2021, eq. 10.

    Only training sees the prior: at test the bare logits favour no class.
    """
    prior = counts / counts.sum()
    offset = (config.logit_tau * np.log(prior)).astype(np.float32)
    return lambda logits: cross_entropy(logits + offset), prior**config.logit_tau


def cross_entropy(logits: jax.Array) -> jax.Array:
    """Returns -log p_c of logits [B, C], [B, C]."""
    return -jax.nn.log_softmax(logits)


def _with_weights(weights: np.ndarray, counts: np.ndarray) -> tuple[PerClass, np.ndarray]:
    weights = weights * counts.sum() / (weights * counts).sum()
    return lambda logits: cross_entropy(logits) * weights.astype(np.float32), 1 / weights


LOSSES = {
    "none": Kind(_plain),
    "weighted": Kind(_weighted, needs_all_classes=True),
    "sqrt": Kind(_sqrt_weighted, needs_all_classes=True),
    "focal": Kind(_focal),
    "logit_adjusted": Kind(_logit_adjusted, needs_all_classes=True),
    "balanced_sampling": Kind(_plain, balances_batches=True),
}
