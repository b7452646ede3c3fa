"""How many sessions there may be at once: in all, and of one client.

With a queue, a client for which there is no place in all waits for one, in order, and
nothing is read from it meanwhile: the gate answers a Deferred.  Who leaves is
forgotten, and who has waited for too long is refused.  One timer is for all who wait.

When limits change, others take the place of these: what was counted here counts there
from then on (:meth:`SessionLimits.succeed`), whoever is asked.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from zope.interface import implementer

from relayd.admission.client_keys import ClientKey, ClientKeys
from relayd.admission.per_client import ClientPrefix
from relayd.core import admission_settings
from relayd.core.errors import Refused
from relayd.core.interfaces import IGate, ILease
from relayd.net.monotonic import monotonic


@implementer(ILease)
class _Place:
    """One session's place, or that of who waits for one; it can be given back once.

    :ivar limits: where it counts; None: it was given back.
    :ivar client: whose it is,
    :ivar key: and what it counts for, if clients are limited.
    """

    __slots__ = ("client", "key", "limits")

    def __init__(self, limits: SessionLimits, client: str, key: ClientKey) -> None:
        self.limits: SessionLimits | None = limits
        self.client = client
        self.key = key

    def release(self) -> None:
        limits, self.limits = self.limits, None
        if limits is not None:
            limits.left(self)


@implementer(IGate)
class SessionLimits:
    """Admits so many sessions at once.

    Clients of UNIX sockets can't be told apart, and are counted in all only.

    :param max_sessions: in all; None is no limit.
    :param max_sessions_per_client: of one client, likewise; those that wait count, too.
    :param prefix: which clients count as one.
    :param queue: how many wait when there are `max_sessions`; None: more are refused.
    :param queue_timeout: the seconds that they wait; then they are refused.
    :param clock: for a queue: monotonic seconds, and a timer while somebody waits.
    :raises ValueError: a limit is less than 1; or there is a queue, and no limit of
        sessions or no clock.
    """

    def __init__(
        self,
        max_sessions: int | None = admission_settings.MAX_SESSIONS.default,
        max_sessions_per_client: int
        | None = admission_settings.MAX_SESSIONS_PER_CLIENT.default,
        *,
        prefix: ClientPrefix | None = None,
        queue: int | None = admission_settings.QUEUE.default,
        queue_timeout: float = admission_settings.QUEUE_TIMEOUT.default,
        clock: IReactorTime | None = None,
    ) -> None:
        for limit in (max_sessions, max_sessions_per_client):
            if limit is not None and limit < 1:
                raise ValueError(f"a limit of sessions is at least 1: {limit!r}")
        if queue and (max_sessions is None or clock is None):
            raise ValueError("a queue takes a limit of sessions, and a clock")
        if (queue or 0) < 0 or not queue_timeout > 0:
            raise ValueError("a queue's limits must be more than 0")
        self.max_sessions = max_sessions
        self.max_sessions_per_client = max_sessions_per_client
        self._prefix = prefix or ClientPrefix()
        self._key_of = ClientKeys(prefix).of
        #: What counts in place of this, if something does.
        self._heir: SessionLimits | None = None
        self._queue = queue or 0
        self._queue_timeout = queue_timeout
        self._clock: Any = monotonic(clock)
        #: Those that are taken.
        self._places: set[_Place] = set()
        #: How many each client has, if that is limited.
        self._by_client: dict[ClientKey, int] = {}
        #: Those that wait: what is theirs then, and until when; in order.  A dict would
        #: be searched for its first entry, past all that are deleted.
        self._waiting: OrderedDict[Deferred[ILease], tuple[_Place, float]]
        self._waiting = OrderedDict()
        self._timer: IDelayedCall | None = None
        self._hands_out = False

    @property
    def sessions(self) -> int:
        """How many there are now."""
        return len(self._places)

    @property
    def waiting(self) -> int:
        """How many wait for a place."""
        return len(self._waiting)

    @property
    def clients(self) -> int:
        """How many clients have a session, or wait; 0 if that is not limited."""
        return len(self._by_client)

    @property
    def queue(self) -> int:
        """How many may wait for a place; 0: none."""
        return self._queue

    @property
    def most_of_one(self) -> int:
        """How many sessions the client has, or waits for, that has most."""
        return max(self._by_client.values(), default=0)

    @property
    def patience(self) -> float:
        """The seconds for which clients may wait, beyond the handshake timeout."""
        return self._queue_timeout if self._queue else 0.0

    def enter(self, session: Any) -> Any:
        """See :meth:`IGate.enter`."""
        if self._heir is not None:
            return self._last.enter(session)
        client = session.client
        key: ClientKey = None
        count = 0
        if self.max_sessions_per_client is not None:
            key, count = self._counted(client)
        place = _Place(self, client, key)
        if self._is_full():
            # Nobody comes before those who wait.
            return self._wait(place)
        if key is not None:
            self._by_client[key] = count + 1
        self._places.add(place)
        return place

    def adopt(self, session: Any) -> ILease:
        """Count one that was admitted before there was this limit."""
        place = _Place(self, session.client, None)
        self._places.add(place)
        self._identify(place)
        return place

    def foresee(self, client: str) -> bool:
        """Do what :meth:`enter` would, but count nobody.

        :return: whether the client would have to wait.
        :raises Refused: it would be.
        """
        self._counted(client)
        if self._is_full():
            self._check_queue()
            return True
        return False

    def sessions_of(self, client: str) -> int | None:
        """How many sessions a client has, or waits for; None: it is not counted."""
        if self.max_sessions_per_client is None:
            return None
        key = self._key_of(client)
        return None if key is None else self._by_client.get(key, 0)

    def _is_full(self) -> bool:
        """Whether the next client has to wait, or is refused."""
        most = self.max_sessions
        return bool(self._waiting) or (most is not None and len(self._places) >= most)

    def _counted(self, client: str) -> tuple[ClientKey, int]:
        """The key of a client, and how many sessions it has; if that is limited.

        :raises Refused: it has as many as it may have.
        """
        most = self.max_sessions_per_client
        if most is None:
            return None, 0
        key = self._key_of(client)
        if key is None:
            return None, 0
        count = self._by_client.get(key, 0)
        if count >= most:
            raise Refused(
                f"--max-sessions-per-client {most}", "max_sessions_per_client"
            )
        return key, count

    def left(self, place: _Place) -> None:
        """A session has given its place back."""
        self._places.remove(place)
        if place.key is not None:
            self._count(place.key, -1)
        if self._waiting:
            self._hand_out()

    def succeed(self, other: SessionLimits) -> None:
        """Count in place of another one; call it before the first session.

        Its sessions count here, too, and whoever waits for a place there waits here, as
        long as others do.  They count for their clients, though these were told apart
        otherwise, or not at all.  Whoever is asked about there from now on is admitted,
        or refused, here.
        """
        before: SessionLimits = other._last
        if before is self:
            # Others that share both have done so.
            return
        before._heir = self
        self._places, before._places = before._places, set()
        waiting, before._waiting = before._waiting, OrderedDict()
        before._set_timer()
        by_client, before._by_client = before._by_client, {}
        alike = self._tells_apart == before._tells_apart
        if alike:
            self._by_client = by_client
        for place in (*self._places, *(place for place, _ in waiting.values())):
            place.limits = self
            if not alike:
                self._identify(place)
        if waiting:
            if self._clock is None:
                self._clock = before._clock
            latest = self._clock.seconds() + self._queue_timeout
            more = max(self._queue_timeout - before._queue_timeout, 0.0)
            for given, (place, until) in waiting.items():
                self._waiting[given] = place, min(until + more, latest)
            self._hand_out()

    def lift(self) -> None:
        """Nothing is limited any more: whoever waits is admitted."""
        SessionLimits(None, None).succeed(self)

    @property
    def _tells_apart(self) -> ClientPrefix | None:
        """What tells clients apart; None: they are not limited."""
        return None if self.max_sessions_per_client is None else self._prefix

    def _identify(self, place: _Place) -> None:
        """Have a place count for its client, if clients are limited."""
        place.key = None
        if self.max_sessions_per_client is not None:
            place.key = self._key_of(place.client)
            self._count(place.key, 1)

    @property
    def _last(self) -> SessionLimits:
        """What counts by now."""
        limits = self
        while limits._heir is not None:
            limits = limits._heir
        return limits

    def _count(self, key: ClientKey, more: int) -> None:
        if key is not None:
            count = self._by_client.get(key, 0) + more
            if count:
                self._by_client[key] = count
            else:
                del self._by_client[key]

    # -- the queue

    def _check_queue(self) -> None:
        """:raises Refused: nobody may wait, or as many wait as may."""
        if not self._queue:
            raise Refused(f"--max-sessions {self.max_sessions}", "max_sessions")
        if len(self._waiting) >= self._queue:
            raise Refused(
                f"--queue {self._queue}, with --max-sessions {self.max_sessions}",
                "queue",
            )

    def _wait(self, place: _Place) -> Deferred[ILease]:
        self._check_queue()
        self._count(place.key, 1)
        given: Deferred[ILease] = Deferred(self._leave)
        self._waiting[given] = place, self._clock.seconds() + self._queue_timeout
        self._set_timer()
        return given

    def _leave(self, given: Deferred[ILease]) -> None:
        """Who waited has left."""
        self._last.forget(given)

    def forget(self, given: Deferred[ILease]) -> None:
        """Somebody waits no longer."""
        place, _ = self._waiting.pop(given)
        self._count(place.key, -1)
        self._set_timer()

    def _hand_out(self) -> None:
        """Give free places to those who have waited longest."""
        # One that is given a place may give it back at once: that is not gone into
        # deeper and deeper.
        if self._hands_out:
            return
        self._hands_out = True
        try:
            most = self.max_sessions
            while self._waiting and (most is None or len(self._places) < most):
                given, (place, _) = self._waiting.popitem(last=False)
                self._places.add(place)
                given.callback(place)
        finally:
            self._hands_out = False
        self._set_timer()

    def _set_timer(self) -> None:
        if self._waiting and self._timer is None:
            _, until = next(iter(self._waiting.values()))
            later: Callable[..., IDelayedCall] = self._clock.callLater
            self._timer = later(max(until - self._clock.seconds(), 0.0), self._expire)
        elif not self._waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self._timer = None
        now = self._clock.seconds()
        for given, (place, until) in list(self._waiting.items()):
            if until > now:
                break
            if given in self._waiting:
                del self._waiting[given]
                self._count(place.key, -1)
                given.errback(
                    Refused(f"--queue-timeout {self._queue_timeout:g}", "queue_timeout")
                )
        self._set_timer()
