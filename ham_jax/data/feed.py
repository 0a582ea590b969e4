"""(seed, step) -> record numbers -> batches on the devices.

Which images a step sees is a pure function of (seed, step). The data position therefore IS the
step: resuming costs nothing and is exact. Each feed carries the same pixels to the devices:
`stream` reads records as they are needed, with tf.data; `threads` does so without TensorFlow;
`resident` keeps the whole split as one uint8 array in device memory and gathers from it there.

A batch is `{'image': uint8 [B, H, W, 3], 'label': int32 [B]}`, with `'metadata'`, float32 [B, M],
where it is asked for, sharded over the mesh axis `data`. Row i of a batch is the same image on any
number of devices and processes.
"""

import collections
import functools
import importlib.util
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np

from ham_jax import parallel
from ham_jax.config import InputError

if TYPE_CHECKING:  # batches of arrays need no TFDS
    from ham_jax.data.records import Subset

Order = Callable[[int], np.ndarray]
"""step -> record numbers, int64 [B]"""

_SHUFFLED, _BALANCED = 0, 1  # separate random streams of one seed
_READ_AHEAD = 4  # batches
_LOAD_ROWS = 512  # records read at once while the resident array is filled


def shuffled(rows: np.ndarray, batch_size: int, seed: int) -> Order:
    """Every image once an epoch: epoch permutations laid end to end, cut into batches.

    A batch may straddle two epochs, so no image is ever dropped.
    """

    @functools.lru_cache(maxsize=2)
    def permutation(epoch: int) -> np.ndarray:
        return np.random.default_rng((seed, _SHUFFLED, epoch)).permutation(rows)

    def at(step: int) -> np.ndarray:
        position = np.arange(step * batch_size, (step + 1) * batch_size)
        epoch, offset = np.divmod(position, len(rows))
        return np.concatenate([permutation(e)[offset[epoch == e]] for e in np.unique(epoch)])

    return at


def class_balanced(rows: np.ndarray, labels: np.ndarray, batch_size: int, seed: int) -> Order:
    """Each image: a class drawn evenly among those present, then one of its images, evenly.

    Args:
      rows: record numbers of the split, [n].
      labels: their labels, [n].
      batch_size: images a step.
      seed: of the draws.
    """
    by_class = np.argsort(labels, kind="stable")
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)

    def at(step: int) -> np.ndarray:
        rng = np.random.default_rng((seed, _BALANCED, step))
        drawn = rng.integers(len(starts), size=batch_size)
        return rows[by_class[starts[drawn] + rng.integers(counts[drawn])]]

    return at


def choose(feed: str, num_bytes: int, mesh: jax.sharding.Mesh) -> str:
    """Returns which of the feeds data.feed stands for; resident on all processes, or on none.

    'auto' is resident where the split takes at most a quarter of the memory it would lie in.
    A stream is read by tf.data where TensorFlow is installed, otherwise by threads.

    Args:
      feed: auto, stream or resident.
      num_bytes: of the split's pixels.
      mesh: the devices, axis `data`.

    Raises:
      InputError: 'resident' was asked for, and the memory does not hold the split.
    """
    memory = _memory(mesh)
    if feed == "auto":
        feed = ("stream", "resident")[parallel.broadcast(int(num_bytes <= memory / 4))]
    elif feed == "resident" and parallel.broadcast(int(num_bytes > memory)):
        raise InputError(
            f"data.feed = 'resident' needs {num_bytes / 1e9:,.1f} GB for the training images, and"
            f" {memory / 1e9:,.1f} GB is what the main process has for them on a device. Set"
            " data.feed=stream, which reads them as they are needed, or a smaller data.canvas."
        )
    if feed == "stream" and importlib.util.find_spec("tensorflow") is None:
        return "threads"
    return feed


def batches(
    feed: str,
    images: "Subset",
    order: Order,
    calls: Iterable[range],
    mesh: jax.sharding.Mesh,
    metadata: np.ndarray | None = None,
) -> Iterator[dict[str, jax.Array]]:
    """Yields the batch of each call of the train step.

    Args:
      feed: 'stream', 'threads' or 'resident'.
      images: the split.
      order: step -> record numbers of the global batch, all of `images`.
      calls: the steps of each call, in order. Several steps are stacked along a new first axis;
        only the resident feed can give them.
      mesh: the devices, axis `data`.
      metadata: float32 [number of records, M], for a network that takes it.
    """
    beside = {"label": images.records.table["label"].to_numpy(np.int32)}
    if metadata is not None:
        beside["metadata"] = metadata
    calls = list(calls)
    if feed == "resident":
        read = _resident(images, mesh)
    else:
        stream = {"stream": _streamed, "threads": _threaded}[feed]
        read = stream(images.records, order, [step for (step,) in calls], mesh)
    for steps in calls:
        numbers = np.stack([order(step) for step in steps])
        mine = (numbers if len(steps) > 1 else numbers[0])[
            ..., parallel.local_rows(mesh, numbers.shape[-1])
        ]
        rest = {name: values[mine] for name, values in beside.items()}
        yield {"image": read(mine), **parallel.shard(mesh, rest, mine.ndim - 1)}


class Images(Protocol):
    """Canvas pixels by place: a `Subset`, or an array uint8 [n, H, W, 3]."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: np.ndarray, /) -> np.ndarray: ...


def sequential(
    images: Images,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    beside: Mapping[str, np.ndarray] | None = None,
) -> Iterator[tuple[dict[str, jax.Array], int]]:
    """Yields (batch without label, number of true rows): each image once, in order.

    The last batch is filled up with its last row; only the first number of true rows count.
    The next batch is read while the caller works on this one.

    Args:
      images: n of them.
      batch_size: B.
      mesh: the devices, axis `data`.
      beside: what else a batch holds, by name, such as `metadata`: [n, ...].
    """
    read = functools.partial(_read, images, batch_size, mesh, beside)
    for batch, count in ahead(read, range(0, len(images), batch_size), 1, 1):
        yield parallel.shard(mesh, batch), count


def one_batch(
    images: Images,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    beside: Mapping[str, np.ndarray] | None = None,
) -> dict[str, jax.Array]:
    """Returns the first batch of `sequential`, read by this thread."""
    return parallel.shard(mesh, _read(images, batch_size, mesh, beside, 0)[0])


def _read(images, batch_size, mesh, beside, start) -> tuple[dict[str, np.ndarray], int]:
    """Returns this process's rows of the batch that starts there, and the number of true rows."""
    chosen = np.arange(start, min(start + batch_size, len(images)))
    padded = np.pad(chosen, (0, batch_size - len(chosen)), mode="edge")
    mine = padded[parallel.local_rows(mesh, batch_size)]
    rest = {name: values[mine] for name, values in (beside or {}).items()}
    return {"image": images[mine], **rest}, len(chosen)


def _streamed(records, order, steps, mesh) -> Callable[[np.ndarray], jax.Array]:
    """Returns a function that gives the next step's images, [B, H, W, 3], read ahead by tf.data.

    It does not look at the record numbers that it is given. Threads read the first steps, while
    TensorFlow is imported, which takes seconds.
    """
    faults: list[InputError] = []
    waiting = collections.deque(steps)
    importer = ThreadPoolExecutor(1)
    jax.devices()  # JAX takes its devices before TensorFlow is there
    importing = importer.submit(_tensorflow)
    importer.shutdown(wait=False)
    read_numbers = _reader(records, order, mesh)

    def read(step: np.ndarray) -> np.ndarray:
        try:
            return read_numbers(int(step))
        except InputError as error:  # TensorFlow would keep its text only, as one of its own errors
            faults.append(error)
            raise

    def meanwhile() -> Iterator[int]:
        while waiting and not importing.done():
            yield waiting.popleft()

    def images() -> Iterator[np.ndarray]:
        yield from ahead(read_numbers, meanwhile(), _READ_AHEAD, _READ_AHEAD)
        if not waiting:
            return
        tf = importing.result()

        def read_in_graph(step):
            image = tf.numpy_function(read, [step], tf.uint8, stateful=False)
            return tf.ensure_shape(image, (None, *records.canvas, 3))

        dataset = tf.data.Dataset.from_tensor_slices(np.array(waiting, np.int64))
        dataset = dataset.map(read_in_graph, num_parallel_calls=_READ_AHEAD, deterministic=True)
        try:
            yield from dataset.prefetch(_READ_AHEAD).as_numpy_iterator()
        except tf.errors.OpError as error:
            raise faults[0] if faults else error from error

    found = images()
    return lambda _: parallel.shard(mesh, next(found))


def _threaded(records, order, steps, mesh) -> Callable[[np.ndarray], jax.Array]:
    """Is `_streamed` without TensorFlow."""
    images = ahead(_reader(records, order, mesh), steps, _READ_AHEAD, _READ_AHEAD)
    return lambda _: parallel.shard(mesh, next(images))


def _reader(records, order, mesh) -> Callable[[int], np.ndarray]:
    """Returns step -> this process's images of it."""

    def read(step: int) -> np.ndarray:
        numbers = order(step)
        return records.read(numbers[parallel.local_rows(mesh, len(numbers))])

    return read


def ahead(
    function: Callable[[Any], Any], items: Iterable[Any], num_threads: int, num_ahead: int
) -> Iterator[Any]:
    """Yields function(item) of each, in order; threads call it for so many items ahead."""
    with ThreadPoolExecutor(num_threads) as pool:
        waiting: collections.deque[Future] = collections.deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > num_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _resident(images: "Subset", mesh) -> Callable[[np.ndarray], jax.Array]:
    """Returns record numbers [..., B] of this process -> their images, [..., B, H, W, 3]."""
    whole = np.empty((len(images), *images.records.canvas, 3), np.uint8)
    for start in range(0, len(images), _LOAD_ROWS):
        part = np.arange(start, min(start + _LOAD_ROWS, len(images)))
        whole[part] = images[part]
    whole = parallel.replicate(mesh, whole)
    place = np.zeros(len(images.records.table), np.int32)  # record number -> place in `whole`
    place[images.rows] = np.arange(len(images))

    # A program of its own, so that the train step is the same one with either feed.
    @functools.partial(jax.jit, static_argnums=2)
    def gather(images: jax.Array, places: jax.Array, axis: int) -> jax.Array:
        chosen = images.at[places].get(mode="promise_in_bounds")
        return jax.lax.with_sharding_constraint(chosen, parallel.batch_sharding(mesh, axis))

    def get(numbers: np.ndarray) -> jax.Array:
        axis = numbers.ndim - 1
        return gather(whole, parallel.shard(mesh, place[numbers], axis), axis)

    return get


def _tensorflow():
    """Imports TensorFlow quietly and keeps it off the accelerators, which are JAX's."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    return tf


def _memory(mesh: jax.sharding.Mesh) -> int:
    """Returns the bytes that a resident split may take: of a device, and of the host on the way.

    On CPU it is a device's share of the host's. Where a device does not tell, the host's counts.
    """
    device = jax.local_devices()[0]
    host = _host_bytes()
    if device.platform == "cpu":
        return host // mesh.devices.size
    return min(host, (device.memory_stats() or {}).get("bytes_limit", host))


def _host_bytes() -> int:
    """Returns the memory of the machine, or what a container or a job's scheduler leaves of it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
        own = next((group[4:] for group in groups if group.startswith("0::/")), "")
        folder = Path("/sys/fs/cgroup", own)
        for group in (folder, *folder.parents[:-3]):
            limit = group / "memory.max"
            if limit.exists() and (text := limit.read_text().strip()).isdecimal():
                limits.append(int(text))
    except OSError:
        pass  # another system than Linux, or another version of its groups
    return min(limits)
