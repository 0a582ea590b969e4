"""Which images train and which validate, and the proof that no lesion does both.

Photographs of one lesion are near copies of each other, so a split by image lets a network
recognise lesions instead of diagnosing them. Here a lesion's images always stay together.
"""

import dataclasses
import hashlib
import itertools
import math
import operator
import os
import pathlib
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from sklearn import model_selection

from ham_jax import escape, files
from ham_jax.classes import Classes
from ham_jax.config import InputError, nearest
from ham_jax.data import metadata, tables

SPLITS = ("train", "val", "test", "unused")
METADATA = (*metadata.COLUMNS, "dx_type")


def folds(table: pd.DataFrame, num_folds: int, seed: int) -> np.ndarray:
    """Assigns lesions to folds, stratified by diagnosis.

    The folds depend on the set of (lesion_id, dx), on `num_folds` and on `seed` only, not on the
    order of the rows. Of each class, and over all, two folds differ by one lesion at the most.

    Args:
      table: one row an image, with the columns `lesion_id` and `dx`.
      num_folds: at least 2.
      seed: 0 to 2**32 - 1.

    Returns:
      int [n]: the fold of each row, 0 to num_folds - 1.

    Raises:
      InputError: a lesion has several diagnoses, a class has fewer lesions than folds, or the
        seed is out of range.
    """
    lesions, of_image, faults = _lesions(table)
    dx, _ = pd.factorize(lesions["dx"])  # numbers sort sooner than texts
    sizes = lesions["dx"].value_counts().sort_index()
    small = sizes[sizes < num_folds]
    if len(small):
        listed = ", ".join(f"{name} {size}" for name, size in small.items())
        most = int(sizes.min())
        way_out = (
            f"set data.num_folds to {most} or less"
            if most >= 2
            else "no number of folds can hold it in both splits, so give data.split_csv"
        )
        faults.append(
            f"data.num_folds = {num_folds} is more than the lesions of a class ({listed});"
            f" {way_out}, or add images."
        )
    if not 0 <= seed < 2**32:
        faults.append(f"the seed of the folds = {seed} must lie in [0, {2**32 - 1}].")
    if faults:
        raise InputError(faults)
    fold = np.full(len(lesions), -1)
    stratified = model_selection.StratifiedKFold(num_folds, shuffle=True, random_state=seed)
    for k, (_, held_out) in enumerate(stratified.split(dx, dx)):
        fold[held_out] = k
    return fold[of_image]


def set_aside(table: pd.DataFrame, data_config: Any, seed: int) -> np.ndarray:
    """Cuts off the lesions that no fold has, a share of each diagnosis.

    The lesions of a diagnosis come in the order of a checksum of seed and lesion_id. The first
    `data.test_share` of them, rounded, are the test, whatever `data.val_share` is; the next
    `data.val_share` are validation. A positive share is at least one lesion.

    Args:
      table: one row an image, with the columns `lesion_id` and `dx`.
      data_config: the configuration's section `data`.
      seed: of the order.

    Returns:
      str [n]: 'test', 'val' or, of what remains for the folds, ''.

    Raises:
      InputError: a lesion has several diagnoses, or fewer of a class remain than there are folds.
    """
    shares = {"test": data_config.test_share, "val": data_config.val_share}
    if not any(shares.values()):
        return np.full(len(table), "")
    lesions, of_image, faults = _lesions(table)
    if faults:
        raise InputError(faults)
    lesions["order"] = [
        hashlib.sha256(f"{seed} {name}".encode()).hexdigest() for name in lesions["lesion_id"]
    ]
    part, small = np.full(len(lesions), "", object), []
    for dx, of_class in lesions.sort_values("order").groupby("dx", observed=True):
        places, start = of_class.index, 0
        for name, share in shares.items():
            count = max(1, round(share * len(places))) if share else 0
            part[places[start : start + count]] = name
            start += count
        if len(places) - start < data_config.num_folds:
            small.append(f"{dx} {max(0, len(places) - start)} of {len(places)}")
    if small:
        raise InputError(
            f"data.test_share = {shares['test']} and data.val_share = {shares['val']} leave fewer"
            f" lesions of a class than data.num_folds = {data_config.num_folds}"
            f" ({', '.join(small)}): set smaller shares or fewer folds, or add images."
        )
    return part[of_image].astype(str)


def min_lesions(data_config: Any) -> int:
    """Returns how many lesions of a class are enough for its folds and shares."""
    shares = [share for share in (data_config.test_share, data_config.val_share) if share]
    # Rounded up, each share takes at most one lesion more than its part.
    return math.ceil((data_config.num_folds + len(shares)) / (1 - sum(shares)))


def assign(table: pd.DataFrame, data_config: Any, seed: int) -> np.ndarray:
    """Returns the split of each row, from the user's CSV where one is given, else from the folds.

    What `set_aside` calls validation is that of a network for which all folds train
    (`data.num_folds` = 1), and unused where one of several folds validates.

    Args:
      table: one row an image, with the columns `image_id`, `lesion_id` and `dx`.
      data_config: the configuration's section `data`.
      seed: of the folds, unless `data.split_seed` is set.

    Returns:
      str [n]: one of `SPLITS`.

    Raises:
      InputError: see `folds` and `set_aside`; and all that is wrong with the CSV.
    """
    if data_config.split_csv:
        return _from_csv(table, data_config.split_csv)
    if data_config.split_seed is not None:
        seed = data_config.split_seed
    aside = set_aside(table, data_config, seed)
    rest = aside == ""
    if data_config.num_folds == 1:
        return np.where(rest, "train", aside)
    split = np.where(aside == "val", "unused", aside).astype(object)
    fold = folds(table[rest], data_config.num_folds, seed)
    split[rest] = np.where(fold == data_config.fold, "val", "train")
    return split.astype(str)


@dataclasses.dataclass(frozen=True, eq=False)
class Audit:
    """What lies in which split, and what should not.

    Attributes:
      counts: a row a diagnosis and one 'total'; the columns `<split>_images`, `<split>_lesions`.
      shared_lesions: lesions with images in more than one split; must be empty.
      duplicate_files: groups of equal files, each ((image_id, split), ...); None where the table
        has no checksums to tell.
      missing: images without a value; a row a metadata column, a column a split.
    """

    counts: pd.DataFrame
    shared_lesions: tuple[str, ...]
    duplicate_files: tuple[tuple[tuple[str, str], ...], ...] | None
    missing: pd.DataFrame

    def text(self) -> str:
        """Returns the audit as plain text for a terminal."""
        shared = len(self.shared_lesions)
        return "\n".join(
            [
                self.counts.to_string(),
                "",
                "images without metadata",
                self.missing.to_string(),
                "",
                f"lesions in more than one split: {shared or 'none'}"
                + (f" ({_some(self.shared_lesions)})" if shared else ""),
                f"groups of identical files: {self._duplicates_text()}",
            ]
        )

    def _duplicates_text(self) -> str:
        if self.duplicate_files is None:
            return "not looked for, the files have no checksums"
        if not self.duplicate_files:
            return "none"
        across = [group for group in self.duplicate_files if len({s for _, s in group}) > 1]
        names = [" = ".join(f"{name} ({split})" for name, split in group) for group in across]
        return f"{len(self.duplicate_files)}, across splits: {len(across) or 'none'}" + (
            f" ({_some(names)})" if across else ""
        )

    def write(self, folder: str | os.PathLike) -> None:
        """Writes audit.json (everything) and audit.csv (the counts), each whole or not at all."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "counts": self.counts.to_dict("index"),
            "shared_lesions": self.shared_lesions,
            "duplicate_files": self.duplicate_files
            and [[{"image_id": i, "split": s} for i, s in group] for group in self.duplicate_files],
            "missing": self.missing.to_dict("index"),
        }
        files.write_json(folder / "audit.json", content)
        files.write_text(folder / "audit.csv", self.counts.to_csv(lineterminator="\n"))


def audit(
    table: pd.DataFrame,
    split: np.ndarray,
    classes: Classes,
    test_table: pd.DataFrame | None = None,
) -> Audit:
    """Counts images, lesions and missing metadata by split and looks for leaks between splits.

    Args:
      table: one row an image: `image_id`, `lesion_id`, `dx`, and where known `age`, `sex`,
        `localization`, `dx_type` and `file_sha256`. An image without a lesion_id counts as a
        lesion of its own; a metadata column that is absent counts as missing.
      split: str [n], the split of each row.
      classes: the diagnoses.
      test_table: the official test in the same form, counted as split 'test'.

    Returns:
      The audit; finding a leak is no error here.
    """
    columns = ["image_id", "lesion_id", "dx", "file_sha256", *METADATA]
    rows = table.reindex(columns=columns).assign(split=split)
    if test_table is not None:
        tested = test_table.reindex(columns=columns).assign(split="test")
        # As objects, for one of the two may lack a column that the other has.
        rows = pd.concat([rows.astype(object), tested.astype(object)], ignore_index=True)
    rows["lesion_id"] = rows["lesion_id"].where(~_blank(rows["lesion_id"]), rows["image_id"])
    # Numbers from here on, for texts take long.
    lesion, lesion_names = pd.factorize(rows["lesion_id"])
    dx = pd.Index(classes.names).get_indexer(rows["dx"])
    place = pd.Index(SPLITS).get_indexer(rows["split"])
    blank = {column: _blank(rows[column]).to_numpy() for column in METADATA}

    counts, missing = {}, {}
    for number, name in enumerate(SPLITS):
        if not (own := place == number).any():
            continue
        known = own & (dx >= 0)
        has = np.zeros((len(lesion_names), len(classes)), bool)
        has[lesion[known], dx[known]] = True
        counts[f"{name}_images"] = np.bincount(dx[known], minlength=len(classes))
        counts[f"{name}_lesions"] = has.sum(axis=0)
        missing[name] = {column: int(blank[column][own].sum()) for column in METADATA}
    counts = pd.DataFrame(counts, index=pd.Index(classes.names, name="dx"))
    counts.loc["total"] = counts.sum()

    lies = np.zeros((len(lesion_names), len(SPLITS)), bool)
    lies[lesion, place] = True
    shared = lesion_names[lies.sum(axis=1) > 1]
    return Audit(
        counts=counts,
        shared_lesions=tuple(sorted(shared)),
        duplicate_files=_duplicates(rows),
        missing=pd.DataFrame(missing),
    )


def _duplicates(rows: pd.DataFrame) -> tuple[tuple[tuple[str, str], ...], ...] | None:
    """Returns (image_id, split) of each group of equal files; None where no checksum is known."""
    is_hashed = ~_blank(rows["file_sha256"])
    if not is_hashed.any():
        return None
    repeated = rows[is_hashed & rows["file_sha256"].duplicated(keep=False)]
    repeated = repeated.sort_values("file_sha256", kind="stable")
    files_of = zip(*(repeated[k] for k in ("file_sha256", "image_id", "split")), strict=True)
    return tuple(
        tuple((name, split) for _, name, split in group)
        for _, group in itertools.groupby(files_of, operator.itemgetter(0))
    )


def write_csv(path: str | os.PathLike, table: pd.DataFrame, split: np.ndarray) -> None:
    """Writes who is in which split, in a form that `data.split_csv` reads.

    Args:
      path: CSV to make or replace, whole or not at all.
      table: one row an image, with the columns `image_id` and `lesion_id`.
      split: str [n].
    """
    rows = table[["image_id", "lesion_id"]].assign(split=split).map(escape.cell)
    files.write_text(path, rows.to_csv(index=False, lineterminator="\n"))


def trained_on(path: str | os.PathLike, table: pd.DataFrame) -> np.ndarray:
    """Returns which images of `table`, or others of their lesions, a run trained on, bool [n].

    Args:
      path: of the run's split, as `write_csv` wrote it.
      table: one row an image, with the columns `image_id` and `lesion_id`.
    """
    rows = _read_csv(path)
    trained = rows[rows["split"] == "train"]
    return (
        table["image_id"].isin(trained["image_id"]) | table["lesion_id"].isin(trained["lesion_id"])
    ).to_numpy()


def lists(path: str | os.PathLike, table: pd.DataFrame) -> bool:
    """Returns whether a run had all images of `table`, in whichever split.

    Args:
      path: of the run's split, as `write_csv` wrote it.
      table: one row an image, with the column `image_id`.
    """
    return bool(table["image_id"].isin(_read_csv(path)["image_id"]).all())


def changed_split(path: str | os.PathLike, table: pd.DataFrame, split: np.ndarray) -> np.ndarray:
    """Returns which images of `table` a run had in another split, or did not have, bool [n].

    Args:
      path: of the run's split, as `write_csv` wrote it.
      table: one row an image, with the column `image_id`.
      split: str [n], as it is now.
    """
    before = _read_csv(path).set_index("image_id")["split"]
    return before.reindex(table["image_id"]).to_numpy() != split


def _read_csv(path: str | os.PathLike) -> pd.DataFrame:
    """Returns what `write_csv` wrote.

    Raises:
      InputError: it is damaged.
    """
    told = f"{path} cannot be read as the split of a run:"
    try:
        rows = tables.read(path)
    except tables.TableError as error:
        raise InputError(f"{told} {error}") from error
    missing = {"image_id", "lesion_id", "split"} - {*rows.texts}
    if rows.faults or missing:
        raise InputError(f"{told} {rows.faults[0] if rows.faults else f'no {min(missing)}.'}")
    return rows.texts.map(escape.plain)


def _from_csv(table: pd.DataFrame, path: str) -> np.ndarray:
    """Returns the split of each row as the user's CSV says; see `assign`."""
    where = f"data.split_csv = {os.fspath(path)!r}"
    needed = "It needs the columns image_id (or lesion_id) and split (train, val, test or unused)."
    try:
        rows = tables.read(path)
    except tables.TableError as error:
        raise InputError(f"{where} cannot be read as a table: {error} {needed}") from error
    texts = rows.texts
    key = next((name for name in ("image_id", "isic_id") if name in texts), "lesion_id")
    if key not in texts or "split" not in texts:
        listed = ", ".join(texts) or "(none)"
        hint = "".join(nearest(name, texts) for name in ("image_id", "split") if name not in texts)
        raise InputError(
            f"{where} has the columns {listed}; it needs image_id (or lesion_id) and split.{hint}"
        )
    ids, key = texts[key].map(escape.plain), "lesion_id" if key == "lesion_id" else "image_id"
    known = set(table[key])
    if key == "image_id":  # a path or another suffix is still that image
        ids = ids.where(ids.isin(known), ids.map(tables.image_id))
    given = defaultdict(set)
    for name, split in zip(ids, texts["split"], strict=True):
        given[name].add(split)

    faults = [f"{where} {fault}" for fault in rows.faults]
    names = sorted(set().union(*given.values()).difference(SPLITS))
    if names:
        hint = nearest(names[0].lower(), SPLITS)
        faults.append(f"{where}: split {_some(names)} must be one of {', '.join(SPLITS)}.{hint}")
    lists = {
        f"are not in the data: remove them, or add the images ({key})": given.keys() - known,
        f"of the data have no split: give each {key} one": known - given.keys(),
        f"have two splits: keep one row for each {key}": {k for k in given if len(given[k]) > 1},
    }
    for fault, ids in lists.items():
        if ids:
            faults.append(f"{where}: {len(ids)} id(s) {fault}: {_some(sorted(ids))}.")

    split = np.array([next(iter(given[k])) if len(given[k]) == 1 else "" for k in table[key]], str)
    placed = table.loc[np.isin(split, SPLITS), ["lesion_id"]].assign(
        split=split[np.isin(split, SPLITS)]
    )
    num_splits = placed.groupby("lesion_id")["split"].nunique()
    torn = num_splits.index[num_splits > 1]
    if len(torn):
        faults.append(
            f"{where}: {len(torn)} lesion(s) have images in more than one split, which would leak"
            f" training images into the evaluation: {_some(torn)}. Keep each lesion's together."
        )
    faults += [f"{where}: no image has the split {s}." for s in SPLITS[:2] if s not in split]
    if faults:
        raise InputError(faults)
    return split


def _lesions(table: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray, list[str]]:
    """Returns (lesion_id and dx of each lesion, sorted; each image's lesion; see below).

    The last is a fault where a lesion has several dx, which then has as many rows.
    """
    of_image, names = pd.factorize(table["lesion_id"], sort=True)
    dx, dx_names = pd.factorize(table["dx"], sort=True)
    has = np.zeros((len(names), len(dx_names)), bool)
    has[of_image, dx] = True
    lesion, dx = has.nonzero()
    lesions = pd.DataFrame({"lesion_id": names[lesion], "dx": dx_names[dx]})
    mixed = names[has.sum(axis=1) > 1]
    if not len(mixed):
        return lesions, of_image, []
    fault = f"metadata: {len(mixed)} lesion(s) have more than one dx: {_some(mixed)}."
    return lesions, of_image, [f"{fault} A lesion has one diagnosis; correct dx or lesion_id."]


def _blank(column: pd.Series) -> pd.Series:
    """Returns where a value is missing."""
    return column.isna() | column.isin(metadata.UNKNOWN)


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more
