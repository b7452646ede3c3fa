"""A listener's datagrams, received and sent in batches.

A relay of many flows reads and answers one datagram of each, and for each of these
Python makes a system call, a buffer and an address.  The kernel can process a batch in
one call (:mod:`relayd.datagrams.mmsg`).  :class:`Batches` receives and :class:`Outbox`
sends; a datagram is sent from the buffer that it was received into.

Where the calls are missing, or a test has a socket of its own, :class:`OneByOne`
receives, and there is no outbox.  A sandbox may refuse the calls at any time, with any
error: then datagrams are received and sent one by one, and keys stay the same.

A client's *key* at a listener is what the kernel reports with its datagram: its source,
and the local address that it sent to if the listener has several.
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
from relayd.datagrams.mmsg import BATCH, SOCKADDR4, UNKNOWN, Messages, can_batch
from relayd.datagrams.sockets import (
    BUFFER_SIZE,
    PKTINFO4,
    PKTINFO6,
    pktinfo,
    short_pktinfo6,
)

#: A batch of a socket that is read datagram by datagram.
BATCH_RANGE = range(BATCH)

#: Bytes for the ancillary messages with a datagram.
ANCILLARY = 128

#: Those of the one with the local address.
PKTINFO_SPACE4 = socket.CMSG_SPACE(PKTINFO4)
PKTINFO_SPACE6 = socket.CMSG_SPACE(PKTINFO6)

#: Errors of a call that no sandbox refuses: nothing to read, no buffer or memory, or an
#: earlier datagram was refused.  Any other may be a sandbox's.
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
    """Counts refusals."""

    icmp_errors: int


class OneByOne:
    """Receives with the calls that every socket has.

    :param local: the key has the local address, too; the socket has the option set.

    :ivar drained: the last call has read all that was pending.
    :ivar refusal: the error of the last call, if it may last.
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
        info = extra[0][2]
        # The second field of in_pktinfo: the third may be a broadcast address.
        return data, (source, short_pktinfo6(info) if self._v6 else info[4:8])

    @staticmethod
    def origin(key: Any) -> tuple[Any, bytes]:
        """The client's socket address and, packed, the local one; empty if unknown."""
        source, ours = key
        return source, ours


class Batches:
    """As :class:`OneByOne`, a batch in one call.

    The datagrams that it returns are in buffers that the next call overwrites.

    :cvar one_by_one: receives instead, if the call is refused.
    """

    one_by_one = OneByOne

    def __init__(self, sock: Any, tally: Tally, *, local: bool) -> None:
        self._sock = sock
        self._tally = tally
        self._local = local
        self._v6 = sock.family == socket.AF_INET6
        space, part, self._shortens = self._layout()
        messages = self._messages = Messages(sock.family, space if local else 0)
        starts = range(0, len(messages.envelopes), messages.envelope)
        self._name = messages.name
        self._names = [slice(start, start + self._name) for start in starts]
        self._ours = [
            slice(start + part.start, start + part.stop)
            for start in (each + messages.control for each in starts)
        ]
        #: What is in a key if the kernel has not told.
        self._unknown = UNKNOWN * (part.stop - part.start)
        if self._shortens:
            self._unknown = short_pktinfo6(self._unknown)
        self.drained = False
        self._singly: OneByOne | None = None

    def _layout(self) -> tuple[int, slice, bool]:
        """Bytes of the ancillary messages, what of them a key has, and whether that is
        an in6_pktinfo, which is shortened."""
        begin = socket.CMSG_LEN(0)
        # The address to answer from, of in_pktinfo; the whole in6_pktinfo.
        if self._v6:
            return PKTINFO_SPACE6, slice(begin, begin + PKTINFO6), True
        return PKTINFO_SPACE4, slice(begin + 4, begin + 8), False

    @property
    def refusal(self) -> OSError | None:
        """See :class:`OneByOne`."""
        return None if self._singly is None else self._singly.refusal

    def receive(self) -> list[tuple[Any, Any]]:
        """See :meth:`OneByOne.receive`."""
        if self._singly is not None:
            return self._receive_singly(self._singly)
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
                self._singly = self.one_by_one(
                    self._sock, self._tally, local=self._local
                )
                return self._receive_singly(self._singly)
            self._tally.icmp_errors += 1
            return []
        envelopes, sizes = bytes(messages.envelopes), messages.sizes[:count].tolist()
        ends = zip(sizes, messages.slots, self._names, self._ours, strict=False)
        if not self._local:
            return [(slot[:size], envelopes[name]) for size, slot, name, _ in ends]
        if not self._shortens:
            return [
                (slot[:size], envelopes[name] + envelopes[ours])
                for size, slot, name, ours in ends
            ]
        return [
            (slot[:size], envelopes[name] + short_pktinfo6(envelopes[ours]))
            for size, slot, name, ours in ends
        ]

    def _receive_singly(self, one_by_one: OneByOne) -> list[tuple[Any, Any]]:
        got = one_by_one.receive()
        self.drained = one_by_one.drained
        return [(data, self._key(*key)) for data, key in got]

    def _key(self, source: Any, ours: bytes) -> bytes:
        """A client's key here, from its key of :class:`OneByOne`."""
        if not self._local:
            return _packed(source)
        return _packed(source) + (ours or self._unknown)

    def origin(self, key: bytes) -> tuple[Any, bytes]:
        """See :meth:`OneByOne.origin`."""
        name, ours = key[: self._name], key[self._name :]
        return _unpacked(name), b"" if ours == self._unknown else ours


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

    :ivar slots: the buffers to write the next datagrams to.
    """

    def __init__(self, sock: Any, *, local: bool) -> None:
        self._sock = sock
        self._local = local
        v6 = sock.family == socket.AF_INET6
        space = PKTINFO_SPACE6 if v6 else PKTINFO_SPACE4
        messages = self._messages = Messages(sock.family, space if local else 0)
        self._name = messages.name
        self.slots = self._messages.slots
        #: The call is refused: send one by one.
        self._singly = False

    def envelope(self, key: bytes) -> bytes:
        """A client's address and the local address, as the kernel reads them.

        :param key: the client's key of :class:`Batches`.
        """
        made = key[: self._name].ljust(self._messages.control, b"\0")
        if self._local:
            level, kind, info = pktinfo(key[self._name :])
            made += struct.pack("@Nii", socket.CMSG_LEN(len(info)), level, kind) + info
        return made.ljust(self._messages.envelope, b"\0")

    def send(self, sizes: list[int], envelopes: list[bytes]) -> dict[int, OSError]:
        """Send the datagrams in the first `len(sizes)` slots.

        :return: the errors of those that could not be sent, by slot number.
        """
        self._lay_out(sizes, envelopes)
        return self._send_some(self._sock, range(len(sizes)), sizes, envelopes)

    def _lay_out(self, sizes: list[int], envelopes: list[bytes]) -> None:
        """Put them where the kernel reads them."""
        messages, count = self._messages, len(sizes)
        messages.lengths[:count] = memoryview(array("L", sizes))
        messages.envelopes[: count * messages.envelope] = b"".join(envelopes)

    def _send_some(
        self, sock: Any, which: range, sizes: list[int], envelopes: list[bytes]
    ) -> dict[int, OSError]:
        """Send some of them, which follow each other, by one socket."""
        if self._singly:
            return self._send_singly(sock, which, sizes, envelopes)
        messages = self._messages
        problems: dict[int, OSError] = {}
        done, count = which.start, which.stop
        while done < count:
            sent = mmsg.sendmmsg(  # type: ignore[misc]
                sock.fileno(),
                messages.first + done * messages.step,
                count - done,
                socket.MSG_DONTWAIT,
            )
            if sent > 0:
                done += sent
            else:
                # The error of the first; that of a later one is reported next time.
                number = ctypes.get_errno()
                problem = OSError(number, os.strerror(number))
                if number not in _SOFT:
                    # If it can be sent by another call, this call is refused.
                    this, rest = range(done, done + 1), range(done + 1, count)
                    if not self._send_singly(sock, this, sizes, envelopes):
                        self._singly = True
                        rest_too = self._send_singly(sock, rest, sizes, envelopes)
                        return problems | rest_too
                problems[done] = problem
                done += 1
        return problems

    def _send_singly(
        self, sock: Any, which: range, sizes: list[int], envelopes: list[bytes]
    ) -> dict[int, OSError]:
        problems: dict[int, OSError] = {}
        for number in which:
            envelope = envelopes[number]
            extra = [self._ancillary(envelope)] if self._local else []
            data = self.slots[number][: sizes[number]]
            try:
                to = _unpacked(envelope[: self._name])
                if extra:
                    sock.sendmsg([data], extra, 0, to)
                else:
                    sock.sendto(data, to)
            except OSError as problem:
                problems[number] = problem
        return problems

    def _ancillary(self, envelope: bytes) -> tuple[int, int, bytes]:
        """The ancillary message of an envelope, as `sendmsg` takes it."""
        control = envelope[self._messages.control :]
        length, level, kind = struct.unpack_from("@Nii", control)
        return level, kind, control[socket.CMSG_LEN(0) : length]


def receiver(sock: Any, tally: Tally, *, local: bool) -> OneByOne | Batches:
    """The receiver for a listener's socket.

    :param local: the address that a client has sent to is part of its key.
    """
    kind = Batches if can_batch(sock) else OneByOne
    return kind(sock, tally, local=local)


def outbox(sock: Any, *, local: bool) -> Outbox | None:
    """The outbox for a listener's socket, if the kernel has the calls."""
    return Outbox(sock, local=local) if can_batch(sock) else None
