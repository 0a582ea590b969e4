"""`--mode=report`: one HTML page and a model card from the files of a run's folder.

No network is run: every figure comes from `predictions.csv`, or from the file that is named beside
it. The same files give the same bytes.
"""

import base64
import csv
import dataclasses
import html
import json
import math
import platform
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import pandas as pd
import sklearn

from ham_jax import DISCLAIMER, console, escape, files, hub, reading
from ham_jax import config as configuration
from ham_jax.classes import Classes
from ham_jax.config import InputError
from ham_jax.data import image as image_files
from ham_jax.evaluation import (
    bootstrap,
    calibration,
    figures,
    isic,
    lesions,
    metrics,
    on_lesion,
    predictions,
    selective,
    subgroups,
)
from ham_jax.evaluation.calibration import HELD_OUT
from ham_jax.evaluation.predictions import METADATA, Predictions
from ham_jax.inference import calibrator, decision
from ham_jax.inference.calibrator import Calibrator
from ham_jax.inference.decision import Calibrated

FILE, CARD = "report.html", "model_card.md"
PANELS = "explanations"
TESTS = ("test/metrics.json", "test_metrics.json")
"""What `--mode=eval --split=test --output=RUN/test` writes into a run's folder, and its name in an
export."""

INTENDED = "education and research: how such networks are trained, measured and explained"
OUT_OF_SCOPE = (
    "diagnosis, triage or any other decision about a person, nor for photographs taken without a"
    " dermatoscope"
)
_KINDS = {  # of metrics.json's values
    "split": str,
    "log_loss": float,
    "members": list,
    "folds": list,
    "calibration": dict,
    "decision": dict,
}
_AXES = {
    "sex": "sex",
    "age": "age",
    "localization": "site",
    "dx_type": "method of diagnosis",
}
_SPLITS = {
    "val": "validation",
    "test": "test",
    "train": "training",
    "crossval": "all folds, each image by the network that never saw its lesion",
}
_PROGRAM = "python -m ham_jax.main"
_NOTHING = "\N{EN DASH}"  # for what is not defined
_NUM_HARDEST = 20
_PANEL_BYTES = 3_000_000  # of all panels together
_PANEL_SIDES = (1400, 1000, 700, 500, 350)  # pixels
_ROBUSTNESS = ("corruption", "severity", "balanced_accuracy", "low", "high", "n", "split", "tta")


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a folder holds; None or empty where a file is missing.

    Attributes:
      workdir: the folder.
      predictions: of predictions.csv.
      numbers: metrics.json; empty where it is missing.
      config: config.json.
      calibrator: of calibration.json.
      folds: of a cross-validation, the rows of `predictions` that each fold validates.
      robustness: robustness.csv.
      audit: audit.csv, a row a class.
      panels: of explanations/ the step and the pictures: {name, said, data}.
      on_lesion: explanations/on_lesion.csv.
      test: of one of TESTS, beside the predictions of another split.
    """

    workdir: Path
    predictions: Predictions
    numbers: Mapping[str, Any]
    config: Mapping[str, Any] | None
    calibrator: Calibrator | None
    folds: list[np.ndarray]
    robustness: pd.DataFrame | None
    audit: list[dict[str, str]]
    panels: Mapping[str, Any] | None
    on_lesion: pd.DataFrame | None
    test: Mapping[str, Any] | None


def run(workdir: Path, output: Path | None = None) -> None:
    """Writes the report and, beside it, the model card.

    Args:
      workdir: of a run, of a cross-validation, or what `--mode=eval` wrote into.
      output: the HTML file. Default: report.html in the folder.

    Raises:
      InputError: nothing to report on, a damaged file, files of different evaluations, or nowhere
        to write.
    """
    output = output or workdir / FILE
    evidence = read(workdir)
    if not output.parent.is_dir():
        raise InputError(f"--output={output}: there is no folder {output.parent}.")
    facts = measure(evidence)
    page, card = render(facts)
    files.write_text(output, page)
    files.write_text(output.with_name(CARD), card)
    low, high = facts["intervals"]["balanced_accuracy"]
    rows = [
        ["balanced accuracy", f"{facts['balanced_accuracy']:.3f} ({low:.3f} to {high:.3f})"],
        ["not in it", ", ".join(name for name in facts["missing"]) or "nothing"],
        ["written", f"{output}, {output.with_name(CARD)}"],
    ]
    console.print_table(DISCLAIMER, ["", ""], rows)


def card(workdir: Path, name: str) -> str:
    """Returns the model card of a folder under another name: an export's must name no place.

    Raises:
      InputError: see `run`.
    """
    evidence = dataclasses.replace(read(workdir), workdir=Path(name))
    return render(measure(evidence))[1]


def read(workdir: Path) -> Evidence:
    """Reads a folder.

    Raises:
      InputError: see `run`; all faults at once.
    """
    faults: list[str] = []

    def get(what: Callable[[Path], Any], name: str, default: Any) -> Any:
        if not (workdir / name).exists():
            return default
        try:
            return what(workdir / name)
        except InputError as error:
            faults.extend(error.faults)
        except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
            faults.append(
                f"{workdir / name} is damaged: {error}. Remove it, or make it anew with the"
                " command that made it."
            )
        return default

    if not (workdir / "predictions.csv").is_file():
        raise InputError(
            f"{workdir / 'predictions.csv'} is missing, from which a report is made. It is written"
            f" by training and by --mode=eval --workdir={workdir}."
        )
    numbers = get(_read_numbers, "metrics.json", {})
    judged = get(lambda p: _read_predictions(p, _classes(numbers)), "predictions.csv", None)
    rest = (
        get(_read_config, "config.json", None) or get(reading.read_json, "fold0/config.json", None),
        judged and get(lambda _: calibrator.read(workdir, judged.classes), "", None),
        judged and get(lambda _: _read_folds(workdir, judged), "fold0", []),
        get(_read_robustness, "robustness.csv", None),
        get(_read_audit, "audit.csv", []) or get(_read_audit, "fold0/audit.csv", []),
        get(_read_panels, f"{PANELS}/manifest.json", None),
        judged
        and get(lambda p: _read_on_lesion(p, judged.classes), f"{PANELS}/{on_lesion.FILE}", None),
        get(lambda p: _read_test(p, numbers), TESTS[0], None)
        or get(lambda p: _read_test(p, numbers), TESTS[1], None),
    )
    if not faults and numbers:
        faults += _mismatch(workdir, judged, numbers)
    if faults:
        raise InputError(faults)
    return Evidence(workdir, judged, numbers, *rest)


def measure(evidence: Evidence) -> dict[str, Any]:
    """Returns all that page and card say: numbers, texts, and figures as SVG."""
    judged, numbers, config = evidence.predictions, evidence.numbers, evidence.config or {}
    split = numbers.get("split")
    cross_fitted = split not in HELD_OUT
    calibrated, note = _calibrated(evidence)
    known = judged.metadata.loc[:, list(METADATA)]
    found = metrics.compute(judged)
    facts = {
        **found,
        "classes": judged.classes,
        "is_ham10000": isic.knows(judged.classes),
        "intervals": bootstrap.intervals(judged),
        "baseline": _baseline(found["per_class"]),
        "name": evidence.workdir.resolve().name,
        "model": _model(config),
        "synthetic": bool(_key(config, "data.synthetic_images")),
        "split": split,
        "split_name": _SPLITS.get(split or "", "not known, as there is no metrics.json"),
        "num_lesions": judged.num_lesions,
        "by_lesion": lesions.measure(judged),
        "test": evidence.test,
        "isic": isic.score(judged) if split == "test" and isic.knows(judged.classes) else None,
        **(
            calibration.measure(judged, calibrated, cross_fitted)
            if calibrated
            else {key: numbers.get(key) for key in ("calibration", "decision")}
        ),
        "calibration_note": note,
        "sets_note": _sets_note(evidence, calibrated),
        "best_name": calibrated.method if calibrated else "none, uncalibrated",
        "cross_fitted": calibrated is not None and cross_fitted,
        "ood": _ood(judged),
        "subgroups": (
            subgroups.measure(judged) if (known.notna() & (known != "")).to_numpy().any() else None
        ),
        "robustness": _robustness(evidence.robustness),
        "panels": _panels(evidence),
        "on_lesion": _on_lesion(evidence),
        "hardest": _hardest(judged),
        "audit": evidence.audit,
        "config": _config_rows(config),
        "limits": _limits(split, judged),
        "command": f"{_PROGRAM} --mode=report --workdir={shlex.quote(str(evidence.workdir))}",
        "provenance": _provenance(numbers),
        "parts": numbers.get("members") or numbers.get("folds"),
        "parts_name": "Members of the ensemble" if "members" in numbers else "Folds",
    }
    facts["flagged"] = _flagged(facts["subgroups"])
    facts["in_plain_words"] = _in_plain_words(facts)
    commands = _commands(evidence)
    facts["missing"] = {what: command for what, command in commands.items() if not facts[what]}
    return facts | {"figures": _figures(facts, judged, calibrated)}


def render(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the page and the model card, texts, of what `measure` returned."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: ".html" in str(name),
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: escape.shown(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": lambda value, digits=3: _NOTHING if value is None else f"{value:.{digits}f}",
        "signed": lambda value: _NOTHING if value is None else f"{value:+.3f}",
        "span": _span,
        "signed_span": lambda pair: _span(pair, sign="+"),
        "percent": lambda value, digits=0: (
            _NOTHING if value is None else f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%"
        ),
        "words": lambda name: str(name).replace("_", " ").replace("auc", "AUC"),
        "sentence": lambda text: text[:1].upper() + text[1:],
        "cell": _cell,
        "code": _code,
    }
    common = {
        **facts,
        "facts": facts,
        "metrics": metrics.METRICS,
        "colors": dict(
            zip(facts["classes"], figures.class_colors(len(facts["classes"])), strict=True)
        ),
        "has_legend": len(facts["classes"]) <= figures.MAX_LEGEND,
        "calibration_methods": _methods(facts["calibration"]),
        "sensitivity": decision.SENSITIVITY,
        "min_lesions": subgroups.MIN_LESIONS,
        "axes": _AXES,
        "intended": INTENDED,
        "out_of_scope": OUT_OF_SCOPE,
        "disclaimer": DISCLAIMER,
    }
    return (
        environment.get_template("report.html.jinja").render(common),
        environment.get_template("model_card.md.jinja").render(common),
    )


def _commands(evidence: Evidence) -> dict[str, str]:
    """Returns the command that makes what each section needs, whether or not it is there."""
    folder, split = shlex.quote(str(evidence.workdir)), evidence.numbers.get("split")
    chosen = f" --split={split}" if split in HELD_OUT else ""
    where = run = f"--workdir={folder}"
    if split == "crossval":
        evaluate = f"{_PROGRAM} --mode=crossval --config=CONFIG {where}"
        where = run = f"--workdir={folder}/fold0"
    else:
        if members := evidence.numbers.get("members"):
            runs = ",".join(shlex.quote(str(member.get("workdir"))) for member in members)
            run, where = "--workdir=RUN", f"--workdir={runs} --output={folder}"
        elif not (evidence.workdir / "checkpoints").is_dir():  # --mode=eval --output
            run, where = "--workdir=RUN", f"--workdir=RUN --output={folder}"
        evaluate = f"{_PROGRAM} --mode=eval {where}{chosen}"
    fit = evaluate
    if chosen and "members" not in evidence.numbers:
        fit = f"{_PROGRAM} --mode=eval --split=val {run} && {evaluate}"
    return {
        "calibration": fit,
        "decision": fit,
        "ood": fit,
        "subgroups": evaluate,
        "robustness": f"{_PROGRAM} --mode=robustness {where}{chosen}",
        "panels": f"{_PROGRAM} --mode=explain {run}{chosen}",
    }


def _read_config(path: Path) -> dict[str, Any]:
    """Returns a run's configuration, which an export has within what else its file says."""
    if hub.is_exported(path.parent):
        return configuration.to_dict(hub.run_config(path.parent))
    return reading.read_json(path)


def _read_numbers(path: Path) -> dict[str, Any]:
    numbers = reading.read_json(path)
    for name, kind in _KINDS.items():
        value = numbers.get(name)
        whole = isinstance(value, kind | None) and (
            kind is not list or all(isinstance(part, dict) for part in value or ())
        )
        if not whole:
            raise ValueError(f"{name} = {value!r:.100}")
    _classes(numbers)
    return numbers


def _classes(numbers: Mapping[str, Any]) -> Classes | None:
    """Returns the classes that metrics.json names; None where it names none.

    Raises:
      ValueError: they cannot be classes.
    """
    if "classes" not in numbers:
        return None
    if "malignant" not in numbers:
        return Classes.from_json(numbers["classes"])
    fields = {name: numbers.get(name, ()) for name in ("malignant", "titles")}
    return Classes.from_json({"names": numbers["classes"], **fields})


def _read_predictions(path: Path, classes: Classes | None) -> Predictions:
    read = predictions.read(path, classes)
    if not np.allclose(read.probabilities.sum(axis=1), 1):
        raise ValueError("the probabilities do not sum to 1 in each line")
    return read


def _read_folds(workdir: Path, joined: Predictions) -> list[np.ndarray]:
    """Returns the rows of the predictions that each fold has; none if they do not make it up."""
    place = pd.Index(joined.image_ids)
    paths = sorted(workdir.glob("fold*/predictions.csv"))
    folds = [place.get_indexer(predictions.read(p, joined.classes).image_ids) for p in paths]
    whole = np.array_equal(np.sort(np.concatenate([[], *folds])), np.arange(len(joined)))
    return folds if whole else []


def _read_robustness(path: Path) -> pd.DataFrame:
    with reading.open_regular(path) as file:
        table = pd.read_csv(file, keep_default_na=False)
    if absent := [name for name in _ROBUSTNESS if name not in table]:
        raise ValueError(f"it lacks {', '.join(absent)}")
    for name in ("severity", "balanced_accuracy", "low", "high"):
        table[name] = pd.to_numeric(table[name])
    if table.empty or table["corruption"].iloc[0] != "none":
        raise ValueError("its first row is not the clean one")
    return table


def _read_audit(path: Path) -> list[dict[str, str]]:
    with reading.open_text(path) as file:
        rows = list(csv.DictReader(file))
    if any(None in (*row, *row.values()) for row in rows):
        raise ValueError("its lines have not as many fields as its header")
    return rows


def _read_panels(path: Path) -> dict[str, Any] | None:
    """Returns the step and the pictures of a manifest, all of the size that keeps the page small.

    None where it is of a person's own photographs, which are no business of a report.
    """
    manifest = reading.read_json(path)
    if "split" not in manifest:
        return None
    names = list(manifest["panels"])
    pictures: list[bytes] = []
    for side in _PANEL_SIDES:
        pictures = [image_files.smaller_png(path.with_name(Path(n).name), side) for n in names]
        if sum(map(len, pictures)) <= _PANEL_BYTES:
            break
    return {
        "split": manifest["split"],
        "step": manifest["step"],
        "pictures": [
            {
                "name": Path(name).stem.replace("_", " "),
                "said": "; ".join(
                    f"{image['image_id']}, truth {image['truth']}, answer {image['prediction']}"
                    f" {image['probability']:.2f}"
                    for image in manifest["panels"][name]
                ),
                "data": base64.b64encode(picture).decode(),
            }
            for name, picture in zip(names, pictures, strict=True)
        ],
    }


def _read_on_lesion(path: Path, classes: Classes) -> pd.DataFrame:
    with reading.open_regular(path) as file:
        table = pd.read_csv(file, keep_default_na=False)
    if absent := [name for name in (*on_lesion.COLUMNS, "split", "step") if name not in table]:
        raise ValueError(f"it lacks {', '.join(absent)}")
    for name in ("heat_on_lesion", "lesion_area"):
        table[name] = pd.to_numeric(table[name].replace("", np.nan))
    if table["heat_on_lesion"].isna().all() or not table["truth"].isin(classes.names).all():
        raise ValueError("it has no number, or other classes")
    return table


def _read_test(path: Path, own: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is told of the test split.

    Args:
      path: one of TESTS.
      own: metrics.json of the folder itself; empty where it is missing.

    Raises:
      ValueError: it is of another split, or of other weights than `own`.
    """
    numbers = _read_numbers(path)
    found = [numbers.get("split"), numbers.get("step")]
    needed = ["test", own.get("step") if own else found[1]]
    if found != needed:
        raise ValueError(f"its split and step are {found}, not {needed}")
    intervals = numbers["intervals"]
    decided, calibrated = numbers.get("decision"), numbers.get("calibration")
    return {
        **{name: numbers[name] for name in ("num_images", "num_lesions")},
        "metrics": [
            (metric.title, numbers[metric.name], intervals[metric.name])
            for metric in metrics.METRICS
            if metric.name in intervals
        ],
        "by_lesion": numbers.get("by_lesion"),
        "per_class": [
            (dx, row["num_images"], row["sensitivity"], intervals["per_class"][dx]["sensitivity"])
            for dx, row in numbers["per_class"].items()
        ],
        "flag": decided and decided["malignant"],
        "sets": decided and decided["sets"][f"{decision.LEVEL:.2f}"]["shown"],
        "calibrated": calibrated and calibrated[calibrated["method"]],
    }


def _mismatch(workdir: Path, judged: Predictions, numbers: Mapping[str, Any]) -> list[str]:
    """Returns the fault that metrics.json is of other predictions than are there."""
    found = metrics.compute(judged)
    said = [numbers.get(name) for name in ("num_images", "log_loss")]
    if said[0] == found["num_images"] and math.isclose(said[1] or 0, found["log_loss"]):
        return []
    return [
        f"{workdir}: metrics.json is of {said[0]} images with log loss {said[1]},"
        f" predictions.csv of {found['num_images']} with {found['log_loss']}. They come from"
        f" different evaluations: make both anew with --mode=eval --workdir={workdir}."
    ]


def _calibrated(evidence: Evidence) -> tuple[Calibrated | None, str]:
    """Returns calibrated probabilities with their thresholds, and a sentence on how they came.

    None where the folder has not what it takes. Of an ensemble it never has: each member is
    calibrated by itself. Nor of a method of an earlier version. Then metrics.json may say what
    --mode=eval measured.
    """
    numbers, own = evidence.numbers, evidence.calibrator
    split = numbers.get("split") or "val"
    method = (numbers.get("calibration") or {}).get("method")
    method = method or ((evidence.config or {}).get("eval") or {}).get("calibration", "temperature")
    calibrated = None
    if "members" not in numbers and method in calibrator.METHODS:
        calibrated = calibration.decide(evidence.predictions, split, method, own, evidence.folds)
    if calibrated is None:
        return None, "As --mode=eval measured it." if "calibration" in numbers else ""
    if split not in HELD_OUT or own is None:
        return calibrated, (
            "Fitted on these very images, but cross-fitted: each fold of lesions is calibrated by"
            " what was fitted on the other folds, thresholds too."
        )
    note = (
        f"Fitted on {own.fitted_on.get('num_images')} validation images of"
        f" {own.fitted_on.get('num_lesions')} lesions, applied here as it is."
    )
    if differs := own.mismatch({**own.fitted_on, **numbers}):
        note += f" It was fitted for other probabilities: {differs}."
    return calibrated, note


def _sets_note(evidence: Evidence, calibrated: Calibrated | None) -> str:
    """Returns in words what the sets promise that a person is shown; '' where nothing tells."""
    if calibrated is None or evidence.calibrator is None:
        return ""
    choice = evidence.calibrator.choice(calibrated.method)
    return decision.sets_note(choice, evidence.predictions.classes)


def _in_plain_words(facts: Mapping[str, Any]) -> list[str]:
    """Returns what a reader who knows no metric should take from the figures, in sentences."""

    def in_100(share: float) -> str:
        return f"{100 * share:.0f} of 100"

    classes, baseline, told = facts["classes"], facts["baseline"], facts["decision"]
    low, high = (f"{100 * bound:.0f}" for bound in facts["intervals"]["balanced_accuracy"])
    found = {
        dx: row["sensitivity"]
        for dx, row in facts["per_class"].items()
        if row["sensitivity"] is not None
    }
    best, worst = max(found, key=found.__getitem__), min(found, key=found.__getitem__)
    said = [
        f"Of {len(classes)} diagnoses the network named the right one for"
        f" {in_100(facts['accuracy'])} photographs.",
        f"With each diagnosis counted alike, rare or frequent, it found"
        f" {in_100(facts['balanced_accuracy'])} ({low} to {high}, as far as so many photographs can"
        f" tell); always answering “{classes.title(baseline['answer'])}” would find"
        f" {100 * baseline['balanced_accuracy']:.0f}.",
        f"It found {classes.title(best)} most often ({in_100(found[best])}) and"
        f" {classes.title(worst)} least often ({in_100(found[worst])}).",
    ]
    if told and classes.malignant and told["malignant"]["auc"] is not None:
        flag = told["malignant"]
        said.append(
            f"Its warning of a malignant lesion came for {in_100(flag['sensitivity'])} malignant"
            f" photographs, and also for {in_100(1 - flag['specificity'])} others."
        )
    if told:
        surest = told["abstention"]["selective"][-1]
        said.append(
            f"Where it answered only the {100 * surest['coverage']:.0f} in 100 photographs that it"
            f" was surest of, {in_100(surest['accuracy'])} answers were right."
        )
    return said


def _on_lesion(evidence: Evidence) -> dict[str, Any] | None:
    """Returns where the heat lies, and whether that is of another evaluation."""
    table, numbers = evidence.on_lesion, evidence.numbers
    if table is None:
        return None
    stale = any(numbers.get(key, table[key][0]) != table[key][0] for key in ("split", "step"))
    return {**on_lesion.summarise(table, evidence.predictions.classes), "stale": stale}


def _ood(judged: Predictions) -> dict[str, Any] | None:
    if "ood_score" not in judged.metadata:
        return None
    scores = judged.metadata["ood_score"].to_numpy(float)
    known = np.flatnonzero(~np.isnan(scores))
    if not len(known):
        return None
    highest = known[np.lexsort((judged.image_ids[known], -scores[known]))][:5]
    return {
        "num_images": len(known),
        "share": float((scores[known] > 1).mean()),
        "median": float(np.median(scores[known])),
        "scores": scores[known],
        "highest": [
            {"image_id": judged.image_ids[k], "truth": judged.truth[k], "score": scores[k]}
            for k in highest
        ],
    }


def _robustness(table: pd.DataFrame | None) -> dict[str, Any] | None:
    """Returns the clean row, the severities, and a row a corruption with its mean."""
    if table is None:
        return None
    clean, corrupted = table.iloc[0].to_dict(), table.iloc[1:]
    rows = []
    for name, of_name in corrupted.groupby("corruption", sort=False):
        cells = {row.severity: row._asdict() for row in of_name.itertuples(index=False)}
        rows.append({"name": name, "cells": cells, "mean": of_name["balanced_accuracy"].mean()})
    return {
        "clean": clean,
        "severities": sorted(corrupted["severity"].unique().tolist()),
        "rows": rows,
        "mean": corrupted["balanced_accuracy"].mean() if rows else None,
    }


def _hardest(judged: Predictions) -> list[dict[str, Any]]:
    """Returns the most confident wrong answers, the worst first."""
    wrong = np.flatnonzero(~metrics.correct_answers(judged))
    probabilities, truth = judged.probabilities, judged.truth
    confidence = probabilities.max(axis=1)
    order = wrong[np.lexsort((judged.image_ids[wrong], -confidence[wrong]))][:_NUM_HARDEST]
    return [
        {
            "image_id": judged.image_ids[row],
            "lesion_id": judged.lesion_ids[row],
            "truth": truth[row],
            "predicted": judged.classes.names[probabilities[row].argmax()],
            "confidence": confidence[row],
            "of_truth": probabilities[row, judged.labels[row]],
        }
        for row in order
    ]


def _panels(evidence: Evidence) -> dict[str, Any] | None:
    """Returns the panels, and whether they show another evaluation than the predictions."""
    numbers, panels = evidence.numbers, evidence.panels
    if panels is None:
        return None
    stale = any(numbers.get(key, panels[key]) != panels[key] for key in ("split", "step"))
    return {**panels, "stale": stale}


def _baseline(per_class: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what always giving the most frequent answer is worth."""
    counts = {dx: row["num_images"] for dx, row in per_class.items()}
    answer = max(counts, key=counts.__getitem__)
    return {
        "answer": answer,
        "accuracy": counts[answer] / sum(counts.values()),
        "balanced_accuracy": 1 / sum(count > 0 for count in counts.values()),
    }


def _key(config: Mapping[str, Any], path: str) -> Any:
    """Returns a configuration's value of a key; None where there is no such key."""
    return configuration.flatten(config).get(path)


def _model(config: Mapping[str, Any]) -> str:
    """Returns the network in words; empty where it is not known."""
    name = _key(config, "model.name")
    if not name:
        return ""
    source = _key(config, "model.pretrained")
    start = f"from {source}" if source else "from random weights"
    beside = ", with age, sex and site" if _key(config, "model.metadata") else ""
    return f"{name} {start}, {_key(config, 'augment.crop_px')} px{beside}"


def _methods(measured: Mapping[str, Any] | None) -> list[str]:
    """Returns the methods that were measured; an ensemble's own may be a mix of them."""
    if not measured:
        return []
    others = [name for name in measured if name not in ("method", "cross_fitted", "reliability")]
    return [name for name in dict.fromkeys((*calibrator.METHODS, *others)) if name in measured]


def _flagged(measured: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Returns the flagged gaps of `subgroups.measure`."""
    return [
        {"axis": axis, "name": name, "figure": figure, **gap}
        for axis, rows in (measured or {"axes": {}})["axes"].items()
        for name, row in rows.items()
        for figure, gap in row["gaps"].items()
        if gap["flagged"]
    ]


def _limits(split: str | None, judged: Predictions) -> list[str]:
    """Returns the sentences that keep a reader from taking the figures for more than they are."""
    classes = judged.classes
    of_split = {
        "val": "The best checkpoint was chosen on these photographs, so the figures are"
        " optimistically biased.",
        "crossval": "Each fold's best checkpoint was chosen on the photographs that it is measured"
        " on, so the figures are optimistically biased.",
        "test": "No weight, checkpoint or threshold was chosen on these photographs.",
        "train": "The network was trained on these very photographs: the figures say nothing about"
        " new ones.",
    }
    lesions = [len(set(judged.lesion_ids[judged.labels == k])) for k in range(len(classes))]
    few = [
        f"{dx} ({num})"
        for dx, num in zip(classes, lesions, strict=True)
        if num < subgroups.MIN_LESIONS
    ]
    of_ham10000 = (
        "HAM10000 was collected at clinics in Austria and Australia, with few kinds of camera.",
        "Not every truth was found by histology; the subgroups by method of diagnosis show the"
        " difference.",
    )
    return [
        *([of_split[split]] if split in of_split else []),
        *(
            [f"Few lesions of {', '.join(few)}: their figures are uncertain, see the intervals."]
            if few
            else []
        ),
        f"It knows {len(classes)} diagnoses. Any other disease, and healthy skin, gets one of"
        " them.",
        "How frequent each diagnosis is here depends on the data set. Where the frequencies are"
        " different, so are precision and calibration.",
        *(of_ham10000 if isic.knows(classes) else ()),
        "Skin colour is not recorded, so no figure can be given by it.",
    ]


def _provenance(numbers: Mapping[str, Any]) -> dict[str, str]:
    """Returns what was evaluated, and with what it was drawn."""
    named = {
        "step": "checkpoint, step",
        "weights": "weights",
        "tta": "views averaged",
        "tiles": "squares averaged",
        "crop_scale": "side of a square",
        "records": "fingerprint of the records",
    }
    return {
        **{title: str(numbers[key]) for key, title in named.items() if key in numbers},
        "drawn with": f"Python {platform.python_version()}, numpy {np.__version__}, scikit-learn"
        f" {sklearn.__version__}, matplotlib {matplotlib.__version__}",
    }


def _config_rows(config: Mapping[str, Any]) -> list[dict[str, str]]:
    """Returns key, value and default, texts, of each key of a configuration."""
    default = configuration.flatten(configuration.to_dict(configuration.base()))
    return [
        {"key": key, "value": json.dumps(value), "default": json.dumps(default.get(key))}
        for key, value in sorted(configuration.flatten(config).items())
    ]


def _figures(
    facts: Mapping[str, Any], judged: Predictions, calibrated: Calibrated | None
) -> dict[str, str]:
    best = judged.with_probabilities(calibrated.probabilities) if calibrated else judged
    drawn = {
        "roc": figures.roc(judged, facts["per_class"]),
        "precision_recall": figures.precision_recall(judged, facts["per_class"]),
        "risk": figures.risk_coverage(selective.risk_coverage(best)),
    }
    if facts["calibration"]:
        drawn["reliability"] = figures.reliability(
            facts["calibration"]["reliability"], facts["calibration"]["method"]
        )
    if calibrated and facts["decision"]["malignant"]["auc"] is not None:
        curve = selective.roc(judged, calibrated)
        drawn["malignancy"] = figures.malignancy(curve, facts["decision"]["malignant"])
    if facts["ood"]:
        drawn["ood"] = figures.ood_scores(facts["ood"]["scores"])
    return drawn


def _span(pair: list[float] | None, digits: int = 3, sign: str = "") -> str:
    if pair is None:
        return _NOTHING
    low, high = (f"{value:{sign}.{digits}f}" for value in pair)
    return f"{low} to {high}"


def _cell(text: Any) -> str:
    """Returns a text that means nothing but itself in a Markdown table."""
    return re.sub(r"([\\`*_|\[\]$~])", r"\\\1", html.escape(escape.shown(text), quote=False))


def _code(text: str) -> str:
    """Returns a text as code in Markdown, within more backticks than it has in a row."""
    text = escape.shown(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"
