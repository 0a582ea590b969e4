"""Finds HAM10000 on disk in any of its published layouts, and makes records of it, once.

A raw folder (photographs and metadata as Kaggle, Harvard Dataverse, the ISIC challenge or the ISIC
archive give them, or one flat folder) becomes a TFDS data set: ArrayRecord files with each
photograph as raw uint8 on one canvas, and `records.csv`, the metadata in record order. TensorFlow
is not needed, neither to write nor to read. The same code reads the official ISIC 2018 Task 3 test
set.

Sources: Tschandl, Rosendahl and Kittler, Sci. Data 5, 180161 (2018), doi:10.7910/DVN/DBW86T;
Codella et al., arXiv 1902.03368 (2019), for the challenge.
"""

import dataclasses
import difflib
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import pandas as pd
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import writer
from tensorflow_datasets.proto import tf_example_pb2

from ham_jax import CLASSES, escape, files, reading
from ham_jax.classes import HAM10000, Classes
from ham_jax.config import InputError, nearest
from ham_jax.data import folders, image, metadata, tables
from ham_jax.local_path import LocalPath

DECODER_VERSION = 3
"""Raise it when `image.load` gives other pixels for the same file: old records are then remade."""

COLUMNS = ("lesion_id", "dx", "dx_type", "age", "sex", "localization", "dataset")

# Published counts: images of each class in the order of CLASSES, and lesions where known.
TRAIN_IMAGES = (327, 514, 1099, 115, 1113, 6705, 142)
TRAIN_LESIONS = 7470
TEST_IMAGES = (43, 93, 217, 44, 171, 908, 35)

_LAST_TRAIN_ID = 34320  # ISIC_0034320; the challenge's validation and test images come after it
# The published sets by their ids: training, the challenge's validation, its test.
_SETS = pd.IntervalIndex.from_tuples([(24305, 34320), (34320, 34523), (34523, 36064)])
_TABLES = ("", ".csv", ".tab", ".tsv", ".txt", ".xlsx", ".xls", ".ods")  # the last, to say so
_WITHOUT_IMAGE = "ISIC_0035068"  # a row of the official test without a photograph, of weight 0
_SHARD_BYTES = 128 << 20  # tfds holds a shard in memory while it writes it
_MAX_MEMBER_BYTES = 512 << 20  # of a zip; a photograph of 100 megapixels in TIFF has 300 MB
_SPLIT = "images"
_MAX_SMALL_BYTES = 256 << 20  # records.csv of a million photographs
_CHECKSUMS = "checksums.json"  # of the small files; an ArrayRecord has its own inside

# What other layouts call our columns.
_ALIASES = {
    "isic_id": "image_id",
    "image": "image_id",
    "age_approx": "age",
    "anatom_site_general": "localization",
    "diagnosis_confirm_type": "dx_type",
}
_LEVELS = ("diagnosis", *(f"diagnosis_{n}" for n in range(1, 6)))  # the ISIC archive's
_KNOWN = {"image_id", "isic_id", "image", "dx", *_LEVELS}
_SYNONYMS = {  # names that are no misspelling
    "image_id": ("image", "id", "file", "filename", "path"),
    "dx": ("diagnosis", "label", "class", "target"),
}
_DIAGNOSES = {  # the ISIC archive's names of what the seven classes hold, and its old ones
    name: dx
    for dx, names in {
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
        "vasc": ("benign soft tissue proliferations - vascular", "vascular lesion"),
    }.items()
    for name in names
}
_CONFIRMED = {  # the ISIC challenge's and archive's words for `dx_type`
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
    classes: Classes = HAM10000

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


def find(raw_dir: str | os.PathLike, allow_partial: bool = False) -> RawData:
    """Finds photographs by image id, and their metadata, anywhere below a folder.

    Zips are read where they lie. A photograph that lies there several times is taken once.

    Args:
      raw_dir: the folder.
      allow_partial: accept other counts than the published ones, photographs without metadata
        (they are left out) and the reverse, and the ISIC archive's other diagnoses (the same).

    Raises:
      InputError: with all that is missing from the data or wrong in its metadata.
    """
    raw_dir = Path(raw_dir)
    if not raw_dir.is_dir():
        raise InputError(_nothing(raw_dir, "there is no such folder"))
    images, lists, faults = {}, [], []
    for source in _files(raw_dir, faults):
        name = PurePosixPath(source.name)
        if name.suffix.lower() in image.SUFFIXES:
            if not name.stem.endswith(("_superpixels", "_segmentation")):
                images.setdefault(tables.image_id(source.name), []).append(source)
        elif name.suffix.lower() in _TABLES:
            lists.append(source)
    rows, refused = _metadata(lists, allow_partial, faults)
    if rows is None:
        found = f"it holds {len(images):,} images, but no table of metadata"
        nothing = _nothing(raw_dir, found if images else "it holds neither")
        raise InputError([nothing, *faults, *_first(refused)])
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
    with files.locked(folder.parent / "lock"):
        if folder.is_dir():
            return folder
        for unfinished in folder.parent.glob(f"{folder.name}.incomplete*"):  # of a killed process
            shutil.rmtree(unfinished)
        _check_disk(folder.parent, len(raw.sources) * _record_bytes(canvas))
        with tempfile.TemporaryDirectory() as unused:  # tfds insists on a folder for downloads
            builder = Ham10000(data_dir=LocalPath(prepared_dir), config=config)
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
        builder = tfds.builder_from_directory(LocalPath(folder))
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
    return table.map(escape.plain)


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
            raw.table.assign(file_sha256=hashes).map(escape.cell).to_csv(
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
    content, zips = folders.walk(folder), []
    for path, why in content.faults.items():
        if path.suffix.lower() in (*image.SUFFIXES, *_TABLES, ".zip") or path.is_dir():
            faults.append(f"{path}: {why}. Mend it, or take it away.")
    for path in content.files:
        if path.suffix.lower() == ".zip":
            zips.append(str(path))
        else:
            yield path
    for path in zips:
        try:
            members = sorted(_zip(path).namelist())
        except (zipfile.BadZipFile, OSError) as error:
            faults.append(f"{path}: {error}. Fetch this zip again, or take it away.")
            continue
        for name in members:
            parts = PurePosixPath(name).parts
            if not name.endswith("/") and not any(map(folders.is_hidden, parts)):
                yield ZipMember(path, name)


def _size(source: Source) -> int:
    if isinstance(source, ZipMember):
        return _zip(source.zip_path).getinfo(source.name).file_size
    return source.stat().st_size


def _sha256(source: Source) -> str:
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _metadata(
    sources: list[Source], allow_partial: bool, faults: list[str]
) -> tuple[pd.DataFrame | None, list[str]]:
    """Reads the tables that tell diagnoses, whatever their layout.

    Args:
      sources: files that may be such tables.
      allow_partial: leave out rows of the ISIC archive with other diagnoses than the seven.
      faults: what is wrong is added here.

    Returns:
      One row a table row: image_id, COLUMNS, `table` (the file) and `where` (file and line); None
      if no file is such a table. And why each other table was not taken.
    """
    parts, groupings, refused = [], [], []
    for source in sources:
        is_table = PurePosixPath(source.name).suffix.lower() in (".csv", ".tab", ".tsv")
        try:
            names = tables.columns(source)  # a large table of something else is read no further
            convert = _layout(names)
            if convert is None:
                if is_table or _KNOWN & set(names):
                    refused.append(f"{source}: {_lacking(names)}")
                continue
            is_table = True
            table = tables.read(source, _size(source))
        except tables.TableError as error:
            told = f"{source}: cannot be read as a table: {error}"
            (faults if is_table else refused).append(told)
            continue
        faults += [f"{source} {fault}" for fault in table.faults]
        where = [f"{source} line {line}" for line in table.lines]
        rows = convert(table.texts.assign(table=str(source), where=where), allow_partial, faults)
        if "dx" in rows:
            parts.append(rows)
        else:
            groupings.append(rows)
            refused.append(f"{source}: tells lesions, but not their dx.")
    if not parts:
        return None, refused
    rows = _joined(parts)
    if groupings:
        lesions = _joined(groupings).drop_duplicates("image_id", keep="last").set_index("image_id")
        for column in COLUMNS:
            told = rows["image_id"].map(lesions[column]).fillna("")
            rows[column] = rows[column].where(rows[column] != "", told)
    return _checked(rows, faults), refused


def _layout(names: Sequence[str]) -> Callable | None:
    """Returns what makes rows with our columns of a table with these, or None."""
    names = set(names)
    if {"image_id", "isic_id", "image"} & names and "dx" in names:
        return _renamed
    if {"image", *CLASSES} <= names:
        return _from_one_hot
    if "isic_id" in names and names.intersection(_LEVELS):
        return _from_archive
    if {"image", "lesion_id"} <= names:
        return _renamed
    return None


def _lacking(names: Sequence[str]) -> str:
    """Returns why a table with these columns tells no diagnoses, and what may be meant."""
    if not names:
        return "is empty."
    needed = ("image_id", "dx")
    if "isic_id" in names:
        needed = ("isic_id", "diagnosis_3")
    elif "image" in names and set(CLASSES) & set(names):
        needed = ("image", *CLASSES)
    found = [name for name in needed if name in names]
    missing = [name for name in needed if name not in names]
    others = [name for name in names if name and name not in needed]
    told = f"has an {', '.join(found)}, but not" if found else "has not"
    told += f" the column{'s' * (len(missing) > 1)} {', '.join(missing)}. Its columns:"
    told += f" {_some((repr(name[:40]) for name in names), 12)}."
    for name in missing:
        near = difflib.get_close_matches(name, others, 1)
        near += [other for other in _SYNONYMS.get(name, ()) if other in others]
        if near:
            told += f" If {near[0]!r} is the {name}, call it so."
    return told


def _renamed(rows: pd.DataFrame, *_) -> pd.DataFrame:
    """Returns the rows with our names of columns; ours win where a table has both."""
    for alias, name in _ALIASES.items():
        if name not in rows:
            rows = rows.rename(columns={alias: name})
    return rows


def _joined(parts: list[pd.DataFrame]) -> pd.DataFrame:
    """Returns the rows of several tables with the same columns and the same words."""
    columns = ["image_id", *COLUMNS, "table", "where"]
    parts = [rows.reindex(columns=columns, fill_value="") for rows in parts]
    rows = pd.concat(parts, ignore_index=True)
    rows["image_id"] = rows["image_id"].map(tables.image_id)
    rows["dx_type"] = rows["dx_type"].str.lower().map(_CONFIRMED).fillna(rows["dx_type"])
    return rows


def _from_one_hot(rows: pd.DataFrame, _: bool, faults: list[str]) -> pd.DataFrame:
    """Returns the ISIC challenge's truth as rows with a dx."""
    values = np.stack([tables.numbers(rows[name]) for name in CLASSES], axis=1)
    wrong = ~(np.isin(values, (0, 1)).all(1) & (values.sum(1) == 1))
    faults += [
        f"{where}: exactly one of {', '.join(CLASSES).upper()} must be 1, the others 0."
        for where in _first(rows["where"][wrong])
    ]
    return _renamed(rows).assign(dx=np.array(CLASSES)[np.nan_to_num(values).argmax(1)])


def _from_archive(rows: pd.DataFrame, allow_partial: bool, faults: list[str]) -> pd.DataFrame:
    """Returns the ISIC archive's metadata, as isic-cli writes it, as rows with a dx."""
    dx = name = site = pd.Series("", index=rows.index)
    for level in (level for level in _LEVELS if level in rows):  # from the widest to the narrowest
        name = rows[level].where(rows[level] != "", name)
        dx = rows[level].str.lower().map(_DIAGNOSES).fillna(dx)
    for level in (f"anatom_site_{n}" for n in range(1, 6) if f"anatom_site_{n}" in rows):
        word = rows[level].str.lower()
        site = word.where(word.isin(metadata.SITES) | ((site == "") & (word != "")), site)
    rows = _renamed(rows).assign(dx=dx)
    if "localization" not in rows:
        rows["localization"] = ""
    rows["localization"] = rows["localization"].where(rows["localization"] != "", site)
    others = name[dx == ""]
    if allow_partial and len(others) < len(rows):
        return rows[dx != ""]
    for other, number in _first(others.value_counts().items()):
        where = rows["where"][others.index[others == other][0]]
        faults.append(
            f"{where}: the diagnosis {other!r} of {number:,} rows is none of HAM10000's seven"
            f" ({', '.join(CLASSES)}). Correct it, or set --config.data.allow_partial=true to leave"
            " out the photographs of such rows."
        )
    return rows[dx != ""]


def _checked(rows: pd.DataFrame, faults: list[str]) -> pd.DataFrame:
    """Returns the rows with numbers for ages; adds each row's own faults."""
    rows["dx"] = rows["dx"].str.lower()
    for column in ("image_id", *COLUMNS):
        odd = rows[rows[column].map(escape.shown) != rows[column]]
        for where, text in zip(_first(odd["where"]), odd[column], strict=False):
            faults.append(f"{where}: {column} {text!r} holds a character that nobody can see.")
    empty = rows["where"][rows["image_id"] == ""]
    faults += [f"{where}: image_id is empty." for where in _first(empty)]
    unknown = rows[~rows["dx"].isin(CLASSES)]
    for where, dx in zip(_first(unknown["where"]), unknown["dx"], strict=False):
        named = difflib.get_close_matches(dx, _DIAGNOSES, 1, 0.8)
        hint = f" Did you mean {_DIAGNOSES[named[0]]!r}?" if named else nearest(dx, CLASSES)
        faults.append(f"{where}: dx {dx!r} must be one of {', '.join(CLASSES)}.{hint}")
    age = pd.Series(tables.numbers(rows["age"]), rows.index)
    missing = rows["age"].str.lower().isin(metadata.UNKNOWN)
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
    faults += _conflicts(rows)
    repeated = rows["image_id"].duplicated(keep=False)
    merged = rows[repeated].replace("", pd.NA).groupby("image_id")[list(COLUMNS)].first()
    table = pd.concat([rows[~repeated], merged.reset_index()]).sort_values("image_id")
    table = table[["image_id", *COLUMNS]].reset_index(drop=True)
    texts = table.columns.drop("age")
    table[texts] = table[texts].fillna("")

    number = pd.to_numeric(table["image_id"].str.extract(r"^ISIC_(\d{7})$")[0])
    # The ISIC archive has one table of all three sets: the others than those of this folder go.
    published = pd.Series(_SETS.get_indexer(number), table.index)
    here = published[table["image_id"].isin(images.keys())].unique()
    is_elsewhere = (published >= 0) & ~published.isin(here)
    table, number = table[~is_elsewhere].reset_index(drop=True), number[~is_elsewhere]
    held_out = number.reset_index(drop=True) > _LAST_TRAIN_ID
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
    pairs = table.loc[table["lesion_id"] != "", ["lesion_id", "dx"]].drop_duplicates()
    mixed = pairs[pairs["lesion_id"].duplicated(keep=False)].groupby("lesion_id")["dx"]
    faults += [
        f"lesion {lesion} has several diagnoses: {', '.join(sorted(several))}."
        " A lesion has one; correct dx or lesion_id."
        for lesion, several in _first(mixed)
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
            f"{' and '.join(sorted(names))} do not say the same: they differ in {numbers}"
            f" ({example}). Keep one of these tables. (The Dataverse and Kaggle call lesions HAM_*,"
            " the ISIC archive IL_*.)"
        )
    return faults


def _values(rows: pd.DataFrame, column: str) -> str:
    pairs = zip(rows[column], rows["where"], strict=True)
    return ", ".join(f"{value!r} ({where})" for value, where in pairs)


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


def _nothing(raw_dir: Path, found: str) -> str:
    return (
        f"No HAM10000 in {raw_dir.absolute()}: {found}. Looked for, at any depth and inside zips: a"
        " table HAM10000_metadata (.csv or .tab), ISIC2018_Task3_*_GroundTruth.csv, the ISIC"
        " archive's metadata.csv or another with the columns image_id and dx; and images named by"
        " their image_id, such as ISIC_0024306.jpg. Three ways out:"
        " --config.data.download=true fetches them; --config.data.dir=PATH"
        " (--config.data.test_dir=PATH for the test) says where they are;"
        " --config=configs/demo.py needs no photographs."
    )


def _first(items, limit: int = 10) -> list:
    """Returns the first of many like faults; the user sees the pattern."""
    return list(itertools.islice(items, limit))


def _some(names, limit: int = 5) -> str:
    names = list(names)
    return ", ".join(map(escape.shown, names[:limit])) + (", ..." if len(names) > limit else "")
