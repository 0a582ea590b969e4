"""A run of version 0.1 (tests/make_old_run.py) is evaluated, reported on and asked today."""

import csv
import json
import runpy
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from ham_jax import models
from ham_jax.commands import predict
from ham_jax.data import synthetic
from ham_jax.evaluation import evaluate, report

OLD = Path(__file__).parent / "old_run"
linear = runpy.run_path(Path(__file__).parent / "make_old_run.py")["linear"]
GONE = {"0.95", "vector"}  # sets for 95 %, and a method of calibration


def without_what_is_gone(tree):
    if isinstance(tree, dict):
        return {k: without_what_is_gone(v) for k, v in tree.items() if k not in GONE}
    return tree


def without_what_is_new(tree, before):
    if isinstance(before, dict):
        return {k: without_what_is_new(tree[k], old) for k, old in before.items()}
    if isinstance(before, list):
        return [without_what_is_new(*pair) for pair in zip(tree, before, strict=True)]
    return tree


@pytest.fixture
def mesh(monkeypatch):
    monkeypatch.setattr(models, "build", linear)
    return jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old") / "photographs"
    synthetic.write(folder, 120, 0)
    return folder


def test_a_run_of_version_0_1_says_what_it_said(mesh, photographs, tmp_path):
    run, output = tmp_path / "run", tmp_path / "answers.csv"
    shutil.copytree(OLD, run)
    before = json.loads((OLD / "metrics.json").read_text())
    images = str(photographs / "*" / "ISIC_002431?.jpg")
    where = [("data.dir", str(photographs)), ("data.prepared_dir", str(tmp_path / "records"))]

    assert predict.run([run], images, output, where, mesh) == 10
    with output.open(newline="") as file:
        answers = list(csv.DictReader(file))
    assert all(row["malignant_flag"] and row["ood_score"] for row in answers)
    report.run(run)

    now = evaluate.run([run], "val", where, mesh)
    assert (run / "predictions.csv").read_bytes() == (OLD / "predictions.csv").read_bytes()
    assert now.pop("records") != before.pop("records"), "the decoder has changed since"
    before = without_what_is_gone(before)
    assert without_what_is_new(now, before) == before
    # The calibration that is fitted today says the same, but for which sets it shows.
    predict.run([run], images, tmp_path / "again.csv", where, mesh)
    with (tmp_path / "again.csv").open(newline="") as file:
        again = list(csv.DictReader(file))
    chosen = ("prediction_set", "note")
    for old, new in zip(answers, again, strict=True):
        assert new == old | {name: new[name] for name in chosen}
