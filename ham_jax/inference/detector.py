"""Is this an image like those of training? A distance in the space of the network's features.

A network answers any image with one of its classes, and surely at that. Here a Gaussian a class is
laid over the features of the training images; an image that is far from all of them is marked.
"""

import dataclasses
import functools
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ham_jax import files, reading

FILE = "ood.npz"
"""Its name in a run's folder."""

_MAX_BYTES = 256 << 20
"""4,096 features take half of it."""

# So few are multiplied by this thread alone: those of a BLAS wait busily for tens of milliseconds
# afterwards, on the cores that the network needs for the next photograph.
_FEW = 2


@dataclasses.dataclass(frozen=True)
class Detector:
    """Class means and one covariance of features, and how far is too far.

    Attributes:
      means: float64 [k, F], of the classes that training has.
      whitening: float64 [F, F], W with W W^T = the inverse covariance.
      threshold: the distance that a score of 1 stands for.
      provenance: what it was fitted on, as JSON can hold it.
    """

    means: np.ndarray
    whitening: np.ndarray
    threshold: float
    provenance: Mapping[str, Any]

    @functools.cached_property
    def _white_means(self) -> np.ndarray:
        return self.means @ self.whitening

    def distance(self, features: np.ndarray) -> np.ndarray:
        """Returns the Mahalanobis distance to the nearest class mean, float64 [n].

        Lee et al., A Simple Unified Framework for Detecting Out-of-Distribution Samples and
        Adversarial Attacks, NeurIPS 2018, eq. 2: here the root, and without the sign.

        Args:
          features: [n, F].
        """
        features = np.asarray(features, np.float64)
        if len(features) <= _FEW:
            white = np.einsum("nf,fg->ng", features, self.whitening)
        else:
            white = features @ self.whitening
        of_classes = [np.linalg.norm(white - mean, axis=1) for mean in self._white_means]
        return np.min(of_classes, axis=0)

    def score(self, features: np.ndarray) -> np.ndarray:
        """Returns the distance in thresholds, float64 [n]: above 1 is not like training."""
        return self.distance(features) / self.threshold

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            means=self.means,
            whitening=self.whitening,
            threshold=self.threshold,
            about=json.dumps(dict(self.provenance)),  # the name in files of all versions
        )
        files.write_bytes(path, buffer.getvalue())


def joined(scores: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Returns the score of an ensemble: the mean over the members that have one, [n] each."""
    known = [of_member for of_member in scores if of_member is not None]
    return np.mean(known, axis=0) if known else None


def load(path: Path) -> Detector | None:
    """Returns what `save` wrote; None where there is no such file.

    Raises:
      ValueError: it is damaged.
    """
    try:
        saved = reading.read_npz(path, _MAX_BYTES)
        return of(saved, reading.parse_json(str(saved["about"])))
    except FileNotFoundError:
        return None
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def of(arrays: Mapping[str, np.ndarray], provenance: Mapping[str, Any]) -> Detector:
    """Returns the model that a file's arrays are: `means`, `whitening` and `threshold`.

    Raises:
      KeyError, TypeError, ValueError: they are not.
    """
    means, whitening, threshold = (
        arrays[name].astype(np.float64, casting="safe")
        for name in ("means", "whitening", "threshold")
    )
    num = len(whitening)
    if (means.shape[1:], whitening.shape, threshold.shape) != ((num,), (num, num), ()):
        raise ValueError("its arrays are not of one size")
    if not (all(np.isfinite(x).all() for x in (means, whitening)) and 0 < threshold < np.inf):
        raise ValueError("it holds what is no finite number")
    return Detector(means, whitening, float(threshold), provenance)
