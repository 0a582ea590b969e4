"""Orbax and TFDS take every path as it is, and work for a user who is only a number."""

import grp
import pwd

import numpy as np

from ham_jax.data import records
from ham_jax.local_path import LocalPath


def test_every_character_means_itself(tmp_path):
    folder = tmp_path / "a[1]*"
    (folder / "sub").mkdir(parents=True)
    for name in ("process_0", "process_1", "other"):
        (folder / name).touch()
    found = sorted((LocalPath(tmp_path) / "a[1]*").glob("process_*"))
    assert [path.name for path in found] == ["process_0", "process_1"]
    assert all(isinstance(path, LocalPath) for path in found)


def test_an_owner_needs_no_name_and_a_folder_may_have_any(tiny_raw, tmp_path, monkeypatch):
    def unknown(number):
        raise KeyError(f"uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(grp, "getgrgid", unknown)
    prepared = tmp_path / "[2024] x"
    folder = records.prepare(tiny_raw, (16, 16), prepared, allow_partial=True, num_workers=1)
    assert records.open_records(folder).read(np.arange(3)).any()
