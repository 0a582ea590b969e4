"""Eight virtual CPU devices for every test, and data that several of them use."""

import os
from pathlib import Path

# Read by jax when it is first imported, so they are set before any test module is.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# A network compiled by one test is not compiled again by the next, nor by the next run.
_CACHE = Path(__file__).parents[1] / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import pytest  # noqa: E402

# The longest files, which start first, so that no process waits for the other's last one.
_LONGEST = ("test_slurm", "test_loop", "test_predict", "test_crossval", "test_records")


def pytest_collection_modifyitems(items):
    order = {name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


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
