import jax
import numpy as np
import pytest
from flax import nnx

from ham_jax import config, models
from ham_jax.models import resnet


class MeanColor(nnx.Module):
    """A backbone of no weights."""

    num_features = 3

    def __init__(self, *_):
        pass

    def __call__(self, image, rngs=None):
        return image.mean((1, 2))


@pytest.fixture
def build(monkeypatch):
    """Returns models.build with the keywords' keys of the section `model`, fast to compile."""
    monkeypatch.setattr(resnet, "ResNet", MeanColor)

    def make(num_metadata=0, **keys):
        section = config.base().model
        section.update(keys)
        return models.build(section, 7, num_metadata)

    return make


def test_head_sees_normalised_features(build):
    net = build(dropout=0.5)
    params, stats = net.init(0)
    image = np.random.default_rng(0).random((4, 8, 8, 3), np.float32)
    logits, kept = net.apply(params, stats, image, False)
    features = (image.mean((1, 2)) - np.array(resnet.FAMILY.mean)) / np.array(resnet.FAMILY.std)
    np.testing.assert_allclose(
        logits, features @ params["head"]["kernel"] + params["head"]["bias"], atol=1e-5
    )
    # The statistics, not a constant, say what the weights expect.
    moved = {"normalize": {"mean": stats["normalize"]["mean"] + 1, "std": kept["normalize"]["std"]}}
    shifted, _ = net.apply(params, moved, image + 1, False)
    np.testing.assert_allclose(shifted, logits, atol=1e-5)


def test_dropout_keeps_the_mean(build):
    net = build(dropout=0.5)
    params, stats = net.init(0)
    image = np.ones((20_000, 1, 1, 3), np.float32)
    expected, _ = net.apply(params, stats, image[:1], False)
    logits, _ = net.apply(params, stats, image, True, jax.random.key(0))
    spread = np.asarray(logits).std(0)
    assert (spread > 0).all()
    assert (np.abs(np.asarray(logits).mean(0) - expected[0]) < 5 * spread / 20_000**0.5).all()


def test_metadata_join_before_the_head(build):
    net = build(num_metadata=5)
    params, stats = net.init(0)
    assert set(params) == {"fusion", "head"}
    assert params["head"]["kernel"].shape == (3 + 64, 7)
    image, metadata = np.ones((2, 8, 8, 3), np.float32), np.eye(5, dtype=np.float32)[:2]
    logits, _ = net.apply(params, stats, image, False, metadata=metadata)
    assert np.abs(logits[0] - logits[1]).max() > 1e-3
    with pytest.raises(ValueError, match="5 metadata"):
        net.apply(params, stats, image, False)
    with pytest.raises(ValueError, match="0 metadata"):
        build().apply(params, stats, image, False, metadata=metadata)
