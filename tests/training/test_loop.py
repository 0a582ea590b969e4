"""A run can be stopped, resumed, moved to other devices and rebuilt, and stays the same run."""

import json

import jax
import numpy as np
import pytest

from ham_jax import checkpoints, config
from ham_jax.config import InputError
from ham_jax.evaluation import evaluate, metrics
from ham_jax.training import loop, telemetry


@pytest.fixture
def one_device():
    return jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))


@pytest.fixture
def tiny(tiny_records):
    """The smallest run that has everything: augmentation, momentum, an average of the weights."""
    c = config.base()
    c.data.dir = str(tiny_records)
    c.data.canvas = (24, 32)
    c.data.num_folds = 3
    c.data.feed = "resident"
    c.model.stem = "small"
    c.augment.crop_px = 16
    c.augment.mixup = 0.2
    c.augment.cutout = 0.2
    c.optim.ema_decay = 0.99
    c.optim.learning_rate = 0.01
    c.optim.warmup = {"steps": 1}
    c.train.batch_size = 8
    c.train.duration = {"steps": 5}
    c.eval.every = {"steps": 3}
    c.eval.batch_size = 64
    c.checkpoint.every = {"steps": 1}
    c.log.every_steps = 2
    c.log.tensorboard = False
    config.validate(c)
    return c


class StopAfter:
    """A request to stop, as SIGTERM would make it, after a given number of steps."""

    exit_code = 75

    def __init__(self, step=None):
        self.step = step

    def reached(self, step):
        return step == self.step


def final_state(workdir):
    params, batch_stats, ema, _, step = checkpoints.load_for_inference(workdir, which="latest")
    return step, jax.tree.leaves_with_path((params, batch_stats, ema))


def assert_same_state(a, b):
    assert a[0] == b[0]
    for (path, x), (_, y) in zip(a[1], b[1], strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def lines(workdir):
    """Returns metrics.jsonl without what a clock says."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k in ("step", "epoch") or k.startswith(("train/", "val/"))}
        for row in rows
    ]


def test_resume_is_bit_exact_and_so_are_both_feeds(tiny, one_device, tmp_path):
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    loop.train(tiny, unbroken, one_device, StopAfter())

    tiny.data.feed = "stream"
    with pytest.raises(loop.Preempted) as stopped:
        loop.train(tiny, resumed, one_device, StopAfter(2))
    assert stopped.value.exit_code == 75
    numbers = loop.train(tiny, resumed, one_device, StopAfter())

    assert_same_state(final_state(resumed), final_state(unbroken))
    assert lines(resumed) == lines(unbroken)
    assert numbers == json.loads((unbroken / "metrics.json").read_text())


def test_eval_rebuilds_the_run_from_its_folder_to_the_last_digit(tiny, one_device, tmp_path):
    loop.train(tiny, tmp_path, one_device, StopAfter())
    written = json.loads((tmp_path / "metrics.json").read_text())
    logged = {row["step"]: row for row in lines(tmp_path) if "val/balanced_accuracy" in row}
    best = max(logged.values(), key=lambda row: row["val/balanced_accuracy"])
    assert written["balanced_accuracy"] == best["val/balanced_accuracy"]
    assert written["log_loss"] == logged[written["step"]]["val/log_loss"]

    (tmp_path / "metrics.json").unlink()
    again = evaluate.run(tmp_path, "val", [], one_device)
    assert again == written == json.loads((tmp_path / "metrics.json").read_text())

    ids, _, labels, probabilities = metrics.read_predictions(tmp_path / "predictions.csv")
    assert len(set(ids)) == len(ids) == written["num_images"]
    recomputed = metrics.compute(labels, probabilities)
    assert recomputed["balanced_accuracy"] == written["balanced_accuracy"]
    assert recomputed["confusion_matrix"] == written["confusion_matrix"]

    with_views = evaluate.run(tmp_path, "val", [("eval.tta", "8")], one_device)
    assert with_views["tta"] == 8
    assert with_views["log_loss"] != written["log_loss"]

    with pytest.raises(InputError, match="cannot be set here"):
        evaluate.run(tmp_path, "val", [("augment.crop_px", "32")], one_device)
    with pytest.raises(InputError, match="no image in split 'test'"):
        evaluate.run(tmp_path, "test", [], one_device)


def test_a_diverged_run_names_the_step_and_keeps_the_last_good_checkpoint(
    tiny, one_device, tmp_path
):
    tiny.optim.learning_rate = 1e30
    tiny.optim.warmup = {"steps": 0}
    with pytest.raises(telemetry.NonFiniteLoss, match="step"):
        loop.train(tiny, tmp_path, one_device, StopAfter())
    step, leaves = final_state(tmp_path)
    assert 1 <= step < 5
    assert all(np.isfinite(x).all() for _, x in leaves)


def test_the_folder_of_another_run_is_refused(tiny, one_device, tmp_path):
    with pytest.raises(loop.Preempted):
        loop.train(tiny, tmp_path, one_device, StopAfter(1))
    tiny.optim.learning_rate = 0.02
    with pytest.raises(InputError, match=r"optim\.learning_rate"):
        loop.train(tiny, tmp_path, one_device, StopAfter())


def test_an_empty_folder_cannot_be_evaluated(one_device, tmp_path):
    with pytest.raises(InputError, match=str(tmp_path)):
        evaluate.run(tmp_path, "val", [], one_device)
