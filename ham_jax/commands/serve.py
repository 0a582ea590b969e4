"""`--mode=serve`: a page on this machine, and the HTTP interface below it. Nothing is stored.

The only room that knows Starlette and uvicorn. Only what this server's own page, or a program of
this machine's user, asks is answered: a page from elsewhere that sends a browser here, under this
address or under a name of its own that leads here (DNS rebinding), is refused.
"""

import asyncio
import contextlib
import importlib.resources
import ipaddress
import json
import logging
import math
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

import jax
import jinja2
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import FormData, Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ham_jax import DISCLAIMER, escape
from ham_jax.commands import service as services
from ham_jax.config import InputError
from ham_jax.data.image import ImageError
from ham_jax.model import Ensemble, restore_all

MAX_FILES = 64
"""Photographs in a request."""

MAX_BYTES = 32 << 20
"""Of a photograph."""

MAX_REQUEST_BYTES = 128 << 20
"""Of all photographs in a request."""

_MAX_HELD_BYTES = 512 << 20  # of all requests that are under way
_MAX_METADATA_BYTES = 1 << 20
_UPLOAD_S = 120  # that an upload may take
_DRAIN_S = 2  # to take in what a refused upload still sends: browsers read the answer only then
_MB = 1 << 20

_HERE = importlib.resources.files("ham_jax.commands")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src"
    " 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors"
    " 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def run(
    workdirs: Sequence[Path],
    overrides: Sequence[tuple[str, str]],
    mesh: jax.sharding.Mesh,
    host: str,
    port: int,
) -> None:
    """Serves until a signal ends it, SIGINT or SIGTERM, which it does at once.

    Args:
      workdirs: one training run, or the members of an ensemble.
      overrides: (key, text) pairs of the command line.
      mesh: the devices.
      host: where to listen: a name or an address of this machine.
      port: likewise; 0: any that is free.

    Raises:
      InputError: no checkpoint, a damaged calibration, or an address that cannot be used.
    """
    start = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    if jax.process_count() > 1:
        raise InputError("--mode=serve is a single process: set HAM_JAX_NUM_PROCESSES=1.")
    listener = _listen(host, port)
    ensemble = Ensemble(restore_all(workdirs, overrides, mesh)).with_decisions()
    service = services.Service(ensemble)
    service.warm_up()
    config = uvicorn.Config(
        app(service, host), lifespan="off", ws="none", log_level="warning", server_header=False
    )
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # uploads that are none
    print(
        f"Open {_address(host, listener)} (ready after {time.monotonic() - start:.1f} s; Ctrl-C"
        f" ends it). {DISCLAIMER}",
        flush=True,
    )
    asyncio.run(_Server(config).serve(sockets=[listener]))


class _Server(uvicorn.Server):
    """Leaves signals to `_end`: uvicorn would wait for open requests."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _end(*_) -> NoReturn:
    """Ends at once: a thread that predicts would otherwise be waited for. Nothing is written."""
    for decoder in multiprocessing.active_children():
        decoder.kill()
    os._exit(0)


def _listen(host: str, port: int) -> socket.socket:
    if not host:
        raise InputError("--host= is empty: 127.0.0.1 answers this machine alone, 0.0.0.0 all.")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise InputError(
            f"--host={host} --port={port}: nothing can listen there: {error.strerror or error}."
            " Give another --port (0 takes any that is free), or a --host of this machine."
        ) from error


def _address(host: str, listener: socket.socket) -> str:
    """Returns what to open in a browser, in words."""
    port = listener.getsockname()[1]
    if host in ("0.0.0.0", "::"):
        return f"http://localhost:{port}/ or, from elsewhere, this machine's name or address"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def app(service: services.Service, host: str) -> ASGIApp:
    """Returns the application, to be asked by the names of this machine alone.

    Args:
      service: warm.
      host: where it listens.
    """
    about = service.about | {
        "limits": {
            "max_files": MAX_FILES,
            "max_bytes": MAX_BYTES,
            "max_request_bytes": MAX_REQUEST_BYTES,
            "max_pixels": services.MAX_PIXELS,
        }
    }
    template = (_HERE / "page" / "index.html.jinja").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = page.from_string(template).render(model=about)
    openapi = json.loads((_HERE / "openapi.json").read_text(encoding="utf-8"))
    fixed = {
        "/": HTMLResponse(page),
        "/api/model": JSONResponse(about),
        "/healthz": PlainTextResponse("ok"),
        "/openapi.json": JSONResponse(openapi),
    }
    routes = [
        *(Route(path, response, methods=["GET"]) for path, response in fixed.items()),
        Route("/api/queue", _queue(service), methods=["GET"]),
        Route("/api/predict", _predict(service), methods=["POST"]),
        Mount("/static", StaticFiles(packages=[("ham_jax.commands", "page/static")])),
    ]
    handlers = {HTTPException: _refused, ClientDisconnect: _gone, Exception: _failed}
    return _Guard(Starlette(routes=routes, exception_handlers=handlers), host)


class _Guard:
    """Refuses what other pages ask, and gives each answer its headers.

    Args:
      app: the rest.
      host: where it listens.
    """

    def __init__(self, app: ASGIApp, host: str):
        self._app, self._names = app, {"localhost", host.lower()}
        self._is_local = _is_loopback(host)
        if not self._is_local:
            name = socket.gethostname().lower()
            self._names |= {name, f"{name}.local"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        why = self._fault(scope)
        answer = JSONResponse({"error": why}, 403) if why else self._app
        await answer(scope, receive, with_headers)

    def _fault(self, scope: Scope) -> str:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_own(host):
            return (
                f"{escape.shown(host)!r:.80} is not the name of this server: open it by the address"
                " that it printed."
            )
        if origin not in (None, f"http://{host}", f"https://{host}"):
            return "Only this server's own page may ask it, not one from elsewhere."
        site = headers.get("sec-fetch-site", "none")
        # A link that leads here from elsewhere opens the page, and no more.
        opens = scope["path"] == "/" and headers.get("sec-fetch-dest") == "document"
        if site not in ("same-origin", "none") and not opens:
            return "Only this server's own page may ask it, not one from elsewhere."
        return ""

    def _is_own(self, host: str) -> bool:
        """Whether a Host header is one by which no foreign name can lead here."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not self._is_local


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _queue(service: services.Service) -> Callable[[Request], Awaitable[Response]]:
    async def answer(_: Request) -> Response:
        return JSONResponse(service.queue())

    return answer


def _predict(service: services.Service) -> Callable[[Request], Awaitable[Response]]:
    held = _Held()

    async def answer(request: Request) -> Response:
        start = time.monotonic()
        name = request.query_params.get("class")
        if name is not None and name not in service.classes.names:
            allowed = ", ".join(service.classes)
            raise HTTPException(422, f"class must be one of {allowed}.")
        explain = request.query_params.get("explain", "0") not in ("0", "false")
        with held.by_request() as hold:
            form = await _form(request, hold)
            try:
                photographs, known = _parts(form, service)
                files = [await _file(photograph) for photograph in photographs]
            finally:
                await form.close()
            try:
                answers = await service.predict(
                    files, known, explain, name, request.is_disconnected
                )
            except services.FullError as full:
                raise _full(full.seconds) from full
        names = [{"file": escape.shown(photograph.filename)} for photograph in photographs]
        return JSONResponse(
            {
                "answers": [name | said for name, said in zip(names, answers, strict=False)],
                "seconds": time.monotonic() - start,
                "disclaimer": DISCLAIMER,
            }
        )

    return answer


class _Held:
    """How many bytes of uploads are in memory, of all requests."""

    def __init__(self):
        self.num_bytes = 0

    @contextlib.contextmanager
    def by_request(self) -> Iterator[Callable[[int], None]]:
        """Yields a function to add the bytes that come in, which goes on from none at the end.

        It raises HTTPException where they are too many, of this request or of all.
        """
        own = 0

        def add(num_bytes: int) -> None:
            nonlocal own
            own += num_bytes
            self.num_bytes += num_bytes
            if own > MAX_REQUEST_BYTES + _MAX_METADATA_BYTES:
                raise _too_large()
            if self.num_bytes > _MAX_HELD_BYTES:
                raise _full(10)

        try:
            yield add
        finally:
            self.num_bytes -= own


def _too_large() -> HTTPException:
    allowed = f"{MAX_REQUEST_BYTES // _MB} MB of photographs may be sent at once; send fewer."
    return HTTPException(413, f"The upload is too large: {allowed}")


def _full(seconds: float) -> HTTPException:
    wait = max(1, math.ceil(seconds))
    said = f"Too many photographs wait for their answers; try again in {wait} s."
    return HTTPException(503, said, {"Retry-After": str(wait)})


class _InMemory(MultiPartParser):
    """Writes nothing to a disk; `_Held` bounds the memory."""

    spool_max_size = 0


async def _form(request: Request, hold: Callable[[int], None]) -> FormData:
    """Returns the parts of an upload, which is read no further than it may be long.

    Raises:
      HTTPException: there are too many bytes or photographs, or they come in no known form.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "multipart/form-data":
        raise HTTPException(415, "Send photographs as multipart/form-data, parts `photograph`.")

    body = request.stream()

    async def counted() -> AsyncGenerator[bytes, None]:
        async for chunk in body:
            hold(len(chunk))
            yield chunk

    try:
        async with asyncio.timeout(_UPLOAD_S):
            length = request.headers.get("content-length", "")
            if length.isdecimal() and int(length) > MAX_REQUEST_BYTES + _MAX_METADATA_BYTES:
                raise _too_large()
            parser = _InMemory(
                request.headers,
                counted(),
                max_files=MAX_FILES,
                max_fields=1,
                max_part_size=_MAX_METADATA_BYTES,
            )
            return await parser.parse()
    except TimeoutError:
        refusal = HTTPException(408, f"The upload took longer than {_UPLOAD_S} s.")
    except MultiPartException as error:
        refusal = HTTPException(422, f"The upload cannot be read: {error.message}")
        if error.message.startswith("Too many files"):
            refusal = HTTPException(413, f"At most {MAX_FILES} photographs may be sent at once.")
    except HTTPException as error:
        refusal = error
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_S):
            async for _ in body:
                pass
    refusal.headers = {**(refusal.headers or {}), "Connection": "close"}
    raise refusal


def _parts(form: FormData, service: services.Service) -> tuple[list[UploadFile], list | None]:
    """Returns the photographs, and what is known of each.

    Raises:
      HTTPException: there is no photograph, something else, or metadata that are invalid.
    """
    faults, known = [], None
    if others := sorted(form.keys() - {"photograph", "metadata"}):
        faults.append(f"{escape.shown(others[0])!r:.80} is neither `photograph` nor `metadata`.")
    photographs = [part for part in form.getlist("photograph") if isinstance(part, UploadFile)]
    if not photographs:
        faults.append("Send at least one file as `photograph`.")
    elif len(photographs) < len(form.getlist("photograph")):
        faults.append("`photograph` must be a file.")
    text = form.get("metadata")
    if isinstance(text, UploadFile):
        faults.append("`metadata` must be a text, not a file.")
    elif text is not None and not service.takes_metadata:
        faults.append("This network takes no metadata: leave them out.")
    elif text is not None:
        try:
            known = json.loads(text)
        except (ValueError, RecursionError):
            faults.append("`metadata` is not JSON.")
        else:
            faults += services.metadata_faults(known, len(photographs))
    if faults:
        raise HTTPException(422, " ".join(faults))
    return photographs, known


async def _file(photograph: UploadFile) -> bytes | ImageError:
    if (photograph.size or 0) > MAX_BYTES:
        return ImageError(f"too large: more than {MAX_BYTES // _MB} MB in one file")
    return await photograph.read()


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = {
        404: f"There is nothing at {escape.shown(request.url.path):.80}.",
        405: f"{request.method} is not for {escape.shown(request.url.path):.80}.",
    }
    text = said.get(error.status_code, error.detail)
    return JSONResponse({"error": text}, error.status_code, headers=error.headers)


async def _gone(*_) -> Response:
    return Response(status_code=400)  # nobody reads it


async def _failed(*_) -> Response:
    """Says no more to whoever asked; uvicorn prints the traceback where the server was started."""
    return JSONResponse({"error": "The server failed; its terminal says more."}, 500)
