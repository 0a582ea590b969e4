"""A run's folder in, its table of corruptions out."""

import jax
import numpy as np
import pandas as pd
import pytest

from ham_jax import config, models
from ham_jax.config import InputError
from ham_jax.evaluation import bootstrap, corruptions, evaluate, metrics, predictions, robustness
from ham_jax.training import loop


class NeverStop:
    exit_code = 75

    def reached(self):
        return False


def by_color(model_config, num_classes, num_metadata):
    """A network that costs nothing and answers by the mean colour and its spread."""

    def features(params, batch_stats, image):
        return jax.numpy.concatenate([image.mean((1, 2)), image.std((1, 2))], -1)

    def apply(params, batch_stats, image, *_, **__):
        kernel = params["head"]["kernel"]
        return 20 * features(params, batch_stats, image) @ kernel, batch_stats

    def classify(params, batch_stats, features, metadata=None):
        return 20 * features @ params["head"]["kernel"]

    kernel = np.random.default_rng(0).normal(0, 1, (6, num_classes)).astype(np.float32)
    params = {"head": {"kernel": kernel}}
    return models.Network("by_color", lambda seed: (params, {}), apply, features, None, classify)


@pytest.fixture(scope="module")
def mesh():
    return jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))


@pytest.fixture(scope="module")
def trained(tiny_records, tmp_path_factory, mesh):
    c = config.base()
    c.data.dir = str(tiny_records)
    c.data.canvas = (24, 32)
    c.data.num_folds = 3
    c.augment.crop_px = 16
    c.optim.warmup = {"steps": 0}
    c.train.batch_size = 8
    c.train.duration = {"steps": 2}
    c.eval.batch_size = 32
    c.eval.tta = 2
    c.log.tensorboard = False
    workdir = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build", by_color)
        loop.train(c, workdir, mesh, NeverStop())
        yield workdir


def test_the_table_of_a_run(trained, mesh, tmp_path, capsys):
    before = sorted(trained.iterdir())
    found = robustness.run([trained], "val", [], mesh, tmp_path)
    assert sorted(trained.iterdir()) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["robustness.csv"]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "robustness.csv"), found)
    header = "corruption,severity,balanced_accuracy,low,high,accuracy,macro_auc,n,split,tta"
    assert (tmp_path / "robustness.csv").read_text().startswith(header + "\nnone,0,")
    asked = [(name, s) for name in corruptions.NAMES for s in range(1, 6)]
    assert list(zip(found["corruption"], found["severity"], strict=True)) == [("none", 0), *asked]
    assert (found["low"] <= found["balanced_accuracy"]).all()
    assert (found["balanced_accuracy"] <= found["high"]).all()
    assert found["macro_auc"].nunique() > 30, "every corruption reaches the network"
    assert (found["tta"] == 1).all(), "although the run was evaluated with two views"

    clean = evaluate.run([trained], "val", [("eval.tta", "1")], mesh, tmp_path)
    judged = predictions.read(tmp_path / "predictions.csv")
    low, high = bootstrap.balanced_accuracy_interval(judged)
    expected = [clean["balanced_accuracy"], low, high, clean["accuracy"], clean["macro_auc"]]
    columns = ["balanced_accuracy", "low", "high", "accuracy", "macro_auc"]
    assert found.loc[0, columns].tolist() == expected
    assert found.loc[0, "n"] == clean["num_images"]

    said = capsys.readouterr().out
    grid = found[1:].groupby("corruption", sort=False)["balanced_accuracy"]
    for name, mean in grid.mean().items():
        (line,) = (line for line in said.splitlines() if line.strip().startswith(name))
        assert f"{mean:.3f}" in line
        assert f"{mean / found.loc[0, 'balanced_accuracy']:.0%}" in line
    difference = found["balanced_accuracy"][1:].mean() - found.loc[0, "balanced_accuracy"]
    assert f"{difference:+.3f}" in said


def test_fewer_images_more_views_and_an_ensemble(trained, mesh, tmp_path):
    few, twice = [("eval.robustness_images", "30"), ("eval.tta", "2")], [trained, trained]
    with pytest.raises(InputError, match="needs --output"):
        robustness.run(twice, "val", few, mesh)
    found = robustness.run(twice, "val", few, mesh, tmp_path)
    assert (found["tta"] == 2).all()
    assert found["n"].between(30, 40).all()
    # The mean of equal members is each of them.
    evaluate.run([trained], "val", [], mesh, tmp_path)  # with two views
    judged = predictions.read(tmp_path / "predictions.csv")
    table = pd.DataFrame({"lesion_id": judged.lesion_ids, "label": judged.labels})
    expected = metrics.compute(judged.take(robustness.choose(table, 30)))
    for name in ("balanced_accuracy", "accuracy", "macro_auc"):
        assert found.loc[0, name] == pytest.approx(expected[name], rel=1e-12)


def test_whole_lesions_even_over_the_classes_are_chosen_from_any_order():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 4, 300)
    labels = rng.choice(4, 300, p=[0.7, 0.2, 0.08, 0.02])
    table = pd.DataFrame(
        {
            "image_id": [f"I{n}" for n in range(sizes.sum())],
            "lesion_id": np.repeat([f"L{n}" for n in range(300)], sizes),
            "label": np.repeat(labels, sizes),
        }
    )
    counts = table["label"].value_counts()

    def ids(table, num_images):
        return set(table["image_id"].iloc[robustness.choose(table, num_images)])

    for num_images in (20, 100, 300):
        chosen = table[table["image_id"].isin(ids(table, num_images))]
        assert num_images <= len(chosen) <= num_images + 4 * 3 + 4
        assert (chosen["lesion_id"].value_counts() == 0).sum() == 0
        rest = table[~table.index.isin(chosen.index)]
        assert not {*chosen["lesion_id"]} & {*rest["lesion_id"]}
        own = chosen["label"].value_counts()
        most = own.max()
        assert all(own[k] == counts[k] or own[k] >= most - 3 for k in range(4))
        shuffled = table.sample(frac=1, random_state=1)
        assert ids(shuffled, num_images) == {*chosen["image_id"]}
    assert ids(table, 100) <= ids(table, 300)
    for everything in (0, len(table), 10**6):
        assert len(robustness.choose(table, everything)) == len(table)
