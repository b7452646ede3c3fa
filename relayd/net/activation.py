"""Sockets that a service manager has passed to this process: socket activation.

systemd opens the sockets of a `.socket` unit, and passes them to the process that it
starts, from descriptor 3 on (sd_listen_fds(3)).  Three variables say what they are:

    LISTEN_PID        the process that they are for
    LISTEN_FDS        how many there are
    LISTEN_FDNAMES    their names, with `:` between: FileDescriptorName= of the unit, or
                      the unit's own name.  Several sockets may have one name.

Twisted's own code takes the variables out of the environment as it is imported, and
knows one socket of each name.  So they are read from /proc, which has them as the
process was started with.

The sockets stay open here, too, and the manager's: a relay that ends leaves to the next
one all clients that wait.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from relayd.net.listening import adopt_all

#: The descriptor of the first one.
FIRST = 3

#: The most that are believed: more descriptors than any process gets.
_MOST = 1 << 20

#: What a socket without a name is called, as sd_listen_fds_with_names(3) has it.
UNNAMED = "unknown"

_KINDS = {
    int(socket.SOCK_STREAM): "for streams",
    int(socket.SOCK_DGRAM): "for datagrams",
}


def starting_environment(path: str = "/proc/self/environ") -> dict[str, str]:
    """The variables that this process was started with."""
    try:
        pairs = Path(path).read_bytes().split(b"\0")
    except OSError:
        # Another system, or a sandbox.
        return dict(os.environ)
    named = (os.fsdecode(pair).partition("=") for pair in pairs)
    return {name: value for name, _, value in named}


def passed_sockets(environ: Mapping[str, str] | None = None) -> list[tuple[str, int]]:
    """The name and the descriptor of each socket that was passed to this process."""
    if environ is None:
        environ = starting_environment()
    count = environ.get("LISTEN_FDS", "")
    if environ.get("LISTEN_PID") != str(os.getpid()) or not count.isdecimal():
        return []
    number = min(int(count[:9]), _MOST)
    text = environ.get("LISTEN_FDNAMES", "")
    names = text.split(":") if text else [UNNAMED] * number
    if len(names) != number:
        # They are not about the same sockets.
        return []
    return list(zip(names, range(FIRST, FIRST + number), strict=True))


def sockets_named(name: str, kind: int) -> list[int]:
    """The descriptors of the sockets with a name.

    :param kind: SOCK_STREAM or SOCK_DGRAM.
    :raises ValueError: there are none, or one is of another kind, or does not listen;
        the message says so to the operator.
    """
    passed = passed_sockets()
    if not passed:
        raise ValueError(
            "systemd has passed no sockets to this process (LISTEN_FDS,"
            " LISTEN_FDNAMES): let its .socket unit start it"
        )
    found = [descriptor for each, descriptor in passed if each == name]
    if not found:
        there = ", ".join(dict.fromkeys(repr(each) for each, _ in passed))
        raise ValueError(
            f"systemd has passed no socket with this name, but {there}: set"
            " FileDescriptorName= in the .socket unit"
        )
    for descriptor in found:
        _check(descriptor, kind)
    return found


def _check(descriptor: int, kind: int) -> None:
    try:
        [adopted] = adopt_all([descriptor])
        with adopted as sock:
            is_kind = int(sock.type)
            listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            is_ip = sock.family in (socket.AF_INET, socket.AF_INET6)
    except OSError as problem:
        raise ValueError(
            f"descriptor {descriptor}, which systemd has passed, is not a socket"
            f" ({problem.strerror})"
        ) from problem
    if is_kind != kind:
        found = _KINDS.get(is_kind, "of another kind")
        raise ValueError(
            f"the socket is {found}, and should be {_KINDS[kind]}: write systemd: for"
            " ListenStream=, and udp:systemd: for ListenDatagram="
        )
    if kind == socket.SOCK_STREAM and not listens:
        raise ValueError(
            "the socket does not listen: set Accept=no in the .socket unit, so that it"
            " passes the listener and not a connection"
        )
    if kind == socket.SOCK_DGRAM and not is_ip:
        raise ValueError("the socket has no IP address: relayd relays UDP")
