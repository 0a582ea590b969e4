"""Pixels -> logits: networks as pure functions of plain dicts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from ham_jax.models import efficientnet, resnet

Tree = dict[str, Any]
"""Nested dicts of arrays with string keys."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A network's pure functions.

    Attributes:
      name: such as resnet18.
      mean: of RGB in [0, 1], what the network subtracts from the image.
      std: what it then divides by.
      init: seed -> (params, batch_stats), float32.
      apply: (params, batch_stats, image float32 [B, H, W, 3] in [0, 1], train) ->
        (logits float32 [B, C], new batch_stats). The network normalises the image itself, as its
        weights expect. In training BatchNorm looks at the whole global batch.
    """

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    init: Callable[[int], tuple[Tree, Tree]]
    apply: Callable[[Tree, Tree, jax.Array, bool], tuple[jax.Array, Tree]]


def build(config: ml_collections.ConfigDict, num_classes: int) -> Network:
    """Returns the network that the section `model` names."""
    family = efficientnet if config.name in efficientnet.SCALES else resnet
    dtype = _dtype(config.dtype)

    def make(rngs: nnx.Rngs) -> nnx.Module:
        if family is efficientnet:
            return efficientnet.EfficientNetLite(config.name, num_classes, dtype, rngs)
        return resnet.ResNet(
            config.name, num_classes, config.stem, config.zero_init_residual, dtype, rngs
        )

    def init(seed: int) -> tuple[Tree, Tree]:
        @jax.jit
        def initial(key):
            _, params, stats = nnx.split(make(nnx.Rngs(key)), nnx.Param, nnx.BatchStat)
            return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

        return initial(jax.random.key(seed))

    shape = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graphs = {
        train: nnx.split(
            nnx.view(shape, use_running_average=not train),
            nnx.Param,
            nnx.BatchStat,
        )[0]
        for train in (True, False)
    }

    def apply(params: Tree, batch_stats: Tree, image: jax.Array, train: bool):
        net = nnx.merge(graphs[train], params, batch_stats, copy=True)
        logits = net(image)
        if train:
            batch_stats = nnx.to_pure_dict(nnx.state(net, nnx.BatchStat))
        return logits, batch_stats

    return Network(config.name, family.MEAN, family.STD, init, apply)


def _dtype(name: str) -> jnp.dtype:
    """Returns the dtype to compute in; bfloat16 gains on GPU and TPU and loses on CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)
