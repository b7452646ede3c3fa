"""Shows what a running relayd has said: tables on a terminal, else lines in columns.

A view is a list of tables and of notes.  Data goes to standard output; the notes below
a table are messages, and go to standard error, unless the screen is drawn again and
again.  Nothing here fails over what relayd has sent: a cell that is not there is `-`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import click

from relayd.ctl import amounts

Json = dict[str, Any]

#: The longest word that is never torn where cells fold.
_WORD = 40

#: The longest table that is drawn, in rows: each takes 0.6 ms.  Longer ones are lines.
_DRAWN = 2000

#: How the word of a state is shown.
_STYLES = {
    "running": "green",
    "up": "green",
    "yes": "green",
    "paused": "yellow",
    "draining": "yellow",
    "drain": "yellow",
    "down": "red",
    "ejected": "red",
    "no": "red",
    "stopped": "dim",
    "disabled": "dim",
}


class Column(NamedTuple):
    """A column: what is above it, and what of a row is in it.

    :ivar key: of the row, or a function of it.
    :ivar form: how the value is shown.
    :ivar right: numbers are set to the right.
    :ivar spare: a terminal that is too narrow goes without it: those with the lowest
        first; 0: never.
    :ivar folds: it may have lines below each other; other cells are never torn.
    """

    title: str
    key: str | Callable[[Json], Any]
    form: Callable[[Any], str] = amounts.text
    right: bool = False
    spare: int = 0
    folds: bool = False

    def cell(self, row: Json) -> str:
        value = row.get(self.key) if isinstance(self.key, str) else self.key(row)
        return self.form(value)


def number(title: str, key: str, spare: int = 0) -> Column:
    return Column(title, key, right=True, spare=spare)


def size(title: str, key: str, spare: int = 0) -> Column:
    return Column(title, key, amounts.size, right=True, spare=spare)


def span(title: str, key: str, spare: int = 0) -> Column:
    return Column(title, key, amounts.span, right=True, spare=spare)


class Table(NamedTuple):
    """Rows, and how they are shown.

    :ivar headed: the titles of the columns are shown.
    """

    columns: Sequence[Column]
    rows: Sequence[Json]
    headed: bool = True


View = Sequence[Table | str]


def rows_of(answer: Json, key: str) -> list[Json]:
    """The rows in an answer; what is none is left out."""
    found = answer.get(key)
    if not isinstance(found, list):
        return []
    return [each for each in found if isinstance(each, dict)]


def lines_of(table: Table) -> list[str]:
    """A line for each row, in columns two spaces apart."""
    rows = [[column.cell(row) for column in table.columns] for row in table.rows]
    if table.headed:
        rows.insert(0, [column.title.upper() for column in table.columns])
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    made = []
    for row in rows:
        cells = (
            f"{cell:>{width}}" if column.right else f"{cell:{width}}"
            for cell, width, column in zip(row, widths, table.columns, strict=True)
        )
        made.append("  ".join(cells).rstrip())
    return made


def fitted(table: Table, width: int) -> tuple[Table, int]:
    """A table as a terminal has room for it, and how wide it is at least.

    :param width: of the terminal.  Columns are left out until what is left fits, or
        none of them can be spared: then lines run over.
    """
    while True:
        # Two spaces between columns, and the edges of the box.
        least = sum(_least(column, table) for column in table.columns)
        least += 2 * len(table.columns)
        spare = [column for column in table.columns if column.spare]
        if least <= width or not spare:
            return table, least
        least_needed = min(spare, key=lambda column: column.spare)
        kept = [column for column in table.columns if column is not least_needed]
        table = table._replace(columns=kept)


def _least(column: Column, table: Table) -> int:
    cells = [column.title, *(column.cell(row) for row in table.rows)]
    if column.folds:
        cells = [word[:_WORD] for cell in cells for word in cell.split(" ")]
    return max(map(len, cells))


def rich_table(table: Table, width: int) -> Any:
    """For a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    table, least = fitted(table, width)
    made = RichTable(
        box=SIMPLE_HEAD if table.headed else None,
        show_header=table.headed,
        pad_edge=False,
        collapse_padding=True,
        width=least if least > width else None,
    )
    for column in table.columns:
        made.add_column(
            column.title,
            justify="right" if column.right else "left",
            overflow="fold",
            no_wrap=not column.folds,
            min_width=_least(column, table),
        )
    for row in table.rows:
        cells = (column.cell(row) for column in table.columns)
        made.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in cells))
    return made


def _left_out(view: View, width: int) -> list[str]:
    """A note about columns that a terminal has no room for."""
    names = []
    for each in view:
        if not isinstance(each, str):
            kept = fitted(each, width)[0].columns
            names += [column.title for column in each.columns if column not in kept]
    if not names:
        return []
    return [f"Left out, for want of room: {', '.join(names)}; --json has all"]


def print_view(view: View) -> None:
    """Print it once."""
    from rich.console import Console

    console = Console()
    drawn = console.is_terminal and all(
        isinstance(each, str) or len(each.rows) <= _DRAWN for each in view
    )
    if drawn:
        view = [*view, *_left_out(view, console.width)]
    for each in view:
        if isinstance(each, str):
            click.echo(each, err=True)
        elif drawn:
            console.print(rich_table(each, console.width), crop=False)
        else:
            click.echo("\n".join(lines_of(each)))


def show(
    ask: Callable[[], Json],
    view: Callable[[Json], View],
    *,
    as_json: bool,
    every: float | None = None,
) -> None:
    """Print an answer; again and again, until Ctrl-C, if it is watched.

    :param ask: asks relayd.
    :param every: seconds between two answers; None: it is printed once.
    """

    def once(answer: Json) -> None:
        if not as_json:
            print_view(view(answer))
        elif every is None:
            click.echo(json.dumps(answer, indent=2))
        else:
            # A line each time, for programs that read them as they come.
            click.echo(json.dumps(answer))

    if every is None:
        once(ask())
        return
    from rich.console import Console

    console = Console()
    if console.is_terminal and not console.is_dumb_terminal and not as_json:
        _redraw(console, ask, view, every)
        return
    while True:
        once(ask())
        _wait(every)


def report(answer: Json, line: Callable[[Json], str], *, as_json: bool) -> None:
    """Print what a change has led to: a line, or the answer."""
    click.echo(json.dumps(answer, indent=2) if as_json else line(answer))


def _wait(seconds: float) -> None:
    threading.Event().wait(seconds)


def _redraw(
    console: Any,
    ask: Callable[[], Json],
    view: Callable[[Json], View],
    every: float,
) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    def drawn(answer: Json) -> Any:
        # The terminal may have become another size; what is below its end is not made.
        width, height = console.size
        shown = [
            each if isinstance(each, str) else each._replace(rows=each.rows[:height])
            for each in view(answer)
        ]
        return Group(
            *(
                Text(each, style="dim")
                if isinstance(each, str)
                else rich_table(each, width)
                for each in [*shown, *_left_out(shown, width)]
            )
        )

    # What goes wrong at first is said where the command was given.
    answer = ask()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(drawn(answer), refresh=True)
            _wait(every)
            answer = ask()
