"""Resamples hold whole lesions; their figures are those of images that are written out again."""

import time

import numpy as np
import pytest
from sklearn import metrics as oracle

from ham_jax import CLASSES
from ham_jax.evaluation import bootstrap, metrics


def draw(num_images, seed=0, digits=12):
    """Returns labels, probabilities (few digits make ties) and lesions of one to many images."""
    rng = np.random.default_rng(seed)
    labels = np.append(np.arange(7), rng.integers(0, 7, num_images - 7))
    p = 0.8 * rng.dirichlet(np.ones(7), num_images) + 0.2 * np.eye(7)[labels]
    lesions = labels * 1000 + rng.geometric(0.03, num_images)
    return labels, np.round(p, digits), np.array([f"HAM_{n}" for n in lesions])


@pytest.mark.parametrize("digits", [12, 1])
def test_the_figures_of_a_resample_are_those_of_a_plain_loop(digits):
    labels, p, lesions = draw(150, digits=digits)
    (weights,) = bootstrap.resamples(labels, lesions, 6, seed=0)
    found = bootstrap.Figures(labels, p)(weights)
    predicted = metrics.compute(labels, p)  # of all images, to see that resamples differ from it
    assert abs(found["balanced_accuracy"] - predicted["balanced_accuracy"]).min() > 0
    for i, weight in enumerate(weights.T):
        times = weight.astype(int)
        expected = metrics.compute(labels.repeat(times), p.repeat(times, axis=0))
        for name in set(found) & set(expected):
            assert found[name][i] == pytest.approx(expected[name], rel=1e-12, abs=1e-12)
        for name in ("sensitivity", "auc", "average_precision"):
            of_class = [expected["per_class"][dx][name] for dx in CLASSES]
            assert found[name][:, i] == pytest.approx(of_class, rel=1e-12)
        areas = [oracle.roc_auc_score(labels == k, p[:, k], sample_weight=weight) for k in range(7)]
        assert found["auc"][:, i] == pytest.approx(areas, rel=1e-12)
        areas = [
            oracle.average_precision_score(labels == k, p[:, k], sample_weight=weight)
            for k in range(7)
        ]
        assert found["average_precision"][:, i] == pytest.approx(areas, rel=1e-12)
        correct = metrics.correct_answers(labels, p)
        gap = np.average(p.max(axis=1), weights=weight) - np.average(correct, weights=weight)
        assert found["overconfidence"][i] == pytest.approx(gap, abs=1e-12)
    assert {"log_loss", "expected_calibration_error", "macro_auc"} <= set(found) & set(expected)


def test_a_resample_draws_whole_lesions_as_many_as_each_stratum_has():
    strata, _, lesions = draw(200)
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
    labels, p, lesions = draw(150)
    found = bootstrap.intervals(labels, p, lesions, num_draws=300)
    turned = np.random.default_rng(1).permutation(150)
    assert found == bootstrap.intervals(labels[turned], p[turned], lesions[turned], num_draws=300)

    figures = bootstrap.Figures(labels, p)
    drawn = bootstrap.draws(figures, bootstrap.resamples(labels, lesions, 4000, seed=9))
    for name in ("accuracy", "macro_auc", "macro_average_precision", "log_loss"):
        low, high = np.quantile(drawn[name], [0.025, 0.975])
        np.testing.assert_allclose(found[name], [low, high], atol=0.2 * (high - low))
    low, high = np.quantile(drawn["auc"][2], [0.025, 0.975])
    assert found["per_class"]["bkl"]["auc"] == pytest.approx([low, high], abs=0.2 * (high - low))
    assert found["balanced_accuracy"] == list(metrics.interval(labels, p, lesions))

    kept = labels != 3
    without = bootstrap.intervals(labels[kept], p[kept], lesions[kept], num_draws=100)
    assert without["per_class"]["df"] == {"sensitivity": None, "auc": None}
    assert without["macro_auc"][0] < without["macro_auc"][1]


def test_two_thousand_resamples_of_two_thousand_images_are_quick():
    labels, p, lesions = draw(2000)
    start = time.process_time()  # of all cores together
    bootstrap.intervals(labels, p, lesions)
    assert time.process_time() - start < 5
