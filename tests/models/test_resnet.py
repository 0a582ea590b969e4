import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ham_jax import config, models
from ham_jax.models import resnet
from ham_jax.models.norm import Norm


@functools.cache
def network(name="resnet18", num_classes=7, stem="imagenet", dtype="float32", zero_init=True):
    section = config.base().model
    section.name, section.stem, section.dtype = name, stem, dtype
    section.zero_init_residual = zero_init
    return models.build(section, num_classes)


@pytest.fixture
def narrow(monkeypatch):
    """Makes `network` one of two stages of one block, which compile sooner than four of two."""
    monkeypatch.setattr(resnet, "_WIDTHS", (16, 32))
    monkeypatch.setitem(resnet.DEPTHS, "resnet18", (1, 1))
    return network.__wrapped__


def images(num=8, side=16):
    return np.random.default_rng(0).random((num, side, side, 3), np.float32)


def paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
    ],
)
def test_number_of_parameters_is_the_published_one(name, published):
    params, _ = jax.eval_shape(lambda: network(name, 1000).init(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == published


def test_parameters_are_float32_and_named_by_their_place():
    params, stats = jax.eval_shape(network().init, 3)
    flat = paths(params)
    assert set(params) == {"backbone", "head"}
    assert set(stats) == {"backbone", "normalize"}
    assert {"stem/conv/kernel", "stem/norm/scale"} <= set(paths(params["backbone"]))
    assert "stage2/block0/shortcut/conv/kernel" in paths(params["backbone"])
    assert {"stage4/block1/norm2/mean", "stage4/block1/norm2/var"} <= set(paths(stats["backbone"]))
    assert {leaf.dtype for leaf in jax.tree.leaves((params, stats))} == {jnp.dtype("float32")}
    # Weight decay and its like find what to act on by this name.
    assert {p for p, leaf in flat.items() if leaf.ndim > 1} == {
        p for p in flat if p.endswith("/kernel")
    }


def test_init_is_a_function_of_the_seed(narrow):
    first, again, other = (narrow().init(seed)[0] for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    for path, leaf in paths(other).items():
        same = (paths(again)[path] == leaf).all()
        assert same != path.endswith("/kernel"), path


def test_zero_init_makes_each_block_its_shortcut(narrow):
    flat = paths(narrow().init(3)[0])
    last = {p for p in flat if "/block" in p and p.endswith("/norm2/scale")}
    assert len(last) == 2
    for path, leaf in flat.items():
        if path.endswith("/scale"):
            assert (leaf == (0 if path in last else 1)).all(), path
    style = resnet.Style(bottleneck=False, averaged=False, zero_init=True, dtype=jnp.float32)
    block = resnet.Block(4, 4, 1, style=style, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
    np.testing.assert_array_equal(block(x), jax.nn.relu(x))


@pytest.mark.parametrize(("kind", "side"), [("imagenet", 16), ("d", 16), ("small", 64)])
def test_stem_leaves_a_quarter_of_the_side_or_all_of_it(kind, side):
    stem = nnx.eval_shape(lambda: resnet.Stem(kind, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    out = nnx.eval_shape(lambda m, x: m(x), stem, jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32))
    assert out.shape == (2, side, side, 64)


def numpy_conv(x, kernel, stride):
    size = kernel.shape[0]
    x = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
    return np.einsum("bhwcij,ijco->bhwo", windows[:, ::stride, ::stride], kernel)


def numpy_norm(x):
    return (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)


@pytest.mark.parametrize("averaged", [False, True])
def test_bottleneck_block_equals_numpy(averaged):
    style = resnet.Style(True, averaged, zero_init=False, dtype=jnp.float32)
    block = resnet.Block(6, 4, 2, style=style, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(3, 6, 6, 6))
    kernels = [
        np.asarray(c.kernel[...], np.float64) for c in (block.conv1, block.conv2, block.conv3)
    ]
    y = x
    for kernel, stride in zip(kernels, (1, 2, 1), strict=True):  # v1.5: the 3x3 strides
        last = numpy_norm(numpy_conv(y, kernel, stride))
        y = np.maximum(last, 0)
    around = x.reshape(3, 3, 2, 3, 2, 6).mean((2, 4)) if averaged else x[:, ::2, ::2]
    around = numpy_norm(numpy_conv(around, np.asarray(block.shortcut.conv.kernel[...]), 1))
    expected = np.maximum(last + around, 0)
    np.testing.assert_allclose(block(jnp.asarray(x, jnp.float32)), expected, atol=1e-4)


@pytest.mark.parametrize("train", [True, False])
def test_norm_and_its_gradients_are_batchnorms(train):
    """Flax's own, with the statistics moved and every gradient by automatic differentiation."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    x, weights = 3 + 2 * draw(4, 5, 6, 3), draw(4, 5, 6, 3)
    given = {"scale": draw(3), "bias": draw(3)}, {"mean": draw(3), "var": draw(3) ** 2}
    results = []
    for norm in (Norm(3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, momentum=0.9, rngs=nnx.Rngs(0))):
        norm = nnx.view(norm, use_running_average=not train)
        graph, *_ = nnx.split(norm, nnx.Param, nnx.BatchStat)

        def loss(params, stats, x, graph=graph):
            net = nnx.merge(graph, params, stats, copy=True)
            y = net(x)
            return (y * weights).sum(), (y, nnx.to_pure_dict(nnx.state(net, nnx.BatchStat)))

        results.append(jax.value_and_grad(loss, (0, 2), has_aux=True)(*given, x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *results)


def test_bfloat16_evaluation_keeps_the_statistics_in_float32():
    norm = Norm(1, rngs=nnx.Rngs(0))
    norm.mean[...] = jnp.array([1000.3])  # the nearest bfloat16 is 1000
    out = nnx.view(norm, use_running_average=True)(jnp.full((1, 1, 1, 1), 1000, jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), -0.3, rtol=0.01)


def test_training_moves_the_statistics_and_evaluation_does_not(narrow):
    net = narrow()
    params, stats = net.init(3)
    image = images()
    apply = jax.jit(net.apply, static_argnums=3)
    logits, new = apply(params, stats, image, True)
    still, kept = apply(params, new, image, False)
    assert logits.shape == (8, 7)
    assert not np.allclose(logits, still, atol=1e-3)
    jax.tree.map(np.testing.assert_array_equal, new, kept)
    normal = (image - np.array(resnet.FAMILY.mean)) / np.array(resnet.FAMILY.std)
    y = numpy_conv(normal, params["backbone"]["stem"]["conv"]["kernel"], 2)
    moved = new["backbone"]["stem"]["norm"]["mean"]
    np.testing.assert_allclose(moved, 0.1 * y.mean((0, 1, 2)), atol=1e-5)
    # An image's answer does not depend on its neighbours.
    alone, _ = apply(params, new, np.concatenate([image[:1], image[:1] * 0 + 1] * 4), False)
    np.testing.assert_allclose(alone[0], still[0], atol=1e-4)

    half, half_stats = jax.jit(narrow(dtype="bfloat16").apply, static_argnums=3)(
        params, stats, image, True
    )
    assert half.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(half_stats)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(half, logits, atol=0.05 * np.abs(logits).max())


def test_one_and_eight_devices_take_the_same_steps(narrow):
    net = narrow(dtype="float64", zero_init=False)
    start = net.init(3)
    label = np.arange(8) % 7

    def step(params, stats, image, label):
        def loss(params):
            logits, new = net.apply(params, stats, image, True)
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], 1).mean(), new

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), stats, value

    def two_steps(num_devices):
        mesh = Mesh(jax.devices()[:num_devices], ("data",), axis_types=(AxisType.Auto,))
        whole, rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
        tree = jax.tree.map(lambda x: np.asarray(x, np.float64), start)
        params, stats = jax.device_put(tree, whole)
        batch = jax.device_put((np.asarray(images(), np.float64), label), rows)
        taken = jax.jit(step, out_shardings=whole)
        for _ in range(2):
            params, stats, value = taken(params, stats, *batch)
        return jax.device_get((params, stats, value))

    assert jax.device_count() >= 8
    with jax.enable_x64(True):
        one, eight = two_steps(1), two_steps(8)
    assert one[2].dtype == np.float64
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * max(1, np.abs(a).max()))
