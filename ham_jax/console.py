"""What a person sees in the terminal: progress bars and tables. The only room that knows rich.

Whatever is printed, names from outside included, comes out as visible characters and means nothing
to the terminal or to rich; printing never fails.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import rich.box
import rich.cells
import rich.console
import rich.progress
import rich.table
import rich.text

from ham_jax import escape

_LINE_EVERY_S = 10.0  # where bars cannot be drawn

console = rich.console.Console(stderr=True, highlight=False, emoji=False)
_output = rich.console.Console(highlight=False, emoji=False)


def is_terminal() -> bool:
    """Returns whether bars can be drawn."""
    return console.is_terminal


@contextlib.contextmanager
def progress(description: str | None) -> Iterator[Callable[..., None]]:
    """Shows how far a task is: a bar on a terminal, else a line at most every 10 seconds.

    Without a description it is a no-op: the caller reports progress.

    Yields:
      progress(done, total, note=""): tells the state; the bar appears with the first call.
    """
    if description is None:
        yield lambda *_, **__: None
        return
    if not console.is_terminal:
        yield _lines(description)
        return
    columns = (
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[note]}", markup=False),
    )
    with rich.progress.Progress(*columns, console=console, transient=True) as bar:
        task = None

        def show(done: int, total: int, note: str = "") -> None:
            nonlocal task
            if task is None:
                task = bar.add_task(escape.shown(description), total=total, note=note)
            bar.update(task, completed=done, total=total, note=note)

        yield show


def log_line(text: str) -> None:
    """Prints a line or several to standard error, above a live bar if there is one."""
    console.print(rich.text.Text(escape.lines(text)), soft_wrap=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a small table to standard output; empty column names leave out the header."""
    table = rich.table.Table(
        title=_text(title, "table.title"),
        title_justify="left",
        box=rich.box.SIMPLE,
        show_header=any(columns),
    )
    for number, name in enumerate(columns):
        justify = "right" if number and name else "left"
        table.add_column(_text(name), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*map(_text, row))
    _output.print(table)


def print_lines(lines: Iterable[str], width: int) -> None:
    """Prints lines to standard output, those that are longer than the width broken at blanks."""
    for line in lines:
        text = _text(line)
        for part in text.wrap(_output, width) if columns(text.plain) > width else [text]:
            part.rstrip()
            _output.print(part, soft_wrap=True)


def columns(text: str) -> int:
    """Returns how many columns of the terminal a text takes; some letters take two."""
    return rich.cells.cell_len(text)


def fit(text: str, width: int) -> str:
    """Returns a text of exactly so many columns, at least 6: filled up, or shortened in the middle.

    Args:
      text: of visible characters.
      width: of the result.
    """
    if columns(text) <= width:
        return rich.cells.set_cell_size(text, width)
    tail = text[-((width - 3) // 2) :]
    while columns(tail) > (width - 3) // 2:
        tail = tail[1:]
    return rich.cells.set_cell_size(text, width - 3 - columns(tail)) + "..." + tail


def _text(text: str, style: str = "") -> rich.text.Text:
    """Returns a line that is no markup, of characters that standard output's encoding has."""
    encoding = _output.encoding  # standard error escapes the others by itself
    shown = escape.shown(text).encode(encoding, "backslashreplace").decode(encoding)
    return rich.text.Text(shown, style)


def _lines(description: str) -> Callable[..., None]:
    last = time.monotonic()

    def show(done: int, total: int, note: str = "") -> None:
        nonlocal last
        if time.monotonic() - last >= _LINE_EVERY_S:
            last = time.monotonic()
            log_line(f"{description}: {done} of {total} {note}".rstrip())

    return show
