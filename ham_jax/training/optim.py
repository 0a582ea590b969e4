"""Gradients -> updates: schedules, optimisers, what decays, what is frozen, averaged weights.

Parameters are nested dicts with string keys; a parameter's path joins them with '/', as in
`stem/conv/kernel`. A new optimiser is a function and an entry of `OPTIMIZERS`.
"""

import difflib
import re
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import ml_collections
import optax

from ham_jax import config as configuration
from ham_jax.config import InputError

Tree = dict[str, Any]
Optimizer: TypeAlias = optax.GradientTransformation
Schedule: TypeAlias = optax.Schedule
"""step -> learning rate"""

_ADAM_RMS = 0.2  # of a typical AdamW update; Liu et al. 2025, arXiv:2502.16982, section 2.2


def schedule(config: ml_collections.ConfigDict, warmup_steps: int, num_steps: int) -> Schedule:
    """Returns step -> learning rate: from 0 up in a line, then along a cosine to 0.

    Loshchilov and Hutter, SGDR, ICLR 2017, eq. 5, without restarts.

    Args:
      config: the section `optim`.
      warmup_steps: the peak is reached at this step.
      num_steps: the cosine reaches 0 at this step.

    Raises:
      InputError: the warm-up does not end before the run.
    """
    if warmup_steps >= num_steps:
        raise InputError(
            f"optim.warmup is {warmup_steps} steps and train.duration {num_steps}: the warm-up"
            " must end before the run; shorten the one or lengthen the other."
        )
    peak = config.learning_rate
    after = optax.cosine_decay_schedule(peak, num_steps - warmup_steps)
    if not warmup_steps:
        return after
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup_steps), after], [warmup_steps]
    )


def faults(config: ml_collections.ConfigDict) -> list[str]:
    """Returns a sentence if there is no such optimiser.

    Args:
      config: the whole configuration.
    """
    return configuration.choice_faults("optim.name", config.optim.name, OPTIMIZERS)


def make(config: ml_collections.ConfigDict, learning_rate: Schedule, params: Tree) -> Optimizer:
    """Returns the optimiser that the section `optim` describes.

    In this order: clipping by the global norm (of what is trained), the optimiser's direction, the
    learning rate, and `lr_scale`'s factor of each parameter. Weight decay acts on kernels only:
    for sgd as the gradient of an L2 penalty, else decoupled and times the learning rate. Frozen
    parameters get updates of exactly zero and take no room in the state.

    Args:
      config: the section `optim`.
      learning_rate: step -> learning rate.
      params: the parameters, or their shapes.

    Raises:
      InputError: a pattern matches no parameter, or none is left to train.
    """
    names = paths(params)
    wrong = [
        f"optim.{key}: {pattern!r} matches no parameter; the nearest path is"
        f" {_nearest_path(pattern, names)!r}."
        for key, patterns in (("freeze", config.freeze), ("lr_scale", dict(config.lr_scale)))
        for pattern in patterns
        if not any(re.search(pattern, name) for name in names)
    ]
    if all(_is_frozen(config, name) for name in names):
        wrong.append(f"optim.freeze = {config.freeze!r} leaves no parameter to train.")
    if wrong:
        raise InputError(wrong)

    steps = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    steps += [*OPTIMIZERS[config.name](config), optax.scale_by_learning_rate(learning_rate)]
    optimizer = optax.chain(*steps)
    if config.freeze:
        labels = _by_path(lambda name, _: "frozen" if _is_frozen(config, name) else "trained")
        optimizer = optax.partition(
            {"trained": optimizer, "frozen": optax.set_to_zero()}, labels(params)
        )
    if config.lr_scale:
        scale = _by_path(lambda name, update: update * _lr_factor(config, name))
        optimizer = optax.chain(optimizer, optax.stateless(lambda updates, _: scale(updates)))
    return optimizer


def detach_frozen(config: ml_collections.ConfigDict, params: Tree) -> Tree:
    """Returns the parameters, of which frozen ones get gradients of zero that cost nothing."""
    if not config.freeze:
        return params
    return _by_path(lambda name, x: jax.lax.stop_gradient(x) if _is_frozen(config, name) else x)(
        params
    )


def paths(params: Tree) -> list[str]:
    """Returns the path of each parameter, in the order of `jax.tree.leaves`."""
    return jax.tree.leaves(_by_path(lambda name, _: name)(params))


def ema_decay_at(step: jax.typing.ArrayLike, decay: float) -> jax.Array:
    """Returns min(decay, (1 + step) / (10 + step)): early weights are soon forgotten."""
    return jnp.minimum(decay, (1 + step) / (10 + step))


def update_ema(ema: Tree, new: Tree, step: jax.typing.ArrayLike, decay: float) -> Tree:
    """Returns the moving average after step number `step`, which counts from 0.

    Written as a correction, so that what never changes stays as it is to the last bit.

    Args:
      ema: the average so far.
      new: what the step has produced, a tree of the same shapes.
      step: [].
      decay: the share of the old average in the long run.
    """
    keep = ema_decay_at(step, decay)
    return jax.tree.map(lambda e, n: (e + (1 - keep) * (n - e)).astype(e.dtype), ema, new)


# What each optimiser does between clipping and the learning rate.


def _sgd(config) -> list[Optimizer]:
    """Nesterov's momentum as Sutskever et al. 2013."""
    return [_decay(config), optax.trace(config.momentum, nesterov=True)]


def _adamw(config) -> list[Optimizer]:
    """Loshchilov and Hutter 2019."""
    return [optax.scale_by_adam(), _decay(config)]


def _muon(config) -> list[Optimizer]:
    """Jordan et al. 2024: kernels as matrices from inputs to outputs; AdamW for all else.

    Updates are as large as AdamW's, so that one learning rate serves both.
    """
    muon = optax.chain(
        optax.contrib.scale_by_muon(
            beta=config.momentum,
            weight_dimension_numbers=_by_path(
                lambda _, x: optax.contrib.MuonDimensionNumbers(
                    tuple(range(x.ndim - 1)), x.ndim - 1
                )
            ),
        ),
        optax.stateless_with_tree_map(
            lambda u, _: u * _ADAM_RMS * max(u.size // u.shape[-1], u.shape[-1]) ** 0.5
        ),
    )
    labels = _by_path(lambda name, x: "muon" if _is_matrix(name, x) else "adam")
    return [optax.partition({"muon": muon, "adam": optax.scale_by_adam()}, labels), _decay(config)]


OPTIMIZERS = {"sgd": _sgd, "adamw": _adamw, "muon": _muon}


def _decay(config) -> Optimizer:
    return optax.add_decayed_weights(config.weight_decay, _kernels)


def _is_matrix(name: str, x) -> bool:
    """Returns whether a kernel maps several channels to several; a depthwise one does not."""
    return _is_kernel(name) and x.ndim >= 2 and x.shape[-2] > 1


def _is_kernel(name: str) -> bool:
    return name.rsplit("/", 1)[-1] == "kernel"


def _kernels(params: Tree) -> Tree:
    return _by_path(lambda name, _: _is_kernel(name))(params)


def _is_frozen(config, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in config.freeze)


def _lr_factor(config, name: str) -> float:
    return next((f for pattern, f in config.lr_scale if re.search(pattern, name)), 1.0)


def _by_path(function):
    """Returns a function of a tree that applies function(path, leaf) to each leaf."""
    return lambda tree: jax.tree.map_with_path(
        lambda path, leaf: function(jax.tree_util.keystr(path, simple=True, separator="/"), leaf),
        tree,
    )


def _nearest_path(pattern: str, names: list[str]) -> str:
    """Returns the path, or beginning of one, whose spelling is nearest to a pattern."""
    beginnings = dict.fromkeys(
        "/".join(name.split("/")[:depth])
        for name in names
        for depth in range(1, name.count("/") + 2)
    )
    return difflib.get_close_matches(pattern, beginnings, n=1, cutoff=0.0)[0]
