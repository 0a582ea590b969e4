"""Canvas pixels -> what the network sees, on the device; training and evaluation share it.

Images are float32 in [0, 1], RGB, [B, H, W, 3], unless said otherwise. All of it runs inside jit
on batches sharded along their rows, with static shapes.
"""

import math
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def resample(image: jax.Array, boxes: jax.Array, size_px: int) -> jax.Array:
    """Cuts a box out of each image and scales it to a square, with antialiasing.

    The filter is the triangle (bilinear) one, as wide as the reduction, as in Pillow's
    `Image.resize(..., BILINEAR, box=...)`. Its weights are separable: rows first, then columns,
    each as a sum over the few pixels within reach.

    Args:
      image: uint8 [B, H, W, 3].
      boxes: top, left, height, width in pixels, float [B, 4], inside the image. A negative height
        or width is measured from a bottom or right edge, and mirrors.
      size_px: side of the result.

    Returns:
      float32 [B, size_px, size_px, 3] in [0, 1].
    """
    batch, height, width, channels = image.shape
    rows = _within_reach(boxes[:, 0], boxes[:, 2], height, size_px)
    columns = _within_reach(boxes[:, 1], boxes[:, 3], width, size_px)
    # A row of pixels with its channels is one contiguous vector.
    scaled = _weighted(image.reshape(batch, height, width * channels), *rows, 0)
    # The barriers keep XLA from computing rows anew in each column, and all anew in what follows.
    scaled = lax.optimization_barrier(scaled).reshape(batch, size_px, width, channels)
    return lax.optimization_barrier(_weighted(scaled, *columns, 1) / 255)


def _within_reach(
    start: jax.Array, length: jax.Array, num_pixels: int, size_px: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the input pixels of each output pixel and their weights, [B, size_px, taps] each.

    Pixels outside the image have weight 0.
    """
    scale = (length / size_px)[:, None, None]
    reach = jnp.maximum(jnp.abs(scale), 1.0)
    center = start[:, None, None] + (jnp.arange(size_px)[:, None] + 0.5) * scale
    num_taps = math.ceil(2 * max(num_pixels / size_px, 1.0))  # of the widest box
    # Pillow lets no pixel count whose centre is not within reach; the triangle does the same.
    pixel = jnp.floor(center - reach + 0.5).astype(jnp.int32) + jnp.arange(num_taps)
    weight = jnp.maximum(1.0 - jnp.abs(pixel + 0.5 - center) / reach, 0.0)
    weight = jnp.where((pixel >= 0) & (pixel < num_pixels), weight, 0.0)
    return pixel, weight / weight.sum(-1, keepdims=True)


def _weighted(image: jax.Array, pixel: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
    """Sums each output pixel's weighted input pixels along an axis of each image."""
    shape = [1] * image.ndim
    shape[0], shape[axis + 1] = weight.shape[:2]
    take = jax.vmap(lambda image, pixel: image.take(pixel, axis, mode="clip"))
    taps = range(pixel.shape[-1])
    weighted = (take(image, pixel[..., tap]) * weight[..., tap].reshape(shape) for tap in taps)
    return cast(jax.Array, sum(weighted))


def central_boxes(batch_size: int, height: int, width: int, scale: float) -> np.ndarray:
    """Returns centred squares float32 [B, 4] whose side is `scale` times the shorter side."""
    side = scale * min(height, width)
    box = ((height - side) / 2, (width - side) / 2, side, side)
    return np.tile(np.array(box, np.float32), (batch_size, 1))


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


def eval_view(image: jax.Array, crop_px: int, crop_scale: float, gray_norm: float) -> jax.Array:
    """Returns what evaluation, prediction and export show the network.

    Args:
      image: canvas pixels, uint8 [B, H, W, 3].
      crop_px: side of the result.
      crop_scale: side of the central square, share of the canvas's shorter side.
      gray_norm: of `shades_of_gray`.

    Returns:
      float32 [B, crop_px, crop_px, 3] in [0, 1].
    """
    batch_size, height, width, _ = image.shape
    boxes = central_boxes(batch_size, height, width, crop_scale)
    return shades_of_gray(resample(image, jnp.asarray(boxes), crop_px), gray_norm)
