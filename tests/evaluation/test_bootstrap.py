"""Resamples hold whole lesions; their figures are those of images that are written out again."""

import time

import numpy as np
import pytest
from sklearn import metrics as oracle

from ham_jax.classes import HAM10000
from ham_jax.evaluation import bootstrap, metrics
from ham_jax.evaluation.predictions import Predictions


def draw(num_images, seed=0, digits=12):
    """Returns predictions (few digits make ties) of lesions of one to many images."""
    rng = np.random.default_rng(seed)
    labels = np.append(np.arange(7), rng.integers(0, 7, num_images - 7))
    p = 0.8 * rng.dirichlet(np.ones(7), num_images) + 0.2 * np.eye(7)[labels]
    lesions = labels * 1000 + rng.geometric(0.03, num_images)
    lesion_ids = np.array([f"HAM_{n}" for n in lesions])
    return Predictions(HAM10000, labels, np.round(p, digits), lesion_ids)


@pytest.mark.parametrize("digits", [12, 1])
def test_the_figures_of_a_resample_are_those_of_a_plain_loop(digits):
    predictions = draw(150, digits=digits)
    labels, p = predictions.labels, predictions.probabilities
    (weights,) = bootstrap.resamples(labels, predictions.lesion_ids, 6, seed=0)
    found = bootstrap.Figures(labels, p)(weights)
    predicted = metrics.compute(predictions)  # of all images, to see that resamples differ from it
    assert abs(found["balanced_accuracy"] - predicted["balanced_accuracy"]).min() > 0
    for i, weight in enumerate(weights.T):
        times = weight.astype(int)
        expected = metrics.compute(predictions.take(np.arange(150).repeat(times)))
        for name in set(found) & set(expected):
            assert found[name][i] == pytest.approx(expected[name], rel=1e-12, abs=1e-12)
        for name in ("sensitivity", "auc", "average_precision"):
            of_class = [expected["per_class"][dx][name] for dx in HAM10000]
            assert found[name][:, i] == pytest.approx(of_class, rel=1e-12)
        areas = [oracle.roc_auc_score(labels == k, p[:, k], sample_weight=weight) for k in range(7)]
        assert found["auc"][:, i] == pytest.approx(areas, rel=1e-12)
        areas = [
            oracle.average_precision_score(labels == k, p[:, k], sample_weight=weight)
            for k in range(7)
        ]
        assert found["average_precision"][:, i] == pytest.approx(areas, rel=1e-12)
        correct = metrics.correct_answers(predictions)
        gap = np.average(p.max(axis=1), weights=weight) - np.average(correct, weights=weight)
        assert found["overconfidence"][i] == pytest.approx(gap, abs=1e-12)
    assert {"log_loss", "expected_calibration_error", "macro_auc"} <= set(found) & set(expected)


def test_a_resample_draws_whole_lesions_as_many_as_each_stratum_has():
    predictions = draw(200)
    strata, lesions = predictions.labels, predictions.lesion_ids
    weights = np.concatenate(list(bootstrap.resamples(strata, lesions, 250, seed=3)), axis=1)
    assert weights.shape == (200, 250)
    first = {lesion: row for row, lesion in reversed(list(enumerate(lesions)))}
    np.testing.assert_array_equal(weights, weights[[first[lesion] for lesion in lesions]])
    for k in range(7):
        rows = sorted({first[lesion] for lesion in lesions[strata == k]})
        assert (weights[rows].sum(axis=0) == len(rows)).all()
        # A lesion is drawn once on average, with a variance of 1 - 1 / n.
        assert abs(weights[rows].mean(axis=1) - 1).max() < 5 / np.sqrt(250)
        assert weights[rows].var() == pytest.approx(1 - 1 / len(rows), abs=0.2)


def test_intervals_are_those_of_all_resamples_whatever_the_order_of_the_images():
    predictions = draw(150)
    labels = predictions.labels
    found = bootstrap.intervals(predictions, num_draws=300)
    turned = np.random.default_rng(1).permutation(150)
    assert found == bootstrap.intervals(predictions.take(turned), num_draws=300)

    figures = bootstrap.Figures(labels, predictions.probabilities)
    resamples = bootstrap.resamples(labels, predictions.lesion_ids, 4000, seed=9)
    drawn = bootstrap.draws(figures, resamples)
    for name in ("accuracy", "macro_auc", "macro_average_precision", "log_loss"):
        low, high = np.quantile(drawn[name], [0.025, 0.975])
        np.testing.assert_allclose(found[name], [low, high], atol=0.2 * (high - low))
    low, high = np.quantile(drawn["auc"][2], [0.025, 0.975])
    assert found["per_class"]["bkl"]["auc"] == pytest.approx([low, high], abs=0.2 * (high - low))
    assert found["balanced_accuracy"] == bootstrap.balanced_accuracy_interval(predictions)

    without = bootstrap.intervals(predictions.take(labels != 3), num_draws=100)
    assert without["per_class"]["df"] == {"sensitivity": None, "auc": None}
    assert without["macro_auc"][0] < without["macro_auc"][1]


def answers(num_images, signal=0.15):
    rng = np.random.default_rng(0)
    labels = rng.choice(7, num_images, p=[0.05, 0.1, 0.1, 0.05, 0.1, 0.5, 0.1])
    noise = rng.dirichlet(np.ones(7), num_images)
    return labels, (1 - signal) * noise + signal * np.eye(7)[labels]


def test_interval_agrees_with_a_bootstrap_loop_over_lesions(monkeypatch):
    labels, p = answers(150)
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
    predictions = Predictions(HAM10000, labels, p, lesions)
    found = bootstrap.balanced_accuracy_interval(predictions, num_draws=4000)
    # The end points of two bootstraps differ by about 0.003 (standard error of the 2.5 % quantile).
    np.testing.assert_allclose(found, np.quantile(draws, [0.025, 0.975]), atol=0.012)
    assert found == bootstrap.balanced_accuracy_interval(predictions, num_draws=4000)
    monkeypatch.setattr(bootstrap, "LEVEL", 0.5)
    narrow = bootstrap.balanced_accuracy_interval(predictions, num_draws=4000)
    assert found[0] < narrow[0] < metrics.compute(predictions)["balanced_accuracy"] < narrow[1]


def test_interval_is_wider_where_images_share_lesions_and_is_fast():
    labels, p = answers(500)
    repeated = (np.repeat(labels, 4), np.repeat(p, 4, axis=0))  # four equal images a lesion
    together = Predictions(HAM10000, *repeated, np.repeat(np.arange(500), 4))
    start = time.process_time()
    low, high = bootstrap.balanced_accuracy_interval(together)
    assert time.process_time() - start < 2
    apart = Predictions(HAM10000, *repeated)
    image_low, image_high = bootstrap.balanced_accuracy_interval(apart)
    assert 1.7 < (high - low) / (image_high - image_low) < 2.3  # sqrt(4)


def test_two_thousand_resamples_of_two_thousand_images_are_quick():
    predictions = draw(2000)
    start = time.process_time()  # of all cores together
    bootstrap.intervals(predictions)
    assert time.process_time() - start < 5
