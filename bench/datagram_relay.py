"""A plain UDP relay in Twisted: a DatagramProtocol for each client.

`python datagram_relay.py PORT DESTINATION_PORT RECEIVE_BUFFER` relays on loopback,
keeps every flow for ever, and logs nothing.
"""

from __future__ import annotations

import argparse
import socket
from typing import Any

from twisted.internet import epollreactor
from twisted.internet.protocol import DatagramProtocol


class Upstream(DatagramProtocol):
    """The socket for one client, connected to the server."""

    noisy = False

    def __init__(self, listener: Listener, client: Any) -> None:
        self._listener = listener
        self._client = client

    def startProtocol(self) -> None:
        transport: Any = self.transport
        transport.connect("127.0.0.1", self._listener.destination)

    def datagramReceived(self, datagram: bytes, addr: Any) -> None:
        transport: Any = self._listener.transport
        transport.write(datagram, self._client)

    def connectionRefused(self) -> None:
        """The server is gone; another one may start later."""


class Listener(DatagramProtocol):
    """The socket that clients send to."""

    noisy = False

    def __init__(self, reactor: Any, destination: int) -> None:
        self._reactor = reactor
        self.destination = destination
        self._flows: dict[Any, Upstream] = {}

    def datagramReceived(self, datagram: bytes, addr: Any) -> None:
        upstream = self._flows.get(addr)
        if upstream is None:
            upstream = self._flows[addr] = Upstream(self, addr)
            self._reactor.listenUDP(0, upstream)
        transport: Any = upstream.transport
        transport.write(datagram)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("port", type=int)
    options.add_argument("destination", type=int)
    options.add_argument("receive_buffer", type=int)
    given = options.parse_args()

    epollreactor.install()
    from twisted.internet import reactor  # noqa: TID251

    running: Any = reactor
    listener = Listener(running, given.destination)
    port = running.listenUDP(given.port, listener, interface="127.0.0.1")
    # The same buffer as the other relays: lost datagrams would cost nothing.
    port.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, given.receive_buffer)
    running.run()


if __name__ == "__main__":
    main()
