"""`--mode=crossval`: every fold validates once, so that every image is judged unseen."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import pandas as pd

from ham_jax import checkpoints, console, parallel
from ham_jax.config import InputError
from ham_jax.data import prepare as preparation
from ham_jax.data.records import Subset
from ham_jax.evaluation import evaluate, judgement, lineage, metrics
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
        lineage.refuse_seen(config.model.pretrained, records.table, "model.pretrained")
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
    predictions = [folder / "predictions.csv" for folder in folders]
    probabilities, judged = _joined(
        predictions, records.table["image_id"].tolist(), config.eval.calibration
    )
    about = {
        "num_folds": num_folds,
        "folds": folds,
        "tta": config.eval.tta,
        "records": records.fingerprint,
    }
    images = Subset(records, np.arange(len(records.table)))
    scores = _ood_scores(predictions, records.table["image_id"])
    return evaluate.report(workdir, "crossval", about, images, probabilities, judged, scores)


def _joined(
    files: Sequence[Path], image_ids: Sequence[str], method: str
) -> tuple[np.ndarray, judgement.Judgement | None]:
    """Returns the probabilities and the judgement of each image by the one file that has it.

    Args:
      files: predictions, one a fold.
      image_ids: [n], in the order of what is returned.
      method: of calibration.

    Returns:
      (probabilities float64 [n, 7], raw; the folds' `judgement.cross_fit`, or None where a fold
      has too few lesions for one).

    Raises:
      InputError: an image is in no file or in several.
    """
    read = [metrics.read_predictions(file) for file in files]
    ids = [image_id for of_fold, _, _, _ in read for image_id in of_fold]
    if sorted(ids) != sorted(image_ids):
        raise InputError(
            f"{', '.join(map(str, files))} do not hold each of {len(image_ids)} images once: did"
            " another job write there? Start the command again."
        )
    place = {image_id: n for n, image_id in enumerate(image_ids)}
    places = np.array([place[image_id] for image_id in ids])
    probabilities = np.concatenate([rows for *_, rows in read])[np.argsort(places)]
    judged = [
        judgement.cross_fit(labels, rows, np.array(lesions), method)
        for _, lesions, labels, rows in read
    ]
    return probabilities, None if None in judged else judgement.join(judged, places)


def _ood_scores(files: Sequence[Path], image_ids: Sequence[str]) -> np.ndarray | None:
    """Returns each image's `ood_score` by the one file that has it; None where a fold has none."""
    tables = [metrics.read_table(file) for file in files]
    if not all("ood_score" in table for table in tables):
        return None
    return pd.concat(tables).set_index("image_id")["ood_score"].loc[image_ids].to_numpy()
