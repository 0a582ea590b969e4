"""Maps are those of the paper, depend on the weights, and stand over the place that they mean."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage, stats

from ham_jax import config, escape, model, models, parallel
from ham_jax.classes import Classes
from ham_jax.config import InputError
from ham_jax.evaluation import explain, predictions
from ham_jax.evaluation.predictions import Predictions
from ham_jax.models import resnet
from ham_jax.models.pool import Pool
from ham_jax.training import loop


class Patches(nnx.Module):
    """A backbone of no weights: the mean colour of each 4 x 4 pixels is its last map."""

    num_features = 3

    def __init__(self, *_):
        self.pool = Pool()

    def __call__(self, image, rngs=None):
        b, h, w, c = image.shape
        return self.pool(image.reshape(b, h // 4, 4, w // 4, 4, c).mean((2, 4)))


@pytest.fixture
def patches(monkeypatch):
    monkeypatch.setattr(resnet, "ResNet", Patches)


def random_weights(net, seed):
    """Returns (params, batch_stats) of He's variance; the network's own would compile long."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            return rng.normal(0, (2 / np.prod(leaf.shape[:-1])) ** 0.5, leaf.shape).astype("f")
        # Scales of BatchNorm, LayerNorm and layer scale, and the spread of what they normalise.
        return np.full(leaf.shape, path[-1].key in ("scale", "var", "std"), "f")

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda: net.init(0)))


def test_choice_is_by_confidence_and_entropy_one_image_a_lesion():
    probabilities = np.array(
        [
            [0.90, 0.05, 0.05],  # right
            [0.80, 0.10, 0.10],  # right, of the same lesion
            [0.05, 0.85, 0.10],  # wrong
            [0.00, 0.95, 0.05],  # wrong and surer
            [0.34, 0.33, 0.33],  # right by a hair
            [0.50, 0.50, 0.00],  # no answer, which is wrong
        ]
    )
    lesions = ["a", "a", "b", "c", "d", "e"]
    judged = Predictions(Classes(("a", "b", "c")), np.zeros(6, int), probabilities, lesions)
    assert explain.choose(judged, 2) == {
        "confident_right": [0, 4],
        "confident_wrong": [3, 2],
        "uncertain": [4, 5],
    }
    assert explain.choose(judged.take(np.arange(2)))["confident_wrong"] == []


@pytest.mark.usefixtures("patches")
def test_with_a_linear_head_it_is_the_class_activation_map():
    """Zhou et al., CVPR 2016: a place's features times the class's weights; Grad-CAM's / places."""
    net = models.build(config.base().model, 7)
    params, batch_stats = net.init(0)
    image = np.random.default_rng(0).random((5, 16, 24, 3), np.float32)
    classes = np.array([0, 6, 3, 3, 1])
    last, gradient = net.class_maps(params, batch_stats, image, classes)
    normal = (image - np.array(resnet.FAMILY.mean)) / np.array(resnet.FAMILY.std)
    places = normal.reshape(5, 4, 4, 6, 4, 3).mean((2, 4))
    np.testing.assert_allclose(last, places, atol=1e-5)
    cam = np.einsum("bhwk,kb->bhw", places, np.asarray(params["head"]["kernel"])[:, classes])
    heat = model.grad_cam(last, gradient)
    np.testing.assert_allclose(heat, np.maximum(cam, 0) / 24, atol=1e-6)
    assert (cam < 0).any()
    assert (cam > 0).any()


@pytest.fixture(scope="module")
def red_spots():
    """A random ResNet whose class 0 is a red spot on grey.

    Returns:
      (net, params, params -> maps [4, 8, 8] of four spots, where each spot is [4, 8, 8])
    """
    section = config.base().model
    section.stem = "small"
    net = models.build(section, 7)
    params, batch_stats = random_weights(net, 0)
    images = np.full((5, 64, 64, 3), 0.5, np.float32)  # the last stays plain
    images += np.random.default_rng(0).normal(0, 0.02, images.shape).astype("f")
    where = np.zeros((4, 8, 8), bool)
    for number, (row, column) in enumerate([(1, 1), (1, 5), (5, 1), (5, 5)]):
        where[number, row : row + 2, column : column + 2] = True
        pixels = where[number].repeat(8, 0).repeat(8, 1)
        images[number][pixels] = (0.9, 0.1, 0.1)

    @jax.jit
    def last_and_gradient(params):
        return net.class_maps(params, batch_stats, images, jnp.zeros(5, jnp.int32))

    pooled = last_and_gradient(params)[0].mean((1, 2))
    params["head"]["kernel"][:, 0] = pooled[:4].mean(0) - pooled[4]
    return net, params, lambda params: model.grad_cam(*last_and_gradient(params))[:4], where


def test_a_spot_that_moves_moves_the_map(red_spots):
    _, params, maps, where = red_spots
    for heat, inside in zip(np.asarray(maps(params)), where, strict=True):
        around = ndimage.binary_dilation(inside, np.ones((3, 3)))
        assert around.flat[heat.argmax()]
        assert heat[inside].mean() > 1.2 * heat[~around].mean()


def test_maps_of_random_weights_are_others(red_spots):
    """Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018: randomised parameters.

    A map that only looks at the image, such as one of its edges, would keep its ranks.
    """
    net, params, maps, _ = red_spots

    def correlation(other):
        pairs = [(np.ravel(a), np.ravel(b)) for a, b in zip(maps(params), maps(other), strict=True)]
        # Where nothing speaks for the class the map is 0 everywhere, and nothing correlates.
        return [stats.spearmanr(a, b).statistic if np.ptp(b) else 0.0 for a, b in pairs]

    assert np.mean(correlation(jax.tree.map(lambda x: x * (1 + 1e-4), params))) > 0.95
    draws = [random_weights(net, seed)[0] for seed in range(1, 7)]
    assert abs(np.mean([correlation(draw) for draw in draws])) < 0.4
    only_heads = [{**params, "head": draw["head"]} for draw in draws]
    assert abs(np.mean([correlation(other) for other in only_heads])) < 0.4


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "convnext_atto"])
def test_every_family_has_maps(name):
    section = config.base().model
    section.name, section.stem = name, "small"
    net = models.build(section, 7)
    params, batch_stats = random_weights(net, 0)
    image = np.random.default_rng(0).random((4, 64, 64, 3), np.float32)
    classes = np.array([0, 1, 2, 6], np.int32)
    last, gradient = map(np.asarray, jax.jit(net.class_maps)(params, batch_stats, image, classes))
    kernel = params["head"]["kernel"].astype(np.float64)
    side = 8 if name == "resnet18" else 2
    assert last.shape == gradient.shape == (4, side, side, len(kernel))
    assert last.std() > 0.01

    def logit(pooled, row):  # from the map's average on, in float64
        if name == "convnext_atto":
            pooled = (pooled - pooled.mean()) / np.sqrt(pooled.var() + 1e-6)
        return pooled @ kernel[:, classes[row]]

    direction = np.random.default_rng(1).normal(size=len(kernel))
    for row in range(4):
        pooled = last[row].astype(np.float64).mean((0, 1))
        step = 1e-4 * direction
        slope = (logit(pooled + step, row) - logit(pooled - step, row)) / 2e-4
        # Each place has its share of the average.
        np.testing.assert_allclose(
            gradient[row] @ direction, np.full((side, side), slope / side**2), rtol=2e-3, atol=1e-5
        )


class NeverStop:
    exit_code = 75

    def reached(self):
        return False


@pytest.fixture(scope="module")
def trained(tiny_records, tmp_path_factory):
    c = config.base()
    c.data.dir = str(tiny_records)
    c.data.canvas = (24, 32)
    c.data.num_folds = 3
    c.model.metadata = True
    c.augment.crop_px = 16
    c.optim.learning_rate = 0.5
    c.train.batch_size = 8
    c.optim.warmup = {"steps": 0}
    c.train.duration = {"steps": 4}
    c.log.tensorboard = False
    c.eval.ood = False
    workdir = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet, "ResNet", Patches)
        loop.train(c, workdir, parallel.mesh(), NeverStop())
    return workdir


@pytest.mark.usefixtures("patches")
def test_panels_of_a_run(trained):
    mesh = parallel.mesh()
    manifest = explain.run(trained, "val", [], mesh)
    folder = trained / "explanations"
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    judged = predictions.read(trained / "predictions.csv")
    ids, chosen = judged.image_ids.tolist(), explain.choose(judged)
    shown = {name: [image["image_id"] for image in of] for name, of in manifest["panels"].items()}
    assert shown == {f"{kind}.png": [ids[row] for row in rows] for kind, rows in chosen.items()}
    for image in manifest["panels"]["confident_wrong.png"]:
        row = ids.index(image["image_id"])
        assert image["truth"] == judged.truth[row] != image["prediction"]
        assert image["probability"] == judged.probabilities[row].max()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {*shown, "manifest.json"}
    assert all(content.startswith(b"\x89PNG") for name, content in before.items() if name in shown)
    explain.run(trained, "val", [], mesh)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(InputError, match="split 'train'"):
        explain.run(trained, "train", [], mesh)


@pytest.mark.usefixtures("patches")
def test_heat_is_shared_between_the_halves_of_the_view(trained, tmp_path):
    """Masks of the left half and of the right: together all of the heat."""
    judged = predictions.read(trained / "predictions.csv")
    run = shutil.copytree(trained, tmp_path / "run")
    halves = []
    for side in (slice(0, 32), slice(32, 64)):
        folder = tmp_path / f"masks{side.start}"
        folder.mkdir()
        mask = np.zeros((64, 64, 3), np.uint8)
        mask[:, side] = 255
        for image_id in judged.image_ids[1:]:
            Image.fromarray(mask).save(folder / f"{image_id}.png")
        options = [("eval.masks", str(folder)), ("eval.robustness_images", "0")]
        explain.run(run, "val", [*options, ("eval.batch_size", "16")], parallel.mesh())
        halves.append(pd.read_csv(run / "explanations" / "on_lesion.csv"))
    left, right = halves
    assert left["image_id"].tolist() == judged.image_ids[1:].tolist()
    said = left["truth"].tolist(), left["prediction"].tolist()
    answers = [judged.classes.names[k] for k in judged.probabilities[1:].argmax(1)]
    assert said == (judged.truth[1:].tolist(), answers)
    np.testing.assert_allclose(left["lesion_area"], 0.5, atol=1e-6)
    total = left["heat_on_lesion"] + right["heat_on_lesion"]
    np.testing.assert_allclose(total.dropna(), 1, atol=1e-6)
    assert total.notna().any()
    assert left["heat_on_lesion"].std() > 0.01
    with pytest.raises(InputError, match="neither a folder nor a zip"):
        explain.run(run, "val", [("eval.masks", str(tmp_path / "no"))], parallel.mesh())


@pytest.mark.usefixtures("patches")
def test_panels_of_a_persons_photographs(trained, tiny_raw, tmp_path, capsys):
    files = sorted(tiny_raw.rglob("*.jpg"))[:8]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    listed = tmp_path / "list.csv"
    listed.write_text("path,age\n" + "".join(f"{path},50\n" for path in [broken, *files]))
    manifest = explain.run_on_photographs(trained, str(listed), [], parallel.mesh())
    shown = [image["image"] for images in manifest["panels"].values() for image in images]
    assert shown == list(map(str, files))
    assert list(manifest["panels"]) == ["photographs1.png", "photographs2.png"]
    assert (trained / "explanations" / "photographs2.png").read_bytes().startswith(b"\x89PNG")
    assert str(broken) in " ".join(capsys.readouterr().err.split())
    with pytest.raises(InputError, match="No photograph"):
        explain.run_on_photographs(trained, str(broken), [], parallel.mesh())

    hostile = ["$x_1$", "日本\u202e\n" + "x" * 200, os.fsdecode(b"\xff")]
    folder = tmp_path / "photographs"
    folder.mkdir()
    for name in (*hostile, "a.pdf"):
        shutil.copy(files[0], folder / f"{name}{'' if name == 'a.pdf' else '.jpg'}")
    manifest = explain.run_on_photographs(trained, str(folder), [], parallel.mesh())
    written = json.loads((trained / "explanations" / "manifest.json").read_text())
    assert written == manifest
    shown = [image["image"] for image in manifest["panels"]["photographs1.png"]]
    assert shown == [escape.shown(folder / f"{name}.jpg") for name in sorted(hostile)]
    assert "Not looked at: 1 .pdf" in capsys.readouterr().err


@settings(max_examples=6, deadline=None)
@given(st.text(st.characters(), max_size=60), st.sampled_from(["image", "image_id"]))
@example("$\\frac{$", "image_id")
@example("$$ ^ _ \\alpha ش ह\ud800\x00", "image")
def test_a_panel_takes_any_name(name, key):
    about = {key: name, "truth": "nv", "prediction": "mel", "probability": 0.5}
    panel = explain.draw([about], np.zeros((1, 4, 4, 3)), np.zeros((1, 4, 4)))
    assert panel.startswith(b"\x89PNG")
