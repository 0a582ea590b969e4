"""Finds photographs and their metadata in a folder, in any published layout or a person's own.

A folder holds photographs (loose or in zips) and tables. Each form of table is an entry of
`LAYOUTS`. HAM10000 may come from Kaggle, Harvard Dataverse, the ISIC challenge or the ISIC archive;
the ISIC 2018 Task 3 test and ISIC 2019 come from the challenge.

Sources: Tschandl, Rosendahl and Kittler, Sci. Data 5, 180161 (2018), doi:10.7910/DVN/DBW86T;
Codella et al., arXiv 1902.03368 (2019), for the challenge.
"""

import dataclasses
import difflib
import functools
import hashlib
import io
import itertools
import os
import shlex
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from ham_jax import classes as class_lists
from ham_jax import console, escape, parallel, reading
from ham_jax.classes import HAM10000, ISIC2019, Classes
from ham_jax.config import InputError, nearest
from ham_jax.data import folders, image, metadata, tables

COLUMNS = ("lesion_id", "dx", "dx_type", "age", "sex", "localization", "dataset")

# Published counts: images of each class in the order of `HAM10000`, and lesions where known.
TRAIN_IMAGES = (327, 514, 1099, 115, 1113, 6705, 142)
TRAIN_LESIONS = 7470
TEST_IMAGES = (43, 93, 217, 44, 171, 908, 35)

# The published sets by the numbers of their ISIC ids: training, the challenge's validation, test.
_SETS = pd.IntervalIndex.from_tuples([(24305, 34320), (34320, 34523), (34523, 36064)])
_TABLES = ("", ".csv", ".tab", ".tsv", ".txt", ".xlsx", ".xls", ".ods")  # the last, to say so
_WITHOUT_IMAGE = "ISIC_0035068"  # a row of the official test without a photograph, of weight 0
_MAX_MEMBER_BYTES = 512 << 20  # of a zip; a photograph of 100 megapixels in TIFF has 300 MB

_IDS = ("image_id", "isic_id", "image")
_ALIASES = {  # what other layouts call our columns
    **dict.fromkeys(_IDS[1:], "image_id"),
    **{alias: name for name, aliases in metadata.COLUMNS.items() for alias in aliases[1:]},
    "diagnosis_confirm_type": "dx_type",
}
_LEVELS = ("diagnosis", *(f"diagnosis_{n}" for n in range(1, 6)))  # the ISIC archive's
_UNKNOWN_CLASS = "unk"  # ISIC 2019's column of none of its classes
_SYNONYMS = {  # names that are no misspelling
    "image_id": ("image", "id", "file", "filename", "path"),
    "dx": ("diagnosis", "label", "class", "target"),
}
_DIAGNOSES = {  # the ISIC archive's names of what our classes hold, and its old ones
    "ak": ("solar or actinic keratosis", "actinic keratosis"),
    "akiec": (
        *("solar or actinic keratosis", "actinic keratosis", "squamous cell carcinoma in situ"),
        *("squamous cell carcinoma, nos", "squamous cell carcinoma"),
    ),
    "bcc": ("basal cell carcinoma",),
    "bkl": (
        *("pigmented benign keratosis", "benign keratosis", "seborrheic keratosis"),
        *("solar lentigo", "lichen planus like keratosis", "lichenoid keratosis"),
    ),
    "df": ("dermatofibroma",),
    "mel": ("melanoma, nos", "melanoma invasive", "melanoma in situ", "melanoma"),
    "nv": ("nevus", "melanocytic nevus"),
    "scc": ("squamous cell carcinoma, nos", "squamous cell carcinoma"),
    "vasc": ("benign soft tissue proliferations - vascular", "vascular lesion"),
}
_CONFIRMED = {  # the ISIC challenge's and archive's words for `dx_type`
    "histopathology": "histo",
    "serial imaging showing no change": "follow_up",
    "single image expert consensus": "consensus",
    "confocal microscopy with consensus dermoscopy": "confocal",
}


@dataclasses.dataclass(frozen=True)
class ZipMember:
    """A file that still lies in a zip.

    Attributes:
      zip_path: the zip.
      name: the member's path inside it.
    """

    zip_path: str
    name: str

    def __str__(self) -> str:
        return f"{self.zip_path}!{self.name}"

    def open(self, mode: str = "rb") -> io.BytesIO:
        """Opens the member for reading bytes, as `Path.open("rb")` does a file.

        Raises:
          OSError: as `read`.
        """
        assert mode == "rb", mode
        return io.BytesIO(self.read())

    def read(self) -> bytes:
        """Returns the member's bytes; thread-safe.

        Raises:
          OSError: the zip is damaged, or the member encrypted, packed in an unknown way, too large,
            or of another size than the zip says.
        """
        try:
            return reading.read_member(_zip(self.zip_path), self.name, _MAX_MEMBER_BYTES)
        except reading.ZIP_ERRORS as error:
            raise OSError(f"zip: {error}") from error


Source = Path | ZipMember


@dataclasses.dataclass(frozen=True, eq=False)
class RawData:
    """Photographs on disk and their metadata.

    Attributes:
      classes: the diagnoses.
      table: one row an image, sorted by image_id: image_id, lesion_id, dx, dx_type, sex,
        localization, dataset ('' where unknown), age in years (float, nan where unknown),
        label (index of dx in `classes`).
      sources: where each row's photograph lies.
      sizes: bytes of each photograph's file.
      notes: sentences that a person was told of them.
    """

    classes: Classes
    table: pd.DataFrame
    sources: list[Source]
    sizes: list[int]
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(eq=False)
class Search:
    """What is looked for, and what was found to be wrong.

    Attributes:
      raw_dir: the folder.
      classes: the diagnoses.
      allow_partial: see `find`.
      faults: sentences; each step adds its own.
      notes: sentences on what is no fault.
    """

    raw_dir: Path
    classes: Classes
    allow_partial: bool
    faults: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def is_ham10000(self) -> bool:
        """Whether the classes are HAM10000's seven, in any order."""
        return {name.lower() for name in self.classes} == set(HAM10000)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A form of table that states the diagnoses or the lesions of images.

    Attributes:
      name: for messages.
      needs: classes -> the columns of such a table; of several in one entry any will do.
      rows: (its rows as texts, the search) -> rows with our columns: image_id and any of `COLUMNS`.
        It keeps the columns `table` (the file) and `where` (file and line), and adds to the
        search's faults.
    """

    name: str
    needs: Callable[[Classes], Sequence[Sequence[str]]]
    rows: Callable[[pd.DataFrame, Search], pd.DataFrame]

    def divide(self, names: Collection[str], classes: Classes) -> tuple[list[str], list[str]]:
        """Returns which of the columns that it needs are among these, and which are missing."""
        found, missing = [], []
        for any_of in self.needs(classes):
            there = [name for name in any_of if name in names]
            found += there[:1]
            missing += [] if there else [any_of[0]]
        return found, missing


def find(
    raw_dir: str | os.PathLike, classes: Classes = HAM10000, *, allow_partial: bool = False
) -> RawData:
    """Finds photographs by image id, and their metadata, anywhere below a folder.

    Zips are read where they lie. A photograph that lies there several times is taken once.

    Args:
      raw_dir: the folder.
      classes: the diagnoses; a table may write them in other case.
      allow_partial: accept other counts than HAM10000's published ones, photographs without
        metadata (they are left out) and the reverse, the ISIC archive's other diagnoses and ISIC
        2019's unknown ones (the same).

    Raises:
      InputError: no photographs, no metadata, or what is wrong with them, all at once.
    """
    search = Search(Path(raw_dir), classes, allow_partial)
    if not search.raw_dir.is_dir():
        raise InputError(_nothing(search, "there is no such folder"))
    images, lists = {}, []
    for source in _files(search):
        name = PurePosixPath(source.name)
        if name.suffix.lower() in image.SUFFIXES:
            if not name.stem.endswith(("_superpixels", "_segmentation")):
                images.setdefault(tables.image_id(source.name), []).append(source)
        elif name.suffix.lower() in _TABLES:
            lists.append(source)
    rows, refused = _metadata(lists, search)
    if rows is None:
        found = f"it holds {len(images):,} images, but no table of metadata"
        nothing = _nothing(search, found if images else "it holds neither")
        raise InputError([nothing, *search.faults, *_first(refused)])
    if not images:
        found = f"it holds metadata of {rows['image_id'].nunique():,} images, but no image"
        raise InputError([*search.faults, _nothing(search, found)])
    return _matched(search, images, rows)


@functools.lru_cache(maxsize=16)
def _zip(path: str) -> zipfile.ZipFile:
    """Keeps zips open: reading the directory of one again for each of 5,000 members is slow."""
    return reading.open_zip(path)


def _files(search: Search) -> Iterator[Source]:
    """Yields all files below the folder in a fixed order, then those inside its zips."""
    content, zips = folders.walk(search.raw_dir), []
    for path, why in content.faults.items():
        if path.suffix.lower() in (*image.SUFFIXES, *_TABLES, ".zip") or path.is_dir():
            search.faults.append(f"{path}: {why}. Repair it, or remove it.")
    for path in content.files:
        if path.suffix.lower() == ".zip":
            zips.append(str(path))
        else:
            yield path
    for path in zips:
        try:
            members = sorted(_zip(path).namelist())
        except (zipfile.BadZipFile, OSError) as error:
            search.faults.append(f"{path}: {error}. Fetch this zip again, or remove it.")
            continue
        for name in members:
            parts = PurePosixPath(name).parts
            if not name.endswith("/") and not any(map(folders.is_hidden, parts)):
                yield ZipMember(path, name)


def size(source: Source) -> int:
    """Returns the bytes of a photograph's or table's file, as its folder or zip says."""
    if isinstance(source, ZipMember):
        return _zip(source.zip_path).getinfo(source.name).file_size
    return source.stat().st_size


def sha256(source: Source) -> str:
    """Returns the SHA-256 of a photograph's file, in hexadecimal digits.

    Raises:
      OSError: it cannot be read.
    """
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _metadata(sources: list[Source], search: Search) -> tuple[pd.DataFrame | None, list[str]]:
    """Reads the tables that state diagnoses, whatever their layout.

    Args:
      sources: files that may be such tables.
      search: what is looked for.

    Returns:
      One row a table row: image_id, COLUMNS, `table` and `where`; None if no file is such a table.
      And why each other table was not taken.
    """
    parts, groupings, refused = [], [], []
    for source in sources:
        is_table = PurePosixPath(source.name).suffix.lower() in (".csv", ".tab", ".tsv")
        try:
            names = tables.columns(source)  # a large table of something else is read no further
            divided = {layout: layout.divide(names, search.classes) for layout in LAYOUTS}
            layout = next((one for one, (_, missing) in divided.items() if not missing), None)
            if layout is None:
                if is_table or any(found for found, _ in divided.values()):
                    refused.append(f"{source}: {_lacking(names, divided)}")
                continue
            is_table = True
            table = tables.read(source, size(source))
        except tables.TableError as error:
            told = f"{source}: cannot be read as a table: {error}"
            (search.faults if is_table else refused).append(told)
            continue
        search.faults += [f"{source} {fault}" for fault in table.faults]
        where = [f"{source} line {line}" for line in table.lines]
        rows = layout.rows(table.texts.assign(table=str(source), where=where), search)
        if "dx" in rows:
            parts.append(rows)
        else:
            groupings.append(rows)
            refused.append(f"{source}: lists lesions, but not their dx.")
    if not parts:
        return None, refused
    rows = _joined(parts)
    if groupings:
        lesions = _joined(groupings).drop_duplicates("image_id", keep="last").set_index("image_id")
        for column in COLUMNS:
            told = rows["image_id"].map(lesions[column]).fillna("")
            rows[column] = rows[column].where(rows[column] != "", told)
    return _checked(rows, search), refused


def _lacking(names: Sequence[str], divided: dict[Layout, tuple[list[str], list[str]]]) -> str:
    """Returns why a table with these columns fits no layout, and what may be meant."""
    if not names:
        return "is empty."
    for known, what in ((HAM10000, "ISIC 2018 Task 3"), (ISIC2019, "ISIC 2019")):
        if {"image", *known} <= set(names):
            return f"is the truth of {what}. To train on its classes set {_option(known.names)}."
    layout = max(divided, key=lambda layout: len(divided[layout][0]))
    found, missing = divided[layout]
    others = [name for name in names if name and name not in found]
    told = f"has {', '.join(found)}, but not" if found else "lacks"
    told += f" the column{'s' * (len(missing) > 1)} {', '.join(missing)} of {layout.name}. Its"
    told += f" columns: {_some((repr(name[:40]) for name in names), 12)}."
    for name in missing:
        near = difflib.get_close_matches(name, others, 1)
        near += [other for other in _SYNONYMS.get(name, ()) if other in others]
        if near:
            told += f" If {near[0]!r} is the {name}, call it so."
    return told


def _renamed(rows: pd.DataFrame, _: Search) -> pd.DataFrame:
    """Returns the rows with our names of columns; ours win where a table has both."""
    for alias, name in _ALIASES.items():
        if name not in rows:
            rows = rows.rename(columns={alias: name})
    return rows


def _from_one_hot(rows: pd.DataFrame, search: Search) -> pd.DataFrame:
    """Returns the ISIC challenge's truth as rows with a dx."""
    names = np.array([name.lower() for name in search.classes])
    if _UNKNOWN_CLASS in rows and _UNKNOWN_CLASS not in names:
        is_unknown = tables.numbers(rows[_UNKNOWN_CLASS]) == 1
        if is_unknown.any() and not search.allow_partial:
            unknown = rows[is_unknown]
            search.faults.append(
                f"{unknown['where'].iloc[0]}: UNK is 1 for {len(unknown):,} images"
                f" ({_some(unknown['image'])}): they are of none of the classes. Set"
                " --config.data.allow_partial=true to leave them out."
            )
        rows = rows[~is_unknown]
    values = np.stack([tables.numbers(rows[name]) for name in names], axis=1)
    wrong = ~(np.isin(values, (0, 1)).all(1) & (values.sum(1) == 1))
    search.faults += [
        f"{where}: exactly one of {', '.join(names).upper()} must be 1, the others 0."
        for where in _first(rows["where"][wrong])
    ]
    return _renamed(rows, search).assign(dx=names[np.nan_to_num(values).argmax(1)])


def _from_archive(rows: pd.DataFrame, search: Search) -> pd.DataFrame:
    """Returns the ISIC archive's metadata, as isic-cli writes it, as rows with a dx."""
    dx = name = site = pd.Series("", index=rows.index)
    diagnoses = _diagnoses(search.classes)
    for level in (level for level in _LEVELS if level in rows):  # from the widest to the narrowest
        name = rows[level].where(rows[level] != "", name)
        dx = rows[level].str.lower().map(diagnoses).fillna(dx)
    for level in (f"anatom_site_{n}" for n in range(1, 6) if f"anatom_site_{n}" in rows):
        word = rows[level].str.lower()
        site = word.where(word.isin(metadata.SITES) | ((site == "") & (word != "")), site)
    rows = _renamed(rows, search).assign(dx=dx)
    if "localization" not in rows:
        rows["localization"] = ""
    rows["localization"] = rows["localization"].where(rows["localization"] != "", site)
    others = name[dx == ""]
    if search.allow_partial and len(others) < len(rows):
        return rows[dx != ""]
    for other, number in _first(others.value_counts().items()):
        where = rows["where"][others.index[others == other][0]]
        search.faults.append(
            f"{where}: the diagnosis {other!r} of {number:,} rows is none of the classes"
            f" ({', '.join(search.classes)}). Correct it, or set --config.data.allow_partial=true"
            " to leave out the photographs of such rows."
        )
    if len(others):
        search.faults.append(_other_classes(name))
    return rows[dx != ""]


LAYOUTS = (
    Layout("a table of metadata", lambda _: (_IDS, ("dx",)), _renamed),
    Layout(
        "the ISIC challenge's truth",
        lambda classes: (("image",), *((name.lower(),) for name in classes)),
        _from_one_hot,
    ),
    Layout("the ISIC archive's metadata", lambda _: (("isic_id",), _LEVELS), _from_archive),
    Layout("the ISIC challenge's lesions", lambda _: (("image",), ("lesion_id",)), _renamed),
)
"""The first that fits a table is taken. To add one, write its `rows` and put it here."""


def _diagnoses(classes: Classes) -> dict[str, str]:
    """Returns the class of each word for it, in lower case: its own name, and the archive's."""
    told = {word: name for name in classes for word in _DIAGNOSES.get(name.lower(), ())}
    return told | {name.lower(): name for name in classes}


def _option(names: Sequence[str]) -> str:
    """Returns the option that trains on these classes, ready to be pasted into a shell."""
    value = f"({', '.join(map(repr, names))})"
    quoted = shlex.quote(value) if set(value) & set('"$`\\!') else f'"{value}"'
    return f"--config.data.classes={quoted}"


def _other_classes(words: pd.Series) -> str:
    """Returns how to train on the words that a table has for diagnoses."""
    spelled = {word.lower(): word for word in reversed(words[words != ""].value_counts().index)}
    names = [spelled[word] for word in sorted(spelled)]
    if why := class_lists.faults(names, ()):
        return f"The words there ({_some(names, 20)}) cannot be the classes: {' '.join(why)}"
    return f"To train on the words that are there, set {_option(names)}."


def _joined(parts: list[pd.DataFrame]) -> pd.DataFrame:
    """Returns the rows of several tables with the same columns and the same words."""
    columns = ["image_id", *COLUMNS, "table", "where"]
    parts = [rows.reindex(columns=columns, fill_value="") for rows in parts]
    rows = pd.concat(parts, ignore_index=True)
    rows["image_id"] = rows["image_id"].map(tables.image_id)
    rows["dx_type"] = rows["dx_type"].str.lower().map(_CONFIRMED).fillna(rows["dx_type"])
    return rows


def _checked(rows: pd.DataFrame, search: Search) -> pd.DataFrame:
    """Returns the rows with numbers for ages and classes for dx; adds each row's own faults."""
    for column in ("image_id", *COLUMNS):
        odd = rows[rows[column].map(escape.shown) != rows[column]]
        for where, text in zip(_first(odd["where"]), odd[column], strict=False):
            search.faults.append(f"{where}: {column} {text!r} holds an invisible character.")
    empty = rows["where"][rows["image_id"] == ""]
    search.faults += [f"{where}: image_id is empty." for where in _first(empty)]
    dx = rows["dx"].str.lower().map({name.lower(): name for name in search.classes})
    search.faults += _dx_faults(rows[dx.isna()], rows["dx"], search.classes)
    age = pd.Series(tables.numbers(rows["age"]), rows.index)
    missing = rows["age"].str.lower().isin(metadata.UNKNOWN)
    wrong = rows[~missing & ~age.between(0, 120)]
    for where, text in zip(_first(wrong["where"]), wrong["age"], strict=False):
        search.faults.append(f"{where}: age {text!r} must be years from 0 to 120, or empty.")
    return rows.assign(dx=dx.fillna(rows["dx"]), age=age)


def _dx_faults(unknown: pd.DataFrame, words: pd.Series, classes: Classes) -> list[str]:
    """Returns a fault for each word that is no class, and how to train on all the words."""
    faults, diagnoses = [], _diagnoses(classes)
    for where, dx in _first(unknown.drop_duplicates("dx")[["where", "dx"]].to_numpy()):
        named = difflib.get_close_matches(dx.lower(), diagnoses, 1, 0.8)
        hint = f" Did you mean {diagnoses[named[0]]!r}?" if named else nearest(dx, classes)
        faults.append(f"{where}: dx {dx!r} must be one of {', '.join(classes)}.{hint}")
    return [*faults, _other_classes(words)] if faults else []


def _matched(search: Search, images: dict[str, list[Source]], rows: pd.DataFrame) -> RawData:
    """Joins photographs and metadata and checks the whole, on top of the faults so far."""
    rows = rows[rows["image_id"] != _WITHOUT_IMAGE]
    if not rows["image_id"].isin(images.keys()).any():
        none = f"{search.raw_dir}: no image has a row of metadata ({_some(images)})."
        raise InputError([*search.faults, none])
    search.faults += _conflicts(rows)
    table = _of_these_sets(search, images, _row_an_image(rows))
    table["lesion_id"] = _lesions(search, table)
    _check_pairs(search, images, table)
    table = table[table["image_id"].isin(images.keys())].reset_index(drop=True)
    sizes = [[size(source) for source in images[name]] for name in table["image_id"]]
    differing = table["image_id"][[len(set(several)) > 1 for several in sizes]]
    if len(differing):
        files = ", ".join(map(str, images[differing.iloc[0]]))
        search.faults.append(
            f"{search.raw_dir}: {len(differing):,} images lie there several times with different"
            f" sizes ({differing.iloc[0]}: {files}). Keep one version."
        )
    if not search.faults and not search.allow_partial:
        search.faults += _count_faults(search, table)
    if search.faults:
        raise InputError(search.faults)
    say(*search.notes)
    table["label"] = table["dx"].map({name: i for i, name in enumerate(search.classes)})
    return RawData(
        classes=search.classes,
        table=table,
        sources=[images[name][0] for name in table["image_id"]],
        sizes=[several[0] for several in sizes],
        notes=tuple(search.notes),
    )


def _row_an_image(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns one row an image, sorted, with what any table says of it."""
    repeated = rows["image_id"].duplicated(keep=False)
    merged = rows[repeated].replace("", pd.NA).groupby("image_id")[list(COLUMNS)].first()
    table = pd.concat([rows[~repeated], merged.reset_index()]).sort_values("image_id")
    table = table[["image_id", *COLUMNS]].reset_index(drop=True)
    texts = table.columns.drop("age")
    table[texts] = table[texts].fillna("")
    return table


def _published(image_ids: pd.Series) -> np.ndarray:
    """Returns the place in `_SETS` of each image, int [n]; -1 for those of none."""
    return _SETS.get_indexer(pd.to_numeric(image_ids.str.extract(r"^ISIC_(\d{7})$")[0]))


def _of_these_sets(
    search: Search, images: dict[str, list[Source]], table: pd.DataFrame
) -> pd.DataFrame:
    """Returns the rows without those of HAM10000's sets that are not in this folder.

    The ISIC archive has one table of all three.
    """
    if not search.is_ham10000:
        return table
    published = _published(table["image_id"])
    here = np.isin(published, [-1, *published[table["image_id"].isin(images.keys())]])
    table, published = table[here].reset_index(drop=True), published[here]
    num_held_out = np.count_nonzero(published > 0)
    if num_held_out and (published == 0).any() and not search.allow_partial:
        search.faults.append(
            f"{search.raw_dir} holds the training set and {num_held_out:,} images of the"
            " challenge's validation or test set. Give each set a folder: the official test goes to"
            " data.test_dir."
        )
    return table


def _lesions(search: Search, table: pd.DataFrame) -> pd.Series:
    """Returns the lesion of each image; where no table names one, the image counts as its own.

    HAM10000's training set shows many lesions several times, so its images need their lesions.
    """
    published = _published(table["image_id"])
    nameless = table["lesion_id"].str.lower().isin(metadata.UNKNOWN)
    needed = table["image_id"][nameless & (published == 0)]
    if len(needed):
        search.faults.append(
            f"{len(needed):,} images have no lesion_id ({_some(needed)}), so that images of one"
            " lesion could be in both training and validation. Name each image's lesion in that"
            " column; for the ISIC challenge's training set add"
            " ISIC2018_Task3_Training_LesionGroupings.csv."
        )
    alone = np.count_nonzero(nameless & (published < 0))
    if alone and not search.faults:
        search.notes.append(
            f"{search.raw_dir}: {alone:,} of {len(table):,} images have no lesion_id, and each"
            " counts as a lesion of its own. If some show the same lesion, name it in a column"
            " lesion_id: else it could be in both training and validation."
        )
    return table["lesion_id"].mask(nameless & (published != 0), table["image_id"])


def say(*sentences: str) -> None:
    """Prints sentences on the main process, each once."""
    for sentence in sentences:
        _say(sentence)


@functools.cache
def _say(sentence: str) -> None:
    if parallel.is_main():
        console.log_line(sentence)


def _check_pairs(search: Search, images: dict[str, list[Source]], table: pd.DataFrame) -> None:
    """Adds a fault for lesions of several diagnoses, and for images or rows that are alone."""
    pairs = table.loc[table["lesion_id"] != "", ["lesion_id", "dx"]].drop_duplicates()
    mixed = pairs[pairs["lesion_id"].duplicated(keep=False)].groupby("lesion_id")["dx"]
    search.faults.extend(
        f"lesion {lesion} has several diagnoses: {', '.join(sorted(several))}."
        " A lesion has one; correct dx or lesion_id."
        for lesion, several in _first(mixed)
    )
    if search.allow_partial:
        return
    way_out = "add what is missing, or set --config.data.allow_partial=true to leave them out."
    without_row = sorted(images.keys() - set(table["image_id"]) - {_WITHOUT_IMAGE})
    without_image = table["image_id"][~table["image_id"].isin(images.keys())]
    for names, what in (
        (without_row, "images have no metadata"),
        (without_image, "rows of metadata have no image"),
    ):
        if len(names):
            search.faults.append(
                f"{search.raw_dir}: {len(names):,} {what} ({_some(names)}); {way_out}"
            )


def _conflicts(rows: pd.DataFrame) -> list[str]:
    """Returns a fault for each image with several values, or one for tables that disagree."""
    rows = rows[rows["image_id"].duplicated(keep=False)].replace("", pd.NA)
    faults, counts, example, names = [], {}, "", set()
    for column in COLUMNS:
        told = rows.dropna(subset=column).sort_values("image_id", kind="stable")
        told = told[told.groupby("image_id")[column].transform("nunique") > 1]
        within = told.groupby(["image_id", "table"])[column].nunique() > 1
        within = set(within.index[within].get_level_values(0))
        for name in _first(sorted(within)):
            shown = _values(told[told["image_id"] == name], column)
            faults.append(f"{name} has several values of {column}: {shown}. Keep one.")
        across = told[~told["image_id"].isin(within)]
        if len(across):
            counts[column] = across["image_id"].nunique()
            names |= set(across["table"])
            first = across[across["image_id"] == across["image_id"].iloc[0]]
            example = example or f"{first['image_id'].iloc[0]}: {_values(first, column)}"
    if counts:
        numbers = ", ".join(f"{column} of {number:,} images" for column, number in counts.items())
        faults.append(
            f"{' and '.join(sorted(names))} disagree: they differ in {numbers} ({example}). Keep"
            " one of these tables. (The Dataverse and Kaggle call lesions HAM_*, the ISIC archive"
            " IL_*.)"
        )
    return faults


def _values(rows: pd.DataFrame, column: str) -> str:
    pairs = zip(rows[column], rows["where"], strict=True)
    return ", ".join(f"{value!r} ({where})" for value, where in pairs)


def _count_faults(search: Search, table: pd.DataFrame) -> list[str]:
    """Compares HAM10000's sets with the published counts; other data have none."""
    sets = _published(table["image_id"])
    if not search.is_ham10000 or (sets < 0).any():
        return []
    is_test = bool((sets > 0).all())
    published = TEST_IMAGES if is_test else TRAIN_IMAGES
    expected = {"images": sum(published), **dict(zip(HAM10000, published, strict=True))}
    counts = {"images": len(table), **table["dx"].str.lower().value_counts()}
    if not is_test:
        expected["lesions"], counts["lesions"] = TRAIN_LESIONS, table["lesion_id"].nunique()
    other = [
        f"{name} {counts.get(name, 0):,} instead of {number:,}"
        for name, number in expected.items()
        if counts.get(name, 0) != number
    ]
    what = "the official ISIC 2018 Task 3 test" if is_test else "HAM10000"
    return other and [
        f"{search.raw_dir}: these are not the published counts of {what}: {', '.join(other)}."
        " Complete the folder, or set --config.data.allow_partial=true if a part of it is meant."
    ]


def _nothing(search: Search, found: str) -> str:
    return (
        f"No data set in {search.raw_dir.absolute()}: {found}. Looked for, at any depth and inside"
        " zips: a table HAM10000_metadata (.csv or .tab), ISIC2018_Task3_*_GroundTruth.csv,"
        " ISIC_2019_*_GroundTruth.csv, the ISIC archive's metadata.csv or another with the columns"
        " image_id and dx; and images named by their image_id, such as ISIC_0024306.jpg. Three ways"
        " out: --config.data.download=true fetches HAM10000; --config.data.dir=PATH"
        " (--config.data.test_dir=PATH for the test) says where they are;"
        " --config=configs/demo.py needs no photographs."
    )


def _first(items, limit: int = 10) -> list:
    """Returns the first of many like faults; the user sees the pattern."""
    return list(itertools.islice(items, limit))


def _some(names, limit: int = 5) -> str:
    names = list(names)
    return ", ".join(map(escape.shown, names[:limit])) + (", ..." if len(names) > limit else "")
