"""No run is judged by what its weights, or those that it started from, were trained on."""

import pandas as pd
import pytest

from ham_jax import config as configuration
from ham_jax import files
from ham_jax.config import InputError
from ham_jax.evaluation import leakage

SPLIT = pd.DataFrame(
    {
        "image_id": ["a", "b", "c", "d"],
        "lesion_id": ["1", "1", "2", "3"],
        "split": ["train", "train", "val", "test"],
    }
)


@pytest.fixture
def run(tmp_path):
    """Makes the folder of a run that had the given split and started from the given source."""

    def make(name, split=SPLIT, pretrained=None, teacher=None):
        folder = tmp_path / name
        (folder / "checkpoints" / "3").mkdir(parents=True)
        split.to_csv(folder / "split.csv", index=False)
        config = configuration.base()
        config.model.pretrained, config.loss.teacher = pretrained, teacher
        files.write_json(folder / "config.json", configuration.to_dict(config))
        return folder

    return make


def refuse(folder, judged):
    leakage.refuse_trained_on(str(folder), judged, "--workdir")


def test_other_images_of_a_lesion_count_and_what_did_not_train_passes(run, caplog):
    folder = run("a")
    new = pd.DataFrame({"image_id": ["x"], "lesion_id": ["1"]})
    with pytest.raises(InputError, match=r"lesions of 1 of the 1 images.*a/split\.csv"):
        refuse(folder, new)
    refuse(folder, SPLIT[SPLIT["split"] != "train"])
    refuse("pypi:efficientnet-lite0", SPLIT)
    assert not caplog.text


def test_runs_before_are_asked_even_where_their_checkpoints_are_gone(run, caplog):
    first = run("first")
    second = run("second", SPLIT[SPLIT["split"] != "train"], str(first))
    (first / "checkpoints" / "3").rmdir()  # to make room
    with pytest.raises(InputError, match=f"started from '{first}'.*lesions of 2 of the 4"):
        refuse(second, SPLIT)
    refuse(second, SPLIT[2:])
    assert not caplog.text


def test_teachers_are_asked_each_fold_of_them_and_what_taught_them(run, tmp_path, caplog):
    nothing = SPLIT[SPLIT["split"] != "train"]
    run("folds/fold0", nothing)
    last = run("folds/fold1")
    for fold in ("fold2", "fold3", "fold4"):
        run(f"folds/{fold}", nothing)
    with pytest.raises(InputError, match="lesions of 2 of the 4"):
        refuse(tmp_path / "folds", SPLIT)
    student = run("student", nothing, teacher=f"{run('other', nothing)},{tmp_path / 'folds'}")
    with pytest.raises(InputError, match=r"was taught by '.*folds',.*fold1/split\.csv"):
        refuse(student, SPLIT)
    with pytest.raises(InputError, match=r"heir', which was taught by '.*folds'"):
        refuse(run("heir", nothing, str(student)), SPLIT)
    nothing.to_csv(last / "split.csv", index=False)
    refuse(student, SPLIT)
    assert not caplog.text
    (tmp_path / "folds").rename(tmp_path / "away")
    refuse(student, nothing)  # training asked them about these
    assert not caplog.text
    refuse(student, SPLIT)
    assert f"it was taught by '{tmp_path / 'folds'}', which is not here" in caplog.text


def test_a_ring_of_runs_ends(run, tmp_path):
    second = run("second", pretrained=str(tmp_path / "first"))
    refuse(run("first", pretrained=str(second)), SPLIT[2:])


def test_what_cannot_be_known_is_said(run, caplog):
    first = run("first")
    second = run("second", SPLIT[2:], str(first))
    (first / "split.csv").unlink()  # a run of an earlier version
    refuse(second, SPLIT)
    assert f"{first}/split.csv missing" in caplog.text
    first.rename(first.with_name("away"))
    refuse(second, SPLIT)
    assert f"it started from '{first}', which is not here" in caplog.text


def test_damaged_files_are_named_and_older_configurations_read(run):
    folder = run("a")
    for name, text in (
        ("split.csv", ""),
        ("split.csv", "name,split\nc,val\n"),
        ("config.json", "{"),
        ("config.json", "[]"),
    ):
        whole = (folder / name).read_text()
        (folder / name).write_text(text)
        with pytest.raises(InputError, match=f"{folder}/{name}"):
            refuse(folder, SPLIT[2:])
        (folder / name).write_text(whole)
    (folder / "config.json").write_text('{"model": {"name": "resnet18"}}')
    refuse(folder, SPLIT[2:])
