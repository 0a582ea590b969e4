import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ham_jax.models import conv

SIDE = st.integers(1, 9)
PAD = st.integers(0, 3)


def close(got, expected, scale=1e-5):
    """Within `scale` of the largest expected magnitude."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(got, expected, rtol=0, atol=scale * np.abs(expected).max())


def value_and_gradients(form, x, kernel, dy):
    y, pull = jax.vjp(form, x, kernel)
    return y, *pull(dy)


@settings(max_examples=12, deadline=None)
@given(SIDE, SIDE, st.sampled_from([(1, 1), (3, 3), (2, 3), (7, 7)]), st.integers(1, 3), PAD, PAD)
@example(2, 2, (3, 3), 1, 1, 1)  # the kernel is larger than the map
@example(4, 4, (3, 3), 2, 1, 1)  # it is larger than the output only
@example(8, 6, (3, 3), 1, 1, 1)  # larger than neither
@example(7, 5, (1, 1), 2, 0, 0)  # one matrix product
def test_cpu_forms_equal_xlas_convolution_and_its_gradients(height, width, size, stride, low, high):
    assume(height + low + high >= size[0] and width + low + high >= size[1])
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, height, width, 5)).astype(np.float32)
    kernel = rng.normal(size=(*size, 5, 4)).astype(np.float32)
    pads = ((low, high), (low, high))

    @jax.jit
    def both(x, kernel):
        y = conv.direct(x, kernel, stride, pads)
        dy = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
        return [
            value_and_gradients(lambda x, k, form=form: form(x, k, stride, pads), x, kernel, dy)
            for form in (conv.conv_on_cpu, conv.direct)
        ]

    for got, expected in zip(*both(x, kernel), strict=True):
        close(got, expected)


def test_groups_are_convolutions_side_by_side_and_dilation_spreads_the_taps():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 2, 2, 4)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 2, 6)).astype(np.float32)
    pads = ((2, 2), (2, 2))
    spread = np.zeros((5, 5, 2, 6), np.float32)
    spread[::2, ::2] = kernel
    halves = [
        conv.direct(x[..., :2], spread[..., :3], 1, pads),
        conv.direct(x[..., 2:], spread[..., 3:], 1, pads),
    ]
    close(conv.conv(x, kernel, 1, pads, groups=2, dilation=2), np.concatenate(halves, -1))


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
    assert tied.min() >= 0
    np.testing.assert_allclose(tied.sum(), 16, rtol=1e-6)  # one for each of 4 x 4 windows


def test_kernel_starts_with_he_variance_of_fan_out():
    kernel = conv.Conv(32, 64, 3, dtype=jnp.float32, rngs=nnx.Rngs(0)).kernel[...]
    assert kernel.shape == (3, 3, 32, 64)
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 64)), rtol=0.02)
