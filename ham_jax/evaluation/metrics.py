"""How good probabilities are. How sure that number is: `bootstrap`.

Everything here is a pure function of the set of images: their order changes no digit, so numbers
computed from a predictions file equal those that were computed while it was written.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from sklearn import metrics as sklearn_metrics

from ham_jax.evaluation.predictions import Predictions

NUM_BINS = 15  # of the expected calibration error

Parts = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(labels int [n], probabilities float64 [n, C]) -> numbers [k, n]: k of each image."""


def correct_answers(predictions: Predictions) -> np.ndarray:
    """Returns whether the arg-max is right, bool [n]; where several classes share it, it is not."""
    return _correct(predictions.labels, predictions.probabilities)


def confidence_bins(confidence: np.ndarray) -> np.ndarray:
    """Returns which of the NUM_BINS bins (low, high] of equal width each confidence [n] is in."""
    return np.digitize(confidence, np.linspace(0, 1, NUM_BINS + 1)[1:-1], right=True)


def of_class(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Returns whether each image is of a class, bool [C, n]."""
    return np.arange(probabilities.shape[1])[:, None] == labels


def hits(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Returns whether each image is of a class and answered so, bool [C, n]."""
    return of_class(labels, probabilities) & _correct(labels, probabilities)


def gaps(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Returns confidence less 1 if right, in the row of the confidence's bin: [NUM_BINS, n]."""
    confidence = probabilities.max(axis=1)
    is_bin = np.arange(NUM_BINS)[:, None] == confidence_bins(confidence)
    return is_bin * (confidence - _correct(labels, probabilities))


def surprise(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Returns the negative logarithm of the truth's probability, nats [1, n]."""
    of_truth = probabilities[np.arange(len(labels)), labels]
    return -np.log(np.maximum(of_truth, np.finfo(float).eps))[None]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure of all images with an interval.

    One entry in METRICS puts it into metrics.json, into the printed table and into the report.
    Either `mean_of` or `parts` says what it is.

    Attributes:
      name: its key in metrics.json.
      title: in tables.
      mean_of: 'sensitivity', 'auc' or 'average_precision', whose mean over the classes it is.
      parts: numbers of each image; the metric is made of their sums over the images.
      combine: sums [k, ...] -> [...], which over the number of images is the metric.
      exact: the metric of images that count once each, where `combine` is not exact to the last
        digit; takes labels and probabilities.
    """

    name: str
    title: str
    mean_of: str = ""
    parts: Parts | None = None
    combine: Callable[[np.ndarray], np.ndarray] = lambda sums: sums.sum(axis=0)
    exact: Callable[[np.ndarray, np.ndarray], float] | None = None

    def value(
        self, predictions: Predictions, per_class: Mapping[str, Mapping[str, Any]]
    ) -> float | None:
        """Returns the metric, or None where it is not defined; see `compute` for `per_class`."""
        labels, probabilities = predictions.labels, predictions.probabilities
        if self.exact:
            return self.exact(labels, probabilities)
        if self.parts:
            sums = np.array([math.fsum(part) for part in self.parts(labels, probabilities)])
            return float(self.combine(sums)) / len(labels)
        return _mean_of_classes(per_class, self.mean_of)


def _calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Returns the gap between confidence and accuracy, averaged over images by bin (low, high]."""
    correct, confidence = _correct(labels, probabilities), probabilities.max(axis=1)
    bins = confidence_bins(confidence)
    of_bins = [
        abs(math.fsum(confidence[bins == b]) - int(correct[bins == b].sum()))
        for b in range(NUM_BINS)
    ]
    return math.fsum(of_bins) / len(correct)


METRICS = (
    Metric("balanced_accuracy", "balanced accuracy", mean_of="sensitivity"),
    Metric("accuracy", "accuracy", parts=hits),
    Metric("macro_auc", "macro AUC", mean_of="auc"),
    Metric("macro_average_precision", "macro average precision", mean_of="average_precision"),
    Metric("log_loss", "log loss", parts=surprise),
    Metric(
        *("expected_calibration_error", "expected calibration error"),
        parts=gaps,
        combine=lambda sums: np.abs(sums).sum(axis=0),
        exact=_calibration_error,
    ),
)
"""What is told with an interval, in the order of all tables; the first is the headline."""


def compute(predictions: Predictions) -> dict[str, Any]:
    """Measures predictions against the truth.

    The predicted class is the arg-max. Where several classes share the maximum none is predicted,
    so that the image counts as wrong, as in the ISIC challenge's scorer; only the confusion matrix,
    which has no column for it, counts such an image under the first of them. Macro means run over
    the classes that are present.

    Returns:
      What JSON can hold, with None where a number is undefined, such as the sensitivity of a class
      without images:
      num_images; METRICS: balanced_accuracy (mean recall), accuracy, macro_auc (one against the
      rest), macro_average_precision, log_loss (nats; a probability counts as no less than
      2.2e-16), expected_calibration_error (of the arg-max, 15 bins of equal width; Guo et al. 2017,
      arXiv 1706.04599, eq. 3); macro_f1; confusion_matrix [C][C] (rows are the truth); per_class:
      {class: {num_images, sensitivity, specificity, precision, f1, auc, average_precision}}, where
      the first four rates follow from the arg-max and not from a threshold of 0.5.
    """
    labels, probabilities = predictions.labels, predictions.probabilities
    predicted = _predicted(probabilities)
    per_class = {
        name: _one_class(labels == k, predicted == k, probabilities[:, k])
        for k, name in enumerate(predictions.classes)
    }
    confusion = np.zeros((len(per_class), len(per_class)), int)
    np.add.at(confusion, (labels, probabilities.argmax(axis=1)), 1)
    return {
        "num_images": len(labels),
        **{metric.name: metric.value(predictions, per_class) for metric in METRICS},
        "macro_f1": _mean_of_classes(per_class, "f1"),
        "confusion_matrix": confusion.tolist(),
        "per_class": per_class,
    }


def _predicted(probabilities: np.ndarray) -> np.ndarray:
    """Returns the arg-max int [n] of [n, C], or -1 where several columns share the maximum."""
    is_top = probabilities == probabilities.max(axis=1, keepdims=True)
    return np.where(is_top.sum(axis=1) == 1, is_top.argmax(axis=1), -1)


def _correct(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    return _predicted(probabilities) == labels


def _one_class(truth: np.ndarray, predicted: np.ndarray, score: np.ndarray) -> dict[str, Any]:
    """Returns `compute`'s per_class row from bool [n], bool [n] and float [n]."""
    num_true, num_predicted = int(truth.sum()), int(predicted.sum())
    num_hits, negatives = int((truth & predicted).sum()), len(truth) - num_true
    both = num_true and negatives
    return {
        "num_images": num_true,
        "sensitivity": _ratio(num_hits, num_true),
        "specificity": _ratio(negatives - (num_predicted - num_hits), negatives),
        "precision": _ratio(num_hits, num_predicted),
        "f1": _ratio(2 * num_hits, num_true + num_predicted) if num_true else None,
        "auc": float(sklearn_metrics.roc_auc_score(truth, score)) if both else None,
        "average_precision": (
            float(sklearn_metrics.average_precision_score(truth, score)) if num_true else None
        ),
    }


def _ratio(numerator: int, denominator: int) -> float | None:
    return numerator / denominator if denominator else None


def _mean_of_classes(per_class: Mapping[str, Mapping[str, Any]], name: str) -> float | None:
    """Returns the mean of a figure over the classes where it is defined."""
    values = [row[name] for row in per_class.values() if row[name] is not None]
    return math.fsum(values) / len(values) if values else None
