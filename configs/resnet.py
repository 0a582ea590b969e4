"""A ResNet on HAM10000. `configs/resnet.py:50` picks the depth: 18, 34, 50, 101.

It starts from random weights, ResNet-18 by the recipe of run 7 in benchmarks/recipes.md. With
`configs/resnet.py:50-imagenet` it starts from timm's weights of the Hugging Face hub, by the recipe
of EfficientNet-Lite0, which has not been measured with a ResNet.
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
        c.augment.crop_px = 96
        c.augment.progressive = ((0.7, 64),)
        c.loss.imbalance = "logit_adjusted"
        c.optim.ema_decay = 0.998
        c.train.duration = {"epochs": 40.0}
        c.eval.tta = 8
        c.eval.every = {"epochs": 10.0}
    if depth in ("50", "101"):  # sized for a GPU or TPU
        c.augment.crop_px = 224
        c.data.canvas = (300, 400)
        if not start:
            c.augment.progressive = ()
            c.train.batch_size = 256
            c.train.duration = {"epochs": 90.0}
            c.optim.learning_rate = 0.2
            c.optim.warmup = {"epochs": 5.0}
    return c
