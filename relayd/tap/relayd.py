"""`twistd relayd`: its options, and the service that they describe."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from typing import Any

import attrs
from twisted.application.service import MultiService
from twisted.python import usage

import relayd
import twisted
from relayd import config
from relayd.bridge import Timeouts
from relayd.endpoints import parse_destination, parse_listener
from relayd.errors import CannotStart, ConfigError
from relayd.service import make_service

EXAMPLES = """
ADDRESS is 8080, :8080, 127.0.0.1:8080, [::1]:8080, localhost:8080,
unix:/run/x.sock, or a Twisted endpoint string such as
tcp:8080:interface=127.0.0.1, tls:example.com:443 or systemd:domain=INET:index=0.
A listener without a host listens on all addresses, IPv4 and IPv6; port 0 picks
a free one, which the log names.  A destination without a host is this machine.

Examples:
  twistd -n relayd --demo
      a relay on 127.0.0.1:8080 to a file server of this folder
  twistd -n relayd --listen 8080 --dest example.com:80
      every connection to port 8080 goes to example.com, port 80
  twistd -n relayd -l 8080 -d 10.0.0.5:80 -d 10.0.0.6:80
      to two servers in turn
  twistd -n relayd -l 8080 -d 10.0.0.5:80 -l [::1]:5432 -d unix:/run/pg/.s.PGSQL.5432
      two relays in one process
  twistd -n relayd -l ssl:8443:privateKey=key.pem:certKey=crt.pem -d 8080
      TLS outside, plain inside

SIGTERM stops accepting and lets sessions finish for --drain-timeout; a second
one ends at once.
"""


class Options(usage.Options):
    """Reads the command line; whatever is wrong with it ends in one line."""

    synopsis = "--listen ADDRESS --dest ADDRESS [--dest …] [--listen … --dest …] …"
    longdesc = "Relay TCP and UNIX stream connections."

    optParameters = [
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
                "0 means never, for this and the three above."
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

    optFlags = [
        ["demo", None, "Relay 127.0.0.1:8080 to a file server of the current folder."],
        ["verbose", "v", "Log when a session opens, dials and connects, too."],
        ["quiet", "q", "Log only the sessions that did not end well."],
    ]

    compData = usage.Completions()

    def __init__(self) -> None:
        super().__init__()
        self._given: list[config.Given] = []
        #: The settings, once `parseOptions` has returned.
        self.config = config.Config(())

    def opt_listen(self, address: str) -> None:
        """Where clients connect; opens a relay."""
        where = parse_listener(address)
        self._given.append(config.Given("--listen", address, where))

    def opt_dest(self, address: str) -> None:
        """Where to relay to: the --listen before it; several take turns."""
        where = parse_destination(address)
        self._given.append(config.Given("--dest", address, where))

    opt_l = opt_listen
    opt_d = opt_dest

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
                f"unexpected argument {unexpected[0]!r}: relayd takes options only"
            )

    def getUsage(self, width: int | None = None) -> str:
        return f"{super().getUsage(width)}{EXAMPLES}"

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """Read the command line into `config`.

        :raises CannotStart: it can't be used.  Twisted would answer a
            UsageError with the whole help text; this is one line.
        """
        try:
            super().parseOptions(options)
        except (ConfigError, usage.UsageError) as problem:
            raise CannotStart(f"relayd: {problem}") from problem

    def postOptions(self) -> None:
        if self["demo"] and self._given:
            raise ConfigError("--demo brings its own listener and destination")
        if self["verbose"] and self["quiet"]:
            raise ConfigError("--verbose and --quiet contradict each other: give one")
        self.config = config.Config(
            relays=() if self["demo"] else config.pair(self._given),
            timeouts=Timeouts(
                **{
                    field.name: self._seconds(field.name.replace("_", "-"))
                    for field in attrs.fields(Timeouts)
                }
            ),
            drain_timeout=self._seconds("drain"),
            backlog=config.backlog(self["backlog"]),
            transport=config.transport(self["transport"]),
            verbose=bool(self["verbose"]),
            quiet=bool(self["quiet"]),
            demo=bool(self["demo"]),
        )

    def _seconds(self, name: str) -> float:
        option = f"{name}-timeout"
        return config.seconds(f"--{option}", self[option])


def makeService(options: Options, reactor: Any = None) -> MultiService:
    """The service that `options` describe.

    :raises CannotStart: Twisted can't use one of the endpoint strings.
    """
    if reactor is None:
        from twisted.internet import reactor
    try:
        return make_service(options.config, reactor)
    except ConfigError as problem:
        raise CannotStart(f"relayd: {problem}") from problem
