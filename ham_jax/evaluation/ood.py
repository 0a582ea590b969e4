"""Fits the out-of-distribution model that `inference.detector` applies."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn import covariance

from ham_jax.inference.detector import Detector

REJECTED = 0.05
"""Share of the validation images that the threshold may turn away."""


def fit(
    features: np.ndarray,
    labels: np.ndarray,
    val_features: np.ndarray,
    provenance: Mapping[str, Any],
) -> Detector:
    """Fits the Gaussians on training and the threshold on validation.

    The covariance is that of the features around their class's mean, shrunk towards a multiple of
    the identity (Ledoit and Wolf, J. Multivariate Analysis 88, 2004), for with more features than
    a few thousand images can tell apart it would have no inverse.

    Args:
      features: of training images, [n, F].
      labels: of the same, int [n].
      val_features: of validation images, [m, F].
      provenance: what they come from.

    Raises:
      ValueError: features that are all the same, or not finite.
    """
    present, of_class = np.unique(labels, return_inverse=True)
    features = np.asarray(features, np.float64)
    means = np.stack([features[of_class == k].mean(0) for k in range(len(present))])
    covered, _ = covariance.ledoit_wolf(features - means[of_class], assume_centered=True)
    # Features are float32: in no direction are they known better than that.
    covered += np.finfo(np.float32).eps * np.trace(covered) / len(covered) * np.eye(len(covered))
    try:
        whitening = np.linalg.inv(np.linalg.cholesky(covered)).T
    except np.linalg.LinAlgError as error:
        raise ValueError("the features of the training images do not vary") from error
    detector = Detector(means, whitening, 1.0, {})
    # A quantile that is itself a distance: no more than REJECTED lie above it.
    threshold = np.quantile(detector.distance(val_features), 1 - REJECTED, method="inverted_cdf")
    provenance = {**provenance, "num_train": len(features), "num_val": len(val_features)}
    return dataclasses.replace(detector, threshold=float(threshold), provenance=provenance)
