"""Files written whole or not at all, and the proof beforehand that they can be."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import logging

from ham_jax import reading
from ham_jax.config import InputError


def faults_of_folder(folder: Path, flag: str) -> list[str]:
    """Tries to write into a folder that need not exist yet, and leaves no trace.

    Args:
      folder: that files will be written into.
      flag: what it was given as, such as '--workdir', for the message.

    Returns:
      What is wrong, as sentences; none where all is well.
    """
    made = []
    try:
        for missing in reversed([p for p in (folder, *folder.parents) if not p.exists()]):
            missing.mkdir()
            made.append(missing)
        if not folder.is_dir():
            return [f"{flag}={folder} is a file; a folder is needed."]
        # Not TemporaryFile, which on Linux has no name: some file systems refuse only names.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".ham_jax-"):
            pass
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = getattr(error, "strerror", None) or error
        return [f"{flag}={folder}: nothing can be written there ({why}). Name another folder."]
    finally:
        with contextlib.suppress(OSError):  # another process has put something into it
            for path in reversed(made):
                path.rmdir()
    return []


def faults_of_file(path: Path, flag: str) -> list[str]:
    """Tries to write beside a file that need not exist yet, and leaves no trace.

    Args:
      path: that will be written or replaced.
      flag: what it was given as, such as '--output', for the message.

    Returns:
      What is wrong, as sentences; none where all is well.
    """
    try:
        if path.is_dir():
            return [f"{flag}={path} is a folder; name a file in it."]
        if path.exists() and not path.is_file():
            return [f"{flag}={path} is a device or a pipe, no file that can be replaced."]
        if not path.parent.is_dir():
            return [f"{flag}={path}: there is no folder {path.parent}. Make it, or name another."]
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        return [f"{flag}={path} cannot be written ({why}). Name another file."]
    return faults_of_folder(path.parent, flag)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lets one process at a time work; the others wait here, or go on where there are no locks."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # released when closed, also by a crash
        except OSError as error:  # Lustre and NFS may be mounted without
            _warn_of_no_locks(path, error)
        yield


@contextlib.contextmanager
def claimed(path: Path, flag: str) -> Iterator[None]:
    """Holds what belongs to one job at a time, such as a run's folder; does not wait.

    The file says who holds it: host, process and since when. What a killed job left there does not
    count. It stays, empty, when the claim ends, unless it is alone in a folder made for it.

    Args:
      path: of the file; its folder is made.
      flag: what is claimed, such as '--workdir=runs/resnet', for the message.

    Raises:
      InputError: another job holds it.
    """
    is_new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_free = True
        except BlockingIOError:
            is_free = False
        except OSError as error:
            _warn_of_no_locks(path, error)
            is_free = None  # not known: go by what the file says
        file.seek(0)
        holder = file.read(1000).split()
        if is_free is None:
            is_free = not (holder and _may_live(*holder[:2]))
        if not is_free:
            host, pid, since = [*holder, "?", "?", "?"][:3]
            raise InputError(
                f"{flag} is in use: process {pid} on host {host} has worked there since {since}."
                f" Wait for it, stop it, or name another folder. If it is long gone, remove {path}."
            )
        file.truncate(0)
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        file.write(f"{socket.gethostname()} {os.getpid()} {now}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
            if is_new and os.listdir(path.parent) == [path.name]:
                path.unlink()
                path.parent.rmdir()


def _may_live(host: str, pid: str) -> bool:
    if host != socket.gethostname() or not pid.isdecimal():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:  # there, and another user's
        pass
    return int(pid) != os.getpid()


def _warn_of_no_locks(path: Path, error: OSError) -> None:
    logging.warning(
        "%s cannot be locked (%s): see to it that no other job uses %s at the same time.",
        path,
        error.strerror,
        path.parent,
    )


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text in UTF-8 as `write_bytes` does; bytes of names that are not become escapes."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes bytes under a temporary name, then renames it.

    Both are on the disk before this returns: after a power failure the file is the old one or the
    new one. Where `path` is a link, what it points to is replaced.

    Raises:
      OSError: it cannot be written, or is there and no regular file, such as /dev/null.
    """
    path = Path(path)
    if path.is_symlink():
        path = path.resolve()
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{path} is a folder, a device or a pipe, no file that can be replaced")
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes strict, indented JSON.

    Raises:
      ValueError: nan or an infinity, which JSON does not have.
      TypeError: what JSON cannot hold, such as an array.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Args:
      path: of the file.
      remedy: what to do where it is damaged, a sentence.

    Raises:
      FileNotFoundError: there is no such file.
      InputError: it is empty, cut short, too large or holds something else.
    """
    try:
        return reading.read_json(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}. {remedy}") from error


def _temporary(path: Path) -> Path:
    """Returns a name beside `path` that is not longer: names have a limit."""
    return path.with_name(f".{path.name[:40]}.{os.getpid()}.tmp")


def _sync_folder(folder: Path) -> None:
    """Brings a renaming to the disk, where the file system can do that for folders."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
