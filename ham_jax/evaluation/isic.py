"""The figures of the ISIC 2018 Task 3 challenge, by its scorer's own rules.

They differ from `metrics.compute`'s where the scorer's rules do, and are the ones to set beside the
challenge's live ranking and its papers.
"""

import os
import re
from typing import Any

import numpy as np

from ham_jax.classes import Classes
from ham_jax.evaluation import bootstrap
from ham_jax.evaluation.predictions import Predictions, write_csv

CATEGORIES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
"""The columns of the challenge's truth and submission files, in their order."""

WITHOUT_WEIGHT = "ISIC_0035068"
"""An image of the test set that the scorer wants an answer for and does not count."""

_HIGH_SENSITIVITY = 0.8


def knows(classes: Classes) -> bool:
    """Returns whether these are the challenge's seven diagnoses, in whatever order."""
    return sorted(classes) == sorted(name.lower() for name in CATEGORIES)


def score(predictions: Predictions) -> dict[str, Any]:
    """Returns what the package isic-challenge-scoring 5.6.0 says of a submission.

    A category counts as answered where its own probability is above 0.5, whatever the others are;
    only the balanced accuracy goes by the arg-max, and takes a shared maximum for wrong.

    Args:
      predictions: of classes that `knows` knows; image ids with or without `.jpg`. Probabilities
        are clipped to [0, 1] as in the submission.

    Returns:
      overall: the balanced accuracy over the categories that are present; per_category: {MEL:
      {accuracy, sensitivity, specificity, dice, ppv, npv, auc, auc_sens_80 (the area under the ROC
      curve where the sensitivity is 0.8 or more, 1 at the most), ap}}; macro_average: {the same
      names}. A rate of no images at all is 1. Without an image of the category, or of any other,
      the last three are None and left out of the mean; the scorer itself refuses such a set.

    Raises:
      ValueError: no image has a weight.
    """
    names = [re.sub(r"\.jpg$", "", name, flags=re.IGNORECASE) for name in predictions.image_ids]
    kept = predictions.take(np.array(names) != WITHOUT_WEIGHT)
    labels, probabilities = kept.labels, np.clip(kept.probabilities, 0, 1)
    figures = bootstrap.Figures(labels, probabilities)(np.ones((len(labels), 1)))
    per_category = {}
    for name in CATEGORIES:
        k = kept.classes.index(name.lower())
        truth, values = labels == k, probabilities[:, k]
        areas = dict.fromkeys(("auc", "auc_sens_80", "ap"))
        if 0 < truth.sum() < len(truth):
            areas["auc"] = float(figures["auc"][k, 0])
            areas["auc_sens_80"] = _area_above(truth, values, _HIGH_SENSITIVITY)
            areas["ap"] = float(figures["average_precision"][k, 0])
        per_category[name] = _rates(truth, values > 0.5) | areas
    columns = {
        key: [row[key] for row in per_category.values() if row[key] is not None]
        for key in per_category["MEL"]
    }
    return {
        "overall": float(figures["balanced_accuracy"][0]),
        "macro_average": {
            key: float(np.mean(values)) if values else None for key, values in columns.items()
        },
        "per_category": per_category,
    }


def write_submission(path: str | os.PathLike, predictions: Predictions) -> None:
    """Writes a file that the challenge's scorer accepts, sorted by image.

    Args:
      path: CSV to make or replace, whole or not at all.
      predictions: as for `score`; probabilities are clipped to [0, 1], which a rounded softmax can
        leave by one unit in the last place.
    """
    order = [predictions.classes.index(name.lower()) for name in CATEGORIES]
    columns = np.clip(predictions.probabilities[:, order], 0, 1).T.tolist()
    rows = zip(predictions.image_ids, *columns, strict=True)
    write_csv(path, ("image", *CATEGORIES), rows)


def _rates(truth: np.ndarray, answered: np.ndarray) -> dict[str, float]:
    """Returns the rates of two bool [n]."""
    hits, misses = int((truth & answered).sum()), int((truth & ~answered).sum())
    false_alarms, passed = int((~truth & answered).sum()), int((~truth & ~answered).sum())

    def rate(part: int, rest: int) -> float:
        return part / (part + rest) if part + rest else 1.0

    return {
        "accuracy": rate(hits + passed, misses + false_alarms),
        "sensitivity": rate(hits, misses),
        "specificity": rate(passed, false_alarms),
        "dice": rate(2 * hits, misses + false_alarms),
        "ppv": rate(hits, false_alarms),
        "npv": rate(passed, misses),
    }


def _area_above(truth: np.ndarray, values: np.ndarray, sensitivity: float) -> float:
    """Returns the area between the ROC curve where it is at least that sensitive and the axis."""
    order = np.argsort(-values, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(values[order])), len(values) - 1)  # of equal values
    num_true = np.append(0, np.cumsum(truth[order])[ends])
    num_false = np.append(0, ends + 1) - num_true
    tpr, fpr = num_true / num_true[-1], num_false / num_false[-1]
    first = np.searchsorted(tpr, sensitivity)
    around = slice(first - 1, first + 1)
    start = np.interp(sensitivity, tpr[around], fpr[around])
    return float(np.trapezoid(np.append(sensitivity, tpr[first:]), np.append(start, fpr[first:])))
