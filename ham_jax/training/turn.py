"""Crops that are turned by any angle, on the device, in the form that suits it.

On CPU every pixel of the view is looked up in the canvas and interpolated once. GPUs and TPUs look
pixels up slowly: there the upright box around the turned one is cut out by two matrix products
(`preprocess`), and a turn of it is three shears (Paeth, A Fast Algorithm for General Raster
Rotation, Graphics Interface 1986), which move each row or column by its own distance. Mirroring and
quarter turns are exact, so that at most 45 degrees are left to the shears.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ham_jax.data import preprocess

_QUARTER = math.pi / 2


class Most(NamedTuple):
    """What no image of a batch exceeds.

    Attributes:
      angle: of a turn either way, in radians.
      ratio: of a box's longer side to its shorter one.
    """

    angle: float
    ratio: float


def resample_turned(
    image: jax.Array, boxes: jax.Array, angle: jax.Array, k: jax.Array, size_px: int, most: Most
) -> jax.Array:
    """Cuts a box that is turned about its middle, scales it to a square, flips and turns that.

    Outside the canvas its mirror image is seen.

    Args:
      image: uint8 [B, H, W, 3].
      boxes: top, left, height, width in pixels, float [B, 4].
      angle: radians, [B]; positive turns lead from the view's rows to the canvas's columns.
      k: as for `preprocess.dihedral`, int32 [] or [B].
      size_px: side of the result.
      most: bounds of `angle` and `boxes`.

    Returns:
      float32 [B, size_px, size_px, 3] in [0, 1].
    """
    return TURNERS[preprocess.form()](image, boxes, angle, k, size_px, most)


def _by_gathers(image, boxes, angle, k, size_px, most):
    """Interpolates each pixel once (bilinear), as in `preprocess.resample`, so that nothing blurs.

    Where the canvas is much larger than the result, each result pixel is the mean of 2x2 or more
    places, against aliasing.
    """
    batch_size, height, width, channels = image.shape
    parts = max(round(min(height, width) / size_px), 1)
    side = size_px * parts
    share = (jnp.arange(side) + 0.5) / side - 0.5
    corner, size = boxes[:, :2, None, None], boxes[:, 2:]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    matrix = jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], 1)
    down, across = jnp.moveaxis(matrix * size[:, None], -1, 0)[..., None, None]
    place = down * share[:, None] + across * share  # [B, 2, side, side]
    place += corner + size[..., None, None] / 2 - 0.5

    def channel(pixels, place):
        return jax.scipy.ndimage.map_coordinates(pixels, list(place), 1, "mirror")

    view = jax.vmap(jax.vmap(channel, (2, None), 2))(image / jnp.float32(255), place)
    # The barrier keeps XLA from looking the pixels up anew for each step that follows.
    view = lax.optimization_barrier(view)
    view = view.reshape(batch_size, size_px, parts, size_px, parts, channels).mean((2, 4))
    return preprocess.dihedral(view, k)


def _by_shears(image, boxes, angle, k, size_px, most):
    center, size = boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]
    mirrored = jnp.stack([(k & 2) != 0, (k & 1) != 0], -1)
    size = jnp.where(mirrored, -size, size)
    swapped = (k & 4) != 0
    reach = most.angle
    if reach > _QUARTER / 2:
        reach, quarters = _QUARTER / 2, jnp.round(angle / _QUARTER)
        angle = angle - quarters * _QUARTER
        quarters = quarters.astype(jnp.int32) & 3
        # A quarter turn exchanges rows and columns and then mirrors one of them.
        odd = (quarters & 1) != 0
        size = jnp.where(odd[:, None], size[:, ::-1], size)
        size = jnp.where(jnp.stack([(quarters & 3) % 3 != 0, quarters >= 2], -1), -size, size)
        swapped ^= odd
    # Within the box, in shares of its sides, a turn is the three shears
    # row += slope * column, column += rise * row, row += slope * column.
    ratio = size[:, 1] / size[:, 0]
    slope, rise = -jnp.tan(angle / 2) * ratio, jnp.sin(angle) / ratio
    around, between = _sides(size_px, reach, most.ratio)
    upright = jnp.concatenate([center - size * around / size_px / 2, size * around / size_px], -1)
    view = preprocess.around(image, upright, around)
    for axis, factor, side in ((1, slope, between), (3, rise, size_px), (1, slope, size_px)):
        view = _sheared(view, axis, factor, side)
    view = jnp.clip(view, 0.0, 1.0)  # waves reach over at an edge
    view = jnp.where(swapped.reshape(-1, 1, 1, 1), view.transpose(0, 3, 2, 1), view)
    return view.swapaxes(2, 3)


TURNERS = {"gathers": _by_gathers, "products": _by_shears}
"""Forms of `resample_turned` by those of `preprocess.resample`; they interpolate differently."""


def _sides(size_px: int, reach: float, ratio: float) -> tuple[int, int]:
    """Returns the sides of what three shears need of the upright view, before and after the first.

    Args:
      size_px: side of the turned view, in the middle of it.
      reach: largest angle, 45 degrees at the most.
      ratio: of the longer to the shorter side of its box.
    """
    margin = 8  # pixels: the ends of rows and columns, which are seen mirrored, stay out of sight

    def side(share: float) -> int:
        return size_px + 2 * (math.ceil(size_px * (share - 1) / 2) + margin)

    return side(math.cos(reach) + ratio * math.sin(reach)), side(1 + ratio * math.tan(reach / 2))


def _sheared(image: jax.Array, axis: int, factor: jax.Array, side: int) -> jax.Array:
    """Moves each row or column by its distance from the middle, times a factor.

    By its cosine transform (DCT-II), of which each wave is moved, so that nothing blurs; three
    products with matrices that are the same for all images.

    Args:
      image: [B, rows, 3, columns].
      axis: along which it is moved, 1 or 3.
      factor: pixels along `axis` a pixel of the other, [B].
      side: of the result along `axis`, around the middle.
    """
    length, across = image.shape[axis], image.shape[4 - axis]
    waves = np.arange(length) * np.pi / length  # radians a pixel
    scale = np.where(waves > 0, 2.0, 1.0)[:, None] / length
    transform = scale * np.cos(waves[:, None] * (np.arange(length) + 0.5))
    places = waves[:, None] * (np.arange(side) + (length - side) / 2 + 0.5)
    spectrum = _along(axis, image, transform.T)
    shift = factor[:, None] * (jnp.arange(across) - (across - 1) / 2)
    phase = shift[..., None] * waves.astype(np.float32)  # [B, across, length]
    phase = phase.swapaxes(1, 2)[:, :, None] if axis == 1 else phase[:, :, None]
    # The barrier keeps XLA from computing them anew for each channel and within the products.
    cos, sin = lax.optimization_barrier((jnp.cos(phase), jnp.sin(phase)))
    moved = _along(axis, spectrum * cos, np.cos(places))
    return moved - _along(axis, spectrum * sin, np.sin(places))


def _along(axis: int, image: jax.Array, matrix: np.ndarray) -> jax.Array:
    """Returns image [B, rows, 3, columns] times a matrix along an axis, 1 or 3."""
    product = "bycx,yz->bzcx" if axis == 1 else "bycx,xz->bycz"
    matrix = matrix.astype(np.float32)
    # On TPU three products in bfloat16: right to a hundredth of a grey level.
    return jnp.einsum(product, image, matrix, precision=lax.Precision.HIGH)
