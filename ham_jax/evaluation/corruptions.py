"""What goes wrong with dermoscopy photographs, drawn on the device in five severities.

The protocol is that of Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations, ICLR 2019: each corruption in five severities, for evaluation only,
never in training. The choice is for dermoscopy, as in Maron et al., A benchmark for neural network
robustness in skin cancer classification, Eur. J. Cancer 155 (2021), whose categories are noise,
blur, digital and dermoscopy: no weather, but hair, ruler and the dark corners of the dermatoscope.
Brightness is an error of exposure. The constants are ours. They begin milder than those for
ImageNet, because dermoscopy is taken in contact and under its own light.

A corruption happens to the photograph, so it is applied to the canvas and not to the network's
view: networks with different crops, views and colour constancy meet the same pictures. Lengths are
shares of the canvas's shorter side, so that a severity looks the same on any canvas; JPEG's blocks
and the noise are those of the canvas's pixels.

Images are float32 in [0, 1], RGB, [B, H, W, 3] or, of one, [H, W, 3].
"""

import math
import zlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

# Of each severity, mild to severe, the one number that makes it; lengths: see above.
SEVERITIES = {
    "defocus_blur": (0.008, 0.014, 0.022, 0.032, 0.045),  # radius of the disc that is a point
    "jpeg": (50, 30, 20, 12, 6),  # libjpeg's quality, 1 to 100
    "brightness": (0.25, 0.5, 0.75, 1.0, 1.5),  # stops of exposure too many or too few
    "dark_corner": (0.68, 0.61, 0.54, 0.48, 0.42),  # radius of the disc that is left
    "hair": (3, 7, 12, 20, 30),  # number of hairs
    "ruler": (0.03, 0.05, 0.08, 0.12, 0.17),  # length of a tick
    "gaussian_noise": (0.02, 0.04, 0.07, 0.11, 0.16),  # standard deviation; white is 1
}
NAMES = tuple(SEVERITIES)
NUM_SEVERITIES = 5


def image_numbers(image_ids: Iterable[str]) -> np.ndarray:
    """Returns what names each image in `corrupt`, uint32 [n], from its id alone."""
    return np.array([zlib.crc32(image_id.encode()) for image_id in image_ids], np.uint32)


def corrupt(
    image: jax.Array,
    number: jax.Array,
    corruption: jax.Array,
    severity: jax.Array,
    seed: int = 0,
) -> jax.Array:
    """Corrupts each image; one program for all corruptions and severities.

    What is drawn (where a hair lies, the noise) depends on the seed, the corruption and the image
    only: not on the severity, so that a severe picture is the mild one with more of the same, and
    not on the rest of the batch.

    Args:
      image: [B, H, W, 3].
      number: of each image, uint32 [B].
      corruption: index in NAMES, int32 [].
      severity: 1 to 5, int32 [].
      seed: of the draws.

    Returns:
      [B, H, W, 3].
    """
    key = jax.random.fold_in(jax.random.key(seed), corruption)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, number)
    amount = jnp.array(list(SEVERITIES.values()), jnp.float32)[corruption, severity - 1]
    branches = [jax.vmap(function, (0, 0, None)) for function in _FUNCTIONS]
    return jnp.clip(lax.switch(corruption, branches, keys, image, amount), 0.0, 1.0)


def defocus_blur(key: jax.Array, image: jax.Array, radius: jax.Array) -> jax.Array:
    """Spreads each point over a disc; beyond the edge the image is mirrored."""
    del key
    side = min(image.shape[:2])
    reach = math.ceil(max(SEVERITIES["defocus_blur"]) * side + 0.5)
    padded = jnp.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="symmetric")
    height, width, _ = padded.shape
    # Distances from pixel (0, 0) around the corners: the disc's middle, as the product of Fourier
    # transforms has it.
    y, x = (np.minimum(np.arange(n), n - np.arange(n)) for n in (height, width))
    distance = np.hypot(y[:, None], x[None])
    disc = jnp.clip(radius * side + 0.5 - distance, 0.0, 1.0)  # with an antialiased edge
    product = jnp.fft.rfft2(padded, axes=(0, 1)) * jnp.fft.rfft2(disc / disc.sum())[..., None]
    blurred = jnp.fft.irfft2(product, (height, width), axes=(0, 1))
    return blurred[reach:-reach, reach:-reach]


# Annex K of the JPEG standard, ITU-T T.81 (1992), tables K.1 and K.2: luminance and chrominance.
_LUMINANCE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
_CHROMINANCE = np.full((8, 8), 99)
_CHROMINANCE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]

# RGB to YCbCr, JFIF 1.02 (1992), and the orthonormal DCT of length 8.
_YCBCR = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
_DCT = np.cos(np.pi / 8 * (np.arange(8) + 0.5) * np.arange(8)[:, None]) / 2
_DCT[0] /= np.sqrt(2)


def jpeg(key: jax.Array, image: jax.Array, quality: jax.Array) -> jax.Array:
    """Returns what a baseline JPEG file with 4:2:0 chroma gives back, as libjpeg makes it."""
    del key
    height, width, _ = image.shape
    padding = ((0, -height % 16), (0, -width % 16), (0, 0))
    pixels = jnp.pad(jnp.round(image * 255), padding, mode="edge")
    luminance, *chrominance = (jnp.round(_colors(pixels, row)) for row in _YCBCR)
    scale = jnp.where(quality < 50, jnp.floor(5000 / quality), 200 - 2 * quality)
    luminance = _coded(luminance - 128, _LUMINANCE, scale)[:height, :width]
    small = (-(-height // 2), -(-width // 2))
    channels = [luminance]
    for channel in chrominance:
        halved = channel.reshape(channel.shape[0] // 2, 2, -1, 2).mean((1, 3))
        coded = _coded(halved, _CHROMINANCE, scale)[: small[0], : small[1]]
        doubled = jnp.round(_doubled(_doubled(coded, 0), 1))
        channels.append(doubled[:height, :width])
    decoded = jnp.stack(channels, -1) + np.array([128.0, 0.0, 0.0])
    rgb = [_colors(decoded, row) for row in np.linalg.inv(_YCBCR)]
    return jnp.clip(jnp.round(jnp.stack(rgb, -1)), 0, 255) / 255


def _colors(image: jax.Array, weights: np.ndarray) -> jax.Array:
    first, second, third = (image[..., c] * float(weights[c]) for c in range(3))
    return first + second + third


def _coded(channel: jax.Array, table: np.ndarray, scale: jax.Array) -> jax.Array:
    """Returns a channel around 0, [h, w], after its 8 x 8 blocks were quantised."""
    height, width = channel.shape
    blocks = jnp.round(channel).reshape(height // 8, 8, width // 8, 8)
    steps = jnp.clip(jnp.floor((table * scale + 50.5) / 100), 1, 255)[:, None]

    def both_ways(blocks: jax.Array, matrix: np.ndarray) -> jax.Array:
        # Not in the low precision that accelerators multiply with by default.
        return jnp.einsum(
            "yi,xj,aibj->aybx", matrix.astype(np.float32), matrix, blocks, precision="highest"
        )

    quantised = jnp.round(both_ways(blocks, _DCT) / steps) * steps
    # A flat block is often a whole number and a half, which libjpeg rounds up; float32 may miss it.
    decoded = jnp.floor(both_ways(quantised, _DCT.T) + 0.501)
    return jnp.clip(decoded, -128, 127).reshape(height, width)


def _doubled(channel: jax.Array, axis: int) -> jax.Array:
    """Doubles an axis with the triangle filter of libjpeg's decoder."""
    channel = jnp.moveaxis(channel, axis, 0)
    padded = jnp.pad(channel, ((1, 1), (0, 0)), mode="edge")
    before = (3 * channel + padded[:-2]) / 4
    after = (3 * channel + padded[2:]) / 4
    doubled = jnp.stack([before, after], 1).reshape(-1, channel.shape[1])
    return jnp.moveaxis(doubled, 0, axis)


def brightness(key: jax.Array, image: jax.Array, stops: jax.Array) -> jax.Array:
    """Exposes half of the images too long, the others too short; what is too bright is white."""
    up = jax.random.bernoulli(key)
    light = jnp.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055) ** 2.4)  # sRGB
    light = jnp.clip(light * 2 ** jnp.where(up, stops, -stops), 1e-9, 1.0)
    return jnp.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def dark_corner(key: jax.Array, image: jax.Array, radius: jax.Array) -> jax.Array:
    """Leaves the disc that the dermatoscope's tube lets through, nearly in the middle."""
    y, x, _ = _coordinates(image)
    away = 0.02 * jax.random.normal(key, (2,))
    distance = jnp.hypot(y - away[0], x - away[1])
    return image * jax.nn.sigmoid((radius - distance) / 0.012)[..., None]


def hair(key: jax.Array, image: jax.Array, count: jax.Array) -> jax.Array:
    """Lays hairs over the image: dark, curved, thinner towards the tip, much in one direction."""
    y, x, px = _coordinates(image)
    of_all, of_each = jax.random.split(key)
    draw = jax.random.uniform(of_all, (2,))
    direction, tone = jnp.pi * draw[0], 0.6 + 0.8 * draw[1]
    half = np.array([y.max(), x.max()])

    def lay(number: int, below: jax.Array) -> jax.Array:
        uniform, normal = jax.random.split(jax.random.fold_in(of_each, number))
        top, left, size, thick, shade = jax.random.uniform(uniform, (5,))
        turn, bow, sway = jax.random.normal(normal, (3,))
        angle = direction + 0.45 * turn
        length, width = 0.5 + 0.9 * size, 0.007 + 0.007 * thick
        dy, dx = y - half[0] * (2 * top - 1), x - half[1] * (2 * left - 1)
        along = jnp.cos(angle) * dx + jnp.sin(angle) * dy
        across = jnp.cos(angle) * dy - jnp.sin(angle) * dx
        # A cubic through its middle; the slope turns a difference in height into a distance.
        bow, sway = 0.4 * bow, 0.35 * sway
        height = across - (bow + sway * along) * along**2
        slope = (2 * bow + 3 * sway * along) * along
        distance = jnp.abs(height) / jnp.sqrt(1 + slope**2)
        share = jnp.clip(along / length + 0.5, 0.0, 1.0)  # 0 at the root, 1 at the tip
        covered = _stroke(distance / px, width * (1 - share**3) / px)
        covered = covered * _stroke(jnp.abs(along) / px, length / px)
        color = np.array([0.16, 0.11, 0.08]) * tone * (0.7 + 0.6 * shade)
        return _over(below, color, 0.9 * covered)

    return lax.fori_loop(0, count.astype(jnp.int32), lay, image)


def ruler(key: jax.Array, image: jax.Array, length: jax.Array) -> jax.Array:
    """Prints a scale along one edge of the central square, a little askew; each fifth tick longer.

    The network sees the central square, so a scale at the far edge of a wide canvas would be lost.
    """
    y, x, px = _coordinates(image)
    edge, askew, start, pitch = jax.random.uniform(key, (4,))
    angle = jnp.floor(4 * edge) * (jnp.pi / 2) + 0.12 * (askew - 0.5)
    along = jnp.cos(angle) * x + jnp.sin(angle) * y
    inward = 0.46 - (jnp.cos(angle) * y - jnp.sin(angle) * x)  # from where the ticks begin
    place = along / (0.035 + 0.02 * pitch) + 5 * start
    tick = jnp.round(place)
    distance = jnp.abs(place - tick) * (0.035 + 0.02 * pitch)
    length = length * jnp.where(tick % 5 == 0, 1.6, 1.0)
    covered = _stroke(distance / px, 0.009 / px)
    covered = covered * _stroke(jnp.abs(inward - length / 2) / px, length / px)
    covered = covered * (jnp.abs(along) < 0.45)
    return _over(image, np.array([0.10, 0.10, 0.12]), 0.9 * covered)


def gaussian_noise(key: jax.Array, image: jax.Array, deviation: jax.Array) -> jax.Array:
    """Adds noise that is independent in each pixel and channel."""
    return image + deviation * jax.random.normal(key, image.shape)


_FUNCTIONS = (defocus_blur, jpeg, brightness, dark_corner, hair, ruler, gaussian_noise)  # as NAMES


def _coordinates(image: jax.Array) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns (y [H, 1], x [1, W]) from the image's middle, and the side of a pixel.

    In shares of the shorter side.
    """
    height, width, _ = image.shape
    px = 1 / min(height, width)
    y, x = ((np.arange(n, dtype=np.float32) + 0.5 - n / 2) * px for n in (height, width))
    return y[:, None], x[None], px


def _stroke(distance: jax.Array, width: ArrayLike) -> jax.Array:
    """Returns how much a line covers of each pixel, in [0, 1], from pixels to its middle."""
    return jnp.clip(width / 2 + 0.5 - distance, 0.0, jnp.minimum(width, 1.0))


def _over(below: jax.Array, color: ArrayLike, share: jax.Array) -> jax.Array:
    return below + share[..., None] * (color - below)
