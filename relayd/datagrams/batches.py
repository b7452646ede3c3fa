"""A listener's datagrams, many at a time.

A relay of many flows has one datagram of each to read and one to answer, and Python
makes a call to the kernel, a buffer and an address of each.  The kernel can do a batch
of them in one call (:mod:`relayd.datagrams.mmsg`).  :class:`Batches` receives and
:class:`Outbox` sends: the kernel writes a datagram where it will be sent from.

Where there is no such call, or a test's socket, :class:`OneByOne` receives, and there
is no outbox.  A sandbox may refuse the calls at any time, with any error: then the same
is done one by one, and the keys stay what they are.

A client's *key* is what the kernel tells with its datagram: its source, and the local
address that it sent to where a listener has several.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import sys
from array import array
from typing import Any, Protocol

from relayd.datagrams import mmsg
from relayd.datagrams.mmsg import BATCH, NOT_TOLD, SOCKADDR4, Messages, can_batch
from relayd.datagrams.sockets import (
    BUFFER_SIZE,
    PKTINFO6,
    pktinfo,
    short_pktinfo6,
)

#: One turn at a socket that is read datagram by datagram.
BATCH_RANGE = range(BATCH)

#: Bytes for what the kernel tells besides a datagram: one address of ours.
ANCILLARY = 64

#: Errors of a call that works: nothing to read, no buffer or memory, or an earlier
#: datagram was refused.  Any other may be a sandbox's refusal.
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
    """Where refusals are counted."""

    icmp_errors: int


class OneByOne:
    """Receives with the calls that every socket has.

    :param local: the key has the local address, too; the socket has been asked to tell
        it.

    :ivar drained: the last call has read all that was pending.
    :ivar refusal: why it could not receive at all, if the reason may last.
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
        for _ in BATCH_RANGE:
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


class Batches:
    """As :class:`OneByOne`, in one call.

    What it returns is in memory that the next call overwrites.
    """

    def __init__(self, sock: Any, tally: Tally, *, local: bool) -> None:
        self._sock = sock
        self._tally = tally
        self._local = local
        self._v6 = sock.family == socket.AF_INET6
        messages = self._messages = Messages(sock.family, local=local)
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
        count = mmsg.recvmmsg(  # type: ignore[misc]
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
        ends = zip(sizes, messages.slots, self._names, self._ours, strict=False)
        if not self._local:
            return [(slot[:size], told[name]) for size, slot, name, _ in ends]
        if not self._v6:
            return [
                (slot[:size], told[name] + told[ours])
                for size, slot, name, ours in ends
            ]
        return [
            (slot[:size], told[name] + short_pktinfo6(told[ours]))
            for size, slot, name, ours in ends
        ]

    def _receive_plainly(self, plain: OneByOne) -> list[tuple[Any, Any]]:
        got = plain.receive()
        self.drained = plain.drained
        return [(data, self._key(*key)) for data, key in got]

    def _key(self, source: Any, ours: bytes) -> bytes:
        """A client's key, of what :class:`OneByOne` knows it by."""
        if not self._local:
            return _packed(source)
        return _packed(source) + (ours or NOT_TOLD * (16 if self._v6 else 4))

    def origin(self, key: bytes) -> tuple[Any, bytes]:
        """See :meth:`OneByOne.origin`."""
        name, ours = key[: self._name], key[self._name :]
        return _unpacked(name), b"" if ours == NOT_TOLD * len(ours) else ours


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

    :ivar slots: the buffers of the next datagrams, which are written there.
    """

    def __init__(self, sock: Any, *, local: bool) -> None:
        self._sock = sock
        self._local = local
        messages = self._messages = Messages(sock.family, local=local)
        self._name = messages.name
        self.slots = self._messages.slots
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
        """Send what is in the first slots, as many as there are sizes.

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
            sent = mmsg.sendmmsg(  # type: ignore[misc]
                self._sock.fileno(),
                messages.first + done * messages.step,
                count - done,
                socket.MSG_DONTWAIT,
            )
            if sent > 0:
                done += sent
            else:
                # Of the first; an error of a later one is reported by the next call.
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
            data = self.slots[number][: sizes[number]]
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

    :param local: the address that a client has sent to is part of its key.
    """
    kind = Batches if can_batch(sock) else OneByOne
    return kind(sock, tally, local=local)


def outbox(sock: Any, *, local: bool) -> Outbox | None:
    """What sends on a listener's socket, if the kernel can."""
    return Outbox(sock, local=local) if can_batch(sock) else None
