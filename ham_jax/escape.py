"""How names and other texts from outside are shown and written, so that they stay mere texts."""

import csv
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

# Controls, invisible characters such as those that turn the reading direction, bytes of a file
# name that are not UTF-8, and separators of lines.
_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"  # are invisible, too, but Persian and composed emoji need them
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}

# What a spreadsheet takes for a formula, by the list of OWASP's "CSV Injection": also after
# blanks, and in full width. Quotes in front are part of it, so that `plain` undoes `cell` exactly.
_FORMULA = re.compile(r"['\s]*[=+\-@\t\r\n＝＋－＠]")  # noqa: RUF001
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def shown(text: Any) -> str:
    r"""Returns a text as one line of visible characters, for terminals, tables and pages.

    All others become escapes: a byte of a file name that is not UTF-8 `\xff`, an escape character
    `\x1b`, a line's end `\n`, a character that turns the reading direction `\u202e`. What is
    visible stays as it is, a backslash too, so that a text that was escaped before does not change.
    """
    text = str(text)
    return text if text.isprintable() else "".join(map(_visible, text))


def lines(text: Any) -> str:
    """Returns a text of several lines with each of them as `shown`."""
    return "\n".join(map(shown, str(text).split("\n")))


def cell(value: Any) -> Any:
    """Returns a value for a CSV: a text that spreadsheets would run as a formula gets a quote.

    Numbers, and texts that are numbers, stay as they are.
    """
    if not isinstance(value, str) or _NUMBER.fullmatch(value) or not _FORMULA.match(value):
        return value
    return "'" + value


def plain(value: Any) -> Any:
    """Returns the value that `cell` was given; what is not a text stays as it is."""
    if isinstance(value, str) and value.startswith("'") and _FORMULA.match(value):
        return value[1:]
    return value


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    r"""Returns rows as CSV with `\n` at the ends, each value as `cell`."""
    lines = _Lines()
    # The csv module quotes a carriage return in a value only where it is also a line's end.
    csv.writer(lines, lineterminator="\r\n").writerows(map(cell, row) for row in rows)
    return "".join(lines)


class _Lines(list[str]):
    def write(self, line: str) -> None:
        self.append(line.removesuffix("\r\n") + "\n")


def _visible(character: str) -> str:
    if unicodedata.category(character) not in _ESCAPED or character in _JOINERS:
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds the byte `code - 0xDC00` of a file name
        return f"\\x{code - 0xDC00:02x}"
    if code > 0xFFFF:
        return f"\\U{code:08x}"
    return _SHORT.get(character) or (f"\\x{code:02x}" if code < 0x80 else f"\\u{code:04x}")
