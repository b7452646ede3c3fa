"""An endpoint of your own, which chooses the server when a client connects.

A relay connects to any object with Twisted's `IStreamClientEndpoint`.  This one tries a
main server, and a spare if the main one can't be reached.  An observer counts how
sessions end::

    python examples/own_endpoint.py 8080 127.0.0.1:8081 127.0.0.1:8082
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from twisted.internet import reactor as installed_reactor
from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks
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
    """Dials `main`, and `spare` if that fails."""

    def __init__(
        self, main: IStreamClientEndpoint, spare: IStreamClientEndpoint
    ) -> None:
        self._main = main
        self._spare = spare

    def connect(self, factory: IProtocolFactory) -> Deferred[IProtocol]:
        """Connect to the first that answers.  Cancelling cancels the current dial."""

        def dial_spare(reason: Failure) -> Deferred[IProtocol]:
            reason.trap(ConnectError)
            return self._spare.connect(factory)

        return self._main.connect(factory).addErrback(dial_spare)


class Tally(Observer):
    """Counts the endings of sessions, and prints the counts after each."""

    def __init__(self) -> None:
        self.endings: Counter[str] = Counter()

    def closed(self, session: Session) -> None:
        """A session has ended."""
        if session.ending is not None:
            self.endings[session.ending.word] += 1
        print(
            f"{session.client} -> {session.upstream}: {dict(self.endings)}", flush=True
        )


@inlineCallbacks
def serve(reactor: Any, listen: str, main_server: str, spare_server: str) -> Any:
    """Relay until the reactor stops."""
    relay = RelayFactory(
        WithSpare(
            dialing_endpoint(parse_destination(main_server), reactor),
            dialing_endpoint(parse_destination(spare_server), reactor),
        ),
        connect_timeout=3,
        observer=Tally(),
    )
    listener = listening_endpoint(parse_listener(listen), reactor)
    port = yield listener.listen(relay)
    print(f"listening on port {port.getHost().port}", flush=True)

    def shut_down() -> Any:
        # Stop accepting, then wait up to five seconds for the sessions.
        return gatherResults([port.stopListening(), relay.drain(5)])

    reactor.addSystemEventTrigger("before", "shutdown", shut_down)


def main() -> str | None:
    """Run; an error at the start is returned as one line."""
    if len(sys.argv) != 4:
        return "usage: own_endpoint.py LISTEN MAIN-SERVER SPARE-SERVER"
    reactor: Any = installed_reactor
    problems: list[str] = []

    def failed(reason: Failure) -> None:
        problems.append(f"own_endpoint: {reason.getErrorMessage()}")
        reactor.callWhenRunning(reactor.stop)

    serve(reactor, *sys.argv[1:]).addErrback(failed)
    reactor.run()
    return problems[0] if problems else None


if __name__ == "__main__":
    sys.exit(main())
