"""Both feeds, on any number of devices and processes, bring the same images in the same order."""

import os
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from ham_jax import parallel
from ham_jax.config import InputError
from ham_jax.data import feed
from ham_jax.data.records import Subset, open_records

ROWS = np.arange(100, 137)


def test_each_epoch_shows_each_image_once_and_in_a_new_order():
    order = feed.shuffled(ROWS, 8, seed=3)
    drawn = np.concatenate([order(step) for step in range(37)])  # 8 epochs of 37 images
    epochs = drawn.reshape(8, 37)
    assert all(sorted(epoch) == ROWS.tolist() for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 8
    assert not np.array_equal(drawn[:8], feed.shuffled(ROWS, 8, seed=4)(0))


def test_the_order_is_a_function_of_the_step_alone():
    order = feed.shuffled(ROWS, 8, seed=3)
    backwards = [order(step) for step in reversed(range(20))][::-1]
    fresh = feed.shuffled(ROWS, 8, seed=3)
    np.testing.assert_array_equal(backwards, [fresh(step) for step in range(20)])


def test_class_balanced_draws_classes_evenly_and_images_of_their_class():
    labels = np.repeat([0, 4, 5], [2, 5, 30])
    order = feed.class_balanced(ROWS, labels, 64, seed=0)
    drawn = np.concatenate([order(step) for step in range(100)])
    classes = labels[drawn - 100]
    counts = np.array([(classes == c).sum() for c in (0, 4, 5)])
    # Binomial(6400, 1/3) has a deviation of 38.
    assert np.abs(counts - 6400 / 3).max() < 5 * 38
    assert set(drawn) == set(ROWS)
    np.testing.assert_array_equal(order(7), feed.class_balanced(ROWS, labels, 64, seed=0)(7))


@pytest.fixture(scope="module")
def records(tiny_records):
    return open_records(tiny_records)


def single(steps):
    """Each step is a call of its own."""
    return [range(step, step + 1) for step in steps]


def test_stream_and_resident_bring_the_same_pixels_and_labels(records):
    rows = np.arange(0, len(records.table), 2)
    order = feed.shuffled(rows, 16, seed=1)
    mesh = parallel.mesh()
    steps = range(3, 6)
    streamed = list(feed.batches("stream", Subset(records, rows), order, single(steps), mesh))
    resident = list(feed.batches("resident", Subset(records, rows), order, single(steps), mesh))
    for step, a, b in zip(steps, streamed, resident, strict=True):
        truth = records.read(order(step))
        np.testing.assert_array_equal(a["image"], truth)
        np.testing.assert_array_equal(b["image"], truth)
        labels = records.table["label"].to_numpy()[order(step)]
        np.testing.assert_array_equal(a["label"], labels)
        np.testing.assert_array_equal(b["label"], labels)
        assert a["image"].sharding == b["image"].sharding


@pytest.mark.parametrize("kind", ["stream", "resident"])
def test_damaged_records_are_named_by_either_feed(kind, tiny_records, tmp_path):
    folder = shutil.copytree(tiny_records, tmp_path / "records")
    (path,) = folder.glob("*.array_record*")
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    records = open_records(folder)
    rows = np.arange(len(records.table))
    order, mesh = feed.shuffled(rows, 8, 0), parallel.mesh()
    with pytest.raises(InputError, match="records are damaged"):
        list(feed.batches(kind, Subset(records, rows), order, single(range(len(rows) // 8)), mesh))


def test_steps_that_go_together_are_stacked(records):
    rows = np.arange(len(records.table))
    order = feed.shuffled(rows, 8, seed=2)
    calls = [range(1), range(1, 4), range(4, 5)]
    batches = feed.batches("resident", Subset(records, rows), order, calls, parallel.mesh())
    labels = records.table["label"].to_numpy()
    for steps, batch in zip(calls, batches, strict=True):
        count = len(steps)
        numbers = np.stack([order(n) for n in steps])
        numbers = numbers if count > 1 else numbers[0]
        np.testing.assert_array_equal(batch["label"], labels[numbers])
        np.testing.assert_array_equal(
            batch["image"], records.read(numbers.ravel()).reshape(*numbers.shape, 24, 32, 3)
        )
        for array in batch.values():
            assert array.sharding.spec[count > 1] == "data"


def test_sequential_shows_each_row_once_and_pads_the_last_batch(records):
    rows = np.arange(5, 42)
    known = np.random.default_rng(0).normal(size=(len(rows), 3)).astype(np.float32)
    for beside in (None, {"metadata": known}):
        seen = [
            {name: np.asarray(array)[:count] for name, array in batch.items()}
            for batch, count in feed.sequential(Subset(records, rows), 16, parallel.mesh(), beside)
        ]
        assert [len(part["image"]) for part in seen] == [16, 16, 5]
        whole = {name: np.concatenate([part[name] for part in seen]) for name in seen[0]}
        np.testing.assert_array_equal(whole.pop("image"), records.read(rows))
        assert whole.keys() == (beside or {}).keys()
        if whole:
            np.testing.assert_array_equal(whole["metadata"], known)


def test_both_feeds_bring_metadata_where_it_is_asked_for(records):
    rows = np.arange(len(records.table))
    order = feed.shuffled(rows, 8, seed=2)
    known = np.random.default_rng(0).normal(size=(len(rows), 3)).astype(np.float32)
    ask = (Subset(records, rows), order, single(range(4)), parallel.mesh(), known)
    streamed = list(feed.batches("stream", *ask))
    resident = list(feed.batches("resident", *ask))
    for step, pair in enumerate(zip(streamed, resident, strict=True)):
        for batch in pair:
            np.testing.assert_array_equal(batch["metadata"], known[order(step)])
            assert batch["metadata"].sharding.spec == batch["label"].sharding.spec
    (stacked,) = feed.batches("resident", *ask[:2], [range(4)], *ask[3:])
    np.testing.assert_array_equal(
        stacked["metadata"], np.stack([known[order(n)] for n in range(4)])
    )
    assert "metadata" not in next(feed.batches("resident", *ask[:-1]))


WORKER = textwrap.dedent("""
    import sys
    import numpy as np
    from ham_jax import parallel
    from ham_jax.data import feed
    from ham_jax.data.records import Subset, open_records

    folder, out = sys.argv[1:]
    parallel.initialize()
    import jax
    records = open_records(folder)
    rows = np.arange(len(records.table))
    order = feed.shuffled(rows, 8, seed=5)
    for kind in ("stream", "resident"):
        calls = [range(n, n + 1) for n in range(2, 5)]
        images = Subset(records, rows)
        batches = feed.batches(kind, images, order, calls, parallel.mesh())
        for step, batch in enumerate(batches):
            for name, array in batch.items():
                for shard in array.addressable_shards:
                    start = shard.index[0].start or 0
                    np.save(f"{out}/{kind}-{step}-{name}-{start}.npy", np.asarray(shard.data))
""")


def start_job(num_processes, num_devices, folder, out):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    out.mkdir()
    common = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(num_devices),
    }
    if num_processes > 1:
        common["HAM_JAX_NUM_PROCESSES"] = str(num_processes)
        common["HAM_JAX_COORDINATOR"] = f"127.0.0.1:{port}"
    return [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, folder, out],
            env=common | ({"HAM_JAX_PROCESS_ID": str(number)} if num_processes > 1 else {}),
        )
        for number in range(num_processes)
    ]


def test_one_and_two_processes_see_the_same_global_batches(tiny_records, tmp_path):
    jobs = start_job(1, 4, tiny_records, tmp_path / "one")
    jobs += start_job(2, 2, tiny_records, tmp_path / "two")
    assert [job.wait(120) for job in jobs] == [0, 0, 0]
    one = {file.name: np.load(file) for file in (tmp_path / "one").iterdir()}
    two = {file.name: np.load(file) for file in (tmp_path / "two").iterdir()}
    assert len(one) == 2 * 3 * 2 * 4  # feeds, steps, arrays, devices
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
