"""`--mode=robustness`: how much worse a network answers about photographs that went wrong."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax.sharding import PartitionSpec

from ham_jax import DISCLAIMER, console, files, parallel
from ham_jax.data.records import Subset
from ham_jax.evaluation import bootstrap, corruptions, evaluate, metrics
from ham_jax.evaluation.predictions import Predictions
from ham_jax.model import Ensemble, Model, normalised

# Not the run's own: runs of other seeds meet the same corrupted photographs.
_SEED = 0
_NUM_DRAWS = 1000
_CLEAN = ("none", 0)  # corruption and severity of the photographs as they are

Corruptor = Callable[..., jax.Array]
"""(image uint8 [B, H, W, 3], number uint32 [B], corruption int32 [], severity int32 []) -> uint8
[B, H, W, 3]; see `corruptions.corrupt`"""


def make_corruptor(mesh: jax.sharding.Mesh) -> Corruptor:
    """Returns the one compiled program of all corruptions and severities.

    Each device corrupts its own rows. The result has eight bits, as a photograph has.
    """

    def corrupt(image, number, corruption, severity):
        image = image.astype(jnp.float32) / 255
        image = corruptions.corrupt(image, number, corruption, severity, _SEED)
        return jnp.round(image * 255).astype(jnp.uint8)

    rows, whole = PartitionSpec("data"), PartitionSpec()
    return jax.jit(
        jax.shard_map(corrupt, mesh=mesh, in_specs=(rows, rows, whole, whole), out_specs=rows)
    )


def with_corruption(
    model: Model, images: Subset, corrupt: Corruptor, name: str, severity: int
) -> np.ndarray:
    """Returns what a model says of corrupted images: raw probabilities float64 [n, C]."""
    which = jnp.int32(corruptions.NAMES.index(name)), jnp.int32(severity)

    def probabilities(variables, image, number, metadata=None):
        return model.forward.probabilities(variables, corrupt(image, number, *which), metadata)

    beside = {
        "number": corruptions.image_numbers(images.table["image_id"]),
        "metadata": model.encode(images.table),
    }
    return normalised(model.in_batches(probabilities, images, beside, "Evaluating"))


def choose(table: pd.DataFrame, num_images: int, seed: int = _SEED) -> np.ndarray:
    """Chooses whole lesions at random, the same ones each time and from any order of the rows.

    Classes get as even a number of images as they have, since balanced accuracy weighs them alike:
    with their own shares the rare ones would come down to a few images and drown the rest in noise.

    Args:
      table: one row an image, with the columns `lesion_id` and `label`.
      num_images: about how many; the last lesion of a class may make it a few more. 0: all.
      seed: of the choice.

    Returns:
      Row numbers of `table`, sorted.
    """
    if not 0 < num_images < len(table):
        return np.arange(len(table))
    labels, lesion_ids = table["label"].to_numpy(), table["lesion_id"].to_numpy()
    counts = np.bincount(labels)
    level = next(n for n in itertools.count(1) if np.minimum(counts, n).sum() >= num_images)
    chosen = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        names, lesion, sizes = np.unique(lesion_ids[rows], return_inverse=True, return_counts=True)
        order = np.random.default_rng((seed, label)).permutation(len(names))
        before = np.cumsum(sizes[order]) - sizes[order]
        chosen.append(rows[np.isin(lesion, order[before < level])])
    return np.sort(np.concatenate(chosen))


def run(
    workdirs: Sequence[Path],
    split: str,
    overrides: list[tuple[str, str]],
    mesh: jax.sharding.Mesh,
    output: Path | None = None,
) -> pd.DataFrame:
    """Evaluates the best checkpoint under each corruption and severity; writes robustness.csv.

    Of several runs the mean of their probabilities is evaluated. There is one view of one square,
    whatever the run was evaluated with, unless `eval.tta` or `eval.tiles` is set anew: it is 36
    evaluations.

    Args:
      workdirs: one training run, or the members of an ensemble.
      split: 'val', 'test' or 'train'.
      overrides: (key, text) pairs of the command line, for each of the runs.
      mesh: the devices.
      output: the folder to write into. Default: the run's own; an ensemble has none.

    Returns:
      What robustness.csv holds, a row an evaluation, the clean one first (corruption 'none',
      severity 0): corruption, severity, balanced_accuracy, low and high of its 95 % bootstrap
      interval over lesions, accuracy, macro_auc, n (images), split, tta (views of all squares).

    Raises:
      InputError: as `evaluate.run`.
    """
    overrides = [("eval.tta", "1"), ("eval.tiles", "1"), *overrides]
    ensemble, _, images = evaluate.restore_on(
        split, workdirs, overrides, mesh, output, "robustness"
    )
    config = ensemble.members[0].config.eval
    num_images = len(images[0])
    chosen = choose(images[0].table, config.robustness_images)
    images = [of_member.take(chosen) for of_member in images]
    results, correct = [], []
    for (name, severity), probabilities in _answers(ensemble, images):
        judged = Predictions.of(images[0], ensemble.classes, probabilities)
        row = _measured(name, severity, judged)
        results.append(row | {"n": len(judged), "split": split, "tta": config.tta * config.tiles})
        correct.append(metrics.correct_answers(judged))
        if parallel.is_main():
            console.log_line(f"{name} {severity}: balanced accuracy {row['balanced_accuracy']:.3f}")
    results = pd.DataFrame(results)
    # All in the same resamples of the lesions, so that only the differences vary.
    draws = bootstrap.balanced_accuracy_draws(
        judged, np.stack(correct, axis=-1), _NUM_DRAWS, seed=0
    )
    interval = bootstrap.interval(draws[:, 1:].mean(axis=1) - draws[:, 0])
    if parallel.is_main():
        path = (output or workdirs[0]) / "robustness.csv"
        files.write_text(path, results.to_csv(index=False, lineterminator="\n"))
        assert interval, "no resample lacks a class that is there"
        _print(results, interval, num_images, path)
    return results


def _measured(name: str, severity: int, judged: Predictions) -> dict[str, float | str | int]:
    """Returns the first columns of a row of robustness.csv."""
    numbers = metrics.compute(judged)
    low, high = bootstrap.balanced_accuracy_interval(judged, _NUM_DRAWS)
    return {
        "corruption": name,
        "severity": severity,
        "balanced_accuracy": numbers["balanced_accuracy"],
        "low": low,
        "high": high,
        "accuracy": numbers["accuracy"],
        "macro_auc": numbers["macro_auc"],
    }


def _answers(
    ensemble: Ensemble, images: Sequence[Subset]
) -> Iterator[tuple[tuple[str, int], np.ndarray]]:
    """Yields ((corruption, severity), mean probabilities float64 [n, C]), the clean ones first."""
    corrupt = make_corruptor(ensemble.members[0].forward.mesh)
    severities = range(1, corruptions.NUM_SEVERITIES + 1)
    for name, severity in [_CLEAN, *((n, s) for n in corruptions.NAMES for s in severities)]:
        answers = [
            model.probabilities(of_model, model.encode(of_model.table), "Evaluating")
            if (name, severity) == _CLEAN
            else with_corruption(model, of_model, corrupt, name, severity)
            for model, of_model in zip(ensemble.members, images, strict=True)
        ]
        yield (name, severity), np.mean(answers, axis=0)


def _print(results: pd.DataFrame, interval: list[float], num_images: int, path: Path) -> None:
    clean, corrupted = results.iloc[0], results.iloc[1:]
    grid = corrupted.pivot_table("balanced_accuracy", "corruption", "severity", sort=False)
    grid.loc["all"] = grid.mean()
    columns = ["corruption", *map(str, grid.columns), "mean", "of clean"]
    rows = []
    for name, values in grid.iterrows():
        mean = values.mean()
        share = f"{mean / clean.balanced_accuracy:.0%}" if clean.balanced_accuracy else "-"
        rows.append([name, *(f"{value:.3f}" for value in values), f"{mean:.3f}", share])
    console.print_table(
        f"{clean.split}: balanced accuracy by severity, {clean.n} of {num_images} images,"
        f" {clean.tta} view(s)",
        columns,
        rows,
    )
    mean = corrupted["balanced_accuracy"].mean() - clean.balanced_accuracy
    summary = [
        ["clean", f"{clean.balanced_accuracy:.3f} ({clean.low:.3f} to {clean.high:.3f})"],
        ["all corruptions, difference", f"{mean:+.3f} ({interval[0]:+.3f} to {interval[1]:+.3f})"],
        ["written", str(path)],
    ]
    console.print_table(DISCLAIMER, ["", ""], summary)
