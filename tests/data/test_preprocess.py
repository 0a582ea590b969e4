"""What the device does to pixels is what Pillow and numpy would do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ham_jax.data import preprocess

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 36, 48, 3), np.uint8)


@pytest.mark.parametrize("size_px", [16, 36, 50])
def test_resample_is_pillows_bilinear_resize_of_a_box(size_px):
    boxes = np.array([[0, 0, 36, 48], [3.3, 10.25, 20.5, 30.7], [30, 40, 4, 5]], np.float32)
    ours = preprocess.resample(jnp.asarray(IMAGES), jnp.asarray(boxes), size_px)
    for image, (top, left, height, width), got in zip(IMAGES, boxes, ours, strict=True):
        box = (left, top, left + width, top + height)
        for channel in range(3):
            plane = Image.fromarray(image[..., channel].astype(np.float32))
            size = (size_px, size_px)
            expected = plane.resize(size, Image.Resampling.BILINEAR, box=box)
            np.testing.assert_allclose(got[..., channel] * 255, expected, atol=2e-2)


def random_boxes(rng, number, height, width):
    """Boxes from a pixel to the whole image; half of them touch edges, half are mirrored."""
    size = rng.uniform([1, 1], [height, width], (number, 2))
    start = rng.uniform(0, 1, (number, 2)) * ([height, width] - size)
    start = np.where(rng.random((number, 2)) < 0.25, 0, start)
    start = np.where(rng.random((number, 2)) < 0.25, [height, width] - size, start)
    mirrored = rng.random((number, 2)) < 0.25
    boxes = np.concatenate([start + mirrored * size, np.where(mirrored, -size, size)], 1)
    return boxes.astype(np.float32)


@pytest.mark.parametrize("size_px", [12, 80])
def test_products_are_the_gathers(size_px):
    rng = np.random.default_rng(size_px)
    images = jnp.asarray(rng.integers(0, 256, (100, 36, 48, 3), np.uint8))
    whole = np.array([[0, 0, 36, 48]], np.float32)
    boxes = jnp.asarray(np.concatenate([whole, random_boxes(rng, 99, 36, 48)]))
    gathers = preprocess.resample(images, boxes, size_px)
    with preprocess.in_form("products"):
        products = preprocess.resample(images, boxes, size_px)
    assert not np.array_equal(products, gathers), "these are two forms"
    four_ulp = 4 * np.spacing(np.float32(255))  # 6e-5 grey levels
    np.testing.assert_allclose(products * 255, gathers * 255, rtol=0, atol=four_ulp)


def test_the_form_follows_the_backend(monkeypatch):
    def has_product():
        given = (jnp.asarray(IMAGES), jnp.zeros((3, 4)) + 20)
        text = str(jax.make_jaxpr(lambda *of: preprocess.resample(*of, 8))(*given))
        return "dot_general" in text, "gather" in text

    assert has_product() == (False, True)
    with preprocess.in_form("products"):
        assert has_product() == (True, False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert has_product() == (True, False)
    with preprocess.in_form("gathers"):
        assert has_product() == (False, True)


def test_tiles_reach_the_edges_and_lie_evenly():
    four = [[0, 0, 27, 27], [0, 21, 27, 27], [9, 0, 27, 27], [9, 21, 27, 27]]
    np.testing.assert_array_equal(preprocess.tile_boxes(36, 48, 0.75, (2, 2)), four)
    three = [[0, 0, 36, 36], [0, 6, 36, 36], [0, 12, 36, 36]]
    np.testing.assert_array_equal(preprocess.tile_boxes(36, 48, 1.0, (1, 3)), three)


def test_central_boxes_are_centred_squares():
    np.testing.assert_array_equal(preprocess.central_boxes(2, 36, 48, 0.5), [[9, 15, 18, 18]] * 2)


def test_shades_of_gray_is_the_papers_formula():
    image = RNG.uniform(0.1, 0.8, (2, 8, 8, 3)).astype(np.float32)
    ours = preprocess.shades_of_gray(jnp.asarray(image), 6.0)
    for got, x in zip(ours, image.astype(np.float64), strict=True):
        light = (x**6).mean((0, 1)) ** (1 / 6)
        light /= np.linalg.norm(light)
        expected = np.clip(x / (light * np.sqrt(3)) * 1.0, 0, 1)
        scale = expected.sum() / np.asarray(got).sum()
        np.testing.assert_allclose(got * scale, expected, rtol=2e-2)
    gray = np.repeat(RNG.uniform(0, 1, (1, 8, 8, 1)).astype(np.float32), 3, -1)
    np.testing.assert_allclose(preprocess.shades_of_gray(jnp.asarray(gray), 6.0), gray, atol=1e-5)
    np.testing.assert_array_equal(preprocess.shades_of_gray(image, 0), image)


def test_shades_of_gray_of_any_norm_is_finite():
    """The larger the norm, the nearer it comes to the brightest pixel of each channel."""
    image = jnp.asarray(RNG.uniform(0, 0.05, (2, 8, 8, 3)), jnp.float32).at[1].set(0.0)
    largest = image[:1].max((1, 2), keepdims=True)
    white = image[:1] * jnp.sqrt((largest**2).mean()) / largest
    np.testing.assert_allclose(preprocess.shades_of_gray(image, 1e4)[:1], white, rtol=1e-2)
    assert not preprocess.shades_of_gray(image, 1e4)[1].round(5).any()


def test_dihedral_is_the_group_of_the_square():
    square = IMAGES[:1, :36, :36]
    views = [
        np.asarray(preprocess.dihedral(jnp.asarray(square), jnp.int32(k)))[0] for k in range(8)
    ]
    turns = [np.rot90(x, n) for x in (square[0], square[0][:, ::-1]) for n in range(4)]
    assert {view.tobytes() for view in views} == {turn.tobytes() for turn in turns}
    np.testing.assert_array_equal(views[0], square[0])
    np.testing.assert_array_equal(views[1], square[0][:, ::-1])
    np.testing.assert_array_equal(views[3], square[0][::-1, ::-1])
    each = preprocess.dihedral(jnp.asarray(np.repeat(square, 8, 0)), jnp.arange(8))
    np.testing.assert_array_equal(each, views)


def test_resample_dihedral_is_one_after_the_other():
    images, k = jnp.asarray(np.repeat(IMAGES[:1], 8, 0)), jnp.arange(8)
    boxes = jnp.tile(jnp.array([[3.3, 10.25, 20.5, 30.7]]), (8, 1))
    together = preprocess.resample_dihedral(images, boxes, k, 24)
    apart = preprocess.dihedral(preprocess.resample(images, boxes, 24), k)
    np.testing.assert_allclose(together, apart, atol=1e-4)


def test_eval_view_is_a_central_crop_scaled():
    view = jax.jit(preprocess.eval_view, static_argnums=(1, 2, 3))(
        jnp.asarray(IMAGES), 36, 1.0, 0.0
    )
    np.testing.assert_allclose(view * 255, IMAGES[:, :, 6:42], atol=1e-3)
