"""The report says what the metrics say, stands alone, and stays the same."""

import collections
import functools
import html.parser
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ham_jax import DISCLAIMER
from ham_jax.classes import HAM10000, Classes
from ham_jax.config import InputError
from ham_jax.data import image
from ham_jax.evaluation import (
    bootstrap,
    calibration,
    evaluate,
    figures,
    lesions,
    metrics,
    predictions,
    report,
    selective,
    subgroups,
)
from ham_jax.evaluation.predictions import Predictions
from ham_jax.inference import calibrator, decision

NUM = 210
COLUMNS = ",".join(HAM10000)
OLD_RUN = Path(__file__).parent / "old_run"
HOSTILE = "<script>alert(1)</script>|`x`"


def write_predictions(folder, classes=HAM10000, seed=0, **columns):
    """Returns a folder's new predictions.csv as it is read."""
    rng = np.random.default_rng(seed)
    c = len(classes)
    labels = np.arange(NUM) % c
    probabilities = rng.dirichlet(np.full(c, 0.5), NUM) * 0.5
    probabilities[np.arange(NUM), labels] += 0.5 * rng.random(NUM)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    image_ids = np.array([f"ISIC_{n:07d}" for n in range(NUM)], object)
    # The most confident wrong answer, so that its name is on the page.
    image_ids[0], probabilities[0] = HOSTILE, np.eye(c)[-1]
    lesion_ids = np.array([f"HAM_{n // (2 * c) * c + n % c}" for n in range(NUM)])
    known = pd.DataFrame({"sex": ["female", "male"] * (NUM // 2), **columns})
    path = folder / "predictions.csv"
    Predictions(classes, labels, probabilities, lesion_ids, image_ids, known).write(path)
    return predictions.read(path, classes)


def write_numbers(folder, judged, **about):
    numbers = metrics.compute(judged) | about
    (folder / "metrics.json").write_text(json.dumps(numbers))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A folder with every file that a report reads."""
    folder = tmp_path_factory.mktemp("full")
    scores = np.linspace(0.2, 1.4, NUM)
    judged = write_predictions(
        folder,
        ood_score=scores,
        age=np.arange(NUM) % 80,
        localization=[HOSTILE] * NUM,
        dx_type=["histo"] * NUM,
    )
    write_numbers(folder, judged, split="val", step=7, records="f00", classes=list(HAM10000))
    fitted_on = {"split": "val", "step": 7, "tta": 1, "crop_scale": 1.0, "weights": "raw"}
    calibration.fit(judged, fitted_on).write(folder)
    (folder / "config.json").write_text(
        json.dumps({"model": {"name": HOSTILE, "pretrained": None}, "seed": 3})
    )
    (folder / "audit.csv").write_text("dx,train_images\nakiec,257\n")
    (folder / "robustness.csv").write_text(
        "corruption,severity,balanced_accuracy,low,high,accuracy,macro_auc,n,split,tta\n"
        "none,0,0.8,0.7,0.9,0.8,0.9,210,val,1\nfog,1,0.6125,0.5,0.7,0.6,,210,val,1\n"
        "fog,2,0.4125,0.3,0.5,0.4,,210,val,1\n"
    )
    (folder / "explanations").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (900, 500, 3), np.uint8)
    image.save_jpeg(noise, folder / "explanations" / "uncertain.png", 90)
    shown = {"image_id": "a", "truth": "nv", "prediction": "mel", "probability": 0.5}
    manifest = {"split": "val", "step": 7, "panels": {"uncertain.png": [shown]}}
    (folder / "explanations" / "manifest.json").write_text(json.dumps(manifest))
    (folder / "explanations" / "on_lesion.csv").write_text(
        "image_id,lesion_id,truth,prediction,heat_on_lesion,lesion_area,split,step\n"
        "a,l,mel,mel,0.75,0.25,val,7\nb,m,nv,mel,0.375,0.25,val,7\nc,n,nv,mel,,0.5,val,7\n"
    )
    report.run(folder)
    return folder


@pytest.fixture
def bare(tmp_path):
    """A folder with nothing but predictions."""
    write_predictions(tmp_path)
    return tmp_path


@pytest.fixture
def few_draws(monkeypatch):
    """What does not look at intervals need not wait for them."""
    draw = functools.partial(bootstrap.intervals, num_draws=20)
    monkeypatch.setattr(bootstrap, "intervals", draw)
    monkeypatch.setattr(subgroups, "_NUM_DRAWS", 20)


class Page(html.parser.HTMLParser):
    """What is in a page: texts of table rows, ids, what it loads, and where it points."""

    OPEN = ("meta", "br", "img", "wbr")

    def __init__(self, text):
        super().__init__()
        self.rows, self.ids, self.loads, self.anchors, self.scripts = [], [], [], [], 0
        self.pictures_without_words = 0
        self._stack = []
        self.feed(text)
        self.close()
        assert self._stack == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag not in self.OPEN:
            self._stack.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.scripts += tag == "script"
        self.loads += [given[k] for k in ("src", "srcset", "data", "action") if k in given]
        self.loads += [given["href"]] if tag in ("link", "base", "image") else []
        self.loads += re.findall(r"url\(([^)]*)\)", given.get("style", ""))
        self.pictures_without_words += tag == "img" and not given.get("alt")
        self.pictures_without_words += tag == "svg" and not given.get("aria-label")
        if "href" in given:
            self.anchors.append(given["href"])
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.OPEN:
            self._stack.pop()

    def handle_endtag(self, tag):
        assert self._stack.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self._stack):
            self.rows[-1][-1] += data


def page_of(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def numbers_of(row):
    return [float(x) for cell in row for x in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", cell)]


def check_tables(card):
    for table in re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_the_page_says_what_the_metrics_say(full):
    judged = predictions.read(full / "predictions.csv")
    numbers = metrics.compute(judged)
    spans = bootstrap.intervals(judged)
    text = page_of(full)
    for key in (metric.name for metric in metrics.METRICS):
        low, high = spans[key]
        said = (
            rf'"value">{numbers[key]:.3f}</span>\s*<span class="span">[^<]*{low:.3f} to {high:.3f}'
        )
        assert re.search(said, text), key
    assert DISCLAIMER in text
    of_lesions = lesions.measure(judged)
    low, high = of_lesions["balanced_accuracy_interval"]
    said = (
        f'<b>{of_lesions["balanced_accuracy"]:.3f}</b> <span class="span">{low:.3f} to {high:.3f}'
    )
    assert said in text

    rows = Page(text).rows
    for k, dx in enumerate(HAM10000):
        figures, confused = [numbers_of(row) for row in rows if row and dx in row[0].split()][:2]
        of_class = numbers["per_class"][dx]
        expected = [
            of_class["num_images"],
            *(of_class["sensitivity"], *spans["per_class"][dx]["sensitivity"]),
            *(of_class[key] for key in ("specificity", "precision", "f1")),
            *(of_class["auc"], *spans["per_class"][dx]["auc"]),
            of_class["average_precision"],
        ]
        assert figures == pytest.approx(expected, abs=5.1e-4)
        assert confused[1::2] == numbers["confusion_matrix"][k]

    calibrated = calibration.cross_fit(judged, "temperature")
    measured = calibration.measure(judged, calibrated, True)
    isotonic = next(numbers_of(row) for row in rows if row and row[0] == "isotonic")
    assert isotonic == pytest.approx(list(measured["calibration"]["isotonic"].values()), abs=5.1e-4)
    flag = measured["decision"]["malignant"]
    said = next(numbers_of(row) for row in rows if row and row[0] == "specificity of the flag")
    assert said == pytest.approx([flag["specificity"], *flag["specificity_interval"]], abs=5.1e-4)
    fog = next(numbers_of(row) for row in rows if row and row[0] == "fog")
    assert fog == pytest.approx([0.6125, 0.5, 0.7, 0.4125, 0.3, 0.5, 0.5125], abs=5.1e-4)


def test_what_a_reader_sees_first_is_in_words_and_nothing_is_mixed(full):
    """Plain words, then what is measured before calibration, then after; shares as asked for."""
    judged = predictions.read(full / "predictions.csv")
    numbers, text = metrics.compute(judged), page_of(full)
    words, before, after = (
        text.index(f">{mark}") for mark in ("In plain words", "Before calib", "After calib")
    )
    assert words < before < after
    right = f"named the right one for {100 * numbers['accuracy']:.0f} of 100 photographs"
    assert words < text.index(right) < before
    measured = calibration.measure(judged, calibration.cross_fit(judged, "temperature"), True)
    loss = measured["calibration"]["temperature"]["log_loss"]
    assert f'"value">{loss:.3f}</span><span class="span">{numbers["log_loss"]:.3f} before' in text
    assert f"{measured['decision']['malignant']['auc']:.3f}</span>" in text[after:]
    assert "AUC, malignant or not" not in text[before:after]
    rows = [[cell.replace("\N{NO-BREAK SPACE}", " ") for cell in row] for row in Page(text).rows]
    asked = [row[0] for row in rows if len(row) == 5 and row[1].endswith(".0 %")]
    assert asked == ["100 %", "90 %", "80 %", "70 %", "60 %", "50 %"]
    own = calibrator.read(full, HAM10000).choice("temperature")
    for said in (text, (full / "model_card.md").read_text(encoding="utf-8")):
        assert html.escape(decision.sets_note(own, HAM10000)) in said
    shown = next(row for row in rows if row[1:2] == ["shown"])
    sets = measured["decision"]["sets"]["0.90"]["shown"]
    of_mel = 6 + HAM10000.index("mel")
    low, high = sets["coverage_per_class_interval"]["mel"]
    assert shown[of_mel] == f"{100 * sets['coverage_per_class']['mel']:.0f} %" + (
        f"{100 * low:.0f} to {100 * high:.0f}"
    )


def test_the_share_of_the_heat_on_the_lesion_is_told_where_masks_were_given(full, tmp_path):
    rows = Page(page_of(full)).rows
    mel, nv, mean = (
        numbers_of(next(row for row in rows if row and len(row) == 6 and row[0] == name)[1:5])
        for name in ("mel", "nv", "mean of the diagnoses")
    )
    assert mel == [1, 75, 25, 0.5]
    assert nv == [1, 37.5, 25, 0.125]
    assert mean == pytest.approx([2, 56.2, 25, 0.312], abs=0.06)
    assert "1 of 3 maps are empty" in page_of(full)
    assert "56\N{NO-BREAK SPACE}% lies on the lesion" in (full / "model_card.md").read_text()


def test_the_card_says_the_same(full):
    numbers = metrics.compute(predictions.read(full / "predictions.csv"))
    card = (full / "model_card.md").read_text(encoding="utf-8")
    assert f"| balanced accuracy | {numbers['balanced_accuracy']:.3f} |" in card
    sensitivity = numbers["per_class"]["mel"]["sensitivity"]
    assert f"| mel | {NUM // 7} | {sensitivity:.3f} |" in card
    assert all(word in card for word in (DISCLAIMER, "CC BY-NC 4.0", "Apache", "fog"))
    assert "<script" not in card
    of_lesions = lesions.measure(predictions.read(full / "predictions.csv"))
    assert f"({of_lesions['num_lesions']} lesions, {of_lesions['num_with_several']} of them" in card
    assert f"| accuracy | {of_lesions['accuracy']:.3f} | |" in card
    check_tables(card)


def test_the_test_split_has_a_section_of_its_own(full, tmp_path, few_draws):
    folder = tmp_path / "run"
    shutil.copytree(full, folder)
    (folder / "test").mkdir()
    judged = write_predictions(folder / "test", seed=1)
    numbers = evaluate.report(folder / "test", "test", {"step": 7}, judged, None)
    report.run(folder)
    told = report.read(folder).test
    card, page = ((folder / name).read_text("utf-8") for name in (report.CARD, report.FILE))
    section = card.split("## On the test split")[1].split("\n## ")[0]
    value, low, high = numbers["balanced_accuracy"], *numbers["intervals"]["balanced_accuracy"]
    assert f"| balanced accuracy | {value:.3f} | {low:.3f} to {high:.3f} |" in section
    one = numbers["by_lesion"]["balanced_accuracy"]
    assert f"| balanced accuracy, one answer a lesion | {one:.3f} |" in section
    recall = numbers["per_class"]["mel"]["sensitivity"]
    assert f"| mel | {NUM // 7} | {recall:.3f} |" in section
    assert f"balanced accuracy <b>{value:.3f}</b>" in page.split("On the test split")[1]
    shutil.move(folder / "test" / "metrics.json", folder / "test_metrics.json")
    assert report.read(folder).test == told, "so do exports call it"
    (folder / "test_metrics.json").write_text(json.dumps(numbers | {"step": 8}))
    with pytest.raises(InputError, match=r"test_metrics\.json is damaged: its split and step"):
        report.read(folder)


def test_the_page_stands_alone(full):
    text = page_of(full)
    page = Page(text)
    assert all(load.startswith(("data:image/png;base64,", "#")) for load in page.loads)
    assert all(anchor.startswith("#") for anchor in page.anchors)
    assert {anchor[1:] for anchor in page.anchors} <= set(page.ids)
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert len(page.ids) == len(set(page.ids))
    assert page.pictures_without_words == 0
    assert len(text) < 5_000_000


def test_a_hostile_name_is_a_name(full):
    page = Page(page_of(full))
    assert page.scripts == 1
    assert any(row and row[0] == HOSTILE for row in page.rows)


def test_a_hostile_folder_is_a_name(bare, tmp_path, few_draws):
    folder = tmp_path / os.fsdecode(b"a`<b>`\n# $x_1$\x1b\xff")
    folder.mkdir()
    shutil.copy(bare / "predictions.csv", folder)
    report.run(folder)
    shown = r"a`<b>`\n# $x_1$\x1b\xff"
    assert f"<h1>Report on {html.escape(shown)}</h1>" in page_of(folder)
    card = (folder / "model_card.md").read_text(encoding="utf-8")
    assert card.startswith(r"# Model card: a\`&lt;b&gt;\`\\n# \$x\_1\$\\x1b\\xff" + "\n\n")
    codes = re.findall(r"``([^\n]*)``", card)
    assert len(codes) == 2  # what makes the robustness, and the card itself
    assert all(shown in code for code in codes)
    assert "<b>" not in re.sub(r"``[^\n]*``", "", card)


def test_the_same_files_give_the_same_bytes(full, tmp_path):
    before = [(full / name).read_bytes() for name in ("report.html", "model_card.md")]
    report.run(full, tmp_path / "again.html")
    assert [(tmp_path / n).read_bytes() for n in ("again.html", "model_card.md")] == before


@pytest.mark.usefixtures("few_draws")
def test_other_predictions_give_another_page(full, tmp_path):
    folder = shutil.copytree(full, tmp_path / full.name)
    judged = write_predictions(folder, seed=1)
    with pytest.raises(InputError, match="different evaluations"):
        report.run(folder)
    write_numbers(folder, judged, split="val")
    report.run(folder)
    value = metrics.compute(judged)["balanced_accuracy"]
    assert f'"value">{value:.3f}<' in page_of(folder)


@pytest.mark.usefixtures("few_draws")
def test_without_the_other_files_it_says_what_makes_them(bare):
    report.run(bare)
    text = page_of(bare)
    for mode in ("eval", "robustness", "explain"):
        assert f"--mode={mode}" in text
    assert "Made by" in (bare / "model_card.md").read_text()


@pytest.mark.parametrize(
    "name",
    [
        *("metrics.json", "calibration.json", "config.json", "audit.csv", "robustness.csv"),
        "explanations",
    ],
)
@pytest.mark.usefixtures("few_draws")
def test_each_other_file_may_be_missing(full, tmp_path, name, monkeypatch):
    monkeypatch.setattr(report, "_figures", lambda *_: collections.defaultdict(str))
    folder = shutil.copytree(full, tmp_path / "run")
    (folder / name).unlink() if (folder / name).is_file() else shutil.rmtree(folder / name)
    facts = report.measure(report.read(folder))
    report.render(facts)


@pytest.mark.usefixtures("few_draws")
def test_on_test_the_calibration_of_validation_is_applied(full, tmp_path):
    folder = shutil.copytree(full, tmp_path / "run")
    judged = write_predictions(folder, seed=2)
    write_numbers(folder, judged, split="test")
    facts = report.measure(report.read(folder))
    fitted = calibrator.read(folder, HAM10000)
    calibrated = fitted.apply("temperature", judged.probabilities)
    assert facts["decision"] == selective.measure(judged, calibrated)
    assert facts["isic"]["overall"] == pytest.approx(facts["balanced_accuracy"])

    (folder / "calibration.json").unlink()
    without = report.measure(report.read(folder))
    assert without["calibration"] is None
    assert "--split=val" in without["missing"]["calibration"]


@pytest.mark.usefixtures("few_draws")
def test_folds_are_calibrated_by_themselves(tmp_path):
    judged = write_predictions(tmp_path)
    write_numbers(tmp_path, judged, split="crossval")
    of_lesion = np.unique(judged.lesion_ids, return_inverse=True)[1]
    parts, places = [], []
    for fold in range(2):
        rows = np.flatnonzero(of_lesion % 2 == fold)
        (tmp_path / f"fold{fold}").mkdir()
        judged.take(rows[::-1]).write(tmp_path / f"fold{fold}" / "predictions.csv")
        parts.append(calibration.cross_fit(judged.take(rows), "temperature"))
        places.append(rows)
    joined = decision.join(parts, np.concatenate(places))
    expected = calibration.measure(judged, joined, True)
    facts = report.measure(report.read(tmp_path))
    assert facts["calibration"]["temperature"] == pytest.approx(
        expected["calibration"]["temperature"]
    )


@pytest.mark.usefixtures("few_draws")
def test_an_ensembles_decisions_are_those_that_eval_measured(tmp_path):
    judged = write_predictions(tmp_path)
    calibrated = calibration.cross_fit(judged, "isotonic")
    measured = calibration.measure(judged, calibrated, True)
    members = [{"workdir": "runs/a", "step": 1}, {"workdir": "runs/b", "step": 2}]
    write_numbers(tmp_path, judged, split="val", members=members, **measured)
    report.run(tmp_path)
    text = page_of(tmp_path)
    size = measured["decision"]["sets"]["0.90"]["class_conditional"]["mean_size"]
    row = next(
        row for row in Page(text).rows if row[:2] == ["90\N{NO-BREAK SPACE}%", "class conditional"]
    )
    assert float(row[3]) == pytest.approx(size, abs=5.1e-3)
    assert "runs/a,runs/b" in text


@pytest.mark.usefixtures("few_draws")
def test_a_run_of_version_0_1_is_reported(tmp_path):
    """It measured sets for 95 %, and vector scaling, which was in use there."""
    folder = shutil.copytree(OLD_RUN, tmp_path / "run")
    numbers = json.loads((folder / "metrics.json").read_text())
    assert numbers["calibration"]["method"] == "vector"
    facts = report.measure(report.read(folder))
    assert facts["decision"] == numbers["decision"]
    assert list(facts["decision"]["sets"]) == ["0.90", "0.95"]
    page, card = report.render(facts)
    for text in (page, card):
        assert "As --mode=eval measured it." in text
    names = {row[0] for row in Page(page).rows if row}
    assert {"vector, in use", "isotonic", "95\N{NO-BREAK SPACE}%"} <= names

    numbers["calibration"]["method"] = "temperature"
    for split in ("val", "test"):
        (folder / "metrics.json").write_text(json.dumps({**numbers, "split": split}))
        facts = report.measure(report.read(folder))
        assert list(facts["decision"]["sets"]) == ["0.90"]
        for name in calibrator.METHODS:
            if split == "val":
                expected = numbers["calibration"][name]
                assert facts["calibration"][name] == pytest.approx(expected, rel=1e-12)
    old = json.loads((folder / "calibration.json").read_text())["methods"]["temperature"]
    expected = old["thresholds"]["malignant"]
    assert facts["decision"]["malignant"]["threshold"] == pytest.approx(expected, rel=1e-12)


OTHER = {
    "three": Classes(("rash", "wart", "<b>|`z"), (), ("a rash", "a wart", "<i>|x</i>")),
    "twelve": Classes(tuple(f"dx {k}" for k in range(12)), ("dx 3",)),
    "twenty": Classes(tuple(f"dx {k}" for k in range(20)), ("dx 3", "dx 19")),
}


@pytest.mark.parametrize("which", OTHER)
@pytest.mark.usefixtures("few_draws")
def test_any_classes_are_reported(which, tmp_path):
    classes = OTHER[which]
    judged = write_predictions(tmp_path, classes)
    told = {"classes": list(classes), **{k: classes.to_json()[k] for k in ("malignant", "titles")}}
    write_numbers(tmp_path, judged, split="test", **told)
    fitted_on = {"num_images": NUM, "num_lesions": 105}
    calibration.fit(judged, fitted_on).write(tmp_path)
    report.run(tmp_path)
    text, card = page_of(tmp_path), (tmp_path / "model_card.md").read_text()
    page, numbers = Page(text), metrics.compute(judged)
    rows = [row for row in page.rows if row]
    for dx in classes:
        row = next(row for row in rows if row[0] == f"{dx} {classes.title(dx)}")
        assert f"{numbers['per_class'][dx]['sensitivity']:.3f}" in row[2]
    # Each diagnosis has a colour on light and on dark pages, and lines have no other.
    for k in range(len(classes)):
        assert text.count(f"--dx{k}: ") == 2
    assert set(re.findall(r"var\(--dx(\d+)\)", text)) == {str(k) for k in range(len(classes))}
    assert ("Malignant or not" in text) == bool(classes.malignant)
    assert ("dashed: benign" in text) == bool(classes.malignant)
    assert ("too many for a legend" in text) == (len(classes) > figures.MAX_LEGEND)
    assert f"It knows {len(classes)} diagnoses" in text
    for said in (text, card):
        assert not re.search("HAM10000|Austria|ISIC 2018|histology", said)
    assert page.scripts == 1
    assert "<b>|" not in text
    check_tables(card)


@pytest.mark.usefixtures("few_draws")
def test_classes_are_those_of_the_columns_where_no_file_names_them(tmp_path):
    write_predictions(tmp_path, OTHER["three"])
    report.run(tmp_path)
    facts = report.measure(report.read(tmp_path))
    assert facts["classes"] == Classes(OTHER["three"].names)


@pytest.mark.usefixtures("few_draws")
def test_a_new_metric_is_one_entry(bare, monkeypatch):
    """In metrics.json, with its interval, on the page and on the card."""

    def misses(labels, probabilities):
        return (probabilities.argmax(axis=1) != labels)[None]

    dummy = metrics.Metric("error_rate", "error rate", parts=misses)
    before = metrics.compute(predictions.read(bare / "predictions.csv"))
    monkeypatch.setattr(metrics, "METRICS", (*metrics.METRICS, dummy))
    judged = predictions.read(bare / "predictions.csv")
    numbers = metrics.compute(judged)
    assert numbers.pop("error_rate") == pytest.approx(1 - before["accuracy"], rel=1e-12)
    assert numbers == before
    spans = bootstrap.intervals(judged)
    expected = [1 - bound for bound in reversed(spans["accuracy"])]
    assert spans["error_rate"] == pytest.approx(expected, rel=1e-12)
    report.run(bare)
    card = (bare / "model_card.md").read_text()
    assert f"| error rate | {1 - before['accuracy']:.3f} | {expected[0]:.3f} to" in card
    assert '"name">Error rate</span>' in page_of(bare)


@pytest.mark.parametrize(
    ("name", "content", "answer"),
    [
        ("predictions.csv", "image_id,truth\n", "it lacks"),
        (
            "predictions.csv",
            f"image_id,lesion_id,truth,{COLUMNS}\n",
            "a header only",
        ),
        (
            "predictions.csv",
            f"image_id,lesion_id,truth,{COLUMNS}\na,b,nv,0.1,0,0,0,0,1,0\n",
            "sum to 1",
        ),
        (
            "predictions.csv",
            f"image_id,lesion_id,truth,{COLUMNS}\n" + "a,b,nv,0,0,0,0,0,1,0\n" * 2,
            "line 3: a is in line 2 already",
        ),
        ("metrics.json", "{", "metrics.json is damaged"),
        ("metrics.json", '{"num_images": 3}', "different evaluations"),
        ("config.json", "[]", "config.json is damaged"),
        ("calibration.json", "{}", "was not written by this version"),
        ("robustness.csv", "corruption\nfog\n", "robustness.csv is damaged"),
        ("robustness.csv", "", "robustness.csv is damaged"),
        ("explanations/manifest.json", '{"split": 1}', "manifest.json is damaged"),
    ],
)
def test_damaged_files_are_named(bare, name, content, answer):
    (bare / "explanations").mkdir()
    (bare / name).write_text(content)
    with pytest.raises(InputError, match=answer):
        report.run(bare)
    assert not (bare / "report.html").exists()


def test_missing_predictions_and_nowhere_to_write_are_answered(bare, tmp_path):
    with pytest.raises(InputError, match=r"predictions\.csv is missing"):
        report.run(tmp_path / "nowhere")
    with pytest.raises(InputError, match="there is no folder"):
        report.run(bare, tmp_path / "nowhere" / "report.html")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.json", b"[1]"),
        ("metrics.json", b'{"a":' * 100_000),
        ("metrics.json", b'{"split": ["val"]}'),
        ("metrics.json", b'{"log_loss": "0.5"}'),
        ("metrics.json", b'{"members": {"workdir": "a"}}'),
        ("metrics.json", b'{"folds": [1]}'),
        ("metrics.json", b'{"decision": []}'),
        ("metrics.json", b'{"classes": 7}'),
        ("metrics.json", b'{"classes": ["mel", "Mel"]}'),
        ("metrics.json", b'{"classes": ["mel", "nv"], "malignant": ["bcc"]}'),
        ("metrics.json", b'{"classes": ["mel", "nv"], "malignant": [], "titles": ["a"]}'),
        ("config.json", b"[" * 100_000),
        ("explanations/manifest.json", b'{"a": "\\ud800"}'),
        ("explanations/on_lesion.csv", b"image_id\na\n"),
        (
            "explanations/on_lesion.csv",
            b"image_id,lesion_id,truth,prediction,heat_on_lesion,lesion_area,split,step\n"
            b"a,l,wart,mel,0.7,0.2,val,7\n",
        ),
        ("explanations/manifest.json", b'{"split": "val", "step": 7, "panels": [1]}'),
        ("explanations/manifest.json", b'{"split": "val", "step": 7, "panels": {"a.png": 1}}'),
        ("robustness.csv", b"corruption\nnone\n"),
        ("robustness.csv", b"\xff\xfe\0"),
        ("audit.csv", b"dx,train_images\nakiec\n"),
        ("audit.csv", b"dx,train_images\nakiec,1,2\n"),
        ("audit.csv", b'"' + b"a" * 200_000),
    ],
)
def test_a_file_of_another_shape_is_named(name, content, full, tmp_path):
    folder = shutil.copytree(full, tmp_path / "run")
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} (is damaged|holds)"):
        report.read(folder)
