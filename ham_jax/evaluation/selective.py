"""How good what a person acts on is: prediction sets, the malignancy flag, and abstention."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn import metrics as sklearn_metrics

from ham_jax.classes import Classes
from ham_jax.evaluation import bootstrap, metrics
from ham_jax.evaluation.predictions import Predictions
from ham_jax.inference import decision
from ham_jax.inference.decision import Calibrated

COVERAGES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)

_ROUNDING = 1e-9  # of a count of images


def measure(predictions: Predictions, calibrated: Calibrated) -> dict[str, Any]:
    """Measures sets, flag and abstention on images that the thresholds were not fitted on.

    Args:
      predictions: of the images.
      calibrated: what is said of them.

    Returns:
      What JSON holds: `sets`: {level: {kind: see `set_numbers`}} of decision.SHOWN and of
      decision.KINDS that have thresholds; `malignant`: see `flag`; `abstention`: see `abstention`.
    """
    return {
        "sets": {
            f"{decision.LEVEL:.2f}": {
                kind: set_numbers(predictions, calibrated.sets(kind))
                for kind in (decision.SHOWN, *decision.KINDS)
                if kind in calibrated.thresholds
            }
        },
        "malignant": flag(predictions, calibrated),
        "abstention": abstention(predictions.with_probabilities(calibrated.probabilities)),
    }


def flag(
    predictions: Predictions, calibrated: Calibrated, num_draws: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Measures malignant-or-not: the ranking by its ROC curve, the flag at its threshold.

    Args:
      predictions: of the images.
      calibrated: what is said of them.
      num_draws: resamples of the lesions, malignant and benign apart.
      seed: of the draws.

    Returns:
      auc, sensitivity, specificity and the 95 % bootstrap percentile interval over lesions of each
      as `<name>_interval`; num_malignant; threshold: the mean. None where there are no malignant
      images, or no others.
    """
    truth = is_malignant(predictions.labels, predictions.classes)
    score, flagged = calibrated.malignancy, calibrated.flagged
    names = ("auc", "sensitivity", "specificity")
    names_of_intervals = [f"{name}_interval" for name in names]
    counted = {
        "num_malignant": int(truth.sum()),
        "threshold": _mean(calibrated.thresholds["malignant"]),
    }
    if truth.all() or not truth.any():
        return dict.fromkeys((*names, *names_of_intervals)) | counted
    pair = np.stack([1 - score, score], axis=-1)
    figures = bootstrap.Figures(truth.astype(int), pair, ranked=[1])

    def measured(weights: np.ndarray) -> np.ndarray:
        return np.stack(
            [
                figures(weights)["auc"][1],
                (truth & flagged) @ weights / (truth @ weights),
                (~truth & ~flagged) @ weights / (~truth @ weights),
            ]
        )

    found = measured(np.ones((len(truth), 1)))[:, 0].tolist()
    resamples = bootstrap.resamples(truth, predictions.lesion_ids, num_draws, seed)
    intervals = map(bootstrap.interval, np.concatenate([measured(w) for w in resamples], axis=-1))
    return (
        dict(zip(names, found, strict=True))
        | dict(zip(names_of_intervals, intervals, strict=True))
        | counted
    )


def roc(predictions: Predictions, calibrated: Calibrated) -> dict[str, list[float]]:
    """Returns the ROC curve of malignant-or-not: `sensitivity`, `specificity` and `threshold`.

    Args:
      predictions: images with malignant labels and others.
      calibrated: what is said of them.
    """
    false_positive, true_positive, threshold = sklearn_metrics.roc_curve(
        is_malignant(predictions.labels, predictions.classes), calibrated.malignancy
    )
    return {
        "sensitivity": true_positive.tolist(),
        "specificity": (1 - false_positive).tolist(),
        # The first is infinite, which JSON has not; no score is above 1 but by rounding.
        "threshold": np.minimum(threshold, 2).tolist(),
    }


def abstention(predictions: Predictions) -> dict[str, Any]:
    """Measures answers when the least confident are left to somebody else.

    Args:
      predictions: the greatest probability of each image is its confidence.

    Returns:
      aurc: the area under `risk_coverage` (Geifman, Uziel & El-Yaniv, ICLR 2019, eq. 4);
      selective: for each of COVERAGES, as `asked`, the coverage (more where confidences tie, or
      where that share is no whole number of images), accuracy and balanced_accuracy of the images
      kept, and num_classes, of how many diagnoses it is the mean.
    """
    labels = predictions.labels
    correct = metrics.correct_answers(predictions)
    confidence = predictions.probabilities.max(axis=-1)
    descending = np.sort(confidence)[::-1]
    selective = []
    for coverage in COVERAGES:
        kept = confidence >= descending[math.ceil(coverage * len(labels) - _ROUNDING) - 1]
        num_images = np.bincount(labels[kept])
        hits = np.bincount(labels[kept & correct], minlength=len(num_images))
        recalls = hits[num_images > 0] / num_images[num_images > 0]
        selective.append(
            {
                "asked": coverage,
                "coverage": float(kept.mean()),
                "accuracy": float(correct[kept].mean()),
                "balanced_accuracy": float(recalls.mean()),
                "num_classes": len(recalls),
            }
        )
    return {"aurc": _mean(risk_coverage(predictions)["risk"]), "selective": selective}


def risk_coverage(predictions: Predictions) -> dict[str, list[float]]:
    """Returns the share of wrong answers (`risk`) among the most confident `coverage`.

    Equal confidences count as shuffled: each takes the share of wrong answers among them.

    Returns:
      coverage and risk, [n] each: of the 1, 2, ... n most confident.
    """
    wrong = ~metrics.correct_answers(predictions)
    confidence = predictions.probabilities.max(axis=-1)
    _, place, counts = np.unique(-confidence, return_inverse=True, return_counts=True)
    share = np.bincount(place, weights=wrong) / counts
    kept = np.arange(1, len(wrong) + 1)
    return {
        "coverage": (kept / len(wrong)).tolist(),
        "risk": (np.cumsum(np.repeat(share, counts)) / kept).tolist(),
    }


def set_numbers(predictions: Predictions, members: np.ndarray) -> dict[str, Any]:
    """Measures prediction sets.

    Args:
      predictions: of n images.
      members: which diagnoses are in each image's set, bool [n, C].

    Returns:
      coverage (each lesion weighs 1, as promised), coverage_of_images, coverage_per_class (as
      `coverage`; None without images), coverage_per_class_interval (95 %, Wilson's, of lesions),
      mean_size, empty and single (shares of the images).
    """
    labels, weights = predictions.labels, lesion_weights(predictions.lesion_ids)
    covered, size = members[np.arange(len(labels)), labels], members.sum(axis=-1)

    def share(of: np.ndarray) -> float | None:
        return math.fsum((covered * weights)[of]) / math.fsum(weights[of]) if of.any() else None

    per_class = {name: share(labels == k) for k, name in enumerate(predictions.classes)}
    num = [len(np.unique(predictions.lesion_ids[labels == k])) for k in range(len(per_class))]
    return {
        "coverage": share(np.ones(len(labels), bool)),
        "coverage_of_images": float(covered.mean()),
        "coverage_per_class": per_class,
        "coverage_per_class_interval": {
            name: None if part is None else _wilson(part, n)
            for (name, part), n in zip(per_class.items(), num, strict=True)
        },
        "mean_size": float(size.mean()),
        "empty": float((size == 0).mean()),
        "single": float((size == 1).mean()),
    }


def lesion_weights(lesion_ids: np.ndarray) -> np.ndarray:
    """Returns float [n]: one over the number of images of each image's lesion."""
    _, lesion, sizes = np.unique(np.asarray(lesion_ids), return_inverse=True, return_counts=True)
    return 1 / sizes[lesion]


def is_malignant(labels: np.ndarray, classes: Classes) -> np.ndarray:
    """Returns whether each label int [n] is a malignant class, bool [n]."""
    return np.isin(labels, classes.malignant_labels)


def _mean(values: Sequence[float] | np.ndarray) -> float:
    """Returns the mean, whatever the order."""
    return math.fsum(values) / len(values)


def _wilson(share: float, num: int) -> list[float]:
    """Returns the 95 % interval of a share of independent cases (Wilson, JASA 1927)."""
    z = 1.959963984540054
    middle, scale = share + z * z / (2 * num), 1 + z * z / num
    half = z * math.sqrt(share * (1 - share) / num + (z / (2 * num)) ** 2)
    return [max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)]
