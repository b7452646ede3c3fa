"""A listener's datagrams, many at a time: recvmmsg(2) and sendmmsg(2).

A relay of many flows has one datagram of each to read and one to answer, and Python
makes a call to the kernel, a buffer and an address of each.  The kernel can do a batch
of them in one call; Python's sockets can't ask for that, so the C library is asked.
:class:`Batches` receives and :class:`Outbox` sends, out of memory that is laid out
once: the kernel writes a datagram where it will be sent from.

Where there is no such call, or a socket that is none of the kernel's, :class:`OneByOne`
receives, and there is no outbox.  A sandbox may refuse the calls at any time, with any
error: then the same is done one by one, and the keys stay what they are.

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

#: What a call that can be had may fail with: there is nothing, no room, no memory, or
#: an earlier datagram was refused.  Anything else may be a sandbox's refusal.
_SOFT = frozenset(
    {
        errno.EAGAIN,
        errno.EINTR,
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.ECONNREFUSED,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
    }
)


class Tally(Protocol):
    """What is counted of errors."""

    icmp_errors: int


class OneByOne:
    """Receives with the calls that every socket has.

    :param local: the key has the local address, too; the socket has been told to say
        it.

    :ivar drained: the last call has read all there was.
    :ivar refusal: why it could not receive at all, for a reason that may last.
    """

    def __init__(self, sock: Any, tally: Tally, *, local: bool) -> None:
        self._sock = sock
        self._tally = tally
        self._local = local
        self._v6 = sock.family == socket.AF_INET6
        self.drained = False
        self.refusal: OSError | None = None

    def receive(self) -> list[tuple[Any, Any]]:
        """A batch of datagrams, each with its client's key."""
        one = self._with_local if self._local else self._plain
        got: list[tuple[Any, Any]] = []
        self.drained, self.refusal = False, None
        for _ in TURNS:
            try:
                got.append(one())
            except BlockingIOError:
                self.drained = True
                break
            except OSError as problem:
                # An observer may have closed the relay.
                self.drained = self._sock.fileno() < 0
                if self.drained:
                    break
                if problem.errno not in _SOFT:
                    self.refusal = problem
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
        #: What receives instead, where the call is refused.
        self._plain: OneByOne | None = None

    @property
    def refusal(self) -> OSError | None:
        """See :class:`OneByOne`."""
        return None if self._plain is None else self._plain.refusal

    def receive(self) -> list[tuple[Any, Any]]:
        """See :meth:`OneByOne.receive`."""
        if self._plain is not None:
            return self._receive_plainly(self._plain)
        messages = self._messages
        messages.clear()
        count = _recvmmsg(  # type: ignore[misc]
            self._sock.fileno(), messages.first, BATCH, socket.MSG_DONTWAIT, None
        )
        self.drained = count < BATCH
        if count < 0:
            number = ctypes.get_errno()
            if number == errno.EAGAIN:
                return []
            # An observer may have closed the relay.
            self.drained = self._sock.fileno() < 0
            if self.drained:
                return []
            if number not in _SOFT:
                self._plain = OneByOne(self._sock, self._tally, local=self._local)
                return self._receive_plainly(self._plain)
            self._tally.icmp_errors += 1
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

    def _receive_plainly(self, plain: OneByOne) -> list[tuple[Any, Any]]:
        got = plain.receive()
        self.drained = plain.drained
        return [(data, self._key(*key)) for data, key in got]

    def _key(self, source: Any, ours: bytes) -> bytes:
        """A client's key, of what :class:`OneByOne` knows it by."""
        if not self._local:
            return _packed(source)
        return _packed(source) + (ours or _NOT_TOLD * (16 if self._v6 else 4))

    def origin(self, key: bytes) -> tuple[Any, bytes]:
        """See :meth:`OneByOne.origin`."""
        name, ours = key[: self._name], key[self._name :]
        return _unpacked(name), b"" if ours == _NOT_TOLD * len(ours) else ours


def _packed(source: Any) -> bytes:
    """A socket address as the kernel has it: ip(7), ipv6(7)."""
    port: bytes = source[1].to_bytes(2, "big")
    if len(source) == 2:
        family = socket.AF_INET.to_bytes(2, sys.byteorder)
        return family + port + socket.inet_aton(source[0]) + bytes(8)
    family = socket.AF_INET6.to_bytes(2, sys.byteorder)
    host = socket.inet_pton(socket.AF_INET6, source[0].partition("%")[0])
    flow, scope = source[2].to_bytes(4, "big"), source[3].to_bytes(4, sys.byteorder)
    return b"".join((family, port, flow, host, scope))


def _unpacked(name: bytes) -> Any:
    """A socket address as the socket module has it."""
    port = int.from_bytes(name[2:4], "big")
    if len(name) == SOCKADDR4:
        return socket.inet_ntop(socket.AF_INET, name[4:8]), port
    return (
        socket.inet_ntop(socket.AF_INET6, name[8:24]),
        port,
        int.from_bytes(name[4:8], "big"),
        int.from_bytes(name[24:28], sys.byteorder),
    )


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
        #: The call is refused: one by one.
        self._plainly = False

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
        if self._plainly:
            return self._send_plainly(range(len(sizes)), sizes, envelopes)
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
                problem = OSError(number, os.strerror(number))
                if number not in _SOFT:
                    # If it can be sent without the call, it was the call.
                    one = self._send_plainly(range(done, done + 1), sizes, envelopes)
                    if not one:
                        self._plainly = True
                        rest = range(done + 1, count)
                        return problems | self._send_plainly(rest, sizes, envelopes)
                problems[done] = problem
                done += 1
        return problems

    def _send_plainly(
        self, which: range, sizes: list[int], envelopes: list[bytes]
    ) -> dict[int, OSError]:
        problems: dict[int, OSError] = {}
        for number in which:
            envelope = envelopes[number]
            extra = [self._told(envelope)] if self._local else []
            data = self.rooms[number][: sizes[number]]
            try:
                to = _unpacked(envelope[: self._name])
                if extra:
                    self._sock.sendmsg([data], extra, 0, to)
                else:
                    self._sock.sendto(data, to)
            except OSError as problem:
                problems[number] = problem
        return problems

    def _told(self, envelope: bytes) -> tuple[int, int, bytes]:
        """The ancillary message of an envelope, as `sendmsg` wants it."""
        control = envelope[self._messages.control :]
        length, level, kind = struct.unpack_from("@Nii", control)
        return level, kind, control[socket.CMSG_LEN(0) : length]


def receiver(sock: Any, tally: Tally, *, local: bool) -> OneByOne | Batches:
    """What receives from a listener's socket.

    :param local: where a client spoke to is part of its key.
    """
    kind = Batches if _can_batch(sock) else OneByOne
    return kind(sock, tally, local=local)


def outbox(sock: Any, *, local: bool) -> Outbox | None:
    """What sends on a listener's socket, if the kernel can."""
    return Outbox(sock, local=local) if _can_batch(sock) else None
