"""Probabilities can be taken at their word after calibration, and nothing else is promised."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from sklearn import isotonic

from ham_jax.evaluation import calibration, metrics

FREQUENCIES = np.array([0.05, 0.1, 0.1, 0.03, 0.1, 0.55, 0.07])


def draw(n, seed=0):
    """Returns labels drawn from probabilities that are therefore calibrated, and these."""
    rng = np.random.default_rng(seed)
    probabilities = special.softmax(rng.normal(0, 1.5, (n, 7)) + np.log(FREQUENCIES), axis=-1)
    return (probabilities.cumsum(-1) < rng.random((n, 1))).sum(-1), probabilities


def balanced(probabilities):
    """What a network answers that is too sure, in a world of equally frequent classes."""
    odds = (probabilities / FREQUENCIES) ** 2
    return odds / odds.sum(-1, keepdims=True)


def calibrated(method, raw, labels, fresh):
    return calibration.apply(calibration.fit(labels, raw, (method,)), method, fresh)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_temperature_is_found_again_and_leaves_every_answer(temperature):
    labels, true = draw(20_000)
    raw = special.softmax(np.log(true) * temperature, axis=-1)
    fitted = calibration.fit(labels, raw)
    assert fitted["temperature"]["temperature"] == pytest.approx(temperature, rel=0.03)
    after = calibration.apply(fitted, "temperature", raw)
    np.testing.assert_array_equal(after.argmax(-1), raw.argmax(-1))
    before, then = (calibration.measure(labels, p) for p in (raw, after))
    assert then["balanced_accuracy"] == before["balanced_accuracy"]
    if temperature != 1:
        for number in ("log_loss", "brier_score", "expected_calibration_error"):
            assert then[number] < before[number]


def test_vector_and_isotonic_bring_back_the_frequencies_and_temperature_cannot():
    """The trap of the default loss: better probabilities, fewer rare diagnoses."""
    (labels, true), (fresh_labels, fresh) = draw(8_000), draw(8_000, 1)
    raw = calibration.measure(fresh_labels, balanced(fresh))
    found = {
        method: calibration.measure(
            fresh_labels, calibrated(method, balanced(true), labels, balanced(fresh))
        )
        for method in calibration.METHODS
    }
    assert found["none"] == raw
    assert found["temperature"]["balanced_accuracy"] == raw["balanced_accuracy"]
    for method in ("vector", "isotonic"):
        for name in ("expected_calibration_error", "expected_calibration_error_equal_mass"):
            assert found[method][name] < 0.3 * raw[name]
        assert found[method]["log_loss"] < found["temperature"]["log_loss"] - 0.1
        assert found[method]["balanced_accuracy"] < raw["balanced_accuracy"] - 0.02
    vector = calibration.fit(labels, balanced(true), ("vector",))["vector"]
    np.testing.assert_allclose(vector["scale"], 0.5, atol=0.05)
    bias = np.log(FREQUENCIES)
    np.testing.assert_allclose(
        vector["bias"] - np.mean(vector["bias"]), bias - bias.mean(), atol=0.2
    )


def test_isotonic_is_scikit_learns():
    labels, raw = draw(500)
    found = calibrated("isotonic", raw, labels, raw[:50])
    expected = np.empty((50, 7))
    for k in range(7):
        line = isotonic.IsotonicRegression(y_min=1 / 502, y_max=501 / 502, out_of_bounds="clip")
        expected[:, k] = line.fit(raw[:, k], labels == k).predict(raw[:50, k])
    np.testing.assert_allclose(found, expected / expected.sum(-1, keepdims=True), rtol=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.sampled_from(calibration.METHODS))
@settings(max_examples=40, deadline=None)
def test_whatever_was_fitted_gives_probabilities_and_survives_json(seed, n, method):
    """Few images, absent classes, certain answers; another order of images; a file between."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, rng.integers(1, 8), n)
    raw = rng.dirichlet(np.full(7, 0.05), n)
    raw[: n // 3] = np.eye(7)[labels[: n // 3]]
    fitted = calibration.fit(labels, raw, (method,))
    order = rng.permutation(n)
    assert calibration.fit(labels[order], raw[order], (method,)) == fitted
    found = calibration.apply(fitted, method, raw)
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-12)
    read = json.loads(json.dumps(fitted, allow_nan=False))
    np.testing.assert_array_equal(calibration.apply(read, method, raw), found)
    for row in range(n):  # each by itself
        alone = calibration.apply(read, method, raw[row : row + 1])[0]
        np.testing.assert_array_equal(alone, found[row])
    if method == "temperature":
        np.testing.assert_array_equal(found[range(n), raw.argmax(-1)], found.max(-1))
    if method == "isotonic":
        assert (found > 0).all()


def test_images_and_shapes_are_asked_for():
    for labels, raw in (([], np.empty((0, 7))), ([1, 2], np.full((3, 7), 1 / 7))):
        with pytest.raises(ValueError, match="labels"):
            calibration.fit(np.array(labels, int), raw)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4)), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_folds_hold_each_image_out_once_with_its_lesion(lesions):
    labels = np.repeat([k for k, _ in lesions], [size for _, size in lesions])
    groups = np.repeat(np.arange(len(lesions)), [size for _, size in lesions]).astype(str)
    most = max(np.bincount([k for k, _ in lesions]))
    dealt = calibration.folds(labels, groups)
    assert len(dealt) == (min(5, most) if most > 1 else 0)
    for rest, held_out in dealt:
        assert sorted([*rest, *held_out]) == list(range(len(labels)))
        assert not set(groups[rest]) & set(groups[held_out])
    if dealt:
        everything = np.concatenate([held_out for _, held_out in dealt])
        assert sorted(everything) == list(range(len(labels)))
    order = np.random.default_rng(0).permutation(len(labels))
    again = calibration.folds(labels[order], groups[order])
    assert [set(groups[h]) for _, h in dealt] == [set(groups[order][h]) for _, h in again]


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
    found = calibration.measure(labels, raw)
    assert found["brier_score"] == pytest.approx((0.32 + (0.36 + 0.64 + 0.04) + 0) / 3)
    assert found["expected_calibration_error"] == pytest.approx(0.2 / 3)
    assert found["expected_calibration_error_equal_mass"] == pytest.approx(0.2 / 3)
    table = calibration.reliability(labels, raw, equal_mass=True)
    assert table == {
        "edges": [0, 0.6, 1],
        "num_images": [2, 1],
        "confidence": [0.6, 1],
        "accuracy": [0.5, 1],
    }


@given(st.integers(0, 1000), st.booleans())
@settings(max_examples=10, deadline=None)
def test_a_reliability_table_holds_all_images_and_the_calibration_error(seed, coarse):
    labels, raw = draw(200, seed)
    if coarse:
        raw = np.round(raw, 1)
        raw = raw / raw.sum(-1, keepdims=True)
    for equal_mass in (False, True):
        table = calibration.reliability(labels, raw, equal_mass)
        assert sum(table["num_images"]) == 200
        edges = zip(table["edges"], table["edges"][1:], strict=False)
        for (low, high), n, mean in zip(
            edges, table["num_images"], table["confidence"], strict=True
        ):
            assert (mean is None) == (n == 0)
            assert n == 0 or low - 1e-12 < mean <= high + 1e-12
            assert not equal_mass or coarse or abs(n - 200 / 15) < 1
    wide = calibration.reliability(labels, raw)
    gaps = [
        n * abs(c - a)
        for n, c, a in zip(wide["num_images"], wide["confidence"], wide["accuracy"], strict=True)
        if n
    ]
    assert sum(gaps) / 200 == pytest.approx(
        metrics.compute(labels, raw)["expected_calibration_error"], abs=1e-12
    )
    order = np.random.default_rng(seed).permutation(200)
    assert calibration.measure(labels[order], raw[order]) == calibration.measure(labels, raw)
