"""A person's own photographs: what `--images` names, and what their list says of them."""

import collections
import dataclasses
import fnmatch
import glob
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ham_jax import escape
from ham_jax.config import InputError
from ham_jax.data import folders, image, metadata, tables

if TYPE_CHECKING:  # imported where a table is made: predict mostly has none
    import pandas as pd

_PATH_COLUMNS = ("path", "image_path", "file", "filename", "image", "image_id", "isic_id")
_LISTS = (".csv", ".tsv", ".tab")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# Other files among photographs: counted, but not listed one by one.
_BESIDE = frozenset(
    {
        *(".txt", ".csv", ".tsv", ".tab", ".json", ".xml", ".xmp", ".aae", ".thm", ".md", ".html"),
        *(".ini", ".db", ".log", ".yaml", ".yml", ".md5", ".sha256"),
    }
)
_HIDDEN, _FOLDER = "hidden", "folder(s)"
_MAX_NAMED = 1000  # files
_MAX_COUNTED = 10  # suffixes


@dataclasses.dataclass(frozen=True)
class Photographs:
    """What `--images` names.

    Attributes:
      paths: each once, in the order of a list, else sorted.
      faults: why some of these cannot be opened, by their number.
      left_out: what was found beside them, sorted.
    """

    paths: list[str]
    faults: dict[int, str]
    left_out: list[str]

    @property
    def sources(self) -> list[Path | folders.Unreadable]:
        """What `image.load_many` takes, one a path."""
        return [
            folders.Unreadable(self.faults[number]) if number in self.faults else Path(path)
            for number, path in enumerate(self.paths)
        ]

    def counted(self) -> str:
        """Returns what is left out in a few words, such as '3 .pdf, 1 hidden'; '' for nothing."""
        counts = collections.Counter(map(_kind, self.left_out))
        kinds = sorted(counts, key=lambda kind: (-counts[kind], kind))
        listed = [f"{counts[kind]} {kind}" for kind in kinds[:_MAX_COUNTED]]
        if others := sum(counts[kind] for kind in kinds[_MAX_COUNTED:]):
            listed.append(f"{others} others")
        return ", ".join(listed)

    def named(self) -> list[tuple[str, str]]:
        """Returns (path, why it is left out) of what could have been meant; a last one counts."""
        kinds = {path: _kind(path) for path in self.left_out}
        rows = [
            (path, f"not looked at: not a photograph by its name ({kind})")
            for path, kind in kinds.items()
            if kind not in (*_BESIDE, _HIDDEN, _FOLDER)
        ]
        if (num_more := len(rows) - _MAX_NAMED) > 0:
            why = "not looked at: not photographs by their names"
            rows[_MAX_NAMED:] = [(f"{num_more} more", why)]
        return rows


def find_images(pattern: str) -> Photographs:
    """Finds the photographs that `--images` names.

    Args:
      pattern: a file, whatever its suffix; a folder, searched through; a glob; or a CSV with a
        column `path` (a relative one counts from the CSV's folder, or else from the current
        folder) or `isic_id` or `image_id` (which the photographs' names begin with, anywhere below
        the CSV's folder). What exists under this very name is no glob.

    Raises:
      InputError: nothing there.
    """
    if _URL.match(pattern):
        raise InputError(
            f"--images={pattern} is a URL: fetch the photographs, and name the folder."
        )
    if _is_list(pattern):
        return _from_list(Path(pattern))
    base, rest = _literal(pattern)
    if rest:
        found = _from_glob(base, rest)
    elif os.path.isdir(base):
        content = folders.walk(base)
        found = _sorted(content.files, content.faults, content.left_out)
    else:
        found = _sorted([base], _faults([base]), [], any_suffix=True)
    if not found.paths:
        beside = f" Not looked at: {found.counted()}." if found.left_out else ""
        raise InputError(
            f"--images={pattern}: no image found.{beside} Give a file, a folder or a glob of"
            f" {', '.join(sorted(image.SUFFIXES))}, or a CSV with a column 'path'."
        )
    return found


def find_metadata(pattern: str, num_images: int) -> "pd.DataFrame":
    """Returns what the CSV `--images` says beside the paths; nothing where it is no CSV.

    Args:
      pattern: see `find_images`.
      num_images: how many photographs that found.

    Returns:
      A row a photograph, in the order of `find_images`: those of age in years (nan where
      unknown), sex and localization that the CSV has.

    Raises:
      InputError: an invalid age, or two rows that say different things of a photograph.
    """
    import pandas as pd

    if not _is_list(pattern) or not num_images:
        return pd.DataFrame(index=range(num_images))
    path = Path(pattern)
    table, column = _rows(path)
    names = {
        name: next((alias for alias in aliases if alias in table), None)
        for name, aliases in metadata.COLUMNS.items()
    }
    listed, faults = {}, []
    for row in table.to_dict("records"):
        where = f"--images={path}: {escape.shown(row[column])}"
        values = {name: row[given] for name, given in names.items() if given}
        if "age" in values:
            try:
                values["age"] = _years(values["age"])
            except ValueError:
                faults.append(
                    f"{where}: {names['age']} {values['age']!r} must be years from 0 to 120, or"
                    " empty."
                )
        if listed.setdefault(row[column], values) != values:
            faults.append(f"{where} is listed twice and differently.")
    if faults:
        raise InputError(faults[:10])
    table = pd.DataFrame(listed.values(), index=range(num_images))
    return table.astype({"age": float}) if "age" in table else table


def _is_list(pattern: str) -> bool:
    return pattern.lower().endswith(_LISTS) and os.path.isfile(pattern)


def _kind(path: str) -> str:
    """Returns in a word or two what is left out."""
    name = os.path.basename(path)
    if folders.is_hidden(name):
        return _HIDDEN
    if os.path.isdir(path):
        return _FOLDER
    return escape.shown(os.path.splitext(name)[1].lower()) or "without a suffix"


def _sorted(
    files: Iterable[Path],
    faults: dict[Path, str],
    left_out: Iterable[Path],
    *,
    any_suffix: bool = False,
) -> Photographs:
    """Takes the photographs, by their suffixes, out of files; what has a fault is one of them."""
    taken, beside = set(faults), set(left_out)
    for path in files:
        is_taken = any_suffix or path.suffix.lower() in image.SUFFIXES or path in faults
        (taken if is_taken else beside).add(path)
    paths = sorted(taken)
    why = {number: faults[path] for number, path in enumerate(paths) if path in faults}
    return Photographs([*map(str, paths)], why, [*map(str, sorted(beside))])


def _faults(files: Iterable[Path]) -> dict[Path, str]:
    return {path: why for path in files if (why := folders.fault(path))}


def _literal(pattern: str) -> tuple[Path, list[str]]:
    """Returns how far a pattern exists as it is written, and the parts after that."""
    base, parts = Path(), Path(pattern).parts
    for number, part in enumerate(parts):
        if not os.path.lexists(base / part):
            return base, [*parts[number:]]
        base /= part
    return base, []


def _from_glob(base: Path, rest: list[str]) -> Photographs:
    if not glob.has_magic("/".join(rest)):
        return Photographs([], {}, [])
    named = [part for part in rest if part[0] not in "*?["]  # hidden files only by such a pattern
    if "**" in rest:  # glob's own follows circles of links, until the names are too long
        content = folders.walk(base, named)
        files = [path for path in content.files if _matches(path.relative_to(base).parts, rest)]
        faults, left_out = content.faults, content.left_out
    else:
        files, left_out = [], []
        for path in map(base.joinpath, glob.glob(os.path.join(*rest), root_dir=base)):
            among = [path, *path.parents][: len(path.parts) - len(base.parts)]
            hidden = [p for p in among if folders.is_hidden(p.name, named)]
            if hidden or os.path.isdir(path):
                left_out.append(hidden[-1] if hidden else path)
            else:
                files.append(path)
        faults = _faults(files)
    # `*.scan` means these very files, `*` only the photographs among all.
    any_suffix = not glob.has_magic(Path(rest[-1]).suffix or "*")
    return _sorted(files, faults, left_out, any_suffix=any_suffix)


def _matches(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    """Returns whether the parts of a path are those of a glob, `**` being any number of them."""
    if not patterns:
        return not parts
    if patterns[0] == "**" and _matches(parts, patterns[1:]):
        return True
    if not parts or not fnmatch.fnmatchcase(parts[0], patterns[0]):  # `**` is a `*` to it
        return False
    return _matches(parts[1:], patterns if patterns[0] == "**" else patterns[1:])


def _from_list(path: Path) -> Photographs:
    table, column = _rows(path)
    listed = dict.fromkeys(table[column])
    places = {name: _place(name, path.parent) for name in listed}
    ids = [n for n, (_, why) in places.items() if why and os.path.splitext(n) == (n, "")]
    if ids:  # names without a suffix
        files = [p for p in folders.walk(path.parent).files if p.suffix.lower() in image.SUFFIXES]
        by_id = {tables.image_id(file.name): str(file) for file in reversed(files)}
        places |= {n: (by_id[n], None) for n in ids if n in by_id}
    why = {number: fault for number, (_, fault) in enumerate(places.values()) if fault}
    return Photographs([place for place, _ in places.values()], why, [])


def _place(name: str, folder: Path) -> tuple[str, str | None]:
    """Returns where a list's photograph lies and, if it cannot be opened, why."""
    if _URL.match(name):
        return name, "a URL: fetch the photograph, and list its path"
    for spelled in dict.fromkeys((name, escape.plain(name), name.replace("\\", "/"))):
        given = os.path.expanduser(spelled)
        for place in (os.path.join(folder, given), given):
            if os.path.lexists(place):
                return str(Path(place)), folders.fault(place)
    return name, folders.fault(os.path.join(folder, name)) or folders.fault(name)


def _rows(path: Path) -> "tuple[pd.DataFrame, str]":
    """Returns the rows of a table that name a photograph, and the column that does."""
    try:
        table = tables.read(path)
    except tables.TableError as error:
        raise InputError(f"--images={path} cannot be read as a table: {error}") from error
    if table.faults:
        raise InputError([f"--images={path} {fault}" for fault in table.faults])
    names = list(table.texts)
    column = next((name for name in _PATH_COLUMNS if name in names), None)
    if column is None:
        raise InputError(
            f"--images={path}: no column of paths; one must be called"
            f" {', '.join(_PATH_COLUMNS)}. Found: {', '.join(names) or 'nothing'}."
        )
    rows = table.texts[table.texts[column] != ""]
    if rows.empty:
        raise InputError(f"--images={path}: the list is empty: no row has a {column}.")
    return rows, column


def _years(text: str) -> float:
    """Returns an age, nan where it is unknown.

    Raises:
      ValueError: it is not an age.
    """
    if text.lower() in metadata.UNKNOWN:
        return math.nan
    age = tables.number(text)
    if not 0 <= age <= 120:
        raise ValueError
    return age
