"""A relay that chooses a server in its own way: by the client's network.

Clients of this machine get the first server, all others one of the rest, in turn; if a
server can't be reached, the client is tried with another::

    python examples/own_selector.py 127.0.0.1:8080 127.0.0.1:8001 127.0.0.1:8002

A selector is asked for each attempt, with the servers that may be chosen: those that
have failed this client are not among them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from twisted.internet import reactor as installed_reactor
from twisted.internet.defer import gatherResults, inlineCallbacks
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.endpoints import (
    UdpAddress,
    dialing_endpoint,
    listening_endpoint,
    parse_destination,
    parse_listener,
)
from relayd.errors import ConfigError
from relayd.pools import ISelector, Pool, RoundRobin, Server
from relayd.tcp import RelayFactory


@implementer(ISelector)
class NearAndFar:
    """Clients of this machine have a server of their own."""

    def __init__(self, near: Server) -> None:
        self._near = near
        self._turns = RoundRobin()

    def choose(self, candidates: Sequence[Any], session: Any) -> Any:
        """The near server if there is one for this client, or one of the others."""
        if session.client.startswith("127.") and self._near in candidates:
            return self._near
        others = tuple(each for each in candidates if each is not self._near)
        return self._turns.choose(others or tuple(candidates), session)


@inlineCallbacks
def serve(reactor: Any, listen: str, *addresses: str) -> Any:
    """Serve until the reactor stops."""
    where, *servers = parse_listener(listen), *map(parse_destination, addresses)
    if any(isinstance(each, UdpAddress) for each in (where, *servers)):
        raise ConfigError("this example relays streams")
    made = [Server(dialing_endpoint(to, reactor), str(to)) for to in servers]
    relay = RelayFactory(Pool(made, NearAndFar(made[0])), clock=reactor)
    port = yield listening_endpoint(where, reactor).listen(relay)
    print(f"listening on port {port.getHost().port}", flush=True)

    def shut_down() -> Any:
        # Stop accepting, then wait up to five seconds for the sessions.
        return gatherResults([port.stopListening(), relay.drain(5)])

    reactor.addSystemEventTrigger("before", "shutdown", shut_down)


def main() -> str | None:
    """Run; an error at the start is returned as one line."""
    if len(sys.argv) < 3:
        return "usage: own_selector.py LISTEN SERVER..."
    reactor: Any = installed_reactor
    problems: list[str] = []

    def failed(reason: Failure) -> None:
        problems.append(f"own_selector: {reason.getErrorMessage()}")
        reactor.callWhenRunning(reactor.stop)

    serve(reactor, *sys.argv[1:]).addErrback(failed)
    reactor.run()
    return problems[0] if problems else None


if __name__ == "__main__":
    sys.exit(main())
