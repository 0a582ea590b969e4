"""Writes what the official scorer says of 1,000 submissions, for test_isic.py. Run by hand.

python tests/evaluation/make_reference.py

The scorer takes a tenth of a second for each, which is too slow for the suite.
"""

import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

from ham_jax.classes import HAM10000
from ham_jax.evaluation import isic
from ham_jax.evaluation.predictions import Predictions

HERE = Path(__file__).parent
NUM_FILES = 1000
FIGURES = ("accuracy", "sensitivity", "specificity", "dice", "ppv", "npv", "auc", "auc_sens_80")
FIGURES = (*FIGURES, "ap")


def draw(seed):
    """Returns image ids, labels and probabilities of a small submission.

    Of four files one has the image without weight, one values so coarse that many are equal, one
    certain answers only, and one many ties for the maximum; two of three carry suffixes.
    """
    rng = np.random.default_rng(seed)
    num = int(rng.integers(15, 60))
    labels = np.append(np.arange(7), rng.integers(0, 7, num - 7))
    kind = seed % 4
    steps = 1_000_000 if kind == 0 else 10
    values = rng.integers(0, steps + 1, (num, 7)) // 2
    values[np.arange(num), labels] += rng.integers(0, steps // 2 + 1, num)
    if kind == 2:
        values = steps * (np.arange(7) == rng.integers(0, 7, num)[:, None])
        right = rng.integers(0, 2, num) == 0
        values[right] = steps * np.eye(7, dtype=int)[labels[right]]
    if kind == 3:
        tied = rng.permutation(num)[: num // 2]
        values[tied, rng.integers(0, 7, len(tied))] = values[tied].max(axis=1)
    ids = [f"ISIC_{number}" for number in 1_000_000 + rng.permutation(num)]
    if kind == 0:
        ids[-1] = "ISIC_0035068"
    suffix = ("", ".jpg", ".JPG")[seed % 3]
    return [name + suffix for name in ids], labels, values / steps


def submission(ids, labels, probabilities):
    """Returns what `isic` takes."""
    return Predictions(HAM10000, labels, probabilities, image_ids=np.array(ids, object))


def official(seed, folder):
    """Returns the scorer's answer about files with this submission and its truth."""
    import isic_challenge_scoring as scorer

    ids, labels, probabilities = draw(seed)
    bare = [name.split(".")[0] for name in ids]
    isic.write_submission(folder / "truth.csv", submission(bare, labels, np.eye(7)[labels]))
    isic.write_submission(folder / "submission.csv", submission(ids, labels, probabilities))
    return scorer.ClassificationScore.from_file(
        folder / "truth.csv",
        folder / "submission.csv",
        scorer.ClassificationMetric.BALANCED_ACCURACY,
    )


def flat(overall, per_category):
    """Returns the overall figure and those of each category in one row."""
    return [overall, *(per_category[c][f] for c in isic.CATEGORIES for f in FIGURES)]


def fingerprint():
    """Returns a checksum of all submissions: whether a random generator still draws the same."""
    texts = (
        repr((ids, labels.tolist(), probabilities.tolist()))
        for ids, labels, probabilities in map(draw, range(NUM_FILES))
    )
    return zlib.crc32("".join(texts).encode())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    pd.DataFrame.applymap = pd.DataFrame.map  # the scorer calls a name that pandas 3 has dropped
    with tempfile.TemporaryDirectory() as folder:
        scores = [official(seed, Path(folder)) for seed in range(NUM_FILES)]
    rows = [flat(s.overall, s.per_category.to_dict("index")) for s in scores]
    np.savez_compressed(HERE / "isic_reference.npz", figures=rows, fingerprint=fingerprint())
