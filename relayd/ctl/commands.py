"""The command `relayctl`: which commands it has, and where they are.

A module has a group of commands that belong together; it is imported when one of them
is used, or when the help lists them all.  Such a module imports click and no more: what
a command works with, it imports itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import click

import relayd

#: The module of each command, below `relayd.ctl`, in the order of the help.
COMMANDS: Mapping[str, str] = {
    "check": "file_commands",
    "show": "file_commands",
    "example": "file_commands",
    "schema": "file_commands",
    "completion": "shell_commands",
}


class LazyGroup(click.Group):
    """A command whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"relayd.ctl.{COMMANDS[cmd_name]}")
        found: click.Command = getattr(module, cmd_name)
        return found


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(
    relayd.__version__, "-V", "--version", message="relayctl %(version)s"
)
def relayctl() -> None:
    """Check, show and write configuration files of relayd.

    Data goes to standard output, messages to standard error. NO_COLOR switches colours
    off. The exit code is 0 (done), 1 (failed), 2 (wrong command line), 3 (there is no
    such file), 4 (refused), 5 (invalid configuration) or 6 (relayd can't be reached).
    """
