"""A relay of one's own: a destination that is decided when a client connects.

Any object with Twisted's `IStreamClientEndpoint` can be relayed to.  This one
tries a main server and turns to a spare when the main one can't be reached; an
observer counts what became of the sessions::

    python examples/own_endpoint.py 8080 127.0.0.1:8081 127.0.0.1:8082
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from twisted.internet import reactor as installed_reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectError
from twisted.internet.interfaces import (
    IProtocol,
    IProtocolFactory,
    IStreamClientEndpoint,
)
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.endpoints import (
    dialing_endpoint,
    listening_endpoint,
    parse_destination,
    parse_listener,
)
from relayd.observers import Observer
from relayd.session import Session
from relayd.tcp import RelayFactory


@implementer(IStreamClientEndpoint)
class WithSpare:
    """Dials `main`, and `spare` when that fails."""

    def __init__(
        self, main: IStreamClientEndpoint, spare: IStreamClientEndpoint
    ) -> None:
        self._main = main
        self._spare = spare

    def connect(self, factory: IProtocolFactory) -> Deferred[IProtocol]:
        """Connect to whichever answers.  Cancelling cancels the dial under way."""

        def turn_to_spare(reason: Failure) -> Deferred[IProtocol]:
            reason.trap(ConnectError)
            return self._spare.connect(factory)

        return self._main.connect(factory).addErrback(turn_to_spare)


class Tally(Observer):
    """Counts the endings of sessions, and says so after each."""

    def __init__(self) -> None:
        self.endings: Counter[str] = Counter()

    def closed(self, session: Session) -> None:
        """One more session has ended."""
        if session.ending is not None:
            self.endings[session.ending.word] += 1
        print(
            f"{session.client} -> {session.upstream}: {dict(self.endings)}", flush=True
        )


def main(listen: str, main_server: str, spare_server: str) -> None:
    """Relay until Ctrl-C."""
    reactor: Any = installed_reactor
    relay = RelayFactory(
        WithSpare(
            dialing_endpoint(parse_destination(main_server), reactor),
            dialing_endpoint(parse_destination(spare_server), reactor),
        ),
        connect_timeout=3,
        observer=Tally(),
    )
    door = listening_endpoint(parse_listener(listen), reactor)
    door.listen(relay).addCallbacks(
        lambda port: print(f"listening on port {port.getHost().port}", flush=True),
        lambda reason: sys.exit(reason.getErrorMessage()),
    )
    reactor.addSystemEventTrigger("before", "shutdown", relay.drain, 5)
    reactor.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
