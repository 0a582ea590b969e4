import json
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle

from ham_jax import CLASSES, files
from ham_jax.config import InputError
from ham_jax.evaluation import metrics


def draw(n, seed=0, signal=0.2):
    rng = np.random.default_rng(seed)
    labels = rng.choice(7, n, p=[0.05, 0.1, 0.1, 0.05, 0.1, 0.5, 0.1])
    return labels, (1 - signal) * rng.dirichlet(np.ones(7), n) + signal * np.eye(7)[labels]


def test_every_number_agrees_with_scikit_learn():
    labels, p = draw(600)
    found, predicted = metrics.compute(labels, p), p.argmax(1)
    macro = {
        "balanced_accuracy": oracle.balanced_accuracy_score(labels, predicted),
        "accuracy": oracle.accuracy_score(labels, predicted),
        "macro_auc": oracle.roc_auc_score(labels, p, multi_class="ovr"),
        "macro_average_precision": oracle.average_precision_score(np.eye(7)[labels], p),
        "macro_f1": oracle.f1_score(labels, predicted, average="macro"),
        "log_loss": oracle.log_loss(labels, p),
    }
    assert found["num_images"] == 600
    assert {k: found[k] for k in macro} == pytest.approx(macro, rel=1e-12)
    confusion = oracle.confusion_matrix(labels, predicted)
    assert found["confusion_matrix"] == confusion.tolist()
    columns = oracle.precision_recall_fscore_support(labels, predicted)
    for k, dx in enumerate(CLASSES):
        precision, recall, f1, count = (column[k] for column in columns)
        rest = np.delete(confusion, k, axis=0)
        assert found["per_class"][dx] == pytest.approx(
            {
                "num_images": count,
                "sensitivity": recall,
                "specificity": 1 - rest[:, k].sum() / rest.sum(),
                "precision": precision,
                "f1": f1,
                "auc": oracle.roc_auc_score(labels == k, p[:, k]),
                "average_precision": oracle.average_precision_score(labels == k, p[:, k]),
            },
            rel=1e-12,
        )
    for seed in range(10):
        order = np.random.default_rng(seed).permutation(600)
        assert metrics.compute(labels[order], p[order]) == found, "to the last digit"


# Coarse values make ties, certain predictions and values on the edges of the bins common.
coarse = st.lists(st.sampled_from([0.0, 1 / 15, 0.2, 1 / 3, 0.4, 1.0]), min_size=3, max_size=3)


@settings(max_examples=60, deadline=None)
@example(data=[(0, [0.1, 0.2, 0.0]), (1, [0.1, 0.25, 0.0])])  # 3 / 15 belongs to the lower bin
@given(data=st.lists(st.tuples(st.integers(0, 2), coarse), min_size=1, max_size=12))
def test_ties_absent_classes_and_bins_against_a_plain_loop(data):
    labels = np.array([label for label, _ in data])
    p = np.array([row for _, row in data])
    found = metrics.compute(labels, p, classes=("a", "b", "c"))

    right = [row.count(max(row)) == 1 and row[label] == max(row) for label, row in data]
    recalls = [
        np.mean([r for r, y in zip(right, labels, strict=True) if y == k]) for k in {*labels}
    ]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert found["accuracy"] == pytest.approx(np.mean(right))

    error = 0.0
    for b in range(15):
        low, high = (b / 15 if b else -1), (b + 1) / 15
        members = [(max(row), r) for (_, row), r in zip(data, right, strict=True)]
        members = [(c, r) for c, r in members if low < c <= high]
        error += abs(sum(c for c, _ in members) - sum(r for _, r in members))
    assert found["expected_calibration_error"] == pytest.approx(error / len(data), abs=1e-12)

    for k, name in enumerate("abc"):
        if k not in labels:
            row = found["per_class"][name]
            assert [row[m] for m in ("sensitivity", "f1", "auc", "average_precision")] == [None] * 4
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("labels", "p"),
    [
        (np.zeros(0, int), np.zeros((0, 7))),
        (np.zeros(2), np.full((2, 7), 1 / 7)),
        (np.array([0, 7]), np.full((2, 7), 1 / 7)),
        (np.array([0, 1]), np.full((2, 6), 1 / 6)),
        (np.array([0, 1]), np.full((2, 7), np.nan)),
    ],
)
def test_what_cannot_be_measured_is_refused(labels, p):
    with pytest.raises(ValueError, match=r"labels|probabilities"):
        metrics.compute(labels, p)


def test_interval_agrees_with_a_bootstrap_loop_over_lesions():
    labels, p = draw(150, signal=0.15)
    rng = np.random.default_rng(1)
    lesions = np.array([f"{y}-{i}" for y, i in zip(labels, rng.integers(0, 9, 150), strict=True)])
    right = p.argmax(1) == labels
    draws = []
    for _ in range(1000):
        recalls = []
        for k in range(7):
            own = np.unique(lesions[labels == k])
            images = [np.flatnonzero(lesions == name) for name in rng.choice(own, len(own))]
            recalls.append(right[np.concatenate(images)].mean())
        draws.append(np.mean(recalls))
    found = metrics.interval(labels, p, lesions, num_draws=4000)
    # The end points of two bootstraps differ by about 0.003 (standard error of the 2.5 % quantile).
    np.testing.assert_allclose(found, np.quantile(draws, [0.025, 0.975]), atol=0.012)
    assert found == metrics.interval(labels, p, lesions, num_draws=4000)
    narrow = metrics.interval(labels, p, lesions, num_draws=4000, level=0.5)
    assert found[0] < narrow[0] < metrics.compute(labels, p)["balanced_accuracy"] < narrow[1]


def test_interval_is_wider_where_images_share_lesions_and_is_fast():
    labels, p = draw(500, signal=0.15)
    repeated = (np.repeat(labels, 4), np.repeat(p, 4, axis=0))  # four equal images a lesion
    start = time.perf_counter()
    low, high = metrics.interval(*repeated, groups=np.repeat(np.arange(500), 4))
    assert time.perf_counter() - start < 2
    image_low, image_high = metrics.interval(*repeated, groups=np.arange(2000))
    assert 1.7 < (high - low) / (image_high - image_low) < 2.3  # sqrt(4)


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
    metrics.write_predictions(
        path,
        [names[i] for i in turned],
        [f"={i}" for i in turned],
        np.array(labels)[turned],
        p[turned],
    )
    image_ids, lesion_ids, back, probabilities = metrics.read_predictions(path)
    assert image_ids == list(names)
    assert lesion_ids == [f"={i}" for i in range(len(data))]
    assert "\n=" not in path.read_text()
    assert ",=" not in path.read_text()
    np.testing.assert_array_equal(back, labels)
    np.testing.assert_array_equal(probabilities, p.astype(float))
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
    given = (["b", "a"], ["L2", "L1"], np.array([4, 5]), np.eye(7)[:2])
    metrics.write_predictions(path, *given, known)
    lines = path.read_text().splitlines()
    assert lines[0].endswith("nv,vasc,age,sex,localization,dx_type,ood_score")
    assert lines[1].endswith(',,,"face, left",,1.5')
    table = metrics.read_table(path)
    assert table["image_id"].tolist() == ["a", "b"]
    assert table["truth"].tolist() == ["nv", "mel"]
    np.testing.assert_array_equal(table[list(CLASSES)], np.eye(7)[[1, 0]])
    np.testing.assert_array_equal(table["age"], [np.nan, 35])
    texts = table[["sex", "localization", "dx_type", "ood_score"]].to_numpy().tolist()
    assert texts == [["", "face, left", "", 1.5], ["female", "lower extremity", "histo", 0.25]]
    assert [list(part) for part in metrics.read_predictions(path)[:3]] == [
        *(["a", "b"], ["L1", "L2"], [5, 4])
    ]

    path.write_text(path.read_text().replace("35.0", "young"))
    with pytest.raises(InputError, match=r"line 3: .* age and ood_score a number or empty"):
        metrics.read_table(path)
    metrics.write_predictions(path, *given)
    table = metrics.read_table(path)
    assert table["age"].isna().all()
    assert (table[["sex", "localization", "dx_type"]] == "").all(axis=None)


def test_a_damaged_predictions_file_is_refused_line_by_line(tmp_path):
    path = tmp_path / "predictions.csv"
    with pytest.raises(InputError, match="No such file"):
        metrics.read_predictions(path)
    path.write_text("image_id,lesion_id,truth,akiec,bcc\n")
    with pytest.raises(InputError, match="lacks bkl, df, mel, nv, vasc"):
        metrics.read_predictions(path)
    metrics.write_predictions(path, ["a", "b", "c"], ["", "", ""], np.arange(3), np.eye(7)[:3])
    path.write_text(path.read_text().replace("akiec,1.0", "moles,1.0")[:-10])
    with pytest.raises(InputError) as caught:
        metrics.read_predictions(path)
    assert [fault.split(":")[0][-6:] for fault in caught.value.faults] == ["line 2", "line 4"]
    metrics.write_predictions(path, ["a", "b", "a"], ["", "", ""], np.arange(3), np.eye(7)[:3])
    path.write_text(path.read_text().replace("bcc,0.0", "bcc,nan"))
    with pytest.raises(InputError) as caught:
        metrics.read_predictions(path)
    assert "line 3: a is in line 2 already" in caught.value.faults[0]
    assert "line 4: truth must be" in caught.value.faults[1]
    path.write_text(path.read_text().splitlines()[0])
    with pytest.raises(InputError, match="a header only"):
        metrics.read_predictions(path)


def test_json_is_strict_and_never_half_written(tmp_path):
    path = tmp_path / "metrics.json"
    files.write_json(path, {"a": [1, None, 0.1]})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": [1, None, 0.1]}
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        files.write_json(tmp_path / "folder", {})
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "metrics.json"]
