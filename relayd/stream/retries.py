"""What follows a dial that has failed: another server, before the client notices.

A client is not relayed until a server is connected, so nothing that it has sent was
written to a server that failed: all of it goes to the one that answers.  One that is
connected and resets at once has failed as well (:mod:`relayd.stream.redial`).  If there
is no other server, the same one is dialled again after a pause, which doubles; if none
can be chosen by then, the client waits for one where new clients do
(:mod:`relayd.stream.standby`).

Attempts end with the session's retries, or when its time for all of them is over.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Protocol

from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from relayd.core import pool_settings
from relayd.core.counts import Tally
from relayd.core.session import Ending
from relayd.core.stage import Stage
from relayd.net.upstream import Upstream
from relayd.stream.attempt import Attempt

log = Logger(namespace="relayd.stream")

#: Seconds until the same server is dialled again; they double up to the second figure.
PAUSE_FIRST, PAUSE_LAST = 0.1, 1.0

#: A deadline that never comes.
NEVER = float("inf")

#: The seconds that an attempt has at least: 0 would be for ever.
LEAST = 0.001

#: How many there are where there are several servers, unless another number is given.
RETRIES = 2

#: What another server may do better.  A client that is turned away, and a defect of
#: ours, would be the same there.
RETRIED = frozenset(
    {
        Ending.CONNECT_REFUSED,
        Ending.CONNECT_TIMEOUT,
        Ending.CONNECT_FAILED,
        Ending.UPSTREAM_RESET,
        Ending.UPSTREAM_DOWN,
        Ending.UNRESOLVED,
    }
)


def time_for_all(dial_timeout: float | None, connect_timeout: float) -> float:
    """The seconds that a session's attempts have together, 0 for ever.

    :param dial_timeout: as given; None: :data:`~.pool_settings.LONGEST_DIAL`, or as
        long as one attempt, if that is longer.
    :raises ValueError: it is negative.
    """
    if dial_timeout is None:
        longest = max(pool_settings.LONGEST_DIAL, connect_timeout)
        return longest if connect_timeout else 0.0
    if not dial_timeout >= 0:
        raise ValueError(f"dial_timeout must not be negative: {dial_timeout!r}")
    return dial_timeout


class Choosing(Protocol):
    """The servers (:class:`relayd.upstreams.pool.Pool`)."""

    def choose(self, session: Any, tried: Collection[Upstream] = ()) -> Upstream | None:
        """One that is not among those that were tried, or None."""


class Waiting(Protocol):
    """Where clients wait for a server (:class:`relayd.stream.standby.StandBy`)."""

    def wait(
        self, client: Any, limit: float, dial: Callable[[Any], object] | None
    ) -> None:
        """Until there is one to dial, and so many seconds at most."""


class Pause:
    """What is under way until the same server is dialled again."""

    def __init__(self, client: Any, failed: Attempt, timer: IDelayedCall) -> None:
        self._client = client
        self._failed = failed
        self._timer = timer

    def cancel(self) -> None:
        """The client has left."""
        self._timer.cancel()

    def comes_on(self) -> bool:
        """See :meth:`Attempt.comes_on`."""
        return False

    def overdue(self) -> None:
        """The time of all attempts is over."""
        self._timer.cancel()
        self._client.pending = None
        self.give_up()

    def give_up(self) -> None:
        """The session ends as its last attempt did."""
        self._client.end_unserved(self._failed)


class Retries:
    """How the sessions of one relay try again.

    :param pool: the servers.
    :param retries: how many attempts a session may have beyond its first; None:
        RETRIES while the pool has several servers, and none while it has one.
    :param dial_timeout: seconds for all of them; 0 is for ever.

    :ivar tally: where they are counted; relays that succeed each other share it.
    :ivar standby: where clients wait while no server can be chosen, if they do.
    """

    standby: Waiting | None = None

    def __init__(
        self, pool: Choosing, retries: int | None, dial_timeout: float
    ) -> None:
        self._pool = pool
        self._retries = retries
        self.dial_timeout = dial_timeout
        self.tally = Tally()

    def count_in(self, tally: Tally) -> None:
        """Count attempts there from now on, together with others."""
        self.tally = tally

    @property
    def count(self) -> int:
        """How many attempts were retries."""
        return self.tally.count

    @property
    def retries(self) -> int:
        """How many attempts a session may have beyond its first, as of now."""
        if self._retries is not None:
            return self._retries
        pool: Any = self._pool
        return RETRIES if len(pool.latest.upstreams) > 1 else 0

    def again(self, client: Any, attempt: Any) -> bool:
        """Try another server after an attempt that has failed; whether it will.

        :param client: the :class:`relayd.stream.session.StreamProtocol`, DIALING.
        """
        try:
            return self._again(client, attempt)
        except Exception:
            # Of a selector or an endpoint that somebody else has made.
            client.failed(Failure())
            return True

    def _again(self, client: Any, attempt: Any) -> bool:
        if attempt.ending not in RETRIED or not self.has_more(client):
            return False
        session, left = client.session, self._time_left(client)
        client.tried = *client.tried, attempt.upstream
        another = self._pool.choose(session, client.tried)
        if another is not None:
            log.debug(
                "{relay}: session {id}: {why} of {server}, next is {another}",
                relay=session.relay,
                id=session.id,
                why=attempt.ending.word,
                server=attempt.upstream.name,
                another=another.name,
            )
            self._dial(client, another)
            return True
        return self.same_again(client, attempt, left)

    def _dial(self, client: Any, server: Upstream) -> None:
        self.tally.count += 1
        client.dial(server)

    def same_again(self, client: Any, attempt: Any, left: float) -> bool:
        """There is no other server: try again after a pause; whether it will.

        :param left: the seconds that the client's attempts have.
        """
        pause = min(PAUSE_FIRST * 2 ** (client.session.attempts - 1), PAUSE_LAST)
        if left <= pause:
            return False
        timer = client.factory.clock.callLater(pause, self._after_pause, client)
        client.pending = Pause(client, attempt, timer)
        client.set_deadline(left if left < NEVER else 0.0)
        return True

    def has_more(self, client: Any) -> bool:
        """Whether a client may have another attempt, by their number and its time."""
        return client.session.attempts <= self.retries and self._time_left(client) > 0

    def limit(self, client: Any, connect: float) -> float:
        """The seconds that the next attempt of a client has, 0 for ever.

        :param connect: those that it has at most, likewise.
        """
        all_of_them = self.dial_timeout
        if not all_of_them:
            return connect
        if not client.session.attempts:
            # As most sessions have no other.
            return connect if 0 < connect < all_of_them else all_of_them
        # It may have waited for a server in between.
        left = max(self._time_left(client), LEAST)
        return min(connect, left) if connect else left

    def _time_left(self, client: Any) -> float:
        """The seconds that a client's attempts have."""
        first = client.session.first_dialed_at
        if not self.dial_timeout:
            return NEVER
        if first is None:
            return self.dial_timeout
        passed: float = client.factory.now() - first
        return self.dial_timeout - passed

    def _after_pause(self, client: Any) -> None:
        pause, client.pending = client.pending, None
        session = client.session
        if session.stage is not Stage.DIALING or session.ending is not None:
            return
        try:
            # Others may be up again by now, and any of them will do.
            server = self._pool.choose(session)
            if server is not None:
                self._dial(client, server)
            elif self.standby is not None:
                dial = partial(self._dial, client)
                self.standby.wait(client, self._time_left(client), dial)
            else:
                pause.give_up()
        except Exception:
            client.failed(Failure())
