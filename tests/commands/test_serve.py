"""The page's server: the network's answers to the last bit, for nobody else, whatever is sent."""

import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import types
from importlib import resources
from pathlib import Path

import httpx2
import jsonschema
import numpy as np
import openapi_spec_validator
import pytest
from PIL import Image
from starlette.testclient import TestClient

import ham_jax
from ham_jax import DISCLAIMER
from ham_jax.commands import serve
from ham_jax.commands import service as services
from ham_jax.config import InputError
from ham_jax.model import Ensemble

ROOT = Path(__file__).parents[2]
OPENAPI = json.loads(resources.files("ham_jax.commands").joinpath("openapi.json").read_text())
HOME = "http://127.0.0.1:8000"
BATCH = 8  # one photograph a device


@pytest.fixture(scope="module")
def trained(tiny_run, small_resnet18):
    return tiny_run(**{"model.metadata": "true"})


@pytest.fixture(scope="module")
def model(trained):
    return ham_jax.load(trained)


@pytest.fixture(scope="module")
def service(model):
    service = services.Service(Ensemble((model,)), max_waiting=20)
    service.warm_up()
    yield service
    service.close()


@pytest.fixture(scope="module")
def client(service):
    return TestClient(serve.app(service, "127.0.0.1"), base_url=HOME)


@pytest.fixture(scope="module")
def photographs(tiny_raw):
    return [path.read_bytes() for path in sorted(tiny_raw.rglob("*.jpg"))[:10]]


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def sent(*files, metadata=None):
    parts = [("photograph", (f"{number}.jpg", data)) for number, data in enumerate(files)]
    return {"files": parts, "data": None if metadata is None else {"metadata": metadata}}


def checked(answer, method="get"):
    """Returns an answer's JSON, which must be what openapi.json says."""
    said = answer.json()
    path = re.sub(r"\?.*", "", str(answer.url)).removeprefix(HOME)
    described = OPENAPI["paths"][path][method]["responses"][str(answer.status_code)]
    if "$ref" in described:
        described = OPENAPI["components"]["responses"][described["$ref"].split("/")[-1]]
    schema = described["content"]["application/json"]["schema"]
    jsonschema.Draft202012Validator(schema | {"components": OPENAPI["components"]}).validate(said)
    return said


def as_said(answer, classes):
    """Returns an Answer in the form of the HTTP interface."""
    said = dataclasses.asdict(answer) | {"unlike": answer.unlike, "error": answer.error or None}
    said["prediction"] = answer.prediction or None
    said["title"] = classes.title(answer.prediction) if answer.prediction else None
    sets = answer.prediction_set
    return said | {"prediction_set": None if sets is None else list(sets)}


def test_answers_are_the_models_to_the_last_bit(client, model, photographs):
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    files = [*photographs[:7], b"no image", *photographs[7:], png(noise)]
    said = checked(client.post("/api/predict", **sent(*files)), "post")
    wanted = [*model.predict(files[:BATCH]), *model.predict(files[BATCH:])]
    for number, (answer, of_model) in enumerate(zip(said["answers"], wanted, strict=True)):
        assert answer == {"file": f"{number}.jpg", **as_said(of_model, model.classes)}
    assert "not an image" in said["answers"][7]["error"]
    assert said["answers"][-1]["unlike"]
    assert said["answers"][0]["flagged"] is not None
    assert said["disclaimer"] == DISCLAIMER


def test_what_is_known_of_a_photograph_counts_and_is_checked(client, model, photographs, service):
    known = [{"age": 70, "sex": "male", "localization": "back"}, {"age": None, "sex": ""}]
    request = sent(*photographs[:2], metadata=json.dumps(known))
    said = checked(client.post("/api/predict", **request), "post")["answers"]
    answers = model.predict(photographs[:2], [known[0], {}])
    assert [one["probabilities"] for one in said] == [dict(one.probabilities) for one in answers]
    assert said[0]["probabilities"] != dict(model.predict(photographs[:2])[0].probabilities)
    for wrong, why in {
        "{}": "a JSON list",
        "[": "not JSON",
        "[" * 100_000: "not JSON",
        "[{}]": "of 1 for 2",
        '[{"age": 150}, {"age": true}]': "Photograph 2: age must be",
        '[{"age": NaN}, {"sex": "m"}]': "sex must be one of female, male",
        '[{"dx": "mel"}, {"localization": 3}]': "localization must be one of abdomen",
    }.items():
        refused = client.post("/api/predict", **sent(*photographs[:2], metadata=wrong))
        assert refused.status_code == 422
        assert why in checked(refused, "post")["error"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "takes_metadata", False)
        refused = client.post("/api/predict", **request)
    assert "takes no metadata" in refused.json()["error"]


def test_a_heat_map_is_drawn_over_what_the_network_saw(client, model, photographs):
    request = sent(photographs[0], b"no image")
    said = checked(client.post("/api/predict?explain=1&class=mel", **request), "post")["answers"]
    assert said[1]["heat_map"] is None
    kind, data = said[0]["heat_map"].split(",")
    assert kind == "data:image/png;base64"
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    image = model.decode(photographs[0])
    codes = model.encode(services.pd.DataFrame([{}]))
    view, heat = model.explain(image, np.array([4]), codes)
    np.testing.assert_array_equal(drawn, services._over(view[0], heat[0]))
    np.testing.assert_array_equal(
        services._over(view[0], 0 * heat[0]), np.round(view[0] * 255).astype(np.uint8)
    )
    default = client.post("/api/predict?explain=1", **request).json()["answers"][0]
    name = default["prediction"]
    named = client.post(f"/api/predict?explain=1&class={name}", **request).json()["answers"][0]
    assert default["heat_map"] == named["heat_map"]
    refused = client.post("/api/predict?explain=1&class=melon", **request)
    assert refused.status_code == 422
    assert "akiec, bcc" in checked(refused, "post")["error"]


def test_every_malformed_file_of_the_suite_costs_its_own_answer_only(client, photographs):
    files = runpy.run_path(str(ROOT / "tests" / "malformed.py"))["files"]()
    good = client.post("/api/predict", **sent(photographs[0])).json()["answers"][0]
    names, errors = sorted(files), 0
    for start in range(0, len(names), 10):
        chosen = [files[name] for name in names[start : start + 10]]
        said = checked(client.post("/api/predict", **sent(photographs[0], *chosen)), "post")
        assert said["answers"][0] == good | {"ood_score": pytest.approx(good["ood_score"])}
        assert len(said["answers"]) == 1 + len(chosen)
        errors += sum(answer["error"] is not None for answer in said["answers"])
        assert all(answer["error"] or answer["prediction"] for answer in said["answers"])
    assert errors > 80


class Deadly:
    """A photograph that ends the process that receives it."""

    def __reduce__(self):
        return os._exit, (1,)


def test_a_picture_that_kills_its_decoder_costs_its_own_answer_only(service, photographs):
    killed, good = asyncio.run(service.predict([Deadly(), photographs[0]]))
    assert "killed" in killed["error"]
    assert good["prediction"]


def test_limits_are_kept_and_say_so(client, photographs, monkeypatch):
    def refused(status, **request):
        answer = client.post("/api/predict", **request)
        assert answer.status_code == status
        assert answer.headers["connection"] == "close"
        return checked(answer, "post")["error"]

    too_many = [b""] * (serve.MAX_FILES + 1)
    assert "At most 64 photographs" in refused(413, **sent(*too_many))
    pixels = np.zeros((7200, 7200), np.uint8)  # of 50 million
    (said,) = client.post("/api/predict", **sent(png(pixels))).json()["answers"]
    assert said["error"] == "too large: 7200 x 7200 pixels; at most 50 million are read"
    monkeypatch.setattr(serve, "MAX_BYTES", 10)
    (said,) = client.post("/api/predict", **sent(photographs[0])).json()["answers"]
    assert "in one file" in said["error"]
    monkeypatch.setattr(serve, "MAX_REQUEST_BYTES", 1000)
    monkeypatch.setattr(serve, "_MAX_METADATA_BYTES", 1000)
    assert "too large" in refused(413, **sent(bytes(3000)))
    taken = []

    def endless():
        for _ in range(100):
            taken.append(0)
            yield bytes(100)

    head = {"content-type": "multipart/form-data; boundary=x"}
    assert "too large" in refused(413, content=endless(), headers=head)
    monkeypatch.setattr(serve, "_MAX_HELD_BYTES", 500)
    full = client.post("/api/predict", **sent(bytes(600)))
    assert full.status_code == 503
    assert full.headers["retry-after"] == "10"
    monkeypatch.setattr(serve, "_MAX_HELD_BYTES", 1 << 20)
    assert client.post("/api/predict", **sent(bytes(600))).status_code == 200  # all was given back


@pytest.mark.parametrize(
    ("request_", "status", "why"),
    [
        ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415, "multipart"),
        ({"content": b"x"}, 415, "multipart"),
        ({"files": [("photo", ("a.jpg", b"x"))]}, 422, "'photo' is neither"),
        ({"data": {"photograph": "a"}, "files": [("metadata", ("a", b"[]"))]}, 422, "at least one"),
        (
            {
                "content": b"no",
                "headers": {"content-type": "multipart/form-data; boundary=x"},
            },
            422,
            "cannot be read",
        ),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 422, "boundary"),
    ],
)
def test_what_is_no_upload_is_answered_in_a_sentence(client, request_, status, why):
    answer = client.post("/api/predict", **request_)
    assert answer.status_code == status
    assert why in checked(answer, "post")["error"]


OWN = {"host": "127.0.0.1:8000", "origin": HOME, "sec-fetch-site": "same-origin"}


@pytest.mark.parametrize(
    ("host", "path", "headers", "status"),
    [
        ("127.0.0.1", "/api/model", OWN, 200),
        ("127.0.0.1", "/api/model", {"host": "localhost:9000"}, 200),  # forwarded
        ("127.0.0.1", "/api/model", {"host": "[::1]:8000"}, 200),
        ("127.0.0.1", "/api/model", {"host": "evil.example:8000"}, 403),
        ("127.0.0.1", "/healthz", {"host": "127.0.0.1.evil.example"}, 403),
        ("127.0.0.1", "/", {"host": "192.168.1.2:8000"}, 403),
        ("127.0.0.1", "/", {"host": ""}, 403),
        ("127.0.0.1", "/", {"host": "[:8000"}, 403),
        ("127.0.0.1", "/", {"host": "user@127.0.0.1:8000@evil.example"}, 403),
        ("127.0.0.1", "/api/model", OWN | {"origin": "http://evil.example"}, 403),
        ("127.0.0.1", "/api/model", OWN | {"origin": "null"}, 403),
        ("127.0.0.1", "/api/model", OWN | {"origin": "http://127.0.0.1:9000"}, 403),
        ("127.0.0.1", "/api/model", OWN | {"origin": "http://["}, 403),
        ("127.0.0.1", "/api/model", {"sec-fetch-site": "cross-site"}, 403),
        ("127.0.0.1", "/api/model", {"sec-fetch-site": "same-site"}, 403),
        ("127.0.0.1", "/", {"sec-fetch-site": "cross-site", "sec-fetch-dest": "document"}, 200),
        ("127.0.0.1", "/", {"sec-fetch-site": "cross-site", "sec-fetch-dest": "iframe"}, 403),
        ("0.0.0.0", "/api/model", {"host": "192.168.1.2:8000"}, 200),
        ("0.0.0.0", "/api/model", {"host": "evil.example:8000"}, 403),
        ("0.0.0.0", "/api/model", {"host": f"{socket.gethostname()}:8000"}, 200),
        ("skin.example", "/api/model", {"host": "skin.example"}, 200),
    ],
)
def test_only_this_machines_own_page_may_ask(service, host, path, headers, status):
    client = TestClient(serve.app(service, host), base_url=HOME)
    answer = client.get(path, headers=headers)
    assert answer.status_code == status
    if status == 403:
        assert re.fullmatch(r'\{"error":".+\."\}', answer.text)


def test_every_answer_has_its_guards(client, service, monkeypatch):
    answers = [client.get(path) for path in ("/", "/healthz", "/nothing", "/api/predict")]
    answers.append(client.get("/", headers={"host": "evil.example"}))
    monkeypatch.setattr(service, "queue", None)
    failing = TestClient(client.app, base_url=HOME, raise_server_exceptions=False)
    answers.append(failing.get("/api/queue"))
    assert [answer.status_code for answer in answers] == [200, 200, 404, 405, 403, 500]
    for answer in answers:
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert "Traceback" not in answer.text
    for answer in answers[2:]:
        assert list(answer.json()) == ["error"]
    assert DISCLAIMER in answers[0].text


def test_while_the_network_works_others_wait_are_turned_away_or_told(service, photographs):
    """The event loop never waits for the network: health, queue and refusals come at once."""
    busy, free = threading.Event(), threading.Event()

    def work():
        busy.set()
        free.wait(30)

    async def ask():
        transport = httpx2.ASGITransport(serve.app(service, "127.0.0.1"))
        async with httpx2.AsyncClient(transport=transport, base_url=HOME) as client:
            service._network.submit(work)
            busy.wait(30)
            first = asyncio.create_task(client.post("/api/predict", **sent(*photographs[:2])))
            while not service.queue()["waiting"]:
                await asyncio.sleep(0.01)
            health = await client.get("/healthz")
            queue = checked(await client.get("/api/queue"))
            full = await client.post("/api/predict", **sent(*photographs, *photographs[:9]))
            waited = not first.done()
            free.set()
            return waited, health, queue, full, await first

    waited, health, queue, full, first = asyncio.run(ask())
    assert waited
    assert health.text == "ok"
    assert queue["waiting"] == 2
    assert queue["seconds"] > 0
    assert full.status_code == 503
    assert int(full.headers["retry-after"]) >= 1
    assert "Too many photographs wait" in checked(full, "post")["error"]
    assert len(first.json()["answers"]) == 2
    assert service.queue() == {"waiting": 0, "seconds": 0}


def test_nobody_is_answered_who_has_left(service, photographs):
    async def gone():
        return True

    assert asyncio.run(service.predict(photographs[:1], is_gone=gone)) == []
    assert service.queue()["waiting"] == 0


def test_the_interface_is_described_as_it_is(client, model):
    openapi_spec_validator.validate(OPENAPI)
    assert client.get("/openapi.json").json() == OPENAPI
    assert OPENAPI["info"]["version"] == ham_jax.__version__
    assert all(client.options(path).status_code == 405 for path in OPENAPI["paths"])
    about = checked(client.get("/api/model"))
    assert about["classes"][4] == {"name": "mel", "title": "melanoma", "malignant": True}
    assert about["metadata"]["sex"] == ["female", "male"]
    assert about["has_calibration"]
    assert about["has_ood"]
    assert about["heat_map_of"] is None
    two = services.describe(Ensemble((model, model.replace(name="b", calibrator=None))))
    assert two["heat_map_of"] == Path(model.name).name
    assert not two["has_calibration"]


def test_a_card_from_anywhere_has_no_html_of_its_own():
    card = "---\nlicense: x\n---\n# A\n<script>x</script>\n\n[a](javascript:x) ![b](http://c)\n\n"
    table = "|a|b|\n|-|-|\n|1|2|\n"
    shown = services._card([types.SimpleNamespace(card=card + table)])
    assert "license" not in shown
    assert "<h1>A</h1>" in shown
    assert "<td>1</td>" in shown
    assert not re.search(r"<(script|img|a href=.javascript)", shown)


def test_a_port_in_use_and_an_address_elsewhere_are_sentences():
    with serve._listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(InputError, match=f"--port={port}: nothing can listen there"):
            serve._listen("127.0.0.1", port)
    for host in ("192.0.2.1", "no.such.host.invalid", "::2", ""):
        with pytest.raises(InputError, match=r"Give another --port|--host= is empty"):
            serve._listen(host, 0)


CODE = """
    import sys
    for name in ("tensorflow", "tensorflow_datasets", "sklearn", "matplotlib"):
        sys.modules[name] = None
    from ham_jax import main
    from ham_jax.models import resnet
    resnet._WIDTHS, resnet.DEPTHS["resnet18"] = (16,), (1,)  # as in conftest
    main.run()
"""


def test_the_command_answers_at_its_address_and_ends_at_once(trained, photographs):
    command = [sys.executable, "-c", textwrap.dedent(CODE), "--mode=serve", "--port=0"]
    with subprocess.Popen(
        [*command, f"--workdir={trained}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as started:
        assert started.stdout
        try:
            said = started.stdout.readline()
            address = re.search(r"http://127\.0\.0\.1:\d+", said)[0]
            port = int(address.rpartition(":")[2])
            assert httpx2.get(f"{address}/healthz").text == "ok"
            answer = httpx2.post(f"{address}/api/predict", **sent(photographs[0]), timeout=60)
            assert answer.json()["answers"][0]["prediction"]
            with contextlib.closing(socket.create_connection(("127.0.0.1", port))) as upload:
                upload.sendall(  # and no more of it
                    f"POST /api/predict HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: 9\r\n"
                    "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n".encode()
                )
                time.sleep(0.2)
                start = time.monotonic()
                started.send_signal(signal.SIGTERM)
                _, errors = started.communicate(timeout=10)
            assert started.returncode == 0
            assert time.monotonic() - start < 2
            assert "Traceback" not in errors
        finally:
            started.kill()
