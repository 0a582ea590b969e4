"""Optimisers move what they shall, by how much they shall, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from ham_jax import config
from ham_jax.config import InputError
from ham_jax.training import optim

NAMES = tuple(optim.OPTIMIZERS)


def section(**keys):
    c = config.base().optim
    c.update({"weight_decay": 0.0} | keys)
    return c


@pytest.fixture
def params():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "stem": {
            "conv": {"kernel": draw(3, 3, 3, 8)},
            "depthwise": {"kernel": draw(3, 3, 1, 8)},
            "norm": {"scale": draw(8), "bias": draw(8)},
        },
        "head": {"kernel": draw(8, 7), "bias": draw(7)},
    }


def quadratic(params):
    return sum((leaf**2).sum() for leaf in jax.tree.leaves(params)) / 2


def run(c, params, num_steps=1, loss=quadratic, rate=0.1):
    optimizer = optim.make(c, lambda _: rate, jax.eval_shape(lambda: params))
    state = jax.jit(optimizer.init)(params)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(num_steps):
        params, state = step(params, state)
    return params, state


def by_path(params):
    return dict(zip(optim.paths(params), map(np.asarray, jax.tree.leaves(params)), strict=True))


def assert_same_bits(a, b):
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_each_optimiser_goes_downhill_and_decays_kernels_only(name, params):
    c = section(name=name, momentum=0.5)
    end, _ = run(c, params, 20, rate=0.05)
    before, after = by_path(params), by_path(end)
    assert all((after[p] ** 2).sum() < 0.9 * (before[p] ** 2).sum() for p in before)

    c = section(name=name, weight_decay=0.1)
    end, _ = run(c, params, 3, lambda p: 0.0 * quadratic(p))
    for path, leaf in by_path(end).items():
        if path.endswith("/kernel"):
            assert (leaf**2).sum() < (before[path] ** 2).sum()
        else:
            assert_same_bits(leaf, before[path])


def test_sgd_is_nesterov_with_l2():
    w, velocity, rate, momentum, decay = np.array([1.0, -2.0]), 0.0, 0.1, 0.9, 0.01
    c = section(momentum=momentum, weight_decay=decay)
    start = {"kernel": jnp.asarray(w, jnp.float32)}
    end, _ = run(c, start, 3, lambda p: (p["kernel"] ** 4).sum(), rate)
    for _ in range(3):
        gradient = 4 * w**3 + decay * w
        velocity = momentum * velocity + gradient
        w = w - rate * (gradient + momentum * velocity)
    np.testing.assert_allclose(end["kernel"], w, rtol=1e-5)


def test_decoupled_decay_shrinks_by_rate_times_decay(params):
    c = section(name="adamw", weight_decay=0.5)
    end, _ = run(c, params, 1, lambda p: 0.0 * quadratic(p))
    np.testing.assert_allclose(end["head"]["kernel"], params["head"]["kernel"] * 0.95, rtol=1e-6)


def test_muon_turns_a_convolution_as_one_matrix(params):
    """The update of a kernel [3, 3, 3, 8] is nearly orthogonal as [27, 8], and AdamW's size."""
    end, _ = run(section(name="muon"), params)
    step = np.asarray(end["stem"]["conv"]["kernel"] - params["stem"]["conv"]["kernel"])
    singular = np.linalg.svd(step.reshape(27, 8), compute_uv=False)
    raw = np.linalg.svd(params["stem"]["conv"]["kernel"].reshape(27, 8), compute_uv=False)
    assert singular.max() / singular.min() < 2 < raw.max() / raw.min()
    # n singular values near 1 of an [m, n] matrix have a root mean square of 1 / sqrt(m).
    assert np.sqrt((step**2).mean()) == pytest.approx(0.1 * 0.2, rel=0.3)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_keep_their_bits_and_the_state_survives_orbax(name, params, tmp_path):
    c = section(name=name, weight_decay=0.1, freeze=("^stem/conv", "bias$"), clip_norm=1.0)
    end, state = run(c, params, 3)
    before, after = by_path(params), by_path(end)
    frozen = {"stem/conv/kernel", "stem/norm/bias", "head/bias"}
    for path in before:
        if path in frozen:
            assert_same_bits(after[path], before[path])
        else:
            assert (after[path] != before[path]).all()
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert (3, 3, 3, 8) not in shapes
    assert (7,) not in shapes

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"opt_state": state})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "state", {"opt_state": jax.tree.map(jnp.zeros_like, state)}
        )
    jax.tree.map(np.testing.assert_array_equal, restored["opt_state"], state)


def test_frozen_parameters_get_no_gradient_and_the_others_their_own(params):
    c = section(freeze=("^stem", "bias$"))

    def product(p):
        return p["stem"]["conv"]["kernel"].sum() * p["head"]["kernel"].sum()

    plain = jax.grad(product)(params)
    detached = jax.grad(lambda p: product(optim.detach_frozen(c, p)))(params)
    assert_same_bits(detached["head"]["kernel"], plain["head"]["kernel"])
    assert (plain["stem"]["conv"]["kernel"] != 0).all()
    assert (detached["stem"]["conv"]["kernel"] == 0).all()


def test_the_first_matching_lr_scale_counts(params):
    plain, _ = run(section(), params)
    c = section(lr_scale=(("^stem/norm", 0.5), ("^stem", 0.25)), freeze=("depthwise",))
    scaled, _ = run(c, params)
    for path, factor in (("stem/norm/scale", 0.5), ("stem/conv/kernel", 0.25), ("head/bias", 1.0)):
        start = by_path(params)[path]
        np.testing.assert_allclose(
            by_path(scaled)[path] - start,
            factor * (by_path(plain)[path] - start),
            rtol=1e-5,
            atol=1e-6,
        )


def test_clipping_bounds_the_step(params):
    end, _ = run(section(momentum=0.0, clip_norm=0.5), params, rate=1.0)
    step = jax.tree.map(jnp.subtract, params, end)
    assert float(optax.tree.norm(step)) == pytest.approx(0.5, rel=1e-4)


def test_patterns_that_match_nothing_are_named_with_the_nearest_path(params):
    c = section(freeze=("^steem/conv", "head"), lr_scale=(("hed/kernel", 0.1),))
    with pytest.raises(InputError) as refused:
        optim.make(c, lambda _: 0.1, params)
    first, second = refused.value.faults
    assert "optim.freeze" in first
    assert "'^steem/conv'" in first
    assert "'stem/conv'" in first
    assert "'head/kernel'" in second
    with pytest.raises(InputError, match="leaves no parameter"):
        optim.make(section(freeze=("",)), lambda _: 0.1, params)


def test_schedule_at_its_key_points():
    rate = optim.schedule(section(learning_rate=2.0), 10, 110)
    values = {0: 0.0, 5: 1.0, 10: 2.0, 35: 1 + np.sqrt(0.5), 60: 1.0, 110: 0.0}
    for step, value in values.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-6)
    assert float(optim.schedule(section(learning_rate=2.0), 0, 8)(0)) == 2.0
    with pytest.raises(InputError, match=r"optim\.warmup is 8 steps"):
        optim.schedule(section(), 8, 8)


def test_ema_follows_early_and_smooths_later():
    assert float(optim.ema_decay_at(0, 0.99)) == pytest.approx(0.1)
    assert float(optim.ema_decay_at(10_000, 0.99)) == pytest.approx(0.99)
    ema = {"params": {"kernel": jnp.full(2, 10.0)}, "batch_stats": {"mean": jnp.full(1, 0.0)}}
    new = {"params": {"kernel": jnp.full(2, 20.0)}, "batch_stats": {"mean": jnp.full(1, 1.0)}}
    ema = optim.update_ema(ema, new, jnp.int32(0), 0.99)
    np.testing.assert_allclose(ema["params"]["kernel"], 19.0)
    np.testing.assert_allclose(ema["batch_stats"]["mean"], 0.9)


def test_a_new_optimiser_is_a_function_and_an_entry(monkeypatch, params):
    monkeypatch.setitem(optim.OPTIMIZERS, "sign", lambda section: [optax.scale_by_sign()])
    c = config.base()
    c.optim.name = "sign"
    assert optim.faults(c) == []
    end, _ = run(c.optim, params, 1, lambda p: p["head"]["kernel"].sum())
    moved = end["head"]["kernel"] - params["head"]["kernel"]
    np.testing.assert_allclose(moved, -0.1, rtol=1e-5)
    c.optim.name = "adam"
    assert optim.faults(c)[0].endswith("Did you mean 'adamw'?")
