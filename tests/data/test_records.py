"""Records are the photographs, made once; damaged ones are told."""

import contextlib
import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from ham_jax import config, console
from ham_jax.classes import HAM10000, Classes
from ham_jax.config import InputError
from ham_jax.data import image, layouts, records
from ham_jax.data import prepare as preparation
from ham_jax.data.records import open_records

attacks = runpy.run_path(str(Path(__file__).parents[1] / "attacks.py"))
made = runpy.run_path(str(Path(__file__).with_name("raw_folders.py")))
ROWS, IDS, jpeg = (made[name] for name in ("ROWS", "IDS", "jpeg"))
kaggle, dataverse = made["kaggle"], made["dataverse"]
CANVAS = (24, 32)


def prepare(raw: Path, out: Path, **kwargs) -> Path:
    return records.prepare(raw, CANVAS, out, allow_partial=True, num_workers=1, **kwargs)


@pytest.fixture
def prepared(tmp_path) -> Path:
    return prepare(kaggle(tmp_path / "raw"), tmp_path / "out")


def test_records_are_the_photographs(prepared, tmp_path):
    records = open_records(prepared)
    assert records.canvas == CANVAS
    raw = layouts.find(tmp_path / "raw", allow_partial=True)
    pd.testing.assert_frame_equal(records.table.drop(columns="file_sha256"), raw.table)
    digests = [hashlib.sha256(jpeg(name)).hexdigest() for name in IDS]
    assert list(records.table["file_sha256"]) == digests
    expected = np.stack([image.load(jpeg(name), CANVAS) for name in IDS])
    order = np.array([6, 0, 3, 3, 1])
    np.testing.assert_array_equal(records.read(order), expected[order])
    assert records.read(np.array([], int)).shape == (0, *CANVAS, 3)
    with ThreadPoolExecutor(8) as pool:
        draws = [np.random.default_rng(i).integers(0, 7, 20) for i in range(50)]
        for draw, images in zip(draws, pool.map(records.read, draws), strict=True):
            np.testing.assert_array_equal(images, expected[draw])


def test_tfds_reads_every_field(prepared):
    example = tfds.builder_from_directory(prepared).as_data_source("images")[2]
    np.testing.assert_array_equal(example["image"], image.load(jpeg(IDS[2]), CANVAS))
    assert HAM10000.names[example["label"]] == "akiec"
    texts = {key: value.decode() for key, value in example.items() if isinstance(value, bytes)}
    assert texts.pop("file_sha256") == hashlib.sha256(jpeg(IDS[2])).hexdigest()
    assert texts == {**dict(ROWS.loc[3].drop("age")), "dataset": ""}
    assert example["age"] == 0


def test_records_are_made_once_and_again_when_the_photographs_change(
    prepared, tmp_path, monkeypatch
):
    done = []
    monkeypatch.setattr(image, "load_many", lambda *_: pytest.fail("decoded again"))
    assert prepare(tmp_path / "raw", tmp_path / "out") == prepared
    monkeypatch.undo()
    for path in (tmp_path / "raw").glob(f"*/{IDS[0]}.jpg"):
        path.write_bytes(jpeg("another picture") + b"longer")
    told = contextlib.nullcontext(lambda *at: done.append(at))
    monkeypatch.setattr(console, "progress", lambda _: told)
    again = prepare(tmp_path / "raw", tmp_path / "out")
    assert again != prepared
    assert done == [(i, 7) for i in range(1, 8)]
    assert open_records(again).fingerprint != open_records(prepared).fingerprint


@pytest.fixture
def looks(monkeypatch):
    """Grows by one whenever the photographs and their tables are looked through."""
    done, find = [], layouts.find
    monkeypatch.setattr(layouts, "find", lambda *a, **k: done.append(1) or find(*a, **k))
    return done


def test_a_start_reads_no_table_and_asks_once_for_each_file(prepared, tmp_path, looks, monkeypatch):
    raw, asked = tmp_path / "raw", []
    count = sum(path.is_file() for path in raw.rglob("*"))
    monkeypatch.setattr(layouts.tables, "read", lambda *_: pytest.fail("reads a table"))
    with monkeypatch.context() as patch:
        for name in ("stat", "lstat", "scandir", "listdir"):
            real = getattr(os, name)
            patch.setattr(os, name, lambda *a, _f=real, **k: asked.append(a) or _f(*a, **k))
        assert prepare(raw, tmp_path / "out") == prepared
    of_raw = [a for a in asked if a and str(a[0]).startswith(f"{raw}/")]
    num_folders = sum(path.is_dir() for path in raw.rglob("*"))
    assert len(of_raw) <= count + 3 * num_folders
    assert looks == []


def test_whatever_changes_in_the_folder_is_noticed(prepared, tmp_path, looks):
    raw, out = tmp_path / "raw", tmp_path / "out"
    first, other = raw / "HAM10000_images_part_1" / f"{IDS[0]}.jpg", tmp_path / "other.jpg"
    table = raw / "HAM10000_metadata.csv"
    other.write_bytes(first.read_bytes())
    changes = [
        lambda: os.utime(first, ns=(0, 0)),
        lambda: os.replace(other, first),
        lambda: table.write_text(table.read_text().replace("45.0", "46.0")),  # of the same size
        lambda: (raw / "new").mkdir() or shutil.copy(first, raw / "new"),
        lambda: shutil.rmtree(raw / "new"),
        lambda: first.unlink(),
        lambda: (raw / "lost.jpg").symlink_to("nowhere"),
    ]
    for number, change in enumerate(changes, 1):
        change()
        with contextlib.suppress(InputError):  # of the link that leads nowhere
            prepare(raw, out)
        assert len(looks) == number
    (raw / "lost.jpg").unlink()
    prepare(raw, out)  # all is as it was noted last
    assert len(looks) == len(changes)
    for path in (out / "ham10000").glob(".seen-*"):
        path.write_bytes(b'{"version": 1}')
    prepare(raw, out)
    assert len(looks) == len(changes) + 1


def test_another_photograph_of_the_same_size_is_told(prepared, tmp_path, looks):
    (first, _) = (tmp_path / "raw").glob(f"*/{IDS[0]}.jpg")
    whole = first.read_bytes()
    first.write_bytes(whole[:300] + bytes([whole[300] ^ 1]) + whole[301:])
    for _ in range(2):
        with pytest.raises(InputError, match=rf"1 photographs are not .*{first}.*Delete") as error:
            prepare(tmp_path / "raw", tmp_path / "out")
    assert str(prepared) in str(error.value)
    first.write_bytes(whole)
    assert prepare(tmp_path / "raw", tmp_path / "out") == prepared
    assert len(looks) == 3
    assert prepare(tmp_path / "raw", tmp_path / "out") == prepared
    assert len(looks) == 3


def test_where_nothing_can_be_noted_a_line_says_so(prepared, tmp_path, looks, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    for path in (tmp_path / "out" / "ham10000").glob(".seen-*"):  # as of an earlier version
        path.unlink()
    monkeypatch.setattr(records.files, "write_bytes", refuse)
    for _ in range(2):
        assert prepare(tmp_path / "raw", tmp_path / "out") == prepared
    assert len(looks) == 2
    assert capsys.readouterr().err.count("read anew at each start") == 1


def test_records_move_without_the_photographs(prepared, tmp_path):
    moved = tmp_path / "elsewhere"
    (tmp_path / "out").rename(moved)
    folder = prepare(moved, tmp_path / "unused")
    assert moved in folder.parents
    assert not (tmp_path / "unused").exists()
    assert open_records(moved).read(np.arange(7)).shape == (7, *CANVAS, 3)
    with pytest.raises(InputError, match=r"(?s)data.canvas = \(48, 64\).*\(24, 32\)"):
        records.prepare(moved, (48, 64), tmp_path / "unused")


def test_records_that_lost_bytes_are_refused(prepared):
    (path,) = prepared.glob("*.array_record*")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="damaged"):
        open_records(prepared)


@settings(max_examples=120, deadline=None)
@given(st.data(), st.sampled_from([True, True, True, False]))
def test_a_flipped_bit_is_told_or_harmless(tiny_records, tmp_path_factory, data, has_checksums):
    folder = tmp_path_factory.getbasetemp() / "flipped"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny_records, folder)
    if not has_checksums:  # as of records that were made before there were any
        (folder / "checksums.json").unlink()
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    try:
        records = open_records(folder)
        images = records.read(np.arange(len(records.table)))
    except InputError as error:
        name = ".array_record" if ".array_record" in path.name else path.name
        parts = [str(folder), "again", *([name] if has_checksums else [])]
        assert [part for part in parts if part not in str(error)] == []  # noqa: PT017, most are read
        return
    whole = open_records(tiny_records)
    np.testing.assert_array_equal(images, whole.read(np.arange(len(whole.table))))
    if has_checksums:
        pd.testing.assert_frame_equal(records.table, whole.table)
        assert (records.canvas, records.fingerprint) == (whole.canvas, whole.fingerprint)


@pytest.mark.parametrize("has_checksums", [True, False])
@pytest.mark.parametrize("name", ["records.csv", "metadata.json", "features.json"])
def test_records_that_lost_a_file_or_hold_a_pipe_are_refused(name, has_checksums, prepared):
    if not has_checksums:
        (prepared / "checksums.json").unlink()
    for make in (os.mkfifo, lambda path: None):
        (prepared / name).unlink()
        make(prepared / name)
        with pytest.raises(InputError, match=rf"{name}|0 sets of records"):
            open_records(prepared)


def test_a_member_of_a_zip_that_attacks_is_named(tmp_path):
    raw = dataverse(tmp_path / "raw")
    members = {
        "bomb/ISIC_0024306.jpg": (attacks["zeros"](3 << 30), 3 << 30),
        "../../away/ISIC_0024306.jpg": (b"not read", None),
        "lies/ISIC_0024307.jpg": (attacks["zeros"](3 << 30), 100),
    }
    attacks["zip_of"](raw / "HAM10000_images_part_1.zip", members)
    locked = {f"{name}.jpg": (jpeg(name), None) for name in IDS[2:4]}
    path = attacks["zip_of"](raw / "HAM10000_images_part_2.zip", locked)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1  # encrypted, says the list of members
    path.write_bytes(content)
    with attacks["Cheap"](), pytest.raises(InputError) as error:
        prepare(raw, tmp_path / "out")
    for pattern in ("ISIC_0024306.jpg: .*unpack", "ISIC_0024307.jpg: .*CRC", "encrypted"):
        assert re.search(pattern, str(error.value)), error.value
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "raw"]


def test_broken_images_are_named_together_and_leave_nothing_behind(tmp_path):
    raw = dataverse(tmp_path / "raw")
    for zipped in raw.glob("HAM10000_images*.zip"):
        with zipfile.ZipFile(zipped) as file:
            file.extractall(raw)
        zipped.unlink()
    broken = {IDS[0]: b"", IDS[4]: jpeg(IDS[4])[:300], IDS[6]: b"not an image"}
    for name, content in broken.items():
        (path,) = raw.glob(f"*/{name}.jpg")
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        prepare(raw, tmp_path / "out")
    assert [name for name in IDS if name in str(error.value)] == list(broken)
    assert not list((tmp_path / "out").rglob("*records.csv"))
    assert not list((tmp_path / "out").rglob("*array_record*"))


def test_a_damaged_member_of_a_zip_is_named(tmp_path):
    path = dataverse(tmp_path / "raw") / "HAM10000_images_part_2.zip"
    content = bytearray(path.read_bytes())
    content[content.index(jpeg(IDS[5])) + 200] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"^\S*part_2\.zip!.*{IDS[5]}\.jpg: .*CRC[^\n]*$"):
        prepare(tmp_path / "raw", tmp_path / "out")


def test_zips_give_the_same_records(tmp_path, prepared):
    zipped = prepare(dataverse(tmp_path / "zips"), tmp_path / "out_zips")
    np.testing.assert_array_equal(
        open_records(zipped).read(np.arange(7)),
        open_records(prepared).read(np.arange(7)),
    )


def test_a_full_disk_is_noticed_before_the_work(tmp_path, monkeypatch):
    raw = kaggle(tmp_path / "raw")
    monkeypatch.setattr(records.shutil, "disk_usage", lambda _: type("U", (), {"free": 9000}))
    with pytest.raises(InputError, match=r"0\.0 GB free"):
        prepare(raw, tmp_path / "out")


def test_without_tfds_records_are_read_and_a_sentence_says_how_to_make_them(
    prepared, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    monkeypatch.delitem(sys.modules, "ham_jax.data.builder")
    monkeypatch.delattr("ham_jax.data.builder")
    assert prepare(tmp_path / "raw", tmp_path / "out") == prepared
    assert open_records(prepared).read(np.arange(7)).any()
    with pytest.raises(InputError, match=r"package tensorflow_datasets, .* 'ham-jax\[train\]'"):
        prepare(tmp_path / "raw", tmp_path / "new")
    c = config.base()
    c.data.dir, c.data.synthetic_images = str(tmp_path / "drawn"), 100
    with pytest.raises(InputError, match="package tensorflow_datasets"):
        preparation.prepare(c)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


def test_several_processes_prepare_once_and_without_tensorflow(tmp_path):
    raw = kaggle(tmp_path / "raw")
    program = textwrap.dedent(
        """
        import sys
        from importlib.machinery import PathFinder
        find = PathFinder.find_spec
        PathFinder.find_spec = lambda name, *args: (
            None if name.split(".")[0] == "tensorflow" else find(name, *args)
        )
        import numpy as np
        import contextlib
        from ham_jax import console
        from ham_jax.data.records import open_records, prepare
        done = []
        console.progress = lambda _: contextlib.nullcontext(lambda *at: done.append(at))
        folder = prepare(
            sys.argv[1], (24, 32), sys.argv[2], allow_partial=True, num_workers=1
        )
        print(len(done), open_records(folder).read(np.arange(7)).shape)
        """
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(raw), str(tmp_path / "out")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in processes]
    assert sorted(out for out, _ in said) == ["0 (7, 24, 32, 3)\n", "7 (7, 24, 32, 3)\n"], said


def test_the_fingerprint_of_ham10000s_classes_is_what_it_was(tiny_raw, tiny_records):
    raw = layouts.find(tiny_raw, allow_partial=True)
    # If this fails, all records that people have are made again.
    digest = "627c453aab4271c239f4a99342dd92567532494f510ff9a100dfe65ccb069f3b"
    assert records._fingerprint(raw, CANVAS) == open_records(tiny_records).fingerprint == digest


def test_records_from_before_there_were_other_classes_are_ham10000s(prepared, tmp_path):
    content = json.loads((prepared / "metadata.json").read_text())
    assert Classes.from_json(content.pop("classes")) == HAM10000
    (prepared / "metadata.json").write_text(json.dumps(content))
    (prepared / "checksums.json").unlink()
    assert open_records(prepared).classes == HAM10000
    assert prepare(tmp_path / "raw", tmp_path / "out") == prepared == prepare(prepared, tmp_path)


@pytest.mark.parametrize("num_classes", [2, 3, 12])
def test_own_classes_without_lesion_ids_come_back(num_classes, tmp_path):
    names = tuple(f"Diagnosis {chr(97 + n)}" for n in range(num_classes))
    classes = Classes(names, malignant=names[1:2], titles=tuple(map(str.upper, names)))
    ids = [f"photo {n:02}" for n in range(2 * num_classes)]
    (tmp_path / "raw").mkdir()
    for name in ids:
        (tmp_path / "raw" / f"{name}.jpg").write_bytes(jpeg(name))
    rows = pd.DataFrame({"image": ids, "dx": [*names, *map(str.lower, reversed(names))]})
    rows.to_csv(tmp_path / "raw" / "mine.csv", index=False)

    def made(classes: Classes, source: str = "raw") -> Path:
        return records.prepare(
            tmp_path / source, CANVAS, tmp_path / "out", classes=classes, num_workers=1
        )

    whole = open_records(made(classes))
    assert whole.classes == classes
    assert list(whole.table["lesion_id"]) == ids
    assert list(whole.table["dx"]) == [*names, *reversed(names)]
    assert list(whole.table["label"]) == [*range(num_classes), *reversed(range(num_classes))]
    np.testing.assert_array_equal(whole.read(np.array([1]))[0], image.load(jpeg(ids[1]), CANVAS))

    other = Classes(names[::-1])  # the same diagnoses, but other labels
    assert made(Classes(names)) == whole.folder != made(other)
    assert open_records(made(other)).table["label"][0] == num_classes - 1
    assert made(other, "out") == made(other)
    assert made(classes, "out") == whole.folder
    with pytest.raises(InputError, match="fit 0 of these prepared sets"):
        made(HAM10000, "out")
    (whole.folder / "label.labels.txt").write_text("\n".join(names[::-1]))
    (whole.folder / "checksums.json").unlink()
    with pytest.raises(InputError, match=r"metadata\.json cannot be read: its classes are not"):
        open_records(whole.folder)
