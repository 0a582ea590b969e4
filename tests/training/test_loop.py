"""A run can be stopped, resumed, moved to other devices and rebuilt, and stays the same run."""

import contextlib
import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from ham_jax import checkpoints, config, models
from ham_jax.config import InputError
from ham_jax.data import metadata
from ham_jax.evaluation import evaluate, metrics, predictions
from ham_jax.training import crossval, loop, losses, optim, step, telemetry


@pytest.fixture(scope="module")
def one_device():
    return jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))


@pytest.fixture
def tiny(tiny_records):
    """A small run of a network that compiles at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build", linear)
        yield tiny_of(tiny_records)


def tiny_of(tiny_records):
    """Returns the configuration: augmentation, momentum, an average of the weights."""
    c = config.base()
    c.data.dir = str(tiny_records)
    c.data.canvas = (24, 32)
    c.data.num_folds = 3
    c.data.feed = "resident"
    c.model.stem = "small"
    c.augment.crop_px = 16
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
        self.done = 0

    def reached(self):
        self.done += 1
        return self.done == self.step


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


@contextlib.contextmanager
def no_unasked_transfers():
    """Fails where a train step moves data between host and device that nobody put there."""
    make = step.make_train_step

    def guarded(*args):
        take = make(*args)

        def take_guarded(*given):
            with jax.transfer_guard("disallow"):
                return take(*given)

        return take_guarded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "make_train_step", guarded)
        yield


def train_resnet(c, workdir, mesh, stop_after):
    c.augment.mixup = 0.2  # not everywhere: its Beta draws compile for seconds
    with no_unasked_transfers():
        return loop.train(c, workdir, mesh, StopAfter(stop_after))


@pytest.fixture(scope="module")
def unbroken(tiny_records, small_resnet18, one_device, tmp_path_factory):
    """A run of a real network that nobody stopped; to be read only."""
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    train_resnet(tiny_of(tiny_records), workdir, one_device, None)
    return workdir


def test_resume_is_bit_exact_and_so_are_both_feeds(unbroken, tiny_records, one_device, tmp_path):
    c, resumed = tiny_of(tiny_records), tmp_path / "resumed"
    c.data.feed = "stream"
    with pytest.raises(loop.Preempted) as stopped:
        train_resnet(c, resumed, one_device, 2)
    assert stopped.value.exit_code == 75
    numbers = train_resnet(c, resumed, one_device, None)

    assert_same_state(final_state(resumed), final_state(unbroken))
    assert lines(resumed) == lines(unbroken)
    starts = [json.loads(line) for line in (resumed / "starts.jsonl").read_text().splitlines()]
    assert [start["step"] for start in starts] == [0, 2]
    assert starts[1]["devices"] == "8 x cpu"
    assert {"jax", "optax"} < starts[1]["packages"].keys()
    assert numbers == json.loads((unbroken / "metrics.json").read_text())


@pytest.mark.parametrize(("num_steps", "every", "most"), [(20, 6.5, 4), (20, 20, 8), (7, 3, 1)])
def test_the_steps_of_a_call_end_where_something_follows(num_steps, every, most):
    plan = loop.Plan(10.0, num_steps, 0, every, every, ((0, 16), (9, 24)))
    groups = plan.calls(0, most)
    assert [n for group in groups for n in group] == list(range(num_steps))
    assert max(map(len, groups)) == most
    for group in groups:
        assert len(group) in (1, most)
        assert not any(plan.saves(done) for done in range(group.start + 1, group.stop))
        assert len({plan.crop_px(step) for step in group}) == 1


def test_crops_grow_at_the_shares_of_the_run(tiny):
    tiny.train.duration = {"steps": 10}
    assert loop.Plan.of(tiny, 80).sizes == ((0, 16),)
    tiny.augment.crop_px, tiny.augment.progressive = 32, ((0.3, 16), (0.5, 24))
    plan = loop.Plan.of(tiny, 80)
    assert [plan.crop_px(step) for step in range(10)] == [16] * 3 + [24] * 2 + [32] * 5


def linear(config, num_classes, num_metadata=0):
    """A network so small that a rolled loop of it is no burden on CPU."""

    def classify(params, batch_stats, features, metadata=None):
        if num_metadata:
            features = jnp.concatenate([features, metadata], axis=-1)
        return features @ params["head"]["kernel"]

    def apply(params, batch_stats, image, train, key=None, metadata=None):
        return classify(params, batch_stats, image.mean((1, 2)), metadata), batch_stats

    num_features = 3 + num_metadata
    kernel = np.linspace(-1, 1, num_features * num_classes, dtype=np.float32)
    params = {"head": {"kernel": jnp.asarray(kernel.reshape(num_features, num_classes))}}

    def features(params, batch_stats, image):
        return image.mean((1, 2))

    return models.Network("linear", lambda seed: (params, {}), apply, features, None, classify)


def test_steps_of_one_call_are_the_same_steps(tiny, one_device, tmp_path):
    tiny.model.metadata = True
    tiny.augment.crop_px, tiny.augment.progressive = 24, ((0.8, 16),)
    tiny.checkpoint.every = tiny.eval.every = {"steps": 5}
    one, three = tmp_path / "one", tmp_path / "three"
    loop.train(tiny, one, one_device, StopAfter())
    tiny.train.steps_per_dispatch = 3
    loop.train(tiny, three, one_device, StopAfter())
    for (path, a), (_, b) in zip(final_state(one)[1], final_state(three)[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6, err_msg=jax.tree_util.keystr(path))
    assert [row["step"] for row in lines(one)] == [2, 4, 5, 5]
    assert [row["step"] for row in lines(three)] == [3, 4, 5, 5]


def test_metadata_draw_with_a_key_of_their_own_in_each_part_of_a_batch(tiny, one_device):
    """Beside a network that ignores them, nothing changes; one that takes them sees each row's."""
    tiny.augment.update(strength=0.0, dihedral=False)  # compiles sooner
    batch = {
        "image": np.random.default_rng(0).integers(0, 256, (8, 24, 32, 3), np.uint8),
        "label": np.arange(8, dtype=np.int32) % 7,
    }
    codes = metadata.encode(pd.DataFrame({"age": np.arange(5.0, 85, 10), "sex": ["male"] * 8}))

    def after_a_step(batch, num_metadata, dropout=0.5, parts=1):
        tiny.model.metadata_dropout, tiny.train.accumulate = dropout, parts
        net = linear(tiny.model, 7, num_metadata)
        optimizer = optim.make(tiny.optim, lambda _: 0.1, net.init(0)[0])
        take = step.make_train_step(
            net,
            optimizer,
            losses.make_loss(tiny.loss, np.ones(7), tiny.data.classes),
            tiny,
            one_device,
        )
        state, _ = take(step.init_state(net, optimizer, tiny, one_device), batch)
        return np.asarray(state["params"]["head"]["kernel"])

    np.testing.assert_array_equal(
        after_a_step(batch, 0), after_a_step(batch | {"metadata": codes}, 0)
    )
    batch["metadata"] = codes
    whole = after_a_step(batch, metadata.NUM_METADATA)
    in_parts = after_a_step(batch, metadata.NUM_METADATA, parts=2)
    np.testing.assert_allclose(in_parts, whole, rtol=0, atol=1e-6)
    assert np.abs(whole - after_a_step(batch, metadata.NUM_METADATA, dropout=0.0)).max() > 1e-3


def test_eval_rebuilds_the_run_from_its_folder_to_the_last_digit(unbroken, one_device, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    written = json.loads((run / "metrics.json").read_text())
    logged = {row["step"]: row for row in lines(run) if "val/balanced_accuracy" in row}
    best = max(logged.values(), key=lambda row: row["val/balanced_accuracy"])
    assert written["balanced_accuracy"] == best["val/balanced_accuracy"]
    assert written["log_loss"] == logged[written["step"]]["val/log_loss"]

    (run / "metrics.json").unlink()
    again = evaluate.run([run], "val", [], one_device)
    assert again == written == json.loads((run / "metrics.json").read_text())

    judged = predictions.read(run / "predictions.csv")
    assert len(set(judged.image_ids)) == len(judged) == written["num_images"]
    recomputed = metrics.compute(judged)
    assert recomputed["balanced_accuracy"] == written["balanced_accuracy"]
    assert recomputed["confusion_matrix"] == written["confusion_matrix"]

    with_views = evaluate.run([run], "val", [("eval.tta", "8")], one_device)
    assert with_views["tta"] == 8
    assert with_views["log_loss"] != written["log_loss"]

    with pytest.raises(InputError, match="cannot be set here"):
        evaluate.run([run], "val", [("augment.crop_px", "32")], one_device)
    with pytest.raises(InputError, match="no image in split 'test'"):
        evaluate.run([run], "test", [], one_device)


@pytest.mark.usefixtures("small_resnet18")
def test_a_diverged_run_names_the_step_and_keeps_the_last_good_checkpoint(
    tiny_records, one_device, tmp_path
):
    c = tiny_of(tiny_records)
    c.optim.learning_rate = 1e30
    c.optim.warmup = {"steps": 0}
    with pytest.raises(telemetry.NonFiniteLoss, match="step"):
        loop.train(c, tmp_path, one_device, StopAfter())
    last, leaves = final_state(tmp_path)
    assert 1 <= last < 5
    assert all(np.isfinite(x).all() for _, x in leaves)


def test_a_run_starts_from_the_weights_of_another(tiny, one_device, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    tiny.train.duration = {"steps": 2}
    loop.train(tiny, first, one_device, StopAfter())
    *_, ema, _, _ = checkpoints.load_for_inference(first)

    tiny.model.pretrained = str(first)
    tiny.optim.learning_rate = 0.0
    loop.train(tiny, second, one_device, StopAfter())
    params, _, ema_of_second, _, _ = checkpoints.load_for_inference(second)
    jax.tree.map(np.testing.assert_array_equal, params, ema["params"])
    jax.tree.map(np.testing.assert_allclose, ema_of_second["params"], ema["params"])
    assert f"weights: {first}" in capsys.readouterr().err

    first.rename(tmp_path / "elsewhere")  # a run that is taken up again does not need it
    loop.train(tiny, second, one_device, StopAfter())
    tiny.data.dir = str(tmp_path / "no data")
    with pytest.raises(InputError, match=r"model.pretrained = .*no such file"):
        loop.train(tiny, tmp_path / "third", one_device, StopAfter())


def test_the_folder_of_another_run_is_refused(tiny, one_device, tmp_path):
    with pytest.raises(loop.Preempted):
        loop.train(tiny, tmp_path, one_device, StopAfter(1))
    tiny.optim.learning_rate = 0.02
    with pytest.raises(InputError, match=r"optim\.learning_rate"):
        loop.train(tiny, tmp_path, one_device, StopAfter())


def test_a_folder_that_another_job_trains_in_is_refused(tiny, one_device, tmp_path):
    for train in (loop.train, crossval.train):
        with checkpoints.claimed(tmp_path), pytest.raises(InputError, match="is in use: process"):
            train(tiny, tmp_path, one_device, StopAfter())
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    with pytest.raises(InputError), checkpoints.claimed(tmp_path / "new"):
        raise InputError("nothing is left of a run that was refused")
    assert not (tmp_path / "new").exists()


def test_other_photographs_than_before_are_refused(tiny, one_device, tmp_path, monkeypatch):
    with pytest.raises(loop.Preempted):
        loop.train(tiny, tmp_path, one_device, StopAfter(1))
    prepare, config_file = loop.preparation.prepare, tmp_path / "config.json"
    before = config_file.read_text()

    def prepare_others(config):
        data = prepare(config)
        records = dataclasses.replace(data.records, fingerprint="of other photographs")
        return dataclasses.replace(data, records=records)

    monkeypatch.setattr(loop.preparation, "prepare", prepare_others)
    tiny.log.every_steps = 1
    with pytest.raises(InputError, match="trained on other photographs"):
        loop.train(tiny, tmp_path, one_device, StopAfter())
    assert config_file.read_text() == before


def test_a_run_that_trained_on_what_validates_lends_no_weights(tiny, one_device, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    tiny.train.duration = {"steps": 2}
    loop.train(tiny, first, one_device, StopAfter())
    tiny.model.pretrained = str(first)
    tiny.data.fold = 1
    with pytest.raises(InputError, match=r"inflated by leakage.*split\.csv"):
        loop.train(tiny, second, one_device, StopAfter())
    split = pd.read_csv(first / "split.csv")
    num_val = len(pd.read_csv(first / "predictions.csv"))
    assert (split["split"] == "val").sum() == num_val
    assert not second.exists()

    tiny.data.split_csv = str(first / "split.csv")
    loop.train(tiny, second, one_device, StopAfter())
    ids = [pd.read_csv(folder / "predictions.csv")["image_id"] for folder in (first, second)]
    pd.testing.assert_series_equal(*ids)

    # What the first one trained on can be no test either, but for one lesion that trains on.
    again = split["lesion_id"] == split["lesion_id"][split["split"] == "train"].iloc[0]
    tested = (split["split"] == "train") & ~again
    mixed = split.assign(split=split["split"].mask(tested, "test"))
    mixed.to_csv(tmp_path / "mixed.csv", index=False)
    tiny.data.split_csv = str(tmp_path / "mixed.csv")
    with pytest.raises(InputError, match="inflated by leakage"):
        loop.train(tiny, tmp_path / "third", one_device, StopAfter())


def test_a_split_that_changed_meanwhile_is_refused(tiny, one_device, tmp_path):
    run = tmp_path / "run"
    tiny.train.duration = {"steps": 2}
    loop.train(tiny, tmp_path / "other", one_device, StopAfter())
    given = tmp_path / "mine.csv"
    shutil.copy(tmp_path / "other" / "split.csv", given)
    tiny.data.split_csv = str(given)
    loop.train(tiny, run, one_device, StopAfter())
    split = pd.read_csv(given)
    kept = [(run / name).read_bytes() for name in ("split.csv", "calibration.json")]
    swapped = split["split"].map({"train": "val", "val": "train"})
    split.assign(split=swapped).to_csv(given, index=False)
    with pytest.raises(InputError, match=f"{len(split)} images in another split"):
        loop.train(tiny, run, one_device, StopAfter())
    with pytest.raises(InputError, match="inflated by leakage"):
        evaluate.run([run], "val", [], one_device)
    assert kept == [(run / name).read_bytes() for name in ("split.csv", "calibration.json")]


def test_the_weights_that_a_run_was_judged_by_are_lent(tiny, one_device, tmp_path):
    first = tmp_path / "first"
    tiny.train.duration = {"steps": 2}
    tiny.eval.weights = "raw"
    loop.train(tiny, first, one_device, StopAfter())
    params, _, ema, _, _ = checkpoints.load_for_inference(first)
    lent = loop._read_run(first)
    kernels = [tree["head"]["kernel"] for tree in (params, ema["params"])]
    np.testing.assert_array_equal(lent["params/head/kernel"], kernels[0])
    assert not np.array_equal(*kernels)


def test_an_empty_folder_cannot_be_evaluated(one_device, tmp_path):
    with pytest.raises(InputError, match=str(tmp_path)):
        evaluate.run([tmp_path], "val", [], one_device)
