"""Sockets for flows, connected to a server, or to the next that has a route."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from twisted.logger import Logger

from relayd.core.addresses import socket_name
from relayd.core.flows import Counters, NewFlow
from relayd.core.session import Ending
from relayd.datagrams.interfaces import Ends
from relayd.datagrams.loops import LoopGuard
from relayd.datagrams.refusals import SHORTAGE
from relayd.datagrams.servers import Server, ServerPool
from relayd.datagrams.sockets import flow_opener, raise_buffer
from relayd.net.dial_options import DialOptions
from relayd.net.resolving import SocketAddress

log = Logger(namespace="relayd.datagrams")

#: Limit of a flow's receive buffer in the kernel, in bytes.
FLOW_BUFFER = 1 << 20

#: The most servers that are tried for a new flow.
MAX_SERVERS = 16

#: How many sockets are tried, if they connect to themselves.
SELF_TRIES = 4


class Connected(NamedTuple):
    """A flow's socket.

    :ivar server: the server that it is connected to.
    :ivar ours: the local address.
    :ivar tried: addresses of the server; it is connected to the last of them, the
        others have refused.
    """

    server: Server
    sock: Any
    ours: Any
    tried: list[SocketAddress]


class Served(Protocol):
    """A relay whose flows get their sockets here."""

    pool: ServerPool
    loops: LoopGuard

    @property
    def counters(self) -> Counters: ...


class FlowDialer:
    """Opens and connects the sockets of flows.

    :param pool: the servers.
    :param open_socket: opens a non-blocking datagram socket of a family.
    :param receive_buffer: the receive buffer of a listener, in bytes; a flow has the
        same, and at most :data:`FLOW_BUFFER`.
    :param dialing: what is set on the sockets to servers that have nothing of their
        own.

    :ivar dialing: the same.
    :ivar returns: whether what a flow sends to an address with its client's own comes
        back to its relay (:meth:`relayd.datagrams.loops.LoopGuard.returns`).
    :ivar shed: ends another flow than that with these ends, for want of descriptors
        (:meth:`relayd.datagrams.opening.FlowOpener.shed`).
    """

    returns: Callable[[Ends, Any], bool]
    shed: Callable[[Ends], bool]

    def __init__(
        self,
        pool: ServerPool,
        open_socket: Callable[[int], Any],
        receive_buffer: int,
        dialing: DialOptions | None = None,
    ) -> None:
        self.dialing = dialing
        self._pool = pool
        self._bare = open_socket
        self._open_socket = flow_opener(open_socket, dialing)
        self._transparent = dialing is not None and dialing.transparent
        self._buffer = min(receive_buffer, FLOW_BUFFER)
        #: The module of those.
        self._as_client: Any = None

    def serve(self, relay: Served) -> None:
        """The sockets are for flows of this relay."""
        self.returns = relay.loops.returns

    def dial_any(
        self,
        server: Server,
        ends: Ends,
        asked: NewFlow | None = None,
        tried: Sequence[Server] = (),
    ) -> Connected:
        """Connect to this server, or to the next that has a route.

        :param ends: of the flow.
        :param asked: the flow, for a pool that chooses.
        :param tried: servers not to try.
        :raises OSError: no socket can be opened, or no server has a route.
        """
        had = list(tried)
        for _ in range(MAX_SERVERS):
            try:
                return self.dial(server, ends)
            except OSError as problem:
                if problem.errno in SHORTAGE:
                    raise
                state = server.state
                blamed = server.judged and not self._is_ours(server, problem)
                if state is not None and blamed:
                    state.began()
                    state.failed(Ending.CONNECT_FAILED, problem.strerror or "")
                had.append(server)
                following = self._pool.choose(asked, had)
                if following is None:
                    raise
                server = following
        raise OSError(errno.EHOSTUNREACH, "no way to many servers")

    def dial(
        self, server: Server, ends: Ends, tried: Sequence[SocketAddress] = ()
    ) -> Connected:
        """Connect to the first of a server's addresses that has a route.

        :param ends: of the flow.
        :param tried: addresses not to try again.
        :raises OSError: no socket can be opened, or no other address has a route.
        """
        if not server.named:
            only: Any = server.at(ends)
            return Connected(server, *self._connect(server, only, ends), [only])
        had = list(tried)
        refusal = OSError(errno.EHOSTUNREACH, "no other address of its name")
        for address in list(server.candidates(had)):
            had.append(address)
            try:
                return Connected(server, *self._connect(server, address, ends), had)
            except OSError as problem:
                if problem.errno in SHORTAGE:
                    raise
                # Such as: no route for that family.
                if not self._is_ours(server, problem):
                    self.refused(server, address, problem)
                refusal = problem
        raise refusal

    def refused(self, server: Server, address: SocketAddress, problem: OSError) -> None:
        """An address has refused: new flows get the server's next address."""
        if server.advance_from(address):
            log.warn(
                "{name}: {address} refuses ({why}): the next of its addresses is tried,"
                " {next}",
                name=server.name,
                address=socket_name(address[1]),
                why=problem.strerror,
                next=socket_name(server.address[1]),  # type: ignore[index]
            )

    def open_for(self, server: Server, family: int) -> Any:
        """A socket of a family with what is to be set on those to a server.

        :raises OSError: it can't be opened, or set.
        """
        if server.dialing is None:
            return self._open_socket(family)
        return flow_opener(self._bare, server.dialing)(family)

    def _is_transparent(self, server: Server) -> bool:
        options = server.dialing
        return self._transparent if options is None else options.transparent

    def _is_ours(self, server: Server, problem: OSError) -> bool:
        """Whether a dial has failed for want of something here, by no server's fault:
        its client's address can't be had, or is of no use."""
        return problem.errno == errno.EADDRNOTAVAIL and self._is_transparent(server)

    def _connect(
        self,
        server: Server,
        address: SocketAddress,
        ends: Ends,
        tries: int = SELF_TRIES,
    ) -> tuple[Any, Any]:
        """A socket that is connected to an address, and its local address."""
        if self._is_transparent(server):
            return self._connect_as_client(server, address, ends)
        family, where = address
        sock = self.open_for(server, family)
        try:
            raise_buffer(sock, self._buffer)
            sock.connect(where)
            ours = sock.getsockname()
            # The kernel may choose the port that is dialled, if it is free: datagrams
            # would come back as answers.
            itself = ours[1] == where[1] and ours == sock.getpeername()
        except OSError:
            sock.close()
            raise
        if not itself:
            return sock, ours
        try:
            # While this socket is open, so that the next gets another port.
            if tries > 1:
                return self._connect(server, address, ends, tries - 1)
        finally:
            sock.close()
        raise OSError(
            errno.ECONNREFUSED, f"nothing has {socket_name(where)} but its own socket"
        )

    def _import(self) -> Any:
        """What only a relay with such servers needs, the first time."""
        # To import it for each flow takes 1.4 µs, a part in sixty of all.
        from relayd.datagrams import transparent

        self._as_client = transparent
        return transparent

    def _connect_as_client(
        self, server: Server, address: SocketAddress, ends: Ends
    ) -> tuple[Any, Any]:
        """The same, with its client's address and port."""
        transparent = self._as_client or self._import()
        (family, where), source = address, ends[1][1]
        transparent.check_source(source, where)
        # First, as without a descriptor every address may be this machine's own.
        sock = self.open_for(server, family)
        try:
            if self.returns(ends, where):
                why = f"{socket_name(where)} leads back to its own relay"
                raise transparent.NotAsClient(why, "loop")
            raise_buffer(sock, self._buffer)
            return transparent.connected_as(sock, ends, where), source
        except OSError:
            sock.close()
            raise
