"""How sure the figures are: bootstrap intervals over lesions. All resampling is in this room.

Lesions are drawn, not images, since images of one lesion succeed and fail together; and they are
drawn within each class, so that a rare class is in every resample.

A resample is a weight an image: how often its lesion was drawn. The figures of a resample are the
weighted figures, and so hundreds of resamples are computed side by side from one sorting
(`resamples`, `Figures`). The balanced accuracy alone needs no sorting: `balanced_accuracy_draws`
draws how many lesions of each kind there are, which is the same bootstrap at a fraction of the
time, but with other random numbers. So its interval differs from one by `resamples` in the third
digit. It is `balanced_accuracy_interval` wherever it is told.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ham_jax.evaluation import metrics
from ham_jax.evaluation.predictions import Predictions

LEVEL = 0.95
"""The share of the resamples that an interval holds."""

_CHUNK = 100  # resamples side by side
_CACHED = 200_000  # numbers that are worked on at once: 1.6 MB, which a core's cache holds


def intervals(predictions: Predictions, num_draws: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Returns 95 % percentile intervals of the figures of `metrics.compute`.

    A calibration error is a sum of absolute values, to which the noise of a resample adds: its
    interval is biased upwards and may lie above the figure itself.

    Args:
      predictions: of the images.
      num_draws: resamples.
      seed: of the draws.

    Returns:
      {name of each of metrics.METRICS: [low, high]}, and per_class: {class: {sensitivity, auc}},
      with None where the figure is undefined.
    """
    predictions = in_fixed_order(predictions)
    labels, lesion_ids = predictions.labels, predictions.lesion_ids
    figures = Figures(labels, predictions.probabilities)
    drawn = draws(figures, resamples(labels, lesion_ids, num_draws, seed))
    return {
        **{metric.name: interval(drawn[metric.name]) for metric in metrics.METRICS},
        "balanced_accuracy": balanced_accuracy_interval(predictions),
        "per_class": {
            name: {figure: interval(drawn[figure][k]) for figure in ("sensitivity", "auc")}
            for k, name in enumerate(predictions.classes)
        },
    }


def balanced_accuracy_interval(
    predictions: Predictions, num_draws: int = 1000, seed: int = 0
) -> list[float]:
    """Returns [low, high], the 95 % percentile interval of the balanced accuracy.

    Args:
      predictions: of the images.
      num_draws: resamples.
      seed: of the draws.
    """
    correct = metrics.correct_answers(predictions)
    drawn = balanced_accuracy_draws(predictions, correct[:, None], num_draws, seed)
    return percentiles(drawn[:, 0])


def balanced_accuracy_draws(
    predictions: Predictions, correct: np.ndarray, num_draws: int, seed: int
) -> np.ndarray:
    """Returns the balanced accuracy of several networks in the same resamples of the lesions.

    Args:
      predictions: of the images, of any of the networks.
      correct: bool [n, num_networks].
      num_draws: resamples.
      seed: of the draws.

    Returns:
      float64 [num_draws, num_networks].
    """
    labels = predictions.labels
    _, group = np.unique(predictions.lesion_ids, return_inverse=True)
    rng = np.random.default_rng(seed)
    recalls = []
    for k in np.unique(labels):
        _, lesion = np.unique(group[labels == k], return_inverse=True)
        sizes = np.bincount(lesion)
        hits = np.zeros((len(sizes), correct.shape[1]))
        np.add.at(hits, lesion, correct[labels == k])
        # Lesions with the same hits and size are alike: how many of each kind a resample holds is
        # multinomial.
        kinds, counts = np.unique(np.column_stack([hits, sizes]), axis=0, return_counts=True)
        sums = rng.multinomial(len(sizes), counts / len(sizes), size=num_draws) @ kinds
        recalls.append(sums[:, :-1] / sums[:, -1:])
    return np.mean(recalls, axis=0)


def in_fixed_order(predictions: Predictions) -> Predictions:
    """Returns the images in an order that does not depend on theirs.

    Taken in it, the same set of images gives the same resamples and sums to the last digit.
    """
    keys = (*predictions.probabilities.T, predictions.labels, predictions.lesion_ids)
    return predictions.take(np.lexsort(keys))


def interval(values: np.ndarray) -> list[float] | None:
    """Returns the [low, high] that holds LEVEL of the values [num_draws]; None if one is nan."""
    return None if np.isnan(values).any() else percentiles(values)


def percentiles(values: np.ndarray) -> list[float]:
    """Returns the [low, high] that holds LEVEL of the values [num_draws], none of which is nan."""
    return np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()


def resamples(
    strata: np.ndarray, lesion_ids: np.ndarray, num_draws: int, seed: int
) -> Iterator[np.ndarray]:
    """Draws lesions with replacement, as many as there are, within each stratum.

    Args:
      strata: int [n], such as the classes. A lesion in two strata counts as two lesions.
      lesion_ids: [n].
      num_draws: resamples.
      seed: of the draws.

    Yields:
      How often each image counts, float64 [n, some draws], until there were `num_draws`.
    """
    _, group = np.unique(lesion_ids, return_inverse=True)
    lesions, of_image = np.unique(np.stack([strata, group]), axis=1, return_inverse=True)
    _, first, of_lesion, sizes = np.unique(
        lesions[0], return_index=True, return_inverse=True, return_counts=True
    )
    low = first[of_lesion]  # lesions are sorted by stratum: each draws from a range of places
    high = low + sizes[of_lesion]
    rng = np.random.default_rng(seed)
    for start in range(0, num_draws, _CHUNK):
        num = min(_CHUNK, num_draws - start)
        weights = np.empty((num, len(strata)))
        for row in weights:
            row[:] = np.bincount(rng.integers(low, high), minlength=len(low))[of_image.ravel()]
        yield weights.T


def packed(weights: np.ndarray) -> np.ndarray:
    """Returns whole numbers in the smallest type that holds them, which is mostly a byte."""
    return weights.astype(np.min_scalar_type(int(weights.max())))


def draws(figures: "Figures", weights: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
    """Returns each figure in all resamples, [..., num_draws]."""
    parts = [figures(chunk) for chunk in weights]
    return {name: np.concatenate([part[name] for part in parts], -1) for name in parts[0]}


class Figures:
    """The figures of fixed answers as functions of how often each image counts."""

    def __init__(
        self, labels: np.ndarray, probabilities: np.ndarray, ranked: Iterable[int] | None = None
    ):
        """Sorts once.

        Args:
          labels: int [n], indices of C classes.
          probabilities: float64 [n, C].
          ranked: the classes whose AUC and average precision are wanted. Default: all.
        """
        self._metrics = metrics.METRICS
        wanted = [metric.parts for metric in self._metrics if metric.parts]
        parts = {
            of: of(labels, probabilities)
            for of in (metrics.of_class, metrics.hits, metrics.gaps, *wanted)
        }
        ends = np.cumsum([len(rows) for rows in parts.values()]).tolist()
        self._rows = {
            of: slice(end - len(rows), end)
            for end, (of, rows) in zip(ends, parts.items(), strict=True)
        }
        self._parts = np.concatenate(list(parts.values()))
        ranked = range(probabilities.shape[1]) if ranked is None else ranked
        self._ranks = {k: _Ranks(labels == k, probabilities[:, k]) for k in ranked}

    def __call__(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Computes the figures of d resamples.

        Args:
          weights: whole numbers of any type [n, d], in all below 2**30 and above 0 a resample.

        Returns:
          float64 [d] each: metrics.METRICS as in `metrics.compute`, and overconfidence (mean
          confidence less accuracy); float64 [C, d] each: sensitivity, auc, average_precision. nan
          where undefined; means run over the classes where it is defined.
        """
        rows = np.ascontiguousarray(weights.T, np.float64)
        all_sums = self._parts @ rows.T
        sums = {of: all_sums[rows] for of, rows in self._rows.items()}
        of_class = sums[metrics.of_class]
        total = of_class.sum(axis=0)
        auc, average_precision = np.full((2, *of_class.shape), np.nan)
        counts = packed(rows)
        with ThreadPoolExecutor() as pool:
            areas = pool.map(lambda ranks: ranks.areas(counts), self._ranks.values())
            for k, of_one in zip(self._ranks, areas, strict=True):
                auc[k], average_precision[k] = of_one
        found = {
            "sensitivity": _ratio(sums[metrics.hits], of_class),
            "auc": auc,
            "average_precision": average_precision,
            "overconfidence": sums[metrics.gaps].sum(axis=0) / total,
        }
        for metric in self._metrics:
            found[metric.name] = (
                metric.combine(sums[metric.parts]) / total
                if metric.parts
                else _mean(found[metric.mean_of])
            )
        return found


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

    def areas(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns AUC and average precision [d] of whole numbers [d, n], a small type's."""
        step = max(1, _CACHED // len(self._order))
        parts = [self._areas(counts[i : i + step]) for i in range(0, len(counts), step)]
        auc, average_precision = map(np.concatenate, zip(*parts, strict=True))
        return auc, average_precision

    def _areas(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        below = _sums_before(counts.take(self._order, axis=1), np.int32)
        own = counts.take(self._positives, axis=1)
        own_below = _sums_before(own, np.int32)
        num_positive, total = own_below[:, -1:], below[:, -1:]
        below_low = below.take(self._low, axis=1)
        own_below_low = own_below.take(self._own_low, axis=1)
        # Each positive wins against the negatives below it and half of those level with it.
        wins = below.take(self._high, axis=1)
        wins += below_low
        wins -= own_below_low
        wins -= own_below.take(self._own_high, axis=1)
        own = own.astype(np.float64)
        num_wins = (wins * own).sum(axis=1)  # whole numbers, which are exact in any order
        pairs = 2.0 * num_positive * (total - num_positive)
        # Each positive adds the precision among the images that score no less than it does.
        precision = np.zeros_like(own)
        from_here = total - below_low
        np.divide(num_positive - own_below_low, from_here, out=precision, where=from_here > 0)
        precision *= own
        return (
            _ratio(num_wins, pairs[:, 0]),
            _ratio(_sums_before(precision, np.float64)[:, -1], num_positive[:, 0]),
        )


_SIDES = ("left", "right")


def _sums_before(values: np.ndarray, dtype: type) -> np.ndarray:
    """Returns the sums [d, n + 1] of the first 0, 1, ... n columns, added one after the other."""
    sums = np.empty((len(values), values.shape[1] + 1), dtype)
    sums[:, 0] = 0
    np.cumsum(values, axis=1, dtype=dtype, out=sums[:, 1:])
    return sums


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Returns the quotients, nan where the denominator is 0."""
    full = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    return np.divide(numerator, denominator, out=full, where=denominator > 0)


def _mean(values: np.ndarray) -> np.ndarray:
    """Returns the mean over classes [c, d] that are not nan; nan where there is none."""
    return _ratio(np.nansum(values, axis=0), (~np.isnan(values)).sum(axis=0))
