"""The only reader of small tables: whatever Excel, pandas, Dataverse or a person wrote, as texts.

Metadata, splits and lists of photographs are all read here, so that a table which one of them
takes is taken by the others, and refused in the same words.
"""

import codecs
import contextlib
import csv
import dataclasses
import io
import itertools
import lzma
import math
import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ham_jax.data import image

if TYPE_CHECKING:  # imported where a table is read: predict mostly reads none
    import pandas as pd

MAX_BYTES = 1 << 28
"""A larger table is refused: 1,000,000 rows of HAM10000's metadata are 57 MB."""
MAX_CELLS = 30_000_000  # cells of one letter are larger in memory than in the file
MAX_LINES = 2_000_000

_SAMPLE_BYTES = 1 << 16  # enough for the longest header that is published, of 2,353 columns
_SAMPLE_ROWS = 50
_PART_ROWS = 5_000  # a million lists at once would keep the garbage collector busy
# The first of equals is taken, and a name such as "age, years" is likelier than "age; years".
_SEPARATORS = "\t;|,"
_MAX_FAULTS = 10
_END = "\0"  # follows the last line, and is in none
_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_BINARY = {
    b"PK\x03\x04": "an Excel or OpenDocument file, or another zip",
    b"\xd0\xcf\x11\xe0": "an old Excel file (.xls)",
    b"\x1f\x8b": "packed by gzip; unpack it",
}
_SAVE_AS = "Save the table as text in UTF-8; Excel calls that 'CSV UTF-8'."
_NUMBER = re.compile(r"[+-]?([0-9]+[.,]?[0-9]*|[.,][0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
_ISIC_ID = re.compile(r"(isic_[0-9]+)(\.[a-z0-9]+)?", re.IGNORECASE)


class TableError(ValueError):
    """A file that cannot be read as a table; the text says why, and does not name the file."""


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """What a table says.

    Attributes:
      texts: a row a record; every cell is a text without blanks around it. So are the columns'
        names, which are in lower case.
      lines: in which line of the file each row begins; the first is 1.
      faults: sentences about lines of another length than the header, which are not in `texts`:
        "line 7: 3 fields instead of 4.", at most a few.
    """

    texts: "pd.DataFrame"
    lines: list[int]
    faults: list[str]


def read(source: Any, num_bytes: int | None = None) -> Table:
    """Reads a table of texts with a header, in whatever dialect it was written.

    Cells are separated by comma, semicolon, tab or bar, whichever divides the header and the
    first rows best; Excel's first line `sep=;` settles it. They may be quoted, and then hold
    separators and line ends; blanks around them do not count. Lines end as on Unix, Windows or an
    old Mac. Blank lines do not count, nor do empty cells beyond the header's last.

    The encoding is UTF-8, with or without a mark; UTF-16 or UTF-32 with one; or UTF-16 without,
    where it is plain. Older ones (Windows' cp1252, Latin-1, ...) are refused where a text is not
    ASCII: nothing in a file tells them apart, and a name that is guessed wrong is another name.

    Args:
      source: bytes, a path, or an object whose `open("rb")` gives a file.
      num_bytes: how long the file says that it is, where that is known before reading. Longer
        than `MAX_BYTES` is refused unread, and so is a file that turns out to be longer.

    Raises:
      TableError: missing, too large, binary, in another encoding, a quote that is never closed,
        or two columns of one name that say different things.
    """
    with _refusing():
        data = _load(source, MAX_BYTES + 1, num_bytes)
        if len(data) > MAX_BYTES:
            raise TableError(_too_large(len(data), "at least "))
    return _table(_utf8(data))


def columns(source: Any) -> tuple[str, ...]:
    """Returns the names of a table's columns as `read` does, from the first few KB of a file.

    Raises:
      TableError: it is missing or binary.
    """
    with _refusing():
        data = _load(source, _SAMPLE_BYTES)
    return tuple(_names(next(_records(_utf8(data, "replace")), (0, []))[1]))


def number(text: str) -> float:
    """Returns the number that a cell says, with a decimal point or a decimal comma.

    Nothing separates thousands: `1,234` is 1.234, and `1.234,5` is no number. Nor are nan, inf,
    1_000 and digits of other scripts, which Python would take.

    Raises:
      ValueError: that is no number.
    """
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{text!r} is not a number")
    return float(text.replace(",", "."))


def numbers(column: "pd.Series") -> np.ndarray:
    """Returns the numbers of a column of texts, float64 [n]; nan where there is none."""

    def parsed(text: str) -> float:
        try:
            return number(text)
        except ValueError:
            return math.nan

    return column.map({text: parsed(text) for text in column.unique()}).to_numpy(np.float64)


def image_id(name: str) -> str:
    r"""Returns the id that a photograph's name stands for, in a table as on the disk.

    A folder before it and the suffix of an image behind it do not belong to it, and ISIC's ids
    are in capitals: `part_1\isic_0024306.JPG` is `ISIC_0024306`.
    """
    name = re.split(r"[\\/]", name)[-1]
    isic = _ISIC_ID.fullmatch(name)
    if isic:
        return isic[1].upper()
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in image.SUFFIXES else name


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    """Turns whatever files and zips raise into a TableError."""
    try:
        yield
    # RuntimeError is zipfile's for an encrypted member and for an unknown compression.
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as e:
        raise TableError(f"{e}.") from e


def _load(source: Any, limit: int, num_bytes: int | None = None) -> bytes:
    """Returns the first bytes of a source, at most `limit`."""
    if isinstance(source, bytes):
        return source[:limit]
    if isinstance(source, str | os.PathLike):
        source = Path(source)
        num_bytes = source.stat().st_size
        if not source.is_file():  # a pipe would be waited for without end
            raise TableError("it is not a regular file.")
    if limit > MAX_BYTES and num_bytes is not None and num_bytes > MAX_BYTES:
        raise TableError(_too_large(num_bytes))
    if isinstance(source, Path):  # `read` may take the memory for as much as it is asked for
        limit = min(limit, source.stat().st_size + 1)
    with source.open("rb") as file:
        return file.read(limit)


def _too_large(num_bytes: int, at_least: str = "") -> str:
    return (
        f"it has {at_least}{num_bytes:,} bytes, and a table may have {MAX_BYTES:,}. Keep the rows"
        " and columns that are needed."
    )


def _utf8(data: bytes, errors: str = "strict") -> str:
    """Returns a text without the mark of its encoding."""
    encoding, num_mark = _encoding(data[:_SAMPLE_BYTES])
    try:
        text = data[num_mark:].decode(encoding, errors)
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            raise TableError(f"it seems to be {encoding}, but is damaged: {error}.") from error
        before, byte = error.object[: error.start], error.object[error.start : error.start + 1]
        line = 1 + len(re.findall(rb"\r\n|\r|\n", before))
        raise TableError(
            f"it is not in UTF-8: line {line} holds the byte 0x{byte.hex()}, which Windows' cp1252"
            f" would read as {byte.decode('cp1252', 'replace')!r}. {_SAVE_AS}"
        ) from error
    if _END in text:
        raise TableError(f"it holds zero bytes, so it is not a text. {_SAVE_AS}")
    return text


def _encoding(start: bytes) -> tuple[str, int]:
    """Returns a text's encoding and how many bytes its mark has."""
    for mark, name in _MARKS.items():
        if start.startswith(mark):
            return name, len(mark)
    for magic, what in _BINARY.items():
        if start.startswith(magic):
            raise TableError(f"it is {what}, not a text. {_SAVE_AS}")
    odd, even = start[1::2].count(0), start[::2].count(0)
    # Of Latin letters in UTF-16 every other byte is zero.
    if max(odd, even) * 4 > len(start) and min(odd, even) * 8 < max(odd, even):
        return ("utf-16-le" if odd > even else "utf-16-be"), 0
    return "utf-8", 0


def _lines(text: str) -> Iterator[str]:
    # Not io.StringIO, which takes four bytes a character; nor splitlines, which knows more ends.
    return io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8", newline="")


def _dialect(text: str) -> tuple[str, int]:
    """Returns what separates a text's cells, and how many lines are there only to say so."""
    lines = list(_lines(text[:_SAMPLE_BYTES]))
    named = re.fullmatch(r'"?sep=([^\w\s"]|\t)"?\s*', lines[0], re.IGNORECASE) if lines else None
    if named:
        return named[1], 1
    if len(text) > _SAMPLE_BYTES and len(lines) > 1:
        lines.pop()  # a part of a line

    def fit(separator: str) -> tuple[bool, float, int]:
        rows = csv.reader(lines, delimiter=separator, skipinitialspace=True)
        try:
            widths = [len(row) for row in itertools.islice(filter(any, rows), _SAMPLE_ROWS)]
        except csv.Error:
            widths = []
        if not widths:
            return False, 0, 0
        return widths[0] > 1, widths.count(widths[0]) / len(widths), widths[0]

    return max(_SEPARATORS, key=fit), 0


def _records(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yields each record's first line and cells, without those that are blank."""
    separator, num_skipped = _dialect(text)
    lines = itertools.islice(_lines(text), num_skipped, None)
    reader = csv.reader(itertools.chain(lines, [_END]), delimiter=separator, skipinitialspace=True)
    begins = num_skipped + 1
    try:
        for cells in reader:
            if any(cells):
                if _END in cells[-1]:
                    if cells != [_END]:  # the end of the file was taken for a part of a cell
                        raise TableError(f"line {begins}: a quote is never closed.")
                    return
                yield begins, cells
            begins = reader.line_num + num_skipped + 1
            if begins > MAX_LINES:
                raise TableError(f"it has more than {MAX_LINES:,} lines.")
    except csv.Error as error:
        raise TableError(f"line {begins}: {error}; is a quote never closed?") from error


def _table(text: str) -> Table:
    """Collects records under the header, which is the first."""
    records = _records(text)
    names = _names(next(records, (0, []))[1])
    width, parts, lines, wrong, num_wrong = len(names), [], [], [], 0
    while part := list(itertools.islice(records, _PART_ROWS)):
        rows = []
        for line, cells in part:
            while len(cells) > width and not cells[-1].strip():
                cells.pop()
            if len(cells) == width:
                rows.append(cells)
                lines.append(line)
                continue
            num_wrong += 1
            if num_wrong <= _MAX_FAULTS:
                wrong.append(f"line {line}: {len(cells)} fields instead of {width}.")
        parts.append(_texts(rows, width))
        if len(lines) * width > MAX_CELLS:
            raise TableError(f"it has more than {MAX_CELLS:,} cells.")
    import pandas as pd

    texts = pd.concat(parts, ignore_index=True) if parts else _texts([], width)
    for i, name in enumerate(names):
        first = names.index(name)
        if name and first < i and not texts[first].equals(texts[i]):
            raise TableError(f"two columns are called {name!r} and differ; rename one of them.")
    is_first = [names.index(name) == i for i, name in enumerate(names)]
    texts = texts.set_axis(names, axis=1).loc[:, is_first]
    if num_wrong > _MAX_FAULTS:
        wrong.append(f"{num_wrong - _MAX_FAULTS:,} more lines are of a wrong length.")
    return Table(texts, lines, wrong)


def _texts(rows: list[list[str]], width: int) -> "pd.DataFrame":
    import pandas as pd

    columns = zip(*rows, strict=True) if rows else [()] * width
    stripped = {i: list(map(str.strip, column)) for i, column in enumerate(columns)}
    return pd.DataFrame(stripped, index=range(len(rows)), dtype=str)


def _names(header: list[str]) -> list[str]:
    """Returns the names of columns; Excel pads a header with empty cells."""
    names = [name.strip().strip("\ufeff").lower() for name in header]
    while names and not names[-1]:
        names.pop()
    return names
