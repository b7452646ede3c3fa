"""Tables of what waits, limited in all and for each client.

When a limit is reached, either a new item is refused (:meth:`Waiting.add`), or the
oldest is evicted (:meth:`Waiting.push`).  Evicting is for what takes honest clients a
moment, such as a handshake: a table that refuses can be kept full by a client that
opens connections and sends nothing.
"""

from __future__ import annotations

import itertools
import resource
from typing import Any, Generic, TypeVar

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from relayd.core.errors import Refused
from relayd.core.settings import (
    DEFAULT_HANDSHAKES,
    DEFAULT_HANDSHAKES_PER_CLIENT,
)
from relayd.net.log_throttle import LogThrottle

log = Logger(namespace="relayd.limits")

Item = TypeVar("Item")


def default_max_handshakes() -> int:
    """The default limit of handshakes in all.

    A quarter of the limit of open files: with a limit above that of open files, waiting
    handshakes would block all clients, as one that can't be accepted evicts nothing.
    """
    try:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except OSError:
        # A sandbox refuses.
        return DEFAULT_HANDSHAKES
    if limit == resource.RLIM_INFINITY:
        return DEFAULT_HANDSHAKES
    return max(1, min(DEFAULT_HANDSHAKES, limit // 4))


def default_max_handshakes_per_client(limit: int) -> int:
    """The default limit of handshakes of one client: a quarter of all."""
    return max(1, min(DEFAULT_HANDSHAKES_PER_CLIENT, limit // 4))


def undecided(most: int | None, clock: IReactorTime) -> Waiting[Any]:
    """The clients of one relay about which nothing is decided yet.

    :param most: of them; None: as many as handshakes, unless more are asked for.
    :raises ValueError: that is none.
    """
    limit = default_max_handshakes() if most is None else most
    if limit < 1:
        raise ValueError(f"max_deciding must be at least 1: {most!r}")
    return Waiting("undecided clients", limit, max(1, limit // 4), clock)


class Waiting(Generic[Item]):
    """A table of waiting items, in order of arrival.

    :param what: what the items are, in the plural, for the log.
    :param clock: for the log, which has one line a second at most.

    :ivar limit: of items in all, at least 1.
    :ivar limit_per_client: of items of one client, at least 1.
    :ivar hits: how often one of the limits was reached; `client_hits` of them, that of
        one client.
    """

    def __init__(
        self, what: str, limit: int, limit_per_client: int, clock: IReactorTime
    ) -> None:
        self._what = what
        self.limit = limit
        self.limit_per_client = limit_per_client
        self._items: dict[Item, str] = {}
        self._by_client: dict[str, dict[Item, None]] = {}
        self._throttle = LogThrottle(clock)
        self.hits = self.client_hits = 0

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, item: Item) -> bool:
        return item in self._items

    def add(self, item: Item, client: str) -> None:
        """Add `item`.

        :param client: the client key that it counts for.
        :raises Refused: a limit is reached.
        """
        if len(self._items) >= self.limit:
            self._hit("in all", self.limit)
            raise Refused(f"{self.limit} {self._what} wait already")
        own = self._by_client.get(client, ())
        if len(own) >= self.limit_per_client:
            self.client_hits += 1
            self._hit(f"of {client or 'one client'}", self.limit_per_client)
            raise Refused(
                f"{self.limit_per_client} {self._what} of this client wait already"
            )
        self._insert(item, client)

    def push(self, item: Item, client: str) -> Item | None:
        """Add `item`; evict the oldest if a limit is reached.

        :return: the evicted item, if any.
        """
        evicted = None
        own = self._by_client.get(client, ())
        if len(own) >= self.limit_per_client:
            self.client_hits += 1
            self._hit(f"of {client or 'one client'}", self.limit_per_client)
            evicted = next(iter(own))
        elif len(self._items) >= self.limit:
            self._hit("in all", self.limit)
            evicted = next(iter(self._items))
        if evicted is not None:
            self.discard(evicted)
        self._insert(item, client)
        return evicted

    @property
    def most_of_one(self) -> int:
        """How many the client has that has most."""
        return max(map(len, self._by_client.values()), default=0)

    def limited_as(self, other: Waiting[Item]) -> Waiting[Item]:
        """This table, with another one's limits from now on.

        Nobody is evicted for that alone.
        """
        self.limit, self.limit_per_client = other.limit, other.limit_per_client
        return self

    def oldest(self, count: int) -> list[Item]:
        """The oldest items, at most `count`; the oldest first."""
        return list(itertools.islice(self._items, count))

    def discard(self, item: Item) -> None:
        """Remove `item`, if it is in the table."""
        client = self._items.pop(item, None)
        if client is None:
            return
        own = self._by_client[client]
        del own[item]
        if not own:
            del self._by_client[client]

    def _insert(self, item: Item, client: str) -> None:
        self._items[item] = client
        own = self._by_client.get(client)
        if own is None:
            self._by_client[client] = {item: None}
        else:
            own[item] = None

    def _hit(self, whose: str, limit: int) -> None:
        self.hits += 1
        if not self._throttle.is_due():
            return
        log.warn(
            "{limit} {what} {whose} wait, which is the limit"
            " (reached {hits} times so far)",
            limit=limit,
            what=self._what,
            whose=whose,
            hits=self.hits,
        )
