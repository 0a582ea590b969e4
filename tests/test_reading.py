"""Files that a stranger made are read, or refused before they take time or memory."""

import io
import os
import runpy
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ham_jax import reading

attacks = runpy.run_path(Path(__file__).with_name("attacks.py"))
GIGABYTES, Cheap, zeros, zip_of = (attacks[n] for n in ("GIGABYTES", "Cheap", "zeros", "zip_of"))


def npy_header(shape, dtype="|u1", version=1):
    header = io.BytesIO()
    write = getattr(np.lib.format, f"write_array_header_{version}_0")
    write(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    return header.getvalue()


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        for read in (reading.open_regular, reading.read_json, reading.open_zip, reading.open_text):
            with pytest.raises(OSError, match=r"regular file"):
                read(path)


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"3", b'{"a":', b"[" * 100_000, b'{"a": ' * 100_000, b'{"a": "\\ud800"}', b"\xff"],
)
def test_only_a_json_object_is_read(text, tmp_path):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"."):
        reading.read_json(tmp_path / "x.json")


def test_a_file_larger_than_any_honest_one_is_not_read(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(GIGABYTES)
    with Cheap(), pytest.raises(OSError, match="3,221,225,472 bytes are more"):
        reading.read_json(tmp_path / "x.json")


@pytest.mark.parametrize("size", [GIGABYTES, 1000])  # what it says; it is always the former
def test_a_zip_bomb_is_not_unpacked(size, tmp_path):
    bomb = zip_of(tmp_path / "x.zip", {"a": (zeros(GIGABYTES), size)})
    refused = pytest.raises((OSError, zipfile.BadZipFile), match=r"unpack to|CRC")
    with Cheap(), reading.open_zip(bomb) as file, refused:
        reading.read_member(file, "a", 4 * GIGABYTES)


def test_members_are_unpacked_by_deflate_alone(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_LZMA) as file:
        file.writestr("a", bytes(1000))
    with reading.open_zip(tmp_path / "x.zip") as file, pytest.raises(OSError, match="by lzma"):
        reading.read_member(file, "a", 1000)


@pytest.mark.parametrize("is_zip64", [False, True])
def test_members_are_counted_before_they_are_listed(is_zip64, tmp_path):
    many = 300_000
    entry = b"PK\1\2" + struct.pack("<HHHHHHIIIHHHHHII", *[0] * 16)
    said = 0xFFFF if is_zip64 else 7
    zip64 = b"PK\6\6" + struct.pack(
        "<QHHIIQQQQ", 44, 45, 45, 0, 0, many, many, many * len(entry), 0
    )
    zip64 += b"PK\6\7" + struct.pack("<IQI", 0, many * len(entry), 1)
    end = struct.pack(
        "<HHHHIIH", 0, 0, said, said, 0xFFFFFFFF if is_zip64 else many * len(entry), 0, 0
    )
    path = tmp_path / "x.zip"
    path.write_bytes(entry * many + (zip64 if is_zip64 else b"") + b"PK\5\6" + end)
    with Cheap(), pytest.raises(zipfile.BadZipFile, match="more than 200,000 members"):
        reading.open_zip(path)


@pytest.mark.parametrize(
    "content",
    [
        npy_header((1 << 40,)) + bytes(100),
        npy_header((1 << 40,), "|V0"),
        npy_header((1,), "|O") + bytes(8),
        b"\x93NUMPY\x02\0" + struct.pack("<I", 1 << 31) + b"{",
        b"\x93NUMPY\x01\0" + struct.pack("<H", 9000) + b"(" * 9000,
        b"\x93NUMPY\x01\0" + struct.pack("<H", 9000) + b"-" * 9000,
        npy_header((1,))[:20],
        b"\x93NUMPY\x09\0",
        b"",
    ],
)
def test_an_array_is_no_more_than_its_member(content, tmp_path):
    path = zip_of(tmp_path / "x.npz", {"a.npy": (content, None)})
    with Cheap(), pytest.raises(ValueError, match=r"."):
        reading.read_npz(path, GIGABYTES)


def test_arrays_of_either_order_and_packing(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.float32(7), "c": np.zeros((0, 3))}
    arrays["d"] = np.asfortranarray(arrays["a"])
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        back = reading.read_npz(tmp_path / "x.npz", 1000)
        assert back.keys() == arrays.keys()
        for name, value in arrays.items():
            np.testing.assert_array_equal(back[name], value)
    with pytest.raises(OSError, match="100 are the most"):
        reading.read_npz(tmp_path / "x.npz", 100)
