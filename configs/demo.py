"""The embedded default: synthetic lesions and a small network, minutes on a laptop."""

from ham_jax import config


def get_config():
    """Returns the configuration of the demonstration."""
    c = config.base()
    c.data.dir = "data/demo"
    c.data.synthetic_images = 800
    c.data.canvas = (96, 128)
    c.augment.crop_px = 64
    c.augment.crop_scale = (0.7, 1.0)
    c.augment.color = 0.1
    c.loss.imbalance = "sqrt"
    c.optim.learning_rate = 0.05
    c.optim.clip_norm = 5.0
    c.train.batch_size = 32
    c.train.duration = {"epochs": 10.0}
    c.eval.every = {"epochs": 2.0}
    c.checkpoint.every = {"epochs": 2.0}
    c.log.every_steps = 10
    return c
