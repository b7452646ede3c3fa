"""Datagram sockets: opening them, their options, and runs.

`reactor.listenUDP` is not used: it truncates datagrams at 8,192 bytes, lets a flood of
empty ones starve everything else, and hides the address that a client sent to.

A *run* is several datagrams of one size.  The kernel takes it in one call, passes it
through its stack as one, and splits it at the end (UDP_SEGMENT, udp(7)).
"""

from __future__ import annotations

import errno
import resource
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from relayd.core import ports
from relayd.core.errors import ListenError
from relayd.core.names import host_port
from relayd.net.binding import numeric_address
from relayd.net.dial_options import DialOptions, set_transparent

#: More bytes than any datagram has: 65,507 over IPv4, 65,527 over IPv6.
BUFFER_SIZE = 65536

#: Descriptors kept free of flows; at most a quarter of the limit.
RESERVE = 1024

#: The most flows by default, however many descriptors there are: they take 0.3 GB of
#: memory (docs/operating.md), and whoever can forge addresses can fill the table.
MOST_BY_DEFAULT = 1 << 16

#: socket(7), Linux: counters of a socket, and the index of its drops.
_SO_MEMINFO, _DROPS = 55, 8

WILDCARDS = ("0.0.0.0", "::")

IP_PKTINFO = getattr(socket, "IP_PKTINFO", 8)

#: Bytes of in_pktinfo, ip(7): the interface, the local address, and the destination in
#: the header.
PKTINFO4 = 12
_PKTINFO4 = struct.Struct("=I4s4s")

#: Bytes of in6_pktinfo, ipv6(7) and RFC 3542: the local address, and the interface.
PKTINFO6 = 20
_LINK_LOCAL = b"\xfe\x80"

#: udp(7), since Linux 4.18: several datagrams in one call.
_SEGMENTS = sys.platform.startswith("linux")
_SOL_UDP, _UDP_SEGMENT, _UINT16 = 17, 103, struct.Struct("=H")

#: Limits of a run: datagrams, and bytes in all.
MAX_SEGMENTS, MAX_SEGMENTED = 64, 65000


def fits(run: list[bytes], size: int) -> bool:
    """Whether another datagram of this size can be added to a run."""
    if not _SEGMENTS or not size:
        return False
    return len(run) < MAX_SEGMENTS and size * (len(run) + 1) <= MAX_SEGMENTED


def segments(size: int) -> tuple[int, int, bytes]:
    """The ancillary message that has the kernel split a run so (udp(7))."""
    return _SOL_UDP, _UDP_SEGMENT, _UINT16.pack(size)


#: Errors that do not concern the run itself: a queue is full, or an earlier datagram
#: was refused.
_PASSING = frozenset(
    {
        errno.EAGAIN,
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.ECONNREFUSED,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
    }
)


def segments_after(problem: OSError) -> bool:
    """Whether to go on sending runs, after one has failed."""
    # Any other error means that runs can't be sent: datagrams are larger than the path
    # allows, or the interface or the kernel does not support runs.
    return problem.errno in _PASSING


def ask_for_local_address(sock: Any) -> OSError | None:
    """Have the kernel report the local address that each datagram was sent to.

    :return: the error, if it does not.
    """
    try:
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
    except OSError as problem:
        return problem
    return None


def short_pktinfo6(info: bytes) -> bytes:
    """The address of an in6_pktinfo; with the interface, if it is link-local."""
    return info if info[:2] == _LINK_LOCAL else info[:16]


def pktinfo(ours: bytes) -> tuple[int, int, bytes]:
    """The ancillary message for sending from a local address.

    :param ours: the address, packed; or the result of :func:`short_pktinfo6`.
    :return: as `sendmsg` takes it.
    """
    if len(ours) == 4:
        return socket.IPPROTO_IP, IP_PKTINFO, _PKTINFO4.pack(0, ours, bytes(4))
    return socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, ours.ljust(PKTINFO6, b"\0")


def kernel_drops(sock: Any) -> int | None:
    """Datagrams that the kernel dropped at a full buffer; None if not known."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        counters = sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 64)
    except OSError:
        return None
    if len(counters) < 4 * _DROPS + 4:
        return None
    return int.from_bytes(counters[4 * _DROPS : 4 * _DROPS + 4], sys.byteorder)


def raise_buffer(sock: Any, wanted: int) -> None:
    """Set the receive buffer to so many bytes, as far as allowed (socket(7))."""
    forced = getattr(socket, "SO_RCVBUFFORCE", 33)
    try:
        # Beyond net.core.rmem_max, with the privilege.
        sock.setsockopt(socket.SOL_SOCKET, forced, wanted)
    except OSError:
        # A sandbox may refuse both: the buffer stays as it is.
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wanted)


def send_error(problem: OSError) -> str:
    return f"send_{errno.errorcode.get(problem.errno or 0, problem.errno)}"


def udp_socket(family: int) -> Any:
    return socket.SocketType(
        family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    )


def flow_opener(
    open_socket: Callable[[int], Any], options: DialOptions | None
) -> Callable[[int], Any]:
    """What opens the sockets of flows: of a family, with these options."""
    if options is None or options == DialOptions():
        return open_socket
    prepare = options.prepare
    if options == DialOptions(transparent=True):
        # It is all there is to set, and is asked for with each flow.
        prepare = set_transparent

    def opened(family: int) -> Any:
        sock = open_socket(family)
        try:
            prepare(sock, family)
        except OSError:
            sock.close()
            raise
        return sock

    return opened


def default_max_flows(
    sockets: int = 1, others: int = 0, *, ephemeral: bool = True
) -> int:
    """The default limit of flows: see :func:`possible_flows`."""
    possible = possible_flows(sockets, others, ephemeral=ephemeral)
    return min(MOST_BY_DEFAULT, possible)


def possible_flows(sockets: int = 1, others: int = 0, *, ephemeral: bool = True) -> int:
    """How many flows this process can have, with some left for everything else.

    :param sockets: that each has to its servers.
    :param others: what it takes beside: one more descriptor if its client was
        redirected.
    :param ephemeral: the former take one of the kernel's ephemeral ports, too.  One
        that is transparent does not: it has its client's port.
    """
    try:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except OSError:
        # A sandbox refuses: what most systems begin with.
        limit = 1024
    if limit == resource.RLIM_INFINITY:
        limit = 1 << 20
    found = (limit - min(RESERVE, limit // 4)) // (sockets + others)
    if ephemeral:
        found = min(found, ports.count() * 7 // 8 // sockets)
    return max(1, found)


def bind_udp(host: str, port: int) -> socket.SocketType:
    """A non-blocking datagram socket, bound.

    :raises ListenError: it can't be bound.
    """
    try:
        return bound_socket(host, port)
    except OSError as problem:
        raise cannot_listen(host_port(host, port), problem) from problem


def cannot_listen(where: str, problem: OSError) -> ListenError:
    """The error for a datagram listener that can't be opened."""
    why = problem.strerror or str(problem)
    return ListenError(f"can't listen on udp:{where}: {why}")


def bound_socket(host: str, port: int) -> socket.SocketType:
    """As :func:`bind_udp`.

    :raises OSError: it can't be bound.
    """
    family, address = numeric_address(host, port, socket.SOCK_DGRAM)
    sock = udp_socket(family)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if address[0] in WILDCARDS:
            # Before a datagram can arrive.
            ask_for_local_address(sock)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock  # type: ignore[no-any-return]
