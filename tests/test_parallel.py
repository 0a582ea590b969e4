"""One mesh over all processes; a job is joined as its variables say, and stopped together."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest

from ham_jax import parallel
from ham_jax.config import InputError

ROOT = Path(__file__).parents[1]
JOB = {
    "HAM_JAX_NUM_PROCESSES": "2",
    "HAM_JAX_PROCESS_ID": "1",
    "HAM_JAX_COORDINATOR": "127.0.0.1:1",
}


ALONE = {"cluster_detection_method": "deactivate"}  # Slurm's variables may be set too


@pytest.fixture
def joined(monkeypatch):
    """Returns the list of what jax.distributed.initialize was called with."""
    others = ("TPU_WORKER_HOSTNAMES", "HAM_JAX_GPUS_PER_PROCESS", "CUDA_VISIBLE_DEVICES")
    for name in [*JOB, *others, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    return calls


@pytest.mark.parametrize(
    ("variables", "call"),
    [
        ({}, None),
        (JOB, (("127.0.0.1:1", 2, 1), ALONE | {"local_device_ids": None})),
        (
            JOB | {"HAM_JAX_GPUS_PER_PROCESS": "3"},
            (("127.0.0.1:1", 2, 1), ALONE | {"local_device_ids": [3, 4, 5]}),
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
            ((), {"local_device_ids": None}),
        ),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script, without srun
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, ((), {"local_device_ids": None})),
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
    assert joined == [((), {"local_device_ids": own})]


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
    }
    with parallel.Preemption() as preemption:
        for step in range(1, 1000):
            if number == 1 and step == 3:
                os.kill(os.getpid(), int(sys.argv[2]))
            if preemption.reached():
                break
            time.sleep(0.01)
    report |= {"stopped": step, "code": preemption.exit_code}
    (workdir / f"{number}.json").write_text(json.dumps(report))
    parallel.barrier("the end")
""")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_two_processes_are_one_job(number, code, tmp_path):
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
            [sys.executable, "-c", WORKER, tmp_path, str(int(number))],
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
    assert second.pop("code") == code  # the one that was asked
    assert first.pop("code") == 75
    assert first == second
    assert first["dot"] == sum(x * x for x in range(8))
    assert first["from_main"] == 10
    assert first["steps"] == [1, 1]  # the damaged one is used by neither
    assert first["restored"] == list(range(8))
    assert 3 <= first["stopped"] < 999


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
