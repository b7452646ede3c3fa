"""Prints the settings that are in effect: for people, for programs, as a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from relayd.configuring.effective import DEFAULT, Effective, Table
from relayd.ctl.texts import default_in_words, in_keys, literal


def as_json(tables: Sequence[Table]) -> dict[str, Any]:
    """For programs: each setting's value and source, by its key.

    A default that only words can say is null, and `means` says it.
    """
    relays: dict[str, dict[str, Any]] = {}
    process: dict[str, Any] = {}
    for table in tables:
        settings = {each.key: _entry(each) for each in table.settings}
        if table.kind is None:
            process = settings
        else:
            relays[table.name] = {"kind": table.kind, "settings": settings}
    return {"process": process, "relays": relays}


def _entry(setting: Effective) -> dict[str, Any]:
    entry = {"value": setting.value, "source": setting.source}
    return entry if setting.value is not None else {**entry, "means": _means(setting)}


def _means(setting: Effective) -> str:
    return in_keys(setting.rows[0].otherwise)


def as_toml(tables: Sequence[Table]) -> str:
    """A file that says the same, with every setting in it."""
    return "\n".join(line for table in tables for line in _toml_of(table))


def _toml_of(table: Table) -> Iterator[str]:
    if table.kind is not None:
        yield f"[{table.path}]"
    for each in table.settings:
        if each.value is None:
            # Left out, it means this.
            yield f"# {each.key}: {_means(each)}  # {each.source}"
        else:
            yield f"{each.key} = {literal(each.value)}  # {each.source}"
    yield ""


def _shown(setting: Effective) -> str:
    if setting.value is None:
        return f"({default_in_words(setting.rows[0])})"
    return literal(setting.value)


def show(tables: Sequence[Table]) -> None:
    """Print them for people: tables on a terminal, else a line for each setting."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        for table in tables:
            console.print(_rich_table(table))
    else:
        import click

        click.echo("\n".join(_lines(tables)))


def _lines(tables: Sequence[Table]) -> list[str]:
    """A line for each setting, in columns."""
    rows = [
        (f"{table.path}.{each.key}".lstrip("."), _shown(each), each.source)
        for table in tables
        for each in table.settings
    ]
    wide = max(len(key) for key, _, _ in rows)
    value = max(min(len(shown), 40) for _, shown, _ in rows)
    return [f"{key:{wide}}  {shown:{value}}  {source}" for key, shown, source in rows]


def _rich_table(table: Table) -> Any:
    from rich.table import Table as RichTable
    from rich.text import Text

    title = f"[{table.path}]" if table.kind else "the process"
    made = RichTable(title=Text(title, style="bold"), title_justify="left", expand=True)
    made.add_column("setting", no_wrap=True)
    made.add_column("value", overflow="fold")
    made.add_column("source", overflow="fold")
    for each in table.settings:
        style = "dim" if each.source == DEFAULT else "bold"
        made.add_row(Text(each.key), Text(_shown(each)), Text(each.source), style=style)
    return made
