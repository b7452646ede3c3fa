"""One client of a stream relay, from accept to the end of its session.

:class:`StreamProtocol` is the client's leg and walks through the stages
(:mod:`relayd.core.stage`):

    accept -> (PROXY header) -> gate -> (TLS) -> preludes -> decide -> dial -> Bridge

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

A peer that the relay trusts to speak for others (`StreamRelay.introduction`) says first
whose connection it is.  It is trusted by its own address; the gate, limits and the log
see the client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.interfaces import IHandshakeListener
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.core import pauses
from relayd.core.addresses import client_key, host_of
from relayd.core.errors import Refused
from relayd.core.hops import streams
from relayd.core.interfaces import ILease
from relayd.core.leases import LATER, checked
from relayd.core.prelude import Introduction, Prelude
from relayd.core.session import Ending
from relayd.core.stage import Stage
from relayd.net.foreign_transports import note_listener, set_options
from relayd.net.handshake_ack import go_on
from relayd.net.upstream import Upstream
from relayd.stream.admission import Admission
from relayd.stream.attempt import LOOP_DETAIL, RESETS, Attempt, UpstreamLeg
from relayd.stream.handshake import ClientHandshake
from relayd.stream.legs import Leg
from relayd.stream.preludes import Pipeline
from relayd.stream.redial import Redialing
from relayd.stream.server_attempt import EndpointLeg, ServerAttempt
from relayd.stream.watches import watch_certificate

log = Logger(namespace="relayd.stream")

# An enum's members cost a look-up by its metaclass each time (Python 3.11).
_DIALING, _RELAYING, _OVER = Stage.DIALING, Stage.RELAYING, Stage.OVER
_HANDSHAKE, _PRELUDE, _DECIDING = Stage.HANDSHAKE, Stage.PRELUDE, Stage.DECIDING
_HEADER = Stage.HEADER


@implementer(IHandshakeListener)
class StreamProtocol(Redialing):
    """The client's leg.

    Subclasses override :meth:`decide` and call :meth:`dial` from it, or later.
    """

    #: The servers that it has tried in vain.
    tried: tuple[Upstream, ...] = ()
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
        self.alive = True
        if self.paused:
            transport.pauseProducing()
        factory, session = self.factory, self.session
        handshake = None
        try:
            if self.is_foreign:
                set_options(transport)
                note_listener(transport.getHost())
                handshake = ClientHandshake.of(transport)
            session.listener = (
                self.asked_for(transport)
                if factory.translated
                else factory.host_name(transport.getHost())
            )
            if (streams.hops or streams.past) and self.leads_back():
                self.refuse_client(Ending.LOOP, LOOP_DETAIL)
                return
            self.connectionMade()
            introduction = factory.introduction
            if introduction is not None and session.peer in introduction.peers:
                self._await_header(introduction, handshake)
                return
        except Exception:
            self._not_opened()
            return
        self._admit(handshake)

    def _await_header(
        self, introduction: Introduction, handshake: ClientHandshake | None
    ) -> None:
        """The peer is to say whose connection this is."""
        if handshake is not None:
            late = "a PROXY header comes before TLS, which this listener ends"
            self.refuse_client(Ending.FAILED, late)
            return
        self._limit_handshake(self.session.opened_at)
        self._listen(_HEADER, (introduction.prelude,), self._introduced)
        self.factory.wheel.add(self)
        self._enter_queue(host_of(self.session.peer))

    def _introduced(self, header: Any) -> None:
        """The header was read: ask the gate for the client."""
        session = self.session
        session.header = header
        # Its balancer did, and may ask only whether we are here.
        session.spoke = False
        if header.source:
            session.client = header.source
        # Its balancer's until now, of which all clients would share one limit.
        self.leave_queue()
        self._admit(None)

    def _admit(self, handshake: ClientHandshake | None) -> None:
        """Ask the gate.  A client that is admitted goes on."""
        factory, session = self.factory, self.session
        try:
            if factory.gate is not None:
                answer = factory.gate.enter(session)
                if isinstance(answer, LATER):
                    self._handshake = handshake
                    self.pending = Admission(self, answer)
                    self.pending.start()
                    return
                self._lease = checked(answer)
                if factory.registry.draining and session.ending is None:
                    # The gate has begun a drain, which does not know of this client.
                    self.release_lease()
                    self.refuse_client(Ending.DRAINED, "before it was admitted")
                    return
        except Refused as refusal:
            self.refuse_client(Ending.REFUSED, refusal.why, refusal.reason)
            return
        except Exception:
            self._not_opened()
            return
        if session.ending is not None:
            # The gate has ended it.
            if session.ended_at is not None:
                self.release_lease()
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
        if factory.bandwidth is not None:
            self.limit_bytes(factory.bandwidth)
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
            handshake = None
        self.admitted(handshake, self.factory.now())
        # It is read now, in whichever stage it is.
        self.resume(pauses.WAITING)

    def _begin(self, handshake: ClientHandshake | None, now: float) -> None:
        """The client was let in, and has to do something before it is relayed."""
        self._limit_handshake(now)
        if handshake is not None:
            self._handshake = handshake
            self.enter(_HANDSHAKE)
        else:
            self._listen(_PRELUDE, self.factory.preludes, self.ask_decision)
        self._enter_queue(host_of(self.session.client))
        if self.held is not None:
            self._read_held()

    def _limit_handshake(self, now: float) -> None:
        """The header, the TLS handshake and the preludes have one deadline together."""
        self.set_deadline(self.factory.timeouts.handshake, now)

    def _enter_queue(self, host: str) -> None:
        """Wait with the others in a handshake; it counts for the client at `host`."""
        queue = self.factory.handshakes
        if queue is not None:
            gone = queue.push(self, client_key(host))
            if gone is not None:
                gone.end(Ending.EVICTED, "evicted for a new client")

    def _listen(
        self, stage: Stage, preludes: Sequence[Prelude], then: Callable[..., object]
    ) -> None:
        """Read preludes.

        :param then: called with what they say.
        """
        self.enter(stage)
        self.preludes = Pipeline(self, preludes, then)
        self.reader = self.preludes.feed

    def _read_held(self) -> None:
        """Give the preludes what was read before them.

        It came with the header; or the transport can't be paused, and so was read while
        the client waited.
        """
        reader, held = self.reader, self.held
        if reader is not None and held is not None:
            self.held = None
            self.direction.keep(-len(held))
            self.resume(pauses.HOLDING)
            reader(bytes(held))

    def handshakeCompleted(self) -> None:
        """See `IHandshakeListener`."""
        if self.session.stage is not _HANDSHAKE:
            if self._handshake is not None:
                # It could not be kept waiting.
                self._handshake.is_done = True
            return
        try:
            if self.factory.preludes:
                self._listen(_PRELUDE, self.factory.preludes, self.ask_decision)
                if self.held is not None:
                    self._read_held()
            else:
                self.ask_decision()
        except Exception:
            self.failed(Failure())

    def _not_opened(self) -> None:
        """Called in an `except`: what is plugged in has failed, before it is let in."""
        self.factory.log_failure("could not be opened", self.session, Failure())
        self.refuse_client(Ending.FAILED, "could not be opened")

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
        self.reader = self.preludes = None
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
        limit, retries = factory.timeouts.connect, factory.retries
        if retries and (session.attempts or not 0 < limit <= retries.dial_timeout):
            limit = retries.limit(self, limit)
        self.begin_attempt(_DIALING, limit)
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
        preamble = attempt.preamble
        if preamble is not None:
            self.write_preamble(leg, preamble(session))
        if attempt.holds_back:
            self._speak_first(leg, preamble is not None)
        else:
            self.relay(leg)
        if leg.spliced:
            # Not needed any more: thousands of idle sessions would keep it.
            self._deadline = 0.0
        else:
            watch_certificate(self, leg, self._deadline)

    def attempt_failed(self, attempt: Attempt) -> None:
        """There is no server's connection: try another, or tell the client.

        Or it was reset at once (:mod:`relayd.stream.redial`).
        """
        self.pending = None
        if self.session.ending is not None or attempt.ending is None:
            # Cancelled by us, or too late to matter.
            return
        retries = self.factory.retries
        if retries is None or not retries.again(self, attempt):
            self.end_unserved(attempt)

    def end_unserved(self, attempt: Attempt) -> None:
        """The client is told in the same way as its attempt has failed."""
        ending = attempt.ending
        if ending is None:
            return
        if ending in RESETS and not self.replies:
            self.abort_session(ending, attempt.detail)
        else:
            self.end(ending, attempt.detail)

    def relay(self, leg: Leg) -> None:
        """Join the server's connection to the client's."""
        factory = self.factory
        self.enter(_RELAYING)
        kind = self.own_bridge or factory.bridge
        bridge = kind(self.session, self, leg, factory.timeouts, factory.clock)
        if self._limits is None:
            bridge.start(self.is_foreign)
        else:
            self.keep_pace(leg, bridge)

    def _speak_first(self, leg: Leg, spoken: bool) -> None:
        """Relay; the first bytes take the ACK of the server's connection along.

        :param spoken: they were sent.
        """
        spoken = spoken or self.held is not None
        self.relay(leg)
        if spoken or not self.alive:
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
