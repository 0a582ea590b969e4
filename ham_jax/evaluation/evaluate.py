"""Weights -> probabilities of every image of a split -> the numbers and files that say how good.

The training loop and `--mode=eval` both call `evaluate`, so both report the same numbers.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ham_jax import CLASSES, DISCLAIMER, checkpoints, console, files, models, parallel
from ham_jax import config as configuration
from ham_jax.config import InputError
from ham_jax.data import feed, preprocess
from ham_jax.data import prepare as preparation
from ham_jax.data.ham10000 import Records
from ham_jax.evaluation import metrics

Variables = Mapping[str, Any]
"""{'params', 'batch_stats'} as nested dicts"""

Predictor = Callable[..., jax.Array]
"""(variables, image uint8 [B, H, W, 3], metadata float32 [B, M] or None=None) -> probabilities
float32 [B, 7] on every process"""

# Keys that --mode=eval and --mode=predict may set anew; the rest is what the run was trained with.
MOVABLE = (
    "data.dir",
    "data.test_dir",
    "data.prepared_dir",
    "data.download",
    "data.allow_partial",
    "data.num_workers",
    "eval",
)


def make_predictor(
    network: models.Network, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> Predictor:
    """Returns the compiled way from canvas pixels to probabilities.

    With `eval.tta = n` it is the mean of the probabilities of the first n views of the dihedral
    group: 2 adds the mirror image, 4 all flips, 8 the quarter turns too.
    """

    def probabilities(variables, image, k, metadata):
        view = preprocess.eval_view(
            image, config.augment.crop_px, config.eval.crop_scale, config.augment.shades_of_gray
        )
        view = preprocess.dihedral(view, k)
        logits, _ = network.apply(
            variables["params"], variables["batch_stats"], view, train=False, metadata=metadata
        )
        return jax.nn.softmax(logits)

    compiled = jax.jit(probabilities, out_shardings=parallel.replicated(mesh))

    def predict(
        variables: Variables, image: jax.Array, metadata: jax.Array | None = None
    ) -> jax.Array:
        # One program for all views: eight unrolled copies would compile eight times as long.
        views = [compiled(variables, image, jnp.int32(k), metadata) for k in range(config.eval.tta)]
        return sum(views[1:], views[0]) / len(views)

    return predict


def evaluate(
    predict: Predictor,
    variables: Variables,
    records: Records,
    rows: np.ndarray,
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> tuple[dict[str, Any], np.ndarray]:
    """Returns (`metrics.compute`'s numbers, probabilities float64 [n, 7]) of the given rows.

    Each row is computed exactly once.
    """
    batches = []
    with console.progress("Evaluating") as progress:
        done = 0
        for image, count in feed.sequential(records, rows, batch_size, mesh):
            batches.append(np.asarray(predict(variables, image))[:count])
            done += count
            progress(done, len(rows))
    probabilities = normalised(np.concatenate(batches))
    return metrics.compute(records.table["label"].to_numpy()[rows], probabilities), probabilities


def normalised(probabilities: np.ndarray) -> np.ndarray:
    """Returns float64 rows that sum to 1, without float32's rounding."""
    probabilities = probabilities.astype(np.float64)
    return probabilities / probabilities.sum(-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network as its checkpoint holds it.

    Attributes:
      config: of the run, with the keys that were set anew.
      network: its pure functions.
      variables: the weights that `eval.weights` asks for, on the mesh.
      step: of the checkpoint.
    """

    config: ml_collections.ConfigDict
    network: models.Network
    variables: Variables
    step: int


def load(workdir: Path, overrides: list[tuple[str, str]], mesh: jax.sharding.Mesh) -> Trained:
    """Rebuilds the network and its best weights from a run's folder alone.

    Args:
      workdir: of a training run.
      overrides: (key, text) pairs of the command line; only `MOVABLE` keys.
      mesh: the devices.

    Raises:
      InputError: no checkpoint there, or keys that may not be set anew.
    """
    params, batch_stats, ema, meta, step = checkpoints.load_for_inference(workdir)
    config = configuration.from_dict(meta["config"])
    movable = tuple(f"{key}." for key in MOVABLE)
    known = configuration.flatten(config)
    faults = [
        f"--config.{key} cannot be set here: it belongs to the run in {workdir}. What can:"
        f" {', '.join(MOVABLE)}."
        for key, _ in overrides
        if key in known and not f"{key}.".startswith(movable)
    ]
    faults += configuration.override(config, overrides)
    if faults:
        raise InputError(faults)
    configuration.validate(config, mesh.devices.size)
    use_ema = config.eval.weights == "ema" or (config.eval.weights == "auto" and ema)
    variables = ema if use_ema else {"params": params, "batch_stats": batch_stats}
    network = models.build(config.model, len(CLASSES))
    return Trained(config, network, parallel.replicate(mesh, variables), step)


def run(
    workdir: Path, split: str, overrides: list[tuple[str, str]], mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """`--mode=eval`: evaluates the best checkpoint of a run on a split and writes the files.

    Raises:
      InputError: nothing to evaluate, or nothing to evaluate on.
    """
    trained = load(workdir, overrides, mesh)
    config = trained.config
    records, rows = preparation.prepare(config).select(split)
    predict = make_predictor(trained.network, config, mesh)
    numbers, probabilities = evaluate(
        predict, trained.variables, records, rows, config.eval.batch_size, mesh
    )
    return report(workdir, split, trained.step, config, records, rows, numbers, probabilities)


def report(
    workdir: Path,
    split: str,
    step: int,
    config: ml_collections.ConfigDict,
    records: Records,
    rows: np.ndarray,
    numbers: dict[str, Any],
    probabilities: np.ndarray,
) -> dict[str, Any]:
    """Prints a table and writes metrics.json, predictions.csv and isic_submission.csv.

    Returns:
      What metrics.json holds: the numbers, a 95 % interval of the balanced accuracy from a
      bootstrap over lesions, and what they were measured on.
    """
    table = records.table.iloc[rows]
    image_ids, lesion_ids = table["image_id"].tolist(), table["lesion_id"].tolist()
    labels = table["label"].to_numpy()
    low, high = metrics.interval(labels, probabilities, table["lesion_id"].to_numpy())
    numbers = {
        "balanced_accuracy": numbers["balanced_accuracy"],
        "balanced_accuracy_interval": [low, high],
        **numbers,
        "split": split,
        "step": step,
        "tta": config.eval.tta,
        "num_lesions": len(set(lesion_ids)),
        "classes": list(CLASSES),
        "records": records.fingerprint,
        "note": DISCLAIMER,
    }
    if parallel.is_main():
        files.write_json(workdir / "metrics.json", numbers)
        metrics.write_predictions(
            workdir / "predictions.csv", image_ids, lesion_ids, labels, probabilities
        )
        metrics.write_isic_submission(workdir / "isic_submission.csv", image_ids, probabilities)
        _print(numbers, workdir)
    return numbers


def _print(numbers: dict[str, Any], workdir: Path) -> None:
    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    columns = ("num_images", "sensitivity", "specificity", "f1", "auc", "average_precision")
    rows = [
        [dx, str(of_class["num_images"]), *(text(of_class[c]) for c in columns[1:])]
        for dx, of_class in numbers["per_class"].items()
    ]
    console.print_table(
        f"{numbers['split']}: {numbers['num_images']} images, {numbers['num_lesions']} lesions",
        ["dx", "images", *(c.replace("_", " ") for c in columns[1:])],
        rows,
    )
    low, high = numbers["balanced_accuracy_interval"]
    summary = [
        ["balanced accuracy", f"{numbers['balanced_accuracy']:.3f} ({low:.3f} to {high:.3f})"],
        ["accuracy", text(numbers["accuracy"])],
        ["macro AUC", text(numbers["macro_auc"])],
        ["log loss", text(numbers["log_loss"])],
        ["expected calibration error", text(numbers["expected_calibration_error"])],
        ["checkpoint", f"step {numbers['step']}"],
        ["written", f"{workdir}/metrics.json, predictions.csv, isic_submission.csv"],
    ]
    console.print_table(DISCLAIMER, ["", ""], summary)
