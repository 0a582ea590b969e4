"""How seconds and memory grow with the number of photographs, as a table and as JSON.

python benchmarks/scale.py    # 10 thousand, 100 thousand and 1 million rows; takes some minutes

Photographs are hard links to one tiny file for each folder of 10,000, and records of 8 x 8 pixels
repeat a few hundred: what is measured is all that is done a row, not what is done a pixel. A fifth
of the rows are validation images. Each stage runs in a process of its own, whose peak memory it is.
"""

import contextlib
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from absl import app, flags, logging

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from ham_jax import config as configuration  # noqa: E402
from ham_jax import console, files  # noqa: E402
from ham_jax.classes import HAM10000  # noqa: E402
from ham_jax.models import processor  # noqa: E402

_ROWS = flags.DEFINE_multi_integer("rows", [10_000, 100_000, 1_000_000], "Photographs; repeatable.")
_FOLDER = flags.DEFINE_string(
    "folder", None, "Keeps what is made there, 1 GB, for the next time; default: is made anew."
)
_ASKED = flags.DEFINE_multi_string("only", None, "Stages; repeatable. Default: all.")
_JSON = flags.DEFINE_string("json", "runs/benchmark/scale.json", "The file to write.")
_STAGE = flags.DEFINE_string("stage", None, "Internal: the stage that this process measures.")

_CANVAS = (8, 8)
_SHARES = (0.033, 0.051, 0.11, 0.0115, 0.111, 0.67, 0.0135)  # of the lesions, about HAM10000's
_IN_A_FOLDER = 10_000
_TINY = 300  # records that are drawn and decoded
_PHOTOGRAPH = b"never decoded"


def table(num_rows: int) -> pd.DataFrame:
    """Returns metadata of so many photographs, of three quarters as many lesions."""
    rng = np.random.default_rng(0)
    lesion = np.sort(rng.integers(0, num_rows * 3 // 4, num_rows))
    dx = rng.choice(list(HAM10000), num_rows, p=_SHARES)[lesion]
    return pd.DataFrame(
        {
            "image_id": [f"photo_{n:07}" for n in range(num_rows)],
            "lesion_id": [f"lesion_{n:07}" for n in lesion],
            "dx": dx,
            "dx_type": rng.choice(["histo", "follow_up", "consensus"], num_rows),
            "age": rng.choice(np.arange(5, 90, 5).astype(float), num_rows),
            "sex": rng.choice(["male", "female", "unknown"], num_rows),
            "localization": rng.choice(["back", "trunk", "face", "unknown"], num_rows),
        }
    )


def make(folder: Path, num_rows: int) -> None:
    """Makes `raw`, `prepared` and a run's `report` of so many photographs."""
    from array_record.python import array_record_module

    from ham_jax.data import records, synthetic

    rows = table(num_rows)
    for first in range(0, num_rows, _IN_A_FOLDER):
        part = folder / "raw" / f"part_{first // _IN_A_FOLDER:03}"
        part.mkdir(parents=True)
        names = rows["image_id"][first : first + _IN_A_FOLDER]
        (part / f"{names.iloc[0]}.jpg").write_bytes(_PHOTOGRAPH)
        for name in names[1:]:
            os.link(part / f"{names.iloc[0]}.jpg", part / f"{name}.jpg")
    rows.to_csv(folder / "raw" / "metadata.csv", index=False)

    synthetic.write(folder / "tiny", _TINY, 0)
    tiny = records.prepare(folder / "tiny", _CANVAS, folder / "tiny_records", allow_partial=True)
    serialized = records.open_records(tiny)._serialized
    examples = [serialized[i] for i in range(len(serialized))]
    raw = _raw(rows)
    fingerprint = records._fingerprint(raw, _CANVAS)
    made = folder / "prepared" / "ham10000" / f"8x8-{fingerprint[:10]}" / "1.0.0"
    shutil.copytree(tiny, made, ignore=shutil.ignore_patterns("*array_record*", "checksums.json"))
    shard = made / next(tiny.glob("*array_record*")).name
    writer = array_record_module.ArrayRecordWriter(str(shard), "group_size:1,uncompressed")
    for n in range(num_rows):
        writer.write(examples[n % len(examples)])
    writer.close()
    digests = [hashlib.sha256(name.encode()).hexdigest() for name in raw.table["image_id"]]
    raw.table.assign(file_sha256=digests).to_csv(made / "records.csv", index=False)
    metadata = json.loads((made / "metadata.json").read_text()) | {"fingerprint": fingerprint}
    files.write_json(made / "metadata.json", metadata)
    info = json.loads((made / "dataset_info.json").read_text())
    info["splits"][0] |= {
        "shardLengths": [str(num_rows)],
        "numBytes": str(shard.stat().st_size),
    }
    files.write_json(made / "dataset_info.json", info)
    records._write_checksums(made)
    (folder / "report").mkdir()
    _judged(num_rows).write(folder / "report" / "predictions.csv")


def _raw(rows: pd.DataFrame):
    """Returns what `layouts.find` will find, so that its records count as made."""
    from ham_jax.data import layouts

    labels = rows["dx"].map({name: k for k, name in enumerate(HAM10000)})
    whole = rows.assign(dataset="", label=labels)[["image_id", *layouts.COLUMNS, "label"]]
    return layouts.RawData(HAM10000, whole, [], [len(_PHOTOGRAPH)] * len(rows))


def _judged(num_rows: int):
    """Returns answers to a fifth of the photographs, right four times out of five."""
    from ham_jax.evaluation.predictions import METADATA, Predictions

    rows = table(num_rows)
    rows = rows[rows["lesion_id"].str[-1].isin(["0", "5"])]
    rng = np.random.default_rng(1)
    labels = rows["dx"].map({name: k for k, name in enumerate(HAM10000)}).to_numpy()
    logits = rng.normal(size=(len(rows), len(HAM10000)))
    logits[np.arange(len(rows)), labels] += 3
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    lesions, ids = rows["lesion_id"].to_numpy(), rows["image_id"].to_numpy()
    return Predictions(HAM10000, labels, probabilities, lesions, ids, rows[list(METADATA)])


# ---- the stages: each prepares, untimed, and returns what is timed


def metadata(folder: Path) -> Callable[[], object]:
    """A first start, up to the photographs: walk, tables, their checks, fingerprint, manifest."""
    from ham_jax.data import records

    return lambda: records.prepare(folder / "raw", _CANVAS, folder / "prepared")


def split(folder: Path) -> Callable[[], object]:
    """Folds of whole lesions."""
    from ham_jax.data import splits

    opened, data = _opened(folder), _config(folder).data
    return lambda: splits.assign(opened.table, data, 0)


def audit(folder: Path) -> Callable[[], object]:
    """The audit of a split."""
    from ham_jax.data import splits

    opened, data = _opened(folder), _config(folder).data
    assigned = splits.assign(opened.table, data, 0)
    return lambda: splits.audit(opened.table, assigned, opened.classes)


def start(folder: Path) -> Callable[[], object]:
    """From the configuration to the first batch on the device: any start but the first."""
    from ham_jax import parallel
    from ham_jax.data import feed, prepare

    def first_batch():
        images = prepare.prepare(_config(folder)).select("train")
        order = feed.shuffled(images.rows, 64, 0)
        batches = feed.batches("stream", images, order, [range(1), range(1, 2)], parallel.mesh())
        next(batches)["image"].block_until_ready()

    return first_batch


def epoch(folder: Path) -> Callable[[], object]:
    """The order of an epoch of batches of 64."""
    from ham_jax.data import feed

    num_rows = len(_opened(folder).table)
    order = feed.shuffled(np.arange(num_rows), 64, 0)
    return lambda: [order(step) for step in range(num_rows // 64)]


def bootstrap(folder: Path) -> Callable[[], object]:
    """The intervals of all figures of the validation images."""
    from ham_jax.evaluation import bootstrap, predictions

    judged = predictions.read(folder / "report" / "predictions.csv", HAM10000)
    return lambda: bootstrap.intervals(judged)


def report(folder: Path) -> Callable[[], object]:
    """`--mode=report` of the validation images."""
    from ham_jax.evaluation import report

    return lambda: report.run(folder / "report")


def _opened(folder: Path):
    from ham_jax.data import records

    return records.open_records(folder / "prepared")


def _config(folder: Path):
    config = configuration.base()
    config.data.update(dir=str(folder / "raw"), prepared_dir=str(folder / "prepared"))
    config.data.canvas = _CANVAS
    return config


_STAGES = {f.__name__: f for f in (metadata, split, audit, start, epoch, bootstrap, report)}
flags.register_validator(
    "only", lambda asked: set(asked or ()) <= set(_STAGES), f"must be of {', '.join(_STAGES)}."
)


def main(argv: list[str]) -> None:
    """Measures all stages, or is one of their processes."""
    logging.set_verbosity(logging.WARNING)
    if _STAGE.value:
        _worker(Path(argv[1]), _STAGE.value)
        return
    results: dict[str, list] = {}
    with contextlib.ExitStack() as stack:
        kept = _FOLDER.value or stack.enter_context(tempfile.TemporaryDirectory())
        for num_rows in _ROWS.value:
            folder = Path(kept, str(num_rows))
            if not folder.exists():
                make(folder, num_rows)
            for stage in _ASKED.value or _STAGES:
                results.setdefault(stage, []).append(_measured(stage, folder))
    rows = [
        [
            stage,
            *(
                f"{m['seconds']:.2f} s ({m['cpu_s']:.2f} of CPU), {m['peak_mb']:,.0f} MB"
                for m in of_stage
            ),
        ]
        for stage, of_stage in results.items()
    ]
    console.print_table("rows", ["stage", *(f"{n:,}" for n in _ROWS.value)], rows)
    output = Path(_JSON.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(
        output, {"rows": _ROWS.value, "processor": processor.describe(), "stages": results}
    )
    print(f"Written: {output}")


def _measured(stage: str, folder: Path) -> dict[str, float]:
    """Returns what the stage's process measured, and its seconds with start and imports."""
    command = [sys.executable, __file__, f"--stage={stage}", str(folder)]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    taken = time.perf_counter() - began
    measured = json.loads(done.stdout.splitlines()[-1]) | {"process_s": taken}
    console.log_line(f"{folder.name} {stage}: {measured}")
    return measured


def _worker(folder: Path, stage: str) -> None:
    work = _STAGES[stage](folder)
    began, cpu_began = time.perf_counter(), time.process_time()
    work()
    measured = {
        "seconds": time.perf_counter() - began,
        "cpu_s": time.process_time() - cpu_began,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(measured))


if __name__ == "__main__":
    app.run(main)
