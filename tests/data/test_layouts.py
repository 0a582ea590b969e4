"""Photographs and metadata are found in every layout, and all that is wrong is named."""

import hashlib
import os
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ham_jax import config
from ham_jax.classes import HAM10000, ISIC2019, Classes, known
from ham_jax.config import InputError
from ham_jax.data import layouts

made = runpy.run_path(str(Path(__file__).with_name("raw_folders.py")))
ROWS, IDS, jpeg, one_hot = (made[name] for name in ("ROWS", "IDS", "jpeg", "one_hot"))
kaggle, dataverse, isic, flat = (made[name] for name in ("kaggle", "dataverse", "isic", "flat"))


@pytest.mark.parametrize("layout", [kaggle, dataverse, isic, flat])
def test_every_layout_gives_the_same_images_and_diagnoses(layout, tmp_path):
    raw = layouts.find(layout(tmp_path / "raw"), allow_partial=True)
    expected = ROWS.sort_values("image_id", ignore_index=True)
    for column in ("image_id", "lesion_id", "dx", "dx_type"):
        assert list(raw.table[column]) == list(expected[column])
    assert [HAM10000.names[i] for i in raw.table["label"]] == list(expected["dx"])
    if layout is not isic:  # the challenge publishes no ages
        np.testing.assert_array_equal(raw.table["age"], pd.to_numeric(expected["age"]))
    for source, size, name in zip(raw.sources, raw.sizes, IDS, strict=True):
        with source.open("rb") as file:
            assert file.read() == jpeg(name)
        assert size == len(jpeg(name))


def test_official_test_without_lesion_ids_and_with_its_row_without_image(tmp_path):
    dx = np.repeat(HAM10000.names, layouts.TEST_IMAGES)
    names = [f"ISIC_{34524 + i:07d}" for i in range(len(dx) + 1)]
    names.remove("ISIC_0035068")
    for name in names:
        (tmp_path / f"{name}.jpg").touch()
    rows = pd.DataFrame({"image_id": [*names, "ISIC_0035068"], "dx": [*dx, "nv"]})
    truth = tmp_path / "ISIC2018_Task3_Test_GroundTruth.csv"
    truth.write_text(one_hot(rows))
    raw = layouts.find(tmp_path)  # the published counts hold
    assert list(raw.table["lesion_id"]) == list(raw.table["image_id"]) == names
    assert list(raw.table["dx"]) == list(dx)

    rows["lesion_id"] = [f"HAMTEST_{i // 2:07d}" for i in range(len(rows))]
    rows["dx"] = "nv"
    truth.unlink()
    rows.to_csv(tmp_path / "ISIC2018_Task3_Test_GroundTruth.tab", sep="\t", index=False)
    with pytest.raises(InputError, match="nv 1,511 instead of 908"):
        layouts.find(tmp_path)


CONFIRMED = {v: k for k, v in layouts._CONFIRMED.items()}
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


TABLES = {
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
@pytest.mark.parametrize("layout", TABLES)
def test_every_layout_reads_alike_in_every_dialect(layout, dialect, tmp_path):
    folder = photographs(tmp_path, suffix=".JPG" if layout == "archive" else ".jpg")
    for name, rows in TABLES[layout].items():
        (folder / name).write_bytes(DIALECTS[dialect](rows))
    expected = ROWS.sort_values("image_id", ignore_index=True).assign(
        dataset="rosendahl" if layout == "dataverse" else "",
        age=lambda rows: pd.to_numeric(rows["age"]),
        label=lambda rows: rows["dx"].map(HAM10000.index),
    )
    if layout == "challenge":
        expected = expected.assign(age=np.nan, sex="", localization="")
    if layout == "archive":
        expected["lesion_id"] = expected["lesion_id"].str.replace("HAM_", "IL_")
    raw = layouts.find(folder, allow_partial=True)
    pd.testing.assert_frame_equal(
        raw.table, expected[["image_id", *layouts.COLUMNS, "label"]], check_dtype=False
    )
    assert [source.stem for source in raw.sources] == IDS


def find_archive(folder: Path, rows: pd.DataFrame, allow_partial: bool = True) -> pd.DataFrame:
    rows.to_csv(folder / "metadata.csv", index=False)
    return layouts.find(folder, allow_partial=allow_partial).table.set_index("image_id")


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
            layouts.find(folder)
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
            ["a.csv: lacks the", "'x', 'y'", "b.tab: is empty"],
        ),
        (
            {"a.csv": b"image,MEL,NV\nx,1,0\n"},
            ["has image, mel, nv, but not the columns akiec, bcc, bkl, df, vasc"],
        ),
        ({"a.csv": b"PK\x03\x04\0\0"}, ["a.csv: cannot be read as a table: it is an Excel"]),
        ({"m.xlsx": b"PK\x03\x04\0\0"}, ["m.xlsx: cannot be read as a table: it is an Excel"]),
        ({"a.csv": "image_id,dx\n1,ä\n".encode("cp1252")}, ["a.csv: cannot be read", "UTF-8"]),
        ({"a.csv": b"image,lesion_id\n1,2\n", "note.txt": b"hello"}, ["lists lesions, but not"]),
    ],
)
def test_each_table_that_will_not_do_is_named_with_why(files, told, tmp_path):
    photographs(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        layouts.find(tmp_path)
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
        (edit(4, ",nv,", ",Nevus,"), [r"line 4: dx 'Nevus' .*'nv'\?"]),
        (edit(4, ",nv,", ",Melanoma,"), [r"line 4: dx 'Melanoma' .*'mel'\?"]),
        (edit(3, "45.0", "forty"), ["line 3: age 'forty'"]),
        (edit(3, "45.0", "-1"), ["line 3: age '-1'"]),
        (edit(1, "lesion_id", "lesion"), ["7 images have no lesion_id"]),
        (edit(1, "dx,", "diagnosis,"), ["has image_id, but not the column dx"]),
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
        layouts.find(tmp_path / "raw", allow_partial=True)
    for pattern in told:
        assert re.search(pattern, str(error.value)), error.value


def test_repeated_rows_are_no_fault(tmp_path):
    raw = layouts.find(kaggle(tmp_path / "raw", pd.concat([ROWS, ROWS[:3]])), allow_partial=True)
    assert list(raw.table["image_id"]) == IDS


def test_one_hot_rows_must_name_one_class(tmp_path):
    isic(tmp_path / "raw")
    (tmp_path / "raw" / "ISIC2018_Task3_Training_GroundTruth.zip").unlink()
    truth = tmp_path / "raw" / "truth.csv"
    truth.write_text(edit(3, "1.0", "0.5")(edit(5, "0.0", "1.0")(one_hot(ROWS))))
    with pytest.raises(InputError, match=r"(?s)line 3: exactly one.*line 5: exactly one"):
        layouts.find(tmp_path / "raw", allow_partial=True)


def test_training_truth_without_lesions_is_refused(tmp_path):
    isic(tmp_path / "raw")
    (tmp_path / "raw" / "ISIC2018_Task3_Training_LesionGroupings.csv").unlink()
    with pytest.raises(InputError, match=r"7 images have no lesion_id.*LesionGroupings"):
        layouts.find(tmp_path / "raw", allow_partial=True)


def test_images_and_metadata_must_match_unless_a_part_is_meant(tmp_path):
    flat(tmp_path / "raw")
    with pytest.raises(InputError, match=r"images 7 instead of 10,015.*df 0 instead of 115"):
        layouts.find(tmp_path / "raw")
    (tmp_path / "raw" / "ISIC_0024312.jpg").rename(tmp_path / "raw" / "ISIC_0029999.jpg")
    with pytest.raises(InputError) as error:
        layouts.find(tmp_path / "raw")
    assert "1 images have no metadata (ISIC_0029999)" in str(error.value)
    assert "1 rows of metadata have no image (ISIC_0024312)" in str(error.value)
    assert list(layouts.find(tmp_path / "raw", allow_partial=True).table["image_id"]) == IDS[:-1]


def test_two_sizes_of_one_photograph_are_ambiguous(tmp_path):
    flat(tmp_path / "raw")
    (tmp_path / "raw" / "small").mkdir()
    (tmp_path / "raw" / "small" / f"{IDS[0]}.jpg").write_bytes(b"other")
    with pytest.raises(InputError, match="1 images lie there several times"):
        layouts.find(tmp_path / "raw", allow_partial=True)


def test_training_and_test_in_one_folder_are_told_apart(tmp_path):
    flat(tmp_path / "raw")
    (tmp_path / "raw" / "ISIC_0034600.jpg").write_bytes(jpeg("test"))
    with (tmp_path / "raw" / "labels.csv").open("a") as file:
        file.write("HAMTEST_0000001,ISIC_0034600,nv,histo,30,male,back\n")
    with pytest.raises(InputError, match=r"Give each set a folder.*data\.test_dir"):
        layouts.find(tmp_path / "raw")


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
        layouts.find(tmp_path / "raw")
    ways = ("--config.data.download=true", "--config.data.dir=PATH", "configs/demo.py")
    for text in (found, str(tmp_path / "raw"), "HAM10000_metadata", *ways):
        assert text in str(error.value)


def test_a_damaged_zip_is_named(tmp_path):
    path = dataverse(tmp_path / "raw") / "HAM10000_images_part_2.zip"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"images_part_2\.zip: .*Fetch this zip again"):
        layouts.find(tmp_path / "raw", allow_partial=True)


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
        raw = layouts.find(folder, allow_partial=True)
    except InputError:
        return
    assert set(raw.table["image_id"]) <= set(IDS)
    assert raw.table["dx"].isin(HAM10000.names).all()
    assert (raw.table["age"].isna() | raw.table["age"].between(0, 120)).all()


def test_the_real_training_set_is_complete(real_data):
    table = layouts.find(real_data / "ham10000").table
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


def test_a_table_in_a_zip_that_cannot_be_read_is_named(tmp_path):
    path = isic(tmp_path / "raw") / "ISIC2018_Task3_Training_GroundTruth.zip"
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"GroundTruth\.csv: .*encrypted"):
        layouts.find(tmp_path / "raw", allow_partial=True)
    path.unlink()
    os.mkfifo(path.with_name("pipe.zip"))
    with pytest.raises(InputError, match=r"pipe\.zip: a pipe, socket or device"):
        layouts.find(tmp_path / "raw", allow_partial=True)


def own(folder: Path, rows: pd.DataFrame) -> Path:
    """A person's own photographs with a table of them, named by `image_id` or `isic_id`."""
    (ids,) = (rows[name] for name in ("image_id", "isic_id") if name in rows)
    photographs(folder, ids)
    rows.to_csv(folder / "mine.csv", index=False)
    return folder


THREE = pd.DataFrame(
    {
        "isic_id": [f"photo {n}" for n in range(6)],
        "dx": ["Benign nevus", "benign nevus", "Melanoma ", "melanoma", "wart", "Wart"],
    }
)


def test_own_photographs_need_no_lesion_ids_which_is_said_once(tmp_path, capsys):
    classes = Classes(("wart", "benign nevus", "Melanoma"), malignant=("Melanoma",))
    folder = own(tmp_path, THREE)
    raw = layouts.find(folder, classes)  # nor allow_partial: no counts are published
    assert raw.classes == classes
    assert list(raw.table["lesion_id"]) == list(raw.table["image_id"]) == list(THREE["isic_id"])
    assert list(raw.table["dx"]) == [classes.names[n] for n in (1, 1, 2, 2, 0, 0)]
    assert list(raw.table["label"]) == [1, 1, 2, 2, 0, 0]
    layouts.find(folder, classes)
    assert capsys.readouterr().err.count("6 of 6 images have no lesion_id") == 1

    own(tmp_path, THREE.assign(lesion_id=["L1", "L1", "", "NA", "L2", "L2"]))
    lesions = layouts.find(folder, classes).table["lesion_id"]
    assert list(lesions) == ["L1", "L1", "photo 2", "photo 3", "L2", "L2"]
    assert "2 of 6 images have no lesion_id" in capsys.readouterr().err
    (folder / "photo 0.jpg").rename(folder / "photo 9.jpg")
    with pytest.raises(InputError) as error:
        layouts.find(folder, classes)
    for text in ("1 images have no metadata (photo 9)", "1 rows of metadata have no image"):
        assert text in str(error.value)


@pytest.mark.parametrize(
    "words",
    [("Benign nevus", "wart"), ("Bowen's", "$HOME `x` !", "a\\b"), ("nævus", "b, c", "(d)")],
)
def test_words_of_other_classes_come_as_an_option_to_be_pasted(words, tmp_path):
    rows = pd.DataFrame({"image_id": [f"p{n}" for n in range(len(words))], "dx": words})
    with pytest.raises(InputError, match=r"line 2: dx .* must be one of akiec, bcc") as error:
        layouts.find(own(tmp_path, rows))
    (option,) = re.findall(r"--config\.data\.classes=.*(?=\.$)", error.value.faults[-1])
    (argument,) = shlex.split(option)
    given = config.base()
    assert config.override(given, [(argument[len("--config.") :].partition("=")[::2])]) == []
    classes = known(given.data.classes)
    assert set(layouts.find(tmp_path, classes).table["dx"]) == set(words) == set(classes)


def test_words_that_cannot_be_classes_are_told_with_why(tmp_path):
    rows = pd.DataFrame({"image_id": ["a", "b"], "dx": ["image", "wart"]})
    with pytest.raises(InputError, match=r"\(image, wart\) cannot be .* No class can be called"):
        layouts.find(own(tmp_path, rows))
    many = pd.DataFrame({"image_id": [f"p{n}" for n in range(101)]})
    with pytest.raises(InputError, match="There are 101 classes"):
        layouts.find(own(tmp_path, many.assign(dx=many["image_id"])))


def test_ham10000s_own_photographs_need_their_lesions_whatever_the_classes(tmp_path):
    rows = ROWS.assign(dx=["bad", "bad", *["good"] * 5]).drop(columns="lesion_id")
    with pytest.raises(InputError, match="7 images have no lesion_id"):
        layouts.find(own(tmp_path, rows), known(("good", "bad")), allow_partial=True)
    own(tmp_path, rows.assign(lesion_id=ROWS["lesion_id"]))
    assert len(layouts.find(tmp_path, known(("good", "bad"))).table) == 7  # no counts either


def isic2019(folder: Path) -> list[str]:
    """Nine images: two of one lesion of HAM10000, three without a lesion, the last unknown."""
    names = ["ISIC_0024306", "ISIC_0024307", "ISIC_0000002_downsampled", "ISIC_0053459"]
    names += [f"ISIC_005346{n}" for n in range(5)]
    photographs(folder, names)
    columns = [name.upper() for name in (*ISIC2019, "unk")]
    hot = np.eye(9)[[1, 1, *range(2, 9)]]
    pd.DataFrame(hot, names, columns).to_csv(
        folder / "ISIC_2019_Training_GroundTruth.csv", index_label="image"
    )
    pd.DataFrame(
        {
            "image": names,
            "age_approx": ["55.0", "", *["30.0"] * 7],
            "anatom_site_general": "anterior torso",
            "lesion_id": [*["HAM_0000550"] * 2, "MSK4_0011169", "", "", "", *["BCN_1"] * 3],
            "sex": "female",
        }
    ).to_csv(folder / "ISIC_2019_Training_Metadata.csv", index=False)
    return names


def test_isic_2019_is_found_and_its_unknown_images_are_named(tmp_path, capsys):
    names = isic2019(tmp_path)
    with pytest.raises(InputError) as error:
        layouts.find(tmp_path)
    told = "is the truth of ISIC 2019. To train on its classes set --config.data.classes=\"('mel', "
    assert told in str(error.value)
    with pytest.raises(InputError, match=r"line 10: UNK is 1 for 1 images \(ISIC_0053464\)"):
        layouts.find(tmp_path, ISIC2019)

    truth = tmp_path / "ISIC_2019_Training_GroundTruth.csv"
    lesions = tmp_path / "ISIC_2019_Training_Metadata.csv"
    lesions.write_text(lesions.read_text().replace("BCN_1", "").replace("ISIC_0053464", "other"))
    table = layouts.find(tmp_path, ISIC2019, allow_partial=True).table.set_index("image_id")
    assert list(table["dx"][names[:-1]]) == ["nv", *ISIC2019.names[1:]]
    assert table.loc[names[:3], "lesion_id"].tolist() == [*["HAM_0000550"] * 2, "MSK4_0011169"]
    assert (table.loc[names[3:-1], "lesion_id"] == names[3:-1]).all()
    assert table.loc[names[0], "age"] == 55
    assert set(table["localization"]) == {"anterior torso"}
    assert "5 of 8 images have no lesion_id" in capsys.readouterr().err

    (tmp_path / f"{names[-1]}.jpg").unlink()
    truth.write_text("".join(truth.read_text().splitlines(keepends=True)[:-1]))
    assert len(layouts.find(tmp_path, ISIC2019).table) == 8  # whole again


def test_a_layout_is_one_entry(tmp_path, monkeypatch):
    def rows(table, search):
        return table.rename(columns={"foto": "image_id"}).assign(
            dx=table["befund"].map(dict(zip("ABC", search.classes, strict=False)))
        )

    dummy = layouts.Layout("the clinic's export", lambda _: (("foto",), ("befund", "dx1")), rows)
    photographs(tmp_path, ["a", "b"])
    (tmp_path / "export.csv").write_text("Foto;Befund\na.jpg;B\nb.jpg;A\n")
    with pytest.raises(InputError, match=r"export\.csv: lacks the columns image_id, dx of a table"):
        layouts.find(tmp_path)
    monkeypatch.setattr(layouts, "LAYOUTS", (*layouts.LAYOUTS, dummy))
    assert list(layouts.find(tmp_path).table["dx"]) == ["bcc", "akiec"]
    (tmp_path / "export.csv").write_text("Foto;Rest\na.jpg;B\nb.jpg;A\n")
    with pytest.raises(InputError, match="has foto, but not the column befund of the clinic's"):
        layouts.find(tmp_path)
