"""Weights -> probabilities of every image of a split -> the numbers and files that say how good.

The training loop and `--mode=eval` both call `evaluate`, so both report the same numbers.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pandas as pd

from ham_jax import CLASSES, DISCLAIMER, checkpoints, console, files, models, parallel
from ham_jax import config as configuration
from ham_jax.config import InputError
from ham_jax.data import feed, metadata, preprocess
from ham_jax.data import prepare as preparation
from ham_jax.data.records import Subset
from ham_jax.evaluation import bootstrap, isic, judgement, lineage, metrics, ood

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

FIXED = ("test", "train")
"""Splits that a run's calibration is applied to as it is: it was fitted on validation."""


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


def make_extractor(
    network: models.Network, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> Callable[[Variables, jax.Array], jax.Array]:
    """Returns the compiled way from canvas pixels to features, of the upright view alone.

    (variables, image uint8 [B, H, W, 3]) -> float32 [B, F] on every process.
    """

    def features(variables, image):
        view = preprocess.eval_view(
            image, config.augment.crop_px, config.eval.crop_scale, config.augment.shades_of_gray
        )
        return network.features(variables["params"], variables["batch_stats"], view)

    return jax.jit(features, out_shardings=parallel.replicated(mesh))


def evaluate(
    predict: Predictor,
    variables: Variables,
    images: Subset,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    with_metadata: bool,
    beside: Mapping[str, np.ndarray] | None = None,
) -> tuple[dict[str, Any], np.ndarray]:
    """Returns (`metrics.compute`'s numbers, probabilities float64 [n, 7]) of images.

    Each is computed exactly once. Their metadata go in where `with_metadata` says so, and so does
    what `beside` holds for a predictor that takes more: by name, a row an image.
    """
    batches = []
    beside = dict(beside or {})
    if with_metadata:
        beside["metadata"] = metadata.encode(images.table)
    with console.progress("Evaluating") as progress:
        done = 0
        for batch, count in feed.sequential(images, batch_size, mesh, beside):
            batches.append(np.asarray(predict(variables, **batch))[:count])
            done += count
            progress(done, len(images))
    probabilities = normalised(np.concatenate(batches))
    return metrics.compute(images.labels, probabilities), probabilities


def normalised(probabilities: np.ndarray) -> np.ndarray:
    """Returns float64 rows that sum to 1, without float32's rounding."""
    probabilities = probabilities.astype(np.float64)
    return probabilities / probabilities.sum(-1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network as its checkpoint holds it.

    Attributes:
      workdir: of the run.
      config: of the run, with the keys that were set anew.
      network: its pure functions.
      variables: the weights that `eval.weights` asks for, on the mesh.
      weights: which these are, 'raw' or 'ema'.
      step: of the checkpoint.
    """

    workdir: Path
    config: ml_collections.ConfigDict
    network: models.Network
    variables: Variables
    weights: str
    step: int


def load(workdir: Path, overrides: list[tuple[str, str]], mesh: jax.sharding.Mesh) -> Trained:
    """Rebuilds the network and its best weights from a run's folder alone.

    Args:
      workdir: of a training run.
      overrides: (key, text) pairs of the command line; only `MOVABLE` keys.
      mesh: the devices.

    Raises:
      InputError: no checkpoint there, one of other classes, or keys that may not be set anew.
    """
    params, batch_stats, ema, meta, step = checkpoints.load_for_inference(workdir)
    if tuple(meta["classes"]) != CLASSES:
        raise InputError(
            f"--workdir={workdir} tells {', '.join(meta['classes'])} apart; this version of ham_jax"
            f" knows {', '.join(CLASSES)}."
        )
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
    num_metadata = metadata.NUM_METADATA if config.model.metadata else 0
    network = models.build(config.model, len(CLASSES), num_metadata)
    weights = "ema" if use_ema else "raw"
    return Trained(workdir, config, network, parallel.replicate(mesh, variables), weights, step)


def saved_detector(member: Trained, refits: bool = False) -> ood.Detector | None:
    """Returns the run's out-of-distribution model, or None where it has none for these weights.

    Unless the caller fits it anew, a line says why there is none.
    """
    if not member.config.eval.ood:
        return None
    path = member.workdir / ood.FILE
    try:
        detector = ood.load(path)
        why = "" if detector else f"there is no {path}"
    except ValueError as error:
        detector, why = None, f"{error}"
    if detector is not None:
        asked = _fitted_on(member)
        differs = [key for key in asked if detector.about.get(key) != asked[key]]
        if differs:
            detector, why = None, f"{path} was fitted with another {', '.join(differs)}"
    if why and not refits and parallel.is_main():
        console.log_line(
            f"Images unlike those of training are not marked: {why}. --mode=eval --split=val"
            f" --workdir={member.workdir} makes it."
        )
    return detector


def _fitted_on(member: Trained) -> dict[str, Any]:
    """Returns what features depend on and a command line can change."""
    about = settings(member.config, member.step, member.weights)
    return {key: about[key] for key in ("step", "weights", "crop_scale")}


def ood_scores(
    member: Trained,
    data: preparation.Dataset,
    images: Subset,
    mesh: jax.sharding.Mesh,
    may_fit: bool,
) -> np.ndarray | None:
    """Returns how far images are from the run's training images: see `ood.Detector.score`.

    Args:
      member: the run.
      data: where the training images are.
      images: n of them.
      mesh: the devices.
      may_fit: they are the run's validation images. Where it has no out-of-distribution model
        for its weights, one is fitted and kept in its folder.

    Returns:
      float64 [n], or None: the run has no such model.
    """
    if not member.config.eval.ood:
        return None
    detector = saved_detector(member, refits=may_fit)
    if detector is None and not may_fit:
        return None
    extract = make_extractor(member.network, member.config, mesh)

    def features(images: Subset) -> np.ndarray:
        batches = feed.sequential(images, member.config.eval.batch_size, mesh)
        parts, done = [], 0
        with console.progress("Features") as progress:
            for batch, count in batches:
                parts.append(np.asarray(extract(member.variables, batch["image"]))[:count])
                done += count
                progress(done, len(images))
        return np.concatenate(parts)

    of_rows = features(images)
    if detector is None:
        train = data.select("train")
        about = {**_fitted_on(member), "records": train.records.fingerprint}
        try:
            detector = ood.fit(features(train), train.labels, of_rows, about)
        except ValueError as error:
            console.log_line(f"{member.workdir}: no {ood.FILE}: {error}.")
            return None
        if parallel.is_main():
            detector.save(member.workdir / ood.FILE)
    return detector.score(of_rows)


def load_all(
    workdirs: Sequence[Path], overrides: list[tuple[str, str]], mesh: jax.sharding.Mesh
) -> list[Trained]:
    """Returns the members of an ensemble: of each folder the run, or a cross-validation's folds."""
    return [load(run, overrides, mesh) for workdir in workdirs for run in checkpoints.runs(workdir)]


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
    members = load_all(workdirs, overrides, mesh)
    if len(members) > 1 and output is None:
        raise InputError(
            f"--mode=eval of {len(members)} runs needs --output, the folder to write into."
        )
    datasets = [preparation.prepare(member.config) for member in members]
    images = select(members, datasets, split)
    fitted = [None if split == "val" else judgement.read(member.workdir) for member in members]
    own = output is None
    output = output or workdirs[0]
    output.mkdir(parents=True, exist_ok=True)
    if any(member.config.model.metadata for member in members):
        metadata.warn_unknown(images[0].records.table)
    answers, parts, judged, scores = [], [], [], []
    for member, data, own_images, calibrated in zip(members, datasets, images, fitted, strict=True):
        config = member.config
        predict = make_predictor(member.network, config, mesh)
        numbers, probabilities = evaluate(
            predict,
            member.variables,
            own_images,
            config.eval.batch_size,
            mesh,
            config.model.metadata,
        )
        answers.append(probabilities)
        about = settings(config, member.step, member.weights) | {
            "records": own_images.records.fingerprint
        }
        alone = {"balanced_accuracy": numbers["balanced_accuracy"]}
        if split == "val":
            folder = member.workdir if own else None
            judged.append(judge_validation(folder, config, about, own_images, probabilities))
        elif tell_calibration(member, calibrated, about):
            judged.append(judgement.apply(calibrated[0], config.eval.calibration, probabilities))
        else:
            judged.append(None)
        may_fit = own and split == "val"
        scores.append(ood_scores(member, data, own_images, mesh, may_fit))
        parts.append({"workdir": str(member.workdir)} | alone | about)
    if len(members) > 1:
        about = {"members": parts}
    together = None if None in judged else judgement.mean(judged)
    return report(
        output, split, about, images[0], np.mean(answers, axis=0), together, ood.joined(scores)
    )


def settings(config: ml_collections.ConfigDict, step: int, weights: str) -> dict[str, Any]:
    """Returns what probabilities come from, as metrics.json and calibration.json say it.

    Args:
      config: of the run.
      step: of the checkpoint.
      weights: 'raw' or 'ema'.
    """
    return {
        "step": step,
        "tta": config.eval.tta,
        "crop_scale": config.eval.crop_scale,
        "weights": weights,
    }


def judge_validation(
    folder: Path | None,
    config: ml_collections.ConfigDict,
    about: Mapping[str, Any],
    images: Subset,
    probabilities: np.ndarray,
) -> judgement.Judgement | None:
    """Fits a run's calibration.json and judges the same images without their own lesions.

    Args:
      folder: of the run, to write into; None: nowhere.
      config: of the run.
      about: `settings`, and `records`: their fingerprint.
      images: validation.
      probabilities: float64 [n, 7].

    Returns:
      See `judgement.cross_fit`.
    """
    table = images.table
    labels, lesion_ids = table["label"].to_numpy(), table["lesion_id"].to_numpy()
    if folder is not None and parallel.is_main():
        counts = {"num_images": len(table), "num_lesions": table["lesion_id"].nunique()}
        fitted = judgement.fit(labels, probabilities, lesion_ids)
        judgement.write(folder, fitted, {"split": "val", **about, **counts})
    return judgement.cross_fit(labels, probabilities, lesion_ids, config.eval.calibration)


def tell_calibration(
    member: Trained,
    fitted: tuple[judgement.Fitted, dict[str, Any]] | None,
    about: Mapping[str, Any],
) -> bool:
    """Says where a run has no calibration, or one for other probabilities.

    Args:
      member: the run.
      fitted: what `judgement.read` returned.
      about: `settings` of what it is to be applied to.

    Returns:
      Whether there is one.
    """
    line = ""
    if fitted is None:
        line = (
            f"{member.workdir} has no {judgement.FILE}: its probabilities stay as the network gives"
            f" them, without flag and sets. {judgement.how_to_make(member.workdir)}"
        )
    elif differs := judgement.mismatch(fitted[1], about):
        line = (
            f"{member.workdir}/{judgement.FILE} does not fit: {differs}. Fit it anew with the same"
            f" keys and --mode=eval --split=val --workdir={member.workdir}."
        )
    if line and parallel.is_main():
        console.log_line(line)
    return fitted is not None


def select(
    members: Sequence[Trained], datasets: Sequence[preparation.Dataset], split: str
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
                f"--workdir: {members[0].workdir} and {member.workdir} have different images in"
                f" split {split!r}. {why}"
            )
        aligned.append(of_member.take(place))
        if split != "train":
            lineage.refuse_seen(str(member.workdir), of_member.table, "--workdir")
    return aligned


def report(
    folder: Path,
    split: str,
    about: Mapping[str, Any],
    images: Subset,
    probabilities: np.ndarray,
    judged: judgement.Judgement | None,
    ood_scores: np.ndarray | None = None,
) -> dict[str, Any]:
    """Prints a table and writes metrics.json, predictions.csv and isic_submission.csv.

    Args:
      folder: where to write.
      split: its name.
      about: what the probabilities come from: `settings` and `records` of a run, or a list of such,
        with each `balanced_accuracy`, as `members` of an ensemble or `folds`.
      images: n of them.
      probabilities: float64 [n, 7], raw.
      judged: calibrated probabilities and thresholds, where there are any.
      ood_scores: float64 [n], where there is an out-of-distribution model.

    Returns:
      What metrics.json holds: the numbers of the raw probabilities, their 95 % intervals from a
      bootstrap over lesions, what they were measured on, `judgement.measure`, and of split test the
      challenge's own figures.
    """
    table = images.table
    image_ids, lesion_ids = table["image_id"].tolist(), table["lesion_id"].tolist()
    labels = table["label"].to_numpy()
    numbers = metrics.compute(labels, probabilities)
    intervals = bootstrap.intervals(labels, probabilities, table["lesion_id"].to_numpy())
    if split == "test":  # elsewhere nobody else's figures are there to compare them with
        about = {**about, "isic2018": isic.score(image_ids, labels, probabilities)}
    numbers = {
        "balanced_accuracy": numbers["balanced_accuracy"],
        "balanced_accuracy_interval": intervals["balanced_accuracy"],
        **numbers,
        "intervals": intervals,
        "split": split,
        **about,
        "num_lesions": len(set(lesion_ids)),
        **(
            judgement.measure(labels, table["lesion_id"].to_numpy(), judged, split not in FIXED)
            if judged
            else {}
        ),
        "classes": list(CLASSES),
        "note": DISCLAIMER,
    }
    if parallel.is_main():
        files.write_json(folder / "metrics.json", numbers)
        known = table[list(metrics.KNOWN)]
        if ood_scores is not None:
            known = known.assign(ood_score=ood_scores)
        metrics.write_predictions(
            folder / "predictions.csv",
            image_ids,
            lesion_ids,
            labels,
            probabilities,
            known,
        )
        metrics.write_isic_submission(folder / "isic_submission.csv", image_ids, probabilities)
        _print(numbers, folder)
    return numbers


def _print(numbers: dict[str, Any], folder: Path) -> None:
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
        ["balanced accuracy", with_interval("balanced_accuracy")],
        ["accuracy", with_interval("accuracy")],
        ["macro AUC", with_interval("macro_auc")],
        ["macro average precision", with_interval("macro_average_precision")],
        ["log loss", with_interval("log_loss")],
        ["expected calibration error", with_interval("expected_calibration_error")],
        *(_judgement_rows(numbers) if "calibration" in numbers else ()),
        *(
            [name, ", ".join(f"{p['balanced_accuracy']:.3f}" for p in numbers[name])]
            for name in ("members", "folds")
            if name in numbers
        ),
        *([["checkpoint", f"step {numbers['step']}"]] if "step" in numbers else []),
        ["written", f"{folder}/metrics.json, predictions.csv, isic_submission.csv"],
    ]
    console.print_table(DISCLAIMER, ["", ""], summary)


def _judgement_rows(numbers: dict[str, Any]) -> list[list[str]]:
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
    sets = decided["sets"]["0.90"]["class_conditional"]
    rows.append(
        [
            "prediction sets for 90 %",
            f"cover {sets['coverage']:.3f}, {sets['mean_size']:.2f} diagnoses on average",
        ]
    )
    return rows
