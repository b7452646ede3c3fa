"""One client of a stream relay, from accept to the end of its session.

:class:`StreamProtocol` is the client's leg and walks through the stages
(:mod:`relayd.core.stage`):

    accept -> gate -> (TLS, PROXY header) -> preludes -> decide -> dial -> Bridge

A relay is a subclass that decides, once the client has said what it has to say, which
server to dial.

While the server is dialled the client's bytes are kept (up to
:data:`relayd.stream.legs.HOLD_LIMIT`) and its connection is watched:

- a client that is gone (a reset) cancels the dial: at once while it is read, and at
  the next check if it has sent more than is kept, or ended its side;
- a client that ends its side with nothing sent has most likely left, but may be
  waiting for a server that speaks first: TCP looks the same.  The dial gets
  :data:`LEFT_GRACE` more seconds and is then cancelled;
- a client that ends its side after sending something waits for the answer: the
  dial goes on, and the end of data is passed on after the data.

With TLS a connection stands when its handshake is done (:mod:`relayd.net.tls`): a
client's has a deadline and nothing is dialled before; a server's is a part of the dial.
A PROXY header (:mod:`relayd.net.proxy_header`) is to a client what a handshake is.
"""

from __future__ import annotations

import itertools
from typing import Any

from twisted.internet import error
from twisted.internet.interfaces import IHandshakeListener, INegotiated
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.core.addresses import address_name, client_key, host_of
from relayd.core.errors import Refused
from relayd.core.hops import Hop, between, streams
from relayd.core.interfaces import ILease
from relayd.core.session import Ending, Session
from relayd.core.stage import Stage
from relayd.net.foreign_transports import keep_alive, note_listener, set_options
from relayd.net.proxy_header import names_address
from relayd.net.tcp_info import was_reset
from relayd.net.tls import notifies_handshake
from relayd.net.transports import KEEPALIVE_IS_INHERITED
from relayd.net.upstream import Upstream
from relayd.stream.attempt import EXTRA_CHECKS, LOOP_DETAIL, Attempt, UpstreamLeg
from relayd.stream.bridge import Bridge
from relayd.stream.handshake import ClientHandshake
from relayd.stream.legs import Leg
from relayd.stream.preludes import Pipeline
from relayd.stream.relay import StreamRelay
from relayd.stream.server_attempt import EndpointLeg, ServerAttempt

log = Logger(namespace="relayd.stream")

#: Seconds that a dial goes on for a client that ended its side with nothing sent.
LEFT_GRACE = 1.0

#: Seconds that a client gets to answer a polite close.
CLOSE_GRACE = 5.0

#: A deadline that never comes.
NEVER = float("inf")

# An enum's members cost a look-up by its metaclass each time (Python 3.11).
_DIALING, _RELAYING, _OVER = Stage.DIALING, Stage.RELAYING, Stage.OVER
_HANDSHAKE, _PRELUDE, _CLOSING = Stage.HANDSHAKE, Stage.PRELUDE, Stage.CLOSING
_ACCEPTED, _DECIDING = Stage.ACCEPTED, Stage.DECIDING
_DONE = Ending.DONE

_session_ids = itertools.count(1)


@implementer(IHandshakeListener)
class StreamProtocol(Leg):
    """The client's leg.

    Subclasses override :meth:`decide` and call :meth:`dial` from it, or later.

    :ivar is_foreign: its connection may be of a kind that is not ours.
    :ivar pending: what is under way before relaying, and can be cancelled: an
        :class:`relayd.stream.attempt.Attempt`, or the like.
    """

    factory: StreamRelay
    #: What the session is recorded in; subclasses may have more to record.
    record: type[Session] = Session
    #: What the server's connection is made: by endpoints of ours, and of others'.
    upstream_leg: type[UpstreamLeg] = UpstreamLeg
    endpoint_leg: type[EndpointLeg] = EndpointLeg
    #: The client is told in words that it is not served (:meth:`last_words`), and so a
    #: server's reset is not passed on before the two are joined.
    replies = False

    pending: Any = None
    #: A client that has most likely left has until then.
    _left_by = NEVER
    #: A TLS server that must have shown its certificate by the deadline, and of which
    #: nobody tells that it has.
    _unproven: Leg | None = None
    #: Connections to this process, by what they are called at both ends.
    _hops: dict[str, Hop] | None = None
    #: The wheel has seen to keepalive probes.
    _is_kept_alive = False
    #: Checks that a handshake has beyond its time.
    checks_left = EXTRA_CHECKS
    #: What the client's connection begins with, and what reads what it says then.
    _handshake: ClientHandshake | None = None
    preludes: Pipeline | None = None

    def __init__(self, factory: StreamRelay, client: str) -> None:
        session = self.session = self.record(
            next(_session_ids), client, "", factory.now(), factory.name, client
        )
        Leg.__init__(self, session.up)
        self.factory = factory
        self.is_foreign = True
        self.wheel_bucket: dict[Any, None] | None = None
        self._lease: ILease | None = None
        #: When this stage has had its time, on the factory's clock.
        self._deadline = 0.0

    # -- what a relay decides

    def decide(self, *said: Any) -> None:
        """The client may be served, and has said what it had to say.

        Call :meth:`dial`, now or later; :meth:`end` if there is no server for it.  The
        session is DECIDING until then, which has no deadline of its own.

        :param said: what each of the relay's preludes has read, in order.
        """
        raise NotImplementedError

    def last_words(self) -> bytes:
        """What to tell a client that is not served, before it is closed."""
        return b""

    # -- stages

    def enter(self, stage: Stage, limit: float | None = None) -> None:
        """Go on to a stage.

        :param limit: the seconds that it has, 0 for ever; unless given, those that are
            left of the stage before.
        :raises RuntimeError: it does not follow the one before.
        """
        session = self.session
        if not session.stage.leads_to & stage.bit:
            raise RuntimeError(f"a session can't go from {session.stage} to {stage}")
        session.stage = stage
        if limit is not None:
            self._deadline = self.factory.now() + limit if limit else NEVER

    def set_deadline(self, limit: float) -> None:
        """Give this stage so many seconds from now; 0 is for ever."""
        self._deadline = self.factory.now() + limit if limit else NEVER

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
                self._refuse_client(Ending.LOOP, LOOP_DETAIL)
                return
            self.connectionMade()
            if factory.gate is not None:
                self._lease = factory.gate.enter(session)
        except Refused as refusal:
            self._refuse_client(Ending.REFUSED, refusal.why)
            return
        except Exception:
            log.failure("session {id} could not be opened", id=session.id)
            self._refuse_client(Ending.FAILED, "could not be opened")
            return
        session.ordinal = next(factory.ordinals)
        factory.wheel.add(self)
        factory.observer.opened(session)
        if session.ending is not None:
            # An observer has ended it.
            return
        try:
            if handshake is not None or factory.preludes:
                self._begin(handshake)
            else:
                self.decide()
                if session.stage is _ACCEPTED:
                    self.enter(_DECIDING)
        except Exception:
            self.failed(Failure())

    def _begin(self, handshake: ClientHandshake | None) -> None:
        """The client was let in, and has to do something before it is relayed."""
        session, factory = self.session, self.factory
        limit = factory.timeouts.handshake
        # Of a handshake and of the preludes: together they have one deadline.
        self._deadline = session.opened_at + limit if limit else NEVER
        if handshake is not None:
            self._handshake = handshake
            self.enter(_HANDSHAKE)
        else:
            self._listen_to_preludes()
        self._enter_queue(host_of(session.peer))

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

    def handshakeCompleted(self) -> None:
        """See `IHandshakeListener`; the PROXY header is read, likewise."""
        session = self.session
        if session.stage is not _HANDSHAKE:
            return
        try:
            handshake = self._handshake
            has_header = handshake is not None and handshake.header is not None
            if has_header and not self._learn_client():
                return
            if self.factory.preludes:
                self._listen_to_preludes()
            else:
                self.decide()
                if session.stage is _HANDSHAKE:
                    self.enter(_DECIDING)
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
        if self.factory.preludes and client != session.peer:
            # Its balancer's until now, of which all clients would share one limit.
            self.leave_queue()
            self._enter_queue(host)
        return True

    def _refuse_client(self, ending: Ending, why: str) -> None:
        """Reset a client that was not let in; it never becomes a living session."""
        session, factory = self.session, self.factory
        session.ending, session.detail = ending, why
        session.ended_at = factory.now()
        self.enter(_OVER)
        factory.endings[ending.word] += 1
        factory.observer.refused(session, why)
        self.abort()

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
        self.enter(_DIALING, factory.timeouts.connect)
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
        factory.observer.connected(session)
        if session.ending is not None:
            # An observer has ended it.
            leg.abort()
            return
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
        bridge = Bridge(
            self.session, self, leg, factory.timeouts, factory.clock, self._over
        )
        bridge.start(self.is_foreign)

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

    # -- the client's side before the Bridge

    def ended_alone(self) -> None:
        preludes = self.preludes
        if preludes is not None and self.session.stage is _PRELUDE:
            unread = preludes.unread
            said = f"in the middle of its {preludes.name}" if unread else "said nothing"
            self.end(Ending.CLIENT_LEFT, said)
        else:
            self.may_have_left()

    def may_have_left(self) -> None:
        """The client has ended its side: it has left, unless it has sent something."""
        if not self.direction.read:
            self._left_by = self.factory.now() + LEFT_GRACE

    def lost_alone(self, reason: Failure) -> None:
        session = self.session
        if session.ended_at is None:
            if session.ending is None:
                session.ending = Ending.CLIENT_LEFT
                if self._handshake is not None and session.stage is _HANDSHAKE:
                    session.ending, session.detail = self._handshake.judge(reason)
            self.stop_waiting()
            self._over()

    def stop_waiting(self) -> None:
        """Cancel what is under way."""
        self.leave_queue()
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.cancel()

    def leave_queue(self) -> None:
        """Its handshake and preludes are done: leave the queue of those who wait."""
        if self.factory.handshakes is not None:
            self.factory.handshakes.discard(self)

    # -- endings

    def end(self, ending: Ending, detail: str = "") -> None:
        """End a session: close the client politely, unless it is relayed already."""
        session = self.session
        if session.stage is _CLOSING or session.stage is _OVER:
            return
        if self.bridge is not None:
            self.bridge.abort(ending, detail)
            return
        # In the middle of a handshake nothing can be said.
        words = b"" if session.stage is _HANDSHAKE else self.last_words()
        session.ending, session.detail = ending, detail
        self.stop_waiting()
        # TLS waits for the client's own goodbye, which may never come.
        self.enter(_CLOSING, CLOSE_GRACE)
        self.reader = self._drop
        if words:
            self.transport.write(words)
        self.transport.loseConnection()

    def _drop(self, data: bytes) -> None:
        """What a client sends while it is closed is neither kept nor relayed."""
        self.direction.read -= len(data)

    def abort_session(self, ending: Ending, detail: str = "") -> None:
        """End the session now, whatever its stage: reset what is connected."""
        if self.bridge is not None:
            self.bridge.abort(ending, detail)
            return
        session = self.session
        if session.ending is None:
            session.ending, session.detail = ending, detail
        self.stop_waiting()
        if session.stage.leads_to & _CLOSING.bit:
            self.enter(_CLOSING, CLOSE_GRACE)
        self.abort()

    def failed(self, reason: Failure) -> None:
        """A defect, ours or of what is plugged in: end the session."""
        log.failure("session {id} failed", reason, id=self.session.id)
        self.abort_session(Ending.FAILED, repr(reason.value))

    def _over(self) -> None:
        session, factory = self.session, self.factory
        session.ended_at = factory.now()
        # From whichever stage it was: `enter` has nothing to refuse.
        session.stage = _OVER
        if self.reader is not None:
            # They hold each other.
            self.reader = self.preludes = None
        factory.wheel.discard(self)
        if self._lease is not None:
            lease, self._lease = self._lease, None
            try:
                lease.release()
            except Exception:
                log.failure("the lease of session {id} failed", id=session.id)
        if self._hops is not None:
            for name, hop in self._hops.items():
                streams.is_over(name, hop)
        ending = session.ending
        if ending is not None and ending is not _DONE:
            factory.endings[ending.word] += 1
        factory.observer.closed(session)
        if factory.registry.draining:
            factory.registry.check()

    # -- the wheel

    def check(self, now: float) -> None:
        """Check the deadline of whichever stage this is."""
        bridge, session = self.bridge, self.session
        if session.ending is not None:
            # A transport that is not ours has told nobody of a loss, or an override of
            # `connectionLost` below it (TLS, a wrapper) has kept that to itself.
            legs = (self,) if bridge is None else (self, bridge.upstream)
            for leg in legs:
                if leg.outlives_abort():
                    leg.lost_anyway(Failure(error.ConnectionAborted()))
            if session.stage is _OVER:
                return
        if bridge is not None:
            self._check_relaying(bridge, now)
        elif session.stage is _CLOSING:
            if now >= self._deadline:
                self.abort()
        elif (self.paused or self.direction.eof) and was_reset(self.transport):
            # It is not read, so nobody hears of its reset.
            self.abort_session(Ending.CLIENT_LEFT)
        elif now >= self._left_by:
            self.end(Ending.CLIENT_LEFT, "the client ended its side, unanswered")
        elif now < self._deadline:
            self._comes_on()
        elif self._comes_on() and self.checks_left:
            self.checks_left -= 1
        else:
            self.overdue()

    def _check_relaying(self, bridge: Bridge, now: float) -> None:
        if not self._is_kept_alive:
            self._keep_alive(bridge)
        if self._unproven is not None and now >= self._deadline:
            leg, self._unproven = self._unproven, None
            if leg.alive and leg.transport.getPeerCertificate() is None:
                self.abort_session(Ending.CONNECT_TIMEOUT, "no TLS handshake in time")
                return
        bridge.check(now)

    def _comes_on(self) -> bool:
        """Whether a handshake, the client's or the server's, has moved since."""
        stage = self.session.stage
        if stage is _DIALING:
            # Without one, another dial is to follow one that failed.
            pending = self.pending
            return pending is not None and bool(pending.comes_on())
        handshake = self._handshake
        return handshake is not None and stage is _HANDSHAKE and handshake.comes_on()

    def _keep_alive(self, bridge: Bridge) -> None:
        self._is_kept_alive = True
        if bridge.upstream.alive:
            keep_alive(bridge.upstream.transport)
        # A listener of ours has passed its options on.
        if self.alive and (self.is_foreign or not KEEPALIVE_IS_INHERITED):
            keep_alive(self.transport)

    def overdue(self) -> None:
        """The stage before the Bridge has had its time."""
        limit = self.factory.timeouts.handshake
        stage = self.session.stage
        if stage is _HANDSHAKE and self._handshake is not None:
            self.end(
                Ending.HANDSHAKE_TIMEOUT, f"no {self._handshake.name} in {limit:g} s"
            )
        elif stage is _PRELUDE and self.preludes is not None:
            self.end(
                Ending.HANDSHAKE_TIMEOUT, f"no {self.preludes.name} in {limit:g} s"
            )
        elif self.pending is not None:
            self.pending.overdue()

    def check_failed(self) -> None:
        """`check` raised: end the session."""
        self.abort_session(Ending.FAILED, "its deadlines could not be checked")
