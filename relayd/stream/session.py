"""One client of a stream relay, from accept to the end of its session.

:class:`StreamProtocol` is the client's leg and walks through the stages
(:mod:`relayd.core.stage`):

    accept -> gate -> (TLS, PROXY header) -> preludes -> decide -> dial -> Bridge

A gate may take its time: the client is WAITING then, and nothing is read from it
(:mod:`relayd.stream.admission`).  A relay is a subclass that decides, once the client
has said what it has to say, which server to dial.

While the server is dialled the client's bytes are kept (up to
:data:`relayd.stream.legs.HOLD_LIMIT`) and its connection is watched:

- a client that is gone (a reset) cancels the dial: at once while it is read, and at
  the next check if it has sent more than is kept, or ended its side;
- a client that ends its side with nothing sent has most likely left, but may be
  waiting for a server that speaks first: TCP looks the same.  The dial gets
  :data:`relayd.stream.lifecycle.LEFT_GRACE` more seconds and is then cancelled;
- a client that ends its side after sending something waits for the answer: the
  dial goes on, and the end of data is passed on after the data.

With TLS a connection stands when its handshake is done (:mod:`relayd.net.tls`): a
client's has a deadline and nothing is dialled before; a server's is a part of the dial.
A PROXY header (:mod:`relayd.net.proxy_header`) is to a client what a handshake is.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import IHandshakeListener, INegotiated
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.core import pauses
from relayd.core.addresses import address_name, client_key, host_of
from relayd.core.errors import Refused
from relayd.core.hops import between, streams
from relayd.core.interfaces import ILease
from relayd.core.leases import LATER
from relayd.core.session import Ending
from relayd.core.stage import Stage
from relayd.net.foreign_transports import note_listener, set_options
from relayd.net.handshake_ack import go_on
from relayd.net.proxy_header import names_address
from relayd.net.tls import notifies_handshake
from relayd.net.upstream import Upstream
from relayd.stream.admission import Admission
from relayd.stream.attempt import LOOP_DETAIL, Attempt, UpstreamLeg
from relayd.stream.bridge import Bridge
from relayd.stream.handshake import ClientHandshake
from relayd.stream.legs import Leg
from relayd.stream.lifecycle import NEVER, Lifecycle
from relayd.stream.preludes import Pipeline
from relayd.stream.server_attempt import EndpointLeg, ServerAttempt

log = Logger(namespace="relayd.stream")

# An enum's members cost a look-up by its metaclass each time (Python 3.11).
_DIALING, _RELAYING, _OVER = Stage.DIALING, Stage.RELAYING, Stage.OVER
_HANDSHAKE, _PRELUDE, _DECIDING = Stage.HANDSHAKE, Stage.PRELUDE, Stage.DECIDING


@implementer(IHandshakeListener)
class StreamProtocol(Lifecycle):
    """The client's leg.

    Subclasses override :meth:`decide` and call :meth:`dial` from it, or later.
    """

    #: What the server's connection is made: by endpoints of ours, and of others'.
    upstream_leg: type[UpstreamLeg] = UpstreamLeg
    endpoint_leg: type[EndpointLeg] = EndpointLeg

    # -- what a relay decides

    def decide(self, *said: Any) -> None:
        """The client may be served, and has said what it had to say.

        Call :meth:`dial`, now or later; :meth:`end` if there is no server for it.  The
        session is DECIDING until then, which has no deadline of its own.

        :param said: what each of the relay's preludes has read, in order.
        """
        raise NotImplementedError

    def ask_decision(self, *said: Any) -> None:
        """Call :meth:`decide`; what takes its time is a stage of its own."""
        before = self.session.stage
        self.decide(*said)
        if self.session.stage is before:
            self.enter(_DECIDING)

    # -- stages

    def makeConnection(self, transport: Any) -> None:
        # As Leg's: see there.
        self.transport = transport
        self.connected = 1
        self.alive = True
        if self.paused:
            transport.pauseProducing()
        factory, session = self.factory, self.session
        handshake = None
        try:
            if self.is_foreign:
                set_options(transport)
                note_listener(transport.getHost())
                handshake = ClientHandshake.of(transport, self.handshakeCompleted)
            session.listener = factory.host_name(transport.getHost())
            if (streams.hops or streams.past) and self.leads_back():
                self.refuse_client(Ending.LOOP, LOOP_DETAIL)
                return
            self.connectionMade()
            if factory.gate is not None:
                answer = factory.gate.enter(session)
                if isinstance(answer, LATER):
                    self._handshake = handshake
                    self.pending = Admission(self, answer)
                    self.pending.start()
                    return
                self._lease = answer
        except Refused as refusal:
            self.refuse_client(Ending.REFUSED, refusal.why, refusal.reason)
            return
        except Exception:
            log.failure("session {id} could not be opened", id=session.id)
            self.refuse_client(Ending.FAILED, "could not be opened")
            return
        factory.wheel.add(self)
        self.admitted(handshake, session.opened_at)

    def admitted(self, handshake: ClientHandshake | None, now: float) -> None:
        """The client is served.

        :param handshake: what its connection begins with, if that is not done.
        :param now: when its handshake and its preludes begin.
        """
        factory, session = self.factory, self.session
        session.ordinal = next(factory.ordinals)
        factory.observer.opened(session)
        if session.ending is not None:
            # An observer has ended it.
            return
        try:
            if handshake is not None or factory.preludes:
                self._begin(handshake, now)
            else:
                self.ask_decision()
        except Exception:
            self.failed(Failure())

    def take_lease(self, lease: ILease) -> None:
        """The gate has admitted a client that was WAITING."""
        self._lease = lease
        handshake = self._handshake
        if handshake is not None and handshake.is_done:
            if handshake.header is None or self._learn_client():
                self.admitted(None, self.factory.now())
        else:
            self.admitted(handshake, self.factory.now())
        # It is read now, in whichever stage it is.
        self.resume(pauses.WAITING)

    def _begin(self, handshake: ClientHandshake | None, now: float) -> None:
        """The client was let in, and has to do something before it is relayed."""
        session, factory = self.session, self.factory
        limit = factory.timeouts.handshake
        # Of a handshake and of the preludes: together they have one deadline.
        self._deadline = now + limit if limit else NEVER
        if handshake is not None:
            self._handshake = handshake
            self.enter(_HANDSHAKE)
        else:
            self._listen_to_preludes()
        self._enter_queue(host_of(session.client))

    def _enter_queue(self, host: str) -> None:
        """Wait with the others in a handshake; it counts for the client at `host`."""
        queue = self.factory.handshakes
        if queue is not None:
            gone = queue.push(self, client_key(host))
            if gone is not None:
                gone.end(Ending.EVICTED, "evicted for a new client's handshake")

    def _listen_to_preludes(self) -> None:
        self.enter(_PRELUDE)
        self.preludes = Pipeline(self, self.factory.preludes)
        self.reader = self.preludes.feed
        if self.held is not None:
            # Its transport can't be paused, and so was read while it waited.
            held, self.held = self.held, None
            self.reader(bytes(held))

    def handshakeCompleted(self) -> None:
        """See `IHandshakeListener`; the PROXY header is read, likewise."""
        session, handshake = self.session, self._handshake
        if session.stage is not _HANDSHAKE:
            if handshake is not None:
                # It could not be kept waiting.
                handshake.is_done = True
            return
        try:
            has_header = handshake is not None and handshake.header is not None
            if has_header and not self._learn_client():
                return
            if self.factory.preludes:
                self._listen_to_preludes()
            else:
                self.ask_decision()
        except Exception:
            self.failed(Failure())

    def _learn_client(self) -> bool:
        """The PROXY header names the client; whether it can be one."""
        session, transport = self.session, self.transport
        source = transport.getPeer()
        client = address_name(source)
        host = host_of(client)
        if not (names_address(source) and names_address(transport.getHost())):
            self.end(Ending.BAD_REQUEST, "its PROXY header names no address")
            return False
        session.client = client
        queued = self.factory.preludes and session.stage is _HANDSHAKE
        if queued and client != session.peer:
            # Its balancer's until now, of which all clients would share one limit.
            self.leave_queue()
            self._enter_queue(host)
        return True

    def refuse_client(self, ending: Ending, why: str, reason: str = "") -> None:
        """Reset a client that is not admitted; it never becomes a living session.

        :param reason: the gate's word for it; empty if no gate has refused it.
        """
        session, factory = self.session, self.factory
        session.ending, session.detail = ending, why
        if reason:
            session.reason, session.detail = reason, f"{reason}: {why}"
            factory.refusals[reason] += 1
        session.ended_at = factory.now()
        self.enter(_OVER)
        factory.wheel.discard(self)
        factory.endings[ending.word] += 1
        if factory.counts is not None:
            factory.counts.refuse(reason or ending.word)
        factory.observer.refused(session, why)
        self.abort()
        if factory.registry.draining:
            factory.registry.check()

    def dial(self, upstream: Upstream | None) -> None:
        """Connect to `upstream` and relay; None ends the session.

        Does nothing if the session has ended meanwhile.
        """
        session, factory = self.session, self.factory
        if session.ending is not None:
            return
        if upstream is None:
            self.end(Ending.NO_UPSTREAM)
            return
        if factory.handshakes is not None:
            factory.handshakes.discard(self)
        session.server, session.upstream = upstream, upstream.name
        self.begin_attempt(_DIALING, factory.timeouts.connect)
        if self.direction.eof:
            self.may_have_left()
        factory.observer.dialing(session)
        if session.ending is not None:
            # An observer has ended it.
            return
        attempt = self.pending = ServerAttempt(self, upstream)
        attempt.start()

    def attempt_connected(self, attempt: Attempt, leg: Leg) -> None:
        """The server's connection stands."""
        session, factory = self.session, self.factory
        self.pending = None
        session.connected_at = factory.now()
        if factory.counts is not None:
            factory.counts.connect(session)
        factory.observer.connected(session)
        if session.ending is not None:
            # An observer has ended it.
            leg.abort()
            return
        if attempt.holds_back:
            self._speak_first(leg)
        else:
            self.relay(leg)
        if leg.spliced:
            # Not needed any more: thousands of idle sessions would keep it.
            self._deadline = 0.0
        elif INegotiated.providedBy(leg.transport) and not notifies_handshake(
            leg.transport
        ):
            # TLS below a wrapper: connected, but maybe not yet with a server.
            self._unproven = leg

    def attempt_failed(self, attempt: Attempt) -> None:
        """There is no server's connection: the client is told in the same way."""
        self.pending = None
        ending = attempt.ending
        if self.session.ending is not None or ending is None:
            # Cancelled by us, or too late to matter.
            return
        if ending is Ending.UPSTREAM_RESET and not self.replies:
            self.abort_session(ending, attempt.detail)
        else:
            self.end(ending, attempt.detail)

    def relay(self, leg: Leg) -> None:
        """Join the server's connection to the client's."""
        factory = self.factory
        self.enter(_RELAYING)
        bridge = Bridge(self.session, self, leg, factory.timeouts, factory.clock)
        bridge.start(self.is_foreign)

    def _speak_first(self, leg: Leg) -> None:
        """Relay; the first bytes take the ACK of the server's connection along."""
        held = self.held is not None
        self.relay(leg)
        if held or not self.alive:
            self._has_spoken()
        else:
            self.transport.relay_soon(self._has_spoken)

    def _has_spoken(self) -> None:
        """The first bytes were sent, or there were none."""
        bridge = self.bridge
        if bridge is not None and bridge.upstream.alive:
            transport = bridge.upstream.transport
            if getattr(transport, "options_are_set", False):
                go_on(transport.getHandle())

    # -- connections to this process

    @property
    def _hop(self) -> str:
        """What the client's connection is, if it is another relay's of this process."""
        return between(self.session.peer, self.session.listener)

    def leads_back(self) -> bool:
        """Whether this relay is on the way by which the client came."""
        return streams.is_loop(self._hop, self.factory)

    def note_hop(self, name: str) -> None:
        """A connection to this process was made; kept until the session is over."""
        if self._hops is None:
            self._hops = {}
        if name not in self._hops:
            self._hops[name] = streams.add(name, self.factory, self._hop)
