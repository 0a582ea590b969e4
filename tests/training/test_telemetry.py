"""A run's log says the truth about the run, also after a crash, and others can read it."""

import io
import json
import struct

import jax
import jax.numpy as jnp
import pytest
import rich.console
from absl import logging
from tensorboardX.proto import event_pb2

from ham_jax import config, console
from ham_jax.training import telemetry


class Clock:
    """A clock that goes on only when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def shown(monkeypatch):
    """The lines shown."""
    texts = []
    monkeypatch.setattr(console, "log_line", texts.append)
    return texts


def make(workdir, start_step=0, clock=None, is_main=True, num_steps=100, **keys):
    c = config.base().log
    c.update({"tensorboard": False} | keys)
    extent = telemetry.Extent(num_steps, 8.0, 4)
    return telemetry.Telemetry(workdir, c, extent, start_step, is_main, clock or Clock())


def rows(workdir):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (workdir / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def events(workdir):
    """Yields the events of each file, oldest file first, read by the format's own rules."""
    for file in sorted((workdir / "tensorboard").iterdir()):
        data, found = file.read_bytes(), []
        while data:  # length uint64, its checksum uint32, content, its checksum uint32
            (size,) = struct.unpack("<Q", data[:8])
            found.append(event_pb2.Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
        yield found


def test_share_of_the_peak_is_logged_where_the_peak_is_known(tmp_path, shown):
    clock = Clock()
    c = config.base().log
    c.tensorboard = False
    extent = telemetry.Extent(100, 8.0, 4, peak_images_per_s=160.0)
    with telemetry.Telemetry(tmp_path, c, extent, 0, True, clock) as log:
        clock.now += 1
        log.log(10, {"train/loss": 2.0})  # 40 images/s
    assert rows(tmp_path)[0]["perf/mfu"] == pytest.approx(0.25)
    assert "MFU 25.0%" in shown[0]
    assert telemetry.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert telemetry.peak_flops("cpu") is None


def test_speed_and_wait_and_eta_by_a_clock(tmp_path, shown):
    clock = Clock()
    with make(tmp_path, 0, clock) as log:
        clock.now += 60  # compiles
        log.log(10, {"train/loss": 2.0})
        clock.now += 6
        with log.waiting():
            clock.now += 2
        with log.elsewhere():
            clock.now += 12
        log.log(30, {"train/loss": 1.0, "train/learning_rate": 0.05})
        with log.elsewhere():
            clock.now += 1000
            log.log(30, {"val/balanced_accuracy": 0.5, "val/log_loss": 1.5})
        clock.now += 5
        log.log(40, {"train/loss": 0.5})
    first, second, val, last = rows(tmp_path)
    assert first["perf/images_per_s"] == pytest.approx(40 / 60)
    assert second["perf/images_per_s"] == pytest.approx(80 / 8)
    assert second["perf/wait_share"] == pytest.approx(2 / 8)
    assert (second["step"], second["epoch"], second["train/loss"]) == (30, 3.75, 1.0)
    assert set(val) == {"step", "epoch", "time", "val/balanced_accuracy", "val/log_loss"}
    assert last["perf/images_per_s"] == pytest.approx(40 / 5)
    assert last["perf/wait_share"] == 0
    # Compiling does not come again, evaluating does: 20 s for 20 steps, so 70 s for 70.
    assert shown[1] == (
        "step 30/100  epoch 3.75  loss 1.0000  lr 5.00e-02  10 images/s  waiting 25.0%  ETA 0:01:10"
    )
    assert shown[2] == "step 30/100  epoch 3.75  val balanced accuracy 0.5000  val log loss 1.5000"
    assert shown[3].endswith("ETA 0:34:10")  # 1025 s for 30 steps, so 2050 s for 60


@pytest.mark.parametrize("last_line", ['{"step": 3, "ep', '{"step": 3}'])
def test_a_resumed_file_is_that_of_an_unbroken_run(tmp_path, last_line):
    def run(workdir, first, last, start_step):
        with make(workdir, start_step) as log:
            for step in range(first, last + 1):
                log.log(step, {"train/loss": 1 / step})

    run(tmp_path / "unbroken", 1, 9, 0)
    broken = tmp_path / "broken"
    run(broken, 1, 7, 0)
    with (broken / "metrics.jsonl").open("a") as file:
        file.write(
            last_line
        )  # killed here, before the line's end; the last checkpoint is of step 5
    run(broken, 6, 9, 5)

    def timeless(workdir):
        return [row | {"time": 0} for row in rows(workdir)]

    assert timeless(broken) == timeless(tmp_path / "unbroken")
    assert [file.name for file in broken.iterdir()] == ["metrics.jsonl"]


def test_a_damaged_line_is_dropped_with_a_warning(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda form, *values: warnings.append(form % values))
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1}\n\0\0\n[1]\n' + '{"step":' * 100_000 + '\n{"step": 2}\n'
    )
    telemetry.drop_after(tmp_path / "metrics.jsonl", 2)
    assert rows(tmp_path) == [{"step": 1}, {"step": 2}]
    assert [text.split("jsonl: ")[1][:6] for text in warnings] == ["line 2", "line 3", "line 4"]


def test_lines_are_on_disk_at_once_and_strict_json(tmp_path):
    with make(tmp_path) as log:
        log.log(1, {"val/auc": float("nan"), "val/log_loss": jnp.float32(jnp.inf)})
        (row,) = rows(tmp_path)
    assert (row["val/auc"], row["val/log_loss"]) == (None, None)


def test_tensorboard_reads_the_events_and_hides_what_a_crash_left(tmp_path):
    with make(tmp_path, 0, tensorboard=True) as log:
        log.log(1, {"train/loss": 2.0})
        log.log(2, {"train/loss": 1.0})
    with make(tmp_path, 1, tensorboard=True) as log:  # in the same second
        log.log(2, {"train/loss": 0.5})
    first, second = (
        [
            (event.step, value.tag, value.simple_value)
            for event in file
            for value in event.summary.value
        ]
        for file in events(tmp_path)
    )
    assert first == [(1, "train/loss", 2.0), (2, "train/loss", 1.0)]
    assert second == [(2, "train/loss", 0.5)]
    _, second = events(tmp_path)
    starts = [e.step for e in second if e.session_log.status == event_pb2.SessionLog.START]
    assert starts == [2]  # TensorBoard drops what the first file has from here on


def test_only_the_main_process_tells(tmp_path, shown):
    with make(tmp_path / "run", is_main=False, tensorboard=True, profile=(0, 1)) as log:
        log.profile(0)
        with log.waiting(), log.elsewhere():
            log.log(1, {"train/loss": 1.0})
    assert not (tmp_path / "run").exists()
    assert shown == []


@pytest.mark.parametrize("stop", [2, 99])
def test_a_trace_is_written_also_where_the_run_ends_in_it(tmp_path, stop):
    double = jax.jit(lambda x: x * 2)
    with make(tmp_path, profile=(1, stop)) as log:
        for step in range(3):
            log.profile(step)
            double(jnp.ones(3)).block_until_ready()
            assert log._is_tracing == (1 <= step < stop)
    (trace,) = tmp_path.glob("profile/**/*.xplane.pb")
    assert trace.stat().st_size > 0


def test_a_diverged_loss_names_its_steps():
    telemetry.check_finite({1: 0.5, 2: 3.0})
    with pytest.raises(telemetry.NonFiniteLoss, match=r"at step 3\.") as stopped:
        telemetry.check_finite({2: 1.0, 3: float("nan")})
    assert "optim.learning_rate" in str(stopped.value)
    with pytest.raises(FloatingPointError, match="steps 3 to 5"):
        telemetry.check_finite({3: float("inf"), 4: float("nan"), 5: float("nan")})


def test_without_a_terminal_progress_is_a_line_every_ten_seconds(shown, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(console.time, "monotonic", clock)
    with console.progress("Preparing") as progress:
        for done in range(25):
            progress(done, 25)
            clock.now += 1
    assert shown == ["Preparing: 10 of 25", "Preparing: 20 of 25"]


def test_lines_stand_above_a_live_bar(tmp_path, monkeypatch):
    screen = io.StringIO()
    terminal = rich.console.Console(file=screen, force_terminal=True, width=120, highlight=False)
    monkeypatch.setattr(console, "console", terminal)
    with make(tmp_path, num_steps=10) as log:
        for step in range(3):
            log.profile(step)
            log.log(step + 1, {"train/loss": 1.0})
            with log.elsewhere(), console.progress("Evaluating") as progress:
                progress(1, 2)
    text = screen.getvalue()
    assert "Training" in text
    assert "Evaluating" in text
    for step in (1, 2, 3):  # a line of its own, from the first column, the bar having been erased
        assert f"\x1b[2Kstep {step}/10  epoch" in text
