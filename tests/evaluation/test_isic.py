"""The official scorer says the same, of recorded submissions and of files it reads now."""

import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ham_jax.classes import HAM10000, ISIC2019
from ham_jax.evaluation import isic
from ham_jax.evaluation.predictions import Predictions

HERE = Path(__file__).parent
reference = runpy.run_path(HERE / "make_reference.py")


submission = reference["submission"]


def flat(score):
    return reference["flat"](score["overall"], score["per_category"])


def test_a_thousand_submissions_score_as_the_official_scorer_scored_them():
    with np.load(HERE / "isic_reference.npz") as recorded:
        official, fingerprint = recorded["figures"], int(recorded["fingerprint"])
    assert reference["fingerprint"]() == fingerprint, "other submissions: record them anew"
    scores = [isic.score(submission(*reference["draw"](seed))) for seed in range(len(official))]
    assert len(scores) == 1000
    np.testing.assert_allclose([flat(s) for s in scores], official, rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        [list(s["macro_average"].values()) for s in scores],
        official[:, 1:].reshape(len(scores), 7, 9).mean(axis=1),
        rtol=0,
        atol=1e-12,
    )


@pytest.fixture
def scorer(monkeypatch):
    # Its release for Python 3.11 calls a name that pandas 3 has dropped.
    monkeypatch.setattr(pd.DataFrame, "applymap", pd.DataFrame.map, raising=False)
    return pytest.importorskip("isic_challenge_scoring")


# The scorer 5.6.0 is older than pandas 3.1, which deprecates some of what it calls
# (pandas issues 62919 and 63207; seen November 2026).
@pytest.mark.filterwarnings("ignore:The .* in (DataFrame|Series).* is deprecated")
def test_the_official_scorer_accepts_our_files_and_agrees(scorer, tmp_path):
    for seed in range(4):
        ids, labels, probabilities = reference["draw"](seed)
        if seed == 1:  # as a rounded softmax may be
            probabilities = (probabilities * np.float32(1 + 1e-7)).astype(np.float32)
            probabilities[0] = np.eye(7)[labels[0]] * np.float32(1 + 1e-7)
        given = submission(ids, labels, probabilities)
        isic.write_submission(tmp_path / "submission.csv", given)
        bare = [name.split(".")[0] for name in ids]
        isic.write_submission(tmp_path / "truth.csv", submission(bare, labels, np.eye(7)[labels]))
        official = scorer.ClassificationScore.from_file(
            tmp_path / "truth.csv",
            tmp_path / "submission.csv",
            scorer.ClassificationMetric.BALANCED_ACCURACY,
        )
        found = isic.score(given)
        categories = official.per_category.to_dict("index")
        assert flat(found) == pytest.approx(
            reference["flat"](official.overall, categories), rel=0, abs=1e-12
        )
        assert found["macro_average"] == pytest.approx(
            official.macro_average.to_dict(), rel=0, abs=1e-12
        )


def test_the_image_without_weight_ties_and_absent_categories():
    labels = np.array([0, 0, 4, 4, 5, 5])
    answers = np.eye(7)[labels]
    answers[1] = 0.5 * (np.eye(7)[0] + np.eye(7)[1])  # a tie, and 0.5 is not above 0.5
    answers[3] = np.eye(7)[5]
    ids = [f"ISIC_{n}" for n in range(6)]
    found = isic.score(submission(ids, labels, answers))
    assert found["overall"] == pytest.approx(np.mean([1 / 2, 1 / 2, 1]))
    row = found["per_category"]["DF"]
    assert [row[name] for name in ("sensitivity", "ppv", "dice", "accuracy")] == [1, 1, 1, 1]
    assert [row[name] for name in ("auc", "auc_sens_80", "ap")] == [None, None, None]
    areas = [found["per_category"][name]["auc"] for name in ("AKIEC", "MEL", "NV")]
    assert found["macro_average"]["auc"] == pytest.approx(np.mean(areas))
    ids[3] = "ISIC_0035068.jpg"
    assert isic.score(submission(ids, labels, answers))["overall"] == pytest.approx(
        np.mean([1 / 2, 1, 1])
    )


def test_the_challenge_knows_its_own_diagnoses_in_whatever_order():
    turned = type(HAM10000)(HAM10000.names[::-1])
    assert isic.knows(HAM10000)
    assert isic.knows(turned)
    assert not isic.knows(ISIC2019)
    given = submission(*reference["draw"](0))
    other = Predictions(
        turned, 6 - given.labels, given.probabilities[:, ::-1], image_ids=given.image_ids
    )
    assert flat(isic.score(other)) == pytest.approx(flat(isic.score(given)), rel=1e-12)
