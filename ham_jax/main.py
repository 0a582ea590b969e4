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

import re
import sys
from pathlib import Path

from absl import app, flags, logging

from ham_jax import config as configuration
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
_WORKDIR = flags.DEFINE_list(
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
_PREDICTIONS = flags.DEFINE_list(
    "predictions", None, "--mode=compare: two or more predictions.csv of the same images."
)
_TRAINS = ("train", "crossval")
_EVALUATES = ("eval", "robustness")

_BAD_INPUT = 2  # exit code
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
    predictions = _PREDICTIONS.value or []
    if _MODE.value == "compare":  # `--predictions A.csv B.csv`, as a person would write it
        words, predictions = [], predictions + words
    faults = [f"{word!r}: every argument must be a --flag." for word in words]
    faults += _flag_faults(predictions)
    config = None
    if _CONFIG.value and _MODE.value in (*_TRAINS, "prepare"):
        config = configuration.load(_CONFIG.value)
        faults += _config_faults(config)
    if faults:
        raise InputError(faults)
    if _MODE.value == "compare":
        from ham_jax.evaluation import compare

        compare.run(predictions)
        return
    workdirs = [Path(folder) for folder in _WORKDIR.value or [_default_workdir()]]
    workdir = workdirs[0]
    if _MODE.value == "report":
        from ham_jax.evaluation import report

        report.run(workdir, Path(_OUTPUT.value) if _OUTPUT.value else None)
        return

    logging.set_verbosity(logging.WARNING)  # libraries' own notes; ours go through console
    from ham_jax import console, parallel  # from here on, seconds of imports

    parallel.initialize()
    parallel.compile_cache()
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
            print(f"Written: {workdir}/audit.csv, {workdir}/audit.json")
    elif _MODE.value in _EVALUATES:
        from ham_jax.evaluation import evaluate, robustness

        output = Path(_OUTPUT.value) if _OUTPUT.value else None
        look = evaluate.run if _MODE.value == "eval" else robustness.run
        look(workdirs, _SPLIT.value, _overrides, mesh, output)
    elif _MODE.value == "explain":
        from ham_jax.evaluation import explain
        from ham_jax.inference import predict

        if _IMAGES.value:
            paths = predict.find_images(_IMAGES.value)
            known = predict.find_metadata(_IMAGES.value, len(paths))
            explain.run_on_photographs(workdir, paths, known, _overrides, mesh)
        else:
            explain.run(workdir, _SPLIT.value, _overrides, mesh)
    else:
        from ham_jax.inference import predict

        output = Path(_OUTPUT.value or workdir / "predict.csv")
        if not predict.run(workdirs, _IMAGES.value, output, _overrides, mesh):
            raise InputError("No photograph could be read; the CSV says why of each.")


def _flag_faults(predictions: list[str]) -> list[str]:
    mode, workdirs = _MODE.value, _WORKDIR.value or []
    faults = []
    if mode in (*_TRAINS, "prepare") and not _CONFIG.value:
        faults.append(
            f"--mode={mode} needs --config: configs/resnet.py for HAM10000, configs/demo.py for"
            " synthetic lesions that need no data."
        )
    reads = (*_EVALUATES, "predict", "explain", "report")
    if mode in reads and not workdirs and not _CONFIG.value:
        faults.append(f"--mode={mode} needs --workdir, the folder of a training run.")
    if not all(workdirs):
        faults.append(f"--workdir={','.join(workdirs)} names a folder without a name.")
    if len(workdirs) > 1:
        if mode not in (*_EVALUATES, "predict"):
            faults.append(f"--mode={mode} works in one --workdir, not in {len(workdirs)}.")
        elif not _OUTPUT.value:
            what = "folder to write into" if mode in _EVALUATES else "CSV to write"
            faults.append(f"--mode={mode} of {len(workdirs)} runs needs --output, the {what}.")
    if mode in _EVALUATES and _OUTPUT.value and Path(_OUTPUT.value).is_file():
        faults.append(f"--output={_OUTPUT.value} is a file; --mode={mode} writes into a folder.")
    if mode == "report" and _OUTPUT.value and Path(_OUTPUT.value).is_dir():
        faults.append(f"--output={_OUTPUT.value} is a folder; --mode=report writes an HTML file.")
    if mode == "compare" and len(predictions) < 2:
        faults.append("--mode=compare needs --predictions: two or more files, A.csv B.csv.")
    if mode == "predict" and not _IMAGES.value:
        faults.append("--mode=predict needs --images: a file, a folder, a glob or a CSV.")
    return faults


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


def _default_workdir() -> str:
    file, _, variant = _CONFIG.value.partition(":")
    return "runs/" + "-".join(filter(None, [Path(file).stem, variant]))


def run() -> None:
    """Entry point: bad input ends as its sentences and exit code 2, not as a traceback."""
    try:
        app.run(main, flags_parser=_parse)
    except InputError as error:
        print("\n".join(f"ham_jax: {fault}" for fault in error.faults), file=sys.stderr)
        if parallel := sys.modules.get("ham_jax.parallel"):  # or nothing was joined
            parallel.leave(_BAD_INPUT)
        sys.exit(_BAD_INPUT)


def _parse(argv: list[str]) -> list[str]:
    others, _overrides[:] = split_overrides(argv)
    try:
        return flags.FLAGS(others)
    except flags.Error as error:
        raise InputError(f"{error}") from error


if __name__ == "__main__":
    run()
