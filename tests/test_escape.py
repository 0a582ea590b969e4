"""Texts from outside stay texts: on the terminal, in spreadsheets, and when they are read back."""

import csv
import io
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ham_jax import console, escape

ANY = st.text(st.characters(), max_size=12)  # lone surrogates, too


@given(ANY)
def test_what_is_shown_is_visible_and_fits_everywhere(text):
    shown = escape.shown(text)
    shown.encode()
    kinds = {unicodedata.category(c) for c in shown if c not in "\u200c\u200d"}
    assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert escape.shown(shown) == shown
    assert escape.shown("a" + text) == "a" + shown


def test_escapes_say_what_was_there_and_leave_letters_alone():
    name = b"caf\xe9\\ \x1b[2J\n\x85".decode("utf-8", "surrogateescape") + "\u202egpj.\u0085"
    assert escape.shown(name) == r"caf\xe9\ \x1b[2J\n\x85\u202egpj.\u0085"
    for kept in ("Fötö 日本\u3000.jpg", "क\u200c्", r"C:\photos\x1.jpg", "👩\u200d🔬"):
        assert escape.shown(kept) == kept


@given(st.lists(st.lists(ANY | st.floats(-9, 9), min_size=2, max_size=3), min_size=1, max_size=4))
@example([["=1+1", "'=1+1", "''-x"], [" +x", "\t=x", "a\rb"], ["-0.5", -0.5, "+1e-3"]])
def test_a_table_runs_nothing_and_gives_back_what_was_written(rows):
    text = escape.csv_text(rows)
    read = list(csv.reader(io.StringIO(text, newline="")))
    assert [[escape.plain(cell) for cell in row] for row in read] == [
        [str(value) for value in row] for row in rows
    ]
    for cell in (cell for row in read for cell in row):
        try:
            float(cell)
        except ValueError:
            assert not cell.strip().startswith(tuple("=+-@＝＋－＠")), cell  # noqa: RUF001
            assert not cell.startswith(tuple("\t\r\n")), cell


@given(ANY)
@example("[/b] [red]x[/red] :smile: $x_1$")
def test_the_terminal_gets_a_name_as_it_is_shown(text):
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("console", "_output"):
            # Not `file` and `width`, whose old values would be set for good afterwards.
            patch.setattr(getattr(console, name), "_file", said)
            patch.setattr(getattr(console, name), "_width", 400)
        console.log_line("a" + escape.shown(text) + "z")
        console.print_table(f"t{text}", ["a", f"b{text}"], [["1", f"a{text}z"]])
    shown = escape.shown(text)
    assert said.getvalue().startswith(f"a{shown}z\n")
    assert f"a{shown}z" in said.getvalue().split("\n", 1)[1]
    assert not any(unicodedata.category(c) in ("Cc", "Cs") and c != "\n" for c in said.getvalue())


def test_a_terminal_of_few_letters_prints_every_name(monkeypatch):
    said = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(console._output, "_file", said)
    console.print_table("Fötö", ["日本"], [["\udcff"]])
    said.flush()
    assert rb"F\xf6t\xf6" in said.buffer.getvalue()
