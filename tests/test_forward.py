"""What `model.Forward` says of a canvas is what NumPy says of its squares, flipped and turned."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ham_jax import config, model, parallel
from ham_jax.data import preprocess

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (8, 36, 48, 3), np.uint8)
WEIGHTS = RNG.normal(size=(24, 24, 3, 5)).astype(np.float32) / 10
VARIABLES = {"params": WEIGHTS, "batch_stats": {}}


def features(params, stats, view):
    return view.reshape(len(view), -1)


def classify(params, stats, features, metadata):
    params = params.reshape(-1, params.shape[-1])
    product = jnp.matmul(features, params, precision=jax.lax.Precision.HIGHEST)
    return product + (0 if metadata is None else metadata[:, :5])


def forward(tiles, tta, metadata=False):
    c = config.base()
    c.data.canvas = (36, 48)
    c.augment.crop_px = 24
    c.eval.tiles, c.eval.tta, c.eval.crop_scale = tiles, tta, 24 / 36
    c.model.metadata = metadata
    network = types.SimpleNamespace(features=features, classify=classify)
    return model.Forward(lambda: network, c, parallel.mesh())


def probabilities_of_slices(tops, lefts, num_views, metadata=0.0):
    """Squares of the canvas's own scale are slices of it."""
    said = []
    for top in tops:
        for left in lefts:
            crop = IMAGES[:, top : top + 24, left : left + 24] / 255
            flips = [crop, crop[:, :, ::-1], crop[:, ::-1], crop[:, ::-1, ::-1]]
            for view in [*flips, *(flip.transpose(0, 2, 1, 3) for flip in flips)][:num_views]:
                logits = np.tensordot(view, WEIGHTS.astype(float), 3) + metadata
                powers = np.exp(logits - logits.max(-1, keepdims=True))
                said.append(powers / powers.sum(-1, keepdims=True))
    return np.mean(said, axis=0)


@pytest.mark.parametrize(
    ("tiles", "tta", "tops", "lefts"),
    [
        (1, 1, [6], [12]),
        (1, 8, [6], [12]),
        (4, 1, [0, 12], [0, 24]),
        (6, 8, [0, 12], [0, 12, 24]),
        (8, 2, [0, 12], [0, 8, 16, 24]),
        (9, 4, [0, 6, 12], [0, 12, 24]),
    ],
)
def test_probabilities_are_the_mean_over_squares_and_views(tiles, tta, tops, lefts):
    images, metadata = parallel.shard(
        parallel.mesh(), (IMAGES, np.float32(RNG.normal(size=(8, 5))))
    )
    said = forward(tiles, tta).probabilities(VARIABLES, images, metadata)
    expected = probabilities_of_slices(tops, lefts, tta, np.asarray(metadata))
    np.testing.assert_allclose(said, expected, atol=2e-6)


def test_features_are_those_of_the_central_square():
    expected = IMAGES[:, 6:30, 12:36].reshape(8, -1) / 255
    np.testing.assert_allclose(forward(6, 8).features(VARIABLES, IMAGES), expected, atol=1e-6)
    takes_metadata = forward(1, 2, metadata=True)
    np.testing.assert_allclose(takes_metadata.features(VARIABLES, IMAGES), expected, atol=1e-6)
    for tiles in (1, 4):
        ways = forward(tiles, 2)
        probabilities, same = ways.both(VARIABLES, IMAGES)
        np.testing.assert_array_equal(probabilities, ways.probabilities(VARIABLES, IMAGES))
        np.testing.assert_allclose(same, expected, atol=1e-6)


def test_eight_views_are_one_crop_and_one_program(monkeypatch):
    traced = []
    resample = preprocess.resample
    monkeypatch.setattr(
        preprocess, "resample", lambda *given: traced.append("crop") or resample(*given)
    )
    ways = forward(4, 8)
    for _ in range(2):
        ways.probabilities(VARIABLES, parallel.shard(parallel.mesh(), IMAGES))
    assert traced == ["crop"]
    assert ways._said._cache_size() == 1
