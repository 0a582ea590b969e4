"""`--mode=predict`: seven probabilities for each photograph of a file, folder, glob or CSV.

With the run's calibration also a malignancy flag and a set of diagnoses, by thresholds that were
fixed on validation; and with its out-of-distribution model a mark on what is no such photograph.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ham_jax import CLASSES, DISCLAIMER, console, escape, files, parallel
from ham_jax.config import InputError
from ham_jax.data import image as image_files
from ham_jax.data import metadata, photographs
from ham_jax.evaluation import decision, evaluate, judgement, ood

_DECISIONS = ("malignant", "malignant_flag", "prediction_set")
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
      output: the CSV: path, prediction, the seven probabilities, malignant (the sum of the three
        malignant ones), malignant_flag, prediction_set, ood_score, ood (whether the photograph is
        unlike those of training), error, note. Flag and set are empty, as malignant is, where a
        run has no calibration; the two of ood, where no run has a model of it. After the
        photographs come, with an error, the files that by their names are none.
      overrides: (key, text) pairs of the command line.
      mesh: the devices.

    Returns:
      The number of photographs that could be read.

    Raises:
      InputError: no checkpoint, no photograph, nowhere to write, metadata that are none, or a
        damaged calibration.
    """
    found = photographs.find_images(images)
    paths = found.paths
    if not output.parent.is_dir():
        raise InputError(f"--output={output}: there is no folder {output.parent}.")
    members = evaluate.load_all(workdirs, overrides, mesh)
    fitted = _calibrations(members)
    codes = None
    if any(member.config.model.metadata for member in members):
        table = photographs.find_metadata(images, len(paths))
        codes = metadata.encode(table)
        metadata.warn_unknown(table)
        _tell_missing(codes, [name for name in metadata.COLUMNS if name not in table])
    canvases = [tuple(member.config.data.canvas) for member in members]
    detectors = [evaluate.saved_detector(member) for member in members]
    answers = np.empty((len(members), len(paths), len(CLASSES)))
    scores = np.empty(answers.shape[:2])
    for canvas in dict.fromkeys(canvases):  # each photograph is decoded once a canvas
        chosen = [n for n, other in enumerate(canvases) if other == canvas]
        answers[chosen], scores[chosen], errors = _classify(
            [members[n] for n in chosen], [detectors[n] for n in chosen], found.sources, codes, mesh
        )
    read = [number for number in range(len(paths)) if number not in errors]
    rows = dict(zip(read, _judged(members, fitted, answers[:, read]), strict=True))
    joined = ood.joined([s if d else None for s, d in zip(scores, detectors, strict=True)])
    if joined is not None:
        for number in read:
            rows[number] = dataclasses.replace(rows[number], ood_score=float(joined[number]))
    if parallel.is_main():
        _write(output, found, rows, errors)  # before anything is printed, so that it is there
        _print(found, rows, errors, output)
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
    sources: Sequence[Any],
    codes: np.ndarray | None,
    mesh: jax.sharding.Mesh,
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Returns the answers of members that share a canvas, and the errors by number of source.

    Args:
      members: of an ensemble.
      detectors: the members' out-of-distribution models, as far as they have one.
      sources: of the photographs, see `image.load`.
      codes: `metadata.encode`d, a row a source, where a member takes metadata.
      mesh: the devices.

    Returns:
      (probabilities float64 [members, sources, 7], nan where a photograph is unreadable;
      out-of-distribution scores float64 [members, sources], nan there and of members without such
      a model; {number of a source: why it is unreadable}).
    """
    config = members[0].config
    predictors = [evaluate.make_predictor(m.network, m.config, mesh) for m in members]
    extractors = [evaluate.make_extractor(m.network, m.config, mesh) for m in members]
    batch_size = config.eval.batch_size
    canvas = tuple(config.data.canvas)
    local = parallel.local_rows(mesh, batch_size)

    errors: dict[int, str] = {}
    probabilities = np.full((len(members), len(sources), len(CLASSES)), np.nan)
    scores = np.full((len(members), len(sources)), np.nan)
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
        decoded = image_files.load_many(sources, canvas, config.data.num_workers)
        for number, pixels in enumerate(decoded):
            if isinstance(pixels, image_files.ImageError):
                errors[number] = str(pixels)
            else:
                batch[len(waiting)] = pixels
                waiting.append(number)
            if len(waiting) == batch_size:
                flush()
            progress(number + 1, len(sources))
    if waiting:
        flush()
    return probabilities, scores, errors


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
    output: Path,
    found: photographs.Photographs,
    rows: Mapping[int, _Answer],
    errors: Mapping[int, str],
) -> None:
    empty = [""] * len((*CLASSES, *_DECISIONS, *_OOD))
    lines = [["path", "prediction", *CLASSES, *_DECISIONS, *_OOD, "error", "note"]]
    for number, path in enumerate(found.paths):
        if number in errors:
            answer = ["", *empty, escape.shown(errors[number])]
        else:
            row = rows[number].probabilities
            first = CLASSES[row.argmax()]
            marks = ["", ""]
            if rows[number].ood_score is not None:
                marks = [repr(rows[number].ood_score), "yes" if rows[number].unlike else "no"]
            answer = [first, *map(repr, row.tolist()), *rows[number].decisions, *marks, ""]
        lines.append([escape.shown(path), *answer, DISCLAIMER])
    for path, why in found.named():
        lines.append([escape.shown(path), "", *empty, why, DISCLAIMER])
    files.write_text(output, escape.csv_text(lines))


def _print(
    found: photographs.Photographs,
    rows: Mapping[int, _Answer],
    errors: Mapping[int, str],
    output: Path,
) -> None:
    shown = []
    paths = [*map(escape.shown, found.paths)]
    for number, path in enumerate(paths[:_SHOWN_ROWS]):
        if number in errors:
            shown.append([path, "unreadable", escape.shown(errors[number]), "", "", ""])
            continue
        probabilities = rows[number].probabilities
        _, flag, inside = rows[number].decisions
        first, second = np.argsort(-probabilities, kind="stable")[:2]
        shown.append(
            [
                path,
                f"{CLASSES[first]} {probabilities[first]:.2f}",
                f"{CLASSES[second]} {probabilities[second]:.2f}",
                flag,
                inside,
                "no" if rows[number].unlike else "",
            ]
        )
    more = f", the first {_SHOWN_ROWS} shown" if len(paths) > _SHOWN_ROWS else ""
    beside = f"; not looked at: {found.counted()}" if found.left_out else ""
    num_read = len(paths) - len(errors)
    title = f"{num_read} of {len(paths)} photographs read{more}{beside}. {DISCLAIMER}"
    columns = ["photograph", "answer", "next", "malignant?", "set for 90 %", "like training?"]
    console.print_table(title, columns, shown)
    num_unlike = sum(row.unlike for row in rows.values())
    if num_unlike:
        console.log_line(
            f"{num_unlike} of {len(rows)} photographs are unlike those of training: do not rely on"
            " what is said of them."
        )
    console.print_table("Written", ["", ""], [["probabilities", str(output)]])
