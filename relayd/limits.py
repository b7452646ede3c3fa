"""Bounds on those who wait: so many in all, and so many for each client.

A bound that is reached either refuses whoever comes next, or makes the one go that
has waited longest.  The second is for waiting that honest clients do for a moment
and others for as long as they may, such as a handshake: a table that refuses can be
kept full by whoever opens connections and says nothing.
"""

from __future__ import annotations

import itertools
import resource
from typing import Generic, TypeVar

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from relayd.errors import Refused
from relayd.log_throttle import LogThrottle
from relayd.settings import HANDSHAKES, HANDSHAKES_EACH

log = Logger(namespace="relayd.limits")

Item = TypeVar("Item")


def affordable_handshakes() -> int:
    """How many handshakes may wait in all, unless it is said.

    A quarter of what the limit of open files allows: more than it allows would keep
    everybody out, since nobody has to make room for a client that is not accepted.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return HANDSHAKES
    return max(1, min(HANDSHAKES, limit // 4))


def fair_handshakes(most: int) -> int:
    """How many of those one client may have, unless it is said: a quarter."""
    return max(1, min(HANDSHAKES_EACH, most // 4))


class Waiting(Generic[Item]):
    """Those who wait for one kind of thing, in the order in which they came.

    :param what: what they are, in the plural, for the log.
    :param most: how many may wait in all, at least 1.
    :param most_each: how many of one client, at least 1.
    :param clock: seconds; the log has at most one line in each.

    :ivar hits: how often one of the bounds was reached.
    """

    def __init__(
        self, what: str, most: int, most_each: int, clock: IReactorTime
    ) -> None:
        self._what = what
        self._most = most
        self._most_each = most_each
        self._items: dict[Item, str] = {}
        self._by_client: dict[str, dict[Item, None]] = {}
        self._throttle = LogThrottle(clock)
        self.hits = 0

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, item: Item) -> bool:
        return item in self._items

    def add(self, item: Item, client: str) -> None:
        """Let `item` wait.

        :param client: whose it is, such as an address without its port.
        :raises Refused: there is no room.
        """
        if len(self._items) >= self._most:
            self._hit("in all", self._most)
            raise Refused(f"{self._most} {self._what} wait already")
        own = self._by_client.get(client, ())
        if len(own) >= self._most_each:
            self._hit(f"of {client or 'one client'}", self._most_each)
            raise Refused(f"{self._most_each} {self._what} of this client wait already")
        self._insert(item, client)

    def push(self, item: Item, client: str) -> Item | None:
        """Let `item` wait, whoever has to make room.

        :return: the one that must go: it is forgotten here.
        """
        gone = None
        own = self._by_client.get(client, ())
        if len(own) >= self._most_each:
            self._hit(f"of {client or 'one client'}", self._most_each)
            gone = next(iter(own))
        elif len(self._items) >= self._most:
            self._hit("in all", self._most)
            gone = next(iter(self._items))
        if gone is not None:
            self.discard(gone)
        self._insert(item, client)
        return gone

    def oldest(self, count: int) -> list[Item]:
        """Those who have waited longest, at most so many; the longest first."""
        return list(itertools.islice(self._items, count))

    def discard(self, item: Item) -> None:
        """`item` waits no longer, if it did."""
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

    def _hit(self, whose: str, most: int) -> None:
        self.hits += 1
        if not self._throttle.is_due():
            return
        log.warn(
            "{most} {what} {whose} wait, which is the bound"
            " (reached {hits} times so far)",
            most=most,
            what=self._what,
            whose=whose,
            hits=self.hits,
        )
