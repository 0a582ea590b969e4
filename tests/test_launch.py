"""launch.sh passes arguments and signals on, restarts what was preempted, leaves nobody behind.

A stand-in for the environment's python runs a small program in place of `ham_jax.main` and notes
what pip is asked for; the rest of the script is the real one.
"""

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml

from ham_jax.main import MODES

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
    # A suite that was started in the background may ignore these, and so would its children.
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    }

    def start(program, *arguments, command=(ROOT / "launch.sh",), pass_fds=(), **environment):
        (tmp_path / "main.py").write_text(textwrap.dedent(program))
        job = subprocess.Popen(
            [*command, *arguments],
            cwd=tmp_path,
            pass_fds=pass_fds,
            env=os.environ
            | {"HAM_JAX_VENV": str(tmp_path / "venv"), "TMPDIR": str(tmp_path)}
            | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(job)
        return job

    yield start
    for job in started:
        job.kill()
        job.wait()
        job.stdout.close()  # not read to its end, which a child that outlives a failed test holds
        job.stderr.close()
    for number, handler in before.items():
        signal.signal(number, handler)


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
        open(f"stopped-{number}", "w").write(str(int(signum)))
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


@pytest.mark.parametrize(
    ("number", "received", "code"),
    [
        (signal.SIGTERM, signal.SIGTERM, 75),
        (signal.SIGINT, signal.SIGINT, 130),
        (signal.SIGHUP, signal.SIGTERM, 75),  # the terminal was closed
    ],
)
def test_a_signal_is_passed_on_and_nothing_is_started_again(
    launch, tmp_path, number, received, code
):
    job = launch(WAITS, "--mode=train")
    wait_until((tmp_path / "pid-0").exists)
    job.send_signal(number)
    assert job.wait(30) == code
    assert (tmp_path / "stopped-0").read_text() == str(int(received))
    assert not alive((tmp_path / "pid-0").read_text())


def test_a_run_that_is_held_for_a_while_goes_on(launch, tmp_path):
    job = launch(WAITS, "--mode=train")
    wait_until((tmp_path / "pid-0").exists)
    pid = int((tmp_path / "pid-0").read_text())
    os.kill(pid, signal.SIGSTOP)
    time.sleep(1)
    assert job.poll() is None
    os.kill(pid, signal.SIGCONT)
    os.kill(pid, signal.SIGTERM)  # a preemption: it is started again
    wait_until(lambda: (tmp_path / "pid-0").read_text() != str(pid))
    job.terminate()
    assert job.wait(30) == 75


def test_ctrl_c_typed_at_a_terminal_reaches_every_process(launch, tmp_path):
    ours, theirs = pty.openpty()
    script = "import os, sys; os.login_tty(int(sys.argv[1])); os.execv(sys.argv[2], sys.argv[2:])"
    start = [sys.executable, "-c", script, str(theirs), str(ROOT / "launch.sh"), "--processes=2"]
    job = launch(WAITS, command=start, pass_fds=(theirs,))
    wait_until(lambda: all((tmp_path / f"pid-{number}").exists() for number in range(2)))
    os.write(ours, b"\x03")
    assert job.wait(30) == 130
    for number in range(2):
        assert (tmp_path / f"stopped-{number}").read_text() == str(int(signal.SIGINT))
        assert not alive((tmp_path / f"pid-{number}").read_text())
    os.close(ours)
    os.close(theirs)


def test_what_a_crashed_run_had_started_ends_too(launch, tmp_path):
    program = """
        import os, signal, subprocess
        worker = subprocess.Popen(["sleep", "600"])
        open("worker", "w").write(str(worker.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    job = launch(program, "--mode=train")
    assert job.wait(60) == 128 + signal.SIGKILL
    wait_until(lambda: not alive((tmp_path / "worker").read_text()))


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
        with open("pid.tmp", "w") as file:
            file.write(str(os.getpid()))
        os.rename("pid.tmp", "pid")
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


def num_installations(folder):
    log = folder / "pip.log"
    return log.read_text().count("requirements.txt") if log.exists() else 0


@pytest.mark.parametrize("fault", ["its Python is gone", "making it was broken off"])
def test_a_broken_environment_is_made_anew_and_filled_anew(fault, launch, tmp_path):
    python = tmp_path / "venv/bin/python"
    assert launch("", "--mode=train").wait(60) == 0
    stamps = [tmp_path / "venv" / f".installed-{name}" for name in ("predict", "ham_jax")]
    assert (num_installations(tmp_path), [stamp.exists() for stamp in stamps]) == (1, [True] * 2)
    whole = tmp_path / "whole"
    whole.write_text(python.read_text())
    if fault == "its Python is gone":
        python.write_text("#!/bin/sh\nexit 127\n")
    else:  # after python, before pip
        for stamp in stamps:
            stamp.unlink()
        python.write_text(whole.read_text().replace("exit 0", "exit 1"))
    base = tmp_path / "python3"
    base.write_text(
        f'#!/bin/sh\nif [ "$1 $2" = "-m venv" ]; then exec cp {whole} "$3/bin/python"; fi\n'
        f'exec {sys.executable} "$@"\n'
    )
    base.chmod(0o755)
    before = num_installations(tmp_path)
    assert launch("", "--mode=train", PYTHON=str(base)).wait(60) == 0
    assert num_installations(tmp_path) == before + 1


def test_an_installation_that_failed_is_done_again(launch, tmp_path):
    python = tmp_path / "venv/bin/python"
    works = python.read_text()
    python.write_text(works.replace("exit 0", 'test "$3" = --version; exit'))
    job = launch("open('ran', 'w')", "--mode=train")
    assert "the installation failed" in job.communicate(timeout=60)[1]
    assert (job.returncode, (tmp_path / "ran").exists()) == (2, False)
    python.write_text(works)
    assert launch("", "--mode=train").wait(60) == 0
    assert num_installations(tmp_path) == 2


def test_only_what_trains_gets_the_packages_of_training(launch, tmp_path):
    def asked_for(*arguments, venv):
        """Returns the files that pip is given."""
        (tmp_path / "pip.log").unlink(missing_ok=True)
        if not (tmp_path / venv).exists():
            shutil.copytree(tmp_path / "venv", tmp_path / venv)
        assert launch("", *arguments, HAM_JAX_VENV=str(tmp_path / venv)).wait(60) == 0
        log = tmp_path / "pip.log"
        return re.findall(r"requirements\S*", log.read_text()) if log.exists() else []

    small, whole = ["requirements-predict.txt"], ["requirements.txt"]
    for name, mode in MODES.items():
        assert asked_for(f"--mode={name}", venv=name) == (whole if mode.trains else small)
    assert asked_for("--images=x", "--mode", "predict", venv="a") == small
    assert asked_for("predict", "--mode", venv="b") == small
    assert asked_for("--mode=predict", venv="train") == []  # it is there already
    assert asked_for("--config=x", venv="predict") == whole
    assert asked_for("--mode=eval", venv="predict") == []


def test_help_installs_nothing(launch, tmp_path):
    out, _ = launch("", "--help", HAM_JAX_VENV=str(tmp_path / "new")).communicate(timeout=60)
    assert "--processes N" in out
    assert not (tmp_path / "new").exists()


def test_gpus_are_shared_out_among_the_processes(launch, tmp_path):
    program = "import os; print(os.environ['HAM_JAX_GPUS_PER_PROCESS'])"
    gpus = {"JAX_PLATFORMS": "", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    assert launch(program, "--processes=2", **gpus).communicate(timeout=60)[0].strip() == "2"
    refused = launch(program, "--processes=5", **gpus)
    assert "here are 4" in refused.communicate(timeout=60)[1]
    assert refused.returncode == 2
    on_cpu = launch(program, "--processes=5", **gpus | {"JAX_PLATFORMS": "cpu"})
    assert on_cpu.communicate(timeout=60)[0].strip() == "0"


@pytest.mark.parametrize(
    "job",
    [
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_JOB_ID": "7"},
        {
            "HAM_JAX_NUM_PROCESSES": "2",
            "HAM_JAX_PROCESS_ID": "0",
            "HAM_JAX_COORDINATOR": "elsewhere:61440",
        },
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "PMIX_NAMESPACE": "x"},
        {"TPU_WORKER_HOSTNAMES": "a,b"},
        {"HAM_JAX_NUM_PROCESSES": "2"},  # half a job: it would not start again, either
    ],
    ids=lambda job: next(iter(job)),
)
def test_one_process_of_several_is_not_started_again_alone(job, launch, tmp_path):
    program = "import sys; open('starts', 'a').write('x'); sys.exit(75)"
    started = launch(program, "--mode=train", **job)
    _, err = started.communicate(timeout=60)
    assert (started.returncode, (tmp_path / "starts").read_text()) == (75, "x")
    assert "must start all of them again" in err


def test_one_that_had_nothing_to_save_yet_goes_on_all_the_same(launch, tmp_path):
    program = WAITS.replace("    signal.signal(signal.SIGTERM, stop)\n", "")
    job = launch(program, "--mode=train")
    wait_until((tmp_path / "pid-0").exists)
    job.terminate()
    assert job.wait(30) == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_installation_can_be_stopped_and_is_done_again(number, launch, tmp_path):
    python = tmp_path / "venv/bin/python"
    works = python.read_text()
    slow = "echo $$ > pip-pid.tmp; mv pip-pid.tmp pip-pid; exec sleep 600"
    python.write_text(works.replace("exit 0", f'[ "$3" = --version ] || {{ {slow}; }}; exit 0'))
    job = launch("", "--mode=train")
    wait_until((tmp_path / "pip-pid").exists)
    job.send_signal(number)
    assert job.wait(30) == (75 if number == signal.SIGTERM else 130)
    wait_until(lambda: not alive((tmp_path / "pip-pid").read_text().strip()))
    python.write_text(works)
    assert launch("", "--mode=train").wait(60) == 0


@pytest.mark.parametrize("lock", ["flock", "a file system that refuses flock", "a stale folder"])
def test_two_at_a_time_install_once(lock, launch, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    if lock != "flock":
        (tools / "flock").write_text("#!/bin/sh\nexit 1\n")
        (tools / "flock").chmod(0o755)
    if lock == "a stale folder":
        (tmp_path / "venv/.locked").mkdir()
        os.utime(tmp_path / "venv/.locked", (1, 1))
    python = tmp_path / "venv/bin/python"
    slow = '[ "$3" = --version ] || sleep 1; exit 0'
    python.write_text(python.read_text().replace("exit 0", slow))
    path = f"{tools}:{os.environ['PATH']}"
    jobs = [launch("", "--mode=train", PATH=path) for _ in range(2)]
    assert [job.wait(60) for job in jobs] == [0, 0]
    assert num_installations(tmp_path) == 1
    assert not (tmp_path / "venv/.locked").exists()


def test_it_runs_in_an_empty_environment_from_a_path_with_blanks_and_brackets(launch, tmp_path):
    folder = tmp_path / "a [1] b/*{c}"
    folder.mkdir(parents=True)
    for file in ("launch.sh", *(path.name for path in ROOT.glob("requirements*.txt"))):
        shutil.copy(ROOT / file, folder)
    (tmp_path / "venv").rename(folder / ".venv")
    empty = ["env", "-i", f"PATH={os.environ['PATH']}", "TMPDIR=/nonexistent/folder", "./launch.sh"]
    program = "import os, sys; print(sys.argv[1:], 'HOME' in os.environ); sys.exit(3)"
    for arguments in (["--mode=train"], ["--processes=2", "--mode=train"]):
        job = launch("", *arguments, command=["sh", "-c", 'cd "$0" && exec "$@"', folder, *empty])
        (tmp_path / "main.py").write_text(program)
        out, err = job.communicate(timeout=60)
        assert (job.returncode, out) == (3, "['--mode=train'] False\n"), err


def test_a_ready_environment_needs_no_lock_and_no_place_to_write(launch, tmp_path):
    assert launch("", "--mode=train").wait(60) == 0
    (tmp_path / "venv/.lock").unlink()
    assert launch("", "--mode=train").wait(60) == 0
    assert not (tmp_path / "venv/.lock").exists()


def test_the_pods_of_the_kubernetes_example_are_one_job(launch, tmp_path):
    service, job = yaml.safe_load_all((ROOT / "examples/kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    count = job["spec"]["completions"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert count == job["spec"]["parallelism"] > 1
    name, subdomain = job["metadata"]["name"], service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == subdomain
    ignored = [
        rule.get("onExitCodes", {}).get("values")
        for rule in job["spec"]["podFailurePolicy"]["rules"]
        if rule["action"] == "Ignore"
    ]
    assert [75] in ignored
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    assert given["HAM_JAX_COORDINATOR"].startswith(f"{name}-0.{subdomain}:")
    (tmp_path / "launch.sh").write_text(f'#!/bin/sh\nexec "{ROOT}/launch.sh" "$@"\n')
    (tmp_path / "launch.sh").chmod(0o755)
    program = """
        import sys
        from ham_jax import parallel
        job = parallel.find_job()
        print(sys.argv[1:], job.number, job.count, job.coordinator)
    """
    for index in range(count):
        started = launch(
            program,
            command=[*container["command"], *container["args"]],
            **given | {"JOB_COMPLETION_INDEX": str(index), "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        )
        out, err = started.communicate(timeout=60)
        address = given["HAM_JAX_COORDINATOR"]
        assert out == f"{container['args']} {index} {count} {address}\n", err


def test_the_commands_of_the_tpu_example_are_shell():
    text = (ROOT / "examples/tpu_pod.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    assert len(blocks) > 3
    for block in blocks:
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
        for remote in re.findall(r"--command='(.*?)'", block, re.DOTALL):
            subprocess.run(["bash", "-n"], input=remote, text=True, check=True)
    assert sum("./launch.sh" in block for block in blocks) == 2
