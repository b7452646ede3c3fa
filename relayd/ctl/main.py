"""Where `relayctl` begins: the console script.

Every command, and what it needs, is imported when it is used: `relayctl --help` shows
at once.  Data goes to standard output, messages to standard error.  A command that
fails raises :class:`~relayd.ctl.exits.CommandFailed`, and nobody sees a traceback for
what a person may have done: a wrong option, Ctrl-C, a pipe that nobody reads.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from io import TextIOWrapper

from relayd.ctl.amounts import printable
from relayd.ctl.exits import CommandFailed, Exit

#: What is not installed with relayd itself.
NEEDS = ("click", "rich")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    :param arguments: of the process, unless given.
    :return: the exit code.
    """
    if not all(map(find_spec, NEEDS)):
        print(
            "relayctl needs click and rich: pip install 'relayd[ctl]'", file=sys.stderr
        )
        return Exit.FAILED
    if isinstance(sys.stdout, TextIOWrapper):
        # The name of a file may be no text at all.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _run(arguments)
    except CommandFailed as failed:
        return _fail(failed.exit, *failed.lines)
    except OSError as problem:
        # Most likely of standard output: what reads a file says so itself.
        return _fail(Exit.FAILED, f"relayctl: {problem.strerror or problem}")
    except KeyboardInterrupt:
        return Exit.INTERRUPTED


def _fail(code: Exit, *lines: str) -> Exit:
    """Say why, if anybody reads it: the exit code is the same."""
    with suppress(OSError):
        for line in lines:
            # The name of a file may have any characters.
            print(printable(line), file=sys.stderr, flush=True)
    return code


def _run(arguments: Sequence[str] | None) -> int:
    import click

    from relayd.ctl.commands import relayctl

    try:
        # What a pipe that nobody reads raises is click's to handle, too.
        done = relayctl.main(arguments, "relayctl", standalone_mode=False)
    except click.ClickException as problem:
        problem.show()
        return problem.exit_code
    except click.Abort:
        return Exit.INTERRUPTED
    return done or Exit.DONE
