"""Every image is judged once, by a network that never saw its lesion; and so in ensembles."""

import csv
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ham_jax import checkpoints, config, models
from ham_jax import model as models_that_answer
from ham_jax.classes import HAM10000
from ham_jax.commands import predict
from ham_jax.config import InputError
from ham_jax.data import prepare as preparation
from ham_jax.data import synthetic
from ham_jax.data.records import Subset
from ham_jax.evaluation import bootstrap, calibration, evaluate, isic, metrics, predictions
from ham_jax.inference import calibrator
from ham_jax.training import crossval, loop


class StopAfter:
    """A request to stop, as SIGTERM would make it, after being asked for a number of times."""

    exit_code = 75

    def __init__(self, times=None):
        self.times = times
        self.asked = 0

    def reached(self):
        self.asked += 1
        return self.asked == self.times


def linear(model_config, num_classes, num_metadata):
    """A network that costs nothing and compiles at once; its name decides what it looks at."""
    power = 1 if model_config.name == "resnet18" else 3

    def features(params, batch_stats, image):
        color = (image**power).mean((1, 2))
        return color[:, :2] - color[:, 1:]

    def apply(params, batch_stats, image, *_, **__):
        return features(params, batch_stats, image) @ params["head"]["kernel"], batch_stats

    def classify(params, batch_stats, features, metadata=None):
        return features @ params["head"]["kernel"]

    kernel = np.random.default_rng(0).normal(0, 10, (2, num_classes))
    params = {"head": {"kernel": jnp.asarray(kernel, jnp.float32)}}
    return models.Network("linear", lambda seed: (params, {}), apply, features, None, classify)


@pytest.fixture(scope="module", autouse=True)
def linear_networks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "build", linear)
        yield


@pytest.fixture(scope="module")
def mesh():
    return jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))


def tiny(raw, prepared, **edits):
    c = config.base()
    c.data.dir = str(raw)
    c.data.prepared_dir = str(prepared)
    c.data.canvas = (24, 32)
    c.data.allow_partial = True
    c.data.num_folds = 2
    c.data.num_workers = 1
    c.data.feed = "resident"
    c.augment.crop_px = 16
    c.optim.learning_rate = 0.1
    c.optim.warmup = {"steps": 0}
    c.train.batch_size = 8
    c.train.duration = {"steps": 2}
    c.eval.batch_size = 64
    c.log.tensorboard = False
    with c.unlocked():
        c.update_from_flattened_dict(edits)
    config.validate(c)
    return c


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tmp_path_factory.mktemp("records")


@pytest.fixture(scope="module")
def tiny_test(tmp_path_factory):
    """Photographs of lesions that no fold has."""
    folder = tmp_path_factory.mktemp("synthetic") / "test"
    synthetic.write(folder, 60, 1)
    metadata = folder / "HAM10000_metadata.csv"
    text = metadata.read_text().replace("HAM_", "HAM_test_").replace("ISIC_00", "ISIC_99")
    metadata.write_text(text)
    for photograph in list(folder.rglob("ISIC_00*")):
        photograph.rename(photograph.with_name(photograph.name.replace("ISIC_00", "ISIC_99")))
    return folder


@pytest.fixture(scope="module")
def folds(tiny_raw, prepared, mesh, tmp_path_factory):
    """A cross-validation that was stopped in its second fold and started again."""
    workdir = tmp_path_factory.mktemp("runs") / "folds"
    c = tiny(tiny_raw, prepared)
    with pytest.raises(loop.Preempted, match="stopped at step 1") as stopped:
        crossval.train(c, workdir, mesh, StopAfter(5))
    assert stopped.value.exit_code == 75
    assert not (workdir / "metrics.json").exists()
    crossval.train(c, workdir, mesh, StopAfter())
    return workdir


@pytest.fixture(scope="module")
def other(tiny_raw, prepared, mesh, tmp_path_factory):
    """Another architecture on another canvas and crop, which validates on fold 0 too."""
    workdir = tmp_path_factory.mktemp("runs") / "other"
    edits = {
        "data.canvas": (32, 40),
        "augment.crop_px": 24,
        "model.name": "resnet34",
        "eval.tta": 2,
        "eval.batch_size": 32,
    }
    loop.train(tiny(tiny_raw, prepared, **edits), workdir, mesh, StopAfter())
    return workdir


def ood_scores(path):
    """Returns the column of a CSV, nan where it is empty."""
    with path.open(newline="") as file:
        return np.array([float(row["ood_score"] or "nan") for row in csv.DictReader(file)])


def test_each_image_is_judged_once_by_a_network_that_never_saw_its_lesion(folds, tiny_raw):
    whole = predictions.read(folds / "predictions.csv")
    ids, probabilities = whole.image_ids, whole.probabilities
    assert sorted(ids) == sorted(path.stem for path in tiny_raw.rglob("*.jpg"))
    joined = dict(zip(ids, probabilities.tolist(), strict=True))
    scores = dict(zip(ids, ood_scores(folds / "predictions.csv"), strict=True))
    for fold in (folds / "fold0", folds / "fold1"):
        judged = predictions.read(fold / "predictions.csv")
        in_fold, lesions = judged.image_ids, judged.lesion_ids
        assert judged.probabilities.tolist() == [joined[image_id] for image_id in in_fold]
        of_fold = ood_scores(fold / "predictions.csv")
        assert of_fold.tolist() == [scores[image_id] for image_id in in_fold]
        assert (of_fold > 1).mean() <= 0.05
        of_fold = config.from_dict(json.loads((fold / "config.json").read_text()))
        trained_on = preparation.prepare(of_fold).select("train").table
        assert len(in_fold) + len(trained_on) == len(ids)
        assert not set(lesions) & set(trained_on["lesion_id"])

        assert (fold / calibrator.FILE).exists()

    records = preparation.prepare(of_fold).records.table.set_index("image_id")
    known = list(predictions.METADATA)
    assert (whole.metadata["dx_type"] != "").all()
    assert whole.metadata[known].equals(records.loc[ids, known].reset_index(drop=True))

    written = json.loads((folds / "metrics.json").read_text())
    after = np.empty((len(ids), 7))  # each fold by itself, without the lesion at hand
    for fold in (folds / "fold0", folds / "fold1"):
        judged = predictions.read(fold / "predictions.csv")
        decided = calibration.cross_fit(judged, "temperature")
        after[np.isin(ids, judged.image_ids)] = decided.probabilities  # both by image_id
    expected = calibration.measure_method(whole.with_probabilities(after))
    assert written["calibration"]["temperature"] == expected
    assert written["calibration"]["cross_fitted"]
    recomputed = metrics.compute(whole)
    assert {key: written[key] for key in recomputed} == recomputed
    low, high = written["balanced_accuracy_interval"]
    assert low < written["balanced_accuracy"] < high
    again = bootstrap.intervals(whole)
    assert written["intervals"] == again
    assert written["balanced_accuracy_interval"] == again["balanced_accuracy"]
    assert written["num_folds"] == len(written["folds"]) == 2
    for fold, part in enumerate(written["folds"]):
        alone = json.loads((folds / f"fold{fold}" / "metrics.json").read_text())
        assert part == {key: alone[key] for key in part}
    with (folds / "isic_submission.csv").open() as file:
        assert len(file.readlines()) == 1 + len(ids)


def test_a_second_start_trains_nothing_and_mends_what_another_evaluation_wrote(
    folds, tiny_raw, prepared, mesh, tmp_path, monkeypatch
):
    workdir = tmp_path / "folds"
    shutil.copytree(folds, workdir)
    written = (workdir / "metrics.json").read_text()
    evaluate.run([workdir / "fold1"], "train", [], mesh)
    monkeypatch.setattr(loop, "_Steps", None)
    crossval.train(tiny(tiny_raw, prepared), workdir, mesh, StopAfter())
    assert (workdir / "metrics.json").read_text() == written

    with pytest.raises(loop.Preempted, match="the start of fold 1"):
        crossval.train(tiny(tiny_raw, prepared), workdir, mesh, StopAfter(2))


def test_a_run_and_a_cross_validation_do_not_share_a_folder(folds, other, tiny_raw, prepared, mesh):
    c = tiny(tiny_raw, prepared)
    with pytest.raises(InputError, match="a cross-validation"):
        loop.train(c, folds, mesh, StopAfter())
    with pytest.raises(InputError, match="a single run"):
        crossval.train(c, other, mesh, StopAfter())


def test_folds_do_not_start_from_a_run_that_trained_on_them(
    other, tiny_raw, prepared, mesh, tmp_path
):
    c = tiny(tiny_raw, prepared, **{"model.pretrained": str(other)})
    with pytest.raises(InputError, match="inflated by leakage"):
        crossval.train(c, tmp_path / "folds", mesh, StopAfter())


def test_predictions_that_lack_an_image_or_have_one_twice_are_not_joined(folds, tiny_raw, prepared):
    files = [folds / f"fold{fold}" / "predictions.csv" for fold in (0, 1)]
    records = preparation.prepare(tiny(tiny_raw, prepared)).records
    images = Subset(records, np.arange(len(records.table)))
    for wrong in (files[:1], [*files, files[0]], [files[0], files[0]]):
        with pytest.raises(InputError, match="images once"):
            crossval._joined(wrong, images, "none")


def test_an_ensemble_is_the_mean_of_its_members(folds, other, tiny_raw, mesh, tmp_path):
    members = [folds / "fold0", other]
    alone = [evaluate.run([m], "val", [], mesh, tmp_path / m.name) for m in members]
    both = evaluate.run(members, "val", [], mesh, tmp_path / "both")
    raw = [
        predictions.read(tmp_path / name / "predictions.csv").probabilities
        for name in ("fold0", "other")
    ]
    judged = predictions.read(tmp_path / "both" / "predictions.csv")
    ids, probabilities = judged.image_ids, judged.probabilities
    assert not np.allclose(*raw)
    np.testing.assert_array_equal(probabilities, (raw[0] + raw[1]) / 2)
    assert [m["balanced_accuracy"] for m in both["members"]] == [
        a["balanced_accuracy"] for a in alone
    ]
    assert [m["tta"] for m in both["members"]] == [1, 2]

    scores = [ood_scores(tmp_path / n / "predictions.csv") for n in ("fold0", "other")]
    assert not np.allclose(*scores)
    together = ood_scores(tmp_path / "both" / "predictions.csv")
    np.testing.assert_allclose(together, np.mean(scores, axis=0), rtol=1e-12)

    # From the files, each member with its own canvas: the same to what the CSV rounds to.
    paths = {p.stem: p for p in tiny_raw.rglob("*.jpg")}
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    listed = tmp_path / "list.csv"
    listed.write_text("path\n" + "\n".join(str(p) for p in [broken, *(paths[i] for i in ids)]))
    output = tmp_path / "answers.csv"
    calibrated = [
        calibrator.read(m, HAM10000).apply("temperature", of_member).probabilities
        for m, of_member in zip(members, raw, strict=True)
    ]
    for method, expected in (("none", probabilities), ("temperature", np.mean(calibrated, axis=0))):
        choice = [("eval.calibration", method)]
        assert predict.run(members, str(listed), output, choice, mesh) == len(ids)
        with output.open(newline="") as file:
            first, *rows = csv.DictReader(file)
        assert first["error"]
        told = [[float(row[dx]) for dx in HAM10000] for row in rows]
        np.testing.assert_allclose(told, expected, rtol=0, atol=3e-6)
    # Batches of another size are added up in another order.
    np.testing.assert_allclose(ood_scores(output)[1:], together, rtol=0, atol=2e-5)
    assert [row["ood"] == "yes" for row in rows] == (together > 1).tolist()


def test_a_run_without_calibration_answers_and_eval_makes_one(
    folds, tiny_raw, mesh, tmp_path, capsys
):
    trained = folds / "fold0"
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    written = (run / calibrator.FILE).read_text()
    (run / calibrator.FILE).unlink()
    images = str(next(tiny_raw.rglob("*.jpg")))
    output = tmp_path / "answers.csv"

    def ask(workdirs, *overrides):
        predict.run(workdirs, images, output, list(overrides), mesh)
        with output.open(newline="") as file:
            answer = next(csv.DictReader(file))
        return answer, " ".join(capsys.readouterr().err.split())

    raw, _ = ask([trained], ("eval.calibration", "none"))
    calibrated, lines = ask([trained])
    assert "calibration.json" not in lines
    without, lines = ask([run])
    assert f"Make it with --mode=eval --split=val --workdir={run}" in lines
    columns = ("malignant", "malignant_flag", "prediction_set")
    assert raw["note"].startswith(without["note"])  # after it, what the sets promise
    assert without == raw | dict.fromkeys(columns, "") | {"note": without["note"]}
    both, lines = ask([run, trained])
    assert f"{run} has no calibration.json" in lines
    assert "mean of 2 runs' thresholds" not in lines
    assert both["malignant_flag"] == ""
    middle = (float(raw["nv"]) + float(calibrated["nv"])) / 2
    assert float(both["nv"]) == pytest.approx(middle, abs=3e-6)

    numbers = evaluate.run([run], "train", [], mesh)
    assert "calibration" not in numbers
    assert "has no calibration.json" in capsys.readouterr().err
    evaluate.run([run], "val", [], mesh, tmp_path / "elsewhere")
    assert not (run / calibrator.FILE).exists()
    numbers = evaluate.run([run], "val", [], mesh)
    assert (run / calibrator.FILE).read_text() == written
    assert ask([run]) == (calibrated, "")
    assert numbers["calibration"]["cross_fitted"]
    assert json.loads((run / "metrics.json").read_text()) == numbers
    assert json.loads((trained / "metrics.json").read_text()) == numbers
    fixed = evaluate.run([run], "train", [], mesh)["calibration"]
    assert not fixed["cross_fitted"]
    assert (run / calibrator.FILE).read_text() == written, "fitted on validation only"

    capsys.readouterr()
    _, lines = ask([run], ("eval.tta", "2"))
    assert "eval.tta = 2 (calibrated with 1)" in lines
    _, lines = ask([run, trained])
    assert "mean of 2 runs' thresholds" in lines
    (run / calibrator.FILE).write_text(written[:100])
    with pytest.raises(InputError, match="is damaged"):
        ask([run])


def test_each_photograph_is_decoded_once_a_canvas(
    folds, other, tiny_raw, mesh, tmp_path, monkeypatch
):
    canvases = []
    load_many = models_that_answer.image_files.load_many

    def counted(paths, canvas, num_workers):
        canvases.append(canvas)
        return load_many(paths, canvas, num_workers)

    monkeypatch.setattr(models_that_answer.image_files, "load_many", counted)
    image = str(next(tiny_raw.rglob("*.jpg")))
    output = tmp_path / "answers.csv"
    assert checkpoints.runs(folds) == [folds / "fold0", folds / "fold1"]
    assert predict.run([folds, other], image, output, [], mesh) == 1
    assert canvases == [(24, 32), (32, 40)]
    together = output.read_text()
    predict.run([folds / "fold0", folds / "fold1", other], image, output, [], mesh)
    assert output.read_text() == together


def test_members_of_other_folds_are_averaged_on_the_test_only(
    folds, tiny_raw, tiny_test, mesh, tmp_path
):
    with pytest.raises(InputError, match="needs --output"):
        evaluate.run([folds], "test", [], mesh)
    with pytest.raises(InputError, match="that some members were trained on"):
        evaluate.run([folds], "val", [], mesh, tmp_path / "both")
    assert not (tmp_path / "both").exists()
    test = [("data.test_dir", str(tiny_test))]
    numbers = evaluate.run([folds], "test", test, mesh, tmp_path / "both")
    assert numbers["num_images"] == len(list(tiny_test.rglob("*.jpg")))
    assert len(numbers["members"]) == 2
    judged = predictions.read(tmp_path / "both/predictions.csv")
    assert numbers["isic2018"] == isic.score(judged)
