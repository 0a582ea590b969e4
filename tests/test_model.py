"""A run's folder answers in Python as it does on the command line, to the last bit."""

import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import ham_jax
from ham_jax import export, model
from ham_jax.classes import Classes
from ham_jax.config import InputError
from ham_jax.data import records
from ham_jax.evaluation import predictions

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def trained(tiny_run, small_resnet18):
    return tiny_run(**{"optim.ema_decay": "0.9"})


@pytest.fixture
def photographs(trained, tiny_raw):
    files = {path.stem: str(path) for path in tiny_raw.rglob("*.jpg")}
    return [files[name] for name in predictions.read(trained / "predictions.csv").image_ids]


def test_a_loaded_run_answers_as_its_files_say(trained, photographs, tiny_records):
    loaded = ham_jax.load(trained)
    judged = predictions.read(trained / "predictions.csv")
    answers = loaded.predict(photographs, exact=True)
    decided = loaded.calibrator.apply("temperature", judged.probabilities)
    np.testing.assert_array_equal(answers.probabilities, decided.probabilities)
    np.testing.assert_array_equal(answers.calibrated.flagged, decided.flagged)
    np.testing.assert_allclose(answers.ood_scores, judged.metadata["ood_score"], rtol=1e-9)
    opened = records.open_records(tiny_records)
    rows = np.flatnonzero(np.isin(opened.table["image_id"], judged.image_ids))
    images = opened.read(rows)
    np.testing.assert_array_equal(loaded.probabilities(images), judged.probabilities)
    assert loaded.features(images).shape == (len(images), 16)
    view, heat = loaded.explain(images[:3], np.array([0, 4, 6]))
    assert view.shape == (3, 16, 16, 3)
    assert heat.shape == (3, 16, 16)
    assert loaded.provenance["weights"] == "ema"
    assert loaded.classes == ham_jax.Classes.from_json(loaded.classes.to_json())


def test_batches_and_views_side_by_side_on_one_cpu_answer_each_photograph(trained, photographs):
    """Of several threads each has its own batch; what they say is put where it belongs."""
    alone = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    views = [("eval.tta", "4"), ("eval.calibration", "none")]
    on_eight = ham_jax.load(trained, overrides=views).predict(photographs, exact=True)
    on_one = ham_jax.load(trained, mesh=alone, overrides=views)
    several, first = on_one.predict(photographs), on_one.predict(photographs[0])
    np.testing.assert_allclose(several.probabilities, on_eight.probabilities, atol=1e-5)
    np.testing.assert_allclose(first.probabilities, several.probabilities[:1], atol=1e-5)
    assert on_eight.probabilities.std(0).max() > 1e-3  # a photograph in another's place would show


def test_an_ensemble_has_the_same_answers(trained, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "_SCORED", 16)  # several groups of photographs
    one, two = ham_jax.load(trained), ham_jax.load([trained, trained])
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    some = [photographs[0], str(broken), photographs[1]]
    answers, again = one.predict(some), two.predict(some)
    np.testing.assert_array_equal(answers.probabilities, again.probabilities)
    np.testing.assert_array_equal(answers.ood_scores, again.ood_scores)
    assert np.isnan(answers.probabilities[1]).all()
    assert list(answers.errors) == [1]
    of_all, exact = (two.predict([*some, *photographs], exact=e) for e in (False, True))
    np.testing.assert_allclose(of_all.probabilities, exact.probabilities, atol=1e-5)
    np.testing.assert_allclose(of_all.ood_scores, exact.ood_scores, rtol=1e-4)
    assert answers.read.tolist() == [0, 2]
    assert len(answers.calibrated.flagged) == 2
    other = one.replace(classes=Classes(("a", "b")))
    with pytest.raises(InputError, match="only networks of the same classes"):
        model.Ensemble((one, other))
    with pytest.raises(InputError, match="No run was named"):
        ham_jax.load([])
    assert len(one.predict([])) == 0
    few = one.predict(photographs[:3])  # in a batch of their own
    filled = one.predict(photographs[:3], exact=True)
    np.testing.assert_allclose(few.probabilities, filled.probabilities, atol=1e-5)


def test_photographs_come_in_any_form_and_answers_one_by_one(trained, photographs):
    loaded = ham_jax.load(trained)
    path = Path(photographs[0])
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
        forms = [path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), picture]
        answers = loaded.predict([*forms, pixels, pixels.astype(float), b"no image"])
        (alone,) = loaded.predict(picture)
    reference = answers[0]
    for answer in [*answers[1:6], alone]:  # a JPEG may be decoded at a smaller scale
        assert answer.prediction == reference.prediction
        for name, probability in answer.probabilities.items():
            assert probability == pytest.approx(reference.probabilities[name], abs=0.02)
    assert answers[1] == reference
    assert list(reference.probabilities) == list(loaded.classes)
    assert reference.flagged == (reference.malignancy >= loaded_threshold(loaded))
    assert set(reference.prediction_set) <= set(loaded.classes)
    assert [bool(answer.error) for answer in answers] == [False] * 6 + [True] * 2
    assert "uint8 [H, W, 3], not float64" in answers[6].error
    assert answers[-1] == answers[7]
    with pytest.raises(IndexError):
        answers[8]
    with pytest.raises(FileNotFoundError):
        print(loaded.card)
    assert loaded.features(loaded.decode(photographs[:2])).shape == (2, 16)


def loaded_threshold(loaded):
    return loaded.calibrator.methods["temperature"]["thresholds"]["malignant"]


def test_what_belongs_to_the_run_cannot_be_set_anew(trained):
    with pytest.raises(InputError, match=r"augment\.crop_px cannot be set here"):
        ham_jax.load(trained, overrides=[("augment.crop_px", "32")])
    assert ham_jax.load(trained, overrides=[("eval.weights", "raw")]).provenance["weights"] == "raw"


def test_asking_a_trained_network_needs_no_training_libraries(trained, photographs):
    """A machine that only answers need not have TensorFlow, TFDS or scikit-learn."""
    code = """
        import sys
        for name in ("tensorflow", "tensorflow_datasets", "sklearn", "matplotlib"):
            sys.modules[name] = None
        import ham_jax
        from ham_jax.models import resnet
        resnet._WIDTHS, resnet.DEPTHS["resnet18"] = (16,), (1,)  # as in conftest
        print(ham_jax.load(sys.argv[1]).predict(sys.argv[2:]).probabilities.shape)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(trained), *photographs[:2]]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stdout.endswith("(2, 7)\n")


def test_an_exported_network_that_was_traced_before_answers_without_flax_or_pandas(
    trained, photographs, tmp_path
):
    here = ham_jax.load(trained)
    folder = tmp_path / "exported"
    folder.mkdir()
    export._write_weights(here, folder, "float32")
    code = """
        import sys
        again = sys.argv.pop(1) == "again"
        for name in ("flax", "optax", "orbax", "pandas", "sklearn", "tensorflow",
                     "tensorflow_datasets") if again else ():
            sys.modules[name] = None
        import ham_jax
        from ham_jax import parallel
        from ham_jax.commands import predict
        if not again:
            from ham_jax.models import resnet
            resnet._WIDTHS, resnet.DEPTHS["resnet18"] = (16,), (1,)  # as in conftest
        print(ham_jax.load(sys.argv[1]).predict(sys.argv[2:]).probabilities.tobytes().hex())
    """
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
    }
    said = []
    for when in ("first", "again"):
        command = [sys.executable, "-c", textwrap.dedent(code), when, str(folder)]
        ended = subprocess.run(
            [*command, photographs[0]], capture_output=True, text=True, env=environment, check=True
        )
        said.append(ended.stdout)
    assert said[0] == said[1]
    found = np.frombuffer(bytes.fromhex(said[0]), np.float64).reshape(1, -1)
    np.testing.assert_allclose(found, here.predict(photographs[0]).probabilities, atol=1e-5)


def test_predict_eval_explain_and_report_run_where_training_is_not_installed(
    trained, photographs, tmp_path
):
    code = """
        import sys
        from pathlib import Path
        for name in ("tensorflow", "tensorflow_datasets", "tensorboardX"):
            sys.modules[name] = None
        from ham_jax import parallel
        from ham_jax.commands import predict
        from ham_jax.evaluation import evaluate, explain, report
        from ham_jax.models import resnet
        resnet._WIDTHS, resnet.DEPTHS["resnet18"] = (16,), (1,)  # as in conftest
        run, photograph, mesh = Path(sys.argv[1]), sys.argv[2], parallel.mesh()
        evaluate.run([run], "val", [], mesh)
        predict.run([run], photograph, run / "predict.csv", [], mesh)
        explain.run_on_photographs(run, photograph, [], mesh)
        report.run(run, None)
    """
    run = shutil.copytree(trained, tmp_path / "run")
    before = {name: (run / name).read_bytes() for name in ("metrics.json", "predictions.csv")}
    for name in before:
        (run / name).unlink()
    command = [sys.executable, "-c", textwrap.dedent(code), str(run), photographs[0]]
    subprocess.run(command, capture_output=True, text=True, check=True)
    assert {name: (run / name).read_bytes() for name in before} == before
    for name in ("predict.csv", "explanations/photographs1.png", "report.html"):
        assert (run / name).stat().st_size > 100


def test_the_notebook_runs(trained, tiny_raw, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = json.loads((ROOT / "examples/predict.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    text = "\n".join("".join(cell["source"]) for cell in cells)
    folder = next(tiny_raw.rglob("*.jpg")).parent
    for written, ours in (
        ("load()", f"load({str(trained)!r})"),
        ('"../photographs"', repr(str(folder))),
    ):
        assert text.count(written) == 1
        text = text.replace(written, ours)
    names: dict = {}
    exec(compile(text, "predict.ipynb", "exec"), names)
    out = capsys.readouterr().out
    assert "nv is nevus" in out
    assert out.count(".jpg: ") == 6
    assert len(names["figure"].axes) == 6
    names["plt"].close("all")
