"""Sockets for flows: connected to a server, or to the next one with a way there."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from twisted.logger import Logger

from relayd.core.addresses import socket_name
from relayd.datagrams.refusals import SHORTAGE
from relayd.datagrams.servers import Server, ServerPool
from relayd.datagrams.sockets import raise_buffer
from relayd.net.resolving import SocketAddress

log = Logger(namespace="relayd.datagrams")

#: What the kernel may keep of a flow's unread datagrams, in bytes, at most.
FLOW_BUFFER = 1 << 20

#: How many sockets that turn out to be connected to themselves are closed again.
SELF_TRIES = 4


class Connected(NamedTuple):
    """A flow's socket.

    :ivar server: where it leads.
    :ivar ours: the socket's own address.
    :ivar tried: addresses of the server; it is connected to the last of them, and the
        others have refused.
    """

    server: Server
    sock: Any
    ours: Any
    tried: list[SocketAddress]


class FlowDialer:
    """Opens and connects the sockets of flows.

    :param pool: which other servers there are.
    :param open_socket: opens a non-blocking datagram socket of a family.
    :param receive_buffer: bytes that the kernel may keep unread for a listener; a flow
        has no more, and at most :data:`FLOW_BUFFER`.
    """

    def __init__(
        self,
        pool: ServerPool,
        open_socket: Callable[[int], Any],
        receive_buffer: int,
    ) -> None:
        self._pool = pool
        self._open_socket = open_socket
        self._buffer = min(receive_buffer, FLOW_BUFFER)

    def dial_any(self, server: Server) -> Connected:
        """Connect to this server, or to the next with a way there.

        :raises OSError: there is no socket to be had, or no way to any of them.
        """
        refusal = OSError(errno.EHOSTUNREACH, "no way to any server")
        others = (self._pool.choose() for _ in range(len(self._pool.servers) - 1))
        tried: set[Server] = set()
        for candidate in itertools.chain((server,), others):
            if candidate is None or candidate in tried:
                continue
            tried.add(candidate)
            try:
                return self.dial(candidate)
            except OSError as problem:
                if problem.errno in SHORTAGE:
                    raise
                refusal = problem
        raise refusal

    def dial(self, server: Server, tried: Sequence[SocketAddress] = ()) -> Connected:
        """Connect to a server, by the first of its addresses with a way there.

        :param tried: addresses that are not to be tried again.
        :raises OSError: there is no socket to be had, or no way to what is left.
        """
        if not server.named:
            only: Any = server.address
            return Connected(server, *self._connect(only), [only])
        had = list(tried)
        refusal = OSError(errno.EHOSTUNREACH, "no other address of its name")
        for address in list(server.candidates(had)):
            had.append(address)
            try:
                return Connected(server, *self._connect(address), had)
            except OSError as problem:
                if problem.errno in SHORTAGE:
                    raise
                # There is no way to that family, for one.
                self.refused(server, address, problem)
                refusal = problem
        raise refusal

    def refused(self, server: Server, address: SocketAddress, problem: OSError) -> None:
        """New flows are to have the next address of the server."""
        if server.advance_from(address):
            log.warn(
                "{name}: {address} refuses ({why}): the next of its addresses is tried,"
                " {next}",
                name=server.name,
                address=socket_name(address[1]),
                why=problem.strerror,
                next=socket_name(server.address[1]),  # type: ignore[index]
            )

    def _connect(
        self, address: SocketAddress, tries: int = SELF_TRIES
    ) -> tuple[Any, Any]:
        """A socket that is connected to an address, and its own address."""
        family, where = address
        sock = self._open_socket(family)
        try:
            raise_buffer(sock, self._buffer)
            sock.connect(where)
            ours = sock.getsockname()
            # The kernel may assign the very port that is dialled, if it is free: what
            # is sent would come back as the answer.
            itself = ours[1] == where[1] and ours == sock.getpeername()
        except OSError:
            sock.close()
            raise
        if not itself:
            return sock, ours
        try:
            # Before this one is closed, or the next would get the same port.
            if tries > 1:
                return self._connect(address, tries - 1)
        finally:
            sock.close()
        raise OSError(
            errno.ECONNREFUSED, f"nothing has {socket_name(where)} but its own socket"
        )
