"""What is in a folder: the only walk, for data folders and a person's photographs alike."""

import dataclasses
import fnmatch
import itertools
import operator
import os
import stat
import time
from collections.abc import Sequence
from concurrent import futures
from pathlib import Path

from ham_jax.data import image

# Of macOS, Synology, QNAP, Windows and Linux: thumbnails, copies and what was thrown away.
_SYSTEM = frozenset(
    {
        *("__macosx", "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),
        *("$recycle.bin", "system volume information", "lost+found", "__pycache__"),
    }
)
_RECORDS = "dataset_info.json"  # in folders that `records.prepare` made
_AT_ONCE = 8  # threads that ask for sizes and times
_STAMPS = 500  # asked for by one of them in a row
_FAR_S = 1e-4  # for one: a local disk takes a twentieth


@dataclasses.dataclass(frozen=True)
class Content:
    """What a folder holds, at any depth.

    Attributes:
      files: regular files, those of a folder before those of its folders, each by name.
      faults: what cannot be read, and why: links that lead nowhere, pipes, locked folders.
      left_out: hidden files, and folders that were not entered.
    """

    files: list[Path] = dataclasses.field(default_factory=list)
    faults: dict[Path, str] = dataclasses.field(default_factory=dict)
    left_out: list[Path] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """A source for `image.load` that only says why there is no photograph."""

    why: str

    def read(self) -> bytes:
        """Raises ImageError."""
        raise image.ImageError(self.why)


def is_hidden(name: str, named: Sequence[str] = ()) -> bool:
    """Returns whether a file or folder of this name is never a photograph or table.

    Args:
      name: without the folders above it.
      named: patterns of names that were asked for, hidden or not.
    """
    if not name.startswith(".") and name.lower() not in _SYSTEM:
        return False
    return not any(fnmatch.fnmatchcase(name, pattern) for pattern in named)


def fault(path: str | os.PathLike) -> str | None:
    """Returns why a path cannot be opened as a file; None if it can, as far as one can see."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return "a link that leads nowhere" if os.path.islink(path) else "there is no such file"
    except OSError as error:
        return f"cannot be opened: {error.strerror}"
    except ValueError as error:  # a NUL, or half a character
        return f"no file can have this name: {error}"
    if stat.S_ISDIR(mode):
        return "a folder, where a file must be named"
    return None if stat.S_ISREG(mode) else "a pipe, socket or device, which is never opened"


def walk(folder: str | os.PathLike, named: Sequence[str] = ()) -> Content:
    """Looks through a folder and all below it; links to folders are followed, each folder once.

    Args:
      folder: where to start.
      named: see `is_hidden`.
    """
    files, faults, left_out = _walk(os.fspath(folder), named)
    return Content(
        [Path(path) for path in files],
        {Path(path): why for path, why in faults.items()},
        [Path(path) for path in left_out],
    )


def stamps(folder: str | os.PathLike) -> list[str]:
    """Returns `<size> <time of change, ns> <path below the folder>` of each file in a folder.

    The files are those of `walk`, links followed; folders of records count as well, and so does
    what cannot be read, without size and time. Where each answer is waited for, as on a network
    file system, several are asked for at once; on a local disk threads would take twice as long.
    """
    files, faults, left_out = _walk(os.fspath(folder), ())
    start = len(os.path.join(folder, ""))

    def some(first: int) -> list[str]:
        found = []
        for path in files[first : first + _STAMPS]:
            try:
                what = os.stat(path)
            except OSError:  # gone since
                found.append(f"- - {path[start:]}")
            else:
                found.append(f"{what.st_size} {what.st_mtime_ns} {path[start:]}")
        return found

    began = time.perf_counter()
    found = some(0)
    is_far = time.perf_counter() - began > _FAR_S * len(found)
    with futures.ThreadPoolExecutor(_AT_ONCE if is_far else 1) as pool:
        parts = pool.map(some, range(_STAMPS, len(files), _STAMPS))
        found += itertools.chain.from_iterable(parts)
    others = [*faults, *(path for path in left_out if not is_hidden(os.path.basename(path)))]
    return found + [f"- - {path[start:]}" for path in others]


def _walk(folder: str, named: Sequence[str]) -> tuple[list[str], dict[str, str], list[str]]:
    """Returns the fields of `Content`, with paths as texts: of a million, Paths take seconds."""
    files, faults, left_out = [], {}, []
    seen, waiting = set(), [folder]
    while waiting:
        parent = waiting.pop()
        real = os.path.realpath(parent)
        if real in seen:  # a circle of links
            continue
        seen.add(real)
        try:
            with os.scandir(parent) as found:
                entries = sorted(found, key=operator.attrgetter("name"))
        except OSError as error:
            faults[parent] = f"a folder that cannot be read: {error.strerror}"
            continue
        if any(entry.name == _RECORDS for entry in entries):
            left_out.append(parent)
            continue
        folders = []
        for entry in entries:
            name, path = entry.name, entry.path
            try:
                is_folder = entry.is_dir()
                is_file = not is_folder and entry.is_file()
            except OSError:  # such as a link to itself; `fault` says what it is
                is_folder = is_file = False
            if is_hidden(name, named):
                left_out.append(path)
            elif is_file:
                files.append(path)
            elif is_folder:
                folders.append(path)
            elif why := fault(path):
                faults[path] = why
            else:
                files.append(path)
        waiting += reversed(folders)
    return files, faults, left_out
