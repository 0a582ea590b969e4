"""One mesh over all processes; a job is joined as its variables say, and stopped together."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import requests
from jax._src.clusters import cloud_tpu_cluster

from ham_jax import parallel
from ham_jax.config import InputError

ROOT = Path(__file__).parents[1]
JOB = {
    "HAM_JAX_NUM_PROCESSES": "2",
    "HAM_JAX_PROCESS_ID": "1",
    "HAM_JAX_COORDINATOR": "127.0.0.1:1",
}


SECOND = {  # what JAX is told
    "coordinator_address": "127.0.0.1:1",
    "num_processes": 2,
    "process_id": 1,
    "cluster_detection_method": "deactivate",  # Slurm's variables may be set too
}


@pytest.fixture
def joined(monkeypatch):
    """Returns the list of what jax.distributed.initialize was called with."""
    others = (
        "SLURM_",
        "HAM_JAX_",
        "OMPI_",
        "PMI",
        "MPI_",
        "TPU_WORKER",
        "TPU_PROCESS",
        "MEGASCALE_",
    )
    others += ("CUDA_VISIBLE", "ROCR_VISIBLE", "JAX_COORDINATOR", "JOB_COMPLETION")
    for name in list(os.environ):
        if name.startswith(others):
            monkeypatch.delenv(name)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    return calls


@pytest.mark.parametrize(
    ("variables", "call"),
    [
        ({}, None),
        (JOB, SECOND | {"local_device_ids": None}),
        (JOB | {"HAM_JAX_GPUS_PER_PROCESS": "3"}, SECOND | {"local_device_ids": [3, 4, 5]}),
        (
            {"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
            {"local_device_ids": None},
        ),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script, without srun
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {"local_device_ids": None}),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ],
)
def test_a_job_is_joined_as_its_variables_say(variables, call, joined, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    parallel.initialize()
    assert joined == ([] if call is None else [call])


@pytest.mark.parametrize(
    ("per_node", "node", "task", "visible", "on_node", "own"),
    [
        ("1(x2)", "1", "0", "0,1,2,3", "4", [0, 1, 2, 3]),
        ("4(x2)", "0", "2", "0,1,2,3", "4", [2]),
        ("1,2(x2)", "2", "1", "0,1,2,3", "", [2, 3]),
        ("2(x2)", "1", "1", "0,1", "4", [0, 1]),  # bound to its task, which sees no other
        ("4", "0", "3", "0", "4", [0]),
        ("2(x2)", "1", "1", "", "", None),
    ],
)
def test_a_slurm_task_takes_its_share_of_the_gpus(
    per_node, node, task, visible, on_node, own, joined, monkeypatch
):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", per_node)
    monkeypatch.setenv("SLURM_NODEID", node)
    monkeypatch.setenv("SLURM_LOCALID", task)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if on_node:
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", on_node)
    parallel.initialize()
    assert joined == [{"local_device_ids": own}]


def test_more_slurm_tasks_than_gpus_are_refused(joined, monkeypatch):
    for name, value in {"STEP_NUM_TASKS": "4", "STEP_TASKS_PER_NODE": "4", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(InputError, match=r"4 Slurm tasks share 2 GPU"):
        parallel.initialize()
    assert joined == []


@pytest.mark.parametrize(
    ("variables", "answer"),
    [
        ({"HAM_JAX_PROCESS_ID": "1"}, "not HAM_JAX_NUM_PROCESSES, HAM_JAX_COORDINATOR"),
        (JOB | {"HAM_JAX_COORDINATOR": ""}, "not HAM_JAX_COORDINATOR"),
        (JOB | {"HAM_JAX_PROCESS_ID": "2"}, "must be a number below"),
        (JOB | {"HAM_JAX_NUM_PROCESSES": "two"}, "must be a number below"),
    ],
)
def test_half_a_job_is_refused(variables, answer, joined, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=answer):
        parallel.initialize()
    assert joined == []


def test_rows_lie_in_order_on_the_devices():
    mesh = parallel.mesh()
    assert mesh.devices.tolist() == sorted(jax.devices(), key=lambda device: device.id)
    assert parallel.local_rows(mesh, 16) == slice(0, 16)
    image = np.arange(16 * 3, dtype=np.uint8).reshape(16, 3)
    batch = parallel.shard(mesh, {"image": image})
    for number, shard in enumerate(batch["image"].addressable_shards):
        np.testing.assert_array_equal(shard.data, image[2 * number : 2 * number + 2])
    whole = parallel.replicate(mesh, {"image": image})["image"]
    assert len(whole.addressable_shards) == 8
    for shard in whole.addressable_shards:
        np.testing.assert_array_equal(shard.data, image)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_request_to_stop_is_kept_until_asked_for(number, code):
    before = signal.getsignal(number)
    with parallel.Preemption() as preemption:
        assert not preemption.reached()
        os.kill(os.getpid(), number)
        assert preemption.reached()
        assert preemption.exit_code == code
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


WORKER = textwrap.dedent("""
    import json, os, signal, sys, time
    import numpy as np
    from pathlib import Path
    from ham_jax import checkpoints, parallel

    parallel.initialize()
    import jax
    mesh, number = parallel.mesh(), jax.process_index()
    rows = np.arange(8.0)
    batch = parallel.shard(mesh, rows[parallel.local_rows(mesh, 8)])
    state = {"step": np.int32(0), "params": {"w": rows}, "batch_stats": {}, "opt_state": (),
             "ema": {}}
    workdir = Path(sys.argv[1])
    with checkpoints.Checkpoints(workdir) as saved:
        for step in (1, 2):
            saved.save(step, parallel.replicate(mesh, state), {checkpoints.METRIC: 0.5}, {})
    if parallel.is_main():
        (workdir / "checkpoints/2/metrics/metrics").write_text("damaged")
    parallel.barrier("damaged")
    seen = checkpoints.load_for_inference(workdir)[-1]
    with checkpoints.Checkpoints(workdir) as saved:
        restored, _ = saved.restore(None, state, mesh)
        latest = saved.latest()
    report = {
        "rows": [parallel.local_rows(mesh, 8).start, parallel.local_rows(mesh, 8).stop],
        "dot": float(jax.jit(lambda x: (x * rows).sum())(batch)),
        "from_main": parallel.broadcast(10 + number),
        "steps": [seen, latest],
        "restored": np.asarray(restored["params"]["w"]).tolist(),
        "stopped": [],
        "codes": [],
    }
    for asked in (signal.SIGTERM, signal.SIGINT):
        with parallel.Preemption() as preemption:
            for step in range(1, 1000):
                if number == 1 and step == 3:
                    os.kill(os.getpid(), asked)
                if preemption.reached():
                    break
                time.sleep(0.01)
        report["stopped"].append(step)
        report["codes"].append(preemption.exit_code)
    (workdir / f"{number}.json").write_text(json.dumps(report))
    parallel.barrier("the end")
""")


def test_two_processes_are_one_job(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{s.getsockname()[1]}"
    common = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_NUM_CPU_DEVICES": "2",
        "HAM_JAX_NUM_PROCESSES": "2",
        "HAM_JAX_COORDINATOR": coordinator,
    }
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, tmp_path],
            env=common | {"HAM_JAX_PROCESS_ID": str(process)},
        )
        for process in range(2)
    ]
    try:
        assert [job.wait(120) for job in jobs] == [0, 0]
    finally:
        for job in jobs:
            job.kill()
    first, second = (json.loads((tmp_path / f"{process}.json").read_text()) for process in range(2))
    assert (first.pop("rows"), second.pop("rows")) == ([0, 4], [4, 8])
    assert second.pop("codes") == [75, 130]  # the one that was asked
    assert first.pop("codes") == [75, 75]
    assert first == second
    assert first["dot"] == sum(x * x for x in range(8))
    assert first["from_main"] == 10
    assert first["steps"] == [1, 1]  # the damaged one is used by neither
    assert first["restored"] == list(range(8))
    assert all(3 <= step < 999 for step in first["stopped"])


CACHED = """
    import jax, sys
    from ham_jax import parallel
    parallel.compile_cache()
    print(jax.config.jax_compilation_cache_dir)
    jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((64, 64))).block_until_ready()
"""


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"])
def test_programs_are_kept_on_disk_without_a_word(variable, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"PYTHONPATH": str(ROOT), variable: str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(CACHED)]
    folder = tmp_path / "ham_jax/xla" if variable == "XDG_CACHE_HOME" else tmp_path
    counts = []
    for _ in range(2):
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert (ended.stdout.strip(), ended.stderr) == (str(folder), "")
        counts.append(sum(path.name.endswith("-cache") for path in folder.iterdir()))
    assert counts[0] == counts[1] > 0


def test_without_a_home_or_a_cache_folder_all_goes_on(tmp_path, monkeypatch, capsys):
    """A cluster's job may have no home, a container's a read-only one."""
    options = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in options}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    (tmp_path / "file").touch()
    try:
        for variables in ({"XDG_CACHE_HOME": str(tmp_path / "file")}, {"HOME": "/proc/nobody"}):
            for name in ("XDG_CACHE_HOME", "HOME"):
                monkeypatch.delenv(name, raising=False)
            for name, value in variables.items():
                monkeypatch.setenv(name, value)
            parallel.compile_cache()
            assert "Compiled programs are not kept" in capsys.readouterr().err
            assert not jax.config.jax_enable_compilation_cache
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


class Elsewhere:
    """JAX's own look at the machine, as if a TPU of this many hosts were here."""

    def __init__(self, hosts):
        self.hosts = hosts

    def get(self, url, **_):
        key = url.rpartition("/")[2]
        answer = {
            "agent-worker-number": "1",
            "worker-network-endpoints": ",".join(f"host-{n}" for n in range(self.hosts)),
            "tpu-env": "ZONE: 'here'\n",
        }[key]
        return types.SimpleNamespace(text=answer, status_code=200)


SLURM = {
    "SLURM_CLUSTER_NAME": "c",
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}
STEP = SLURM | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "n[4-5]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "158072832.0;tcp://10.0.0.9,10.0.1.9:37553",
}
ONE_HOST = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "PMIX_NAMESPACE": "x@1"}
OPEN_MPI_5 = {k: v for k, v in MPI.items() if "orte" not in k} | ONE_HOST
HYDRA = {"PMI_SIZE": "2", "PMI_RANK": "1"}


@pytest.mark.parametrize(
    ("variables", "count", "number", "host"),
    [
        ({}, None, None, None),
        ({"HAM_JAX_NUM_PROCESSES": "1"}, None, None, None),
        (JOB, 2, 1, "127.0.0.1"),
        (STEP, 2, 1, "n4"),
        (SLURM, None, None, None),  # a batch script
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "n4"}, None, None, None),
        (STEP | JOB | {"HAM_JAX_COORDINATOR": "here:1"}, 2, 1, "here"),
        (STEP | {"HAM_JAX_NUM_PROCESSES": "1"}, None, None, None),
        (MPI, 4, 3, "10.0.0.9"),
        (MPI | STEP, 4, 3, "10.0.0.9"),  # inside Slurm, whose step is that of mpirun's daemons
        (MPI | ONE_HOST, 2, 1, "127.0.0.1"),
        (OPEN_MPI_5, 2, 1, "127.0.0.1"),
        (MPI | SLURM | {"OMPI_COMM_WORLD_SIZE": "1"}, None, None, None),
        (STEP | HYDRA, 2, 1, "n4"),  # srun --mpi=pmi2
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, 2, None, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None, None, None),
        ({"TPU_PROCESS_ADDRESSES": "a:8471,b:8471", "TPU_WORKER_ID": "1"}, 2, None, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "3"}, 3, None, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"}, 4, None, None),
    ],
)
def test_a_job_is_found_whoever_started_it(variables, count, number, host, joined, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    job = parallel.find_job()
    if count is None:
        assert job is None
    else:
        coordinator = job.coordinator and job.coordinator.rpartition(":")[0]
        assert (job.count, coordinator) == (count, host)
        assert number in (None, job.number)


@pytest.mark.parametrize(("hosts", "count"), [(4, 4), (1, None)])
def test_the_hosts_of_a_tpu_pod_are_those_that_its_metadata_name(hosts, count, joined, monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setattr(requests, "get", Elsewhere(hosts).get)
    job = parallel.find_job()
    assert count == (job and job.count)
    monkeypatch.setattr(requests, "get", lambda *_, **__: 1 / 0)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    assert parallel.find_job() is None  # the network is not asked


def test_where_no_tpu_is_the_network_is_not_asked(joined, monkeypatch):
    monkeypatch.setattr(requests, "get", lambda *_, **__: 1 / 0)
    assert parallel.find_job() is None


@pytest.mark.parametrize(
    ("variables", "answer"),
    [
        (JOB | {"HAM_JAX_COORDINATOR": "here"}, r"must be <host of process 0>:<port>"),
        (HYDRA, "pip install mpi4py"),
        (MPI | {"OMPI_COMM_WORLD_RANK": ""}, "OMPI_COMM_WORLD_RANK = '' must be a number"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "two"}, "SLURM_STEP_NUM_TASKS = 'two' must be a number"),
        (MPI | {"CUDA_VISIBLE_DEVICES": "3"}, r"2 MPI ranks share 1 GPU"),
    ],
)
def test_a_job_that_cannot_be_joined_is_refused(variables, answer, joined, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=answer):
        parallel.initialize()
    assert joined == []


@pytest.mark.parametrize(
    ("visible", "own"),
    [("4,5", [1]), ("0,1,2,3", [2, 3]), ("", None), ("-1", None), ("NoDevFiles", None)],
)
def test_an_mpi_rank_takes_its_share_of_the_gpus_of_its_host(visible, own, joined, monkeypatch):
    for name, value in (MPI | {"CUDA_VISIBLE_DEVICES": visible}).items():
        monkeypatch.setenv(name, value)
    parallel.initialize()
    (options,) = joined
    assert options["local_device_ids"] == own


def test_steps_and_jobs_meet_at_ports_of_their_own(joined, monkeypatch):
    addresses = set()
    for job in (7, 8):
        for step in (0, 1):
            for name, value in (
                STEP | {"SLURM_JOB_ID": f"{job}", "SLURM_STEP_ID": f"{step}"}
            ).items():
                monkeypatch.setenv(name, value)
            addresses.add(parallel.find_job().coordinator)
    assert len(addresses) == 4
    assert all(61440 <= int(address.rpartition(":")[2]) <= 65535 for address in addresses)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "5000")
    assert parallel.find_job().coordinator is None  # JAX reads the variable


TOGETHER = """
    import os, signal, sys
    from pathlib import Path
    from ham_jax import parallel
    from ham_jax.config import InputError

    try:
        parallel.initialize()
        parallel.check_shared(Path("run"))
        number = int(os.environ["HAM_JAX_PROCESS_ID"])
        for step in range(1000):
            if (number, step) == (1, 5):
                if sys.argv[1] == "is killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if sys.argv[1] == "is refused":
                    raise InputError("process 1 alone")
            parallel.barrier(f"step {step}")
    except InputError as error:
        print(error, file=sys.stderr, flush=True)
        parallel.leave(2)
"""


def two_processes(program, *arguments, folders, environments=({}, {}), seconds=60):
    """Returns the (exit code, stderr) of each process of a job."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{s.getsockname()[1]}"
    common = os.environ | JOB | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    common["HAM_JAX_COORDINATOR"] = coordinator
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), *arguments],
            env=common | {"HAM_JAX_PROCESS_ID": str(number)} | environment,
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, (folder, environment) in enumerate(zip(folders, environments, strict=True))
    ]
    try:
        errors = [job.communicate(timeout=seconds)[1] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    return [(job.returncode, error) for job, error in zip(jobs, errors, strict=True)]


@pytest.mark.parametrize(("fate", "code"), [("is killed", -9), ("is refused", 2)])
def test_a_process_that_is_gone_takes_the_others_along(fate, code, tmp_path):
    (first, error), (second, its) = two_processes(TOGETHER, fate, folders=[tmp_path] * 2)
    assert (first, second) == (1, code), error + its
    assert "another process is gone" in error
    assert ("process 1 alone" in its) == (fate == "is refused")
    assert [path.name for path in (tmp_path / "run").iterdir()] == []


def test_hosts_that_do_not_share_the_folder_are_named(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        (folder / "run").mkdir(parents=True)
    for code, error in two_processes(TOGETHER, "", folders=folders):
        assert code == 2, error
        (line,) = [line for line in error.splitlines() if "does not see" in line]
        assert "Process 1 on" in line
        assert str(folders[1] / "run") in line
        assert str(folders[0] / "run") in line
    assert not any(path for folder in folders for path in (folder / "run").iterdir())


def test_a_folder_that_cannot_be_made_is_told_to_all(tmp_path):
    (tmp_path / "run").write_text("a file")
    for code, error in two_processes(TOGETHER, "", folders=[tmp_path] * 2):
        assert (code, "cannot write into" in error) == (2, True), error


def test_a_stranger_at_the_same_port_is_told_on_both_sides(tmp_path):
    strangers = {"HAM_JAX_JOB": "one"}, {"HAM_JAX_JOB": "two"}
    for code, error in two_processes(TOGETHER, "", folders=[tmp_path] * 2, environments=strangers):
        assert (code, "belongs to another job" in error) == (2, True), error


def test_a_port_that_is_taken_is_told_at_once(joined, monkeypatch):
    monkeypatch.setattr(parallel.time, "sleep", lambda seconds: None)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        for name, value in JOB.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HAM_JAX_PROCESS_ID", "0")
        monkeypatch.setenv("HAM_JAX_COORDINATOR", f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(InputError, match="JAX_COORDINATOR_PORT"):
            parallel.initialize()
    assert joined == []


@pytest.mark.skipif(not shutil.which("mpirun"), reason="mpirun is not installed")
def test_mpirun_makes_one_job(tmp_path):
    program = textwrap.dedent("""
        from pathlib import Path
        import jax
        from ham_jax import parallel
        parallel.initialize()
        rank = str(jax.process_index())
        Path(rank).write_text(" ".join(parallel._gather(rank)))
    """)
    options = ("--allow-run-as-root", "--oversubscribe", "-n", "2")
    ended = subprocess.run(
        ["mpirun", *options, sys.executable, "-c", program],
        env={k: v for k, v in os.environ.items() if not k.startswith(("HAM_JAX_", "SLURM_"))}
        | {"PYTHONPATH": str(ROOT), "OMPI_MCA_plm_rsh_agent": "false", "JAX_NUM_CPU_DEVICES": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 0, ended.stderr
    for rank in (0, 1):
        assert (tmp_path / f"{rank}").read_text() == "0 1"
