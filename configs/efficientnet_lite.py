"""EfficientNet-Lite from scratch on HAM10000. `configs/efficientnet_lite.py:2` picks: 0, 1, 2."""

from ham_jax import config
from ham_jax.config import InputError


def get_config(scale: str = "0"):
    """Returns the configuration of EfficientNet-Lite`scale`."""
    if scale not in ("0", "1", "2"):
        raise InputError(f"configs/efficientnet_lite.py:{scale}: the scale must be 0, 1 or 2.")
    c = config.base()
    c.model.name = f"efficientnet_lite{scale}"
    c.loss.imbalance = "sqrt"
    c.loss.label_smoothing = 0.05
    c.optim.weight_decay = 1e-4  # most of its kernels are depthwise and small
    c.optim.ema_decay = 0.998
    return c
