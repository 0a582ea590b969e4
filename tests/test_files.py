"""Paths as a person writes them; outputs proved beforehand; files whole or not at all; one job."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ham_jax import config, files
from ham_jax.config import InputError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~/runs/a[1]", "/home/me/runs/a[1]"),
        ("$SCRATCH/x", "/big disk/x"),
        ("a/${SCRATCH}", "a//big disk"),
        ("runs/a b#1%ü", "runs/a b#1%ü"),
        ("a:b/c", "a:b/c"),
        ("costs$5", "costs$5"),  # it exists under that name
        ("~", "/home/me"),
    ],
)
def test_a_path_is_expanded_once(text, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "costs$5").touch()
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/big disk")
    assert config.expand(text, "--workdir") == path
    c = config.base()
    assert config.override(c, [("data.prepared_dir", text), ("model.pretrained", "hf:~/$x")]) == []
    assert (c.data.prepared_dir, c.model.pretrained) == (path, "hf:~/$x")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("gs://bucket/run", "is an address"),
        ("s3:/bucket", "is an address"),
        ("file:///tmp/x", "is an address"),
        ("$NOT_SET/run", "no variable NOT_SET"),
        ("x/${NOT_SET}", "no variable NOT_SET"),
        ("~nobody-of-this-name/run", "no home folder of '~nobody-of-this-name'"),
    ],
)
def test_what_is_no_path_here_is_refused(text, why):
    with pytest.raises(InputError, match=why):
        config.expand(text, "--workdir")
    (fault,) = config.override(config.base(), [("data.dir", text)])
    assert why in fault
    assert fault.startswith("--config.data.dir=")


def test_what_will_be_written_is_tried_and_no_trace_is_left(tmp_path):
    file, fifo = tmp_path / "file", tmp_path / "fifo"
    file.write_text("old")
    os.mkfifo(fifo)
    long = tmp_path / ("x" * 300)
    for path, fault in (
        (tmp_path / "new/run", ""),
        (file, "is a file"),
        (file / "run", "Not a directory"),
        (long, "File name too long"),
        (Path("/proc/run"), "nothing can be written there"),
        (Path("nul\0"), "nothing can be written there"),
    ):
        found = files.faults_of_folder(path, "--workdir")
        assert fault in " ".join(found)
        assert bool(found) == bool(fault)
    for path, fault in (
        (tmp_path / "a.csv", ""),
        (file, ""),
        (tmp_path, "is a folder"),
        (fifo, "is a device or a pipe"),
        (Path("/dev/null"), "is a device or a pipe"),
        (long, "File name too long"),
        (tmp_path / "no/a.csv", "there is no folder"),
        (Path("/proc/a.csv"), "nothing can be written there"),
    ):
        found = files.faults_of_file(path, "--output")
        assert fault in " ".join(found)
        assert bool(found) == bool(fault)
    assert {*tmp_path.iterdir()} == {fifo, file}
    assert file.read_text() == "old"


def test_a_file_is_replaced_whole_through_a_link_or_not_at_all(tmp_path, monkeypatch):
    target, link, fifo = tmp_path / "target", tmp_path / "link", tmp_path / "fifo"
    target.write_text("old")
    link.symlink_to(target)
    os.mkfifo(fifo)
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(number), fsync(number)))
    files.write_text(link, "new")
    assert (link.is_symlink(), target.read_text(), len(synced)) == (True, "new", 2)
    with pytest.raises(OSError, match="a device or a pipe"):
        files.write_text(fifo, "x")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match="No space"):
        files.write_text(target, "lost")
    assert target.read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"target", "link", "fifo"}


@given(st.binary(max_size=60) | st.sampled_from([b"", b"{", b"[]", b'{"a": ' * 100_000, b"3"]))
def test_any_bytes_are_an_object_or_a_sentence(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    try:
        content, said = files.read_json(path, "Do this."), None
    except InputError as error:
        content, said = {}, str(error)
    assert isinstance(content, dict)
    assert said is None or (str(path) in said and "Do this." in said)


HOLDS = """
import sys, time
from pathlib import Path
from ham_jax import files
with files.claimed(Path(sys.argv[1]), "--workdir=x"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_job_is_refused_and_a_killed_one_is_not_waited_for(tmp_path):
    lock = tmp_path / "run/.lock"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDS, str(lock)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        refused = pytest.raises(InputError, match=f"--workdir=x is in use: process {first.pid} on")
        with refused, files.claimed(lock, "--workdir=x"):
            pass
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert str(first.pid) in lock.read_text()
    with files.claimed(lock, "--workdir=x"):
        assert str(os.getpid()) in lock.read_text()
    assert lock.read_text() == ""


def test_without_locks_the_file_itself_says_who_works_there(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with files.locked(tmp_path / "lock"):
        assert "see to it that no other job" in caplog.text
    lock, host = tmp_path / ".lock", os.uname().nodename
    gone = subprocess.Popen(["true"])
    gone.wait()
    for holder, is_free in (
        ("", True),
        (f"{host} {gone.pid} then", True),
        (f"{host} {os.getppid()} then", False),
        ("elsewhere 1 then", False),
    ):
        lock.write_text(holder)
        if is_free:
            with files.claimed(lock, "--workdir=x"):
                pass
        else:
            with pytest.raises(InputError, match="since then"), files.claimed(lock, "--workdir=x"):
                pass
