"""`--mode=compare`: whether one network is better than another on the same images.

Two intervals that overlap say little: both networks meet the same hard lesions. Here both are
judged in the same resamples of the lesions, so that only their difference varies.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ham_jax import console
from ham_jax.config import InputError
from ham_jax.evaluation import bootstrap, metrics, predictions
from ham_jax.evaluation.predictions import Predictions


def run(files: Sequence[str]) -> list[dict[str, Any]]:
    """Compares the first predictions file with each other one and prints a table.

    Args:
      files: two or more that `--mode=eval`, `train` or `crossval` wrote, of the same images.

    Returns:
      What `paired` returns, for each file but the first.

    Raises:
      InputError: a file is missing or damaged, or the images differ.
    """
    first, *others = [predictions.read(file) for file in files]
    order = {image_id: row for row, image_id in enumerate(first.image_ids)}
    faults = []
    aligned = []
    for file, other in zip(files[1:], others, strict=True):
        if other.classes != first.classes:
            faults.append(
                f"{file} has the classes {', '.join(other.classes)}, {files[0]}"
                f" {', '.join(first.classes)}: only predictions of the same can be compared."
            )
            continue
        if sorted(other.image_ids) != sorted(order):
            common = len(set(other.image_ids) & set(order))
            faults.append(
                f"{file} has {len(other)} images, {files[0]} {len(order)}, and {common} are"
                " in both: only predictions of the same images can be compared."
            )
            continue
        other = other.take(np.argsort([order[image_id] for image_id in other.image_ids]))
        if (other.labels != first.labels).any():
            faults.append(f"{file} and {files[0]} disagree about the truth of some images.")
        aligned.append(other)
    if faults:
        raise InputError(faults)
    results = [paired(first, other) for other in aligned]
    _print(files, results, len(first), first.num_lesions)
    return results


def paired(
    first: Predictions, second: Predictions, num_draws: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Returns how much the second network is better than the first.

    Args:
      first: of one network.
      second: of another, of the same images in the same order.
      num_draws: resamples of the lesions, within each class.
      seed: of the draws.

    Returns:
      balanced_accuracy: of both; difference: second minus first; interval: its 95 % bootstrap
      percentile interval over lesions; only_first_right and only_second_right: images;
      mcnemar_p: the exact two-sided p-value that these two counts differ (McNemar, Psychometrika
      1947). It takes images as independent, which photographs of one lesion are not, so it is too
      small rather than too large.
    """
    correct = np.stack([metrics.correct_answers(p) for p in (first, second)], axis=-1)
    scores = [metrics.compute(p)["balanced_accuracy"] for p in (first, second)]
    draws = bootstrap.balanced_accuracy_draws(first, correct, num_draws, seed)
    only_first = int((correct[:, 0] & ~correct[:, 1]).sum())
    only_second = int((correct[:, 1] & ~correct[:, 0]).sum())
    differing = only_first + only_second
    return {
        "balanced_accuracy": scores,
        "difference": scores[1] - scores[0],
        "interval": bootstrap.percentiles(draws[:, 1] - draws[:, 0]),
        "only_first_right": only_first,
        "only_second_right": only_second,
        "mcnemar_p": float(stats.binomtest(only_first, differing).pvalue) if differing else 1.0,
    }


def _print(files: Sequence[str], results, num_images: int, num_lesions: int) -> None:
    rows = []
    for file, result in zip(files[1:], results, strict=True):
        low, high = result["interval"]
        rows.append(
            [
                str(Path(file)),
                f"{result['balanced_accuracy'][1]:.3f}",
                f"{result['difference']:+.3f} ({low:+.3f} to {high:+.3f})",
                f"{result['only_second_right']} : {result['only_first_right']}",
                f"{result['mcnemar_p']:.2g}",
            ]
        )
    console.print_table(
        f"{files[0]}: balanced accuracy {results[0]['balanced_accuracy'][0]:.3f},"
        f" {num_images} images, {num_lesions} lesions",
        ["file", "balanced accuracy", "difference (95 %)", "right alone", "McNemar p"],
        rows,
    )
