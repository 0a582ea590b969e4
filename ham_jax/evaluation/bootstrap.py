"""How sure the figures are: bootstrap intervals over lesions, all from the same resamples.

A resample is a weight an image: how often its lesion was drawn. The figures of a resample are the
weighted figures, and so hundreds of resamples are computed side by side from one sorting.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from ham_jax import CLASSES
from ham_jax.evaluation import metrics

LEVEL = 0.95
_CHUNK = 100  # resamples side by side: 2,000 images then take 1.6 MB, which a core's cache holds


def intervals(
    labels: np.ndarray,
    probabilities: np.ndarray,
    groups: np.ndarray,
    num_draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns 95 % percentile intervals of `metrics.compute`'s headline figures.

    Lesions are drawn with replacement within each class. A calibration error is a sum of absolute
    values, to which the noise of a resample adds: its interval leans high and may lie above the
    figure itself. The balanced accuracy's interval is that of `metrics.interval`, so that there is
    one of it wherever it is told; by these resamples it would differ in the third digit.

    Args:
      labels: int [n], indices in CLASSES.
      probabilities: float [n, 7].
      groups: [n], the lesion of each image.
      num_draws: resamples.
      seed: of the draws.

    Returns:
      {figure: [low, high]} for balanced_accuracy, accuracy, macro_auc, macro_average_precision,
      log_loss and expected_calibration_error, and per_class: {class: {sensitivity, auc}}, with
      None where the figure is undefined.

    Raises:
      ValueError: as `metrics.compute`.
    """
    order = fixed_order(labels, probabilities, groups)
    labels, probabilities, groups = (np.asarray(a)[order] for a in (labels, probabilities, groups))
    figures = Figures(labels, probabilities)
    drawn = draws(figures, resamples(labels, groups, num_draws, seed))
    found = {name: interval(values) for name, values in drawn.items() if values.ndim == 1}
    del found["overconfidence"]
    found["balanced_accuracy"] = list(metrics.interval(labels, probabilities, groups))
    found["per_class"] = {
        dx: {name: interval(drawn[name][k]) for name in ("sensitivity", "auc")}
        for k, dx in enumerate(CLASSES)
    }
    return found


def fixed_order(labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Returns an order int [n] of the images that does not depend on theirs.

    Taken in it, the same set of images gives the same resamples and sums to the last digit.
    """
    return np.lexsort((*np.asarray(probabilities).T, labels, groups))


def interval(values: np.ndarray) -> list[float] | None:
    """Returns the [low, high] that holds LEVEL of the values [num_draws]; None if one is nan."""
    if np.isnan(values).any():
        return None
    return np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()


def resamples(
    strata: np.ndarray, groups: np.ndarray, num_draws: int, seed: int
) -> Iterator[np.ndarray]:
    """Draws lesions with replacement, as many as there are, within each stratum.

    Args:
      strata: int [n], such as the classes. A lesion in two strata counts as two lesions.
      groups: [n], the lesion of each image.
      num_draws: resamples.
      seed: of the draws.

    Yields:
      How often each image counts, float64 [n, some draws], until there were `num_draws`.
    """
    _, group = np.unique(groups, return_inverse=True)
    lesions, of_image = np.unique(np.stack([strata, group]), axis=1, return_inverse=True)
    _, first, of_lesion, sizes = np.unique(
        lesions[0], return_index=True, return_inverse=True, return_counts=True
    )
    low = first[of_lesion]  # lesions are sorted by stratum: each draws from a range of places
    high = low + sizes[of_lesion]
    rng = np.random.default_rng(seed)
    for start in range(0, num_draws, _CHUNK):
        num = min(_CHUNK, num_draws - start)
        places = rng.integers(low, high, (num, len(low))) + np.arange(num)[:, None] * len(low)
        counts = np.bincount(places.ravel(), minlength=places.size).reshape(places.shape)
        yield counts.T[of_image.ravel()].astype(np.float64)


def draws(figures: "Figures", weights: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """Returns each figure in all resamples, [..., num_draws]."""
    parts = [figures(chunk) for chunk in weights]
    return {name: np.concatenate([part[name] for part in parts], -1) for name in parts[0]}


class Figures:
    """The headline figures of fixed answers as functions of how often each image counts."""

    def __init__(
        self, labels: np.ndarray, probabilities: np.ndarray, ranked: Iterable[int] | None = None
    ):
        """Sorts once.

        Args:
          labels: int [n], indices of classes.
          probabilities: float [n, num_classes].
          ranked: the classes whose AUC and average precision are wanted. Default: all.

        Raises:
          ValueError: as `metrics.compute`.
        """
        correct = metrics.correct_answers(labels, probabilities)
        probabilities = np.asarray(probabilities, np.float64)
        num_images, self._num_classes = probabilities.shape
        confidence = probabilities.max(axis=1)
        of_truth = probabilities[np.arange(num_images), labels]
        is_class = np.arange(self._num_classes)[:, None] == labels
        is_bin = np.arange(metrics.NUM_BINS)[:, None] == metrics.confidence_bins(confidence)
        self._sums = np.concatenate(  # of these values each figure without ranks is made
            [
                is_class,
                is_class & correct,
                is_bin * (confidence - correct),
                -np.log(np.maximum(of_truth, np.finfo(float).eps))[None],
            ]
        )
        ranked = range(self._num_classes) if ranked is None else ranked
        self._ranks = {k: _Ranks(is_class[k], probabilities[:, k]) for k in ranked}

    def __call__(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Computes the figures of d resamples.

        Args:
          weights: whole numbers as float64 [n, d], not all 0 for any resample.

        Returns:
          float64 [d] each: balanced_accuracy, accuracy, macro_auc, macro_average_precision,
          log_loss, expected_calibration_error as in `metrics.compute`, and overconfidence (mean
          confidence less accuracy); float64 [num_classes, d] each: sensitivity, auc,
          average_precision. nan where undefined; means run over the classes where it is defined.
        """
        c = self._num_classes
        sums = self._sums @ weights
        of_class, hits, gaps, log_loss = np.split(sums, [c, 2 * c, len(sums) - 1])
        total = of_class.sum(axis=0)
        auc, average_precision = np.full((2, c, weights.shape[1]), np.nan)
        for k, ranks in self._ranks.items():
            auc[k], average_precision[k] = ranks.areas(weights)
        sensitivity = _ratio(hits, of_class)
        return {
            "balanced_accuracy": _mean(sensitivity),
            "accuracy": hits.sum(axis=0) / total,
            "macro_auc": _mean(auc),
            "macro_average_precision": _mean(average_precision),
            "log_loss": log_loss[0] / total,
            "expected_calibration_error": np.abs(gaps).sum(axis=0) / total,
            "overconfidence": gaps.sum(axis=0) / total,
            "sensitivity": sensitivity,
            "auc": auc,
            "average_precision": average_precision,
        }


class _Ranks:
    """One class against the rest, sorted by its score."""

    def __init__(self, truth: np.ndarray, score: np.ndarray):
        self._order = np.argsort(score, kind="stable")
        score = score[self._order]
        positive = truth[self._order]
        self._positives = self._order[positive]
        score_of_positive = score[positive]
        # Between `low` and `high` lie the images of equal score: among all and among the positives.
        self._low, self._high = (np.searchsorted(score, score_of_positive, s) for s in _SIDES)
        self._own_low, self._own_high = (
            np.searchsorted(score_of_positive, score_of_positive, s) for s in _SIDES
        )

    def areas(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns AUC and average precision [d] of weights [n, d]."""
        below = _sums_before(weights[self._order])
        own = weights[self._positives]
        own_below = _sums_before(own)
        num_positive, total = own_below[-1], below[-1]
        below_low, own_below_low = below[self._low], own_below[self._own_low]
        # Each positive wins against the negatives below it and half of those level with it.
        wins = below_low - own_below_low + below[self._high] - own_below[self._own_high]
        pairs = 2 * num_positive * (total - num_positive)
        # Each positive adds the precision among the images that score no less than it does.
        precision = _ratio(num_positive - own_below_low, total - below_low)
        return (
            _ratio(np.einsum("nd,nd->d", own, wins), pairs),
            _ratio(np.einsum("nd,nd->d", own, np.nan_to_num(precision)), num_positive),
        )


_SIDES = ("left", "right")


def _sums_before(weights: np.ndarray) -> np.ndarray:
    """Returns the sums [n + 1, d] of the first 0, 1, ... n rows."""
    sums = np.zeros((len(weights) + 1, weights.shape[1]))
    np.cumsum(weights, axis=0, out=sums[1:])
    return sums


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Returns the quotients, nan where the denominator is 0."""
    full = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    return np.divide(numerator, denominator, out=full, where=denominator > 0)


def _mean(values: np.ndarray) -> np.ndarray:
    """Returns the mean over classes [c, d] that are not nan; nan where there is none."""
    return _ratio(np.nansum(values, axis=0), (~np.isnan(values)).sum(axis=0))
