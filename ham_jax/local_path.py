"""Paths for Orbax and TFDS, which go through etils.epath. The only room that knows it."""

import glob
import os
from collections.abc import Iterator
from types import SimpleNamespace

from etils import epath
from etils.epath import backend


class LocalPath(type(epath.Path())):
    """A path whose every character means itself.

    A folder `a[1]` is no pattern. epath globs whole paths, so that Orbax would find none of the
    files to merge, and commit a checkpoint that cannot be read.
    """

    def glob(self, pattern: str) -> Iterator["LocalPath"]:
        """Yields what lies below this path and fits the pattern."""
        return map(self._new, glob.iglob(os.path.join(glob.escape(os.fspath(self)), pattern)))


def _stat(path: str | os.PathLike) -> SimpleNamespace:
    """Returns what `stat` of an epath returns, without the owner's name, which nobody asks for."""
    found = os.stat(path)
    return SimpleNamespace(
        is_directory=os.path.isdir(path),
        length=found.st_size,
        mtime=int(found.st_mtime),
        mode=found.st_mode,
        owner=None,
        group=None,
    )


# Where the user is a number without an entry in /etc/passwd, as in many containers, epath's own
# (etils 1.15) raises KeyError, and TFDS asks through paths that it makes itself.
backend.os_backend.stat = _stat
