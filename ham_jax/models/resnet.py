"""ResNet v1.5 (the stride on the 3x3 convolution), with three stems.

He et al., Deep Residual Learning, CVPR 2016; the D variant is from He et al., Bag of Tricks for
Image Classification, CVPR 2019. Parameters are named by their place: `stem/conv/kernel`,
`stage1/block0/conv1/kernel`, `stage2/block0/shortcut/norm/scale`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from ham_jax.models import drop_path as stochastic_depth
from ham_jax.models.conv import Conv, Kernel, max_pool
from ham_jax.models.family import Family
from ham_jax.models.norm import Norm
from ham_jax.models.pool import Pool

DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
}
BOTTLENECK = ("resnet50", "resnet101")
_WIDTHS = (64, 128, 256, 512)


@dataclasses.dataclass(frozen=True)
class Style:
    """What all blocks of a network have in common.

    Attributes:
      bottleneck: three convolutions, of which the first narrows and the last widens.
      averaged: the D variant's shortcuts.
      zero_init: start each block as its shortcut (Goyal et al., arXiv:1706.02677).
      dtype: to compute in.
    """

    bottleneck: bool
    averaged: bool
    zero_init: bool
    dtype: jnp.dtype


class Shortcut(nnx.Module):
    """Brings a block's input to its output's shape.

    Plain: a strided 1x1 convolution. D: an average over the stride first, so that no pixel is lost.
    """

    def __init__(self, num_in, num_out, stride, *, averaged, dtype, rngs):
        self.pool = stride if averaged else 1
        kernel = Kernel(1, 1 if averaged else stride)
        self.conv = Conv(num_in, num_out, kernel, dtype=dtype, rngs=rngs)
        self.norm = Norm(num_out, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, num_in] -> [B, H / stride, W / stride, num_out]."""
        if self.pool > 1:
            window = (self.pool, self.pool)
            # SAME, so that odd sides round up as the block's own convolution does.
            x = nnx.avg_pool(x, window, window, "SAME", count_include_pad=False)
        return self.norm(self.conv(x))


class Block(nnx.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 with four times the channels, and a way around."""

    def __init__(
        self, num_in, width, stride, *, style: Style, drop_path: float = 0.0, rngs: nnx.Rngs
    ):
        make = {"dtype": style.dtype, "rngs": rngs}
        self.num_out = width * 4 if style.bottleneck else width
        if style.bottleneck:
            layers = ((width, Kernel(1)), (width, Kernel(3, stride)), (self.num_out, Kernel(1)))
        else:
            layers = ((width, Kernel(3, stride)), (width, Kernel(3)))
        self.num_layers = len(layers)
        channels = num_in
        for number, (num_out, kernel) in enumerate(layers, 1):
            zero = style.zero_init and number == len(layers)
            setattr(self, f"conv{number}", Conv(channels, num_out, kernel, **make))
            setattr(self, f"norm{number}", Norm(num_out, zero=zero, rngs=rngs))
            channels = num_out
        self.shortcut = (
            Shortcut(num_in, self.num_out, stride, averaged=style.averaged, **make)
            if stride > 1 or num_in != self.num_out
            else None
        )
        self.drop_path = stochastic_depth.DropPath(drop_path)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """[B, H, W, num_in] -> [B, H / stride, W / stride, num_out]."""
        around = x if self.shortcut is None else self.shortcut(x)
        for number in range(1, self.num_layers + 1):
            x = getattr(self, f"norm{number}")(getattr(self, f"conv{number}")(x))
            if number < self.num_layers:
                x = jax.nn.relu(x)
        return jax.nn.relu(self.drop_path(x, rngs=rngs) + around)


class Stem(nnx.Module):
    """The first layers: `imagenet` and `d` leave a quarter of the side, `small` all of it."""

    def __init__(self, kind: str, *, dtype, rngs: nnx.Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        self.pooled = kind != "small"
        self.deep = kind == "d"
        if self.deep:
            self.conv1 = Conv(3, 32, Kernel(3, 2), **make)
            self.norm1 = Norm(32, rngs=rngs)
            self.conv2 = Conv(32, 32, Kernel(3), **make)
            self.norm2 = Norm(32, rngs=rngs)
            self.conv = Conv(32, 64, Kernel(3), **make)
        else:
            kernel = Kernel(7, 2) if kind == "imagenet" else Kernel(3)
            self.conv = Conv(3, 64, kernel, **make)
        self.norm = Norm(64, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, 3] -> [B, H / 4 or H, W / 4 or W, 64]."""
        if self.deep:
            x = jax.nn.relu(self.norm1(self.conv1(x)))
            x = jax.nn.relu(self.norm2(self.conv2(x)))
        x = jax.nn.relu(self.norm(self.conv(x)))
        return max_pool(x, 3, 2, 1) if self.pooled else x


class Stage(nnx.Module):
    """Blocks of one width, one for each of `drop_paths`; the first one may halve the side."""

    def __init__(self, num_in, width, drop_paths, stride, **make):
        self.num_blocks = len(drop_paths)
        for number, rate in enumerate(drop_paths):
            block = Block(num_in, width, 1 if number else stride, drop_path=rate, **make)
            setattr(self, f"block{number}", block)
            num_in = block.num_out
        self.num_out = num_in

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """[B, H, W, num_in] -> [B, H / stride, W / stride, num_out]."""
        for number in range(self.num_blocks):
            x = getattr(self, f"block{number}")(x, rngs)
        return x


class ResNet(nnx.Module):
    """ResNet-18, 34, 50 or 101 without a head: `num_features` is F.

    Args:
      name: a key of DEPTHS.
      stem: imagenet, d or small.
      zero_init_residual: start each block as its shortcut.
      drop_path: stochastic depth of the last block.
      dtype: to compute in; parameters, statistics and features are float32.
      rngs: for the initial weights.
    """

    def __init__(self, name, stem, zero_init_residual, drop_path, dtype, rngs: nnx.Rngs):
        style = Style(name in BOTTLENECK, stem == "d", zero_init_residual, dtype)
        self.dtype = dtype
        self.stem = Stem(stem, dtype=dtype, rngs=rngs)
        num_channels = 64
        rates = stochastic_depth.rates(drop_path, DEPTHS[name])
        for number, width in enumerate(_WIDTHS):
            stage = Stage(
                num_channels,
                width,
                rates[number],
                stride=2 if number else 1,
                style=style,
                rngs=rngs,
            )
            setattr(self, f"stage{number + 1}", stage)
            num_channels = stage.num_out
        self.pool = Pool()
        self.num_features = num_channels

    def __call__(self, image: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Normalised RGB, [B, H, W, 3] -> features float32 [B, F]."""
        x = self.stem(image.astype(self.dtype))
        for number in range(len(_WIDTHS)):
            x = getattr(self, f"stage{number + 1}")(x, rngs)
        return self.pool(x)


_TORCH_NAMES = (  # torchvision's and timm's
    (r"stem/conv", "conv1"),
    (r"stem/norm", "bn1"),
    (r"stage(\d)/block(\d+)/conv(\d)", r"layer\1.\2.conv\3"),
    (r"stage(\d)/block(\d+)/norm(\d)", r"layer\1.\2.bn\3"),
    (r"stage(\d)/block(\d+)/shortcut/conv", r"layer\1.\2.downsample.0"),
    (r"stage(\d)/block(\d+)/shortcut/norm", r"layer\1.\2.downsample.1"),
    (r"head", "fc"),
)
# The D stem is a sequence of layers, and its shortcuts begin with an average.
_TORCH_NAMES_D = (
    (r"stem/conv1", "conv1.0"),
    (r"stem/norm1", "conv1.1"),
    (r"stem/conv2", "conv1.3"),
    (r"stem/norm2", "conv1.4"),
    (r"stem/conv", "conv1.6"),
    (r"stage(\d)/block(\d+)/shortcut/conv", r"layer\1.\2.downsample.1"),
    (r"stage(\d)/block(\d+)/shortcut/norm", r"layer\1.\2.downsample.2"),
    *_TORCH_NAMES,
)

FAMILY = Family(
    names=tuple(DEPTHS),
    build=lambda config, dtype, rngs: ResNet(
        config.name, config.stem, config.zero_init_residual, config.drop_path, dtype, rngs
    ),
    torch_names=lambda paths: (
        _TORCH_NAMES_D if any("stem/conv1/" in path for path in paths) else _TORCH_NAMES
    ),
    hints={"conv1.0.weight": "Its stem is that of model.stem = 'd'."},
)
