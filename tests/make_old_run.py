"""Made tests/old_run with the code of version 0.1 (commit 86e8317).

From an empty folder: PYTHONPATH=<that version> python make_old_run.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ham_jax import config, models
from ham_jax.data import synthetic
from ham_jax.training import loop


class NeverStop:
    exit_code = 75

    def reached(self):
        return False


def linear(model_config, num_classes, num_metadata):
    """A network that costs nothing."""

    def features(params, batch_stats, image):
        color = image.mean((1, 2))
        return color[:, :2] - color[:, 1:]

    def apply(params, batch_stats, image, *_, **__):
        return features(params, batch_stats, image) @ params["head"]["kernel"], batch_stats

    def classify(params, batch_stats, features, metadata=None):
        return features @ params["head"]["kernel"]

    kernel = np.random.default_rng(0).normal(0, 10, (2, num_classes))
    params = {"head": {"kernel": jnp.asarray(kernel, jnp.float32)}}
    return models.Network("linear", lambda seed: (params, {}), apply, features, None, classify)


def main():
    synthetic.write(Path("photographs"), 120, 0)
    c = config.base()
    c.data.dir, c.data.prepared_dir = "photographs", "prepared"
    c.data.canvas = (24, 32)
    c.data.allow_partial = True
    c.data.num_folds = 3
    c.data.feed = "resident"
    c.augment.crop_px = 16
    c.optim.learning_rate = 0.1
    c.optim.warmup = {"steps": 0}
    c.optim.ema_decay = 0.5
    c.train.batch_size = 8
    c.train.duration = {"steps": 4}
    c.eval.batch_size = 64
    c.eval.tta = 2
    c.log.tensorboard = False
    models.build = linear
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    loop.train(c, Path("old_run"), mesh, NeverStop())


if __name__ == "__main__":
    main()
