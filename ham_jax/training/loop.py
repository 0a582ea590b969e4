"""`--mode=train`: from a configuration to a folder with a trained and evaluated network."""

import collections
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from ham_jax import CLASSES, checkpoints, console, models, parallel
from ham_jax import config as configuration
from ham_jax.data import feed
from ham_jax.data import prepare as preparation
from ham_jax.evaluation import evaluate
from ham_jax.training import losses, optim, step, telemetry

_STEPS_AHEAD = 2  # dispatched before the oldest must be ready: bounds the batches in memory


class Preempted(Exception):  # noqa: N818 - not an error: the run was asked to stop
    """The run was asked to stop, saved its state and can be taken up again.

    Attributes:
      exit_code: 75 after SIGTERM, 130 after Ctrl-C.
    """

    def __init__(self, exit_code: int, last_step: int):
        self.exit_code = exit_code
        super().__init__(f"stopped at step {last_step}, saved; the same command goes on from there")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run in steps; `eval_every` and `save_every` need not be whole."""

    steps_per_epoch: float
    num_steps: int
    warmup_steps: int
    eval_every: float
    save_every: float

    @classmethod
    def of(cls, config: ml_collections.ConfigDict, num_images: int) -> "Plan":
        """Returns the plan for a training split of `num_images`."""
        per_epoch = num_images / config.train.batch_size
        return cls(
            per_epoch,
            configuration.num_steps(config.train.duration, per_epoch),
            configuration.num_steps(config.optim.warmup, per_epoch),
            _in_steps(config.eval.every, per_epoch),
            _in_steps(config.checkpoint.every, per_epoch),
        )

    def evaluates(self, done: int) -> bool:
        """Returns whether validation follows after `done` steps."""
        return _passes(done, self.eval_every) or done == self.num_steps

    def saves(self, done: int) -> bool:
        """Returns whether a checkpoint follows after `done` steps."""
        return _passes(done, self.save_every) or self.evaluates(done)


def _in_steps(duration, steps_per_epoch: float) -> float:
    ((unit, amount),) = duration.items()
    return max(1.0, amount * steps_per_epoch if unit == "epochs" else amount)


def _passes(done: int, every: float) -> bool:
    """Returns whether the last step reached or passed a multiple of `every`."""
    return done // every > (done - 1) // every


def train(
    config: ml_collections.ConfigDict,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    preemption: parallel.Preemption,
) -> dict[str, Any]:
    """Trains, or goes on with what `workdir` holds, and evaluates the best checkpoint.

    Args:
      config: a validated configuration.
      workdir: where everything is written; a folder of the same run is taken up again.
      mesh: the devices, axis `data`.
      preemption: entered; asked after each step.

    Returns:
      The contents of metrics.json.

    Raises:
      Preempted: asked to stop; the state is saved.
      InputError: data or workdir do not fit the configuration.
      telemetry.NonFiniteLoss: training diverged; the last good checkpoint is kept.
    """
    checkpoints.check_run_config(workdir, config)
    data = preparation.prepare(config)
    records, rows = data.select("train")
    val_records, val_rows = data.select("val")
    labels = records.table["label"].to_numpy()[rows]
    plan = Plan.of(config, len(rows))

    network = models.build(config.model, len(CLASSES))
    schedule = optim.schedule(config.optim, plan.warmup_steps, plan.num_steps)
    params = jax.eval_shape(lambda: network.init(config.seed)[0])
    optimizer = optim.make(config.optim, schedule, params)
    loss = losses.make_loss(config.loss, np.bincount(labels, minlength=len(CLASSES)))
    train_step = step.make_train_step(network, optimizer, loss, config, mesh)
    predict = evaluate.make_predictor(network, config, mesh)
    use_ema = config.optim.ema_decay > 0 and config.eval.weights != "raw"

    def validate(state):
        numbers, probabilities = evaluate.evaluate(
            predict,
            state["ema"] if use_ema else {k: state[k] for k in ("params", "batch_stats")},
            val_records,
            val_rows,
            config.eval.batch_size,
            mesh,
        )
        return numbers, probabilities

    workdir.mkdir(parents=True, exist_ok=True)
    checkpoints.write_run_config(workdir, config)
    if parallel.is_main():
        data.audit.write(workdir)
    meta = {
        "config": configuration.to_dict(config),
        "classes": list(CLASSES),
        "records": records.fingerprint,
    }
    state = step.init_state(network, optimizer, config, mesh)
    with checkpoints.Checkpoints(workdir, config.checkpoint.keep) as saved:
        if saved.latest() is not None:
            state, _ = saved.restore(None, state, mesh)
        start = int(state["step"])
        if start < plan.num_steps:
            if parallel.is_main():
                _say_what(config, plan, start, len(rows), len(val_rows), mesh)
            order = _order(config, rows, labels)
            kind = feed.choose(config.data.feed, len(rows) * math.prod(records.canvas) * 3, mesh)
            state = _steps(
                state,
                train_step,
                feed.batches(kind, records, rows, order, range(start, plan.num_steps), mesh),
                plan,
                config,
                workdir,
                schedule,
                validate,
                lambda done, state, numbers: saved.save(done, state, numbers, meta),
                preemption,
            )
            saved.wait()
        best = saved.best()
        if best != int(state["step"]):
            state, _ = saved.restore(best, state, mesh)
    numbers, probabilities = validate(state)
    return evaluate.report(
        workdir, "val", best, config, val_records, val_rows, numbers, probabilities
    )


def _steps(
    state, train_step, batches, plan, config, workdir, schedule, validate, save, preemption
) -> step.State:
    """The loop: step, log, evaluate, save, until the plan's end or a request to stop."""
    start = int(state["step"])
    unlogged: dict[int, dict[str, jax.Array]] = {}
    ahead: collections.deque[jax.Array] = collections.deque()
    with telemetry.Telemetry(
        workdir,
        config.log,
        plan.num_steps,
        plan.steps_per_epoch,
        config.train.batch_size,
        start,
        parallel.is_main(),
    ) as log:

        def flush(done: int) -> None:
            """Fetches the scalars since the last time, checks them and logs their means."""
            if not unlogged:
                return
            fetched = jax.device_get(unlogged)
            unlogged.clear()
            # A gradient that overflows ruins the weights before the loss shows it.
            sums = {n: s["loss"] + s["grad_norm"] for n, s in fetched.items()}
            telemetry.check_finite(sums)
            means = {
                f"train/{name}": float(np.mean([s[name] for s in fetched.values()]))
                for name in ("loss", "accuracy", "grad_norm")
            }
            log.log(done, means | {"train/learning_rate": float(schedule(done - 1))})

        for done in range(start + 1, plan.num_steps + 1):
            log.profile(done - 1)
            with log.waiting():
                batch = next(batches)
            state, scalars = train_step(state, batch)
            unlogged[done] = scalars
            ahead.append(scalars["loss"])
            if len(ahead) > _STEPS_AHEAD:
                ahead.popleft().block_until_ready()
            stop = preemption.reached(done)
            if done % config.log.every_steps == 0 or plan.saves(done) or stop:
                flush(done)  # before a save: no checkpoint of a diverged run
            numbers = None
            with log.elsewhere():
                if plan.evaluates(done):
                    results, _ = validate(state)
                    numbers = {
                        f"val/{name}": value
                        for name, value in results.items()
                        if isinstance(value, float)
                    }
                    log.log(done, numbers)
                if plan.saves(done) or stop:
                    save(done, state, numbers)
            if stop and done < plan.num_steps:
                raise Preempted(preemption.exit_code, done)
    return state


def _order(config: ml_collections.ConfigDict, rows: np.ndarray, labels: np.ndarray) -> feed.Order:
    if config.loss.imbalance == "balanced_sampling":
        return feed.class_balanced(rows, labels, config.train.batch_size, config.seed)
    return feed.shuffled(rows, config.train.batch_size, config.seed)


def _say_what(config, plan, start, num_train, num_val, mesh) -> None:
    devices = f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}"
    console.log_line(
        f"{config.model.name} on {devices}: {num_train} images train, {num_val} validate; steps"
        f" {start} to {plan.num_steps}, {plan.steps_per_epoch:.1f} an epoch"
    )
