"""The kernel's state of a stream connection, by its descriptor.

Nothing in this module is called for a chunk of data.  Most of it is called only when
bytes wait, or when the connection is not read, so that its reset would go unnoticed.

Where the kernel can't be asked (no descriptor, another system, a sandbox that refuses
the call), each function returns None, 0 or False, and the caller goes on as if the
connection were in order.

`TcpInfo` is read from Linux's `struct tcp_info` (tcp(7), linux/tcp.h).  It does not
show what a peer's application does: a peer that takes nothing and one that takes slowly
answer the same probes with the same closed window.
"""

from __future__ import annotations

import fcntl
import select
import socket
import struct
import sys
import termios
from typing import Any

import attrs

from relayd.net.foreign_transports import lent_socket

_LINUX = sys.platform.startswith("linux")

#: Linux, sockios(7): the bytes in a socket's send queue that the peer's kernel
#: has not acknowledged.  The same request as TIOCOUTQ; None elsewhere.
SIOCOUTQ = 0x5411 if _LINUX else None

#: tcp(7), Linux; other systems have another structure.
TCP_INFO = int(socket.TCP_INFO) if _LINUX else None

#: Bytes up to and with tcpi_snd_wnd.
_INFO_SIZE = 232

#: tcpi_retransmits and tcpi_probes, two bytes; tcpi_last_data_sent and
#: tcpi_last_ack_recv, milliseconds; tcpi_snd_wnd, bytes, since Linux 5.4.
_COUNTS, _TIMES, _WINDOW = struct.Struct("2x2B"), struct.Struct("I8xI"), 228
_TIMES_AT = 44

#: tcpi_last_data_sent, tcpi_last_data_recv and tcpi_last_ack_recv, milliseconds.
_DATA = struct.Struct("I4xII")

#: poll(2): an error is pending, or the descriptor is not open.
_FAILED = select.POLLERR | select.POLLNVAL

#: poll(2), Linux: the peer has ended its side.
_ENDED = getattr(select, "POLLRDHUP", 0)


@attrs.frozen
class TcpInfo:
    """How a connection is doing, as its sender sees it.

    :ivar window: the send window of the last acknowledgement, in bytes; 0 also where
        the kernel does not report it (before Linux 5.4).
    :ivar retransmits: how often the same bytes have been retransmitted without an
        acknowledgement.
    :ivar probes: probes of a closed window, or of a silent peer, since the last answer.
    :ivar since_sent: seconds since bytes were last sent, or sent again.
    :ivar since_heard: seconds since the last acknowledgement.
    """

    window: int
    retransmits: int
    probes: int
    since_sent: float
    since_heard: float


@attrs.frozen
class SinceData:
    """Seconds since data went over a connection, or since its beginning.

    They go by the kernel's ticks, of 1 to 10 ms.

    :ivar sent: since data was last sent, or sent again.
    :ivar arrived: since some has arrived.
    :ivar acknowledged: since the peer's last acknowledgement, with data or without.
    """

    sent: float
    arrived: float
    acknowledged: float


def _asked(transport: Any) -> bytes:
    """The `struct tcp_info` of a connection; empty where the kernel has none."""
    if TCP_INFO is None:
        return b""
    with lent_socket(transport) as sock:
        if sock is None:
            return b""
        try:
            return sock.getsockopt(socket.IPPROTO_TCP, TCP_INFO, _INFO_SIZE)
        except OSError:
            # A UNIX socket, or a sandbox.
            return b""


def tcp_info(transport: Any) -> TcpInfo | None:
    """How a TCP connection is doing; None where the kernel does not report it."""
    return parse(_asked(transport))


def since_data(transport: Any) -> SinceData | None:
    """When data went over a TCP connection; None where the kernel does not tell."""
    try:
        found = _DATA.unpack_from(_asked(transport), _TIMES_AT)
    except struct.error:
        return None
    return SinceData(*(each / 1000 for each in found))


def parse(raw: bytes) -> TcpInfo | None:
    """The fields of a `struct tcp_info` that are used; None if it is too short."""
    if len(raw) < _TIMES_AT + _TIMES.size:
        return None
    retransmits, probes = _COUNTS.unpack_from(raw)
    sent, heard = _TIMES.unpack_from(raw, _TIMES_AT)
    window = 0
    if len(raw) >= _INFO_SIZE:
        (window,) = struct.unpack_from("I", raw, _WINDOW)
    return TcpInfo(window, retransmits, probes, sent / 1000, heard / 1000)


def unacknowledged(transport: Any) -> int:
    """Bytes in the kernel's send queue of `transport`; 0 where it is not known."""
    return 0 if SIOCOUTQ is None else _count(transport, SIOCOUTQ)


def unread(transport: Any) -> int:
    """Bytes that have arrived and were not read yet; 0 where it is not known."""
    return _count(transport, termios.FIONREAD)


def _count(transport: Any, request: int) -> int:
    try:
        answer = fcntl.ioctl(transport.fileno(), request, b"\0\0\0\0")
    except (AttributeError, OSError, TypeError, ValueError):
        return 0
    return int(struct.unpack("i", answer)[0])


def is_dead(transport: Any) -> bool:
    """Whether nothing can be delivered on this connection any more.

    Unacknowledged bytes stay in its queue for ever.
    """
    return bool(_events(transport))


def was_reset(transport: Any) -> bool:
    """Whether an error is pending on a connection that is not read.

    Narrower than :func:`is_dead`: a UNIX socket whose peer has closed can't be written
    to, but what the peer sent before can still be read.
    """
    return bool(_events(transport) & _FAILED)


def take_error(transport: Any) -> int:
    """The errno that is pending on a connection; 0 where that is not known.

    The kernel tells of it once, which is here: a read after that finds what looks like
    an end of data.  So whoever calls this ends the connection.
    """
    with lent_socket(transport) as sock:
        if sock is None:
            return 0
        try:
            return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        except OSError:
            # A sandbox.
            return 0


def ended_unread(transport: Any) -> bool:
    """Whether the peer has ended its side, and nothing that it sent is unread.

    Asked of a connection that is not read.
    """
    with lent_socket(transport) as sock:
        if sock is None:
            return False
        try:
            return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except OSError:
            # Nothing has arrived; or a reset has, which is told otherwise.
            return False


def has_ended(transport: Any) -> bool:
    """Whether the peer has ended its side, however much of what it sent is unread.

    Asked of a connection that is not read.  Where poll(2) has no POLLRDHUP, an end
    behind something unread is not known.
    """
    return bool(_events(transport, _ENDED) & _ENDED) or ended_unread(transport)


def _events(transport: Any, asked: int = 0) -> int:
    poll = select.poll()
    try:
        poll.register(transport.fileno(), asked)
        found = poll.poll(0)
    except (AttributeError, OSError, TypeError, ValueError):
        return 0
    return found[0][1] if found else 0
