"""From probabilities to what a person can act on: sets, a malignancy flag, and when to abstain.

Thresholds are fitted on images that the network did not train on and hold for probabilities of the
same calibration only. A photograph on the threshold counts as above it.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn import metrics as sklearn_metrics

from ham_jax import CLASSES
from ham_jax.evaluation import bootstrap, metrics

LEVELS = (0.9, 0.95)
"""The coverage that prediction sets are made for."""

MALIGNANT = ("akiec", "bcc", "mel")
SENSITIVITY = 0.95
"""The share of malignant photographs that the flag is to find."""

COVERAGES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)

Thresholds = Mapping[str, Any]
"""`malignant` [...], `marginal` [..., LEVELS] and `class_conditional` [..., LEVELS, 7]: floats or
lists as JSON holds them, or arrays with a row an image."""

_ROUNDING = 1e-9  # of a count of lesions


def fit(labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """Fits the thresholds of the flag and of the prediction sets.

    A diagnosis is in the set where its probability reaches a threshold: split conformal prediction
    with the score 1 - p (Vovk et al. 2005; Sadinle, Lei & Wasserman, JASA 2019). `marginal` has
    one threshold for all diagnoses and covers the share of all; `class_conditional` has one a
    diagnosis and covers that share of each, the rare ones too.

    Photographs of one lesion are not exchangeable with those of another, lesions are. So each
    lesion weighs 1, shared by its photographs, and one more lesion, the next patient's, counts as
    uncovered: then a photograph of a new lesion is covered with at least that chance (Lee, Barber
    & Willett 2023, arXiv 2306.06342, hierarchical conformal prediction). With one photograph a
    lesion it is the usual quantile with ceil((n + 1) level). Where the lesions are too few to
    promise anything (fewer than 9 for 90 %, 19 for 95 %) the threshold is 0: always in the set.

    Args:
      labels: int [n], indices in CLASSES.
      probabilities: float [n, 7], calibrated as those that the thresholds will be applied to.
      groups: [n], the lesion of each image; a lesion has one label.

    Returns:
      What JSON holds: `malignant`, the largest threshold of `malignancy` that SENSITIVITY of the
      malignant images reach (0 where there are none); `marginal` [LEVELS]; `class_conditional`
      [LEVELS][7].
    """
    labels, of_truth = np.asarray(labels), _of_truth(labels, probabilities)
    weights = _weights(groups)
    scores = np.sort(malignancy(probabilities)[_is_malignant(labels)])[::-1]
    needed = math.ceil(SENSITIVITY * len(scores) - _ROUNDING)
    return {
        "malignant": float(scores[needed - 1]) if len(scores) else 0.0,
        "marginal": [_conformal(of_truth, weights, level) for level in LEVELS],
        "class_conditional": [
            [
                _conformal(of_truth[labels == k], weights[labels == k], level)
                for k in range(len(CLASSES))
            ]
            for level in LEVELS
        ],
    }


def malignancy(probabilities: np.ndarray) -> np.ndarray:
    """Returns p(akiec) + p(bcc) + p(mel), float [n] of [n, 7]."""
    first, second, third = (probabilities[..., CLASSES.index(dx)] for dx in MALIGNANT)
    return first + second + third


def sets(probabilities: np.ndarray, thresholds: Thresholds, kind: str) -> np.ndarray:
    """Returns which diagnoses are in the set, bool [n, LEVELS, 7].

    Args:
      probabilities: float [n, 7].
      thresholds: of one fit, or with a row an image.
      kind: 'marginal' or 'class_conditional'.
    """
    least = np.asarray(thresholds[kind], float)
    if kind == "marginal":
        least = least[..., None]
    return probabilities[:, None, :] >= least


def measure(
    labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray, thresholds: Thresholds
) -> dict[str, Any]:
    """Measures sets, flag and abstention on images that the thresholds were not fitted on.

    Args:
      labels: int [n], indices in CLASSES.
      probabilities: float [n, 7].
      groups: [n], the lesion of each image.
      thresholds: of one fit, or with a row an image.

    Returns:
      What JSON holds: `sets`: {level: {kind: coverage (each lesion weighs 1, as promised),
      coverage_of_images, coverage_per_class (as `coverage`), mean_size, empty and single (shares of
      the images)}}; `malignant`: see `flag`; `abstention`: see `abstention`.
    """
    labels, groups = np.asarray(labels), np.asarray(groups)
    weights = _weights(groups)
    of_kind = {
        kind: sets(probabilities, thresholds, kind) for kind in ("marginal", "class_conditional")
    }
    return {
        "sets": {
            f"{level:.2f}": {
                kind: _set_numbers(labels, members[:, number], weights)
                for kind, members in of_kind.items()
            }
            for number, level in enumerate(LEVELS)
        },
        "malignant": flag(labels, malignancy(probabilities), groups, thresholds["malignant"]),
        "abstention": abstention(labels, probabilities),
    }


def flag(
    labels: np.ndarray,
    score: np.ndarray,
    groups: np.ndarray,
    threshold: float | np.ndarray,
    num_draws: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures malignant-or-not: the ranking by its ROC curve, the flag at its threshold.

    Args:
      labels: int [n], indices in CLASSES.
      score: float [n], `malignancy`.
      groups: [n], the lesion of each image.
      threshold: of the flag, one or [n].
      num_draws: resamples of the lesions, malignant and benign apart.
      seed: of the draws.

    Returns:
      auc, sensitivity, specificity and the 95 % bootstrap percentile interval over lesions of each
      as `<name>_interval`; num_malignant; threshold: the mean. None where there are no malignant
      images, or no others.
    """
    truth = _is_malignant(np.asarray(labels))
    names = ("auc", "sensitivity", "specificity")
    about = {
        "num_malignant": int(truth.sum()),
        "threshold": _mean(np.broadcast_to(threshold, truth.shape)),
    }
    if truth.all() or not truth.any():
        return dict.fromkeys((*names, *(f"{name}_interval" for name in names))) | about
    flagged = score >= threshold
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
    drawn = [measured(w) for w in bootstrap.resamples(truth, groups, num_draws, seed)]
    intervals = map(bootstrap.interval, np.concatenate(drawn, axis=-1))
    names_of_intervals = (f"{name}_interval" for name in names)
    return (
        dict(zip(names, found, strict=True))
        | dict(zip(names_of_intervals, intervals, strict=True))
        | about
    )


def roc(labels: np.ndarray, score: np.ndarray) -> dict[str, list[float]]:
    """Returns the ROC curve of malignant-or-not: `sensitivity`, `specificity` and `threshold`.

    Args:
      labels: int [n], indices in CLASSES, malignant ones and others.
      score: float [n], `malignancy`.
    """
    false_positive, true_positive, threshold = sklearn_metrics.roc_curve(
        _is_malignant(np.asarray(labels)), score
    )
    return {
        "sensitivity": true_positive.tolist(),
        "specificity": (1 - false_positive).tolist(),
        # The first is infinite, which JSON has not; no score is above 1 but by rounding.
        "threshold": np.minimum(threshold, 2).tolist(),
    }


def abstention(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """Measures answers when the least confident are left to somebody else.

    Args:
      labels: int [n].
      probabilities: float [n, c]; their maximum is the confidence.

    Returns:
      aurc: the area under `risk_coverage` (Geifman, Uziel & El-Yaniv, ICLR 2019, eq. 4);
      selective: for each of COVERAGES the coverage (more where confidences tie), accuracy and
      balanced_accuracy of the images kept, and num_classes, of how many diagnoses it is the mean.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, float)
    correct = metrics.correct_answers(labels, probabilities)
    confidence = probabilities.max(axis=-1)
    descending = np.sort(confidence)[::-1]
    selective = []
    for coverage in COVERAGES:
        kept = confidence >= descending[math.ceil(coverage * len(labels) - _ROUNDING) - 1]
        num_images = np.bincount(labels[kept])
        hits = np.bincount(labels[kept & correct], minlength=len(num_images))
        recalls = hits[num_images > 0] / num_images[num_images > 0]
        selective.append(
            {
                "coverage": float(kept.mean()),
                "accuracy": float(correct[kept].mean()),
                "balanced_accuracy": float(recalls.mean()),
                "num_classes": len(recalls),
            }
        )
    risk = risk_coverage(labels, probabilities)["risk"]
    return {"aurc": _mean(risk), "selective": selective}


def risk_coverage(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, list[float]]:
    """Returns the share of wrong answers (`risk`) among the most confident `coverage`.

    Equal confidences count as shuffled: each takes the share of wrong answers among them.

    Args:
      labels: int [n].
      probabilities: float [n, c].

    Returns:
      coverage and risk, [n] each: of the 1, 2, ... n most confident.
    """
    wrong = ~metrics.correct_answers(labels, probabilities)
    confidence = np.asarray(probabilities, float).max(axis=-1)
    _, place, counts = np.unique(-confidence, return_inverse=True, return_counts=True)
    share = np.bincount(place, weights=wrong) / counts
    kept = np.arange(1, len(wrong) + 1)
    return {
        "coverage": (kept / len(wrong)).tolist(),
        "risk": (np.cumsum(np.repeat(share, counts)) / kept).tolist(),
    }


def _is_malignant(labels: np.ndarray) -> np.ndarray:
    return np.isin(labels, [CLASSES.index(dx) for dx in MALIGNANT])


def _of_truth(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    return probabilities[np.arange(len(labels)), labels]


def _mean(values: np.ndarray) -> float:
    """Returns the mean, whatever the order."""
    return math.fsum(values) / len(values)


def _weights(groups: np.ndarray) -> np.ndarray:
    """Returns float [n]: one over the number of images of each image's lesion."""
    _, lesion, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    return 1 / sizes[lesion]


def _conformal(of_truth: np.ndarray, weights: np.ndarray, level: float) -> float:
    """Returns the largest threshold that `level` of the lesions, and one more, reach; else 0."""
    values, place = np.unique(-of_truth, return_inverse=True)
    reached = np.cumsum(np.bincount(place, weights=weights, minlength=len(values)))
    needed = level * (weights.sum() + 1) - _ROUNDING
    enough = np.flatnonzero(reached >= needed)
    return float(-values[enough[0]]) if len(enough) else 0.0


def _set_numbers(labels: np.ndarray, members: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """Returns `measure`'s numbers of sets bool [n, 7]."""
    covered, size = _of_truth(labels, members), members.sum(axis=-1)

    def share(of: np.ndarray) -> float | None:
        return math.fsum((covered * weights)[of]) / math.fsum(weights[of]) if of.any() else None

    return {
        "coverage": share(np.ones(len(labels), bool)),
        "coverage_of_images": float(covered.mean()),
        "coverage_per_class": {dx: share(labels == k) for k, dx in enumerate(CLASSES)},
        "mean_size": float(size.mean()),
        "empty": float((size == 0).mean()),
        "single": float((size == 1).mean()),
    }
