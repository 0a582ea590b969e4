"""The command line: what a user types wrong is answered in sentences, before any work."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from ham_jax import __version__
from ham_jax import config as configuration
from ham_jax.main import MODES, help_of_all, help_of_mode, split_overrides

ROOT = Path(__file__).parents[1]


def ham_jax(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", "ham_jax.main", *map(str, arguments)],
        cwd=cwd,
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_overrides_are_taken_out_of_the_command_line():
    argv = ["main", "--config=a.py", "--config.b.c=d=e", "--mode", "eval", "--config.f", "7"]
    others, pairs = split_overrides(argv)
    assert others == ["main", "--config=a.py", "--mode", "eval"]
    assert pairs == [("b.c", "d=e"), ("f", "7")]


@pytest.mark.parametrize(
    ("arguments", "answers"),
    [
        ([], ["--mode=train needs --config"]),
        (["--cofig=x"], ["Did you mean: config"]),
        (
            ["--mode=evaluate"],
            ["train|crossval|prepare|eval|robustness|explain|report|compare|predict|export|serve"],
        ),
        (["stray", "--config={root}/configs/demo.py"], ["'stray': every argument must be"]),
        (["trian"], ["Did you mean 'train'?", "--mode=train needs --config"]),
        (["predict"], ["--mode=predict needs --images"]),  # the network that comes along answers
        (["train", "--config=resnet.py:19"], ["18, 34, 50 or 101"]),  # from any folder
        (["train", "--config=configs/demo.py:x"], ["has no variants"]),
        (["--config=nowhere.py"], ["there is no file nowhere.py"]),
        (["--config={root}/configs/resnet.py:19"], ["18, 34, 50 or 101"]),
        (["--config={root}/configs/convnext.py:nano-x"], ["-imagenet may follow"]),
        (["--config={root}/configs/demo.py:x"], ["has no variants"]),
        (
            [
                *("--config={root}/configs/demo.py", "--config.loss.imbalance=weigthed"),
                *("--config.model.name=convnext_ato", "--config.optim.name=lamb"),
                "--config.data.fold=9",
            ],
            ["Did you mean 'weighted'?", "'convnext_atto'", "no longer available", "fold = 9"],
        ),
        (["--mode=eval"], ["needs --workdir"]),
        (["--mode=robustness"], ["--mode=robustness needs --workdir"]),
        (["--mode=report"], ["--mode=report needs --workdir"]),
        (["--mode=report", "--workdir=a,b"], ["one --workdir, not in 2"]),
        (["--mode=report", "--workdir=a", "--output={root}"], ["is a folder"]),
        (["--mode=predict"], ["needs --images"]),
        (["--mode=explain"], ["needs --workdir"]),
        (["--mode=explain", "--workdir=a,b"], ["one --workdir, not in 2"]),
        (
            ["--config={root}/configs/demo.py", "--images=x", "--split=val"],
            ["--images; these modes do: explain, predict.", "--split; these modes do: eval"],
        ),
        (["--mode=compare", "--predictions=a,b", "--workdir=a"], ["does not take --workdir"]),
        (["--mode=report", "--workdir=a", "--config.eval.tta=8"], ["eval.tta. It sets no keys."]),
        (
            [
                *("--mode=predict", "--workdir=a", "--images=x", "--config.model.name=resnet50"),
                *("--config.train.duration.epochs=3", "--config.eval.tta=3"),
                *("--config.eval.ood=maybe", "--config.eval.odd=true"),
            ],
            [
                "cannot set model.name, train.duration. It can set data.dir,",
                "eval.tta = 3 must be one of 1, 2, 4, 8.",
                "this is not true or false",
                "Did you mean 'eval.ood'?",
            ],
        ),
        (["--mode=crossval"], ["--mode=crossval needs --config"]),
        (
            [
                "--mode=crossval",
                "--config={root}/configs/demo.py",
                "--config.data.fold=0",
                "--config.data.split_csv=mine.csv",
            ],
            ["leave out data.fold", "leave out data.split_csv"],
        ),
        (["--config={root}/configs/demo.py", "--workdir=a,b"], ["one --workdir, not in 2"]),
        (["--mode=eval", "--workdir=a,b"], ["needs --output, the folder"]),
        (["--mode=robustness", "--workdir=a,b"], ["needs --output, the folder"]),
        (["--mode=predict", "--workdir=a,b", "--images=x"], ["needs --output, the CSV"]),
        (["--mode=compare", "--predictions=a.csv"], ["two or more files"]),
        (["--mode=compare", "--predictions", "a.csv", "b.csv"], ["a.csv cannot be read"]),
        (["--mode=eval", "--workdir=a,,b", "--output=c"], ["a folder without a name"]),
        (["--mode=eval", "--workdir=a", "--output={root}/README.md"], ["is a file"]),
        (
            [
                "--config={root}/configs/resnet.py",
                "--config.train.batch_sze=3",
                "--config.augment.crop_px=wide",
                "--config.data.fold=9",
            ],
            ["'train.batch_size'", "not a whole number", "folds count from 0"],
        ),
    ],
)
def test_mistakes_are_answered_at_once_all_together(arguments, answers, tmp_path):
    before = sum(os.times()[:4])
    ended = ham_jax(*[a.format(root=ROOT) for a in arguments], cwd=tmp_path)
    assert sum(os.times()[:4]) - before < 10  # of processor time: nothing heavy is imported
    assert ended.returncode == 2
    assert all(answer in ended.stderr for answer in answers), ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) == len(answers)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--help"], ["--mode=predict", "-h"]])
def test_help_is_printed_without_imports_that_take_seconds(arguments):
    code = "import runpy, sys; sys.argv[0] = 'main'; from ham_jax import main\n"
    code += (
        "try: main.run()\nfinally: assert not {'jax', 'pandas', 'tensorflow'} & set(sys.modules)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    text = help_of_all() if arguments == ["--help"] else help_of_mode("predict")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, text + "\n", "")


def test_the_version_is_printed():
    assert ham_jax("--version", cwd=ROOT).stdout == f"ham-jax {__version__}\n"


def test_a_package_that_is_not_installed_is_a_sentence(tmp_path):
    (tmp_path / "scipy.py").write_text("import no_such_package")
    (tmp_path / "a.csv").touch()
    path = f"{tmp_path}:{ROOT}"
    ended = ham_jax("compare", "--predictions", "a.csv", "a.csv", cwd=tmp_path, PYTHONPATH=path)
    assert ended.returncode == 2
    assert "--mode=compare needs the package no_such_package" in ended.stderr
    assert "'ham-jax[train]'" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that `pip install .` makes, unpacked, in a folder `wheel`."""
    pytest.importorskip("setuptools", "77", reason="it makes the wheel")
    folder = tmp_path_factory.mktemp("built")
    for name in ("ham_jax", "configs"):
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for name in ("pyproject.toml", "setup.py", "requirements-predict.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    ended = subprocess.run(
        [sys.executable, "-c", build], cwd=folder, capture_output=True, text=True, check=True
    )
    with zipfile.ZipFile(folder / ended.stdout.splitlines()[-1]) as file:
        file.extractall(folder / "wheel")
    return folder / "wheel"


def test_the_wheel_holds_every_file_and_starts_from_any_folder(wheel, tmp_path):
    def files_of(folder):
        inside = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return {path for path in inside if "__pycache__" not in path.parts}

    assert files_of(wheel / "ham_jax") == files_of(ROOT / "ham_jax") | {
        Path("configs", path) for path in files_of(ROOT / "configs")
    }
    start = "import sys; from ham_jax import main; sys.argv[0] = 'ham-jax'; main.run()"
    for config in ("resnet.py", "configs/resnet.py"):
        ended = subprocess.run(
            [sys.executable, "-c", start, "train", f"--config={config}:19"],
            env=os.environ | {"PYTHONPATH": str(wheel)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (ended.returncode, "18, 34, 50 or 101" in ended.stderr) == (2, True), ended.stderr


def test_the_wheel_asks_for_tensorflow_and_tfds_only_to_train(wheel):
    (info,) = wheel.glob("ham_jax-*.dist-info")
    assert "ham-jax = ham_jax.main:run" in (info / "entry_points.txt").read_text()
    metadata = (info / "METADATA").read_text()
    assert f"\nVersion: {__version__}\n" in metadata
    asked = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    base = [line for line in asked if "extra ==" not in line]
    training = [line for line in asked if 'extra == "train"' in line]
    assert {"jax<0.13,>=0.10.2", "orbax-checkpoint<0.13,>=0.12.8"} <= set(base)
    assert not any("tensorflow" in line for line in base)
    assert sum("tensorflow" in line for line in training) == 3


def test_the_extra_is_what_requirements_add_for_training():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    added = [line.split("#")[0].strip() for line in lines]
    added = [line for line in added if line and not line.startswith("-r ")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["train"] == added


def test_help_names_every_mode_flag_and_key_with_its_doc():
    text = help_of_all()
    words = " ".join(text.split())
    assert all(f"--mode={name}" in help_of_mode(name) for name in MODES)
    assert all(f"  {name} " in text for name in MODES)
    assert all(f"  --{flag} " in text for mode in MODES.values() for flag in mode.flags)
    for key in configuration.KEYS:
        assert f"\n  {key.name} = {key.default}\n" in text
        assert f"{key.doc} Allowed: {configuration.allowed(key)}." in words
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("name", MODES)
def test_help_of_a_mode_shows_what_it_takes_and_nothing_else(name):
    text, mode = help_of_mode(name), MODES[name]
    assert max(map(len, text.splitlines())) <= 100
    shown = {line.split()[0] for line in text.splitlines() if line.startswith("  ")}
    assert {word[2:] for word in shown if word.startswith("--")} == set(mode.flags)
    keys = {key.name for key in configuration.KEYS}
    assert shown & keys == set(mode.keys) - set(mode.own_keys)
    assert {line.split()[0][2:] for line in text.splitlines() if " Required. " in line} == set(
        mode.needs
    )
    others, overrides = split_overrides(mode.example.split())
    given = {word[2:].split("=")[0] for word in others if word.startswith("--")}
    assert set(mode.needs) <= given <= set(mode.flags)
    assert {key for key, _ in overrides} <= set(mode.keys)


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--config={root}/configs/demo.py", "--workdir=taken"], "Not a directory"),
        (["--config={root}/configs/demo.py", "--workdir=/proc/run"], "nothing can be written"),
        (["--mode=predict", "--workdir=run", "--images=.", "--output=run"], "is a folder"),
        (["--mode=predict", "--workdir=run", "--images=.", "--output=/dev/null"], "is a device"),
        (["--mode=eval", "--workdir=run", "--output=/proc/out"], "nothing can be written"),
        (["--mode=eval", "--workdir=run", "--output=taken"], "is a file"),
        (["--mode=report", "--workdir=run", "--output=no/report.html"], "there is no folder no"),
        (["--mode=eval", "--workdir=gs://bucket/run"], "is an address"),
        (["--mode=predict", "--workdir=$NO/run", "--images=x"], "no variable NO"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(arguments, answer, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "taken").touch()
    ended = ham_jax(*[a.format(root=ROOT) for a in arguments], cwd=tmp_path)
    assert ended.returncode == 2
    assert answer in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert {path.name for path in tmp_path.rglob("*")} == {"run", "taken"}


def test_help_may_be_read_in_part():
    command = f"{sys.executable} -m ham_jax.main --help | head -n 1"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert (len(ended.stdout.splitlines()), ended.stderr) == (1, "")


def test_a_system_that_fails_is_one_sentence(tmp_path):
    """What no check foresees, such as a disk that fails, ends without a traceback, too."""
    (tmp_path / "run/predictions.csv").mkdir(parents=True)
    ended = ham_jax("--mode=compare", "--predictions", "run", "run", cwd=tmp_path)
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) <= 2


def test_missing_photographs_are_answered_with_the_ways_out(tmp_path):
    config = ROOT / "configs/resnet.py"
    ended = ham_jax(f"--config={config}", "--config.data.dir=no/such", cwd=tmp_path)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    for way in ("no/such", "data.download=true", "--config.data.dir", "configs/demo.py"):
        assert way in ended.stderr


def test_a_batch_that_the_devices_cannot_share_is_refused(tmp_path):
    config = ROOT / "configs/demo.py"
    ended = ham_jax(
        f"--config={config}",
        "--config.train.batch_size=30",
        cwd=tmp_path,
        JAX_NUM_CPU_DEVICES="4",
    )
    assert ended.returncode == 2
    assert "4 device(s)" in ended.stderr
    assert "32 can" in ended.stderr
    assert not (tmp_path / "data").exists()
