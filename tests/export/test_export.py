"""An exported folder answers as its run does, whole or not at all, whoever made it."""

import hashlib
import json
import shutil
import sys
import types
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors

import ham_jax
from ham_jax import checkpoints, config, export, hub, main, model, parallel
from ham_jax.config import InputError
from ham_jax.data import prepare
from ham_jax.evaluation import evaluate, explain, leakage, predictions, report
from ham_jax.models import pretrained
from ham_jax.training import loop


@pytest.fixture(scope="module")
def trained(tiny_run, small_resnet18):
    return tiny_run(**{"optim.ema_decay": "0.9"})


def options(dtype="float32", files=()):
    chosen = config.base().export
    chosen.dtype, chosen.files = dtype, files
    return chosen


def exported_to(output, workdirs, body=lambda folder, name: f"# {name}", **chosen):
    export.run(workdirs, output, options(**chosen), parallel.mesh(), body)
    return output


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    return exported_to(tmp_path_factory.mktemp("tiny"), [trained], report.card)  # empty


@pytest.fixture
def copy(exported, tmp_path):
    """A copy of the exported folder, to be damaged."""
    return shutil.copytree(exported, tmp_path / "copy")


@pytest.fixture
def photographs(tiny_raw):
    return sorted(map(str, tiny_raw.rglob("*.jpg")))[:6]


def test_it_answers_as_the_run_to_the_last_bit(trained, exported, photographs):
    run, loaded = ham_jax.load(trained), ham_jax.load(exported)
    assert list(loaded.predict(photographs)) == list(run.predict(photographs))
    assert loaded.provenance == run.provenance
    assert loaded.provenance["weights"] == "ema"
    assert loaded.takes_metadata is False
    images = run.decode(photographs)
    np.testing.assert_array_equal(loaded.features(images), run.features(images))
    labels = np.arange(6)
    np.testing.assert_array_equal(
        loaded.explain(images, labels).heat, run.explain(images, labels).heat
    )
    assert "## Thresholds" in loaded.card
    with pytest.raises(InputError, match="averaged weights has no others"):
        ham_jax.load(exported, overrides=[("eval.weights", "raw")])
    text = (exported / "config.json").read_text()
    assert str(trained.parent) not in text, "an export names no place of the machine"
    assert loaded.config.data.dir == "data/ham10000"
    assert json.loads(text)["trained_on"]["records"] == run.records != ""


def test_a_split_of_ones_own_goes_along(copy):
    changed(copy / hub.CONFIG, lambda c: c["config"]["data"].update(split_csv="/far/away.csv"))
    assert ham_jax.load(copy).config.data.split_csv == str(copy / "split.csv")


def test_evaluation_and_heat_maps_take_it(trained, exported, tiny_records, tmp_path):
    mesh, before = parallel.mesh(), sorted(exported.iterdir())
    at = [("data.dir", str(tiny_records))]
    found = evaluate.run([exported], "val", at, mesh, tmp_path / "eval")
    said = json.loads((trained / "metrics.json").read_text())
    assert found["log_loss"] == said["log_loss"]
    assert found["decision"] == said["decision"]
    assert found["records"] == said["records"]
    explain.run(exported, "val", at, mesh, tmp_path / "maps")
    assert (tmp_path / "maps" / "manifest.json").is_file()
    assert sorted(exported.iterdir()) == before, "nothing is written into it"


def test_training_starts_from_it_but_not_in_it(trained, exported, tiny_records):
    run = ham_jax.load(trained)
    params, batch_stats, told = pretrained.load(
        str(exported), *run.forward.network.init(3), "resnet18", loop._read_run
    )
    assert not told.fresh
    found = pretrained.flatten({"params": params, "batch_stats": batch_stats})
    for path, leaf in pretrained.flatten(run.variables).items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    assert checkpoints.read_run_config(exported).model.name == "resnet18"
    with pytest.raises(InputError, match="cannot be trained on"):
        checkpoints.check_run_config(exported, run.config)
    run.config.data.fold = 1
    judged = prepare.prepare(run.config).held_out()
    with pytest.raises(InputError, match="inflated by leakage"):
        leakage.refuse_trained_on(str(exported), judged, "model.pretrained")


def test_half_precision_is_close_and_becomes_float32(trained, photographs, tmp_path):
    half = exported_to(tmp_path / "half", [trained], dtype="float16")
    run, loaded = ham_jax.load(trained), ham_jax.load(half)
    tensors = pretrained.flatten(loaded.variables)
    assert {leaf.dtype.name for leaf in tensors.values()} == {"float32"}
    num_values = sum(leaf.size for leaf in tensors.values())
    assert (half / hub.WEIGHTS).stat().st_size < 3 * num_values + 5000
    there, here = loaded.predict(photographs), run.predict(photographs)
    assert 0 < np.abs(there.probabilities - here.probabilities).max() < 0.01
    np.testing.assert_allclose(there.ood_scores, here.ood_scores, rtol=0.02)
    assert "The weights are float16, read as float32" in loaded.card
    assert config.base().export.dtype == "float32"
    large = {"params/head/kernel": np.full(3, 1e5, np.float32)}
    with pytest.raises(InputError, match="head/kernel has values that it cannot hold"):
        hub.write(tmp_path, {}, run.config, large, None, "float16")
    content = {
        "provenance": {"step": 2, "weights": "raw"},
        "trained_on": {"records": ""},
        "classes": run.classes.to_json(),
    }
    hub.write(tmp_path, content, run.config, large, None, "bfloat16")
    params, *_ = hub.load(tmp_path)
    np.testing.assert_allclose(params["head"]["kernel"], 1e5, rtol=2**-8)
    assert params["head"]["kernel"].dtype == np.float32


def test_runs_together_are_an_ensemble(trained, exported, photographs, tmp_path):
    bare = shutil.copytree(trained, tmp_path / "bare")  # killed before it was evaluated
    for name in ("calibration.json", "ood.npz", "predictions.csv", "metrics.json"):
        (bare / name).unlink()
    (bare / "test").mkdir()
    (bare / "test" / "metrics.json").write_text("{}")
    folder = exported_to(tmp_path / "both", [exported, bare])
    loaded, both = ham_jax.load(folder), ham_jax.load([exported, bare])
    assert isinstance(loaded, ham_jax.Ensemble)
    np.testing.assert_array_equal(
        loaded.predict(photographs).probabilities, both.predict(photographs).probabilities
    )
    first, second = loaded.members
    assert first.calibrator is not None
    assert (second.calibrator, second.detector) == (None, None)
    assert (second.workdir / "test_metrics.json").read_text() == "{}"
    assert "nothing is known of how good it is" in second.card
    assert huggingface_hub.ModelCard(second.card).data.eval_results is None
    assert huggingface_hub.ModelCard((folder / hub.CARD).read_text()).data.library_name == "ham_jax"
    with pytest.raises(InputError, match="name the folder of one"):
        loop._read_run(folder)
    for bad in (["../copy"], ["member0", "gone"], [], "member0", [3]):
        hub.write_ensemble(folder, bad)
        with pytest.raises(InputError, match="must name subfolders"):
            ham_jax.load(folder)


def test_the_hub_reads_the_card(trained, exported):
    card = huggingface_hub.ModelCard((exported / hub.CARD).read_text())
    numbers = json.loads((trained / "metrics.json").read_text())
    assert card.data.license == "cc-by-nc-4.0"
    assert card.data.pipeline_tag == "image-classification"
    first = card.data.eval_results[0]
    assert first.metric_type == "balanced_accuracy"
    assert first.metric_value == pytest.approx(numbers["balanced_accuracy"], abs=1e-6)
    assert first.metric_args["confidence_interval_95"] == pytest.approx(
        numbers["intervals"]["balanced_accuracy"], abs=1e-6
    )
    assert first.dataset_split == "val"
    threshold = ham_jax.load(exported).calibrator.methods["temperature"]["thresholds"]["malignant"]
    assert f"reach {threshold:.4f}" in card.text
    assert "| `model.safetensors` | 0.0e+00 | 0.0e+00 | 0.0e+00 |" in card.text
    assert "16 validation photographs" in card.text


def changed(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def with_tensors(folder, tensors, name=hub.WEIGHTS):
    """Puts other tensors into a folder, as somebody would who wants them to be taken."""
    hub.files.write_bytes(folder / name, hub.safetensors.numpy.save(tensors))
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    changed(folder / hub.CONFIG, lambda c: c["checksums"].update({name: digest}))


def test_damaged_weights_are_told(copy):
    path = copy / hub.WEIGHTS
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for damaged in (whole[:-1000], whole[:4], b"", bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"model\.safetensors is damaged or missing.*checksum"):
            ham_jax.load(copy)
    path.unlink()
    with pytest.raises(InputError, match="No such file"):
        ham_jax.load(copy)
    own = {"params/head/kernel": np.zeros((3, 3), np.float32)}
    for tensors, said in (
        (own, r"does not fit resnet18 of 7 classes: \d+ tensors"),
        ({"params": np.zeros(3, np.float32)}, "damaged"),
        ({**own, "params/head/kernel/a": own["params/head/kernel"]}, "damaged"),
        ({"params/a": np.zeros(3, np.int64)}, "I64"),
    ):
        with_tensors(copy, tensors)
        with pytest.raises(InputError, match=said):
            ham_jax.load(copy)


def test_a_damaged_or_foreign_config_is_told(copy):
    path = copy / hub.CONFIG
    whole = path.read_text()
    for change, said in (
        (lambda c: c.pop("library_name"), "no model that ham_jax exported"),
        (lambda c: c.update(library_name="timm"), "no model that ham_jax exported"),
        (lambda c: c.update(format=2), "has format 2"),
        (lambda c: c.pop("config"), "is damaged"),
        (lambda c: c.update(config=[1]), "is damaged"),
        (lambda c: c["config"].update(surprise={"a": 1}), r"surprise\.a"),
        (lambda c: c["config"]["model"].update(name="../../x"), "model.name"),
        (lambda c: c["config"]["model"].update(name=7), "model.name"),
        (lambda c: c["config"]["eval"].update(batch_size=10**9), "fits no machine"),
        (lambda c: c.pop("provenance"), "is damaged"),
        (lambda c: c["provenance"].update(step="x"), "is damaged"),
        (lambda c: c["provenance"].update(weights="all"), "is damaged"),
        (lambda c: c.pop("checksums"), "checksum"),
        (lambda c: c.update(checksums=[]), "checksum"),
        (lambda c: c.update(classes={"names": ["a"]}), "classes"),
        (lambda c: c.pop("classes"), "classes"),
        (lambda c: c["calibration"].update(level=3), "checksum"),
        (lambda c: c.update(calibration={"level": 0.9}), "was not written by this version"),
    ):
        path.write_text(whole)
        changed(path, change)
        with pytest.raises(InputError, match=said):
            ham_jax.load(copy)
    for text in (whole[:500], "", "[]"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"config\.json is damaged"):
            ham_jax.load(copy)
    path.unlink()
    with pytest.raises(InputError, match=r"but no config\.json"):
        ham_jax.load(copy)


def test_a_damaged_detector_is_left_out_with_a_line(copy, photographs, capsys):
    path = copy / hub.OOD
    path.write_bytes(path.read_bytes()[:-10])
    assert ham_jax.load(copy).predict(photographs[0])[0].ood_score is None
    assert "ood.safetensors is damaged" in capsys.readouterr().err
    found = model.detector.Detector(np.zeros((2, 9)), np.eye(9), 1.0, {})
    arrays = {name: np.array(getattr(found, name)) for name in hub.OOD_ARRAYS}
    with_tensors(copy, arrays, hub.OOD)
    assert ham_jax.load(copy).detector is None
    assert "of a network with other features" in capsys.readouterr().err


def runtime(monkeypatch, name, off):
    """Stands for a module that writes a file whose probabilities are off by so much."""

    def answer(path, images, codes):
        assert path.read_bytes() == b"graph"
        assert images.dtype == np.uint8
        assert codes is None
        said = export._answers(ham_jax.load(path.parent), export.Photographs(images, codes, ""))
        return {**said, "probabilities": said["probabilities"] + off}

    module = types.ModuleType(f"ham_jax.export.{name}")
    module.write = lambda model, path: path.write_bytes(b"graph")
    module.answer = answer
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_other_runtimes_are_verified_and_one_that_is_missing_is_named(
    trained, tmp_path, monkeypatch, capsys
):
    runtime(monkeypatch, "onnx", 1e-5)
    monkeypatch.setitem(sys.modules, "ham_jax.export.stablehlo", None)
    folder = exported_to(tmp_path / "out", [trained], files=("onnx", "stablehlo"))
    assert "| `model.onnx` | 1.0e-05 | 0.0e+00 | 0.0e+00 |" in (folder / hub.CARD).read_text()
    said = "model.stablehlo is left out: it needs ham_jax.export.stablehlo"
    assert said in capsys.readouterr().err
    assert not (folder / "model.stablehlo").exists()
    runtime(monkeypatch, "onnx", 0.5)
    with pytest.raises(InputError, match=r"model\.onnx differs from the network by 5\.0e-01"):
        exported_to(tmp_path / "off", [trained], files=("onnx",))
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing half-written is left"


def test_what_is_there_is_not_written_over(trained, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is there already") as refused:
        exported_to(tmp_path, [trained], files=("tflite",))
    assert len(refused.value.faults) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_model_of_the_hub(exported, tmp_path, monkeypatch, photographs):
    asked = []

    def snapshot(repository, revision, ignore_patterns):
        asked.append((repository, revision))
        if repository == "me/timm":
            (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
            return str(tmp_path)
        if repository == "me/gone":
            raise errors.LocalEntryNotFoundError("offline")
        return str(exported)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    loaded = ham_jax.load("hf:me/lesions@v1")
    assert asked == [("me/lesions", "v1")]
    same = ham_jax.load(exported)
    assert list(loaded.predict(photographs[:2])) == list(same.predict(photographs[:2]))
    with pytest.raises(InputError, match=r"hf:me/timm is no model.*model\.pretrained=hf:me/timm"):
        ham_jax.load("hf:me/timm")
    with pytest.raises(InputError, match="cannot be reached and it is not in the cache"):
        ham_jax.load("hf:me/gone")
    with pytest.raises(InputError, match="must be in the form"):
        hub.download("hf:not a name/at/all", "config.json")
    cached = {"hf:me/lesions": str(exported / "config.json")}
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda repository, file, revision: cached.get(f"hf:{repository}"),
    )
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repository, file, revision: exported / file
    )
    assert pretrained.find("hf:me/lesions", "resnet18").file == exported
    judged = predictions.read(exported / "predictions.csv")
    assert leakage._folder("hf:me/lesions") == exported
    assert leakage._folder("hf:timm/other") == Path("hf:timm/other")
    assert len(judged)


def test_the_command_line_writes_nothing_into_it(exported, tmp_path, monkeypatch):
    call = main.Call(
        config_file="",
        config=config.base(),
        workdirs=[exported],
        split="val",
        images="",
        output=None,
        predictions=[],
        overrides=[],
        host="127.0.0.1",
        port=8000,
    )
    with pytest.raises(InputError, match="is an exported model, into which nothing is written"):
        main._located(main.MODES["eval"], call)
    with pytest.raises(InputError, match="nothing is written: name another"):
        main._located(main.MODES["crossval"], call)
    assert main._located(main.MODES["predict"], call).output == Path("predict.csv")
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "ham_jax" / "hub.py"))
    assert hub.released() == []
    (tmp_path / "released").mkdir()
    shutil.copytree(exported, tmp_path / "released" / "tiny")
    assert hub.released() == [tmp_path / "released" / "tiny"]
    assert isinstance(model.load(hub.released()), ham_jax.Model)
