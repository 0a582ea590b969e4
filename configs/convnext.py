"""A ConvNeXt on HAM10000. `configs/convnext.py:tiny` picks: atto, femto, pico, nano, tiny.

It starts from random weights; with `configs/convnext.py:tiny-imagenet` from timm's of the Hugging
Face hub. Neither has been measured on HAM10000.
"""

from ham_jax import config
from ham_jax.config import InputError

_IMAGENET = {
    "atto": "d2_in1k",
    "femto": "d1_in1k",
    "pico": "d1_in1k",
    "nano": "in12k_ft_in1k",
    "tiny": "in12k_ft_in1k",
}


def get_config(variant: str = "atto"):
    """Returns the configuration of a scale, or of `<scale>-imagenet`."""
    scale, _, start = variant.partition("-")
    if scale not in _IMAGENET or start not in ("", "imagenet"):
        raise InputError(
            f"configs/convnext.py:{variant}: the scale must be atto, femto, pico, nano or tiny, and"
            " -imagenet may follow."
        )
    c = config.base()
    c.model.name = f"convnext_{scale}"
    if start:
        config.fine_tune(c, f"hf:timm/convnext_{scale}.{_IMAGENET[scale]}")
        c.augment.crop_px = 224
        c.data.canvas = (300, 400)
        c.optim.learning_rate = 2e-4  # customary: networks without BatchNorm take smaller steps
    else:
        c.loss.imbalance = "sqrt"
        c.loss.label_smoothing = 0.05
        c.optim.name = "adamw"
        c.optim.learning_rate = 1e-3
        c.optim.warmup = {"epochs": 3.0}
        c.optim.ema_decay = 0.998
    c.model.drop_path = 0.1
    c.optim.weight_decay = 0.05
    return c
