"""Probabilities that mean what they say: of answers given with 0.8, eight in ten are right.

All methods work on probabilities, whose logarithms are logits up to a constant that no softmax
sees. So they need nothing but a predictions file, and `eval.tta` may have averaged before.

What they do to decisions differs. A network that was trained with a balanced loss or balanced
sampling gives the probabilities of a world in which the diagnoses are equally frequent.
Temperature scaling keeps the order of the classes, and with it every arg-max and the balanced
accuracy. Isotonic regression also brings back the frequencies of validation: better probabilities
for patients such as those, but rare diagnoses are named less often. On 2,048 validation
photographs, cross-fitted, EfficientNet-Lite0 with a logit-adjusted loss went from a balanced
accuracy of 0.739 (raw and temperature) to 0.683 (isotonic), and from 71 % of the melanomas named to
49 %, while log loss fell from 0.612 to 0.602 (temperature) and 0.505. That is why temperature is
the default.

What is fitted here is applied by `inference.calibrator`.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import optimize, special
from sklearn import isotonic, model_selection

from ham_jax.evaluation import metrics, selective
from ham_jax.evaluation.predictions import Predictions
from ham_jax.inference import decision
from ham_jax.inference.calibrator import METHODS, Calibrator, calibrate, logits
from ham_jax.inference.decision import Calibrated

NUM_FOLDS = 5  # of cross-fitting

HELD_OUT = ("test", "train")
"""Splits that a run's calibration is applied to as it is: it was fitted on validation."""

_TEMPERATURES = (0.05, 20.0)
_ROUNDING = 1e-9  # of a count of lesions
_CLUSTER = 20  # lesions: with half as many the threshold for 90 % is that of the worst or next
_QUANTILES = np.array([0.5, 0.6, 0.7, 0.8, 0.9])


def decide(
    predictions: Predictions,
    split: str,
    method: str,
    calibrator: Calibrator | None = None,
    folds: Sequence[np.ndarray] = (),
) -> Calibrated | None:
    """Returns calibrated probabilities and thresholds that no image had a part in.

    On validation, where a calibration is fitted, it is cross-fitted. On other images the run's own
    is applied as it is. Of a cross-validation each fold is cross-fitted, and they are joined.

    Args:
      predictions: raw.
      split: 'val', 'test', 'train' or 'crossval'.
      method: of calibration, to be in use.
      calibrator: of the run; only HELD_OUT splits need it.
      folds: of 'crossval', the rows that each fold validates.

    Returns:
      None where there is no calibrator, or a fold has too few lesions to hold any out.
    """
    if split in HELD_OUT:
        return None if calibrator is None else calibrator.apply(method, predictions.probabilities)
    if split != "crossval":
        return cross_fit(predictions, method)
    fitted = [cross_fit(predictions.take(rows), method) for rows in folds]
    parts = [part for part in fitted if part is not None]
    if not parts or len(parts) < len(folds):
        return None
    return decision.join(parts, np.concatenate(folds))


def fit(
    predictions: Predictions, fitted_on: Mapping[str, Any], methods: Sequence[str] = METHODS
) -> Calibrator:
    """Fits each method and its thresholds, for images of other lesions.

    The thresholds come from probabilities that were calibrated without the own lesion: those that
    a calibration was fitted to look surer than new ones. The order of the images changes no digit.

    Args:
      predictions: raw, of images that the network did not train on.
      fitted_on: what they are, see `Calibrator`.
      methods: of METHODS.
    """
    labels, raw = predictions.labels, predictions.probabilities
    parameters = {method: fit_method(method, labels, raw) for method in methods}
    held_out = {m: calibrate(parameters[m], m, raw).copy() for m in methods}
    for rest, out in folds(labels, predictions.lesion_ids):
        for method in methods:
            without = fit_method(method, labels[rest], raw[rest])
            held_out[method][out] = calibrate(without, method, raw[out])
    fitted = {}
    for method in methods:
        calibrated = predictions.with_probabilities(held_out[method])
        fitted[method] = {
            "parameters": parameters[method],
            "thresholds": fit_thresholds(calibrated),
            "sets": choose_sets(calibrated),
        }
    return Calibrator(predictions.classes, fitted, fitted_on)


def fit_method(method: str, labels: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """Fits a method on images that the network did not train on.

    The order of the images changes no digit.

    Args:
      method: of METHODS.
      labels: int [n].
      probabilities: float [n, C], raw.

    Returns:
      Its parameters, which JSON holds without loss:
      none: nothing.
      temperature: `temperature` T of softmax(log p / T), by log loss (Guo et al. 2017, arXiv
        1706.04599, section 4.2).
      isotonic: `x` and `y`, for each class the corners of a rising line through (p, truth), one
        class against the rest, to be normalised (Zadrozny & Elkan, KDD 2002). It ends 1 / (n + 2)
        above 0 and below 1: no finite number of images shows that a diagnosis is impossible.
    """
    order = np.lexsort([*probabilities.T, labels])
    fits = {"none": lambda *_: {}, "temperature": _fit_temperature, "isotonic": _fit_isotonic}
    return fits[method](labels[order], probabilities[order])


def fit_thresholds(predictions: Predictions) -> dict[str, Any]:
    """Fits the thresholds of the flag and of the prediction sets.

    A diagnosis is in the set where its probability reaches a threshold: split conformal prediction
    with the score 1 - p (Vovk et al. 2005; Sadinle, Lei & Wasserman, JASA 2019). `marginal` has
    one threshold for all diagnoses and covers the share of all; `class_conditional` has one a
    diagnosis and covers that share of each, the rare ones too; `clustered` lies between them: see
    `_clusters`.

    Photographs of one lesion are not exchangeable with those of another, lesions are. So each
    lesion weighs 1, shared by its photographs, and one more lesion, the next patient's, counts as
    uncovered: then a photograph of a new lesion is covered with at least that chance (Lee, Barber
    & Willett 2023, arXiv 2306.06342, hierarchical conformal prediction). With one photograph a
    lesion it is the usual quantile with ceil((n + 1) level). Where the lesions are too few to
    promise anything (fewer than 9 for 90 %) the threshold is 0: always in the set.

    Args:
      predictions: calibrated as those that the thresholds will be applied to; a lesion has one
        label.

    Returns:
      What JSON holds: `malignant`, the largest threshold of `decision.malignancy` that
      `decision.SENSITIVITY` of the malignant images reach (0 where there are none); `marginal`, a
      number; `class_conditional` [C]; `clustered` [C], that of all for a diagnosis without images.
    """
    labels, classes = predictions.labels, predictions.classes
    of_truth = predictions.probabilities[np.arange(len(labels)), labels]
    weights = selective.lesion_weights(predictions.lesion_ids)
    scores = decision.malignancy(predictions.probabilities, classes)
    scores = np.sort(scores[np.isin(labels, classes.malignant_labels)])[::-1]
    needed = math.ceil(decision.SENSITIVITY * len(scores) - _ROUNDING)
    marginal = _conformal(of_truth, weights)
    clustered = [marginal] * len(classes)
    for cluster in _clusters(labels, of_truth, weights):
        inside = np.isin(labels, cluster)
        threshold = _conformal(of_truth[inside], weights[inside])
        for k in cluster:
            clustered[k] = threshold
    return {
        "malignant": float(scores[needed - 1]) if len(scores) else 0.0,
        "marginal": marginal,
        "class_conditional": [
            _conformal(of_truth[labels == k], weights[labels == k]) for k in range(len(classes))
        ],
        "clustered": clustered,
    }


def choose_sets(predictions: Predictions) -> dict[str, Any]:
    """Chooses the kind of set that is shown, by validation alone.

    The strongest promise that is still useful: of decision.KINDS the first whose sets name at most
    `decision.widest_useful` diagnoses on average, measured on lesions that their thresholds were
    not fitted on. Where none does, the kind with the smallest sets.

    Args:
      predictions: calibrated, each image without its own lesion.

    Returns:
      See `Calibrated.choice`; JSON holds it.
    """
    labels, p = predictions.labels, predictions.probabilities
    sets = {kind: np.zeros(p.shape, bool) for kind in decision.KINDS}
    everything = np.arange(len(labels))
    for rest, out in folds(labels, predictions.lesion_ids) or [(everything, everything)]:
        thresholds = fit_thresholds(predictions.take(rest))
        for kind, members in sets.items():
            members[out] = p[out] >= np.array(thresholds[kind])
    sizes = {kind: float(members.sum(axis=1).mean()) for kind, members in sets.items()}
    widest = decision.widest_useful(len(predictions.classes))
    useful = [kind for kind in decision.KINDS if sizes[kind] <= widest]
    kind = useful[0] if useful else min(sizes, key=sizes.__getitem__)
    found = selective.set_numbers(predictions, sets[kind])
    told = ("mean_size", "coverage", "coverage_per_class")
    return {"kind": kind, **{name: found[name] for name in told}, "useful": bool(useful)}


def cross_fit(predictions: Predictions, method: str) -> Calibrated | None:
    """Returns what is said of validation, each fold of lesions by what the others say.

    Args:
      predictions: raw.
      method: of calibration, to be in use.

    Returns:
      None where the lesions are too few to hold any out.
    """
    labels, raw = predictions.labels, predictions.probabilities
    held_out = folds(labels, predictions.lesion_ids)
    if not held_out:
        return None
    others = [name for name in METHODS if name != method]
    parts = []
    for rest, out in held_out:
        part = fit(predictions.take(rest), {}, (method,)).apply(method, raw[out])
        more = {
            name: calibrate(fit_method(name, labels[rest], raw[rest]), name, raw[out])
            for name in others
        }
        parts.append(dataclasses.replace(part, by_method={**part.by_method, **more}))
    return decision.join(parts, np.concatenate([out for _, out in held_out]))


def folds(labels: np.ndarray, lesion_ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns (rows to fit on, rows held out) a fold; together the latter are all rows.

    Whole lesions are assigned to folds, stratified by diagnosis. The folds depend on the set of
    lesions, not on the order of the rows. There are NUM_FOLDS, or fewer where the lesions do not
    suffice, and none where no two lesions are of the same class: nothing can be held out.

    Args:
      labels: int [n].
      lesion_ids: [n]; a lesion has one label.
    """
    _, first, lesion = np.unique(np.asarray(lesion_ids), return_index=True, return_inverse=True)
    of_lesion = np.asarray(labels)[first]
    num_folds = min(NUM_FOLDS, int(np.bincount(of_lesion).max()))
    if num_folds < 2:
        return []
    splitter = model_selection.StratifiedKFold(num_folds, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        # A class with fewer lesions than folds is absent from some, which is all right here.
        warnings.filterwarnings("ignore", message="The least populated class")
        parts = list(splitter.split(of_lesion, of_lesion))
    return [
        (np.flatnonzero(np.isin(lesion, rest)), np.flatnonzero(np.isin(lesion, held_out)))
        for rest, held_out in parts
    ]


def measure(predictions: Predictions, calibrated: Calibrated, cross_fitted: bool) -> dict[str, Any]:
    """Returns metrics.json's sections `calibration` and `decision`.

    Args:
      predictions: of the images.
      calibrated: what is said of them.
      cross_fitted: whether they are those that the run's calibration was fitted on.
    """
    used = calibrated.method
    by_method = {
        name: predictions.with_probabilities(probabilities)
        for name, probabilities in calibrated.by_method.items()
    }
    return {
        "calibration": {
            "method": used,
            "cross_fitted": cross_fitted,
            **{name: measure_method(of_method) for name, of_method in by_method.items()},
            "reliability": {
                name: reliability(by_method[name]) for name in dict.fromkeys(("none", used))
            },
        },
        "decision": selective.measure(predictions, calibrated),
    }


def measure_method(predictions: Predictions) -> dict[str, float]:
    """Returns how far probabilities can be taken at their word.

    Returns:
      balanced_accuracy, log_loss, expected_calibration_error (15 bins of equal width): see
      `metrics.compute`; brier_score: the squared distance from the truth, summed over the classes,
      0 to 2 (Brier 1950); expected_calibration_error_equal_mass: of bins of equal size.
    """
    numbers = metrics.compute(predictions)
    truth = np.eye(len(predictions.classes))[predictions.labels]
    distance = ((predictions.probabilities - truth) ** 2).ravel()
    bins = reliability(predictions, equal_mass=True)
    gaps = [
        n * abs(confidence - accuracy)
        for n, confidence, accuracy in zip(
            bins["num_images"], bins["confidence"], bins["accuracy"], strict=True
        )
        if n
    ]
    return {
        "balanced_accuracy": numbers["balanced_accuracy"],
        "log_loss": numbers["log_loss"],
        "brier_score": math.fsum(distance) / len(predictions),
        "expected_calibration_error": numbers["expected_calibration_error"],
        "expected_calibration_error_equal_mass": math.fsum(gaps) / len(predictions),
    }


def reliability(predictions: Predictions, equal_mass: bool = False) -> dict[str, list]:
    """Returns the table of a reliability diagram of the arg-max.

    Args:
      predictions: n images.
      equal_mass: bins of about the same number of images instead of the same width; equal
        confidences are never torn apart.

    Returns:
      edges: of the bins (low, high]; num_images, confidence (their mean) and accuracy: a number a
      bin, the last two None where it is empty.
    """
    correct = metrics.correct_answers(predictions)
    confidence = predictions.probabilities.max(axis=-1)
    edges = np.linspace(0, 1, metrics.NUM_BINS + 1)
    if equal_mass:
        inner = np.quantile(confidence, edges[1:-1], method="inverted_cdf")
        edges = np.unique([0.0, *inner, 1.0])
    bins = np.digitize(confidence, edges[1:-1], right=True)
    inside = [bins == b for b in range(len(edges) - 1)]
    counts = [int(b.sum()) for b in inside]
    return {
        "edges": edges.tolist(),
        "num_images": counts,
        "confidence": [
            math.fsum(confidence[b]) / n if n else None for b, n in zip(inside, counts, strict=True)
        ],
        "accuracy": [
            int(correct[b].sum()) / n if n else None for b, n in zip(inside, counts, strict=True)
        ],
    }


def _fit_temperature(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    raw = logits(probabilities)

    def loss(log_temperature: float) -> float:
        scaled = raw * math.exp(-log_temperature)
        truth = np.take_along_axis(scaled, labels[:, None], axis=-1)[:, 0]
        return float((special.logsumexp(scaled, axis=-1) - truth).mean())

    found = optimize.minimize_scalar(
        loss, bounds=np.log(_TEMPERATURES), method="bounded", options={"xatol": 1e-8}
    )
    return {"temperature": math.exp(found.x)}


def _fit_isotonic(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, list[list[float]]]:
    end = 1 / (len(labels) + 2)
    x, y = [], []
    for k, column in enumerate(probabilities.T):
        line = isotonic.IsotonicRegression(y_min=end, y_max=1 - end, out_of_bounds="clip")
        line.fit(column, labels == k)
        x.append(line.X_thresholds_.tolist())
        y.append(line.y_thresholds_.tolist())
    return {"x": x, "y": y}


def _clusters(labels: np.ndarray, of_truth: np.ndarray, weights: np.ndarray) -> list[list[int]]:
    """Returns groups of diagnoses that are alike, each of at least _CLUSTER lesions if it can be.

    Diagnoses are alike whose probabilities of the truth are spread alike, compared by five
    quantiles (Ding et al., Class-Conditional Conformal Prediction with Many Classes, NeurIPS 2023,
    section 2.2). Instead of their k-means on a part of the lesions, which seven diagnoses are too
    few for, the smallest group is joined to the one most like it until all are large enough.

    Args:
      labels: int [n].
      of_truth: the probability of the true diagnosis, float [n].
      weights: of `selective.lesion_weights`, float [n].
    """

    def spread(cluster: list[int]) -> np.ndarray:
        inside = np.isin(labels, cluster)
        values, part = of_truth[inside], weights[inside]
        order = np.lexsort((part, -values))
        reached = np.cumsum(part[order])
        return np.interp(_QUANTILES * reached[-1], reached, values[order])

    clusters = [[int(k)] for k in np.unique(labels)]
    sizes = [math.fsum(weights[labels == k]) for (k,) in clusters]
    spreads = [spread(cluster) for cluster in clusters]
    while len(clusters) > 1 and min(sizes) < _CLUSTER - _ROUNDING:
        smallest = int(np.argmin(sizes))
        cluster, size, own = clusters.pop(smallest), sizes.pop(smallest), spreads.pop(smallest)
        nearest = int(np.argmin([abs(other - own).sum() for other in spreads]))
        clusters[nearest] += cluster
        sizes[nearest] += size
        spreads[nearest] = spread(clusters[nearest])
    return clusters


def _conformal(of_truth: np.ndarray, weights: np.ndarray) -> float:
    """Returns the largest threshold that LEVEL of the lesions, and one more, reach; else 0."""
    values, place = np.unique(-of_truth, return_inverse=True)
    reached = np.cumsum(np.bincount(place, weights=weights, minlength=len(values)))
    needed = decision.LEVEL * (weights.sum() + 1) - _ROUNDING
    enough = np.flatnonzero(reached >= needed)
    return float(-values[enough[0]]) if len(enough) else 0.0
