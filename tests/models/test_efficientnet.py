import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ham_jax import config, models
from ham_jax.models import efficientnet


@functools.cache
def network(name="efficientnet_lite0", num_classes=7, dtype="float32"):
    section = config.base().model
    section.name, section.dtype = name, dtype
    return models.build(section, num_classes)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("efficientnet_lite0", 4_652_008),
        ("efficientnet_lite1", 5_416_680),
        ("efficientnet_lite2", 6_092_072),
    ],
)
def test_number_of_parameters_is_the_published_one(name, published):
    params, _ = jax.eval_shape(lambda: network(name, 1000).init(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == published


def test_parameters_are_named_by_their_place():
    params, stats = (tree["backbone"] for tree in jax.eval_shape(lambda: network().init(0)))
    assert params["stage2"]["block0"]["depthwise"]["conv"]["kernel"].shape == (3, 3, 1, 96)
    assert params["stage3"]["block1"]["expand"]["conv"]["kernel"].shape == (1, 1, 40, 240)
    assert "expand" not in params["stage1"]["block0"]
    assert params["top"]["conv"]["kernel"].shape == (1, 1, 320, 1280)
    assert stats["stage7"]["block0"]["project"]["norm"]["mean"].shape == (320,)


def same_windows(x, size, stride):
    """Returns [B, H / stride, W / stride, C, size, size]; the odd zero lies below and right."""
    total = [max((-(-n // stride) - 1) * stride + size - n, 0) for n in x.shape[1:3]]
    x = np.pad(x, ((0, 0), *((t // 2, t - t // 2) for t in total), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
    return windows[:, ::stride, ::stride]


def norm(x):
    return (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-3)


@pytest.mark.parametrize(("stride", "num_out"), [(2, 4), (1, 6), (1, 4)])
def test_block_equals_numpy(stride, num_out):
    block = efficientnet.Block(6, num_out, 5, stride, 3, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(3, 8, 7, 6))
    expand, depthwise, project = (
        np.asarray(part.conv.kernel[...], np.float64)
        for part in (block.expand, block.depthwise, block.project)
    )
    y = np.clip(norm(x @ expand[0, 0]), 0, 6)
    y = np.einsum("bhwcij,ijc->bhwc", same_windows(y, 5, stride), depthwise[:, :, 0])
    y = norm(np.clip(norm(y), 0, 6) @ project[0, 0])
    expected = x + y if (stride, num_out) == (1, 6) else y
    np.testing.assert_allclose(block(jnp.asarray(x, jnp.float32)), expected, atol=1e-4)
