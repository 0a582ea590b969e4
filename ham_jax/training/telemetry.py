"""What a training run tells: starts and metrics as JSON lines, TensorBoard, log lines, a trace."""

import contextlib
import dataclasses
import datetime
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

import jax
import ml_collections
from absl import logging

from ham_jax import console, files, reading

_MAX_LOG_BYTES = 1 << 30  # of a metrics.jsonl: a hundred times a long run's

# What a log line shows of the scalars, in this order.
_SHOWN = {
    "train/loss": "loss {:.4f}",
    "train/learning_rate": "lr {:.2e}",
    "val/balanced_accuracy": "val balanced accuracy {:.4f}",
    "val/log_loss": "val log loss {:.4f}",
    "perf/images_per_s": "{:.0f} images/s",
    "perf/mfu": "MFU {:.1%}",
    "perf/wait_share": "waiting {:.1%}",
}

# Whose versions starts.jsonl names.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow")

# Dense bfloat16 FLOP/s of one device as JAX names it, from the makers' data sheets; the first
# name that begins the device's counts.
_PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "TPU v6 lite": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Returns the dense bfloat16 FLOP/s of a device, None where it is not known."""
    return next((peak for kind, peak in _PEAK_FLOPS.items() if device_kind.startswith(kind)), None)


def write_start(workdir: Path, step: int) -> None:
    """Adds to starts.jsonl what this process runs with, beside the configuration.

    Args:
      workdir: of the run.
      step: that it starts at.
    """
    devices = jax.devices()
    start = {
        "step": step,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "code": _code_version(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
    }
    with (workdir / "starts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(start, ensure_ascii=False) + "\n")


def _code_version() -> str | None:
    """Returns the commit of this code, `-dirty` where it was edited; None outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


class NonFiniteLoss(FloatingPointError):  # noqa: N818 - says what it is
    """The loss is not finite: training has diverged."""


def check_finite(losses: Mapping[int, float]) -> None:
    """Raises NonFiniteLoss where a loss is nan or infinite.

    Args:
      losses: {step: loss}.
    """
    bad = [step for step, loss in losses.items() if not math.isfinite(loss)]
    if bad:
        steps = f"step {bad[0]}" if len(bad) == 1 else f"steps {bad[0]} to {bad[-1]}"
        raise NonFiniteLoss(
            f"The loss or its gradient is not finite at {steps}. The last good checkpoint is kept."
            " Lower optim.learning_rate, lengthen optim.warmup, set optim.clip_norm=1 or use"
            " model.dtype=float32."
        )


@dataclasses.dataclass(frozen=True)
class Extent:
    """How large a run is, as far as its log needs to know.

    Attributes:
      num_steps: of the whole run.
      steps_per_epoch: may be fractional.
      batch_size: images a step over all devices.
      peak_images_per_s: what the devices would do at their peak FLOP/s, if that is known; the log
        then has `perf/mfu`, the share of it that is reached (Chowdhery et al., PaLM, 2022).
    """

    num_steps: int
    steps_per_epoch: float
    batch_size: int
    peak_images_per_s: float | None = None


class Telemetry:
    """Tells what a training run does, on the main process only; the others' calls do nothing.

    Steps count from 1 when they are done. Speeds are measured between two logs with different
    steps, over time that was not spent `elsewhere()`.

    Args:
      workdir: gets metrics.jsonl, tensorboard/ and profile/.
      log_config: the section `log`.
      extent: of the run.
      start_step: steps done before; what an earlier run logged after it is dropped.
      is_main_process: whether this process is the one that tells.
      clock: returns seconds.
    """

    def __init__(
        self,
        workdir: Path,
        log_config: ml_collections.ConfigDict,
        extent: Extent,
        start_step: int,
        is_main_process: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._workdir = Path(workdir)
        self._config = log_config
        self._extent = extent
        self._start_step = start_step
        self._is_main = is_main_process
        self._clock = clock
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> "Telemetry":
        self._waited_s = self._away_s = 0.0  # since the log before
        self._logged = self._origin = (self._start_step, self._clock())  # step, when
        self._is_tracing = False
        self._bar = None
        if not self._is_main:
            return self
        self._workdir.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as opened:  # closes what is open if the next fails
            path = self._workdir / "metrics.jsonl"
            drop_after(path, self._start_step)
            self._lines = opened.enter_context(path.open("a", encoding="utf-8"))
            self._events = opened.enter_context(self._open_events())
            if console.is_terminal():
                self._bar = opened.enter_context(console.progress("Training"))
            self._closing = opened.pop_all()
        return self

    def __exit__(self, *exception) -> None:
        with self._closing:
            if self._is_tracing:
                self._trace(False)

    def _open_events(self):
        if not self._config.tensorboard:
            return contextlib.nullcontext()
        import tensorboardX  # late: slow to import, and not everybody wants it

        return tensorboardX.SummaryWriter(
            str(self._workdir / "tensorboard"),
            purge_step=self._start_step + 1,
            # Names have a resolution of one second, and an equal name would be overwritten.
            filename_suffix=f".{self._start_step}",
        )

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars of a step that is done, and shows the most telling ones.

        Adds `epoch`, `time` (seconds since 1970), and where the step is another one than in the
        log before, `perf/images_per_s` and `perf/wait_share`. JSON has no nan: it becomes null.

        Args:
          step: steps done.
          scalars: {"split/name": value}.
        """
        if not self._is_main:
            return
        now = self._clock()
        scalars = {name: float(value) for name, value in scalars.items()} | self._speed(step, now)
        row = {
            "step": step,
            "epoch": round(step / self._extent.steps_per_epoch, 4),
            "time": round(time.time(), 3),
        } | {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._lines.write(json.dumps(row, allow_nan=False) + "\n")
        self._lines.flush()
        if self._events:
            for name, value in scalars.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()
        shown = [form.format(scalars[name]) for name, form in _SHOWN.items() if name in scalars]
        if "perf/images_per_s" in scalars:
            shown.append(f"ETA {self._eta(step, now)}")
            if self._logged[0] == self._start_step:
                self._origin = (step, now)  # the first steps were also compiled
            self._logged, self._waited_s, self._away_s = (step, now), 0.0, 0.0
        where = [f"step {step}/{self._extent.num_steps}", f"epoch {row['epoch']:.2f}"]
        console.log_line("  ".join(where + shown))

    def _speed(self, step: int, now: float) -> dict[str, float]:
        last_step, then = self._logged
        busy_s = now - then - self._away_s
        if step == last_step or busy_s <= 0:
            return {}
        images_per_s = (step - last_step) * self._extent.batch_size / busy_s
        speed = {"perf/images_per_s": images_per_s, "perf/wait_share": self._waited_s / busy_s}
        if self._extent.peak_images_per_s:
            speed["perf/mfu"] = images_per_s / self._extent.peak_images_per_s
        return speed

    def _eta(self, step: int, now: float) -> datetime.timedelta:
        """Returns the time left, with evaluations and saves as frequent as so far."""
        first, then = self._origin
        left_s = (now - then) / max(step - first, 1) * (self._extent.num_steps - step)
        return datetime.timedelta(seconds=round(left_s))

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as time waited for data."""
        start = self._clock()
        try:
            yield
        finally:
            self._waited_s += self._clock() - start

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Leaves the time inside (evaluating, saving) out of the images/s."""
        start = self._clock()
        try:
            yield
        finally:
            self._away_s += self._clock() - start

    def profile(self, step: int) -> None:
        """Before each step: moves the bar, and starts or ends the trace where that is due.

        Args:
          step: steps done; `log.profile` = (start, stop) traces from the one to the other.
        """
        if not self._is_main:
            return
        if self._bar:
            self._bar(step, self._extent.num_steps)
        if self._config.profile:
            first, stop = self._config.profile
            if self._is_tracing != (first <= step < stop):
                self._trace(not self._is_tracing)

    def _trace(self, on: bool) -> None:
        if on:
            jax.profiler.start_trace(str(self._workdir / "profile"))
        else:
            jax.profiler.stop_trace()
            console.log_line(f"Trace written to {self._workdir / 'profile'}")
        self._is_tracing = on


def drop_after(path: Path, last_step: int) -> None:
    """Drops from a metrics.jsonl what was logged after a step, and a half-written last line.

    The file is replaced as a whole. Another line that is not JSON is dropped with a warning.
    """
    if not path.exists():
        return
    text = reading.read_bytes(path, _MAX_LOG_BYTES).decode(errors="replace")
    lines = text.splitlines(keepends=True)
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            if json.loads(line)["step"] <= last_step and line.endswith("\n"):
                kept.append(line)
        except (ValueError, TypeError, KeyError, RecursionError):
            if number < len(lines):
                logging.warning("%s: line %d is not the record of a step; dropped", path, number)
    if len(kept) < len(lines):
        files.write_text(path, "".join(kept))
