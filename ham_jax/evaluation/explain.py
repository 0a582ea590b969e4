"""`--mode=explain`: where a network looked, on the images whose answers are worth looking at.

Which images is a pure function of predictions.csv. A map shows which places spoke for an answer,
not whether they were right to; it is no evidence that the answer is. Answers and probabilities
here are the network's own, before calibration.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd

from ham_jax import DISCLAIMER, console, escape, files, parallel
from ham_jax.config import InputError
from ham_jax.data import image as image_files
from ham_jax.data import photographs
from ham_jax.data import prepare as preparation
from ham_jax.evaluation import metrics, on_lesion, predictions, robustness
from ham_jax.evaluation.predictions import Predictions
from ham_jax.model import Explanation, Model, restore

FOLDER = "explanations"
"""Its name in a run's folder."""

NUM_SHOWN = 6  # images a panel

_NAME_LENGTH = 40  # characters of a name over an image

Panels = Mapping[str, tuple[list[dict[str, Any]], np.ndarray, np.ndarray]]
"""{file name: (what the manifest says of each image, view, heat)}; see `draw`"""


def choose(judged: Predictions, num_shown: int = NUM_SHOWN) -> dict[str, list[int]]:
    """Returns the images worth looking at, of each lesion one at the most.

    Args:
      judged: n images.
      num_shown: of each kind; fewer where there are not so many.

    Returns:
      Row numbers by kind, the most extreme first: `confident_right` and `confident_wrong` by the
      probability of the answer, `uncertain` by the entropy of all.
    """
    probabilities = judged.probabilities
    right = metrics.correct_answers(judged)
    confidence = probabilities.max(axis=1)
    spread = np.where(probabilities > 0, probabilities, 1.0)
    entropy = -(spread * np.log(spread)).sum(axis=1)
    everyone = np.ones(len(judged), bool)
    chosen = {}
    for kind, among, rank in (
        ("confident_right", right, confidence),
        ("confident_wrong", ~right, confidence),
        ("uncertain", everyone, entropy),
    ):
        of_lesion: dict[Any, int] = {}
        for row in np.argsort(-rank, kind="stable"):
            if among[row]:
                of_lesion.setdefault(judged.lesion_ids[row], int(row))
        chosen[kind] = list(of_lesion.values())[:num_shown]
    return chosen


def run(
    workdir: Path,
    split: str,
    overrides: list[tuple[str, str]],
    mesh: jax.sharding.Mesh,
    output: Path | None = None,
) -> dict[str, Any]:
    """`--mode=explain`: panels of the images that a run's predictions.csv makes worth looking at.

    Args:
      workdir: of a training run.
      split: that its predictions.csv is of.
      overrides: (key, text) pairs of the command line.
      mesh: the devices.
      output: the folder to write into. Default: explanations/ in the run's.

    Returns:
      What explanations/manifest.json holds: `panels`, for each file its images.

    Raises:
      InputError: no checkpoint, no predictions, predictions of other images, or no masks where
        `eval.masks` names some.
    """
    path = workdir / "predictions.csv"
    judged = predictions.read(path)
    model = restore(workdir, overrides, mesh)
    masks = on_lesion.Masks(model.config.eval.masks) if model.config.eval.masks else None
    of_split = preparation.prepare(model.config).select(split)
    place = pd.Index(of_split.table["image_id"]).get_indexer(judged.image_ids)
    if (place < 0).any() or judged.classes.names != model.classes.names:
        raise InputError(
            f"{path} does not hold images of split {split!r} alone: give --split as it was"
            f" evaluated, or make it anew with --mode=eval --workdir={workdir} --split={split}."
        )
    chosen = choose(judged)
    rows = np.concatenate([np.array(of_kind, int) for of_kind in chosen.values()])
    answers = judged.probabilities.argmax(axis=1)
    images = of_split.take(place[rows])
    explained = model.explain(
        images[np.arange(len(rows))], answers[rows], model.encode(images.table)
    )
    panels = _panels(judged, chosen, explained)
    folder = output or workdir / FOLDER
    if masks:
        few = robustness.choose(of_split.table.iloc[place], model.config.eval.robustness_images)
        table = on_lesion.measure(model, of_split.take(place[few]), answers[few], masks)
        _write_on_lesion(folder, model, table.assign(split=split, step=model.provenance["step"]))
    return _write(folder, model, {"split": split}, panels)


def _panels(
    judged: Predictions, chosen: Mapping[str, Sequence[int]], explained: Explanation
) -> Panels:
    """Returns what each file shows: `explained` has the chosen rows, kind by kind."""
    answers, names = judged.probabilities.argmax(axis=1), judged.classes.names
    panels, first = {}, 0
    for kind, of_kind in chosen.items():
        said = [
            {
                "image_id": judged.image_ids[row],
                "truth": names[judged.labels[row]],
                "prediction": names[answers[row]],
                "probability": float(judged.probabilities[row, answers[row]]),
            }
            for row in of_kind
        ]
        if said:
            panels[f"{kind}.png"] = said, *_part(explained, slice(first, first + len(said)))
        first += len(said)
    return panels


def _write_on_lesion(folder: Path, model: Model, table: pd.DataFrame) -> None:
    """Writes what masks told, and prints it by diagnosis."""
    if not parallel.is_main():
        return
    path = folder / on_lesion.FILE
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(path, escape.csv_text([[*table], *table.fillna("").to_numpy().tolist()]))
    summary = on_lesion.summarise(table, model.classes)
    rows = []
    for name, row in [*summary["per_class"].items(), ("mean of these", summary["mean"])]:
        low, high = row["interval"]
        difference = f"{row['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
        shares = [f"{row['heat']:.3f}", f"{row['area']:.3f}"]
        rows.append([name, str(row["num_images"]), *shares, difference])
    title = f"How much of the heat lies on the lesion: {path}"
    columns = ["diagnosis", "images", "of the heat", "of the view", "difference"]
    console.print_table(title, columns, rows)


def run_on_photographs(
    workdir: Path,
    images: str,
    overrides: list[tuple[str, str]],
    mesh: jax.sharding.Mesh,
    output: Path | None = None,
) -> dict[str, Any]:
    """`--mode=explain --images=...`: panels of a person's own photographs, in their order.

    Args:
      workdir: of a training run.
      images: see `photographs.find_images`; a line says which cannot be read.
      overrides: (key, text) pairs of the command line.
      mesh: the devices.
      output: the folder to write into. Default: explanations/ in the run's.

    Returns:
      As `run`.

    Raises:
      InputError: no checkpoint, invalid metadata, or no photograph that can be read.
    """
    found = photographs.find_images(images)
    table = photographs.find_metadata(images, len(found.paths))
    model = restore(workdir, overrides, mesh)
    if found.left_out and parallel.is_main():
        console.log_line(f"Not looked at: {found.counted()}.")
    read: dict[int, np.ndarray] = {}
    decoded = image_files.load_many(found.sources, model.canvas, model.config.data.num_workers)
    for number, pixels in enumerate(decoded):
        if not isinstance(pixels, image_files.ImageError):
            read[number] = pixels
        elif parallel.is_main():
            console.log_line(f"{escape.shown(found.paths[number])}: {escape.shown(pixels)}")
    if not read:
        raise InputError("No photograph could be read.")
    image, codes = np.stack(list(read.values())), model.encode(table.iloc[list(read)])
    probabilities = model.probabilities(image, codes)
    explained = model.explain(image, probabilities.argmax(axis=1), codes)
    said = [
        {
            "image": escape.shown(found.paths[number]),
            "prediction": model.classes.names[row.argmax()],
            "probability": float(row.max()),
        }
        for number, row in zip(read, probabilities, strict=True)
    ]
    panels = {}
    for first in range(0, len(said), NUM_SHOWN):
        page = slice(first, first + NUM_SHOWN)
        panels[f"photographs{first // NUM_SHOWN + 1}.png"] = said[page], *_part(explained, page)
    return _write(output or workdir / FOLDER, model, {}, panels)


def _part(explained: Explanation, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    return explained.view[rows], explained.heat[rows]


def _write(folder: Path, model: Model, beside: Mapping[str, Any], panels: Panels) -> dict[str, Any]:
    """Writes the panels and the manifest, and says where; returns the manifest."""
    manifest = {
        **beside,
        "step": model.provenance["step"],
        "panels": {name: images for name, (images, _, _) in panels.items()},
        "note": DISCLAIMER,
    }
    if parallel.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        for name, panel in panels.items():
            files.write_bytes(folder / name, draw(*panel))
        files.write_json(folder / "manifest.json", manifest)
        written = [[name, f"{len(images)} images"] for name, images in manifest["panels"].items()]
        console.print_table(f"{folder}. {DISCLAIMER}", ["panel", ""], written)
    return manifest


def draw(images: Sequence[Mapping[str, Any]], view: np.ndarray, heat: np.ndarray) -> bytes:
    """Returns a panel as PNG: a row an image, its view and beside it the heat map over it.

    Args:
      images: [n], what the manifest says of each: `image_id` or `image`, `truth` where it is
        known, `prediction` and `probability`.
      view: float [n, s, s, 3] in [0, 1].
      heat: float [n, s, s] in [0, 1].
    """
    from matplotlib.figure import Figure  # takes a second; without pyplot nothing is global

    figure = Figure(figsize=(5, 2.7 * len(images) + 0.4), layout="constrained")
    figure.suptitle(DISCLAIMER, fontsize=8)
    plain = {"fontsize": 8, "parse_math": False}  # a name may hold a $
    axes = figure.subplots(len(images), 2, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for about, pixels, hot, (left, right) in zip(images, view, heat, axes, strict=False):
        pixels = np.clip(pixels, 0, 1)  # a scaled white may round to 1.0000001
        left.imshow(pixels)
        right.imshow(pixels)
        right.imshow(hot, cmap="inferno", vmin=0, vmax=1, alpha=0.6 * hot)
        name = about["image_id"] if "image_id" in about else Path(about["image"]).name
        name = escape.shown(name)
        if len(name) > _NAME_LENGTH:
            name = f"{name[: _NAME_LENGTH // 2]}...{name[-_NAME_LENGTH // 2 :]}"
        truth = f"\ntruth: {about['truth']}" if "truth" in about else ""
        left.set_title(f"{name}{truth}", **plain)
        right.set_title(f"answer: {about['prediction']} {about['probability']:.2f}", **plain)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Of letters that the font has not, which are drawn as boxes; the manifest has the name.
        warnings.simplefilter("ignore", UserWarning)
        # Without the version of matplotlib in it, the same images are the same bytes.
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
