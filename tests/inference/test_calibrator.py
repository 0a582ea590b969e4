"""calibration.json: whatever method is in use, thresholds and probabilities belong together."""

import json

import numpy as np
import pytest

from ham_jax import CLASSES
from ham_jax.config import InputError
from ham_jax.evaluation import calibration, decision, judgement

ABOUT = {"step": 7, "tta": 1, "crop_scale": 1.0, "weights": "ema", "records": "abc"}


def draw(num_lesions=300, seed=0):
    rng = np.random.default_rng(seed)
    lesion = np.repeat(np.arange(num_lesions), rng.integers(1, 4, num_lesions))
    labels = rng.choice(7, num_lesions, p=[0.1, 0.1, 0.1, 0.05, 0.15, 0.4, 0.1])[lesion]
    odds = np.exp(3 * np.eye(7)[labels] + rng.normal(0, 2, (len(labels), 7)))
    return labels, odds / odds.sum(-1, keepdims=True), np.array([f"HAM_{n}" for n in lesion])


def test_a_file_gives_the_same_judgement_to_the_last_digit(tmp_path):
    labels, raw, groups = draw()
    fitted = judgement.fit(labels, raw, groups)
    assert judgement.read(tmp_path) is None
    judgement.write(tmp_path, fitted, {**ABOUT, "split": "val"})
    read, fitted_on = judgement.read(tmp_path)
    assert fitted_on == {**ABOUT, "split": "val"}
    for method in calibration.METHODS:
        one, two = (judgement.apply(f, method, raw) for f in (fitted, read))
        np.testing.assert_array_equal(one.probabilities, two.probabilities)
        for name, thresholds in one.thresholds.items():
            np.testing.assert_array_equal(thresholds, two.thresholds[name])
    text = (tmp_path / judgement.FILE).read_text()
    order = np.random.default_rng(0).permutation(len(labels))
    again = judgement.fit(labels[order], raw[order], groups[order])
    judgement.write(tmp_path, again, {**ABOUT, "split": "val"})
    assert (tmp_path / judgement.FILE).read_text() == text


@pytest.mark.parametrize("method", calibration.METHODS)
def test_flag_and_sets_are_on_the_scale_of_the_method_in_use(method):
    """On fresh lesions each method keeps what is promised, with its own thresholds."""
    labels, raw, groups = draw(2000)
    fresh_labels, fresh, fresh_groups = draw(2000, 1)
    judged = judgement.apply(judgement.fit(labels, raw, groups), method, fresh)
    found = judgement.measure(fresh_labels, fresh_groups, judged, False)["decision"]
    assert found["malignant"]["sensitivity"] == pytest.approx(0.95, abs=0.02)
    for level in decision.LEVELS:
        for kind in ("marginal", "class_conditional"):
            numbers = found["sets"][f"{level:.2f}"][kind]
            assert numbers["coverage"] == pytest.approx(level, abs=0.02)


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_no_image_is_judged_by_its_own_lesion(method):
    labels, raw, groups = draw(60)
    judged = judgement.cross_fit(labels, raw, groups, method)
    own = groups == "HAM_0"
    moved = raw.copy()
    # Another certainty of the same answer: its fold stays.
    moved[own] = raw[own] ** 3 / (raw[own] ** 3).sum(-1, keepdims=True)
    again = judgement.cross_fit(labels, moved, groups, method)
    for name, thresholds in judged.thresholds.items():
        np.testing.assert_array_equal(again.thresholds[name][own], thresholds[own])
    assert (again.probabilities != judged.probabilities)[~own].any()
    order = np.random.default_rng(0).permutation(len(labels))
    shuffled = judgement.cross_fit(labels[order], raw[order], groups[order], method)
    for name in calibration.METHODS:
        np.testing.assert_array_equal(shuffled.by_method[name], judged.by_method[name][order])
    one, two = (
        judgement.measure(y, g, j, True)
        for y, g, j in ((labels, groups, judged), (labels[order], groups[order], shuffled))
    )
    assert one == two
    assert json.loads(json.dumps(one, allow_nan=False)) == one


def test_too_few_lesions_to_hold_any_out():
    labels, raw = np.array([0, 5, 5]), np.full((3, 7), 1 / 7)
    groups = np.array(["a", "b", "b"])
    assert judgement.cross_fit(labels, raw, groups, "temperature") is None
    assert set(judgement.fit(labels, raw, groups)) == set(calibration.METHODS)


def test_parts_are_joined_in_the_order_asked_for():
    labels, raw, groups = draw(40)
    fitted = judgement.fit(labels, raw, groups)
    whole = judgement.apply(fitted, "vector", raw)
    places = np.random.default_rng(0).permutation(len(raw))
    parts = [judgement.apply(fitted, "vector", raw[p]) for p in (places[:30], places[30:])]
    joined = judgement.join(parts, places)
    np.testing.assert_array_equal(joined.probabilities, whole.probabilities)


def test_members_with_other_methods_are_averaged_each_as_it_says():
    labels, raw, groups = draw(60)
    fitted = judgement.fit(labels, raw, groups)
    members = [judgement.apply(fitted, method, raw) for method in ("temperature", "isotonic")]
    both = judgement.mean(members)
    assert both.method == "temperature, isotonic"
    np.testing.assert_array_equal(
        both.probabilities, (members[0].probabilities + members[1].probabilities) / 2
    )
    assert judgement.mean(members[:1]).method == "temperature"


def test_settings_that_differ_are_named():
    assert judgement.mismatch(ABOUT, {**ABOUT, "records": "other"}) == ""
    text = judgement.mismatch(ABOUT, {**ABOUT, "tta": 8, "weights": "raw"})
    assert text == "eval.tta = 8 (calibrated with 1), weights = raw (calibrated with ema)"


def test_a_damaged_file_is_refused_with_the_way_out(tmp_path):
    labels, raw, groups = draw(30)
    path = tmp_path / judgement.FILE
    judgement.write(tmp_path, judgement.fit(labels, raw, groups), ABOUT)
    text = path.read_text()
    digits = [place for place, character in enumerate(text) if character.isdigit()]
    texts = [text[:-40], "[]", "{}", ""]
    changed = [text[:at] + str(9 - int(text[at])) + text[at + 1 :] for at in digits[::20]]
    # A threshold like any other, but for the checksum. The last of 17 digits may say the same.
    texts += [other for other in changed if json.loads(other) != json.loads(text)]
    assert len(texts) > 30
    whole = json.loads(text)
    whole.pop("sha256")  # as an earlier version wrote it
    path.write_text(json.dumps(whole))
    assert judgement.read(tmp_path)[1] == ABOUT
    for key, value in (("classes", CLASSES[:6]), ("levels", [0.5]), ("methods", {"none": {}})):
        texts.append(json.dumps({**whole, key: value}))
    for text in texts:
        path.write_text(text)
        with pytest.raises(InputError, match="--mode=eval --split=val --workdir="):
            judgement.read(tmp_path)
