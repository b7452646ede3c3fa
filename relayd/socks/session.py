"""One client of the SOCKS4 proxy: its request, and what is decided about it.

A client's session goes through these stages, each with a deadline::

    prelude (its request) -> (ident) -> CONNECT: dial               -> Bridge
                                        BIND:    listen, one accept -> Bridge

The request is a prelude (:data:`REQUEST`), read by :mod:`relayd.preludes.socks4`.  When
the Bridge begins, there is no SOCKS left: the client's protocol hands on what it reads
as any other leg does, or is spliced.  What the client sends before that, with its
request or right after it, is kept for the server.
"""

from __future__ import annotations

import functools
import socket
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from relayd.core.addresses import client_key, host_of
from relayd.core.errors import Refused
from relayd.core.escapes import NOTHING
from relayd.core.names import host_port, is_address
from relayd.core.prelude import Prelude
from relayd.core.routing import RouteFailed
from relayd.core.session import Ending, Session
from relayd.core.stage import Stage
from relayd.net.resolving import SocketAddress
from relayd.net.upstream import Upstream
from relayd.preludes.socks4 import Code, Command, Request, read_request, write_reply
from relayd.socks import ident
from relayd.socks.bind import ANYONE, BindAttempt
from relayd.socks.named import NamedDestination, permitted
from relayd.stream.attempt import Attempt
from relayd.stream.legs import Leg
from relayd.stream.routable import Routable

#: What a client says first.
REQUEST = Prelude("request", read_request)

# An enum's members cost a look-up by its metaclass each time.
_BIND, _GRANTED = Command.BIND, int(Code.GRANTED)

#: The same destinations are asked for again and again.
_reply_bytes = functools.lru_cache(maxsize=1024)(write_reply)


@attrs.define(eq=False, slots=True, weakref_slot=False)
class Socks4Session(Session):
    """A session, and what its client asked for.

    :ivar command: `connect`, `bind`, or `-` until it is known.
    :ivar user_id: what the client calls its user; it proves nothing.
    :ivar requested: the host name or address and the port, as they were asked for;
        `upstream` is what that led to.
    :ivar reply: the code of the last reply, or None.
    """

    command: str = NOTHING
    user_id: bytes = b""
    requested: str = NOTHING
    reply: int | None = None

    @property
    def facts(self) -> Mapping[str, object]:
        """See :meth:`Session.facts`."""
        user_id = self.user_id
        return {
            "command": self.command,
            # Without blanks, which divide the line's fields.
            "user": ident.quoted(user_id).replace(" ", "\\x20") if user_id else NOTHING,
            "requested": self.requested,
            "reply": NOTHING if self.reply is None else self.reply,
            **super().facts,
        }


class Socks4Protocol(Routable):
    """A client of the proxy.

    :ivar request: what it asks for, once that is known.
    """

    #: A :class:`relayd.socks4.Socks4Factory`.
    factory: Any
    session: Socks4Session
    record = Socks4Session
    replies = True

    request: Request | None = None
    #: What a client that is not served is told.
    _refusal = Code.REJECTED

    @property
    def key(self) -> str:
        """Its client key: whose limits it counts for."""
        return client_key(host_of(self.session.client))

    # -- what is asked for

    def decide(self, *said: Any) -> None:
        session, factory = self.session, self.factory
        request: Request = said[0]
        self.request = request
        session.command = "bind" if request.command is _BIND else "connect"
        session.user_id = request.user_id
        session.requested = request.requested
        try:
            factory.policy.admit(request.user_id, session)
        except Refused as refusal:
            self.end(Ending.DENIED, refusal.why)
            return
        if session.ending is not None:
            # The policy has ended it.
            return
        if factory.ident:
            self._ask_ident(request)
        else:
            self.serve(request)

    def _ask_ident(self, request: Request) -> None:
        session, why = self.session, ""
        if session.client != session.peer:
            # identd tells of connections between its host and the one that asks.
            why = "the identd of a client behind a balancer can't be asked"
        elif not host_of(session.client):
            why = "a UNIX client has no identd"
        if why:
            self.refuse(Ending.IDENT_FAILED, why, Code.NO_IDENT)
            return
        self.enter(Stage.DECIDING)
        self.pending = _Question(self, request)
        self.pending.start()

    def serve(self, request: Request) -> None:
        """Do what it asks for, or what the route says instead."""
        if self.factory.router is not None:
            self.ask_route()
        else:
            self.serve_as_asked(request)

    def serve_as_asked(self, request: Request) -> None:
        """Do what it asks for, if that is permitted."""
        try:
            if request.command is _BIND:
                self._bind(request)
            else:
                self.dial(self._destination(request))
        except Refused as refusal:
            self.end(Ending.DENIED, refusal.why)

    def go_by_itself(self, where: Any) -> None:
        """See :meth:`Routable.go_by_itself`.

        What the client has asked for is judged as ever; another server is its
        operator's own word.
        """
        request: Any = self.request
        if where == self.session.requested:
            self.serve_as_asked(request)
        elif request.command is _BIND:
            raise RouteFailed("BIND has no server: return conn.server(conn.requested)")
        else:
            self.dial(self.upstream_of(where))

    def turn_away(self, why: str, reply: bytes = b"") -> None:
        """See :meth:`Routable.turn_away`; its client is told by a reply of SOCKS."""
        self.end(Ending.DENIED, why)

    def route_failed(self, why: str) -> None:
        """See :meth:`Routable.route_failed`."""
        self.end(Ending.ROUTE_FAILED, why)

    def _destination(self, request: Request) -> Upstream:
        """Where the client wants to go.

        :raises Refused: it may not go there.
        """
        address = _address_of(request)
        if not address:
            # Its session keeps the server, and that must not keep this, in a cycle.
            this = weakref.proxy(self)
            named = NamedDestination(
                lambda: this.look_up(request),
                lambda found: this.permitted(request, found),
                self.factory.dialer,
            )
            return Upstream(named, self.session.requested)
        factory = self.factory
        factory.policy.permit(address, request.port, "", self.session)
        found: Upstream = factory.upstream_at(
            address, request.port, self.session.requested
        )
        return found

    def look_up(self, request: Request) -> Deferred[list[SocketAddress]]:
        """The addresses of the host that it names."""
        found: Deferred[list[SocketAddress]] = self.factory.resolver.addresses(
            request.host, request.port, self.key
        )
        return found

    def permitted(
        self, request: Request, found: Sequence[SocketAddress]
    ) -> list[SocketAddress]:
        """Those of a name's addresses to which the client may go.

        :raises Refused: to none of them.
        """
        factory = self.factory
        kept = permitted(factory.policy, request, found, self.session)
        ordered: list[SocketAddress] = factory.retries.in_order(kept, factory.now())
        return ordered

    # -- BIND

    def _bind(self, request: Request) -> None:
        factory = self.factory
        if not factory.bind:
            raise Refused("BIND is switched off (--no-bind)")
        self.leave_queue()
        if request.address == ANYONE:
            if not factory.bind_any:
                raise Refused("BIND for whoever comes takes --bind-any")
            self.listen(None)
        elif request.address:
            factory.policy.permit(request.address, request.port, "", self.session)
            self.listen([request.address])
        else:
            if self.session.stage is not Stage.DECIDING:
                self.enter(Stage.DECIDING)
            self.set_deadline(factory.timeouts.connect)
            if self.direction.eof:
                self.may_have_left()
            self.pending = _LookUp(self, request)
            self.pending.start()

    def listen(self, peers: Sequence[str] | None) -> None:
        """Wait for one of `peers`, or for whoever comes."""
        if self.session.ending is not None:
            # The policy has ended it.
            return
        if self.direction.eof:
            self.may_have_left()
        attempt = self.pending = BindAttempt(self, peers)
        attempt.start()

    def bound_to(self, host: str, port: int) -> None:
        """The listener stands: tell the client where."""
        session, factory = self.session, self.factory
        if factory.external_address:
            host = factory.external_address
        elif host == ANYONE:
            # What the client calls us; another machine may know another name.
            facing = getattr(self.transport.getHost(), "host", "")
            host = facing.removeprefix("::ffff:")
            if "." not in host:
                self.end(
                    Ending.CONNECT_FAILED,
                    "a reply can't name the IPv6 or UNIX address that faces this"
                    " client: it takes --external-address",
                )
                return
        session.upstream = f"bind:{host_port(host, port)}"
        factory.observer.dialing(session)
        if session.ending is None:
            # No observer has ended it.
            self._reply(_GRANTED, host, port)

    # -- replies

    def relay(self, leg: Leg) -> None:
        request: Any = self.request
        address, port = request.address, request.port
        if request.command is _BIND or not address:
            # Whoever came; or whichever of the name's addresses it was.
            peer = leg.transport.getPeer()
            address = getattr(peer, "host", ANYONE)
            port = getattr(peer, "port", request.port)
        self._reply(_GRANTED, address, port)
        Routable.relay(self, leg)

    def refuse(self, ending: Ending, why: str, code: Code = Code.REJECTED) -> None:
        """Tell the client that it is not served, and close."""
        self._refusal = code
        self.end(ending, why)

    def last_words(self) -> bytes:
        self.session.reply = int(self._refusal)
        return _reply_bytes(int(self._refusal), ANYONE, 0)

    def _reply(self, code: int, address: str, port: int) -> None:
        self.session.reply = code
        self.transport.write(_reply_bytes(code, address, port))


def _address_of(request: Request) -> str:
    """The address that a request is for; empty if it names a host."""
    if request.address:
        return request.address
    return request.host if is_address(request.host) else ""


class _Question(Attempt):
    """The client's identd is asked who it is (RFC 1413)."""

    client: Any

    def __init__(self, client: Socks4Protocol, request: Request) -> None:
        Attempt.__init__(self, client)
        self._request = request

    def start(self) -> None:
        """Ask; the outcome may be told from within."""
        client, transport = self.client, self.client.transport
        factory = client.factory
        asked = self.dial = ident.ask(
            factory.reactor,
            transport.getPeer(),
            transport.getHost(),
            port=factory.ident_port,
        )
        asked.addCallbacks(self._identified, self._not_identified)
        asked.addErrback(client.failed)

    def overdue(self) -> None:
        limit = self.client.factory.timeouts.handshake
        self.client.refuse(
            Ending.IDENT_FAILED,
            f"identd did not answer before the handshake's {limit:g} s were over",
            Code.NO_IDENT,
        )

    def _identified(self, user_id: bytes) -> None:
        client = self.client
        client.pending = self.dial = None
        if client.session.ending is not None:
            return
        if user_id == self._request.user_id:
            client.serve(self._request)
        else:
            why = f"identd says {ident.quoted(user_id)}"
            client.refuse(Ending.IDENT_FAILED, why, Code.WRONG_IDENT)

    def _not_identified(self, reason: Failure) -> None:
        client = self.client
        client.pending = self.dial = None
        if client.session.ending is None:
            reason.trap(ident.NoIdent)
            client.refuse(Ending.IDENT_FAILED, str(reason.value), Code.NO_IDENT)


class _LookUp(Attempt):
    """The name of the peer that BIND is for is looked up."""

    client: Any

    def __init__(self, client: Socks4Protocol, request: Request) -> None:
        Attempt.__init__(self, client)
        self._request = request

    def start(self) -> None:
        """Look it up; the outcome may be told from within."""
        found = self.dial = self.client.look_up(self._request)
        found.addCallbacks(self._bind, self.dial_failed)
        found.addErrback(self.client.failed)

    def overdue(self) -> None:
        limit = self.client.factory.timeouts.connect
        self.failed(Ending.CONNECT_TIMEOUT, f"no address in {limit:g} s")

    def _bind(self, found: list[SocketAddress]) -> None:
        self.dial = None
        if self.is_over:
            return
        self.is_over = True
        client, request = self.client, self._request
        client.pending = None
        try:
            # A reply can name an IPv4 listener only.
            found = [each for each in found if each[0] == socket.AF_INET]
            if not found:
                raise Refused(f"{request.host} has no IPv4 address")
            client.listen(
                [address[0] for _, address in client.permitted(request, found)]
            )
        except Refused as refusal:
            client.end(Ending.DENIED, refusal.why)
