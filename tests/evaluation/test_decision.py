"""What is promised of sets and of the flag holds on lesions that they were not fitted on."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as oracle

from ham_jax import CLASSES
from ham_jax.evaluation import decision, metrics

MALIGNANT = [CLASSES.index(dx) for dx in ("akiec", "bcc", "mel")]


def draw(num_lesions, rng, signal=2.0, most=4):
    """Returns labels, probabilities and lesions; photographs of a lesion are much alike."""
    of_lesion = rng.choice(7, num_lesions, p=[0.1, 0.1, 0.15, 0.1, 0.15, 0.3, 0.1])
    # Lesions that are hard are photographed more often.
    hard = rng.random(num_lesions) < 0.3
    lesion = np.repeat(np.arange(num_lesions), np.where(hard, rng.integers(1, most + 1), 1))
    shared = rng.normal(0, 1, (num_lesions, 7))[lesion]
    labels = of_lesion[lesion]
    truth = np.eye(7)[labels] * np.where(hard, 0, signal)[lesion, None]
    logits = truth + shared + rng.normal(0, 0.3, (len(lesion), 7))
    odds = np.exp(logits)
    return labels, odds / odds.sum(-1, keepdims=True), np.array([f"HAM_{n}" for n in lesion])


@pytest.mark.parametrize("kind", ["marginal", "class_conditional"])
def test_a_photograph_of_a_new_lesion_is_covered_as_promised(kind):
    """Over many draws the coverage is the level: not below it, and hardly above."""
    rng = np.random.default_rng(0)
    num_draws, num_lesions = 300, 150
    covered, of_class = [], []
    for _ in range(num_draws):
        thresholds = decision.fit(*draw(num_lesions, rng))
        labels, probabilities, groups = draw(100, rng)
        _, first = np.unique(groups, return_index=True)  # one photograph a new lesion
        inside = decision.sets(probabilities[first], thresholds, kind)
        covered.append(inside[np.arange(len(first)), :, labels[first]])
        of_class.append(labels[first])
    covered, of_class = np.concatenate(covered), np.concatenate(of_class)
    for number, level in enumerate(decision.LEVELS):
        which = (
            [of_class == k for k in range(7)] if kind == "class_conditional" else [of_class > -1]
        )
        for chosen in which:
            # The draws of thresholds vary too: what they add is below 1 / sqrt(num_draws n).
            slack = 4 * math.sqrt(level * (1 - level) * (1 / chosen.sum() + 1 / num_draws / 10))
            share = covered[chosen, number].mean()
            assert level - slack < share
            if kind == "marginal":
                assert share < level + 1 / (num_lesions + 1) + slack


def test_with_one_photograph_a_lesion_it_is_the_usual_quantile():
    rng = np.random.default_rng(1)
    for n in (5, 8, 9, 10, 18, 19, 20, 99, 100):
        labels, probabilities, groups = draw(n, rng, most=1)
        assert len(set(groups)) == n
        scores = np.sort(1 - probabilities[np.arange(n), labels])
        found = decision.fit(labels, probabilities, groups)["marginal"]
        for level, rank, threshold in zip(
            (0.9, 0.95), (-(-9 * (n + 1) // 10), -(-19 * (n + 1) // 20)), found, strict=True
        ):
            assert level in decision.LEVELS
            assert threshold == pytest.approx(1 - scores[rank - 1] if rank <= n else 0, abs=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_flag_finds_its_share_where_it_was_fitted(seed, num_lesions, coarse):
    labels, probabilities, groups = draw(num_lesions, np.random.default_rng(seed))
    if coarse:
        probabilities = np.round(probabilities, 1)
    thresholds = decision.fit(labels, probabilities, groups)
    assert json.loads(json.dumps(thresholds, allow_nan=False)) == thresholds
    truth = np.isin(labels, MALIGNANT)
    score = decision.malignancy(probabilities)
    np.testing.assert_allclose(score, probabilities[:, MALIGNANT].sum(-1), rtol=1e-12)
    if not truth.any():
        assert thresholds["malignant"] == 0
        return
    assert np.mean(score[truth] >= thresholds["malignant"]) >= 0.95
    assert np.mean(score[truth] > thresholds["malignant"]) < 0.95, "the largest such threshold"
    order = np.random.default_rng(seed).permutation(len(labels))
    assert decision.fit(labels[order], probabilities[order], groups[order]) == thresholds
    assert decision.measure(
        labels[order], probabilities[order], groups[order], thresholds
    ) == decision.measure(labels, probabilities, groups, thresholds)


def test_the_flag_agrees_with_scikit_learn_and_its_interval_with_theory():
    rng = np.random.default_rng(2)
    labels, probabilities, groups = draw(600, rng, most=1)
    score = np.round(decision.malignancy(probabilities), 2)  # with ties
    truth = np.isin(labels, MALIGNANT)
    found = decision.flag(labels, score, groups, 0.4)
    assert found["auc"] == pytest.approx(oracle.roc_auc_score(truth, score), rel=1e-12)
    assert found["sensitivity"] == np.mean(score[truth] >= 0.4)
    assert found["specificity"] == np.mean(score[~truth] < 0.4)
    assert (found["num_malignant"], found["threshold"]) == (truth.sum(), pytest.approx(0.4))
    low, high = found["auc_interval"]
    assert low < found["auc"] < high
    share, n = found["sensitivity"], truth.sum()
    exact = stats.binomtest(round(share * n), int(n)).proportion_ci(0.95, method="wilson")
    assert found["sensitivity_interval"] == pytest.approx([exact.low, exact.high], abs=0.012)

    curve = decision.roc(labels, score)
    assert oracle.auc(1 - np.array(curve["specificity"]), curve["sensitivity"]) == pytest.approx(
        found["auc"]
    )
    assert json.loads(json.dumps(curve, allow_nan=False)) == curve

    # Each photograph four times says nothing new, and the interval knows.
    again = decision.flag(*(np.repeat(x, 4) for x in (labels, score, groups)), 0.4)
    assert again["auc_interval"] == pytest.approx(found["auc_interval"], abs=1e-12)
    for side in (truth, ~truth):
        alone = decision.flag(labels[side], score[side], groups[side], 0.4)
        assert alone["auc"] is None
        assert alone["sensitivity_interval"] is None


def test_sets_are_counted_by_lesion_and_by_image():
    """Lesion a has two photographs, one covered; lesion b one, with an empty set."""
    probabilities = np.full((3, 7), 0.02)
    probabilities[0, [0, 1]] = 0.5, 0.4
    probabilities[1, 1] = 0.88
    labels, groups = np.array([0, 0, 5]), np.array(["a", "a", "b"])
    thresholds = {"malignant": 0.5, "marginal": [0.3, 0.01], "class_conditional": np.zeros((2, 7))}
    found = decision.measure(labels, probabilities, groups, thresholds)["sets"]
    first = found["0.90"]["marginal"]
    assert first["coverage"] == pytest.approx(0.25)
    assert first["coverage_of_images"] == pytest.approx(1 / 3)
    assert first["coverage_per_class"] == dict.fromkeys(CLASSES) | {"akiec": 0.5, "nv": 0}
    assert first["mean_size"] == pytest.approx(1)
    assert (first["empty"], first["single"]) == pytest.approx((1 / 3, 1 / 3))
    assert found["0.95"]["marginal"]["coverage"] == 1
    assert found["0.90"]["class_conditional"]["mean_size"] == 7


def test_thresholds_may_differ_by_image():
    rng = np.random.default_rng(3)
    labels, probabilities, groups = draw(50, rng)
    one = decision.fit(labels, probabilities, groups)
    same = {
        name: np.broadcast_to(value, (len(labels), *np.shape(value))) for name, value in one.items()
    }
    assert decision.measure(labels, probabilities, groups, one) == decision.measure(
        labels, probabilities, groups, same
    )


def test_abstention_by_hand():
    """The two right answers are the surest, then one wrong: risks 0, 0, 1/3."""
    probabilities = np.zeros((3, 7))
    probabilities[range(3), [0, 1, 2]] = 0.9, 0.8, 0.7
    labels = np.array([0, 1, 3])
    curve = decision.risk_coverage(labels, probabilities)
    assert curve["risk"] == pytest.approx([0, 0, 1 / 3])
    assert curve["coverage"] == pytest.approx([1 / 3, 2 / 3, 1])
    found = decision.abstention(labels, probabilities)
    assert found["aurc"] == pytest.approx(1 / 9)
    assert found["selective"][0] == pytest.approx(
        {"coverage": 1, "accuracy": 2 / 3, "balanced_accuracy": 2 / 3, "num_classes": 3}
    )
    assert found["selective"][-1] == pytest.approx(
        {"coverage": 2 / 3, "accuracy": 1, "balanced_accuracy": 1, "num_classes": 2}
    )


@given(st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_abstention_at_full_coverage_is_the_plain_number_and_ties_have_no_order(seed):
    rng = np.random.default_rng(seed)
    labels, probabilities, _ = draw(60, rng)
    probabilities = np.round(probabilities, 1)
    whole = metrics.compute(labels, probabilities)
    found = decision.abstention(labels, probabilities)
    for name in ("accuracy", "balanced_accuracy"):
        assert found["selective"][0][name] == pytest.approx(whole[name], abs=1e-12)
    for wanted, row in zip(decision.COVERAGES, found["selective"], strict=True):
        assert row["coverage"] >= wanted - 1e-12
    order = rng.permutation(len(labels))
    assert decision.abstention(labels[order], probabilities[order]) == found
