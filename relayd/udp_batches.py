"""A listener's datagrams, many at a time: recvmmsg(2) and sendmmsg(2).

A relay of many flows has one datagram of each to read and one to answer, and Python
makes a call to the kernel, a buffer and an address of each.  The kernel can do a batch
of them in one call; Python's sockets can't ask for that, so the C library is asked.
:class:`Batches` receives and :class:`Outbox` sends, out of memory that is laid out
once: the kernel writes a datagram where it will be sent from.

Where there is no such call, or a socket that is none of the kernel's, :class:`OneByOne`
receives, and there is no outbox.

What a client is known by, its *key*, is what the kernel says of a datagram: its
source, and the local address that it spoke to where a listener has several.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import struct
import sys
from array import array
from collections.abc import Callable
from typing import Any, Protocol

from relayd.udp_sockets import (
    BUFFER_SIZE,
    PKTINFO4,
    PKTINFO6,
    pktinfo,
    short_pktinfo6,
)

#: Datagrams that are read from one socket before others have their turn.
BATCH = 64

TURNS = range(BATCH)

#: Room for what the kernel says besides a datagram, in bytes: one address of ours.
ANCILLARY = 64

#: Bytes of a socket address: sockaddr_in of ip(7), sockaddr_in6 of ipv6(7).
SOCKADDR4, SOCKADDR6 = 16, 28

#: What is left of an address that the kernel does not say.
_NOT_TOLD = b"\xff"


class Tally(Protocol):
    """What is counted of errors."""

    icmp_errors: int


class OneByOne:
    """Receives with the calls that every socket has.

    :param local: the key has the local address, too; the socket has been told to say
        it.

    :ivar drained: the last call has read all there was.
    """

    def __init__(self, sock: Any, tally: Tally, *, local: bool) -> None:
        self._sock = sock
        self._tally = tally
        self._local = local
        self._v6 = sock.family == socket.AF_INET6
        self.drained = False

    def receive(self) -> list[tuple[Any, Any]]:
        """A batch of datagrams, each with its client's key."""
        one = self._with_local if self._local else self._plain
        got: list[tuple[Any, Any]] = []
        self.drained = False
        for _ in TURNS:
            try:
                got.append(one())
            except BlockingIOError:
                self.drained = True
                break
            except OSError:
                # An observer may have closed the relay.
                self.drained = self._sock.fileno() < 0
                if self.drained:
                    break
                self._tally.icmp_errors += 1
        return got

    def _plain(self) -> tuple[bytes, Any]:
        data, source = self._sock.recvfrom(BUFFER_SIZE)
        return data, (source, b"")

    def _with_local(self) -> tuple[bytes, Any]:
        data, extra, _, source = self._sock.recvmsg(BUFFER_SIZE, ANCILLARY)
        if not extra:
            return data, (source, b"")
        told = extra[0][2]
        # Of in_pktinfo, the second: the third may be a broadcast address.
        return data, (source, short_pktinfo6(told) if self._v6 else told[4:8])

    @staticmethod
    def origin(key: Any) -> tuple[Any, bytes]:
        """The client's socket address and, packed, the local one; empty if unknown."""
        source, ours = key
        return source, ours


class _Part(ctypes.Structure):
    """`struct iovec`: where the bytes are."""

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


class _Messages:
    """The headers of a batch, and the memory that they point to.

    A header points to a room for the datagram and to an *envelope*: the socket address
    of the other end and, if wanted, an ancillary message with the local address.

    :param family: of the addresses.
    :param local: an envelope has the local address, too.

    :ivar name: bytes of a socket address.
    :ivar rooms: for each, the place of a datagram.
    :ivar envelopes: one after the other, each of so many bytes: `envelope`.
    :ivar control: where an envelope has its ancillary message.
    :ivar lengths: of the datagrams, as the kernel is told.
    :ivar sizes: of the datagrams, as the kernel tells.
    :ivar first: the address of the first header.
    """

    def __init__(self, family: int, *, local: bool) -> None:
        v6 = family == socket.AF_INET6
        name, told = (SOCKADDR6, PKTINFO6) if v6 else (SOCKADDR4, PKTINFO4)
        self.name = name
        # Where the kernel finds it aligned.
        self.control = -name % 8 + name
        room = socket.CMSG_SPACE(told) if local else 0
        self.envelope = self.control + room
        self.envelopes = bytearray(BATCH * self.envelope)
        # Pages of it that no datagram reaches take no memory.
        data = mmap.mmap(-1, BATCH * BUFFER_SIZE, flags=mmap.MAP_PRIVATE)
        parts, messages = (_Part * BATCH)(), (_Message * BATCH)()
        data_at, envelope_at = _address(data), _address(self.envelopes)
        for part, message in zip(parts, messages, strict=True):
            part.base, part.length = data_at, BUFFER_SIZE
            header = message.header
            header.parts, header.parts_count = ctypes.addressof(part), 1
            header.name, header.name_length = envelope_at, name
            if local:
                header.control = envelope_at + self.control
                header.control_length = room
            data_at += BUFFER_SIZE
            envelope_at += self.envelope
        whole = memoryview(data)
        starts = range(0, len(whole), BUFFER_SIZE)
        self.rooms = [whole[start : start + BUFFER_SIZE] for start in starts]
        self.lengths = memoryview(parts).cast("B").cast("L")[1::2]
        self._headers = memoryview(messages).cast("B")
        at, each = _Message.size.offset // 4, ctypes.sizeof(_Message) // 4
        self.sizes = self._headers.cast("I")[at::each]
        self._fresh = bytes(messages)
        # No address of ours is all ones, and 0.0.0.0 is said of some broadcasts.
        self._no_envelopes = _NOT_TOLD * len(self.envelopes)
        self.first = ctypes.addressof(messages)

    def clear(self) -> None:
        """Make it what it was: the kernel has written into it."""
        self._headers[:] = self._fresh
        self.envelopes[:] = self._no_envelopes


def _address(memory: Any) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _function(name: str, *more: Any) -> Callable[..., int] | None:
    """One of the C library, if it has it."""
    try:
        found = getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError):
        return None
    found.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, *more]
    return found  # type: ignore[no-any-return]


_recvmmsg = _function("recvmmsg", ctypes.c_void_p)
_sendmmsg = _function("sendmmsg")


def _can_batch(sock: Any) -> bool:
    # The layouts are Linux's, and a test's socket is not the kernel's.
    if not sys.platform.startswith("linux") or not isinstance(sock, socket.SocketType):
        return False
    # Neither does anything yet; where a sandbox refuses such calls, it says so.
    nothing = sock.fileno(), None, 0, socket.MSG_DONTWAIT
    return (
        _recvmmsg is not None
        and _recvmmsg(*nothing, None) == 0
        and _sendmmsg is not None
        and _sendmmsg(*nothing) == 0
    )


class Batches:
    """As :class:`OneByOne`, in one call.

    What it returns is in memory that the next call overwrites.
    """

    def __init__(self, sock: Any, tally: Tally, *, local: bool) -> None:
        self._sock = sock
        self._tally = tally
        self._local = local
        self._v6 = sock.family == socket.AF_INET6
        messages = self._messages = _Messages(sock.family, local=local)
        starts = range(0, len(messages.envelopes), messages.envelope)
        self._name = messages.name
        self._names = [slice(start, start + self._name) for start in starts]
        # Of in_pktinfo, the address to answer from; in6_pktinfo is taken whole.
        begin, size = (0, PKTINFO6) if self._v6 else (4, 4)
        begin += messages.control + socket.CMSG_LEN(0)
        self._ours = [slice(start + begin, start + begin + size) for start in starts]
        self.drained = False

    def receive(self) -> list[tuple[Any, Any]]:
        """See :meth:`OneByOne.receive`."""
        messages = self._messages
        messages.clear()
        count = _recvmmsg(  # type: ignore[misc]
            self._sock.fileno(), messages.first, BATCH, socket.MSG_DONTWAIT, None
        )
        self.drained = count < BATCH
        if count < 0:
            if ctypes.get_errno() != errno.EAGAIN:
                # An observer may have closed the relay.
                self.drained = self._sock.fileno() < 0
                self._tally.icmp_errors += not self.drained
            return []
        told, sizes = bytes(messages.envelopes), messages.sizes[:count].tolist()
        ends = zip(sizes, messages.rooms, self._names, self._ours, strict=False)
        if not self._local:
            return [(room[:size], told[name]) for size, room, name, _ in ends]
        if not self._v6:
            return [
                (room[:size], told[name] + told[ours])
                for size, room, name, ours in ends
            ]
        return [
            (room[:size], told[name] + short_pktinfo6(told[ours]))
            for size, room, name, ours in ends
        ]

    def origin(self, key: bytes) -> tuple[Any, bytes]:
        """See :meth:`OneByOne.origin`."""
        name, ours = key[: self._name], key[self._name :]
        port = int.from_bytes(name[2:4], "big")
        source: Any = (socket.inet_ntop(socket.AF_INET, name[4:8]), port)
        if self._v6:
            source = (
                socket.inet_ntop(socket.AF_INET6, name[8:24]),
                port,
                int.from_bytes(name[4:8], "big"),
                int.from_bytes(name[24:28], sys.byteorder),
            )
        return source, b"" if ours == _NOT_TOLD * len(ours) else ours


class Outbox:
    """Sends datagrams of many clients in one call.

    :ivar rooms: the places of the next datagrams; they are written there.
    """

    def __init__(self, sock: Any, *, local: bool) -> None:
        self._sock = sock
        self._local = local
        messages = self._messages = _Messages(sock.family, local=local)
        self._name = messages.name
        self.rooms = self._messages.rooms

    def envelope(self, key: bytes) -> bytes:
        """What tells the kernel where to send to, and from which address of ours.

        :param key: the client's, as :class:`Batches` has it.
        """
        made = key[: self._name].ljust(self._messages.control, b"\0")
        if self._local:
            level, kind, told = pktinfo(key[self._name :])
            made += struct.pack("@Nii", socket.CMSG_LEN(len(told)), level, kind) + told
        return made.ljust(self._messages.envelope, b"\0")

    def send(self, sizes: list[int], envelopes: list[bytes]) -> dict[int, OSError]:
        """Send what is in as many rooms.

        :return: those that could not be sent, by their number, and why.
        """
        messages, count = self._messages, len(sizes)
        messages.lengths[:count] = memoryview(array("L", sizes))
        messages.envelopes[: count * messages.envelope] = b"".join(envelopes)
        problems: dict[int, OSError] = {}
        done = 0
        while done < count:
            sent = _sendmmsg(  # type: ignore[misc]
                self._sock.fileno(),
                messages.first + done * ctypes.sizeof(_Message),
                count - done,
                socket.MSG_DONTWAIT,
            )
            if sent > 0:
                done += sent
            else:
                # The first of them; what stopped the call later is said by the next.
                number = ctypes.get_errno()
                problems[done] = OSError(number, os.strerror(number))
                done += 1
        return problems


def receiver(sock: Any, tally: Tally, *, local: bool) -> OneByOne | Batches:
    """What receives from a listener's socket.

    :param local: where a client spoke to is part of its key.
    """
    kind = Batches if _can_batch(sock) else OneByOne
    return kind(sock, tally, local=local)


def outbox(sock: Any, *, local: bool) -> Outbox | None:
    """What sends on a listener's socket, if the kernel can."""
    return Outbox(sock, local=local) if _can_batch(sock) else None
