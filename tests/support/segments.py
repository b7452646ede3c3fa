"""How many TCP segments a connection has received, as its kernel counts them."""

from __future__ import annotations

import socket
import struct
from contextlib import closing

from tests.support.process import Server, read_exactly

#: struct tcp_info, linux/tcp.h: where tcpi_segs_in is, and how much of it is read.
_SEGMENTS_IN, _SIZE = 140, 144


def segments(connection: socket.socket) -> int:
    """How many there were, the SYN among them."""
    raw = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SIZE)
    return int(struct.unpack_from("I", raw, _SEGMENTS_IN)[0])


def directly(server: Server, said: bytes = b"request") -> int:
    """Those of a client without a relay: it connects, and says this then."""
    with closing(socket.create_connection(server.socket.getsockname()[:2])) as client:
        with closing(server.accept()) as peer:
            client.sendall(said)
            read_exactly(peer, len(said))
            return segments(peer)
