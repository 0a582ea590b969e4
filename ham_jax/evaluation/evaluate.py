"""Weights -> probabilities of every image of a split -> the numbers and files that say how good.

The training loop and `--mode=eval` both call `judge` and `report`, so both give the same numbers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd

from ham_jax import DISCLAIMER, console, files, parallel
from ham_jax.config import InputError
from ham_jax.data import metadata
from ham_jax.data import prepare as preparation
from ham_jax.data.records import Subset
from ham_jax.evaluation import bootstrap, calibration, isic, leakage, lesions, metrics, ood
from ham_jax.evaluation.predictions import Predictions
from ham_jax.inference import decision, detector
from ham_jax.inference.decision import Calibrated
from ham_jax.model import Ensemble, Model, restore_all


def run(
    workdirs: Sequence[Path],
    split: str,
    overrides: list[tuple[str, str]],
    mesh: jax.sharding.Mesh,
    output: Path | None = None,
) -> dict[str, Any]:
    """`--mode=eval`: evaluates the best checkpoint of a run on a split and writes the files.

    Of several runs the mean of their probabilities is evaluated, each with its own preprocessing
    and calibration. A run's own folder also gets a new calibration.json from its validation.

    Args:
      workdirs: one training run, or the members of an ensemble.
      split: 'val', 'test' or 'train'.
      overrides: (key, text) pairs of the command line, for each of the runs.
      mesh: the devices.
      output: the folder to write into. Default: the run's own; an ensemble has none.

    Raises:
      InputError: nothing to evaluate, nothing to evaluate on, nowhere to write, or runs of other
        splits.
    """
    ensemble, datasets, images = restore_on(split, workdirs, overrides, mesh, output, "eval")
    if split in calibration.HELD_OUT:  # all are read before any is evaluated
        ensemble = Ensemble(tuple(member.with_calibrator() for member in ensemble.members))
    all_raw, said, scores, parts = [], [], [], []
    for member, data, own_images in zip(ensemble.members, datasets, images, strict=True):
        raw = member.probabilities(own_images, member.encode(own_images.table), "Evaluating")
        predictions = Predictions.of(own_images, member.classes, raw)
        calibrated, ood_scores = judge(member, data, own_images, predictions, split, not output)
        all_raw.append(raw)
        said.append(calibrated)
        scores.append(ood_scores)
        alone = {"balanced_accuracy": metrics.compute(predictions)["balanced_accuracy"]}
        parts.append({"workdir": member.name} | alone | provenance(member, own_images))
    about = {"members": parts} if len(parts) > 1 else provenance(ensemble.members[0], images[0])
    together = None if None in said else decision.mean(said)
    predictions = Predictions.of(
        images[0], ensemble.classes, np.mean(all_raw, axis=0), detector.joined(scores)
    )
    return report(output or workdirs[0], split, about, predictions, together)


def restore_on(
    split: str,
    workdirs: Sequence[Path],
    overrides: list[tuple[str, str]],
    mesh: jax.sharding.Mesh,
    output: Path | None,
    mode: str,
) -> tuple[Ensemble, list[preparation.Dataset], list[Subset]]:
    """Returns the runs, their data, and each one's images of a split, in the same order.

    Args:
      split: 'val', 'test' or 'train'.
      workdirs: one training run, or the members of an ensemble.
      overrides: (key, text) pairs of the command line, for each of the runs.
      mesh: the devices.
      output: the folder to write into, which is made; None: the run's own.
      mode: for the message.

    Raises:
      InputError: see `run`.
    """
    ensemble = Ensemble(restore_all(workdirs, overrides, mesh))
    num_members = len(ensemble.members)
    if num_members > 1 and output is None:
        raise InputError(
            f"--mode={mode} of {num_members} runs needs --output, the folder to write into."
        )
    datasets = [preparation.prepare(member.config) for member in ensemble.members]
    images = select(ensemble.members, datasets, split)
    (output or workdirs[0]).mkdir(parents=True, exist_ok=True)
    if ensemble.takes_metadata:
        metadata.warn_unknown(images[0].records.table)
    return ensemble, datasets, images


def provenance(model: Model, images: Subset) -> dict[str, Any]:
    """Returns what probabilities come from, as metrics.json and calibration.json say it."""
    return {**model.provenance, "records": images.records.fingerprint}


def judge(
    model: Model,
    data: preparation.Dataset,
    images: Subset,
    predictions: Predictions,
    split: str,
    keeps: bool,
) -> tuple[Calibrated | None, np.ndarray | None]:
    """Returns calibrated decisions about images and how unlike training they are.

    Args:
      model: with its calibrator, where the split is in `calibration.HELD_OUT`.
      data: where the training images are.
      images: of the split.
      predictions: raw, of the same images.
      split: its name.
      keeps: on validation, fit the run's calibration.json anew, and its ood.npz where it has none
        for these weights.

    Returns:
      (None without a calibration, float64 [n] or None without an out-of-distribution model).
    """
    keeps = keeps and split == "val"
    method = model.config.eval.calibration
    if keeps and parallel.is_main():
        counts = {"num_images": len(predictions), "num_lesions": predictions.num_lesions}
        fitted_on = {"split": split, **provenance(model, images), **counts}
        calibration.fit(predictions, fitted_on).write(model.workdir)
    calibrated = calibration.decide(predictions, split, method, model.calibrator)
    return calibrated, _ood_scores(model.with_detector(keeps), data, images, keeps)


def _ood_scores(
    model: Model, data: preparation.Dataset, images: Subset, may_fit: bool
) -> np.ndarray | None:
    """Returns `Detector.score` of images, float64 [n]; None where the run has no such model."""
    if not model.config.eval.ood or (model.detector is None and not may_fit):
        return None
    features, found = model.features(images, "Features"), model.detector
    if found is None:
        train = data.select("train")
        fitted_on = {**model.detector_provenance, "records": train.records.fingerprint}
        of_train = model.features(train, "Features")
        try:
            found = ood.fit(of_train, train.labels, features, fitted_on)
        except ValueError as error:
            console.log_line(f"{model.name}: no {detector.FILE}: {error}.")
            return None
        if parallel.is_main():
            found.save(model.workdir / detector.FILE)
    return found.score(features)


def select(
    members: Sequence[Model], datasets: Sequence[preparation.Dataset], split: str
) -> list[Subset]:
    """Returns each member's images of a split, in the order of the first member's.

    Raises:
      InputError: no such images; members whose split holds other images; or, but for 'train', one
        that was trained on them.
    """
    images = [data.select(split) for data in datasets]
    ids = [pd.Index(of_member.table["image_id"]) for of_member in images]
    aligned = []
    for member, own, of_member in zip(members, ids, images, strict=True):
        place = own.get_indexer(ids[0])
        if len(own) != len(ids[0]) or (place < 0).any():
            why = (
                "Give one --config.data.test_dir for all."
                if split == "test"
                else "One fold's validation is another's training: an average over both would be"
                " tested on lesions that some members were trained on. Evaluate them with"
                " --split=test; --mode=crossval measures all folds on their own validation."
            )
            raise InputError(
                f"--workdir: {members[0].name} and {member.name} have different images in"
                f" split {split!r}. {why}"
            )
        aligned.append(of_member.take(place))
        if split != "train":
            leakage.refuse_trained_on(member.name, of_member.table, "--workdir")
    return aligned


def report(
    folder: Path,
    split: str,
    provenance: Mapping[str, Any],
    predictions: Predictions,
    calibrated: Calibrated | None,
) -> dict[str, Any]:
    """Prints a table and writes metrics.json, predictions.csv and isic_submission.csv.

    Args:
      folder: where to write.
      split: its name.
      provenance: what the probabilities come from: `provenance` of a run, or a list of such, with
        each `balanced_accuracy`, as `members` of an ensemble or `folds`.
      predictions: raw.
      calibrated: probabilities and thresholds of the same images, where there are any.

    Returns:
      What metrics.json holds: the numbers of the raw probabilities, their 95 % intervals from a
      bootstrap over lesions, what they were measured on, `by_lesion` (`lesions.measure`) where a
      lesion has several images, `calibration.measure`, and of HAM10000's split test the
      challenge's own figures.
    """
    classes = predictions.classes
    numbers = metrics.compute(predictions)
    intervals = bootstrap.intervals(predictions)
    by_lesion = lesions.measure(predictions)
    if split == "test" and isic.knows(
        classes
    ):  # only there are others' figures to compare them with
        provenance = {**provenance, "isic2018": isic.score(predictions)}
    decided = {}
    if calibrated:
        held_out = split in calibration.HELD_OUT
        decided = calibration.measure(predictions, calibrated, cross_fitted=not held_out)
    numbers = {
        "balanced_accuracy": numbers["balanced_accuracy"],
        "balanced_accuracy_interval": intervals["balanced_accuracy"],
        **numbers,
        "intervals": intervals,
        "split": split,
        **provenance,
        "num_lesions": predictions.num_lesions,
        **({"by_lesion": by_lesion} if by_lesion else {}),
        **decided,
        "classes": list(classes),
        "malignant": list(classes.malignant),
        "titles": list(classes.titles),
        "note": DISCLAIMER,
    }
    if parallel.is_main():
        files.write_json(folder / "metrics.json", numbers)
        predictions.write(folder / "predictions.csv")
        written = ["metrics.json", "predictions.csv"]
        if isic.knows(classes):
            isic.write_submission(folder / "isic_submission.csv", predictions)
            written.append("isic_submission.csv")
        _print(numbers, f"{folder}/{', '.join(written)}")
    return numbers


def _print(numbers: dict[str, Any], written: str) -> None:
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

    def with_interval(name: str) -> str:
        interval = numbers["intervals"][name]
        return text(numbers[name]) + (" ({:.3f} to {:.3f})".format(*interval) if interval else "")

    summary = [
        ["", "with the 95 % interval over lesions"],
        *([metric.title, with_interval(metric.name)] for metric in metrics.METRICS),
        *(_by_lesion_row(numbers["by_lesion"]) if "by_lesion" in numbers else ()),
        *(_decision_rows(numbers) if "calibration" in numbers else ()),
        *(
            [name, ", ".join(f"{p['balanced_accuracy']:.3f}" for p in numbers[name])]
            for name in ("members", "folds")
            if name in numbers
        ),
        *([["checkpoint", f"step {numbers['step']}"]] if "step" in numbers else []),
        ["written", written],
    ]
    console.print_table(DISCLAIMER, ["", ""], summary)


def _by_lesion_row(found: dict[str, Any]) -> list[list[str]]:
    """Returns the printed row of `lesions.measure`."""
    low, high = found["balanced_accuracy_interval"]
    said = f"balanced accuracy {found['balanced_accuracy']:.3f} ({low:.3f} to {high:.3f})"
    of_one = f"with one photograph of each {found['balanced_accuracy_of_one']:.3f}"
    return [["one answer a lesion", f"{said}, {of_one}"]]


def _decision_rows(numbers: dict[str, Any]) -> list[list[str]]:
    """Returns the printed rows of calibration, flag and sets."""
    calibrated, decided = numbers["calibration"], numbers["decision"]
    after = calibrated[calibrated["method"]]
    rows = [
        [
            f"after calibration ({calibrated['method']})",
            f"{after['expected_calibration_error']:.3f}, log loss {after['log_loss']:.3f},"
            f" balanced accuracy {after['balanced_accuracy']:.3f}",
        ]
    ]
    flag = decided["malignant"]
    if flag["auc"] is not None:
        low, high = flag["auc_interval"]
        rows.append(
            [
                "malignant or not",
                f"sensitivity {flag['sensitivity']:.3f}, specificity {flag['specificity']:.3f},"
                f" AUC {flag['auc']:.3f} ({low:.3f} to {high:.3f})",
            ]
        )
    sets = decided["sets"]["0.90"]["shown"]
    rows.append(
        [
            "prediction sets for 90 %",
            f"cover {sets['coverage']:.3f}, {sets['mean_size']:.2f} diagnoses on average",
        ]
    )
    return rows
