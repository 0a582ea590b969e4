"""Probabilities that mean what they say: of answers given with 0.8, eight in ten are right.

All methods work on probabilities, whose logarithms are logits up to a constant that no softmax
sees. So they need nothing but a predictions file, and `eval.tta` may have averaged before.

What they do to decisions differs. A network that was trained with a balanced loss or balanced
sampling gives the probabilities of a world in which the seven diagnoses are equally frequent.
Temperature scaling keeps the order of the classes, and with it every arg-max and the balanced
accuracy. Vector scaling and isotonic regression also bring back the frequencies of validation:
better probabilities for patients such as those, but rare diagnoses are named less often. On 2,048
validation photographs, cross-fitted, EfficientNet-Lite0 with a logit-adjusted loss went from a
balanced accuracy of 0.739 (raw and temperature) to 0.650 (vector) and 0.683 (isotonic), and from
71 % of the melanomas named to 44 % and 49 %, while log loss fell from 0.612 to 0.602 (temperature),
0.482 and 0.505. That is why temperature is the default.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import optimize, special
from sklearn import isotonic, model_selection

from ham_jax import config
from ham_jax.evaluation import metrics

METHODS = config.key("eval.calibration").choices
NUM_FOLDS = 5  # of cross-fitting

_TINY = np.finfo(float).eps  # what log loss counts a probability as at least
_TEMPERATURES = (0.05, 20.0)


def fit(
    labels: np.ndarray, probabilities: np.ndarray, methods: Sequence[str] = METHODS
) -> dict[str, dict[str, Any]]:
    """Fits each method on images that the network did not train on.

    The order of the images changes no digit.

    Args:
      labels: int [n].
      probabilities: float [n, c].
      methods: of METHODS.

    Returns:
      {method: its parameters}, which JSON holds without loss:
      none: nothing.
      temperature: `temperature` T of softmax(log p / T), by log loss (Guo et al. 2017, arXiv
        1706.04599, section 4.2).
      vector: `scale` w and `bias` b, [c] each, of softmax(w log p + b), by log loss (the same
        section) with a normal prior around w = 1, b = 0, which few images do not overcome.
      isotonic: `x` and `y`, for each class the corners of a rising line through (p, truth), one
        class against the rest, to be normalised (Zadrozny & Elkan, KDD 2002). It ends 1 / (n + 2)
        above 0 and below 1: no finite number of images shows that a diagnosis is impossible.

    Raises:
      ValueError: no images, or shapes that do not belong together.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, float)
    if not len(labels) or probabilities.shape[:-1] != labels.shape:
        raise ValueError(f"labels {labels.shape} and probabilities {probabilities.shape}")
    order = np.lexsort([*probabilities.T, labels])
    fits = {
        "none": lambda *_: {},
        "temperature": _fit_temperature,
        "vector": _fit_vector,
        "isotonic": _fit_isotonic,
    }
    return {method: fits[method](labels[order], probabilities[order]) for method in methods}


def apply(
    fitted: Mapping[str, Mapping[str, Any]], method: str, probabilities: np.ndarray
) -> np.ndarray:
    """Returns calibrated probabilities float64 [n, c]; each row depends on nothing but itself.

    Args:
      fitted: what `fit` returned.
      method: one of its keys.
      probabilities: float [n, c].
    """
    parameters = fitted[method]
    if method == "none":
        return np.asarray(probabilities, float)
    if method == "isotonic":
        lines = zip(probabilities.T, parameters["x"], parameters["y"], strict=True)
        columns = np.stack([np.interp(p, x, y) for p, x, y in lines], axis=-1)
        return columns / columns.sum(axis=-1, keepdims=True)
    if method == "temperature":
        return special.softmax(_logits(probabilities) / parameters["temperature"], axis=-1)
    scaled = _logits(probabilities) * parameters["scale"] + parameters["bias"]
    return special.softmax(scaled, axis=-1)


def folds(labels: np.ndarray, groups: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns (rows to fit on, rows held out) a fold; together the latter are all rows.

    Lesions are dealt, stratified by diagnosis, so that a lesion's images stay together. The folds
    depend on the set of lesions, not on the order of the rows. There are NUM_FOLDS, or fewer where
    the lesions do not suffice, and none where no two lesions are alike: nothing can be held out.

    Args:
      labels: int [n].
      groups: [n], the lesion of each image; a lesion has one label.
    """
    _, first, lesion = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
    of_lesion = np.asarray(labels)[first]
    num_folds = min(NUM_FOLDS, np.bincount(of_lesion).max())
    if num_folds < 2:
        return []
    dealer = model_selection.StratifiedKFold(num_folds, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        # A class with fewer lesions than folds is absent from some, which is all right here.
        warnings.filterwarnings("ignore", message="The least populated class")
        dealt = list(dealer.split(of_lesion, of_lesion))
    return [
        (np.flatnonzero(np.isin(lesion, rest)), np.flatnonzero(np.isin(lesion, held_out)))
        for rest, held_out in dealt
    ]


def measure(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Returns how far probabilities can be taken at their word.

    Args:
      labels: int [n], indices in CLASSES.
      probabilities: float [n, 7].

    Returns:
      balanced_accuracy, log_loss, expected_calibration_error (15 bins of equal width): see
      `metrics.compute`; brier_score: the squared distance from the truth, summed over the classes,
      0 to 2 (Brier 1950); expected_calibration_error_equal_mass: of bins of equal size.

    Raises:
      ValueError: as `metrics.compute`.
    """
    numbers = metrics.compute(labels, probabilities)
    distance = ((probabilities - np.eye(probabilities.shape[-1])[labels]) ** 2).ravel()
    bins = reliability(labels, probabilities, equal_mass=True)
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
        "brier_score": math.fsum(distance) / len(labels),
        "expected_calibration_error": numbers["expected_calibration_error"],
        "expected_calibration_error_equal_mass": math.fsum(gaps) / len(labels),
    }


def reliability(
    labels: np.ndarray, probabilities: np.ndarray, equal_mass: bool = False
) -> dict[str, list]:
    """Returns the table of a reliability diagram of the arg-max.

    Args:
      labels: int [n].
      probabilities: float [n, c].
      equal_mass: bins of about the same number of images instead of the same width; equal
        confidences are never torn apart.

    Returns:
      edges: of the bins (low, high]; num_images, confidence (their mean) and accuracy: a number a
      bin, the last two None where it is empty.
    """
    correct = metrics.correct_answers(labels, probabilities)
    confidence = np.asarray(probabilities, float).max(axis=-1)
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


def _logits(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities, _TINY))


def _fit_temperature(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    logits = _logits(probabilities)

    def loss(log_temperature: float) -> float:
        scaled = logits * math.exp(-log_temperature)
        truth = np.take_along_axis(scaled, labels[:, None], axis=-1)[:, 0]
        return float((special.logsumexp(scaled, axis=-1) - truth).mean())

    found = optimize.minimize_scalar(
        loss, bounds=np.log(_TEMPERATURES), method="bounded", options={"xatol": 1e-8}
    )
    return {"temperature": math.exp(found.x)}


def _fit_vector(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, list[float]]:
    logits = _logits(probabilities)
    n, c = logits.shape
    truth = np.eye(c)[labels]
    identity = np.repeat([1.0, 0.0], c)

    def loss_and_gradient(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        scaled = logits * parameters[:c] + parameters[c:]
        log_p = special.log_softmax(scaled, axis=-1)
        error = np.exp(log_p) - truth
        away = parameters - identity
        gradient = np.concatenate([(error * logits).sum(0), error.sum(0)]) + away
        return (away @ away / 2 - (log_p * truth).sum()) / n, gradient / n

    found = optimize.minimize(
        loss_and_gradient, identity, jac=True, method="L-BFGS-B", options={"gtol": 1e-7}
    )
    return {"scale": found.x[:c].tolist(), "bias": found.x[c:].tolist()}


def _fit_isotonic(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, list[list[float]]]:
    end = 1 / (len(labels) + 2)
    x, y = [], []
    for k, column in enumerate(probabilities.T):
        line = isotonic.IsotonicRegression(y_min=end, y_max=1 - end, out_of_bounds="clip")
        line.fit(column, labels == k)
        x.append(line.X_thresholds_.tolist())
        y.append(line.y_thresholds_.tolist())
    return {"x": x, "y": y}
