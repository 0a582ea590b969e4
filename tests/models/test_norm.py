"""BatchNorm over a batch, or over the parts of it that lie on each device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ham_jax import config, models, parallel
from ham_jax.models import norm


def apply(x, number):
    """Returns (normalised, running mean, running variance) by parts, and the gradient of scale."""
    layer = nnx.view(norm.Norm(3, rngs=nnx.Rngs(0)), use_running_average=False)
    graph, params, stats = nnx.split(layer, nnx.Param, nnx.BatchStat)

    def run(params, x):
        net = nnx.merge(graph, params, stats, copy=True)
        with norm.in_groups(number):
            y = net(x)
        return (y**3).sum(), (y, net.mean[...], net.var[...])

    (gradient, dx), seen = jax.grad(run, (0, 1), has_aux=True)(params, x)
    return *seen, nnx.to_pure_dict(gradient)["scale"], dx


def test_parts_are_batches_of_their_own_and_share_weights_and_averages():
    x = jnp.asarray(np.random.default_rng(0).normal(1, 2, (8, 4, 4, 3)), jnp.float32)
    y, mean, var, of_scale, dx = apply(x, 4)
    parts = [apply(part, 1) for part in jnp.split(x, 4)]
    np.testing.assert_allclose(y, jnp.concatenate([part[0] for part in parts]), rtol=1e-6)
    np.testing.assert_allclose(dx, jnp.concatenate([part[4] for part in parts]), atol=1e-4)
    np.testing.assert_allclose(of_scale, sum(part[3] for part in parts), rtol=1e-5)
    for got, number in ((mean, 1), (var, 2)):
        np.testing.assert_allclose(got, sum(part[number] for part in parts) / 4, rtol=1e-6)
    assert not np.allclose(y, apply(x, 1)[0], atol=0.01)


@pytest.mark.parametrize(("groups", "num_sums"), [(1, 5), (8, 0)])
def test_statistics_of_a_device_need_no_other(groups, num_sums, two_blocks):
    """Else each layer sums over all eight of them, a shortcut with the layer beside it."""
    section = config.base().model
    section.stem = "small"
    network, mesh = models.build(section, 7), parallel.mesh()
    params, stats = jax.eval_shape(lambda: network.init(0))
    image = jax.ShapeDtypeStruct((16, 8, 8, 3), np.float32, sharding=parallel.batch_sharding(mesh))

    def logits(params, stats, image):
        with norm.in_groups(groups):
            return network.apply(params, stats, image, train=True)[0]

    rows = parallel.batch_sharding(mesh)
    text = jax.jit(logits, out_shardings=rows).lower(params, stats, image).compile().as_text()
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == num_sums
    assert "all-gather" not in text
