"""Check that a transport of your own can be used in a relay.

    trial examples/own_transport_contract.py

The transport is Twisted's, but counts what is written to it; a relay gets it from a
port of its own.  The tests are `relayd.testing`'s: they connect a protocol to the
transport, and a plain socket to the other end.
"""

import socket

from twisted.internet import reactor, tcp
from twisted.internet.protocol import Factory
from twisted.trial.unittest import TestCase

from relayd.testing import SocketPeer, SocketTransportContract


class CountingConnection(tcp.Server):
    """The transport: Twisted's, which counts bytes."""

    written = 0

    def write(self, data):
        super().write(data)
        self.written += len(data)


class CountingPort(tcp.Port):
    """Accepts connections with that transport."""

    transport = CountingConnection


class CountingConnectionTests(SocketTransportContract, TestCase):
    """The contract: all that a relay relies on."""

    port = None

    async def connect(self, protocol):
        if self.port is None:
            self.expected = []
            factory = Factory.forProtocol(lambda: self.expected.pop(0))
            factory.noisy = False
            self.port = CountingPort(0, factory, interface="127.0.0.1", reactor=reactor)
            self.port.startListening()
        self.expected.append(protocol)
        there = self.port.getHost()
        return SocketPeer(socket.create_connection((there.host, there.port)))

    async def disconnect(self):
        if self.port is not None:
            await self.port.stopListening()
