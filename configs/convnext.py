"""A ConvNeXt on HAM10000. `configs/convnext.py:tiny` picks: atto, femto, pico, nano, tiny."""

from ham_jax import config
from ham_jax.config import InputError


def get_config(scale: str = "atto"):
    """Returns the configuration of ConvNeXt-`scale`."""
    if scale not in ("atto", "femto", "pico", "nano", "tiny"):
        raise InputError(
            f"configs/convnext.py:{scale}: the scale must be atto, femto, pico, nano or tiny."
        )
    c = config.base()
    c.model.name = f"convnext_{scale}"
    c.model.drop_path = 0.1
    c.loss.imbalance = "sqrt"
    c.loss.label_smoothing = 0.05
    c.optim.name = "adamw"
    c.optim.learning_rate = 1e-3
    c.optim.weight_decay = 0.05
    c.optim.warmup = {"epochs": 3.0}
    c.optim.ema_decay = 0.998
    return c
