"""From calibrated probabilities to what a person can act on: a set of diagnoses, and a flag.

Thresholds hold for probabilities of the same calibration only. A photograph on a threshold counts
as above it. How they are fitted: `evaluation.calibration.fit`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ham_jax.classes import Classes

LEVEL = 0.9
"""The coverage that prediction sets are made for."""

SENSITIVITY = 0.95
"""The share of malignant photographs that the flag is to find."""

KINDS = ("marginal", "class_conditional")
"""What a set promises to cover: that share of all photographs, or of each diagnosis."""


def malignancy(probabilities: np.ndarray, classes: Classes) -> np.ndarray:
    """Returns the sum of the malignant classes' probabilities, float [n] of [n, C]."""
    columns = [probabilities[..., label] for label in classes.malignant_labels]
    return sum(columns[1:], columns[0]) if columns else np.zeros(probabilities.shape[:-1])


@dataclasses.dataclass(frozen=True, eq=False)
class Calibrated:
    """Calibrated probabilities of images and the thresholds that hold for each of them.

    Attributes:
      classes: C of them.
      method: of calibration, in use.
      by_method: {method: probabilities float64 [n, C]}.
      thresholds: `malignant` [n], `marginal` [n] and `class_conditional` [n, C], float64, for the
        method in use.
    """

    classes: Classes
    method: str
    by_method: Mapping[str, np.ndarray]
    thresholds: Mapping[str, np.ndarray]

    @property
    def probabilities(self) -> np.ndarray:
        """Those of the method in use, float64 [n, C]."""
        return self.by_method[self.method]

    @property
    def malignancy(self) -> np.ndarray:
        """The probability of any malignant class, float64 [n]."""
        return malignancy(self.probabilities, self.classes)

    @property
    def flagged(self) -> np.ndarray:
        """Whether each image is flagged as malignant, bool [n]; none is where no class is."""
        reached = self.malignancy >= self.thresholds["malignant"]
        return reached & bool(self.classes.malignant)

    def sets(self, kind: str) -> np.ndarray:
        """Returns which diagnoses are in each image's set, bool [n, C]; `kind` is one of KINDS."""
        least = self.thresholds[kind]
        return self.probabilities >= (least if least.ndim == 2 else least[:, None])


def join(parts: Sequence[Calibrated], places: np.ndarray) -> Calibrated:
    """Returns what is said of all images from disjoint parts of them, of the same method.

    Args:
      parts: of the same classes.
      places: int [n], a permutation: where each image of the first part goes, of the second, ...
    """
    order = np.argsort(places)
    return _combine(parts, lambda arrays: np.concatenate(arrays)[order])


def mean(members: Sequence[Calibrated]) -> Calibrated:
    """Returns what an ensemble says: means of probabilities and of thresholds.

    Each member goes by its own method; where they differ, `method` names them all.

    No image is validation to all folds of a cross-validation, so an ensemble's own thresholds
    cannot be fitted. What its members promise each by itself is not promised for their mean.
    """
    combined = _combine(members, lambda arrays: np.mean(arrays, axis=0))
    method = ", ".join(dict.fromkeys(member.method for member in members))
    in_use = {method: np.mean([member.probabilities for member in members], axis=0)}
    return dataclasses.replace(combined, method=method, by_method={**combined.by_method, **in_use})


def _combine(
    parts: Sequence[Calibrated], how: Callable[[list[np.ndarray]], np.ndarray]
) -> Calibrated:
    first = parts[0]
    return dataclasses.replace(
        first,
        by_method={name: how([part.by_method[name] for part in parts]) for name in first.by_method},
        thresholds={
            name: how([part.thresholds[name] for part in parts]) for name in first.thresholds
        },
    )
