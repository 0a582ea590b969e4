"""The same photograph is always spoilt in the same way, and more of it at each severity."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ham_jax import parallel
from ham_jax.classes import HAM10000
from ham_jax.data import synthetic
from ham_jax.evaluation import corruptions, robustness

LESIONS = np.stack([synthetic.draw(dx, [0, n], [1, n]) for n, dx in enumerate(HAM10000)])
SMALL = np.concatenate([LESIONS, LESIONS[:1, ::-1]])[:, ::2, ::2]  # 8 of 60 x 80
NUMBERS = corruptions.image_numbers(f"ISIC_{n:07}" for n in range(len(SMALL)))


compiled = jax.jit(corruptions.corrupt)


def corrupted(name, severity, image=None, seed=0):
    image = SMALL.astype(np.float32) / 255 if image is None else image
    return np.asarray(compiled(image, NUMBERS, corruptions.NAMES.index(name), severity, seed))


@pytest.mark.parametrize("name", corruptions.NAMES)
def test_each_severity_is_farther_from_the_clean_image(name):
    clean = SMALL.astype(np.float32) / 255
    distances = [np.abs(corrupted(name, s) - clean).mean((1, 2, 3)) for s in range(1, 6)]
    assert (np.diff([np.zeros(8), *distances], axis=0) > 0).all(), "of each single image"


@pytest.mark.parametrize("name", corruptions.NAMES)
def test_values_stay_in_range_and_nothing_is_undefined(name):
    noise = np.random.default_rng(0).random((2, 60, 80, 3), np.float32)
    extremes = np.concatenate([np.zeros_like(noise), np.ones_like(noise), noise, noise.round()])
    for severity in (1, 5):
        result = corrupted(name, severity, extremes)
        assert result.dtype == np.float32
        assert np.isfinite(result).all()
        assert result.min() >= 0
        assert result.max() <= 1


def test_an_image_is_corrupted_alike_in_any_batch_on_any_devices():
    assert jax.device_count() == 8
    one = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    single, spread = (robustness.make_corruptor(mesh) for mesh in (one, parallel.mesh()))
    order = np.array([3, 1, 7, 0, 2, 6, 5, 4])
    for kind, name in enumerate(corruptions.NAMES):
        which = jnp.int32(kind), jnp.int32(4)
        expected = np.asarray(single(SMALL, NUMBERS, *which))
        turned = spread(*parallel.shard(parallel.mesh(), (SMALL[order], NUMBERS[order])), *which)
        # Eight devices may round another way; a draw that differs would move many pixels far.
        apart = np.abs(np.asarray(turned).astype(int) - expected[order])
        assert apart.max() <= 1, name
        assert (apart > 0).mean() < 1e-3, name
        np.testing.assert_array_equal(single(SMALL, NUMBERS, *which), expected)


@pytest.mark.parametrize("name", ["brightness", "dark_corner", "hair", "ruler", "gaussian_noise"])
def test_other_images_and_seeds_draw_anew(name):
    same = np.repeat(SMALL[:1].astype(np.float32) / 255, 8, axis=0)
    results = corrupted(name, 3, same)
    kinds = len(np.unique(results, axis=0))
    assert kinds == (2 if name == "brightness" else 8)  # brighter or darker
    assert not np.array_equal(corrupted(name, 3, same, seed=1), results)


@pytest.mark.parametrize("size", [(120, 160), (117, 151)])  # whole blocks of chroma, and cut ones
def test_jpeg_is_pillows(size):
    photograph = LESIONS[4][: size[0], : size[1]]
    ours = jax.jit(corruptions.jpeg)
    for quality in (*corruptions.SEVERITIES["jpeg"], 75, 90):
        file = io.BytesIO()
        Image.fromarray(photograph).save(file, "JPEG", quality=quality)
        expected = np.asarray(Image.open(file)).astype(float)
        found = 255 * np.asarray(ours(None, photograph / np.float32(255), np.float32(quality)))
        apart, lost = np.abs(found - expected), np.abs(photograph - expected)
        # What differs is libjpeg's arithmetic in whole numbers. Values count to 255.
        assert apart.mean() < 0.6, quality
        assert apart.mean() < lost.mean() / 5, quality
        assert abs((found - expected).mean((0, 1))).max() < 0.15, quality


def test_defocus_spreads_a_point_evenly_over_a_disc():
    point = np.zeros((100, 120, 3), np.float32)
    point[50, 60] = 1
    blur = jax.jit(corruptions.defocus_blur)
    blurred = np.asarray(blur(None, point, np.float32(0.04)))
    y, x = np.mgrid[:100, :120]
    distance = np.hypot(y - 50, x - 60)
    inside, outside = blurred[distance <= 3.5], blurred[distance > 4.5]
    np.testing.assert_allclose(inside, inside.mean(), rtol=1e-3)
    np.testing.assert_allclose(inside.mean(), 1 / (np.pi * 4**2), rtol=0.05)
    np.testing.assert_allclose(outside, 0, atol=1e-6)
    np.testing.assert_allclose(blurred.sum((0, 1)), 1, rtol=1e-4)
    flat = np.asarray(blur(None, np.full_like(point, 0.5), np.float32(0.04)))
    np.testing.assert_allclose(flat, 0.5, atol=1e-5)  # at the edges, too


def test_a_stop_is_twice_or_half_the_light():
    grey = np.full((1, 1, 3), 0.5, np.float32)  # 0.2140 of white's light
    found = {
        round(float(corruptions.brightness(jax.random.key(n), grey, 1.0)[0, 0, 0]), 3)
        for n in range(8)
    }
    assert found == {0.361, 0.686}  # sRGB of 0.1070 and of 0.4281


def test_lengths_are_shares_of_the_shorter_side():
    """A larger canvas shows the same hairs, ruler and dark corners in more pixels."""
    for function, amount in ((corruptions.hair, 12), (corruptions.ruler, 0.1)):
        covered = [
            1 - jax.jit(function)(jax.random.key(1), jnp.ones((*size, 3)), jnp.float32(amount))
            for size in ((96, 128), (192, 256))
        ]
        halved = np.asarray(covered[1]).reshape(96, 2, 128, 2, 3).mean((1, 3))
        assert covered[0].mean() > 0.01
        assert np.abs(halved - covered[0]).mean() < 0.25 * covered[0].mean()
