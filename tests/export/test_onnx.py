import collections
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ham_jax.config import InputError
from ham_jax.export import onnx as onnx_file

IMAGES = np.random.default_rng(1).integers(0, 256, (3, 36, 48, 3), np.uint8)
EVERY_FAMILY = {
    "resnet": {
        "model.name": "resnet18",
        "model.stem": "d",
        "model.metadata": True,
        "augment.shades_of_gray": 6.0,
        "eval.tta": 8,
    },
    "efficientnet": {
        "model.name": "efficientnet_lite0",
        "eval.calibration": "isotonic",
        "eval.tta": 2,
    },
    "convnext": {
        "model.name": "convnext_atto",
        "eval.calibration": "none",
        "eval.crop_scale": 0.8,
        "eval.tiles": 4,
    },
}


@pytest.fixture(scope="module")
def onnx():
    pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    return pytest.importorskip("onnx", reason="the extra `export` is not installed")


@pytest.mark.parametrize("settings", EVERY_FAMILY.values(), ids=list(EVERY_FAMILY))
def test_the_file_says_what_the_model_says(settings, small_model, tmp_path, onnx):
    model, path = small_model(**settings), tmp_path / "model.onnx"
    onnx_file.write(model, path)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    table = [{"age": 50, "sex": "male"}, {}, {"localization": "ear"}]
    for num in (1, 3):
        images = IMAGES[:num]
        codes = model.encode(pd.DataFrame(table[:num]))
        said = onnx_file.answer(path, images, codes)
        ours = model.predict(images, table[:num], exact=True)  # compiled once
        assert np.ptp(ours.probabilities) > 0.1
        np.testing.assert_allclose(said["probabilities"], ours.probabilities, atol=1e-5)
        raw = model.probabilities(images, codes)
        np.testing.assert_allclose(said["raw"], raw, atol=1e-5)
        np.testing.assert_allclose(said["features"], model.features(images), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(said["ood_score"], ours.ood_scores, rtol=1e-4)


def test_maps_stay_as_convolutions_want_them(small_model, tmp_path, onnx):
    """Each layer stands in the file once, whatever the views, and turns no map."""
    onnx_file.write(small_model(**{"model.name": "resnet18"}), tmp_path / "one.onnx")
    onnx_file.write(
        small_model(**{"model.name": "resnet18", "eval.tta": 4}), tmp_path / "four.onnx"
    )
    for name in ("one", "four"):
        nodes = onnx.load(tmp_path / f"{name}.onnx").graph.node
        kinds = collections.Counter(node.op_type for node in nodes)
        assert (kinds["Conv"], kinds["Transpose"]) == (7, 1)


def test_what_has_no_rule_is_refused(onnx):
    from ham_jax.export import graph

    traced = jax.make_jaxpr(lambda x: [jnp.sort(x)])(jnp.ones(3))
    with pytest.raises(graph.UntranslatableError, match="sort"):
        graph.model(traced, ["x"], ["y"])


def test_without_the_extra_a_sentence_says_how_to_get_it(small_model, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'ham-jax\[export\]'"):
        onnx_file.write(small_model(), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.fixture
def example(onnx):
    path = Path(__file__).parents[2] / "examples" / "onnx_predict.py"
    spec = importlib.util.spec_from_file_location("onnx_predict", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def agree(example, model, photographs, folder):
    onnx_file.write(model, folder / "model.onnx")
    ours = model.predict(photographs)
    for said, answer in zip(example.answers(folder / "model.onnx", photographs), ours, strict=True):
        json.dumps(said)
        assert said["prediction"] == answer.prediction
        assert said["prediction_set"] == list(answer.prediction_set)
        assert (said["flagged"], said["unlike"]) == (answer.flagged, answer.unlike)
        for name, p in answer.probabilities.items():
            assert abs(said["probabilities"][name] - p) <= 1e-4


def test_the_example_answers_as_we_do(example, small_model, tmp_path):
    paths = []
    for number, (height, width) in enumerate([(90, 120), (120, 90), (36, 200)]):
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        picture, exif = Image.fromarray(noise), Image.Exif()
        exif[0x0112] = (1, 6, 3)[number]
        paths.append(tmp_path / f"{number}.png")
        picture.save(paths[-1], exif=exif)
    settings = {"model.name": "resnet18", "model.metadata": True}
    agree(example, small_model(**settings), paths, tmp_path)


def test_the_example_answers_as_we_do_for_original_photographs(
    example, small_model, real_data, tmp_path
):
    photographs = sorted((real_data / "originals_600x450").rglob("*.jpg"))
    assert len(photographs) == 70
    settings = {"model.name": "resnet18", "data.canvas": (300, 400), "data.num_workers": 1}
    agree(example, small_model(**settings), photographs, tmp_path)
