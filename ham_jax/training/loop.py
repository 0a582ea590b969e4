"""`--mode=train`: from a configuration to a folder with a trained and evaluated network."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from ham_jax import checkpoints, classes, console, models, parallel
from ham_jax import config as configuration
from ham_jax.config import InputError
from ham_jax.data import feed, metadata, splits
from ham_jax.data import prepare as preparation
from ham_jax.data.records import Subset
from ham_jax.evaluation import evaluate, leakage, metrics
from ham_jax.evaluation.predictions import Predictions
from ham_jax.model import Model, Variables, judged_weights
from ham_jax.models import pretrained
from ham_jax.training import distill, losses, optim, step, telemetry

_AHEAD = 2  # dispatches before the oldest must be ready: bounds the batches in memory
_STEPS_PER_DISPATCH = 8  # at most, where the number is not given


class Preempted(Exception):  # noqa: N818 - not an error: the run was asked to stop
    """The run was asked to stop; it saved its state and can be resumed.

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
        """A function of the step alone, so that a resumed run groups them alike."""
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
    """Trains, or resumes from `workdir`, and evaluates the best checkpoint.

    The order: what costs least to find wrong comes first. The network is built and its published
    weights are read before the data, which may take an hour to prepare; the data are checked
    against those weights before the optimiser is made; a run that is resumed is compared with
    data and split before anything is written into its folder. Then come the steps. At the end the
    best checkpoint, which need not be the last, is put back and evaluated.

    Args:
      config: a validated configuration.
      workdir: where everything is written; a folder of the same run is resumed.
      mesh: the devices, axis `data`.
      preemption: entered; asked after each step.

    Returns:
      The contents of metrics.json.

    Raises:
      Preempted: asked to stop; the state is saved.
      InputError: data or workdir do not fit the configuration.
      telemetry.NonFiniteLoss: training diverged; the last good checkpoint is kept.
    """
    if wrong := [*models.faults(config), *losses.faults(config), *optim.faults(config)]:
        raise InputError(wrong)
    checkpoints.check_run_config(workdir, config)
    with checkpoints.claimed(workdir):
        run, weights = _prepared(config, workdir, mesh)
        validation = _Validation(run)
        state = step.init_state(run.network, run.optimizer, config, mesh, weights)
        with checkpoints.Checkpoints(workdir, config.checkpoint.keep) as saved:
            state = _resumed(run, saved, state)
            _write_inputs(run)
            state = _trained(run, saved, state, validation, preemption)
            best = saved.best()
            assert best is not None, "the plan's last step is always saved"
            if best != int(state["step"]):
                state, _ = saved.restore(best, state, mesh)
        if best not in validation.probabilities:  # a run resumed after its best evaluation
            validation(state)
        return _evaluated(run, state, validation.probabilities[best])


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same from a run's first step to its evaluation.

    Attributes:
      config: a validated configuration.
      workdir: of the run.
      mesh: the devices, axis `data`.
      data: all photographs, with their split.
      images: those that train.
      val_images: those that validate.
      model: the network, without weights.
      optimizer: from `optim.make`.
      schedule: step -> learning rate.
      loss: from `losses.make_loss`.
      plan: the steps.
      teachers: see `distill`.
    """

    config: ml_collections.ConfigDict
    workdir: Path
    mesh: jax.sharding.Mesh
    data: preparation.Dataset
    images: Subset
    val_images: Subset
    model: Model
    optimizer: optim.Optimizer
    schedule: optim.Schedule
    loss: losses.Loss
    plan: Plan
    teachers: tuple[Model, ...]

    @property
    def network(self) -> models.Network:
        """The network's pure functions."""
        return self.model.forward.network

    @property
    def taught(self) -> tuple[Variables, ...]:
        """The teachers' weights."""
        return tuple(teacher.variables for teacher in self.teachers)

    @functools.cached_property
    def meta(self) -> dict[str, Any]:
        """What every checkpoint says of the run."""
        return {
            "config": configuration.to_dict(self.config),
            "classes": self.model.classes.to_json(),
            "records": self.data.records.fingerprint,
        }

    @functools.cached_property
    def train_step(self) -> Callable[[int], Callable]:
        """The compiled step by the side of its crops in pixels."""

        @functools.cache
        def of(crop_px: int):
            sized = self.config.copy_and_resolve_references()
            sized.augment.crop_px = crop_px
            return step.make_train_step(
                self.network, self.optimizer, self.loss, sized, self.mesh, self.teachers
            )

        return of


def _prepared(
    config: ml_collections.ConfigDict, workdir: Path, mesh: jax.sharding.Mesh
) -> tuple[Run, tuple[models.Tree, models.Tree] | None]:
    """Returns the run, and the weights that it starts from if they are published ones."""
    model = Model.of(workdir, config, classes.of_config(config.data), mesh)
    network, weights = model.forward.network, None
    if config.model.pretrained and not checkpoints.has_checkpoints(workdir):
        weights = _pretrained(network, config)
    teachers = distill.load(config, mesh)
    data = preparation.prepare(config)
    images, val_images = data.select("train"), data.select("val")
    if weights:
        leakage.refuse_trained_on(config.model.pretrained, data.held_out(), "model.pretrained")
    for teacher in teachers:
        leakage.refuse_trained_on(teacher.name, data.held_out(), "loss.teacher")
    if model.takes_metadata:
        metadata.warn_unknown(data.records.table)
    plan = Plan.of(config, len(images))
    schedule = optim.schedule(config.optim, plan.warmup_steps, plan.num_steps)
    params = jax.eval_shape(lambda: network.init(config.seed)[0])
    optimizer = optim.make(config.optim, schedule, params)
    counts = np.bincount(images.labels, minlength=len(model.classes))
    loss = losses.make_loss(config.loss, counts, model.classes.names)
    run = Run(
        config,
        workdir,
        mesh,
        data,
        images,
        val_images,
        model,
        optimizer,
        schedule,
        loss,
        plan,
        teachers,
    )
    return run, weights


def _resumed(run: Run, saved: checkpoints.Checkpoints, state: step.State) -> step.State:
    """Returns the state of the latest checkpoint; `state` where there is none.

    Raises:
      InputError: the run had other photographs or another split.
    """
    if saved.latest() is None:
        return state
    state, meta = saved.restore(None, state, run.mesh)
    records, workdir = run.data.records, run.workdir
    if meta["records"] != records.fingerprint:
        raise InputError(
            f"--workdir={workdir} was trained on other photographs than data.dir ="
            f" {run.config.data.dir!r} now holds; then its training and validation would mix. Give"
            " it the same ones, or choose another --workdir."
        )
    split_file = workdir / checkpoints.SPLIT
    num_changed = 0  # also for runs of an earlier version, which have no such file
    if split_file.exists():
        num_changed = splits.changed_split(split_file, records.table, run.data.split).sum()
    if num_changed:
        raise InputError(
            f"--workdir={workdir} was trained with {num_changed} images in another split than now:"
            f" its training and validation would mix. {split_file} says who was where; restore"
            " that split, or choose another --workdir."
        )
    return state


def _write_inputs(run: Run) -> None:
    """Writes what the run is made from: configuration, audit of the data, split."""
    checkpoints.write_run_config(run.workdir, run.config)
    if parallel.is_main():
        run.data.audit.write(run.workdir)
        table = run.data.records.table
        splits.write_csv(run.workdir / checkpoints.SPLIT, table, run.data.split)


def _trained(
    run: Run,
    saved: checkpoints.Checkpoints,
    state: step.State,
    validation: "_Validation",
    preemption: parallel.Preemption,
) -> step.State:
    """Returns the state after the plan's last step."""
    config, plan, images = run.config, run.plan, run.images
    start = int(state["step"])
    if start >= plan.num_steps:
        return state
    saved.check_space(state)
    if parallel.is_main():
        telemetry.write_start(run.workdir, start)
        _say_what(run, start)
    canvas = images.records.canvas
    kind = feed.choose(config.data.feed, len(images) * math.prod(canvas) * 3, run.mesh)
    calls = plan.calls(start, _most_steps_per_call(config, kind))
    codes = run.model.encode(images.records.table)
    batches = feed.batches(kind, images, _order(run), calls, run.mesh, codes)
    extent = telemetry.Extent(
        plan.num_steps,
        plan.steps_per_epoch,
        config.train.batch_size,
        _peak_images_per_s(run, state),
    )
    main = parallel.is_main()
    with telemetry.Telemetry(run.workdir, config.log, extent, start, main) as log:
        steps = _Steps(run, saved, validation, preemption, log)
        state = steps.take(state, calls, batches)
    saved.wait()
    return state


class _Steps:
    """The loop: step, log, evaluate, save, until the plan's end or a request to stop.

    Args:
      run: what is trained.
      saved: the run's checkpoints.
      validation: of a state.
      preemption: asked after each call.
      log: entered.
    """

    def __init__(
        self,
        run: Run,
        saved: checkpoints.Checkpoints,
        validation: "_Validation",
        preemption: parallel.Preemption,
        log: telemetry.Telemetry,
    ):
        self._run, self._saved, self._validation = run, saved, validation
        self._preemption, self._log = preemption, log
        self._unlogged: list[dict[str, jax.Array]] = []  # scalars of the steps since the last log
        self._ahead: collections.deque[jax.Array] = collections.deque()

    def take(
        self,
        state: step.State,
        calls: Sequence[range],
        batches: Iterator[step.Batch],
    ) -> step.State:
        """Returns the state after all calls, each of which has its batch.

        Raises:
          Preempted: asked to stop; the state is saved.
          telemetry.NonFiniteLoss: training diverged.
        """
        plan, every = self._run.plan, self._run.config.log.every_steps
        for steps in calls:
            before, done = steps.start, steps.stop
            self._log.profile(before)
            with self._log.waiting():
                batch = next(batches)
            take = self._run.train_step(plan.crop_px(before))
            state, scalars = take(state, batch, self._run.taught)
            self._unlogged.append(scalars)
            self._ahead.append(scalars["loss"])
            if len(self._ahead) > _AHEAD:
                self._ahead.popleft().block_until_ready()
            stop = self._preemption.reached()
            if done // every > before // every or plan.saves(done) or stop:
                self._flush(done)  # before a save: no checkpoint of a diverged run
            with self._log.elsewhere():
                numbers = self._validate(done, state) if plan.evaluates(done) else None
                if plan.saves(done) or stop:
                    self._saved.save(done, state, numbers, self._run.meta)
            if stop and done < plan.num_steps:
                raise Preempted(self._preemption.exit_code, f"step {done}")
        return state

    def _flush(self, done: int) -> None:
        """Fetches the scalars since the last time, checks them and logs their means."""
        if not self._unlogged:
            return
        fetched = jax.device_get(self._unlogged)
        self._unlogged.clear()
        each = {
            name: np.concatenate([np.atleast_1d(s[name]) for s in fetched])
            for name in ("loss", "accuracy", "grad_norm")
        }
        # A gradient that overflows ruins the weights before the loss shows it.
        sums = each["loss"] + each["grad_norm"]
        telemetry.check_finite(dict(enumerate(sums, done + 1 - len(sums))))
        means = {f"train/{name}": float(values.mean()) for name, values in each.items()}
        rate = float(self._run.schedule(done - 1))
        self._log.log(done, means | {"train/learning_rate": rate})

    def _validate(self, done: int, state: step.State) -> dict[str, float]:
        """Returns the figures of validation, and logs them."""
        numbers = {
            f"val/{name}": value
            for name, value in self._validation(state).items()
            if isinstance(value, float)
        }
        self._log.log(done, numbers)
        return numbers


class _Validation:
    """Evaluates states on the validation images.

    Attributes:
      probabilities: {step: float64 [n, C]} of the states evaluated so far by this process.
    """

    def __init__(self, run: Run):
        self._model, self._images = run.model, run.val_images
        self._codes = run.model.encode(run.val_images.table)
        self.probabilities: dict[int, np.ndarray] = {}

    def __call__(self, state: step.State) -> dict[str, Any]:
        """Returns the figures of `metrics.compute`."""
        step = int(state["step"])
        model = self._model.with_weights(state, step)
        raw = model.probabilities(self._images, self._codes, "Evaluating")
        self.probabilities[step] = raw
        return metrics.compute(Predictions.of(self._images, model.classes, raw))


def _evaluated(run: Run, state: step.State, probabilities: np.ndarray) -> dict[str, Any]:
    """Fits calibration and out-of-distribution model, and writes the figures of the best state.

    Args:
      run: what was trained.
      state: of the best checkpoint.
      probabilities: its validation's, float64 [n, C].

    Returns:
      The contents of metrics.json.
    """
    model, images = run.model.with_weights(state, int(state["step"])), run.val_images
    predictions = Predictions.of(images, model.classes, probabilities)
    calibrated, scores = evaluate.judge(model, run.data, images, predictions, "val", keeps=True)
    predictions = Predictions.of(images, model.classes, probabilities, scores)
    provenance = evaluate.provenance(model, images)
    return evaluate.report(run.workdir, "val", provenance, predictions, calibrated)


def _pretrained(
    network: models.Network, config: ml_collections.ConfigDict
) -> tuple[models.Tree, models.Tree]:
    """Returns the (params, batch_stats) that `model.pretrained` names, and says what they are."""
    params, batch_stats, report = pretrained.load(
        config.model.pretrained, *network.init(config.seed), config.model.name, _read_run
    )
    if parallel.is_main():
        console.log_line(report.text())
    return params, batch_stats


def _read_run(folder: Path) -> dict[str, np.ndarray]:
    """Returns the weights that a run was judged by, by path."""
    params, batch_stats, ema, meta, _ = checkpoints.load_for_inference(folder)
    state = {"params": params, "batch_stats": batch_stats, "ema": ema}
    return pretrained.flatten(judged_weights(state, meta["config"]["eval"]["weights"])[0])


def _most_steps_per_call(config: ml_collections.ConfigDict, feed: str) -> int:
    """Returns how many steps may be one program: the more, the less small steps wait for Python.

    One on CPU, where XLA runs convolutions in a rolled loop 12 to 28 times slower.
    """
    if feed != "resident" or (
        not config.train.steps_per_dispatch and jax.default_backend() == "cpu"
    ):
        return 1
    every = config.log.every_steps  # a divisor of it, so that logs do not cut a group
    auto = max(n for n in range(1, _STEPS_PER_DISPATCH + 1) if every % n == 0)
    return config.train.steps_per_dispatch or auto


def _peak_images_per_s(run: Run, state: step.State) -> float | None:
    """Returns images/s if every device did nothing but bfloat16 products at its peak.

    None where that is not known or, as the crops grow, not one number.
    """
    config = run.config
    peak = telemetry.peak_flops(run.mesh.devices.flat[0].device_kind)
    if peak is None or config.model.dtype == "float32" or config.augment.progressive:
        return None
    size = config.train.batch_size
    batch = {
        "image": jax.ShapeDtypeStruct((size, *run.images.records.canvas, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((size,), np.int32),
    }
    if config.model.metadata:
        batch["metadata"] = jax.ShapeDtypeStruct((size, metadata.NUM_METADATA), np.float32)
    take = run.train_step(config.augment.crop_px)
    flop = step.flop_per_image(take, state, batch, run.taught)
    return flop and run.mesh.devices.size * peak / flop


def _order(run: Run) -> feed.Order:
    config, images = run.config, run.images
    if losses.LOSSES[config.loss.imbalance].balances_batches:
        return feed.class_balanced(images.rows, images.labels, config.train.batch_size, config.seed)
    return feed.shuffled(images.rows, config.train.batch_size, config.seed)


def _say_what(run: Run, start: int) -> None:
    devices = f"{run.mesh.devices.size} x {run.mesh.devices.flat[0].device_kind}"
    console.log_line(
        f"{run.config.model.name} on {devices}: {len(run.images)} images train,"
        f" {len(run.val_images)} validate; steps {start} to {run.plan.num_steps},"
        f" {run.plan.steps_per_epoch:.1f} an epoch"
    )
