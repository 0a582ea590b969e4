"""Exported models on disk and on the Hugging Face hub. The only room that knows their layout.

    config.json            architecture, classes, configuration, calibration, checksums
    model.safetensors      the weights that answer, `params/...` and `batch_stats/...`
    ood.safetensors        the out-of-distribution model, where the run has one
    README.md              the model card
    split.csv, metrics.json, predictions.csv    of the run: who trained, how good it is
    test_metrics.json, test_predictions.csv     the same on the test split, where measured
    model.onnx, model.stablehlo                 for other runtimes

An ensemble is a folder of such folders, whose config.json names its `members`. A folder may come
from anybody: its JSON is checked, its tensors are numbers alone, and nothing in it is executed.
"""

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from ham_jax import config as configuration
from ham_jax import files, reading
from ham_jax.config import InputError

CONFIG, WEIGHTS, OOD, CARD = "config.json", "model.safetensors", "ood.safetensors", "README.md"

PREFIX = "hf:"
"""What the name of a model on the hub begins with."""

Tensors = Mapping[str, np.ndarray]
"""{path/of/leaf: array}"""

_FORMAT = 1
_TASK = "image-classification"
_LIBRARY = "ham_jax"
_NUMBERS = {
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
}
OOD_ARRAYS = ("means", "whitening", "threshold")
_MAX_BYTES = 8 << 30  # of weights; the largest network here takes 0.4 GB
_MAX_BATCH_BYTES = 16 << 30  # of the pixels of one batch
# Of the machine that trained. They say nothing of the network, and an export names no paths.
_OF_MACHINE = (
    "data.dir",
    "data.test_dir",
    "data.prepared_dir",
    "data.download",
    "data.num_workers",
    "eval.masks",
)
_REMEDY = "Get the folder again: export it anew, or download or copy it once more."


class Metric(NamedTuple):
    """A figure of a model card's head.

    Attributes:
      kind: as the hub calls it, such as `roc_auc`.
      title: in words.
      value: the figure.
      settings: what belongs to it, such as its interval.
    """

    kind: str
    title: str
    value: float
    settings: Mapping[str, Any]


def local(name: str | os.PathLike) -> Path:
    """Returns the folder of a model; one of the hub is downloaded, if the cache lacks it.

    Args:
      name: a folder, or `hf:user/name`, after which `@revision` may follow.

    Raises:
      InputError: no such repository, none of this library, or it cannot be reached.
    """
    text = os.fspath(name)
    return _snapshot(text) if text.startswith(PREFIX) else Path(text)


@functools.cache
def _snapshot(name: str) -> Path:
    repository, revision = _parts(name)
    with _explained(name, repository, "it"):
        import huggingface_hub

        folder = Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, ignore_patterns=["*.onnx", "*.stablehlo"]
            )
        )
    if not is_exported(folder):
        raise InputError(
            f"{name} is no model that ham_jax exported: its {CONFIG} does not say so. Its weights"
            f" may serve to start a training: --config.model.pretrained={name}"
        )
    return folder


def download(name: str, file: str, *, cached: bool = False) -> Path | None:
    """Returns a file of the hub in the local cache, None if the repository has none of that name.

    Args:
      name: `hf:user/name`, after which `@revision` may follow.
      file: its name in the repository.
      cached: ask no network; None also where the cache does not have it.

    Raises:
      InputError: no package, no network, no such repository.
    """
    repository, revision = _parts(name)
    with _explained(name, repository, file):
        import huggingface_hub
        from huggingface_hub import errors

        found = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision)
        if cached:
            return Path(found) if isinstance(found, str) else None
        try:
            return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
        except errors.LocalEntryNotFoundError:
            # The cache also remembers which files a repository does not have.
            if found is huggingface_hub._CACHED_NO_EXIST:
                return None
            raise
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            raise
        except errors.EntryNotFoundError:
            return None


def _parts(name: str) -> tuple[str, str | None]:
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    return repository, revision or None


@contextlib.contextmanager
def _explained(name: str, repository: str, what: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into a sentence."""
    try:
        from huggingface_hub import errors
    except ImportError:
        raise InputError(f"{name} needs: pip install huggingface_hub") from None
    page = f"https://huggingface.co/{repository}"
    try:
        yield
    except errors.LocalEntryNotFoundError as error:
        raise InputError(
            f"{name}: the Hugging Face hub cannot be reached and {what} is not in the cache."
            f" Download {CONFIG} and {WEIGHTS}, and what else is there, from {page} elsewhere into"
            " one folder, and give its path."
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise InputError(
            f"{name}: the hub has no such repository or revision, or it is not public; see {page}."
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: {error}") from error


def released() -> list[Path]:
    """Returns the exported folders that come with this library, mostly one."""
    package = Path(__file__).parent
    around = (package.parent / "released", package / "released")  # a clone's, an installation's
    return sorted(path.parent for each in around for path in each.glob(f"*/{CONFIG}"))


def card_head(
    name: str, described: Mapping[str, Any], dataset: Mapping[str, str], metrics: Sequence[Metric]
) -> str:
    """Returns what stands between the two lines of dashes at the top of a model card.

    Args:
      name: of the model.
      described: license, tags, datasets, as the hub knows them.
      dataset: that the metrics are of: name, type, split.
      metrics: of it; where there are none, the head has no results.
    """
    import huggingface_hub

    results = [
        huggingface_hub.EvalResult(
            task_type=_TASK,
            dataset_type=dataset["type"],
            dataset_name=dataset["name"],
            dataset_split=dataset["split"],
            metric_type=metric.kind,
            metric_name=metric.title,
            metric_value=metric.value,
            metric_args=dict(metric.settings),
        )
        for metric in metrics
    ]
    head = huggingface_hub.ModelCardData(
        **described,
        library_name=_LIBRARY,
        pipeline_tag=_TASK,
        model_name=name,
        eval_results=results or None,
    )
    return head.to_yaml()


def is_exported(folder: Path) -> bool:
    """Returns whether a folder holds an exported model, or an ensemble of them, by its word."""
    try:
        return reading.read_json(folder / CONFIG).get("library_name") == _LIBRARY
    except (OSError, ValueError):
        return False


def members(folder: Path) -> list[Path]:
    """Returns the folders of an exported ensemble's members; of a single model itself.

    Raises:
      InputError: config.json is damaged, or names what is no folder in this one.
    """
    content = _read_config(folder)
    if "members" not in content:
        return [folder]
    names = content["members"]
    # A name such as ../.. would lead out of the folder.
    plain = isinstance(names, list) and all(
        isinstance(name, str) and Path(name).name == name and (folder / name / CONFIG).is_file()
        for name in names
    )
    if not (plain and names):
        raise InputError(
            f"{folder / CONFIG}: members = {names!r:.200} must name subfolders, each with a"
            f" {CONFIG}. {_REMEDY}"
        )
    return [folder / name for name in names]


def run_config(folder: Path, is_trained: bool = True) -> ml_collections.ConfigDict:
    """Returns the configuration of an exported model's run, without what is of its machine.

    Raises:
      InputError: config.json is damaged, or holds keys that this version does not have.
    """
    content = _read_config(folder)
    if "members" in content:
        raise InputError(
            f"{folder} is an ensemble of {', '.join(map(str, content['members']))!s:.200}; name the"
            " folder of one."
        )
    path = folder / CONFIG
    try:
        config = configuration.from_dict(content["config"], is_trained)
    except InputError as error:
        raise InputError([f"{path} is no configuration of a run.", *error.faults]) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error!r}. {_REMEDY}") from error
    configuration.validate(config)
    own = _portable(config)
    height, width = own.data.canvas
    if own.eval.batch_size * height * width * 3 > _MAX_BATCH_BYTES:
        raise InputError(f"{path}: eval.batch_size = {own.eval.batch_size} fits no machine.")
    if own.data.split_csv:
        own.data.split_csv = str(folder / "split.csv")
    return own


def _portable(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns a configuration without the paths of a machine."""
    own, default = config.copy_and_resolve_references(), configuration.base()
    for name in _OF_MACHINE:
        section, leaf = name.split(".")
        own[section][leaf] = default[section][leaf]
    if own.data.split_csv:
        own.data.split_csv = "split.csv"
    for section, key in ((own.model, "pretrained"), (own.loss, "teacher")):
        if section[key]:
            paths = configuration.paths(section[key])
            section[key] = ",".join(os.path.basename(p) if os.path.isabs(p) else p for p in paths)
    return own


def load(folder: Path) -> tuple[Any, Any, Any, dict[str, Any], int]:
    """Returns (params, batch_stats, ema, meta, step) as `checkpoints.load_for_inference` does.

    Only the weights that answer are there: the first two are empty where they are an average.

    Raises:
      InputError: it is damaged, or was not exported by this library.
    """
    content, config = _read_config(folder), run_config(folder)
    tensors = _read_tensors(folder, WEIGHTS, content)
    tree: dict[str, Any] = {"params": {}, "batch_stats": {}}
    try:
        for path, value in tensors.items():
            *sections, leaf = path.split("/")
            at = tree
            for section in sections:
                at = at.setdefault(section, {})
            at[leaf] = value.astype(np.float32)
        provenance = content["provenance"]
        step, weights = int(provenance["step"]), provenance["weights"]
        records = str(content["trained_on"]["records"])
        if weights not in ("raw", "ema") or not all(isinstance(tree[n], dict) for n in tree):
            raise ValueError(f"weights = {weights!r}")
    # IndexError: one tensor's name is the beginning of another's path.
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder} is damaged: {error!r:.200}. {_REMEDY}") from error
    ema = tree if weights == "ema" else {}
    raw = {"params": {}, "batch_stats": {}} if ema else tree
    meta = {
        "config": configuration.to_dict(config),
        "classes": content.get("classes"),
        "records": records,
    }
    return raw["params"], raw["batch_stats"], ema, meta, step


def read_ood(folder: Path) -> tuple[Tensors, Mapping[str, Any]] | None:
    """Returns the arrays of the out-of-distribution model and what it was fitted on, or None.

    Raises:
      ValueError: it is damaged.
    """
    content = _read_config(folder)
    if content.get("ood") is None:
        return None
    try:
        tensors = _read_tensors(folder, OOD, content)
    except InputError as error:
        raise ValueError(str(error)) from error
    if set(tensors) != set(OOD_ARRAYS) or not isinstance(content["ood"], dict):
        raise ValueError(f"{folder / OOD} is damaged: it does not hold {', '.join(OOD_ARRAYS)}")
    return {name: value.astype(np.float64) for name, value in tensors.items()}, content["ood"]


def write(
    folder: Path,
    content: Mapping[str, Any],
    config: ml_collections.ConfigDict,
    tensors: Tensors,
    ood: Tensors | None,
    dtype: str,
) -> None:
    """Writes config.json, model.safetensors and ood.safetensors into a folder.

    BatchNorm's statistics stay float32: they are few, and a variance may be beyond float16.

    Args:
      folder: that is there.
      content: what config.json says beside the configuration, as JSON can hold it: classes,
        provenance, calibration, ood, trained_on.
      config: of the run.
      tensors: float32, `params/...` and `batch_stats/...`.
      ood: means, whitening, threshold, float64; or None.
      dtype: of the kernels and biases: float32, float16 or bfloat16. Beside float32 the
        out-of-distribution model is float64, as it was fitted; beside float16 it is float16 where
        that holds it, which on EfficientNet-Lite0 changed no score by more than 1e-4; else float32.

    Raises:
      InputError: a weight is too large for the type.
    """
    files.write_bytes(folder / WEIGHTS, safetensors.numpy.save(_cast(tensors, dtype)))
    if ood is not None:
        kind = np.float64 if dtype == "float32" else np.float32
        if dtype == "float16" and max(np.abs(value).max() for value in ood.values()) < 1e4:
            kind = np.float16
        arrays = {
            name: np.asarray(value, np.float64 if name == "threshold" else kind, order="C")
            for name, value in ood.items()
        }
        files.write_bytes(folder / OOD, safetensors.numpy.save(arrays))
    described = {
        "format": _FORMAT,
        "library_name": _LIBRARY,
        "architecture": config.model.name,
        **content,
        "config": configuration.to_dict(_portable(config)),
        "checksums": {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in (WEIGHTS, OOD)
            if (folder / name).exists()
        },
    }
    files.write_json(folder / CONFIG, described)


def _cast(tensors: Tensors, dtype: str) -> dict[str, np.ndarray]:
    """Returns weights in the type that they are written in; see `write`."""
    kinds = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    with np.errstate(over="ignore"):  # which is looked for right after
        cast = {
            path: np.asarray(
                value, kinds[dtype] if path.startswith("params/") else np.float32, order="C"
            )
            for path, value in tensors.items()
        }
    if large := [p for p, v in cast.items() if not np.isfinite(v.astype(np.float32)).all()]:
        raise InputError(
            f"export.dtype = {dtype!r}: {', '.join(large[:3])} has values that it cannot hold."
            " Use float32 or bfloat16."
        )
    return cast


def write_ensemble(folder: Path, names: list[str]) -> None:
    """Writes the config.json of a folder whose subfolders are the members of an ensemble."""
    content = {"format": _FORMAT, "library_name": _LIBRARY, "members": names}
    files.write_json(folder / CONFIG, content)


def _read_config(folder: Path) -> dict[str, Any]:
    """Returns what an exported model's config.json says, of a format that is known.

    Raises:
      InputError: it is missing, damaged, another library's or of a later version.
    """
    path = folder / CONFIG
    try:
        content = files.read_json(path, _REMEDY)
    except FileNotFoundError:
        raise InputError(f"{folder} holds {WEIGHTS}, but no {CONFIG}. {_REMEDY}") from None
    if content.get("library_name") != _LIBRARY:
        raise InputError(
            f"{folder} is no model that ham_jax exported: its {CONFIG} does not say so. Weights of"
            " other libraries can only start a training, see model.pretrained."
        )
    if content.get("format") != _FORMAT:
        raise InputError(
            f"{path} has format {content.get('format')!r:.50}; this version of ham_jax reads"
            f" {_FORMAT}. Use the version that wrote it."
        )
    return content


def _read_tensors(folder: Path, name: str, content: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns a file's tensors, after its checksum was verified.

    Raises:
      InputError: it is missing or damaged.
    """
    path, sums = folder / name, content.get("checksums")
    try:
        data = reading.read_bytes(path, _MAX_BYTES)
        expected = sums.get(name) if isinstance(sums, dict) else None
        if hashlib.sha256(data).hexdigest() != expected:
            raise ValueError(f"its checksum is not the one in {CONFIG}")
        return {
            key: np.frombuffer(view["data"], _NUMBERS[view["dtype"]]).reshape(view["shape"])
            for key, view in safetensors.deserialize(data)
        }
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{path} is damaged or missing: {why}. {_REMEDY}") from error
