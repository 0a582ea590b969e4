import hashlib
import io
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
from PIL import Image

from ham_jax import CLASSES
from ham_jax.config import InputError
from ham_jax.data import ham10000, image

attacks = runpy.run_path(Path(__file__).parents[1] / "attacks.py")
CANVAS = (24, 32)

# Two images of one lesion, and one lesion of each other class but df.
ROWS = pd.DataFrame(
    [
        ("HAM_0000001", "ISIC_0024310", "mel", "histo", "45.0", "female", "back"),
        ("HAM_0000001", "ISIC_0024306", "mel", "histo", "45.0", "female", "back"),
        ("HAM_0000002", "ISIC_0024307", "nv", "follow_up", "", "unknown", "unknown"),
        ("HAM_0000003", "ISIC_0024308", "akiec", "histo", "0.0", "male", "face"),
        ("HAM_0000004", "ISIC_0024309", "vasc", "consensus", "70.0", "male", "hand"),
        ("HAM_0000005", "ISIC_0024311", "bkl", "confocal", "55.0", "male", "trunk"),
        ("HAM_0000006", "ISIC_0024312", "bcc", "histo", "85.0", "female", "scalp"),
    ],
    columns=["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization"],
)
IDS = sorted(ROWS["image_id"])


def jpeg(name: str) -> bytes:
    """A picture of its own for every name."""
    rng = np.random.default_rng(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
    pixels = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((64, 48))
    buffer = io.BytesIO()
    pixels.save(buffer, "jpeg", quality=95)
    return buffer.getvalue()


def kaggle(folder: Path, rows: pd.DataFrame = ROWS) -> Path:
    for k, part in enumerate(("HAM10000_images_part_1", "ham10000_images_part_1")):
        (folder / part).mkdir(parents=True)
        for name in IDS if k else IDS[:3]:
            (folder / part / f"{name}.jpg").write_bytes(jpeg(name))
    rows.to_csv(folder / "HAM10000_metadata.csv", index=False)
    (folder / "hmnist_8_8_L.csv").write_text("pixel0000,pixel0001,label\n1,2,3\n")
    (folder / "my_split.csv").write_text("image_id,split\nISIC_0024306,train\n")
    return folder


def dataverse(folder: Path) -> Path:
    folder.mkdir()
    for part, names in (("HAM10000_images_part_1", IDS[:4]), ("HAM10000_images_part_2", IDS[4:])):
        with zipfile.ZipFile(folder / f"{part}.zip", "w") as file:
            for name in names:
                file.writestr(f"{part}/{name}.jpg", jpeg(name))
                file.writestr(f"__MACOSX/{part}/._{name}.jpg", b"junk")
                file.writestr(f"{part}/._{name}.jpg", b"junk")
    with zipfile.ZipFile(folder / "HAM10000_segmentations_lesion_tschandl.zip", "w") as file:
        file.writestr(f"masks/{IDS[0]}_segmentation.png", b"mask")
    ROWS.assign(dataset="rosendahl").to_csv(
        folder / "HAM10000_metadata.tab", index=False, sep="\t", quoting=1
    )
    return folder


def one_hot(rows: pd.DataFrame) -> str:
    order = ("mel", "nv", "bcc", "akiec", "bkl", "df", "vasc")
    lines = [
        f"{r.image_id}," + ",".join(f"{r.dx == c:.1f}" for c in order) for r in rows.itertuples()
    ]
    return "\n".join([",".join(["image", *map(str.upper, order)]), *lines]) + "\n"


def isic(folder: Path) -> Path:
    inputs = folder / "ISIC2018_Task3_Training_Input"
    inputs.mkdir(parents=True)
    for name in IDS:
        (inputs / f"{name}.JPG").write_bytes(jpeg(name))
        (inputs / f"{name}_superpixels.png").write_bytes(b"junk")
    (inputs / "ATTRIBUTION.txt").write_text("image by somebody")
    with zipfile.ZipFile(folder / "ISIC2018_Task3_Training_GroundTruth.zip", "w") as file:
        name = "ISIC2018_Task3_Training_GroundTruth"
        file.writestr(f"{name}/{name}.csv", one_hot(ROWS))
    confirmed = {v: k for k, v in ham10000._CONFIRMED.items()}
    ROWS.assign(
        image=ROWS["image_id"], diagnosis_confirm_type=ROWS["dx_type"].map(confirmed)
    ).to_csv(
        folder / "ISIC2018_Task3_Training_LesionGroupings.csv",
        columns=["image", "lesion_id", "diagnosis_confirm_type"],
        index=False,
    )
    return folder


def flat(folder: Path) -> Path:
    folder.mkdir()
    for name in IDS:
        (folder / f"{name}.jpg").write_bytes(jpeg(name))
    text = ROWS.to_csv(index=False).replace("\n", "\r\n\r\n")  # blank lines, Windows line ends
    (folder / "labels.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    return folder


@pytest.mark.parametrize("layout", [kaggle, dataverse, isic, flat])
def test_every_layout_gives_the_same_images_and_diagnoses(layout, tmp_path):
    raw = ham10000.find(layout(tmp_path / "raw"), allow_partial=True)
    expected = ROWS.sort_values("image_id", ignore_index=True)
    for column in ("image_id", "lesion_id", "dx", "dx_type"):
        assert list(raw.table[column]) == list(expected[column])
    assert [CLASSES[i] for i in raw.table["label"]] == list(expected["dx"])
    if layout is not isic:  # the challenge publishes no ages
        np.testing.assert_array_equal(raw.table["age"], pd.to_numeric(expected["age"]))
    for source, size, name in zip(raw.sources, raw.sizes, IDS, strict=True):
        with source.open("rb") as file:
            assert file.read() == jpeg(name)
        assert size == len(jpeg(name))


def test_official_test_without_lesion_ids_and_with_its_row_without_image(tmp_path):
    dx = np.repeat(CLASSES, ham10000.TEST_IMAGES)
    names = [f"ISIC_{34524 + i:07d}" for i in range(len(dx) + 1)]
    names.remove("ISIC_0035068")
    for name in names:
        (tmp_path / f"{name}.jpg").touch()
    rows = pd.DataFrame({"image_id": [*names, "ISIC_0035068"], "dx": [*dx, "nv"]})
    truth = tmp_path / "ISIC2018_Task3_Test_GroundTruth.csv"
    truth.write_text(one_hot(rows))
    raw = ham10000.find(tmp_path)  # the published counts hold
    assert list(raw.table["lesion_id"]) == list(raw.table["image_id"]) == names
    assert list(raw.table["dx"]) == list(dx)

    rows["lesion_id"] = [f"HAMTEST_{i // 2:07d}" for i in range(len(rows))]
    rows["dx"] = "nv"
    truth.unlink()
    rows.to_csv(tmp_path / "ISIC2018_Task3_Test_GroundTruth.tab", sep="\t", index=False)
    with pytest.raises(InputError, match="nv 1,511 instead of 908"):
        ham10000.find(tmp_path)


CONFIRMED = {v: k for k, v in ham10000._CONFIRMED.items()}
ARCHIVE = {  # diagnosis_1, _2 and _3 of the ISIC archive's collection 212
    "nv": ("Benign", "Benign melanocytic proliferations", "Nevus"),
    "mel": ("Malignant", "Malignant melanocytic proliferations (Melanoma)", "Melanoma, NOS"),
    "bkl": ("Benign", "Benign epidermal proliferations", "Pigmented benign keratosis"),
    "bcc": (
        *("Malignant", "Malignant adnexal epithelial proliferations - Follicular"),
        "Basal cell carcinoma",
    ),
    "vasc": ("Benign", "Benign soft tissue proliferations - Vascular", ""),
    "akiec": (
        *("Indeterminate", "Indeterminate epidermal proliferations"),
        "Solar or actinic keratosis",
    ),
}


def archive_rows(rows: pd.DataFrame = ROWS) -> pd.DataFrame:
    """As isic-cli writes it: named by `isic_id`, columns in the order of the alphabet."""
    levels = rows["dx"].map(ARCHIVE)
    return pd.DataFrame(
        {
            "isic_id": rows["image_id"],
            "attribution": "ViDIR Group, Medical University of Vienna",
            "copyright_license": "CC-BY-NC",
            "age_approx": rows["age"],
            "anatom_site_general": rows["localization"],
            **{f"diagnosis_{n}": levels.str[n - 1] for n in (1, 2, 3)},
            "diagnosis_confirm_type": rows["dx_type"].map(CONFIRMED),
            "image_type": "dermoscopic",
            "lesion_id": rows["lesion_id"].str.replace("HAM_", "IL_"),
            "melanocytic": "True",
            "sex": rows["sex"],
        }
    )


def challenge_rows(rows: pd.DataFrame = ROWS) -> pd.DataFrame:
    order = ("mel", "nv", "bcc", "akiec", "bkl", "df", "vasc")
    hot = {dx.upper(): (rows["dx"] == dx).map({True: "1.0", False: "0.0"}) for dx in order}
    return pd.DataFrame({"image": rows["image_id"], **hot})


LAYOUTS = {
    "kaggle": {"HAM10000_metadata.csv": ROWS},
    "dataverse": {"HAM10000_metadata.tab": ROWS.assign(dataset="rosendahl")},
    "challenge": {
        "ISIC2018_Task3_Training_GroundTruth.csv": challenge_rows(),
        "ISIC2018_Task3_Training_LesionGroupings.csv": pd.DataFrame(
            {
                "image": ROWS["image_id"],
                "lesion_id": ROWS["lesion_id"],
                "diagnosis_confirm_type": ROWS["dx_type"].map(CONFIRMED),
            }
        ),
    },
    "flat": {"labels.csv": ROWS.rename(columns={"image_id": "isic_id"})},
    "archive": {"metadata.csv": archive_rows()},
}


def as_files(rows: pd.DataFrame) -> pd.DataFrame:
    """Names photographs as files, and shouts."""
    ids = [name for name in ("image_id", "image", "isic_id") if name in rows]
    named = {name: "part_1/" + rows[name].str.lower() + ".JPG" for name in ids}
    shouted = {"dx": rows["dx"].str.upper()} if "dx" in rows else {}
    return rows.assign(**named, **shouted).rename(columns=str.title)


def comma(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.map(lambda text: re.sub(r"^(\d+)\.(\d)$", r"\1,\2", text))


DIALECTS = {
    "comma": lambda rows: rows.to_csv(index=False).encode(),
    "excel": lambda rows: (
        comma(rows).to_csv(index=False, sep=";", lineterminator="\r\n").encode("utf-8-sig")
    ),
    "excel, named": lambda rows: b"sep=;\r\n" + comma(rows).to_csv(index=False, sep=";").encode(),
    "unicode text": lambda rows: comma(rows).to_csv(index=False, sep="\t").encode("utf-16"),
    "tab": lambda rows: rows.to_csv(index=False, sep="\t", quoting=1).encode(),
    "bar": lambda rows: rows.to_csv(index=False, sep="|", lineterminator="\r").encode(),
    "capitals": lambda rows: rows.rename(columns=str.upper).to_csv(index=False).encode(),
    "blanks": lambda rows: (
        rows.map(" {} ".format)
        .rename(columns=" {} ".format)
        .to_csv(index=False)
        .encode("utf-16-be")
    ),
    "files": lambda rows: as_files(rows).to_csv(index=False).encode(),
}


def photographs(folder: Path, names=IDS, suffix: str = ".jpg") -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}{suffix}").write_bytes(name.encode())
    return folder


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_alike_in_every_dialect(layout, dialect, tmp_path):
    folder = photographs(tmp_path, suffix=".JPG" if layout == "archive" else ".jpg")
    for name, rows in LAYOUTS[layout].items():
        (folder / name).write_bytes(DIALECTS[dialect](rows))
    expected = ROWS.sort_values("image_id", ignore_index=True).assign(
        dataset="rosendahl" if layout == "dataverse" else "",
        age=lambda rows: pd.to_numeric(rows["age"]),
        label=lambda rows: rows["dx"].map(CLASSES.index),
    )
    if layout == "challenge":
        expected = expected.assign(age=np.nan, sex="", localization="")
    if layout == "archive":
        expected["lesion_id"] = expected["lesion_id"].str.replace("HAM_", "IL_")
    raw = ham10000.find(folder, allow_partial=True)
    pd.testing.assert_frame_equal(
        raw.table, expected[["image_id", *ham10000.COLUMNS, "label"]], check_dtype=False
    )
    assert [source.stem for source in raw.sources] == IDS


def find_archive(folder: Path, rows: pd.DataFrame, allow_partial: bool = True) -> pd.DataFrame:
    rows.to_csv(folder / "metadata.csv", index=False)
    return ham10000.find(folder, allow_partial).table.set_index("image_id")


@pytest.mark.parametrize(
    ("levels", "dx"),
    [
        ({"diagnosis_3": "Squamous cell carcinoma, NOS"}, "akiec"),
        (
            {"diagnosis_3": "Melanoma in situ", "diagnosis_4": "Melanoma in situ, Lentiginous"},
            "mel",
        ),
        ({"diagnosis_3": "Nevus", "diagnosis_4": "Nevus, Spitz"}, "nv"),
        ({"diagnosis_2": "Benign soft tissue proliferations - Vascular"}, "vasc"),
        ({"diagnosis_3": "Melanoma metastasis"}, None),
        ({"diagnosis_3": "Squamous cell carcinoma, Invasive"}, None),
        ({"diagnosis_2": "Malignant melanocytic proliferations (Melanoma)"}, None),
    ],
)
def test_the_archive_tells_the_seven_diagnoses_and_others_are_named(levels, dx, tmp_path):
    photographs(tmp_path)
    rows = archive_rows().assign(diagnosis_4="")
    blank = dict.fromkeys(["diagnosis_1", "diagnosis_2", "diagnosis_3", "diagnosis_4"], "")
    rows.loc[2, list(blank)] = list((blank | levels).values())
    table = find_archive(tmp_path, rows)
    if dx:
        assert table.loc["ISIC_0024307", "dx"] == dx
        return
    assert "ISIC_0024307" not in table.index
    told = f"line 4: the diagnosis {next(iter(levels.values()))!r} of 1 rows is none"
    with pytest.raises(InputError, match=re.escape(told)):
        find_archive(tmp_path, rows, allow_partial=False)


def test_the_archives_sites_are_those_that_a_network_knows(tmp_path):
    photographs(tmp_path)
    rows = archive_rows().drop(columns="anatom_site_general")
    rows[["anatom_site_1", "anatom_site_2", "anatom_site_3"]] = ""
    rows.loc[0, ["anatom_site_1", "anatom_site_2"]] = ["Head and neck", "Head"]
    rows.loc[1, ["anatom_site_1", "anatom_site_2", "anatom_site_3"]] = [
        *("Head and neck", "Head", "Ear")
    ]
    rows.loc[2, ["anatom_site_1", "anatom_site_2"]] = ["Lower extremity", "Knee"]
    sites = find_archive(tmp_path, rows)["localization"]
    assert list(sites[rows["isic_id"][:4]]) == ["head and neck", "ear", "lower extremity", ""]


def test_two_tables_of_the_same_images_are_one_fault(tmp_path):
    photographs(tmp_path)
    ROWS.to_csv(tmp_path / "HAM10000_metadata.csv", index=False)
    with pytest.raises(InputError) as error:
        find_archive(tmp_path, archive_rows().assign(anatom_site_general="posterior torso"))
    (fault,) = error.value.faults
    for text in (
        "HAM10000_metadata.csv and ",
        "lesion_id of 7 images, localization of 7 images",
        "ISIC_0024306: 'HAM_0000001'",
        "'IL_0000001'",
        "Keep one of these tables",
    ):
        assert text in fault


def test_the_archives_one_table_serves_the_folders_of_all_three_sets(tmp_path):
    others = ["ISIC_0034321", "ISIC_0034524", "ISIC_0035068"]
    rows = ROWS.assign(dx="nv")[:3]
    rows = archive_rows(pd.concat([ROWS, rows.assign(image_id=others)], ignore_index=True))
    for names in (IDS, others[:1], others[1:]):
        folder = photographs(tmp_path / names[0], names)
        rows.to_csv(folder / "metadata.csv", index=False)
        with pytest.raises(InputError) as error:  # the counts alone are not the published ones
            ham10000.find(folder)
        (fault,) = error.value.faults
        assert f"images {len(set(names) - {'ISIC_0035068'})} instead of" in fault


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (
            {"a.csv": b"image_id,diagnosis\n1,2\n"},
            ["not the column dx", "If 'diagnosis' is the dx"],
        ),
        ({"a.csv": b"imageid;dx\n1;nv\n"}, ["column image_id", "If 'imageid' is the image_id"]),
        (
            {"a.csv": b"x,y\n1,2\n", "b.tab": b""},
            ["a.csv: has not the", "'x', 'y'", "b.tab: is empty"],
        ),
        (
            {"a.csv": b"image,MEL,NV\nx,1,0\n"},
            ["has an image, mel, nv, but not the columns akiec, bcc, bkl, df, vasc"],
        ),
        ({"a.csv": b"PK\x03\x04\0\0"}, ["a.csv: cannot be read as a table: it is an Excel"]),
        ({"m.xlsx": b"PK\x03\x04\0\0"}, ["m.xlsx: cannot be read as a table: it is an Excel"]),
        ({"a.csv": "image_id,dx\n1,ä\n".encode("cp1252")}, ["a.csv: cannot be read", "UTF-8"]),
        ({"a.csv": b"image,lesion_id\n1,2\n", "note.txt": b"hello"}, ["tells lesions, but not"]),
    ],
)
def test_each_table_that_will_not_do_is_named_with_why(files, told, tmp_path):
    photographs(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        ham10000.find(tmp_path)
    for text in ("7 images, but no table", "--config.data.dir=PATH", *told):
        assert text in str(error.value)
    assert "note.txt" not in str(error.value)  # which is no table, and does not seem one


def edit(line: int, old: str, new: str):
    def apply(text: str) -> str:
        lines = text.split("\n")
        assert old in lines[line - 1]
        lines[line - 1] = lines[line - 1].replace(old, new)
        return "\n".join(lines)

    return apply


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (edit(4, ",nv,", ",mell,"), [r"line 4: dx 'mell' .* akiec, bcc.*'mel'\?"]),
        (edit(4, ",nv,", ",Nevus,"), [r"line 4: dx 'nevus' .*'nv'\?"]),
        (edit(4, ",nv,", ",Melanoma,"), [r"line 4: dx 'melanoma' .*'mel'\?"]),
        (edit(3, "45.0", "forty"), ["line 3: age 'forty'"]),
        (edit(3, "45.0", "-1"), ["line 3: age '-1'"]),
        (edit(1, "lesion_id", "lesion"), ["7 images have no lesion_id"]),
        (edit(1, "dx,", "diagnosis,"), ["an image_id, but not the column dx"]),
        (edit(2, "HAM_0000001", ""), ["1 images have no lesion_id .ISIC_0024310"]),
        (edit(3, ",mel,", ",nv,"), ["lesion HAM_0000001 has several diagnoses: mel, nv"]),
        (
            lambda text: text + "HAM_0000002,ISIC_0024307,df,histo,30,male,back\n",
            [r"ISIC_0024307 has several values of dx: 'nv' \(.*line 4\), 'df' \(.*line 9\)"],
        ),
        (
            lambda text: edit(8, "85.0,", "")(
                edit(5, "akiec", "akeic")(edit(3, "mel", "nv")(text))
            ),
            ["line 5: dx 'akeic'", "line 8: 6 fields instead of 7", "HAM_0000001 has several"],
        ),
    ],
)
def test_metadata_faults_are_named_with_their_line(change, told, tmp_path):
    table = kaggle(tmp_path / "raw") / "HAM10000_metadata.csv"
    table.write_text(change(table.read_text()))
    with pytest.raises(InputError) as error:
        ham10000.find(tmp_path / "raw", allow_partial=True)
    for pattern in told:
        assert re.search(pattern, str(error.value)), error.value


def test_repeated_rows_are_no_fault(tmp_path):
    raw = ham10000.find(kaggle(tmp_path / "raw", pd.concat([ROWS, ROWS[:3]])), True)
    assert list(raw.table["image_id"]) == IDS


def test_one_hot_rows_must_name_one_class(tmp_path):
    isic(tmp_path / "raw")
    (tmp_path / "raw" / "ISIC2018_Task3_Training_GroundTruth.zip").unlink()
    truth = tmp_path / "raw" / "truth.csv"
    truth.write_text(edit(3, "1.0", "0.5")(edit(5, "0.0", "1.0")(one_hot(ROWS))))
    with pytest.raises(InputError, match=r"(?s)line 3: exactly one.*line 5: exactly one"):
        ham10000.find(tmp_path / "raw", allow_partial=True)


def test_training_truth_without_lesions_is_refused(tmp_path):
    isic(tmp_path / "raw")
    (tmp_path / "raw" / "ISIC2018_Task3_Training_LesionGroupings.csv").unlink()
    with pytest.raises(InputError, match=r"7 images have no lesion_id.*LesionGroupings"):
        ham10000.find(tmp_path / "raw", allow_partial=True)


def test_images_and_metadata_must_match_unless_a_part_is_meant(tmp_path):
    flat(tmp_path / "raw")
    with pytest.raises(InputError, match=r"images 7 instead of 10,015.*df 0 instead of 115"):
        ham10000.find(tmp_path / "raw")
    (tmp_path / "raw" / "ISIC_0024312.jpg").rename(tmp_path / "raw" / "ISIC_0029999.jpg")
    with pytest.raises(InputError) as error:
        ham10000.find(tmp_path / "raw")
    assert "1 images have no metadata (ISIC_0029999)" in str(error.value)
    assert "1 rows of metadata have no image (ISIC_0024312)" in str(error.value)
    assert list(ham10000.find(tmp_path / "raw", True).table["image_id"]) == IDS[:-1]


def test_two_sizes_of_one_photograph_are_ambiguous(tmp_path):
    flat(tmp_path / "raw")
    (tmp_path / "raw" / "small").mkdir()
    (tmp_path / "raw" / "small" / f"{IDS[0]}.jpg").write_bytes(b"other")
    with pytest.raises(InputError, match="1 images lie there several times"):
        ham10000.find(tmp_path / "raw", allow_partial=True)


def test_training_and_test_in_one_folder_are_told_apart(tmp_path):
    flat(tmp_path / "raw")
    (tmp_path / "raw" / "ISIC_0034600.jpg").write_bytes(jpeg("test"))
    with (tmp_path / "raw" / "labels.csv").open("a") as file:
        file.write("HAMTEST_0000001,ISIC_0034600,nv,histo,30,male,back\n")
    with pytest.raises(InputError, match=r"Give each set a folder.*data\.test_dir"):
        ham10000.find(tmp_path / "raw")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*", "holds neither"),
        ("*.csv", "7 images, but no table"),
        ("*.jpg", "of 7 images, but no image"),
        (None, "no such folder"),
    ],
)
def test_nothing_found_names_the_ways_out(pattern, found, tmp_path):
    if pattern:
        for path in flat(tmp_path / "raw").glob(pattern):
            path.unlink()
    with pytest.raises(InputError) as error:
        ham10000.find(tmp_path / "raw")
    ways = ("--config.data.download=true", "--config.data.dir=PATH", "configs/demo.py")
    for text in (found, str(tmp_path / "raw"), "HAM10000_metadata", *ways):
        assert text in str(error.value)


def test_a_damaged_zip_is_named(tmp_path):
    path = dataverse(tmp_path / "raw") / "HAM10000_images_part_2.zip"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"images_part_2\.zip: .*Fetch this zip again"):
        ham10000.find(tmp_path / "raw", allow_partial=True)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 400),
            st.integers(0, 30),
            st.sampled_from([b"", b",", b"\n", b'"', b"\t", b"\xff", b"\x00", b"nan", b"1e999"])
            | st.binary(max_size=4),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_no_metadata_file_gets_past_with_another_exception(tmp_path_factory, edits):
    folder = tmp_path_factory.mktemp("fuzz") / "raw"
    table = flat(folder) / "labels.csv"
    data = ROWS.to_csv(index=False).encode()
    for at, length, new in edits:
        data = data[:at] + new + data[at + length :]
    table.write_bytes(data)
    try:
        raw = ham10000.find(folder, allow_partial=True)
    except InputError:
        return
    assert set(raw.table["image_id"]) <= set(IDS)
    assert raw.table["dx"].isin(CLASSES).all()
    assert (raw.table["age"].isna() | raw.table["age"].between(0, 120)).all()


def test_the_real_training_set_is_complete(real_data):
    table = ham10000.find(real_data / "ham10000").table
    digest = hashlib.sha256(table.to_csv(index=False).encode()).hexdigest()
    assert digest[:16] == "ac81c45046ab9143"  # what records are made of; else all are made again
    assert table["image_id"].is_monotonic_increasing
    assert len(table) == 10015
    assert (table["age"].isna().sum(), (table["age"] == 0).sum()) == (57, 39)
    assert dict(table["dx_type"].value_counts()) == {
        "histo": 5340,
        "follow_up": 3704,
        "consensus": 902,
        "confocal": 69,
    }


def prepare(raw: Path, out: Path, **kwargs) -> Path:
    return ham10000.prepare(raw, CANVAS, out, allow_partial=True, num_workers=1, **kwargs)


@pytest.fixture
def prepared(tmp_path) -> Path:
    return prepare(kaggle(tmp_path / "raw"), tmp_path / "out")


def test_records_are_the_photographs(prepared, tmp_path):
    records = ham10000.open_records(prepared)
    assert records.canvas == CANVAS
    raw = ham10000.find(tmp_path / "raw", allow_partial=True)
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
    assert CLASSES[example["label"]] == "akiec"
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
    again = prepare(tmp_path / "raw", tmp_path / "out", progress=lambda *at: done.append(at))
    assert again != prepared
    assert done == [(i, 7) for i in range(1, 8)]
    assert ham10000.open_records(again).fingerprint != ham10000.open_records(prepared).fingerprint


def test_records_move_without_the_photographs(prepared, tmp_path):
    moved = tmp_path / "elsewhere"
    (tmp_path / "out").rename(moved)
    folder = prepare(moved, tmp_path / "unused")
    assert moved in folder.parents
    assert not (tmp_path / "unused").exists()
    assert ham10000.open_records(moved).read(np.arange(7)).shape == (7, *CANVAS, 3)
    with pytest.raises(InputError, match=r"data.canvas = \(48, 64\).*\(24, 32\)"):
        ham10000.prepare(moved, (48, 64), tmp_path / "unused")


def test_records_that_lost_bytes_are_refused(prepared):
    (path,) = prepared.glob("*.array_record*")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="damaged"):
        ham10000.open_records(prepared)


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
        records = ham10000.open_records(folder)
        images = records.read(np.arange(len(records.table)))
    except InputError as error:
        name = ".array_record" if ".array_record" in path.name else path.name
        parts = [str(folder), "again", *([name] if has_checksums else [])]
        assert [part for part in parts if part not in str(error)] == []  # noqa: PT017, most are read
        return
    whole = ham10000.open_records(tiny_records)
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
            ham10000.open_records(prepared)


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


def test_a_table_in_a_zip_that_cannot_be_read_is_named(tmp_path):
    path = isic(tmp_path / "raw") / "ISIC2018_Task3_Training_GroundTruth.zip"
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"GroundTruth\.csv: .*encrypted"):
        ham10000.find(tmp_path / "raw", allow_partial=True)
    path.unlink()
    os.mkfifo(path.with_name("pipe.zip"))
    with pytest.raises(InputError, match=r"pipe\.zip: a pipe, socket or device"):
        ham10000.find(tmp_path / "raw", allow_partial=True)


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
        ham10000.open_records(zipped).read(np.arange(7)),
        ham10000.open_records(prepared).read(np.arange(7)),
    )


def test_a_full_disk_is_noticed_before_the_work(tmp_path, monkeypatch):
    raw = kaggle(tmp_path / "raw")
    monkeypatch.setattr(ham10000.shutil, "disk_usage", lambda _: type("U", (), {"free": 9000}))
    with pytest.raises(InputError, match=r"0\.0 GB free"):
        prepare(raw, tmp_path / "out")


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
        from ham_jax.data import ham10000
        done = []
        folder = ham10000.prepare(
            sys.argv[1], (24, 32), sys.argv[2], allow_partial=True, num_workers=1,
            progress=lambda *at: done.append(at),
        )
        print(len(done), ham10000.open_records(folder).read(np.arange(7)).shape)
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
