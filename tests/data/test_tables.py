import csv
import io
import os
import random
import zipfile

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ham_jax.data import layouts, tables

CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0\ufeff"), max_size=8)
NAMES = st.text("abcdefgh_1", min_size=1, max_size=6)


def written(header, rows, separator, end, quoting, encoding, prefix):
    file = io.StringIO(newline="")
    file.write(prefix)
    writer = csv.writer(file, delimiter=separator, lineterminator=end, quoting=quoting)
    writer.writerow(header)
    writer.writerows(rows)
    return file.getvalue().encode(encoding)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_table_reads_back_from_every_dialect(data):
    draw = data.draw
    header = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    row = st.tuples(*[CELLS] * len(header)).filter(lambda cells: any(c.strip() for c in cells))
    rows = draw(st.lists(row, max_size=6))
    separator = draw(st.sampled_from(",;\t|"))
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
    content = written(
        [draw(st.sampled_from([name, name.upper(), f" {name} "])) for name in header],
        rows,
        separator,
        end=draw(st.sampled_from(["\n", "\r\n", "\r"])),
        quoting=csv.QUOTE_ALL,
        encoding=encoding,
        prefix=draw(st.sampled_from(["", f"sep={separator}\r\n", "\n\n"])),
    )
    table = tables.read(content)
    expected = pd.DataFrame([[c.strip() for c in r] for r in rows], columns=header, dtype=str)
    pd.testing.assert_frame_equal(table.texts, expected, check_index_type=False)
    assert table.faults == []
    assert tables.columns(content) == tuple(header)
    assert len(table.lines) == len(rows)


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=60)
    | st.lists(
        st.sampled_from([b"image_id", b",", b";", b"\t", b"\n", b"\r", b'"', b" ", b"\xff\xfe"])
        | st.sampled_from(
            [b"\xef\xbb\xbf", b"\0", b"sep=;", b"\xe4", "ä€".encode(), b"PK\x03\x04"]
        ),
        max_size=12,
    ).map(b"".join)
)
def test_any_bytes_are_a_table_or_an_error_of_their_own(content):
    for reading in (tables.columns, tables.read):
        try:
            reading(content)
        except tables.TableError as error:
            assert str(error).endswith((".", "?"))  # noqa: PT017, a sentence


@pytest.mark.parametrize(
    ("content", "columns", "rows", "lines"),
    [
        (b"a;b\n1,5;2\n", "a b", [("1,5", "2")], [2]),
        (b"a,b\n1;2,3;4\n", "a b", [("1;2", "3;4")], [2]),
        (b"age, years;sex\n45,0;m\n", "age, years|sex", [("45,0", "m")], [2]),
        (b"path\na,b.jpg\n", "path", [("a,b.jpg",)], [2]),
        (b'a, b\n"x, y" , "z"\n', "a b", [("x, y", "z")], [2]),
        (b'a,b\n"1\n\n2",3\n\n4,5\n', "a b", [("1\n\n2", "3"), ("4", "5")], [2, 6]),
        (b"sep=;\r\na;b\r\n1;2\r\n", "a b", [("1", "2")], [3]),
        (b'"sep=\t"\na,x\tb\n1\t2\n', "a,x|b", [("1", "2")], [3]),
        (b"a;b;;\n1;2;;\n3;4\n;;;\n", "a b", [("1", "2"), ("3", "4")], [2, 3]),
        (b",A,a\n0,1,1\n", "|a", [("0", "1")], [2]),  # an index; one column twice
        (b'a,b\n5" x,2\n', "a b", [('5" x', "2")], [2]),
        ("a;b\nä;ö\n".encode("utf-16-le"), "a b", [("ä", "ö")], [2]),
        ("a;b\nä;ö\n".encode("utf-16-be"), "a b", [("ä", "ö")], [2]),
    ],
)
def test_what_programs_write(content, columns, rows, lines):
    table = tables.read(content)
    assert list(table.texts.columns) == columns.split("|" if "|" in columns else None)
    assert list(table.texts.itertuples(index=False, name=None)) == rows
    assert table.lines == lines
    assert table.faults == []


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a,b\n1,2\n3,ä\n".encode("cp1252"), r"line 3 holds the byte 0xe4.*'ä'.*CSV UTF-8"),
        (b"PK\x03\x04\x14\0", "it is an Excel"),
        (b"\xd0\xcf\x11\xe0\xa1", "old Excel"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"a,b\n1,\0\n", "zero bytes"),
        (random.Random(0).randbytes(5000), "zero bytes|not in UTF-8"),
        (b'a,b\n1,2\n"3,4\n5,6\n', "line 3: a quote is never closed"),
        (b'a,b\n1,"' + b"x\n" * 100_000, "line 2: .*never closed"),
        (b"a,A\n1,2\n", "two columns are called 'a'"),
        ("a,b\n1,2\n".encode("utf-16")[:-1], "utf-16-le, but is damaged"),
    ],
)
def test_what_is_no_table_is_refused_in_a_sentence(content, told):
    with pytest.raises(tables.TableError, match=told):
        tables.read(content)


def test_lines_of_another_length_are_named_and_left_out():
    table = tables.read(b"a,b\n1\n2,3\n\n4,5,6\n" + b"7\n" * 20)
    assert list(table.texts["b"]) == ["3"]
    assert table.faults[:2] == ["line 2: 1 fields instead of 2.", "line 5: 3 fields instead of 2."]
    assert table.faults[-1] == "12 more lines are of a wrong length."
    assert len(table.faults) == 11


def test_sizes_are_looked_at_before_and_while_reading(tmp_path, monkeypatch):
    large = tmp_path / "large.csv"
    with large.open("wb") as file:
        file.write(b"image_id,dx\n")
        file.truncate(10 << 30)  # a sparse file
    with pytest.raises(tables.TableError, match="10,737,418,240 bytes"):
        tables.read(large)
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(tables.TableError, match="not a regular file"):
        tables.read(tmp_path / "pipe.csv")
    monkeypatch.setattr(tables, "MAX_BYTES", 1 << 16)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.csv", b"a,b\n" * (1 << 20))
    member = layouts.ZipMember(str(tmp_path / "bomb.zip"), "a.csv")
    with pytest.raises(tables.TableError, match="it has 4,194,304 bytes"):
        tables.read(member, layouts.size(member))
    with pytest.raises(tables.TableError, match="at least 65,537 bytes"):
        tables.read(member, 10)  # a zip whose directory does not tell the truth
    assert tables.columns(member) == ("a", "b")
    monkeypatch.setattr(tables, "MAX_CELLS", 100)
    with pytest.raises(tables.TableError, match="more than 100 cells"):
        tables.read(b"a,b\n" + b",1\n" * 60)
    monkeypatch.setattr(tables, "MAX_LINES", 100)
    with pytest.raises(tables.TableError, match="more than 100 lines"):
        tables.read(b"a,b\n" + b"\n" * 200)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("45", 45), ("45.0", 45), ("45,0", 45), ("-1,5", -1.5), (",5", 0.5), ("1e2", 100)),
        *((text, None) for text in ("", "nan", "inf", "1_0", "1.234,5", "1 000", "٤", "4 5", "x")),
    ],
)
def test_numbers_have_a_point_or_a_comma(text, value):
    if value is None:
        with pytest.raises(ValueError, match="not a number"):
            tables.number(text)
    else:
        assert tables.number(text) == value
    assert pd.isna(tables.numbers(pd.Series([text]))[0]) == (value is None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ISIC_0024306", "ISIC_0024306"),
        ("isic_0024306.HEIC", "ISIC_0024306"),
        ("a\\b/Isic_0024306.jpg", "ISIC_0024306"),
        ("x/Own.photo.JPEG", "Own.photo"),
        ("own.photo", "own.photo"),
        ("", ""),
    ],
)
def test_an_image_id_is_what_a_file_is_called(name, expected):
    assert tables.image_id(name) == expected
