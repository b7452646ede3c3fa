"""Which TCP connection a SYN began: the timestamps of its two ends.

A relay that dials from its clients' addresses, to where they meant to go, may have a
connection whose two ends are those of one of its client's: the kernel chooses the
relay's port without knowing the client's.  So the ends do not tell a connection of the
relay's that was brought back to it.  The timestamp of its SYN does (RFC 7323, 5.4): its
offset is a secret of the kernel that has sent it.

Clients may be of this machine's own kernel, as containers are: it has one sequence of
ports and one clock for all of them.  So the relay's own SYNs, and nothing else that it
sends, have a DSCP that is for use within a network (RFC 2474, section 6: pool 2).
Nothing on the way changes it: a connection that comes back has not left this machine,
as its handshake would else have ended at the client.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from relayd.core.hops import NO_STAMP
from relayd.net.foreign_transports import lent_socket

_TCP = int(socket.IPPROTO_TCP)

#: linux/tcp.h: read or set a connection's timestamp; keep the SYN of the connections
#: that a listening socket accepts, and read it, once.
_TIMESTAMP, _SAVE_SYN, _SAVED_SYN = 24, 27, 28

#: The DSCP of the relay's own SYNs; with the two bits behind it, what sockets are told:
#: ip(7), and RFC 3542, 6.5.
_DSCP = 0b001011
_TOS = (int(socket.IPPROTO_IP), 1)
_TCLASS = (int(socket.IPPROTO_IPV6), 67)

#: The longest header of TCP, that of IPv4, and some extensions of IPv6.
_LONGEST = 512

#: ip-sysctl.rst: whether this machine's SYNs have timestamps.
SYSCTL = "/proc/sys/net/ipv4/tcp_timestamps"

#: IPv6 extension headers (RFC 8200) that have their length in units of eight bytes:
#: hop-by-hop, routing, destination options; and a fragment's, which has eight.
_EXTENSIONS, _FRAGMENT = (0, 43, 60), 44


def save_syn(sock: Any) -> None:
    """Have :func:`stamp_of_client` work for what a listening socket accepts."""
    # Without, its clients are known by their two ends alone.
    with suppress(OSError):
        sock.setsockopt(_TCP, _SAVE_SYN, 1)


def mark_syn(sock: Any, *, marked: bool = True) -> None:
    """Have what a socket sends be known as the relay's, or as anybody's."""
    option = _TCLASS if sock.family == socket.AF_INET6 else _TOS
    # One that is closed, or a sandbox: its two ends and the timestamp are left.
    with suppress(OSError):
        sock.setsockopt(*option, _DSCP << 2 if marked else 0)


def is_marked(syn: bytes) -> bool:
    """Whether that was said of a SYN: its headers of IP and TCP."""
    if len(syn) < 2:
        return False
    if syn[0] >> 4 == 4:
        return syn[1] >> 2 == _DSCP
    return ((syn[0] & 15) << 4 | syn[1] >> 4) >> 2 == _DSCP


def stamp_of_client(transport: Any) -> int | None:
    """The timestamp of the SYN of an accepted connection; to be asked once.

    :return: :data:`relayd.core.hops.NO_STAMP` if it is not the relay's own: it is not
        marked, or had no timestamp, and one of this machine would have; None: nobody
        knows.
    """
    with lent_socket(transport) as sock:
        try:
            syn = b"" if sock is None else sock.getsockopt(_TCP, _SAVED_SYN, _LONGEST)
        except OSError:
            return None
    if not syn:
        return None
    if not is_marked(syn):
        return NO_STAMP
    stamp = stamp_in(syn)
    if stamp is None:
        return NO_STAMP if _are_sent() else None
    return stamp


def stamp_of_dial(sock: Any) -> int | None:
    """What that of a connection's own SYN was, as of now: it has just been sent."""
    try:
        return int(sock.getsockopt(_TCP, _TIMESTAMP)) & 0xFFFF_FFFF
    except OSError:
        return None


def stamp_in(syn: bytes) -> int | None:
    """The timestamp in a SYN: its headers of IP and TCP; None if there is none."""
    options = _options(syn)
    at = 0
    while at < len(options) and options[at]:
        if options[at] == 1:
            at += 1
            continue
        length = options[at + 1] if at + 1 < len(options) else 0
        if length < 2 or at + length > len(options):
            break
        if options[at] == 8 and length == 10:
            return int.from_bytes(options[at + 2 : at + 6], "big")
        at += length
    return None


def _options(syn: bytes) -> bytes:
    """The options of TCP; empty if there are none, or it is something else."""
    if not syn:
        return b""
    if syn[0] >> 4 == 4:
        begin = (syn[0] & 15) * 4
    else:
        begin, kind = 40, syn[6] if len(syn) > 6 else -1
        while kind in (*_EXTENSIONS, _FRAGMENT) and begin + 1 < len(syn):
            length = 8 if kind == _FRAGMENT else (syn[begin + 1] + 1) * 8
            kind, begin = syn[begin], begin + length
    header = syn[begin:]
    if len(header) < 20:
        return b""
    return header[20 : (header[12] >> 4) * 4]


def _are_sent() -> bool:
    try:
        return Path(SYSCTL).read_text().strip() != "0"
    except OSError:
        return True
