"""Dialling a server from the address of the client that is relayed.

The socket is transparent (:func:`relayd.net.dial_options.set_transparent`), so that the
kernel lets it be bound to an address that is none of this machine's.  What the server
answers must be brought back to this machine, and to the socket, by its routes and rules
(nft(8), `socket transparent`): that is the operator's.

Of some addresses the kernel would take its own instead, and say nothing: of broadcast
and multicast ones (inet_bind(), net/ipv4/af_inet.c).  Those, and others from which no
answer can come, are refused here, before anything is sent.
"""

from __future__ import annotations

import errno
import functools
import ipaddress
import socket
from typing import Any

from twisted.logger import Logger

from relayd.core.addresses import is_loopback
from relayd.core.errors import SHORTAGE
from relayd.core.interfaces import ICaller, IOnBehalf
from relayd.core.networks import unmapped
from relayd.net import broadcast
from relayd.net.dial_options import (
    DialOptions,
    bind_to,
    is_transparent,
    set_transparent,
)
from relayd.net.dialing import WithOptions
from relayd.net.factory_caller import NO_CLIENT
from relayd.net.own_addresses import is_own
from relayd.net.syn import save_syn

log = Logger(namespace="relayd.net")

#: Addresses of clients that are known to be fit.
REMEMBERED = 1024

#: The options of sockets that have no other.
_ALONE = DialOptions(transparent=True)


class FromClient(WithOptions):
    """Endpoints whose sockets are bound to the address of the client."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._is_alone = self.options == _ALONE

    def prepare(self, sock: socket.SocketType, caller: ICaller) -> None:
        """See :meth:`WithOptions.prepare`."""
        if self._is_alone:
            set_transparent(sock, self.family)
        else:
            self.options.prepare_stream(sock, self.family)
        be_client(sock, self.address, client_of(caller))

    def why(self, problem: int) -> str | None:
        """See :meth:`SocketEndpoint.why`."""
        said = f"transparent: the client has no port free for {self.peer_name}"
        return said if problem == errno.EADDRNOTAVAIL else None


def client_of(caller: Any) -> str:
    """The address of the client that a caller, or a factory, dials for.

    :raises OSError: EADDRNOTAVAIL: it dials for none.
    """
    # Asked with each dial: to adapt it takes five times as long, 1.2 µs.
    if not IOnBehalf.providedBy(caller):
        raise _refused(NO_CLIENT)
    host: str = caller.client_host()
    return host


def be_client(sock: Any, server: Any, host: str) -> None:
    """Bind a transparent socket to the address of the client that is relayed.

    The port is chosen as it is connected: the client's own may be in use.

    :param server: the address that is dialled, as the socket module has it.
    :param host: the client's address, with its scope if it needs one; empty for none.
    :raises OSError: the server can't be dialled from there, for a reason that is not
        the server's (EADDRNOTAVAIL, or another of :data:`relayd.core.errors.SHORTAGE`);
        `strerror` is one line.
    """
    source = source_for(server, host)
    try:
        bind_to(sock, source)
    except OSError as problem:
        if problem.errno in SHORTAGE - {errno.EADDRNOTAVAIL}:
            raise
        raise _not_from(host, problem) from problem


def source_for(server: Any, host: str) -> Any:
    """What a socket is bound to that a server is dialled by from a client's address.

    :param server: see :func:`be_client`; so `host`.
    :return: the client's socket address, with port 0.
    :raises OSError: EADDRNOTAVAIL: the server can't be dialled from there.
    """
    here = check_client(host, server[0].partition("%")[0])
    if "%" not in host:
        return here, 0
    try:
        # Nothing is looked up but the scope of fe80::1%eth0.
        found = socket.getaddrinfo(host, 0, flags=socket.AI_NUMERICHOST)
    except OSError as problem:
        raise _not_from(host, problem) from problem
    address: Any = found[0][4]
    if address[3:] != server[3:4]:
        # The kernel would say that there is no route to the server.
        raise link_only(host)
    return address


def check_client(host: str, there: str) -> str:
    """Whether a server may be dialled, or sent to, from a client's address.

    :param host: the client's, with its scope if it needs one; empty for none.
    :param there: the server's address, without one.
    :return: the client's without its scope.
    :raises OSError: EADDRNOTAVAIL: it may not.
    """
    here, is_near = check_host(host, ":" in there)
    if is_near or here == there:
        _check_near(here, there, host)
    return here


@functools.lru_cache(maxsize=REMEMBERED)
def check_host(host: str, is_ipv6: bool) -> tuple[str, bool]:
    """The address of a client, if a server of this family may be dialled from it.

    :param host: the address, with its scope if it needs one.
    :return: it without its scope, and whether it never leaves this machine.
    :raises OSError: it may not; nothing is remembered then.
    """
    if not host:
        raise _refused("the client has no address")
    address = ipaddress.ip_address(host.partition("%")[0])
    address = unmapped(address)
    if (address.version == 6) != is_ipv6:
        kinds = ("IPv4", "IPv6") if is_ipv6 else ("IPv6", "IPv4")
        raise _refused(
            f"the client's address {host} is {kinds[0]}, and the server's {kinds[1]}"
        )
    text = str(address)
    if not broadcast.is_host(text):
        raise no_host(host)
    return text, is_loopback(text)


def _check_near(here: str, there: str, host: str) -> None:
    """Refuse the server's own address, and one that never leaves this machine, unless
    the server is on this machine.

    :raises OSError: as :func:`be_client` does.
    """
    if here != there and is_loopback(there):
        return
    if is_own(ipaddress.ip_address(there)):
        return
    if here == there:
        raise _refused(f"the client's address {host} is the server's own")
    raise _refused(f"the client's address {host} never leaves this machine")


def no_host(host: str) -> OSError:
    """The error for an address of a client that is not that of one host."""
    return _refused(f"the client's address {host} is not that of one host")


def link_only(host: str) -> OSError:
    """The error for one that is link-local, and the server is not on its link."""
    return _refused(f"the client's address {host} is known on its link only")


def _not_from(host: str, problem: OSError) -> OSError:
    why = problem.strerror or str(problem)
    return _refused(f"not from the client's address {host}: {why}")


def _refused(why: str) -> OSError:
    return OSError(errno.EADDRNOTAVAIL, f"transparent: {why}")


def listen_for_others(sock: Any, name: str) -> None:
    """Have a listening socket accept what TPROXY brings to it, whatever its address.

    Without the right, it still accepts what REDIRECT and DNAT bring: the log says so.

    :param name: what the log calls it.
    """
    save_syn(sock)
    try:
        if not is_transparent(sock):
            set_transparent(sock, sock.family)
    except OSError as problem:
        log.warn(
            "the listener {name} can't accept what TPROXY brings: {why}",
            name=name,
            why=problem.strerror or str(problem),
        )
