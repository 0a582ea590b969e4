"""`--mode=predict`: seven probabilities for each photograph of a file, folder, glob or CSV.

With the run's calibration also a malignancy flag and a set of diagnoses, by thresholds that were
fixed on validation; and with its out-of-distribution model a mark on what is no such photograph.
"""

import csv
import dataclasses
import glob
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import pandas as pd

from ham_jax import CLASSES, DISCLAIMER, console, files, parallel
from ham_jax.config import InputError
from ham_jax.data import image as image_files
from ham_jax.data import metadata
from ham_jax.evaluation import decision, evaluate, judgement, ood

_PATH_COLUMNS = ("path", "image", "file", "filename", "image_path")
_METADATA_COLUMNS = {  # what a list may call them
    "age": ("age", "age_approx"),
    "sex": ("sex",),
    "localization": ("localization", "site", "anatom_site_general"),
}
_DECISIONS = ("malignant", "malignant_flag", "prediction_set")
_OOD = ("ood_score", "ood")
_SHOWN_ROWS = 10


def find_images(pattern: str) -> list[Path]:
    """Returns the photographs that `--images` names, sorted, each once.

    Args:
      pattern: a file, a folder (searched through), a glob, or a CSV with a column `path` (a
        relative one counts from the CSV's folder, or else from the current folder).

    Raises:
      InputError: nothing there.
    """
    path = Path(pattern)
    if path.suffix.lower() == ".csv" and path.is_file():
        return _from_csv(path)
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.suffix.lower() in image_files.SUFFIXES]
        found = [p for p in found if p.is_file() and not p.name.startswith(".")]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]
    if not found:
        raise InputError(
            f"--images={pattern}: no image found. Give a file, a folder or a glob of"
            f" {', '.join(sorted(image_files.SUFFIXES))}, or a CSV with a column 'path'."
        )
    return sorted(set(found))


def find_metadata(pattern: str, num_images: int) -> pd.DataFrame:
    """Returns what the CSV `--images` tells beside the paths; nothing where it is no CSV.

    Args:
      pattern: see `find_images`.
      num_images: how many photographs that found.

    Returns:
      A row a photograph, in the order of `find_images`: those of age in years (nan where not
      known), sex and localization that the CSV has.

    Raises:
      InputError: an age that is none, or two rows that say different things of a photograph.
    """
    path = Path(pattern)
    if path.suffix.lower() != ".csv" or not path.is_file() or not num_images:
        return pd.DataFrame(index=range(num_images))
    rows, column = _rows(path)
    names = {
        name: next((alias for alias in aliases if alias in rows[0]), None)
        for name, aliases in _METADATA_COLUMNS.items()
    }
    listed, faults = {}, []
    for row in rows:
        known = {name: (row[given] or "").strip() for name, given in names.items() if given}
        if "age" in known:
            try:
                known["age"] = _years(known["age"])
            except ValueError:
                faults.append(
                    f"--images={path}: {row[column]}: {names['age']} {known['age']!r} must be years"
                    " from 0 to 120, or empty."
                )
        if listed.setdefault(row[column], known) != known:
            faults.append(f"--images={path}: {row[column]} is listed twice and differently.")
    if faults:
        raise InputError(faults[:10])
    table = pd.DataFrame(listed.values(), index=range(num_images))
    return table.astype({"age": float}) if "age" in table else table


def run(
    workdirs: Sequence[Path],
    images: str,
    output: Path,
    overrides: list[tuple[str, str]],
    mesh: jax.sharding.Mesh,
) -> int:
    """Classifies the photographs, writes a CSV and prints a short table.

    An unreadable photograph gets a row with its error, and the rest go on. Of several runs the
    answer is the mean of their probabilities, each with its own preprocessing and calibration.

    Args:
      workdirs: one training run, or the members of an ensemble.
      images: see `find_images`.
      output: the CSV: path, prediction, the seven probabilities, malignant (the sum of the three
        malignant ones), malignant_flag, prediction_set, ood_score, ood (whether the photograph is
        unlike those of training), error, note. Flag and set are empty, as malignant is, where a
        run has no calibration; the two of ood, where no run has a model of it.
      overrides: (key, text) pairs of the command line.
      mesh: the devices.

    Returns:
      The number of photographs that could be read.

    Raises:
      InputError: no checkpoint, no photograph, nowhere to write, metadata that are none, or a
        damaged calibration.
    """
    paths = find_images(images)
    if not output.parent.is_dir():
        raise InputError(f"--output={output}: there is no folder {output.parent}.")
    members = evaluate.load_all(workdirs, overrides, mesh)
    fitted = _calibrations(members)
    codes = None
    if any(member.config.model.metadata for member in members):
        table = find_metadata(images, len(paths))
        codes = metadata.encode(table)
        metadata.announce(table)
        _tell_missing(codes, [name for name in _METADATA_COLUMNS if name not in table])
    canvases = [tuple(member.config.data.canvas) for member in members]
    detectors = [evaluate.saved_detector(member) for member in members]
    answers = np.empty((len(members), len(paths), len(CLASSES)))
    scores = np.empty(answers.shape[:2])
    for canvas in dict.fromkeys(canvases):  # each photograph is decoded once a canvas
        chosen = [n for n, other in enumerate(canvases) if other == canvas]
        answers[chosen], scores[chosen], errors = _classify(
            [members[n] for n in chosen], [detectors[n] for n in chosen], paths, codes, mesh
        )
    read = [number for number in range(len(paths)) if number not in errors]
    rows = dict(zip(read, _judged(members, fitted, answers[:, read]), strict=True))
    joined = ood.joined([s if d else None for s, d in zip(scores, detectors, strict=True)])
    if joined is not None:
        for number in read:
            rows[number] = dataclasses.replace(rows[number], ood_score=float(joined[number]))
    if parallel.is_main():
        _write(output, paths, rows, errors)
        _print(paths, rows, errors, output)
    return len(paths) - len(errors)


@dataclasses.dataclass(frozen=True)
class _Answer:
    """What is said of a photograph.

    Attributes:
      probabilities: float64 [7].
      decisions: texts of the columns `_DECISIONS`.
      ood_score: see `ood.Detector.score`; None where no run has such a model.
    """

    probabilities: np.ndarray
    decisions: tuple[str, ...]
    ood_score: float | None = None

    @property
    def unlike(self) -> bool:
        """Whether the photograph is unlike those of training."""
        return self.ood_score is not None and self.ood_score > 1


def _calibrations(members: Sequence[evaluate.Trained]) -> list[judgement.Fitted | None]:
    """Returns the calibration of each run that has one, and says what a person must know of it."""
    read = [judgement.read(member.workdir) for member in members]
    fitted = []
    for member, found in zip(members, read, strict=True):
        about = evaluate.settings(member.config, member.step, member.weights)
        fitted.append(found[0] if evaluate.tell_calibration(member, found, about) else None)
    if len(members) > 1 and None not in fitted and parallel.is_main():
        console.log_line(
            f"Flag and sets go by the mean of {len(members)} runs' thresholds. Each run's were"
            " fixed for its own probabilities; for their mean nothing was measured."
        )
    return fitted


def _judged(
    members: Sequence[evaluate.Trained],
    fitted: Sequence[judgement.Fitted | None],
    answers: np.ndarray,
) -> list[_Answer]:
    """Returns what is said of each photograph, from raw probabilities [members, n, 7]."""
    if None in fitted:
        calibrated = [
            judgement.apply(own, member.config.eval.calibration, rows).probabilities
            if own
            else rows
            for member, own, rows in zip(members, fitted, answers, strict=True)
        ]
        return [_Answer(row, ("",) * len(_DECISIONS)) for row in np.mean(calibrated, axis=0)]
    judged = judgement.mean(
        [
            judgement.apply(own, member.config.eval.calibration, rows)
            for member, own, rows in zip(members, fitted, answers, strict=True)
        ]
    )
    score = decision.malignancy(judged.probabilities)
    flagged = score >= judged.thresholds["malignant"]
    # Those that cover 90 % of each diagnosis: sets that cover 90 % of all are shorter, but buy it
    # with the rare ones, melanoma among them.
    inside = decision.sets(judged.probabilities, judged.thresholds, "class_conditional")[:, 0]
    return [
        _Answer(
            judged.probabilities[n],
            (
                repr(float(score[n])),
                "yes" if flagged[n] else "no",
                " ".join(np.array(CLASSES)[inside[n]]) or "empty",
            ),
        )
        for n in range(len(score))
    ]


def _classify(
    members: Sequence[evaluate.Trained],
    detectors: Sequence[ood.Detector | None],
    paths: Sequence[Path],
    codes: np.ndarray | None,
    mesh: jax.sharding.Mesh,
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Returns the answers of members that share a canvas, and the errors by number of path.

    Args:
      members: of an ensemble.
      detectors: the members' out-of-distribution models, as far as they have one.
      paths: of the photographs.
      codes: `metadata.encode`d, a row a path, where a member takes metadata.
      mesh: the devices.

    Returns:
      (probabilities float64 [members, paths, 7], nan where a photograph is unreadable;
      out-of-distribution scores float64 [members, paths], nan there and of members without such a
      model; {number of a path: why it is unreadable}).
    """
    config = members[0].config
    predictors = [evaluate.make_predictor(m.network, m.config, mesh) for m in members]
    extractors = [evaluate.make_extractor(m.network, m.config, mesh) for m in members]
    batch_size = config.eval.batch_size
    canvas = tuple(config.data.canvas)
    local = parallel.local_rows(mesh, batch_size)

    errors: dict[int, str] = {}
    probabilities = np.full((len(members), len(paths), len(CLASSES)), np.nan)
    scores = np.full((len(members), len(paths)), np.nan)
    batch = np.zeros((batch_size, *canvas, 3), np.uint8)
    waiting: list[int] = []

    def flush() -> None:
        image = parallel.shard(mesh, batch[local])
        beside = None
        if codes is not None:
            # The last rows of a batch that is not full are nobody's, whatever they hold.
            beside = parallel.shard(mesh, codes[np.resize(waiting, batch_size)[local]])
        for number, (predict, member) in enumerate(zip(predictors, members, strict=True)):
            given = {"metadata": beside} if member.config.model.metadata else {}
            answers = np.asarray(predict(member.variables, image, **given))[: len(waiting)]
            probabilities[number, waiting] = evaluate.normalised(answers)
            if detectors[number] is not None:
                features = np.asarray(extractors[number](member.variables, image))[: len(waiting)]
                scores[number, waiting] = detectors[number].score(features)
        waiting.clear()

    with console.progress("Predicting") as progress:
        decoded = image_files.load_many(paths, canvas, config.data.num_workers)
        for number, pixels in enumerate(decoded):
            if isinstance(pixels, image_files.ImageError):
                errors[number] = str(pixels)
            else:
                batch[len(waiting)] = pixels
                waiting.append(number)
            if len(waiting) == batch_size:
                flush()
            progress(number + 1, len(paths))
    if waiting:
        flush()
    return probabilities, scores, errors


def _from_csv(path: Path) -> list[Path]:
    rows, column = _rows(path)
    listed = dict.fromkeys(row[column] for row in rows)
    beside = [path.parent / name for name in listed]
    return [b if b.exists() else Path(name) for b, name in zip(beside, listed, strict=True)]


def _rows(path: Path) -> tuple[list[dict[str, str]], str]:
    """Returns the rows of a CSV that name a photograph, and the column that does."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
            rows = list(reader)
    except (OSError, UnicodeError, csv.Error) as error:
        raise InputError(f"--images={path} cannot be read as a CSV in UTF-8: {error}.") from error
    names = rows[0].keys() if rows else ()
    column = next((name for name in _PATH_COLUMNS if name in names), None)
    if column is None:
        raise InputError(
            f"--images={path}: no column of paths; one must be called"
            f" {', '.join(_PATH_COLUMNS)}. Found: {', '.join(names) or 'no rows'}."
        )
    return [row for row in rows if row[column]], column


def _years(text: str) -> float:
    """Returns an age, nan where it is not known.

    Raises:
      ValueError: that is no age.
    """
    if text.lower() in metadata.UNKNOWN:
        return math.nan
    age = float(text)
    if not 0 <= age <= 120:
        raise ValueError
    return age


def _tell_missing(codes: np.ndarray, absent: Sequence[str]) -> None:
    num_without = int((codes == metadata.MISSING).all(1).sum())
    if num_without and parallel.is_main():
        console.log_line(
            f"The network also takes age, sex and site, which {num_without} of {len(codes)}"
            " photographs come without: give a CSV with columns path, age, sex, localization."
        )
    if 0 < len(absent) < len(_METADATA_COLUMNS) and parallel.is_main():
        console.log_line(f"--images has no column for {', '.join(absent)}: they count as unknown.")


def _write(output: Path, paths, rows: Mapping[int, _Answer], errors) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "prediction", *CLASSES, *_DECISIONS, *_OOD, "error", "note"])
    for number, path in enumerate(paths):
        if number in errors:
            empty = [""] * len((*CLASSES, *_DECISIONS, *_OOD))
            answer = ["", *empty, errors[number]]
        else:
            row = rows[number].probabilities
            first = CLASSES[row.argmax()]
            marks = ["", ""]
            if rows[number].ood_score is not None:
                marks = [repr(rows[number].ood_score), "yes" if rows[number].unlike else "no"]
            answer = [first, *map(repr, row.tolist()), *rows[number].decisions, *marks, ""]
        writer.writerow([path, *answer, DISCLAIMER])
    files.write_text(output, text.getvalue())


def _print(paths, rows: Mapping[int, _Answer], errors, output: Path) -> None:
    shown = []
    for number, path in enumerate(paths[:_SHOWN_ROWS]):
        if number in errors:
            shown.append([str(path), "unreadable", errors[number], "", "", ""])
            continue
        probabilities = rows[number].probabilities
        _, flag, inside = rows[number].decisions
        first, second = np.argsort(-probabilities, kind="stable")[:2]
        shown.append(
            [
                str(path),
                f"{CLASSES[first]} {probabilities[first]:.2f}",
                f"{CLASSES[second]} {probabilities[second]:.2f}",
                flag,
                inside,
                "no" if rows[number].unlike else "",
            ]
        )
    more = f", the first {_SHOWN_ROWS} shown" if len(paths) > _SHOWN_ROWS else ""
    title = f"{len(paths) - len(errors)} of {len(paths)} photographs read{more}. {DISCLAIMER}"
    columns = ["photograph", "answer", "next", "malignant?", "set for 90 %", "like training?"]
    console.print_table(title, columns, shown)
    num_unlike = sum(row.unlike for row in rows.values())
    if num_unlike:
        console.log_line(
            f"{num_unlike} of {len(rows)} photographs are unlike those of training: do not rely on"
            " what is said of them."
        )
    console.print_table("Written", ["", ""], [["probabilities", str(output)]])
