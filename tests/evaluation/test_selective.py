"""How good sets, flag and abstention are, by hand and by others' code."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as oracle

from ham_jax.classes import HAM10000, Classes
from ham_jax.evaluation import metrics, selective
from ham_jax.evaluation.predictions import Predictions
from ham_jax.inference.decision import Calibrated

MALIGNANT = [HAM10000.index(dx) for dx in ("akiec", "bcc", "mel")]


def draw(num_lesions, rng, signal=2.0, most=4):
    """Returns predictions; photographs of a lesion are much alike."""
    of_lesion = rng.choice(7, num_lesions, p=[0.1, 0.1, 0.15, 0.1, 0.15, 0.3, 0.1])
    # Lesions that are hard are photographed more often.
    hard = rng.random(num_lesions) < 0.3
    lesion = np.repeat(np.arange(num_lesions), np.where(hard, rng.integers(1, most + 1), 1))
    shared = rng.normal(0, 1, (num_lesions, 7))[lesion]
    labels = of_lesion[lesion]
    truth = np.eye(7)[labels] * np.where(hard, 0, signal)[lesion, None]
    logits = truth + shared + rng.normal(0, 0.3, (len(lesion), 7))
    odds = np.exp(logits)
    lesion_ids = np.array([f"HAM_{n}" for n in lesion])
    return Predictions(HAM10000, labels, odds / odds.sum(-1, keepdims=True), lesion_ids)


def calibrated(predictions, malignant=0.5, marginal=0.0, class_conditional=0.0):
    """Returns what is said of images, all with the same thresholds."""
    n, c = predictions.probabilities.shape
    thresholds = {
        "malignant": np.full(n, malignant),
        "marginal": np.full(n, marginal),
        "class_conditional": np.full((n, c), class_conditional),
    }
    return Calibrated(predictions.classes, "none", {"none": predictions.probabilities}, thresholds)


def test_the_flag_agrees_with_scikit_learn_and_its_interval_with_theory():
    rng = np.random.default_rng(2)
    drawn = draw(600, rng, most=1)
    # With ties: the whole score in one class.
    score = np.round(drawn.probabilities[:, MALIGNANT].sum(-1), 2)
    p = np.zeros((600, 7))
    p[:, 4], p[:, 5] = score, 1 - score
    predictions = drawn.with_probabilities(p)
    truth = np.isin(predictions.labels, MALIGNANT)
    said = calibrated(predictions, 0.4)
    found = selective.flag(predictions, said)
    assert found["auc"] == pytest.approx(oracle.roc_auc_score(truth, score), rel=1e-12)
    assert found["sensitivity"] == np.mean(score[truth] >= 0.4)
    assert found["specificity"] == np.mean(score[~truth] < 0.4)
    assert (found["num_malignant"], found["threshold"]) == (truth.sum(), pytest.approx(0.4))
    low, high = found["auc_interval"]
    assert low < found["auc"] < high
    share, n = found["sensitivity"], truth.sum()
    exact = stats.binomtest(round(share * n), int(n)).proportion_ci(0.95, method="wilson")
    assert found["sensitivity_interval"] == pytest.approx([exact.low, exact.high], abs=0.012)

    curve = selective.roc(predictions, said)
    assert oracle.auc(1 - np.array(curve["specificity"]), curve["sensitivity"]) == pytest.approx(
        found["auc"]
    )
    assert json.loads(json.dumps(curve, allow_nan=False)) == curve

    # Each photograph four times says nothing new, and the interval knows.
    repeated = predictions.take(np.arange(600).repeat(4))
    again = selective.flag(repeated, calibrated(repeated, 0.4))
    assert again["auc_interval"] == pytest.approx(found["auc_interval"], abs=1e-12)
    for side in (truth, ~truth):
        one_kind = predictions.take(side)
        alone = selective.flag(one_kind, calibrated(one_kind, 0.4))
        assert alone["auc"] is None
        assert alone["sensitivity_interval"] is None


def test_without_malignant_classes_there_is_nothing_to_flag():
    classes = Classes(("a", "b", "c"))
    predictions = Predictions(classes, np.array([0, 1, 2]), np.eye(3))
    found = selective.measure(predictions, calibrated(predictions, malignant=0.0))
    assert found["malignant"]["num_malignant"] == 0
    assert found["malignant"]["auc"] is None
    assert found["sets"]["0.90"]["marginal"]["coverage_per_class"] == dict.fromkeys("abc", 1)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_sets_are_counted_by_lesion_and_by_image():
    """Lesion a has two photographs, one covered; lesion b one, with an empty set."""
    probabilities = np.full((3, 7), 0.02)
    probabilities[0, [0, 1]] = 0.5, 0.4
    probabilities[1, 1] = 0.88
    predictions = Predictions(
        HAM10000, np.array([0, 0, 5]), probabilities, np.array(["a", "a", "b"])
    )
    said = calibrated(predictions, marginal=0.3)
    found = selective.measure(predictions, said)["sets"]
    assert list(found) == ["0.90"]
    first = found["0.90"]["marginal"]
    assert first["coverage"] == pytest.approx(0.25)
    assert first["coverage_of_images"] == pytest.approx(1 / 3)
    assert first["coverage_per_class"] == dict.fromkeys(HAM10000) | {"akiec": 0.5, "nv": 0}
    assert first["mean_size"] == pytest.approx(1)
    assert (first["empty"], first["single"]) == pytest.approx((1 / 3, 1 / 3))
    interval = stats.binomtest(0, 1).proportion_ci(0.95, method="wilson")
    of_nv = first["coverage_per_class_interval"]["nv"]
    assert of_nv == pytest.approx([interval.low, interval.high])
    assert first["coverage_per_class_interval"]["mel"] is None
    all_in = selective.measure(predictions, calibrated(predictions, marginal=0.01))["sets"]
    assert all_in["0.90"]["marginal"]["coverage"] == 1
    assert found["0.90"]["class_conditional"]["mean_size"] == 7


def test_abstention_by_hand():
    """The two right answers are the surest, then one wrong: risks 0, 0, 1/3."""
    probabilities = np.zeros((3, 7))
    probabilities[range(3), [0, 1, 2]] = 0.9, 0.8, 0.7
    predictions = Predictions(HAM10000, np.array([0, 1, 3]), probabilities)
    curve = selective.risk_coverage(predictions)
    assert curve["risk"] == pytest.approx([0, 0, 1 / 3])
    assert curve["coverage"] == pytest.approx([1 / 3, 2 / 3, 1])
    found = selective.abstention(predictions)
    assert found["aurc"] == pytest.approx(1 / 9)
    assert found["selective"][0] == pytest.approx(
        {
            "asked": 1,
            "coverage": 1,
            "accuracy": 2 / 3,
            "balanced_accuracy": 2 / 3,
            "num_classes": 3,
        }
    )
    assert found["selective"][-1] == pytest.approx(
        {
            "asked": 0.5,
            "coverage": 2 / 3,
            "accuracy": 1,
            "balanced_accuracy": 1,
            "num_classes": 2,
        }
    )


@given(st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_abstention_at_full_coverage_is_the_plain_number_and_ties_have_no_order(seed):
    rng = np.random.default_rng(seed)
    drawn = draw(60, rng)
    predictions = drawn.with_probabilities(np.round(drawn.probabilities, 1))
    whole = metrics.compute(predictions)
    found = selective.abstention(predictions)
    for name in ("accuracy", "balanced_accuracy"):
        assert found["selective"][0][name] == pytest.approx(whole[name], abs=1e-12)
    for wanted, row in zip(selective.COVERAGES, found["selective"], strict=True):
        assert row["coverage"] >= wanted - 1e-12
    order = rng.permutation(len(predictions))
    assert selective.abstention(predictions.take(order)) == found
