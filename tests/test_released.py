"""The model that comes with this library is what its card says."""

import json
import re

import numpy as np
import pytest

import ham_jax
from ham_jax import DISCLAIMER, hub
from ham_jax.data import synthetic
from ham_jax.evaluation import lesions, metrics, predictions, report

MOST_BYTES = 20_000_000

pytestmark = pytest.mark.skipif(len(hub.released()) != 1, reason="no model is in released/")


@pytest.fixture(scope="module")
def folder():
    return hub.released()[0]


def test_its_figures_follow_from_its_predictions(folder):
    for split in ("", "test_"):
        judged = predictions.read(folder / f"{split}predictions.csv")
        written = json.loads((folder / f"{split}metrics.json").read_text())
        for name, value in metrics.compute(judged).items():
            if isinstance(value, float):
                assert written[name] == pytest.approx(value, abs=1e-12), name
        for name, value in lesions.measure(judged).items():
            if isinstance(value, float):
                assert written["by_lesion"][name] == pytest.approx(value, abs=1e-12), name
    card = (folder / "README.md").read_text()
    remade = report.card(folder, folder.name).strip()
    of_machine = "- drawn with: .*\n"
    assert re.sub(of_machine, "", remade) in re.sub(of_machine, "", card)
    assert DISCLAIMER in card
    assert "license: cc-by-nc-4.0" in card.split("---")[1]
    names = re.search(r"SHA-256 of\nthe lesions' sorted names: `([0-9a-f]{64})`", card)
    assert (
        names.group(1) == json.loads((folder / "config.json").read_text())["trained_on"]["lesions"]
    )


def test_no_lesion_that_judges_it_trained_it(folder):
    import pandas as pd

    split = pd.read_csv(folder / "split.csv")
    trained = set(split["lesion_id"][split["split"] == "train"])
    for file in ("predictions.csv", "test_predictions.csv"):
        assert trained.isdisjoint(predictions.read(folder / file).lesion_ids)
    assert trained.isdisjoint(split["lesion_id"][split["split"] != "train"])


def test_it_answers_and_is_small(folder):
    assert sum(path.stat().st_size for path in folder.iterdir()) < MOST_BYTES
    model = ham_jax.load(overrides=[("eval.tta", "1")])
    assert model.workdir == folder
    drawn = synthetic.draw("mel", [1], [1])
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    answers = model.predict([drawn, noise])
    assert answers[1].unlike
    assert sum(answers[0].probabilities.values()) == pytest.approx(1)
    assert answers[0].prediction_set is not None
    assert answers[0].flagged is not None
