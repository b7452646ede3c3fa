"""Flows whose server is told whose datagrams these are: a PROXY header before them.

The header is the same for all datagrams of a flow, and is made once.  It goes into each
datagram, or into the first that the server's address gets.  It is not counted as the
client's; a datagram that does not fit with it is dropped, as `send_EMSGSIZE`.

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


class _Sender:
    """Sends with a header.

    :ivar header: goes before the next datagram; empty if none does.
    """

    __slots__ = ("_first", "_send", "header")

    def __init__(self, sock: Any, header: bytes, *, first: bool) -> None:
        self._send = sock.send
        self._first = first
        self.header = header

    def __call__(self, data: bytes) -> int:
        """As `socket.send`."""
        sent: int = self._send(self.header + data)
        if self._first:
            self.header = b""
        return sent


class PreambledFlow(ClientFlow):
    """A flow with a preamble.

    :param preamble: what its server is told.
    """

    __slots__ = ("_header", "_is_first")

    def __init__(
        self,
        ledger: Ledger[ClientFlow],
        relay: FlowRelay,
        listener: FlowListener,
        client: tuple[Any, Any, Any],
        connected: Connected,
        preamble: Preamble,
    ) -> None:
        key, source, _ = client
        self._header = preamble.write(socket_name(source), listener.name(key))
        self._is_first = preamble.first
        ClientFlow.__init__(self, ledger, relay, listener, client, connected)
        self._segments_up = False

    def use(self, connected: Connected) -> None:
        ClientFlow.use(self, connected)
        self.send = _Sender(connected.sock, self._header, first=self._is_first)


def flow_of(
    preamble: Preamble | None,
    ledger: Ledger[ClientFlow],
    relay: FlowRelay,
    listener: FlowListener,
    client: tuple[Any, Any, Any],
    connected: Connected,
) -> ClientFlow:
    """A flow, with a preamble if its server is to be told one."""
    if preamble is None:
        return ClientFlow(ledger, relay, listener, client, connected)
    return PreambledFlow(ledger, relay, listener, client, connected, preamble)
