"""Traced programs kept on disk, so that a later start need not trace a network again.

Tracing is seconds of Python. What is kept is StableHLO, as `jax.export` writes it, beside JAX's
compile cache, which keeps the machine code it becomes: numbers and operations, nothing that Python
would execute. A file that is damaged, or of other code, is not used: the program is traced anew.
"""

import contextlib
import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export

from ham_jax import files

_FORMAT = 1
_SOURCES = ("models/*.py", "data/preprocess.py", "model.py", "programs.py")  # what is traced
_DIGEST = hashlib.sha256().digest_size


class Kept:
    """A function that is traced once for each shape of its arguments, and in no later process.

    Args:
      function: what `jax.jit` returned. It must depend on nothing but its arguments, `about` and
        the source of this package.
      about: what JSON can hold; another function has another.
      options: of the compiler, as `jax.jit` takes them.
    """

    def __init__(self, function: Any, about: Any, options: dict[str, Any] | None = None):
        self._function, self._about, self._options = function, about, options
        self._programs: dict[Any, Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def __call__(self, first: Any, *others: Any) -> Any:
        """Calls it; the first argument, such as weights, is of the same shapes each time."""
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(others))
        with self._lock:
            if shapes not in self._programs:
                program = self._exported(first, *others).call
                self._programs[shapes] = jax.jit(program, compiler_options=self._options)
        return self._programs[shapes](first, *others)

    def _exported(self, *arguments: Any) -> export.Exported:
        leaves, structure = jax.tree.flatten(arguments)
        shapes = [f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for leaf in leaves]
        path = _path([self._about, jax.default_backend(), str(structure), shapes], ".stablehlo")
        if (data := _read(path)) is None:
            data = bytes(export.export(self._function)(*arguments).serialize())
            _write(path, data)
        return export.deserialize(bytearray(data))


def remembered(about: Any, make: Callable[[], Any]) -> Any:
    """Returns what `make` returns, as JSON holds it: called once, and in no later process.

    Args:
      about: what it depends on beside the source of this package, as JSON can hold it.
      make: returns what JSON can hold.
    """
    path = _path(about, ".json")
    if (data := _read(path)) is None:
        data = json.dumps(make()).encode()
        _write(path, data)
    return json.loads(data)


def _path(about: Any, suffix: str) -> Path | None:
    """Returns the file of something in the compile cache's folder; None: there is no such cache."""
    folder = jax.config.jax_compilation_cache_dir
    if not (folder and jax.config.jax_enable_compilation_cache) or "://" in folder:
        return None
    table = Path(os.environ.get("HAM_JAX_CONV_TABLE", ""))  # which models/conv.py follows
    forms = hashlib.sha256(table.read_bytes()).hexdigest() if table.is_file() else str(table)
    settings = [jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision, forms]
    versions = [_FORMAT, jax.__version__, metadata.version("flax"), _source()]
    text = json.dumps([*versions, settings, about])
    return Path(folder) / "programs" / (hashlib.sha256(text.encode()).hexdigest() + suffix)


@functools.cache
def _source() -> str:
    """Returns a checksum of the code that is traced."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(package.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path | None) -> bytes | None:
    """Returns what `_write` wrote, None if it is not there or not whole."""
    if path is None or not path.is_file():
        return None
    data = path.read_bytes()
    whole = hashlib.sha256(data[_DIGEST:]).digest() == data[:_DIGEST]
    return data[_DIGEST:] if whole else None


def _write(path: Path | None, data: bytes) -> None:
    """Writes a file with its checksum; where it cannot, the next start takes longer."""
    if path is not None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(path, hashlib.sha256(data).digest() + data)
