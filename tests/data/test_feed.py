"""Each feed, on any number of devices and processes, brings the same images in the same order."""

import itertools
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
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


KINDS = ("stream", "threads", "resident")


def test_each_feed_brings_the_same_pixels_and_labels(records):
    rows = np.arange(0, len(records.table), 2)
    order = feed.shuffled(rows, 16, seed=1)
    mesh = parallel.mesh()
    steps = range(3, 16)
    batches = [
        list(feed.batches(kind, Subset(records, rows), order, single(steps), mesh))
        for kind in KINDS
    ]
    for step, *of_step in zip(steps, *batches, strict=True):
        truth = records.read(order(step))
        labels = records.table["label"].to_numpy()[order(step)]
        for batch in of_step:
            np.testing.assert_array_equal(batch["image"], truth)
            np.testing.assert_array_equal(batch["label"], labels)
            assert batch["image"].sharding == of_step[0]["image"].sharding


def test_threads_read_until_tensorflow_is_there(records, monkeypatch):
    rows, mesh, steps = np.arange(len(records.table)), parallel.mesh(), range(12)
    order = feed.shuffled(rows, 8, seed=4)
    ask, imported = feed._tensorflow, threading.Event()
    monkeypatch.setattr(feed, "_tensorflow", lambda: imported.wait(60) and ask())
    batches = feed.batches("stream", Subset(records, rows), order, single(steps), mesh)
    found = [next(batches) for _ in range(3)]
    imported.set()
    for step, batch in zip(steps, itertools.chain(found, batches), strict=True):
        np.testing.assert_array_equal(batch["image"], records.read(order(step)))


def test_the_feed_is_chosen_by_memory_and_a_stream_needs_no_tensorflow(monkeypatch):
    mesh, find = parallel.mesh(), feed.importlib.util.find_spec
    memory = feed._memory(mesh)
    assert [feed.choose("auto", n, mesh) for n in (memory // 4, memory // 4 + 1)] == [
        "resident",
        "stream",
    ]
    assert feed.choose("resident", memory, mesh) == "resident"
    monkeypatch.setattr(feed, "_host_bytes", lambda: 16_000_000_000)  # of eight devices
    with pytest.raises(InputError, match=r"needs 147\.0 GB .* and 2\.0 GB is what .*feed=stream"):
        feed.choose("resident", 147_000_000_000, mesh)
    monkeypatch.setattr(
        *(feed.importlib.util, "find_spec"),
        lambda name: None if name == "tensorflow" else find(name),
    )
    asked = (("stream", 1), ("auto", 500_000_001), ("auto", 500_000_000))
    assert [feed.choose(*one, mesh) for one in asked] == ["threads", "threads", "resident"]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_records_are_named_by_each_feed(kind, tiny_records, tmp_path):
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


def test_each_feed_brings_metadata_where_it_is_asked_for(records):
    rows = np.arange(len(records.table))
    order = feed.shuffled(rows, 8, seed=2)
    known = np.random.default_rng(0).normal(size=(len(rows), 3)).astype(np.float32)
    ask = (Subset(records, rows), order, single(range(4)), parallel.mesh(), known)
    of_kinds = [list(feed.batches(kind, *ask)) for kind in KINDS]
    for step, of_step in enumerate(zip(*of_kinds, strict=True)):
        for batch in of_step:
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
    from ham_jax import config, parallel
    from ham_jax.data import feed, layouts, prepare
    from ham_jax.data.records import Subset

    raw, prepared, out = sys.argv[1:]
    parallel.initialize()
    import jax
    c, find = config.base(), layouts.find
    c.data.update(dir=raw, prepared_dir=prepared, canvas=(24, 32), num_workers=1)
    layouts.find = lambda *args, **kwargs: print("looks") or find(*args, **kwargs)
    try:
        prepare.prepare(c)
    except config.InputError as error:
        print("refused")
    c.data.allow_partial = True
    records = prepare.prepare(c).records
    rows = np.arange(len(records.table))
    order = feed.shuffled(rows, 8, seed=5)
    for kind in ("stream", "threads", "resident"):
        calls = [range(n, n + 1) for n in range(2, 5)]
        images = Subset(records, rows)
        batches = feed.batches(kind, images, order, calls, parallel.mesh())
        for step, batch in enumerate(batches):
            for name, array in batch.items():
                for shard in array.addressable_shards:
                    start = shard.index[0].start or 0
                    np.save(f"{out}/{kind}-{step}-{name}-{start}.npy", np.asarray(shard.data))
""")


def start_job(num_processes, num_devices, raw, prepared, out):
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
            [sys.executable, "-c", WORKER, raw, prepared, out],
            stdout=subprocess.PIPE,
            text=True,
            env=common | ({"HAM_JAX_PROCESS_ID": str(number)} if num_processes > 1 else {}),
        )
        for number in range(num_processes)
    ]


def test_one_and_two_processes_see_the_same_global_batches(tiny_raw, tiny_records, tmp_path):
    for folder in ("one-records", "two-records"):  # each start finds records, but nothing noted
        (tmp_path / folder / "ham10000").mkdir(parents=True)
        there = tmp_path / folder / "ham10000" / tiny_records.parent.name
        there.symlink_to(tiny_records.parent)
    jobs = start_job(1, 4, tiny_raw, tmp_path / "one-records", tmp_path / "one")
    jobs += start_job(2, 2, tiny_raw, tmp_path / "two-records", tmp_path / "two")
    said = [job.communicate(timeout=120)[0].split() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0]
    # The main process looks at the photographs; the others are told.
    assert said == [["looks", "refused", "looks"]] * 2 + [["refused"]]
    one = {file.name: np.load(file) for file in (tmp_path / "one").iterdir()}
    two = {file.name: np.load(file) for file in (tmp_path / "two").iterdir()}
    assert len(one) == 3 * 3 * 2 * 4  # feeds, steps, arrays, devices
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
