import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ham_jax import config, models
from ham_jax.models import convnext, drop_path


@functools.cache
def network(name="convnext_atto", num_classes=7):
    section = config.base().model
    section.update(name=name, dtype="float32")
    return models.build(section, num_classes)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("convnext_atto", 3_695_520),
        ("convnext_femto", 5_217_784),
        ("convnext_pico", 9_045_672),
        ("convnext_nano", 15_593_560),
        ("convnext_tiny", 28_589_128),
    ],
)
def test_number_of_parameters_is_the_published_one(name, published):
    params, stats = jax.eval_shape(lambda: network(name, 1000).init(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == published
    assert set(stats) == {"normalize"}


def test_parameters_are_named_by_their_place():
    params = jax.eval_shape(lambda: network().init(0)[0])["backbone"]
    assert params["stem"]["conv"]["kernel"].shape == (4, 4, 3, 40)
    assert "downsample" not in params["stage1"]
    assert params["stage2"]["downsample"]["conv"]["kernel"].shape == (2, 2, 40, 80)
    shapes = jax.tree.map(lambda leaf: leaf.shape, params["stage3"]["block5"])
    assert shapes == {
        "depthwise": {"kernel": (7, 7, 1, 160), "bias": (160,)},
        "norm": {"scale": (160,), "bias": (160,)},
        "expand": {"kernel": (160, 640), "bias": (640,)},
        "project": {"kernel": (640, 160), "bias": (160,)},
        "scale": (160,),
    }


def test_block_equals_numpy():
    rng = np.random.default_rng(0)
    block = convnext.Block(6, 0.0, dtype=jnp.float32, rngs=nnx.Rngs(0))
    graph, params = nnx.split(block, nnx.Param)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    values = jax.tree.map(draw, nnx.to_pure_dict(params))
    block = nnx.merge(graph, values, copy=True)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), values)
    x = rng.normal(size=(2, 5, 4, 6))
    padded = np.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (7, 7), (1, 2))
    y = np.einsum("bhwcij,ijc->bhwc", windows, p["depthwise"]["kernel"][:, :, 0])
    y += p["depthwise"]["bias"]
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    y = y * p["norm"]["scale"] + p["norm"]["bias"]
    y = y @ p["expand"]["kernel"] + p["expand"]["bias"]
    y = y * (1 + np.vectorize(math.erf)(y / np.sqrt(2))) / 2
    y = (y @ p["project"]["kernel"] + p["project"]["bias"]) * p["scale"]
    np.testing.assert_allclose(block(jnp.asarray(x, jnp.float32)), x + y, atol=1e-3)


def test_stochastic_depth_keeps_the_mean_and_leaves_evaluation_alone():
    rates = drop_path.rates(0.6, (2, 1, 1))
    np.testing.assert_allclose([*rates[0], *rates[1], *rates[2]], [0, 0.2, 0.4, 0.6])
    assert [len(stage) for stage in rates] == [2, 1, 1]
    drop, branch = drop_path.DropPath(0.25), jnp.ones((8000, 2, 1, 3))
    left = np.asarray(drop(branch, rngs=nnx.Rngs(dropout=jax.random.key(0))))
    assert (left == left[:, :1, :, :1]).all()  # an image's branch goes as a whole
    np.testing.assert_allclose(np.unique(left), [0, 4 / 3], rtol=1e-6)
    assert left.mean() == pytest.approx(1, abs=0.03)  # 5 standard deviations
    np.testing.assert_array_equal(nnx.view(drop, deterministic=True)(branch), branch)


def test_training_draws_by_the_key_and_evaluation_does_not(monkeypatch):
    # Two blocks, as twelve compile for half a minute.
    monkeypatch.setitem(convnext.SCALES, "convnext_atto", ((1, 0, 0, 1), (8, 8, 8, 8)))
    section = config.base().model
    section.update(name="convnext_atto", dtype="float32", drop_path=0.5)
    net = models.build(section, 7)
    params, stats = net.init(0)
    # Blocks start as almost nothing; here they count.
    params = jax.tree.map_with_path(
        lambda path, leaf: leaf + 0.5 if path[-1].key == "scale" and len(path) == 4 else leaf,
        params,
    )
    image = np.random.default_rng(0).random((4, 32, 32, 3), np.float32)

    @jax.jit
    def train(params, key):
        loss = lambda params: (net.apply(params, stats, image, True, key)[0] ** 2).sum()  # noqa: E731
        return jax.value_and_grad(loss)(params)

    (first, grads), (again, _), (other, _) = (train(params, jax.random.key(n)) for n in (0, 0, 1))
    assert first == again != other
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads["backbone"]["stem"]))

    evaluate = jax.jit(lambda params: net.apply(params, stats, image, False)[0])
    logits = evaluate(params)
    assert logits.shape == (4, 7)
    np.testing.assert_array_equal(logits, evaluate(params))
    with pytest.raises(ValueError, match="need a key"):
        net.apply(params, stats, image, True)
