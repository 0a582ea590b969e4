"""ConvNeXt: wide depthwise kernels, LayerNorm and GELU.

Liu et al., A ConvNet for the 2020s, CVPR 2022; atto to nano are timm's, smaller ones of the same
kind (Wightman, 2022). Epsilon, activation and the order pool, then norm are the published weights'.
Parameters are named by their place: `stem/conv/kernel`, `stage2/downsample/conv/kernel`,
`stage1/block0/depthwise/kernel`, `stage1/block0/scale`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from ham_jax.models import drop_path as stochastic_depth
from ham_jax.models.conv import Conv, Kernel
from ham_jax.models.family import Family
from ham_jax.models.pool import Pool

# blocks and channels of each stage
SCALES = {
    "convnext_atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "convnext_femto": ((2, 2, 6, 2), (48, 96, 192, 384)),
    "convnext_pico": ((2, 2, 6, 2), (64, 128, 256, 512)),
    "convnext_nano": ((2, 2, 8, 2), (80, 160, 320, 640)),
    "convnext_tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
}
_LAYER_SCALE = 1e-6  # each block starts close to its input
_INIT = nnx.initializers.normal(0.02)


class LayerNorm(nnx.LayerNorm):
    """Over the channels, in float32 at least (Ba et al., arXiv:1607.06450)."""

    def __init__(self, num_channels: int, rngs: nnx.Rngs):
        super().__init__(num_channels, epsilon=1e-6, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] -> the same shape and dtype."""
        return super().__call__(x).astype(x.dtype)


class Stem(nnx.Module):
    """Patches of 4 x 4 pixels, each a vector of channels."""

    def __init__(self, num_out, *, dtype, rngs: nnx.Rngs):
        self.conv = Conv(3, num_out, Kernel(4, 4, init=_INIT), bias=True, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(num_out, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, 3] -> [B, H / 4, W / 4, num_out], rounded down."""
        return self.norm(self.conv(x))


class Downsample(nnx.Module):
    """Halves the side."""

    def __init__(self, num_in, num_out, *, dtype, rngs: nnx.Rngs):
        self.norm = LayerNorm(num_in, rngs)
        kernel = Kernel(2, 2, init=_INIT)
        self.conv = Conv(num_in, num_out, kernel, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, num_in] -> [B, H / 2, W / 2, num_out], rounded down."""
        return self.conv(self.norm(x))


class Block(nnx.Module):
    """Filter each channel by itself, widen fourfold, narrow, scale; and a way around."""

    def __init__(self, channels, drop_path, *, dtype, rngs: nnx.Rngs):
        make = {"dtype": dtype, "rngs": rngs}
        kernel = Kernel(7, depthwise=True, init=_INIT)
        self.depthwise = Conv(channels, channels, kernel, bias=True, **make)
        self.norm = LayerNorm(channels, rngs)
        self.expand = nnx.Linear(channels, 4 * channels, kernel_init=_INIT, **make)
        self.project = nnx.Linear(4 * channels, channels, kernel_init=_INIT, **make)
        self.scale = nnx.Param(jnp.full(channels, _LAYER_SCALE))
        self.drop_path = stochastic_depth.DropPath(drop_path)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """[B, H, W, C] -> the same shape."""
        # Pixels as rows of one matrix: XLA's CPU backend is twice as fast at its gradients.
        y = self.norm(self.depthwise(x)).reshape(-1, x.shape[-1])
        y = self.project(jax.nn.gelu(self.expand(y), approximate=False))
        y = y.reshape(x.shape) * self.scale[...].astype(y.dtype)
        return x + self.drop_path(y, rngs=rngs)


class Stage(nnx.Module):
    """Blocks of one width, one for each of `drop_paths`; num_in None: the side stays."""

    def __init__(self, num_in, channels, drop_paths, **make):
        self.num_blocks = len(drop_paths)
        self.downsample = None if num_in is None else Downsample(num_in, channels, **make)
        for number, rate in enumerate(drop_paths):
            setattr(self, f"block{number}", Block(channels, rate, **make))

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """[B, H, W, num_in] -> [B, H / 2 or H, W / 2 or W, channels], rounded down."""
        if self.downsample is not None:
            x = self.downsample(x)
        for number in range(self.num_blocks):
            x = getattr(self, f"block{number}")(x, rngs)
        return x


class ConvNeXt(nnx.Module):
    """ConvNeXt atto to tiny without a head: `num_features` is F.

    Args:
      name: a key of SCALES.
      drop_path: stochastic depth of the last block.
      dtype: to compute in; parameters and features are float32.
      rngs: for the initial weights.
    """

    def __init__(self, name: str, drop_path: float, dtype, rngs: nnx.Rngs):
        depths, widths = SCALES[name]
        make = {"dtype": dtype, "rngs": rngs}
        self.dtype = dtype
        self.stem = Stem(widths[0], **make)
        rates = stochastic_depth.rates(drop_path, depths)
        for number, (num_in, channels) in enumerate(zip((None, *widths), widths, strict=False)):
            setattr(self, f"stage{number + 1}", Stage(num_in, channels, rates[number], **make))
        self.norm = LayerNorm(widths[-1], rngs)
        self.pool = Pool()
        self.num_features = widths[-1]

    def __call__(self, image: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Normalised RGB, [B, H, W, 3], sides of 32 at the least -> features float32 [B, F]."""
        x = self.stem(image.astype(self.dtype))
        for number in range(1, 5):
            x = getattr(self, f"stage{number}")(x, rngs)
        return self.norm(self.pool(x))


_TORCH_NAMES = (  # timm's
    (r"stem/conv", "stem.0"),
    (r"stem/norm", "stem.1"),
    (r"stage\d/downsample/norm", "stages.{stage}.downsample.0"),
    (r"stage\d/downsample/conv", "stages.{stage}.downsample.1"),
    (r"stage\d/block(\d+)/depthwise", r"stages.{stage}.blocks.\1.conv_dw"),
    (r"stage\d/block(\d+)/norm", r"stages.{stage}.blocks.\1.norm"),
    (r"stage\d/block(\d+)/expand", r"stages.{stage}.blocks.\1.mlp.fc1"),
    (r"stage\d/block(\d+)/project", r"stages.{stage}.blocks.\1.mlp.fc2"),
    (r"stage\d/block(\d+)", r"stages.{stage}.blocks.\1.gamma"),  # the layer scale
    (r"norm", "head.norm"),
    (r"head", "head.fc"),
)

FAMILY = Family(
    names=tuple(SCALES),
    build=lambda config, dtype, rngs: ConvNeXt(config.name, config.drop_path, dtype, rngs),
    min_px=32,  # it takes the side down to a 32nd
    torch_names=lambda paths: _TORCH_NAMES,
    other_names=(  # facebookresearch/ConvNeXt's
        (r"downsample_layers\.0\.", "stem."),
        (r"downsample_layers\.(\d)\.", r"stages.\1.downsample."),
        (r"stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"(.*)\.dwconv\.", r"\1.conv_dw."),
        (r"(.*)\.pwconv(\d)\.", r"\1.mlp.fc\2."),
        (r"head\.(weight|bias)", r"head.fc.\1"),
        (r"norm\.", "head.norm."),
    ),
)
