"""How good probabilities are, how sure that number is, and the files that carry both.

Everything here is a pure function of the set of images: their order changes no digit, so numbers
computed from a predictions file equal those that were computed while it was written.
"""

import csv
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn import metrics as sklearn_metrics

from ham_jax import CLASSES, escape, files, reading
from ham_jax.config import InputError

ISIC_CLASSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
"""The columns of the ISIC 2018 Task 3 truth and submission files, in their order."""

KNOWN = ("age", "sex", "localization", "dx_type")
"""What a predictions file tells of an image beside its truth. `dx_type`, how the truth was found,
predicts it: it is there to look at results by it and never enters a network."""

NUM_BINS = 15  # of the expected calibration error


def compute(
    labels: np.ndarray, probabilities: np.ndarray, classes: Sequence[str] = CLASSES
) -> dict[str, Any]:
    """Measures predictions against the truth.

    The predicted class is the arg-max. Where several classes share the maximum none is predicted,
    so that the image counts as wrong, as in the ISIC challenge's scorer; only the confusion matrix,
    which has no column for it, counts such an image under the first of them. Macro means run over
    the classes that are present.

    Args:
      labels: int [n], indices in `classes`.
      probabilities: float [n, len(classes)], finite.
      classes: names, in the order of the columns.

    Returns:
      What JSON can hold, with None where a number is undefined, such as the sensitivity of a class
      without images:
      num_images, balanced_accuracy (mean recall), accuracy, macro_auc (one against the rest),
      macro_average_precision, macro_f1, log_loss (nats; a probability counts as no less than
      2.2e-16), expected_calibration_error (of the arg-max, 15 bins of equal width; Guo et al. 2017,
      arXiv 1706.04599, eq. 3), confusion_matrix (rows are the truth), and per_class: {class:
      {num_images, sensitivity, specificity, precision, f1, auc, average_precision}}, where the
      first four rates follow from the arg-max and not from a threshold of 0.5.

    Raises:
      ValueError: no images, wrong shapes, a label out of range, or a value that is not finite.
    """
    labels, probabilities = _checked(labels, probabilities, len(classes))
    predicted = _predicted(probabilities)
    per_class = {
        name: _one_class(labels == k, predicted == k, probabilities[:, k])
        for k, name in enumerate(classes)
    }
    confusion = np.zeros((len(classes), len(classes)), int)
    np.add.at(confusion, (labels, probabilities.argmax(axis=1)), 1)
    of_truth = np.maximum(probabilities[np.arange(len(labels)), labels], np.finfo(float).eps)
    return {
        "num_images": len(labels),
        "balanced_accuracy": _mean(row["sensitivity"] for row in per_class.values()),
        "accuracy": float(np.mean(predicted == labels)),
        "macro_auc": _mean(row["auc"] for row in per_class.values()),
        "macro_average_precision": _mean(row["average_precision"] for row in per_class.values()),
        "macro_f1": _mean(row["f1"] for row in per_class.values()),
        "log_loss": math.fsum(-np.log(of_truth)) / len(labels),
        "expected_calibration_error": _calibration_error(
            predicted == labels, probabilities.max(axis=1)
        ),
        "confusion_matrix": confusion.tolist(),
        "per_class": per_class,
    }


def interval(
    labels: np.ndarray,
    probabilities: np.ndarray,
    groups: np.ndarray,
    num_draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Returns a bootstrap percentile interval of the balanced accuracy.

    Lesions are drawn, not images, since images of one lesion succeed and fail together; and they
    are drawn within each class, so that a rare class is in every draw.

    Args:
      labels: int [n].
      probabilities: float [n, num_classes].
      groups: [n], the lesion of each image.
      num_draws: resamples.
      seed: of the draws.
      level: share of the resamples inside the interval.

    Returns:
      (low, high).

    Raises:
      ValueError: as `compute`.
    """
    correct = correct_answers(labels, probabilities)
    draws = balanced_accuracy_draws(labels, correct[:, None], groups, num_draws, seed)
    low, high = np.quantile(draws[:, 0], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def correct_answers(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Returns whether the arg-max is right, bool [n]; where several classes share it, it is not.

    Raises:
      ValueError: as `compute`.
    """
    probabilities = np.asarray(probabilities)
    labels, probabilities = _checked(labels, probabilities, probabilities.shape[-1])
    return _predicted(probabilities) == labels


def confidence_bins(confidence: np.ndarray) -> np.ndarray:
    """Returns which of the NUM_BINS bins (low, high] of equal width each confidence [n] is in."""
    return np.digitize(confidence, np.linspace(0, 1, NUM_BINS + 1)[1:-1], right=True)


def balanced_accuracy_draws(
    labels: np.ndarray, correct: np.ndarray, groups: np.ndarray, num_draws: int, seed: int
) -> np.ndarray:
    """Returns the balanced accuracy of several networks in the same resamples of the lesions.

    Args:
      labels: int [n].
      correct: bool [n, num_networks].
      groups: [n], the lesion of each image.
      num_draws: resamples.
      seed: of the draws.

    Returns:
      float64 [num_draws, num_networks].
    """
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    rng = np.random.default_rng(seed)
    recalls = []
    for k in np.unique(labels):
        _, lesion = np.unique(group[labels == k], return_inverse=True)
        sizes = np.bincount(lesion)
        hits = np.zeros((len(sizes), correct.shape[1]))
        np.add.at(hits, lesion, correct[labels == k])
        # Lesions with the same hits and size are alike: how many of each kind a resample holds is
        # multinomial, which is the same bootstrap at a fraction of the numbers.
        kinds, counts = np.unique(np.column_stack([hits, sizes]), axis=0, return_counts=True)
        sums = rng.multinomial(len(sizes), counts / len(sizes), size=num_draws) @ kinds
        recalls.append(sums[:, :-1] / sums[:, -1:])
    return np.mean(recalls, axis=0)


def write_predictions(
    path: str | os.PathLike,
    image_ids: Sequence[str],
    lesion_ids: Sequence[str],
    labels: np.ndarray,
    probabilities: np.ndarray,
    known: pd.DataFrame | None = None,
) -> None:
    """Writes image_id, lesion_id, truth, the seven probabilities and what else is known.

    Args:
      path: CSV to make or replace, whole or not at all; sorted by image_id.
      image_ids: [n].
      lesion_ids: [n].
      labels: int [n], indices in CLASSES.
      probabilities: float [n, 7]; `read_predictions` gives back exactly these values.
      known: one row an image, for the columns after these, such as KNOWN; nan becomes an empty
        field.

    Raises:
      ValueError: as `compute`.
    """
    labels, probabilities = _checked(labels, probabilities, len(CLASSES))
    truth = [CLASSES[label] for label in labels]
    columns = {} if known is None else known.astype(object).where(known.notna(), "")
    rows = zip(
        *(image_ids, lesion_ids, truth, *probabilities.T.tolist()),
        *(columns[name].tolist() for name in columns),
        strict=True,
    )
    _write_csv(path, ("image_id", "lesion_id", "truth", *CLASSES, *columns), rows)


def read_predictions(
    path: str | os.PathLike,
) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """Reads what `write_predictions` wrote, without what else is known.

    Returns:
      image_ids [n], lesion_ids [n], labels int [n], probabilities float64 [n, 7].

    Raises:
      InputError: as `read_table`.
    """
    table = read_table(path)
    return (
        table["image_id"].tolist(),
        table["lesion_id"].tolist(),
        np.array([CLASSES.index(dx) for dx in table["truth"]], int),
        table[list(CLASSES)].to_numpy(),
    )


def read_table(path: str | os.PathLike) -> pd.DataFrame:
    """Reads all that `write_predictions` wrote.

    Returns:
      One row an image with the file's columns and those of KNOWN: the seven probabilities, age
      (years) and ood_score are float64 (nan where not known), all others texts ('' where not
      known). A file from before there was a column counts as not knowing it.

    Raises:
      InputError: the file is missing or not such a file; all faults at once.
    """
    try:
        with reading.open_text(path) as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames or []
            rows = [
                (reader.line_num, {name: escape.plain(text) for name, text in row.items()})
                for row in reader
            ]
    except (OSError, UnicodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a CSV: {error}.") from error
    absent = [name for name in ("image_id", "lesion_id", "truth", *CLASSES) if name not in header]
    if absent:
        raise InputError(f"{path} is no predictions file: it lacks {', '.join(absent)}.")
    if not rows:
        raise InputError(f"{path} holds no predictions, but a header only.")
    faults = []
    seen = {}  # image -> its first line
    for line, row in rows:
        first = seen.setdefault(row["image_id"], line)
        if first != line:
            faults.append(f"{path}, line {line}: {row['image_id']} is in line {first} already.")
        try:
            CLASSES.index(row["truth"])
            row |= {name: float(row[name]) for name in CLASSES}
            if not np.isfinite([row[name] for name in CLASSES]).all():
                raise ValueError
            row |= {name: float(row.get(name) or "nan") for name in ("age", "ood_score")}
        except (ValueError, TypeError):  # TypeError: a short row has None
            faults.append(
                f"{path}, line {line}: truth must be one of {', '.join(CLASSES)}, each"
                " probability a finite number, age and ood_score a number or empty."
            )
    if faults:
        raise InputError(faults)
    numbers = dict.fromkeys((*CLASSES, "age", "ood_score"), np.float64)
    columns = dict.fromkeys((*header, *KNOWN))
    return pd.DataFrame(
        {
            name: pd.Series(
                [row[name] if name in numbers else row.get(name) or "" for _, row in rows],
                dtype=numbers.get(name, str),
            )
            for name in columns
        }
    )


def write_isic_submission(
    path: str | os.PathLike, image_ids: Sequence[str], probabilities: np.ndarray
) -> None:
    """Writes a file that the ISIC 2018 Task 3 scorer accepts, sorted by image.

    Args:
      path: CSV to make or replace, whole or not at all.
      image_ids: [n].
      probabilities: float [n, 7], columns in the order of CLASSES; clipped to [0, 1], which a
        rounded softmax can leave by one unit in the last place.

    Raises:
      ValueError: wrong shape, or a value that is not finite.
    """
    _, probabilities = _checked(np.zeros(len(image_ids), int), probabilities, len(CLASSES))
    order = [CLASSES.index(name.lower()) for name in ISIC_CLASSES]
    columns = np.clip(probabilities[:, order], 0, 1).T.tolist()
    _write_csv(path, ("image", *ISIC_CLASSES), zip(image_ids, *columns, strict=True))


def _checked(
    labels: np.ndarray, probabilities: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns int labels and float64 probabilities, or raises ValueError."""
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, np.float64)
    if labels.ndim != 1 or not len(labels) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be whole numbers [n], n > 0: {labels.dtype} {labels.shape}")
    if probabilities.shape != (len(labels), num_classes):
        raise ValueError(
            f"probabilities must be [{len(labels)}, {num_classes}], not {probabilities.shape}"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels must lie in [0, {num_classes - 1}]")
    if not np.isfinite(probabilities).all():
        raise ValueError("probabilities must be finite")
    return labels, probabilities


def _predicted(probabilities: np.ndarray) -> np.ndarray:
    """Returns the arg-max int [n] of [n, c], or -1 where several columns share the maximum."""
    is_top = probabilities == probabilities.max(axis=1, keepdims=True)
    return np.where(is_top.sum(axis=1) == 1, is_top.argmax(axis=1), -1)


def _one_class(truth: np.ndarray, predicted: np.ndarray, score: np.ndarray) -> dict[str, Any]:
    """Returns `compute`'s per_class row from bool [n], bool [n] and float [n]."""
    num_true, num_predicted = int(truth.sum()), int(predicted.sum())
    hits, negatives = int((truth & predicted).sum()), len(truth) - num_true
    both = num_true and negatives
    return {
        "num_images": num_true,
        "sensitivity": _ratio(hits, num_true),
        "specificity": _ratio(negatives - (num_predicted - hits), negatives),
        "precision": _ratio(hits, num_predicted),
        "f1": _ratio(2 * hits, num_true + num_predicted) if num_true else None,
        "auc": float(sklearn_metrics.roc_auc_score(truth, score)) if both else None,
        "average_precision": (
            float(sklearn_metrics.average_precision_score(truth, score)) if num_true else None
        ),
    }


def _ratio(numerator: int, denominator: int) -> float | None:
    return numerator / denominator if denominator else None


def _mean(values: Iterable[float | None]) -> float | None:
    """Returns the mean of the values that are defined."""
    values = [value for value in values if value is not None]
    return math.fsum(values) / len(values) if values else None


def _calibration_error(correct: np.ndarray, confidence: np.ndarray) -> float:
    """Returns the gap between confidence and accuracy, averaged over images by bin (low, high]."""
    bins = confidence_bins(confidence)
    gaps = [
        abs(math.fsum(confidence[bins == b]) - int(correct[bins == b].sum()))
        for b in range(NUM_BINS)
    ]
    return math.fsum(gaps) / len(correct)


def _write_csv(path: str | os.PathLike, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Writes rows sorted by their first column; floats in the shortest text that is exact."""
    files.write_text(path, escape.csv_text([header, *sorted(rows, key=lambda row: row[0])]))
