"""`--mode=explain`: where a network looked, on the images whose answers are worth looking at.

Which images is a pure function of predictions.csv. A map shows which places spoke for an answer,
not whether they were right to; it is no evidence that the answer is. Answers and probabilities
here are the network's own, before calibration.
"""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from ham_jax import CLASSES, DISCLAIMER, console, escape, files, parallel
from ham_jax.config import InputError
from ham_jax.data import image as image_files
from ham_jax.data import metadata, photographs, preprocess
from ham_jax.data import prepare as preparation
from ham_jax.evaluation import evaluate, metrics

FOLDER = "explanations"
"""Its name in a run's folder."""

NUM_SHOWN = 6  # images a panel

_NAME_LENGTH = 40  # characters of a name over an image


def choose(
    labels: np.ndarray,
    probabilities: np.ndarray,
    lesions: Sequence[str],
    num_shown: int = NUM_SHOWN,
) -> dict[str, list[int]]:
    """Returns the images worth looking at, of each lesion one at the most.

    Args:
      labels: int [n].
      probabilities: float [n, c].
      lesions: [n], the lesion of each image.
      num_shown: of each kind; fewer where there are not so many.

    Returns:
      Row numbers by kind, the most extreme first: `confident_right` and `confident_wrong` by the
      probability of the answer, `uncertain` by the entropy of all.
    """
    right = metrics.correct_answers(labels, probabilities)
    confidence = probabilities.max(axis=1)
    spread = np.where(probabilities > 0, probabilities, 1.0)
    entropy = -(spread * np.log(spread)).sum(axis=1)
    everyone = np.ones(len(labels), bool)
    chosen = {}
    for kind, among, rank in (
        ("confident_right", right, confidence),
        ("confident_wrong", ~right, confidence),
        ("uncertain", everyone, entropy),
    ):
        of_lesion: dict[str, int] = {}
        for row in np.argsort(-rank, kind="stable"):
            if among[row]:
                of_lesion.setdefault(lesions[row], int(row))
        chosen[kind] = list(of_lesion.values())[:num_shown]
    return chosen


def grad_cam(last: jax.Array, gradient: jax.Array) -> jax.Array:
    """Returns how much each place of a map speaks for a class, [B, h, w], 0 where not at all.

    Selvaraju et al., Grad-CAM, ICCV 2017: a channel weighs what the logit's derivative is on
    average over all places (eq. 1), and the positive part of the weighted sum is shown (eq. 2).

    Args:
      last: the map, [B, h, w, K].
      gradient: of the class's logit with respect to it, [B, h, w, K].
    """
    weights = gradient.mean((1, 2))
    return jax.nn.relu(jnp.einsum("bhwk,bk->bhw", last, weights))


class Explained(NamedTuple):
    """What `explain` returns of n images.

    Attributes:
      view: what the network saw, float32 [n, s, s, 3] in [0, 1].
      heat: the Grad-CAM scaled to it, float32 [n, s, s]; 1 at its own maximum, 0 where nothing
        speaks for the class.
    """

    view: np.ndarray
    heat: np.ndarray


def explain(
    member: evaluate.Trained,
    image: np.ndarray,
    classes: np.ndarray,
    codes: np.ndarray | None,
    mesh: jax.sharding.Mesh,
) -> Explained:
    """Computes the maps of a class for each image, of the upright view alone.

    Args:
      member: the network.
      image: canvas pixels, uint8 [n, H, W, 3].
      classes: int [n], the class to speak for.
      codes: metadata, float32 [n, M], where the network takes them.
      mesh: the devices.
    """
    config = member.config

    def maps(variables, image, classes, metadata):
        view = preprocess.eval_view(
            image, config.augment.crop_px, config.eval.crop_scale, config.augment.shades_of_gray
        )
        heat = grad_cam(
            *member.network.class_maps(
                variables["params"], variables["batch_stats"], view, classes, metadata
            )
        )
        heat = jax.image.resize(heat, view.shape[:3], "bilinear")
        return view, heat / jnp.maximum(heat.max((1, 2), keepdims=True), 1e-12)

    compiled = jax.jit(maps, out_shardings=parallel.replicated(mesh))
    given = (image, classes.astype(np.int32), codes)
    return Explained(
        *_in_batches(lambda *batch: compiled(member.variables, *batch), given, member, mesh)
    )


def _in_batches(function: Callable, arrays: Any, member: evaluate.Trained, mesh: jax.sharding.Mesh):
    """Returns function(*arrays) as NumPy arrays, computed on batches of their first axis."""
    num_rows, num_devices = len(jax.tree.leaves(arrays)[0]), mesh.devices.size
    # A few images need not fill the batch of an evaluation.
    batch_size = min(member.config.eval.batch_size, -(-num_rows // num_devices) * num_devices)
    local = parallel.local_rows(mesh, batch_size)
    parts = []
    for start in range(0, num_rows, batch_size):
        rows = np.arange(start, start + batch_size).clip(max=num_rows - 1)[local]
        batch = parallel.shard(mesh, jax.tree.map(lambda x, rows=rows: x[rows], arrays))
        parts.append(jax.tree.map(np.asarray, function(*batch)))
    return jax.tree.map(lambda *of_parts: np.concatenate(of_parts)[:num_rows], *parts)


def run(
    workdir: Path, split: str, overrides: list[tuple[str, str]], mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """`--mode=explain`: panels of the images that a run's predictions.csv makes worth looking at.

    Args:
      workdir: of a training run.
      split: that its predictions.csv is of.
      overrides: (key, text) pairs of the command line.
      mesh: the devices.

    Returns:
      What explanations/manifest.json holds: `panels`, for each file its images.

    Raises:
      InputError: no checkpoint, no predictions, or predictions of other images.
    """
    path = workdir / "predictions.csv"
    image_ids, lesions, labels, probabilities = metrics.read_predictions(path)
    member = evaluate.load(workdir, overrides, mesh)
    of_split = preparation.prepare(member.config).select(split)
    table = of_split.table
    place = pd.Index(table["image_id"]).get_indexer(image_ids)
    if not image_ids or (place < 0).any():
        raise InputError(
            f"{path} does not hold images of split {split!r} alone: give --split as it was"
            f" evaluated, or make it anew with --mode=eval --workdir={workdir} --split={split}."
        )
    chosen = choose(labels, probabilities, lesions)
    together = np.concatenate([np.array(of_kind, int) for of_kind in chosen.values()])
    codes = None
    if member.config.model.metadata:
        codes = metadata.encode(table.iloc[place[together]])
    answers = probabilities.argmax(axis=1)
    explained = explain(member, of_split[place[together]], answers[together], codes, mesh)
    panels, first = {}, 0
    for kind, of_kind in chosen.items():
        about = [
            {
                "image_id": image_ids[row],
                "truth": CLASSES[labels[row]],
                "prediction": CLASSES[answers[row]],
                "probability": float(probabilities[row, answers[row]]),
            }
            for row in of_kind
        ]
        end = first + len(about)
        if about:
            panels[f"{kind}.png"] = about, explained.view[first:end], explained.heat[first:end]
        first = end
    return _write(workdir, member, {"split": split}, panels)


def run_on_photographs(
    workdir: Path, images: str, overrides: list[tuple[str, str]], mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """`--mode=explain --images=...`: panels of a person's own photographs, in their order.

    Args:
      workdir: of a training run.
      images: see `photographs.find_images`; a line says which cannot be read.
      overrides: (key, text) pairs of the command line.
      mesh: the devices.

    Returns:
      As `run`.

    Raises:
      InputError: no checkpoint, metadata that are none, or no photograph that can be read.
    """
    found = photographs.find_images(images)
    known = photographs.find_metadata(images, len(found.paths))
    member = evaluate.load(workdir, overrides, mesh)
    config = member.config
    if found.left_out and parallel.is_main():
        console.log_line(f"Not looked at: {found.counted()}.")
    canvases, read = [], []
    for number, pixels in enumerate(
        image_files.load_many(found.sources, tuple(config.data.canvas), config.data.num_workers)
    ):
        if not isinstance(pixels, image_files.ImageError):
            canvases.append(pixels)
            read.append(number)
        elif parallel.is_main():
            console.log_line(f"{escape.shown(found.paths[number])}: {escape.shown(pixels)}")
    if not read:
        raise InputError("No photograph could be read.")
    image = np.stack(canvases)
    codes = metadata.encode(known.iloc[read]) if config.model.metadata else None
    predict = evaluate.make_predictor(member.network, config, mesh)
    probabilities = _in_batches(
        lambda *batch: predict(member.variables, *batch), (image, codes), member, mesh
    )
    explained = explain(member, image, probabilities.argmax(axis=1), codes, mesh)
    panels = {}
    for first in range(0, len(read), NUM_SHOWN):
        page = slice(first, first + NUM_SHOWN)
        about = [
            {
                "image": escape.shown(found.paths[number]),
                "prediction": CLASSES[row.argmax()],
                "probability": float(row.max()),
            }
            for number, row in zip(read[page], probabilities[page], strict=True)
        ]
        name = f"photographs{first // NUM_SHOWN + 1}.png"
        panels[name] = about, explained.view[page], explained.heat[page]
    return _write(workdir, member, {}, panels)


def _write(
    workdir: Path,
    member: evaluate.Trained,
    about: Mapping[str, Any],
    panels: Mapping[str, tuple[list[dict[str, Any]], np.ndarray, np.ndarray]],
) -> dict[str, Any]:
    """Writes the panels and the manifest, and says where; returns the manifest."""
    manifest = {
        **about,
        "step": member.step,
        "panels": {name: images for name, (images, _, _) in panels.items()},
        "note": DISCLAIMER,
    }
    if parallel.is_main():
        folder = workdir / FOLDER
        folder.mkdir(exist_ok=True)
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
