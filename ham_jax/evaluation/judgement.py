"""A run's `calibration.json`: from what the network says to what a person is told.

It holds the calibration of each method, with the thresholds that belong to its probabilities, so
that whatever `eval.calibration` says, flags and sets are on the scale of the probabilities beside
them. On other images the file is applied as it is. On validation itself, where it was fitted, the
whole of it is fitted anew without each fold of lesions and applied to that fold.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ham_jax import CLASSES, DISCLAIMER, files
from ham_jax.config import InputError
from ham_jax.evaluation import calibration, decision

FILE = "calibration.json"

Fitted = Mapping[str, Mapping[str, Any]]
"""{method: {'parameters': of `calibration.fit`, 'thresholds': of `decision.fit`}}"""

_CHECKSUM = "sha256"  # of the rest: a changed digit of a threshold would look like any other
_ON = {"step": "step", "tta": "eval.tta", "crop_scale": "eval.crop_scale", "weights": "weights"}


@dataclasses.dataclass(frozen=True)
class Judgement:
    """Calibrated probabilities of images and the thresholds that hold for each of them.

    Attributes:
      method: of calibration, in use.
      by_method: {method: probabilities float64 [n, 7]}.
      thresholds: `decision.Thresholds` with a row an image, for the method in use.
    """

    method: str
    by_method: Mapping[str, np.ndarray]
    thresholds: Mapping[str, np.ndarray]

    @property
    def probabilities(self) -> np.ndarray:
        """Those of the method in use, float64 [n, 7]."""
        return self.by_method[self.method]


def fit(
    labels: np.ndarray,
    probabilities: np.ndarray,
    groups: np.ndarray,
    methods: Sequence[str] = calibration.METHODS,
) -> dict[str, dict[str, Any]]:
    """Fits each method and its thresholds, for images of other lesions.

    The thresholds come from probabilities that were calibrated without the own lesion: those that
    a calibration was fitted to look surer than new ones.

    Args:
      labels: int [n], indices in CLASSES.
      probabilities: float64 [n, 7], raw.
      groups: [n], the lesion of each image.
      methods: of calibration.METHODS.

    Returns:
      `Fitted`, as JSON holds it.
    """
    fitted = calibration.fit(labels, probabilities, methods)
    dealt = calibration.folds(labels, groups)
    held_out = {m: calibration.apply(fitted, m, probabilities).copy() for m in methods}
    for rest, out in dealt:
        without = calibration.fit(labels[rest], probabilities[rest], methods)
        for method in methods:
            held_out[method][out] = calibration.apply(without, method, probabilities[out])
    return {
        method: {
            "parameters": fitted[method],
            "thresholds": decision.fit(labels, held_out[method], groups),
        }
        for method in methods
    }


def apply(fitted: Fitted, method: str, probabilities: np.ndarray) -> Judgement:
    """Returns the judgement of images that nothing was fitted on.

    Args:
      fitted: of the run.
      method: to be in use.
      probabilities: float64 [n, 7], raw.
    """
    parameters = {name: of_method["parameters"] for name, of_method in fitted.items()}
    thresholds = {
        name: np.broadcast_to(value, (len(probabilities), *np.shape(value)))
        for name, value in fitted[method]["thresholds"].items()
    }
    by_method = {name: calibration.apply(parameters, name, probabilities) for name in fitted}
    return Judgement(method, by_method, thresholds)


def cross_fit(
    labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray, method: str
) -> Judgement | None:
    """Returns the judgement of validation, each fold of lesions by what the others say.

    Args:
      labels: int [n], indices in CLASSES.
      probabilities: float64 [n, 7], raw.
      groups: [n], the lesion of each image.
      method: to be in use.

    Returns:
      None where the lesions are too few to hold any out.
    """
    dealt = calibration.folds(labels, groups)
    if not dealt:
        return None
    others = [name for name in calibration.METHODS if name != method]
    parts = []
    for rest, out in dealt:
        fitted = fit(labels[rest], probabilities[rest], groups[rest], (method,))
        judged = apply(fitted, method, probabilities[out])
        beside = calibration.fit(labels[rest], probabilities[rest], others)
        more = {name: calibration.apply(beside, name, probabilities[out]) for name in others}
        parts.append(dataclasses.replace(judged, by_method={**judged.by_method, **more}))
    return join(parts, np.concatenate([out for _, out in dealt]))


def join(parts: Sequence[Judgement], places: np.ndarray) -> Judgement:
    """Returns the judgement of all images from those of disjoint parts of them.

    Args:
      parts: of the same method.
      places: int [n], a permutation: where each image of the first part goes, of the second, ...
    """
    order = np.argsort(places)
    return _combine(parts, lambda arrays: np.concatenate(arrays)[order])


def mean(members: Sequence[Judgement]) -> Judgement:
    """Returns the judgement of an ensemble: means of probabilities and of thresholds.

    Each member goes by its own method; where they differ, `method` names them all.

    No image is validation to all folds of a cross-validation, so an ensemble's own thresholds
    cannot be fitted. What its members promise each by itself is not promised for their mean.
    """
    combined = _combine(members, lambda arrays: np.mean(arrays, axis=0))
    method = ", ".join(dict.fromkeys(member.method for member in members))
    in_use = {method: np.mean([member.probabilities for member in members], axis=0)}
    return Judgement(method, {**combined.by_method, **in_use}, combined.thresholds)


def _combine(parts: Sequence[Judgement], how) -> Judgement:
    first = parts[0]
    return Judgement(
        first.method,
        {name: how([part.by_method[name] for part in parts]) for name in first.by_method},
        {name: how([part.thresholds[name] for part in parts]) for name in first.thresholds},
    )


def measure(
    labels: np.ndarray, groups: np.ndarray, judgement: Judgement, cross_fitted: bool
) -> dict[str, Any]:
    """Returns metrics.json's sections `calibration` and `decision`.

    Args:
      labels: int [n], indices in CLASSES.
      groups: [n], the lesion of each image.
      judgement: of these images.
      cross_fitted: whether they are those that the run's calibration was fitted on.
    """
    used = judgement.method
    return {
        "calibration": {
            "method": used,
            "cross_fitted": cross_fitted,
            **{
                name: calibration.measure(labels, probabilities)
                for name, probabilities in judgement.by_method.items()
            },
            "reliability": {
                name: calibration.reliability(labels, judgement.by_method[name])
                for name in dict.fromkeys(("none", used))
            },
        },
        "decision": decision.measure(labels, judgement.probabilities, groups, judgement.thresholds),
    }


def write(workdir: Path, fitted: Fitted, fitted_on: Mapping[str, Any]) -> None:
    """Writes a run's calibration.json.

    Args:
      workdir: of the run.
      fitted: of its validation.
      fitted_on: split, step, tta, crop_scale, weights, records, num_images, num_lesions.
    """
    content = {
        "fitted_on": fitted_on,
        "classes": CLASSES,
        "levels": decision.LEVELS,
        "sensitivity": decision.SENSITIVITY,
        "methods": fitted,
        "note": DISCLAIMER,
    }
    files.write_json(workdir / FILE, {**content, _CHECKSUM: _checksum(content)})


def read(workdir: Path) -> tuple[Fitted, dict[str, Any]] | None:
    """Returns what `write` wrote, (fitted, fitted_on), or None where there is no such file.

    Raises:
      InputError: the file is damaged, or of another version.
    """
    path = workdir / FILE
    try:
        content = files.read_json(path, how_to_make(workdir))
    except FileNotFoundError:
        return None
    # Files of earlier versions have no checksum.
    if content.pop(_CHECKSUM, None) not in (None, _checksum(content)):
        raise InputError(
            f"{path} has changed since it was written: its checksum is another."
            f" {how_to_make(workdir)}"
        )
    try:
        fitted = {method: content["methods"][method] for method in calibration.METHODS}
        same = content["classes"] == list(CLASSES) and content["levels"] == list(decision.LEVELS)
        apply(fitted, "none", np.full((1, len(CLASSES)), 1 / len(CLASSES)))
        fitted_on = dict(content["fitted_on"])
    # OverflowError: a number of 400 digits.
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        same = False
    if not same:
        raise InputError(
            f"{path} is none that this version of ham_jax writes. {how_to_make(workdir)}"
        )
    return fitted, fitted_on


def _checksum(content: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of what a file says, however it is laid out."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def how_to_make(workdir: Path) -> str:
    """Returns the sentence that says how a run gets its calibration."""
    return f"Make it with --mode=eval --split=val --workdir={workdir}."


def mismatch(fitted_on: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """Returns in which settings probabilities differ from those of a calibration; else ''."""
    return ", ".join(
        f"{name} = {about[key]} (calibrated with {fitted_on.get(key)})"
        for key, name in _ON.items()
        if about[key] != fitted_on.get(key)
    )
