import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle

from ham_jax import files
from ham_jax.classes import HAM10000, Classes
from ham_jax.evaluation import metrics
from ham_jax.evaluation.predictions import Predictions


def draw(n, seed=0, signal=0.2):
    rng = np.random.default_rng(seed)
    labels = rng.choice(7, n, p=[0.05, 0.1, 0.1, 0.05, 0.1, 0.5, 0.1])
    p = (1 - signal) * rng.dirichlet(np.ones(7), n) + signal * np.eye(7)[labels]
    return Predictions(HAM10000, labels, p)


def test_every_number_agrees_with_scikit_learn():
    predictions = draw(600)
    labels, p = predictions.labels, predictions.probabilities
    found, predicted = metrics.compute(predictions), p.argmax(1)
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
    for k, dx in enumerate(HAM10000):
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
        assert metrics.compute(predictions.take(order)) == found, "to the last digit"


# Coarse values make ties, certain predictions and values on the edges of the bins common.
coarse = st.lists(st.sampled_from([0.0, 1 / 15, 0.2, 1 / 3, 0.4, 1.0]), min_size=3, max_size=3)


@settings(max_examples=60, deadline=None)
@example(data=[(0, [0.1, 0.2, 0.0]), (1, [0.1, 0.25, 0.0])])  # 3 / 15 belongs to the lower bin
@given(data=st.lists(st.tuples(st.integers(0, 2), coarse), min_size=1, max_size=12))
def test_ties_absent_classes_and_bins_against_a_plain_loop(data):
    labels = np.array([label for label, _ in data])
    p = np.array([row for _, row in data])
    found = metrics.compute(Predictions(Classes(("a", "b", "c")), labels, p))

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
