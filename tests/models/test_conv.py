import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from jax import lax

from ham_jax.config import InputError
from ham_jax.models import conv, processor

PAD = st.integers(0, 3)


def close(got, expected, scale=1e-5):
    """Within `scale` of the largest expected magnitude."""
    expected = np.asarray(expected)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=0, atol=scale * np.abs(expected).max())


def problem(shape, size, geometry, batch=2):
    rng = np.random.default_rng(0)
    groups = geometry.groups
    x = rng.normal(size=(batch, *shape, 4)).astype(np.float32)
    kernel = rng.normal(size=(*size, 4 // groups, 4 if groups > 1 else 6)).astype(np.float32)
    return x, kernel, geometry


@st.composite
def problems(draw):
    side, size = st.integers(1, 9), draw(st.sampled_from([(1, 1), (3, 3), (2, 3), (5, 5)]))
    geometry = conv.Geometry(
        draw(st.integers(1, 3)),
        ((draw(PAD), draw(PAD)), (draw(PAD), draw(PAD))),
        draw(st.sampled_from([1, 1, 2, 4])),
    )
    shape = draw(side), draw(side)
    assume(all(n + sum(p) >= k for n, p, k in zip(shape, geometry.pads, size, strict=True)))
    return problem(shape, size, geometry)


@settings(max_examples=25, deadline=None)
@given(problems())
@example(problem((2, 2), (3, 3), conv.Geometry(1, ((1, 1), (1, 1)))))  # a kernel over all the map
@example(problem((8, 6), (3, 3), conv.Geometry(2, ((0, 1), (0, 1)))))
@example(problem((7, 5), (1, 1), conv.Geometry(2, ((0, 0), (0, 0)))))
@example(problem((8, 6), (5, 5), conv.Geometry(2, ((1, 2), (1, 2)), 4)))
@example(problem((6, 5), (7, 7), conv.Geometry(1, ((3, 3), (3, 3)), 4)))
@example(problem((9, 9), (2, 3), conv.Geometry(3, ((0, 0), (3, 0)), 4)))
def test_every_form_equals_xlas_convolution_and_its_gradients(given):
    x, kernel, geometry = given
    forward, by_input, weight = conv.fitting(x.shape, kernel.shape, geometry)
    chosen = conv.choose(x.shape, kernel.shape, geometry)
    assert chosen.forward in forward
    assert chosen.input in by_input
    assert chosen.weight in weight

    @jax.jit
    def all_forms(x, kernel):
        y, pull = jax.vjp(lambda x, kernel: conv.direct(x, kernel, geometry), x, kernel)
        dy = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        forms = [
            {name: conv.FORWARD[name](x, kernel, geometry) for name in forward},
            {name: conv.INPUT[name](x, kernel, geometry, dy) for name in by_input},
            {name: conv.WEIGHT[name](x, kernel, geometry, dy) for name in weight},
        ]
        by_default, pull_default = jax.vjp(lambda x, k: conv.conv(x, k, *geometry), x, kernel)
        return (y, *pull(dy)), forms, (by_default, *pull_default(dy))

    expected, forms, defaults = all_forms(x, kernel)
    for truth, by_form, by_default in zip(expected, forms, defaults, strict=True):
        close(by_default, truth)
        for got in by_form.values():
            close(got, truth)


def test_xlas_convolution_equals_numpy_with_groups():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 4, 3, 4))
    kernel = rng.normal(size=(3, 3, 2, 6))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.zeros((2, 4, 3, 6))
    for i, j in np.ndindex(3, 3):
        tap = padded[:, i : i + 4, j : j + 3]
        expected[..., :3] += tap[..., :2] @ kernel[i, j, :, :3]
        expected[..., 3:] += tap[..., 2:] @ kernel[i, j, :, 3:]
    geometry = conv.Geometry(1, ((1, 1), (1, 1)), groups=2)
    x, kernel = x.astype(np.float32), kernel.astype(np.float32)
    close(conv.direct(x, kernel, geometry), expected.astype(np.float32))


@pytest.mark.parametrize("form", ["scanned", "scanned_rows"])
def test_sums_over_a_batch_in_bfloat16_keep_their_digits(form):
    x, kernel, geometry = problem((6, 6), (3, 3), conv.Geometry(1, ((1, 1), (1, 1)), 4), batch=256)
    x, dy = jnp.abs(x).astype(jnp.bfloat16), jnp.ones((256, 6, 6, 4), jnp.bfloat16)
    got = conv.WEIGHT[form](x, kernel.astype(jnp.bfloat16), geometry, dy)
    assert got.dtype == jnp.bfloat16
    exact = conv.WEIGHT["direct"](x.astype(jnp.float32), kernel, geometry, dy.astype(jnp.float32))
    np.testing.assert_allclose(got.astype(jnp.float32), exact, rtol=2**-8)  # one rounding


def test_same_padding_is_tensorflows():
    x = np.random.default_rng(3).normal(size=(1, 8, 7, 4)).astype(np.float32)
    layer = conv.Conv(4, 6, conv.Kernel(5, 2, same=True), dtype=jnp.float32, rngs=nnx.Rngs(0))
    expected = lax.conv_general_dilated(
        x, layer.kernel[...], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    close(layer(x), expected)


def test_stock_is_xlas_own_convolution_on_cpu_too():
    x, kernel = jnp.zeros((1, 4, 4, 8)), jnp.zeros((3, 3, 1, 8))

    def traced():
        apply = lambda x, k: conv.conv(x, k, 1, ((1, 1), (1, 1)), groups=8)  # noqa: E731
        return str(jax.make_jaxpr(apply)(x, kernel))

    with conv.stock():
        assert "conv_general_dilated" in traced()
    assert "conv_general_dilated" not in traced()


def test_max_pool_equals_xlas_and_shares_a_tied_gradient():
    x = np.random.default_rng(2).permutation(2 * 7 * 8 * 3).reshape(2, 7, 8, 3).astype(np.float32)

    def pool(x):
        return conv.max_pool(x, 3, 2, 1)

    def pool_xla(x):
        return nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

    y, pull = jax.vjp(pool, x)
    expected, pull_xla = jax.vjp(pool_xla, x)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(pull(y)[0], pull_xla(y)[0])
    tied = jax.grad(lambda x: pool(x).sum())(jnp.zeros((1, 8, 8, 1)))
    assert 0 < tied.min() < tied.max() < 1
    np.testing.assert_allclose(tied.sum(), 16, rtol=1e-6)  # one for each of 4 x 4 windows


def test_kernel_starts_with_he_variance_of_fan_out():
    make = {"dtype": jnp.float32, "rngs": nnx.Rngs(0)}
    kernel = conv.Conv(32, 64, conv.Kernel(3), **make).kernel[...]
    assert kernel.shape == (3, 3, 32, 64)
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 64)), rtol=0.02)
    each = conv.Conv(640, 640, conv.Kernel(5, depthwise=True), **make).kernel[...]
    assert each.shape == (5, 5, 1, 640)
    np.testing.assert_allclose(each.std(), np.sqrt(2 / 25), rtol=0.02)


GIVEN = (8, 6, 6, 4), (3, 3, 4, 6), conv.Geometry(1, ((1, 1), (1, 1)))


def table(path, monkeypatch, entries, family=None):
    path.write_text(json.dumps({family or processor.family(): entries}))
    monkeypatch.setenv(conv.TABLE, str(path))
    conv._table.cache_clear()


def test_a_table_of_this_processor_chooses_and_the_rule_what_it_leaves_open(tmp_path, monkeypatch):
    forms = conv.Forms("direct", "inside", "rows")
    assert forms != conv.rule(*GIVEN)
    table(tmp_path / "table.json", monkeypatch, [conv.table_entry(*GIVEN, forms)])
    assert conv.faults() == []
    x, *of_kernel = GIVEN
    for batch in (8, 1):
        assert conv.choose((batch, *x[1:]), *of_kernel) == forms
    other = (8, 7, 6, 4)
    assert conv.choose(other, *of_kernel) == conv.rule(other, *of_kernel)


@pytest.mark.parametrize(
    ("change", "family", "reason"),
    [
        ({"forward": "shifted"}, None, "do not all fit"),  # a form of depthwise convolutions
        ({"pads": 1}, None, "no table of forms"),
        ({}, "sparc", "no entry for"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(change, family, reason, tmp_path, monkeypatch):
    entry = conv.table_entry(*GIVEN, conv.rule(*GIVEN)) | change
    table(tmp_path / "table.json", monkeypatch, [entry], family)
    with pytest.raises(InputError, match=reason):
        conv.choose(*GIVEN)
    (fault,) = conv.faults()
    assert "speed.py conv --table=" in fault
    monkeypatch.setenv(conv.TABLE, str(tmp_path / "none.json"))
    assert "No such file" in conv.faults()[0]


def test_only_large_convolutions_get_the_form_that_takes_seconds_to_compile():
    of_kernel = (3, 3, 256, 256), conv.Geometry(1, ((1, 1), (1, 1)))
    assert set(conv.rule((32, 8, 8, 256), *of_kernel)) == {"winograd"}
    assert "winograd" not in conv.rule((2, 8, 8, 256), *of_kernel)
