"""The commands about configuration files: check, show, example, schema."""

from __future__ import annotations

import json
from typing import Any

import click

from relayd.ctl.exits import CommandFailed, Exit

# Whether it can be read, the reader says, in a line.
FILE = click.argument(
    "file", metavar="FILE", type=click.Path(allow_dash=True, readable=False)
)


@click.command()
@FILE
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option(
    "--file-only",
    is_flag=True,
    help="Check what the file says, and not whether this machine has what it needs:"
    " certificates, addresses, interfaces, limits.",
)
def check(file: str, as_json: bool, file_only: bool) -> None:
    """Check a configuration file, without starting anything.

    FILE is a TOML file, a folder of them, or - for JSON on standard input. Problems are
    printed, a line each, on standard error, and the exit code is 5; 3 if there is no
    such file, and 0 if relayd would take it. All problems of settings are told at once;
    those of filters, routes and the machine, once there are no others.

    Sockets that systemd passes on are not checked, nor whether an address is in use,
    nor whether a log can be opened: only the service itself finds that out.
    """
    from relayd.ctl.checking import check_file

    checked = check_file(file, file_only=file_only)
    if as_json:
        result = {
            "file": checked.name,
            "valid": not checked.problems,
            "relays": checked.relays,
            "problems": checked.problems,
        }
        click.echo(json.dumps(result, indent=2))
        if checked.problems:
            raise CommandFailed(Exit.INVALID)
        return
    if checked.problems:
        raise CommandFailed(Exit.INVALID, *checked.problems)
    relays = "1 relay" if checked.relays == 1 else f"{checked.relays} relays"
    click.echo(f"{checked.name}: {relays}, no problems")


@click.command(short_help="Show the settings in effect, and where each comes from.")
@FILE
@click.option("--json", "form", flag_value="json", help="Print them as JSON.")
@click.option(
    "--toml",
    "form",
    flag_value="toml",
    help="Print a file that says the same, with every setting in it.",
)
def show(file: str, form: str | None) -> None:
    """Show the settings that are in effect, and where each comes from.

    FILE is a TOML file, a folder of them, or - for JSON on standard input. Each setting
    of the process and of every relay is shown with its value and its source: `default`,
    or a file and the table in it. Of values that are read from a file of their own
    (userid_file), only the file's name is shown.
    """
    from relayd.configuring.effective import effective
    from relayd.ctl.checking import read

    layers, _ = read(file)
    found = effective(layers)
    if form == "json":
        from relayd.ctl.showing import as_json

        click.echo(json.dumps(as_json(found), indent=2))
    elif form == "toml":
        from relayd.ctl.showing import as_toml

        click.echo(as_toml(found), nl=False)
    else:
        from relayd.ctl.showing import show as print_tables

        print_tables(found)


@click.command(short_help="Print an example file, with every setting in it.")
def example() -> None:
    """Print an example of a configuration file, with every setting in it.

    A good start: relayctl example > relayd.toml
    """
    from relayd.ctl.example import example as text

    click.echo(text(), nl=False)


@click.command(short_help="Print the JSON Schema of the file, for editors.")
def schema() -> None:
    """Print the JSON Schema of configuration files, for editors.

    An editor that knows it (with a TOML language server such as taplo) completes keys,
    explains them, and marks what is wrong.
    """
    from relayd.ctl.schema import schema as made

    found: dict[str, Any] = made()
    click.echo(json.dumps(found, indent=2))
