"""`--mode=robustness`: how much worse a network answers about photographs that went wrong."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax.sharding import PartitionSpec

from ham_jax import DISCLAIMER, console, files, parallel
from ham_jax.config import InputError
from ham_jax.data import metadata
from ham_jax.data import prepare as preparation
from ham_jax.evaluation import bootstrap, corruptions, evaluate, metrics

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


def behind(
    predict: evaluate.Predictor, corrupt: Corruptor, name: str, severity: int
) -> evaluate.Predictor:
    """Returns the predictor that sees corrupted canvases; it takes `number` beside the image."""
    which = jnp.int32(corruptions.NAMES.index(name)), jnp.int32(severity)

    def predict_corrupted(variables, image, number, **given):
        return predict(variables, corrupt(image, number, *which), **given)

    return predict_corrupted


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

    Of several runs the mean of their probabilities is evaluated. There is one view, whatever the
    run was evaluated with, unless `eval.tta` is set anew: it is 36 evaluations.

    Args:
      workdirs: one training run, or the members of an ensemble.
      split: 'val', 'test' or 'train'.
      overrides: (key, text) pairs of the command line, for each of the runs.
      mesh: the devices.
      output: the folder to write into. Default: the run's own; an ensemble has none.

    Returns:
      What robustness.csv holds, a row an evaluation, the clean one first (corruption 'none',
      severity 0): corruption, severity, balanced_accuracy, low and high of its 95 % bootstrap
      interval over lesions, accuracy, macro_auc, n (images), split, tta.

    Raises:
      InputError: as `evaluate.run`.
    """
    if not any(key == "eval.tta" for key, _ in overrides):
        overrides = [*overrides, ("eval.tta", "1")]
    members = evaluate.load_all(workdirs, overrides, mesh)
    if len(members) > 1 and output is None:
        raise InputError(
            f"--mode=robustness of {len(members)} runs needs --output, the folder to write into."
        )
    datasets = [preparation.prepare(member.config) for member in members]
    images = evaluate.select(members, datasets, split)
    config = members[0].config.eval
    num_images = len(images[0])
    chosen = choose(images[0].table, config.robustness_images)
    images = [of_member.take(chosen) for of_member in images]
    table = images[0].table
    output = output or workdirs[0]
    output.mkdir(parents=True, exist_ok=True)
    if any(member.config.model.metadata for member in members):
        metadata.warn_unknown(table)
    labels, lesion_ids = table["label"].to_numpy(), table["lesion_id"].to_numpy()

    results, correct = [], []
    for (name, severity), probabilities in _answers(members, images, mesh):
        numbers = metrics.compute(labels, probabilities)
        low, high = metrics.interval(labels, probabilities, lesion_ids, _NUM_DRAWS)
        results.append(
            {
                "corruption": name,
                "severity": severity,
                "balanced_accuracy": numbers["balanced_accuracy"],
                "low": low,
                "high": high,
                "accuracy": numbers["accuracy"],
                "macro_auc": numbers["macro_auc"],
                "n": len(labels),
                "split": split,
                "tta": config.tta,
            }
        )
        correct.append(metrics.correct_answers(labels, probabilities))
        if parallel.is_main():
            console.log_line(
                f"{name} {severity}: balanced accuracy {numbers['balanced_accuracy']:.3f}"
            )
    results = pd.DataFrame(results)
    # All in the same resamples of the lesions, so that only the differences vary.
    draws = metrics.balanced_accuracy_draws(
        labels, np.stack(correct, axis=-1), lesion_ids, _NUM_DRAWS, seed=0
    )
    difference = draws[:, 1:].mean(axis=1) - draws[:, 0]
    interval = bootstrap.interval(difference)
    if parallel.is_main():
        path = output / "robustness.csv"
        files.write_text(path, results.to_csv(index=False, lineterminator="\n"))
        _print(results, interval, num_images, path)
    return results


def _answers(members, images, mesh):
    """Yields ((corruption, severity), mean probabilities float64 [n, 7]), the clean ones first."""
    corrupt = make_corruptor(mesh)
    predictors = [evaluate.make_predictor(m.network, m.config, mesh) for m in members]
    numbers = [corruptions.image_numbers(i.table["image_id"]) for i in images]
    severities = range(1, corruptions.NUM_SEVERITIES + 1)
    for name, severity in [_CLEAN, *((n, s) for n in corruptions.NAMES for s in severities)]:
        answers = []
        for n, member in enumerate(members):
            predict, beside = predictors[n], {}
            if (name, severity) != _CLEAN:
                predict = behind(predict, corrupt, name, severity)
                beside = {"number": numbers[n]}
            _, probabilities = evaluate.evaluate(
                predict,
                member.variables,
                images[n],
                member.config.eval.batch_size,
                mesh,
                member.config.model.metadata,
                beside,
            )
            answers.append(probabilities)
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
