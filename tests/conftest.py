"""Eight virtual CPU devices for every test, and data that several of them use."""

import hashlib
import os
from pathlib import Path

# Read by jax when it is first imported, so they are set before any test module is.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# A network compiled by one test is not compiled again by the next, nor by the next run.
_CACHE = Path(__file__).parents[1] / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# LLVM's third level compiles the draws of initial weights for ten times as long as the second, to
# the same bits. 3 in XLA_FLAGS brings it back.
_LEVEL = "--xla_backend_optimization_level"
if _LEVEL not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_LEVEL}=2".strip()

import pytest  # noqa: E402

# The longest files, which start first, so that no process waits for the other's last one.
_LONGEST = ("test_slurm", "test_loop", "test_predict", "test_crossval", "test_records")

# Files, and single tests of others, that train, compile networks, start processes or try a
# thousand cases. All other tests are `fast`.
_SLOW = {
    *_LONGEST,
    *("test_checkpoints", "test_launch", "test_main", "test_page", "test_parallel", "test_serve"),
    *(
        "test_feed",
        "test_layouts",
        "test_prepare",
        "test_preprocess",
        "test_model",
        "test_old_runs",
        "test_speed",
        "test_compile_ahead",
    ),
    *("test_onnx", "test_stablehlo", "test_released"),
    *("test_calibration", "test_corruptions", "test_explain", "test_report"),
    *("test_robustness", "test_subgroups", "test_export"),
    *("test_classifier", "test_conv", "test_convnext", "test_efficientnet", "test_resnet"),
    *(
        "test_pretrained",
        "test_augment",
        "test_turn",
        "test_norm",
        "test_distill",
        "test_step",
        "test_losses",
        "test_optim",
        "test_streams",
    ),
    "test_the_demonstration_with_other_classes_in_every_mode",
    "test_any_text_for_any_key_is_set_or_refused_never_a_crash",
    "test_a_thousand_submissions_score_as_the_official_scorer_scored_them",
}
_FAST_S = 10  # of processor time, with what is compiled, that a fast test may take


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    order = {name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        if not _SLOW & {item.path.stem, item.originalname}:
            item.add_marker(pytest.mark.fast)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fails a fast test that has become slow."""
    before = sum(os.times()[:4])
    result = yield
    spent = sum(os.times()[:4]) - before
    if item.get_closest_marker("fast") and spent > _FAST_S:
        pytest.fail(
            f"It took {spent:.0f} s of processor time: make it smaller, or name it or its file"
            " among the slow ones in tests/conftest.py."
        )
    return result


@pytest.fixture(scope="module")
def small_resnet18():
    """Makes resnet18 one narrow block: it compiles in a fraction of the time."""
    from ham_jax.models import resnet

    with pytest.MonkeyPatch.context() as patch:
        _narrow(patch, resnet)
        yield


@pytest.fixture(scope="module")
def two_blocks():
    """Makes resnet18 two narrow blocks, of which the second has a stride and a shortcut."""
    from ham_jax.models import resnet

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet, "_WIDTHS", (16, 32))
        patch.setitem(resnet.DEPTHS, "resnet18", (1, 1))
        yield


def _narrow(patch, resnet):
    patch.setattr(resnet, "_WIDTHS", (16,))
    patch.setitem(resnet.DEPTHS, "resnet18", (1,))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with `ham10000/` and `originals_600x450/`; skips the test where it is absent."""
    beside = Path(__file__).parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("HAM_JAX_DATA") or beside)
    if not (folder / "ham10000").is_dir():
        pytest.skip(f"no HAM10000 in {folder}; set HAM_JAX_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_raw(tmp_path_factory) -> Path:
    """200 synthetic lesions in the Kaggle layout."""
    from ham_jax.data import synthetic

    folder = tmp_path_factory.mktemp("synthetic") / "ham10000"
    synthetic.write(folder, 200, 0)
    return folder


@pytest.fixture(scope="session")
def tiny_records(tiny_raw, tmp_path_factory) -> Path:
    """The same as records of 24 x 32 pixels."""
    from ham_jax.data import records

    prepared = tmp_path_factory.mktemp("prepared")
    return records.prepare(tiny_raw, (24, 32), prepared, allow_partial=True, num_workers=1)


class NeverStop:
    """A `parallel.Preemption` that nobody asks to stop."""

    exit_code = 75

    def reached(self):
        return False


@pytest.fixture(scope="session")
def tiny_run(tiny_records, tmp_path_factory):
    """Gives the folder of a run of two steps, to be read only; equal ones are trained once."""
    import fcntl
    import json

    from ham_jax import config, parallel
    from ham_jax.models import resnet
    from ham_jax.training import loop

    # Below the folder that the processes of a parallel session share.
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "runs"
    shared.mkdir(exist_ok=True)

    def run(**edits):
        folder = shared / hashlib.sha256(json.dumps(edits).encode()).hexdigest()[:8]
        with open(f"{folder}.lock", "w") as lock, pytest.MonkeyPatch.context() as patch:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder
            _narrow(patch, resnet)
            c = config.base()
            c.data.dir = str(tiny_records)
            c.data.canvas = (24, 32)
            c.data.num_folds = 3
            c.model.stem = "small"
            c.augment.crop_px = 16
            c.optim.warmup = {"steps": 0}
            c.train.batch_size = 8
            c.train.duration = {"steps": 2}
            c.log.tensorboard = False
            assert config.override(c, list(edits.items())) == []
            loop.train(c, Path(f"{folder}.new"), parallel.mesh(), NeverStop())
            os.rename(f"{folder}.new", folder)
        return folder

    return run
