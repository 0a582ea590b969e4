"""Random views of a batch, drawn and computed on the device.

`TRANSFORMS` lists them in the order in which they are applied. Each has random streams of its own,
so that turning one off leaves the draws of the others as they were.

Images are float32 in [0, 1], RGB, [B, s, s, 3]; targets are probabilities, [B, C].
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections

from ham_jax.data import preprocess
from ham_jax.training import turn
from ham_jax.training.streams import Stream


def augment(
    key: jax.Array,
    image: jax.Array,
    label: jax.Array,
    config: ml_collections.ConfigDict,
    num_classes: int,
    metadata: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns a random view of each image, its target and its metadata.

    Where images are mixed, so is what belongs to them, by the same shares.

    `strength` scales the range of the crops' areas, turns, colour changes and the cutout; at 0 each
    image is the central square that evaluation sees, flipped and turned by quarters.

    Args:
      key: of this step.
      image: canvas pixels, uint8 [B, H, W, 3].
      label: int32 [B].
      config: the section `augment`.
      num_classes: C.
      metadata: float32 [B, M], or None.

    Returns:
      (float32 [B, crop_px, crop_px, 3], float32 [B, C], float32 [B, M] or None).
    """
    target = jax.nn.one_hot(label, num_classes)
    if metadata is not None:
        target = jnp.concatenate([target, metadata], axis=-1)
    for transform in TRANSFORMS:
        if any(config[name] for name in transform.keys):
            draws = [jax.random.fold_in(key, stream) for stream in transform.streams]
            image, target = transform.apply(config, image, target, *draws)
    if metadata is None:
        return image, target, None
    return image, target[:, :num_classes], target[:, num_classes:]


def _view(config, image, target, of_crop, of_dihedral, of_warp):
    """Crops, turns and flips; the first transform, which makes float32 of the canvas's uint8."""
    batch_size, height, width, _ = image.shape
    if config.strength:
        boxes = draw_boxes(
            of_crop,
            batch_size,
            height,
            width,
            stretched(config.crop_scale, config.strength),
            config.crop_ratio,
        )
    else:
        boxes = jnp.asarray(preprocess.central_boxes(batch_size, height, width, 1.0))
    k = jax.random.randint(of_dihedral, (batch_size,), 0, 8) if config.dihedral else jnp.int32(0)
    if config.strength and config.rotation:
        reach = math.radians(config.rotation) * config.strength
        low, high = config.crop_ratio
        # A box that is cut to the canvas comes nearer to the canvas's ratio.
        most = turn.Most(reach, max(high, 1 / low, width / height, height / width))
        angle = draw_angles(of_warp, batch_size, reach)
        view = turn.resample_turned(image, boxes, angle, k, config.crop_px, most)
    elif config.dihedral:
        view = preprocess.resample_dihedral(image, boxes, k, config.crop_px)
    else:
        view = preprocess.resample(image, boxes, config.crop_px)
    return view, target


def _constant_color(config, image, target):
    return preprocess.shades_of_gray(image, config.shades_of_gray), target


def _color(config, image, target, key):
    reach = min(config.color * config.strength, 0.9)
    if reach:
        image = change_color(image, *draw_color(key, len(image), reach))
    return image, target


def _cutout(config, image, target, key):
    side = min(config.cutout * config.strength, 0.75)
    if side:
        centers = jax.random.uniform(key, (len(image), 2))
        image = cutout(image, centers, round(side * config.crop_px))
    return image, target


def _mix(config, image, target, of_choice, of_mixup, of_cutmix):
    """Applies mixup or cutmix; with both on, a fair coin chooses for the whole batch."""
    if not config.cutmix:
        return mixup(image, target, draw_share(of_mixup, config.mixup))
    share, center = draw_patch(of_cutmix, config.cutmix)
    if config.mixup:
        own = draw_share(of_mixup, config.mixup)
        heads = jax.random.bernoulli(of_choice)
        # At share 1 either of them leaves the batch as it is.
        image, target = mixup(image, target, jnp.where(heads, own, 1.0))
        share = jnp.where(heads, 1.0, share)
    return cutmix(image, target, share, center)


@dataclasses.dataclass(frozen=True)
class Transform:
    """One step from a canvas to what the network sees.

    Attributes:
      apply: (section `augment`, image, target [B, C + M], a key a stream) -> (image, target); the
        target's last M columns are the metadata, which mixes as the classes do.
      keys: of the section, that it reads; where all of them are 0, it is left out.
      streams: of its random draws, used nowhere else.
    """

    apply: Callable[..., tuple[jax.Array, jax.Array]]
    keys: tuple[str, ...]
    streams: tuple[int, ...] = ()


TRANSFORMS = (
    Transform(
        _view,
        ("crop_px", "crop_scale", "crop_ratio", "dihedral", "rotation"),
        (Stream.CROP, Stream.DIHEDRAL, Stream.WARP),
    ),
    Transform(_constant_color, ("shades_of_gray",)),
    Transform(_color, ("color",), (Stream.COLOR,)),
    Transform(_cutout, ("cutout",), (Stream.CUTOUT,)),
    Transform(_mix, ("mixup", "cutmix"), (Stream.MIX_CHOICE, Stream.MIXUP, Stream.CUTMIX)),
)


def stretched(crop_scale: tuple[float, float], strength: float) -> tuple[float, float]:
    """Returns the range of a crop's area with its lower end moved by `strength`.

    0 leaves the upper end only, 1 the range as configured, 2 goes down twice as far (at least 5 %
    of the canvas stay).
    """
    low, high = crop_scale
    return max(high - (high - low) * strength, min(low, 0.05)), high


def draw_boxes(
    key: jax.Array,
    batch_size: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> jax.Array:
    """Draws boxes (top, left, height, width), float [B, 4], inside an image of height x width.

    The area is uniform in `scale` (share of the image), the logarithm of width / height uniform
    in `ratio`'s; a box that would not fit is cut to the image's height or width. The position is
    uniform. After Szegedy et al., Going Deeper with Convolutions, CVPR 2015.
    """
    draws = jax.random.uniform(key, (4, batch_size))
    area = (scale[0] + (scale[1] - scale[0]) * draws[0]) * height * width
    low, high = jnp.log(jnp.array(ratio))
    aspect = jnp.exp(low + (high - low) * draws[1])
    box_height = jnp.minimum(jnp.sqrt(area / aspect), height)
    box_width = jnp.minimum(jnp.sqrt(area * aspect), width)
    top = draws[2] * (height - box_height)
    left = draws[3] * (width - box_width)
    return jnp.stack([top, left, box_height, box_width], -1)


def draw_angles(key: jax.Array, batch_size: int, reach: float) -> jax.Array:
    """Draws angles uniform within +- reach (radians), [B]."""
    # Two numbers an image, of which the second is no longer used: the first stays what it was.
    angle, _ = jax.random.uniform(key, (2, batch_size), minval=-1.0, maxval=1.0)
    return angle * reach


def draw_color(key: jax.Array, batch_size: int, reach: float) -> tuple[jax.Array, ...]:
    """Draws (brightness, contrast, saturation, hue), each [B].

    The first three are factors uniform in 1 +- reach, hue is a turn in radians, uniform within
    +- reach / 4 of half a circle.
    """
    draws = jax.random.uniform(key, (4, batch_size), minval=-1.0, maxval=1.0) * reach
    return 1 + draws[0], 1 + draws[1], 1 + draws[2], draws[3] / 4 * jnp.pi


def change_color(
    image: jax.Array,
    brightness: jax.Array,
    contrast: jax.Array,
    saturation: jax.Array,
    hue: jax.Array,
) -> jax.Array:
    """Changes brightness, contrast, saturation and hue in one pass over the pixels.

    All four are affine in RGB, so they are one 3x3 matrix and one offset an image: hue turns about
    the grey axis (Rodrigues' formula), saturation scales the distance from the mean of the three
    channels, contrast the distance from the image's mean grey, brightness everything.

    Args:
      image: [B, h, w, 3].
      brightness: factor, [B].
      contrast: factor, [B].
      saturation: factor, [B].
      hue: radians, [B].
    """
    gray = jnp.full((3, 3), 1 / 3)
    identity = jnp.eye(3)
    cross = jnp.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / jnp.sqrt(3.0)
    cos, sin = jnp.cos(hue)[:, None, None], jnp.sin(hue)[:, None, None]
    turn = cos * identity + sin * cross + (1 - cos) * gray
    saturate = gray + saturation[:, None, None] * (identity - gray)
    matrix = (brightness * contrast)[:, None, None] * (saturate @ turn)
    mean = image.mean((1, 2, 3))  # neither turn nor saturation moves the mean grey
    offset = brightness * (1 - contrast) * mean
    # Not a matrix product: with three channels it is slow, and cannot be one pass with the rest.
    parts = [image[..., c, None] * matrix[:, None, None, :, c] for c in range(3)]
    changed = sum(parts) + offset[:, None, None, None]
    return jnp.clip(changed, 0.0, 1.0)


def cutout(image: jax.Array, centers: jax.Array, side_px: int) -> jax.Array:
    """Paints a square of mid-grey on each image.

    DeVries and Taylor, arXiv:1708.04552. The square may reach over the edge.

    Args:
      image: [B, s, s, 3].
      centers: row and column as shares of the side, [B, 2].
      side_px: of the square.
    """
    inside = _patch(image.shape[1], centers, side_px)
    return jnp.where(inside[..., None], 0.5, image)


def draw_share(key: jax.Array, alpha: float) -> jax.Array:
    """Draws the share of the batch's own images, Beta(alpha, alpha), []."""
    return jax.random.beta(key, alpha, alpha)


def mixup(image: jax.Array, target: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Blends each image with its partner: the one in the mirrored place of the batch.

    Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018.

    Args:
      image: [B, s, s, 3].
      target: [B, C].
      share: of the own image, [].
    """
    return (
        share * image + (1 - share) * image[::-1],
        share * target + (1 - share) * target[::-1],
    )


def draw_patch(key: jax.Array, alpha: float) -> tuple[jax.Array, jax.Array]:
    """Draws (share of the own image [], centre of the foreign patch as shares [2])."""
    of_share, of_center = jax.random.split(key)
    return draw_share(of_share, alpha), jax.random.uniform(of_center, (2,))


def cutmix(
    image: jax.Array, target: jax.Array, share: jax.Array, center: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Pastes a square of each image's partner over it; targets mix by the pixels pasted.

    Yun et al., CutMix, ICCV 2019. The partner is the image in the mirrored place of the batch.

    Args:
      image: [B, s, s, 3].
      target: [B, C].
      share: of the own image, []; the patch's side is sqrt(1 - share) of the image's.
      center: row and column of the patch's middle, shares of the side, [2]; what reaches over the
        edge is not pasted.
    """
    size_px = image.shape[1]
    inside = _patch(size_px, center[None], jnp.sqrt(1 - share) * size_px)
    pasted = inside.mean()
    return (
        jnp.where(inside[..., None], image[::-1], image),
        (1 - pasted) * target + pasted * target[::-1],
    )


def _patch(size_px: int, centers: jax.Array, side_px) -> jax.Array:
    """Returns whether each pixel's middle lies in a square around each centre, [B, s, s]."""
    middle = jnp.arange(size_px) + 0.5
    near = jnp.abs(middle - centers[..., None] * size_px) < side_px / 2
    return near[:, 0, :, None] & near[:, 1, None, :]
