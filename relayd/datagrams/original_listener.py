"""A listener for datagrams that were sent to others, which the kernel brings here.

TPROXY gives a socket of this machine datagrams whose destination is another one, as
they are.  The kernel reports that destination with each (IP_RECVORIGDSTADDR of ip(7),
IPV6_RECVORIGDSTADDR).  It is part of a client's key: a client that sends to two
destinations has two flows.

Replies must come from where the client has sent to.  A socket that is bound to that
address (IP_TRANSPARENT) sends them: one for all flows to it, as long as there is one.
Nobody reads it, and it has next to no memory to receive.  Where the destination has the
port of the listener, the listener itself sends, from another address (IP_PKTINFO).
Replies of a batch that leave by the same socket one after the other are sent in one
call.
"""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

from relayd.core.addresses import socket_name
from relayd.datagrams.batches import (
    ANCILLARY,
    PKTINFO_SPACE4,
    PKTINFO_SPACE6,
    Batches,
    OneByOne,
    Outbox,
    Tally,
)
from relayd.datagrams.flow import ClientFlow
from relayd.datagrams.hop_limits import (
    NUMBER_AT,
    SPACE,
    UNKNOWN,
    Ageing,
    ask_for_hops,
    hops_in,
)
from relayd.datagrams.interfaces import FlowRelay
from relayd.datagrams.ledger import Ledger
from relayd.datagrams.listener import DatagramListener
from relayd.datagrams.mmsg import SOCKADDR4, SOCKADDR6, can_batch
from relayd.datagrams.original import NO_SOCKET, Meant
from relayd.datagrams.sockets import (
    BUFFER_SIZE,
    WILDCARDS,
    ask_for_local_address,
    pktinfo,
    segments,
    short_pktinfo6,
    udp_socket,
)
from relayd.datagrams.transparent import NotAsClient, is_host, places
from relayd.datagrams.watching import Watcher
from relayd.net.dial_options import is_transparent, set_transparent
from relayd.net.log_throttle import LogThrottle

#: ip(7), and linux/in6.h; the numbers of the options and of their messages.  Python has
#: no names for them.
_ORIGDSTADDR4 = int(socket.IPPROTO_IP), 20
_ORIGDSTADDR6 = int(socket.IPPROTO_IPV6), 74

#: ip(7): IP_MTU_DISCOVER, and IP_PMTUDISC_DONT.
_MTU_DISCOVER, _DONT = (int(socket.IPPROTO_IP), 10), 0

#: What a key has of their sockaddr_in and sockaddr_in6: port and address; port, flow
#: label, address and interface.
_PART4, _PART6 = slice(2, 8), slice(2, 28)


class OriginalOneByOne(OneByOne):
    """Receives datagram by datagram; a key has the destination, packed.

    :ivar hops: how many each of the last batch had left.
    """

    def __init__(self, sock: Any, tally: Tally, *, local: bool) -> None:
        super().__init__(sock, tally, local=local)
        self.hops: list[int] = []

    def receive(self) -> list[tuple[Any, Any]]:
        self.hops = []
        return super().receive()

    def _with_local(self) -> tuple[bytes, Any]:
        data, extra, _, source = self._sock.recvmsg(BUFFER_SIZE, ANCILLARY)
        wanted, part = (_ORIGDSTADDR6, _PART6) if self._v6 else (_ORIGDSTADDR4, _PART4)
        meant, hops = b"", UNKNOWN
        for level, kind, told in extra:
            if (level, kind) == wanted:
                meant = told[part]
            elif hops_in(level, kind):
                hops = int.from_bytes(told, sys.byteorder, signed=True)
        self.hops.append(hops)
        return data, (source, meant)


class OriginalBatches(Batches):
    """The same, a batch in one call."""

    one_by_one = OriginalOneByOne
    _singly: OriginalOneByOne | None

    @property
    def hops(self) -> list[int]:
        """How many each of the last batch had left."""
        if self._singly is not None:
            return self._singly.hops
        messages, before = self._messages, PKTINFO_SPACE4
        if self._v6:
            before = PKTINFO_SPACE6
        at, each = messages.control + before + NUMBER_AT, messages.envelope
        numbers = memoryview(messages.envelopes).cast("i")[at // 4 :: each // 4]
        return numbers[: self._count].tolist()

    def receive(self) -> list[tuple[Any, Any]]:
        got = super().receive()
        self._count = len(got)
        return got

    def _layout(self) -> tuple[int, slice, bool]:
        # Behind the local address, and the hops: see `_prepare`.
        if self._v6:
            before, size, part = PKTINFO_SPACE6, SOCKADDR6, _PART6
        else:
            before, size, part = PKTINFO_SPACE4, SOCKADDR4, _PART4
        before += SPACE
        begin = before + socket.CMSG_LEN(0)
        space = before + socket.CMSG_SPACE(size)
        return space, slice(begin + part.start, begin + part.stop), False


class OriginalOutbox(Outbox):
    """Sends replies that follow each other, and leave by one socket, in one call.

    An envelope here is that socket and the envelope of the class above, whose local
    address is the destination.
    """

    def envelope(self, key: bytes) -> bytes:
        source, told = key[: self._name], key[self._name :]
        return super().envelope(source + _host(told))

    def send(self, sizes: list[int], envelopes: list[Any]) -> dict[int, OSError]:
        """See :meth:`relayd.datagrams.batches.Outbox.send`."""
        socks = [sock for sock, _ in envelopes]
        packed = [envelope for _, envelope in envelopes]
        self._lay_out(sizes, packed)
        problems: dict[int, OSError] = {}
        begin = 0
        for sock, same in groupby(socks):
            which = range(begin, begin + len(list(same)))
            problems |= self._send_some(sock, which, sizes, packed)
            begin = which.stop
        return problems


class OriginalListener(DatagramListener):
    """Gets what clients have sent to others.

    :raises OSError: the kernel, or the rights of this process, do not allow it.
    """

    local = redirected = True

    def __init__(
        self, ledger: Ledger[ClientFlow], relay: FlowRelay, watcher: Watcher, sock: Any
    ) -> None:
        _prepare(sock)
        _let_routers_split(sock)
        super().__init__(ledger, relay, watcher, sock)
        self.wild = self.address[0] in WILDCARDS
        throttle = LogThrottle(ledger.clock)
        self._receiver: Any = Ageing(
            self._receiver, self.flows, ledger.counters, throttle
        )
        #: By destination: what its replies leave by, and how many flows have it.
        self._reply_sockets: dict[Any, tuple[Any, int]] = {}

    def _open_receiver(self) -> OneByOne | Batches:
        kind: Any = OriginalBatches if can_batch(self.sock) else OriginalOneByOne
        return kind(  # type: ignore[no-any-return]
            self.sock, self.ledger.counters, local=True
        )

    def _open_outbox(self) -> Outbox | None:
        return OriginalOutbox(self.sock, local=True) if can_batch(self.sock) else None

    # -- what a key means

    def client(self, key: Any) -> tuple[Any, Any]:
        source, told = self._receiver.origin(key)
        return source, Meant(source, _unpacked(told)) if told else None

    def envelope(self, key: Any) -> Any:
        packed = self.replies.envelope(key)
        if not packed:
            return packed
        original = _unpacked(self._receiver.origin(key)[1])
        sock, _ = self._reply_sockets.get(original) or (self.sock, 0)
        return sock, packed

    def name(self, key: Any) -> str:
        """The address that a client has sent to, as text: not this machine's."""
        return socket_name(_unpacked(self._receiver.origin(key)[1]))

    # -- replies

    def replier(self, to: Meant) -> Callable[[bytes, Any], Any]:
        original = to.original
        if not is_host(original[0]):
            raise NotAsClient(
                f"{socket_name(original)} can't be answered from: it is no address of"
                " one host"
            )
        if not original[1]:
            # bind(2) would choose one.
            raise NotAsClient(
                f"{socket_name(original)} can't be answered from: no socket has port 0"
            )
        if original[1] == self.port:
            to.sock, to.extra = self.sock, [pktinfo(_packed_host(original))]
        else:
            sock, flows = self._reply_sockets.get(original) or (None, 0)
            if sock is None:
                sock = self._open_reply_socket(original)
            self._reply_sockets[original] = sock, flows + 1
            to.sock = sock
        return _reply

    def gone(self, to: Meant) -> None:
        sock, to.sock = to.sock, NO_SOCKET
        if sock is NO_SOCKET or sock is self.sock:
            return
        _, flows = self._reply_sockets[to.original]
        if flows > 1:
            self._reply_sockets[to.original] = sock, flows - 1
        else:
            del self._reply_sockets[to.original]
            sock.close()

    def reply_run(self, run: Sequence[bytes], to: Meant) -> None:
        to.sock.sendmsg(run, [*to.extra, segments(len(run[0]))], 0, to.source)

    def _open_reply_socket(self, original: Any) -> Any:
        sock = udp_socket(self.sock.family)
        try:
            set_transparent(sock, self.sock.family)
            _let_routers_split(sock)
            if self.sock.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # Nobody reads it.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
            return places.place(sock, original, self.number)
        except OSError:
            sock.close()
            raise


def _reply(data: bytes, to: Meant) -> None:
    to.sock.sendmsg([data], to.extra, 0, to.source)


def _prepare(sock: Any) -> None:
    """Have the kernel give a socket what was sent to others, and say to whom.

    And to which local address, which comes before that: a relay that this one replaces
    may go on with the same socket, and have asked for it, or ask for it again.  And how
    many hops were left, which comes in between (ip_cmsg_recv_offset(),
    ip6_datagram_recv_specific_ctl()).

    :raises OSError: it does not.
    """
    if not is_transparent(sock):
        set_transparent(sock, sock.family)
    v6 = sock.family == socket.AF_INET6
    refused = ask_for_local_address(sock)
    try:
        if refused is not None:
            raise refused
        ask_for_hops(sock)
        sock.setsockopt(*(_ORIGDSTADDR6 if v6 else _ORIGDSTADDR4), 1)
    except OSError as problem:
        raise OSError(
            problem.errno or errno.EINVAL,
            "the kernel does not tell where redirected datagrams were to go"
            f" (IP_RECVORIGDSTADDR): {problem.strerror}",
        ) from problem


def _let_routers_split(sock: Any) -> None:
    """Have IPv4 replies be split on their way, where a link takes no such large ones.

    The kernel learns of such a link from an ICMP error, but not for what a socket that
    is not connected sends from an address of others (`ipv4_sk_update_pmtu`, which asks
    for a route from there as if that had to be its own).  So all would be lost that
    routers may not split.  With IPv6 it learns.
    """
    if sock.family == socket.AF_INET:
        # Where it is not possible only those are lost.
        with suppress(OSError):
            sock.setsockopt(*_MTU_DISCOVER, _DONT)


def _unpacked(told: bytes) -> Any:
    """The part of a key as a socket address."""
    port = int.from_bytes(told[:2], "big")
    if len(told) == 6:
        return socket.inet_ntop(socket.AF_INET, told[2:]), port
    scope = int.from_bytes(told[22:26], sys.byteorder)
    return socket.inet_ntop(socket.AF_INET6, told[6:22]), port, 0, scope


def _host(told: bytes) -> bytes:
    """The host in the part of a key, as :func:`pktinfo` takes it."""
    return told[2:] if len(told) == 6 else short_pktinfo6(told[6:])


def _packed_host(address: Any) -> bytes:
    """The host of a socket address, likewise."""
    if len(address) == 2:
        return socket.inet_aton(address[0])
    host = socket.inet_pton(socket.AF_INET6, address[0].partition("%")[0])
    return short_pktinfo6(host + address[3].to_bytes(4, sys.byteorder))
