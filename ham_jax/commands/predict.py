"""`--mode=predict`: the probability of each diagnosis for each photograph, as a CSV.

With the run's calibration also a malignancy flag and a set of diagnoses, by thresholds that were
fixed on validation; and with its out-of-distribution model a mark on what is no such photograph.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from ham_jax import DISCLAIMER, console, escape, files, parallel
from ham_jax.classes import Classes
from ham_jax.config import InputError
from ham_jax.data import metadata, photographs
from ham_jax.inference import decision
from ham_jax.model import Answer, Answers, Ensemble, restore_all

_OOD = ("ood_score", "ood")
_SHOWN_ROWS = 10

# Columns of the terminal: of all, and within them of a diagnosis with its probability and of the
# others in its set.
_WIDTH, _DIAGNOSIS, _OTHERS = 80, 25, 18
_FLAG = "malignant?"
_UNLIKE = "unlike the photographs of training, so not named here"


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
        ood_score, ood (whether the photograph is unlike those of training), error, note (in the
        first row alone: the disclaimer, and what the sets promise). Numbers have six digits. Flag,
        sum and set are empty where a run has no calibration, and flag and sum where no class is
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
    answers = ensemble.predict(found.sources, table)
    if parallel.is_main():
        rows = [_row(answer, answers.classes) for answer in answers]
        _write(output, found, answers, rows)  # before anything is printed, so that it is there
        _print(found, answers, output)
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
        decisions[:2] = _rounded(answer.malignancy), "yes" if answer.flagged else "no"
    if answer.ood_score is not None:
        marks = [f"{answer.ood_score:.6g}", "yes" if answer.unlike else "no"]
    return [answer.prediction, *map(_rounded, answer.probabilities.values()), *decisions, *marks]


def _rounded(probability: float) -> str:
    return f"{probability:.6f}"


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
        lines.append([escape.shown(path), *row, error, ""])
    empty = [""] * (len(header) - 3)
    for path, why in found.named():
        lines.append([escape.shown(path), *empty, why, ""])
    note = answers.calibrated and decision.sets_note(answers.calibrated.choice, answers.classes)
    lines[1][-1] = f"{DISCLAIMER} {note or ''}".strip()
    files.write_text(output, escape.csv_text(lines))


def _print(found: photographs.Photographs, answers: Answers, output: Path) -> None:
    """Prints a line a photograph, within _WIDTH columns of the terminal, and what it means."""
    num_read, num = len(answers.read), len(found.paths)
    more = f", the first {_SHOWN_ROWS} shown" if num > _SHOWN_ROWS else ""
    beside = f"; not looked at: {found.counted()}" if found.left_out else ""
    note = answers.calibrated and decision.sets_note(answers.calibrated.choice, answers.classes)
    said = [f"{num_read} of {num} photographs read{more}{beside}. {DISCLAIMER}"]
    said += _lines(_short_names(found.paths)[:_SHOWN_ROWS], answers)
    said += [note] if note else []
    console.print_lines([*said, f"All probabilities: {output}"], _WIDTH)
    if num_unlike := int(answers.unlike.sum()):
        console.log_line(
            f"{num_unlike} of {num_read} photographs are unlike those of training: do not rely on"
            f" what {output.name} says of them."
        )


def _short_names(paths: Sequence[str]) -> list[str]:
    """Returns paths, visible, without the folders that all of them are in."""
    absolute = [os.path.abspath(path) for path in paths]
    common = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return [escape.shown(os.path.relpath(path, common)) for path in absolute]


def _lines(names: Sequence[str], answers: Answers) -> list[str]:
    """Returns a header and a line a photograph, of the first of the answers."""
    classes, decided = answers.classes, answers.calibrated is not None
    room = _WIDTH - len("! ") - _DIAGNOSIS - 2
    most = room - (len(_FLAG) + 2 + _OTHERS + 2 if decided else 0)
    width = max(6, min(most, max(map(console.columns, ["photograph", *names]))))
    others_width = room - width - len(_FLAG) - 4

    def line(name: str, diagnosis: str, flag: str = "", others: Sequence[str] = ()) -> str:
        cells = [f"  {console.fit(name, width)}", console.fit(diagnosis, _DIAGNOSIS)]
        if decided:
            cells += [console.fit(flag, len(_FLAG)), _listed(others, others_width)]
        return "  ".join(cells).rstrip()

    flag = _FLAG if classes.malignant else ""
    lines = [line("photograph", "most likely", flag, ["may also be"])]
    for name, answer in zip(names, answers, strict=False):
        if answer.error or answer.unlike:
            why = f"unreadable: {escape.shown(answer.error)}" if answer.error else _UNLIKE
            mark = "  " if answer.error else "! "
            text = f"{mark}{console.fit(name, width)}  "
            lines.append(text + console.fit(why, _WIDTH - console.columns(text)).rstrip())
            continue
        probabilities = answer.probabilities
        title = console.fit(_short(classes, answer.prediction), _DIAGNOSIS - 5)
        inside = sorted(answer.prediction_set or (), key=probabilities.__getitem__, reverse=True)
        lines.append(
            line(
                name,
                f"{title.rstrip()} {probabilities[answer.prediction]:.2f}",
                {None: "", True: "yes", False: "no"}[answer.flagged],
                [_short(classes, dx) for dx in inside if dx != answer.prediction],
            )
        )
    return lines


def _short(classes: Classes, name: str) -> str:
    """Returns a diagnosis in words, without what its title adds after a comma."""
    return escape.shown(classes.title(name).split(",")[0])


def _listed(texts: Sequence[str], width: int) -> str:
    """Returns as many of the texts as there is room for, and how many more there are."""
    for num in range(len(texts), 0, -1):
        more = [f"+{len(texts) - num}"] if num < len(texts) else []
        if console.columns(line := ", ".join([*texts[:num], *more])) <= width:
            return line
    if not texts:
        return ""
    more = f", +{len(texts) - 1}" if len(texts) > 1 else ""
    return console.fit(texts[0], width - len(more)).rstrip() + more
