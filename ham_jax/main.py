"""Flags, the table of modes, `--help` and the order of start-up.

`python -m ham_jax.main --help` lists modes, flags and keys; `--mode=MODE --help` explains a mode.
`ham-jax MODE`, which `pip install .` gives, is the same as `python -m ham_jax.main --mode=MODE`.
A new mode is an entry of `MODES` and the module that does its work.
"""

import dataclasses
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import ml_collections
from absl import app, flags, logging

from ham_jax import DISCLAIMER, __version__, escape, files, hub
from ham_jax import config as configuration
from ham_jax.config import InputError

_HELP = ("--help", "-help", "-h")
_BAD_INPUT, _SYSTEM_FAILED = 2, 1  # exit codes
_ALL_KEYS = tuple(key.name for key in configuration.KEYS)
_overrides: list[tuple[str, str]] = []  # (key, text) of each --config.key=text


@dataclasses.dataclass(frozen=True)
class Call:
    """The flags that a mode is called with, their paths expanded.

    Attributes:
      config_file: `--config`, with its variant; empty: not given.
      config: the configuration of `config_file`, with the overrides; the defaults for modes that
        work on a trained run.
      workdirs: one folder, or several runs whose probabilities are averaged.
      split: 'val', 'test' or 'train'.
      images: empty: not given.
      output: None: not given.
      predictions: CSV files.
      overrides: (key, text) of each `--config.key=text`.
      host: the name or address to listen at.
      port: likewise.
      mesh: the devices, a jax.sharding.Mesh; None for modes that use none.
    """

    config_file: str
    config: ml_collections.ConfigDict
    workdirs: list[Path]
    split: str
    images: str
    output: Path | None
    predictions: list[str]
    overrides: list[tuple[str, str]]
    host: str
    port: int
    mesh: Any = None


@dataclasses.dataclass(frozen=True)
class Mode:
    """What `--mode` may be.

    Attributes:
      doc: what it does; the first sentence is its line in the list of modes.
      example: flags of a usual call.
      run: does the work.
      needs: flags that must be given; for 'workdir', `--config` will do, which names a folder.
      takes: flags that may be given.
      writes: where it writes, below the run's folder; with a suffix a file, otherwise a folder.
        None: nowhere.
      averages: `--workdir` may be several runs.
      uses_devices: JAX is started first.
      keys: those that `--config.KEY=VALUE` may set.
      own_keys: keys that the mode sets itself, so that a configuration must leave them out.
      uses_released: without `--workdir` it takes the model that comes with this library.
    """

    doc: str
    example: str
    run: Callable[[Call], None]
    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()
    writes: str | None = None
    averages: bool = False
    uses_devices: bool = True
    keys: tuple[str, ...] = ()
    own_keys: tuple[str, ...] = ()
    uses_released: bool = False

    @property
    def trains(self) -> bool:
        """Whether it works by a configuration file, and not on a trained run."""
        return "config" in self.needs

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of the flags that it takes."""
        return tuple(name for name in _FLAGS if name in self.needs + self.takes)

    @property
    def output_file(self) -> str:
        """Name of the one file that it writes; empty: it writes a folder or nothing."""
        return self.writes if self.writes and Path(self.writes).suffix else ""


def _train(call: Call) -> None:
    from ham_jax.training import loop

    _run_training(loop.train, call)


def _crossval(call: Call) -> None:
    from ham_jax.training import crossval

    _run_training(crossval.train, call)


def _run_training(train: Callable[..., Any], call: Call) -> None:
    from ham_jax import console, parallel
    from ham_jax.training import loop

    configuration.validate(call.config, call.mesh.devices.size)
    with parallel.Preemption() as preemption:
        try:
            train(call.config, call.workdirs[0], call.mesh, preemption)
        except loop.Preempted as stopped:
            console.log_line(f"ham_jax: {stopped}")
            sys.exit(stopped.exit_code)


def _prepare(call: Call) -> None:
    from ham_jax import console, parallel
    from ham_jax.data import prepare

    data, (workdir,) = prepare.prepare(call.config), call.workdirs
    if parallel.is_main():
        workdir.mkdir(parents=True, exist_ok=True)
        data.audit.write(workdir)
        print(data.audit.text())
        console.print_table("Written", ["", ""], [["audit", f"{workdir}/audit.csv, audit.json"]])


def _eval(call: Call) -> None:
    from ham_jax.evaluation import evaluate

    evaluate.run(call.workdirs, call.split, call.overrides, call.mesh, call.output)


def _robustness(call: Call) -> None:
    from ham_jax.evaluation import robustness

    robustness.run(call.workdirs, call.split, call.overrides, call.mesh, call.output)


def _explain(call: Call) -> None:
    from ham_jax.evaluation import explain

    if call.images:
        explain.run_on_photographs(
            call.workdirs[0], call.images, call.overrides, call.mesh, call.output
        )
    else:
        explain.run(call.workdirs[0], call.split, call.overrides, call.mesh, call.output)


def _report(call: Call) -> None:
    from ham_jax.evaluation import report

    report.run(call.workdirs[0], call.output)


def _compare(call: Call) -> None:
    from ham_jax.evaluation import compare

    compare.run(call.predictions)


def _predict(call: Call) -> None:
    from ham_jax.commands import predict

    output = call.output or call.workdirs[0] / MODES["predict"].output_file
    if not predict.run(call.workdirs, call.images, output, call.overrides, call.mesh):
        raise InputError("No photograph could be read; the CSV says why of each.")


def _export(call: Call) -> None:
    from ham_jax import export
    from ham_jax.evaluation import report

    assert call.output is not None, "the mode needs it"
    export.run(call.workdirs, call.output, call.config.export, call.mesh, report.card)


def _serve(call: Call) -> None:
    from ham_jax.commands import serve

    serve.run(call.workdirs, call.overrides, call.mesh, call.host, call.port)


_IN_EVALUATION = configuration.FREE_IN_EVALUATION

# fmt: off
MODES = {
    "train": Mode(
        "Trains a network, or resumes a stopped run, and evaluates the best checkpoint. The same"
        " command resumes a run from its folder. SIGTERM makes it save itself and exit with 75.",
        "--config=configs/resnet.py:50 --config.train.batch_size=128",
        _train, needs=("config",), takes=("workdir",), writes="checkpoints", keys=_ALL_KEYS),
    "crossval": Mode(
        "Trains every fold and evaluates each image with the network that never saw its lesion."
        " Each fold is a run in a subfolder fold0, fold1, ...; the same command resumes.",
        "--config=configs/resnet.py --workdir=runs/folds",
        _crossval, needs=("config",), takes=("workdir",), writes="checkpoints", keys=_ALL_KEYS,
        own_keys=("data.fold", "data.split_csv")),
    "prepare": Mode(
        "Prepares the records and writes the audit of the data, without training. Training does"
        " the same where the records are missing.",
        "--config=configs/resnet.py --config.data.download=true",
        _prepare, needs=("config",), takes=("workdir",), writes="checkpoints", keys=_ALL_KEYS),
    "eval": Mode(
        "Evaluates the best checkpoint of a run on a split. Writes metrics.json and"
        " predictions.csv; on validation, it also fits calibration.json.",
        "--workdir=runs/resnet --split=val",
        _eval, needs=("workdir",), takes=("config", "split", "output"), writes="", averages=True,
        keys=_IN_EVALUATION),
    "robustness": Mode(
        "Evaluates a run on corrupted images. Seven corruptions in five severities each; writes"
        " robustness.csv. One view per image unless eval.tta is set.",
        "--workdir=runs/resnet",
        _robustness, needs=("workdir",), takes=("config", "split", "output"), writes="",
        averages=True, keys=_IN_EVALUATION),
    "explain": Mode(
        "Draws heat maps of the regions that supported an answer. On images of a split that"
        " predictions.csv makes worth looking at, or with --images on your own photographs.",
        "--workdir=runs/resnet --split=val",
        _explain, needs=("workdir",), takes=("config", "split", "images", "output"),
        writes="explanations", keys=_IN_EVALUATION),
    "report": Mode(
        "Makes one HTML page and a model card from the files of a run. It runs no network and takes"
        " seconds. The model card is written beside the page.",
        "--workdir=runs/resnet",
        _report, needs=("workdir",), takes=("config", "output"), writes="report.html",
        uses_devices=False),
    "compare": Mode(
        "Tests whether one run is better than another on the same images. Prints the paired"
        " difference, its interval over lesions, and McNemar's test.",
        "--predictions runs/a/predictions.csv runs/b/predictions.csv",
        _compare, needs=("predictions",), uses_devices=False),
    "predict": Mode(
        "Classifies photographs and writes a CSV. An unreadable photograph gets a row with its"
        " error, and the others are still classified.",
        "--workdir=runs/resnet --images=photographs/",
        _predict, needs=("workdir", "images"), takes=("config", "output"), writes="predict.csv",
        averages=True, keys=_IN_EVALUATION, uses_released=True),
    "export": Mode(
        "Writes a trained network as a folder for the Hugging Face hub and for other runtimes. The"
        " weights, ONNX, StableHLO and a model card; each file is verified on photographs before"
        " the folder gets its name. `hf upload` publishes it, and --workdir=hf:USER/NAME reads it.",
        "--workdir=runs/resnet --output=exported/resnet",
        _export, needs=("workdir", "output"), takes=("config",), writes="", averages=True,
        keys=("export.dtype", "export.files")),
    "serve": Mode(
        "Shows a page in the browser that classifies photographs. It answers this machine alone,"
        " unless --host says otherwise, and stores nothing.",
        "--workdir=runs/resnet --port=8000",
        _serve, needs=("workdir",), takes=("config", "host", "port"), averages=True,
        keys=_IN_EVALUATION, uses_released=True),
}
# fmt: on

_MODE = flags.DEFINE_enum("mode", "train", list(MODES), "What to do.")
flags.DEFINE_enum("split", "val", ["val", "test", "train"], "The split to look at.")
_FLAG_DOCS = {
    "config": "A file, or one of configs/ from any folder; a variant may follow, as in"
    " configs/resnet.py:50.",
    "workdir": "The folder of a run, or an exported one, or hf:USER/NAME. Default: runs/<name of"
    " the config file>.",
    "images": "Photographs: a file, a folder, a glob, or a CSV with a column path, image_id or"
    " isic_id.",
    "output": "Where to write, if not into the run's folder.",
    "predictions": "Two or more files of the same images: predictions.csv of --mode=train, crossval"
    " or eval.",
}
for _name, _doc in _FLAG_DOCS.items():
    flags.DEFINE_string(_name, None, _doc)
flags.DEFINE_string(
    "host", "127.0.0.1", "Where to listen: 0.0.0.0 answers any machine that can reach this one."
)
flags.DEFINE_integer("port", 8000, "The port to listen at; 0: any that is free.", 0, 65535)
_FLAGS = ("config", "workdir", "split", "images", "output", "predictions", "host", "port")
_NEEDED = {  # what to give where a flag is missing
    "config": "configs/resnet.py for HAM10000, configs/demo.py for synthetic lesions that need no"
    " data",
    "workdir": "the folder of a training run or of an exported model, or hf:USER/NAME",
    "images": "a file, a folder, a glob or a CSV",
    "output": "a folder that is not there yet",
    "predictions": "two or more files, A.csv B.csv",
}


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
    mode, words, faults = MODES[_MODE.value], argv[1:], []
    call = _read_flags(faults)
    if mode.uses_released and not call.workdirs and len(found := hub.released()) == 1:
        call = dataclasses.replace(call, workdirs=found)
    if "predictions" in mode.needs:  # `--predictions A.csv B.csv`, as a person would write it
        call.predictions.extend(words)
        words = []
    faults += [
        f"{word!r}: every argument must be a --flag, but for the mode as the first one."
        f"{configuration.nearest(word, MODES)}"
        for word in words
    ]
    faults += _flag_faults(mode, call)
    if not mode.trains:
        faults += _override_faults(mode, call)
    elif call.config_file:
        call = dataclasses.replace(call, config=configuration.load(call.config_file))
        faults += _config_faults(mode, call)
    if faults:
        raise InputError(faults)
    call = _located(mode, call)
    if not mode.uses_devices:
        _check_writable(mode, call)
        mode.run(call)
        return
    logging.set_verbosity(logging.WARNING)  # libraries' own notes; ours go through console
    from ham_jax import parallel  # from here on, seconds of imports

    parallel.initialize()
    parallel.compile_cache()
    parallel.on_main(lambda: _check_writable(mode, call))
    mode.run(dataclasses.replace(call, mesh=parallel.mesh()))


def _read_flags(faults: list[str]) -> Call:
    """Returns the flags with their paths expanded; adds to `faults` what cannot be expanded."""

    def expanded(text: str | None, flag: str) -> str:
        try:
            return configuration.expand(text, flag) if text else ""
        except InputError as error:
            faults.extend(error.faults)
            return text or ""

    def several(text: str | None, flag: str) -> list[str]:
        if text is None:
            return []
        return [expanded(part, flag) for part in configuration.paths(text)]

    value: dict[str, Any] = {name: flags.FLAGS[name].value for name in _FLAGS}
    workdirs = several(value["workdir"], "--workdir")
    if not all(workdirs):
        faults.append(f"--workdir={','.join(workdirs)} names a folder without a name.")
    config_file = expanded(value["config"], "--config")
    if config_file and not workdirs:
        file, variant = configuration.split_flag(config_file)
        workdirs = ["runs/" + "-".join(filter(None, [Path(file).stem, variant]))]
    output = expanded(value["output"], "--output")
    return Call(
        config_file=config_file,
        config=configuration.base(),
        workdirs=[Path(folder) for folder in workdirs],
        split=value["split"] or "",
        images=expanded(value["images"], "--images"),
        output=Path(output) if output else None,
        predictions=several(value["predictions"], "--predictions"),
        overrides=_overrides,
        host=value["host"],
        port=value["port"],
    )


def _flag_faults(mode: Mode, call: Call) -> list[str]:
    name = f"--mode={_MODE.value}"
    faults = [
        f"{name} does not take --{flag}; these modes do: {_modes_with(flag)}."
        for flag in _FLAGS
        if flags.FLAGS[flag].present and flag not in mode.flags
    ]
    given = {
        "config": call.config_file,
        "workdir": call.workdirs,
        "images": call.images,
        "output": call.output,
        "predictions": call.predictions[1:],
    }
    faults += [f"{name} needs --{flag}: {_NEEDED[flag]}." for flag in mode.needs if not given[flag]]
    num_runs = len(call.workdirs)
    if num_runs > 1 and "workdir" in mode.flags:
        if not mode.averages:
            faults.append(
                f"{name} works in one --workdir, not in {num_runs}, which commas separate."
            )
        elif not call.output and "output" in mode.flags:
            faults.append(f"{name} of {num_runs} runs needs --output, the {_output_name(mode)}.")
    return faults


def _located(mode: Mode, call: Call) -> Call:
    """Returns the call with models of the hub downloaded, and nothing to be written into exports.

    Raises:
      InputError: they cannot be had, or there is no --output to write into.
    """
    call = dataclasses.replace(call, workdirs=[hub.local(folder) for folder in call.workdirs])
    if call.output or not (call.workdirs and hub.is_exported(call.workdirs[0])):
        return call
    if mode.output_file:
        return dataclasses.replace(call, output=Path(mode.output_file))
    if mode.writes is not None:
        instead = "name another" if mode.trains else f"give --output, the {_output_name(mode)}"
        raise InputError(
            f"--workdir={call.workdirs[0]} is an exported model, into which nothing is written:"
            f" {instead}."
        )
    return call


def _modes_with(flag: str) -> str:
    return ", ".join(name for name, mode in MODES.items() if flag in mode.flags)


def _output_name(mode: Mode) -> str:
    suffix = Path(mode.output_file).suffix.lstrip(".").upper()
    return f"{suffix} file to write" if suffix else "folder to write into"


def _config_faults(mode: Mode, call: Call) -> list[str]:
    faults = configuration.override(call.config, call.overrides)
    try:
        configuration.validate(call.config)
    except InputError as error:
        faults += error.faults
    from ham_jax import models  # seconds of imports, which a run needs anyway
    from ham_jax.training import losses, optim

    for room in (models, losses, optim):
        faults += [fault for fault in room.faults(call.config) if fault not in faults]
    values = configuration.flatten(call.config)
    overridden = {key for key, _ in call.overrides}
    return faults + [
        f"--mode={_MODE.value} sets {name} itself: leave out {name}."
        for name in mode.own_keys
        if values.get(name) is not None
        and (name in overridden or values[name] != configuration.key(name).default)
    ]


def _override_faults(mode: Mode, call: Call) -> list[str]:
    """Returns the faults of `--config.KEY=VALUE` for a mode that works on a trained run."""
    names = dict.fromkeys(configuration.key_name(path) for path, _ in call.overrides)
    faults = configuration.override(call.config, call.overrides)
    values = configuration.flatten(call.config)
    refused = []
    for name in names:
        if name in mode.keys:
            faults += configuration.faults_of(name, values[name])
        elif name in values:
            refused.append(name)
    if refused:
        can = f"It can set {', '.join(mode.keys)}." if mode.keys else "It sets no keys."
        faults.append(f"--mode={_MODE.value} cannot set {', '.join(refused)}. {can}")
    return faults


def _check_writable(mode: Mode, call: Call) -> None:
    """Checks that what the mode will write can be written, before any work is done.

    Raises:
      InputError: it cannot.
    """
    if mode.writes is None or not (mode.trains or call.output or call.workdirs[0].is_dir()):
        return  # it writes nothing, or there is no run to read, which reading it will say
    check = files.faults_of_file if mode.output_file else files.faults_of_folder
    flag = "--output" if call.output else "--workdir"
    if faults := check(call.output or call.workdirs[0] / mode.writes, flag):
        raise InputError(faults)


def help_of_all() -> str:
    """Returns modes, flags and keys, at most 100 columns wide."""
    docs = {"--mode": f"What to do. Default: {_MODE.default}."}
    docs |= {f"--{flag}": f"{_flag_doc(flag)} Modes: {_modes_with(flag)}." for flag in _FLAGS}
    docs["--config.KEY=VALUE"] = (
        'Sets one key of those below. A tuple needs quotes: "--config.data.canvas=(450,600)".'
    )
    modes = {name: mode.doc.split(". ")[0].rstrip(".") + "." for name, mode in MODES.items()}
    return "\n".join(
        [
            "Trains, evaluates and uses classifiers of skin lesions.",
            DISCLAIMER,
            *("", "ham-jax MODE [flags]      or python -m ham_jax.main --mode=MODE [flags]"),
            "ham-jax MODE --help       explains one mode",
            "ham-jax --version         prints the version",
            *("", "Modes:", _listed(modes)),
            *("", "Flags:", _listed(docs)),
            *("", "Keys and their defaults:", configuration.in_words(configuration.KEYS)),
        ]
    )


def help_of_mode(name: str) -> str:
    """Returns what a mode does, its flags and the keys that can be set, likewise."""
    mode = MODES[name]
    docs = {
        f"--{flag}": "Required. " * (flag in mode.needs) + _flag_doc(flag, mode)
        for flag in mode.flags
    }
    keys = [configuration.key(key) for key in mode.keys if key not in mode.own_keys]
    defaults = "their defaults" if mode.trains else "the default is the run's own value"
    return "\n".join(
        [
            configuration.wrapped(mode.doc),
            *("", "Example:", f"  python -m ham_jax.main --mode={name} {mode.example}"),
            *("", "Flags:", _listed(docs)),
            *("", f"Keys that --config.KEY=VALUE can set; {defaults}:") * bool(keys),
            configuration.in_words(keys, with_defaults=mode.trains),
        ]
    ).rstrip()


def _flag_doc(flag: str, mode: Mode | None = None) -> str:
    """Returns what a flag means in a mode; None: in general."""
    if mode and flag == "output":
        default = "/".join(filter(None, ["<workdir>", mode.writes]))
        said = f" Default: {default}." * (flag not in mode.needs)
        return f"The {_output_name(mode)}.{said}"
    if mode and not mode.trains and flag == "config":
        return "Instead of --workdir: a file in configs/, for the run in runs/<name of the file>."
    if mode and not mode.trains and flag == "workdir":
        several = " Several, with commas between: their probabilities are averaged."
        what = "The folder of a training run, or an exported one, or hf:USER/NAME."
        released = " Default: the model in released/." * mode.uses_released
        return what + several * mode.averages + released
    default = flags.FLAGS[flag].default
    return f"{flags.FLAGS[flag].help}" + f" Default: {default}." * bool(default)


def _listed(docs: dict[str, str]) -> str:
    """Returns names and their docs as two columns."""
    width = max(map(len, docs)) + 4
    return "\n".join(
        configuration.wrapped(doc, f"  {name}".ljust(width), " " * width)
        for name, doc in docs.items()
    )


def run() -> None:
    """Entry point: what a person can mend ends as its sentences, not as a traceback.

    Bad input ends with exit code 2, and so does a package that is not installed; a disk or file
    system that fails ends with 1.
    """
    try:
        app.run(main, flags_parser=_parse)
    except InputError as error:
        faults = [f"ham_jax: {escape.lines(fault)}" for fault in error.faults]
        print("\n".join(faults), file=sys.stderr)
        _leave(_BAD_INPUT)
    except ModuleNotFoundError as error:
        if (error.name or "ham_jax").startswith("ham_jax"):
            raise
        print(
            f"ham_jax: --mode={_MODE.value} needs the package {error.name}, which is not installed."
            " All that training needs comes with pip install 'ham-jax[train]', in a clone with"
            " pip install -r requirements.txt.",
            file=sys.stderr,
        )
        _leave(_BAD_INPUT)
    except BrokenPipeError:  # nobody reads the output any more, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(_SYSTEM_FAILED)
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
    if "--version" in others:
        print(f"ham-jax {__version__}")
        sys.exit(0)
    if others[1:] and others[1] in MODES:
        others[1] = f"--mode={others[1]}"
    arguments = [word for word in others if word not in _HELP]
    try:
        words = flags.FLAGS(arguments)
    except flags.Error as error:
        raise InputError(f"{error}") from error
    if arguments != others:
        print(help_of_mode(_MODE.value) if flags.FLAGS["mode"].present else help_of_all())
        sys.exit(0)
    return words


if __name__ == "__main__":
    run()
