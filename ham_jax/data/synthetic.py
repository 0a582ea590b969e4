"""Draws skin lesions and writes them as HAM10000 is written: the embedded default's data.

The pictures only resemble dermoscopy. Each class has typical shapes, colours and structures that
overlap with the others', so that a network must look at more than the mean colour.
"""

import colorsys
import dataclasses
import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ham_jax import files
from ham_jax.classes import HAM10000, Classes
from ham_jax.config import InputError
from ham_jax.data import image

SIZE = (120, 160)  # height, width of a photograph in pixels
_FIRST_ID = 24306  # HAM10000's first is ISIC_0024306
_SHARES = (0.10, 0.12, 0.14, 0.08, 0.14, 0.34, 0.08)  # of the lesions, as in `HAM10000`
_MAX_PHOTOGRAPHS = 3  # of one lesion
_SITES = ("back", "trunk", "face", "lower extremity", "upper extremity", "unknown")
_DRAWING_VERSION = 1


@dataclasses.dataclass(frozen=True)
class _Look:
    """What is typical of a diagnosis.

    Attributes:
      color: of the lesion, RGB in [0, 1].
      spread: of that colour between lesions.
      irregular: how far the border leaves an ellipse.
      sharp: how steep the border is.
      network: contrast of a pigment network.
      dots: number of dark globules.
      vessels: number of red curves.
      veil: strength of a blue-white patch.
      scale: contrast of whitish scales.
      center: brightness of a scar-like centre.
      lakes: number of red or purple lagoons.
    """

    color: tuple[float, float, float]
    spread: float = 0.04
    irregular: float = 0.12
    sharp: float = 12.0
    network: float = 0.0
    dots: int = 0
    vessels: int = 0
    veil: float = 0.0
    scale: float = 0.0
    center: float = 0.0
    lakes: int = 0


_LOOKS = {
    "akiec": _Look((0.80, 0.52, 0.47), irregular=0.15, sharp=6.0, scale=0.3, vessels=1),
    "bcc": _Look((0.74, 0.60, 0.60), irregular=0.10, sharp=14.0, vessels=10, dots=3),
    "bkl": _Look((0.62, 0.48, 0.33), irregular=0.12, sharp=25.0, dots=12, scale=0.12),
    "df": _Look((0.68, 0.50, 0.42), irregular=0.06, sharp=5.0, network=0.06, center=0.35),
    "mel": _Look((0.40, 0.28, 0.25), irregular=0.30, sharp=12.0, network=0.10, dots=6, veil=0.5),
    "nv": _Look((0.50, 0.35, 0.27), irregular=0.07, sharp=10.0, network=0.17),
    "vasc": _Look((0.66, 0.28, 0.34), irregular=0.12, sharp=14.0, lakes=7),
}


def write(
    folder: str | os.PathLike,
    num_images: int,
    seed: int,
    classes: Classes = HAM10000,
    *,
    min_lesions: int = 1,
) -> bool:
    """Writes a data set in the Kaggle layout, unless it is there already.

    Args:
      folder: becomes `HAM10000_metadata.csv` and two folders of `ISIC_*.jpg`.
      num_images: photographs in all; several may show one lesion.
      seed: of all drawing.
      classes: the diagnoses. HAM10000's seven have about its shares, others equal ones.
      min_lesions: that each class must have, such as the number of folds.

    Returns:
      Whether it was written now.

    Raises:
      InputError: the folder holds something else, or what it holds is damaged; or a class would
        have too few lesions.
    """
    folder = Path(folder)
    made_by: dict[str, Any] = {
        "num_images": num_images,
        "seed": seed,
        "drawing_version": _DRAWING_VERSION,
    }
    if classes.names != HAM10000.names:
        made_by["classes"] = list(classes)
    marker = folder / "synthetic.json"
    if marker.exists():
        if files.read_json(marker, f"Delete {folder}.") == made_by:
            return False
    elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} holds other files; give synthetic lesions a new folder.")
    rows = _plan(num_images, seed, classes)
    needed = _num_lesions(classes, min_lesions)
    if rows["lesion_id"].nunique() < needed:
        raise InputError(
            f"{num_images} synthetic images are too few for {len(classes)} classes with"
            f" {min_lesions} lesions each. Set data.synthetic_images to"
            f" {needed * _MAX_PHOTOGRAPHS} or more."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        drawn = Path(temporary) / "drawn"
        drawn.mkdir()
        _draw_all(drawn, rows, seed)
        files.write_json(drawn / marker.name, made_by)
        if folder.exists():
            shutil.rmtree(folder)  # of other numbers, made by this function
        os.replace(drawn, folder)
    return True


def draw(dx: str, lesion_seed: list[int], view_seed: list[int]) -> np.ndarray:
    """Draws one photograph, uint8 [120, 160, 3].

    Args:
      dx: its class.
      lesion_seed: what the lesion looks like.
      view_seed: how it was photographed: place, turn, size, light, hair.
    """
    lesion, view = np.random.default_rng(lesion_seed), np.random.default_rng(view_seed)
    look = _LOOKS.get(dx.lower()) or _look_of(dx)
    height, width = SIZE
    y, x = np.mgrid[:height, :width].astype(np.float32)

    # Skin: a tone, a soft texture, the vignette of a dermatoscope.
    tone = np.array([0.88, 0.70, 0.60]) * lesion.uniform(0.8, 1.08) + lesion.normal(0, 0.02, 3)
    picture = tone + 0.05 * _noise(view, 6)[..., None] + 0.02 * _noise(view, 40)[..., None]

    # The lesion's own coordinates: turned, moved, scaled; (0, 0) its middle, 1 its border.
    turn = view.uniform(0, 2 * np.pi)
    size = lesion.uniform(31, 44) * view.uniform(0.9, 1.1)
    dx_px = x - width / 2 - view.normal(0, 9)
    dy_px = y - height / 2 - view.normal(0, 7)
    u = (np.cos(turn) * dx_px + np.sin(turn) * dy_px) / size
    v = (np.cos(turn) * dy_px - np.sin(turn) * dx_px) / (size * lesion.uniform(0.65, 1.0))
    angle, radius = np.arctan2(v, u), np.hypot(u, v)
    border = np.ones_like(radius)
    for wave in range(2, 8):
        amplitude = look.irregular * lesion.normal() / wave**0.5
        border += amplitude * np.cos(wave * angle + lesion.uniform(0, 2 * np.pi))
    inside = 1 / (1 + np.exp(np.clip(look.sharp * (radius - border), -30, 30)))
    picture = _over(picture, _body(look, lesion, u, v), inside)

    for _ in range(view.integers(0, 4)):  # hair
        across = view.uniform(0, 2 * np.pi)
        distance = (x - view.uniform(0, width)) * np.cos(across)
        distance = distance + (y - view.uniform(0, height)) * np.sin(across)
        picture = _over(picture, np.array([0.15, 0.10, 0.08]), np.clip(1.2 - abs(distance), 0, 0.8))
    vignette = 1 - 0.25 * (((x / width - 0.5) ** 2 + (y / height - 0.5) ** 2) * 2)
    light = vignette[..., None] * view.uniform(0.88, 1.08) * (1 + view.normal(0, 0.02, 3))
    picture = picture * light + view.normal(0, 0.012, picture.shape)
    return (np.clip(picture, 0, 1) * 255).astype(np.uint8)


def _body(look: _Look, lesion: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Returns a lesion's colours and structures at its own coordinates, [H, W, 3]."""
    color = np.array(look.color) + lesion.normal(0, look.spread) + lesion.normal(0, 0.02, 3)
    body = np.broadcast_to(color, (*u.shape, 3)).copy()
    body += 0.05 * _noise(lesion, 5)[..., None]
    if look.network:
        pitch = lesion.uniform(12, 18)
        lines = np.maximum(np.cos(pitch * u + 2 * v), np.cos(pitch * v - 2 * u))
        body -= look.network * lesion.uniform(0.5, 1.3) * np.clip(lines, 0, 1)[..., None]
    for spot in _spots(lesion, look.dots, u, v, (0.05, 0.10)):
        body = _over(body, color * 0.55, spot)
    for spot in _spots(lesion, look.lakes, u, v, (0.14, 0.26)):
        body = _over(body, np.array([0.52, 0.10, 0.22]), 0.9 * spot)
    for _ in range(look.vessels):
        start, bend = lesion.uniform(-0.8, 0.8, 2), lesion.uniform(2, 5)
        line = np.abs(v - start[1] - 0.15 * np.sin(bend * (u - start[0])))
        along = np.abs(u - start[0]) < lesion.uniform(0.3, 0.7)
        body = _over(body, np.array([0.72, 0.20, 0.22]), np.clip(1.3 - line / 0.06, 0, 1) * along)
    if look.veil:
        (patch,) = _spots(lesion, 1, u, v, (0.35, 0.6))
        body = _over(body, np.array([0.55, 0.60, 0.70]), look.veil * patch)
    if look.center:
        fall = np.exp(-((np.hypot(u, v) / 0.4) ** 2))
        body += look.center * lesion.uniform(0.6, 1.2) * fall[..., None]
    if look.scale:
        body += look.scale * np.clip(_noise(lesion, 25), 0, None)[..., None]
    return body


def _look_of(dx: str) -> _Look:
    """Returns a look of its own for a class that HAM10000 does not have, derived from its name."""
    rng = np.random.default_rng([*hashlib.sha256(dx.lower().encode()).digest()])
    hue, strength, light = rng.uniform((0, 0.4, 0.35), (1, 0.9, 0.85))
    structures: dict[str, Any] = {
        "network": 0.15,
        "dots": 10,
        "vessels": 8,
        "veil": 0.6,
        "scale": 0.3,
        "center": 0.35,
        "lakes": 6,
    }
    chosen = rng.choice(list(structures), 2, replace=False).tolist()
    return _Look(
        colorsys.hsv_to_rgb(hue, strength, light),
        irregular=rng.uniform(0.05, 0.3),
        sharp=rng.uniform(5, 25),
        **{name: structures[name] for name in chosen},
    )


def _turns(classes: Classes) -> Iterator[int]:
    """Yields the label of each lesion: by their shares, so that each has its part of any number."""
    shares = _SHARES if classes.names == HAM10000.names else np.full(len(classes), 1 / len(classes))
    drawn = np.zeros(len(classes))
    while True:
        label = int(np.argmin((drawn + 0.5) / shares))
        drawn[label] += 1
        yield label


def _num_lesions(classes: Classes, per_class: int) -> int:
    """Returns how many lesions it takes for each class to have so many."""
    counts, turns = np.zeros(len(classes), int), _turns(classes)
    while counts.min() < per_class:
        counts[next(turns)] += 1
    return int(counts.sum())


def _plan(num_images: int, seed: int, classes: Classes) -> pd.DataFrame:
    """Returns the table of the photographs to be drawn, a row each."""
    rng = np.random.default_rng(seed)
    rows = []
    for number, label in enumerate(_turns(classes)):
        if len(rows) >= num_images:
            break
        age = rng.choice([np.nan, *range(20, 86, 5)])
        about = {
            "dx": classes.names[label],
            "dx_type": rng.choice(["histo", "follow_up", "consensus"]),
            "age": age,
            "sex": rng.choice(["male", "female", "unknown"], p=[0.5, 0.45, 0.05]),
            "localization": rng.choice(_SITES),
        }
        for _ in range(min(rng.integers(1, _MAX_PHOTOGRAPHS + 1), num_images - len(rows))):
            ids = {
                "lesion_id": f"HAM_{number:07d}",
                "image_id": f"ISIC_{_FIRST_ID + len(rows):07d}",
            }
            rows.append({**ids, **about})
    return pd.DataFrame(rows)


def _draw_all(folder: Path, table: pd.DataFrame, seed: int) -> None:
    parts = [folder / "HAM10000_images_part_1", folder / "HAM10000_images_part_2"]
    for part in parts:
        part.mkdir()
    lesions = itertools.groupby(enumerate(table.itertuples()), lambda row: row[1].lesion_id)
    for number, (_, views) in enumerate(lesions):
        for view, (place, row) in enumerate(views):
            pixels = draw(row.dx, [seed, number, 0], [seed, number, 1, view])
            part = parts[place >= len(table) // 2]
            image.save_jpeg(pixels, part / f"{row.image_id}.jpg", quality=90)
    table.to_csv(folder / "HAM10000_metadata.csv", index=False)


def _noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Returns smooth noise of deviation about 1 with `cells` bumps along the width."""
    height, width = SIZE
    rows = max(2, cells * height // width)
    grid = rng.normal(size=(rows + 1, cells + 1))
    y = np.linspace(0, rows - 1e-6, height)
    x = np.linspace(0, cells - 1e-6, width)
    top, left = y.astype(int), x.astype(int)
    down, right = (y - top)[:, None], (x - left)[None]
    upper = grid[top][:, left] * (1 - right) + grid[top][:, left + 1] * right
    lower = grid[top + 1][:, left] * (1 - right) + grid[top + 1][:, left + 1] * right
    return (upper * (1 - down) + lower * down).astype(np.float32)


def _spots(rng, count, u, v, sizes):
    """Yields soft discs within the lesion, [H, W] in [0, 1]."""
    for _ in range(count):
        angle, away = rng.uniform(0, 2 * np.pi), 0.75 * np.sqrt(rng.uniform())
        distance = np.hypot(u - away * np.cos(angle), v - away * np.sin(angle))
        yield np.clip(1.5 - distance / rng.uniform(*sizes), 0, 1)


def _over(below: np.ndarray, above: np.ndarray, share: np.ndarray) -> np.ndarray:
    return below + share[..., None] * (above - below)
