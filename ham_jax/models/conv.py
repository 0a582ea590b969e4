"""Convolution and pooling that are fast on every backend.

On GPU and TPU they are XLA's own. XLA's CPU backend has cliffs, where the same sum written as a
matrix product or as shifted slices is several times faster; there the form is chosen by the static
shape. Every form computes the same sums.

Images are [B, H, W, C], kernels [kh, kw, C_in, C_out].
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

Pads = tuple[tuple[int, int], tuple[int, int]]

_FEW_PIXELS = 16  # of a map, up to which a convolution is a product of patches
_WIDE = 16  # channels from which a matrix product a tap keeps a core busy


def conv(
    x: jax.Array, kernel: jax.Array, stride: int, pads: Pads, groups: int = 1, dilation: int = 1
) -> jax.Array:
    """Convolves, in the form that suits the backend.

    Args:
      x: [B, H, W, C_in].
      kernel: [kh, kw, C_in / groups, C_out].
      stride: in both directions.
      pads: zeros (above, below), (left, right).
      groups: of channels, each convolved by itself.
      dilation: distance between the kernel's taps, in both directions.
    """
    if jax.default_backend() != "cpu" or groups > 1 or dilation > 1:
        return direct(x, kernel, stride, pads, groups, dilation)
    return conv_on_cpu(x, kernel, stride, pads)


def conv_on_cpu(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """Chooses the form; the measured cliffs are named beside each rule."""
    kh, kw = kernel.shape[:2]
    if kh == kw == 1 and pads == ((0, 0), (0, 0)):
        return pointwise(x[:, ::stride, ::stride], kernel)  # weight gradient: 4 times
    if x.shape[1] < kh and x.shape[2] < kw:
        return patches_product(x, kernel, stride, pads)  # XLA swaps the operands: 70 times
    if (x.shape[1] // stride) * (x.shape[2] // stride) <= _FEW_PIXELS:
        return patches_product(x, kernel, stride, pads)  # a step of ResNet-18 at 64 px: 1.2 times
    return direct_forward(x, kernel, stride, pads)


def direct(
    x: jax.Array, kernel: jax.Array, stride: int, pads: Pads, groups: int = 1, dilation: int = 1
) -> jax.Array:
    """XLA's convolution."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 1x1 convolution as one matrix product."""
    product = x.reshape(-1, x.shape[-1]) @ kernel[0, 0]
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


def patches_product(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """All patches side by side, times the kernel as a matrix; kh * kw times the memory of x."""
    patches = jnp.concatenate(_taps(x, kernel.shape[:2], stride, pads), -1)
    product = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
    return product.reshape(*patches.shape[:-1], kernel.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def direct_forward(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """XLA's convolution, with gradients as matrix products where that is faster.

    The weight gradient always is; the input gradient where the output is smaller than the kernel,
    for there XLA's meets the cliff of `conv_on_cpu`'s second rule.
    """
    return direct(x, kernel, stride, pads)


def _forward(x, kernel, stride, pads):
    return direct(x, kernel, stride, pads), (x, kernel)


def _backward(stride, pads, saved, dy):
    x, kernel = saved
    kh, kw = kernel.shape[:2]
    small = dy.shape[1] < kh and dy.shape[2] < kw
    form = patches_product if small else direct
    (dx,) = jax.vjp(lambda x: form(x, kernel, stride, pads), x)[1](dy)
    dy = dy.reshape(-1, dy.shape[-1])
    taps = _taps(x, (kh, kw), stride, pads)
    if x.shape[-1] >= _WIDE:  # a product a tap; the patches need not be laid side by side
        dk = jnp.stack([tap.reshape(-1, tap.shape[-1]).T @ dy for tap in taps])
    else:
        patches = jnp.concatenate(taps, -1)
        dk = patches.reshape(-1, patches.shape[-1]).T @ dy
    return dx, dk.reshape(kernel.shape)


direct_forward.defvjp(_forward, _backward)


def max_pool(x: jax.Array, size: int, stride: int, padding: int) -> jax.Array:
    """Takes the maximum of each window, [B, H, W, C] -> [B, H', W', C].

    On CPU as the maximum of shifted slices, rows first, then columns: the gradient of XLA's
    windowed maximum is slow there. Where values tie, the gradient is shared out between them.
    """
    if jax.default_backend() != "cpu":
        return nnx.max_pool(x, (size, size), (stride, stride), ((padding, padding),) * 2)
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    x = jnp.pad(x, pads, constant_values=-jnp.inf)
    for axis in (1, 2):
        length = (x.shape[axis] - size) // stride * stride + 1
        slices = [lax.slice_in_dim(x, start, start + length, stride, axis) for start in range(size)]
        x = functools.reduce(jnp.maximum, slices)
    return x


def _taps(x: jax.Array, window: tuple[int, int], stride: int, pads: Pads) -> list[jax.Array]:
    """Returns each output pixel's inputs, kh * kw times [B, H', W', C], in the kernel's order."""
    kh, kw = window
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    height = (x.shape[1] - kh) // stride * stride + 1
    width = (x.shape[2] - kw) // stride * stride + 1
    return [
        x[:, top : top + height : stride, left : left + width : stride]
        for top in range(kh)
        for left in range(kw)
    ]


class Conv(nnx.Module):
    """A convolution without bias, zero-padded by half its kernel.

    Args:
      num_in: channels in.
      num_out: channels out.
      size: of the square kernel, odd.
      stride: in both directions.
      dtype: to compute in; the kernel is kept in float32.
      rngs: for He initialisation (fan out, as for ResNets: He et al., ICCV 2015).
    """

    def __init__(self, num_in, num_out, size, stride=1, *, dtype, rngs: nnx.Rngs):
        init = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        self.kernel = nnx.Param(init(rngs.params(), (size, size, num_in, num_out), jnp.float32))
        self.stride = stride
        self.pads = ((size // 2, size // 2),) * 2
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, num_in] -> [B, H / stride, W / stride, num_out]."""
        kernel = self.kernel[...].astype(self.dtype)
        return conv(x.astype(self.dtype), kernel, self.stride, self.pads)
