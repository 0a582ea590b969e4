"""What is known of a lesion becomes its code; what is not known, or must not be, does not."""

import jax
import numpy as np
import pandas as pd

from ham_jax.data import metadata, records

AGE, SEX, SITE = slice(0, 11), slice(11, 14), slice(14, 29)


def code(**values):
    (row,) = metadata.encode(pd.DataFrame([values]))
    return row


def test_a_table_by_hand(capsys):
    table = pd.DataFrame(
        {
            "age": [35.0, 80.0, np.nan, 0.0, 101.0],
            "sex": ["male", "Female ", "unknown", "", "divers"],
            "localization": ["abdomen", "upper extremity", "unknown", np.nan, "left knee"],
        }
    )
    codes = metadata.encode(table)
    assert codes.shape == (5, metadata.NUM_METADATA)
    assert codes.dtype == np.float32
    places = [[np.flatnonzero(row[g]).tolist() for g in (AGE, SEX, SITE)] for row in codes]
    assert places == [
        [[3, 4], [1], [0]],
        [[8], [0], [13]],
        [[10], [2], [14]],
        [[10], [2], [14]],
        [[9], [2], [14]],
    ]
    np.testing.assert_array_equal(codes[0, 3:5], 0.5)
    for group in (AGE, SEX, SITE):
        np.testing.assert_allclose(codes[:, group].sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(codes[2], metadata.MISSING)
    metadata.warn_unknown(table[:4])
    assert capsys.readouterr().err == ""
    metadata.warn_unknown(table)
    sex, site = capsys.readouterr().err.splitlines()
    assert sex.startswith("sex: 1 of 5 photographs")
    assert "'left knee'" in site


def test_absent_columns_count_as_not_known():
    nothing = metadata.encode(pd.DataFrame(index=range(3)))
    np.testing.assert_array_equal(nothing, [metadata.MISSING] * 3)
    np.testing.assert_array_equal(code(sex="male"), code(age=np.nan, sex="male", localization=""))


def test_the_code_of_an_age_is_linear_between_its_places():
    codes = metadata.encode(pd.DataFrame({"age": np.arange(1.0, 91)}))
    np.testing.assert_allclose(codes[:, AGE][:, :10] @ metadata.AGES, np.arange(1, 91), rtol=1e-5)


def test_how_and_where_it_was_diagnosed_does_not_enter(tiny_records):
    table = records.open_records(tiny_records).table
    rest = [name for name in table.columns if name not in ("age", "sex", "localization")]
    assert {"dx", "dx_type", "dataset", "label", "lesion_id"} <= set(rest)
    other = table.copy()
    other[rest] = table[rest].sample(frac=1, random_state=0).to_numpy()
    assert not table.equals(other)
    np.testing.assert_array_equal(metadata.encode(table), metadata.encode(other))


def test_all_words_of_ham10000_are_known(real_data, capsys):
    table = pd.read_csv(real_data / "ham10000" / "HAM10000_metadata.csv")
    metadata.warn_unknown(table)
    assert capsys.readouterr().err == ""
    codes = metadata.encode(table)
    assert codes[:, [10, 13, 28]].sum(0).tolist() == [57 + 39, 57, 234]
    assert (codes.sum(0) > 0).all()


def test_drop_gives_exactly_the_missing_code_group_by_group():
    row = code(age=47.0, sex="female", localization="ear")
    codes = np.tile(row, (4000, 1))
    dropped = np.asarray(jax.jit(metadata.drop)(jax.random.key(0), codes, 0.3))
    gone = []
    for group in (AGE, SEX, SITE):
        missing = (dropped[:, group] == metadata.MISSING[group]).all(1)
        np.testing.assert_array_equal(dropped[~missing][:, group], codes[~missing][:, group])
        gone.append(missing)
    # Binomial(4000, 0.3) has a deviation of 29, the share of rows that lose two groups of 18.
    assert np.abs(np.sum(gone, axis=1) - 1200).max() < 5 * 29
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs((gone[a] & gone[b]).sum() - 360) < 5 * 18
    np.testing.assert_array_equal(metadata.drop(jax.random.key(0), codes, 0.0), codes)
