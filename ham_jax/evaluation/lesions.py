"""One answer a lesion: the mean of what the network says of its photographs.

Who photographs a lesion several times wants one answer, not several. These figures stand beside
those of the photographs, which stay the headline, and cannot be compared with them: there a lesion
counts as often as it was photographed, here once. What the mean gains shows against one photograph
of each lesion.
"""

import math
from typing import Any

import numpy as np

from ham_jax.evaluation import bootstrap, metrics, selective
from ham_jax.evaluation.predictions import Predictions


def measure(predictions: Predictions) -> dict[str, Any] | None:
    """Measures answers by lesion; None where each image is a lesion of its own.

    Args:
      predictions: raw, of the images.

    Returns:
      What JSON holds: num_lesions; num_with_several, of them those with several photographs;
      metrics.METRICS of `Predictions.by_lesion`; balanced_accuracy_interval, 95 % over lesions;
      balanced_accuracy_of_one: as expected with one photograph of each lesion, drawn at random;
      per_class: {class: {num_lesions, sensitivity}}.
    """
    of_lesions = predictions.by_lesion()
    num_lesions = len(of_lesions)
    if num_lesions == len(predictions):
        return None
    found = metrics.compute(of_lesions)
    per_class = {
        dx: {"num_lesions": row["num_images"], "sensitivity": row["sensitivity"]}
        for dx, row in found["per_class"].items()
    }
    return {
        "num_lesions": num_lesions,
        "num_with_several": int((of_lesions.metadata["num_images"] > 1).sum()),
        **{metric.name: found[metric.name] for metric in metrics.METRICS},
        "balanced_accuracy_interval": bootstrap.balanced_accuracy_interval(of_lesions),
        "balanced_accuracy_of_one": _of_one(predictions),
        "per_class": per_class,
    }


def _of_one(predictions: Predictions) -> float:
    """Returns the mean over the classes of the recall in which each lesion weighs 1."""
    weights = selective.lesion_weights(predictions.lesion_ids)
    correct, labels = metrics.correct_answers(predictions), predictions.labels
    of_classes = [labels == k for k in np.unique(labels)]
    recalls = [math.fsum(weights[k & correct]) / math.fsum(weights[k]) for k in of_classes]
    return math.fsum(recalls) / len(recalls)
