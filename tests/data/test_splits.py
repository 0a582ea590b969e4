import hashlib
import json
import os
import pathlib

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ham_jax import config
from ham_jax.classes import HAM10000
from ham_jax.data import splits

REPOSITORY = pathlib.Path(__file__).parents[2]


def lesions_table(lesions_per_class, images_per_lesion=(1, 2, 3)):
    """One row an image; lesion i has images_per_lesion[i % len] of them."""
    rows = [
        (f"ISIC_{dx}_{i}_{j}", f"HAM_{dx}_{i}", dx)
        for dx, num_lesions in zip(HAM10000, lesions_per_class, strict=True)
        for i in range(num_lesions)
        for j in range(images_per_lesion[i % len(images_per_lesion)])
    ]
    return pd.DataFrame(rows, columns=["image_id", "lesion_id", "dx"])


def check_folds(table, fold, num_folds):
    rows = table.assign(fold=fold)
    assert rows.groupby("lesion_id")["fold"].nunique().max() == 1, "a lesion crosses folds"
    lesions = rows.drop_duplicates("lesion_id")
    sizes = pd.crosstab(lesions["dx"], lesions["fold"]).reindex(columns=range(num_folds))
    assert (sizes.max(axis=1) - sizes.min(axis=1)).max() <= 1
    assert np.ptp(lesions["fold"].value_counts()) <= 1


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(3, 12), min_size=7, max_size=7),
    num_folds=st.integers(2, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_folds_keep_lesions_together_and_ignore_the_order_of_rows(sizes, num_folds, seed):
    table = lesions_table(sizes)
    fold = splits.folds(table, num_folds, seed)
    check_folds(table, fold, num_folds)
    order = np.random.default_rng(0).permutation(len(table))
    shuffled = table.iloc[order].astype("category")  # neither index nor dtype may matter
    np.testing.assert_array_equal(splits.folds(shuffled, num_folds, seed), fold[order])


def test_a_seed_means_the_same_folds_for_ever():
    table = lesions_table([10, 11, 12, 13, 14, 15, 16])
    fold = splits.folds(table, 5, seed=7)
    # If this fails, old checkpoints would be validated on images that they were trained on.
    assert hashlib.sha256(fold.astype("<i4").tobytes()).hexdigest()[:16] == "f6b06ae15884c7d2"
    assert len({splits.folds(table, 5, seed).tobytes() for seed in range(20)}) == 20


def test_bad_tables_are_refused_with_a_way_out():
    table = lesions_table([5, 5, 5, 3, 5, 5, 4])
    with pytest.raises(config.InputError, match=r"df 3, vasc 4\); set data.num_folds to 3 or less"):
        splits.folds(table, 5, 0)
    table.loc[table["image_id"] == "ISIC_bcc_1_0", "dx"] = "nv"
    with pytest.raises(config.InputError, match=r"1 lesion\(s\) have more than one dx: 'HAM_bcc_1"):
        splits.folds(table, 2, 0)
    with pytest.raises(config.InputError, match=r"data.split_csv"):
        splits.folds(lesions_table([1] * 7), 2, 0)
    with pytest.raises(config.InputError, match="seed"):
        splits.folds(lesions_table([5] * 7), 2, -1)


def test_ids_that_look_like_formulas_come_back(tmp_path):
    table = lesions_table([3] * 7)
    table["image_id"] = [("=", "-", "'@")[n % 3] + name for n, name in enumerate(table["image_id"])]
    table["lesion_id"] = "+" + table["lesion_id"]
    wanted = table["lesion_id"].str[-1].map({"0": "train", "1": "val", "2": "test"}).to_numpy()
    path = tmp_path / "split.csv"
    splits.write_csv(path, table, wanted)
    assert all(line.startswith(("image_id", "'")) for line in path.read_text().splitlines())
    np.testing.assert_array_equal(splits.trained_on(path, table), wanted == "train")
    assert not splits.changed_split(path, table, wanted).any()
    given = splits.assign(table, data_config(split_csv=str(path)), seed=0)
    np.testing.assert_array_equal(given, wanted)


def data_config(**changes):
    data = config.base().data
    data.update(changes)
    return data


def test_assign_takes_the_fold_of_the_configuration():
    table = lesions_table([6] * 7)
    fold = splits.folds(table, 3, 11)
    split = splits.assign(table, data_config(num_folds=3, fold=2), seed=11)
    np.testing.assert_array_equal(split == "val", fold == 2)
    assert set(split) == {"train", "val"}
    own_seed = splits.assign(table, data_config(num_folds=3, fold=2, split_seed=11), seed=5)
    np.testing.assert_array_equal(own_seed, split)


def test_what_no_fold_sees_is_set_aside_by_whole_lesions_of_each_diagnosis():
    sizes = [9, 12, 15, 24, 30, 60, 90]
    table = lesions_table(sizes)
    shares = {"test_share": 1 / 6, "val_share": 0.1}

    def split_of(rows=table, seed=4, **changes):
        return splits.assign(rows, data_config(**changes), seed)

    def lesions_of(split, name):
        return set(table["lesion_id"][split == name])

    of_folds = [split_of(num_folds=3, fold=k, **shares) for k in range(3)]
    whole = split_of(num_folds=1, **shares)
    for split in (*of_folds, whole):
        assert table.assign(split=split).groupby("lesion_id")["split"].nunique().max() == 1
    lesions = table.assign(split=whole).drop_duplicates("lesion_id")
    counts = pd.crosstab(lesions["dx"], lesions["split"]).loc[list(HAM10000.names)]
    assert counts["test"].tolist() == [max(1, round(n / 6)) for n in sizes]
    assert counts["val"].tolist() == [max(1, round(n / 10)) for n in sizes]

    # The folds share one test and leave out one validation; the rest validates once in each.
    for split in of_folds:
        assert lesions_of(split, "test") == lesions_of(whole, "test")
        assert lesions_of(split, "unused") == lesions_of(whole, "val")
    validates = np.sum([split == "val" for split in of_folds], axis=0)
    np.testing.assert_array_equal(validates, whole == "train")
    trains = np.sum([split == "train" for split in of_folds], axis=0)
    np.testing.assert_array_equal(trains, 2 * (whole == "train"))
    rest = validates == 1
    check_folds(table[rest], np.argmax([split == "val" for split in of_folds], axis=0)[rest], 3)

    # The test depends on neither the other share, nor the folds, nor the order of rows; so both.
    without = split_of(num_folds=2, test_share=1 / 6)
    assert lesions_of(without, "test") == lesions_of(whole, "test")
    assert "unused" not in without
    order = np.random.default_rng(0).permutation(len(table))
    shuffled = table.iloc[order].astype("category")
    np.testing.assert_array_equal(split_of(shuffled, num_folds=1, **shares), whole[order])
    other = split_of(seed=5, num_folds=1, **shares)
    assert lesions_of(other, "test") != lesions_of(whole, "test")
    # If this fails, old runs would be tested on images that they were trained on.
    digest = hashlib.sha256("".join(sorted(lesions_of(whole, "test"))).encode()).hexdigest()
    assert digest[:16] == "5aa47bec36fd7a06"


def test_shares_that_leave_too_little_of_a_class_are_refused():
    table = lesions_table([5, 5, 5, 4, 5, 5, 5])
    with pytest.raises(config.InputError, match=r"num_folds = 4 \(df 3 of 4\): set smaller shares"):
        splits.assign(table, data_config(num_folds=4, test_share=0.2), 0)
    enough = splits.min_lesions(data_config(num_folds=4, test_share=0.2, val_share=0.3))
    data = data_config(num_folds=4, test_share=0.2, val_share=0.3)
    for more in range(20):
        splits.assign(lesions_table([enough + more] * 7), data, 0)
    assert splits.min_lesions(data_config(num_folds=4)) == 4
    table.loc[table["image_id"] == "ISIC_bcc_1_0", "dx"] = "nv"
    with pytest.raises(config.InputError, match=r"1 lesion\(s\) have more than one dx"):
        splits.assign(table, data_config(num_folds=1, val_share=0.1), 0)


@pytest.mark.parametrize("key", ["image_id", "lesion_id"])
def test_a_split_csv_is_followed(tmp_path, key):
    table = lesions_table([3] * 7)
    wanted = table["lesion_id"].str[-1].map({"0": "train", "1": "val", "2": "test"})
    rows = pd.DataFrame({"split": wanted, key: table[key]}).sample(frac=1, random_state=0)
    path = tmp_path / "split.csv"
    rows.to_csv(path, index=False, encoding="utf-8-sig")  # as Excel writes it
    split = splits.assign(table, data_config(split_csv=str(path)), seed=0)
    np.testing.assert_array_equal(split, wanted)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_split_csv_of_excel_with_the_names_of_files_is_followed(tmp_path, encoding):
    table = lesions_table([3] * 7)
    table["image_id"] = [f"ISIC_{i:07d}" for i in range(len(table))]
    wanted = table["lesion_id"].str[-1].map({"0": "train", "1": "val", "2": "test"})
    names = [f"photos\\{name.lower()}.JPG" for name in table["image_id"]]
    lines = [
        "Image_ID;Note; Split",
        *(f"{n};0,5; {s} " for n, s in zip(names, wanted, strict=True)),
    ]
    path = tmp_path / "split.csv"
    path.write_bytes("\r\n".join(["sep=;", *lines]).encode(encoding))
    split = splits.assign(table, data_config(split_csv=str(path)), seed=0)
    np.testing.assert_array_equal(split, wanted)


def test_all_faults_of_a_split_csv_are_named_at_once(tmp_path):
    table = lesions_table([2] * 7)
    rows = dict.fromkeys(table["image_id"], "train")
    rows["ISIC_nv_1_0"] = "Train"  # bad name
    rows["ISIC_mel_1_0"] = "test"  # its sister ISIC_mel_1_1 is in train
    del rows["ISIC_df_0_0"]
    rows["ISIC_nowhere"] = "train"
    lines = [f"{name},{split}" for name, split in rows.items()]
    lines += ["ISIC_bcc_0_0,test", "ISIC_bkl_0_0,train"]  # a contradiction; a harmless repetition
    path = tmp_path / "split.csv"
    path.write_text("\n".join(["image_id,split", *lines]))
    with pytest.raises(config.InputError) as caught:
        splits.assign(table, data_config(split_csv=str(path)), seed=0)
    expected = [
        "'Train' must be one of train, val, test, unused. Did you mean 'train'?",
        "not in the data: remove them, or add the images (image_id): 'ISIC_nowhere'.",
        "have no split: give each image_id one: 'ISIC_df_0_0'.",
        "have two splits: keep one row for each image_id: 'ISIC_bcc_0_0'.",
        "more than one split, which would leak training images into the evaluation: 'HAM_mel_1'.",
        "no image has the split val.",
    ]
    assert len(caught.value.faults) == len(expected)
    for fault, text in zip(caught.value.faults, expected, strict=True):
        assert text in fault
        assert "data.split_csv" in fault


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", r"columns \(none\)"),
        (b"image,split\na,train\n", "columns image, split; it needs image_id"),
        (b"\xff\xfe\x00image_id", "cannot be read"),
        (b"image_id,split\nISIC_nv_0_0\n", "line 2: 1 fields instead of 2"),
        (b"image_id,split\nISIC_nv_0_0,\n", "split '' must be one of"),
        (b"imageid,split\na,train\n", "columns imageid, split.*'imageid'"),
        (
            "image_id,split\nFöto,train\n".encode("cp1252"),
            "line 2 holds the byte 0xf6.*'CSV UTF-8'",
        ),
        (b"PK\x03\x04\x14\x00", "an Excel"),
    ],
)
def test_a_file_that_is_no_split_csv_is_refused(tmp_path, content, message):
    path = tmp_path / "split.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(config.InputError, match=message):
        splits.assign(lesions_table([2] * 7), data_config(split_csv=str(path)), seed=0)


def test_audit_finds_every_kind_of_leak(tmp_path):
    table = lesions_table([2] * 7, images_per_lesion=(1, 2))
    table["age"] = [np.nan, 0.0] + [50.0] * (len(table) - 2)  # 0 is an age
    table["sex"] = ["unknown", ""] + ["male"] * (len(table) - 2)
    table["file_sha256"] = [f"hash {i}" for i in range(len(table))]
    table.loc[[1, 2], "file_sha256"] = "one file"  # two images of the lesion HAM_akiec_1
    split = np.where(table["lesion_id"].str.endswith("0"), "val", "train")
    test_table = pd.DataFrame(
        {"image_id": ["T1", "T2"], "lesion_id": ["", ""], "dx": "nv", "file_sha256": ["", "hash 0"]}
    )

    clean = splits.audit(table, split, HAM10000)
    assert clean.shared_lesions == ()
    assert list(clean.counts.columns) == [
        "train_images",
        "train_lesions",
        "val_images",
        "val_lesions",
    ]
    assert clean.counts.loc["total"].tolist() == [14, 7, 7, 7]
    assert clean.missing.to_dict() == {
        "train": {"age": 0, "sex": 1, "localization": 14, "dx_type": 14},
        "val": {"age": 1, "sex": 1, "localization": 7, "dx_type": 7},
    }
    assert clean.duplicate_files == ((("ISIC_akiec_1_0", "train"), ("ISIC_akiec_1_1", "train")),)

    assert "across splits: none" in clean.text()
    unhashed = splits.audit(table.drop(columns="file_sha256"), split, HAM10000)
    assert unhashed.duplicate_files is None
    assert "not looked for" in unhashed.text()

    split[2] = "val"
    found = splits.audit(table, split, HAM10000, test_table)
    assert found.shared_lesions == ("HAM_akiec_1",)
    assert found.counts.loc["nv", ["test_images", "test_lesions"]].tolist() == [2, 2]
    assert (("ISIC_akiec_0_0", "val"), ("T2", "test")) in found.duplicate_files
    assert "in more than one split: 1 ('HAM_akiec_1')" in found.text()
    assert "across splits: 2" in found.text()

    found.write(tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["audit.csv", "audit.json"]
    content = json.loads((tmp_path / "new" / "audit.json").read_text())
    assert content["shared_lesions"] == ["HAM_akiec_1"]
    assert content["counts"]["nv"]["test_images"] == 2
    counts = pd.read_csv(tmp_path / "new" / "audit.csv", index_col="dx")
    pd.testing.assert_frame_equal(counts, found.counts, check_dtype=False)


def test_the_published_metadata_split_cleanly():
    root = os.environ.get("HAM_JAX_DATA", REPOSITORY.parent / "shared" / "data")
    path = pathlib.Path(root) / "ham10000" / "HAM10000_metadata.csv"
    if not path.is_file():
        pytest.skip("no HAM10000: set HAM_JAX_DATA to the folder that holds ham10000/")
    table = pd.read_csv(path)
    check_folds(table, splits.folds(table, 5, 0), 5)
    audit = splits.audit(table, splits.assign(table, config.base().data, seed=0), HAM10000)
    assert audit.shared_lesions == ()
    assert audit.counts.loc["df"].tolist()[1::2] == [58, 15]  # of 73 lesions
    images, lesions = audit.counts.filter(like="_images"), audit.counts.filter(like="_lesions")
    # The published totals.
    assert images.sum(axis=1).tolist() == [327, 514, 1099, 115, 1113, 6705, 142, 10015]
    assert lesions.sum(axis=1).tolist() == [228, 327, 727, 73, 614, 5403, 98, 7470]
    assert audit.missing.sum(axis=1).tolist() == [57, 57, 234, 0]
