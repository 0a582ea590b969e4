"""A run's `calibration.json`: from what the network says to what a person is told.

It holds the calibration of each method, with the thresholds that belong to its probabilities, so
that whatever `eval.calibration` says, flags and sets are on the scale of the probabilities beside
them. The file is applied as it is; how it is fitted: `evaluation.calibration`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ham_jax import DISCLAIMER, files
from ham_jax.classes import Classes
from ham_jax.config import InputError
from ham_jax.inference import decision
from ham_jax.inference.decision import Calibrated

FILE = "calibration.json"

METHODS = ("none", "temperature", "isotonic")

_CHECKSUM = "sha256"  # of the rest: a changed digit of a threshold would look like any other
_SETTINGS = {
    "step": "step",
    "tta": "eval.tta",
    "tiles": "eval.tiles",
    "crop_scale": "eval.crop_scale",
    "weights": "weights",
}
_EARLIER = {"tiles": 1}  # what files of versions without these settings were fitted on
_TINY = np.finfo(float).eps  # what log loss counts a probability as at least


def logits(probabilities: np.ndarray) -> np.ndarray:
    """Returns their logarithms: logits, up to a constant that no softmax sees."""
    return np.log(np.maximum(probabilities, _TINY))


def calibrate(parameters: Mapping[str, Any], method: str, probabilities: np.ndarray) -> np.ndarray:
    """Returns calibrated probabilities float64 [n, C]; each row depends on nothing but itself.

    Args:
      parameters: of the method, see `evaluation.calibration.fit_method`.
      method: one of METHODS.
      probabilities: float [n, C], raw.
    """
    if method == "none":
        return np.asarray(probabilities, float)
    if method == "isotonic":
        lines = zip(probabilities.T, parameters["x"], parameters["y"], strict=True)
        columns = np.stack([np.interp(p, x, y) for p, x, y in lines], axis=-1)
        return columns / columns.sum(axis=-1, keepdims=True)
    scaled = logits(probabilities) / parameters["temperature"]
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Calibrator:
    """What a calibration.json says.

    Attributes:
      classes: C of them.
      methods: {method: {'parameters': of `calibrate`, 'thresholds': {`malignant`: a number,
        `marginal`: a number, `class_conditional`: C numbers}}}.
      fitted_on: split, step, tta, tiles, crop_scale, weights, records, num_images, num_lesions.
    """

    classes: Classes
    methods: Mapping[str, Mapping[str, Any]]
    fitted_on: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def apply(self, method: str, probabilities: np.ndarray) -> Calibrated:
        """Returns what is said of images that nothing was fitted on.

        Args:
          method: to be in use.
          probabilities: float64 [n, C], raw.
        """
        return Calibrated(
            self.classes,
            method,
            {
                name: calibrate(fitted["parameters"], name, probabilities)
                for name, fitted in self.methods.items()
            },
            {
                name: np.broadcast_to(value, (len(probabilities), *np.shape(value)))
                for name, value in self.methods[method]["thresholds"].items()
            },
        )

    def mismatch(self, provenance: Mapping[str, Any]) -> str:
        """Returns in which settings probabilities differ from those it was fitted on; else ''."""
        now, then = _EARLIER | dict(provenance), _EARLIER | dict(self.fitted_on)
        return ", ".join(
            f"{name} = {now.get(key)} (calibrated with {then.get(key)})"
            for key, name in _SETTINGS.items()
            if now.get(key) != then.get(key)
        )

    def write(self, workdir: Path) -> None:
        """Writes a run's calibration.json, whole or not at all."""
        content = {
            "fitted_on": dict(self.fitted_on),
            "classes": list(self.classes),
            "level": decision.LEVEL,
            "sensitivity": decision.SENSITIVITY,
            "methods": self.methods,
            "note": DISCLAIMER,
        }
        files.write_json(workdir / FILE, {**content, _CHECKSUM: _checksum(content)})


def read(workdir: Path, classes: Classes) -> Calibrator | None:
    """Returns what `Calibrator.write` wrote, or None where there is no such file.

    Args:
      workdir: of the run.
      classes: of the run.

    Raises:
      InputError: the file is damaged, of other classes, or of another version.
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
        methods = {name: _of_one_level(content["methods"][name], content) for name in METHODS}
        calibrator = Calibrator(classes, methods, dict(content["fitted_on"]))
        calibrator.apply("none", np.full((1, len(classes)), 1 / len(classes)))
        if content["classes"] != list(classes):
            raise ValueError(content["classes"])
    # OverflowError: a number of 400 digits.
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{path} was not written by this version of ham_jax. {how_to_make(workdir)}"
        ) from error
    return calibrator


def how_to_make(workdir: Path) -> str:
    """Returns the sentence that says how a run gets its calibration."""
    return f"Make it with --mode=eval --split=val --workdir={workdir}."


def _of_one_level(fitted: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a method's entry; of a file of several levels, as version 0.1 wrote it, at LEVEL."""
    thresholds = dict(fitted["thresholds"])
    if "levels" in content:
        place = content["levels"].index(decision.LEVEL)
        thresholds |= {kind: thresholds[kind][place] for kind in decision.KINDS}
    elif content["level"] != decision.LEVEL:
        raise ValueError(content["level"])
    return {"parameters": fitted["parameters"], "thresholds": thresholds}


def _checksum(content: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of what a file says, however it is laid out."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
