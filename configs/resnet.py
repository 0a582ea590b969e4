"""A ResNet from scratch on HAM10000. `configs/resnet.py:50` picks the depth: 18, 34, 50, 101."""

from ham_jax import config
from ham_jax.config import InputError


def get_config(depth: str = "18"):
    """Returns the configuration of ResNet-`depth`."""
    if depth not in ("18", "34", "50", "101"):
        raise InputError(f"configs/resnet.py:{depth}: the depth must be 18, 34, 50 or 101.")
    c = config.base()
    c.model.name = f"resnet{depth}"
    c.loss.imbalance = "sqrt"
    c.loss.label_smoothing = 0.05
    c.optim.ema_decay = 0.998
    if depth in ("50", "101"):  # sized for a GPU or TPU
        c.augment.crop_px = 224
        c.data.canvas = (300, 400)
        c.train.batch_size = 256
        c.train.duration = {"epochs": 90.0}
        c.optim.learning_rate = 0.2
        c.optim.warmup = {"epochs": 5.0}
    return c
