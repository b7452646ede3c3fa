"""recvmmsg(2) and sendmmsg(2), and the memory that they work on.

Python's sockets have neither, so the C library is called.  The memory is laid out once:
the headers of a batch, and for each a slot for a datagram and an *envelope*, which is
the socket address of the other end and, if wanted, an ancillary message with the local
address, or with the one that the datagram was sent to.
"""

from __future__ import annotations

import ctypes
import mmap
import socket
import sys
from collections.abc import Callable
from typing import Any

from relayd.datagrams.sockets import BUFFER_SIZE

#: Datagrams in one call, and those read from one socket before the next is read.
BATCH = 64

#: Bytes of a socket address: sockaddr_in of ip(7), sockaddr_in6 of ipv6(7).
SOCKADDR4, SOCKADDR6 = 16, 28

#: Fills the field of an address that the kernel does not report.  No local address is
#: all ones, while 0.0.0.0 is reported for some broadcasts.
UNKNOWN = b"\xff"


class _Part(ctypes.Structure):
    """`struct iovec`: a buffer."""

    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


class _Header(ctypes.Structure):
    """`struct msghdr` of recvmsg(2)."""

    _fields_ = [
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("parts", ctypes.c_void_p),
        ("parts_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    ]


class _Message(ctypes.Structure):
    """`struct mmsghdr` of recvmmsg(2)."""

    _fields_ = [("header", _Header), ("size", ctypes.c_uint32)]


class Messages:
    """The headers of a batch, and the memory that they point to.

    :param family: of the addresses.
    :param space: for the ancillary messages of an envelope, in bytes; 0: it has none.

    :ivar name: bytes of a socket address.
    :ivar slots: the buffer of each datagram.
    :ivar envelopes: one after the other, each of `envelope` bytes.
    :ivar control: offset of the ancillary message in an envelope.
    :ivar lengths: of the datagrams to send, read by the kernel.
    :ivar sizes: of the datagrams received, written by the kernel.
    :ivar first: the address of the first header.
    :ivar step: bytes from one header to the next.
    """

    def __init__(self, family: int, space: int) -> None:
        name = SOCKADDR6 if family == socket.AF_INET6 else SOCKADDR4
        self.name = name
        # Aligned to 8 bytes, as the kernel requires.
        self.control = -name % 8 + name
        self.envelope = self.control + space
        self.envelopes = bytearray(BATCH * self.envelope)
        # Pages that no datagram was written to take no memory.
        data = mmap.mmap(-1, BATCH * BUFFER_SIZE, flags=mmap.MAP_PRIVATE)
        parts, messages = (_Part * BATCH)(), (_Message * BATCH)()
        data_at, envelope_at = _address(data), _address(self.envelopes)
        for part, message in zip(parts, messages, strict=True):
            part.base, part.length = data_at, BUFFER_SIZE
            header = message.header
            header.parts, header.parts_count = ctypes.addressof(part), 1
            header.name, header.name_length = envelope_at, name
            if space:
                header.control = envelope_at + self.control
                header.control_length = space
            data_at += BUFFER_SIZE
            envelope_at += self.envelope
        whole = memoryview(data)
        starts = range(0, len(whole), BUFFER_SIZE)
        self.slots = [whole[start : start + BUFFER_SIZE] for start in starts]
        self.lengths = memoryview(parts).cast("B").cast("L")[1::2]
        self._headers = memoryview(messages).cast("B")
        at, each = _Message.size.offset // 4, ctypes.sizeof(_Message) // 4
        self.sizes = self._headers.cast("I")[at::each]
        self._fresh = bytes(messages)
        self._no_envelopes = UNKNOWN * len(self.envelopes)
        self.first = ctypes.addressof(messages)
        self.step = ctypes.sizeof(_Message)

    def clear(self) -> None:
        """Restore the headers and envelopes, which the kernel has written to."""
        self._headers[:] = self._fresh
        self.envelopes[:] = self._no_envelopes


def _address(memory: Any) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def function(name: str, *more: Any) -> Callable[..., int] | None:
    """A function of the C library; None if it lacks it."""
    try:
        found = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError):
        return None
    found.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, *more]
    return found  # type: ignore[no-any-return]


recvmmsg = function("recvmmsg", ctypes.c_void_p)
sendmmsg = function("sendmmsg")


def can_batch(sock: Any) -> bool:
    """Whether both calls can be made on a socket."""
    # The layouts are Linux's, and a test may use a socket that is no kernel socket.
    if not sys.platform.startswith("linux") or not isinstance(sock, socket.SocketType):
        return False
    # With no messages the calls do nothing; if a sandbox refuses them, they fail.
    nothing = sock.fileno(), None, 0, socket.MSG_DONTWAIT
    return (
        recvmmsg is not None
        and recvmmsg(*nothing, None) == 0
        and sendmmsg is not None
        and sendmmsg(*nothing) == 0
    )
