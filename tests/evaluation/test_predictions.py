"""What is judged: a table that comes back from a file to the last digit, or is refused."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ham_jax.classes import HAM10000, Classes
from ham_jax.config import InputError
from ham_jax.evaluation import predictions
from ham_jax.evaluation.predictions import Predictions


@pytest.mark.parametrize(
    ("labels", "p"),
    [
        (np.zeros(0, int), np.zeros((0, 7))),
        (np.zeros(2), np.full((2, 7), 1 / 7)),
        (np.array([0, 7]), np.full((2, 7), 1 / 7)),
        (np.array([0, -1]), np.full((2, 7), 1 / 7)),
        (np.array([0, 1]), np.full((2, 6), 1 / 6)),
        (np.array([0, 1]), np.full((3, 7), 1 / 7)),
        (np.array([0, 1]), np.full((2, 7), np.nan)),
    ],
)
def test_what_cannot_be_judged_is_refused(labels, p):
    with pytest.raises(ValueError, match=r"labels|probabilities"):
        Predictions(HAM10000, labels, p)


def test_columns_of_another_length_are_refused():
    given = (HAM10000, np.array([0, 1]), np.eye(7)[:2])
    for name, value in (
        ("lesion_ids", np.array(["a"])),
        ("image_ids", np.array(["a", "b", "c"])),
        ("metadata", pd.DataFrame({"age": [1.0]})),
    ):
        with pytest.raises(ValueError, match=f"{name}.* of 2 images"):
            Predictions(*given, **{name: value})


def test_rows_are_taken_and_joined_with_all_that_belongs_to_them():
    table = pd.DataFrame({"age": [1.0, 2.0, np.nan], "sex": ["f", "", "m"]}, index=[7, 8, 9])
    whole = Predictions(
        *(HAM10000, np.array([3, 1, 2]), np.eye(7)[:3]),
        *(np.array(["x", "x", "y"]), np.array(["a", "b", "c"]), table),
    )
    assert (len(whole), whole.num_lesions, whole.truth.tolist()) == (3, 2, ["df", "bcc", "bkl"])
    parts = [whole.take(np.array([False, False, True])), whole.take(np.array([0, 1]))]
    joined = predictions.join(parts).take(np.array([1, 2, 0]))
    for one, two in ((whole, joined), (whole, whole.with_probabilities(whole.probabilities))):
        for name in ("labels", "probabilities", "lesion_ids", "image_ids"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
        pd.testing.assert_frame_equal(one.metadata, two.metadata)


def test_alone_each_image_is_a_lesion_and_nothing_is_known():
    alone = Predictions(HAM10000, np.array([3, 1]), np.eye(7)[:2])
    assert alone.num_lesions == 2
    assert alone.metadata.shape == (2, 0)


@pytest.mark.parametrize("num_classes", [3, 12, 100])
def test_any_classes_come_back(tmp_path, num_classes):
    names = [f"disease {k}, type =" for k in range(num_classes)]
    classes = Classes(tuple(names), (), tuple(name.upper() for name in names))
    labels = np.arange(num_classes)[::-1].copy()
    rng = np.random.default_rng(0)
    given = Predictions(classes, labels, rng.dirichlet(np.ones(num_classes), num_classes))
    given = given.take(np.argsort(given.image_ids))
    given.write(tmp_path / "predictions.csv")
    back = predictions.read(tmp_path / "predictions.csv", classes)
    assert back.classes == classes
    np.testing.assert_array_equal(back.labels, given.labels)
    np.testing.assert_array_equal(back.probabilities, given.probabilities)
    by_columns = predictions.read(tmp_path / "predictions.csv")
    assert by_columns.classes == Classes(tuple(names))
    turned = Classes(tuple(names[::-1]))
    other = predictions.read(tmp_path / "predictions.csv", turned)
    np.testing.assert_array_equal(other.truth, back.truth)
    np.testing.assert_array_equal(other.probabilities, back.probabilities[:, ::-1])


@settings(max_examples=25, deadline=None)
@given(
    data=st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8")),
            st.integers(0, 6),
            st.lists(st.floats(0, 1, width=32), min_size=7, max_size=7),
        ),
        min_size=1,
        max_size=5,
        unique_by=lambda row: row[0],
    )
)
def test_predictions_come_back_exactly(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("predictions") / "predictions.csv"
    names, labels, rows = zip(*sorted(data, key=lambda row: row[0]), strict=True)
    p = np.array(rows, np.float32)
    turned = np.arange(len(data))[::-1]
    lesion_ids = [f"={i}" for i in range(len(data))]
    given = Predictions(
        HAM10000, np.array(labels), p, np.array(lesion_ids), np.array(names, object)
    )
    given.take(turned).write(path)
    back = predictions.read(path)
    assert back.classes == HAM10000
    assert back.image_ids.tolist() == list(names)
    assert back.lesion_ids.tolist() == lesion_ids
    assert "\n=" not in path.read_text()
    assert ",=" not in path.read_text()
    np.testing.assert_array_equal(back.labels, labels)
    np.testing.assert_array_equal(back.probabilities, p.astype(float))
    header = path.read_text().split("\n")[0]
    assert header == "image_id,lesion_id,truth,akiec,bcc,bkl,df,mel,nv,vasc"
    assert [entry.name for entry in path.parent.iterdir()] == ["predictions.csv"]


def test_what_else_is_known_comes_back_and_older_files_know_nothing(tmp_path):
    known = pd.DataFrame(
        {
            "age": [35.0, np.nan],
            "sex": ["female", ""],
            "localization": ["lower extremity", "face, left"],
            "dx_type": ["histo", None],
            "ood_score": [0.25, 1.5],
        }
    )
    path = tmp_path / "predictions.csv"
    given = (np.array([4, 5]), np.eye(7)[:2], np.array(["L2", "L1"]), np.array(["b", "a"]))
    Predictions(HAM10000, *given, known).write(path)
    lines = path.read_text().splitlines()
    assert lines[0].endswith("nv,vasc,age,sex,localization,dx_type,ood_score")
    assert lines[1].endswith(',,,"face, left",,1.5')
    back = predictions.read(path)
    assert back.truth.tolist() == ["nv", "mel"]
    np.testing.assert_array_equal(back.probabilities, np.eye(7)[[1, 0]])
    table = back.metadata
    np.testing.assert_array_equal(table["age"], [np.nan, 35])
    texts = table[["sex", "localization", "dx_type", "ood_score"]].to_numpy().tolist()
    assert texts == [["", "face, left", "", 1.5], ["female", "lower extremity", "histo", 0.25]]
    found = [back.image_ids, back.lesion_ids, back.labels]
    assert [part.tolist() for part in found] == [["a", "b"], ["L1", "L2"], [5, 4]]

    path.write_text(path.read_text().replace("35.0", "young"))
    with pytest.raises(InputError, match=r"line 3: .* age and ood_score a number or empty"):
        predictions.read(path)
    Predictions(HAM10000, *given).write(path)
    table = predictions.read(path).metadata
    assert table["age"].isna().all()
    assert (table[["sex", "localization", "dx_type"]] == "").all(axis=None)


def test_a_damaged_predictions_file_is_refused_line_by_line(tmp_path):
    path = tmp_path / "predictions.csv"
    with pytest.raises(InputError, match="No such file"):
        predictions.read(path, HAM10000)
    path.write_text("image_id,lesion_id,akiec,bcc\na,b,0.5,0.5\n")
    with pytest.raises(InputError, match="it lacks truth"):
        predictions.read(path)
    path.write_text("image_id,lesion_id,truth,akiec,age\na,b,akiec,1,5\n")
    with pytest.raises(InputError, match="2 to 100"):
        predictions.read(path)
    path.write_text("image_id,lesion_id,truth,akiec,bcc\n")
    with pytest.raises(InputError, match="lacks bkl, df, mel, nv, vasc"):
        predictions.read(path, HAM10000)
    given = (np.arange(3), np.eye(7)[:3], np.array(["", "", ""]))
    Predictions(HAM10000, *given, np.array(["a", "b", "c"])).write(path)
    path.write_text(path.read_text().replace("akiec,1.0", "moles,1.0")[:-10])
    with pytest.raises(InputError) as caught:
        predictions.read(path, HAM10000)
    assert [fault.split(":")[0][-6:] for fault in caught.value.faults] == ["line 2", "line 4"]
    Predictions(HAM10000, *given, np.array(["a", "b", "a"])).write(path)
    path.write_text(path.read_text().replace("bcc,0.0", "bcc,nan"))
    with pytest.raises(InputError) as caught:
        predictions.read(path, HAM10000)
    assert "line 3: a is in line 2 already" in caught.value.faults[0]
    assert "line 4: truth must be" in caught.value.faults[1]
    path.write_text(path.read_text().splitlines()[0])
    with pytest.raises(InputError, match="a header only"):
        predictions.read(path, HAM10000)
