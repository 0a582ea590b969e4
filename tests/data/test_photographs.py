"""Whatever a folder, glob or list holds: each photograph once, and nothing missing in silence."""

import os
import socket

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ham_jax.config import InputError
from ham_jax.data import folders, image, layouts, photographs, records

BYTES = os.fsdecode(b"\xff\xfe.jpg")


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def found(pattern, base=None):
    """Returns the paths that are found, relative to a folder."""
    paths = photographs.find_images(str(pattern)).paths
    return [os.path.relpath(path, base) for path in paths] if base else paths


def why(pattern):
    """Returns what is wrong with each path that is found."""
    names = photographs.find_images(str(pattern))
    return {os.path.basename(p): names.faults.get(number) for number, p in enumerate(names.paths)}


def test_by_file_folder_glob_and_csv(tmp_path):
    fill(tmp_path, "x/1.jpg", "x/y/2.PNG", "x/.hidden.jpg", "x/3.txt")
    one, two = str(tmp_path / "x/1.jpg"), str(tmp_path / "x/y/2.PNG")
    (tmp_path / "list.CSV").write_text("note,image\n,x/1.jpg\n, x/1.jpg \n")
    (tmp_path / "bad.csv").write_text("a,b\n1,2,3\n")
    (tmp_path / "empty.csv").write_text("path\n \n")
    assert found(one) == [one]
    assert found(tmp_path / "x/3.txt") == [str(tmp_path / "x/3.txt")]
    assert found(tmp_path / "x") == [one, two]
    assert found(f"{tmp_path}/**/*.PNG") == [two]
    assert found(tmp_path / "list.CSV") == [one]
    (tmp_path / "excel.csv").write_bytes("path\nFötö.jpg\n".encode("latin-1"))
    for nothing in ("nope.jpg", "bad.csv", "*.tiff", "excel.csv", "empty.csv", "a" * 300, "a\0"):
        with pytest.raises(InputError, match="--images="):
            photographs.find_images(str(tmp_path / nothing))
    with pytest.raises(InputError, match="is a URL"):
        photographs.find_images("gs://bucket/x")


def test_a_list_of_ids_in_any_dialect(tmp_path):
    fill(tmp_path, "part_1/ISIC_0024306.JPG", "part_2/isic_0024307.heic", "ISIC_0024308.csv")
    for text, encoding in (
        ("ISIC_ID;Age_Approx\nISIC_0024306; 45,5\nISIC_0024307;\nISIC_0024308;\n", "utf-16"),
        ("sep=,\r\nimage_id,age\r\nISIC_0024306,45.5\r\nISIC_0024307,\r\nISIC_0024308,", "utf-8"),
    ):
        listed = tmp_path / "metadata.csv"
        listed.write_bytes(text.encode(encoding))
        names = photographs.find_images(str(listed))
        assert [os.path.basename(path) for path in names.paths] == [
            "ISIC_0024306.JPG",
            "isic_0024307.heic",
            "ISIC_0024308",
        ]
        assert names.faults == {2: "there is no such file"}
        ages = photographs.find_metadata(str(listed), 3)["age"]
        np.testing.assert_array_equal(ages, [45.5, np.nan, np.nan])
    listed.write_text("path,age\na.jpg,5,7\n")
    with pytest.raises(InputError, match="line 2: 3 fields instead of 2"):
        photographs.find_images(str(listed))


def test_what_a_folder_holds_is_read_or_named_or_counted(tmp_path):
    folder, far = tmp_path / "photographs", fill(tmp_path / "far", "4.jpg")
    fill(folder, *(f"a{suffix}" for suffix in image.SUFFIXES), BYTES, "b.JPG", "c.Mov", "d.pdf")
    fill(folder, "e.pdf", "IMG_1", "notes.txt", "Thumbs.db", "z/5.jpg", ".DS_Store", "._b.JPG")
    junk = (".ipynb_checkpoints", "__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN")
    fill(folder, *(f"{name}/6.jpg" for name in junk))
    (folder / "link").symlink_to(far)
    (folder / "z/circle").symlink_to(folder)
    (folder / "7.jpg").symlink_to(tmp_path / "gone")
    (folder / "unmounted").symlink_to(tmp_path / "gone too")
    (folder / "8.jpg").symlink_to("8.jpg")
    os.mkfifo(folder / "9.jpg")
    names = photographs.find_images(str(folder))
    good = {f"a{suffix}" for suffix in image.SUFFIXES} | {BYTES, "b.JPG", "z/5.jpg", "link/4.jpg"}
    bad = {
        "7.jpg": "leads nowhere",
        "unmounted": "leads nowhere",
        "8.jpg": "cannot be opened: Too many",
        "9.jpg": "a pipe",
    }
    assert set(found(folder, folder)) == good | set(bad)
    assert names.paths == sorted(names.paths)
    for name, part in bad.items():
        assert part in names.faults.pop(names.paths.index(str(folder / name)))
    assert names.faults == {}
    assert names.counted() == "7 hidden, 2 .pdf, 1 .db, 1 .mov, 1 .txt, 1 without a suffix"
    named = [os.path.basename(path) for path, _ in names.named()]
    assert named == ["IMG_1", "c.Mov", "d.pdf", "e.pdf"]
    for name in found(folder, folder):
        (folder / name).unlink()
    with pytest.raises(InputError, match=r"no image found\. Not looked at: 7 hidden, 2 \.pdf"):
        photographs.find_images(str(folder))


def test_very_many_other_files_are_counted(tmp_path):
    fill(tmp_path, "1.jpg", *(f"{n}.s{n % 14}" for n in range(1400)))
    names = photographs.find_images(str(tmp_path))
    assert names.counted().endswith(", 400 others")
    assert len(names.named()) == 1001
    assert names.named()[-1][0] == "400 more"


def test_a_locked_folder_is_named(tmp_path, monkeypatch):
    fill(tmp_path, "1.jpg", "locked/2.jpg")
    scan = os.scandir

    def refuse(folder):  # file modes do not stop root
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scan(folder)

    monkeypatch.setattr(folders.os, "scandir", refuse)
    assert "cannot be read: Permission" in why(tmp_path)["locked"]


def test_what_exists_under_a_name_is_no_glob(tmp_path):
    fill(tmp_path, "a[1]/x.jpg", "a1/y.jpg", "a1/*.jpg", "b/z.jpg")
    assert found(tmp_path / "a[1]", tmp_path) == ["a[1]/x.jpg"]
    assert found(tmp_path / "a[1]/*.jpg", tmp_path) == ["a[1]/x.jpg"]
    assert found(tmp_path / "a[1]/**/*.jpg", tmp_path) == ["a[1]/x.jpg"]
    assert found(tmp_path / "a1/*.jpg", tmp_path) == ["a1/*.jpg"]
    together = ["a1/y.jpg", "a[1]/x.jpg", "b/z.jpg"]
    assert found(tmp_path / "[ab]*/[x-z].jpg", tmp_path) == together


def test_a_glob_takes_photographs_and_what_its_pattern_names(tmp_path, monkeypatch):
    fill(tmp_path, "1.jpg", "2.pdf", ".3.jpg", "sub/4.jpg", "@eaDir/5.jpg", "sub/.trash/6.jpg")
    for name in ("up", "again"):  # two circles: glob alone would not end
        (tmp_path / "sub" / name).symlink_to(tmp_path)
    names = photographs.find_images(f"{tmp_path}/*")
    assert [os.path.basename(path) for path in names.paths] == ["1.jpg"]
    assert names.counted() == "1 .pdf, 1 folder(s), 1 hidden"
    assert found(f"{tmp_path}/*.pdf", tmp_path) == ["2.pdf"]
    assert found(f"{tmp_path}/.*", tmp_path) == [".3.jpg"]
    assert found(f"{tmp_path}/@eaDir/*", tmp_path) == ["@eaDir/5.jpg"]
    assert found(f"{tmp_path}/*/*.jpg", tmp_path) == ["sub/4.jpg"]
    assert found(f"{tmp_path}/**", tmp_path) == ["1.jpg", "sub/4.jpg"]
    assert found(f"{tmp_path}/**/sub/**/*.jpg", tmp_path) == ["sub/4.jpg"]
    monkeypatch.chdir(tmp_path)
    assert found("*.jpg") == ["1.jpg"]
    assert found(".") == ["1.jpg", "sub/4.jpg"]


def test_each_row_of_a_list_is_a_photograph_or_says_why_not(tmp_path, monkeypatch):
    home = fill(tmp_path / "home", "1.jpg")
    monkeypatch.setenv("HOME", str(home))
    fill(tmp_path, "sub/2.jpg", "-3.jpg", "sub/sub.jpg/x")
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)
        server.bind("s.jpg")
    good = {
        "~/1.jpg": home / "1.jpg",
        r"sub\2.jpg": tmp_path / "sub/2.jpg",
        "'-3.jpg": tmp_path / "-3.jpg",
    }
    bad = {
        "pipe.jpg": "a pipe",
        "s.jpg": "socket",
        "/dev/zero": "device",
        "sub": "a folder",
        "x" * 300 + ".jpg": "name too long",
        "https://x.org/a.jpg": "a URL",
        "gs://bucket/a.jpg": "a URL",
        "no.jpg": "no such file",
        r"C:\photos\a.jpg": "no such file",
        "~nobody-here/a.jpg": "no such file",
    }
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(f" {name} " for name in [*good, *bad]))
    names = photographs.find_images("list.csv")
    places = [os.path.abspath(path) for path in names.paths[: len(good)]]
    assert places == [str(place) for place in good.values()]
    assert list(names.faults) == list(range(len(good), len(good) + len(bad)))
    for fault, part in zip(names.faults.values(), bad.values(), strict=True):
        assert part.lower() in fault.lower()
    assert "https://x.org/a.jpg" in names.paths
    errors = list(image.load_many(names.sources, (24, 32), 1))[len(good) :]
    assert [str(error) for error in errors] == list(names.faults.values())


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300))
def test_no_cell_of_a_list_gets_past_with_an_exception(tmp_path_factory, cell):
    path = tmp_path_factory.mktemp("list") / "list.csv"
    quoted = cell.replace('"', '""')
    path.write_text(f'path,age\n"{quoted}",5\n', encoding="utf-8", newline="")
    try:
        names = photographs.find_images(str(path))
    except InputError:
        assert not cell.strip() or "\0" in cell  # which no text file has
        return
    assert len(names.paths) == len(names.faults) == 1
    assert photographs.find_metadata(str(path), 1)["age"].tolist() == [5]


def test_metadata_of_a_list(tmp_path):
    listed = tmp_path / "list.csv"
    listed.write_text(
        "site,path,age_approx,sex\nback,a.jpg,45,male\n,,7,\nEar,b.jpg,,\nback,a.jpg,45.0,male\n"
    )
    assert len(found(listed)) == 2
    table = photographs.find_metadata(str(listed), 2)
    assert table.fillna(-1).to_dict("list") == {
        "age": [45, -1],
        "sex": ["male", ""],
        "localization": ["back", "Ear"],
    }
    assert photographs.find_metadata(str(tmp_path), 3).shape == (3, 0)
    listed.write_text("path,age\na.jpg,fifty\nb.jpg,-3\nc.jpg,5\nc.jpg,6\n")
    with pytest.raises(InputError) as refused:
        photographs.find_metadata(str(listed), 3)
    for fault, part in zip(refused.value.faults, ("'fifty'", "'-3'", "c.jpg"), strict=True):
        assert part in fault


def test_data_folders_leave_out_the_same_and_name_what_is_broken(tmp_path):
    """Data folders and photographs are walked alike."""
    pixels = np.zeros((24, 32, 3), np.uint8)
    fill(tmp_path, "@eaDir/a.jpg", ".ipynb_checkpoints/a.jpg")
    for name in ("=1+1", "b"):
        image.save_jpeg(pixels, tmp_path / f"{name}.jpg", 90)
    rows = ["image_id,lesion_id,dx", "=1+1,-L1,mel", "b,@L2,nv"]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    raw = layouts.find(tmp_path, allow_partial=True)
    assert raw.table["lesion_id"].tolist() == ["-L1", "@L2"]
    folder = records.prepare(
        tmp_path, (24, 32), tmp_path / "out", allow_partial=True, num_workers=1
    )
    assert "'=1+1" in (folder / "records.csv").read_text()
    table = records.open_records(folder).table
    assert table["image_id"].tolist() == ["=1+1", "b"]
    assert table["lesion_id"].tolist() == ["-L1", "@L2"]

    (tmp_path / "c.jpg").symlink_to("gone")
    os.mkfifo(tmp_path / "more.csv")
    (tmp_path / "labels.csv").write_text("\n".join([*rows, "b\x1b[2J,L3,nv"]))
    with pytest.raises(InputError) as refused:
        layouts.find(tmp_path, allow_partial=True)
    told = [r"c.jpg: a link that leads nowhere", "more.csv: a pipe", r"line 4: image_id 'b\x1b[2J'"]
    for part in told:
        assert part in str(refused.value)
