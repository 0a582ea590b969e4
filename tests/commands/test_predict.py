"""Photographs in, answers out: the same pixels as in training, and no bad file ends it."""

import csv
import json
import os
import shutil
import unicodedata

import jax
import numpy as np
import pandas as pd
import pytest
from rich.cells import cell_len

import ham_jax
from ham_jax import DISCLAIMER, escape, parallel
from ham_jax.classes import HAM10000
from ham_jax.commands import predict
from ham_jax.config import InputError
from ham_jax.data import image as image_files
from ham_jax.data import photographs, records
from ham_jax.evaluation import calibration, evaluate, predictions
from ham_jax.inference import calibrator, decision
from ham_jax.inference.decision import Calibrated
from ham_jax.model import Answers


@pytest.fixture(scope="module")
def trained(tiny_run, small_resnet18):
    return tiny_run()


@pytest.fixture(scope="module")
def trained_with_metadata(tiny_run, small_resnet18):
    return tiny_run(**{"model.metadata": "true"})


def answers(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("method", calibrator.METHODS)
def test_a_file_gets_the_answer_of_its_record(trained, tiny_raw, tmp_path, method):
    """Decoded from the file, or read from the record: the same bits, whatever the method.

    The CSV rounds to 1e-6, and is made in batches of another size, which differ by about as much.
    """
    judged = predictions.read(trained / "predictions.csv")
    ids, raw = judged.image_ids, judged.probabilities
    decided = calibrator.read(trained, HAM10000).apply(method, raw)
    listed = tmp_path / "list.csv"
    files = {p.stem: p for p in tiny_raw.rglob("*.jpg")}
    listed.write_text("path\n" + "\n".join(str(files[i]) for i in ids))
    output = tmp_path / "answers.csv"
    choice = [("eval.calibration", method)]
    assert predict.run([trained], str(listed), output, choice, parallel.mesh()) == len(ids)
    rows = answers(output)
    probabilities = np.array([[float(row[dx]) for dx in HAM10000] for row in rows])
    model = ham_jax.load(trained, overrides=choice)
    inside = model.predict([files[i] for i in ids], exact=True).probabilities
    np.testing.assert_array_equal(inside, decided.probabilities)
    np.testing.assert_allclose(probabilities, inside, rtol=0, atol=3e-6)
    assert all(len(row[dx]) == len("0.123456") for row in rows for dx in HAM10000)
    assert (inside == raw).all() == (method == "none")
    assert [row["prediction"] for row in rows] == [HAM10000.names[k] for k in inside.argmax(1)]

    score = inside[:, 0] + inside[:, 1] + inside[:, 4]  # akiec, bcc, mel
    assert [float(row["malignant"]) for row in rows] == pytest.approx(score, abs=3e-6)
    # Thresholds lie on probabilities of these very photographs: those may fall on either side.
    apart = np.abs(score - decided.thresholds["malignant"]) > 1e-5
    flags = np.array([row["malignant_flag"] == "yes" for row in rows])
    assert (flags == (score >= decided.thresholds["malignant"]))[apart].all()
    apart = (np.abs(inside - decided.thresholds["shown"]) > 1e-5).all(1)
    assert apart.mean() > 0.7
    for row, members in zip(np.array(rows)[apart], decided.sets("shown")[apart], strict=True):
        named = [] if row["prediction_set"] == "empty" else row["prediction_set"].split(" ")
        assert named == [dx for dx, member in zip(HAM10000, members, strict=True) if member]
    assert list(rows[0])[-2:] == ["error", "note"]
    note = f"{DISCLAIMER} {decision.sets_note(decided.choice, HAM10000)}"
    assert [row["note"] for row in rows] == [note, *[""] * (len(rows) - 1)]
    assert pd.read_csv(output)["mel"].tolist() == probabilities[:, 4].tolist()


def test_what_eval_says_of_validation_follows_from_its_predictions(trained):
    judged = predictions.read(trained / "predictions.csv")
    decided = calibration.decide(judged, "val", "temperature")
    found = calibration.measure(judged, decided, True)
    written = json.loads((trained / "metrics.json").read_text())
    assert {key: written[key] for key in found} == found
    raw_error = written["calibration"]["none"]["expected_calibration_error"]
    assert raw_error == written["expected_calibration_error"]
    fitted_on = calibrator.read(trained, HAM10000).fitted_on
    names = ("step", "tta", "tiles", "crop_scale", "weights", "records")
    about = {name: written[name] for name in names}
    counts = {"num_images": len(judged), "num_lesions": judged.num_lesions}
    assert fitted_on == {"split": "val", **about, **counts}


def test_a_picture_that_is_no_lesion_is_marked(trained, tiny_raw, tmp_path, capsys):
    ids = predictions.read(trained / "predictions.csv").image_ids
    lesions = [p for p in sorted(tiny_raw.rglob("*.jpg")) if p.stem in ids]
    noise = np.random.default_rng(0).integers(0, 256, (4, 24, 32, 3), np.uint8)
    blank = np.stack([np.full((24, 32, 3), color) for color in (0, 255, (0, 0, 255))])
    foreign = []
    for number, pixels in enumerate([*noise, *blank.astype(np.uint8)]):
        foreign.append(tmp_path / f"foreign{number}.jpg")
        image_files.save_jpeg(pixels, foreign[-1], 95)
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(map(str, foreign + lesions)))
    output = tmp_path / "answers.csv"

    predict.run([trained], str(tmp_path / "list.csv"), output, [], parallel.mesh())
    rows = answers(output)
    scores = np.array([float(row["ood_score"]) for row in rows])
    assert [row["ood"] == "yes" for row in rows] == (scores > 1).tolist()
    assert (scores[: len(foreign)] > 1).all()
    # Fitted by the training run: the threshold is that of these lesions.
    assert 0 < (scores[len(foreign) :] > 1).sum() <= 0.05 * len(lesions)
    shown = capsys.readouterr()
    said = f"{(scores > 1).sum()} of {len(rows)} photographs are unlike those of training"
    assert said in shown.err
    told = [line for line in shown.out.splitlines() if ".jpg" in line]
    assert [line.startswith("! ") for line in told] == (scores[:10] > 1).tolist()
    assert not any(HAM10000.title(dx) in line for line in told[:7] for dx in HAM10000)

    with (trained / "predictions.csv").open(newline="") as file:
        evaluated = {row["image_id"]: float(row["ood_score"]) for row in csv.DictReader(file)}
    np.testing.assert_allclose(
        scores[len(foreign) :], [evaluated[p.stem] for p in lesions], rtol=1e-5
    )


def test_without_its_model_nothing_is_marked_until_validation_makes_it_anew(
    trained, tiny_raw, tmp_path, capsys
):
    workdir, output = tmp_path / "run", tmp_path / "answers.csv"
    shutil.copytree(trained, workdir)
    (workdir / "ood.npz").unlink()
    image = str(next(tiny_raw.rglob("*.jpg")))

    def marks(*overrides):
        predict.run([workdir], image, output, list(overrides), parallel.mesh())
        (row,) = answers(output)
        said = [line for line in capsys.readouterr().err.splitlines() if "not marked" in line]
        return row["ood_score"], row["ood"], said

    evaluate.run([workdir], "train", [], parallel.mesh())
    assert not (workdir / "ood.npz").exists()
    assert "ood_score" not in (workdir / "predictions.csv").read_text()
    capsys.readouterr()
    score, mark, said = marks()
    assert (score, mark, len(said)) == ("", "", 1)
    assert marks(("eval.ood", "False")) == ("", "", [])
    evaluate.run([workdir], "val", [], parallel.mesh())
    written = [folder / "predictions.csv" for folder in (workdir, trained)]
    assert written[0].read_bytes() == written[1].read_bytes()
    score, mark, said = marks()
    assert float(score) > 0
    assert (mark, said) == ("yes" if float(score) > 1 else "no", [])
    score, mark, said = marks(("eval.crop_scale", "0.9"))
    assert (score, mark, len(said)) == ("", "", 1)
    assert "another crop_scale" in said[0]


def test_broken_files_get_a_row_and_the_rest_go_on(trained, tiny_raw, tmp_path, capsys):
    folder = tmp_path / "photographs"
    folder.mkdir()
    good = next(tiny_raw.rglob("*.jpg"))
    shutil.copy(good, folder / "b.jpg")
    (folder / "a.jpg").write_bytes(good.read_bytes()[:500])
    (folder / "c.png").touch()
    (folder / "notes.txt").write_text("not an image")
    output = tmp_path / "answers.csv"
    assert predict.run([trained], str(folder), output, [], parallel.mesh()) == 1
    rows = answers(output)
    assert [row["path"].rsplit("/")[-1] for row in rows] == ["a.jpg", "b.jpg", "c.png"]
    assert [bool(row["error"]) for row in rows] == [True, False, True]
    assert DISCLAIMER in " ".join(capsys.readouterr().out.split())
    assert predict.run([trained], str(folder / "a.jpg"), output, [], parallel.mesh()) == 0


def test_metadata_count_where_the_network_takes_them_and_only_there(
    trained, trained_with_metadata, tiny_raw, tiny_records, tmp_path, capsys
):
    judged = predictions.read(trained_with_metadata / "predictions.csv")
    ids, evaluated = judged.image_ids, judged.probabilities
    files = {p.stem: p for p in tiny_raw.rglob("*.jpg")}
    about = records.open_records(tiny_records).table.set_index("image_id").loc[ids]
    about = about[["age", "sex", "localization"]].assign(path=[files[i] for i in ids])

    def probabilities(workdir, table):
        table.to_csv(tmp_path / "list.csv", index=False)
        output = tmp_path / "answers.csv"
        raw = [("eval.calibration", "none")]
        predict.run([workdir], str(tmp_path / "list.csv"), output, raw, parallel.mesh())
        return np.array([[float(row[dx]) for dx in HAM10000] for row in answers(output)])

    rounded = evaluated.round(6)
    np.testing.assert_allclose(probabilities(trained_with_metadata, about), rounded, atol=3e-6)
    assert "come without" not in capsys.readouterr().err
    named = about.rename(columns={"age": " Age", "sex": "SEX", "path": "Path"})
    np.testing.assert_allclose(probabilities(trained_with_metadata, named), rounded, atol=3e-6)
    probabilities(trained_with_metadata, about.rename(columns={"age": "years"}))
    assert "no column for age" in capsys.readouterr().err
    older = about.assign(age=about["age"] + 30)
    known = about["age"].notna().to_numpy()
    moved = np.abs(probabilities(trained_with_metadata, older) - rounded).max(1)
    assert (moved[known] > 3e-6).all()
    assert (moved[~known] < 3e-6).all()
    without = probabilities(trained_with_metadata, about[["path"]])
    assert (np.abs(without - rounded).max(1) > 3e-6).all()
    assert f"which {len(ids)} of {len(ids)} photographs come without" in capsys.readouterr().err
    nothing = about.assign(age="", sex="unknown", localization="left knee")
    np.testing.assert_array_equal(probabilities(trained_with_metadata, nothing), without)
    assert "'left knee'" in capsys.readouterr().err

    np.testing.assert_array_equal(
        probabilities(trained, about), probabilities(trained, about[["path"]])
    )
    asked = ham_jax.load(trained_with_metadata, overrides=[("eval.calibration", "none")])
    paths = about["path"].tolist()
    inside = asked.predict(paths, about[["age", "sex", "localization"]], exact=True)
    np.testing.assert_array_equal(inside.probabilities, evaluated)
    one, same = asked.predict(paths[:2], {"age": 50, "sex": "male"}, exact=True)
    apart = asked.predict(paths[:2], [{"age": 50, "sex": "male"}] * 2, exact=True)
    assert [one, same] == list(apart)
    assert one.probabilities != dict(zip(HAM10000, evaluated[0].tolist(), strict=True))
    with pytest.raises(InputError, match="metadata of 1 for 2 photographs"):
        asked.predict(paths[:2], [{"age": 50}])
    evaluate.run([trained_with_metadata], "val", [], parallel.mesh(), tmp_path)
    again = predictions.read(tmp_path / "predictions.csv")
    np.testing.assert_array_equal(again.probabilities, evaluated)


def test_every_name_and_every_file_left_out_is_in_the_answers(trained, tiny_raw, tmp_path, capsys):
    """A folder with every kind of name: one row each, and nothing that runs anywhere."""
    folder = tmp_path / "[red]\x1b[31m"
    folder.mkdir()
    good = next(tiny_raw.rglob("*.jpg"))
    undecodable = os.fsdecode(b"\xff")
    hostile = ["=cmd()", "$x_1$ {a} [red] :smile:", "a\nb\x1b[2J", "\u202egpj", undecodable]
    for name in hostile:
        shutil.copy(good, folder / f"{name}.jpg")
    (folder / "gone.jpg").symlink_to("nowhere")
    for name in ("film.mov", "\x1b].p\x07", "notes.txt"):
        (folder / name).touch()
    output = tmp_path / "answers.csv"
    assert predict.run([trained], str(folder), output, [], parallel.mesh()) == len(hostile)
    said = "".join(capsys.readouterr())
    rows = answers(output)
    names = [row["path"].removeprefix(escape.shown(folder) + "/") for row in rows]
    shown = sorted([*(f"{name}.jpg" for name in hostile), "gone.jpg"])
    assert names == [*map(escape.shown, shown), r"\x1b].p\x07", "film.mov"]
    errors = dict(zip(names, (row["error"] for row in rows), strict=True))
    assert errors["gone.jpg"] == "a link that leads nowhere"
    assert errors["film.mov"] == "not looked at: not a photograph by its name (.mov)"
    assert [row["prediction"] for row in rows].count("") == 3
    for text in (output.read_text(), said):
        assert not any(unicodedata.category(c) in ("Cc", "Cf") for c in text.replace("\n", ""))
    words = " ".join(said.split())
    assert r"5 of 6 photographs read; not looked at: 1 .mov, 1 .p\x07, 1 .txt." in words

    shutil.copy(good, tmp_path / "=a.jpg")
    (tmp_path / "list.csv").write_text(f"path\n=a.jpg\nhttp://x/a.jpg\n{'n' * 300}\n")
    assert predict.run([trained], str(tmp_path / "list.csv"), output, [], parallel.mesh()) == 1
    assert ["URL" in row["error"] for row in answers(output)] == [False, True, False]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        predict.run([trained], "=a.jpg", output, [], parallel.mesh())
    assert output.read_text().split("\n")[1].startswith("'=a.jpg,")


def test_ten_photographs_are_twelve_lines_in_words_within_80_columns(capsys, tmp_path):
    """Of answers by hand: surest first in each set, foreign pictures without a diagnosis."""
    p = np.full((10, 7), 0.05)
    p[:, 4] = 0.7  # mel
    p[0] = (0.40, 0.22, 0.21, 0, 0, 0.17, 0)
    errors, scores = {3: "not an image " * 20}, np.full(10, 0.5)
    scores[2] = 1.5
    read = np.delete(p, 3, 0)
    thresholds = {"malignant": np.full(9, 0.65), "shown": np.full((9, 7), 0.18)}
    choice = {"kind": "marginal", "mean_size": 4.8, "useful": False}
    decided = Calibrated(HAM10000, "none", {"none": read}, thresholds, choice)
    answers = Answers(HAM10000, p, decided, scores, errors)
    names = [*(f"ISIC_{n:07d}.jpg" for n in range(8)), "日本" * 20 + ".jpg", "x" * 50 + "_left.jpg"]
    paths = [f"/data/photographs/{n % 2}/{name}" for n, name in enumerate(names)]
    predict._print(photographs.Photographs(paths, {}, []), answers, tmp_path / "a.csv")
    lines = capsys.readouterr().out.splitlines()
    assert "too wide to help: on validation they named 4.8 of 7" in " ".join(lines[12:])
    assert lines[0] == f"9 of 10 photographs read. {DISCLAIMER}"
    assert max(cell_len(line) for line in lines[:14]) <= 80
    assert lines[1].split("  ")[1].strip() == "photograph"
    assert lines[2].endswith("no          basal ...inoma, +1")
    assert lines[2].startswith("  0/ISIC_0000000.jpg   actinic keratosis 0.40     no")
    assert lines[3].split()[1:] == ["melanoma", "0.70", "yes"]
    assert lines[4].startswith("! 0/ISIC_0000002.jpg   unlike")
    assert "unreadable: not an image" in lines[5]
    assert lines[11].startswith("  1/xxxxxx...left.jpg  melanoma")
    assert not any("/data" in line for line in lines[:12])


def test_an_output_in_a_missing_folder_is_refused_before_work(trained, tiny_raw, tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        predict.run([trained], str(tiny_raw), tmp_path / "no" / "a.csv", [], parallel.mesh())


def test_more_photographs_than_a_batch(trained, tiny_raw, tmp_path):
    """The order of rows survives full batches with a broken file among them."""
    listed = sorted(tiny_raw.rglob("*.jpg"))[:19]
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    names = [*listed[:5], broken, *listed[5:]]
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(map(str, names)))
    few = [("eval.batch_size", "8")]
    output = tmp_path / "a.csv"
    predict.run([trained], str(tmp_path / "list.csv"), output, few, parallel.mesh())
    rows = answers(output)
    assert [row["path"] for row in rows] == [str(name) for name in names]
    assert [bool(row["error"]) for row in rows] == [name is broken for name in names]
    assert jax.device_count() == 8
