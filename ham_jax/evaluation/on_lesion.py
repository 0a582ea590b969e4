"""Whether a network looks at the lesion: how much of its heat lies there, against chance.

A map that knows nothing of the lesion has as much of its heat on it as the lesion has of the
picture. More than that shows where the network looked, not that its answer is right; and hair,
rulers or a dark corner over the lesion's edge count by their place alone.
"""

import contextlib
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ham_jax import console, reading
from ham_jax.classes import Classes
from ham_jax.config import InputError
from ham_jax.data import folders
from ham_jax.data import image as image_files
from ham_jax.data.records import Subset
from ham_jax.evaluation import bootstrap
from ham_jax.model import Model

FILE = "on_lesion.csv"
COLUMNS = ("image_id", "lesion_id", "truth", "prediction", "heat_on_lesion", "lesion_area")
"""Of FILE; beside them `split` and `step`."""

_SUFFIX = "_segmentation"  # of HAM10000's masks, after the image's name
_MAX_MASK_BYTES = 64 << 20
_NUM_DRAWS = 1000


class Masks:
    """The lesion masks of a folder or a zip: `<image_id>.png` or `<image_id>_segmentation.png`.

    Args:
      path: of the folder or zip.

    Raises:
      InputError: there is no such, or no mask in it.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = path = Path(path)
        try:
            if path.is_dir():
                names = [str(file) for file in folders.walk(path).files]
            else:
                with reading.open_zip(path) as archive:
                    names = archive.namelist()
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(
                f"eval.masks = {str(path)!r} is neither a folder nor a zip of masks: {error}"
            ) from error
        self._names = {
            Path(name).stem.removesuffix(_SUFFIX): name
            for name in names
            if name.lower().endswith(".png")
        }
        if not self._names:
            raise InputError(f"eval.masks = {str(path)!r} holds no .png.")

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._names

    def read(self, image_ids: Sequence[str], size_px: int, crop_scale: float) -> np.ndarray:
        """Returns how much of each pixel of a network's view is lesion, float [n, s, s] in [0, 1].

        A mask covers its whole photograph, or the central square of it; the view is the middle of
        that square.

        Args:
          image_ids: those of masks that are there.
          size_px: side of the view.
          crop_scale: side of the view, as a share of the square's.

        Raises:
          InputError: of masks that cannot be read.
        """
        border = round((size_px / crop_scale - size_px) / 2)
        side, inside = size_px + 2 * border, slice(border, border + size_px)
        found, faults = [], []
        with self._files() as read:
            for image_id in image_ids:
                try:
                    pixels = image_files.load(read(self._names[image_id]), (side, side))
                    found.append(pixels[inside, inside, 0] / 255)
                except (image_files.ImageError, OSError, *reading.ZIP_ERRORS) as error:
                    faults.append(f"eval.masks: {self._names[image_id]!r}: {error}")
        if faults:
            raise InputError(faults)
        return np.stack(found)

    @contextlib.contextmanager
    def _files(self) -> Iterator[Any]:
        """Yields what returns a file, as `image.load` takes it, of its name."""
        if self._path.is_dir():
            yield Path
            return
        with reading.open_zip(self._path) as archive:
            yield lambda name: reading.read_member(archive, name, _MAX_MASK_BYTES)


def measure(model: Model, images: Subset, answers: np.ndarray, masks: Masks) -> pd.DataFrame:
    """Measures the heat for a network's answers on the lesions of images.

    Args:
      model: the network.
      images: n of them.
      answers: int [n], the class that each map speaks for.
      masks: images without one are left out.

    Returns:
      A row an image, of COLUMNS. heat_on_lesion is the share of the map's sum that lies on the
      lesion, nan where nothing speaks for the answer; lesion_area the lesion's share of the view.

    Raises:
      InputError: no image has a mask, or one cannot be read.
    """
    table = images.table
    rows = np.flatnonzero([image_id in masks for image_id in table["image_id"]])
    if not len(rows):
        raise InputError(
            f"eval.masks holds no mask of the {len(table)} images, such as"
            f" {table['image_id'].iloc[0]}.png."
        )
    size, parts = model.config.eval.batch_size, []
    with console.progress("Comparing with masks") as progress:
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            some = images.take(part)
            lesion = masks.read(
                some.table["image_id"].tolist(),
                model.config.augment.crop_px,
                model.config.eval.crop_scale,
            )
            explained = model.explain(
                some[np.arange(len(part))], answers[part], model.encode(some.table)
            )
            parts.append(shares(explained.heat, lesion))
            progress(start + len(part), len(rows))
    on_lesion, area = np.concatenate(parts, axis=1)
    names = np.array(model.classes.names, object)
    chosen = table.iloc[rows]
    columns = (
        chosen["image_id"].to_numpy(),
        chosen["lesion_id"].to_numpy(),
        names[chosen["label"].to_numpy()],
        names[answers[rows]],
        on_lesion,
        area,
    )
    return pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)))


def shares(heat: np.ndarray, lesion: np.ndarray) -> np.ndarray:
    """Returns the share of each map's sum on the lesion and the lesion's of the view, [2, n].

    Args:
      heat: not negative, [n, s, s]; the first share is nan where it is all 0.
      lesion: in [0, 1], [n, s, s].
    """
    total = heat.sum((1, 2), dtype=float)
    on_lesion = (heat * lesion).sum((1, 2), dtype=float)
    whole = np.where(total > 0, total, 1)
    return np.stack([np.where(total > 0, on_lesion / whole, np.nan), lesion.mean((1, 2))])


def summarise(table: pd.DataFrame, classes: Classes) -> dict[str, Any]:
    """Returns what a table of `measure` says of each diagnosis and of all.

    Args:
      table: of COLUMNS.
      classes: of the network.

    Returns:
      num_images; num_without_heat, which are left out; and `per_class`: {class that is there:
      num_images, heat and area (means over its images), difference, and the 95 % bootstrap
      interval of that over lesions}; `mean`: the same of the mean over these classes.
    """
    told = table[table["heat_on_lesion"].notna()]
    labels = told["truth"].map(classes.index).to_numpy(int)
    there = np.unique(labels)
    values = told[["heat_on_lesion", "lesion_area"]].to_numpy(float)
    values = np.column_stack([values, values[:, 0] - values[:, 1]])

    def means(weights: np.ndarray) -> np.ndarray:
        """Of classes and their mean, [K + 1, 3, d] of weights [n, d]."""
        of_class = [
            values[labels == k].T @ weights[labels == k] / weights[labels == k].sum(0)
            for k in there
        ]
        return np.stack([*of_class, np.mean(of_class, axis=0)])

    found = means(np.ones((len(told), 1)))[:, :, 0]
    lesion_ids = told["lesion_id"].to_numpy(str)
    resamples = bootstrap.resamples(labels, lesion_ids, _NUM_DRAWS, seed=0)
    drawn = np.concatenate([means(weights)[:, 2] for weights in resamples], axis=-1)
    counts = [*(int((labels == k).sum()) for k in there), len(told)]
    *per_class, mean = [
        {
            "num_images": num,
            "heat": heat,
            "area": area,
            "difference": difference,
            "interval": bootstrap.percentiles(draws),
        }
        for num, (heat, area, difference), draws in zip(counts, found.tolist(), drawn, strict=True)
    ]
    return {
        "num_images": len(table),
        "num_without_heat": len(table) - len(told),
        "per_class": {classes.names[k]: row for k, row in zip(there, per_class, strict=True)},
        "mean": mean,
    }
