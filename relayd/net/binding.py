"""Binding the sockets of listeners: addresses, names, and UNIX socket files.

`[::]` is IPv6 only and `0.0.0.0` IPv4 only, so that both can be bound together.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from twisted.logger import Logger

from relayd.core.addresses import numeric_host
from relayd.net.broadcast import BROADCAST, is_broadcast

log = Logger(namespace="relayd.binding")

Socket = TypeVar("Socket", bound=socket.SocketType)

#: How often port 0 is tried for several addresses, which must get the same port.
_PORT_TRIES = 16


def numeric_address(host: str, port: int, kind: int) -> tuple[int, Any]:
    """The family and the socket address of an address that can be bound.

    :param host: an IPv4 or IPv6 address as text, with a scope if it needs one: nothing
        is resolved but the scope of fe80::1%eth0.
    :param kind: SOCK_STREAM or SOCK_DGRAM.
    :raises OSError: it is no address of this machine's, or a broadcast address.
    """
    if is_broadcast(host):
        # The kernel would listen there for TCP, but no client could connect.
        raise OSError(errno.EACCES, BROADCAST)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    flags = socket.AI_NUMERICHOST
    return family, socket.getaddrinfo(host, port, family, kind, flags=flags)[0][4]


def bind_tcp(host: str, port: int, backlog: int) -> socket.socket:
    """A socket that listens on an address.

    :param host: an IPv4 or IPv6 address as text, with a scope if it needs one.
    :raises OSError: it can't be bound.
    """
    family, address = numeric_address(host, port, socket.SOCK_STREAM)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # So that `[::]` can be bound beside `0.0.0.0`.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(backlog)
    except OSError:
        sock.close()
        raise
    return sock


def hosts_of(host: str | None, port: int, kind: int) -> list[str]:
    """The addresses to listen on.

    :param host: an address, a name, or None for all addresses of this machine.
    :param kind: of the sockets, such as SOCK_STREAM.
    :raises OSError: the name has no address.
    """
    if host is None:
        return ["0.0.0.0", "::"]
    found = socket.getaddrinfo(host, port, type=kind)
    return list(dict.fromkeys(numeric_host(item[4]) for item in found))


def bind_all(
    hosts: Sequence[str], port: int, bind: Callable[[str, int], Socket]
) -> list[Socket]:
    """A socket for each address, all on the same port.

    An address family that this machine lacks is left out, if there is another.

    :param bind: makes a socket for an address and a port.
    :raises OSError: as `bind` raised it.
    """
    for tries_left in range(_PORT_TRIES - 1, -1, -1):
        try:
            return _bind_each(hosts, port, bind)
        except OSError as problem:
            # Port 0: the port chosen for the first address may be in use on the second.
            if port or problem.errno != errno.EADDRINUSE or not tries_left:
                raise
    raise AssertionError("the last try returns or raises")


def _bind_each(
    hosts: Sequence[str], port: int, bind: Callable[[str, int], Socket]
) -> list[Socket]:
    bound: list[Socket] = []
    missing: OSError | None = None
    for host in hosts:
        try:
            bound.append(bind(host, port))
        except OSError as problem:
            if problem.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                missing = problem
                continue
            for sock in bound:
                sock.close()
            raise
        port = bound[0].getsockname()[1]
    if missing is not None and not bound:
        raise missing
    return bound


def _is_stale(path: str) -> bool:
    """Whether `path` is the UNIX socket of a process that has ended."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            probe.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


#: The mode of a socket file that all may connect to, as Twisted's UNIX endpoint has it;
#: the folder's permissions restrict clients.
FOR_ALL = 0o666


def bind_unix(path: str, backlog: int, mode: int = FOR_ALL) -> socket.socket:
    """A socket that listens at a path; a stale socket file there is replaced.

    :param mode: of the file, which on Linux has no other for a moment either.
    :raises OSError: it can't be bound.
    """
    if _is_stale(path):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if mode != FOR_ALL:
            # bind(2) makes the file with the socket's own mode, less the umask.
            os.fchmod(sock.fileno(), mode)
        sock.bind(path)
    except OSError:
        sock.close()
        raise
    try:
        os.chmod(path, mode)
        sock.listen(backlog)
    except OSError:
        sock.close()
        os.unlink(path)
        raise
    return sock


def unlink_own(path: str, made: os.stat_result) -> Callable[[], None]:
    """A callback that removes the socket file at `path`, unless it was replaced."""

    def unlink() -> None:
        try:
            now = os.stat(path)
            if (now.st_dev, now.st_ino) == (made.st_dev, made.st_ino):
                os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as problem:
            # This process may have dropped its privileges since it began to listen.
            why = problem.strerror
            log.warn("unix:{path} stays behind: {why}", path=path, why=why)

    return unlink
