"""Losses for unequal classes: HAM10000 has 58 images of nevi to each one of dermatofibroma."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ham_jax import CLASSES
from ham_jax.config import InputError

Loss = Callable[[jax.Array, jax.Array], jax.Array]
"""(logits [B, C], target [B, C] whose rows sum to 1) -> loss of each example in nats, [B]."""


def make_loss(config: ml_collections.ConfigDict, class_counts: np.ndarray) -> Loss:
    """Returns the loss that the section `loss` describes.

    Targets are smoothed first: (1 - s) target + s spread, where the classes' spread is even except
    for the losses that favour rare classes. There an even one would be favoured likewise, and the
    outputs for every image drawn to the rare classes; so `logit_adjusted` spreads by
    prior^logit_tau and the weighted losses by 1 / weight, each scaled to a sum of 1. Every loss is
    a sum over the classes, so that mixed and smoothed targets need no special case.
    `balanced_sampling` is the plain loss, since the feed draws the classes evenly.

    Args:
      config: the section `loss`.
      class_counts: images of each class in the training split, int [C].

    Raises:
      InputError: a class has no image, and the loss weighs by class frequencies.
    """
    counts = np.asarray(class_counts, np.float64)
    spread = np.ones(len(counts))
    if config.imbalance == "focal":
        per_class = focal(config.focal_gamma)
    elif config.imbalance == "logit_adjusted":
        _refuse_empty(counts, config.imbalance)
        prior = counts / counts.sum()
        spread = prior**config.logit_tau
        per_class = logit_adjusted(config.logit_tau, prior)
    elif config.imbalance in ("none", "balanced_sampling"):
        per_class = cross_entropy
    else:
        _refuse_empty(counts, config.imbalance)
        weights = class_weights(config.imbalance, counts, 0.0)
        spread = 1 / weights
        per_class = weighted(weights)
    spread = spread / spread.sum()

    def loss(logits: jax.Array, target: jax.Array) -> jax.Array:
        smoothing = config.label_smoothing
        target = (1 - smoothing) * target + (smoothing * spread).astype(np.float32)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return (target * per_class(logits)).sum(-1)

    return loss


def cross_entropy(logits: jax.Array) -> jax.Array:
    """Returns -log p_c of logits [B, C], [B, C]."""
    return -jax.nn.log_softmax(logits)


def class_weights(imbalance: str, class_counts: np.ndarray, effective_beta: float) -> np.ndarray:
    """Returns a weight for each class, [C], whose mean over the training images is 1.

    Before that scaling, of a class with n images:
      weighted: 1 / n.
      sqrt: 1 / sqrt(n).
      effective_number: (1 - beta) / (1 - beta^n); Cui et al., Class-Balanced Loss Based on
        Effective Number of Samples, CVPR 2019, eq. 3.

    Args:
      imbalance: one of the three names.
      class_counts: images of each class, all positive, [C].
      effective_beta: beta, in [0, 1).
    """
    if imbalance == "weighted":
        weights = 1 / class_counts
    elif imbalance == "sqrt":
        weights = 1 / np.sqrt(class_counts)
    else:
        weights = (1 - effective_beta) / (1 - effective_beta**class_counts)
    return weights * class_counts.sum() / (weights * class_counts).sum()


def weighted(weights: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    """Returns logits [B, C] -> -w_c log p_c, [B, C]."""
    return lambda logits: weights.astype(np.float32) * cross_entropy(logits)


def focal(gamma: float) -> Callable[[jax.Array], jax.Array]:
    """Returns logits [B, C] -> -(1 - p_c)^gamma log p_c, [B, C].

    Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, eq. 4.
    """

    def per_class(logits: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(logits)
        # log(1 - p_c) summed over the other classes: 1 - p_c would round to 0 for a sure class,
        # where a power below 1 has no finite gradient.
        is_self = np.eye(logits.shape[-1], dtype=bool)
        log_rest = jax.nn.logsumexp(jnp.where(is_self, -jnp.inf, log_p[..., None, :]), axis=-1)
        return -jnp.exp(gamma * log_rest) * log_p

    return per_class


def logit_adjusted(tau: float, prior: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    """Returns logits [B, C] -> -log softmax(logits + tau log prior)_c, [B, C].

    Only training sees the prior: at test the bare logits favour no class. Menon et al., Long-tail
    Learning via Logit Adjustment, ICLR 2021, eq. 10.
    """
    offset = (tau * np.log(prior)).astype(np.float32)
    return lambda logits: cross_entropy(logits + offset)


def _refuse_empty(class_counts: np.ndarray, imbalance: str) -> None:
    empty = [CLASSES[number] for number in np.flatnonzero(class_counts == 0)]
    if empty:
        raise InputError(
            f"loss.imbalance = {imbalance!r} divides by class frequencies, but the training split"
            f" has no image of {', '.join(empty)}: use 'none', 'focal' or 'balanced_sampling', or"
            " a split with images of every class."
        )
