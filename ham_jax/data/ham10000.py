"""Finds HAM10000 on disk in any of its published layouts, and makes records of it, once.

A raw folder (photographs and metadata as Kaggle, Harvard Dataverse or the ISIC challenge give
them, or one flat folder) becomes a TFDS data set: ArrayRecord files with each photograph as raw
uint8 on one canvas, and `records.csv`, the metadata in record order. TensorFlow is not needed,
neither to write nor to read. The same code reads the official ISIC 2018 Task 3 test set.

Sources: Tschandl, Rosendahl and Kittler, Sci. Data 5, 180161 (2018), doi:10.7910/DVN/DBW86T;
Codella et al., arXiv 1902.03368 (2019), for the challenge.
"""

import contextlib
import csv
import dataclasses
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import pandas as pd
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import writer
from tensorflow_datasets.proto import tf_example_pb2

from ham_jax import CLASSES, files, reading
from ham_jax.config import InputError, nearest
from ham_jax.data import image

DECODER_VERSION = 2
"""Raise it when `image.load` gives other pixels for the same file: old records are then remade."""

COLUMNS = ("lesion_id", "dx", "dx_type", "age", "sex", "localization", "dataset")

# Published counts: images of each class in the order of CLASSES, and lesions where known.
TRAIN_IMAGES = (327, 514, 1099, 115, 1113, 6705, 142)
TRAIN_LESIONS = 7470
TEST_IMAGES = (43, 93, 217, 44, 171, 908, 35)

_LAST_TRAIN_ID = 34320  # ISIC_0034320; the challenge's validation and test images come after it
_WITHOUT_IMAGE = "ISIC_0035068"  # a row of the official test without a photograph, of weight 0
_SHARD_BYTES = 128 << 20  # tfds holds a shard in memory while it writes it
_MAX_MEMBER_BYTES = 512 << 20  # of a zip; a photograph of 100 megapixels in TIFF has 300 MB
_SPLIT = "images"
_MAX_SMALL_BYTES = 256 << 20  # records.csv of a million photographs
_CHECKSUMS = "checksums.json"  # of the small files; an ArrayRecord has its own inside

_ONE_HOT = tuple(name.upper() for name in CLASSES)
_CONFIRMED = {  # the ISIC challenge's words for `dx_type`
    "histopathology": "histo",
    "serial imaging showing no change": "follow_up",
    "single image expert consensus": "consensus",
    "confocal microscopy with consensus dermoscopy": "confocal",
}

Progress = Callable[[int, int], None]
"""progress(done, total)"""


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

    def open(self, mode: str = "rb") -> IO[bytes]:
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
    """Photographs on disk and what is known about them.

    Attributes:
      table: one row an image, sorted by image_id: image_id, lesion_id, dx, dx_type, sex,
        localization, dataset ('' where not known), age in years (float, nan where not known),
        label (index of dx in CLASSES).
      sources: where each row's photograph lies.
      sizes: bytes of each photograph's file.
    """

    table: pd.DataFrame
    sources: list[Source]
    sizes: list[int]


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """Prepared photographs.

    Attributes:
      folder: where the records lie.
      table: as in `RawData`, in record order, and file_sha256 of each original file.
      canvas: height, width of every image, in pixels.
      fingerprint: of the raw data, the canvas and the decoder.
    """

    folder: Path
    table: pd.DataFrame
    canvas: tuple[int, int]
    fingerprint: str
    _serialized: Any = dataclasses.field(repr=False)  # TFDS's ArrayRecord data source

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns the images of these records, uint8 [n, H, W, 3]; thread-safe.

        Args:
          indices: record numbers [n], in any order; one may come several times.
        """
        images = np.empty((len(indices), *self.canvas, 3), np.uint8)
        # One by one: array_record's own batches start a thread a shard, which takes longer.
        for target, i in zip(images, indices, strict=True):
            try:
                record = tf_example_pb2.Example.FromString(self._serialized[int(i)])
                pixels = record.features.feature["image"].bytes_list.value[0]
            except Exception as error:  # array_record's, protobuf's and more: it is another record
                what = f"record {i} of the .array_record files cannot be read: {error}"
                raise _damaged(self.folder, what) from error
            if len(pixels) != target.size:
                what = f"record {i} of the .array_record files has {len(pixels):,} bytes of pixels"
                raise _damaged(self.folder, what)
            target.reshape(-1)[:] = np.frombuffer(pixels, np.uint8)
        return images


def find(raw_dir: str | os.PathLike, allow_partial: bool = False) -> RawData:
    """Finds photographs by image id, and their metadata, anywhere below a folder.

    Zips are read where they lie. A photograph that lies there several times is taken once.

    Args:
      raw_dir: the folder.
      allow_partial: accept other counts than the published ones, photographs without metadata
        (they are left out) and the reverse.

    Raises:
      InputError: with all that is missing from the data or wrong in its metadata.
    """
    raw_dir = Path(raw_dir)
    if not raw_dir.is_dir():
        raise InputError(_nothing(raw_dir, "there is no such folder"))
    images, tables, faults = {}, [], []
    for source in _files(raw_dir, faults):
        name = PurePosixPath(source.name)
        if name.suffix.lower() in image.SUFFIXES:
            if not name.stem.endswith(("_superpixels", "_segmentation")):
                images.setdefault(name.stem, []).append(source)
        elif name.suffix.lower() in ("", ".csv", ".tab", ".tsv", ".txt"):
            tables.append(source)
    rows = _metadata(tables, faults)
    if rows is None:
        found = f"it holds {len(images):,} images, but no table of metadata"
        raise InputError(faults or _nothing(raw_dir, found if images else "it holds neither"))
    if not images:
        found = f"it holds metadata of {rows['image_id'].nunique():,} images, but no image"
        raise InputError([*faults, _nothing(raw_dir, found)])
    return _matched(raw_dir, images, rows, allow_partial, faults)


def prepare(
    raw_dir: str | os.PathLike,
    canvas: tuple[int, int],
    prepared_dir: str | os.PathLike,
    *,
    allow_partial: bool = False,
    num_workers: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Makes records of a raw folder, unless they are there already.

    Several processes may call this at once: one works, the others wait.

    Args:
      raw_dir: photographs and metadata; or a folder that `prepare` made, here or elsewhere,
        which is returned as it is.
      canvas: height, width of the records' images, in pixels.
      prepared_dir: the records' folder becomes `<prepared_dir>/ham10000/<H>x<W>-<hash>/<version>`.
      allow_partial: see `find`.
      num_workers: processes that decode; 0: one a core.
      progress: told how many images are done.

    Returns:
      The records' folder, for `open_records`.

    Raises:
      InputError: see `find`; no space on the disk; or images that cannot be decoded, all by name.
    """
    raw_dir, prepared_dir, canvas = Path(raw_dir), Path(prepared_dir), tuple(canvas)
    ready = records_folders(raw_dir)
    if ready:
        return _with_canvas(ready, canvas)
    raw = find(raw_dir, allow_partial)
    fingerprint = _fingerprint(raw, canvas)
    config = PhotographsConfig(
        name=f"{canvas[0]}x{canvas[1]}-{fingerprint[:10]}",
        raw=raw,
        canvas=canvas,
        fingerprint=fingerprint,
        num_workers=num_workers,
        progress=progress,
    )
    folder = prepared_dir / Ham10000.name / config.name / str(Ham10000.VERSION)
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"data.prepared_dir = {str(prepared_dir)!r}: {error}.") from error
    with locked(folder.parent / "lock"):
        if folder.is_dir():
            return folder
        for unfinished in folder.parent.glob(f"{folder.name}.incomplete*"):  # of a killed process
            shutil.rmtree(unfinished)
        _check_disk(folder.parent, len(raw.sources) * _record_bytes(canvas))
        with tempfile.TemporaryDirectory() as unused:  # tfds insists on a folder for downloads
            builder = Ham10000(data_dir=prepared_dir, config=config)
            builder.download_and_prepare(download_dir=unused, file_format="array_record")
        _write_checksums(folder)
    return folder


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
        builder = tfds.builder_from_directory(folder)
        split = builder.info.splits[_SPLIT]
        canvas = builder.info.features["image"].shape[:2]
    except Exception as error:  # TFDS raises what its readers of JSON and of protocol buffers do
        named = f"dataset_info.json or features.json cannot be read: {error}"
        raise _damaged(folder, named) from error
    table = _records_table(folder)
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.array_record*"))
    if num_bytes != split.num_bytes or len(table) != split.num_examples:
        raise _damaged(
            folder,
            f"{num_bytes:,} bytes of .array_record files instead of {split.num_bytes:,},"
            f" {len(table):,} rows of records.csv instead of {split.num_examples:,}",
        )
    try:
        serialized = builder.as_data_source(
            _SPLIT, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        num_records = len(serialized)
    except Exception as error:  # the same, and array_record's RuntimeError
        raise _damaged(folder, f"an .array_record cannot be read: {error}") from error
    if num_records != len(table):
        raise _damaged(folder, f"{num_records:,} records, but {len(table):,} rows of records.csv")
    try:
        fingerprint = str(reading.read_json(folder / "metadata.json")["fingerprint"])
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(folder, f"metadata.json cannot be read: {error}") from error
    return Records(folder, table, canvas, fingerprint, serialized)


def _damaged(folder: Path, what: str) -> InputError:
    return InputError(
        f"{folder}: the records are damaged or not all there: {what}. Delete the folder and prepare"
        " again, or copy it again."
    )


def _records_table(folder: Path) -> pd.DataFrame:
    texts = ("image_id", "file_sha256", *(name for name in COLUMNS if name != "age"))
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
        if not table["label"].between(0, len(CLASSES) - 1).all():
            raise ValueError(f"a label is not in 0 to {len(CLASSES) - 1}")
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"records.csv cannot be read: {error}") from error
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
      InputError: one of them is another.
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
            raise ValueError("it is not as it was written")
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"{_CHECKSUMS} cannot be read: {error}") from error
    for name, expected in sums.items():
        try:
            content = reading.read_bytes(folder / PurePosixPath(name).name, _MAX_SMALL_BYTES)
        except OSError as error:
            raise _damaged(folder, f"{name} cannot be read: {error}") from error
        if hashlib.sha256(content).hexdigest() != expected:
            raise _damaged(folder, f"{name} is not as it was written")


@dataclasses.dataclass(eq=False, kw_only=True)
class PhotographsConfig(tfds.core.BuilderConfig):
    """Which photographs become records, and how large.

    Attributes:
      raw: what `find` returned.
      canvas: height, width of the records' images, in pixels.
      fingerprint: of the two.
      num_workers: processes that decode; 0: one a core.
      progress: told how many images are done.
    """

    raw: RawData
    canvas: tuple[int, int]
    fingerprint: str
    num_workers: int = 0
    progress: Progress | None = None


class Ham10000(tfds.core.ShardBasedBuilder):
    """Skin lesions as TFDS records, in the order of their image ids.

    A GeneratorBasedBuilder would hold every image in memory before it wrote the first one, and
    beyond 1 GB would need TensorFlow. This one holds a shard.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Raw uint8 images on one canvas."}  # noqa: RUF012, the API's form

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features
        return tfds.core.DatasetInfo(
            builder=self,
            description="Dermatoscopic images of pigmented skin lesions, on one canvas.",
            features=features.FeaturesDict(
                {
                    "image": features.Tensor(
                        shape=(*self.builder_config.canvas, 3), dtype=np.uint8, encoding="bytes"
                    ),
                    "label": features.ClassLabel(names=CLASSES),
                    "image_id": features.Text(),
                    "age": features.Scalar(np.float32, doc="years; nan where not known"),
                    "file_sha256": features.Text(doc="of the file that was decoded"),
                    **{name: features.Text() for name in COLUMNS if name != "age"},
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://doi.org/10.7910/DVN/DBW86T",
            citation="Tschandl, Rosendahl and Kittler, Sci. Data 5, 180161 (2018)",
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(fingerprint=self.builder_config.fingerprint),
        )

    def _shard_iterators_per_split(self, dl_manager) -> dict:
        """Returns one generator function a shard; tfds runs them one after the other."""
        config, raw = self.builder_config, self.builder_config.raw
        total = len(raw.sources)
        num_shards = math.ceil(total * _record_bytes(config.canvas) / _SHARD_BYTES)
        ends = [total * (k + 1) // num_shards for k in range(num_shards)]
        decoded = enumerate(image.load_many(raw.sources, config.canvas, config.num_workers))
        rows = raw.table.to_dict("records")
        faults, hashes = [], []

        def shard(first: int, end: int) -> Iterator[tuple[int, dict]]:
            for i, pixels in itertools.islice(decoded, end - first):
                if isinstance(pixels, image.ImageError):
                    faults.append(f"{raw.sources[i]}: {pixels}")
                elif not faults:
                    hashes.append(_sha256(raw.sources[i]))
                    yield i, {**rows[i], "image": pixels, "file_sha256": hashes[i]}
                if config.progress:
                    config.progress(i + 1, total)
            if end < total:
                return
            if faults:
                raise InputError(faults)
            raw.table.assign(file_sha256=hashes).to_csv(
                self.data_path / "records.csv", index=False, lineterminator="\n"
            )

        return {
            _SPLIT: [
                functools.partial(shard, first, end)
                for first, end in zip([0, *ends], ends, strict=False)
            ]
        }

    def _example_writer(self) -> writer.ExampleWriter:
        return _UncompressedWriter(self.info.file_format)

    def _create_builder_config(self, builder_config, version):
        """Takes the config as it is; tfds would log a warning that it is not a listed one."""
        return builder_config

    def _log_download_bytes(self) -> None:
        """Says nothing: the caller shows progress."""

    _log_download_done = _log_download_bytes


class _UncompressedWriter(writer.ExampleWriter):
    """ArrayRecord without zstd: half as large again, written 6 and read 2.5 times as fast."""

    def write(self, path, examples) -> None:
        records = array_record_module.ArrayRecordWriter(
            os.fspath(path), "group_size:1,uncompressed"
        )
        try:
            for _, serialized in examples:
                records.write(serialized)
        finally:
            records.close()


@functools.lru_cache(maxsize=16)
def _zip(path: str) -> zipfile.ZipFile:
    """Keeps zips open: reading the directory of one again for each of 5,000 members is slow."""
    return reading.open_zip(path)


def _files(folder: Path, faults: list[str]) -> Iterator[Source]:
    """Yields all files below a folder in a fixed order, then those inside its zips."""
    zips, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen or "dataset_info.json" in names:  # a circle of links; our own records
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(names):
            if name.startswith("."):
                continue
            if name.lower().endswith(".zip"):
                zips.append(os.path.join(parent, name))
            else:
                yield Path(parent, name)
    for path in zips:
        try:
            members = sorted(_zip(path).namelist())
        except (zipfile.BadZipFile, OSError) as error:
            faults.append(f"{path}: {error}. Fetch this zip again, or take it away.")
            continue
        for name in members:
            parts = PurePosixPath(name).parts
            if not name.endswith("/") and not any(p.startswith((".", "__MACOSX")) for p in parts):
                yield ZipMember(path, name)


def _size(source: Source) -> int:
    if isinstance(source, ZipMember):
        return _zip(source.zip_path).getinfo(source.name).file_size
    return source.stat().st_size


def _sha256(source: Source) -> str:
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _metadata(sources: list[Source], faults: list[str]) -> pd.DataFrame | None:
    """Reads the tables that tell diagnoses, whatever their layout.

    Args:
      sources: files that may be such tables.
      faults: what is wrong is added here.

    Returns:
      One row a table row: image_id, COLUMNS and `where` (file and line); None if no file is such
      a table.
    """
    parts, groupings, near_misses = [], {}, []
    for source in sources:
        try:
            separator, columns = _header(source)
            by_dx, by_one_hot = {"image_id", "dx"} <= columns, {"image", *_ONE_HOT} <= columns
            by_lesion = {"image", "lesion_id"} <= columns
            if not (by_dx or by_one_hot or by_lesion):
                if "image_id" in columns:
                    near_misses.append(f"{source}: has an image_id, but not the column dx.")
                elif len(columns & {"image", *_ONE_HOT}) > 1:
                    lacking = ", ".join({"image", *_ONE_HOT} - columns)
                    near_misses.append(f"{source}: has not the columns {lacking}.")
                continue
            rows = _read_table(source, separator, faults)
        except (csv.Error, UnicodeError, OSError, zipfile.BadZipFile, zlib.error) as error:
            faults.append(f"{source}: cannot be read as a table: {error}.")
            continue
        if by_lesion and not by_one_hot:
            confirmed = rows.get("diagnosis_confirm_type", pd.Series("", index=rows.index))
            groupings |= dict(
                zip(rows["image"], zip(rows["lesion_id"], confirmed, strict=True), strict=True)
            )
            continue
        if by_one_hot:
            rows = _from_one_hot(rows, faults)
        parts.append(rows.reindex(columns=["image_id", *COLUMNS, "where"], fill_value=""))
    if not parts:
        faults += near_misses
        return None
    rows = pd.concat(parts, ignore_index=True)
    rows["image_id"] = [_without_suffix(name) for name in rows["image_id"]]
    for i, name in enumerate(rows["image_id"]):
        if name in groupings and not rows.at[i, "lesion_id"]:
            lesion, confirmed = groupings[name]
            rows.at[i, "lesion_id"] = lesion
            rows.at[i, "dx_type"] = _CONFIRMED.get(confirmed, confirmed)
    return _checked(rows, faults)


def _header(source: Source) -> tuple[str, set[str]]:
    """Returns what separates a table's columns, and their names."""
    with source.open("rb") as file:
        line = file.readline(1 << 16).decode("utf-8-sig", "replace")
    separator = "\t" if "\t" in line else ","
    names = next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])
    return separator, {name.strip() for name in names}


def _read_table(source: Source, separator: str, faults: list[str]) -> pd.DataFrame:
    """Returns a table's texts and, as `where`, their lines; adds lines of a wrong length."""
    lines, wrong = [], []
    with source.open("rb") as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, delimiter=separator, skipinitialspace=True)
        header = [name.strip() for name in next(reader)]
        for fields in reader:
            where = f"{source} line {reader.line_num}"
            if len(fields) == len(header):
                lines.append([*map(str.strip, fields), where])
            elif any(fields):
                wrong.append(f"{where}: {len(fields)} fields instead of {len(header)}.")
    faults += _first(wrong)
    rows = pd.DataFrame(lines, columns=[*header, "where"], dtype=str)
    return rows.loc[:, ~rows.columns.duplicated()]


def _from_one_hot(rows: pd.DataFrame, faults: list[str]) -> pd.DataFrame:
    """Returns the ISIC challenge's truth as rows with a dx."""
    values = rows[list(_ONE_HOT)].apply(pd.to_numeric, errors="coerce").to_numpy(float)
    wrong = ~(np.isin(values, (0, 1)).all(1) & (values.sum(1) == 1))
    faults += [
        f"{where}: exactly one of {', '.join(_ONE_HOT)} must be 1, the others 0."
        for where in _first(rows["where"][wrong])
    ]
    dx = np.array(CLASSES)[np.nan_to_num(values).argmax(1)]
    return rows.assign(image_id=rows["image"], dx=dx)


def _checked(rows: pd.DataFrame, faults: list[str]) -> pd.DataFrame:
    """Returns the rows with numbers for ages; adds each row's own faults."""
    rows["dx"] = rows["dx"].str.lower()
    empty = rows["where"][rows["image_id"] == ""]
    faults += [f"{where}: image_id is empty." for where in _first(empty)]
    unknown = rows[~rows["dx"].isin(CLASSES)]
    for where, dx in zip(_first(unknown["where"]), unknown["dx"], strict=False):
        faults.append(
            f"{where}: dx {dx!r} must be one of {', '.join(CLASSES)}.{nearest(dx, CLASSES)}"
        )
    missing = rows["age"].str.lower().isin(("", "na", "nan", "unknown"))
    age = pd.to_numeric(rows["age"].where(~missing, "nan"), errors="coerce")
    wrong = rows[~missing & ~age.between(0, 120)]
    for where, text in zip(_first(wrong["where"]), wrong["age"], strict=False):
        faults.append(f"{where}: age {text!r} must be years from 0 to 120, or empty.")
    return rows.assign(age=age)


def _matched(
    raw_dir: Path,
    images: dict[str, list[Source]],
    rows: pd.DataFrame,
    allow_partial: bool,
    faults: list[str],
) -> RawData:
    """Joins photographs and metadata and checks the whole, on top of the faults so far."""
    rows = rows[rows["image_id"] != _WITHOUT_IMAGE]
    if not rows["image_id"].isin(images.keys()).any():
        none = f"{raw_dir}: no image has a row of metadata ({_some(images)})."
        raise InputError([*faults, none])
    by_image = rows.replace("", pd.NA).groupby("image_id")
    distinct = by_image[list(COLUMNS)].nunique()
    for column in COLUMNS:
        for name in _first(distinct.index[distinct[column] > 1]):
            given = by_image.get_group(name).dropna(subset=column)
            pairs = zip(given[column], given["where"], strict=True)
            shown = ", ".join(f"{value!r} ({where})" for value, where in pairs)
            faults.append(f"{name} has several values of {column}: {shown}. Keep one.")
    table = by_image[list(COLUMNS)].first().reset_index()
    texts = table.columns.drop("age")
    table[texts] = table[texts].fillna("")

    number = pd.to_numeric(table["image_id"].str.extract(r"^ISIC_(\d{7})$")[0])
    held_out = number > _LAST_TRAIN_ID
    if held_out.any() and not held_out.all() and not allow_partial:
        faults.append(
            f"{raw_dir} holds the training set and {held_out.sum():,} images of the challenge's"
            " validation or test set. Give each set a folder: the official test goes to"
            " data.test_dir."
        )
    alone = held_out & (table["lesion_id"] == "")  # the official test truth tells no lesions
    table.loc[alone, "lesion_id"] = table["image_id"]
    nameless = table["image_id"][table["lesion_id"] == ""]
    if len(nameless):
        faults.append(
            f"{len(nameless):,} images have no lesion_id ({_some(nameless)}), so that one lesion's"
            " images could be both learnt and tested. Name each image's lesion in that column; for"
            " the ISIC challenge's training set add ISIC2018_Task3_Training_LesionGroupings.csv."
        )
    per_lesion = table[table["lesion_id"] != ""].groupby("lesion_id")["dx"].unique()
    faults += [
        f"lesion {lesion} has several diagnoses: {', '.join(sorted(per_lesion[lesion]))}."
        " A lesion has one; correct dx or lesion_id."
        for lesion in _first(per_lesion.index[per_lesion.str.len() > 1])
    ]

    strangers = sorted(images.keys() - set(table["image_id"]) - {_WITHOUT_IMAGE})
    imageless = table["image_id"][~table["image_id"].isin(images.keys())]
    if not allow_partial:
        way_out = "add what is missing, or set --config.data.allow_partial=true to leave them out."
        if strangers:
            faults.append(
                f"{raw_dir}: {len(strangers):,} images have no metadata ({_some(strangers)});"
                f" {way_out}"
            )
        if len(imageless):
            faults.append(
                f"{raw_dir}: {len(imageless):,} rows of metadata have no image"
                f" ({_some(imageless)}); {way_out}"
            )
    table = table[table["image_id"].isin(images.keys())].reset_index(drop=True)
    sizes = [[_size(source) for source in images[name]] for name in table["image_id"]]
    differing = table["image_id"][[len(set(several)) > 1 for several in sizes]]
    if len(differing):
        files = ", ".join(map(str, images[differing.iloc[0]]))
        faults.append(
            f"{raw_dir}: {len(differing):,} images lie there several times with different sizes"
            f" ({differing.iloc[0]}: {files}). Keep one version."
        )
    if not faults and not allow_partial:
        faults += _count_faults(raw_dir, table, bool(held_out.all()))
    if faults:
        raise InputError(faults)
    table["label"] = table["dx"].map({name: i for i, name in enumerate(CLASSES)})
    return RawData(
        table=table,
        sources=[images[name][0] for name in table["image_id"]],
        sizes=[several[0] for several in sizes],
    )


def _count_faults(raw_dir: Path, table: pd.DataFrame, is_test: bool) -> list[str]:
    """Compares with the published counts."""
    published = TEST_IMAGES if is_test else TRAIN_IMAGES
    expected = {"images": sum(published), **dict(zip(CLASSES, published, strict=True))}
    counts = {"images": len(table), **table["dx"].value_counts()}
    if not is_test:
        expected["lesions"], counts["lesions"] = TRAIN_LESIONS, table["lesion_id"].nunique()
    other = [
        f"{name} {counts.get(name, 0):,} instead of {number:,}"
        for name, number in expected.items()
        if counts.get(name, 0) != number
    ]
    what = "the official ISIC 2018 Task 3 test" if is_test else "HAM10000"
    return other and [
        f"{raw_dir}: these are not the published counts of {what}: {', '.join(other)}."
        " Complete the folder, or set --config.data.allow_partial=true if a part of it, or a data"
        " set of your own, is meant."
    ]


def _fingerprint(raw: RawData, canvas: tuple[int, int]) -> str:
    """Returns a hash of all that decides what the records will be, without reading pixels."""
    content = [raw.table.to_csv(index=False), raw.sizes, canvas, DECODER_VERSION]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def records_folders(folder: Path) -> list[Path]:
    """Returns the folders that `prepare` made at this path or a few levels below it."""
    patterns = ("", "*/", "*/*/", f"{Ham10000.name}/*/*/")
    found = {
        path.parent
        for pattern in patterns
        for path in folder.glob(f"{pattern}records.csv")
        if path.with_name("dataset_info.json").is_file() and ".incomplete" not in path.parent.name
    }
    return sorted(found)


def _with_canvas(folders: list[Path], canvas: tuple[int, int]) -> Path:
    """Returns the one folder whose records have this canvas."""
    canvases = {folder: open_records(folder).canvas for folder in folders}
    fitting = [folder for folder in folders if canvases[folder] == canvas]
    if len(fitting) == 1:
        return fitting[0]
    listed = ", ".join(f"{folder} ({h}, {w})" for folder, (h, w) in canvases.items())
    raise InputError(
        f"data.canvas = {canvas!r} is that of {len(fitting)} of these prepared sets, not of one:"
        f" {listed}. Set data.canvas to what is there, or data.dir to one of these folders, or to"
        " the photographs."
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


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lets one process at a time work; the others wait here."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when closed, also by a crash
        yield


def _nothing(raw_dir: Path, found: str) -> str:
    return (
        f"No HAM10000 in {raw_dir.absolute()}: {found}. Looked for, at any depth and inside zips: a"
        " table HAM10000_metadata (.csv or .tab) or ISIC2018_Task3_*_GroundTruth.csv, and images"
        " named by their image_id, such as ISIC_0024306.jpg. Three ways out:"
        " --config.data.download=true fetches them; --config.data.dir=PATH"
        " (--config.data.test_dir=PATH for the test) says where they are;"
        " --config=configs/demo.py needs no photographs."
    )


def _without_suffix(name: str) -> str:
    path = PurePosixPath(name)
    return path.stem if path.suffix.lower() in image.SUFFIXES else name


def _first(items, limit: int = 10) -> list:
    """Returns the first of many like faults; the user sees the pattern."""
    return list(itertools.islice(items, limit))


def _some(names, limit: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
