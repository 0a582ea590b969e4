"""Every loss equals its paper's formula, written once more in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ham_jax import classes, config
from ham_jax.config import InputError
from ham_jax.training import losses

COUNTS = np.array([327, 514, 1099, 115, 1113, 6705, 142])


def make(imbalance, counts=COUNTS, **keys):
    section = config.base().loss
    section.update(imbalance=imbalance, **keys)
    return losses.make_loss(section, counts, classes.HAM10000.names)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return rng.normal(0, 3, (16, 7)).astype(np.float32), rng.dirichlet(np.ones(7), 16)


def probabilities(logits):
    e = np.exp(np.float64(logits) - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def scaled(weights):
    """Weights whose mean over an epoch's images, written out one by one, is 1."""
    return weights / np.repeat(weights, COUNTS).mean()


PRIOR = COUNTS / 10015
ORACLES = {
    "none": lambda z: -np.log(probabilities(z)),
    "balanced_sampling": lambda z: -np.log(probabilities(z)),
    "weighted": lambda z: -np.log(probabilities(z)) * scaled(1 / COUNTS),
    "sqrt": lambda z: -np.log(probabilities(z)) * scaled(COUNTS**-0.5),
    "focal": lambda z: -((1 - probabilities(z)) ** 1.5) * np.log(probabilities(z)),
    "logit_adjusted": lambda z: -np.log(probabilities(z + 0.7 * np.log(PRIOR))),
}


def shares(values):
    return values / values.sum()


# The class frequencies that a loss takes for even ones, and its smoothing's; else 1/7 each.
SPREADS = {
    "weighted": shares(COUNTS),
    "sqrt": shares(COUNTS**0.5),
    "logit_adjusted": shares(PRIOR**0.7),
}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("imbalance", losses.LOSSES)
def test_formula(imbalance, smoothing, batch):
    logits, target = batch
    loss = make(imbalance, label_smoothing=smoothing, focal_gamma=1.5, logit_tau=0.7)
    loss = jax.jit(loss)(logits, np.float32(target))
    spread = SPREADS.get(imbalance, np.full(7, 1 / 7))
    smooth = target * (1 - smoothing) + smoothing * spread
    expected = (smooth * ORACLES[imbalance](logits)).sum(1)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=2e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("imbalance", losses.LOSSES)
def test_smoothing_favours_no_class_where_the_image_says_nothing(imbalance, smoothing):
    """Equal logits stay equal on classes as frequent as the loss makes even."""
    frequencies = SPREADS.get(imbalance, np.full(7, 1 / 7))
    loss = make(imbalance, label_smoothing=smoothing, logit_tau=0.7)
    gradient = jax.grad(
        lambda z: (frequencies * loss(jnp.broadcast_to(z, (7, 7)), jnp.eye(7))).sum()
    )(jnp.zeros(7))
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_has_a_gradient_where_the_network_is_sure(gamma):
    logits = jnp.array([[200.0, 0, 0, 0, 0, 0, 0], [-200.0, 0, 0, 0, 0, 0, 0]])
    target = jax.nn.one_hot(jnp.array([0, 0]), 7)
    gradient = jax.jit(jax.grad(lambda z: make("focal", focal_gamma=gamma)(z, target).sum()))(
        logits
    )
    assert np.isfinite(gradient).all()
    assert gradient[1, 0] < -0.9  # the wrong answer still pulls with its full force


def test_bfloat16_logits_are_not_summed_in_bfloat16(batch):
    logits = jnp.asarray(batch[0], jnp.bfloat16)
    target = jnp.asarray(batch[1], jnp.float32)
    loss = make("none")(logits, target)
    assert loss.dtype == jnp.float32
    np.testing.assert_array_equal(loss, make("none")(logits.astype(jnp.float32), target))


@pytest.mark.parametrize("imbalance", ["weighted", "sqrt", "logit_adjusted"])
def test_a_class_without_images_is_refused_by_name(imbalance):
    counts = COUNTS * (np.arange(7) != 3)
    with pytest.raises(InputError, match=r"no image of df\b"):
        make(imbalance, counts)
    assert np.isfinite(make("focal", counts)(jnp.zeros((1, 7)), jnp.ones((1, 7)) / 7))


def test_a_new_loss_is_a_function_and_an_entry(monkeypatch, batch):
    def squared(section, counts):
        return lambda logits: jax.nn.log_softmax(logits) ** 2, np.ones(len(counts))

    monkeypatch.setitem(losses.LOSSES, "squared", losses.Kind(squared))
    c = config.base()
    c.loss.imbalance = "squared"
    assert losses.faults(c) == []
    logits, target = batch
    expected = (target * np.log(probabilities(logits)) ** 2).sum(1)
    np.testing.assert_allclose(make("squared")(logits, np.float32(target)), expected, rtol=1e-5)
    c.loss.imbalance = "sqared"
    assert losses.faults(c)[0].endswith("Did you mean 'squared'?")
