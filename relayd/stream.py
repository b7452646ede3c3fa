"""What every stream relay does around its protocol.

A connection goes through the same stages whoever accepted it:

    accepted -> gate -> (TLS) -> (the protocol's own talking) -> dial -> Bridge -> over

:class:`StreamProtocol` is the client's leg and walks through them;
:class:`StreamFactory` knows the sessions that live, their deadlines, and how to
shut down.  A relay is a subclass of each that decides what to dial, and when.

While the server is dialled the client's bytes are kept (up to
:data:`relayd.bridge.HOLD_LIMIT`) and its connection is watched:

- a client that is gone (a reset) cancels the dial: at once while it is read, and at
  the next look of the wheel if it has sent more than is kept, or ended its side;
- a client that ends its side with nothing sent has most likely left, but may be
  waiting for a server that speaks first: TCP looks the same.  A dial that is
  under way gets :data:`LEFT_GRACE` more seconds and is then cancelled;
- a client that ends its side after sending something waits for the answer: the
  dial goes on, and the end of data is passed on after the data.

With TLS a connection stands when its handshake is done (:mod:`relayd.tls`): a client's
has a deadline and nothing is dialled before; a server's is a part of the dial.  A PROXY
header (:mod:`relayd.proxy_header`) is to a client what a handshake is.
"""

from __future__ import annotations

import errno
import itertools
import socket
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from types import MethodType
from typing import Any

from twisted.internet import error
from twisted.internet.address import UNIXAddress
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import (
    IAddress,
    IHandshakeListener,
    INegotiated,
    IReactorTime,
)
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd import settings
from relayd.addresses import address_name
from relayd.bridge import Bridge, Leg, Timeouts
from relayd.errors import HandshakeFailed, Refused
from relayd.foreign_transports import (
    is_its_own_peer,
    keep_alive,
    lent_socket,
    set_options,
)
from relayd.hops import Hop, between, file_of, streams
from relayd.interfaces import (
    ICaller,
    IGate,
    IHopListener,
    ILease,
    INamedClients,
    IObserver,
)
from relayd.monotonic import monotonic
from relayd.observers import Observers, SessionLog
from relayd.own_addresses import OwnHosts
from relayd.registry import Registry
from relayd.relay_names import relay_name
from relayd.session import Ending, Session
from relayd.socket_ends import ends_of
from relayd.tcp_info import was_reset
from relayd.tls import ServerHandshake, ServerIdentity, stage, tells, why_failed
from relayd.transports import KEEPALIVE_IS_INHERITED
from relayd.upstreams import Upstream
from relayd.wheel import DeadlineWheel

# A function that an object keeps as an attribute (`factory.now`) is put into a variable
# first where each session calls it: the interpreter is slow to call it otherwise.

log = Logger(namespace="relayd.stream")

#: Seconds that a dial goes on for a client that ended its side with nothing sent.
LEFT_GRACE = 1.0

#: Seconds that a client gets to answer a polite close.
CLOSE_GRACE = 5.0

#: How many looks more a handshake gets after its time, if it has come further since the
#: last: a relay that was late has only now read what a peer has sent in time.
MORE_LOOKS = 2

#: What is said of a session that leads back to its own relay.
GOES_ROUND = "it leads back to this relay, where it comes from"

_NAMELESS = address_name(UNIXAddress(None))

#: A deadline that never comes.
NEVER = float("inf")

# An enum's members cost a look-up by its metaclass each time.
_DONE = Ending.DONE

_session_ids = itertools.count(1)


def ending_of_failed_dial(reason: Failure) -> tuple[Ending, str]:
    """Name the way in which a dial failed, and say why in one line."""
    problem = reason.value
    if isinstance(problem, error.DNSLookupError):
        ending = Ending.UNRESOLVED
    elif isinstance(problem, error.ConnectionRefusedError):
        ending = Ending.CONNECT_REFUSED
    elif getattr(problem, "osError", None) == errno.ECONNRESET:
        # It was connected, and reset before we looked.
        ending = Ending.UPSTREAM_RESET
    elif isinstance(problem, error.TimeoutError | error.TCPTimedOutError):
        ending = Ending.CONNECT_TIMEOUT
    elif isinstance(
        problem, error.ConnectError | CancelledError | OSError | HandshakeFailed
    ):
        ending = Ending.CONNECT_FAILED
    elif isinstance(problem, Refused):
        # A policy was against each of a name's addresses.
        ending = Ending.DENIED
    else:
        ending = Ending.FAILED
    text = " ".join(str(problem).split()).rstrip(".")
    return ending, text or type(problem).__name__


def _note_listener(here: Any) -> None:
    """A listener that may not be ours has accepted somebody at an address.

    Ours say by themselves that they open and close.  When others close nobody tells:
    what they had stays noted, once for each port and for each socket's file.
    """
    if isinstance(here, UNIXAddress):
        if here.name and not streams.listens_at(here.name):
            streams.opens_file(file_of(here.name))
    elif getattr(here, "port", 0) not in streams.ports:
        streams.listens(getattr(here, "port", 0))


def _hop_of(transport: Any) -> str:
    """What a connection is called at its other end, too.

    :return: empty for one without a name: a UNIX socket that nobody has bound to one.
    """
    ends = None
    with lent_socket(transport) as sock, suppress(OSError):
        if sock is not None:
            ends = ends_of(sock)
    if ends is None:
        ends = address_name(transport.getHost()), address_name(transport.getPeer())
    return "" if ends[0] == _NAMELESS else between(*ends)


class UpstreamLeg(Leg):
    """The server's connection."""

    def __init__(self, session: Session) -> None:
        # As Leg's, which only sees clients' legs then: a line of code that sets
        # attributes of two classes in turn is twice as slow.
        self.direction = session.down
        self.bridge = self.sink = self.held = self.peer = None
        self.alive = self.spliced = False
        self.paused = 0
        self._session = session

    def makeConnection(self, transport: Any) -> None:
        Leg.makeConnection(self, transport)
        if self._session.ending is not None:
            # Connected in spite of being cancelled.
            self.abort()


@implementer(IHandshakeListener)
class EndpointLeg(UpstreamLeg):
    """The server's connection, by an endpoint of any kind: it may be TLS.

    :ivar identity: whose certificate it must show, if that is known.
    :ivar handshake: what is under way, if it will tell of its end.
    :ivar verified: it is done, and the certificate is good.
    :ivar problem: why not.
    :ivar caller: who waits for it.
    """

    identity: ServerIdentity | None = None
    handshake: ServerHandshake | None = None
    verified = False
    problem: HandshakeFailed | None = None
    caller: StreamProtocol | None = None

    def makeConnection(self, transport: Any) -> None:
        UpstreamLeg.makeConnection(self, transport)
        if tells(transport):
            self.handshake = ServerHandshake(transport, self.identity)

    def handshakeCompleted(self) -> None:
        handshake = self.handshake
        # A check of the endpoint's own may have failed: the loss will say why.
        if handshake is None or self.transport.disconnecting:
            return
        try:
            handshake.verify()
        except HandshakeFailed as problem:
            self._failed(problem)
            return
        self.handshake, self.verified = None, True
        caller, self.caller = self.caller, None
        if caller is not None:
            caller.leg_connected(self)

    def lost_alone(self, reason: Failure) -> None:
        if self.handshake is not None:
            self._failed(HandshakeFailed(self.handshake.why_failed(reason)))

    def _failed(self, problem: HandshakeFailed) -> None:
        self.handshake, self.problem = None, problem
        caller, self.caller = self.caller, None
        if caller is not None:
            # Which aborts it.
            caller.dial_failed(Failure(problem))
        else:
            self.abort()

    def cancel(self) -> None:
        """Nobody waits for it any more: it is a part of a dial."""
        self.handshake = self.caller = None
        self.abort()


@implementer(IHopListener)
class _UpstreamFactory(Factory):
    """Builds the server's leg, for endpoints that want a factory.

    Until the dial has its outcome, as an endpoint may try several addresses.  After
    that the caller is let go: Twisted's endpoints wrap a factory in a cycle of
    references, which would keep it, and its session, until the collector comes by.
    """

    noisy = False

    def __init__(self, caller: StreamProtocol, identity: ServerIdentity | None) -> None:
        self._caller: StreamProtocol | None = caller
        self._session = caller.session
        self._identity = identity

    def buildProtocol(self, addr: IAddress | None) -> EndpointLeg:
        caller = self._caller
        if caller is None:
            # Too late.  Of a session that has ended it is aborted.
            return EndpointLeg(self._session)
        return caller.build_endpoint_leg(self._identity)

    def let_go(self, outcome: Any) -> Any:
        """The dial has its outcome, which is returned."""
        self._caller = None
        return outcome

    def under_way(self, sock: socket.SocketType, address: Any) -> bool:
        caller = self._caller
        return caller is not None and caller.under_way(sock, address)


@implementer(ICaller, IHandshakeListener, IHopListener)
class StreamProtocol(Leg):
    """The client's leg, from accept to the end of its session.

    Subclasses override :meth:`admitted` and call :meth:`dial` from it, or
    later.
    """

    factory: StreamFactory
    #: What the session is recorded in; subclasses may have more to record.
    record: type[Session] = Session
    #: A TLS server that must have shown its certificate by the deadline, and of which
    #: nobody tells that it has.
    _unproven: Leg | None = None

    #: The wheel has seen to keepalive probes.
    _is_kept_alive = False
    #: How far a handshake had come at the last look, and how many looks it has beyond
    #: its time.
    _stage: Any = None
    _more_looks = MORE_LOOKS
    #: What reads the PROXY header with which this client is to begin.
    _header: Any = None

    def __init__(self, factory: StreamFactory, client: str) -> None:
        now = factory.now
        session = self.session = self.record(
            next(_session_ids),
            next(factory.ordinals),
            client,
            "",
            now(),
            factory.name,
        )
        Leg.__init__(self, session.up)
        self.factory = factory
        #: Its connection may be of a kind that is not ours.
        self.is_foreign = True
        self.wheel_bucket: dict[Any, None] | None = None
        #: Whether the server may be another relay of this process.
        self._leads_here = False
        #: Hops to it: several if a name has several addresses.
        self._hops_made: dict[str, Hop] | None = None
        self._lease: ILease | None = None
        #: What is under way before the Bridge, and can be cancelled.
        self._dialing: Any = None
        self._leg: UpstreamLeg | None = None
        #: What the log calls the server's address, where the endpoint says it.
        self._peer_name = ""
        #: When to give up on this stage, on the factory's clock.
        self._deadline = 0.0
        #: The client's TLS handshake is not done, or its PROXY header is to come.
        self.handshaking = False

    # -- what a relay decides

    def admitted(self) -> None:
        """The gate let this client in."""
        raise NotImplementedError

    def handshake_begins(self) -> None:
        """Instead of that: it did, and a TLS handshake or PROXY header is to come."""
        limit = self.factory.timeouts.handshake
        self._deadline = self.session.opened_at + limit if limit else NEVER

    def handshake_is_done(self) -> None:
        """The client is as any other from now on."""
        self.admitted()

    # -- stages

    def makeConnection(self, transport: Any) -> None:
        self.attach(transport)
        factory, session = self.factory, self.session
        try:
            if self.is_foreign:
                set_options(transport)
                self.handshaking = tells(transport)
                header = getattr(transport, "proxy_header", None)
                if header is not None:
                    self._header, self.handshaking = header, True
                    header.on_end = self.handshakeCompleted
            host_name = factory.host_name
            here = transport.getHost()
            session.listener = host_name(here)
            if self.is_foreign:
                _note_listener(here)
            if (streams.hops or streams.past) and streams.lead_round(
                self._hop, factory
            ):
                self._turn_away(Ending.LOOP, GOES_ROUND)
                return
            self.connectionMade()
            if factory.gate is not None:
                self._lease = factory.gate.enter(session)
        except Refused as refusal:
            self._turn_away(Ending.REFUSED, refusal.why)
            return
        except Exception:
            log.failure("session {id} could not be opened", id=session.id)
            self._turn_away(Ending.FAILED, "could not be opened")
            return
        factory.wheel.add(self)
        opened = factory.observer.opened
        opened(session)
        if session.ending is not None:
            # An observer has ended it.
            return
        try:
            if self.handshaking:
                self._comes_on()
                self.handshake_begins()
            else:
                self.admitted()
        except Exception as problem:
            log.failure("session {id} failed", id=session.id)
            self.cut(Ending.FAILED, repr(problem))

    def handshakeCompleted(self) -> None:
        """See `IHandshakeListener`; the PROXY header is read, likewise."""
        if not self.handshaking:
            return
        self.handshaking = False
        if self.session.ending is not None:
            return
        try:
            self.handshake_is_done()
        except Exception as problem:
            log.failure("session {id} failed", id=self.session.id)
            self.cut(Ending.FAILED, repr(problem))

    def _turn_away(self, ending: Ending, why: str) -> None:
        """Reset a client that was not let in; it never becomes a living session."""
        session, factory = self.session, self.factory
        session.ending, session.detail = ending, why
        session.ended_at = factory.now()
        factory.endings[ending.word] += 1
        factory.observer.refused(session, why)
        self.abort()

    def dial(self, upstream: Upstream | None) -> None:
        """Connect to `upstream` and join it to the client; None ends the session."""
        if upstream is None:
            self.end(Ending.NO_UPSTREAM)
            return
        session, factory = self.session, self.factory
        session.upstream = upstream.name
        connect, now = factory.timeouts.connect, factory.now
        self._deadline = now() + connect if connect else NEVER
        dialing = factory.observer.dialing
        dialing(session)
        if session.ending is not None:
            # An observer has ended it.
            return
        endpoint: Any = upstream.endpoint
        if upstream.dials:
            port = getattr(endpoint, "port", 0)
            if port in streams.ports or (not port and streams.files):
                self._leads_here = self._is_here(getattr(endpoint, "peer", endpoint))
            self._peer_name = endpoint.peer_name
            dial = endpoint.dial(self)
            # None: what came of it has been told, and may have led to anything.
            if dial is not None:
                self._dialing = dial
        else:
            # Nobody knows yet where it leads.
            self._leads_here = bool(streams.ports or streams.files)
            made = _UpstreamFactory(self, upstream.identity)
            done = self._dialing = endpoint.connect(made)
            done.addBoth(made.let_go)
            done.addCallbacks(self._dialed, self.dial_failed)

    # -- ICaller

    def build_leg(self, addr: IAddress | None) -> UpstreamLeg:
        # An endpoint that tries several addresses may build more than one; the
        # last is the one that it answers for.
        self._leg = UpstreamLeg(self.session)
        return self._leg

    def build_endpoint_leg(self, identity: ServerIdentity | None) -> EndpointLeg:
        """The same for a connection that may turn out to be TLS."""
        leg = self._leg = EndpointLeg(self.session)
        if identity is not None:
            leg.identity = identity
        return leg

    def _dialed(self, protocol: object) -> None:
        """A foreign endpoint has connected, and may answer for a wrapper."""
        leg: Any = self._leg
        if leg is not None:
            if leg.alive:
                transport = leg.transport
                set_options(transport)
                if is_its_own_peer(transport):
                    self._leg = self._dialing = None
                    leg.abort()
                    if self.session.ending is None:
                        self.not_dialed(
                            Ending.CONNECT_REFUSED, "the connection was to itself"
                        )
                    return
            if leg.handshake is not None:
                leg.caller = self
                # What is cancelled from now on.
                self._dialing = leg
                self._more_looks = MORE_LOOKS
                self._comes_on()
            elif leg.problem is not None:
                self.dial_failed(Failure(leg.problem))
            elif leg.identity is not None and not leg.verified:
                unsaid = HandshakeFailed("the endpoint's TLS, if any, can't be checked")
                self.dial_failed(Failure(unsaid))
            else:
                self.leg_connected(leg)
            return
        self._dialing = None
        problem = TypeError(
            f"the endpoint connected {protocol!r}, not what it was given"
        )
        log.failure("session {id} failed", Failure(problem), id=self.session.id)
        self.cut(Ending.FAILED, repr(problem))

    def leg_connected(self, leg: Leg) -> None:
        self._leg = self._dialing = None
        session, factory = self.session, self.factory
        try:
            if session.ending is not None:
                leg.abort()
                return
            if not leg.alive:
                self.end(Ending.CONNECT_FAILED, "lost as soon as it was connected")
                return
            session.upstream = self._peer_name or factory.peer_name(
                leg.transport.getPeer()
            )
            if self._leads_here and self._goes_round(leg):
                leg.abort()
                self.not_dialed(Ending.LOOP, GOES_ROUND)
                return
            now, connected = factory.now, factory.observer.connected
            session.connected_at = now()
            connected(session)
            if session.ending is not None:
                # An observer has ended it.
                leg.abort()
                return
            self.joined(leg)
            if leg.spliced:
                # Not needed any more: thousands of idle sessions would keep it.
                self._deadline = 0.0
            elif INegotiated.providedBy(leg.transport) and not tells(leg.transport):
                # TLS below a wrapper: connected, but maybe not yet with a server.
                self._unproven = leg
        except Exception as problem:
            log.failure("session {id} failed", id=session.id)
            self.cut(Ending.FAILED, repr(problem))
            leg.abort()

    @property
    def _hop(self) -> str:
        """What the client's connection is, if it is another relay's of this process."""
        return between(self.session.client, self.session.listener)

    def _is_here(self, there: Any) -> bool:
        """Whether an address is one on which this process listens, or may be.

        Many a relay and its server have the same port, on two machines.
        """
        if isinstance(there, UNIXAddress):
            return there.name is not None and streams.listens_at(there.name)
        if getattr(there, "port", 0) not in streams.ports:
            return False
        is_own = self.factory.is_own
        return is_own(getattr(there, "host", ""))

    def _goes_round(self, leg: Leg) -> bool:
        """Note a connection to a port of this process; whether it has been here."""
        there = leg.transport.getPeer()
        name = _hop_of(leg.transport) if self._is_here(there) else ""
        if not name:
            self._leads_here = False
            return False
        self._note(name)
        return streams.lead_round(self._hop, self.factory)

    def _note(self, name: str) -> None:
        if self._hops_made is None:
            self._hops_made = {}
        if name not in self._hops_made:
            self._hops_made[name] = streams.add(name, self.factory, self._hop)

    def under_way(self, sock: socket.SocketType, address: Any) -> bool:
        """See :meth:`IHopListener.under_way`."""
        is_own = self.factory.is_own
        if not self._leads_here or not is_own(address[0]):
            return False
        with suppress(OSError):  # over already
            self._note(between(*ends_of(sock, address)))
        return True

    def joined(self, leg: Leg) -> None:
        """The upstream connection stands: join it to the client."""
        factory = self.factory
        bridge = Bridge(
            self.session, self, leg, factory.timeouts, factory.clock, self._over
        )
        bridge.start(self.is_foreign)

    def dial_failed(self, reason: Failure) -> None:
        leg, self._leg, self._dialing = self._leg, None, None
        if leg is not None:
            # An endpoint that had more to do once it was connected.
            leg.abort()
        if self.session.ending is not None:
            # Cancelled by us, or too late to matter.
            return
        ending, detail = ending_of_failed_dial(reason)
        if ending is Ending.FAILED:
            log.failure(
                "session {id}: the endpoint of {upstream} failed",
                reason,
                id=self.session.id,
                upstream=self.session.upstream,
            )
        self.not_dialed(ending, detail)

    def not_dialed(self, ending: Ending, detail: str) -> None:
        """There is no upstream connection: the client is told in the same way."""
        if ending is Ending.UPSTREAM_RESET:
            self.cut(ending, detail)
        else:
            self.end(ending, detail)

    # -- the client's side before the Bridge

    def ended_alone(self) -> None:
        if not self.direction.read:
            grace = self.factory.now() + LEFT_GRACE
            self._deadline = min(self._deadline, grace)

    def lost_alone(self, reason: Failure) -> None:
        session = self.session
        if session.ended_at is None:
            if session.ending is None:
                session.ending = Ending.CLIENT_LEFT
                if self.handshaking:
                    self._judge_handshake(reason)
            self._cancel_dial()
            self._over()

    def _judge_handshake(self, reason: Failure) -> None:
        """A client is gone before its TLS handshake was done, or its header read."""
        session, header = self.session, self._header
        if header is not None:
            if header.is_bad:
                session.ending = Ending.BAD_REQUEST
                session.detail = "it did not begin with a PROXY header"
            else:
                session.detail = "before its PROXY header"
        elif isinstance(reason.value, error.ConnectionClosed | OSError):
            session.detail = "in the middle of its TLS handshake"
        else:
            session.ending = Ending.BAD_REQUEST
            session.detail = f"TLS handshake: {why_failed(reason, 'the client')}"

    def _cancel_dial(self) -> None:
        dialing, self._dialing = self._dialing, None
        if dialing is not None:
            dialing.cancel()

    # -- endings

    def end(self, ending: Ending, detail: str = "") -> None:
        """End a session that has no upstream connection: close the client politely."""
        self.session.ending, self.session.detail = ending, detail
        self._cancel_dial()
        # TLS waits for the client's own goodbye, which may never come.
        self._deadline = self.factory.now() + CLOSE_GRACE
        self.transport.loseConnection()

    def cut(self, ending: Ending, detail: str = "") -> None:
        """End the session now, whatever its stage: reset what is connected."""
        if self.bridge is not None:
            self.bridge.abort(ending, detail)
            return
        if self.session.ending is None:
            self.session.ending, self.session.detail = ending, detail
        self._cancel_dial()
        self.abort()

    def _over(self) -> None:
        session, factory = self.session, self.factory
        now = factory.now
        session.ended_at = now()
        factory.wheel.discard(self)
        if self._lease is not None:
            lease, self._lease = self._lease, None
            try:
                lease.release()
            except Exception:
                log.failure("the lease of session {id} failed", id=session.id)
        if self._hops_made is not None:
            for name, hop in self._hops_made.items():
                streams.is_over(name, hop)
        ending = session.ending
        if ending is not None and ending is not _DONE:
            factory.endings[ending.word] += 1
        closed = factory.observer.closed
        closed(session)
        if factory.registry.draining:
            factory.registry.check()

    # -- the wheel

    def check(self, now: float) -> None:
        """Look at the deadlines of whichever stage this is."""
        bridge = self.bridge
        if self.session.ending is not None:
            # A transport that is not ours has told nobody of a loss, or an override of
            # `connectionLost` below it (TLS, a wrapper) has kept that to itself.
            legs = (self,) if bridge is None else (self, bridge.upstream)
            for leg in legs:
                if leg.outlives_abort():
                    leg.lost_anyway(Failure(error.ConnectionAborted()))
            if self.session.ended_at is not None:
                return
        if bridge is not None:
            if not self._is_kept_alive:
                self._keep_alive(bridge)
            if self._unproven is not None and now >= self._deadline:
                leg, self._unproven = self._unproven, None
                if leg.alive and leg.transport.getPeerCertificate() is None:
                    self.cut(Ending.CONNECT_TIMEOUT, "no TLS handshake in time")
                    return
            bridge.check(now)
        elif (
            (self.paused or self.direction.eof)
            and self.session.ending is None
            and was_reset(self.transport)
        ):
            # It is not read, so nobody hears of its reset.
            self.cut(Ending.CLIENT_LEFT)
        elif now < self._deadline:
            self._comes_on()
        elif self.session.ending is not None:
            self.abort()
        elif self.direction.eof and not self.direction.read:
            self.end(Ending.CLIENT_LEFT, "the client ended its side, unanswered")
        elif self._comes_on() and self._more_looks:
            self._more_looks -= 1
        else:
            self.overdue()

    def _comes_on(self) -> bool:
        """Whether a handshake, the client's or the server's, has moved since."""
        if self._header is not None and self.handshaking:
            now: Any = self._header.stage
        elif self.handshaking:
            now = stage(self.transport)
        elif self._dialing is not None and self._dialing is self._leg:
            now = stage(self._leg.transport)
        else:
            return False
        before, self._stage = self._stage, now
        return bool(now != before)

    def _keep_alive(self, bridge: Bridge) -> None:
        self._is_kept_alive = True
        if bridge.upstream.alive:
            keep_alive(bridge.upstream.transport)
        # A listener of ours has passed its options on.
        if self.alive and (self.is_foreign or not KEEPALIVE_IS_INHERITED):
            keep_alive(self.transport)

    def overdue(self) -> None:
        """The stage before the Bridge has had its time."""
        timeouts = self.factory.timeouts
        if self.handshaking:
            what = "TLS handshake" if self._header is None else "PROXY header"
            self.end(Ending.HANDSHAKE_TIMEOUT, f"no {what} in {timeouts.handshake:g} s")
        elif self._dialing is not None:
            what = "TLS handshake" if self._dialing is self._leg else "connection"
            self.end(Ending.CONNECT_TIMEOUT, f"no {what} in {timeouts.connect:g} s")

    def check_failed(self) -> None:
        """`check` raised: end the session."""
        self.cut(Ending.FAILED, "its deadlines could not be checked")


def _last_name() -> Callable[[IAddress | None], str]:
    """What makes the text of an address, once while it is asked for the same object."""
    last: IAddress | None = None
    name = "-"

    def name_of(address: IAddress | None) -> str:
        nonlocal last, name
        if address is not last:
            last = address
            # The same text in thousands of sessions is kept once.
            name = sys.intern(address_name(address))
        return name

    return name_of


@implementer(INamedClients)
class StreamFactory(Factory):
    """The sessions of one relay, and what they share.

    :cvar protocol: serves one client: made with the factory and the client's name.
    :ivar name: what the log calls this relay.
    :ivar wheel: the sessions that live stand on it.
    :ivar endings: how many sessions have ended in each way, by its word; those that
        ended `done` are left out.
    """

    noisy = False
    protocol: Any = StreamProtocol

    def __init__(
        self,
        *,
        timeouts: Timeouts,
        clock: IReactorTime,
        observer: IObserver | None,
        gate: IGate | None,
        tick: float | None = None,
        name: str | None = None,
    ) -> None:
        self.name = relay_name(name)
        self.timeouts = timeouts
        clock = monotonic(clock)
        self.clock = clock
        #: The time in seconds, asked for five times in a session.
        self.now: Callable[[], float] = clock.seconds
        self.host_name, self.peer_name = _last_name(), _last_name()
        #: Tells this machine's addresses.
        self.is_own: Callable[[str], bool] = OwnHosts(clock.seconds)
        #: Lets everyone in if there is none.
        self.gate = gate
        self.observer = Observers(observer if observer is not None else SessionLog())
        self.wheel: DeadlineWheel[StreamProtocol] = DeadlineWheel(
            clock, timeouts.tick if tick is None else tick
        )
        self.endings: Counter[str] = Counter()
        self.ordinals = itertools.count()
        #: The sessions that live, by id; how they are drained.
        self.registry: Registry[int, StreamProtocol] = Registry(
            self.wheel, clock, id_of=_id_of, abort=_drop
        )

    def takes_names(self) -> bool:
        """See :meth:`INamedClients.takes_names`."""
        # Whoever has a buildProtocol of their own means to see each client's address,
        # and may do anything with the protocol; so may a function in a class's place.
        own = MethodType(StreamFactory.buildProtocol, self)
        return self.buildProtocol == own and isinstance(self.protocol, type)

    def build_named(self, client: str) -> StreamProtocol | None:
        """See :meth:`INamedClients.build_named`."""
        # None closes the connection: it was in the backlog when we shut down.
        if self.registry.draining:
            return None
        protocol: StreamProtocol | None = self.protocol(self, client)
        if protocol is not None:
            protocol.is_foreign = False
        return protocol

    def buildProtocol(self, addr: IAddress | None) -> Any:
        protocol = self.build_named(address_name(addr))
        if protocol is not None:
            protocol.is_foreign = True
        return protocol

    def startFactory(self) -> None:
        """The first listener opens, maybe after a drain: that is over now."""
        self.registry.reopen()

    def stopFactory(self) -> None:
        """The last listener closed: don't keep a timer for sessions to come."""
        self.wheel.settle()

    def drain(self, timeout: float = settings.DRAIN_TIMEOUT.default) -> Deferred[None]:
        """Serve no new client, and wait for the sessions that live.

        Stop listening first, or at the same time: a client that connects after
        this is closed at once, until a listener is opened again.  A later call does
        not change the time that sessions have, but to end it with 0.

        :param timeout: seconds; what has not ended by then is reset.  0 resets
            everything now.
        :return: fires with None when the last session has ended.
        """
        self.wheel.settle()
        return self.registry.drain(timeout)

    def abort_all(self) -> None:
        """Reset every session that lives, now."""
        self.registry.abort_all()

    @property
    def sessions(self) -> dict[int, StreamProtocol]:
        """The sessions that live, by id, the oldest first; made for each that asks."""
        return dict(sorted(self.registry.by_id().items()))


def _id_of(protocol: StreamProtocol) -> int:
    return protocol.session.id


def _drop(protocol: StreamProtocol) -> None:
    """Its drain has had its time."""
    protocol.cut(Ending.DRAINED)
