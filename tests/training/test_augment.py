"""Each random view is what its draws say, and switches do not disturb each other."""

import colorsys
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ham_jax import config, parallel
from ham_jax.data import preprocess
from ham_jax.training import augment

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (16, 36, 48, 3), np.uint8)
LABELS = np.arange(16, dtype=np.int32) % 7


def settings(**changes):
    c = config.base().augment
    c.crop_px = 24
    c.update(changes)
    return c


@functools.cache
def compiled(changes):
    c = settings(**dict(changes))
    return jax.jit(lambda k, i, t, m=None: augment.augment(k, i, t, c, 7, m))


def run(key=0, **changes):
    function = compiled(tuple(changes.items()))
    return jax.tree.map(np.asarray, function(jax.random.key(key), IMAGES, LABELS)[:2])


@pytest.mark.parametrize(("scale", "ratio"), [((0.1, 0.9), (0.5, 2.0)), ((1.0, 1.0), (1.0, 1.0))])
def test_boxes_lie_inside_and_keep_their_ranges(scale, ratio):
    boxes = np.asarray(augment.draw_boxes(jax.random.key(1), 4000, 36, 48, scale, ratio))
    top, left, height, width = boxes.T
    assert (boxes >= 0).all()
    assert (top + height <= 36 + 1e-3).all()
    assert (left + width <= 48 + 1e-3).all()
    area = height * width / (36 * 48)
    assert area.max() <= scale[1] + 1e-4
    uncut = (height < 36) & (width < 48)
    assert (area[uncut] >= scale[0] - 1e-4).all()
    aspect = width / height
    assert (aspect[uncut] >= ratio[0] - 1e-4).all()
    assert (aspect[uncut] <= ratio[1] + 1e-4).all()
    if scale[0] < 1:
        assert abs(area.mean() - np.mean(scale)) < 0.05  # boxes that did not fit were cut
        assert np.ptp(top) > 20


def test_strength_stretches_the_crop_range():
    assert augment.stretched((0.4, 1.0), 0.0) == (1.0, 1.0)
    assert augment.stretched((0.4, 1.0), 1.0) == (0.4, 1.0)
    assert augment.stretched((0.4, 1.0), 2.0) == (0.05, 1.0)


def test_strength_zero_is_the_view_of_evaluation():
    view, target = run(strength=0.0, dihedral=False, rotation=45.0, color=0.5, cutout=0.5)
    expected = preprocess.eval_view(jnp.asarray(IMAGES), 24, 1.0, 0.0)
    np.testing.assert_allclose(view, expected, atol=1e-6)
    np.testing.assert_array_equal(target, np.eye(7)[LABELS])


def test_a_key_is_a_view_and_switches_do_not_disturb_each_other():
    plain, _ = run(color=0.0)
    np.testing.assert_array_equal(plain, run(color=0.0)[0])
    assert not np.array_equal(plain, run(1, color=0.0)[0])
    covered, _ = run(color=0.0, cutout=0.25)
    painted = (covered == 0.5).all(-1)
    np.testing.assert_array_equal(covered[~painted], plain[~painted])
    assert 0 < painted.mean() <= (6 / 24) ** 2


def test_color_changes_are_the_textbook_ones():
    image = RNG.uniform(0.3, 0.6, (1, 5, 5, 3)).astype(np.float32)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)

    def change(brightness=one, contrast=one, saturation=one, hue=zero):
        return np.asarray(augment.change_color(image, brightness, contrast, saturation, hue))

    np.testing.assert_allclose(change(), image, atol=1e-6)
    np.testing.assert_allclose(change(brightness=one * 1.3), image * 1.3, atol=1e-6)
    mean = image.mean()
    np.testing.assert_allclose(change(contrast=one * 0.7), mean + 0.7 * (image - mean), atol=1e-6)
    gray = image.mean(-1, keepdims=True)
    np.testing.assert_allclose(change(saturation=one * 0.5), (image + gray) / 2, atol=1e-6)
    third = change(hue=one * 2 * np.pi / 3)  # a third of a turn exchanges the channels
    np.testing.assert_allclose(third, image[..., [2, 0, 1]], atol=1e-6)
    turned, pixel = change(hue=one * 0.2)[0, 0, 0], image[0, 0, 0]
    hue = [colorsys.rgb_to_hsv(*p)[0] for p in (turned, pixel)]
    assert 0.01 < (hue[0] - hue[1]) % 1 < 0.06  # 0.2 radians are 0.032 turns


def test_drawn_angles_lie_within_their_range():
    angle = np.asarray(augment.draw_angles(jax.random.key(0), 500, 0.5))
    assert 0.45 < angle.max() <= 0.5
    assert -0.5 <= angle.min() < -0.45


def test_cutout_paints_a_square_of_grey():
    image = np.zeros((2, 10, 10, 3), np.float32)
    ours = augment.cutout(jnp.asarray(image), jnp.array([[0.5, 0.5], [0.0, 1.0]]), 4)
    expected = image.copy()
    expected[0, 3:7, 3:7] = 0.5
    expected[1, :2, 8:] = 0.5
    np.testing.assert_array_equal(ours, expected)


def test_mixup_and_cutmix_blend_images_and_targets_alike():
    image = RNG.uniform(size=(4, 10, 10, 3)).astype(np.float32)
    target = np.eye(7, dtype=np.float32)[[0, 1, 2, 3]]
    mixed, soft = augment.mixup(image, target, 0.3)
    np.testing.assert_allclose(mixed[0], 0.3 * image[0] + 0.7 * image[3], atol=1e-6)
    np.testing.assert_allclose(soft[0], [0.3, 0, 0, 0.7, 0, 0, 0], atol=1e-6)
    # A patch of side 0.6 of the image around the upper left corner: 3 x 3 pixels are inside.
    pasted, soft = augment.cutmix(image, target, jnp.float32(0.64), jnp.zeros(2))
    expected = image.copy()
    expected[:, :3, :3] = image[::-1, :3, :3]
    np.testing.assert_array_equal(pasted, expected)
    np.testing.assert_allclose(soft[1], [0, 0.91, 0.09, 0, 0, 0, 0], atol=1e-6)


@pytest.mark.parametrize("mixing", [{"mixup": 1.0}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 0.4}])
def test_targets_stay_probabilities(mixing):
    for key in range(3):
        view, target = run(key, **mixing)
        np.testing.assert_allclose(target.sum(-1), 1, atol=1e-6)
        assert view.min() >= 0
        assert view.max() <= 1


@pytest.mark.parametrize("mixing", [{"mixup": 1.0}, {"cutmix": 1.0}, {}])
def test_metadata_mixes_as_the_targets_do_and_changes_nothing_else(mixing):
    function = compiled(tuple(mixing.items()))
    key, one_hot = jax.random.key(3), np.eye(7, dtype=np.float32)[LABELS]
    view, target, metadata = function(key, IMAGES, LABELS, 2 * one_hot)
    np.testing.assert_allclose(metadata, 2 * target, rtol=1e-6)
    without = run(3, **mixing)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), (view, target), without)


@pytest.mark.parametrize("form", preprocess.RESAMPLERS)
def test_one_and_eight_devices_see_the_same_views(form):
    c = settings(mixup=0.4, rotation=45.0, cutout=0.2, shades_of_gray=6.0)
    mesh = parallel.mesh()
    assert mesh.devices.size == 8
    function = jax.jit(lambda k, i, t: augment.augment(k, i, t, c, 7))
    with preprocess.in_form(form):
        spread = function(jax.random.key(0), *parallel.shard(mesh, (IMAGES, LABELS)))
        single = function(jax.random.key(0), IMAGES, LABELS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), spread, single)


def test_each_key_of_the_section_belongs_to_a_transform():
    keys = [key for transform in augment.TRANSFORMS for key in transform.keys]
    of_all = {"strength", "progressive"}  # the one scales the others; the other is loop.Plan's
    assert sorted(keys) == sorted(set(config.base().augment) - of_all)
    streams = [stream for transform in augment.TRANSFORMS for stream in transform.streams]
    assert len(set(streams)) == len(streams)


def test_a_new_transform_is_an_entry_and_moves_no_others_draws(monkeypatch):
    def negative(section, image, target, key):
        hit = jax.random.bernoulli(key, section.negative, (len(image), 1, 1, 1))
        return jnp.where(hit, 1 - image, image), target

    entry = augment.Transform(negative, ("negative",), (10,))
    plain, target = run(cutout=0.2, rotation=20.0, color=0.0)
    monkeypatch.setattr(augment, "TRANSFORMS", (*augment.TRANSFORMS, entry))
    changed, same = run(cutout=0.2, rotation=20.0, color=0.0, negative=0.5)
    np.testing.assert_array_equal(same, target)
    is_negative = np.abs(changed - (1 - plain)).max((1, 2, 3)) < 1e-6
    np.testing.assert_array_equal(changed[~is_negative], plain[~is_negative])
    assert 0 < is_negative.sum() < len(plain)
    off, _ = run(cutout=0.2, rotation=20.0, color=0.0, negative=0.0)
    np.testing.assert_array_equal(off, plain)
