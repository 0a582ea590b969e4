"""A ResNet on HAM10000. `configs/resnet.py:50` picks the depth: 18, 34, 50, 101.

It starts from random weights; with `configs/resnet.py:50-imagenet` from timm's of the Hugging Face
hub, by the recipe of EfficientNet-Lite0, which has not been measured with a ResNet.
"""

from ham_jax import config
from ham_jax.config import InputError


def get_config(variant: str = "18"):
    """Returns the configuration of a depth, or of `<depth>-imagenet`."""
    depth, _, start = variant.partition("-")
    if depth not in ("18", "34", "50", "101") or start not in ("", "imagenet"):
        raise InputError(
            f"configs/resnet.py:{variant}: the depth must be 18, 34, 50 or 101, and -imagenet may"
            " follow."
        )
    c = config.base()
    c.model.name = f"resnet{depth}"
    if start:
        config.fine_tune(c, f"hf:timm/resnet{depth}.a1_in1k")
    else:
        c.loss.imbalance = "sqrt"
        c.loss.label_smoothing = 0.05
        c.optim.ema_decay = 0.998
    if depth in ("50", "101"):  # sized for a GPU or TPU
        c.augment.crop_px = 224
        c.data.canvas = (300, 400)
        if not start:
            c.train.batch_size = 256
            c.train.duration = {"epochs": 90.0}
            c.optim.learning_rate = 0.2
            c.optim.warmup = {"epochs": 5.0}
    return c
