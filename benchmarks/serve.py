"""Soak of `--mode=serve`: thousands of uploads, every malformed file of the test suite among them.

python benchmarks/serve.py --workdir=runs/lite --photographs=data/ham10000/images --uploads=2000

Starts the server as a person does, and prints: seconds from the command to the first answer; memory
of the server and of the processes that decode, over time; milliseconds from a request to its
answer, of photographs that were read. Needs requirements-test.txt, for the malformed files, and
Linux, whose /proc tells of memory.
"""

import json
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from ham_jax import console  # noqa: E402
from ham_jax.data import image as image_files  # noqa: E402

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a run.", required=True)
_PHOTOGRAPHS = flags.DEFINE_string("photographs", None, "A folder of photographs.", required=True)
_UPLOADS = flags.DEFINE_integer("uploads", 2000, "How many files to send.", 1)
_CLIENTS = flags.DEFINE_integer("clients", 4, "How many requests at once.", 1)
_SERVER = flags.DEFINE_multi_string("server", [], "More flags of the server; may be repeated.")

_TOLD = 10  # times that memory is looked at


def predict(address: str, data: bytes) -> tuple[dict[str, Any], float]:
    """Returns the answer to one file, and the milliseconds that it took."""
    boundary = uuid.uuid4().hex
    head = (
        f"--{boundary}\r\nContent-Disposition: form-data; name=photograph; filename=a\r\n\r\n"
    ).encode()
    body = head + data + f"\r\n--{boundary}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    request = urllib.request.Request(f"{address}/api/predict", body, kind)
    start = time.monotonic()
    with urllib.request.urlopen(request, timeout=300) as answer:
        (said,) = json.load(answer)["answers"]
    return said, 1000 * (time.monotonic() - start)


def memory(pid: int) -> tuple[float, float]:
    """Returns the resident megabytes of a process, and of its children together."""

    def resident(number: int) -> float:
        status = Path(f"/proc/{number}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        return int(found[1]) / 1e3 if found else 0.0

    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for task in Path(f"/proc/{pid}/task").iterdir():  # threads start the processes
        children += (task / "children").read_text().split()
    return resident(pid), sum(resident(int(child)) for child in set(children))


def soak(
    address: str, pid: int, files: Sequence[bytes]
) -> tuple[list[list[str]], list[float], int]:
    """Sends all files.

    Args:
      address: of the server.
      pid: of its process.
      files: in their order.

    Returns:
      (rows of memory over time, milliseconds of each photograph that was read, how many were not).
    """
    rows, latencies, errors = [], [], 0
    parts = np.array_split(np.arange(len(files)), _TOLD)
    with ThreadPoolExecutor(_CLIENTS.value) as clients:
        for part in parts:
            answers = clients.map(lambda number: predict(address, files[number]), part)
            for said, milliseconds in answers:
                if said["error"]:
                    errors += 1
                else:
                    latencies.append(milliseconds)
            server, decoders = memory(pid)
            rows.append([str(part[-1] + 1), f"{server:.0f}", f"{decoders:.0f}"])
    return rows, latencies, errors


def files_to_send(folder: Path, malformed: Mapping[str, bytes], num: int) -> list[bytes]:
    """Returns what is sent: half of it malformed files, the other half photographs."""
    photographs = [
        path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in image_files.SUFFIXES
    ][:200]
    kinds = photographs, list(malformed.values())
    return [kinds[number % 2][number // 2 % len(kinds[number % 2])] for number in range(num)]


def main(_: Sequence[str]) -> None:
    """Starts the server, sends the files and prints the tables."""
    malformed = runpy.run_path(str(ROOT / "tests" / "malformed.py"))["files"]()
    files = files_to_send(Path(_PHOTOGRAPHS.value), malformed, _UPLOADS.value)
    command = [sys.executable, "-m", "ham_jax.main", "--mode=serve", "--port=0"]
    command += [f"--workdir={_WORKDIR.value}", *_SERVER.value]
    start = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://[\d.]+:\d+", server.stdout.readline())
            if found is None:
                sys.exit("The server did not start.")
            ready = time.monotonic() - start
            predict(found[0], files[0])
            first = time.monotonic() - start
            rows, latencies, errors = soak(found[0], server.pid, files)
            took = time.monotonic() - start - first
            server.send_signal(signal.SIGTERM)
            server.wait(10)
        finally:
            server.kill()
    console.print_table("Memory", ["uploads", "server, MB", "decoders, MB"], rows)
    p50, p95 = np.percentile(latencies, (50, 95))
    told = {
        "command": " ".join(map(shlex.quote, sys.argv)),
        "command to ready, s": f"{ready:.1f}",
        "command to first answer, s": f"{first:.1f}",
        "uploads": f"{len(files)} in {took:.0f} s, {_CLIENTS.value} at once",
        "unreadable": f"{errors}; {min(len(malformed), len(files) // 2)} malformed files were sent",
        "p50, p95 of those read, ms": f"{p50:.0f}, {p95:.0f} (n = {len(latencies)})",
        "exit code after SIGTERM": str(server.returncode),
    }
    console.print_table("", ["", ""], [list(row) for row in told.items()])


if __name__ == "__main__":
    app.run(main)
