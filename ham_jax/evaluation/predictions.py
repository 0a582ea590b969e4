"""What is judged: images with their truth, the probabilities they were given, and what is known."""

import csv
import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ham_jax import classes as diagnoses
from ham_jax import escape, files, reading
from ham_jax.classes import Classes
from ham_jax.config import InputError
from ham_jax.data.records import Subset

METADATA = ("age", "sex", "localization", "dx_type")
"""What a predictions file tells of an image beside its truth. `dx_type`, how the truth was found,
predicts it: it is there to look at results by it and never enters a network."""

_NAMES = ("image_id", "lesion_id", "truth")
_NUMBERS = ("age", "ood_score")
_DEFAULT: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """Images that a network answered, n of them.

    Attributes:
      classes: C of them.
      labels: int [n], indices in `classes`.
      probabilities: float64 [n, C], finite.
      lesion_ids: texts [n]. Default: each image is a lesion of its own.
      image_ids: texts [n]. Default: numbers.
      metadata: a row an image, with any of METADATA ('' or nan where not known) and `ood_score`
        (see `inference.detector`). Default: nothing is known.

    Raises:
      ValueError: no images, wrong shapes, a label out of range, or a value that is not finite.
    """

    classes: Classes
    labels: np.ndarray
    probabilities: np.ndarray
    lesion_ids: np.ndarray = _DEFAULT
    image_ids: np.ndarray = _DEFAULT
    metadata: pd.DataFrame = _DEFAULT

    def __post_init__(self):
        labels = np.asarray(self.labels)
        num_images, num_classes = len(labels), len(self.classes)
        if labels.ndim != 1 or not num_images or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"labels must be whole numbers [n], n > 0: {labels.dtype} {labels.shape}"
            )
        probabilities = np.asarray(self.probabilities, np.float64)
        if probabilities.shape != (num_images, num_classes):
            raise ValueError(
                f"probabilities must be [{num_images}, {num_classes}], not {probabilities.shape}"
            )
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"labels must lie in [0, {num_classes - 1}]")
        if not np.isfinite(probabilities).all():
            raise ValueError("probabilities must be finite")
        numbers = np.arange(num_images).astype(str)
        image_ids = numbers if self.image_ids is None else self.image_ids
        lesion_ids = image_ids if self.lesion_ids is None else self.lesion_ids
        nothing = pd.DataFrame(index=range(num_images))
        metadata = nothing if self.metadata is None else self.metadata.reset_index(drop=True)
        fields = {
            "labels": labels,
            "probabilities": probabilities,
            "image_ids": np.asarray(image_ids, object),
            "lesion_ids": np.asarray(lesion_ids, object),
            "metadata": metadata,
        }
        for name, value in fields.items():
            if len(value) != num_images:
                raise ValueError(f"there are {len(value)} {name} of {num_images} images")
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(
        cls,
        images: Subset,
        classes: Classes,
        probabilities: np.ndarray,
        ood_scores: np.ndarray | None = None,
    ) -> "Predictions":
        """Returns what a network says of records.

        Args:
          images: n of them.
          classes: of the records.
          probabilities: float [n, C].
          ood_scores: float [n], where there is an out-of-distribution model.
        """
        table = images.table
        metadata = table.loc[:, list(METADATA)]
        if ood_scores is not None:
            metadata = metadata.assign(ood_score=ood_scores)
        lesion_ids, image_ids = table["lesion_id"].to_numpy(), table["image_id"].to_numpy()
        return cls(classes, images.labels, probabilities, lesion_ids, image_ids, metadata)

    @property
    def truth(self) -> np.ndarray:
        """Names of the labels, texts [n]."""
        return np.array(self.classes.names, object)[self.labels]

    @property
    def num_lesions(self) -> int:
        """How many lesions the images show."""
        return len(set(self.lesion_ids))

    def take(self, rows: np.ndarray) -> "Predictions":
        """Returns the images of these row numbers (or of a bool [n])."""
        return dataclasses.replace(
            self,
            labels=self.labels[rows],
            probabilities=self.probabilities[rows],
            lesion_ids=self.lesion_ids[rows],
            image_ids=self.image_ids[rows],
            metadata=self.metadata[rows] if rows.dtype == bool else self.metadata.iloc[rows],
        )

    def with_probabilities(self, probabilities: np.ndarray) -> "Predictions":
        """Returns the same images with other probabilities, float [n, C]."""
        return dataclasses.replace(self, probabilities=probabilities)

    def by_lesion(self) -> "Predictions":
        """Returns a row a lesion: the mean of its images' probabilities, sorted by name.

        A lesion that has two labels counts as two, as in `bootstrap.resamples`. The order of the
        images changes no digit.

        Returns:
          `image_ids` are those of the lesions; `metadata` has `num_images` alone.
        """
        _, lesion = np.unique(self.lesion_ids, return_inverse=True)
        order = np.lexsort((*self.probabilities.T, self.labels, lesion))
        keys = np.stack([lesion, self.labels])[:, order]
        _, first, sizes = np.unique(keys, axis=1, return_index=True, return_counts=True)
        sums = np.add.reduceat(self.probabilities[order], first)
        rows, ids = order[first], self.lesion_ids[order[first]]
        counts = pd.DataFrame({"num_images": sizes})
        return Predictions(self.classes, self.labels[rows], sums / sizes[:, None], ids, ids, counts)

    def write(self, path: str | os.PathLike) -> None:
        """Writes image_id, lesion_id, truth, the probabilities and the metadata.

        `read` gives back exactly these values; what is not known becomes an empty field.

        Args:
          path: CSV to make or replace, whole or not at all; sorted by image_id.
        """
        known = self.metadata.astype(object).where(self.metadata.notna(), "")
        rows = zip(
            *(self.image_ids, self.lesion_ids, self.truth, *self.probabilities.T.tolist()),
            *(known[name].tolist() for name in known),
            strict=True,
        )
        write_csv(path, (*_NAMES, *self.classes, *known), rows)


def join(parts: Sequence[Predictions]) -> Predictions:
    """Returns all images of several, in their order."""
    return Predictions(
        parts[0].classes,
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.probabilities for part in parts]),
        np.concatenate([part.lesion_ids for part in parts]),
        np.concatenate([part.image_ids for part in parts]),
        pd.concat([part.metadata for part in parts]),
    )


def read(path: str | os.PathLike, classes: Classes | None = None) -> Predictions:
    """Reads what `Predictions.write` wrote.

    Args:
      path: the file.
      classes: of the run; None: those of the file's columns, as `classes.known` has them.

    Returns:
      The images; all of METADATA are there. A file from before there was a column counts as not
      knowing it.

    Raises:
      InputError: the file is missing or not such a file; all faults at once.
    """
    try:
        with reading.open_text(path) as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or [])
            rows = [
                (reader.line_num, {name: escape.plain(text) for name, text in row.items()})
                for row in reader
            ]
    except (OSError, UnicodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a CSV: {error}.") from error
    if classes is None:
        classes = _classes_of(path, header)
    absent = [name for name in (*_NAMES, *classes) if name not in header]
    if absent:
        raise InputError(f"{path} is not a predictions file: it lacks {', '.join(absent)}.")
    if not rows:
        raise InputError(f"{path} holds no predictions, but a header only.")
    if faults := _parse(path, rows, classes):
        raise InputError(faults)
    parsed = [row for _, row in rows]
    columns = dict.fromkeys(
        name for name in (*header, *METADATA) if name not in (*_NAMES, *classes)
    )
    metadata = {
        name: pd.Series(
            [row[name] if name in _NUMBERS else row.get(name) or "" for row in parsed],
            dtype=np.float64 if name in _NUMBERS else str,
        )
        for name in columns
    }
    return Predictions(
        classes,
        np.array([row["truth"] for row in parsed]),
        np.array([[row[name] for name in classes] for row in parsed]),
        np.array([row["lesion_id"] for row in parsed], object),
        np.array([row["image_id"] for row in parsed], object),
        pd.DataFrame(metadata),
    )


def _parse(
    path: str | os.PathLike, rows: Iterable[tuple[int, dict[str, Any]]], classes: Classes
) -> list[str]:
    """Turns texts into labels and numbers, in place, and returns what is wrong with them."""
    faults = []
    seen: dict[str, int] = {}  # image -> its first line
    for line, row in rows:
        first = seen.setdefault(row["image_id"], line)
        if first != line:
            faults.append(f"{path}, line {line}: {row['image_id']} is in line {first} already.")
        try:
            row["truth"] = classes.index(row["truth"])
            row |= {name: float(row[name]) for name in classes}
            if not np.isfinite([row[name] for name in classes]).all():
                raise ValueError
            row |= {name: float(row.get(name) or "nan") for name in _NUMBERS}
        except (ValueError, TypeError):  # TypeError: a short row has None
            faults.append(
                f"{path}, line {line}: truth must be one of {', '.join(classes)}, each"
                " probability a finite number, age and ood_score a number or empty."
            )
    return faults


def write_csv(
    path: str | os.PathLike, header: Sequence[str], rows: Iterable[Sequence[Any]]
) -> None:
    """Writes rows sorted by their first column; floats in the shortest text that is exact."""
    files.write_text(path, escape.csv_text([header, *sorted(rows, key=lambda row: row[0])]))


def _classes_of(path: str | os.PathLike, header: Sequence[str]) -> Classes:
    """Returns the classes whose columns stand between the truth and the metadata."""
    start = header.index("truth") + 1 if "truth" in header else len(header)
    ends = [
        place for place in range(start, len(header)) if header[place] in (*METADATA, "ood_score")
    ]
    names = header[start : ends[0] if ends else None]
    try:
        return diagnoses.known([name or "" for name in names])
    except ValueError as error:
        absent = [name for name in _NAMES if name not in header]
        why = f"it lacks {', '.join(absent)}." if absent else f"of its columns: {error}"
        raise InputError(f"{path} is not a predictions file: {why}") from error
