"""A real gap is flagged; chance, another mix of diagnoses and few lesions are not."""

import json

import numpy as np
import pandas as pd
import pytest

from ham_jax.classes import HAM10000, Classes
from ham_jax.evaluation import metrics, subgroups
from ham_jax.evaluation.predictions import Predictions


def answers(labels, right, seed=0):
    """Returns probabilities of which the share `right` [n] have the maximum at the truth."""
    rng = np.random.default_rng(seed)
    chosen = np.where(rng.random(len(labels)) < right, labels, (labels + 1) % 7)
    return 0.6 * np.eye(7)[chosen] + 0.4 * rng.dirichlet(np.full(7, 5.0), len(labels))


def measure(labels, p, groups, table):
    return subgroups.measure(Predictions(HAM10000, labels, p, groups, metadata=table))


def flags(found):
    return {
        (axis, name)
        for axis, rows in found["axes"].items()
        for name, row in rows.items()
        if any(gap["flagged"] for gap in row["gaps"].values())
    }


@pytest.fixture(scope="module")
def people():
    rng = np.random.default_rng(5)
    num = 840
    table = pd.DataFrame(
        {
            "sex": rng.choice(["female", "male", "unknown"], num, p=[0.5, 0.45, 0.05]),
            "age": rng.choice([0, 20, 40, 50, 70, 80, np.nan], num),
            "localization": rng.choice(["back", "face", "hand"], num),
            "dx_type": rng.choice(["histo", "follow_up"], num),
        }
    )
    return np.arange(num) % 7, np.arange(num), table


def test_a_real_gap_is_flagged_and_only_that(people):
    labels, groups, table = people
    right = np.where(table["sex"] == "female", 0.45, 0.8)
    p = answers(labels, right)
    found = measure(labels, p, groups, table)
    assert flags(found) == {("sex", "female"), ("sex", "male")}
    json.dumps(found, allow_nan=False)

    correct = metrics.correct_answers(Predictions(HAM10000, labels, p))
    recalls = [
        [correct[(table["sex"] == sex) & (labels == k)].mean() for k in range(7)]
        for sex in ("female", "male")
    ]
    female = found["axes"]["sex"]["female"]
    assert female["balanced_accuracy"]["value"] == pytest.approx(np.mean(recalls[0]))
    gap = female["gaps"]["balanced_accuracy"]
    assert gap["value"] == pytest.approx(np.subtract(*recalls).mean())
    assert gap["interval"][0] < gap["value"] < gap["interval"][1] < 0
    assert found["axes"]["sex"]["not known"]["gaps"] == {}
    assert sum(row["num_images"] for row in found["axes"]["sex"].values()) == len(labels)

    same = measure(labels, answers(labels, 0.7), groups, table)
    assert flags(same) == set()
    # three figures of the known subgroups by sex, age, localization and dx_type
    assert same["num_comparisons"] == 3 * (2 + 5 + 3 + 2)


def test_another_mix_of_diagnoses_is_no_gap():
    labels = np.repeat([5, 4, 5, 4], [400, 50, 50, 400])  # nevi are easy, melanomas are not
    table = pd.DataFrame({"sex": np.repeat(["female", "male"], 450)})
    p = answers(labels, np.where(labels == 5, 0.95, 0.5), seed=1)
    found = measure(labels, p, np.arange(900), table)
    rows = found["axes"]["sex"]
    assert rows["female"]["accuracy"]["interval"][0] > rows["male"]["accuracy"]["interval"][1]
    gap = rows["female"]["gaps"]["balanced_accuracy"]
    assert gap["classes"] == ["mel", "nv"]
    assert gap["interval"][0] < 0 < gap["interval"][1]
    assert not gap["flagged"]


@pytest.mark.parametrize(("num", "flagged"), [(29, False), (30, True)])
def test_fewer_than_thirty_are_never_flagged(num, flagged):
    labels = np.append(np.full(num, 4), np.arange(700) % 7)
    table = pd.DataFrame({"localization": ["ear"] * num + ["back"] * 700})
    p = answers(labels, np.append(np.zeros(num), np.full(700, 0.9)))
    groups = np.arange(len(labels))
    found = measure(labels, p, groups, table)
    gap = found["axes"]["localization"]["ear"]["gaps"]["balanced_accuracy"]
    assert (gap["flagged"], gap["p"] is not None) == (flagged, flagged)
    assert gap["classes"] == ["mel"]
    assert gap["interval"][1] < 0
    groups[:2] = 0  # two photographs of one lesion
    found = measure(labels, p, groups, table)
    assert flags(found) == set()


def test_ages_fall_into_bands_and_words_for_nothing_are_not_known():
    table = pd.DataFrame(
        {
            "age": [0, np.nan, 29.9, 30, 44, 45, 60, 75, 85],
            "sex": ["", "Unknown", "female", "male", "male", "male", "male", "male", None],
        }
    )
    labels = np.zeros(9, int)
    found = measure(labels, answers(labels, 1.0), np.arange(9), table)["axes"]
    counts = {axis: {k: r["num_images"] for k, r in rows.items()} for axis, rows in found.items()}
    assert counts == {
        "sex": {"female": 1, "male": 5, "not known": 3},
        "age": dict(zip([*subgroups.AGE_BANDS, "not known"], [1, 2, 1, 1, 2, 2], strict=True)),
        "localization": {"not known": 9},
        "dx_type": {"not known": 9},
    }
    assert list(counts["age"]) == [*subgroups.AGE_BANDS, "not known"]
    assert found["sex"]["male"]["macro_auc"] == {"value": None, "interval": None}


def test_any_classes_have_subgroups():
    labels = np.arange(240) % 12
    table = pd.DataFrame({"sex": np.repeat(["female", "male"], 120)})
    p = 0.5 * np.eye(12)[labels] + 0.5 * np.random.default_rng(0).dirichlet(np.ones(12), 240)
    classes = Classes(tuple("abcdefghijkl"))
    found = subgroups.measure(Predictions(classes, labels, p, metadata=table))
    female = found["axes"]["sex"]["female"]
    assert female["classes"] == dict.fromkeys(classes, 10)
    assert female["gaps"]["balanced_accuracy"]["classes"] == list(classes)


def test_holm_steps_down_from_the_smallest():
    assert subgroups._holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]
    assert subgroups._holm([0.01, 0.011]) == [True, True]
    assert subgroups._holm([]) == []
