"""Processes join one job, share its rows, and stop together."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from ham_jax import parallel
from ham_jax.config import InputError


def test_a_half_described_job_is_refused(monkeypatch):
    monkeypatch.setenv("HAM_JAX_NUM_PROCESSES", "2")
    with pytest.raises(InputError, match="HAM_JAX_PROCESS_ID, HAM_JAX_COORDINATOR"):
        parallel.initialize()
    monkeypatch.setenv("HAM_JAX_COORDINATOR", "127.0.0.1:1")
    monkeypatch.setenv("HAM_JAX_PROCESS_ID", "2")
    with pytest.raises(InputError, match="must be a number below"):
        parallel.initialize()


def test_one_process_holds_all_rows_cut_over_its_devices():
    mesh = parallel.mesh()
    assert parallel.local_rows(mesh, 16) == slice(0, 16)
    rows = np.arange(16 * 3).reshape(16, 3)
    array = parallel.shard(mesh, rows)
    np.testing.assert_array_equal(array, rows)
    assert [shard.data.shape for shard in array.addressable_shards] == [(2, 3)] * 8
    whole = parallel.replicate(mesh, {"a": rows})["a"]
    assert all(shard.data.shape == (16, 3) for shard in whole.addressable_shards)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_request_to_stop_waits_until_it_is_asked_for(number, code):
    before = signal.getsignal(number)
    with parallel.Preemption() as preemption:
        assert not preemption.reached(1)
        os.kill(os.getpid(), number)
        assert preemption.reached(2)
        assert preemption.exit_code == code
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_interrupts_at_once():
    with parallel.Preemption():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


WORKER = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from ham_jax import parallel
    parallel.initialize()
    import jax
    folder = Path(sys.argv[1])
    mesh = parallel.mesh()
    assert parallel.broadcast(jax.process_index() + 5) == 5
    rows = parallel.local_rows(mesh, 8)
    (folder / f"rows-{jax.process_index()}").write_text(f"{rows.start} {rows.stop}")
    with parallel.Preemption() as preemption:
        for step in range(1, 3000):
            time.sleep(0.02)
            if preemption.reached(step):
                (folder / f"stop-{jax.process_index()}").write_text(str(step))
                parallel.barrier("end")
                sys.exit(preemption.exit_code)
""")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_all_processes_of_a_job_stop_after_the_same_step(number, code, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
        "HAM_JAX_NUM_PROCESSES": "2",
        "HAM_JAX_COORDINATOR": f"127.0.0.1:{port}",
    }
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, tmp_path], env=common | {"HAM_JAX_PROCESS_ID": str(k)}
        )
        for k in range(2)
    ]
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("rows-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.5)
        jobs[1].send_signal(number)  # one is asked, both stop
        codes = [job.wait(60) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    assert codes[1] == code
    assert codes[0] == 75
    assert (tmp_path / "stop-0").read_text() == (tmp_path / "stop-1").read_text()
    assert [(tmp_path / f"rows-{k}").read_text() for k in range(2)] == ["0 4", "4 8"]
    assert jax.process_count() == 1
