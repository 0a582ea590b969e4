"""From calibrated probabilities to what a person can act on: a set of diagnoses, and a flag.

Thresholds hold for probabilities of the same calibration only. A photograph on a threshold counts
as above it. How they are fitted: `evaluation.calibration.fit`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ham_jax.classes import Classes

LEVEL = 0.9
"""The coverage that prediction sets are made for."""

SENSITIVITY = 0.95
"""The share of malignant photographs that the flag is to find."""

KINDS = ("class_conditional", "clustered", "marginal")
"""What a set promises to cover, the most first: that share of each diagnosis, of each group of
diagnoses that are alike, or of all lesions."""

SHOWN = "shown"
"""The kind of set that a person is told: the one that validation chose, see `Calibrated.choice`."""

BEFORE_CHOICE = "class_conditional"
"""The kind that is shown where a calibration is of a version that did not choose."""

_PROMISES = {
    "class_conditional": "of each diagnosis",
    "clustered": "of each group of diagnoses that are alike (too few lesions for each alone)",
    "marginal": "taken together, not of each diagnosis",
}


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
      thresholds: `malignant` [n], `marginal` [n], and [n, C] `class_conditional`, `clustered`
        (where the calibration has it) and SHOWN, float64, for the method in use.
      choice: which kind is shown, and what its sets did on validation: `kind`, `mean_size`,
        `coverage`, `coverage_per_class` and `useful`; None where that is not one choice, or of a
        version that did not choose.
    """

    classes: Classes
    method: str
    by_method: Mapping[str, np.ndarray]
    thresholds: Mapping[str, np.ndarray]
    choice: Mapping[str, Any] | None = None

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
        """Returns which diagnoses are in each image's set, bool [n, C].

        Args:
          kind: SHOWN, or one of KINDS that has thresholds.
        """
        least = self.thresholds[kind]
        return self.probabilities >= (least if least.ndim == 2 else least[:, None])


def widest_useful(num_classes: int) -> float:
    """Returns how many diagnoses a set may name on average and still help.

    Beside one diagnosis it keeps at most a quarter of the others, and five in all.
    """
    return min(1 + (num_classes - 1) / 4, 5.0)


def sets_note(choice: Mapping[str, Any] | None, classes: Classes) -> str:
    """Returns in words what the sets that are shown promise and what they did; '' without a choice.

    Args:
      choice: see `Calibrated.choice`.
      classes: of the sets.
    """
    if choice is None:
        return ""
    size = f"{choice['mean_size']:.1f} of {len(classes)} diagnoses on average"
    if not choice["useful"]:
        return f"The sets are too wide to help: on validation they named {size}."
    covered = {dx: share for dx, share in choice["coverage_per_class"].items() if share is not None}
    said = (
        f"Each set is to hold the truth in {LEVEL:.0%} of the lesions"
        f" {_PROMISES[choice['kind']]}; on validation the sets held it in {choice['coverage']:.0%}"
    )
    if covered:
        least = min(covered, key=covered.__getitem__)
        said += f", least often of {classes.title(least)} ({covered[least]:.0%}),"
    return f"{said} and named {size}.".replace("%", " %")


def join(parts: Sequence[Calibrated], places: np.ndarray) -> Calibrated:
    """Returns what is said of all images from disjoint parts of them, of the same method.

    Args:
      parts: of the same classes.
      places: int [n], a permutation: where each image of the first part goes, of the second, ...
    """
    order = np.argsort(places)
    joined = _combine(parts, lambda arrays: np.concatenate(arrays)[order])
    return dataclasses.replace(joined, choice=None)


def mean(members: Sequence[Calibrated]) -> Calibrated:
    """Returns what an ensemble says: means of probabilities and of thresholds.

    Each member goes by its own method; where they differ, `method` names them all.

    No image is validation to all folds of a cross-validation, so an ensemble's own thresholds
    cannot be fitted. What its members promise each by itself is not promised for their mean.
    """
    combined = _combine(members, lambda arrays: np.mean(arrays, axis=0))
    method = ", ".join(dict.fromkeys(member.method for member in members))
    in_use = {method: np.mean([member.probabilities for member in members], axis=0)}
    return dataclasses.replace(
        combined,
        method=method,
        by_method={**combined.by_method, **in_use},
        choice=members[0].choice if len(members) == 1 else None,
    )


def _combine(
    parts: Sequence[Calibrated], how: Callable[[list[np.ndarray]], np.ndarray]
) -> Calibrated:
    first = parts[0]
    return dataclasses.replace(
        first,
        by_method={name: how([part.by_method[name] for part in parts]) for name in first.by_method},
        thresholds={
            name: how([part.thresholds[name] for part in parts])
            for name in first.thresholds
            if all(name in part.thresholds for part in parts)
        },
    )
