"""`--mode=train`: from a configuration to a folder with a trained and evaluated network."""

import collections
import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from ham_jax import CLASSES, checkpoints, console, models, parallel
from ham_jax import config as configuration
from ham_jax.config import InputError
from ham_jax.data import feed, metadata, splits
from ham_jax.data import prepare as preparation
from ham_jax.evaluation import evaluate, lineage
from ham_jax.models import pretrained
from ham_jax.training import losses, optim, step, telemetry

_AHEAD = 2  # dispatches before the oldest must be ready: bounds the batches in memory
_STEPS_PER_DISPATCH = 8  # at most, where the number is not given


class Preempted(Exception):  # noqa: N818 - not an error: the run was asked to stop
    """The run was asked to stop, saved its state and can be taken up again.

    Attributes:
      exit_code: 75 after SIGTERM, 130 after Ctrl-C.
    """

    def __init__(self, exit_code: int, where: str):
        self.exit_code = exit_code
        super().__init__(f"stopped at {where}, saved; the same command goes on from there")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run in steps; `eval_every` and `save_every` need not be whole.

    `sizes` are (first step, side of its crops in pixels), the first one from step 0 on.
    """

    steps_per_epoch: float
    num_steps: int
    warmup_steps: int
    eval_every: float
    save_every: float
    sizes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, config: ml_collections.ConfigDict, num_images: int) -> "Plan":
        """Returns the plan for a training split of `num_images`."""
        per_epoch = num_images / config.train.batch_size
        num_steps = configuration.num_steps(config.train.duration, per_epoch)
        shares, sides = zip(*config.augment.progressive, (1.0, config.augment.crop_px), strict=True)
        starts = [round(share * num_steps) for share in (0.0, *shares[:-1])]
        return cls(
            per_epoch,
            num_steps,
            configuration.num_steps(config.optim.warmup, per_epoch),
            _in_steps(config.eval.every, per_epoch),
            _in_steps(config.checkpoint.every, per_epoch),
            tuple(zip(starts, sides, strict=True)),
        )

    def crop_px(self, step: int) -> int:
        """Returns the side of the crops of a step, which counts from 0."""
        return [px for start, px in self.sizes if start <= step][-1]

    def evaluates(self, done: int) -> bool:
        """Returns whether validation follows after `done` steps."""
        return _passes(done, self.eval_every) or done == self.num_steps

    def saves(self, done: int) -> bool:
        """Returns whether a checkpoint follows after `done` steps."""
        return _passes(done, self.save_every) or self.evaluates(done)

    def calls(self, start: int, most: int) -> list[range]:
        """Returns the steps of each call of the compiled step from `start` on: `most`, or 1."""
        calls = []
        while start < self.num_steps:
            calls.append(range(start, start + self._steps_per_call(start, most)))
            start = calls[-1].stop
        return calls

    def _steps_per_call(self, step: int, most: int) -> int:
        """A function of the step alone, so that a run taken up again groups them alike."""
        last = step + most
        whole = step % most == 0 and last <= self.num_steps
        alike = self.crop_px(step) == self.crop_px(last - 1)
        return most if whole and alike and not any(map(self.saves, range(step + 1, last))) else 1


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
    with checkpoints.claimed(workdir):
        return _train(config, workdir, mesh, preemption)


def _train(
    config: ml_collections.ConfigDict,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    preemption: parallel.Preemption,
) -> dict[str, Any]:
    num_metadata = metadata.NUM_METADATA if config.model.metadata else 0
    network = models.build(config.model, len(CLASSES), num_metadata)
    weights = None
    if config.model.pretrained and not checkpoints.has_checkpoints(workdir):
        weights = _pretrained(network, config)
    data = preparation.prepare(config)
    images, val_images = data.select("train"), data.select("val")
    records = images.records
    if weights:
        lineage.refuse_seen(config.model.pretrained, data.held_out(), "model.pretrained")
    labels = images.labels
    plan = Plan.of(config, len(images))
    codes = None
    if num_metadata:
        codes = metadata.encode(records.table)
        metadata.warn_unknown(records.table)

    schedule = optim.schedule(config.optim, plan.warmup_steps, plan.num_steps)
    params = jax.eval_shape(lambda: network.init(config.seed)[0])
    optimizer = optim.make(config.optim, schedule, params)
    loss = losses.make_loss(config.loss, np.bincount(labels, minlength=len(CLASSES)))

    @functools.cache
    def train_step(crop_px: int):
        """Returns the compiled step for crops of this size."""
        sized = config.copy_and_resolve_references()
        sized.augment.crop_px = crop_px
        return step.make_train_step(network, optimizer, loss, sized, mesh)

    predict = evaluate.make_predictor(network, config, mesh)
    use_ema = config.optim.ema_decay > 0 and config.eval.weights != "raw"

    def chosen(state):
        return state["ema"] if use_ema else {k: state[k] for k in ("params", "batch_stats")}

    validated: dict[int, np.ndarray] = {}  # step -> probabilities, of this process's life

    def validate(state):
        numbers, validated[int(state["step"])] = evaluate.evaluate(
            predict,
            chosen(state),
            val_images,
            config.eval.batch_size,
            mesh,
            config.model.metadata,
        )
        return numbers

    meta = {
        "config": configuration.to_dict(config),
        "classes": list(CLASSES),
        "records": records.fingerprint,
    }
    state = step.init_state(network, optimizer, config, mesh, weights)
    with checkpoints.Checkpoints(workdir, config.checkpoint.keep) as saved:
        if saved.latest() is not None:
            state, saved_meta = saved.restore(None, state, mesh)
            if saved_meta["records"] != records.fingerprint:
                raise InputError(
                    f"--workdir={workdir} was trained on other photographs than"
                    f" data.dir = {config.data.dir!r} now holds; then its training and validation"
                    " would mix. Give it the same ones, or choose another --workdir."
                )
            split_file = workdir / checkpoints.SPLIT
            if split_file.exists():  # runs of an earlier version have none
                num_moved = splits.changed_split(split_file, records.table, data.split).sum()
                if num_moved:
                    raise InputError(
                        f"--workdir={workdir} was trained with {num_moved} images in another split"
                        f" than now: its training and validation would mix. {split_file} says who"
                        f" was where; restore that split, or choose another --workdir."
                    )
        checkpoints.write_run_config(workdir, config)
        if parallel.is_main():
            data.audit.write(workdir)
            splits.write_csv(workdir / checkpoints.SPLIT, records.table, data.split)
        start = int(state["step"])
        if start < plan.num_steps:
            saved.check_space(state)
            if parallel.is_main():
                telemetry.write_start(workdir, start)
                _say_what(config, plan, start, len(images), len(val_images), mesh)
            order = _order(config, images.rows, labels)
            kind = feed.choose(config.data.feed, len(images) * math.prod(records.canvas) * 3, mesh)
            calls = plan.calls(start, _most_steps_per_call(config, kind))
            with telemetry.Telemetry(
                workdir,
                config.log,
                plan.num_steps,
                plan.steps_per_epoch,
                config.train.batch_size,
                start,
                parallel.is_main(),
                _peak_images_per_s(train_step, state, config, records.canvas, mesh),
            ) as log:
                state = _steps(
                    state,
                    train_step,
                    calls,
                    feed.batches(kind, images, order, calls, mesh, codes),
                    plan,
                    config,
                    schedule,
                    validate,
                    lambda done, state, numbers: saved.save(done, state, numbers, meta),
                    preemption,
                    log,
                )
            saved.wait()
        best = saved.best()
        if best != int(state["step"]):
            state, _ = saved.restore(best, state, mesh)
    if best not in validated:  # a run taken up again after its best evaluation
        validate(state)
    about = evaluate.settings(config, best, "ema" if use_ema else "raw")
    about |= {"records": records.fingerprint}
    judged = evaluate.judge_validation(workdir, config, about, val_images, validated[best])
    trained = evaluate.Trained(workdir, config, network, chosen(state), about["weights"], best)
    scores = evaluate.ood_scores(trained, data, val_images, mesh, may_fit=True)
    return evaluate.report(workdir, "val", about, val_images, validated[best], judged, scores)


def _pretrained(
    network: models.Network, config: ml_collections.ConfigDict
) -> tuple[models.Tree, models.Tree]:
    """Returns the (params, batch_stats) that `model.pretrained` names, and says what they are."""
    *weights, report = pretrained.load(
        config.model.pretrained, *network.init(config.seed), config.model.name, _read_run
    )
    if parallel.is_main():
        console.log_line(report.text())
    return tuple(weights)


def _read_run(folder: Path) -> dict[str, np.ndarray]:
    """Returns the weights that a run was judged by, by path."""
    params, batch_stats, ema, meta, _ = checkpoints.load_for_inference(folder)
    use_ema = ema and meta["config"]["eval"]["weights"] != "raw"
    return pretrained.flatten(ema if use_ema else {"params": params, "batch_stats": batch_stats})


def _most_steps_per_call(config: ml_collections.ConfigDict, feed: str) -> int:
    """Returns how many steps may be one program: the more, the less small steps wait for Python.

    One on CPU, where XLA runs convolutions in a rolled loop 12 to 28 times slower.
    """
    if feed == "stream" or (not config.train.steps_per_dispatch and jax.default_backend() == "cpu"):
        return 1
    every = config.log.every_steps  # a divisor of it, so that logs do not cut a group
    auto = max(n for n in range(1, _STEPS_PER_DISPATCH + 1) if every % n == 0)
    return config.train.steps_per_dispatch or auto


def _peak_images_per_s(train_step, state, config, canvas, mesh) -> float | None:
    """Returns images/s if every device did nothing but bfloat16 products at its peak.

    None where that is not known or, as the crops grow, not one number.
    """
    peak = telemetry.peak_flops(mesh.devices.flat[0].device_kind)
    if peak is None or config.model.dtype == "float32" or config.augment.progressive:
        return None
    size = config.train.batch_size
    batch = {
        "image": jax.ShapeDtypeStruct((size, *canvas, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((size,), np.int32),
    }
    if config.model.metadata:
        batch["metadata"] = jax.ShapeDtypeStruct((size, metadata.NUM_METADATA), np.float32)
    take = train_step(config.augment.crop_px)
    return mesh.devices.size * peak / step.flop_per_image(take, state, batch)


def _steps(
    state,
    train_step,
    calls,
    batches,
    plan,
    config,
    schedule,
    validate,
    save,
    preemption,
    log,
) -> step.State:
    """The loop: step, log, evaluate, save, until the plan's end or a request to stop."""
    unlogged: list[dict[str, jax.Array]] = []  # scalars of the steps since the last log
    ahead: collections.deque[jax.Array] = collections.deque()

    def flush(done: int) -> None:
        """Fetches the scalars since the last time, checks them and logs their means."""
        if not unlogged:
            return
        fetched = jax.device_get(unlogged)
        unlogged.clear()
        each = {
            name: np.concatenate([np.atleast_1d(s[name]) for s in fetched])
            for name in ("loss", "accuracy", "grad_norm")
        }
        # A gradient that overflows ruins the weights before the loss shows it.
        sums = each["loss"] + each["grad_norm"]
        telemetry.check_finite(dict(enumerate(sums, done + 1 - len(sums))))
        means = {f"train/{name}": float(values.mean()) for name, values in each.items()}
        log.log(done, means | {"train/learning_rate": float(schedule(done - 1))})

    for steps in calls:
        before, done = steps.start, steps.stop
        log.profile(before)
        with log.waiting():
            batch = next(batches)
        state, scalars = train_step(plan.crop_px(before))(state, batch)
        unlogged.append(scalars)
        ahead.append(scalars["loss"])
        if len(ahead) > _AHEAD:
            ahead.popleft().block_until_ready()
        stop = preemption.reached()
        logs = done // config.log.every_steps > before // config.log.every_steps
        if logs or plan.saves(done) or stop:
            flush(done)  # before a save: no checkpoint of a diverged run
        numbers = None
        with log.elsewhere():
            if plan.evaluates(done):
                results = validate(state)
                numbers = {
                    f"val/{name}": value
                    for name, value in results.items()
                    if isinstance(value, float)
                }
                log.log(done, numbers)
            if plan.saves(done) or stop:
                save(done, state, numbers)
        if stop and done < plan.num_steps:
            raise Preempted(preemption.exit_code, f"step {done}")
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
