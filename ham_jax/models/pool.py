"""The last layer of every backbone, and so the one place where its last map can be seen."""

import jax
import jax.numpy as jnp
from flax import nnx


class Pool(nnx.Module):
    """The average over all places of a map, in float32 at least."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, h, w, K] -> float32 [B, K]."""
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2))
