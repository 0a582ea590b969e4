"""Makes records of photographs, once, and reads them.

A raw folder (see `layouts`) becomes a TFDS data set: ArrayRecord files with each photograph as raw
uint8 on one canvas, and `records.csv`, the metadata in record order. TFDS is needed to write them
(see `builder`), but not to read them, and TensorFlow for neither.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import ModuleType

import numpy as np
import pandas as pd
from array_record.python.array_record_data_source import ArrayRecordDataSource

from ham_jax import console, escape, files, reading
from ham_jax.classes import HAM10000, Classes
from ham_jax.config import InputError
from ham_jax.data import folders, layouts, manifest

DECODER_VERSION = 3
"""Raise it when `image.load` gives other pixels for the same file: old records are then remade."""

_NAME, _VERSION = "ham10000", "1.0.0"
_SHARD_BYTES = 128 << 20  # TFDS holds a shard in memory while it writes it
_MAX_SMALL_BYTES = 256 << 20  # records.csv of a million photographs
_CHECKSUMS = "checksums.json"  # of the small files; an ArrayRecord has its own inside


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """Prepared photographs.

    Attributes:
      folder: where the records lie.
      classes: the diagnoses.
      table: as in `layouts.RawData`, in record order, and file_sha256 of each original file.
      canvas: height, width of every image, in pixels.
      fingerprint: of the raw data, the canvas, the decoder and the classes.
    """

    folder: Path
    classes: Classes
    table: pd.DataFrame
    canvas: tuple[int, int]
    fingerprint: str
    _serialized: ArrayRecordDataSource = dataclasses.field(repr=False)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns the images of these records, uint8 [n, H, W, 3]; thread-safe.

        Args:
          indices: record numbers [n], in any order; one may come several times.
        """
        images = np.empty((len(indices), *self.canvas, 3), np.uint8)
        # One by one: array_record's own batches start a thread a shard, which takes longer.
        for target, i in zip(images, indices, strict=True):
            try:
                pixels = _pixels(self._serialized[int(i)])
            except Exception as error:  # array_record's and more: it is another record
                what = f"record {i} of the .array_record files cannot be read: {error}"
                raise _damaged(self.folder, what) from error
            if len(pixels) != target.size:
                what = f"record {i} of the .array_record files has {len(pixels):,} bytes of pixels"
                raise _damaged(self.folder, what)
            target.reshape(-1)[:] = np.frombuffer(pixels, np.uint8)
        return images


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """Some of the records, such as a split.

    Attributes:
      records: all of them.
      rows: the numbers of those that belong to it, int [n].
    """

    records: Records
    rows: np.ndarray

    @functools.cached_property
    def table(self) -> pd.DataFrame:
        """A row an image: see `RawData`."""
        return self.records.table.iloc[self.rows]

    @property
    def labels(self) -> np.ndarray:
        """Int [n]."""
        return self.table["label"].to_numpy()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """Returns the images at these places of `rows`, uint8 [k, H, W, 3]; thread-safe."""
        return self.records.read(self.rows[places])

    def take(self, places: np.ndarray) -> "Subset":
        """Returns those at these places of `rows`."""
        return Subset(self.records, self.rows[places])


def prepare(
    raw_dir: str | os.PathLike,
    canvas: tuple[int, int],
    prepared_dir: str | os.PathLike,
    *,
    classes: Classes = HAM10000,
    allow_partial: bool = False,
    num_workers: int = 0,
) -> Path:
    """Makes records of a raw folder, unless they are there already.

    Several processes may call this at once: one works, the others wait.

    Args:
      raw_dir: photographs and metadata; or a folder that `prepare` made, here or elsewhere,
        which is returned as it is.
      canvas: height, width of the records' images, in pixels.
      prepared_dir: the records' folder becomes `<prepared_dir>/ham10000/<H>x<W>-<hash>/<version>`.
      classes: see `layouts.find`.
      allow_partial: see there.
      num_workers: processes that decode; 0: one a core.

    Returns:
      The records' folder, for `open_records`.

    Raises:
      InputError: see there; no space on the disk; TFDS is not installed; or images that cannot be
        decoded, all by name.
    """
    raw_dir, prepared_dir = Path(raw_dir), Path(prepared_dir)
    asked = (canvas, classes.names, allow_partial, DECODER_VERSION)
    place = prepared_dir / _NAME / manifest.name(raw_dir, *asked)
    kept = manifest.read(place)
    # Before the tables are read: what is edited meanwhile is noticed by the next start.
    stamps = folders.stamps(raw_dir) if kept else []
    if kept and kept.stamps == stamps and (prepared_dir / kept.records).is_dir():
        layouts.say(*kept.notes)
        return prepared_dir / kept.records
    if ready := records_folders(raw_dir):
        return _fitting(ready, canvas, classes)
    stamps = stamps or folders.stamps(raw_dir)
    raw = layouts.find(raw_dir, classes, allow_partial=allow_partial)
    name = _made(raw_dir, raw, canvas, prepared_dir, num_workers)
    if kept and kept.records == name:
        touched = {str(raw_dir / path) for path in kept.touched(stamps)}
        _check_touched(raw_dir, raw, touched, prepared_dir / name)
    try:
        manifest.Manifest(name, raw.notes, stamps).write(place)
    except OSError as error:
        layouts.say(
            f"What {raw_dir} holds is read anew at each start, for it cannot be noted in"
            f" {prepared_dir}: {error.strerror or error}."
        )
    return prepared_dir / name


def _made(
    raw_dir: Path,
    raw: layouts.RawData,
    canvas: tuple[int, int],
    prepared_dir: Path,
    num_workers: int,
) -> str:
    """Makes the records unless they are there, and returns their folder below `prepared_dir`."""
    fingerprint, num_bytes = _fingerprint(raw, canvas), len(raw.sources) * _record_bytes(canvas)
    name = f"{_NAME}/{canvas[0]}x{canvas[1]}-{fingerprint[:10]}/{_VERSION}"
    folder = prepared_dir / name
    if folder.is_dir():
        return name
    builder = import_builder(raw_dir)
    _make_folder(folder.parent, prepared_dir)
    with files.locked(folder.parent / "lock"):
        if folder.is_dir():
            return name
        for unfinished in folder.parent.glob(f"{folder.name}.incomplete*"):  # of a killed process
            shutil.rmtree(unfinished)
        _check_disk(folder.parent, num_bytes)
        with console.progress(f"Preparing {raw_dir}") as progress:
            config = builder.PhotographsConfig(
                name=folder.parent.name,
                raw=raw,
                canvas=canvas,
                fingerprint=fingerprint,
                num_shards=math.ceil(num_bytes / _SHARD_BYTES),
                num_workers=num_workers,
                progress=progress,
            )
            builder.write(prepared_dir, config)
        _write_checksums(folder)
    return name


def _check_touched(raw_dir: Path, raw: layouts.RawData, touched: set[str], folder: Path) -> None:
    """Compares photographs whose time of change is another, but not their size, with the records.

    Raises:
      InputError: some are other photographs than those that the records were made of.
    """
    if not touched:
        return
    edited, sums = [], open_records(folder).table["file_sha256"]
    with console.progress(f"Comparing {raw_dir}") as progress:
        for number, (source, expected) in enumerate(zip(raw.sources, sums, strict=True), 1):
            path = source.zip_path if isinstance(source, layouts.ZipMember) else str(source)
            try:
                if path in touched and layouts.sha256(source) != expected:
                    edited.append(str(source))
            except OSError as error:
                edited.append(f"{source}: {error}")
            progress(number, len(sums))
    if edited:
        shown = ", ".join(map(escape.shown, edited[:5])) + (", ..." if len(edited) > 5 else "")
        raise InputError(
            f"{raw_dir}: {len(edited):,} photographs are not those that the records in {folder}"
            f" were made of, though their files have the same size ({shown}). Delete {folder} to"
            " have the records made again, or put the photographs back."
        )


def _make_folder(folder: Path, prepared_dir: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"data.prepared_dir = {str(prepared_dir)!r}: {error}.") from error


def import_builder(raw_dir: str | os.PathLike) -> ModuleType:
    """Returns `data.builder`, which writes records of a raw folder.

    Raises:
      InputError: TFDS is not installed.
    """
    try:
        from ham_jax.data import builder  # late: those who only read records need no TFDS
    except ModuleNotFoundError as error:
        raise InputError(
            f"Making records of the photographs in {raw_dir} needs the package {error.name}, which"
            " is not installed. It comes with what training needs: pip install 'ham-jax[train]', or"
            " pip install -r requirements.txt in a clone, or ./launch.sh --mode=prepare. Records"
            " that are there already (data.prepared_dir, data.dir) are read without it."
        ) from error
    return builder


def open_records(folder: str | os.PathLike) -> Records:
    """Opens what `prepare` made; a parent folder will do where it holds no other records.

    Raises:
      InputError: there are no records, several, or damaged ones.
    """
    found = records_folders(Path(folder))
    if len(found) != 1:
        listed = f" Name one of: {', '.join(map(str, found))}." if found else ""
        raise InputError(f"{folder} holds {len(found)} sets of records, not one.{listed}")
    folder = found[0]
    _check_small_files(folder)
    try:
        canvas, names, num_written, num_bytes_written = _read_info(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        named = f"dataset_info.json, features.json or label.labels.txt cannot be read: {error}"
        raise _damaged(folder, named) from error
    try:
        stored = reading.read_json(folder / "metadata.json")
        fingerprint = str(stored["fingerprint"])
        # Records from before there were other classes are HAM10000's and do not say so.
        classes = Classes.from_json(stored.get("classes", HAM10000.to_json()))
        if names != classes.names:
            raise ValueError(f"its classes are not the label's ({', '.join(names)})")
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(folder, f"metadata.json cannot be read: {error}") from error
    table = _records_table(folder, len(classes))
    shards = sorted(folder.glob("*.array_record*"))
    num_bytes = sum(path.stat().st_size for path in shards)
    if num_bytes != num_bytes_written or len(table) != num_written:
        raise _damaged(
            folder,
            f"{num_bytes:,} bytes of .array_record files instead of {num_bytes_written:,},"
            f" {len(table):,} rows of records.csv instead of {num_written:,}",
        )
    try:
        serialized = ArrayRecordDataSource(shards)
        num_records = len(serialized)
    except Exception as error:  # array_record raises RuntimeError and what etils does
        raise _damaged(folder, f"an .array_record cannot be read: {error}") from error
    if num_records != len(table):
        raise _damaged(folder, f"{num_records:,} records, but {len(table):,} rows of records.csv")
    return Records(folder, classes, table, canvas, fingerprint, serialized)


def _pixels(record: bytes) -> memoryview:
    """Returns the content of `image` in a serialized tf.train.Example."""
    ((_, features),) = _fields(memoryview(record))
    for _, feature in _fields(features):
        name, value = (content for _, content in _fields(feature))
        if name == b"image":
            ((_, values),) = _fields(value)
            ((_, pixels),) = _fields(values)
            return pixels
    raise ValueError("it holds no image")


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yields (tag, content) of a protocol buffer whose fields are all of the kind with a length.

    See https://protobuf.dev/programming-guides/encoding.
    """
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        length, place = _varint(message, place)
        if tag & 7 != 2 or place + length > len(message):
            raise ValueError("it is no tf.train.Example")
        yield tag, message[place : place + length]
        place += length


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """Returns a number, of seven bits a byte, the lowest first, and the place after it."""
    number = shift = 0
    while message[place] & 0x80:
        number |= (message[place] & 0x7F) << shift
        place, shift = place + 1, shift + 7
    return number | message[place] << shift, place + 1


def _damaged(folder: Path, what: str) -> InputError:
    return InputError(
        f"{folder}: the records are damaged or incomplete: {what}. Delete the folder and prepare"
        " again, or copy it again."
    )


def _read_info(folder: Path) -> tuple[tuple[int, int], tuple[str, ...], int, int]:
    """Returns what TFDS wrote down: canvas, class names, number of records and of their bytes."""
    features = reading.read_json(folder / "features.json")["featuresDict"]["features"]
    height, width, _ = map(int, features["image"]["tensor"]["shape"]["dimensions"])
    if min(height, width) < 1:
        raise ValueError(f"the images are {height} x {width}")
    labels = reading.read_bytes(folder / "label.labels.txt", _MAX_SMALL_BYTES).decode()
    names = tuple(name.strip() for name in labels.split("\n") if name.strip())
    (split,) = reading.read_json(folder / "dataset_info.json")["splits"]
    num_records = sum(map(int, split["shardLengths"]))
    return (height, width), names, num_records, int(split["numBytes"])


def _records_table(folder: Path, num_classes: int) -> pd.DataFrame:
    texts = ("image_id", "file_sha256", *(name for name in layouts.COLUMNS if name != "age"))
    try:
        with reading.open_regular(folder / "records.csv") as file:
            table = pd.read_csv(
                file,
                dtype=dict.fromkeys(texts, str) | {"label": np.int64, "age": float},
                keep_default_na=False,
                na_values={"age": [""]},
            )
        if missing := {*texts, "label", "age"} - set(table.columns):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if not table["label"].between(0, num_classes - 1).all():
            raise ValueError(f"a label is not in 0 to {num_classes - 1}")
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"records.csv cannot be read: {error}") from error
    for name in texts:
        quoted = table[name].str.startswith("'")
        if quoted.any():
            table.loc[quoted, name] = table.loc[quoted, name].map(escape.plain)
    return table


def _write_checksums(folder: Path) -> None:
    small = (path for path in folder.iterdir() if ".array_record" not in path.name)
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(small)}
    files.write_json(folder / _CHECKSUMS, sums | {_CHECKSUMS: _sum_of(sums)})


def _sum_of(sums: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def _check_small_files(folder: Path) -> None:
    """Compares them with what `prepare` wrote; of older records no checksums are known.

    Raises:
      InputError: one of them was changed.
    """
    for path in folder.glob("*.json"):  # TFDS would wait for a pipe
        try:
            reading.open_regular(path).close()
        except OSError as error:
            raise _damaged(folder, f"{path.name} cannot be read: {error}") from error
    path = folder / _CHECKSUMS
    if not path.exists():
        return
    try:
        sums = reading.read_json(path)
        if sums.pop(_CHECKSUMS, "") != _sum_of(sums):
            raise ValueError("it was changed")
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"{_CHECKSUMS} cannot be read: {error}") from error
    for name, expected in sums.items():
        try:
            content = reading.read_bytes(folder / PurePosixPath(name).name, _MAX_SMALL_BYTES)
        except OSError as error:
            raise _damaged(folder, f"{name} cannot be read: {error}") from error
        if hashlib.sha256(content).hexdigest() != expected:
            raise _damaged(folder, f"{name} was changed")


def _fingerprint(raw: layouts.RawData, canvas: tuple[int, int]) -> str:
    """Returns a hash of all that decides what the records will be, without reading pixels."""
    content = [raw.table.to_csv(index=False), raw.sizes, canvas, DECODER_VERSION]
    if raw.classes.names != HAM10000.names:  # whose records are older than other classes
        content.append(raw.classes.names)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def records_folders(folder: Path) -> list[Path]:
    """Returns the folders that `prepare` made at this path or a few levels below it."""
    patterns = ("", "*/", "*/*/", f"{_NAME}/*/*/")
    found = {
        path.parent
        for pattern in patterns
        for path in folder.glob(f"{pattern}records.csv")
        if path.with_name("dataset_info.json").is_file() and ".incomplete" not in path.parent.name
    }
    return sorted(found)


def _fitting(prepared: list[Path], canvas: tuple[int, int], classes: Classes) -> Path:
    """Returns the one folder whose records have this canvas and these classes."""
    asked = f"data.canvas = {canvas!r} and data.classes = {classes.names!r}"
    opened = [open_records(folder) for folder in prepared]
    fitting = [
        one.folder for one in opened if (one.canvas, one.classes.names) == (canvas, classes.names)
    ]
    if len(fitting) == 1:
        return fitting[0]
    raise InputError(
        [
            f"{asked} fit {len(fitting)} of these prepared sets, not one. Set both to what is"
            " there, or data.dir to one of these folders, or to the photographs:",
            *(f"{one.folder}: {one.canvas!r}, {one.classes.names!r}" for one in opened),
        ]
    )


def _record_bytes(canvas: tuple[int, int]) -> int:
    return canvas[0] * canvas[1] * 3 + 1024  # the metadata's share is below 1 KB


def _check_disk(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise InputError(
            f"data.prepared_dir: {folder} has {free / 1e9:.1f} GB free, and the records need"
            f" {num_bytes / 1e9:.1f} GB. Make room, set data.prepared_dir to another disk, or"
            " choose a smaller data.canvas."
        )
