"""What a seed draws stays what it was, whatever else is drawn: the numbers are written down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ham_jax import config, models
from ham_jax.data import feed
from ham_jax.training import augment, losses, optim, step
from ham_jax.training.streams import Stream

FIRST_DRAWS = {  # of seed 7 in step 5
    Stream.CROP: (0, 268645893),
    Stream.DIHEDRAL: (1, 534519048),
    Stream.COLOR: (2, 618413607),
    Stream.CUTOUT: (3, 2977188385),
    Stream.MIX_CHOICE: (4, 3014239949),
    Stream.MIXUP: (5, 364524022),
    Stream.CUTMIX: (6, 334470574),
    Stream.WARP: (7, 2535859750),
    Stream.MODEL: (8, 3426777266),
    Stream.METADATA: (9, 2912629793),
}


@pytest.mark.parametrize("stream", Stream)
def test_each_stream_draws_what_it_drew(stream):
    number, bits = FIRST_DRAWS[stream]
    assert stream == number
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 5), stream)
    assert jax.random.bits(key).item() == bits


def test_each_transform_has_the_streams_that_it_had():
    assert [transform.streams for transform in augment.TRANSFORMS] == [
        (0, 1, 7),
        (),
        (2,),
        (3,),
        (4, 5, 6),
    ]


def test_dropout_draws_from_the_stream_of_the_model():
    drawn = []

    def apply(params, batch_stats, image, train, key=None, metadata=None):
        jax.debug.callback(lambda bits: drawn.append(int(bits)), jax.random.bits(key))
        return params["kernel"] * jnp.ones((len(image), 7)), batch_stats

    network = models.Network(
        "one", lambda seed: ({"kernel": jnp.ones(())}, {}), apply, None, None, None
    )
    c = config.base()
    c.seed, c.augment.crop_px = 7, 16
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    optimizer = optim.make(c.optim, lambda _: 0.1, network.init(0)[0])
    loss = losses.make_loss(c.loss, np.ones(7), c.data.classes)
    take = step.make_train_step(network, optimizer, loss, c, mesh)
    state = step.init_state(network, optimizer, c, mesh) | {"step": jnp.int32(5)}
    batch = {"image": np.zeros((2, 16, 16, 3), np.uint8), "label": np.zeros(2, np.int32)}
    jax.block_until_ready(take(state, batch))
    jax.effects_barrier()
    assert drawn == [FIRST_DRAWS[Stream.MODEL][1]]


def test_orders_of_a_seed():
    rows, labels = np.arange(100, 112), np.array([0] * 8 + [1] * 3 + [2])
    shuffled = feed.shuffled(rows, 6, seed=7)
    assert shuffled(0).tolist() == [104, 106, 110, 100, 101, 103]
    assert shuffled(3).tolist() == [109, 100, 111, 108, 106, 105]
    balanced = feed.class_balanced(rows, labels, 6, seed=7)
    assert balanced(0).tolist() == [111, 111, 111, 101, 101, 104]
    assert balanced(3).tolist() == [108, 109, 104, 106, 108, 104]


def test_initial_weights_of_a_seed():
    params, _ = models.build(config.base().model, 7).init(7)
    stem = params["backbone"]["stem"]["conv"]["kernel"].ravel()
    np.testing.assert_allclose(stem[:3], [0.02813394, 0.00357673, -0.01319396], atol=1e-8)
    head = params["head"]["kernel"][0]
    np.testing.assert_allclose(head[:3], [0.02387605, 0.00842728, 0.05518275], atol=1e-8)
