"""One answer a lesion: the mean of what the network says of its photographs.

Who photographs a lesion several times wants one answer, not several. This is a figure beside those
of the photographs, which stay the headline.
"""

from typing import Any

from ham_jax.evaluation import bootstrap, metrics
from ham_jax.evaluation.predictions import Predictions


def measure(predictions: Predictions) -> dict[str, Any] | None:
    """Measures answers by lesion; None where each image is a lesion of its own.

    Args:
      predictions: raw, of the images.

    Returns:
      What JSON holds: num_lesions; num_with_several, of them those with several photographs;
      metrics.METRICS of `Predictions.by_lesion`; balanced_accuracy_interval, 95 % over lesions;
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
        "per_class": per_class,
    }
