"""Classes belong to the data: with 3 or 12 of any name, every mode does what it does with seven."""

import csv
import json

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import ham_jax
from ham_jax import classes, config, models
from ham_jax.classes import HAM10000, ISIC2019, Classes
from ham_jax.commands import predict
from ham_jax.data import prepare
from ham_jax.evaluation import compare, evaluate, explain, predictions, report, robustness
from ham_jax.models.family import Family
from ham_jax.models.pool import Pool
from ham_jax.training import crossval, loop


class NeverStop:
    exit_code = 75

    def reached(self):
        return False


class Patches(nnx.Module):
    """A backbone of no weights: the mean colour of each 4 x 4 pixels is its last map."""

    num_features = 3

    def __init__(self):
        self.pool = Pool()

    def __call__(self, image, rngs=None):
        b, h, w, c = image.shape
        return self.pool(image.reshape(b, h // 4, 4, w // 4, 4, c).mean((2, 4)))


@pytest.mark.parametrize(
    ("names", "malignant"),
    [
        (("benign", "Malignant", "not sure"), None),
        (tuple(f"kind{n}" for n in range(12)), ()),
    ],
)
def test_the_demonstration_with_other_classes_in_every_mode(
    names, malignant, tmp_path, monkeypatch, capsys
):
    family = Family(names=("patches",), build=lambda *_: Patches())
    monkeypatch.setattr(models, "FAMILIES", (*models.FAMILIES, family))
    monkeypatch.chdir(tmp_path)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    c = config.base()
    c.data.dir, c.data.synthetic_images = "photographs", 96
    c.data.classes, c.data.malignant = names, malignant
    c.data.canvas, c.data.num_folds, c.data.num_workers = (24, 32), 2, 1
    c.model.name = "patches"
    c.augment.crop_px, c.optim.warmup, c.log.tensorboard = 16, {"steps": 0}, False
    c.optim.learning_rate = 0.5
    c.train.batch_size, c.train.duration = 8, {"steps": 6}
    c.eval.batch_size, c.eval.robustness_images = 16, 16
    config.validate(c)
    run, folds = tmp_path / "run", tmp_path / "folds"

    numbers = loop.train(c, run, mesh, NeverStop())
    assert numbers["classes"] == list(names)
    assert list(numbers["per_class"]) == list(names)
    flagged = names[1:2] if malignant is None else ()
    assert numbers["malignant"] == list(flagged)
    assert (numbers["decision"]["malignant"]["auc"] is None) == (not flagged)
    assert not (run / "isic_submission.csv").exists()
    assert evaluate.run([run], "val", [], mesh) == numbers
    judged = predictions.read(run / "predictions.csv")
    assert judged.classes.names == names

    assert explain.run(run, "val", [], mesh)["panels"]
    assert len(robustness.run([run], "val", [], mesh)) == 36
    images = "photographs/HAM10000_images_part_1"
    assert predict.run([run], images, tmp_path / "answers.csv", [], mesh) == 48
    with (tmp_path / "answers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(names) < rows[0].keys()
    between = "; " if any(" " in name for name in names) else " "
    for row in rows:
        assert row["prediction"] in names
        assert set(row["prediction_set"].split(between)) <= {*names, "empty"}
        of_malignant = row["any_malignant" if flagged else "malignant"]
        assert bool(row["malignant_flag"]) == bool(of_malignant) == bool(flagged)
    report.run(run)
    page = (run / "report.html").read_text()
    assert all(name in page for name in names)
    assert ("Malignant or not" in page) == bool(flagged)

    monkeypatch.setattr(loop.evaluate.calibration, "NUM_FOLDS", 2)  # a third of the time
    joined = crossval.train(c, folds, mesh, NeverStop())
    assert joined["num_images"] == 96
    assert predict.run([folds], images, tmp_path / "answers.csv", [], mesh) == 48
    report.run(folds)
    files = [str(folds / f"fold{k}" / "predictions.csv") for k in (0, 0)]
    assert compare.run(files)[0]["difference"] == 0
    assert ham_jax.load(run).classes.titles == Classes.from_json(list(names)).titles
    capsys.readouterr()


def test_records_of_other_classes_are_not_taken_for_these(tmp_path):
    c = config.base()
    c.data.dir, c.data.synthetic_images = str(tmp_path / "photographs"), 40
    c.data.prepared_dir, c.data.num_folds = str(tmp_path / "prepared"), 2
    c.data.canvas, c.data.num_workers = (24, 32), 1
    c.data.classes = ("one", "two")
    first = prepare.prepare(c).records
    c.data.synthetic_images = 0  # or they would be drawn anew
    c.data.classes = ("two", "one")
    second = prepare.prepare(c).records
    assert first.fingerprint != second.fingerprint
    assert (first.table["label"] == 1 - second.table["label"]).all()
    assert second.classes.names == ("two", "one")


@given(st.lists(st.text(min_size=1, max_size=12), min_size=2, max_size=12), st.data())
@settings(max_examples=60, deadline=None)
def test_classes_are_refused_or_come_back_from_json(names, data):
    malignant = data.draw(st.lists(st.sampled_from(names), unique=True, max_size=len(names) - 1))
    if classes.faults(names, malignant):
        with pytest.raises(ValueError, match=" "):
            Classes(tuple(names), tuple(malignant))
    else:
        made = Classes(tuple(names), tuple(malignant))
        assert Classes.from_json(json.loads(json.dumps(made.to_json()))) == made
        assert [made.index(name) for name in made] == list(range(len(made)))


@pytest.mark.parametrize(
    ("names", "malignant", "told"),
    [
        (("a",), (), "There are 1 classes; 2 to 100"),
        (tuple(map(str, range(101))), (), "There are 101 classes"),
        (("Nevus", "nevus"), (), "nevus is there twice"),
        (("a", " b"), (), "without spaces around it, not ' b'"),
        (("a", "b\n"), (), "printable"),
        (("Age", "Total"), (), "called age, total: .*'age lesion'"),
        (("a", "b"), ("c",), "Malignant is c, but the classes are a, b"),
        (("a", "b"), ("a", "b"), "nothing to flag"),
    ],
)
def test_what_cannot_be_classes_is_told(names, malignant, told):
    with pytest.raises(ValueError, match=told):
        Classes(names, malignant)


def test_known_classes_keep_their_meaning():
    assert HAM10000.malignant == ("akiec", "bcc", "mel")
    assert ISIC2019.malignant == ("mel", "bcc", "ak", "scc")
    assert classes.known(("MEL", "wart")).malignant_labels == (0,)
    assert classes.known(("MEL", "wart"), malignant=()).malignant == ()
    assert classes.known(("MEL", "wart")).titles == ("melanoma", "wart")
    assert classes.known(("benign", "malignant")).malignant == ("malignant",)
    for content in (3, "ab", {"names": "ab"}, {"names": [1, 2]}, None):
        with pytest.raises(ValueError, match="name"):
            Classes.from_json(content)
