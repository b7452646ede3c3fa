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
    """

    title: str
    key: str | Callable[[Json], Any]
    form: Callable[[Any], str] = amounts.text
    right: bool = False

    def cell(self, row: Json) -> str:
        value = row.get(self.key) if isinstance(self.key, str) else self.key(row)
        return self.form(value)


def number(title: str, key: str) -> Column:
    return Column(title, key, right=True)


def size(title: str, key: str) -> Column:
    return Column(title, key, amounts.size, right=True)


def span(title: str, key: str) -> Column:
    return Column(title, key, amounts.span, right=True)


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


def rich_table(table: Table) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    made = RichTable(
        box=SIMPLE_HEAD if table.headed else None,
        show_header=table.headed,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in table.columns:
        justify: Any = "right" if column.right else "left"
        overflow: Any = "ellipsis" if column.right else "fold"
        made.add_column(
            column.title, justify=justify, overflow=overflow, no_wrap=column.right
        )
    for row in table.rows:
        cells = (column.cell(row) for column in table.columns)
        made.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in cells))
    return made


def print_view(view: View) -> None:
    """Print it once."""
    from rich.console import Console

    console = Console()
    for each in view:
        if isinstance(each, str):
            click.echo(each, err=True)
        elif console.is_terminal:
            console.print(rich_table(each))
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
        return Group(
            *(
                Text(each, style="dim") if isinstance(each, str) else rich_table(each)
                for each in view(answer)
            )
        )

    # What goes wrong at first is said where the command was given.
    answer = ask()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(drawn(answer), refresh=True)
            _wait(every)
            answer = ask()
