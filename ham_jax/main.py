"""Flags, start-up order and `--mode`; nothing else.

python -m ham_jax.main --config=configs/resnet.py
python -m ham_jax.main --config=configs/resnet.py:50 --config.train.batch_size=128
python -m ham_jax.main --mode=crossval --config=configs/resnet.py --workdir=runs/folds
python -m ham_jax.main --mode=eval --workdir=runs/resnet --split=val
python -m ham_jax.main --mode=eval --workdir=runs/a,runs/b --split=test --output=runs/both
python -m ham_jax.main --mode=robustness --workdir=runs/resnet
python -m ham_jax.main --mode=predict --workdir=runs/resnet --images=photographs/
python -m ham_jax.main --mode=explain --workdir=runs/resnet --split=val
python -m ham_jax.main --mode=report --workdir=runs/resnet
python -m ham_jax.main --mode=compare --predictions runs/a/predictions.csv runs/b/predictions.csv
"""

import os
import re
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging

from ham_jax import config as configuration
from ham_jax import escape, files
from ham_jax.config import InputError

_CONFIG = flags.DEFINE_string(
    "config", None, "A file of configs/, with :argument for a variant; --config.a.b=c sets one key."
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    [
        *("train", "crossval", "prepare", "eval", "robustness"),
        *("explain", "report", "compare", "predict"),
    ],
    "What to do.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where a run's files are. Default: runs/<name of the config file>. Several, with commas"
    " between: --mode=eval, robustness and predict average their probabilities.",
)
_SPLIT = flags.DEFINE_enum(
    "split", "val", ["val", "test", "train"], "What --mode=eval, robustness and explain look at."
)
_IMAGES = flags.DEFINE_string(
    "images",
    None,
    "--mode=predict, and explain for your own: a file, a folder, a glob or a CSV with a column"
    " 'path'.",
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "--mode=predict: the CSV to write. Default: <workdir>/predict.csv. --mode=eval and"
    " robustness: the folder to write into. Default: <workdir>. Several runs have no default."
    " --mode=report: the HTML file. Default: <workdir>/report.html.",
)
_PREDICTIONS = flags.DEFINE_string(
    "predictions", None, "--mode=compare: two or more predictions.csv of the same images."
)
_TRAINS = ("train", "crossval")
_EVALUATES = ("eval", "robustness")
_OWN_FILE = {"predict": "predict.csv", "report": "report.html"}  # where there is no --output

_BAD_INPUT, _SYSTEM_FAILED = 2, 1  # exit codes
_overrides: list[tuple[str, str]] = []  # (key, text) of each --config.key=text


def split_overrides(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Takes `--config.a.b=c` and `--config.a.b c` out of a command line.

    Returns:
      The other arguments, and (key, text) pairs. A key without a value gets an empty text.
    """
    others, pairs = [], []
    arguments = iter(argv)
    for argument in arguments:
        match = re.fullmatch(r"--?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            others.append(argument)
        else:
            key, text = match.groups()
            pairs.append((key, next(arguments, "") if text is None else text))
    return others, pairs


def main(argv: list[str]) -> None:
    """Checks the whole input, then starts what is heavy and does what `--mode` says."""
    words = argv[1:]
    faults: list[str] = []
    given = _Paths(faults)
    if _MODE.value == "compare":  # `--predictions A.csv B.csv`, as a person would write it
        words, given.predictions = [], given.predictions + words
    faults += [f"{word!r}: every argument must be a --flag." for word in words]
    faults += _flag_faults(given)
    config = None
    if given.config and _MODE.value in (*_TRAINS, "prepare"):
        config = configuration.load(given.config)
        faults += _config_faults(config)
    if faults:
        raise InputError(faults)
    if _MODE.value == "compare":
        from ham_jax.evaluation import compare

        compare.run(given.predictions)
        return
    workdirs = [Path(folder) for folder in given.workdirs or [_default_workdir(given.config)]]
    workdir = workdirs[0]
    output = Path(given.output) if given.output else None
    if _MODE.value == "report":
        _check_writable(workdir, output)
        from ham_jax.evaluation import report

        report.run(workdir, output)
        return

    logging.set_verbosity(logging.WARNING)  # libraries' own notes; ours go through console
    from ham_jax import console, parallel  # from here on, seconds of imports

    parallel.initialize()
    parallel.compile_cache()
    parallel.on_main(lambda: _check_writable(workdir, output))
    mesh = parallel.mesh()
    if _MODE.value in _TRAINS:
        from ham_jax.training import crossval, loop

        configuration.validate(config, mesh.devices.size)
        train = loop.train if _MODE.value == "train" else crossval.train
        with parallel.Preemption() as preemption:
            try:
                train(config, workdir, mesh, preemption)
            except loop.Preempted as stopped:
                console.log_line(f"ham_jax: {stopped}")
                sys.exit(stopped.exit_code)
    elif _MODE.value == "prepare":
        from ham_jax.data import prepare

        data = prepare.prepare(config)
        if parallel.is_main():
            workdir.mkdir(parents=True, exist_ok=True)
            data.audit.write(workdir)
            print(data.audit.text())
            written = [["audit", f"{workdir}/audit.csv, audit.json"]]
            console.print_table("Written", ["", ""], written)
    elif _MODE.value in _EVALUATES:
        from ham_jax.evaluation import evaluate, robustness

        look = evaluate.run if _MODE.value == "eval" else robustness.run
        look(workdirs, _SPLIT.value, _overrides, mesh, output)
    elif _MODE.value == "explain":
        from ham_jax.evaluation import explain

        if given.images:
            explain.run_on_photographs(workdir, given.images, _overrides, mesh)
        else:
            explain.run(workdir, _SPLIT.value, _overrides, mesh)
    else:
        from ham_jax.commands import predict

        output = output or workdir / _OWN_FILE["predict"]
        if not predict.run(workdirs, given.images, output, _overrides, mesh):
            raise InputError("No photograph could be read; the CSV says why of each.")


class _Paths:
    """The flags that name files and folders, expanded.

    Attributes:
      config: with its variant, or None.
      workdirs: none where the flag was not given.
      images, output: or None.
      predictions: none where the flag was not given.
    """

    def __init__(self, faults: list[str]):
        """Adds to `faults` what cannot be expanded."""

        def expanded(text: str | None, flag: str) -> str | None:
            try:
                return configuration.expand(text, flag) if text else text
            except InputError as error:
                faults.extend(error.faults)
                return text

        def several(text: str | None, flag: str) -> list[str]:
            if text is None:
                return []
            parts = [text] if os.path.exists(text) else text.split(",")  # a comma may be in a name
            return [expanded(part.strip(), flag) for part in parts]

        self.config = expanded(_CONFIG.value, "--config")
        self.workdirs = several(_WORKDIR.value, "--workdir")
        self.images = expanded(_IMAGES.value, "--images")
        self.output = expanded(_OUTPUT.value, "--output")
        self.predictions = several(_PREDICTIONS.value, "--predictions")


def _flag_faults(given: _Paths) -> list[str]:
    mode, workdirs = _MODE.value, given.workdirs
    faults = []
    if mode in (*_TRAINS, "prepare") and not given.config:
        faults.append(
            f"--mode={mode} needs --config: configs/resnet.py for HAM10000, configs/demo.py for"
            " synthetic lesions that need no data."
        )
    reads = (*_EVALUATES, "predict", "explain", "report")
    if mode in reads and not workdirs and not given.config:
        faults.append(f"--mode={mode} needs --workdir, the folder of a training run.")
    if not all(workdirs):
        faults.append(f"--workdir={','.join(workdirs)} names a folder without a name.")
    if len(workdirs) > 1:
        if mode not in (*_EVALUATES, "predict"):
            faults.append(
                f"--mode={mode} works in one --workdir, not in {len(workdirs)}, which commas"
                " separate."
            )
        elif not given.output:
            what = "folder to write into" if mode in _EVALUATES else "CSV to write"
            faults.append(f"--mode={mode} of {len(workdirs)} runs needs --output, the {what}.")
    if mode == "compare" and len(given.predictions) < 2:
        faults.append("--mode=compare needs --predictions: two or more files, A.csv B.csv.")
    if mode == "predict" and not given.images:
        faults.append("--mode=predict needs --images: a file, a folder, a glob or a CSV.")
    return faults


def _check_writable(workdir: Path, output: Path | None) -> None:
    """Checks that what the mode will write can be written, before any work is done.

    Raises:
      InputError: it cannot.
    """
    mode, flag = _MODE.value, "--output" if output else "--workdir"
    if mode in (*_TRAINS, "prepare"):
        faults = files.faults_of_folder(workdir / "checkpoints", "--workdir")
    elif not output and not workdir.is_dir():
        return  # no run is there to be read, which reading it will say
    elif mode in _OWN_FILE:
        faults = files.faults_of_file(output or workdir / _OWN_FILE[mode], flag)
    elif mode == "explain":
        faults = files.faults_of_folder(workdir / "explanations", "--workdir")
    else:
        faults = files.faults_of_folder(output or workdir, flag)
    if faults:
        raise InputError(faults)


def _config_faults(config) -> list[str]:
    faults = configuration.override(config, _overrides)
    try:
        configuration.validate(config)
    except InputError as error:
        faults += error.faults
    if _MODE.value == "crossval":
        if config.data.split_csv:
            faults.append("--mode=crossval makes folds itself: leave out data.split_csv.")
        if config.data.fold or any(key == "data.fold" for key, _ in _overrides):
            faults.append("--mode=crossval trains every fold: leave out data.fold.")
    return faults


def _default_workdir(config: str) -> str:
    file, variant = configuration.split_flag(config)
    return "runs/" + "-".join(filter(None, [Path(file).stem, variant]))


def run() -> None:
    """Entry point: what a person can mend ends as its sentences, not as a traceback.

    Bad input ends with exit code 2, a disk or file system that fails with 1.
    """
    try:
        app.run(main, flags_parser=_parse)
    except InputError as error:
        faults = [f"ham_jax: {escape.lines(fault)}" for fault in error.faults]
        print("\n".join(faults), file=sys.stderr)
        _leave(_BAD_INPUT)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        at = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{type(error).__name__} in {Path(at.filename).name}, line {at.lineno}"
        said = escape.lines(f"{where}{error.strerror or error}")
        print(f"ham_jax: {said} ({place}).", file=sys.stderr)
        _leave(_SYSTEM_FAILED)


def _leave(code: int) -> NoReturn:
    if parallel := sys.modules.get("ham_jax.parallel"):  # or nothing was joined
        parallel.leave(code)
    sys.exit(code)


def _parse(argv: list[str]) -> list[str]:
    others, _overrides[:] = split_overrides(argv)
    try:
        return flags.FLAGS(others)
    except flags.Error as error:
        raise InputError(f"{error}") from error


if __name__ == "__main__":
    run()
