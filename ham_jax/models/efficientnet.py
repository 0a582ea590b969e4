"""EfficientNet-Lite: MBConv blocks without squeeze-and-excitation, with ReLU6.

Tan and Le, EfficientNet, ICML 2019; the Lite variants as released with the TensorFlow TPU models
(2020): stem and head keep their width, the first and last stage their depth. Padding and epsilon
are TensorFlow's, as published weights expect. Parameters are named by their place:
`stem/conv/kernel`, `stage2/block0/depthwise/conv/kernel`, `top/norm/scale`.
"""

import math

import jax
from flax import nnx

from ham_jax.models import drop_path as stochastic_depth
from ham_jax.models.conv import Conv, Kernel
from ham_jax.models.family import Family
from ham_jax.models.norm import Norm
from ham_jax.models.pool import Pool

# depth, and width of the stages: multipliers. Lite1 and Lite2 are also made for more pixels.
SCALES = {
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite1": (1.1, 1.0),
    "efficientnet_lite2": (1.2, 1.1),
}
_EPSILON = 1e-3
_STEM, _HEAD = 32, 1280  # channels

# blocks, kernel, stride, expansion, channels
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class ConvNorm(nnx.Module):
    """Convolution and BatchNorm."""

    def __init__(self, num_in, num_out, kernel: Kernel, *, dtype, rngs: nnx.Rngs):
        self.conv = Conv(num_in, num_out, kernel._replace(same=True), dtype=dtype, rngs=rngs)
        self.norm = Norm(num_out, epsilon=_EPSILON, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, num_in] -> [B, H / stride, W / stride, num_out], rounded up."""
        return self.norm(self.conv(x))


class Block(nnx.Module):
    """MBConv: widen, filter each channel by itself, narrow; around it where shapes agree."""

    def __init__(self, num_in, num_out, size, stride, expansion, drop_path=0.0, **make):
        width = num_in * expansion
        self.expand = ConvNorm(num_in, width, Kernel(1), **make) if expansion > 1 else None
        self.depthwise = ConvNorm(width, width, Kernel(size, stride, depthwise=True), **make)
        self.project = ConvNorm(width, num_out, Kernel(1), **make)
        self.around = stride == 1 and num_in == num_out
        self.drop_path = stochastic_depth.DropPath(drop_path)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """[B, H, W, num_in] -> [B, H / stride, W / stride, num_out], rounded up."""
        y = x if self.expand is None else jax.nn.relu6(self.expand(x))
        y = self.project(jax.nn.relu6(self.depthwise(y)))
        return x + self.drop_path(y, rngs=rngs) if self.around else y


class Stage(nnx.Module):
    """Blocks of one width, one for each of `drop_paths`; the first one may halve the side."""

    def __init__(self, num_in, num_out, drop_paths, size, stride, expansion, **make):
        self.num_blocks = len(drop_paths)
        for number, rate in enumerate(drop_paths):
            block = Block(num_in, num_out, size, 1 if number else stride, expansion, rate, **make)
            setattr(self, f"block{number}", block)
            num_in = num_out

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """[B, H, W, num_in] -> [B, H / stride, W / stride, num_out], rounded up."""
        for number in range(self.num_blocks):
            x = getattr(self, f"block{number}")(x, rngs)
        return x


class EfficientNetLite(nnx.Module):
    """EfficientNet-Lite0, 1 or 2 without a head: `num_features` is F.

    Args:
      name: a key of SCALES.
      drop_path: stochastic depth of the last block.
      dtype: to compute in; parameters, statistics and features are float32.
      rngs: for the initial weights.
    """

    def __init__(self, name: str, drop_path: float, dtype, rngs: nnx.Rngs):
        depth, width = SCALES[name]
        depths = [
            math.ceil(num_blocks * depth) if 0 < number < len(_STAGES) - 1 else num_blocks
            for number, (num_blocks, *_) in enumerate(_STAGES)
        ]
        rates = stochastic_depth.rates(drop_path, depths)
        make = {"dtype": dtype, "rngs": rngs}
        self.dtype = dtype
        self.stem = ConvNorm(3, _STEM, Kernel(3, 2), **make)
        num_channels = _STEM
        for number, (_, size, stride, expansion, channels) in enumerate(_STAGES):
            num_out = _round_to_8(channels * width)
            stage = Stage(num_channels, num_out, rates[number], size, stride, expansion, **make)
            setattr(self, f"stage{number + 1}", stage)
            num_channels = num_out
        self.top = ConvNorm(num_channels, _HEAD, Kernel(1), **make)
        self.pool = Pool()
        self.num_features = _HEAD

    def __call__(self, image: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Normalised RGB, [B, H, W, 3] -> features float32 [B, F]."""
        x = jax.nn.relu6(self.stem(image.astype(self.dtype)))
        for number in range(1, len(_STAGES) + 1):
            x = getattr(self, f"stage{number}")(x, rngs)
        return self.pool(jax.nn.relu6(self.top(x)))


def _round_to_8(channels: float) -> int:
    """Rounds to a multiple of 8, but never down by more than a tenth."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


_TORCH_NAMES = (  # efficientnet_lite_pytorch's
    (r"stem/conv", "_conv_stem"),
    (r"stem/norm", "_bn0"),
    (r"stage\d/block\d+/(expand|depthwise|project)/conv", r"_blocks.{block}._\1_conv"),
    (r"stage\d/block\d+/expand/norm", "_blocks.{block}._bn0"),
    (r"stage\d/block\d+/depthwise/norm", "_blocks.{block}._bn1"),
    (r"stage\d/block\d+/project/norm", "_blocks.{block}._bn2"),
    (r"top/conv", "_conv_head"),
    (r"top/norm", "_bn1"),
    (r"head", "_fc"),
)

FAMILY = Family(
    names=tuple(SCALES),
    build=lambda config, dtype, rngs: EfficientNetLite(config.name, config.drop_path, dtype, rngs),
    mean=(127 / 255,) * 3,
    std=(128 / 255,) * 3,
    torch_names=lambda paths: _TORCH_NAMES,
    packages={name.replace("_", "-"): name for name in SCALES},
)
