"""Makes records of photographs, once, and reads them.

A raw folder (see `layouts`) becomes a TFDS data set: ArrayRecord files with each photograph as raw
uint8 on one canvas, and `records.csv`, the metadata in record order. TensorFlow is not needed,
neither to write nor to read.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import writer
from tensorflow_datasets.proto import tf_example_pb2

from ham_jax import console, escape, files, reading
from ham_jax.classes import HAM10000, Classes
from ham_jax.config import InputError
from ham_jax.data import image, layouts
from ham_jax.local_path import LocalPath

DECODER_VERSION = 3
"""Raise it when `image.load` gives other pixels for the same file: old records are then remade."""

_CITATION = "Tschandl, Rosendahl and Kittler, Sci. Data 5, 180161 (2018), doi:10.7910/DVN/DBW86T"
_SHARD_BYTES = 128 << 20  # tfds holds a shard in memory while it writes it
_SPLIT = "images"
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
      InputError: see there; no space on the disk; or images that cannot be decoded, all by name.
    """
    raw_dir, prepared_dir = Path(raw_dir), Path(prepared_dir)
    if ready := records_folders(raw_dir):
        return _fitting(ready, canvas, classes)
    raw = layouts.find(raw_dir, classes, allow_partial=allow_partial)
    fingerprint = _fingerprint(raw, canvas)
    config = PhotographsConfig(
        name=f"{canvas[0]}x{canvas[1]}-{fingerprint[:10]}",
        raw=raw,
        canvas=canvas,
        fingerprint=fingerprint,
        num_workers=num_workers,
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
        with console.progress(f"Preparing {raw_dir}") as config.progress:
            builder = Ham10000(data_dir=LocalPath(prepared_dir), config=config)
            with tempfile.TemporaryDirectory() as unused:  # tfds wants a folder for downloads
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
        names = tuple(builder.info.features["label"].names)
    except Exception as error:  # TFDS raises what its readers of JSON and of protocol buffers do
        named = f"dataset_info.json or features.json cannot be read: {error}"
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
    return Records(folder, classes, table, canvas, fingerprint, serialized)


def _damaged(folder: Path, what: str) -> InputError:
    return InputError(
        f"{folder}: the records are damaged or incomplete: {what}. Delete the folder and prepare"
        " again, or copy it again."
    )


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


@dataclasses.dataclass(eq=False, kw_only=True)
class PhotographsConfig(tfds.core.BuilderConfig):
    """Which photographs become records, and how large.

    Attributes:
      raw: what `layouts.find` returned.
      canvas: height, width of the records' images, in pixels.
      fingerprint: of the two.
      num_workers: processes that decode; 0: one a core.
      progress: progress(done, total) is told how many images are done.
    """

    raw: layouts.RawData
    canvas: tuple[int, int]
    fingerprint: str
    num_workers: int
    progress: Callable[[int, int], None] | None = None


class Ham10000(tfds.core.ShardBasedBuilder):
    """Skin lesions as TFDS records, in the order of their image ids.

    A GeneratorBasedBuilder would hold every image in memory before it wrote the first one, and
    beyond 1 GB would need TensorFlow. This one holds a shard.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Raw uint8 images on one canvas."}  # noqa: RUF012, the API's form

    def _info(self) -> tfds.core.DatasetInfo:
        features, config = tfds.features, self.builder_config
        classes = config.raw.classes
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images of skin lesions, on one canvas.",
            features=features.FeaturesDict(
                {
                    "image": features.Tensor(
                        shape=(*config.canvas, 3), dtype=np.uint8, encoding="bytes"
                    ),
                    "label": features.ClassLabel(names=list(classes)),
                    "image_id": features.Text(),
                    "age": features.Scalar(np.float32, doc="years; nan where unknown"),
                    "file_sha256": features.Text(doc="of the file that was decoded"),
                    **{name: features.Text() for name in layouts.COLUMNS if name != "age"},
                }
            ),
            supervised_keys=("image", "label"),
            citation=_CITATION if classes == HAM10000 else None,
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(
                fingerprint=config.fingerprint, classes=classes.to_json()
            ),
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
        """No-op: `prepare` shows progress."""

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


def _sha256(source: layouts.Source) -> str:
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fingerprint(raw: layouts.RawData, canvas: tuple[int, int]) -> str:
    """Returns a hash of all that decides what the records will be, without reading pixels."""
    content = [raw.table.to_csv(index=False), raw.sizes, canvas, DECODER_VERSION]
    if raw.classes.names != HAM10000.names:  # whose records are older than other classes
        content.append(raw.classes.names)
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
