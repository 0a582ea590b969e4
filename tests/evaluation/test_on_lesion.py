"""Masks lie over the view as the photograph does, and shares are those of the pixels."""

import io
import zipfile

import jax
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ham_jax.classes import HAM10000
from ham_jax.config import InputError
from ham_jax.data import image, preprocess
from ham_jax.evaluation import on_lesion


def test_shares_by_hand():
    lesion = np.zeros((3, 2, 2))
    lesion[:, 0] = 1, 0.5
    heat = np.array([[[0.5, 0.5], [0, 1]], np.ones((2, 2)), np.zeros((2, 2))])
    on, area = on_lesion.shares(heat, lesion)
    np.testing.assert_allclose(on, [0.375, 0.375, np.nan])
    np.testing.assert_allclose(area, 0.375)


def test_a_mask_covers_in_the_view_what_it_covers_in_the_photograph(tmp_path):
    """As a picture of its own: the whole one in a folder, its central square in a zip."""
    y, x = np.mgrid[:450, :600]
    whole = np.where(((x - 380) / 120) ** 2 + ((y - 150) / 90) ** 2 < 1, 255, 0).astype(np.uint8)
    pixels = np.stack([whole] * 3, axis=-1)
    canvas = image.load(pixels, (300, 400))[None]
    Image.fromarray(whole).save(tmp_path / "ISIC_1.png")
    square = Image.fromarray(whole[:, 75:525]).resize((256, 256), Image.Resampling.NEAREST)
    square.save(packed := io.BytesIO(), "PNG")
    with zipfile.ZipFile(tmp_path / "masks.zip", "w") as archive:
        archive.writestr("masks/ISIC_1_segmentation.png", packed.getvalue())
    for crop_scale in (1.0, 0.7):
        seen = jax.jit(lambda x, scale=crop_scale: preprocess.eval_view(x, 64, scale, 0.0))
        view = np.asarray(seen(canvas))[0, :, :, 0]
        for path in (tmp_path, tmp_path / "masks.zip"):
            masks = on_lesion.Masks(path)
            assert "ISIC_1" in masks
            assert "ISIC_2" not in masks
            found = masks.read(["ISIC_1"], 64, crop_scale)[0]
            assert np.abs(found - view).mean() < 0.01
            assert found.max() == 1
    assert np.abs(found[:, ::-1] - view).mean() > 0.1, "it is not in the middle"


def test_wrong_masks_are_named(tmp_path):
    with pytest.raises(InputError, match="neither a folder nor a zip"):
        on_lesion.Masks(tmp_path / "none.zip")
    with pytest.raises(InputError, match=r"holds no \.png"):
        on_lesion.Masks(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(b"no image")
    with pytest.raises(InputError) as raised:
        on_lesion.Masks(tmp_path).read(["a", "b"], 16, 1.0)
    assert len(raised.value.faults) == 2


def test_a_summary_weighs_diagnoses_alike_and_draws_lesions():
    rows = [
        *(("mel", f"m{n}", 0.5 + 0.02 * n, 0.2) for n in range(10)),
        *(("nv", f"n{n // 4}", 0.1, 0.3) for n in range(40)),
        ("nv", "n9", np.nan, 0.9),
    ]
    truth, lesions, heat, area = zip(*rows, strict=True)
    table = pd.DataFrame(
        {"truth": truth, "lesion_id": lesions, "heat_on_lesion": heat, "lesion_area": area}
    )
    found = on_lesion.summarise(table, HAM10000)
    assert (found["num_images"], found["num_without_heat"]) == (51, 1)
    assert list(found["per_class"]) == ["mel", "nv"]
    mel, nv = found["per_class"].values()
    assert mel["difference"] == pytest.approx(0.39)
    assert nv["difference"] == pytest.approx(-0.2)
    assert nv["interval"] == pytest.approx([-0.2, -0.2]), "its lesions are all alike"
    assert found["mean"]["difference"] == pytest.approx(0.095)
    low, high = mel["interval"]
    # The mean of ten values of that spread, by the central limit theorem.
    half = 1.96 * np.std(0.02 * np.arange(10)) / np.sqrt(10)
    assert [low, high] == pytest.approx([0.39 - half, 0.39 + half], abs=0.006)
