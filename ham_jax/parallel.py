"""Processes and devices: joining a job, one mesh over all devices, global arrays, stopping.

Data parallel over one mesh axis `data`. State is replicated, batches are cut along their rows;
process p holds a contiguous run of each global batch's rows.
"""

import dataclasses
import importlib.util
import itertools
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # its key-value store, and this process's number: no public face
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ham_jax import console
from ham_jax.config import InputError

_JOB_VARIABLES = ("HAM_JAX_NUM_PROCESSES", "HAM_JAX_PROCESS_ID", "HAM_JAX_COORDINATOR")
_ALONE = "HAM_JAX_NUM_PROCESSES=1 makes this a single process."
# Size, rank, local size and local rank, as Open MPI, MVAPICH and MPICH's kin name them.
_MPI_VARIABLES = (
    *(
        tuple(f"{kind}_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK"))
        for kind in ("OMPI", "MV2")
    ),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
)
# Where coordinators listen, unless a job says so itself: above the ports that Linux gives out to
# whoever asks for any (32768 to 60999).
_PORTS = range(61440, 65536)
_PATIENCE_S = 10  # for a network file system to show a new file
_WAITING_S = 20  # before it is said that a job is not complete
_ANSWER_S = 300  # for each process to say what all are asked
_WORK_S = 48 * 3600  # for the main process to do what the others wait for
_FAULT_ELSEWHERE = "The main process has found the input wrong; it says why."
_claims: list[socket.socket] = []  # of ports, open as long as this process lives
_texts = itertools.count()  # numbers of what goes around a job, the same on all processes
_GRACE_S = 2  # for processes that fail alike to say so, before the coordinator takes them along


@dataclasses.dataclass(frozen=True)
class Job:
    """A job of several processes, as far as this process is told of it.

    Attributes:
      count: the number of processes.
      number: of this process; None: JAX finds it.
      coordinator: host:port at process 0; None: JAX finds it.
      method: of JAX's detection; "deactivate" where nothing is left to find.
      local_devices: indices of the GPUs that are this process's own; None: all that it sees.
      token: the same text for all processes of this job, and another for any other job.
    """

    count: int
    number: int | None = None
    coordinator: str | None = None
    method: str | None = None
    local_devices: list[int] | None = None
    token: str = "this job"


def find_job() -> Job | None:
    """Returns the job of several processes that this one is part of; None where it is alone.

    The first of these that there is says it: HAM_JAX_NUM_PROCESSES, HAM_JAX_PROCESS_ID and
    HAM_JAX_COORDINATOR; mpirun; a Slurm step (a batch script or the shell of salloc is a single
    process); the hosts of a TPU pod; an indexed job of Kubernetes.

    Raises:
      InputError: only some of the variables are set, or they make no sense.
    """
    for find in (_told, _started_by_mpi, _slurm_step, _tpu_pod, _kubernetes_job):
        job = find()
        if job is not None:
            return job if job.count > 1 else None
    return None


def initialize() -> None:
    """Joins this process to its job (`find_job`); must come before anything touches a device.

    Where the job is of several processes, an uncaught exception from now on ends this one at once
    (`leave`), as JAX would wait for the others.

    Raises:
      InputError: see `find_job`; or the process that was found belongs to another job.
    """
    job = find_job()
    if job is None:
        return
    if job.number == 0 and job.coordinator:
        _claim_port(job.coordinator)
    options: dict[str, Any] = {"local_device_ids": job.local_devices}
    if job.method:
        options["cluster_detection_method"] = job.method
    if job.coordinator:
        options["coordinator_address"] = job.coordinator
    if job.method == "deactivate":
        options |= {"num_processes": job.count, "process_id": job.number}
    waiting = threading.Timer(_WAITING_S, _say_waiting, [job])
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"This process could not join its job of {job.count} processes:"
            f" {str(error).partition(chr(10))[0]}. {_ALONE}"
        ) from error
    finally:
        waiting.cancel()
    if jax.distributed.is_initialized():
        sys.excepthook = _leave_after
        _check_members(job)


def _say_waiting(job: Job) -> None:
    where = f" at {job.coordinator}" if job.coordinator else ""
    print(
        f"ham_jax: waiting for all {job.count} processes of this job to meet{where}; JAX gives up"
        f" after 300 s. {_ALONE}",
        file=sys.stderr,
        flush=True,
    )


def _claim_port(coordinator: str) -> None:
    """Raises InputError if another program listens, or is about to, where this process will.

    JAX would share the port, and each of the others would join one or the other by chance.
    """
    port = int(coordinator.rpartition(":")[2])
    for left in range(5, -1, -1):  # a job that was queued again may find its predecessor's
        try:
            with socket.socket() as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("", port))
                listener.listen()
            if sys.platform == "linux":  # a name that only one process of a host can have
                claim = socket.socket(socket.AF_UNIX)
                claim.bind(f"\0ham_jax/{port}")
                _claims.append(claim)
            return
        except OSError as error:
            if not left:
                raise InputError(
                    f"Port {port}, at which the processes of this job are to meet, cannot be used"
                    f" on {socket.gethostname()}: {error.strerror or error}. Another job may use"
                    " it: set JAX_COORDINATOR_PORT, or the port in HAM_JAX_COORDINATOR, to another"
                    " number for all processes, or start again."
                ) from error
        time.sleep(1)


def _check_members(job: Job) -> None:
    """Raises InputError on both sides where processes of two jobs have met."""
    state, token = distributed.global_state, job.token
    if state.num_processes != job.count:
        raise InputError(
            f"JAX joined a job of {state.num_processes} processes, but {token} has {job.count}: set"
            f" {', '.join(_JOB_VARIABLES)}. {_ALONE}"
        )
    for number, other in enumerate(_gather(token)):
        if other != token:
            raise InputError(
                f"Process {number} that answers at {state.coordinator_address} belongs to another"
                f" job ({other}) than this process ({token}): two jobs use one port. Set"
                " JAX_COORDINATOR_PORT, or the port in HAM_JAX_COORDINATOR, to a number of its own"
                " for each."
            )


def leave(code: int) -> NoReturn:
    """Ends this process; one of several at once, without waiting for the others as JAX would."""
    if not jax.distributed.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if distributed.global_state.process_id == 0:  # jax.process_index() would wait for the others
        time.sleep(_GRACE_S)
    os._exit(code)


def _leave_after(kind: type[BaseException], error: BaseException, trace) -> None:
    sys.__excepthook__(kind, error, trace)
    print(
        f"ham_jax: process {distributed.global_state.process_id} on {socket.gethostname()} ends"
        " because of the error above, and with it the job. If the error is that another process is"
        " gone, see what that one printed. The same command goes on from the last checkpoint.",
        file=sys.stderr,
    )
    leave(130 if isinstance(error, KeyboardInterrupt) else 1)


# ---- the job, by who started it


def _told() -> Job | None:
    given = {name: os.environ[name] for name in _JOB_VARIABLES if os.environ.get(name)}
    if not given:
        return None
    if given == {"HAM_JAX_NUM_PROCESSES": "1"}:
        return Job(1)
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
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise InputError(
            f"HAM_JAX_COORDINATOR = {coordinator!r} must be <host of process 0>:<port>."
        )
    share = int(_number("HAM_JAX_GPUS_PER_PROCESS", 0))
    own = list(range(int(number) * share, (int(number) + 1) * share)) or None
    token = f"{coordinator} of {count} {os.environ.get('HAM_JAX_JOB', '')}".strip()
    return Job(int(count), int(number), coordinator, "deactivate", own, token)


def _started_by_mpi() -> Job | None:
    names = next((names for names in _MPI_VARIABLES if os.environ.get(names[0])), None)
    if names is None:
        return None
    size, rank = (_number(name) for name in names[:2])
    slurm = _number("SLURM_STEP_NUM_TASKS", 1), _number("SLURM_PROCID", 0)
    if names[0] == "PMI_SIZE" and slurm == (size, rank):  # srun sets them, too
        return None
    if size == 1:
        return Job(1)
    local_size, local_rank = _number(names[2], 0), _number(names[3], rank)
    own = _own_gpus(local_rank, local_size or size, "MPI ranks")
    # Open MPI's name for the job, and up to version 4 the address of its launcher.
    uri = os.environ.get("OMPI_MCA_orte_hnp_uri")  # noqa: SIM112 - its own spelling
    name = os.environ.get("PMIX_NAMESPACE") or uri
    port = os.environ.get("JAX_COORDINATOR_PORT") or _port(name or "")
    token = f"mpirun {name}"
    if name and local_size == size:
        return Job(size, rank, f"127.0.0.1:{port}", "deactivate", own, token)
    if uri:
        from jax._src.clusters import OmpiCluster  # its address without its other choices

        address = OmpiCluster.get_coordinator_address(
            timeout_secs=300, override_coordinator_port=str(port)
        )
        return Job(size, rank, address, "deactivate", own, token)
    if importlib.util.find_spec("mpi4py") is None:
        raise InputError(
            f"This is one of {size} processes that mpirun started ({names[0]}), which find each"
            f" other through mpi4py: pip install mpi4py. {_ALONE}"
        )
    return Job(size, method="mpi4py", local_devices=own, token=f"mpirun of {size}")


def _slurm_step() -> Job | None:
    # Of a step, which srun starts: a batch script, too, has SLURM_NTASKS and SLURM_PROCID, but it
    # is one process that would wait for the others for ever.
    count = _number("SLURM_STEP_NUM_TASKS", 1)
    if count == 1:
        return None
    own = _own_gpus(*_slurm_place(count), "Slurm tasks")
    job, nodes = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_NODELIST")
    step = os.environ.get("SLURM_STEP_ID", "")
    address = None
    given = ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT")
    if job and nodes and not any(os.environ.get(name) for name in given):
        from jax._src.clusters import SlurmCluster  # it reads the list of nodes

        # JAX's own port depends on the job alone: two steps side by side would share it.
        address = SlurmCluster.get_coordinator_address(
            timeout_secs=None, override_coordinator_port=str(_port(job, int(step or 0)))
        )
    token = f"Slurm {os.environ.get('SLURM_CLUSTER_NAME', '')} job {job} step {step} on {nodes}"
    return Job(count, _number("SLURM_PROCID", 0), address, local_devices=own, token=token)


def _slurm_place(count: int) -> tuple[int, int]:
    """Returns this Slurm task's number on its node, and how many share the GPUs it sees."""
    per_node = []  # as in 4(x2),3: three nodes
    for part in os.environ.get("SLURM_STEP_TASKS_PER_NODE", str(count)).split(","):
        tasks, _, times = part.partition("(x")
        per_node += [int(tasks)] * int(times.rstrip(")") or 1)
    tasks = per_node[_number("SLURM_NODEID", 0)]
    if _num_gpus() < _number("SLURM_GPUS_ON_NODE", 0):  # each task sees its own alone
        tasks = 1
    return (_number("SLURM_LOCALID", 0) if tasks > 1 else 0), tasks


def _tpu_pod() -> Job | None:
    from jax._src.clusters import GceTpuCluster  # JAX asks it only while it joins

    try:
        hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
        if path := os.environ.get("TPU_PROCESS_ADDRESSES_PATH"):
            hosts = Path(path).read_text()
        if hosts:  # on GKE
            count = len(hosts.split(",")) * _number("MEGASCALE_NUM_SLICES", 1)
        elif GceTpuCluster.is_env_present():  # looks for a TPU before it asks the network
            count = GceTpuCluster.get_process_count()
        else:
            return None
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"The hosts of this TPU cannot be found: {error}. {_ALONE}") from error
    return Job(count, token=f"TPU of {count} processes")


def _kubernetes_job() -> Job | None:
    names = ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")
    if not all(os.environ.get(name) for name in names):
        return None
    if importlib.util.find_spec("kubernetes") is None:
        print(
            "ham_jax: this pod of an indexed Kubernetes job works alone: to make one job of them,"
            f" set {', '.join(_JOB_VARIABLES)} (examples/kubernetes.yaml). {_ALONE}",
            file=sys.stderr,
        )
        return None
    from jax._src.clusters import K8sCluster  # JAX asks it only while it joins

    try:
        count = K8sCluster.get_process_count() if K8sCluster.is_env_present() else 1
    except Exception as error:  # whatever the client of Kubernetes raises
        raise InputError(f"Kubernetes does not tell of this job: {error}. {_ALONE}") from error
    return Job(count, token=f"Kubernetes of {count} pods")


def _number(name: str, default: int | None = None) -> int:
    """Returns an environment variable as a number.

    Raises:
      InputError: it is none, or it is absent and has no default.
    """
    text = os.environ.get(name, "").strip()
    if not text and default is not None:
        return default
    if not text.isdecimal():
        raise InputError(f"{name} = {text!r} must be a number, as whoever starts a job sets it.")
    return int(text)


def _port(name: str, step: int = 0) -> int:
    """Returns where the job of that name meets; the steps of one job have different ones."""
    return _PORTS[(zlib.crc32(name.encode()) + step) % len(_PORTS)]


def _own_gpus(number: int, count: int, what: str) -> list[int] | None:
    """Returns which GPUs are this process's own, `number` of `count` on its host; None: all.

    JAX would take one GPU a process, whether there is one or there are more.

    Raises:
      InputError: there are more processes than GPUs.
    """
    gpus = _num_gpus()
    if not gpus:
        return None
    if count > gpus:
        raise InputError(
            f"{count} {what} share {gpus} GPU(s) on {socket.gethostname()}: use as many {what} a"
            " node as GPUs, or one; JAX_PLATFORMS=cpu with an empty CUDA_VISIBLE_DEVICES uses none."
        )
    share = gpus // count
    return list(range(number * share, (number + 1) * share))


def _num_gpus() -> int:
    """Returns how many GPUs this process may see."""
    for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        if name in os.environ:
            # CUDA reads the list up to the first that is none: -1, or Slurm's NoDevFiles.
            listed = [part.strip() for part in os.environ[name].split(",")]
            wrong = (n for n, part in enumerate(listed) if part in ("", "-1", "NoDevFiles"))
            return next(wrong, len(listed))
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    except OSError:
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


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
        raise error or InputError(_FAULT_ELSEWHERE)


def from_main(make: Callable[[], str]) -> str:
    """Returns on every process the text that `make` returns on the main one.

    The others wait for hours if need be, which they could not in a collective operation. Every
    process raises InputError where `make` does.
    """
    if jax.process_count() == 1:
        return make()
    client, key = distributed.global_state.client, f"ham_jax/from_main/{next(_texts)}"
    assert client is not None  # there are several processes
    if not is_main():
        kind, _, text = client.blocking_key_value_get(key, _WORK_S * 1000).partition(" ")
        if kind == "fault":
            raise InputError(_FAULT_ELSEWHERE)
        return text
    try:
        text = make()
    except InputError:
        client.key_value_set(key, "fault")
        raise
    client.key_value_set(key, f"text {text}")
    return text


def check_shared(folder: Path) -> None:
    """Proves that every process of the job sees the folder of the main process; makes it.

    Must be called by all of them together. The main process writes a file of a random name, which
    all look for, for some seconds, as network file systems show new files late.

    Raises:
      InputError: on all processes, naming the hosts that do not see it.
    """
    if jax.process_count() == 1:
        return
    name = f".shared-{broadcast(secrets.randbits(31)):08x}"
    fault = ""
    if is_main():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        except OSError as error:
            fault = (
                f"{socket.gethostname()} cannot write into {folder.absolute()}: {error.strerror}"
            )
    fault = _gather(fault)[0]
    if fault:
        raise InputError(f"The main process on {fault}.")
    try:
        sees = _appears(folder, name)
        hosts = _gather(f"{socket.gethostname()} (its {folder.absolute()})")
        blind = [number for number, answer in enumerate(_gather(str(sees))) if answer != "True"]
    finally:
        if is_main():
            (folder / name).unlink(missing_ok=True)
    if blind:
        raise InputError(
            [
                f"Process {number} on {hosts[number]} does not see the folder of the main process"
                f" on {hosts[0]}: all hosts of a job must share it. Use a folder of a file system"
                " that all of them mount, by its absolute path."
                for number in blind
            ]
        )


def _appears(folder: Path, name: str) -> bool:
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            if name in os.listdir(folder):  # which network file systems look up anew
                return True
        except OSError:
            pass  # not there, or not yet
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def _gather(text: str) -> list[str]:
    """Returns each process's text, in their order, on every process.

    It goes through JAX's coordination service: no device is touched, no program compiled.
    """
    client, number = distributed.global_state.client, distributed.global_state.process_id
    assert client is not None  # JAX is initialized
    name = f"ham_jax/gather/{next(_texts)}"
    client.key_value_set(f"{name}/{number:06d}", text.encode(errors="replace").decode())
    client.wait_at_barrier(name, _ANSWER_S * 1000)
    return [text for _, text in sorted(client.key_value_dir_get(name))]


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
