"""What is far from the training images is told from what is near, by the published distance."""

import numpy as np
import pytest
from sklearn import covariance

from ham_jax.evaluation import ood

RNG = np.random.default_rng(0)
LABELS = RNG.permutation(np.repeat([0, 1, 4, 6], 100))  # not every class
MIXING = RNG.normal(size=(12, 12))


def features(labels):
    return RNG.normal(size=(len(labels), 12)) @ MIXING + 3 * labels[:, None]


TRAIN = features(LABELS)
VAL = features(RNG.choice(LABELS, 1000))


def test_distance_is_that_of_mahalanobis_to_the_nearest_class():
    """Against the formula as it is printed, an image and a class at a time."""
    x = RNG.normal(0, 20, (5, 12))
    means = {k: TRAIN[k == LABELS].mean(0) for k in set(LABELS.tolist())}
    around = TRAIN - np.stack([means[k] for k in LABELS])
    inverse = np.linalg.inv(covariance.LedoitWolf(assume_centered=True).fit(around).covariance_)
    expected = [min(np.sqrt((f - m) @ inverse @ (f - m)) for m in means.values()) for f in x]
    detector = ood.fit(TRAIN, LABELS, VAL, {})
    np.testing.assert_allclose(detector.distance(x), expected, rtol=1e-6)
    np.testing.assert_allclose(detector.score(x) * detector.threshold, expected, rtol=1e-6)


def test_what_it_was_fitted_on_is_kept():
    found = ood.fit(TRAIN, LABELS, VAL, {"step": 3})
    assert found.provenance == {"step": 3, "num_train": 400, "num_val": 1000}


def test_the_threshold_turns_away_five_percent_of_what_it_was_set_on():
    assert (ood.fit(TRAIN, LABELS, VAL, {}).score(VAL) > 1).sum() == 50
    alike = np.repeat(VAL[:20], 10, axis=0)  # ties: never more
    assert (ood.fit(TRAIN, LABELS, alike, {}).score(alike) > 1).mean() <= 0.05


def test_more_features_than_images_and_features_that_never_vary():
    wide = np.concatenate([TRAIN, np.zeros((len(TRAIN), 600))], axis=1)
    detector = ood.fit(wide, LABELS, wide, {})
    away = wide[:1] + np.eye(612)[[611]]
    assert detector.score(away) > detector.score(wide[:1])
    for useless in (np.ones_like(TRAIN), np.full_like(TRAIN, np.nan)):
        with pytest.raises(ValueError, match=r"do not vary|NaN"):
            ood.fit(useless, LABELS, useless, {})
