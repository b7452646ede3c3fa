"""Flows whose server is told whose datagrams these are: a PROXY header before them.

The header is the same for all datagrams of a flow, and is made once.  It goes into each
datagram, or into the first that the server's address gets.  After a refusal (ICMP) that
is the next one: nobody had the port, and whoever has it then was not told.  It is not
counted as the client's; a datagram that does not fit with it is dropped, as
`send_EMSGSIZE`.

A run would need the header in each of its datagrams, so they are sent one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from relayd.core.addresses import socket_name
from relayd.datagrams.dialing import Connected
from relayd.datagrams.flow import ClientFlow
from relayd.datagrams.interfaces import FlowListener, FlowRelay
from relayd.datagrams.ledger import Ledger


@attrs.frozen
class Preamble:
    """What a server is told of its flows.

    :ivar write: makes it, of the client's address and the one that it sent to, both as
        text.
    :ivar first: in the first datagram only.
    """

    write: Callable[[str, str], bytes]
    first: bool = False


class _FirstOnly:
    """The calls of a flow's socket, with the header in the first datagram.

    :ivar header: goes before the next datagram; empty if none does.
    """

    __slots__ = ("_header", "_sock", "header")

    def __init__(self, sock: Any, header: bytes) -> None:
        self._sock = sock
        self._header = self.header = header

    def send(self, data: bytes) -> int:
        """As `socket.send`."""
        try:
            sent: int = self._sock.send(self.header + data)
        except ConnectionRefusedError:
            self.header = self._header
            raise
        self.header = b""
        return sent

    def recv(self, size: int) -> bytes:
        """As `socket.recv`."""
        try:
            data: bytes = self._sock.recv(size)
        except ConnectionRefusedError:
            self.header = self._header
            raise
        return data

    def recv_into(self, buffer: Any) -> int:
        """As `socket.recv_into`."""
        try:
            size: int = self._sock.recv_into(buffer)
        except ConnectionRefusedError:
            self.header = self._header
            raise
        return size


class PreambledFlow(ClientFlow):
    """A flow with a preamble, if its server is to be told one.

    :param preamble: what servers are told that have none of their own; None: nothing.
    """

    __slots__ = ("_preamble",)

    def __init__(
        self,
        ledger: Ledger[ClientFlow],
        relay: FlowRelay,
        listener: FlowListener,
        client: tuple[Any, Any, Any],
        connected: Connected,
        preamble: Preamble | None,
    ) -> None:
        self._preamble = preamble
        ClientFlow.__init__(self, ledger, relay, listener, client, connected)
        self._segments_up = False

    def use(self, connected: Connected) -> None:
        ClientFlow.use(self, connected)
        preamble = connected.server.preamble or self._preamble
        if preamble is None:
            return
        header = preamble.write(socket_name(self.source), self.listener.name(self.here))
        if preamble.first:
            calls = _FirstOnly(connected.sock, header)
            self.send, self.recv = calls.send, calls.recv
            self.recv_into = calls.recv_into
        else:
            send = connected.sock.send
            self.send = lambda data: send(header + data)
