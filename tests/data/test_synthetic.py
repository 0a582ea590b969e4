"""The embedded default's data look like HAM10000 on disk, and can be learnt but not at a glance."""

import hashlib

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GroupKFold, cross_val_predict

from ham_jax.classes import HAM10000, Classes
from ham_jax.config import InputError
from ham_jax.data import image, layouts, synthetic


def test_the_layout_is_hams_own(tiny_raw):
    table = pd.read_csv(tiny_raw / "HAM10000_metadata.csv")
    assert list(table) == ["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization"]
    assert len(table) == 200
    assert table.groupby("lesion_id")["dx"].nunique().max() == 1
    assert table["lesion_id"].nunique() < 200
    assert table.drop_duplicates("lesion_id")["dx"].value_counts()[list(HAM10000)].min() >= 7
    assert len(layouts.find(tiny_raw, allow_partial=True).sources) == 200


def test_the_same_numbers_draw_the_same_files_and_are_drawn_once(tiny_raw, tmp_path):
    assert synthetic.write(tmp_path / "a", 20, 0)
    assert not synthetic.write(tmp_path / "a", 20, 0)
    synthetic.write(tmp_path / "b", 20, 0)
    a, b = (sorted((tmp_path / name).rglob("*.*")) for name in "ab")
    assert [p.read_bytes() for p in a] == [p.read_bytes() for p in b]
    assert synthetic.write(tmp_path / "a", 20, 1)
    assert [p.read_bytes() for p in a] != [p.read_bytes() for p in b]
    (tmp_path / "c").mkdir()
    (tmp_path / "c/mine.txt").touch()
    with pytest.raises(InputError, match="other files"):
        synthetic.write(tmp_path / "c", 20, 0)
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["mine.txt"]
    (tmp_path / "a/synthetic.json").write_text("")
    with pytest.raises(InputError, match=r"synthetic\.json is damaged"):
        synthetic.write(tmp_path / "a", 20, 1)


def test_mean_colours_tell_something_but_not_everything(tiny_raw):
    raw = layouts.find(tiny_raw, allow_partial=True)
    pixels = np.stack([image.load(source, (24, 32)) for source in raw.sources])
    colors = pixels[:, 6:18, 8:24].mean((1, 2)) / 255
    answers = cross_val_predict(
        LogisticRegression(C=100.0, max_iter=3000),
        colors,
        raw.table["label"],
        groups=raw.table["lesion_id"],
        cv=GroupKFold(4),
    )
    score = balanced_accuracy_score(raw.table["label"], answers)
    assert 0.25 < score < 0.85  # chance is 0.14


def test_hams_classes_look_as_ever_in_any_case():
    drawn = b"".join(synthetic.draw(dx.upper(), [0, 1], [2]).tobytes() for dx in HAM10000)
    assert hashlib.sha256(drawn).hexdigest()[:16] == "f425382a6bbf2d9e"


def test_other_classes_have_looks_of_their_own_and_equal_shares(tmp_path):
    classes = Classes(tuple(f"kind {n}" for n in range(12)))
    synthetic.write(tmp_path / "raw", 96, 0, classes)
    raw = layouts.find(tmp_path / "raw", classes, allow_partial=True)
    lesions = raw.table.drop_duplicates("lesion_id")["dx"].value_counts()
    assert lesions.max() - lesions.min() <= 1
    middles = [image.load(source, (120, 160))[45:75, 60:100] / 255 for source in raw.sources]
    answers = cross_val_predict(
        LogisticRegression(C=1000.0, max_iter=5000),
        np.stack([(*pixels.mean((0, 1)), *pixels.std((0, 1))) for pixels in middles]),
        raw.table["label"],
        groups=raw.table["lesion_id"],
        cv=GroupKFold(4),
    )
    assert balanced_accuracy_score(raw.table["label"], answers) > 0.6  # chance is 0.08
