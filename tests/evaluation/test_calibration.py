"""Probabilities can be taken at their word after calibration, and nothing else is promised."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from sklearn import isotonic

from ham_jax.classes import HAM10000, Classes
from ham_jax.evaluation import calibration, metrics
from ham_jax.evaluation.predictions import Predictions
from ham_jax.inference import decision
from ham_jax.inference.calibrator import METHODS, calibrate

MALIGNANT = [HAM10000.index(dx) for dx in ("akiec", "bcc", "mel")]
FREQUENCIES = np.array([0.05, 0.1, 0.1, 0.03, 0.1, 0.55, 0.07])


def draw(n, seed=0):
    """Returns labels drawn from probabilities, which are therefore calibrated."""
    rng = np.random.default_rng(seed)
    probabilities = special.softmax(rng.normal(0, 1.5, (n, 7)) + np.log(FREQUENCIES), axis=-1)
    labels = (probabilities.cumsum(-1) < rng.random((n, 1))).sum(-1)
    return Predictions(HAM10000, labels, probabilities)


def balanced(predictions):
    """What a network answers that is too sure, in a world of equally frequent classes."""
    odds = (predictions.probabilities / FREQUENCIES) ** 2
    return predictions.with_probabilities(odds / odds.sum(-1, keepdims=True))


def after(method, fitted_on, fresh):
    """Returns fresh images, calibrated by a method that was fitted on others."""
    parameters = calibration.fit_method(method, fitted_on.labels, fitted_on.probabilities)
    return fresh.with_probabilities(calibrate(parameters, method, fresh.probabilities))


def of_lesions(num_lesions, rng, signal=2.0, most=4):
    """Returns predictions; photographs of a lesion are much alike."""
    of_lesion = rng.choice(7, num_lesions, p=[0.1, 0.1, 0.15, 0.1, 0.15, 0.3, 0.1])
    # Lesions that are hard are photographed more often.
    hard = rng.random(num_lesions) < 0.3
    lesion = np.repeat(np.arange(num_lesions), np.where(hard, rng.integers(1, most + 1), 1))
    shared = rng.normal(0, 1, (num_lesions, 7))[lesion]
    labels = of_lesion[lesion]
    truth = np.eye(7)[labels] * np.where(hard, 0, signal)[lesion, None]
    p = special.softmax(truth + shared + rng.normal(0, 0.3, (len(lesion), 7)), axis=-1)
    return Predictions(HAM10000, labels, p, np.array([f"HAM_{n}" for n in lesion]))


def sure(num_lesions=300, seed=0, signal=3):
    """Returns predictions that are mostly right."""
    rng = np.random.default_rng(seed)
    lesion = np.repeat(np.arange(num_lesions), rng.integers(1, 4, num_lesions))
    labels = rng.choice(7, num_lesions, p=[0.1, 0.1, 0.1, 0.05, 0.15, 0.4, 0.1])[lesion]
    p = special.softmax(signal * np.eye(7)[labels] + rng.normal(0, 2, (len(labels), 7)), axis=-1)
    return Predictions(HAM10000, labels, p, np.array([f"HAM_{n}" for n in lesion]))


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_temperature_is_found_again_and_leaves_every_answer(temperature):
    true = draw(20_000)
    p = special.softmax(np.log(true.probabilities) * temperature, axis=-1)
    raw = true.with_probabilities(p)
    fitted = calibration.fit_method("temperature", raw.labels, p)
    assert fitted["temperature"] == pytest.approx(temperature, rel=0.03)
    found = after("temperature", raw, raw)
    np.testing.assert_array_equal(found.probabilities.argmax(-1), p.argmax(-1))
    before, then = calibration.measure_method(raw), calibration.measure_method(found)
    assert then["balanced_accuracy"] == before["balanced_accuracy"]
    if temperature != 1:
        for number in ("log_loss", "brier_score", "expected_calibration_error"):
            assert then[number] < before[number]


def test_isotonic_brings_back_the_frequencies_and_temperature_cannot():
    """The trap of the default loss: better probabilities, fewer rare diagnoses."""
    fitted_on, fresh = balanced(draw(8_000)), balanced(draw(8_000, 1))
    raw = calibration.measure_method(fresh)
    found = {m: calibration.measure_method(after(m, fitted_on, fresh)) for m in METHODS}
    assert found["none"] == raw
    assert found["temperature"]["balanced_accuracy"] == raw["balanced_accuracy"]
    isotonic = found["isotonic"]
    for name in ("expected_calibration_error", "expected_calibration_error_equal_mass"):
        assert isotonic[name] < 0.3 * raw[name]
    assert isotonic["log_loss"] < found["temperature"]["log_loss"] - 0.1
    assert isotonic["balanced_accuracy"] < raw["balanced_accuracy"] - 0.02


def test_isotonic_is_scikit_learns():
    raw = draw(500)
    fresh = raw.take(np.arange(50))
    expected = np.empty((50, 7))
    for k in range(7):
        line = isotonic.IsotonicRegression(y_min=1 / 502, y_max=501 / 502, out_of_bounds="clip")
        line.fit(raw.probabilities[:, k], raw.labels == k)
        expected[:, k] = line.predict(fresh.probabilities[:, k])
    expected /= expected.sum(-1, keepdims=True)
    found = after("isotonic", raw, fresh).probabilities
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from(METHODS))
@settings(max_examples=40, deadline=None)
def test_whatever_was_fitted_gives_probabilities_and_survives_json(seed, n, method):
    """Few images, absent classes, certain answers; another order of images; a file between."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, rng.integers(1, 8), n)
    raw = rng.dirichlet(np.full(7, 0.05), n)
    raw[: n // 3] = np.eye(7)[labels[: n // 3]]
    fitted = calibration.fit_method(method, labels, raw)
    order = rng.permutation(n)
    assert calibration.fit_method(method, labels[order], raw[order]) == fitted
    found = calibrate(fitted, method, raw)
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-12)
    read = json.loads(json.dumps(fitted, allow_nan=False))
    np.testing.assert_array_equal(calibrate(read, method, raw), found)
    for row in range(n):  # each by itself
        alone = calibrate(read, method, raw[row : row + 1])[0]
        np.testing.assert_array_equal(alone, found[row])
    if method == "temperature":
        np.testing.assert_array_equal(found[range(n), raw.argmax(-1)], found.max(-1))
    if method == "isotonic":
        assert (found > 0).all()


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4)), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_folds_hold_each_image_out_once_with_its_lesion(lesions):
    labels = np.repeat([k for k, _ in lesions], [size for _, size in lesions])
    groups = np.repeat(np.arange(len(lesions)), [size for _, size in lesions]).astype(str)
    most = max(np.bincount([k for k, _ in lesions]))
    parts = calibration.folds(labels, groups)
    assert len(parts) == (min(5, most) if most > 1 else 0)
    for rest, held_out in parts:
        assert sorted([*rest, *held_out]) == list(range(len(labels)))
        assert not set(groups[rest]) & set(groups[held_out])
    if parts:
        everything = np.concatenate([held_out for _, held_out in parts])
        assert sorted(everything) == list(range(len(labels)))
    order = np.random.default_rng(0).permutation(len(labels))
    again = calibration.folds(labels[order], groups[order])
    assert [set(groups[h]) for _, h in parts] == [set(groups[order][h]) for _, h in again]


def test_each_class_is_in_each_fold():
    labels = np.repeat(np.arange(7), 10)
    for rest, held_out in calibration.folds(labels, np.arange(70)):
        assert (np.bincount(labels[rest]) == 8).all()
        assert (np.bincount(labels[held_out]) == 2).all()


def test_measures_by_hand():
    raw = np.array(
        [[0.6, 0.4, 0, 0, 0, 0, 0], [0.6, 0.2, 0.2, 0, 0, 0, 0], [0.0, 1, 0, 0, 0, 0, 0]]
    )
    labels = np.array([0, 1, 1])
    predictions = Predictions(HAM10000, labels, raw)
    found = calibration.measure_method(predictions)
    assert found["brier_score"] == pytest.approx((0.32 + (0.36 + 0.64 + 0.04) + 0) / 3)
    assert found["expected_calibration_error"] == pytest.approx(0.2 / 3)
    assert found["expected_calibration_error_equal_mass"] == pytest.approx(0.2 / 3)
    table = calibration.reliability(predictions, equal_mass=True)
    assert table == {
        "edges": [0, 0.6, 1],
        "num_images": [2, 1],
        "confidence": [0.6, 1],
        "accuracy": [0.5, 1],
    }


@given(st.integers(0, 1000), st.booleans())
@settings(max_examples=10, deadline=None)
def test_a_reliability_table_holds_all_images_and_the_calibration_error(seed, coarse):
    raw = draw(200, seed)
    if coarse:
        p = np.round(raw.probabilities, 1)
        raw = raw.with_probabilities(p / p.sum(-1, keepdims=True))
    for equal_mass in (False, True):
        table = calibration.reliability(raw, equal_mass)
        assert sum(table["num_images"]) == 200
        edges = zip(table["edges"], table["edges"][1:], strict=False)
        for (low, high), n, mean in zip(
            edges, table["num_images"], table["confidence"], strict=True
        ):
            assert (mean is None) == (n == 0)
            assert n == 0 or low - 1e-12 < mean <= high + 1e-12
            assert not equal_mass or coarse or abs(n - 200 / 15) < 1
    wide = calibration.reliability(raw)
    gaps = [
        n * abs(c - a)
        for n, c, a in zip(wide["num_images"], wide["confidence"], wide["accuracy"], strict=True)
        if n
    ]
    assert sum(gaps) / 200 == pytest.approx(
        metrics.compute(raw)["expected_calibration_error"], abs=1e-12
    )
    order = np.random.default_rng(seed).permutation(200)
    assert calibration.measure_method(raw.take(order)) == calibration.measure_method(raw)


def test_with_few_lesions_similar_diagnoses_share_a_threshold_and_sets_still_help():
    """Class-conditional sets name nearly all of seven diagnoses where most have few lesions."""
    raw = sure(100, signal=5)
    chosen = calibration.choose_sets(raw)
    assert (chosen["kind"], chosen["useful"]) == ("clustered", True)
    thresholds = calibration.fit_thresholds(raw)
    own, shared = thresholds["class_conditional"], thresholds["clustered"]
    assert min(own) == 0
    lesions = {k: set(raw.lesion_ids[raw.labels == k]) for k in range(7)}
    for value in set(shared):
        group = [k for k in range(7) if shared[k] == value]
        assert sum(len(lesions[k]) for k in group) >= 20
    alone = [k for k in range(7) if shared.count(shared[k]) == 1]
    assert all(shared[k] == own[k] for k in alone)

    def size(kind):
        least = np.array(thresholds[kind])
        return (sure(300, 5, signal=5).probabilities >= least).sum(1).mean()

    assert size("clustered") < 2.5 < size("class_conditional")
    order = np.random.default_rng(0).permutation(len(raw))
    assert calibration.choose_sets(raw.take(order)) == chosen
    assert calibration.choose_sets(sure(1000, signal=5))["kind"] == "class_conditional"
    knows_nothing = raw.with_probabilities(np.full((len(raw), 7), 1 / 7))
    assert calibration.choose_sets(knows_nothing)["useful"] is False


@pytest.mark.parametrize("kind", decision.KINDS)
def test_a_photograph_of_a_new_lesion_is_covered_as_promised(kind):
    """Over many draws the coverage is the level: not below it, and hardly above."""
    rng = np.random.default_rng(0)
    num_draws, num_lesions = 300, 150
    covered, of_class = [], []
    for _ in range(num_draws):
        least = np.array(calibration.fit_thresholds(of_lesions(num_lesions, rng))[kind])
        fresh = of_lesions(100, rng)
        _, first = np.unique(fresh.lesion_ids, return_index=True)  # one photograph a new lesion
        labels = fresh.labels[first]
        covered.append(fresh.probabilities[first, labels] >= np.broadcast_to(least, 7)[labels])
        of_class.append(labels)
    covered, of_class = np.concatenate(covered), np.concatenate(of_class)
    groups = [of_class == k for k in range(7)] if kind == "class_conditional" else [of_class > -1]
    for chosen in groups:
        # The draws of thresholds vary too: what they add is below 1 / sqrt(num_draws n).
        slack = 4 * math.sqrt(0.9 * 0.1 * (1 / chosen.sum() + 1 / num_draws / 10))
        share = covered[chosen].mean()
        assert 0.9 - slack < share
        if kind == "marginal":
            assert share < 0.9 + 1 / (num_lesions + 1) + slack


def test_with_one_photograph_a_lesion_it_is_the_usual_quantile():
    rng = np.random.default_rng(1)
    for n in (5, 8, 9, 10, 18, 19, 20, 99, 100):
        predictions = of_lesions(n, rng, most=1)
        assert predictions.num_lesions == n
        scores = np.sort(1 - predictions.probabilities[np.arange(n), predictions.labels])
        rank = -(-9 * (n + 1) // 10)
        threshold = calibration.fit_thresholds(predictions)["marginal"]
        assert threshold == pytest.approx(1 - scores[rank - 1] if rank <= n else 0, abs=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_flag_finds_its_share_where_it_was_fitted(seed, num_lesions, coarse):
    predictions = of_lesions(num_lesions, np.random.default_rng(seed))
    if coarse:
        predictions = predictions.with_probabilities(np.round(predictions.probabilities, 1))
    thresholds = calibration.fit_thresholds(predictions)
    assert json.loads(json.dumps(thresholds, allow_nan=False)) == thresholds
    truth = np.isin(predictions.labels, MALIGNANT)
    score = decision.malignancy(predictions.probabilities, HAM10000)
    if not truth.any():
        assert thresholds["malignant"] == 0
        return
    assert np.mean(score[truth] >= thresholds["malignant"]) >= 0.95
    assert np.mean(score[truth] > thresholds["malignant"]) < 0.95, "the largest such threshold"
    order = np.random.default_rng(seed).permutation(len(predictions))
    assert calibration.fit_thresholds(predictions.take(order)) == thresholds


@pytest.mark.parametrize("method", METHODS)
def test_flag_and_sets_are_on_the_scale_of_the_method_in_use(method):
    """On fresh lesions each method keeps what is promised, with its own thresholds."""
    fresh = sure(2000, 1)
    calibrated = calibration.decide(fresh, "test", method, calibration.fit(sure(2000), {}))
    found = calibration.measure(fresh, calibrated, False)["decision"]
    assert found["malignant"]["sensitivity"] == pytest.approx(0.95, abs=0.02)
    for kind in decision.KINDS:
        assert found["sets"]["0.90"][kind]["coverage"] == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_no_image_is_calibrated_by_its_own_lesion(method):
    raw = sure(60)
    calibrated = calibration.decide(raw, "val", method)
    own = raw.lesion_ids == "HAM_0"
    # Another certainty of the same answer: its fold stays.
    p = raw.probabilities.copy()
    p[own] = p[own] ** 3 / (p[own] ** 3).sum(-1, keepdims=True)
    again = calibration.decide(raw.with_probabilities(p), "val", method)
    for name, thresholds in calibrated.thresholds.items():
        np.testing.assert_array_equal(again.thresholds[name][own], thresholds[own])
    assert (again.probabilities != calibrated.probabilities)[~own].any()
    order = np.random.default_rng(0).permutation(len(raw))
    shuffled = calibration.decide(raw.take(order), "val", method)
    for name in METHODS:
        np.testing.assert_array_equal(shuffled.by_method[name], calibrated.by_method[name][order])
    one = calibration.measure(raw, calibrated, True)
    assert one == calibration.measure(raw.take(order), shuffled, True)
    assert json.loads(json.dumps(one, allow_nan=False)) == one


def test_folds_of_a_cross_validation_are_calibrated_apart_and_joined():
    raw = sure(60)
    rows = np.unique(raw.lesion_ids, return_inverse=True)[1] % 2
    folds = [np.flatnonzero(rows == fold)[::-1] for fold in range(2)]
    joined = calibration.decide(raw, "crossval", "temperature", folds=folds)
    for fold in folds:
        alone = calibration.cross_fit(raw.take(fold), "temperature")
        np.testing.assert_array_equal(joined.probabilities[fold], alone.probabilities)
        np.testing.assert_array_equal(joined.flagged[fold], alone.flagged)
    assert calibration.decide(raw, "crossval", "temperature") is None


def test_too_few_lesions_to_hold_any_out():
    few = Predictions(
        HAM10000, np.array([0, 5, 5]), np.full((3, 7), 1 / 7), np.array(["a", "b", "b"])
    )
    assert calibration.decide(few, "val", "temperature") is None
    folds = [np.arange(3), np.arange(3, 303)]
    both = Predictions(HAM10000, np.arange(303) % 7, np.full((303, 7), 1 / 7))
    assert calibration.decide(both, "crossval", "temperature", folds=folds) is None
    assert set(calibration.fit(few, {}).methods) == set(METHODS)
    assert calibration.decide(few, "test", "temperature") is None


@pytest.mark.parametrize("num_classes", [3, 12])
def test_any_classes_are_calibrated_and_none_is_flagged_without_malignant_ones(num_classes):
    rng = np.random.default_rng(0)
    labels = np.arange(240) % num_classes
    p = special.softmax(3 * np.eye(num_classes)[labels] + rng.normal(0, 2, (240, num_classes)), -1)
    names = tuple(f"dx{k}" for k in range(num_classes))
    raw = Predictions(Classes(names), labels, p)
    for method in METHODS:
        calibrated = calibration.decide(raw, "val", method)
        assert not calibrated.flagged.any()
        found = calibration.measure(raw, calibrated, True)
        assert found["decision"]["malignant"]["auc"] is None
        coverage = found["decision"]["sets"]["0.90"]["class_conditional"]["coverage_per_class"]
        assert list(coverage) == list(names)
        assert found["calibration"][method]["log_loss"] < np.log(num_classes)
    some = Predictions(Classes(names, names[:1]), labels, p)
    assert calibration.decide(some, "val", "temperature").flagged[labels == 0].mean() > 0.85
