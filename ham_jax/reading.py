"""Reading files that somebody else may have made: only regular ones, and never more than they say.

A small file can ask for much: a zip of a few megabytes unpacks to terabytes, a header names an
array that no memory holds, a pipe never ends. Sizes are looked at here before anything is unpacked.
"""

import io
import json
import math
import os
import stat
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

MAX_JSON_BYTES = 32 << 20
"""The largest JSON that is written here, explanations/manifest.json, stays below a tenth of it."""

ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, ValueError)
"""What zipfile raises for a damaged zip; RuntimeError: an encrypted member, unknown packing."""

_MAX_MEMBERS = 200_000
_MAX_DIRECTORY_BYTES = 64 << 20
# Photographs, tables and weights shrink to a tenth at the best; deflate can reach a thousandth.
_MAX_RATIO = 100
_FREE_BYTES = 64 << 20  # whatever the ratio: an array of zeros is no attack
_CHUNK_BYTES = 1 << 20
_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile unpacks others without a limit
_MAX_HEADER_BYTES = 10_000  # of an array, numpy's own limit
_ZIPFILE: Any = zipfile  # with what it does not document, which type checkers do not know


def open_regular(path: str | os.PathLike) -> IO[bytes]:
    """Opens a file for reading.

    Raises:
      OSError: it cannot be opened, or is a folder, a pipe or a device, which could wait for ever.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError("it is not a regular file")
    return os.fdopen(handle, "rb")


def open_text(path: str | os.PathLike, encoding: str = "utf-8") -> IO[str]:
    """Opens a table for Python's csv; raises as `open_regular`."""
    return io.TextIOWrapper(open_regular(path), encoding=encoding, newline="")


def read_bytes(path: str | os.PathLike, max_bytes: int) -> bytes:
    """Returns a file's bytes.

    Raises:
      OSError: as `open_regular`, or the file is larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise OSError(f"{size:,} bytes are more than the {max_bytes:,} that it may have")
        return file.read()


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the object that a JSON file in UTF-8 holds.

    Raises:
      OSError: as `read_bytes`.
      ValueError: it is no JSON, nested too deeply, or no object.
    """
    return parse_json(read_bytes(path, MAX_JSON_BYTES))


def parse_json(text: str | bytes) -> dict[str, Any]:
    """Returns the object that a JSON text, or one in UTF-8, holds.

    Raises:
      ValueError: it is no JSON, nested too deeply, or no object.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        content = json.loads(text)
        json.dumps(content, ensure_ascii=False).encode()  # a lone surrogate cannot be written
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def open_zip(path: str | os.PathLike) -> zipfile.ZipFile:
    """Opens a zip whose list of members is of a sane length.

    Raises:
      OSError, zipfile.BadZipFile: as `open_regular`; it is damaged, or has too many members.
    """
    try:
        with open_regular(path) as file:
            _check_directory(file)
        return zipfile.ZipFile(path)
    except ZIP_ERRORS as error:
        raise zipfile.BadZipFile(str(error)) from error


def _check_directory(file: IO[bytes]) -> None:
    """Counts the members before zipfile makes an object for each."""
    end = _ZIPFILE._EndRecData(file)
    if not end:
        raise zipfile.BadZipFile("File is not a zip file")
    size, place = end[_ZIPFILE._ECD_SIZE], end[_ZIPFILE._ECD_LOCATION]
    if size <= _MAX_DIRECTORY_BYTES:
        # Between the list and its end there may be the two records of zip64.
        file.seek(max(0, place - size - 76))
        if file.read(size + 76).count(b"PK\1\2") <= _MAX_MEMBERS:
            return
    raise zipfile.BadZipFile(f"it has more than {_MAX_MEMBERS:,} members")


def check_sizes(members: list[zipfile.ZipInfo], max_bytes: int) -> None:
    """Checks what members would take, by what the zip says, before they are unpacked.

    Raises:
      OSError: more than `max_bytes`, far more than what they are packed in, an odd packing, or one
        with a password.
    """
    if closed := next((m for m in members if m.flag_bits & 1), None):
        raise OSError(f"{closed.filename!r:.200} is encrypted")
    if odd := next((m for m in members if m.compress_type not in _PACKINGS), None):
        kind = _ZIPFILE.compressor_names.get(odd.compress_type, odd.compress_type)
        raise OSError(f"{odd.filename!r:.200} is packed by {kind}; deflate is what is read")
    size, packed = (sum(getattr(m, key) for m in members) for key in ("file_size", "compress_size"))
    if size > max_bytes:
        raise OSError(f"it unpacks to {size:,} bytes; {max_bytes:,} are the most")
    if size > max(_FREE_BYTES, _MAX_RATIO * packed):
        raise OSError(f"{packed:,} bytes in it unpack to {size:,}, as in no honest file")


def chunks(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
    """Yields a member's bytes, as many as it declares and never many at once.

    Raises:
      ZIP_ERRORS, OSError: it is damaged: shorter, longer, or of another checksum.
    """
    left = member.file_size
    with archive.open(member) as file:
        while chunk := file.read(_CHUNK_BYTES):
            left -= len(chunk)
            yield chunk
    if left:
        raise EOFError("it is shorter than it says")


def read_member(archive: zipfile.ZipFile, name: str, max_bytes: int) -> bytes:
    """Returns the bytes of a member.

    Raises:
      KeyError, OSError, ZIP_ERRORS: there is none of that name; as `check_sizes` and `chunks`.
    """
    member = archive.getinfo(name)
    check_sizes([member], max_bytes)
    return b"".join(chunks(archive, member))


def read_npz(path: str | os.PathLike, max_bytes: int) -> dict[str, np.ndarray]:
    """Returns the arrays of an .npz, none of them of Python objects.

    Args:
      path: the file.
      max_bytes: that all of them may take.

    Raises:
      OSError, ValueError, zipfile.BadZipFile: it is damaged, too large, or holds objects.
    """
    try:
        with open_zip(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, of headers that Python 2 wrote
            members = [m for m in archive.infolist() if m.filename.endswith(".npy")]
            check_sizes(members, max_bytes)
            return {m.filename.removesuffix(".npy"): _array(archive, m) for m in members}
    except (*ZIP_ERRORS, TypeError, MemoryError) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    content = iter(chunks(archive, member))
    head = io.BytesIO(next(content, b""))
    version = np.lib.format.read_magic(head)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise ValueError(f"{member.filename}: version {version} of the format")
    try:
        shape, is_fortran, dtype = read_header(head, max_header_size=_MAX_HEADER_BYTES)
    except Exception as error:  # it is evaluated as Python: from TokenError to RecursionError
        raise ValueError(f"{member.filename}: {error}") from error
    if dtype.hasobject or not dtype.itemsize or min(shape, default=0) < 0:
        raise ValueError(f"{member.filename}: an array {shape} of {dtype}")
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes != member.file_size - head.tell():
        raise ValueError(f"{member.filename}: an array {shape} of {dtype} is not what is in it")
    raw = np.empty(num_bytes, np.uint8)
    place = 0
    for chunk in (head.read(), *content):
        raw[place : place + len(chunk)] = np.frombuffer(chunk, np.uint8)
        place += len(chunk)
    return raw.view(dtype).reshape(shape, order="F" if is_fortran else "C")
