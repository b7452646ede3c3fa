"""A SOCKS4 proxy with a table of users and the destinations that they may reach.

The table is a TOML file.  Each user has destination rules, written as for
`--allow-dest`; all other destinations are refused::

    [users]
    alice = ["*"]
    bob = ["*.example.com:443", "203.0.113.0/24"]

    python examples/users_table.py 127.0.0.1:1080 users.toml
    curl --socks4 bob@127.0.0.1:1080 https://203.0.113.7/

A user id is what the client claims; pass `ident=True` to ask its host as well.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twisted.internet import reactor as installed_reactor
from twisted.internet.defer import gatherResults, inlineCallbacks
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.config import is_local
from relayd.destinations import ProxyPolicy, parse_rule
from relayd.endpoints import (
    UdpAddress,
    dialer,
    listening_endpoint,
    parse_listener,
)
from relayd.errors import ConfigError, Refused
from relayd.interfaces import IProxyPolicy
from relayd.session import Session
from relayd.socks4 import Socks4Factory


@implementer(IProxyPolicy)
class UsersTable:
    """A policy for each user in the table; other users are refused."""

    def __init__(self, users: Mapping[str, Sequence[str]]) -> None:
        nothing_else = parse_rule("--deny-dest", "*", allow=False)
        self._policies = {
            name.encode(): ProxyPolicy(
                [
                    *(parse_rule(f"rule of {name}:", rule, allow=True) for rule in own),
                    nothing_else,
                ],
                guarded=False,
            )
            for name, own in users.items()
        }

    def admit(self, user_id: bytes, session: Session) -> None:
        """Admit only users that are in the table."""
        if user_id not in self._policies:
            raise Refused("no such user")

    def permit(self, address: str, port: int, name: str, session: Session) -> None:
        """Apply the user's own rules."""
        user_id = getattr(session, "user_id", b"")
        self._policies[user_id].permit(address, port, name, session)


def read_table(path: str) -> UsersTable:
    """Read the table from a file.

    :raises ConfigError: the file can't be used.
    """
    try:
        users = tomllib.loads(Path(path).read_text())["users"]
        return UsersTable({name: list(rules) for name, rules in users.items()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as problem:
        raise ConfigError(f"{path} is no table of users: {problem}") from problem


@inlineCallbacks
def serve(reactor: Any, listen: str, table: str) -> Any:
    """Serve until the reactor stops."""
    where = parse_listener(listen)
    if isinstance(where, UdpAddress) or not is_local(where):
        # This example lacks what makes a public proxy safe; see `twistd socks4`.
        raise ConfigError(f"{listen} is not on this machine's own loopback")
    socks = Socks4Factory(reactor, dialer=dialer(reactor), policy=read_table(table))
    port = yield listening_endpoint(where, reactor).listen(socks)
    print(f"listening on port {port.getHost().port}", flush=True)

    def shut_down() -> Any:
        # Stop accepting, then wait up to five seconds for the sessions.
        return gatherResults([port.stopListening(), socks.drain(5)])

    reactor.addSystemEventTrigger("before", "shutdown", shut_down)


def main() -> str | None:
    """Run; an error at the start is returned as one line."""
    if len(sys.argv) != 3:
        return "usage: users_table.py LISTEN TABLE"
    reactor: Any = installed_reactor
    problems: list[str] = []

    def failed(reason: Failure) -> None:
        problems.append(f"users_table: {reason.getErrorMessage()}")
        reactor.callWhenRunning(reactor.stop)

    serve(reactor, *sys.argv[1:]).addErrback(failed)
    reactor.run()
    return problems[0] if problems else None


if __name__ == "__main__":
    sys.exit(main())
