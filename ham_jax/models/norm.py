"""BatchNorm over the whole global batch or parts of it, for every network."""

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

_num_groups = 1


@contextlib.contextmanager
def in_groups(number: int) -> Iterator[None]:
    """Within it, what is traced normalises each of so many equal parts of a batch by itself.

    Where each part lies on one device or host, no other is asked. The running statistics take the
    mean over the parts.
    """
    global _num_groups
    before, _num_groups = _num_groups, number
    try:
        yield
    finally:
        _num_groups = before


class Norm(nnx.BatchNorm):
    """BatchNorm in float32 at least, whatever comes in and goes out (Ioffe and Szegedy, ICML 2015).

    nnx.BatchNorm told to compute in bfloat16 would round the running statistics in evaluation,
    and what XLA makes of its gradient reads the map more often than need be.
    """

    scale: nnx.Param  # nnx.BatchNorm's may be None
    bias: nnx.Param

    def __init__(self, num_channels, *, epsilon=1e-5, zero=False, rngs: nnx.Rngs):
        scale = nnx.initializers.zeros_init() if zero else nnx.initializers.ones_init()
        super().__init__(num_channels, momentum=0.9, epsilon=epsilon, scale_init=scale, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> the same shape and dtype."""
        scale, bias = self.scale[...], self.bias[...]
        if self.use_running_average:
            scale = scale * lax.rsqrt(self.var[...] + self.epsilon)
            return _affine(x, scale, bias - self.mean[...] * scale)
        normalize = lambda x: _normalize(x, scale, bias, self.epsilon)  # noqa: E731
        if _num_groups == 1:
            y, mean, var = normalize(x)
        else:
            groups = x.reshape(_num_groups, -1, *x.shape[1:])
            y, mean, var = jax.vmap(normalize)(groups)
            y, mean, var = y.reshape(x.shape), mean.mean(0), var.mean(0)
        for average, new in ((self.mean, mean), (self.var, var)):
            old = average[...]
            average[...] = self.momentum * old + (1 - self.momentum) * lax.stop_gradient(new)
        return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalize(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns x normalised by its own mean and variance a channel, and these two, [C].

    Only the first of the three can be differentiated. All is written in sums over x and one pass
    that is affine in it, so that forward and backward read the map twice each.
    """
    return _forward(x, scale, bias, epsilon)[0]


def _forward(x, scale, bias, epsilon):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = wide.mean((0, 1, 2))
    var = jnp.maximum((wide**2).mean((0, 1, 2)) - mean**2, 0.0)
    inverse = lax.rsqrt(var + epsilon)
    y = _affine(x, scale * inverse, bias - mean * scale * inverse)
    return (y, mean, var), (x, scale, mean, inverse)


def _backward(epsilon, saved, cotangents):
    x, scale, mean, inverse = saved
    dy = cotangents[0]
    count = x.size // x.shape[-1]
    wide = dy.astype(jnp.promote_types(dy.dtype, jnp.float32))
    d_bias = wide.sum((0, 1, 2))
    d_scale = ((wide * x).sum((0, 1, 2)) - mean * d_bias) * inverse
    # dx = scale * inverse * (dy - d_bias / n - d_scale / n * (x - mean) * inverse)
    of_dy = scale * inverse
    of_x = -of_dy * d_scale / count * inverse
    offset = -of_dy * d_bias / count - of_x * mean
    return (wide * of_dy + x * of_x + offset).astype(x.dtype), d_scale, d_bias


_normalize.defvjp(_forward, _backward)


def _affine(x: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
    """Computes in the factor's dtype, returns x's."""
    return (x * factor + offset).astype(x.dtype)
