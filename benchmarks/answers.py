"""Answers about photographs: ours, ONNX Runtime and PyTorch take turns, decoding included.

python benchmarks/answers.py --model=EXPORTED --originals=FOLDER --torch_python=...

Each contestant answers a list of JPEG files, and then one file after the other, each by itself,
through the model that it has loaded. ONNX Runtime is asked as examples/onnx_predict.py asks it, in
batches and with Pillow in threads; PyTorch with the same network in `channels_last` behind a
DataLoader. The files are those of --originals over and over.
"""

import functools
import importlib.util
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from absl import app, flags, logging

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import speed  # noqa: E402  (its contestants, and its flags --rounds, --originals, --torch_python)

from ham_jax import console, files  # noqa: E402
from ham_jax.models import processor  # noqa: E402

_MODEL = flags.DEFINE_string("model", None, "The folder of a run or an exported network.")
_VIEWS = flags.DEFINE_multi_integer("views", [1, 8], "eval.tta; may be repeated.")
_NUM = flags.DEFINE_integer("photographs", 2000, "How many files a turn has.", 1)
_ALONE = flags.DEFINE_integer("alone", 50, "How many of them are asked one by one.", 1)
_ONNX = flags.DEFINE_string("onnx", None, "Internal: the file that a worker asks.")
_BATCH = 8  # of ONNX Runtime and PyTorch: larger ones were no faster


def _files(num: int) -> list[str]:
    found = sorted(map(str, Path(speed._ORIGINALS.value or ".").rglob("*.jpg")))
    return (found * (num // len(found) + 1))[:num]


def _ours() -> Callable[[Sequence[str]], Any]:
    import ham_jax

    return ham_jax.load(_MODEL.value, overrides=[("eval.tta", str(_VIEWS.value[0]))]).predict


def _onnx_runtime() -> Callable[[Sequence[str]], Any]:
    import numpy as np
    import onnxruntime

    spec = importlib.util.spec_from_file_location("peer", ROOT / "examples" / "onnx_predict.py")
    assert spec
    assert spec.loader
    peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    session = onnxruntime.InferenceSession(_ONNX.value, providers=["CPUExecutionProvider"])
    canvas = json.loads(session.get_modelmeta().custom_metadata_map["canvas"])
    decode = functools.partial(peer.on_canvas, height=canvas[0], width=canvas[1])
    pool = ThreadPoolExecutor(os.cpu_count())

    def batches(paths: Sequence[str]) -> Iterator[list[Any]]:
        """Decodes a few batches ahead."""
        parts = [paths[n : n + _BATCH] for n in range(0, len(paths), _BATCH)]
        ahead = [[pool.submit(decode, path) for path in part] for part in parts[:4]]
        for number in range(len(parts)):
            yield [decoded.result() for decoded in ahead.pop(0)]
            ahead += [[pool.submit(decode, p) for p in part] for part in parts[number + 4 :][:1]]

    def ask(paths: Sequence[str]) -> Any:
        return [session.run(None, {"image": np.stack(batch)}) for batch in batches(paths)]

    return ask


def _worker(name: str) -> None:
    """Answers so many photographs in one call, or, below 0, so many one by one."""
    ask = {"ours": _ours, "ONNX Runtime": _onnx_runtime}[name]()
    ask(_files(2 * _BATCH))
    ask(_files(1))
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        num = int(line)
        paths = _files(abs(num))
        start = time.perf_counter()
        for part in [paths] if num > 0 else [[path] for path in paths]:
            ask(part)
        print(time.perf_counter() - start, flush=True)


def _compare(views: int, folder: str) -> dict[str, Any]:
    """Lets the contestants have their turns; returns and prints their rates."""
    import ham_jax
    from ham_jax.export import onnx

    file = Path(folder) / f"{views}.onnx"
    model = ham_jax.load(_MODEL.value, overrides=[("eval.tta", str(views))])
    assert isinstance(model, ham_jax.Model), "one network, not several"
    onnx.write(model, file)
    own = [sys.executable, __file__, f"--model={_MODEL.value}", f"--views={views}"]
    own += [f"--originals={speed._ORIGINALS.value}", f"--onnx={file}"]
    commands = {name: [*own, f"--contestant={name}"] for name in ("ours", "ONNX Runtime")}
    if speed._has_torch():
        peer = [speed._TORCH.value, str(ROOT / "benchmarks" / "peers" / "torch_answers.py")]
        height, width = model.canvas
        peer += [f"--model={model.config.model.name}", f"--px={model.config.augment.crop_px}"]
        peer += [f"--canvas={height}x{width}", f"--views={views}", f"--batch={_BATCH}"]
        commands["PyTorch"] = [*peer, f"--images={speed._ORIGINALS.value}"]
    results = {}
    for what, num in (("in a list", _NUM.value), ("one by one", -_ALONE.value)):
        title = f"{abs(num)} photographs {what}, {views} view(s)"
        with console.progress(title) as progress:
            rates: dict[str, list[float]] = {name: [] for name in commands}
            # A contestant that waits still has threads that spin, and memory: so they come and go.
            for number in range(speed._ROUNDS.value):
                for name, command in commands.items():
                    with speed.Contestant(name, command) as contestant:
                        rates[name].append(abs(num) / contestant.work(num))
                progress(number + 1, speed._ROUNDS.value)
        results[what] = speed.compared(rates)
        speed._table(f"{title}: photographs/s", results[what])
    return results


def main(argv: list[str]) -> None:
    """Compares, or works as a contestant."""
    del argv
    logging.set_verbosity(logging.WARNING)
    if not (_MODEL.value and speed._ORIGINALS.value):
        raise app.UsageError("Say --model=FOLDER and --originals=FOLDER.")
    if speed._CONTESTANT.value:
        _worker(speed._CONTESTANT.value)
        return
    if not next(Path(speed._ORIGINALS.value).rglob("*.jpg"), None):
        raise app.UsageError(f"--originals={speed._ORIGINALS.value} has no .jpg below it.")
    with tempfile.TemporaryDirectory() as folder:
        results = {str(views): _compare(views, folder) for views in _VIEWS.value}
    output = Path(speed._JSON.value or "runs/benchmark/answers.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "command": shlex.join(["python", "benchmarks/answers.py", *sys.argv[1:]]),
        "rounds": speed._ROUNDS.value,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "processor": processor.describe(),
    }
    files.write_json(output, {**about, "results": results})
    print(f"Written: {output}")


if __name__ == "__main__":
    app.run(main)
