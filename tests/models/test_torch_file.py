"""A pickle that attacks is refused: nothing runs, nothing hangs, and no memory is filled."""

import pickle
import runpy
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from ham_jax.config import InputError
from ham_jax.models import torch_file

attacks = runpy.run_path(Path(__file__).parents[1] / "attacks.py")
GIGABYTES, Cheap, zeros, zip_of = (attacks[n] for n in ("GIGABYTES", "Cheap", "zeros", "zip_of"))
MAGIC = b"".join(pickle.dumps(part, 2) for part in (torch_file._MAGIC, 1001, {}))
LAUGHS = b"(NNt" + b"2\x86" * 60  # a pair of pairs of pairs: 2**61 parts
STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuM\0\1tQ"
NAME = b"X\1\0\0\0w"


def number(value):
    return b"\x8a\x09" + value.to_bytes(9, "little")


def rebuilt(*parts):
    """Returns opcodes of a call with storage, offset, shape, strides."""
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + b"".join(parts) + b"\x89NtR"


def tensor(shape, strides):
    return rebuilt(
        STORAGE, b"K\0", *(b"(" + b"".join(map(number, n)) + b"t" for n in (shape, strides))
    )


def write(path, opcodes, raw=bytes(1024)):
    members = {"a/data.pkl": (b"\x80\2" + opcodes + b".", None), "a/data/0": (raw, None)}
    return zip_of(path, members)


def test_the_opcodes_below_make_a_tensor(tmp_path):
    path = write(tmp_path / "x.pth", b"}" + NAME + tensor((2, 2), (0, 1)) + b"s")
    np.testing.assert_array_equal(torch_file.read(path)["w"], np.zeros((2, 2)))


ATTACKS = {
    "a memo of 2**32": b"}r\xff\xff\xff\x7f" + NAME + b"h\1s",
    "a value of many parts": b"}" + NAME + LAUGHS + b"s",
    "a key of many parts": b"}" + LAUGHS + b"Ns",
    "keys of many parts": b"}(" + LAUGHS + b"Nu",
    "a dict of many parts": b"(" + LAUGHS + b"Nd",
    "an OrderedDict of many parts": b"ccollections\nOrderedDict\n(]" + LAUGHS + b"N\x86atR",
    "a set of many parts": b"\x8f(" + LAUGHS + b"\x90",
    "a storage of many parts": b"}" + NAME + LAUGHS + b"Qs",
    "a storage's type of many parts": b"(X\7\0\0\0storage" + LAUGHS + b"NNM\0\1tQ",
    "a storage's name of many parts": b"(X\7\0\0\0storagectorch\nFloatStorage\n"
    + LAUGHS
    + b"NM\0\1tQ",
    "a tensor of many parts": b"}" + NAME + rebuilt(STORAGE, LAUGHS, LAUGHS, LAUGHS) + b"s",
    "a tensor of no storage": b"}" + NAME + rebuilt(LAUGHS, NAME, b"\x86K\0))") + b"s",
    "a shape of many parts": b"ctorch\nSize\n(" + LAUGHS + b"tR",
    "depth": b"}" + NAME + b")" + b"\x85" * 50_000 + b"s",
    "a key's depth": b"})" + b"\x85" * 100_000 + b"Ns",
    "itself": b"}q\0" + NAME + b"h\0s",
    "copies of a list": b"](" + b"N" * 50_000 + b"eq\0ctorch\nSize\nq\1" + b"h\1h\0\x85R" * 50_000,
    "keys in one place": b"}("
    + b"".join(
        b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(1, 30_000)
    )
    + b"u",
    "a memo in one place": b"}" + b"".join(b"p%d\n" % (k * (2**61 - 1)) for k in range(1, 30_000)),
    "many containers": b"}" + NAME + b"](" + b"}" * 600_000 + b"es",
    "a tensor of strides 0": b"}" + NAME + tensor((1 << 40,), (0,)) + b"s",
    "a length of 2**40": b"}\x8e" + struct.pack("<Q", 1 << 40),
    "an array of 2**40 bytes": b"}\x96" + struct.pack("<Q", 1 << 40),
    "a million digits": b"}I" + b"9" * 1_000_000 + b"\n",
    "numbers of a megabyte": b"}" + NAME + b"\x8b" + struct.pack("<I", 1 << 20) + bytes(1 << 20),
    "an old class": b"(iposix\nsystem\n",
    "an extension": b"\x82\1",
    "a method": NAME + b"cbuiltins\ngetattr\n" + NAME + b"\x86R",
}


@pytest.mark.parametrize("opcodes", ATTACKS.values(), ids=ATTACKS)
def test_a_small_pickle_takes_little(opcodes, tmp_path):
    path = write(tmp_path / "x.pth", opcodes)
    started = time.process_time()
    with Cheap(), pytest.raises(InputError, match=r"x\.pth"):
        torch_file.read(path)
    assert time.process_time() - started < 5  # with the memory traced; else a second


@pytest.mark.parametrize("size", [GIGABYTES, 1024])
@pytest.mark.parametrize("member", ["a/data.pkl", "a/data/0"])
def test_a_zip_bomb_is_refused(member, size, tmp_path):
    members = {"a/data.pkl": (b"\x80\2}" + NAME + tensor((256,), (1,)) + b"s.", None)}
    path = zip_of(tmp_path / "x.pth", members | {member: (zeros(GIGABYTES), size)})
    with Cheap(), pytest.raises(InputError, match=r"x\.pth"):
        torch_file.read(path)


def test_views_of_one_storage_take_no_memory(tmp_path):
    names = (b"X\4\0\0\0%04d" % k for k in range(500))
    opcodes = b"".join(name + tensor((1 << 18,), (1,)) for name in names)
    path = write(tmp_path / "x.pth", b"}(" + opcodes + b"u", bytes(1 << 20))
    with Cheap():
        assert len(torch_file.read(path)) == 500


@pytest.mark.parametrize(
    "rest",
    [
        b"}" + NAME + tensor((4,), (1,)) + b"s.](X\1\0\0\x000e." + struct.pack("<Q", 1 << 40),
        b"}" + NAME + tensor((4,), (1,)) + b"s.](" + LAUGHS + b"e." + struct.pack("<Q", 4),
        b"V" + b"a" * 1_000_000,
        b"\x8e" + struct.pack("<Q", GIGABYTES),
    ],
)
def test_an_old_file_is_refused_likewise(rest, tmp_path):
    (tmp_path / "x.pth").write_bytes(MAGIC + rest + bytes(64))
    with (tmp_path / "x.pth").open("ab") as file:
        file.truncate(2 * GIGABYTES)
    with Cheap(), pytest.raises(InputError, match=r"x\.pth"):
        torch_file.read(tmp_path / "x.pth")


def test_what_the_network_has_room_for_is_read_and_no_more(tmp_path):
    path = write(tmp_path / "x.pth", b"}" + NAME + tensor((256,), (1,)) + b"s")
    assert torch_file.read(path, 1024)["w"].shape == (256,)
    with pytest.raises(InputError, match="1,023 are the most"):
        torch_file.read(path, 1023)
