"""launch.sh passes arguments and signals on, restarts what was preempted, leaves nobody behind.

A stand-in for the environment's python runs a small program in place of `ham_jax.main` and notes
what pip is asked for; the rest of the script is the real one.
"""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PYTHON = """\
#!/bin/sh
if [ "$1 $2" = "-m pip" ]; then echo "$@" >> {folder}/pip.log; exit 0; fi
if [ "$1 $2" = "-m ham_jax.main" ]; then shift 2; exec {real} {folder}/main.py "$@"; fi
exec {real} "$@"
"""


@pytest.fixture
def launch(tmp_path):
    """Returns start(program, *arguments): launch.sh with `program` in place of ham_jax.main."""
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON.format(folder=tmp_path, real=sys.executable))
    python.chmod(0o755)
    started = []

    def start(program, *arguments, **environment):
        (tmp_path / "main.py").write_text(textwrap.dedent(program))
        job = subprocess.Popen(
            [ROOT / "launch.sh", *arguments],
            cwd=tmp_path,
            env=os.environ | {"HAM_JAX_VENV": str(tmp_path / "venv")} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(job)
        return job

    yield start
    for job in started:
        job.kill()
        job.communicate()


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def alive(pid):
    """Returns whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


WAITS = """
    import os, signal, sys, time
    number = os.environ.get("HAM_JAX_PROCESS_ID", "0")
    def stop(signum, frame):
        open(f"stopped-{number}", "w").write(str(signum))
        sys.exit(75 if signum == signal.SIGTERM else 130)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with open(f"pid-{number}.tmp", "w") as file:
        file.write(str(os.getpid()))
    os.rename(f"pid-{number}.tmp", f"pid-{number}")
    while True:
        time.sleep(0.1)
"""


def test_arguments_and_exit_code_pass_straight_through(launch, tmp_path):
    program = "import sys; print(sys.argv[1:]); sys.exit(7)"
    job = launch(program, "--config=configs/resnet.py", "--config.data.dir=my photographs", "--x=*")
    out, _ = job.communicate(timeout=60)
    assert (
        out.strip() == "['--config=configs/resnet.py', '--config.data.dir=my photographs', '--x=*']"
    )
    assert job.returncode == 7
    assert (tmp_path / "pip.log").read_text().count("requirements.txt") == 1
    again = launch(program, "--y")
    again.communicate(timeout=60)
    assert (tmp_path / "pip.log").read_text().count("requirements.txt") == 1


def test_a_preempted_run_is_started_again(launch, tmp_path):
    program = """
        import pathlib, sys
        with open("starts", "a") as file:
            file.write("x")
        sys.exit(75 if len(pathlib.Path("starts").read_text()) < 3 else 0)
    """
    job = launch(program, "--mode=train")
    _, err = job.communicate(timeout=60)
    assert job.returncode == 0
    assert (tmp_path / "starts").read_text() == "xxx"
    assert err.count("starting again") == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_is_passed_on_and_nothing_is_started_again(launch, tmp_path, number, code):
    job = launch(WAITS, "--mode=train")
    wait_until((tmp_path / "pid-0").exists)
    job.send_signal(number)
    assert job.wait(30) == code
    assert (tmp_path / "stopped-0").read_text() == str(int(number))
    assert not alive((tmp_path / "pid-0").read_text())


def test_many_processes_are_one_job_and_none_is_left_behind(launch, tmp_path):
    job = launch(WAITS, "--processes", "3", "--mode=train")
    pids = [tmp_path / f"pid-{number}" for number in range(3)]
    wait_until(lambda: all(pid.exists() for pid in pids))
    environments = [
        dict(
            entry.split("=", 1)
            for entry in Path(f"/proc/{pid.read_text()}/environ").read_text().split("\0")
            if entry.startswith("HAM_JAX_")
        )
        for pid in pids
    ]
    assert {e["HAM_JAX_NUM_PROCESSES"] for e in environments} == {"3"}
    assert [e["HAM_JAX_PROCESS_ID"] for e in environments] == ["0", "1", "2"]
    (coordinator,) = {e["HAM_JAX_COORDINATOR"] for e in environments}
    assert re.fullmatch(r"127\.0\.0\.1:\d+", coordinator)
    job.terminate()
    assert job.wait(30) == 75
    assert all((tmp_path / f"stopped-{number}").exists() for number in range(3))
    assert not any(alive(pid.read_text()) for pid in pids)


def test_one_process_that_fails_takes_the_others_along(launch, tmp_path):
    program = """
        import os, sys, time
        if os.environ["HAM_JAX_PROCESS_ID"] == "1":
            sys.exit("process 1 says why")
        open("pid", "w").write(str(os.getpid()))
        time.sleep(600)
    """
    job = launch(program, "--processes=2")
    _, err = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "process 1 says why" in err
    assert not (tmp_path / "pid").exists() or not alive((tmp_path / "pid").read_text())


def test_what_cannot_run_is_refused_in_a_sentence(launch, tmp_path):
    for arguments in (["--processes", "many"], ["--processes"]):
        job = launch("raise SystemExit(0)", *arguments)
        assert "needs a number" in job.communicate(timeout=60)[1]
        assert job.returncode == 2
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    job = launch("", "--mode=eval", PYTHON=str(old), HAM_JAX_VENV=str(tmp_path / "new"))
    assert "does not run as Python 3.11" in job.communicate(timeout=60)[1]
    assert job.returncode == 2
