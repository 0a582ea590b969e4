"""What is said of an image follows from its own probabilities and thresholds."""

import dataclasses

import numpy as np
import pytest

from ham_jax.classes import HAM10000, ISIC2019, Classes
from ham_jax.inference import decision
from ham_jax.inference.decision import Calibrated

NUM = 40


def draw(classes=HAM10000, method="temperature", seed=0):
    rng = np.random.default_rng(seed)
    c = len(classes)
    by_method = {name: rng.dirichlet(np.ones(c), NUM) for name in ("none", "temperature")}
    thresholds = {
        "malignant": rng.random(NUM),
        "marginal": rng.random(NUM) / c,
        "class_conditional": rng.random((NUM, c)) / c,
        "clustered": rng.random((NUM, c)) / c,
    }
    return Calibrated(classes, method, by_method, thresholds)


@pytest.mark.parametrize("classes", [HAM10000, ISIC2019])
def test_malignancy_is_the_sum_of_the_malignant_classes(classes):
    said = draw(classes)
    columns = [classes.index(dx) for dx in classes.malignant]
    expected = said.probabilities[:, columns].sum(-1)
    np.testing.assert_allclose(said.malignancy, expected, rtol=1e-12)
    np.testing.assert_array_equal(said.flagged, said.malignancy >= said.thresholds["malignant"])
    assert 0 < said.flagged.sum() < NUM


def test_a_photograph_on_a_threshold_counts_as_above_it():
    said = draw()
    on = {"malignant": said.malignancy, "marginal": said.probabilities[:, 2]}
    said = dataclasses.replace(said, thresholds={**said.thresholds, **on})
    assert said.flagged.all()
    assert said.sets("marginal")[:, 2].all()


def test_without_malignant_classes_nothing_is_flagged():
    said = draw(Classes(("a", "b", "c")))
    said = dataclasses.replace(said, thresholds={**said.thresholds, "malignant": np.zeros(NUM)})
    assert not said.malignancy.any()
    assert not said.flagged.any()


@pytest.mark.parametrize("kind", decision.KINDS)
def test_a_set_is_what_reaches_its_own_threshold(kind):
    said = draw()
    found = said.sets(kind)
    for row in range(NUM):
        least = np.broadcast_to(said.thresholds[kind][row], 7)
        for k in range(7):
            assert found[row, k] == (said.probabilities[row, k] >= least[k])


def test_parts_are_joined_in_the_order_asked_for():
    whole = draw()
    places = np.random.default_rng(0).permutation(NUM)

    def part(rows):
        return dataclasses.replace(
            whole,
            by_method={name: p[rows] for name, p in whole.by_method.items()},
            thresholds={name: t[rows] for name, t in whole.thresholds.items()},
        )

    joined = decision.join([part(places[:30]), part(places[30:])], places)
    for name in whole.by_method:
        np.testing.assert_array_equal(joined.by_method[name], whole.by_method[name])
    for name in whole.thresholds:
        np.testing.assert_array_equal(joined.thresholds[name], whole.thresholds[name])


@pytest.mark.parametrize(
    ("kind", "size", "said"),
    [
        ("class_conditional", 1.74, "of the lesions of each diagnosis; on validation"),
        ("clustered", 2.5, "of each group of diagnoses that are alike"),
        ("marginal", 4.8, "too wide to help: on validation they named 4.8 of 7"),
    ],
)
def test_a_sentence_tells_the_promise_and_whether_it_helps(kind, size, said):
    choice = {
        "kind": kind,
        "mean_size": size,
        "coverage": 0.9,
        "coverage_per_class": dict.fromkeys(HAM10000, 0.95) | {"df": None, "mel": 0.85},
        "useful": size <= decision.widest_useful(7),
    }
    note = decision.sets_note(choice, HAM10000)
    assert said in note
    assert ("least often of melanoma (85 %)" in note) == choice["useful"]
    assert decision.sets_note(None, HAM10000) == ""


def test_members_with_other_methods_are_averaged_each_as_it_says():
    members = [draw(method="temperature"), draw(method="none", seed=1)]
    both = decision.mean(members)
    assert both.method == "temperature, none"
    expected = (members[0].probabilities + members[1].probabilities) / 2
    np.testing.assert_array_equal(both.probabilities, expected)
    thresholds = [member.thresholds["malignant"] for member in members]
    np.testing.assert_array_equal(both.thresholds["malignant"], np.mean(thresholds, axis=0))
    assert decision.mean(members[:1]).method == "temperature"
