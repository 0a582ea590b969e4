"""A step is a pure function of its state, its batch and the seed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ham_jax import config, models
from ham_jax.data import metadata
from ham_jax.models import resnet
from ham_jax.training import losses, optim, step


def taker(network, freeze=(), **train):
    """Returns (state of step 0, compiled step), without augmentation but with an average."""
    c = config.base()
    c.augment.update(crop_px=16, strength=0.0, dihedral=False)
    c.train.update(train)
    c.model.metadata_dropout = 0.0
    c.optim.ema_decay = 0.9
    c.optim.freeze = freeze
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    optimizer = optim.make(c.optim, lambda _: 0.1, jax.eval_shape(lambda: network.init(0)[0]))
    loss = losses.make_loss(c.loss, np.ones(7), c.data.classes)
    take = step.make_train_step(network, optimizer, loss, c, mesh)
    return step.init_state(network, optimizer, c, mesh), take


def batch(**entries):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    return {"image": image, "label": np.arange(8, dtype=np.int32) % 7, **entries}


def network_of(logits):
    """Returns a network of one weight: logits(weight, image, key, metadata) -> [B, 7]."""

    def apply(params, batch_stats, image, train, key=None, metadata=None):
        return logits(params["kernel"], image, key, metadata), batch_stats

    return models.Network(
        "small", lambda seed: ({"kernel": jnp.ones(())}, {}), apply, None, None, None
    )


def test_what_is_frozen_is_no_part_of_the_gradient():
    def apply(params, batch_stats, image, train, key=None, metadata=None):
        return jnp.arange(7.0) * params["frozen"] * params["trained"] + 0 * image[:, :7, 0, 0], {}

    weights = {"frozen": jnp.full((), 2.0), "trained": jnp.ones(())}
    network = models.Network("two", lambda seed: (weights, {}), apply, None, None, None)
    norms = []
    for freeze in ((), ("frozen",)):
        start, take = taker(network, freeze)
        norms.append(float(take(start, batch())[1]["grad_norm"]))
    # The product's gradients are g / 2 and g, so together 5 ** 0.5 / 2 of the second alone.
    np.testing.assert_allclose(norms[0] / norms[1], 5**0.5 / 2, rtol=1e-5)


def test_normalisation_survives_steps_and_average_to_the_last_bit(monkeypatch):
    monkeypatch.setitem(resnet.DEPTHS, "resnet18", (1, 1, 0, 0))  # fast to compile
    section = config.base().model
    section.update(stem="small", dropout=0.5, drop_path=0.5)
    start, take = taker(models.build(section, 7))
    state = start
    for _ in range(3):
        state, _ = take(state, batch())
    for kept in (state["batch_stats"], state["ema"]["batch_stats"]):
        for name in ("mean", "std"):
            np.testing.assert_array_equal(
                kept["normalize"][name], start["batch_stats"]["normalize"][name]
            )
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()), start["ema"]["params"], state["ema"]["params"]
    )
    assert moved["head"]["kernel"]
    assert moved["backbone"]["stem"]["conv"]["kernel"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_dropout_is_a_function_of_seed_and_step(accumulate):
    drawn = network_of(lambda w, x, key, _: w * jax.random.normal(key, (len(x), 7)))
    state, take = taker(drawn, accumulate=accumulate)
    loss = lambda state: float(take(state, batch())[1]["loss"])  # noqa: E731
    assert loss(state) == loss(state)
    assert loss({**state, "step": state["step"] + 1}) != loss(state)


def test_each_micro_batch_has_a_key_of_its_own():
    keys = []

    def logits(w, x, key, _):
        jax.debug.callback(lambda data: keys.append(tuple(data)), jax.random.key_data(key))
        return w * jnp.ones((len(x), 7))

    state, take = taker(network_of(logits), accumulate=4)
    jax.block_until_ready(take(state, batch()))
    jax.effects_barrier()
    assert len({tuple(map(int, key)) for key in keys}) == 4


@pytest.mark.parametrize("accumulate", [1, 2])
def test_metadata_stay_with_their_images(accumulate):
    told = network_of(lambda w, x, _, known: w * known[:, :7])
    state, take = taker(told, accumulate=accumulate)
    known = np.eye(metadata.NUM_METADATA, dtype=np.float32)[batch()["label"]]
    one = batch(metadata=known)
    assert take(state, one)[1]["accuracy"] == 1
    two = jax.tree.map(lambda x: np.stack([x, x]), one)
    np.testing.assert_array_equal(take(state, two)[1]["accuracy"], [1, 1])


def test_operations_are_counted_as_published():
    one_device = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    c = config.base()
    c.model.name, c.augment.crop_px = "resnet18", 224
    net = models.build(c.model, 7)
    optimizer = optim.make(c.optim, lambda _: 0.1, jax.eval_shape(lambda: net.init(0)[0]))
    loss = losses.make_loss(c.loss, np.ones(7), c.data.classes)
    take = step.make_train_step(net, optimizer, loss, c, one_device)
    state = jax.eval_shape(lambda: step.init_state(net, optimizer, c, one_device))
    batch = {
        "image": jax.ShapeDtypeStruct((2, 224, 224, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((2,), np.int32),
    }
    # 1.82e9 multiply-adds forward (He et al., 2016), twice that backward
    assert step.flop_per_image(take, state, batch) == pytest.approx(3 * 2 * 1.82e9, rel=0.1)
