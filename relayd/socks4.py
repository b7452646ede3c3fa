"""A SOCKS4 and 4a proxy: CONNECT, and BIND.

A client's session goes through these stages, each with a deadline::

    handshake -> (ident) -> CONNECT: dial               -> Bridge
                            BIND:    listen, one accept -> Bridge

The Bridge is the TCP relay's.  When it begins, there is no SOCKS left: the client's
protocol hands on what it reads as any other leg does, or is spliced.  What the client
sends before that, with its request or right after it, is kept for the server.

What is decided elsewhere: who may connect (:class:`relayd.interfaces.IGate`), who may
go where (:class:`relayd.interfaces.IProxyPolicy`), and how one gets there (a *dialer*,
which is given addresses that were permitted, and returns a client endpoint).

Three lines embed it in a Twisted program::

    proxy = Socks4Factory(reactor)
    listening = TCP4ServerEndpoint(reactor, 1080, interface="127.0.0.1").listen(proxy)
    reactor.run()

Sources: see :mod:`relayd.socks4_wire`; RFC 1413 for ident.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IListeningPort,
    IProtocol,
    IProtocolFactory,
    IStreamClientEndpoint,
    IStreamServerEndpoint,
)
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd import ident, settings
from relayd.addresses import address_name, client_key, host_of, host_port
from relayd.bridge import Leg, Timeouts
from relayd.destinations import ProxyPolicy
from relayd.errors import Refused, RelayError
from relayd.foreign_transports import set_options
from relayd.happy_eyeballs import Dialer
from relayd.interfaces import IGate, IObserver, IProxyPolicy, IShedsClients
from relayd.limits import (
    Waiting,
    affordable_handshakes,
    fair_handshakes,
)
from relayd.listening import TCPListenerEndpoint
from relayd.names import is_address
from relayd.own_addresses import address_towards
from relayd.resolving import Resolver, SocketAddress
from relayd.session import Ending, Session
from relayd.socks4_wire import (
    BadRequest,
    Code,
    Command,
    Request,
    read_request,
    write_reply,
)
from relayd.stream import (
    LEFT_GRACE,
    NEVER,
    StreamFactory,
    StreamProtocol,
    UpstreamLeg,
)
from relayd.upstreams import Upstream

__all__ = ["Socks4Factory", "Socks4Protocol", "Socks4Session"]

log = Logger(namespace="relayd.socks4")

_ANYONE = "0.0.0.0"

#: Seconds after which a handshake may be ended for want of descriptors: those who mean
#: it are done by then.
LONG_HANDSHAKE = 1.0

#: How many are, each time that a listener finds none; it looks ten times a second.
ROOM = 32

#: Makes what connects to the first of some permitted addresses that answers.
AnyDialer = Callable[[Sequence[SocketAddress]], IStreamClientEndpoint]

#: Makes what listens on a port of its own choice on one of this machine's addresses.
AnyListener = Callable[[str], IStreamServerEndpoint]


class AnyResolver(Protocol):
    """What finds the addresses of a name, as :class:`relayd.resolving.Resolver`."""

    def addresses(
        self, host: str, port: int, owner: str
    ) -> Deferred[list[SocketAddress]]:
        """Fires with at least one, or fails with DNSLookupError.

        :param owner: whose wish it is: the client's share of all bounds.
        """


@attrs.define(eq=False, slots=True, weakref_slot=False)
class Socks4Session(Session):
    """A session, and what its client asked for.

    :ivar command: `connect`, `bind`, or `-` until it is known.
    :ivar user_id: what the client calls its user; it proves nothing.
    :ivar requested: the host name or address and the port, as they were asked for;
        `upstream` is what that led to.
    :ivar reply: the code of the last reply, or None.
    """

    command: str = "-"
    user_id: bytes = b""
    requested: str = "-"
    reply: int | None = None

    @property
    def facts(self) -> Mapping[str, object]:
        """See :meth:`Session.facts`."""
        user_id = self.user_id.decode("utf-8", "backslashreplace")
        return {
            "command": self.command,
            # Without blanks, which divide the line's fields.
            "user": ascii(user_id).replace(" ", "\\x20") if user_id else "-",
            "requested": self.requested,
            "reply": "-" if self.reply is None else self.reply,
        }


class Socks4Protocol(StreamProtocol):
    """A client of the proxy."""

    factory: Socks4Factory
    session: Socks4Session
    record = Socks4Session

    def __init__(self, factory: Socks4Factory, client: str) -> None:
        StreamProtocol.__init__(self, factory, client)
        #: The client's address without its port; empty if it has none.
        self.host = host_of(client)
        self.client_key = client_key(self.host)
        self.request: Request | None = None
        self._unread = b""
        #: What a client that is not served is told.
        self._refusal = Code.REJECTED
        self._bound: _Bound | None = None

    # -- the handshake

    def admitted(self) -> None:
        factory = self.factory
        limit = factory.timeouts.handshake
        self._deadline = self.session.opened_at + limit if limit else NEVER
        gone = factory.handshakes.push(self, self.client_key)
        if gone is not None:
            gone.refuse(Ending.CROWDED_OUT, "made room for a new client's handshake")

    def handshake_begins(self) -> None:
        # Of TLS, and then of SOCKS: together they have one deadline, and one bound.
        self.admitted()

    def handshake_is_done(self) -> None:
        """Of TLS: the request is to come."""

    def hold(self, data: bytes) -> None:
        if self.request is not None:
            Leg.hold(self, data)
            return
        if self.session.ending is not None:
            return
        unread = self._unread + data if self._unread else data
        try:
            found = read_request(unread)
        except BadRequest as problem:
            self.refuse(Ending.BAD_REQUEST, str(problem))
            return
        if found is None:
            self._unread = unread
            return
        request, length = found
        self._unread = b""
        # The session counts what is relayed.
        self.direction.read = len(unread) - length
        self.request = request
        if length < len(unread):
            Leg.hold(self, unread[length:])
        try:
            self._requested(request)
        except Exception as problem:
            log.failure("session {id} failed", id=self.session.id)
            self.cut(Ending.FAILED, repr(problem))

    def _requested(self, request: Request) -> None:
        session, factory = self.session, self.factory
        session.command = "bind" if request.command is _BIND else "connect"
        session.user_id = request.user_id
        session.requested = request.requested
        try:
            factory.policy.admit(request.user_id, session)
        except Refused as refusal:
            self.refuse(Ending.DENIED, refusal.why)
            return
        if factory.ident:
            self._ask_ident()
        else:
            self._serve(request)

    def _ask_ident(self) -> None:
        transport, factory = self.transport, self.factory
        client = transport.getPeer()
        if not self.host:
            self.refuse(
                Ending.IDENT_FAILED, "a UNIX client has no identd", Code.NO_IDENT
            )
            return
        self._dialing = ident.ask(
            factory.reactor, client, transport.getHost(), port=factory.ident_port
        )
        self._dialing.addCallbacks(self._identified, self._not_identified)
        self._dialing.addErrback(self.failed)

    def _identified(self, user_id: bytes) -> None:
        self._dialing = None
        request = self.request
        if self.session.ending is not None or request is None:
            return
        if user_id == request.user_id:
            self._serve(request)
        else:
            shown = ascii(user_id.decode("utf-8", "backslashreplace"))
            self.refuse(Ending.IDENT_FAILED, f"identd says {shown}", Code.WRONG_IDENT)

    def _not_identified(self, reason: Failure) -> None:
        self._dialing = None
        if self.session.ending is None:
            reason.trap(ident.NoIdent)
            self.refuse(Ending.IDENT_FAILED, str(reason.value), Code.NO_IDENT)

    def failed(self, reason: Failure) -> None:
        """A defect of ours, or of a policy, a dialer or a listener."""
        log.failure("session {id} failed", reason, id=self.session.id)
        self.cut(Ending.FAILED, repr(reason.value))

    # -- what was asked for

    def _serve(self, request: Request) -> None:
        factory = self.factory
        factory.handshakes.discard(self)
        try:
            if request.command is _BIND:
                self._bind(request)
            else:
                self.dial(Upstream(self._destination(request), self.session.requested))
        except Refused as refusal:
            self.refuse(Ending.DENIED, refusal.why)
        else:
            if self.direction.eof:
                self._hurry_if_left()

    def _hurry_if_left(self) -> None:
        """A new stage has its time; but not for a client that has left, it seems."""
        going = self.bridge is None and self.session.ending is None
        if self.direction.eof and not self.direction.read and going:
            self._deadline = min(self._deadline, self.factory.now() + LEFT_GRACE)

    def _destination(self, request: Request) -> IStreamClientEndpoint:
        """What connects to where the client wants to go.

        :raises Refused: it may not go there.
        """
        address = request.address
        if not address and is_address(request.host):
            address = request.host
        if not address:
            return _NamedDestination(self, request)
        factory = self.factory
        factory.policy.permit(address, request.port, "", self.session)
        return factory.dialer([_socket_address(address, request.port)])

    def permitted(
        self, request: Request, found: Sequence[SocketAddress]
    ) -> list[SocketAddress]:
        """Those of a name's addresses to which the client may go.

        :raises Refused: to none of them.
        """
        permit, kept = self.factory.policy.permit, []
        refusal: Refused | None = None
        for family, address in found:
            try:
                permit(address[0], request.port, request.host, self.session)
            except Refused as problem:
                refusal = refusal or problem
            else:
                kept.append((family, address))
        if not kept and refusal is not None:
            raise refusal
        return kept

    def joined(self, leg: Leg) -> None:
        request: Any = self.request
        address, port = request.address, request.port
        if self._bound is not None or not address:
            # Whoever came; or whichever of the name's addresses it was.
            peer = leg.transport.getPeer()
            address = getattr(peer, "host", _ANYONE)
            port = getattr(peer, "port", request.port)
        self._bound = None
        self._reply(_GRANTED, address, port)
        StreamProtocol.joined(self, leg)

    # -- BIND

    def _bind(self, request: Request) -> None:
        factory = self.factory
        if not factory.bind:
            raise Refused("BIND is switched off (--no-bind)")
        if request.address == _ANYONE:
            if not factory.bind_any:
                raise Refused("BIND for whoever comes takes --bind-any")
            self._listen(None)
        elif request.address:
            factory.policy.permit(request.address, request.port, "", self.session)
            self._listen([request.address])
        else:
            connect = factory.timeouts.connect
            self._deadline = factory.now() + connect if connect else NEVER
            looked_up = factory.resolver.addresses(
                request.host, request.port, self.client_key
            )
            self._dialing = looked_up
            looked_up.addCallbacks(self._bind_to_named, self._not_resolved)
            looked_up.addErrback(self.failed)

    def _bind_to_named(self, found: list[SocketAddress]) -> None:
        self._dialing = None
        request = self.request
        if self.session.ending is not None or request is None:
            return
        try:
            # A reply can name an IPv4 listener only.
            found = [each for each in found if each[0] == socket.AF_INET]
            if not found:
                raise Refused(f"{request.host} has no IPv4 address")
            peers = [address[0] for _, address in self.permitted(request, found)]
            self._listen(peers)
        except Refused as refusal:
            self.refuse(Ending.DENIED, refusal.why)
        else:
            if self.direction.eof:
                self._hurry_if_left()

    def _not_resolved(self, reason: Failure) -> None:
        self._dialing = None
        if self.session.ending is None:
            self.dial_failed(reason)

    def _listen(self, peers: Sequence[str] | None) -> None:
        """Wait for one of `peers`, or for whoever comes."""
        factory = self.factory
        try:
            factory.binds.add(self, self.client_key)
        except Refused as refusal:
            self.refuse(Ending.REFUSED, refusal.why)
            return
        bound = self._bound = _Bound(self, peers)
        self._dialing = bound
        limit = factory.bind_timeout
        self._deadline = factory.now() + limit if limit else NEVER
        try:
            host = factory.bind_address or (
                _ANYONE
                if peers is None
                else address_towards(ipaddress.ip_address(peers[0]))
            )
        except OSError as problem:
            self.end(Ending.CONNECT_FAILED, f"no way to {peers}: {problem.strerror}")
            return
        listening = factory.listener(host).listen(bound)
        listening.addCallbacks(bound.listens, self._not_bound)
        listening.addErrback(self.failed)

    def _not_bound(self, reason: Failure) -> None:
        # The last is what Twisted's own endpoints say.
        reason.trap(RelayError, OSError, CannotListenError)
        if self.session.ending is None:
            self.end(Ending.CONNECT_FAILED, str(reason.value))

    def bound_to(self, host: str, port: int) -> None:
        """The listener stands: tell the client where."""
        session, factory = self.session, self.factory
        if factory.external_address:
            host = factory.external_address
        elif host == _ANYONE:
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

    def peer_came(self, address: Any, peers: Collection[str] | None) -> Any:
        """Somebody has connected to the listener, which is closed by now."""
        self.factory.binds.discard(self)
        if self.session.ending is not None:
            return None
        if peers is not None and address.host not in peers:
            self.session.upstream = address_name(address)
            self.refuse(
                Ending.WRONG_PEER,
                f"{address_name(address)} came instead of {', '.join(peers)}",
            )
            return None
        if peers is None:
            # Whoever comes is asked about when it has come.
            request: Any = self.request
            try:
                self.factory.policy.permit(address.host, request.port, "", self.session)
            except Refused as refusal:
                self.session.upstream = address_name(address)
                self.refuse(Ending.DENIED, refusal.why)
                return None
        return _PeerLeg(self)

    # -- endings

    def refuse(self, ending: Ending, why: str, code: Code = Code.REJECTED) -> None:
        """Tell the client that it is not served, and close."""
        self._refusal = code
        self.end(ending, why)

    def end(self, ending: Ending, detail: str = "") -> None:
        self._wait_no_more()
        if not self.handshaking:
            self._reply(int(self._refusal))
        StreamProtocol.end(self, ending, detail)

    def not_dialed(self, ending: Ending, detail: str) -> None:
        self.end(ending, detail)

    def overdue(self) -> None:
        factory = self.factory
        if self._bound is not None:
            self.refuse(
                Ending.BIND_TIMEOUT, f"nobody came in {factory.bind_timeout:g} s"
            )
        elif self.handshaking:
            StreamProtocol.overdue(self)
        elif self in factory.handshakes and self.request is not None:
            limit = factory.timeouts.handshake
            self.refuse(
                Ending.IDENT_FAILED,
                f"identd did not answer before the handshake's {limit:g} s were over",
                Code.NO_IDENT,
            )
        elif self in factory.handshakes:
            self.refuse(
                Ending.HANDSHAKE_TIMEOUT,
                f"no request in {factory.timeouts.handshake:g} s",
            )
        else:
            StreamProtocol.overdue(self)

    def ended_alone(self) -> None:
        if self.request is None and self.session.ending is None:
            self.refuse(
                Ending.CLIENT_LEFT,
                "in the middle of the handshake" if self._unread else "said nothing",
            )
            return
        StreamProtocol.ended_alone(self)

    def lost_alone(self, reason: Failure) -> None:
        self._wait_no_more()
        self._bound = None
        StreamProtocol.lost_alone(self, reason)

    def _wait_no_more(self) -> None:
        self.factory.handshakes.discard(self)
        self.factory.binds.discard(self)
        if self.request is None:
            # What was read of a request is not relayed.
            self.direction.read = 0

    def _reply(self, code: int, address: str = _ANYONE, port: int = 0) -> None:
        self.session.reply = code
        self.transport.write(_reply_bytes(code, address, port))


# An enum's members cost a look-up by its metaclass each time.
_BIND, _GRANTED = Command.BIND, int(Code.GRANTED)

#: The same destinations are asked for again and again.
_reply_bytes = functools.lru_cache(maxsize=1024)(write_reply)


def _socket_address(address: str, port: int) -> SocketAddress:
    if ":" in address:
        return socket.AF_INET6, (address, port, 0, 0)
    return socket.AF_INET, (address, port)


@implementer(IStreamClientEndpoint)
class _NamedDestination:
    """Looks a name up once, and connects to an address of it that is permitted."""

    def __init__(self, client: Socks4Protocol, request: Request) -> None:
        self._client = client
        self._request = request

    def connect(self, factory: IProtocolFactory) -> Deferred[IProtocol]:
        request, client = self._request, self._client
        found = client.factory.resolver.addresses(
            request.host, request.port, client.client_key
        )

        def dial(addresses: list[SocketAddress]) -> Deferred[IProtocol]:
            permitted = client.permitted(request, addresses)
            return client.factory.dialer(permitted).connect(factory)

        return found.addCallback(dial)


class _Bound(Factory):
    """A listener for one peer, which it closes when somebody has come."""

    noisy = False

    def __init__(self, client: Socks4Protocol, peers: Sequence[str] | None) -> None:
        self._client = client
        self._peers = peers
        self._port: IListeningPort | None = None
        self._over = False

    def listens(self, port: IListeningPort) -> None:
        """It is open."""
        if self._over:
            port.stopListening()
            return
        self._port = port
        here: Any = port.getHost()
        self._client.bound_to(here.host, here.port)

    def cancel(self) -> None:
        """Close it; nobody is expected any longer."""
        self._over = True
        port, self._port = self._port, None
        if port is not None:
            port.stopListening()

    def buildProtocol(self, addr: IAddress | None) -> Any:
        if self._over:
            return None
        self.cancel()
        try:
            return self._client.peer_came(addr, self._peers)
        except Exception:
            # The listener is gone: its client would wait for nobody.
            self._client.failed(Failure())
            return None


class _PeerLeg(UpstreamLeg):
    """The connection of whoever a client has waited for."""

    def __init__(self, client: Socks4Protocol) -> None:
        UpstreamLeg.__init__(self, client.session)
        self._client: Socks4Protocol | None = client

    def makeConnection(self, transport: Any) -> None:
        UpstreamLeg.makeConnection(self, transport)
        if self.alive:
            set_options(transport)
        client, self._client = self._client, None
        if client is not None:
            client.leg_connected(self)


@implementer(IShedsClients)
class Socks4Factory(StreamFactory):
    """Serves SOCKS4 and 4a clients.

    :param reactor: provides `IReactorTime`, `IReactorFDSet`, `IReactorThreads`, and
        for ident `IReactorTCP`.
    :param dialer: makes the client endpoint for addresses that were permitted: a list
        of (family, socket address), the best first.
    :param listener: makes the server endpoint for BIND, for an address of this
        machine; it chooses the port.
    :param resolver: finds the addresses of 4a's names.
    :param policy: decides who may go where.  Unless given, everybody may go where any
        machine can, and not to what only this one can reach
        (:class:`relayd.destinations.ProxyPolicy`).
    :param ident: ask each client's host for its user id, and refuse those that differ.
    :param ident_port: where that host's identd listens.
    :param bind: serve BIND.
    :param bind_any: serve BIND for whichever peer comes.
    :param bind_address: the IPv4 address that BIND listens on; unless given, the one
        on the way to the expected peer.
    :param external_address: the IPv4 address that BIND's reply names, if another.
    :param handshake_timeout: seconds until a client must have said what it wants, with
        its TLS handshake if it has one; 0 for never.
    :param bind_timeout: seconds that BIND waits for its peer, 0 for ever.
    :param max_handshakes: clients in a handshake; the one that has been in it longest
        makes room.  None is a quarter of the limit of open files, 4,096 at most.
    :param max_handshakes_per_client: those of one client address, likewise.  None is a
        quarter of `max_handshakes`, 1,024 at most.
    :param max_binds: clients that wait for a peer; more are refused.  And of one
        client address.

    The other parameters are those of :class:`relayd.tcp.RelayFactory`.

    :ivar handshakes: the clients in a handshake; several proxies may share them,
    :ivar binds: and those that wait for a peer.
    :raises ValueError: a timeout is negative, a bound is less than 1, an address is
        no IPv4 address, or the name can't be one.
    """

    protocol = Socks4Protocol

    def __init__(
        self,
        reactor: Any,
        *,
        dialer: AnyDialer | None = None,
        listener: AnyListener | None = None,
        resolver: AnyResolver | None = None,
        policy: IProxyPolicy | None = None,
        ident: bool = settings.IDENT.default,
        ident_port: int = ident.PORT,
        bind: bool = settings.BIND.default,
        bind_any: bool = settings.BIND_ANY.default,
        bind_address: str | None = settings.BIND_ADDRESS.default,
        external_address: str | None = settings.EXTERNAL_ADDRESS.default,
        handshake_timeout: float = settings.HANDSHAKE_TIMEOUT.default,
        bind_timeout: float = settings.BIND_TIMEOUT.default,
        connect_timeout: float = settings.CONNECT_TIMEOUT.default,
        stall_timeout: float = settings.STALL_TIMEOUT.default,
        idle_timeout: float = settings.IDLE_TIMEOUT.default,
        half_close_timeout: float = settings.HALF_CLOSE_TIMEOUT.default,
        max_handshakes: int | None = settings.MAX_HANDSHAKES.default,
        max_handshakes_per_client: int
        | None = settings.MAX_HANDSHAKES_PER_CLIENT.default,
        max_binds: int = settings.MAX_BINDS.default,
        max_binds_per_client: int = settings.MAX_BINDS_PER_CLIENT.default,
        observer: IObserver | None = None,
        gate: IGate | None = None,
        name: str | None = None,
    ) -> None:
        timeouts = Timeouts(
            connect=connect_timeout,
            stall=stall_timeout,
            idle=idle_timeout,
            half_close=half_close_timeout,
            handshake=handshake_timeout,
        )
        if not bind_timeout >= 0:
            raise ValueError(f"bind_timeout must not be negative: {bind_timeout!r}")
        if max_handshakes is None:
            max_handshakes = affordable_handshakes()
        if max_handshakes_per_client is None:
            max_handshakes_per_client = fair_handshakes(max_handshakes)
        for bound, most in (
            ("max_handshakes", max_handshakes),
            ("max_handshakes_per_client", max_handshakes_per_client),
            ("max_binds", max_binds),
            ("max_binds_per_client", max_binds_per_client),
        ):
            if most < 1:
                raise ValueError(f"{bound} must be at least 1: {most!r}")
        for address in (bind_address, external_address):
            if address is not None:
                ipaddress.IPv4Address(address)
        tick = timeouts.tick
        super().__init__(
            timeouts=timeouts,
            clock=reactor,
            observer=observer,
            gate=gate,
            name=name,
            tick=max(min(tick, bind_timeout / 8 or tick), 0.01),
        )
        self.reactor = reactor
        self.dialer = dialer if dialer is not None else Dialer(reactor)
        self.listener = listener if listener is not None else self._listener
        self.resolver = resolver if resolver is not None else Resolver.of(reactor)
        self.policy = policy if policy is not None else ProxyPolicy()
        self.ident = ident
        self.ident_port = ident_port
        self.bind = bind
        self.bind_any = bind_any
        self.bind_address = bind_address
        self.external_address = external_address
        self.bind_timeout = bind_timeout
        self._making_room: IDelayedCall | None = None
        self.handshakes: Waiting[Socks4Protocol] = Waiting(
            "handshakes", max_handshakes, max_handshakes_per_client, reactor
        )
        self.binds: Waiting[Socks4Protocol] = Waiting(
            "BINDs", max_binds, max_binds_per_client, reactor
        )

    def shed_clients(self) -> None:
        """See :meth:`IShedsClients.shed_clients`."""
        # Not now: what they have said may have arrived, and is read in this turn.
        if self._making_room is None:
            self._making_room = self.clock.callLater(0, self._make_room)

    def _make_room(self) -> None:
        self._making_room = None
        long_ago = self.now() - LONG_HANDSHAKE
        for protocol in self.handshakes.oldest(ROOM):
            if protocol.session.opened_at <= long_ago:
                protocol.refuse(Ending.CROWDED_OUT, "descriptors run out")

    def _listener(self, host: str) -> IStreamServerEndpoint:
        return TCPListenerEndpoint(self.reactor, host, 0, 1)
