"""A SOCKS4 proxy that connects to all destinations through another SOCKS4 proxy.

A SOCKS4 relay has a *dialer*: it is called with the addresses that the policy
permitted, and returns a client endpoint.  The dialer of this example asks a second
proxy for the first of them::

    twistd -n --pidfile= socks4 --listen 127.0.0.1:1081
    python examples/chained_proxies.py 127.0.0.1:1080 127.0.0.1:1081
    curl --socks4 127.0.0.1:1080 http://127.0.0.1:8000/

Once the second proxy has granted the request, its connection is passed to the relay as
if it were a direct one to the server, and is relayed, or spliced, like any other.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from twisted.internet import reactor as installed_reactor
from twisted.internet.defer import Deferred, gatherResults, inlineCallbacks
from twisted.internet.error import ConnectError
from twisted.internet.interfaces import (
    IProtocol,
    IProtocolFactory,
    IStreamClientEndpoint,
)
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.config import is_local
from relayd.destinations import ProxyPolicy
from relayd.endpoints import (
    UdpAddress,
    dialing_endpoint,
    listening_endpoint,
    parse_destination,
    parse_listener,
)
from relayd.errors import ConfigError
from relayd.resolving import SocketAddress
from relayd.socks4 import Socks4Factory
from relayd.socks4_wire import (
    REPLY_SIZE,
    BadRequest,
    Code,
    Command,
    read_reply,
    write_request,
)


class ProxyClient(Protocol):
    """Asks a proxy for a connection, then passes its transport to the relay."""

    def __init__(self, host: str, port: int, factory: IProtocolFactory) -> None:
        self._request = write_request(Command.CONNECT, host, port)
        self._factory = factory
        self._read = b""
        self.granted: Deferred[IProtocol] = Deferred(lambda _: self._abort())

    def connectionMade(self) -> None:
        """Send the request."""
        transport: Any = self.transport
        transport.write(self._request)

    def dataReceived(self, data: bytes) -> None:
        """Parse the reply; bytes of the server may follow it."""
        self._read += data
        try:
            reply = read_reply(self._read)
            if reply is None:
                return
            if reply.code != Code.GRANTED:
                raise BadRequest(f"the second proxy refused with {reply.code}")
        except BadRequest as problem:
            self._abort()
            self._fail(str(problem))
            return
        transport: Any = self.transport
        protocol = self._factory.buildProtocol(transport.getPeer())
        if protocol is None:
            self._abort()
            self._fail("the dial was cancelled")
            return
        transport.protocol = protocol
        protocol.makeConnection(transport)
        if self._read[REPLY_SIZE:]:
            protocol.dataReceived(self._read[REPLY_SIZE:])
        self.granted.callback(protocol)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        """The second proxy closed before it answered."""
        self._fail("the second proxy closed the connection")

    def _fail(self, why: str) -> None:
        if not self.granted.called:
            self.granted.errback(ConnectError(string=why))

    def _abort(self) -> None:
        transport: Any = self.transport
        transport.abortConnection()


@implementer(IStreamClientEndpoint)
class ThroughProxy:
    """Connects to an address through a SOCKS4 proxy."""

    def __init__(self, proxy: IStreamClientEndpoint, host: str, port: int) -> None:
        self._proxy = proxy
        self._where = host, port

    def connect(self, factory: IProtocolFactory) -> Deferred[IProtocol]:
        """Connect to the proxy, and send the request.  It has no timeout; cancel it."""
        clients = Factory.forProtocol(lambda: ProxyClient(*self._where, factory))
        clients.noisy = False
        connected: Any = self._proxy.connect(clients)
        connected.addCallback(lambda protocol: protocol.granted)
        return connected  # type: ignore[no-any-return]


@inlineCallbacks
def serve(reactor: Any, listen: str, second: str) -> Any:
    """Serve until the reactor stops."""
    where = parse_listener(listen)
    if isinstance(where, UdpAddress) or not is_local(where):
        # This example lacks what makes a public proxy safe; see `twistd socks4`.
        raise ConfigError(f"{listen} is not on this machine's own loopback")
    proxy = dialing_endpoint(parse_destination(second), reactor)

    def dialer(addresses: Sequence[SocketAddress]) -> IStreamClientEndpoint:
        _, (host, port, *_) = addresses[0]
        return ThroughProxy(proxy, host, port)

    socks = Socks4Factory(
        reactor,
        dialer=dialer,
        # For this machine's own programs; the second proxy has its own policy.
        policy=ProxyPolicy(guarded=False),
        bind=False,
    )
    port = yield listening_endpoint(where, reactor).listen(socks)
    print(f"listening on port {port.getHost().port}", flush=True)

    def shut_down() -> Any:
        # Stop accepting, then wait up to five seconds for the sessions.
        return gatherResults([port.stopListening(), socks.drain(5)])

    reactor.addSystemEventTrigger("before", "shutdown", shut_down)


def main() -> str | None:
    """Run; an error at the start is returned as one line."""
    if len(sys.argv) != 3:
        return "usage: chained_proxies.py LISTEN SECOND-PROXY"
    reactor: Any = installed_reactor
    problems: list[str] = []

    def failed(reason: Failure) -> None:
        problems.append(f"chained_proxies: {reason.getErrorMessage()}")
        reactor.callWhenRunning(reactor.stop)

    serve(reactor, *sys.argv[1:]).addErrback(failed)
    reactor.run()
    return problems[0] if problems else None


if __name__ == "__main__":
    sys.exit(main())
