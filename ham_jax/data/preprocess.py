"""Canvas pixels -> what the network sees, on the device; training and evaluation share it.

Images are float32 in [0, 1], RGB, [B, H, W, 3], unless said otherwise. All of it runs inside jit
on batches sharded along their rows, with static shapes.
"""

import jax
import jax.numpy as jnp
import numpy as np


def resample(image: jax.Array, boxes: jax.Array, size_px: int) -> jax.Array:
    """Cuts a box out of each image and scales it to a square, with antialiasing.

    The filter is the triangle (bilinear) one, as wide as the reduction, as in Pillow's
    `Image.resize(..., BILINEAR, box=...)`: its weights are separable, so that two small matrix
    products an image do the work.

    Args:
      image: uint8 [B, H, W, 3].
      boxes: top, left, height, width in pixels, float [B, 4], inside the image.
      size_px: side of the result.

    Returns:
      float32 [B, size_px, size_px, 3] in [0, 1].
    """
    rows = _weights(boxes[:, 0], boxes[:, 2], image.shape[1], size_px)
    columns = _weights(boxes[:, 1], boxes[:, 3], image.shape[2], size_px)
    scaled = image.astype(jnp.float32) / 255
    # Rows first: a row of pixels with its channels is one contiguous vector.
    batch, height, width, channels = image.shape
    scaled = rows @ scaled.reshape(batch, height, width * channels)
    scaled = scaled.reshape(batch, size_px, width, channels)
    return jnp.einsum("bxw,bywc->byxc", columns, scaled)


def _weights(start: jax.Array, length: jax.Array, num_pixels: int, size_px: int) -> jax.Array:
    """Returns each output pixel's weights over input pixels, [B, size_px, num_pixels]."""
    scale = (length / size_px)[:, None, None]
    reach = jnp.maximum(scale, 1.0)
    center = start[:, None, None] + (jnp.arange(size_px)[:, None] + 0.5) * scale
    distance = jnp.abs(jnp.arange(num_pixels) + 0.5 - center) / reach
    # Pillow lets no pixel count whose centre is not within reach; the triangle does the same.
    weights = jnp.maximum(1.0 - distance, 0.0)
    return weights / weights.sum(-1, keepdims=True)


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
    image = jnp.maximum(image, 1e-6)  # black has no colour
    peak = image.max((1, 2), keepdims=True)  # or the powers of a large norm would all be 0
    light = peak * ((image / peak) ** norm).mean((1, 2), keepdims=True) ** (1 / norm)
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
    boxes = central_boxes(*image.shape[:3], crop_scale)
    return shades_of_gray(resample(image, jnp.asarray(boxes), crop_px), gray_norm)
