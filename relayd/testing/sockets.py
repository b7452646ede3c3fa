"""The contract of transports that have a socket.

What :mod:`relayd.testing.contract` does not test: descriptors and their numbers,
options, urgent data, and a reactor that serves other sockets at the same time.
"""

from __future__ import annotations

import socket
from typing import Any

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.error import (
    ConnectionClosed,
    ConnectionLost,
)

from relayd.net.foreign_transports import set_options
from relayd.net.transports import PeerVanished
from relayd.testing.connection import ConnectionContract
from relayd.testing.contract import StreamTransportContract
from relayd.testing.peers import Peer, SocketPeer
from relayd.testing.protocols import Recorder, fail
from relayd.testing.suite import checked, each, pause, turns, until


class SocketConnectionContract(ConnectionContract):
    """The least that every transport of a socket has.

    :meth:`connect` returns a :class:`SocketPeer`.
    """

    @checked
    async def test_names_both_ends(self) -> None:
        protocol, peer = await self.sockets()
        local, remote = protocol.transport.getHost(), protocol.transport.getPeer()
        if peer.socket.family != socket.AF_UNIX:
            assert (local.host, local.port) == peer.socket.getpeername()[:2]
            assert (remote.host, remote.port) == peer.socket.getsockname()[:2]
        protocol.transport.loseConnection()
        await until(lambda: protocol.lost)
        assert protocol.transport.getPeer() == remote

    @checked
    async def test_options_of_tcp(self) -> None:
        protocol, peer = await self.sockets()
        transport = protocol.transport
        for enabled in (True, False, True):
            transport.setTcpNoDelay(enabled)
            transport.setTcpKeepAlive(enabled)
            assert transport.getTcpKeepAlive() is enabled
            tcp = peer.socket.family != socket.AF_UNIX
            assert transport.getTcpNoDelay() is (enabled and tcp)

    @checked
    async def test_has_a_descriptor_and_a_name_in_the_log(self) -> None:
        protocol, _ = await self.sockets()
        transport = protocol.transport
        assert transport.getHandle().fileno() == transport.fileno() >= 0
        assert "Recorder" in transport.logPrefix()
        transport.abortConnection()
        await until(lambda: protocol.lost)
        assert transport.fileno() == -1

    async def sockets(self) -> tuple[Any, SocketPeer]:
        """A connected protocol and the other end's socket."""
        protocol, peer = await self.joined()
        assert isinstance(peer, SocketPeer)
        return protocol, peer


class SocketTransportContract(StreamTransportContract, SocketConnectionContract):
    """The whole contract, for a transport of a socket."""

    @checked
    async def test_urgent_data_does_not_stop_what_follows(self) -> None:
        # It is read in line, on Twisted's own transports once a relay has set the
        # option; a read ends at its mark, however much is behind it.
        protocol, peer = await self.sockets()
        set_options(protocol.transport)
        if self.resets:
            for way in ("read as it comes", "found when resumed"):
                protocol.data.clear()
                if way == "found when resumed":
                    protocol.transport.pauseProducing()
                peer.send_some(b"before")
                peer.socket.send(b"!", socket.MSG_OOB)
                peer.send_some(b"behind")
                await turns()
                protocol.transport.resumeProducing()
                await until(lambda: protocol.data == b"before!behind")
            protocol.data.clear()
            peer.socket.send(b"!", socket.MSG_OOB)
            peer.end()
            await until(lambda: "eof" in protocol.events)
            assert protocol.data == b"!"

    @checked
    async def test_a_peer_that_vanished_has_not_reset(self) -> None:
        # The kernel gives up (here by TCP_USER_TIMEOUT, as the peer takes nothing):
        # connections of relayd distinguish that from a reset.
        protocol, _ = await self.sockets()
        if self.resets:
            transport = protocol.transport
            ours = getattr(transport, "options_are_set", False)
            transport.getHandle().setsockopt(
                socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 50
            )
            await self.fill(transport)
            await self.gone(protocol, PeerVanished if ours else ConnectionLost)
            assert "eof" not in protocol.events
            if ours:
                assert str(protocol.reason.value) == "Connection timed out"

    @checked
    async def test_a_flood_does_not_hold_its_neighbours_or_timers(self) -> None:
        loud, flooding = await self.sockets()
        quiet, other = await self.sockets()
        loud.transport.pauseProducing()
        quiet.transport.pauseProducing()
        total = flooding.flood()
        await other.send(b"x")
        loud.transport.resumeProducing()
        quiet.transport.resumeProducing()
        received: dict[str, int] = {}
        quiet.on["data"] = lambda: received.setdefault("neighbour", len(loud.data))
        await pause(0)
        received["timer"] = len(loud.data)
        await until(lambda: len(loud.data) == total and "neighbour" in received)
        assert received["neighbour"] < total
        assert received["timer"] < total

    @checked
    @each(first=["one", "two"])
    @each(news=["data", "end", "reset", "reset after its end"])
    async def test_a_number_that_is_used_again_brings_no_old_events(
        self, news: str, first: str
    ) -> None:
        # Two connections have events in one batch.  The first event ends the other
        # connection and opens a new one, which may get its descriptor's number.
        (one, sender), (two, other) = await self.sockets(), await self.sockets()
        fresh = Recorder()
        opened: list[Deferred[Peer]] = []

        def replace() -> None:
            if not opened:
                two.on["data"] = fail
                if "after" in news:
                    two.transport.loseConnection()
                else:
                    two.transport.abortConnection()
                opened.append(ensureDeferred(self.open(fresh)))

        one.on["data"] = replace
        if "after" in news:
            other.end()
            await until(lambda: "eof" in two.events)
        if first == "one":
            sender.send_some(b"for one")
        if news == "data":
            other.send_some(b"for two")
        elif news == "end":
            other.end()
        else:
            other.reset()
        if first == "two":
            sender.send_some(b"for one")
        await until(lambda: bool(opened))
        peer = await opened[0]
        await until(lambda: two.lost and fresh.events)
        await turns()
        assert fresh.events == ["made"]
        assert fresh.data == b""
        await peer.send(b"for the new one")
        await until(lambda: fresh.data == b"for the new one")
        assert two.reason is not None
        assert two.reason.check(ConnectionClosed)
