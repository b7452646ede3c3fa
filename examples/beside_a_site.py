"""A relay and a web site in one Twisted program.

Serves a page on one port and relays another port to it::

    python examples/beside_a_site.py
    curl http://127.0.0.1:8080/
"""

from __future__ import annotations

import sys
from typing import Any

from twisted.internet import reactor as installed_reactor
from twisted.internet.defer import gatherResults, inlineCallbacks
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP4ServerEndpoint
from twisted.web.resource import Resource
from twisted.web.server import Site

from relayd.tcp import RelayFactory


class Hello(Resource):
    """The page."""

    isLeaf = True

    def render_GET(self, request: Any) -> bytes:
        """Greet the client by the address that the site sees."""
        return f"hello, {request.getClientAddress().host}\n".encode()


@inlineCallbacks
def serve(reactor: Any, relay_port: int, site_port: int) -> Any:
    """Listen on both ports; shut both down with the reactor."""
    page = TCP4ServerEndpoint(reactor, site_port, interface="127.0.0.1")
    site = yield page.listen(Site(Hello()))

    # The relay: a factory, an endpoint to dial, an endpoint to listen on.
    relay = RelayFactory(TCP4ClientEndpoint(reactor, "127.0.0.1", site.getHost().port))
    listener = TCP4ServerEndpoint(reactor, relay_port, interface="127.0.0.1")
    listening = yield listener.listen(relay)

    def shut_down() -> Any:
        # Stop accepting, then wait up to five seconds for the sessions.
        return gatherResults([listening.stopListening(), relay.drain(5)])

    reactor.addSystemEventTrigger("before", "shutdown", shut_down)
    print(f"try: curl http://127.0.0.1:{listening.getHost().port}/", flush=True)


def main(relay_port: str = "8080", site_port: str = "8081") -> None:
    """Serve until Ctrl-C."""
    reactor: Any = installed_reactor
    serve(reactor, int(relay_port), int(site_port))
    reactor.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
