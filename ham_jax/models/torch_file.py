"""Tensors from PyTorch's own files, without PyTorch and without running what a file says.

Both formats are read: the zip archive of torch >= 1.6, and the older one, in which three pickles
(magic number, version, system) and the pickled object are followed by the raw storages. A pickle
can name any function to call. Here the only ones are those that a tensor is rebuilt with; a file
that names another is refused, and nothing of it has run.

Nor does it take more memory than a file of its size: tensors are views of the storages, however
often they name one; and what can grow in a pickle is counted.
"""

import io
import math
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

from ham_jax import reading
from ham_jax.config import InputError

MAX_BYTES = 8 << 30
"""What all tensors of a file may take where no network says how much it needs."""

_MAGIC = 0x1950A86A20F9469CFC6C
# What a pickle reads, in bytes; an object takes about 64 of memory, and an opcode about that time.
# A ResNet-152 with the state of its optimizer costs a third.
_MAX_PICKLE_COST = 32 << 20
_READ_COST = 64
_MAX_LINE_BYTES = 1 << 16
_MAX_DEPTH = 32
_MAX_SHOWN = 200
_CONTAINERS = (dict, list, tuple)
_MAX_AXES = 32
_MAX_REPEATS = 1 << 16  # by strides of 0, as torch's expand() makes them
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


class _Storage(NamedTuple):
    """A storage's type, a key of _STORAGES, and its name in the file."""

    type: str
    key: str


class _Tensor(NamedTuple):
    """Where a tensor lies; offset and strides in elements of the storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, elements: np.ndarray) -> np.ndarray:
        """Returns a read-only view of its storage's elements."""
        if 0 in self.shape:
            return np.empty(self.shape, elements.dtype)
        steps = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
        if min(self.offset, *self.shape, *self.strides, 0) < 0 or (
            self.offset + sum(steps) >= len(elements)
        ):
            raise ValueError("a tensor reaches beyond its storage")
        if math.prod(self.shape) > len(elements) * _MAX_REPEATS:
            raise ValueError("a tensor repeats its storage's elements too often")
        return np.lib.stride_tricks.as_strided(
            elements[self.offset :],
            self.shape,
            [s * elements.itemsize for s in self.strides],
            writeable=False,
        )


def _elements(storage: _Storage, raw: bytes, byteorder: str) -> np.ndarray:
    dtype = np.dtype(_STORAGES[storage.type])
    elements = np.frombuffer(raw, f"u{dtype.itemsize}")
    return (elements if byteorder == sys.byteorder else elements.byteswap()).view(dtype)


class _Counted:
    """A file of which one pickle may cost so much and no more."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self._left = _MAX_PICKLE_COST

    def spend(self, cost: int) -> None:
        """Raises ValueError where all is spent."""
        self._left -= cost
        if self._left < 0:
            raise ValueError("its pickle is longer than that of any network")

    def read(self, num_bytes: int) -> bytes:
        """Reads as a file does; each opcode reads at least once."""
        self.spend(_READ_COST + num_bytes)
        return self._file.read(num_bytes)

    def readline(self) -> bytes:
        """Reads a line, or what a line may have."""
        self.spend(_READ_COST)
        line = self._file.readline(_MAX_LINE_BYTES)
        self.spend(len(line))
        return line


# Opcodes that build containers, numbers, text and what is called; none of sets and extensions.
_OPCODES = """
PROTO STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT
BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES
SHORT_BINBYTES BINBYTES8 EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
EMPTY_DICT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL BUILD BINPERSID
"""


def _unknown(_) -> None:
    raise ValueError("its pickle does what no tensor needs")


class _Unpickler(pickle._Unpickler):
    """Builds containers, numbers, text and `_Tensor`s, nothing else.

    It is the one that is written in Python: its opcodes can be chosen, and its memo, unlike the
    other's, takes no memory for numbers that are only named. A tuple of tuples can stand for more
    parts than there are atoms: nothing here hashes, compares or prints one.
    """

    # Of the class above, for type checkers, which know only what pickle documents.
    stack: list[Any]
    memo: dict[int, Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **dict.fromkeys(pickle._Unpickler.dispatch, _unknown),
        **{
            getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
            for name in _OPCODES.split()
        },
    }

    def __init__(self, file: IO[bytes], path: Path):
        self._counted = _Counted(file)
        super().__init__(self._counted)
        self._path = path

    def _frame(self) -> None:
        self.read(8)  # its length: what is in it is read as all else

    def _set_items(self, items: list | None = None) -> None:
        items = self.pop_mark() if items is None else items
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise TypeError("items for what is no dict")
        target |= _pairs(zip(items[::2], items[1::2], strict=True))

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise TypeError("a call of what is no function")
        parts = sum(len(part) for part in arguments if isinstance(part, _CONTAINERS))
        self._counted.spend(_READ_COST * parts)
        self.append(function(*arguments))

    def _put(self) -> None:
        number = int(self.readline())
        if not 0 <= number <= _MAX_PICKLE_COST:
            raise ValueError("a number that no memo reaches")
        self.memo[number] = self.stack[-1]

    dispatch |= {
        pickle.FRAME[0]: _frame,
        pickle.PUT[0]: _put,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.DICT[0]: _dict,
        pickle.REDUCE[0]: _reduce,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Returns what stands for a global of torch.

        Raises:
          InputError: any other global.
        """
        if module == "torch" and name in _STORAGES:
            return name
        if (module, name) not in _ALLOWED:
            asked = f"{module}.{name}"[:_MAX_SHOWN].encode("ascii", "backslashreplace").decode()
            raise InputError(
                f"{self._path} asks for {asked}, which is not run: only tensors are read"
                " from a PyTorch file. Save the network's state dict alone, best as safetensors."
            )
        return _Global(_ALLOWED[module, name])

    def persistent_load(self, pid: Any) -> _Storage:
        """Returns what a pickle names from outside."""
        if type(pid) is tuple and len(pid) in (5, 6):
            kind, storage, key, *_, last = pid
            plain = type(kind) is type(storage) is str and type(key) in (str, int)
            if plain and kind == "storage" and storage in _STORAGES and type(last) is not tuple:
                return _Storage(storage, str(key))
        raise ValueError("a storage of an unknown kind")


class _State(dict):
    """A state dict: torch pickles attributes with it (`_metadata`), which are ignored."""

    def __init__(self, pairs=()):
        super().__init__(_pairs(pairs))

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


def _pairs(pairs) -> dict:
    """Returns a dict whose keys are plain, and cannot all be made to lie in one place of it."""
    found = {}
    for key, value in pairs:
        if not (type(key) in (str, bytes, bool, type(None), float) or _is_index(key)):
            raise ValueError(f"a key that is a {type(key).__name__}")
        found[key] = value
    return found


def _is_index(number: Any) -> bool:
    return type(number) is int and -(1 << 60) < number < 1 << 60


def _size(numbers) -> tuple[int, ...]:
    if not isinstance(numbers, list | tuple) or len(numbers) > _MAX_AXES:
        raise ValueError("a shape that no tensor has")
    if not all(map(_is_index, numbers)):
        raise ValueError("a shape that is not of numbers")
    return tuple(numbers)


def _tensor(storage, offset, shape, strides, *_):
    (offset,), shape, strides = _size([offset]), _size(shape), _size(strides)
    if type(storage) is not _Storage:
        raise ValueError("a tensor of no storage")
    return _Tensor(storage, offset, shape, strides)


_ALLOWED: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): _State,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
}


def read(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Returns a `.pth`, `.pt` or `.bin` file's object, with numpy arrays for its tensors.

    Args:
      path: a file that `torch.save` wrote from a dict.
      max_bytes: that all tensors may take.

    Raises:
      InputError: it is damaged, of another format, too large, or holds more than tensors and plain
        values.
    """
    try:
        with reading.open_regular(path) as file:
            is_zip = zipfile.is_zipfile(file)
            content = _read_zip(path, max_bytes) if is_zip else _read_legacy(path, max_bytes)
    except (InputError, FileNotFoundError):
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    except Exception as error:  # a damaged pickle can raise anything
        why = f"{type(error).__name__}: {error}"[:_MAX_SHOWN]
        raise InputError(f"{path} is no whole PyTorch file ({why}); download it again.") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path} holds a {type(content).__name__}; a dict of tensors by name is needed: what"
            " model.state_dict() gives."
        )
    return content


def _read_zip(path: Path, max_bytes: int) -> Any:
    with reading.open_zip(path) as archive:
        names = archive.namelist()
        pickled = next((name for name in names if name.endswith("/data.pkl")), None)
        if pickled is None:
            raise ValueError("a zip archive without data.pkl")
        folder = pickled.removesuffix("data.pkl")
        byteorder = "little"
        if f"{folder}byteorder" in names:
            byteorder = reading.read_member(archive, f"{folder}byteorder", 16).decode()
        raw = reading.read_member(archive, pickled, _MAX_PICKLE_COST)
        content = _Unpickler(io.BytesIO(raw), path).load()
        storages = {
            tensor.storage: f"{folder}data/{tensor.storage.key}" for tensor in _tensors(content)
        }
        reading.check_sizes([archive.getinfo(name) for name in storages.values()], max_bytes)
        elements = {
            storage: _elements(storage, reading.read_member(archive, name, max_bytes), byteorder)
            for storage, name in storages.items()
        }
    return _with_arrays(content, elements)


def _read_legacy(path: Path, max_bytes: int) -> Any:
    with reading.open_regular(path) as file:

        def load():
            return _Unpickler(file, path).load()

        if _plain(load()) != _MAGIC:
            raise ValueError("another magic number")
        load()  # version of the format
        load()  # the writer's system; storages are little-endian whatever it says
        content, keys = load(), load()
        named = {tensor.storage.key: tensor.storage for tensor in _tensors(content)}
        left = min(max_bytes, os.fstat(file.fileno()).st_size - file.tell())
        elements = {}
        for key in map(_plain, keys):
            storage = named[key]
            count = int.from_bytes(file.read(8), "little")
            size = count * np.dtype(_STORAGES[storage.type]).itemsize
            left -= size
            if left < 0:
                raise EOFError("it ends within a tensor")
            elements[storage] = _elements(storage, file.read(size), "little")
    return _with_arrays(content, elements)


def _plain(value: Any) -> Any:
    if type(value) not in (str, int):
        raise ValueError("neither a text nor a number")
    return value


def _tensors(content: Any) -> list[_Tensor]:
    """Returns each once, and looks into what lies there several times once."""
    found, seen, waiting = [], {}, [content]
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen[id(part)] = part
        if isinstance(part, _Tensor):
            found.append(part)
        elif isinstance(part, _CONTAINERS):
            waiting.extend(part.values() if isinstance(part, dict) else part)
    return found


def _with_arrays(content: Any, elements: dict[_Storage, np.ndarray]) -> Any:
    """Returns the same with arrays for tensors; what lies there several times stays one object."""
    made: dict[int, Any] = {}  # by identity; `content` keeps what it names alive

    def of(part: Any, depth: int) -> Any:
        if id(part) not in made:
            if depth > _MAX_DEPTH:  # or it holds itself
                raise ValueError(f"it is nested more than {_MAX_DEPTH} deep")
            made[id(part)] = convert(part, depth + 1)
        return made[id(part)]

    def convert(part: Any, depth: int) -> Any:
        if isinstance(part, _Tensor):
            return part.array(elements[part.storage])
        if isinstance(part, dict):
            return {key: of(value, depth) for key, value in part.items()}
        if isinstance(part, list | tuple):
            return [of(value, depth) for value in part]
        if isinstance(part, _Global):
            raise ValueError("it holds a function")
        return part

    return of(content, 0)
