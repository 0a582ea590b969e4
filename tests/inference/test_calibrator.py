"""calibration.json: whatever method is in use, thresholds and probabilities belong together."""

import json
from pathlib import Path

import numpy as np
import pytest

from ham_jax.classes import HAM10000, Classes
from ham_jax.config import InputError
from ham_jax.evaluation import calibration
from ham_jax.evaluation.predictions import Predictions
from ham_jax.inference import calibrator
from ham_jax.inference.calibrator import METHODS

ABOUT = {"step": 7, "tta": 1, "crop_scale": 1.0, "weights": "ema", "records": "abc"}
OLD_RUN = Path(__file__).parents[1] / "evaluation" / "old_run"


def draw(num_lesions=300, seed=0):
    rng = np.random.default_rng(seed)
    lesion = np.repeat(np.arange(num_lesions), rng.integers(1, 4, num_lesions))
    labels = rng.choice(7, num_lesions, p=[0.1, 0.1, 0.1, 0.05, 0.15, 0.4, 0.1])[lesion]
    odds = np.exp(3 * np.eye(7)[labels] + rng.normal(0, 2, (len(labels), 7)))
    lesion_ids = np.array([f"HAM_{n}" for n in lesion])
    return Predictions(HAM10000, labels, odds / odds.sum(-1, keepdims=True), lesion_ids)


def test_a_file_says_the_same_to_the_last_digit(tmp_path):
    raw = draw()
    fitted = calibration.fit(raw, {**ABOUT, "split": "val"})
    assert calibrator.read(tmp_path, HAM10000) is None
    fitted.write(tmp_path)
    read = calibrator.read(tmp_path, HAM10000)
    assert read.fitted_on == {**ABOUT, "split": "val"}
    for method in METHODS:
        one, two = (f.apply(method, raw.probabilities) for f in (fitted, read))
        np.testing.assert_array_equal(one.probabilities, two.probabilities)
        for name, thresholds in one.thresholds.items():
            np.testing.assert_array_equal(thresholds, two.thresholds[name])
    text = (tmp_path / calibrator.FILE).read_text()
    order = np.random.default_rng(0).permutation(len(raw))
    calibration.fit(raw.take(order), {**ABOUT, "split": "val"}).write(tmp_path)
    assert (tmp_path / calibrator.FILE).read_text() == text


def test_one_fit_says_the_same_of_an_image_whatever_is_beside_it():
    raw = draw(40)
    fitted = calibration.fit(raw, ABOUT)
    whole = fitted.apply("temperature", raw.probabilities)
    assert whole.method == "temperature"
    for row in range(5):
        alone = fitted.apply("temperature", raw.probabilities[row : row + 1])
        assert alone.flagged == whole.flagged[row]
        for kind in ("marginal", "class_conditional"):
            np.testing.assert_array_equal(alone.sets(kind)[0], whole.sets(kind)[row])


def test_a_file_of_version_0_1_is_read_at_its_level_of_90_percent():
    content = json.loads((OLD_RUN / calibrator.FILE).read_text())
    assert content["levels"] == [0.9, 0.95]
    read = calibrator.read(OLD_RUN, HAM10000)
    assert set(read.methods) == set(METHODS) < set(content["methods"])
    raw = draw(10).probabilities
    for method in METHODS:
        said, old = read.apply(method, raw), content["methods"][method]["thresholds"]
        assert (said.thresholds["malignant"] == old["malignant"]).all()
        assert (said.thresholds["marginal"] == old["marginal"][0]).all()
        assert (said.thresholds["class_conditional"] == old["class_conditional"][0]).all()


def test_settings_that_differ_are_named():
    fitted = calibration.fit(draw(30), ABOUT)
    assert fitted.mismatch({**ABOUT, "records": "other"}) == ""
    text = fitted.mismatch({**ABOUT, "tta": 8, "weights": "raw"})
    assert text == "eval.tta = 8 (calibrated with 1), weights = raw (calibrated with ema)"
    assert fitted.mismatch({**ABOUT, "tiles": 6}) == "eval.tiles = 6 (calibrated with 1)"


def test_a_file_of_before_there_were_tiles_was_fitted_on_one():
    fitted = calibration.fit(draw(30), ABOUT)
    assert fitted.mismatch({**ABOUT, "tiles": 1}) == ""


def test_a_damaged_file_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / calibrator.FILE
    calibration.fit(draw(30), ABOUT).write(tmp_path)
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
    assert calibrator.read(tmp_path, HAM10000).fitted_on == ABOUT
    for key, value in (
        ("classes", HAM10000.names[:6]),
        ("level", 0.5),
        ("levels", [0.5]),
        ("methods", {"none": {}}),
    ):
        texts.append(json.dumps({**whole, key: value}))
    for text in texts:
        path.write_text(text)
        with pytest.raises(InputError, match="--mode=eval --split=val --workdir="):
            calibrator.read(tmp_path, HAM10000)


def test_a_file_of_other_classes_is_refused(tmp_path):
    calibration.fit(draw(30), ABOUT).write(tmp_path)
    for other in (Classes(HAM10000.names[::-1]), Classes(HAM10000.names[:6])):
        with pytest.raises(InputError, match="not written by this version"):
            calibrator.read(tmp_path, other)
