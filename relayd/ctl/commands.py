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
from relayd.ctl.asking import control_option

#: The commands, below a heading of the help, each with its module below `relayd.ctl`.
SECTIONS: Mapping[str, Mapping[str, str]] = {
    "Configuration files": {
        "check": "file_commands",
        "show": "file_commands",
        "example": "file_commands",
        "schema": "file_commands",
    },
    "Look at a running relayd": {
        "status": "looking_commands",
        "relays": "looking_commands",
        "sessions": "looking_commands",
        "flows": "looking_commands",
        "nat": "looking_commands",
        "servers": "looking_commands",
        "limits": "looking_commands",
        "capture": "filter_commands",
        "explain": "reload_commands",
    },
    "Steer a running relayd": {
        "start": "steering_commands",
        "stop": "steering_commands",
        "set": "steering_commands",
        "server": "steering_commands",
        "kill": "steering_commands",
        "filter": "filter_commands",
        "drain": "steering_commands",
        "pause": "steering_commands",
        "resume": "steering_commands",
        "log": "reload_commands",
    },
    "The file of a running relayd": {
        "reload": "reload_commands",
        "confirm": "reload_commands",
        "diff": "looking_commands",
        "save": "reload_commands",
    },
    "The kernel": {
        "netfilter": "netfilter_commands",
    },
    "The shell": {
        "completion": "shell_commands",
    },
}

#: The module of each command, in the order of the help.
COMMANDS: Mapping[str, str] = {
    name: module for each in SECTIONS.values() for name, module in each.items()
}

#: What a command is called in its module, if a word of Python stands in the way.
_CALLED = {"set": "set_", "filter": "filter_"}


class LazyGroup(click.Group):
    """A command whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"relayd.ctl.{COMMANDS[cmd_name]}")
        found: click.Command = getattr(module, _CALLED.get(cmd_name, cmd_name))
        return found

    def format_commands(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        """List them by what they are about, all as wide."""
        width = max(map(len, COMMANDS))
        for heading, commands in SECTIONS.items():
            rows = []
            for name in commands:
                command = self.get_command(ctx, name)
                if command is not None:
                    rows.append((name.ljust(width), command.get_short_help_str(80)))
            with formatter.section(heading):
                formatter.write_dl(rows)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@control_option(variable=True)
@click.version_option(
    relayd.__version__, "-V", "--version", message="relayctl %(version)s"
)
def relayctl() -> None:
    """Check, show and write configuration files of relayd, and steer one that runs.

    A running relayd is reached over its control socket, which relayd --control opens.
    Say where it is with --control, before or behind the command, or with
    RELAYD_CONTROL; unless given, it is /run/relayd/control.sock, or else
    relayd/control.sock in XDG_RUNTIME_DIR.

    Data goes to standard output, messages to standard error. NO_COLOR switches colours
    off. The exit code is 0 (done), 1 (failed), 2 (wrong command line), 3 (there is no
    such file, relay, server or session), 4 (refused), 5 (invalid configuration or
    value) or 6 (relayd can't be reached).
    """
