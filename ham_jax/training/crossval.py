"""`--mode=crossval`: every fold validates once, so that every image is judged unseen."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from ham_jax import checkpoints, console, parallel
from ham_jax.config import InputError
from ham_jax.data import prepare as preparation
from ham_jax.data.records import Records, Subset
from ham_jax.evaluation import calibration, evaluate, leakage, predictions
from ham_jax.evaluation.predictions import Predictions
from ham_jax.inference.decision import Calibrated
from ham_jax.training import loop


def train(
    config: ml_collections.ConfigDict,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    preemption: parallel.Preemption,
) -> dict[str, Any]:
    """Trains each fold in `workdir/fold<k>` and joins their validations in `workdir`.

    A fold that was stopped goes on. One that is finished is not trained again, but evaluated, for
    the files in its folder may be those of another evaluation.

    Args:
      config: a validated configuration without `data.split_csv`; its `data.fold` is not read.
      workdir: where everything is written.
      mesh: the devices, axis `data`.
      preemption: entered; asked before each fold and after each step.

    Returns:
      The contents of metrics.json.

    Raises:
      loop.Preempted: asked to stop; the state is saved.
      InputError: data or workdir do not fit the configuration.
    """
    if checkpoints.has_checkpoints(workdir):
        raise InputError(f"--workdir={workdir} holds a single run; choose another --workdir.")
    with checkpoints.claimed(workdir):
        return _train(config, workdir, mesh, preemption)


def _train(
    config: ml_collections.ConfigDict,
    workdir: Path,
    mesh: jax.sharding.Mesh,
    preemption: parallel.Preemption,
) -> dict[str, Any]:
    records = preparation.prepare(config).records
    if config.model.pretrained:
        leakage.refuse_trained_on(config.model.pretrained, records.table, "model.pretrained")
    num_folds = config.data.num_folds
    folders = [checkpoints.fold_folder(workdir, fold) for fold in range(num_folds)]
    folds = []
    for fold, folder in enumerate(folders):
        if preemption.reached():
            raise loop.Preempted(preemption.exit_code, f"the start of fold {fold}")
        if parallel.is_main():
            console.log_line(f"fold {fold} of {num_folds}: {folder}")
        config_of_fold = config.copy_and_resolve_references()
        config_of_fold.data.fold = fold
        numbers = loop.train(config_of_fold, folder, mesh, preemption)
        folds.append({key: numbers[key] for key in ("balanced_accuracy", "num_images", "step")})
    parallel.barrier("folds")  # the main process has written the last predictions
    judged, calibrated = _joined(
        [folder / "predictions.csv" for folder in folders], records, config.eval.calibration
    )
    provenance = {
        "num_folds": num_folds,
        "folds": folds,
        "tta": config.eval.tta,
        "tiles": config.eval.tiles,
        "records": records.fingerprint,
    }
    return evaluate.report(workdir, "crossval", provenance, judged, calibrated)


def _joined(
    files: Sequence[Path], records: Records, method: str
) -> tuple[Predictions, Calibrated | None]:
    """Returns the predictions of each image by the one file that has it, and its decisions.

    Args:
      files: predictions, one a fold.
      records: the images, in the order of what is returned.
      method: of calibration.

    Returns:
      (raw predictions, with `ood_score` where each fold has one; the folds' decisions, or None
      where a fold has too few lesions for any).

    Raises:
      InputError: an image is in no file or in several.
    """
    image_ids = records.table["image_id"].tolist()
    parts = [predictions.read(file) for file in files]
    place = {image_id: number for number, image_id in enumerate(image_ids)}
    ids = [image_id for part in parts for image_id in part.image_ids]
    if sorted(ids) != sorted(image_ids):
        raise InputError(
            f"{', '.join(map(str, files))} do not hold each of {len(image_ids)} images once: did"
            " another job write there? Start the command again."
        )
    folds = [np.array([place[image_id] for image_id in part.image_ids]) for part in parts]
    whole = predictions.join(parts).take(np.argsort(np.concatenate(folds)))
    scores = None
    if all("ood_score" in part.metadata for part in parts):
        scores = whole.metadata["ood_score"].to_numpy()
    images = Subset(records, np.arange(len(image_ids)))
    judged = Predictions.of(images, records.classes, whole.probabilities, scores)
    return judged, calibration.decide(judged, "crossval", method, folds=folds)
