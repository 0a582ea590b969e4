"""`--mode=export`: a trained network leaves the folder it was trained in.

The folder has the Hugging Face hub's layout, see `hub`, with files for other runtimes. Each file is
asked about photographs and compared with the network before the folder gets its name; the greatest
differences stand in the model card.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jinja2
import ml_collections
import numpy as np
import pandas as pd

from ham_jax import DISCLAIMER, console, escape, files, hub, reading
from ham_jax.classes import HAM10000
from ham_jax.config import InputError
from ham_jax.data import records, synthetic
from ham_jax.inference import decision
from ham_jax.model import Ensemble, Model, restore, restore_all
from ham_jax.models import pretrained

Body = Callable[[Path, str], str]
"""From a run's folder and the model's name to the part of its card that says how good it is."""

_COPIED = ("split.csv", "metrics.json", "predictions.csv", "audit.csv", "robustness.csv")
_TESTED = ("metrics.json", "predictions.csv")  # in a run's test/, in an export test_<name>
_RUNTIMES = {"onnx": "model.onnx", "stablehlo": "model.stablehlo"}
_NUM_VERIFIED = 16  # photographs
# The greatest difference of a probability that is not taken for a fault.
_TOLERANCES = {"float32": 0.0, "float16": 0.02, "bfloat16": 0.1}
_TOLERANCE = 0.02  # of other runtimes
_HEAD = {  # of metrics.json's figures: the hub's name, and ours in words
    "balanced_accuracy": ("balanced_accuracy", "balanced accuracy"),
    "accuracy": ("accuracy", "accuracy"),
    "macro_auc": ("roc_auc", "macro AUC"),
    "macro_average_precision": ("average_precision", "macro average precision"),
    "macro_f1": ("f1", "macro F1"),
    "log_loss": ("log_loss", "log loss"),
}


@dataclasses.dataclass(frozen=True)
class Photographs:
    """What the files are verified with.

    Attributes:
      images: on the canvas, uint8 [n, H, W, 3].
      codes: age, sex and site, float32 [n, M]; None for a network that takes none.
      what: they are, in words.
    """

    images: np.ndarray
    codes: np.ndarray | None
    what: str


@dataclasses.dataclass(frozen=True)
class Verified:
    """What a file's answers differ by at most from the network's.

    Attributes:
      file: its name.
      differences: {probabilities, features or ood_score: the greatest difference}.
    """

    file: str
    differences: Mapping[str, float]


def run(
    workdirs: Sequence[Path],
    output: Path,
    options: ml_collections.ConfigDict,
    mesh: jax.sharding.Mesh,
    body: Body,
) -> None:
    """Writes the folder, whole or not at all.

    Of several runs each gets a subfolder, and the whole is read as an ensemble.

    Args:
      workdirs: of training runs, cross-validations or exported folders.
      output: the folder, which must not be there yet or be empty.
      options: the section `export`.
      mesh: the devices.
      body: see `Body`.

    Raises:
      InputError: nothing to export, a folder with something in it, or a file whose answers are not
        those of the network.
    """
    if faults := _faults(output, options):
        raise InputError(faults)
    members = Ensemble(restore_all(workdirs, (), mesh)).with_decisions().members
    names = [f"member{number}" for number in range(len(members))]
    with _whole(output) as folder:
        if len(members) == 1:
            rows = _write(members[0], folder, output.name, options, body)
        else:
            rows = []
            for member, name in zip(members, names, strict=True):
                console.log_line(f"{name}: {member.name}")
                (folder / name).mkdir()
                of_member = _write(member, folder / name, f"{output.name}-{name}", options, body)
                rows += [[f"{name}/{file}", *rest] for file, *rest in of_member]
            hub.write_ensemble(folder, names)
            files.write_text(folder / hub.CARD, _ensemble_card(output.name, members, names))
    columns = ["file", "MB", "greatest difference in probability"]
    console.print_table(f"Written: {output}. {DISCLAIMER}", columns, rows)


def _faults(output: Path, options: ml_collections.ConfigDict) -> list[str]:
    faults = []
    if jax.process_count() > 1:
        faults.append("--mode=export works in one process, not in a job of several.")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        faults.append(f"--output={output} is there already; name a folder that is not, or empty.")
    odd = [name for name in options.files if name not in _RUNTIMES]
    return faults + [
        f"export.files: {name!r} must be one of {', '.join(_RUNTIMES)}." for name in odd
    ]


@contextlib.contextmanager
def _whole(output: Path) -> Iterator[Path]:
    """Gives a new folder, and at the end its name; it is removed if something goes wrong."""
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name[:40]}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, output)  # also over an empty folder
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    model: Model, folder: Path, name: str, options: ml_collections.ConfigDict, body: Body
) -> list[list[str]]:
    """Writes all files of a model, verified; returns a row a file."""
    for file in _COPIED:
        if (model.workdir / file).is_file():
            shutil.copyfile(model.workdir / file, folder / file)
    for file in _TESTED:
        for place in (model.workdir / f"test_{file}", model.workdir / "test" / file):
            if place.is_file():
                shutil.copyfile(place, folder / f"test_{file}")
    _write_weights(model, folder, options.dtype)
    photographs = _photographs(model, folder)
    expected = _answers(model, photographs)
    again = restore(folder, (), model.forward.mesh).with_calibrator().with_detector()
    assert all(again.config[name] == model.config[name] for name in ("augment", "eval", "model"))
    # Weights are arguments: the same network need not be compiled a second time.
    said = _answers(again.replace(forward=model.forward), photographs)
    assert said.keys() == expected.keys(), "a part of the model was not exported"
    verified = [_verified(hub.WEIGHTS, expected, said)]
    _check(verified[0], _TOLERANCES[options.dtype])
    for runtime in options.files:
        file = _RUNTIMES[runtime]
        try:
            writer = importlib.import_module(f"ham_jax.export.{runtime}")
            writer.write(model, folder / file)
            said = writer.answer(folder / file, photographs.images, photographs.codes)
        except ModuleNotFoundError as error:
            console.log_line(
                f"{file} is left out: it needs {error.name}, which pip install 'ham-jax[export]'"
                " installs."
            )
            (folder / file).unlink(missing_ok=True)  # written, but it cannot be verified
            continue
        verified.append(_verified(file, expected, said))
        _check(verified[-1], _TOLERANCE)
    said = {"dtype": options.dtype, "what": photographs.what, "verified": verified}
    files.write_text(folder / hub.CARD, _card(model, folder, name, body, said))
    differ = {one.file: f"{one.differences['probabilities']:.1e}" for one in verified}
    return [
        [path.name, f"{path.stat().st_size / 1e6:.2f}", differ.get(path.name, "")]
        for path in sorted(folder.iterdir())
    ]


def _write_weights(model: Model, folder: Path, dtype: str) -> None:
    found, arrays = model.detector, None
    if found:
        arrays = {name: np.asarray(getattr(found, name)) for name in hub.OOD_ARRAYS}
    content = {
        "classes": model.classes.to_json(),
        "provenance": dict(model.provenance),
        "calibration": model.calibrator and model.calibrator.to_json(),
        "ood": found and dict(found.provenance),
        "trained_on": {"records": model.records, **_trained_on(folder / "split.csv")},
    }
    tensors = {
        path: np.asarray(leaf, np.float32)
        for path, leaf in pretrained.flatten(model.variables).items()
    }
    hub.write(folder, content, model.config, tensors, arrays, dtype)


def _trained_on(split: Path) -> dict[str, Any]:
    """Returns how many images and lesions trained, and a checksum of the lesions' names."""
    if not split.is_file():
        return {}
    table = _read_split(split)
    of_train = table[table["split"] == "train"]
    lesions = sorted(set(of_train["lesion_id"]))
    checksum = hashlib.sha256("\n".join(lesions).encode()).hexdigest()
    return {"num_images": len(of_train), "num_lesions": len(lesions), "lesions": checksum}


def _read_split(path: Path) -> pd.DataFrame:
    try:
        with reading.open_regular(path) as file:
            table = pd.read_csv(file, dtype=str, keep_default_na=False)
        return table[["image_id", "lesion_id", "split"]]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is damaged: {error}. Restore it from a copy.") from error


def _photographs(model: Model, folder: Path) -> Photographs:
    """Returns validation's own where the records are at hand, drawn ones elsewhere."""
    if (seen := _records(model)) is not None and (folder / "split.csv").is_file():
        split = _read_split(folder / "split.csv")
        ids = split["image_id"][split["split"] == "val"]
        rows = np.flatnonzero(seen.table["image_id"].isin(ids))
        if len(rows):
            chosen = rows[np.unique(np.linspace(0, len(rows) - 1, _NUM_VERIFIED).astype(int))]
            codes = model.encode(seen.table.iloc[chosen])
            return Photographs(seen.read(chosen), codes, f"{len(chosen)} validation photographs")
    drawn = [
        synthetic.draw(model.classes.names[n % len(model.classes)], [n], [n])
        for n in range(_NUM_VERIFIED)
    ]
    codes = model.encode(pd.DataFrame(index=range(len(drawn))))
    return Photographs(model.decode(drawn), codes, f"{len(drawn)} drawn pictures of lesions")


def _records(model: Model) -> records.Records | None:
    """Returns the records that the run was trained on, where they are still on this machine."""
    for place in (model.config.data.prepared_dir, model.config.data.dir):
        for folder in records.records_folders(Path(place)):
            with contextlib.suppress(OSError, ValueError):
                if reading.read_json(folder / "metadata.json")["fingerprint"] == model.records:
                    return records.open_records(folder)
    return None


def _answers(model: Model, photographs: Photographs) -> dict[str, np.ndarray]:
    """Returns what a network says: raw and calibrated probabilities, features, likeness."""
    num_devices = model.forward.mesh.devices.size
    size = -(-len(photographs.images) // num_devices) * num_devices
    raw = model.probabilities(photographs.images, photographs.codes, batch_size=size)
    features = model.features(photographs.images, batch_size=size)
    said = {"raw": raw, "probabilities": raw, "features": features}
    if model.calibrator:
        method = model.config.eval.calibration
        said["probabilities"] = model.calibrator.apply(method, raw).probabilities
    if model.detector:
        said["ood_score"] = model.detector.score(features)
    return said


def _verified(
    file: str, expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]
) -> Verified:
    differences = {}
    for name in ("probabilities", "features", "ood_score"):
        if name in expected and name in found:
            apart = np.abs(np.asarray(found[name], np.float64) - expected[name])
            differences[name] = float(apart.max())
    return Verified(file, differences)


def _check(verified: Verified, tolerance: float) -> None:
    """Checks that a file answers as the network does.

    Raises:
      InputError: it does not.
    """
    apart = verified.differences["probabilities"]
    if not apart <= tolerance:  # also refuses nan
        raise InputError(
            f"{verified.file} differs from the network by {apart:.1e} in a probability, more than"
            f" {tolerance:g}: nothing is exported. Choose another export.dtype, or leave it out of"
            " export.files."
        )


def _card(model: Model, folder: Path, name: str, body: Body, said: Mapping[str, Any]) -> str:
    """Returns the model card; `said`: dtype of the weights, what verified the files and how."""
    has_results = (folder / "predictions.csv").is_file()
    numbers = _numbers(folder) if has_results else {}
    thresholds, sets_note = None, ""
    if model.calibrator:
        method, num_classes = model.config.eval.calibration, len(model.classes)
        of_any = model.calibrator.apply(method, np.full((1, num_classes), 1 / num_classes))
        thresholds = {kind: least[0] for kind, least in of_any.thresholds.items()}
        sets_note = decision.sets_note(of_any.choice, model.classes)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    sums = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in sizes}
    return _render(
        "card.md.jinja",
        head=_head(model, name, numbers, list(sizes)),
        name=name,
        body=body(folder, name) if has_results else "",
        model=model,
        trained_on=_trained_on(folder / "split.csv"),
        thresholds=thresholds,
        sets_note=sets_note,
        level=decision.LEVEL,
        sensitivity=decision.SENSITIVITY,
        sizes=sizes,
        sums=sums,
        **said,
    )


def _numbers(folder: Path) -> dict[str, Any]:
    try:
        return files.read_json(folder / "metrics.json", "Make it anew with --mode=eval.")
    except FileNotFoundError:
        return {}


def _head(model: Model, name: str, numbers: Mapping[str, Any], written: Sequence[str]) -> str:
    """Returns the card's YAML head, by which the hub lists, filters and compares models."""
    is_ham10000 = model.classes.names == HAM10000.names and not model.config.data.synthetic_images
    data = "HAM10000" if is_ham10000 else "own photographs"
    if model.config.data.synthetic_images:
        data = "synthetic lesions"
    formats = [kind for kind, file in _RUNTIMES.items() if file in written]
    described = {
        # HAM10000's, which weights trained on it inherit.
        "license": "cc-by-nc-4.0" if is_ham10000 else "other",
        "tags": ["dermoscopy", "skin-lesion", "jax", "flax", model.config.model.name, *formats],
    }
    if is_ham10000:
        described["datasets"] = ["HAM10000"]
    split = str(numbers.get("split", "val"))
    intervals = numbers.get("intervals") or {}
    metrics = [
        hub.Metric(
            kind,
            title,
            round(numbers[figure], 6),
            {"confidence_interval_95": [round(end, 6) for end in intervals[figure]]}
            if intervals.get(figure)
            else {},
        )
        for figure, (kind, title) in _HEAD.items()
        if isinstance(numbers.get(figure), float)
    ]
    of_split = f"{data}, {numbers.get('num_images', 0)} photographs"
    dataset = {"name": of_split, "type": data.replace(" ", "-"), "split": split}
    return hub.card_head(name, described, dataset, metrics)


def _ensemble_card(name: str, members: Sequence[Model], names: Sequence[str]) -> str:
    head = _head(members[0], name, {}, ())
    return _render(
        "ensemble.md.jinja",
        head=head,
        name=name,
        members=list(zip(names, members, strict=True)),
        classes=members[0].classes,
    )


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=False,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: escape.shown(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values, disclaimer=DISCLAIMER)
