"""The train state and the jitted train step.

The state is plain nested dicts: `step` int32 [], `params`, `batch_stats`, `opt_state`, and `ema`
(`{'params', 'batch_stats'}`, or `{}` where no average is kept). Randomness is derived from
(seed, step), so it is not state.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from ham_jax import parallel
from ham_jax.data import metadata
from ham_jax.model import Model, Variables
from ham_jax.models import Network, Tree, norm
from ham_jax.training import augment, distill, losses, optim
from ham_jax.training.streams import Stream

State = dict[str, Any]
Batch = dict[str, jax.Array]


class Seen(NamedTuple):
    """What the network sees of a batch, or of a part of it, and what it is to answer.

    Attributes:
      image: float32 [B, crop_px, crop_px, 3].
      target: float32 [B, C].
      metadata: float32 [B, M], or None.
    """

    image: jax.Array
    target: jax.Array
    metadata: jax.Array | None


def init_state(
    network: Network,
    optimizer: optim.Optimizer,
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    weights: tuple[Tree, Tree] | None = None,
) -> State:
    """Returns the state of step 0, replicated on the mesh.

    Args:
      network: the model's pure functions.
      optimizer: from `optim.make`.
      config: the whole configuration.
      mesh: the devices, axis `data`.
      weights: (params, batch_stats) to start from; None: those of `network.init`.
    """
    params, batch_stats = weights or network.init(config.seed)
    state = {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "batch_stats": batch_stats,
        "opt_state": optimizer.init(params),
        "ema": {"params": params, "batch_stats": batch_stats} if config.optim.ema_decay else {},
    }
    # Copies, so that no two leaves share a buffer: the step may donate each of them.
    return parallel.replicate(mesh, jax.tree.map(jnp.copy, state))


def flop_per_image(
    train_step, state: State, batch: Mapping[str, Any], taught: Sequence[Variables] = ()
) -> float | None:
    """Returns the floating-point operations of a train step by XLA's count, an image of a batch.

    None where XLA does not count before it compiles, as for GPUs (jax 0.11).

    Args:
      train_step: from `make_train_step`.
      state: arrays or their shapes.
      batch: arrays or their shapes, of one step.
      taught: the teachers' weights, or their shapes.
    """
    cost = train_step.lower(state, batch, taught).cost_analysis()
    return cost and cost["flops"] / len(batch["label"])


def make_train_step(
    network: Network,
    optimizer: optim.Optimizer,
    loss: losses.Loss,
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    teachers: Sequence[Model] = (),
) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
    """Returns the compiled step: (state, batch, taught=()) -> (state, scalars).

    A batch with one more axis in front is that many steps, one after the other, as one program.

    Args:
      network: the model's pure functions.
      optimizer: from `optim.make`.
      loss: from `losses.make_loss`.
      config: the whole configuration.
      mesh: the devices, axis `data`.
      teachers: see `distill`.

    Returns:
      A function of a state, a global batch: `image` uint8 [B, H, W, 3], `label` int32 [B] and,
      for a network that takes it, `metadata` float32 [B, M]; and of the weights of each teacher,
      which are neither state nor consumed. The scalars are the batch's `loss`,
      `accuracy` (arg-max against the target's arg-max) and `grad_norm`, [] or [number of steps].
      On GPU and TPU the state given is consumed; on CPU, where donating costs time, it is not.
    """
    root = jax.random.key(config.seed)
    gradient = _gradient(network, loss, config, mesh, teachers)

    def train_step(state: State, batch: Batch, taught: Sequence[Variables]):
        key = jax.random.fold_in(root, state["step"])
        seen = _seen(key, batch, config)
        of_model = jax.random.fold_in(key, Stream.MODEL)
        (value, (accuracy, batch_stats)), grads = gradient(
            state["params"], state["batch_stats"], seen, of_model, taught
        )
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = state["ema"]
        if ema:
            new = {"params": params, "batch_stats": batch_stats}
            ema = optim.update_ema(ema, new, state["step"], config.optim.ema_decay)
        state = {
            "step": state["step"] + 1,
            "params": params,
            "batch_stats": batch_stats,
            "opt_state": opt_state,
            "ema": ema,
        }
        grad_norm = optax.tree.norm(grads)
        return state, {"loss": value, "accuracy": accuracy, "grad_norm": grad_norm}

    def train_steps(state: State, batch: Batch, taught: Sequence[Variables] = ()):
        if batch["label"].ndim == 1:
            return train_step(state, batch, taught)
        return jax.lax.scan(lambda state, batch: train_step(state, batch, taught), state, batch)

    donate = () if jax.default_backend() == "cpu" else (0,)
    return jax.jit(train_steps, out_shardings=parallel.replicated(mesh), donate_argnums=donate)


def _seen(key: jax.Array, batch: Batch, config: ml_collections.ConfigDict) -> Seen:
    """Returns a batch with the random draws of a step, whose key it takes."""
    code = batch.get("metadata")
    if code is not None:
        of_metadata = jax.random.fold_in(key, Stream.METADATA)
        code = metadata.drop(of_metadata, code, config.model.metadata_dropout)
    image, label, num_classes = batch["image"], batch["label"], len(config.data.classes)
    return Seen(*augment.augment(key, image, label, config.augment, num_classes, code))


def _num_groups(batch_norm: str, mesh: jax.sharding.Mesh) -> int:
    """Returns how many parts of a batch BatchNorm normalises each by itself."""
    hosts = {device.process_index for device in mesh.devices.flat}
    return {"global": 1, "host": len(hosts), "device": mesh.devices.size}[batch_norm]


def _gradient(
    network: Network,
    loss: losses.Loss,
    config: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    teachers: Sequence[Model],
) -> Callable:
    """Returns (params, batch_stats, seen, key, taught) -> ((loss, (accuracy, batch_stats)), grads).

    In `train.accumulate` parts, whose gradients add up to that of the whole batch's mean.
    """
    num_parts = config.train.accumulate
    share, temperature = config.loss.teacher_share, config.loss.teacher_temperature
    num_groups = _num_groups(config.model.batch_norm, mesh)

    def of_part(params, batch_stats, seen: Seen, key, batch_size: int, taught):
        if teachers:
            log_taught = distill.log_probabilities(
                teachers, taught, seen.image, seen.metadata, temperature
            )

        def of_each(logits):
            if not teachers:
                return loss(logits, seen.target)
            from_teachers = distill.divergence(log_taught, logits, temperature)
            return (1 - share) * loss(logits, seen.target) + share * from_teachers

        def summed(params):
            params = optim.detach_frozen(config.optim, params)
            with norm.in_groups(num_groups):
                logits, new_stats = network.apply(
                    params, batch_stats, seen.image, train=True, key=key, metadata=seen.metadata
                )
            hits = (logits.argmax(-1) == seen.target.argmax(-1)).sum()
            return of_each(logits).sum() / batch_size, (hits / batch_size, new_stats)

        return jax.value_and_grad(summed, has_aux=True)(params)

    def gradient(params, batch_stats, seen: Seen, key, taught):
        batch_size = len(seen.image)
        if num_parts == 1:
            return of_part(params, batch_stats, seen, key, batch_size, taught)

        def add(carry, part):
            (value, (hits, batch_stats)), grads = carry
            seen, key = part
            (v, (h, batch_stats)), g = of_part(params, batch_stats, seen, key, batch_size, taught)
            return ((value + v, (hits + h, batch_stats)), jax.tree.map(jnp.add, grads, g)), None

        # Part i takes every num_parts-th row, so that each device works on rows it has.
        parts = jax.tree.map(lambda x: x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1), seen)
        zero = jnp.zeros((), jnp.float32)
        start = ((zero, (zero, batch_stats)), jax.tree.map(jnp.zeros_like, params))
        # XLA's CPU backend runs convolutions in a rolled loop 12 to 28 times slower.
        unroll = num_parts if jax.default_backend() == "cpu" else 1
        keys = jax.random.split(key, num_parts)
        return jax.lax.scan(add, start, (parts, keys), unroll=unroll)[0]

    return gradient
