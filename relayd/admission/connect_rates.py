"""How often one client may come: a token bucket for each client key.

A bucket holds as many tokens as clients may come at once, and is refilled at their
rate.  A client that is refused takes none.  The table has a limit: at the limit, the
client that has been away longest is forgotten, as if its bucket were full; mostly it
is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NoReturn

from twisted.internet.interfaces import IReactorTime
from zope.interface import implementer

from relayd.admission.client_keys import ClientKey, ClientKeys
from relayd.admission.per_client import ClientPrefix, ConnectRate
from relayd.core.errors import Refused
from relayd.core.interfaces import IGate, ILease
from relayd.core.leases import FREE
from relayd.net.monotonic import monotonic

#: The most clients that are remembered: some 30 MB.
MAX_CLIENTS = 65536

#: What rounding may have taken off a token.
_ALMOST = 1 - 1e-6


@implementer(IGate)
class ConnectRates:
    """Admits the sessions, or flows, of one client up to a rate.

    Clients of UNIX sockets can't be told apart, and are not counted.

    :param rate: of one client.
    :param clock: monotonic seconds.
    :param prefix: which clients count as one.
    :param max_clients: the most that are remembered.

    :ivar evicted: how many were forgotten before their bucket was full.
    """

    def __init__(
        self,
        rate: ConnectRate,
        clock: IReactorTime,
        prefix: ClientPrefix | None = None,
        max_clients: int = MAX_CLIENTS,
    ) -> None:
        if rate.count < 1 or not rate.period > 0 or max_clients < 1:
            raise ValueError(f"a rate must be more than 0: {rate}")
        self.rate = rate
        self._prefix = prefix or ClientPrefix()
        self._key_of = ClientKeys(prefix).of
        clock = monotonic(clock)
        self._seconds: Callable[[], float] = clock.seconds
        self._max_clients = max_clients
        self._each = rate.count / rate.period
        #: The tokens of each client, and when it had them; who came last is last.  A
        #: dict would be searched for its first entry, past all that are deleted.
        self._buckets: OrderedDict[ClientKey, tuple[float, float]] = OrderedDict()
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._buckets)

    @property
    def buckets(self) -> list[tuple[float, float]]:
        """The tokens of each client, and when it had them; a new list."""
        return list(self._buckets.values())

    def used_of(self, bucket: tuple[float, float]) -> float:
        """How many of a client's tokens are used now."""
        had, at = bucket
        refilled = had + (self._seconds() - at) * self._each
        return max(self.rate.count - refilled, 0.0)

    def succeed(self, other: ConnectRates) -> None:
        """Admit those that another one would, in its place; call it before the first.

        What clients have left of the rate is known, if it is the same.
        """
        self.evicted = other.evicted
        if (self.rate, self._prefix) == (other.rate, other._prefix):
            self._buckets = other._buckets

    def enter(self, session: Any) -> ILease:
        """See :meth:`IGate.enter`."""
        key = self._key_of(session.client)
        if key is None:
            return FREE
        now = self._seconds()
        buckets = self._buckets
        bucket = buckets.pop(key, None)
        tokens = self._tokens(bucket, now)
        if bucket is None and len(buckets) >= self._max_clients:
            self._forget(now)
        if tokens < _ALMOST:
            buckets[key] = tokens, now
            self._refuse()
        buckets[key] = tokens - 1, now
        return FREE

    def left(self, client: str) -> int | None:
        """How often a client may come at once, as of now; it is not counted.

        :return: None: as often as it likes.
        """
        tokens = self._had(client)
        return None if tokens is None else int(tokens + 1 - _ALMOST)

    def foresee(self, client: str) -> None:
        """Do what `enter` would, but count nobody.

        :raises Refused: the client would be.
        """
        tokens = self._had(client)
        if tokens is not None and tokens < _ALMOST:
            self._refuse()

    def _had(self, client: str) -> float | None:
        """The tokens of a client as of now; None: it is not counted."""
        key = self._key_of(client)
        if key is None:
            return None
        return self._tokens(self._buckets.get(key), self._seconds())

    def _refuse(self) -> NoReturn:
        raise Refused(
            f"--max-connects-per-client {self.rate}", "max_connects_per_client"
        )

    def _tokens(self, bucket: tuple[float, float] | None, now: float) -> float:
        """How many a client has, whose bucket this is."""
        most = float(self.rate.count)
        if bucket is None:
            return most
        had, at = bucket
        return min(most, had + (now - at) * self._each)

    def take_back(self, session: Any) -> None:
        """Another gate has refused a client that was admitted here: it did not come."""
        key = self._key_of(session.client)
        bucket = self._buckets.get(key)
        if bucket is not None:
            had, at = bucket
            self._buckets[key] = had + 1, at

    def _forget(self, now: float) -> None:
        """Make place for one client."""
        _, (had, at) = self._buckets.popitem(last=False)
        if had + (now - at) * self._each < self.rate.count:
            self.evicted += 1
