"""On a real Slurm: three nodes on this machine, in a folder and at ports of their own."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from ham_jax import checkpoints

ROOT = Path(__file__).parents[1]
NAMES = (
    *("setpriv", "munged", "slurmctld", "slurmd"),
    *("srun", "salloc", "sbatch", "scancel", "squeue", "scontrol"),
)
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
PROGRAMS = {name: shutil.which(name, path=PATH) for name in NAMES}
MISSING = [name for name, path in PROGRAMS.items() if path is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"no Slurm: {', '.join(MISSING)} not installed"),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons start other users' jobs as root"),
]

# The names of the nodes are addresses, so that nobody has to look them up.
CONF = """\
ClusterName=ham
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=127.0.0.[1-3] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[3]}] CPUs=4
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

LAUNCH = """\
#!/bin/sh
exec {root}/launch.sh "$@"
"""

TINY = """\
from ham_jax import config
from ham_jax.models import resnet

# One narrow block compiles in a fraction of the time.
resnet.DEPTHS["resnet18"], resnet._WIDTHS = (1,), (16,)


def get_config():
    c = config.base()
    c.data.dir = "raw"
    c.data.prepared_dir = "prepared"
    c.data.synthetic_images = 150
    c.data.canvas = (24, 32)
    c.data.num_folds = 3
    c.data.feed = "resident"
    c.model.stem = "small"
    c.augment.crop_px = 16
    c.optim.learning_rate = 0.01
    c.train.batch_size = 8
    c.train.duration = {"steps": 30}
    c.eval.every = {"steps": 30}
    c.eval.batch_size = 64
    c.eval.ood = False
    c.checkpoint.every = {"steps": 100}
    c.log.every_steps = 1
    c.log.tensorboard = False
    return c
"""


def free_ports(count):
    """Returns the first of `count` ports in a row that are free."""
    for first in range(17000, 30000, 100):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for number, each in enumerate(sockets):
                each.bind(("", first + number))
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
        return list(range(first, first + count))
    raise AssertionError("no ports are free")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Starts the cluster; returns run(*command, **environment) -> CompletedProcess."""
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, ports=free_ports(4)))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "state").mkdir()
    # What is set around the tests, such as by a job that they run in, is not the cluster's.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "HAM_JAX_", "SBATCH_", "OMPI_", "PMI"))
    } | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
    }

    daemons = []

    def start(name, *arguments):
        # They end with this process, however it ends.
        command = [PROGRAMS["setpriv"], "--pdeathsig=KILL", PROGRAMS[name], *arguments]
        with (folder / f"{name}.out").open("ab") as out:
            daemons.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))

    def run(*command, **more):
        return subprocess.run(
            [PROGRAMS.get(command[0], command[0]), *map(str, command[1:])],
            env=environment | {k: str(v) for k, v in more.items()},
            cwd=more.get("CWD", folder),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    try:
        munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        start("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge)
        wait_for((folder / "munge.socket").exists, 30, (folder / "munged.out").read_text)
        start("slurmctld", "-D")
        for number in (1, 2, 3):
            start("slurmd", "-D", "-N", f"127.0.0.{number}")
        wait_for(
            lambda: run("srun", "--nodes=3", "--immediate=1", "true").returncode == 0,
            *(60, (folder / "slurmctld.log").read_text),
        )
        yield run
    finally:
        if run("scancel", "--user=root").returncode == 0:
            for _ in range(50):
                if not run("squeue", "--noheader").stdout.strip():
                    break
                time.sleep(0.1)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


@pytest.fixture
def place(tmp_path):
    """A folder with launch.sh and a configuration, as a repository has them."""
    (tmp_path / "launch.sh").write_text(LAUNCH.format(root=ROOT))
    (tmp_path / "launch.sh").chmod(0o755)
    (tmp_path / "tiny.py").write_text(TINY)
    (tmp_path / "runs").mkdir()
    python = tmp_path / "venv/bin/python"  # installs nothing
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ "$1 $2" = "-m pip" ] && exit\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return tmp_path


def wait_for(condition, seconds, why):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.05)


def launcher_of(job, task):
    """Returns the process id of launch.sh of a task of a job."""
    wanted = {f"SLURM_JOB_ID={job}", f"SLURM_PROCID={task}"}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            environment = (process / "environ").read_bytes().decode(errors="replace").split("\0")
            parent = (process / "stat").read_text().rsplit(")", 1)[1].split()[1]
            above = Path(f"/proc/{parent}/comm").read_text()
        except OSError:
            continue
        if wanted <= set(environment) and b"launch.sh" in b" ".join(words) and "slurm" in above:
            return int(process.name)
    return None


def metrics(workdir):
    numbers = json.loads((workdir / "metrics.json").read_text())
    return {key: value for key, value in numbers.items() if isinstance(value, float)}


def weights(workdir):
    params, *_, step = checkpoints.load_for_inference(workdir, which="latest")
    return step, params


def test_two_nodes_one_told_to_stop_queued_again_train_what_one_process_trains(slurm, place):
    """The sbatch example from its start to its end; TERM reaches one task alone."""
    alone = slurm(
        *("sh", "launch.sh", "--config=tiny.py", "--workdir=alone", "--config.data.fold=0"),
        CWD=place,
        HAM_JAX_VENV=place / "venv",
        JAX_NUM_CPU_DEVICES=2,
    )
    assert alone.returncode == 0, alone.stderr
    sent = slurm(
        *("sbatch", "--parsable", "--array=0", "--nodes=2", "--gpus-per-node=0"),
        *("--cpus-per-task=1", ROOT / "examples/slurm.sbatch", "--config=tiny.py"),
        CWD=place,
        HAM_JAX_VENV=place / "venv",
    )
    assert sent.returncode == 0, sent.stderr
    job = sent.stdout.strip().partition(";")[0]
    log, workdir = place / f"runs/slurm-{job}_0.out", place / "runs/slurm/fold0"

    def said():
        return log.read_text() if log.exists() else "nothing was printed"

    lines = workdir / "metrics.jsonl"
    wait_for(lambda: lines.exists() and lines.stat().st_size, 240, said)  # compiled, on its way
    os.kill(launcher_of(job, 1), signal.SIGTERM)
    told = time.monotonic()
    wait_for(lambda: "queued again" in said(), 60, said)
    assert time.monotonic() - told < 30
    assert "stopped at step" in said()
    assert "finished" not in said()
    for number in (0, 1):
        assert f"task {number}: Exited with exit code 75" in said()
    assert weights(workdir)[0] < 30
    # A job that is queued again waits for two minutes; this one need not. But in the same second
    # Slurm would take its credential for that of the job before, which is revoked.
    time.sleep(3)
    wait_for(
        lambda: slurm("scontrol", "update", f"JobId={job}", "StartTime=now").returncode == 0,
        *(30, said),
    )
    wait_for((workdir / "metrics.json").exists, 240, said)
    wait_for(lambda: not slurm("squeue", "--noheader").stdout.strip(), 60, said)
    starts = [json.loads(line) for line in (workdir / "starts.jsonl").read_text().splitlines()]
    assert [start["processes"] for start in starts] == [2, 2]
    assert 0 == starts[0]["step"] < starts[1]["step"] < 30
    (step, ours), (_, theirs) = weights(workdir), weights(place / "alone")
    assert step == 30
    np.testing.assert_equal(ours, theirs)
    assert metrics(workdir) == metrics(place / "alone")


MEETS = """
    import sys, time
    from pathlib import Path
    from ham_jax import parallel
    from ham_jax.config import InputError

    step = sys.argv[1]
    try:
        parallel.initialize()
        parallel.check_shared(Path("shared"))
        rows = parallel._gather(step)
    except InputError as error:
        print(f"{step}: {error}", flush=True)
        parallel.leave(2)
    print(f"{step} met {rows}", flush=True)
"""


@pytest.mark.parametrize("port", [None, 61999])
def test_two_steps_side_by_side_do_not_join(port, slurm, tmp_path):
    (tmp_path / "meets.py").write_text(textwrap.dedent(MEETS))
    python = f"PYTHONPATH={ROOT} {sys.executable} meets.py"
    step = "srun --kill-on-bad-exit=1 --nodes=2 --ntasks=2 --exact --cpus-per-task=1 sh -c"
    steps = " & ".join(f"{step} '{python} {name}'" for name in ("first", "second"))
    both = slurm(
        *("salloc", "--nodes=2", "--ntasks-per-node=2", "sh", "-c", f"{steps} & wait"),
        CWD=tmp_path,
        **({"JAX_COORDINATOR_PORT": port} if port else {}),
    )
    said = both.stdout + both.stderr
    assert both.returncode == 0, said
    met = [said.count(f"{name} met ['{name}', '{name}']") for name in ("first", "second")]
    for name, other in (("first", "second"), ("second", "first")):
        assert f"{name} met ['{other}" not in said, said
        assert f"{name} met ['{name}', '{other}" not in said, said
    if port:
        # The same for both, against our advice. A step meets its own, when the other has left, or
        # ends with an error: ours, or first one of JAX's.
        told = ("JAX_COORDINATOR_PORT", "different incarnation", "detected fatal errors")
        assert met == [2, 2] or any(words in said for words in told), said
    else:
        assert met == [2, 2], said
