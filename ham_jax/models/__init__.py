"""Pixels -> logits: networks as pure functions of plain dicts.

A new backbone is a file that ends with its `Family`, and an entry of `FAMILIES`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax import core

from ham_jax import config as configuration
from ham_jax.config import InputError
from ham_jax.models import conv, convnext, efficientnet, resnet
from ham_jax.models.classifier import Classifier, Normalize
from ham_jax.models.family import Family

Tree = dict[str, Any]
"""Nested dicts of arrays with string keys."""

FAMILIES: tuple[Family, ...] = (resnet.FAMILY, efficientnet.FAMILY, convnext.FAMILY)


def names() -> tuple[str, ...]:
    """Returns the values that `model.name` may have."""
    return tuple(name for family in FAMILIES for name in family.names)


def family_of(name: str) -> Family:
    """Returns the family of a network.

    Raises:
      InputError: there is no such network.
    """
    for family in FAMILIES:
        if name in family.names:
            return family
    raise InputError(configuration.choice_faults("model.name", name, names()))


def faults(config: ml_collections.ConfigDict) -> list[str]:
    """Returns a sentence for each reason why this configuration's network cannot be built.

    Args:
      config: the whole configuration.
    """
    name = config.model.name
    try:
        min_px = family_of(name).min_px
    except InputError as error:
        return error.faults + conv.faults()
    sides = [("augment.crop_px", config.augment.crop_px)]
    sides += [
        ("augment.progressive", entry[-1])
        for entry in config.augment.progressive
        if isinstance(entry, tuple) and entry and isinstance(entry[-1], int)  # config says the rest
    ]
    return conv.faults() + [
        f"{key} = {px} is too small for {name}: set {min_px} or more."
        for key, px in sides
        if px < min_px
    ]


@dataclasses.dataclass(frozen=True)
class Network:
    """A network's pure functions.

    Attributes:
      name: such as resnet18.
      init: seed -> (params, batch_stats), float32. `params` has the parts `backbone`, `head` and,
        where metadata is used, `fusion`; `batch_stats` has `backbone` (where it has BatchNorm)
        and `normalize`: the mean and std of RGB in [0, 1] that the weights expect.
      apply: (params, batch_stats, image float32 [B, H, W, 3] in [0, 1], train, key=None,
        metadata=None) -> (logits float32 [B, C], new batch_stats). The network normalises the
        image itself. In training BatchNorm looks at the whole global batch, or at each of the
        parts of `norm.in_groups`; dropout and stochastic depth, where they are on, need a `key`.
        metadata: float32 [B, M], for a network built with M > 0.
      features: (params, batch_stats, image) -> float32 [B, F], the backbone's features as the head
        sees them in evaluation, before metadata.
      class_maps: (params, batch_stats, image, classes int [B], metadata=None) -> (map, gradient),
        float32 [B, h, w, K] each: the backbone's last map, whose average over all places becomes
        the features, and the derivative of the logit of each image's class with respect to it.
      classify: (params, batch_stats, features, metadata=None) -> logits float32 [B, C]: what is
        left of `apply` in evaluation after `features`.
    """

    name: str
    init: Callable[[int], tuple[Tree, Tree]]
    apply: Callable[..., tuple[jax.Array, Tree]]
    features: Callable[[Tree, Tree, jax.Array], jax.Array]
    class_maps: Callable[..., tuple[jax.Array, jax.Array]]
    classify: Callable[..., jax.Array]


def build(config: ml_collections.ConfigDict, num_classes: int, num_metadata: int = 0) -> Network:
    """Returns the network that the section `model` names.

    Args:
      config: the section `model`.
      num_classes: C.
      num_metadata: M, the length of an image's metadata; 0: the network takes none.

    Raises:
      InputError: there is no network of this name.
    """
    family, dtype = family_of(config.name), _dtype(config.dtype)

    def make(rngs: nnx.Rngs) -> Classifier:
        return Classifier(
            family.build(config, dtype, rngs),
            Normalize(family.mean, family.std),
            num_classes,
            dropout=config.dropout,
            num_metadata=num_metadata,
            rngs=rngs,
        )

    random = config.dropout > 0 or config.drop_path > 0
    functions = _Functions(make, random, num_metadata)
    return Network(
        config.name,
        functions.init,
        functions.apply,
        functions.features,
        functions.class_maps,
        functions.classify,
    )


class _Functions:
    """The functions of a `Network`, which has their signatures.

    Args:
      make: rngs -> module.
      random: training needs a key.
      num_metadata: M.
    """

    def __init__(self, make: Callable[[nnx.Rngs], Classifier], random: bool, num_metadata: int):
        self._make, self._random, self._num_metadata = make, random, num_metadata
        shape = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
        self._graphs = {
            train: nnx.split(
                # Not every backbone has BatchNorm.
                nnx.view(
                    shape,
                    deterministic=not train,
                    use_running_average=not train,
                    raise_if_not_found=False,
                ),
                nnx.Param,
                nnx.BatchStat,
            )[0]
            for train in (True, False)
        }

    def init(self, seed: int) -> tuple[Tree, Tree]:
        def initial(key):
            _, params, stats = nnx.split(self._make(nnx.Rngs(key)), nnx.Param, nnx.BatchStat)
            return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

        key = jax.random.key(seed)
        if isinstance(key, core.Tracer):  # somebody asks for shapes
            return initial(key)
        # On its highest level LLVM compiles the draws three times as long, to the same bits.
        on_cpu = jax.default_backend() == "cpu"
        options = {"xla_backend_optimization_level": "2"} if on_cpu else {}
        return jax.jit(initial, compiler_options=options)(key)

    def apply(
        self,
        params: Tree,
        batch_stats: Tree,
        image: jax.Array,
        train: bool,
        key: jax.Array | None = None,
        metadata: jax.Array | None = None,
    ) -> tuple[jax.Array, Tree]:
        rngs = None
        if train and self._random:
            if key is None:
                raise ValueError("dropout and stochastic depth need a key in training")
            rngs = nnx.Rngs(dropout=key)
        self._check(metadata)
        net = self._module(params, batch_stats, train)
        logits = net(image, metadata, rngs)
        if train:
            batch_stats = nnx.to_pure_dict(nnx.state(net, nnx.BatchStat))
        return logits, batch_stats

    def features(self, params: Tree, batch_stats: Tree, image: jax.Array) -> jax.Array:
        net = self._module(params, batch_stats)
        return net.backbone(net.normalize(image))

    def classify(
        self,
        params: Tree,
        batch_stats: Tree,
        features: jax.Array,
        metadata: jax.Array | None = None,
    ) -> jax.Array:
        self._check(metadata)
        return self._module(params, batch_stats).classify(features, metadata)

    def class_maps(
        self,
        params: Tree,
        batch_stats: Tree,
        image: jax.Array,
        classes: jax.Array,
        metadata: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        self._check(metadata)

        def logits_of_classes(offset):
            net = self._module(params, batch_stats)
            pool, maps = net.backbone.pool, []

            def tapped(x):
                maps.append(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
                return pool(maps[0] + offset)

            net.backbone.pool = tapped
            logits = net(image, metadata)
            chosen = jnp.take_along_axis(logits, jnp.asarray(classes)[:, None], axis=-1)
            # In evaluation no image depends on another, so that the sum's derivative is each one's.
            return chosen.sum(), maps[0]

        _, shape = jax.eval_shape(logits_of_classes, 0.0)
        gradient, last = jax.grad(logits_of_classes, has_aux=True)(
            jnp.zeros(shape.shape, shape.dtype)
        )
        return last, gradient

    def _module(self, params: Tree, batch_stats: Tree, train: bool = False) -> Classifier:
        return nnx.merge(self._graphs[train], params, batch_stats, copy=True)

    def _check(self, metadata: jax.Array | None) -> None:
        if (metadata is None) != (self._num_metadata == 0):
            raise ValueError(f"the network was built for {self._num_metadata} metadata")


def _dtype(name: str) -> jnp.dtype:
    """Returns the dtype to compute in; bfloat16 gains on GPU and TPU and loses on CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)
