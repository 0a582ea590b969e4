"""One answer a lesion is the mean over its photographs, counted by an oracle that loops."""

import math

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as oracle

from ham_jax.classes import HAM10000
from ham_jax.evaluation import lesions
from ham_jax.evaluation.predictions import Predictions


def drawn(num=300, num_lesions=170, seed=0):
    rng = np.random.default_rng(seed)
    lesion = rng.integers(0, num_lesions, num)
    labels = lesion % len(HAM10000)
    p = 0.7 * rng.dirichlet(np.ones(7), num) + 0.3 * np.eye(7)[labels]
    ids = np.array([f"HAM_{k:03d}" for k in lesion], object)
    return Predictions(HAM10000, labels, p, ids)


def test_its_figures_are_those_of_the_means_by_pandas_and_scikit_learn():
    judged = drawn()
    table = pd.DataFrame(judged.probabilities).assign(y=judged.labels, lesion=judged.lesion_ids)
    means = table.groupby("lesion").mean()
    truth, p = means.pop("y").astype(int).to_numpy(), means.to_numpy()
    found = lesions.measure(judged)
    assert found["num_lesions"] == len(means) == judged.num_lesions < len(judged)
    assert found["num_with_several"] == (table["lesion"].value_counts() > 1).sum()
    expected = {
        "balanced_accuracy": oracle.balanced_accuracy_score(truth, p.argmax(1)),
        "accuracy": oracle.accuracy_score(truth, p.argmax(1)),
        "macro_auc": oracle.roc_auc_score(truth, p, multi_class="ovr"),
        "macro_average_precision": oracle.average_precision_score(np.eye(7)[truth], p),
        "log_loss": oracle.log_loss(truth, p),
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-12)
    recall = oracle.recall_score(truth, p.argmax(1), average=None)
    for k, dx in enumerate(HAM10000):
        of_class = {"num_lesions": (truth == k).sum(), "sensitivity": recall[k]}
        assert found["per_class"][dx] == pytest.approx(of_class)
    low, high = found["balanced_accuracy_interval"]
    assert low < found["balanced_accuracy"] < high
    one = table.assign(right=judged.probabilities.argmax(1) == judged.labels)
    of_lesions = one.groupby("lesion").agg(y=("y", "first"), right=("right", "mean"))
    expected = of_lesions.groupby("y")["right"].mean().mean()
    assert found["balanced_accuracy_of_one"] == pytest.approx(expected, rel=1e-12)
    assert found["balanced_accuracy"] > expected, "averaging noise away helps"


def test_the_order_of_the_images_changes_no_digit():
    judged = drawn()
    found = lesions.measure(judged)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(judged))
        assert lesions.measure(judged.take(order)) == found


def test_where_each_image_is_a_lesion_there_is_no_second_figure():
    judged = drawn()
    assert lesions.measure(Predictions(HAM10000, judged.labels, judged.probabilities)) is None


def test_a_lesion_of_two_labels_counts_as_two():
    p = np.array([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]]) @ np.eye(2, 7)
    ids = np.array(["a", "a", "a"], object)
    of_lesions = Predictions(HAM10000, np.array([1, 0, 0]), p, ids).by_lesion()
    assert of_lesions.labels.tolist() == [0, 1]
    assert of_lesions.probabilities[:, 0].tolist() == [0.375, 0.75]
    assert of_lesions.metadata["num_images"].tolist() == [2, 1]
    assert all(math.isclose(sum(row), 1) for row in of_lesions.probabilities)
