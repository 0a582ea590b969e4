"""ood.npz gives the same scores again, or says that it is damaged."""

import io

import numpy as np
import pytest

from ham_jax.inference import detector
from ham_jax.inference.detector import Detector

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(50, 12))


def test_the_score_is_the_distance_to_the_nearest_mean_in_thresholds():
    means = RNG.normal(size=(4, 12))
    found = Detector(means, 2 * np.eye(12), 4.0, {})
    nearest = [min(np.linalg.norm(x - mean) for mean in means) for x in FEATURES]
    np.testing.assert_allclose(found.distance(FEATURES), 2 * np.array(nearest), rtol=1e-12)
    np.testing.assert_allclose(found.score(FEATURES), np.array(nearest) / 2, rtol=1e-12)


def test_a_file_gives_back_the_same_scores(tmp_path):
    path = tmp_path / detector.FILE
    assert detector.load(path) is None
    saved = Detector(RNG.normal(size=(4, 12)), RNG.normal(size=(12, 12)), 2.5, {"step": 3})
    saved.save(path)
    again = detector.load(path)
    np.testing.assert_array_equal(again.score(FEATURES), saved.score(FEATURES))
    assert again.provenance == {"step": 3}
    assert [p.name for p in tmp_path.iterdir()] == [detector.FILE]
    damages = [path.read_bytes()[:-100], b"", b"no archive"]
    content = dict(np.load(io.BytesIO(path.read_bytes())))
    for name, value in (
        ("means", np.zeros((4, 11))),
        ("whitening", np.full((12, 12), np.nan)),
        ("threshold", np.array("1")),
        ("threshold", np.array(-1.0)),
        ("about", np.array("[]")),
        ("about", np.array("[" * 100_000)),
    ):
        file = io.BytesIO()
        np.savez(file, **(content | {name: value}))
        damages.append(file.getvalue())
    for damaged in damages:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            detector.load(path)


def test_an_ensemble_is_the_mean_of_those_that_have_a_score():
    one, two = np.array([0.5, 2.0]), np.array([1.0, 4.0])
    np.testing.assert_array_equal(detector.joined([one, None, two]), [0.75, 3.0])
    assert detector.joined([None]) is None
