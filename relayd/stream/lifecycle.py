"""The life of a stream session: its stage, its deadlines, and how it ends.

:class:`Lifecycle` is what every client's leg has, whatever its relay does: the one way
from stage to stage, the deadline of each, checks by the wheel, the polite end of a
session that is not relayed, its abort, and what is done once when it is over.  The way
from the accept to the Bridge is :class:`relayd.stream.session.StreamProtocol`'s.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from twisted.internet import error
from twisted.logger import Logger
from twisted.python.failure import Failure

from relayd.core.hops import streams
from relayd.core.interfaces import ILease
from relayd.core.leases import FREE, give_back
from relayd.core.observers import shown
from relayd.core.pauses import ALLOWANCE
from relayd.core.session import Ending, PacedDirection, Session
from relayd.core.stage import NEXT, Stage
from relayd.net.foreign_transports import keep_alive
from relayd.net.keepalive import KEEPALIVE, KEEPALIVE_IS_INHERITED
from relayd.net.tcp_info import ended_unread, was_reset
from relayd.stream.admission import has_left
from relayd.stream.attempt import EXTRA_CHECKS
from relayd.stream.bridge import Bridge
from relayd.stream.deadlines import CLOSE_GRACE
from relayd.stream.handshake import ClientHandshake
from relayd.stream.legs import HOLD_LIMIT, Leg
from relayd.stream.loops import LoopGuard
from relayd.stream.losses import tell_server
from relayd.stream.preludes import Pipeline
from relayd.stream.relay import Bandwidth, Lifetime, StreamRelay
from relayd.stream.retries import NEVER

log = Logger(namespace="relayd.stream")

#: Seconds that a dial goes on for a client that ended its side with nothing sent.
LEFT_GRACE = 1.0

# An enum's members cost a look-up by its metaclass each time (Python 3.11).
_DIALING, _OVER, _HANDSHAKE = Stage.DIALING, Stage.OVER, Stage.HANDSHAKE
_HEADER, _CLOSING, _WAITING = Stage.HEADER, Stage.CLOSING, Stage.WAITING
_MUTE = (_HANDSHAKE, _HEADER, _WAITING)
_DONE = Ending.DONE

_session_ids = itertools.count(1)


class Lifecycle(LoopGuard):
    """A client's leg, and the session that lives as long.

    :ivar is_foreign: its connection may be of a kind that is not ours.
    :ivar pending: what is under way before relaying, and can be cancelled: an
        :class:`relayd.stream.attempt.Attempt`, or the like.
    """

    factory: StreamRelay
    #: What the session is recorded in; subclasses may have more to record.
    record: type[Session] = Session
    #: The client is told in words that it is not served (:meth:`last_words`), and so a
    #: server's reset is not passed on before the two are joined.
    replies = False

    pending: Any = None
    _lease: ILease | None = None
    #: Its server, if that counts its sessions, once it is connected.
    place: Any = None
    #: A client that has most likely left has until then.
    _left_by = NEVER
    #: What is asked at each check while it is relayed (:mod:`relayd.stream.watches`):
    watches: tuple[Callable[[Any, float], bool], ...] = ()
    #: about a TLS server that must have shown its certificate by then, and of which
    #: nobody tells that it has; and about how long this session alone may last.
    unproven: tuple[Leg, float] | None = None
    own_lifetime: Lifetime | None = None
    #: Checks that a handshake has beyond its time.
    checks_left = EXTRA_CHECKS
    #: What limits its bytes, if anything does.
    _limits: ILease | None = None
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
        #: When this stage has had its time, on the factory's clock.
        self._deadline = 0.0

    # -- stages

    def enter(self, stage: Stage, limit: float | None = None) -> None:
        """Go on to a stage.

        :param limit: the seconds that it has, 0 for ever; unless given, those that are
            left of the stage before.
        :raises RuntimeError: it does not follow the one before.
        """
        session = self.session
        if stage not in NEXT[session.stage]:
            raise RuntimeError(f"a session can't go from {session.stage} to {stage}")
        session.stage = stage
        if limit is not None:
            self._deadline = self.factory.now() + limit if limit else NEVER

    def begin_attempt(self, stage: Stage, limit: float) -> None:
        """Go on to a stage in which a server is dialled, or a peer awaited.

        :param limit: the seconds that it has, 0 for ever.
        """
        self.enter(stage)
        now = self.factory.now()
        self.session.begin_attempt(now)
        self._deadline = now + limit if limit else NEVER
        if self._limits is not None:
            self._keep_little()

    @property
    def time_had(self) -> float:
        """The seconds that the attempt under way may take."""
        began: float = self.session.dialed_at or 0.0
        return round(self._deadline - began, 3)

    def _keep_little(self) -> None:
        """Until there is a server, don't read what would then be sent at once."""
        pace = self.direction.pace
        if pace is not None and pace.quantum < HOLD_LIMIT:
            self.pause(ALLOWANCE)

    def limit_bytes(self, bandwidth: Bandwidth) -> None:
        """From now on, what it may read and write is limited."""
        session = self.session
        session.up = self.direction = PacedDirection(session.up)
        session.down = PacedDirection(session.down)
        self._limits = bandwidth.enter(session)
        # Both are given back together: one question less for who has neither.
        self._lease = self._lease or FREE

    def keep_pace(self, leg: Leg, bridge: Bridge) -> None:
        """Start relaying; both are read as fast as they may be."""
        paced = [each for each in (self, leg) if each.direction.pace is not None]
        for each in paced:
            each.direction.pace.follow(each)  # type: ignore[union-attr]
        self.resume(ALLOWANCE)
        bridge.start(self.is_foreign)
        for each in paced:
            if each.spliced:
                each.transport.keep_pace(each.direction)

    def set_deadline(self, limit: float, since: float | None = None) -> None:
        """Give this stage so many seconds, 0 for ever, from now or since then."""
        now = self.factory.now() if since is None else since
        self._deadline = now + limit if limit else NEVER

    # -- the client's side before the Bridge

    def ended_alone(self) -> None:
        preludes = self.preludes
        if preludes is not None:
            unread = preludes.unread
            said = f"in the middle of its {preludes.name}" if unread else "said nothing"
            self.end(Ending.CLIENT_LEFT, said)
        else:
            self.may_have_left()

    def may_have_left(self) -> None:
        """The client has ended its side: it has left, unless it has sent something."""
        if not self.direction.read and self._left_by == NEVER:
            self._left_by = self.factory.now() + LEFT_GRACE

    def lost_alone(self, reason: Failure) -> None:
        session = self.session
        if session.ended_at is None:
            if session.ending is None:
                session.ending = Ending.CLIENT_LEFT
                if self._handshake is not None and session.stage is _HANDSHAKE:
                    session.spoke = self._handshake.has_begun
                    session.ending, session.detail = self._handshake.judge(reason)
            self.stop_waiting()
            self.over()

    def stop_waiting(self) -> None:
        """Cancel what is under way."""
        self.leave_queue()
        pending, self.pending = self.pending, None
        if pending is not None:
            try:
                pending.cancel()
            except Exception:
                # Of an endpoint or a gate that somebody else has made.
                log.failure(
                    "session {id}: what it waits for can't be cancelled",
                    id=self.session.id,
                )

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
        # In the middle of a handshake, or before it, nothing can be said.
        words = b"" if session.stage in _MUTE else self.last_words()
        session.ending, session.detail = ending, detail
        self.stop_waiting()
        # TLS waits for the client's own goodbye, which may never come.
        self.enter(_CLOSING, CLOSE_GRACE)
        self.reader = self._drop
        if words:
            self.transport.write(words)
        self.transport.loseConnection()

    def _drop(self, data: bytes) -> None:
        """What a client sends while it is closed is neither kept nor counted."""

    def abort_session(self, ending: Ending, detail: str = "") -> None:
        """End the session now, whatever its stage: reset what is connected."""
        if self.bridge is not None:
            self.bridge.abort(ending, detail)
            return
        session = self.session
        if session.ending is None:
            session.ending, session.detail = ending, detail
        self.stop_waiting()
        if _CLOSING in NEXT[session.stage]:
            self.enter(_CLOSING, CLOSE_GRACE)
        self.abort()

    def failed(self, reason: Failure) -> None:
        """A defect, ours or of what is plugged in: end the session."""
        log.failure("session {id} failed", reason, id=self.session.id)
        self.abort_session(Ending.FAILED, shown(reason.value))

    def over(self) -> None:
        session, factory = self.session, self.factory
        session.ended_at = factory.now()
        # From whichever stage it was: `enter` has nothing to refuse.
        session.stage = _OVER
        if self.reader is not None:
            # They hold each other.
            self.reader = self.preludes = None
        factory.wheel.discard(self)
        if self._lease is not None:
            self.release_lease()
        if self.place is not None:
            self.leave_server()
        if self._hops is not None:
            for name, hop in self._hops.items():
                streams.is_over(name, hop)
        ending = session.ending
        if ending is not None and ending is not _DONE:
            factory.endings[ending.word] += 1
        if not session.up.read and session.is_silent:
            factory.totals.silent += 1
        if session.ordinal < 0:
            self._was_never_admitted()
        else:
            if factory.counts is not None:
                factory.counts.close(session)
            factory.observer.closed(session)
        if factory.registry.draining:
            factory.registry.check()

    def _was_never_admitted(self) -> None:
        """Its PROXY header was awaited, or it was WAITING."""
        session, factory = self.session, self.factory
        ending = session.ending
        if factory.counts is not None and ending is not None:
            factory.counts.refuse(session.reason or ending.word)
        factory.observer.refused(session, session.detail)

    def release_lease(self) -> None:
        """Give back the lease, if it has one, and what its bytes count for."""
        lease, self._lease = self._lease, None
        if lease is not None:
            try:
                lease.release()
            except Exception:
                log.failure("the lease of session {id} failed", id=self.session.id)
        if self._limits is not None:
            limits, self._limits = self._limits, None
            give_back(limits)

    def leave_server(self) -> None:
        """Its server has one session less."""
        place, self.place, session = self.place, None, self.session
        try:
            place.closed() if session.ending is _DONE else tell_server(place, session)
        except Exception:
            log.failure("session {id} could not be counted", id=self.session.id)

    def last_words(self) -> bytes:
        """What to tell a client that is not served, before it is closed."""
        return b""

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
            if not bridge.was_checked:
                self._keep_alive(bridge)
            lifetime = self.factory.lifetime
            if lifetime is not None and self._is_too_old(lifetime, now):
                return
            if not (self.watches and self._ends_by_watch(now)):
                bridge.check(now)
        elif session.stage is _CLOSING:
            if now >= self._deadline:
                self.abort()
        elif (self.paused or self.direction.eof) and was_reset(self.transport):
            # It is not read, so nobody hears of its reset.
            self.abort_session(Ending.CLIENT_LEFT)
        elif session.stage is _WAITING and has_left(self):
            self.abort_session(Ending.CLIENT_LEFT, "before it was admitted")
        elif (
            self.paused & ALLOWANCE
            and self._left_by == NEVER
            and ended_unread(self.transport)
        ):
            self.may_have_left()
        elif now >= self._left_by:
            self.end(Ending.CLIENT_LEFT, "the client ended its side, unanswered")
        elif now < self._deadline:
            self._comes_on()
        elif self._comes_on() and self.checks_left:
            self.checks_left -= 1
        else:
            self.overdue()

    def _is_too_old(self, lifetime: Lifetime, now: float) -> bool:
        """End the session if its lifetime is over."""
        over = lifetime.over(self.session, now)
        if over is not None:
            self.abort_session(*over)
        return over is not None

    def _ends_by_watch(self, now: float) -> bool:
        return any(each(self, now) for each in self.watches)

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
        factory, upstream = self.factory, bridge.upstream
        keepalive, limit = factory.keepalive, factory.user_timeout
        if upstream.alive:
            dialled = upstream.was_dialled
            keep_alive(upstream.transport, keepalive, limit, dialled=dialled)
        # A listener of ours has passed its options on, but not the relay's own.
        inherited = KEEPALIVE_IS_INHERITED and not self.is_foreign
        if self.alive and (not inherited or limit or keepalive != KEEPALIVE):
            keep_alive(self.transport, keepalive, limit)

    def overdue(self) -> None:
        """The stage before the Bridge has had its time."""
        awaited: ClientHandshake | Pipeline | None = self.preludes
        if self.session.stage is _HANDSHAKE:
            awaited = self._handshake
        if awaited is not None:
            limit = self.factory.timeouts.handshake
            self.end(Ending.HANDSHAKE_TIMEOUT, f"no {awaited.name} in {limit:g} s")
        elif self.pending is not None:
            self.pending.overdue()

    def check_failed(self) -> None:
        """`check` raised: end the session."""
        self.abort_session(Ending.FAILED, "its deadlines could not be checked")
