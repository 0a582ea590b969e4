"""BatchNorm over the whole global batch, for every network."""

import jax
import jax.numpy as jnp
from flax import nnx


class Norm(nnx.BatchNorm):
    """BatchNorm in float32 at least, whatever comes in and goes out.

    nnx.BatchNorm told to compute in bfloat16 would round the running statistics in evaluation.
    """

    def __init__(self, num_channels, *, epsilon=1e-5, zero=False, dtype, rngs: nnx.Rngs):
        scale = nnx.initializers.zeros_init() if zero else nnx.initializers.ones_init()
        super().__init__(
            num_channels,
            momentum=0.9,
            epsilon=epsilon,
            dtype=jnp.promote_types(dtype, jnp.float32),
            scale_init=scale,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> the same shape and dtype."""
        return super().__call__(x).astype(x.dtype)
