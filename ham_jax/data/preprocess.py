"""Canvas pixels -> what the network sees, on the device; training and evaluation share it.

Images are float32 in [0, 1], RGB, [B, H, W, 3], unless said otherwise. All of it runs inside jit
on batches sharded along their rows, with static shapes.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_form: str | None = None  # None: what suits the backend


@contextlib.contextmanager
def in_form(name: str) -> Iterator[None]:
    """Within it, what is traced resamples in a form of RESAMPLERS, whatever the backend."""
    global _form
    before, _form = _form, name
    try:
        yield
    finally:
        _form = before


def resample(image: jax.Array, boxes: jax.Array, size_px: int) -> jax.Array:
    """Cuts a box out of each image and scales it to a square, with antialiasing.

    The filter is the triangle (bilinear) one, as wide as the reduction, as in Pillow's
    `Image.resize(..., BILINEAR, box=...)`. Its weights are separable: rows first, then columns.
    On CPU each is a sum over the few pixels within reach; on GPU and TPU, which multiply matrices
    faster than they look pixels up, it is a product with a matrix that is mostly 0.

    Args:
      image: uint8 [B, H, W, 3].
      boxes: top, left, height, width in pixels, float [B, 4], inside the image. A negative height
        or width is measured from a bottom or right edge, and mirrors.
      size_px: side of the result.

    Returns:
      float32 [B, size_px, size_px, 3] in [0, 1].
    """
    return RESAMPLERS[form()](image, boxes, size_px)


def form() -> str:
    """Returns the key of RESAMPLERS that is in use."""
    # Decided while tracing: a program is compiled for the backend that traces it.
    return _form or ("gathers" if jax.default_backend() == "cpu" else "products")


def _by_gathers(image: jax.Array, boxes: jax.Array, size_px: int) -> jax.Array:
    batch, height, width, channels = image.shape
    rows = _within_reach(boxes[:, 0], boxes[:, 2], height, size_px)
    columns = _within_reach(boxes[:, 1], boxes[:, 3], width, size_px)
    # A row of pixels with its channels is one contiguous vector.
    scaled = _weighted(image.reshape(batch, height, width * channels), *rows, 0)
    # The barriers keep XLA from computing rows anew in each column, and all anew in what follows.
    scaled = lax.optimization_barrier(scaled).reshape(batch, size_px, width, channels)
    return lax.optimization_barrier(_weighted(scaled, *columns, 1) / 255)


def _by_products(image: jax.Array, boxes: jax.Array, size_px: int) -> jax.Array:
    _, height, width, _ = image.shape
    rows = _of_all(boxes[:, 0], boxes[:, 2], height, size_px)
    columns = _of_all(boxes[:, 1], boxes[:, 3], width, size_px)
    return _product(image, rows, columns).swapaxes(2, 3)


def around(image: jax.Array, boxes: jax.Array, size_px: int) -> jax.Array:
    """Returns what `resample` does of boxes that may reach beyond the image, by products.

    Outside the image its mirror image is seen, whose outermost pixels are those of the image.

    Args:
      image: uint8 [B, H, W, 3].
      boxes: as for `resample`, but anywhere.
      size_px: side of the result.

    Returns:
      float32 [B, size_px, 3, size_px] in [0, 1]: rows, channels, columns.
    """
    _, height, width, _ = image.shape
    rows = _of_all(boxes[:, 0], boxes[:, 2], height, size_px, mirrored=True)
    columns = _of_all(boxes[:, 1], boxes[:, 3], width, size_px, mirrored=True)
    return _product(image, rows, columns)


def _product(image: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Returns [B, y, 3, x] of image [B, H, W, 3] and weights [B, y, H] and [B, x, W]."""
    # With the channels beside the rows, both products sum over an outermost or innermost axis, and
    # nothing between them is transposed. These are pixels: the default precision keeps 8 bits.
    image = image.swapaxes(2, 3).astype(rows.dtype)
    scaled = jnp.einsum("byh,bhcw->bycw", rows, image, precision=lax.Precision.HIGHEST)
    scaled = jnp.einsum("bycw,bxw->bycx", scaled, columns, precision=lax.Precision.HIGHEST)
    return scaled / 255


RESAMPLERS = {"gathers": _by_gathers, "products": _by_products}
"""Forms of `resample`: the same sums."""


def _within_reach(
    start: jax.Array, length: jax.Array, num_pixels: int, size_px: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the input pixels of each output pixel and their weights, [B, size_px, taps] each.

    Pixels outside the image have weight 0.
    """
    center, reach = _places(start, length, size_px)
    num_taps = math.ceil(2 * max(num_pixels / size_px, 1.0))  # of the widest box
    # Pillow lets no pixel count whose centre is not within reach; the triangle does the same.
    pixel = jnp.floor(center - reach + 0.5).astype(jnp.int32) + jnp.arange(num_taps)
    weight = _triangle(pixel, center, reach)
    weight = jnp.where((pixel >= 0) & (pixel < num_pixels), weight, 0.0)
    return pixel, weight / weight.sum(-1, keepdims=True)


def _of_all(
    start: jax.Array, length: jax.Array, num_pixels: int, size_px: int, mirrored: bool = False
) -> jax.Array:
    """Returns each output pixel's weights of all input pixels, [B, size_px, num_pixels]."""
    center, reach = _places(start, length, size_px)
    pixel = jnp.arange(num_pixels)
    if not mirrored:
        weight = _triangle(pixel, center, reach)
    else:
        last = num_pixels - 1  # after it, and before 0, the pixels come again in reverse
        center = jnp.abs((center - 0.5 + last) % (2 * last) - last) + 0.5
        weight = _triangle(pixel, center, reach)
        weight += jnp.where(pixel > 0, _triangle(-pixel, center, reach), 0.0)
        weight += jnp.where(pixel < last, _triangle(2 * last - pixel, center, reach), 0.0)
    return weight / weight.sum(-1, keepdims=True)


def _places(start: jax.Array, length: jax.Array, size_px: int) -> tuple[jax.Array, jax.Array]:
    """Returns each output pixel's centre, [B, size_px, 1], and how far it reaches, [B, 1, 1]."""
    scale = (length / size_px)[:, None, None]
    center = start[:, None, None] + (jnp.arange(size_px)[:, None] + 0.5) * scale
    return center, jnp.maximum(jnp.abs(scale), 1.0)


def _triangle(pixel: jax.Array, center: jax.Array, reach: jax.Array) -> jax.Array:
    return jnp.maximum(1.0 - jnp.abs(pixel + 0.5 - center) / reach, 0.0)


def _weighted(image: jax.Array, pixel: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    """Sums each output pixel's weighted input pixels along an axis of each image."""
    shape = [1] * image.ndim
    shape[0], shape[axis + 1] = weight.shape[:2]
    take = jax.vmap(lambda image, pixel: image.take(pixel, axis, mode="clip"))
    taps = range(pixel.shape[-1])
    weighted = (take(image, pixel[..., tap]) * weight[..., tap].reshape(shape) for tap in taps)
    return cast(jax.Array, sum(weighted))


def tile_boxes(height: int, width: int, scale: float, grid: tuple[int, int]) -> np.ndarray:
    """Returns the squares that tile a canvas, float32 [rows x columns, 4], row after row.

    The outermost touch the canvas's edges and the others lie evenly between them; one alone in its
    direction is in the middle.

    Args:
      height: of the canvas, in pixels.
      width: of the canvas, in pixels.
      scale: their side, share of the canvas's shorter side.
      grid: (rows, columns).
    """
    side = scale * min(height, width)
    tops, lefts = (
        (length - side) * (np.linspace(0, 1, count) if count > 1 else np.array([0.5]))
        for length, count in zip((height, width), grid, strict=True)
    )
    return np.array([(top, left, side, side) for top in tops for left in lefts], np.float32)


def central_boxes(batch_size: int, height: int, width: int, scale: float) -> np.ndarray:
    """Returns centred squares float32 [B, 4] whose side is `scale` times the shorter side."""
    return np.tile(tile_boxes(height, width, scale, (1, 1)), (batch_size, 1))


def shades_of_gray(image: jax.Array, norm: float) -> jax.Array:
    """Removes the colour of the light, estimated as the Minkowski mean of each channel.

    Finlayson and Trezzi, Shades of Gray and Colour Constancy, CIC 2004. A picture whose light is
    grey stays as it is.

    Args:
      image: [B, h, w, 3].
      norm: of the mean; 1 is grey-world, 6 is usual. 0 returns the image.
    """
    if not norm:
        return image
    power = int(norm) if norm == int(norm) else norm  # whole powers are products, much faster
    image = jnp.maximum(image, 1e-6)  # black has no colour
    peak = image.max((1, 2), keepdims=True)  # or the powers of a large norm would all be 0
    light = peak * ((image / peak) ** power).mean((1, 2), keepdims=True) ** (1 / norm)
    gain = jnp.sqrt((light**2).mean(-1, keepdims=True)) / light
    return jnp.clip(image * gain, 0.0, 1.0)


def dihedral(image: jax.Array, k: jax.Array) -> jax.Array:
    """Applies one of the eight symmetries of the square to each image.

    Args:
      image: [B, s, s, 3].
      k: int32 [] or [B] in 0..7. Bit 0 mirrors left and right, bit 1 then top and bottom, bit 2
        then exchanges rows and columns; so 0 is the identity, 0..1 mirrors, 0..3 all flips.
    """
    k = jnp.broadcast_to(k, image.shape[:1])[:, None, None, None]
    image = jnp.where(k & 1, image[:, :, ::-1], image)
    image = jnp.where(k & 2, image[:, ::-1], image)
    return jnp.where(k & 4, image.swapaxes(1, 2), image)


def resample_dihedral(image: jax.Array, boxes: jax.Array, k: jax.Array, size_px: int) -> jax.Array:
    """Returns `dihedral(resample(image, boxes, size_px), k)` in a third of the time on CPU.

    The mirroring costs nothing: it is in the boxes.

    Args:
      image: uint8 [B, H, W, 3].
      boxes: as for `resample`.
      k: int32 [B] in 0..7.
      size_px: side of the result.
    """
    top, left, height, width = boxes.T
    below, right = (k & 2) != 0, (k & 1) != 0
    boxes = jnp.stack(
        [
            jnp.where(below, top + height, top),
            jnp.where(right, left + width, left),
            jnp.where(below, -height, height),
            jnp.where(right, -width, width),
        ],
        -1,
    )
    view = resample(image, boxes, size_px)
    return jnp.where((k & 4)[:, None, None, None], view.swapaxes(1, 2), view)


def eval_view(
    image: jax.Array,
    crop_px: int,
    crop_scale: float,
    gray_norm: float,
    grid: tuple[int, int] = (1, 1),
    tile: jax.Array | int = 0,
) -> jax.Array:
    """Returns what evaluation, prediction and export show the network.

    Args:
      image: canvas pixels, uint8 [B, H, W, 3].
      crop_px: side of the result.
      crop_scale: side of the square, share of the canvas's shorter side.
      gray_norm: of `shades_of_gray`.
      grid: rows, columns of `tile_boxes`. Default: the central square alone.
      tile: int32 [], which of them.

    Returns:
      float32 [B, crop_px, crop_px, 3] in [0, 1].
    """
    batch_size, height, width, _ = image.shape
    box = jnp.asarray(tile_boxes(height, width, crop_scale, grid))[tile]
    boxes = jnp.broadcast_to(box, (batch_size, 4))
    return shades_of_gray(resample(image, boxes, crop_px), gray_norm)
