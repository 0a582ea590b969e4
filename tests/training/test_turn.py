"""A turned crop is what scipy and Pillow would cut out, in each of its forms."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ham_jax.data import preprocess
from ham_jax.training import augment, turn

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (2, 36, 48, 3), np.uint8)
QUARTER = math.pi / 2


@functools.partial(jax.jit, static_argnames=("form", "size_px", "most"))
def in_form(form, image, boxes, angle, k, size_px, most):
    with preprocess.in_form(form):
        return turn.resample_turned(image, boxes, angle, k, size_px, most)


def turned(form, image, box, angle, k=0, size_px=30, most=None):
    """One box and one angle for all images."""
    number = len(image)
    most = most or turn.Most(max(abs(angle), 0.1), 1.0)
    boxes, angles = jnp.array([box] * number, float), jnp.full(number, angle)
    return np.asarray(in_form(form, image, boxes, angles, jnp.int32(k), size_px, most))


@pytest.mark.parametrize("form", turn.TURNERS)
def test_an_upright_turn_is_a_resample_and_a_quarter_turn_is_exact(form):
    box = [3.0, 9.0, 30.0, 30.0]
    upright = turned(form, IMAGES, box, 0.0)
    boxes = jnp.array([box] * 2)
    np.testing.assert_allclose(upright, preprocess.resample(IMAGES, boxes, 30), atol=1e-5)
    for number in (1, 2, -1):
        quarter = turned(form, IMAGES, box, number * QUARTER)
        np.testing.assert_allclose(quarter, np.rot90(upright, -number, (1, 2)), atol=2e-5)


@pytest.mark.parametrize("form", turn.TURNERS)
def test_a_turned_view_mirrors_at_the_edge_and_keeps_proportions(form):
    # A box of 2 rows and 6 columns, turned by a quarter, spans 6 rows and 2 columns.
    ramp = np.broadcast_to(np.arange(9, dtype=np.uint8)[:, None, None] * 25, (1, 9, 9, 3))
    most = turn.Most(QUARTER, 3.0)
    (view,) = turned(form, ramp, [3.5, 1.5, 2.0, 6.0], QUARTER, size_px=3, most=most)
    np.testing.assert_allclose(view[1, :, 0] * 255 / 25, [6, 4, 2], atol=0.01)
    image = RNG.integers(0, 256, (1, 9, 9, 3), np.uint8)
    (view,) = turned(form, image, [5.0, 0.0, 9.0, 9.0], 0.0, size_px=9)
    np.testing.assert_allclose(view, image[0, [5, 6, 7, 8, 7, 6, 5, 4, 3]] / 255, atol=1e-5)


@pytest.mark.parametrize("form", turn.TURNERS)
def test_a_turn_that_reduces_does_not_alias(form):
    stripes = np.zeros((1, 32, 32, 3), np.uint8)
    stripes[:, ::2] = 255
    view = turned(form, stripes, [0.0, 0.0, 32.0, 32.0], 0.0, size_px=16)
    inner = view[:, 1:-1] if form == "products" else view  # the triangle mirrors at the edges
    np.testing.assert_allclose(inner, 0.5, atol=0.01)


@pytest.mark.parametrize("form", turn.TURNERS)
def test_nothing_is_seen_that_is_not_in_the_canvas(form):
    white, ratio = np.full((4, 36, 48, 3), 255, np.uint8), 4 / 3
    boxes = jnp.array([[0.0, 0.0, 36.0, 48.0], [0.0, 6.0, 36.0, 27.0]] * 2)
    angles, most = jnp.array([0.25, 0.25, -0.25, -0.25]) * math.pi, turn.Most(math.pi / 4, ratio)
    view = in_form(form, white, boxes, angles, jnp.int32(0), 30, most)
    np.testing.assert_allclose(view, 1.0, atol=1e-5)


def photographs(folder, number):
    """Photographs halved to 300 x 225: noise and the blocks of JPEG are no part of the scene."""
    files = sorted(folder.glob("*.jpg"))[:number]
    assert len(files) == number
    images = [Image.open(f).convert("RGB").resize((300, 225), Image.Resampling.BOX) for f in files]
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize("degrees", [30, 180])
def test_the_forms_show_the_same_of_photographs(degrees, real_data):
    """The interpolation differs: bilinear at once, or a triangle and three cubics."""
    image, reach = photographs(real_data / "originals_600x450", 8), math.radians(degrees)
    keys = jax.random.split(jax.random.key(degrees), 3)
    boxes = augment.draw_boxes(keys[0], 8, 225, 300, (0.4, 1.0), (0.75, 4 / 3))
    angle = augment.draw_angles(keys[1], 8, reach)
    k = jnp.arange(8)
    most = turn.Most(reach, 4 / 3)
    views = [in_form(form, image, boxes, angle, k, 200, most) for form in turn.TURNERS]
    apart = np.abs(np.subtract(*views)) * 255
    assert 0 < apart.mean() < 0.6
    assert np.percentile(apart, 99) < 4
    # As far apart as two photographs would be, were one of them turned the other way.
    other = in_form("products", image, boxes, -angle, k, 200, most)
    assert np.abs(views[0] - other).mean() * 255 > 5 * apart.mean()


@pytest.mark.parametrize(("form", "gathers"), [("gathers", True), ("products", False)])
def test_shears_look_nothing_up(form, gathers):
    def view(image, boxes, angle, k):
        with preprocess.in_form(form):
            return turn.resample_turned(image, boxes, angle, k, 8, turn.Most(0.3, 1.5))

    text = str(jax.make_jaxpr(view)(IMAGES, jnp.zeros((2, 4)) + 20, jnp.zeros(2), jnp.int32(0)))
    assert (" gather" in text) == gathers
