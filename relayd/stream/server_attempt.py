"""The dial to a server of a pool.

Endpoints of ours connect a leg at once (:class:`relayd.core.interfaces.IDialer`); any
other endpoint is given a factory, and may turn out to be TLS: such a server is
connected when its handshake is done (:mod:`relayd.net.tls`).  Dials to this process are
noted (:mod:`relayd.core.hops`) so that a loop is found.
"""

from __future__ import annotations

import errno
import socket
from contextlib import suppress
from typing import Any

from twisted.internet.address import UNIXAddress
from twisted.internet.interfaces import IAddress, IHandshakeListener
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.core.addresses import address_name, host_of
from relayd.core.errors import HandshakeFailed
from relayd.core.hops import between, streams
from relayd.core.interfaces import ICaller, IHopListener, IOnBehalf
from relayd.core.pauses import ALLOWANCE
from relayd.core.session import Direction, Ending
from relayd.net.foreign_transports import is_self_connected, lent_socket, set_options
from relayd.net.socket_ends import ends_of
from relayd.net.tls import ServerHandshake, ServerIdentity, notifies_handshake, stage
from relayd.net.upstream import Upstream
from relayd.stream.attempt import (
    EXTRA_CHECKS,
    LOOP_DETAIL,
    Attempt,
    Dialing,
    UpstreamLeg,
)
from relayd.stream.bridge import way_between
from relayd.stream.legs import Leg
from relayd.stream.on_behalf import OnBehalf

log = Logger(namespace="relayd.stream")

#: Seconds that a dial waits in a relay that has found a loop by dialling.  Endpoints of
#: other kinds tell of a connection only after it was accepted, and maybe dialled on: a
#: loop would be one connection ahead for ever.
LOOP_PAUSE = 0.02

_NAMELESS = address_name(UNIXAddress(None))


@implementer(IHandshakeListener)
class EndpointLeg(UpstreamLeg):
    """The server's connection, by an endpoint of any kind: it may be TLS.

    :ivar identity: whose certificate it must show, if that is known.
    :ivar handshake: what is under way, if it will tell of its end.
    :ivar verified: it is done, and the certificate is good.
    :ivar problem: why not.
    :ivar waiting: the attempt that waits for it.
    """

    identity: ServerIdentity | None = None
    handshake: ServerHandshake | None = None
    verified = False
    problem: HandshakeFailed | None = None
    waiting: ServerAttempt | None = None

    def makeConnection(self, transport: Any) -> None:
        UpstreamLeg.makeConnection(self, transport)
        if notifies_handshake(transport):
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
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            waiting.leg_connected(self)

    def lost_alone(self, reason: Failure) -> None:
        if self.handshake is not None:
            self._failed(HandshakeFailed(self.handshake.why_failed(reason)))

    def _failed(self, problem: HandshakeFailed) -> None:
        self.handshake, self.problem = None, problem
        waiting, self.waiting = self.waiting, None
        if waiting is not None:
            # Which aborts it.
            waiting.dial_failed(Failure(problem))
        else:
            self.abort()

    def abort(self) -> None:
        self.handshake = self.waiting = None
        UpstreamLeg.abort(self)


@implementer(IHopListener, IOnBehalf)
class _UpstreamFactory(Factory):
    """Builds the server's leg, for endpoints that want a factory.

    Until the dial has its outcome, as an endpoint may try several addresses.  After
    that the attempt is let go: Twisted's endpoints wrap a factory in a cycle of
    references, which would keep it, and its session, until the collector comes by.
    """

    noisy = False

    def __init__(self, attempt: ServerAttempt) -> None:
        self._attempt: ServerAttempt | None = attempt

    def buildProtocol(self, addr: IAddress | None) -> EndpointLeg:
        attempt = self._attempt
        if attempt is None:
            # Too late: it is reset.
            return EndpointLeg(Direction())
        return attempt.build_endpoint_leg()

    def let_go(self, outcome: Any) -> Any:
        """The dial has its outcome, which is returned."""
        self._attempt = None
        return outcome

    def speaks_first(self) -> bool:
        """See :meth:`ICaller.speaks_first`: dials of ours ask the factory, too."""
        attempt = self._attempt
        return attempt is not None and attempt.speaks_first()

    def dial_started(self, sock: socket.SocketType, address: Any) -> bool:
        attempt = self._attempt
        return attempt is not None and attempt.dial_started(sock, address)

    # -- IOnBehalf: asked as a dial begins

    def client_host(self) -> str:
        return self._attempt_under_way.client_host()

    def original(self) -> tuple[int, Any]:
        return self._attempt_under_way.original()

    def goes_to(self, endpoint: object) -> None:
        self._attempt_under_way.goes_to(endpoint)

    @property
    def _attempt_under_way(self) -> ServerAttempt:
        if self._attempt is None:
            raise OSError(errno.ECANCELED, "its client has left")
        return self._attempt


@implementer(ICaller, IHopListener, IOnBehalf)
class ServerAttempt(OnBehalf):
    """A dial to a server of a pool.

    :param upstream: the server.
    """

    #: How far its TLS handshake had come at the last check.
    _stage: Any = None
    #: What the endpoint was given before `leg`, if it tries several addresses.
    _others: tuple[EndpointLeg, ...] = ()

    def __init__(self, client: Dialing, upstream: Upstream) -> None:
        self.client = client
        self.upstream = upstream

    def start(self) -> None:
        """Dial.  The outcome may be told from within."""
        upstream = self.upstream
        endpoint: Any = upstream.endpoint
        if upstream.counted:
            place: Any = upstream
            self.place = place
            place.began()
        self.preamble = upstream.preamble or self.client.factory.preamble
        if upstream.dials:
            port = getattr(endpoint, "port", 0)
            if port in streams.ports or (not port and streams.files):
                self.leads_here = self._is_here(getattr(endpoint, "peer", endpoint))
            self.name = endpoint.peer_name
            dial = endpoint.dial(self)
            if not self.is_over:
                self.dial = dial
        else:
            # Nobody knows yet where it leads.
            self.leads_here = bool(streams.ports or streams.files)
            client = self.client
            if client.factory.found_loop and self._may_come_from_here():
                self.dial = client.factory.clock.callLater(LOOP_PAUSE, self._look_again)
            else:
                self._connect()

    def _connect(self) -> None:
        """Dial by an endpoint of any kind."""
        made = _UpstreamFactory(self)
        done: Any = self.upstream.endpoint.connect(made)
        self.dial = done
        done.addBoth(made.let_go)
        done.addCallbacks(self._dialed, self.dial_failed)

    def failed(self, ending: Ending, detail: str = "") -> None:
        """See :meth:`Attempt.failed`."""
        factory = self.client.factory
        if not self.is_over:
            if factory.counts is not None:
                factory.counts.fail(self.upstream.name, ending, factory.now())
            if self.place is not None:
                self.place.failed(None if self.is_ours else ending, detail)
        Attempt.failed(self, ending, detail)

    def cancel(self) -> None:
        """See :meth:`Attempt.cancel`."""
        counts = self.client.factory.counts
        if not self.is_over:
            if counts is not None:
                counts.cancel(self.upstream.name)
            if self.place is not None:
                self.place.cancelled()
        Attempt.cancel(self)

    @property
    def awaits(self) -> str:
        """See :attr:`Attempt.awaits`."""
        return "TLS handshake" if self._shakes_hands else "connection"

    @property
    def _shakes_hands(self) -> bool:
        return isinstance(self.leg, EndpointLeg) and self.leg.waiting is not None

    def comes_on(self) -> bool:
        """See :meth:`Attempt.comes_on`: its TLS handshake has."""
        if self.leg is None or not self._shakes_hands:
            return False
        before, self._stage = self._stage, stage(self.leg.transport)
        return bool(self._stage != before)

    # -- ICaller

    def speaks_first(self) -> bool:
        """See :meth:`ICaller.speaks_first`: it is held, or in the kernel, or ours."""
        client = self.client
        if client.held is None and self.preamble is None:
            asked = getattr(client.transport, "has_unread", None)
            # What is limited is read as it is joined.
            paused = client.paused & ~ALLOWANCE
            if paused or asked is None or not asked():
                return False
            kind = client.upstream_leg if self.upstream.dials else client.endpoint_leg
            filtered = client.factory.filters or client.own_filters
            if filtered or not way_between(client, kind, kind, client.is_foreign):
                # What reads it for a program need not pass it on.
                return False
        self.holds_back = True
        return True

    def build_leg(self, addr: IAddress | None) -> UpstreamLeg:
        client = self.client
        leg: UpstreamLeg = client.upstream_leg(client.session.down)
        leg.attempt = self
        self.leg = leg
        return leg

    def build_endpoint_leg(self) -> EndpointLeg:
        """The same for a connection that may turn out to be TLS.

        An endpoint that tries several addresses may build more than one.
        """
        client = self.client
        leg: EndpointLeg = client.endpoint_leg(client.session.down)
        leg.attempt, leg.identity = self, self.upstream.identity
        if self.leg is not None:
            self._others += (self.leg,)
        self.leg = leg
        return leg

    def stop(self) -> None:
        """See :meth:`Attempt.stop`."""
        if self._others:
            self._answered_by(None)
        Attempt.stop(self)

    def _answered_by(self, protocol: object) -> None:
        """Of those that the endpoint was given, take the one that it answers with.

        The last one if it answers with a wrapper.  The others are of no use.
        """
        legs = (*self._others, self.leg)
        self._others = ()
        for leg in legs:
            if leg is protocol:
                self.leg = leg
        for leg in legs:
            if leg is not None and leg is not self.leg:
                leg.attempt = None
                leg.abort()
                if leg.held is not None:
                    leg.direction.keep(-len(leg.held))
                    leg.held = None

    def _dialed(self, protocol: object) -> None:
        """A foreign endpoint has connected, and may answer for a wrapper."""
        if self._others:
            self._answered_by(protocol)
        leg: Any = self.leg
        if leg is None:
            self.dial = None
            problem = TypeError(
                f"the endpoint connected {protocol!r}, not what it was given"
            )
            if not self.is_over:
                self.client.failed(Failure(problem))
            return
        if leg.alive:
            set_options(leg.transport)
            if is_self_connected(leg.transport):
                self.dial = None
                self.failed(Ending.CONNECT_REFUSED, "the connection was to itself")
                return
        if leg.handshake is not None:
            leg.waiting = self
            self.dial = None
            self.client.checks_left = EXTRA_CHECKS
            self.comes_on()
        elif leg.problem is not None:
            self.dial_failed(Failure(leg.problem))
        elif leg.identity is not None and not leg.verified:
            unsaid = HandshakeFailed("the endpoint's TLS, if any, can't be checked")
            self.dial_failed(Failure(unsaid))
        else:
            self.leg_connected(leg)

    # -- connections to this process

    def _is_here(self, there: Any) -> bool:
        """Whether an address is one on which this process listens, or may be.

        Many a relay and its server have the same port, on two machines.
        """
        if isinstance(there, UNIXAddress):
            return there.name is not None and streams.listens_at(there.name)
        if getattr(there, "port", 0) not in streams.ports:
            return False
        is_own = self.client.factory.is_own
        return bool(is_own(getattr(there, "host", "")))

    def _may_come_from_here(self) -> bool:
        """Whether the client may be another relay of this process."""
        host = host_of(self.client.session.peer)
        return not host or bool(self.client.factory.is_own(host))

    def _look_again(self) -> None:
        """The client's connection is noted by now, if it is a relay's."""
        self.dial = None
        try:
            if self.client.leads_back():
                self.failed(Ending.LOOP, LOOP_DETAIL)
            else:
                self._connect()
        except Exception:
            self.client.failed(Failure())

    def is_loop(self, leg: Leg) -> bool:
        """Note a connection to a port of this process; whether it has been here."""
        there = leg.transport.getPeer()
        here = self.anywhere or self._is_here(there)
        name = hop_of(leg.transport) if here else ""
        if not name:
            return False
        with lent_socket(leg.transport) as sock:
            self.client.note_hop(name, self.stamp(sock))
        found = self.client.leads_back()
        if found:
            self.client.factory.found_loop = True
        return found

    def dial_started(self, sock: socket.SocketType, address: Any) -> bool:
        """See :meth:`IHopListener.dial_started`."""
        if not self.leads_here:
            return False
        if not self.anywhere and not self.client.factory.is_own(address[0]):
            return False
        with suppress(OSError):  # over already
            self.client.note_hop(between(*ends_of(sock, address)), self.stamp(sock))
        return True


def hop_of(transport: Any) -> str:
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
