"""`--mode=predict`: the probability of each diagnosis for each photograph, as a CSV.

With the run's calibration also a malignancy flag and a set of diagnoses, by thresholds that were
fixed on validation; and with its out-of-distribution model a mark on what is no such photograph.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from ham_jax import DISCLAIMER, console, escape, files, parallel
from ham_jax.classes import Classes
from ham_jax.config import InputError
from ham_jax.data import metadata, photographs
from ham_jax.model import Answer, Answers, Ensemble, restore_all

_OOD = ("ood_score", "ood")
_SHOWN_ROWS = 10


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
      images: see `photographs.find_images`.
      output: the CSV: path, prediction, the probability of each class, malignant (the sum of the
        malignant ones; any_malignant where a class has that name), malignant_flag, prediction_set,
        ood_score, ood (whether the photograph is unlike those of training), error, note. Flag, sum
        and set are empty where a run has no calibration, and flag and sum where no class is
        malignant; the two of ood, where no run has a model of it. After the photographs come, with
        an error, the files that by their names are none.
      overrides: (key, text) pairs of the command line.
      mesh: the devices.

    Returns:
      The number of photographs that could be read.

    Raises:
      InputError: no checkpoint, no photograph, nowhere to write, invalid metadata, or a damaged
        calibration.
    """
    found = photographs.find_images(images)
    if not output.parent.is_dir():
        raise InputError(f"--output={output}: there is no folder {output.parent}.")
    ensemble, table = Ensemble(restore_all(workdirs, overrides, mesh)).with_decisions(), None
    if ensemble.takes_metadata:
        table = photographs.find_metadata(images, len(found.paths))
        metadata.warn_unknown(table)
        _tell_missing(
            metadata.encode(table),
            [name for name in metadata.COLUMNS if name not in table],
        )
    answers = ensemble.predict(found.sources, table, exact=True)
    if parallel.is_main():
        rows = [_row(answer, answers.classes) for answer in answers]
        _write(output, found, answers, rows)  # before anything is printed, so that it is there
        _print(found, answers, rows, output)
    return len(answers.read)


def _row(answer: Answer, classes: Classes) -> list[str]:
    """Returns the texts of prediction, probabilities, `_decisions` and _OOD."""
    decisions, marks = ["", "", ""], ["", ""]
    if answer.error:
        return ["", *[""] * len(classes), *decisions, *marks]
    if answer.prediction_set is not None:
        between = "; " if any(" " in name for name in classes) else " "
        decisions[2] = between.join(answer.prediction_set) or "empty"
    if answer.malignancy is not None:
        decisions[:2] = repr(answer.malignancy), "yes" if answer.flagged else "no"
    if answer.ood_score is not None:
        marks = [repr(answer.ood_score), "yes" if answer.unlike else "no"]
    return [answer.prediction, *map(repr, answer.probabilities.values()), *decisions, *marks]


def _decisions(classes: Classes) -> tuple[str, ...]:
    """Returns the columns that the calibration fills."""
    is_class = "malignant" in (name.lower() for name in classes)
    return "any_malignant" if is_class else "malignant", "malignant_flag", "prediction_set"


def _tell_missing(codes: np.ndarray, absent: Sequence[str]) -> None:
    num_without = int((codes == metadata.MISSING).all(1).sum())
    if num_without and parallel.is_main():
        console.log_line(
            f"The network also takes age, sex and site, which {num_without} of {len(codes)}"
            " photographs come without: give a CSV with columns path, age, sex, localization."
        )
    if 0 < len(absent) < len(metadata.COLUMNS) and parallel.is_main():
        console.log_line(f"--images has no column for {', '.join(absent)}: they count as unknown.")


def _write(
    output: Path, found: photographs.Photographs, answers: Answers, rows: Sequence[list[str]]
) -> None:
    header = [
        "path",
        "prediction",
        *answers.classes,
        *_decisions(answers.classes),
        *_OOD,
        "error",
        "note",
    ]
    lines = [header]
    for number, (path, row) in enumerate(zip(found.paths, rows, strict=True)):
        error = escape.shown(answers.errors.get(number, ""))
        lines.append([escape.shown(path), *row, error, DISCLAIMER])
    empty = [""] * (len(header) - 3)
    for path, why in found.named():
        lines.append([escape.shown(path), *empty, why, DISCLAIMER])
    files.write_text(output, escape.csv_text(lines))


def _print(
    found: photographs.Photographs, answers: Answers, rows: Sequence[list[str]], output: Path
) -> None:
    shown, names = [], answers.classes.names
    paths = [*map(escape.shown, found.paths)]
    for number, path in enumerate(paths[:_SHOWN_ROWS]):
        if number in answers.errors:
            shown.append([path, "unreadable", escape.shown(answers.errors[number]), "", "", ""])
            continue
        probabilities = answers.probabilities[number]
        _, flag, inside = rows[number][1 + len(names) :][:3]
        first, second = np.argsort(-probabilities, kind="stable")[:2]
        shown.append(
            [
                path,
                f"{names[first]} {probabilities[first]:.2f}",
                f"{names[second]} {probabilities[second]:.2f}",
                flag,
                inside,
                "no" if answers.unlike[number] else "",
            ]
        )
    more = f", the first {_SHOWN_ROWS} shown" if len(paths) > _SHOWN_ROWS else ""
    beside = f"; not looked at: {found.counted()}" if found.left_out else ""
    num_read = len(answers.read)
    title = f"{num_read} of {len(paths)} photographs read{more}{beside}. {DISCLAIMER}"
    columns = ["photograph", "answer", "next", "malignant?", "set for 90 %", "like training?"]
    console.print_table(title, columns, shown)
    if num_unlike := int(answers.unlike.sum()):
        console.log_line(
            f"{num_unlike} of {num_read} photographs are unlike those of training: do not rely on"
            " what is said of them."
        )
    console.print_table("Written", ["", ""], [["probabilities", str(output)]])
