"""What a folder of photographs looked like when its records were found or made.

It is kept beside the records, so that a start that finds the folder unchanged opens them without
reading a table: it compares the name, size and time of change of each file. That notices every file
that was edited, added, removed, renamed or replaced, but for one of the same size whose time was
set back, or whose edit fell into the same tick of the file system's clock as the look before it. A
network file system may show another host's edits some seconds late.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import ham_jax
from ham_jax import files, reading

_VERSION = 1  # of the file
_MAX_BYTES = 1 << 30  # a million photographs take 60 MB


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A folder, and the records of it.

    Attributes:
      records: their folder, below `data.prepared_dir`.
      notes: sentences that a person should be told of the photographs at each start.
      stamps: of `folders.stamps`.
    """

    records: str
    notes: tuple[str, ...]
    stamps: Sequence[str]

    def write(self, path: Path) -> None:
        """Writes it, whole or not at all.

        Raises:
          OSError: it cannot be written.
        """
        head = {"version": _VERSION, "records": self.records, "notes": self.notes}
        content = "\0".join([json.dumps(head), *self.stamps])
        files.write_bytes(path, os.fsencode(content))

    def touched(self, stamps: Sequence[str]) -> set[str]:
        """Returns the paths of files that have another time than here, but the same size."""
        before = {path: (size, time) for size, time, path in map(_parts, self.stamps)}
        return {
            path
            for size, time, path in map(_parts, stamps)
            if path in before and before[path][0] == size and before[path][1] != time
        }


def read(path: Path) -> Manifest | None:
    """Returns what `write` wrote; None where there is none, or none of this version."""
    try:
        head, *stamps = os.fsdecode(reading.read_bytes(path, _MAX_BYTES)).split("\0")
        told = reading.parse_json(head)
        if told["version"] != _VERSION:
            return None
        return Manifest(str(told["records"]), tuple(map(str, told["notes"])), stamps)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # all is then looked at anew, and it is written again


def name(raw_dir: Path, *asked: object) -> str:
    """Returns the name of the file for a folder of which records are asked for.

    It is hidden, for it may lie below that folder, and another one for each version of this
    package, which might read the same tables otherwise.

    Args:
      raw_dir: the folder.
      asked: all else that decides what the records are.
    """
    content = repr((ham_jax.__version__, os.path.realpath(raw_dir), *asked))
    return f".seen-{hashlib.sha256(content.encode(errors='replace')).hexdigest()[:16]}"


def _parts(stamp: str) -> list[str]:
    return stamp.split(" ", 2)
