"""The exit codes of `relayctl`, and the error that leads to one.

Scripts tell by them what has happened; relayctl(1) has the table.  Nothing here imports
more than what every command needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum


class Exit(IntEnum):
    """How a command has ended."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    REFUSED = 4
    INVALID = 5
    UNREACHABLE = 6
    INTERRUPTED = 130


#: What each means, for the manual.
MEANING: Mapping[Exit, str] = {
    Exit.DONE: "It is done.",
    Exit.FAILED: "It failed; a line on standard error says why. Or nobody reads the"
    " output any more.",
    Exit.USAGE: "The command line is wrong.",
    Exit.NOT_FOUND: "What it is about does not exist: there is no such file, relay,"
    " server or session.",
    Exit.REFUSED: "relayd refuses it: it is not possible now, or not for this user.",
    Exit.INVALID: "The configuration, or a value, is not valid.",
    Exit.UNREACHABLE: "relayd can't be reached, or has not answered as it should.",
    Exit.INTERRUPTED: "It was interrupted (Ctrl-C).",
}


class CommandFailed(Exception):
    """A command can't do what it is to do.

    :ivar exit: the exit code.
    :ivar lines: for standard error; may be none.
    """

    def __init__(self, exit: Exit, *lines: str) -> None:  # noqa: A002
        super().__init__("\n".join(lines))
        self.exit = exit
        self.lines = lines
