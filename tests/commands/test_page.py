"""The page in a browser: what a person sees, with a mouse, with a keyboard, on a phone."""

import contextlib
import csv
import dataclasses
import io
import re
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pillow_heif
import pytest
from PIL import Image

from ham_jax import config, escape, models
from ham_jax.classes import HAM10000
from ham_jax.commands import serve, service
from ham_jax.data import synthetic
from ham_jax.data.metadata import NUM_METADATA
from ham_jax.evaluation import ood
from ham_jax.inference import calibrator
from ham_jax.model import Ensemble, Model

CHROMIUM = Path("/usr/bin/chromium")
if not CHROMIUM.exists():
    pytest.skip(
        "there is no /usr/bin/chromium (Debian: apt install chromium)", allow_module_level=True
    )
playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
expect = playwright.expect
expect.set_options(timeout=30_000)  # for machines that do much else


CARD = f"""# Card of a network

<script>alert(1)</script> [a paper](https://example.org/paper)

|{" a column |" * 20}
|{" --- |" * 20}
|{" 0.123 |" * 20}
"""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of twenty drawn lesions and two other files; and one of files that are special."""
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(20):
        dx = HAM10000.names[number % len(HAM10000)]
        pixels = synthetic.draw(dx, [0, number], [1, number])
        Image.fromarray(pixels).save(folder / f"lesion{number:02d}.png")
    (folder / "notes.txt").write_text("no photograph")
    (folder / ".lesion.png").write_bytes(b"hidden")
    beside = tmp_path_factory.mktemp("beside")
    stripes = np.zeros((120, 160, 3), np.uint8)
    stripes[:, ::8] = 0, 255, 0
    Image.fromarray(stripes).save(beside / "foreign.png")
    (beside / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(beside / "phone.heic")
    return folder, beside


@pytest.fixture(scope="module")
def model(two_blocks, photographs, tmp_path_factory):
    """A network with random weights, that takes metadata, with calibration and detector."""
    c = config.base()
    c.data.canvas = (24, 32)
    c.model.update({"stem": "small", "metadata": True})
    c.augment.crop_px = 16
    c.eval.tta = 1
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    network = models.build(c.model, len(HAM10000), NUM_METADATA)
    params, stats = network.init(0)
    state = {"params": params, "batch_stats": stats, "ema": {}}
    workdir = tmp_path_factory.mktemp("run")
    (workdir / "model_card.md").write_text(CARD)
    made = Model.of(workdir, c, HAM10000, mesh).with_weights(state, 1)
    features = made.features(made.decode(sorted(map(str, photographs[0].glob("l*.png")))))
    detector = ood.fit(features, np.arange(20) % 7, features, {})
    detector = dataclasses.replace(
        detector, threshold=2 * detector.threshold
    )  # no lesion is beyond
    thresholds = {"malignant": 0.2, "marginal": 0.1, "class_conditional": [0.1] * 7}
    # Random weights give all photographs nearly the same answer, but for a low temperature.
    method = {"parameters": {"temperature": 0.2}, "thresholds": thresholds}
    calibrated = calibrator.Calibrator(HAM10000, {"temperature": method})
    c.eval.calibration = "temperature"
    return made.replace(calibrator=calibrated, detector=detector)


@pytest.fixture(scope="module")
def address(model):
    """Of a server with the model."""
    import uvicorn

    about = service.Service(Ensemble((model,)))
    about.warm_up()
    settings = uvicorn.Config(
        serve.app(about, "127.0.0.1"), port=0, lifespan="off", ws="none", log_level="warning"
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()
    about.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as programs:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = programs.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page, and fails where it reports an error or asks anybody but its server."""
    wrong = []
    with contextlib.ExitStack() as stack:

        def open_page(**settings):
            context = stack.enter_context(browser.new_context(**settings))
            page = context.new_page()
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("console", lambda line: wrong.append(line.text) if line.type != "log" else None)
            page.on("request", lambda asked: note(asked.url))
            page.goto(address)
            return page

        def note(url):
            if not url.startswith((address, "blob:", "data:")):
                wrong.append(url)

        open_page.allowed = ()
        yield open_page
    assert [line for line in wrong if not line.startswith(tuple(open_page.allowed))] == []


def add(page, *paths):
    """Chooses files, and waits for their answers."""
    page.locator("#files").set_input_files(list(paths))
    settle(page)


def settle(page):
    expect(page.locator(".card").first).to_be_attached()
    expect(page.locator("[aria-busy]")).to_have_count(0)


def card(page, name):
    return page.get_by_role("article", name=name, exact=True)


def percent(probability):
    if probability < 0.005:
        return "<\xa01\xa0%"
    return ">\xa099\xa0%" if probability >= 0.995 else f"{100 * probability:.0f}\xa0%"


def test_a_photograph_gets_its_answer_in_words_and_a_heat_map(visit, model, photographs):
    page = visit()
    flags = set()
    for path in sorted(photographs[0].glob("l*.png"))[:3]:
        add(page, path)
        answer = model.predict([path])[0]
        of_it = card(page, path.name)
        title = HAM10000.title(answer.prediction)
        share = percent(answer.probabilities[answer.prediction])
        expect(of_it.locator(".diagnosis")).to_have_text(
            f"{title[0].upper()}{title[1:]}{share}", use_inner_text=False
        )
        said = "Flagged as possibly" if answer.flagged else "Not flagged as"
        flags.add(answer.flagged)
        expect(of_it.locator(".flag")).to_contain_text(
            f"{said} malignant. Together, the malignant diagnoses have a probability of"
            f" {percent(answer.malignancy)}"
        )
        for name, probability in answer.probabilities.items():
            if probability >= 0.005:
                row = of_it.get_by_role("listitem").filter(has_text=HAM10000.title(name))
                expect(row).to_contain_text(percent(probability))
                assert (row.filter(has_text="(malignant)").count() == 1) == (
                    name in HAM10000.malignant
                )
        held = sorted(answer.prediction_set, key=lambda name: -answer.probabilities[name])
        shown = of_it.locator(".set").inner_text().replace(" (malignant)", "")
        assert shown == "Set for 90\xa0%: " + ", ".join(map(HAM10000.title, held))
    assert flags == {False, True}
    image = of_it.locator("img")
    photograph = image.get_attribute("src")
    of_it.get_by_role("button", name="Heat map").click()
    expect(image).to_have_attribute("alt", re.compile(f"^Heat map over .* spoke for {title}$"))
    first = image.get_attribute("src")
    assert first.startswith("data:image/png;base64,")
    of_it.get_by_label("Places that spoke for").select_option("melanoma")
    expect(image).to_have_attribute("alt", re.compile("spoke for melanoma$"))
    assert image.get_attribute("src") != first
    of_it.get_by_role("button", name="Heat map").click()
    expect(image).to_have_attribute("src", photograph)


def test_of_a_foreign_picture_the_diagnosis_is_withdrawn(visit, model, photographs):
    page = visit()
    path = photographs[1] / "foreign.png"
    assert model.predict([path])[0].unlike
    add(page, path)
    of_it = card(page, path.name)
    expect(of_it.locator(".text")).to_have_text(
        re.compile("^Unlike the photographs of training.*Do not rely on.*nevertheless$", re.S),
        use_inner_text=True,
    )
    expect(of_it.locator(".diagnosis")).to_be_hidden()
    expect(of_it.get_by_role("list")).to_be_hidden()
    expect(page.get_by_role("status").first).to_contain_text("1 unlike the photographs of training")
    of_it.get_by_text("Show the answer nevertheless").click()
    expect(of_it.locator(".diagnosis")).to_be_visible()


def test_files_that_cannot_be_read_or_shown_are_told(visit, photographs):
    page = visit()
    add(page, photographs[1] / "broken.jpg", photographs[1] / "phone.heic")
    expect(card(page, "broken.jpg")).to_contain_text(re.compile("No answer. Damaged or unreadable"))
    expect(card(page, "phone.heic")).to_contain_text("This browser cannot show the file.")
    expect(card(page, "phone.heic").locator(".diagnosis, .withdrawn").first).to_be_attached()
    expect(page.get_by_role("status").first).to_contain_text("1 of 2 photographs answered.")


def test_a_folder_of_twenty_is_dropped_and_its_answers_are_kept(visit, photographs, tmp_path):
    """As CSV like that of --mode=predict, and as a page that asks nobody and runs nothing."""
    page = visit()
    posts = []
    page.on("request", lambda asked: posts.append(asked.url) if asked.method == "POST" else None)
    drop(page, photographs[0])
    expect(page.locator(".card")).to_have_count(20)
    settle(page)
    expect(page.get_by_role("status").first).to_have_text(
        re.compile("^20 of 20 photographs answered.* 2 left out")
    )
    assert len(posts) == 3  # of eight at the most
    evil = "=1+1 <img src=x onerror=alert(1)>.png"
    page.locator("#files").set_input_files(
        {
            "name": evil,
            "mimeType": "image/png",
            "buffer": (photographs[0] / "lesion00.png").read_bytes(),
        }
    )
    expect(page.locator(".card")).to_have_count(21)
    settle(page)
    rows = list(csv.DictReader(io.StringIO(saved(page, "CSV").decode("utf-8-sig"))))
    assert [row["path"] for row in rows[:2]] == [
        f"{photographs[0].name}/lesion{n:02d}.png" for n in (0, 1)
    ]
    assert rows[-1]["path"] == f"'{evil}"
    assert [*rows[0]] == [
        *("path", "prediction", *HAM10000, "malignant", "malignant_flag", "prediction_set"),
        *("ood_score", "ood", "age", "sex", "localization", "error", "note"),
    ]
    assert [bool(row["note"]) for row in rows] == [True] + [False] * 20
    assert sum(float(rows[0][dx]) for dx in HAM10000) == pytest.approx(1, abs=1e-5)
    kept = tmp_path / "answers.html"
    kept.write_bytes(saved(page, "HTML"))
    alone = page.context.new_page()
    asked = []
    alone.on("request", lambda request: asked.append(request.url))
    alone.goto(kept.as_uri())
    expect(alone.get_by_role("row")).to_have_count(1 + 21)
    expect(alone.get_by_role("row").last).to_contain_text(evil)
    assert alone.locator("img").count() == 21
    assert [url for url in asked if not url.startswith("data:")] == [kept.as_uri()]
    assert axe.Axe().run(alone).response["violations"] == []


def drop(page, path):
    """Drops a file or folder as the system does, which a script cannot."""
    session = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, "x": 300, "y": 300, "data": data})


def num_photographs(request):
    return request.post_data_buffer.count(b'name="photograph"')


def saved(page, kind):
    with page.expect_download() as download:
        page.get_by_role("button", name=f"Save as {kind}").click()
    return Path(download.value.path()).read_bytes()


def test_what_is_known_of_a_patient_is_asked_with(visit, model, photographs):
    page = visit()
    path = sorted(photographs[0].glob("l*.png"))[0]
    add(page, path)
    of_it = card(page, path.name)
    shares = [percent(model.predict([path])[0].malignancy)]
    for known in ({"age": 70.0}, {"age": 70.0, "localization": "back"}):
        answer = model.predict([path], [known])[0]
        if "localization" in known:
            of_it.get_by_label("Site").select_option("back")
        else:
            of_it.get_by_label("Age").fill("70")
            of_it.get_by_label("Age").press("Enter")
        shares.append(percent(answer.malignancy))
        expect(of_it.locator(".flag")).to_contain_text(f"a probability of {shares[-1]}")
        settle(page)
    assert len(set(shares)) == 3
    of_it.get_by_label("Age").fill("999")
    of_it.get_by_label("Age").press("Enter")
    expect(page.locator("[aria-busy]")).to_have_count(0)


def test_with_the_keyboard_alone(visit, photographs):
    page = visit()
    with page.expect_file_chooser() as chooser:
        tab_to(page, "Choose photographs")
        page.keyboard.press("Enter")
    some = sorted(photographs[0].glob("l*.png"))[:2]
    chooser.value.set_files([*some, photographs[1] / "foreign.png"])
    settle(page)
    tab_to(page, "Heat map")
    page.keyboard.press("Enter")
    expect(page.locator("img[alt^='Heat map']")).to_have_count(1)
    tab_to(page, "Show the answer nevertheless")
    page.keyboard.press("Enter")
    expect(card(page, "foreign.png").locator(".diagnosis")).to_be_visible()
    page.locator("body").press("Home")
    tab_to(page, "Limits and use")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_contain_text("see a doctor")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page.get_by_role("button", name="Limits and use")).to_be_focused()
    tab_to(page, "Remove lesion00.png")
    page.keyboard.press("Enter")
    expect(card(page, "lesion01.png")).to_be_focused()
    tab_to(page, "Remove all")
    page.keyboard.press("Enter")
    expect(page.locator(".card")).to_have_count(0)
    expect(page.get_by_role("button", name="Choose photographs")).to_be_focused()


FOCUSED = """() => {
  const element = document.activeElement;
  const style = getComputedStyle(element);
  const name = element.ariaLabel ?? element.innerText;
  return [name, parseFloat(style.outlineWidth), style.outlineStyle];
}"""


def tab_to(page, name):
    """Presses the tab key until something is reached; each stop must be visibly the one."""
    for _ in range(40):
        page.keyboard.press("Tab")
        text, width, style = page.evaluate(FOCUSED)
        assert (
            text is None
            or page.evaluate("document.activeElement === document.body")
            or (width >= 2 and style != "none")
        ), text
        if text == name:
            return
    pytest.fail(f"{name!r} was not reached")


def test_no_fault_of_accessibility_and_nothing_wider_than_the_screen(visit, photographs):
    page = visit(reduced_motion="reduce")
    faults = []

    def look(where):
        for width, scheme in ((1280, "light"), (390, "dark")):
            page.set_viewport_size({"width": width, "height": 844})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (where, width)
            page.emulate_media(color_scheme=scheme)
            faults.extend(
                (where, width, scheme, found["id"], found["nodes"][0]["html"])
                for found in axe.Axe().run(page).response["violations"]
            )

    look("empty")
    lesion = sorted(photographs[0].glob("l*.png"))[0]
    add(page, lesion, photographs[1] / "foreign.png", photographs[1] / "broken.jpg")
    card(page, lesion.name).get_by_role("button", name="Heat map").click()
    card(page, "foreign.png").get_by_text("Show the answer nevertheless").click()
    expect(page.locator("img[alt^='Heat map']")).to_have_count(1)
    look("cards")
    page.get_by_role("button", name="Model card").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("<script>alert(1)</script> a paper")
    look("dialog")
    assert dialog.evaluate("(element) => element.scrollWidth - element.clientWidth") == 0
    assert faults == []


def test_on_a_phone_its_camera_is_offered(visit, photographs):
    page = visit(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Take a photograph").tap()
    assert page.locator("#camera").get_attribute("capture") == "environment"
    chooser.value.set_files(sorted(photographs[0].glob("l*.png"))[0])
    settle(page)
    expect(card(page, "lesion00.png").locator(".diagnosis")).to_be_visible()
    expect(page.locator("footer")).to_be_in_viewport()
    expect(page.locator("footer")).to_contain_text("not a medical device. If you are worried")


def test_a_busy_or_absent_server_costs_no_photograph(visit, photographs):
    page = visit()
    visit.allowed = ["Failed to load resource"]
    turned_away = []

    def turn_away(route):
        """The first is told to come again; then several are refused, for one of them."""
        turned_away.append(num_photographs(route.request))
        if len(turned_away) == 1:
            route.fulfill(status=503, headers={"Retry-After": "0.01"}, json={"error": "busy"})
        elif len(turned_away) == 2:
            route.fulfill(status=413, json={"error": "The upload is too large."})
        elif len(turned_away) == 3:
            route.abort()
        else:
            route.continue_()

    page.route("**/api/predict", turn_away)
    add(page, *sorted(photographs[0].glob("l*.png"))[:2])
    assert turned_away == [2, 2, 1, 1]
    expect(card(page, "lesion00.png")).to_contain_text("The server does not answer")
    expect(card(page, "lesion01.png").locator(".diagnosis")).to_be_visible()
    card(page, "lesion00.png").get_by_role("button", name="Try again").click()
    expect(card(page, "lesion00.png").locator(".diagnosis")).to_be_visible()


def test_names_and_csv_are_escaped_as_in_the_terminal(visit):
    texts = [
        "=1+1",
        "+5",
        "-5e3",
        "+a",
        "@x",
        " \t=x",
        "'=x",
        "\uff1dx",
        '=a,"b"',
        "a\rb",
        "nevus.jpg",
    ]
    texts += [
        "a\nb",
        "\x1b[31m",
        "\u202egnp.exe",
        "e\u0301",
        "\u200d",
        "\u2028",
        "\U000e0001",
        "-\u0663",
    ]
    page = visit()
    script = """async (texts) => {
      const { csv, shown } = await import("/static/text.js");
      return [csv([texts, ["b", ...texts]]), texts.map(shown)];
    }"""
    as_csv, shown = page.evaluate(script, texts)
    assert as_csv == escape.csv_text([texts, ["b", *texts]])
    assert shown == [*map(escape.shown, texts)]
