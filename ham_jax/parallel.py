"""Processes and devices: joining a job, one mesh over all devices, global arrays, stopping.

Data parallel over one mesh axis `data`. State is replicated, batches are cut along their rows;
process p holds a contiguous run of each global batch's rows.
"""

import os
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ham_jax import console
from ham_jax.config import InputError

_JOB_VARIABLES = ("HAM_JAX_NUM_PROCESSES", "HAM_JAX_PROCESS_ID", "HAM_JAX_COORDINATOR")


def initialize() -> None:
    """Joins this process to its job; must come before anything touches a device.

    A job of several processes is one that `launch.sh --processes N` started (its variables are
    HAM_JAX_NUM_PROCESSES, HAM_JAX_PROCESS_ID and HAM_JAX_COORDINATOR), a Slurm step of several
    tasks, or a TPU pod. Anything else is a single process.

    Raises:
      InputError: only some of the variables are set, or they make no sense.
    """
    given = {name: os.environ[name] for name in _JOB_VARIABLES if os.environ.get(name)}
    if given:
        missing = [name for name in _JOB_VARIABLES if name not in given]
        if missing:
            raise InputError(
                f"{', '.join(given)} set, but not {', '.join(missing)}: set all three, or none."
            )
        count, number, coordinator = (given[name] for name in _JOB_VARIABLES)
        if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
            raise InputError(
                f"HAM_JAX_PROCESS_ID = {number!r} must be a number below HAM_JAX_NUM_PROCESSES ="
                f" {count!r}."
            )
        jax.distributed.initialize(
            coordinator,
            int(count),
            int(number),
            local_device_ids=_own_gpus(int(number)),
            cluster_detection_method="deactivate",
        )
    elif _slurm_or_pod():
        # Finds the others by itself.
        jax.distributed.initialize(local_device_ids=_own_gpus_of_slurm())


def _slurm_or_pod() -> bool:
    # Of a step, which srun starts: a batch script, too, has SLURM_NTASKS and SLURM_PROCID, but it
    # is one process that would wait for the others for ever.
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    return tasks > 1 or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def _own_gpus(number: int) -> list[int] | None:
    """Returns process `number`'s share of this machine's GPUs; None where launch.sh set none."""
    share = int(os.environ.get("HAM_JAX_GPUS_PER_PROCESS", "0"))
    return list(range(number * share, (number + 1) * share)) or None


def _own_gpus_of_slurm() -> list[int] | None:
    """Returns which of the GPUs that this Slurm task sees are its own; None where it sees none.

    JAX would take one GPU a task, and so a single one on a node with one task.

    Raises:
      InputError: there are more tasks on the node than GPUs.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("ROCR_VISIBLE_DEVICES")
    if not visible or "SLURM_STEP_TASKS_PER_NODE" not in os.environ:
        return None
    count = len(visible.split(","))
    per_node = []  # as in 4(x2),3: three nodes
    for part in os.environ["SLURM_STEP_TASKS_PER_NODE"].split(","):
        tasks, _, times = part.partition("(x")
        per_node += [int(tasks)] * int(times.rstrip(")") or 1)
    tasks = per_node[int(os.environ["SLURM_NODEID"])]
    if count < int(os.environ.get("SLURM_GPUS_ON_NODE", "0")):  # each task sees its own alone
        tasks = 1
    if tasks > count:
        raise InputError(
            f"{tasks} Slurm tasks share {count} GPU(s) on a node: use as many tasks a node as GPUs,"
            " or one."
        )
    share = count // tasks
    first = share * (int(os.environ["SLURM_LOCALID"]) if tasks > 1 else 0)
    return list(range(first, first + share))


def compile_cache() -> None:
    """Keeps compiled programs on disk, so that the second start is quick.

    They lie in $JAX_COMPILATION_CACHE_DIR, or else in ham_jax/xla in the user's cache folder. Where
    that cannot be written, as for a user without a home, a line says so and all goes on without.
    """
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache = Path(given) if given else Path(home) / "ham_jax" / "xla"
        if "://" not in str(cache):  # JAX also takes a bucket
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=cache):
                pass
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        jax.config.update("jax_enable_compilation_cache", False)
        if is_main():
            console.log_line(
                f"Compiled programs are not kept ({error}): each start compiles them anew. Set"
                " JAX_COMPILATION_CACHE_DIR to a folder that can be written."
            )
        return
    jax.config.update("jax_compilation_cache_dir", str(given or cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def mesh() -> Mesh:
    """Returns one axis `data` over all devices of all processes."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Returns the placement of batches, cut along their rows, which lie along the given axis."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the placement of state: whole on each device."""
    return NamedSharding(mesh, PartitionSpec())


def local_rows(mesh: Mesh, batch_size: int) -> slice:
    """Returns which rows of a global batch this process holds."""
    mine = [d.process_index == jax.process_index() for d in mesh.devices.flat]
    per_device = batch_size // len(mine)
    return slice(mine.index(True) * per_device, (mine.index(True) + sum(mine)) * per_device)


def shard(mesh: Mesh, local: Any, axis: int = 0) -> Any:
    """Returns global arrays, sharded along their rows, from this process's rows of each."""
    sharding = batch_sharding(mesh, axis)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), local)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Returns the same arrays on each device of the mesh; every process gives the same values."""
    sharding = replicated(mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def place(leaf):
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree)


def is_main() -> bool:
    """Returns whether this is the one process that writes and prints."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process of the job is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def broadcast(number: int) -> int:
    """Returns the main process's number on every process."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def on_main(check: Callable[[], None]) -> None:
    """Runs a check on the main process; every process raises InputError where it does."""
    error = None
    if is_main():
        try:
            check()
        except InputError as raised:
            error = raised
    if broadcast(int(error is not None)):
        raise error or InputError("The main process has found the input wrong; it says why.")


class Preemption:
    """While entered, a request to stop (SIGTERM, Ctrl-C) is kept for the loop to ask for.

    In a job of several processes all agree on the step after which they stop, whichever of them
    was asked. A second Ctrl-C interrupts at once.

    Attributes:
      exit_code: 75 (try again) after SIGTERM, 130 after Ctrl-C.
    """

    def __init__(self):
        self.exit_code = 75
        self._requested = False
        self._asked = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            self._old[signal.SIGINT] = signal.signal(signal.SIGINT, self._request)
            # In a job of several processes jax.distributed has its own handler of SIGTERM,
            # through which all of them learn of it.
            if jax.process_count() == 1:
                self._old[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()

    def _request(self, number: int, frame) -> None:
        if number == signal.SIGINT:
            if self._requested:
                raise KeyboardInterrupt
            self.exit_code = 130
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)
        self._requested = True

    def reached(self) -> bool:
        """Returns whether to stop now; the same on every process, asked after the same steps."""
        self._asked += 1  # the processes agree on a number of calls
        if jax.process_count() == 1:
            return self._requested
        return multihost_utils.reached_preemption_sync_point(self._asked)
