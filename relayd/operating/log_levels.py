"""How much of what a process says is in its log: a level for each namespace.

A namespace is the name of a logger, such as `relayd.stream`, and everything below it:
of several that are meant, the longest has the say.  What no other is about is at the
level of `default`, which is `info` at the start.  A level shows what is as severe, or
more so.

This is about the log that the command writes itself; syslog, and what `twist` writes,
have levels of their own.  Lines of sessions and flows, and the access log, are always
written: `--quiet` and `--verbose` are about those.
"""

from __future__ import annotations

import re
from typing import Any

from twisted.logger import LogEvent, LogLevel, LogLevelFilterPredicate, PredicateResult

from relayd.core.errors import ConfigError

#: What all namespaces are called that have no level of their own.
DEFAULT = "default"

#: The levels, from the one that shows most.
LEVELS = tuple(each.name for each in LogLevel.iterconstants())

#: How many namespaces may have their own, and how long a name may be.
MOST, LONGEST = 100, 200

#: Of sessions and flows: their lines are no matter of levels.
LINES = frozenset({"relayd.session", "relayd.flow"})

_NAMESPACE = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


class LogLevels:
    """The levels of one log.

    :ivar in_use: a log goes by them.
    """

    def __init__(self) -> None:
        self.in_use = False
        self._own: dict[str, str] = {}
        self._default = LogLevel.info.name
        self._judge = LogLevelFilterPredicate()

    def shows(self, event: LogEvent) -> bool:
        """Whether an event is written.

        One that has no level, or no namespace, is of somebody's old code, and is.
        """
        if event.get("log_level") is None or not event.get("log_namespace"):
            return True
        if event["log_namespace"] in LINES:
            return True
        return self._judge(event) is not PredicateResult.no

    def get(self) -> dict[str, str]:
        """The level of each namespace that has its own, and `default`'s."""
        return {DEFAULT: self._default, **self._own}

    def of(self, namespace: str) -> str:
        """The level that a namespace has, be it its own or one above it."""
        found = namespace if namespace != DEFAULT else ""
        name: str = self._judge.logLevelForNamespace(found).name
        return name

    def set(self, namespace: str, level: str) -> dict[str, str]:
        """Set the level of a namespace, and so of what is below it.

        It need not be one that there is by now.  One that is given the level that it
        would have without its own has none any more.

        :param namespace: or `default`.
        :return: as :meth:`get`.
        :raises ConfigError: there is no such level, it can be no namespace, there are
            too many, or nothing goes by them.
        """
        if level not in LEVELS:
            raise ConfigError(f"bad level {level!r}: expected {', '.join(LEVELS)}")
        if len(namespace) > LONGEST or not _NAMESPACE.fullmatch(namespace):
            raise ConfigError(
                f"bad namespace {namespace[:LONGEST]!r}: expected the name of a logger"
                f" such as relayd.stream, or {DEFAULT}"
            )
        if not self.in_use:
            raise ConfigError(
                "the log is not written by relayd (but by syslog, twist or a program"
                " that embeds it): set the level there"
            )
        if namespace == DEFAULT:
            self._default = level
        elif level == self._inherited(namespace):
            self._own.pop(namespace, None)
        elif namespace in self._own or len(self._own) < MOST:
            self._own[namespace] = level
        else:
            raise ConfigError(
                f"{MOST} namespaces have levels already: give one of them the level"
                " that is above it, which takes it out"
            )
        self._judge = self._judging()
        return self.get()

    def _inherited(self, namespace: str) -> str:
        """The level that a namespace has if it has none of its own."""
        above = namespace.rpartition(".")[0]
        return self.of(above) if above else self._default

    def _judging(self) -> Any:
        found = LogLevelFilterPredicate(LogLevel.levelWithName(self._default))
        for namespace, level in self._own.items():
            found.setLogLevelForNamespace(namespace, LogLevel.levelWithName(level))
        return found
