"""What the command lines of `twistd relayd` and `twistd socks4` have in common."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import attrs
from twisted.python import usage

import relayd
import twisted
from relayd import config
from relayd.bridge import Timeouts
from relayd.errors import CannotStart, ConfigError


class StreamOptions(usage.Options):
    """Reads the command line; whatever is wrong with it ends in one line.

    :cvar service: what the errors begin with.
    """

    service: str

    optParameters: ClassVar[list[Any]] = [
        [
            "handshake-timeout",
            None,
            "30",
            "Seconds until a client must have finished its handshake, TLS or SOCKS4.",
        ],
        ["connect-timeout", None, "10", "Seconds until a server must have answered."],
        [
            "stall-timeout",
            None,
            "10",
            "Seconds that data may wait for a peer that takes none of it.",
        ],
        ["idle-timeout", None, "3600", "Seconds that nothing need move."],
        [
            "half-close-timeout",
            None,
            "300",
            (
                "Seconds that nothing need move once one side has ended. "
                "0 means never, for this and the four above."
            ),
        ],
        [
            "drain-timeout",
            None,
            "10",
            "Seconds that sessions may finish in when the relay stops; 0 ends them.",
        ],
        ["backlog", None, "4096", "How many clients may wait to be accepted."],
        [
            "transport",
            None,
            "auto",
            (
                "plane (Linux, cheaper), twisted, or auto: the plane where it can "
                "be had. For all addresses but endpoint strings."
            ),
        ],
    ]

    optFlags: ClassVar[list[Any]] = [
        ["verbose", "v", "Log when a session opens, dials and connects, too."],
        ["quiet", "q", "Log only the sessions that did not end well."],
    ]

    compData = usage.Completions()

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
        """Read the command line into `config`.

        :raises CannotStart: it can't be used.  Twisted would answer a
            UsageError with the whole help text; this is one line.
        """
        try:
            super().parseOptions(options)
        except (ConfigError, usage.UsageError) as problem:
            raise CannotStart(f"{self.service}: {problem}") from problem

    def common(self) -> dict[str, Any]:
        """The settings of :class:`relayd.config.Common`, checked.

        :raises ConfigError: one of them can't be used.
        """
        if self["verbose"] and self["quiet"]:
            raise ConfigError("--verbose and --quiet contradict each other: give one")
        return {
            "timeouts": Timeouts(
                **{
                    field.name: self.seconds(field.name.replace("_", "-"))
                    for field in attrs.fields(Timeouts)
                    if field.init
                }
            ),
            "drain_timeout": self.seconds("drain"),
            "backlog": config.backlog(self["backlog"]),
            "transport": config.transport(self["transport"]),
            "verbose": bool(self["verbose"]),
            "quiet": bool(self["quiet"]),
        }

    def seconds(self, name: str) -> float:
        """The timeout of this name."""
        option = f"{name}-timeout"
        return config.seconds(f"--{option}", self[option])
