import hashlib
import http.server
import io
import threading
import types
import zipfile

import numpy as np
import pytest

from ham_jax.config import InputError
from ham_jax.data import download
from ham_jax.data.download import Mirror, RemoteFile

IMAGES = np.random.default_rng(0).bytes(300_000)
TABLE = b"image_id,dx\nISIC_0024306,nv\n"


class Server:
    """Serves the files it is told to, with the faults it is told to have.

    Attributes:
      cut_at: a path is served this far in one answer, and then the connection breaks.
      no_range: paths whose Range header is ignored.
      status: an answer of this status and no content.
      asked: (path, Range header) of each request.
    """

    def __init__(self):
        self.files, self.cut_at, self.no_range, self.status = {}, {}, set(), {}
        self.asked = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,))
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, request):
        wanted = request.headers.get("Range")
        self.asked.append((request.path, wanted))
        content = self.files.get(request.path)
        status = self.status.get(request.path, 200 if content is not None else 404)
        if status != 200:
            request.send_error(status)
            return
        start = 0
        if wanted and request.path not in self.no_range:
            start, status = int(wanted.removeprefix("bytes=").removesuffix("-")), 206
        if start >= len(content):
            request.send_error(416)
            return
        request.send_response(status)
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        request.wfile.write(content[start:][: self.cut_at.get(request.path, len(content))])

    def mirror(self, name: str, **files: bytes) -> Mirror:
        """Puts files up under `/<name>/` and returns them as a mirror with checksums."""
        remote = []
        for stem, content in files.items():
            path = f"/{name}/{stem}"
            self.files[path] = content
            digest = "md5:" + hashlib.md5(content).hexdigest()
            remote.append(RemoteFile(f"{stem}.bin", self.url + path, len(content), digest))
        return Mirror(name, tuple(remote))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "_PAUSE_S", 0.001)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()
    server.thread.join()


def visible(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def fetch(folder, *mirrors, progress=None) -> bool:
    return download.download(folder, "train", progress, mirrors={"train": mirrors})


def test_a_set_arrives_once_with_progress(server, tmp_path):
    mirror, seen = server.mirror("one", table=TABLE, images=IMAGES), []
    assert fetch(tmp_path / "raw", mirror, progress=lambda *at: seen.append(at))
    assert visible(tmp_path / "raw") == {"table.bin": TABLE, "images.bin": IMAGES}
    total = len(TABLE) + len(IMAGES)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    num_asked = len(server.asked)
    assert not fetch(tmp_path / "raw", mirror)
    assert len(server.asked) == num_asked


def test_a_broken_connection_goes_on_where_it_stopped(server, tmp_path):
    mirror = server.mirror("one", images=IMAGES)
    server.cut_at["/one/images"] = 70_000
    assert fetch(tmp_path, mirror)
    assert visible(tmp_path) == {"images.bin": IMAGES}
    starts = [int(wanted[6:-1]) if wanted else 0 for _, wanted in server.asked]
    assert starts == sorted(set(starts))
    assert 4 < len(starts) < 7  # at most one chunk is lost by a break


def test_a_later_run_goes_on_where_an_earlier_one_gave_up(server, tmp_path):
    mirror = server.mirror("one", table=TABLE, images=IMAGES)
    server.status["/one/images"] = 403
    with pytest.raises(InputError):
        fetch(tmp_path, mirror)
    assert visible(tmp_path) == {}
    (part,) = [tmp_path / ".unfinished" / "one" / "images.bin.part"]
    part.write_bytes(IMAGES[:1000])
    server.status.clear()
    server.asked.clear()
    assert fetch(tmp_path, mirror)
    assert server.asked == [("/one/images", "bytes=1000-")]
    assert visible(tmp_path) == {"table.bin": TABLE, "images.bin": IMAGES}
    assert not (tmp_path / ".unfinished").exists()


def test_a_server_without_ranges_sends_it_all_again(server, tmp_path):
    mirror = server.mirror("one", images=IMAGES)
    part = tmp_path / ".unfinished" / "one" / "images.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 1000)  # would spoil the checksum if it were kept
    server.no_range.add("/one/images")
    assert fetch(tmp_path, mirror)
    assert visible(tmp_path) == {"images.bin": IMAGES}


@pytest.mark.parametrize("fault", ["forbidden", "other content", "always cut off", "no server"])
def test_the_next_mirror_takes_over(fault, server, tmp_path):
    bad, good = server.mirror("bad", table=TABLE, images=IMAGES), server.mirror("good", all=IMAGES)
    if fault == "forbidden":
        server.status["/bad/images"] = 403
    elif fault == "other content":
        server.files["/bad/images"] = IMAGES[::-1]
    elif fault == "always cut off":
        server.cut_at["/bad/images"] = 0
    else:
        bad = Mirror("bad", (RemoteFile("x", "http://127.0.0.1:9/x", 1),))
    assert fetch(tmp_path, bad, good)
    assert visible(tmp_path) == {"all.bin": IMAGES}


def test_the_last_error_gives_every_reason(server, tmp_path):
    mirrors = [server.mirror(name, images=IMAGES) for name in ("one", "two", "three")]
    server.status["/one/images"] = 403
    server.status["/two/images"] = 503
    server.files["/three/images"] = b"other"
    with pytest.raises(InputError) as error:
        fetch(tmp_path, *mirrors)
    for text in (r"- one: .*HTTP 403", r"- two: .*HTTP 503", r"- three: .*md5 is .*, not "):
        error.match(text)
    assert visible(tmp_path) == {}


def test_what_has_no_checksum_must_at_least_be_what_it_says(server, tmp_path):
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("a.jpg", IMAGES)
    server.files |= {"/page": b"<html>please log in</html>", "/zip": zipped.getvalue()}
    server.files["/table"] = TABLE

    def mirror(zip_path: str, table_path: str) -> Mirror:
        files = (("i.zip", zip_path), ("t.csv", table_path))
        return Mirror(
            (zip_path + table_path).replace("/", ""),
            tuple(RemoteFile(n, server.url + p, 9) for n, p in files),
        )

    with pytest.raises(InputError, match=r"(?s)is not a zip.*a web page, not a table"):
        fetch(tmp_path, mirror("/page", "/table"), mirror("/zip", "/page"))
    assert fetch(tmp_path, mirror("/zip", "/table"))
    assert visible(tmp_path) == {"i.zip": zipped.getvalue(), "t.csv": TABLE}


def test_a_full_disk_is_noticed_before_anything_comes(server, tmp_path, monkeypatch):
    usage = types.SimpleNamespace(free=100_000_000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    large = RemoteFile("a.zip", f"{server.url}/a", 2_000_000_000)
    with pytest.raises(InputError, match=r"0\.10 GB free, and 2\.00 GB"):
        fetch(tmp_path, Mirror("one", (large,)))
    assert server.asked == []


def test_the_published_mirrors_have_distinct_secure_addresses():
    files = [f for mirrors in download.MIRRORS.values() for m in mirrors for f in m.files]
    assert len({file.url for file in files}) == len(files)
    for file in files:
        assert file.url.startswith("https://")
        assert file.checksum == "" or len(file.checksum.removeprefix("sha256:")) == 64
