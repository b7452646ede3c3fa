"""The base class of the command lines of `twistd relayd` and `twistd socks4`.

The options, their checks and the help are generated from rows of the table of settings
(:mod:`relayd.core.setting_types`); each command line is a subclass with its rows.
"""

from __future__ import annotations

import os
import platform
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from twisted.application.service import MultiService
from twisted.python import usage

import relayd
import twisted
from relayd.configuring.config import Config
from relayd.configuring.configure import configure
from relayd.configuring.given import Given, Layers
from relayd.configuring.source import Source
from relayd.core.errors import CannotStart, ConfigError
from relayd.core.process_settings import PRINT_CONFIG
from relayd.core.setting_types import Setting
from relayd.core.settings import GROUPS
from relayd.operating.log_file import is_daemon, log_of
from relayd.operating.logs import Logs
from relayd.operating.service import make_service


def say(text: str) -> None:
    """Print it on standard output; where that can't be had, end with a line."""
    try:
        print(text, end="", flush=True)
    except OSError as problem:
        # What is left would be tried again as Python ends.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        sys.exit(f"relayd: standard output: {problem.strerror}")


class TableOptions(usage.Options):
    """Parses a command line; an error is one line.

    :cvar service: the command's name, with which errors begin.
    :cvar rows: the settings that may be given.
    :cvar examples: the end of the help.
    :ivar given: the repeatable settings, in their order.
    :ivar config: the settings, once `parseOptions` has returned.
    :ivar source: where they came from.
    """

    service: str
    rows: ClassVar[Sequence[Setting[Any]]] = ()
    longdesc = ""
    examples = ""

    optParameters: ClassVar[list[Any]] = []
    optFlags: ClassVar[list[Any]] = []
    compData = usage.Completions()

    def __init_subclass__(cls) -> None:
        """Make options of the rows, except those that a base class has made."""
        super().__init_subclass__()
        made = [row for base in cls.__bases__ for row in getattr(base, "rows", ())]
        new = [row for row in cls.rows if row not in made]
        cls.optParameters = [
            [row.option, row.short, None, row.option_help, _once(row)]
            for row in new
            if not (row.is_flag or row.repeatable)
        ]
        cls.optFlags = [
            [row.option, row.short, row.option_help] for row in new if row.is_flag
        ]
        for row in new:
            if row.repeatable:
                read = _reader(row)
                for name in filter(None, (row.option, row.short)):
                    setattr(cls, f"opt_{name.replace('-', '_')}", read)

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Given] = []
        self.config = Config(())
        self.source: Source | None = None

    def layers(self) -> Layers:
        """What was given, and what a file adds to it.

        :raises ConfigError: it does not fit together.
        """
        raise NotImplementedError

    @property
    def chosen(self) -> list[Given]:
        """The settings that were given and are not repeatable."""
        found = []
        for row in self.rows:
            if row.is_flag and self[row.option]:
                found.append(Given(row, "", not row.default))
            elif not row.repeatable and not row.is_flag:
                found += filter(None, [self[row.option]])
        return found

    def postOptions(self) -> None:
        """Make the settings of what was given, or print it."""
        layers = self.layers()
        self.config = configure(layers)
        if self[PRINT_CONFIG.option]:
            # Imports what writes TOML, which nothing else needs.
            from relayd.configuring.written import as_toml

            say(as_toml(layers))
            sys.exit(0)

    def opt_help(self) -> None:
        """Twisted's, for whoever may stop reading."""
        say(f"{self}\n")
        sys.exit(0)

    def service_of(self, reactor: Any) -> MultiService:
        """The service for these options.

        :param reactor: the running one unless given.
        :raises CannotStart: Twisted can't use one of the endpoint strings, or this
            machine can't give what is asked for.
        """
        logs = self.logs(reactor)
        try:
            return make_service(self.config, reactor, logs, self.service, self.source)
        except ConfigError as problem:
            raise self._cannot_start(problem) from problem

    def _cannot_start(self, problem: Exception) -> CannotStart:
        lines = str(problem).splitlines()
        return CannotStart("\n".join(f"{self.service}: {line}" for line in lines))

    def logs(self, reactor: Any) -> Logs:
        """The logs of the command, by its options and those of `twistd` or `twist`."""
        runner = self.parent
        return Logs(
            reactor,
            self.service,
            log_of(runner, reactor),
            self.config.access_log,
            daemon=is_daemon(runner),
            log_format=self.config.log_format,
        )

    def opt_version(self) -> None:
        """Print the versions of relayd, Twisted and Python, and exit."""
        print(
            f"relayd {relayd.__version__} (Twisted {twisted.__version__}, "
            f"Python {platform.python_version()})"
        )
        sys.exit(0)

    def parseArgs(self, *unexpected: str) -> None:
        if unexpected:
            raise ConfigError(
                f"unexpected argument {unexpected[0]!r}: {self.service} takes options"
                " only"
            )

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """Parse the command line.

        :raises CannotStart: it is wrong, in one line; or a file is, in one for each
            problem.  Twisted would print the whole help text with a UsageError.
        """
        try:
            super().parseOptions(options)
        except (ConfigError, usage.UsageError) as problem:
            raise self._cannot_start(problem) from problem

    def getUsage(self, width: int | None = None) -> str:
        """The help: the rows in their groups, and the examples."""
        width = width or int(os.environ.get("COLUMNS", "80"))
        parts = [*textwrap.wrap(self.longdesc, width), ""]
        for group in GROUPS:
            rows = [row for row in self.rows if row.group == group]
            if rows:
                parts.append(f"{group}:")
                parts += [line for row in rows for line in _help_of(row, width)]
                parts.append("")
        parts.append("Help:")
        for option, text in (
            ("--help", "Print this and exit."),
            ("--version", "Print the versions of relayd, Twisted and Python."),
        ):
            parts += _described(f"    {option}", text, width)
        return "\n".join([*parts, self.examples])


def _once(row: Setting[Any]) -> Callable[[str], Given]:
    """The function that reads a setting which is not repeatable."""

    def read(text: str) -> Given:
        return Given.of(row, text)

    return read


def _reader(row: Setting[Any]) -> Callable[[TableOptions, str], None]:
    """The method that parses a repeatable setting's value."""

    def read(options: TableOptions, text: str) -> None:
        options.given.append(Given.of(row, text))

    read.__doc__ = row.option_help
    return read


def _help_of(row: Setting[Any], width: int) -> list[str]:
    """A row's lines of the help."""
    short = f"-{row.short}, " if row.short else "    "
    value = f"={row.type.placeholder}" if row.type.placeholder else ""
    text = row.option_help
    if row.shown_default:
        text += f" [default: {row.shown_default}]"
    return _described(f"{short}--{row.option}{value}", text, width)


def _described(option: str, text: str, width: int) -> list[str]:
    """An option and, below it, its description."""
    indent = " " * 10
    wrapped = textwrap.wrap(
        text,
        max(width, 40),
        initial_indent=indent,
        subsequent_indent=indent,
        # Option names are not broken.
        break_on_hyphens=False,
    )
    return [f"  {option}", *wrapped]
