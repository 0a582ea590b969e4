"""Whether a network serves some people worse than others: by sex, age, site and dx_type.

Two subgroups differ in which diagnoses they hold, and nevi are easier than melanomas. So a gap is
measured over the classes that both sides have enough lesions of, each class with the same share.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from ham_jax.data.metadata import UNKNOWN
from ham_jax.evaluation import bootstrap
from ham_jax.evaluation.predictions import Predictions

NOT_KNOWN = "not known"
AGE_BANDS = ("under 30", "30 to 44", "45 to 59", "60 to 74", "75 and over")
_BOUNDS = (30, 45, 60, 75)  # years

MIN_LESIONS = 30
"""A gap is flagged only where there are as many lesions, and so images, on both of its sides."""

MIN_CLASS_LESIONS = 10
"""A class enters a gap only with as many lesions on both sides. A bootstrap of n lesions makes the
variance too small by 1/n."""

FIGURES = (
    *("balanced_accuracy", "accuracy", "macro_auc", "expected_calibration_error"),
    "overconfidence",
)
_NUM_DRAWS = 1000


def measure(predictions: Predictions) -> dict[str, Any]:
    """Measures each subgroup and its gap to the other known images on the same axis.

    The intervals are 95 % bootstrap percentiles over lesions, drawn within each subgroup and class.

    Gaps are those of balanced_accuracy and macro_auc, as means over the classes with
    MIN_CLASS_LESIONS on both sides, and of overconfidence. The calibration error itself is not
    compared, as it grows where images are few; overconfidence does not. What the mix of classes
    still does: it decides which others a class is told from in its AUC, and, as it should, how well
    confidences fit.

    A run on HAM10000 makes about 60 comparisons, of which three would leave zero outside their
    interval by chance alone. So a gap is flagged only if zero is outside and Holm's step-down
    (Scand. J. Stat. 6:65, 1979) over all comparisons made leaves it significant, too: the chance of
    any false flag is 5 %. The p-values are normal, from the resamples' standard deviation, for a
    thousand resamples do not reach into such tails. An interval without zero that is not flagged
    is a reason to look again on other images; that nothing is flagged does not show equality.

    Args:
      predictions: of the images. Their metadata has any of the columns sex, age (years, nan where
        not known), localization and dx_type; a column that is absent is not known. As for the
        network, an age of 0 counts as not known.

    Returns:
      num_comparisons, and axes: {sex, age, localization, dx_type: {subgroup: {num_images,
      num_lesions, classes: {class: images} of those present, each of FIGURES as {value, interval}
      (balanced accuracy and AUC over the classes present; overconfidence is the mean confidence
      less the accuracy), gaps}}}. gaps is {figure: {value (subgroup less the others), interval,
      classes: those compared, p: before the correction, None where lesions are too few, flagged}},
      without a figure that cannot be compared and empty for what is not known. None stands for
      what is not defined, and for the classes of overconfidence, which goes over all images.
    """
    predictions = bootstrap.in_fixed_order(predictions)
    axes = {
        axis: _measure_axis(predictions, names)
        for axis, names in _axes(predictions.metadata).items()
    }
    gaps = [
        gap
        for subgroups in axes.values()
        for row in subgroups.values()
        for gap in row["gaps"].values()
        if gap["p"] is not None
    ]
    for gap, significant in zip(gaps, _holm([gap["p"] for gap in gaps]), strict=True):
        low, high = gap["interval"]
        gap["flagged"] = significant and not low <= 0 <= high
    return {"num_comparisons": len(gaps), "axes": axes}


def _axes(metadata: pd.DataFrame) -> dict[str, np.ndarray]:
    """Returns the name of each image's subgroup [n] on each axis."""
    axes = {}
    for axis in ("sex", "age", "localization", "dx_type"):
        if axis not in metadata:
            names = np.full(len(metadata), NOT_KNOWN)
        elif axis == "age":
            age = metadata["age"].to_numpy(np.float64)
            names = np.where(age > 0, np.array(AGE_BANDS)[np.digitize(age, _BOUNDS)], NOT_KNOWN)
        else:
            words = metadata[axis].fillna("").astype(str).str.strip()
            names = words.mask(words.str.lower().isin(UNKNOWN), NOT_KNOWN).to_numpy(str)
        axes[axis] = names
    return axes


def _measure_axis(predictions: Predictions, names: np.ndarray) -> dict[str, Any]:
    """Returns `measure`'s rows of one axis, before any gap is flagged; names are [n]."""
    classes, labels = predictions.classes, predictions.labels
    present, subgroup = np.unique(names, return_inverse=True)
    strata = subgroup * len(classes) + labels
    # The images as they are, then resampled: the first value of each figure is its own.
    as_is = np.ones((len(labels), 1))
    resamples = bootstrap.resamples(strata, predictions.lesion_ids, _NUM_DRAWS, seed=0)
    weights = [as_is, *map(bootstrap.packed, resamples)]

    def drawn(side: np.ndarray, ranked: np.ndarray | None = None) -> dict[str, np.ndarray]:
        figures = bootstrap.Figures(labels[side], predictions.probabilities[side], ranked)
        return bootstrap.draws(figures, (chunk[side] for chunk in weights))

    first = [band for band in AGE_BANDS if band in present]
    last = [NOT_KNOWN] if NOT_KNOWN in present else []
    rows = {}
    for name in dict.fromkeys([*first, *(n for n in present if n not in last), *last]):
        own = names == name
        others = ~own & (names != NOT_KNOWN)
        lesions = np.stack([_lesions(predictions, side) for side in (own, others)])
        drawn_of_own = drawn(own)
        images = np.bincount(labels[own], minlength=len(classes)).tolist()
        rows[str(name)] = {
            "num_images": sum(images),
            "num_lesions": int(lesions[0].sum()),
            "classes": {dx: n for dx, n in zip(classes, images, strict=True) if n},
            **{figure: _with_interval(drawn_of_own[figure]) for figure in FIGURES},
            "gaps": {},
        }
        if name != NOT_KNOWN and others.any():
            common = np.flatnonzero((lesions >= MIN_CLASS_LESIONS).all(axis=0))
            gaps = _gaps(drawn_of_own, drawn(others, common), common)
            enough = bool((lesions.sum(axis=1) >= MIN_LESIONS).all())
            rows[str(name)]["gaps"] = {
                figure: {
                    **_with_interval(values),
                    "classes": None if of is None else [classes.names[k] for k in of],
                    "p": _p_value(values) if enough else None,
                    "flagged": False,
                }
                for figure, (values, of) in gaps.items()
            }
    return rows


def _lesions(predictions: Predictions, side: np.ndarray) -> np.ndarray:
    """Returns how many lesions of each class int [C] the images in bool [n] show."""
    labels, lesion_ids = predictions.labels, predictions.lesion_ids
    return np.array(
        [len(np.unique(lesion_ids[side & (labels == k)])) for k in range(len(predictions.classes))]
    )


def _with_interval(values: np.ndarray) -> dict[str, Any]:
    """Returns a figure's JSON from its own value and those of its resamples [1 + num_draws]."""
    interval = bootstrap.interval(values[1:])
    return {"value": None if interval is None else float(values[0]), "interval": interval}


def _gaps(
    own: dict[str, np.ndarray], others: dict[str, np.ndarray], common: np.ndarray
) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Returns a subgroup's gaps from `bootstrap.draws` of both sides.

    Args:
      own: of the subgroup.
      others: of the others.
      common: int [k], the classes that both sides have enough lesions of.

    Returns:
      {figure: (its gap in each resample, the labels compared or None)}.
    """
    gaps: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    for figure, of_class in (("balanced_accuracy", "sensitivity"), ("macro_auc", "auc")):
        differences = own[of_class][common] - others[of_class][common]
        defined = ~np.isnan(differences).any(axis=1)
        if defined.any():
            gaps[figure] = (differences[defined].mean(axis=0), common[defined])
    gaps["overconfidence"] = (own["overconfidence"] - others["overconfidence"], None)
    return gaps


def _p_value(values: np.ndarray) -> float:
    """Returns the two-sided normal p-value that the first of [1 + num_draws] is 0 but for noise."""
    deviation = values[1:].std(ddof=1)
    if deviation == 0:
        return float(values[0] == 0)
    return float(2 * stats.norm.sf(abs(values[0]) / deviation))


def _holm(p_values: Sequence[float]) -> list[bool]:
    """Returns which p-values Holm's step-down leaves significant at 1 - LEVEL."""
    order = np.argsort(p_values)
    bounds = (1 - bootstrap.LEVEL) / (len(p_values) - np.arange(len(p_values)))
    passed = np.logical_and.accumulate(np.array(p_values)[order] <= bounds)
    return passed[np.argsort(order)].tolist()
