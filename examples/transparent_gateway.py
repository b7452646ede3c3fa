"""A relay on a gateway: servers see their clients, and clients need not know of it.

Clients ask for the servers themselves; the kernel brings them here.  Each session goes
where its client meant to go, or to the host that is given, on the port that the client
has asked for.  The server sees the client's address.  It takes CAP_NET_RAW, and rules
of netfilter: `relayctl netfilter show` prints them (docs/transparent.md)::

    python examples/transparent_gateway.py 16001
    python examples/transparent_gateway.py 16001 192.168.0.10
"""

from __future__ import annotations

import sys
from typing import Any

from twisted.internet import reactor as installed_reactor
from twisted.internet.defer import gatherResults, inlineCallbacks
from twisted.python.failure import Failure

from relayd.endpoints import (
    DialOptions,
    UdpAddress,
    dialing_endpoint,
    listening_endpoint,
    parse_destination,
    parse_listener,
)
from relayd.tcp import RelayFactory


@inlineCallbacks
def serve(reactor: Any, listen: str, host: str = "") -> Any:
    """Relay until the reactor stops."""
    options = DialOptions(transparent=True)
    # Without the right, nobody could be served.
    options.check()
    where = parse_listener(listen)
    server = parse_destination(f"{host}:original" if host else "original")
    if isinstance(where, UdpAddress) or isinstance(server, UdpAddress):
        raise ValueError("this relays streams; transparent_dns.py has datagrams")
    relay = RelayFactory(
        dialing_endpoint(server, reactor, options=options), redirected=True
    )
    port = yield listening_endpoint(where, reactor).listen(relay)
    print(f"listening on port {port.getHost().port}", flush=True)

    def shut_down() -> Any:
        # Stop accepting, then wait up to five seconds for the sessions.
        return gatherResults([port.stopListening(), relay.drain(5)])

    reactor.addSystemEventTrigger("before", "shutdown", shut_down)


def main() -> str | None:
    """Run; an error at the start is returned as one line."""
    if len(sys.argv) not in (2, 3):
        return "usage: transparent_gateway.py LISTEN [HOST]"
    reactor: Any = installed_reactor
    problems: list[str] = []

    def failed(reason: Failure) -> None:
        error: Any = reason.value
        why = getattr(error, "strerror", None) or reason.getErrorMessage()
        problems.append(f"transparent_gateway: {why}")
        reactor.callWhenRunning(reactor.stop)

    serve(reactor, *sys.argv[1:]).addErrback(failed)
    reactor.run()
    return problems[0] if problems else None


if __name__ == "__main__":
    sys.exit(main())
