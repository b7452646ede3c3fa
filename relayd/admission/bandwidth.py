"""Limits of bandwidth: of a relay, of a client, of a session; each way its own.

A session has a :class:`Pace` for each direction that is limited, which asks all buckets
that the direction is in (:mod:`relayd.admission.buckets`) before something is read.
Streams are paused and lose nothing.  Datagrams don't wait: one that comes when a bucket
is empty is dropped.

The buckets of a client live on after its last session until they are full, or it would
get a fresh quantum each time it came back.  That table has a limit; the client that has
been away longest goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from zope.interface import implementer

from relayd.admission.buckets import Bucket, Pacer
from relayd.admission.client_keys import ClientKey, ClientKeys
from relayd.admission.per_client import ClientPrefix
from relayd.admission.rates import Rates
from relayd.core.counts import Tally
from relayd.core.interfaces import ILease
from relayd.core.pacing import Paused
from relayd.core.pauses import ALLOWANCE
from relayd.net.monotonic import monotonic

#: The most clients that are remembered, beside those that have sessions.
MAX_CLIENTS = 65536

#: Those that are looked at, each time that one leaves: more than come.
_LOOKED_AT = 4


class Pace:
    """How fast one direction of one session is read (:class:`relayd.core.pacing.Pace`).

    :param buckets: that it is in: the narrowest first, which sessions share least.
    """

    __slots__ = ("_buckets", "_leg", "_pacer", "_short", "_waits_in")

    def __init__(self, pacer: Pacer, buckets: Sequence[Bucket]) -> None:
        self._pacer = pacer
        self._buckets = tuple(buckets)
        self._leg: Paused | None = None
        #: The bucket that was found short by the last grant.
        self._short: Bucket | None = None
        #: The one in which it waits: TLS hands on what it has all the same, and then
        #: another one may be short.
        self._waits_in: Bucket | None = None

    @property
    def quantum(self) -> float:
        """About how many bytes may be read at once."""
        return min((each.quantum for each in self._buckets), default=float("inf"))

    @property
    def shared(self) -> float:
        """The same of what it has together with others."""
        quanta = (each.quantum for each in self._buckets if each.shared)
        return min(quanta, default=float("inf"))

    @property
    def waits(self) -> bool:
        """Whether it waits."""
        return self._waits_in is not None

    def follow(self, leg: Paused) -> None:
        """See :meth:`relayd.core.pacing.Pace.follow`."""
        self._leg = leg

    def grant(self, most: int) -> int:
        """See :meth:`relayd.core.pacing.Pace.grant`."""
        now = self._pacer.now()
        for bucket in self._buckets:
            bucket.refill(now)
            left = bucket.left_for(self)
            if left < most:
                if left < 1:
                    self._short = bucket
                    return 0
                most = int(left)
        return most

    def take(self, most: int) -> int:
        """See :meth:`relayd.core.pacing.Pace.take`."""
        # All that there is would be too much to keep from the others.
        granted = self.grant(int(min(most, max(self.shared / 2, 1))))
        if granted:
            now = self._pacer.now()
            for bucket in self._buckets:
                bucket.reserve(self, granted, now)
        return granted

    def spend(self, count: int) -> None:
        """See :meth:`relayd.core.pacing.Pace.spend`."""
        for bucket in self._buckets:
            bucket.spend(self, count)

    def rest(self) -> None:
        """See :meth:`relayd.core.pacing.Pace.rest`."""
        for bucket in self._buckets:
            self._pacer.rest(self, bucket)

    def wait(self) -> None:
        """See :meth:`relayd.core.pacing.Pace.wait`."""
        if self._short is None:
            return
        if self._waits_in is None:
            self._waits_in = self._short
            self._pacer.wait(self, self._short)
        # Also one that waits already, if its leg was read on for another reason.
        if self._leg is not None:
            self._leg.pause(ALLOWANCE)

    def wake(self) -> None:
        """It has a part where it has waited."""
        self._waits_in = None
        if self._leg is not None:
            self._leg.resume(ALLOWANCE)

    def lift(self) -> None:
        """See :meth:`relayd.core.pacing.Pace.lift`."""
        self.rest()
        self._buckets = ()
        if self._waits_in is not None:
            self._pacer.leave(self, self._waits_in)
            self.wake()

    def close(self) -> None:
        """Its session is over."""
        self._leg = None
        self.lift()


class _Client:
    """The buckets of one client, and how many sessions it has."""

    __slots__ = ("down", "up", "users")

    def __init__(self, up: Bucket | None, down: Bucket | None) -> None:
        self.up, self.down = up, down
        self.users = 0

    def is_full(self, now: float) -> bool:
        """Whether a new client would have no more."""
        for bucket in (self.up, self.down):
            if bucket is not None:
                bucket.refill(now)
                if not bucket.is_full:
                    return False
        return True


@implementer(ILease)
class Limits:
    """What limits the bytes of one session, or flow; to be released when it is over.

    :ivar up: the buckets that its bytes to the server are counted in; `down` to the
        client.
    :ivar paces: of a session's directions.
    """

    __slots__ = ("_bandwidth", "_key", "down", "paces", "up")

    def __init__(
        self,
        bandwidth: Bandwidth,
        key: ClientKey,
        up: tuple[Bucket, ...],
        down: tuple[Bucket, ...],
    ) -> None:
        self._bandwidth: Bandwidth | None = bandwidth
        self._key = key
        self.up, self.down = up, down
        self.paces: list[Pace] = []

    def add(self, session: Any, rates: Rates) -> None:
        """Limit its session by so much as well, before it is read.

        :param session: the one that has entered; its directions can have a pace.
        """
        if self._bandwidth is not None:
            self._bandwidth.limit_more(session, self, rates)

    def passes_up(self, count: int, *, whole: bool = False) -> bool:
        """See :class:`relayd.core.pacing.DatagramLimits`."""
        return self._passes(self.up, count, whole)

    def passes_down(self, count: int, *, whole: bool = False) -> bool:
        """See :class:`relayd.core.pacing.DatagramLimits`."""
        return self._passes(self.down, count, whole)

    def _passes(self, buckets: tuple[Bucket, ...], count: int, whole: bool) -> bool:
        bandwidth = self._bandwidth
        if bandwidth is None:
            return True
        now, least = bandwidth.now(), count if whole else 0
        for bucket in buckets:
            bucket.refill(now)
            if bucket.tokens <= least:
                return False
        for bucket in buckets:
            bucket.tokens -= count
        return True

    def release(self) -> None:
        """See :meth:`ILease.release`."""
        bandwidth, self._bandwidth = self._bandwidth, None
        if bandwidth is not None:
            for pace in self.paces:
                pace.close()
            bandwidth.left(self._key)


class Bandwidth:
    """The limits of bandwidth of one relay.

    Clients of UNIX sockets can't be told apart, and have no limit of their own.

    :param relay: of the whole relay; None is no limit.
    :param per_client: of each client.
    :param per_session: of each session; of UDP, of each flow.
    :param clock: monotonic seconds, and a timer while sessions wait.
    :param prefix: which clients count as one.
    :param max_clients: the most that are remembered without a session.
    :raises ValueError: `max_clients` is less than 1.

    :ivar evicted: how many clients were forgotten before their buckets were full.
    """

    def __init__(
        self,
        relay: Rates | None = None,
        per_client: Rates | None = None,
        per_session: Rates | None = None,
        *,
        clock: Any,
        prefix: ClientPrefix | None = None,
        max_clients: int = MAX_CLIENTS,
    ) -> None:
        if max_clients < 1:
            raise ValueError(f"max_clients must be at least 1: {max_clients!r}")
        self._pacer = Pacer(monotonic(clock))
        self.now = self._pacer.now
        self._up, self._down = self._buckets_of(relay)
        self._per_client, self._per_session = per_client, per_session
        self._said = relay, per_client, prefix or ClientPrefix()
        self._key_of = ClientKeys(prefix).of
        self._max_clients = max_clients
        self._clients: dict[ClientKey, _Client] = {}
        #: Those without a session; who has left last is last.  A dict would be searched
        #: for its first entry, past all that are deleted.
        self._away: OrderedDict[ClientKey, _Client] = OrderedDict()
        self.evicted = 0

    @property
    def waits(self) -> int:
        """How often a session had to wait."""
        return self._pacer.tally.count

    @property
    def tally(self) -> Tally:
        """Where that is counted."""
        return self._pacer.tally

    @tally.setter
    def tally(self, tally: Tally) -> None:
        self._pacer.tally = tally

    def succeed(self, other: Bandwidth) -> None:
        """Limit the sessions that come in place of another one; call it before.

        What is for several sessions holds for those of both together, if it is as much
        as before; else those that live keep theirs.
        """
        if self._said == other._said:
            self._pacer, self._up, self._down = other._pacer, other._up, other._down
            self._clients, self._away = other._clients, other._away

    @property
    def clients(self) -> int:
        """How many clients have sessions, if they are limited."""
        return len(self._clients)

    @property
    def remembered(self) -> int:
        """How many clients without a session are remembered."""
        return len(self._away)

    def _buckets_of(
        self, rates: Rates | None, *, shared: bool = True
    ) -> tuple[Bucket | None, Bucket | None]:
        if rates is None:
            return None, None
        now = self.now()
        up, down = (
            None if rate is None else Bucket(rate, now, shared=shared)
            for rate in (rates.up, rates.down)
        )
        return up, down

    def enter(self, session: Any) -> Limits:
        """Give an admitted session its paces."""
        limits = self.limits_of(session.client)
        self._set_paces(session, limits)
        return limits

    def limit_more(self, session: Any, limits: Limits, rates: Rates) -> None:
        """Have a session that has entered in further buckets, which it has alone.

        :param limits: its own.
        """
        up, down = self._buckets_of(rates, shared=False)
        if up is not None:
            limits.up = (up, *limits.up)
        if down is not None:
            limits.down = (down, *limits.down)
        self._set_paces(session, limits)

    def _set_paces(self, session: Any, limits: Limits) -> None:
        """Give a session, of which nothing is read yet, the paces of its limits."""
        for pace in limits.paces:
            pace.close()
        limits.paces.clear()
        for direction, buckets in (
            (session.up, limits.up),
            (session.down, limits.down),
        ):
            if buckets:
                direction.pace = Pace(self._pacer, buckets)
                limits.paces.append(direction.pace)

    def limits_of(self, name: str) -> Limits:
        """What limits a new session, or flow, of a client.

        :param name: the client, as :func:`relayd.core.addresses.address_name` has it.
        """
        own = self._buckets_of(self._per_session, shared=False)
        key: ClientKey = None
        client = None
        if self._per_client is not None:
            key = self._key_of(name)
            if key is not None:
                client = self._clients.get(key)
                if client is None:
                    client = self._away.pop(key, None)
                    if client is None:
                        client = _Client(*self._buckets_of(self._per_client))
                    self._clients[key] = client
                client.users += 1
        theirs = (None, None) if client is None else (client.up, client.down)
        up, down = (
            tuple(each for each in ways if each is not None)
            for ways in zip(own, theirs, (self._up, self._down), strict=True)
        )
        return Limits(self, key, up, down)

    def left(self, key: ClientKey) -> None:
        """A session, or flow, of a client is over."""
        if key is None:
            return
        client = self._clients[key]
        client.users -= 1
        if not client.users:
            del self._clients[key]
            self._away[key] = client
            self._forget()

    def _forget(self) -> None:
        """Forget clients that would have no more if they were new."""
        now, away = self.now(), self._away
        for _ in range(min(_LOOKED_AT, len(away))):
            key, client = next(iter(away.items()))
            full = client.is_full(now)
            if not full and len(away) <= self._max_clients:
                break
            self.evicted += not full
            del away[key]
