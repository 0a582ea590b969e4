"""Tensors from PyTorch's own files, without PyTorch and without running what a file says.

Both formats are read: the zip archive of torch >= 1.6, and the older one, in which three pickles
(magic number, version, system) and the pickled object are followed by the raw storages. A pickle
can name any function to call. Here the only ones are those that a tensor is rebuilt with; a file
that names another is refused, and nothing of it has run.
"""

import io
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ham_jax.config import InputError

_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class _Tensor(NamedTuple):
    """Where a tensor lies; offset and strides in elements of the storage."""

    storage: tuple[str, str]  # its type, a key of _STORAGES, and its name in the file
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, raw: bytes, byteorder: str) -> np.ndarray:
        """Returns a copy of its elements out of the storage's bytes."""
        dtype = np.dtype(_STORAGES[self.storage[0]])
        elements = np.frombuffer(raw, f"u{dtype.itemsize}")
        if byteorder != sys.byteorder:
            elements = elements.byteswap()
        if 0 in self.shape:
            return np.empty(self.shape, dtype)
        steps = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
        if min(self.offset, *self.shape, *self.strides, 0) < 0 or (
            self.offset + sum(steps) >= len(elements)
        ):
            raise ValueError("a tensor reaches beyond its storage")
        strides = [s * dtype.itemsize for s in self.strides]
        view = np.lib.stride_tricks.as_strided(elements[self.offset :], self.shape, strides)
        return view.copy().view(dtype)


class _Unpickler(pickle.Unpickler):
    """Builds containers, numbers, text and `_Tensor`s, nothing else."""

    def __init__(self, file, path: Path):
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Returns what stands for a global of torch.

        Raises:
          InputError: any other global.
        """
        if module == "torch" and name in _STORAGES:
            return name
        if (module, name) not in _ALLOWED:
            raise InputError(
                f"{self._path} asks for {module}.{name}, which is not run: only tensors are read"
                " from a PyTorch file. Save the network's state dict alone, best as safetensors."
            )
        return _Global(_ALLOWED[module, name])

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        """Returns a storage's type and its name in the file."""
        kind, storage, key, *_, last = pid
        if kind != "storage" or storage not in _STORAGES or isinstance(last, tuple):
            raise ValueError(f"unknown storage {pid!r}")
        return storage, str(key)


class _State(dict):
    """A state dict: torch pickles attributes with it (`_metadata`), which are ignored."""

    def __setstate__(self, _):
        pass


class _Global:
    """What a pickle gets for a global's name: it can be called, not changed and not kept."""

    __slots__ = ("_build",)

    def __init__(self, build: Callable):
        self._build = build

    def __call__(self, *args):
        return self._build(*args)

    def __setstate__(self, _):
        raise ValueError("it sets attributes of a function")


def _tensor(storage, offset, shape, strides, *_):
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


_ALLOWED: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): _State,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
}


def read(path: Path) -> dict[str, Any]:
    """Returns a `.pth`, `.pt` or `.bin` file's object, with numpy arrays for its tensors.

    Args:
      path: a file that `torch.save` wrote from a dict.

    Raises:
      InputError: it is damaged, of another format, or holds more than tensors and plain values.
    """
    try:
        content = _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    except (InputError, FileNotFoundError):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(
            f"{path} is no whole PyTorch file ({type(error).__name__}: {error}); download it again."
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path} holds a {type(content).__name__}; a dict of tensors by name is needed: what"
            " model.state_dict() gives."
        )
    return content


def _read_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickled = next((name for name in names if name.endswith("/data.pkl")), None)
        if pickled is None:
            raise ValueError("a zip archive without data.pkl")
        folder = pickled.removesuffix("data.pkl")
        byteorder = "little"
        if f"{folder}byteorder" in names:
            byteorder = archive.read(f"{folder}byteorder").decode()
        content = _Unpickler(io.BytesIO(archive.read(pickled)), path).load()
        return _with_arrays(content, lambda key: archive.read(f"{folder}data/{key}"), byteorder)


def _read_legacy(path: Path) -> Any:
    with path.open("rb") as file:

        def load():
            return _Unpickler(file, path).load()

        if load() != _MAGIC:
            raise ValueError("another magic number")
        load()  # version of the format
        load()  # the writer's system; storages are little-endian whatever it says
        content, keys = load(), load()
        types = {tensor.storage[1]: tensor.storage[0] for tensor in _tensors(content)}
        storages = {}
        for key in keys:
            count = int.from_bytes(file.read(8), "little")
            size = count * np.dtype(_STORAGES[types[key]]).itemsize
            storages[key] = file.read(size)
            if len(storages[key]) < size:
                raise EOFError("it ends within a tensor")
    return _with_arrays(content, storages.__getitem__, "little")


def _tensors(content: Any) -> list[_Tensor]:
    if isinstance(content, _Tensor):
        return [content]
    inside = content.values() if isinstance(content, dict) else content
    nested = isinstance(content, dict | list | tuple)
    return [tensor for part in inside for tensor in _tensors(part)] if nested else []


def _with_arrays(content: Any, storage: Callable[[str], bytes], byteorder: str) -> Any:
    if isinstance(content, _Tensor):
        return content.array(storage(content.storage[1]), byteorder)
    if isinstance(content, dict):
        return {k: _with_arrays(v, storage, byteorder) for k, v in content.items()}
    if isinstance(content, list | tuple):
        return [_with_arrays(part, storage, byteorder) for part in content]
    if isinstance(content, _Global):
        raise ValueError("it holds a function")
    return content
