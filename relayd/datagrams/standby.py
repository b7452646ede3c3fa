"""New clients that wait for a server, while none can be chosen.

Their first datagrams are kept, in order, until there is a server or the client has
waited too long; then they are sent, or dropped.  They count as received only then, so
that what was received is always what was sent and dropped.  What is kept has a limit in
bytes, of which one client key has a part; what goes beyond is dropped, as
:data:`FULL`.

The gate has let these clients in, and what it gave for them is kept until their flow
has ended, or they have waited in vain.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable
from typing import Any, Protocol

import attrs
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from relayd.core.flows import NewFlow
from relayd.core.interfaces import ILease
from relayd.core.leases import give_back
from relayd.datagrams.ledger import Ledger
from relayd.datagrams.listener import DatagramListener
from relayd.datagrams.servers import Server
from relayd.datagrams.sockets import BUFFER_SIZE
from relayd.datagrams.unanswered import KEPT_OVERHEAD, MAX_KEPT
from relayd.net.log_throttle import LogThrottle

log = Logger(namespace="relayd.datagrams")

#: Bytes of all that wait, and what each client counts in addition to its datagrams: so
#: there are 4,096 at most.  One client key has this part of it.
MAX_BYTES, CLIENT_OVERHEAD, PART = 4 << 20, 824, 4

#: Clients that get their server in one turn of the reactor.
AT_ONCE = 256

#: The reasons for which datagrams are dropped: their client has waited in vain; no
#: more may be kept; the relay closes.
NO_SERVER, FULL, DRAINING = "no_server", "waiting_full", "draining"


@attrs.define(eq=False)
class WaitingClient:
    """One that waits.

    :ivar listener: that it has sent to.
    :ivar client: its key there, its address, where to reply to.
    :ivar host: its client key.
    :ivar asked: the flow, for a pool that chooses.
    :ivar lease: what the gate gave for it, if there is one.
    :ivar until: when it has waited too long.
    :ivar datagrams: that it has sent, the first ones.
    :ivar size: what they count.
    """

    listener: DatagramListener
    client: tuple[Any, Any, Any]
    host: str
    asked: NewFlow | None
    lease: ILease | None
    until: float = 0.0
    datagrams: list[bytes] = attrs.Factory(list)
    size: int = 0

    @property
    def place(self) -> Hashable:
        """What tells it from others."""
        return self.listener.number, self.client[0]


class Opener(Protocol):
    """What opens flows (:class:`relayd.datagrams.opening.FlowOpener`)."""

    def server_for(self, waiting: WaitingClient) -> Server | None:
        """A server for it, if one can be chosen by now."""

    def open_for(self, waiting: WaitingClient, server: Server) -> Any:
        """Its flow; None: it gets none, and one datagram was counted as dropped.

        What was kept of the gate's is the flow's, or was given back.
        """


class FlowStandBy:
    """Where the new clients of one relay wait for a server.

    :param limit: the seconds for which one waits.

    :ivar limit: the same, as it is now.
    """

    def __init__(self, ledger: Ledger[Any], limit: float, opener: Opener) -> None:
        self._ledger = ledger
        self.limit = limit
        self._opener = opener
        #: In the order in which they came, which is that of `until` as well.  A dict
        #: would be searched for its first entry, past all that are deleted.
        self._waiting: OrderedDict[Hashable, WaitingClient] = OrderedDict()
        self._sizes: Counter[str] = Counter()
        self._size = 0
        #: Call back when a server may be there; when the first has waited too long.
        self._look_soon: IDelayedCall | None = None
        self._timer: IDelayedCall | None = None
        self._throttle = LogThrottle(ledger.clock)

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def size(self) -> int:
        """Bytes in use, at most :data:`MAX_BYTES`."""
        return self._size

    def wait_for(self, limit: float) -> None:
        """Let clients wait so long, those that wait now from now on.

        With 0 they are dropped, once it is clear that there is no server for them.
        """
        self.limit = limit
        until = self._ledger.now() + limit
        for waiting in self._waiting.values():
            waiting.until = until
        self._cancel()
        self.server_changed()

    def begin(self, waiting: WaitingClient, data: Any) -> bool:
        """A client for which there is no server begins to wait.

        :param data: its first datagram.
        :return: whether it does; if not, its datagram was counted as dropped.
        """
        if not self._keep(waiting, data):
            return False
        waiting.until = self._ledger.now() + self.limit
        self._waiting[waiting.place] = waiting
        self._wake_at_first()
        return True

    def add(self, place: Hashable, data: Any) -> bool:
        """Keep another datagram of a client, if it waits.

        :return: whether it does; its datagram may have been dropped.
        """
        waiting = self._waiting.get(place)
        if waiting is not None:
            self._keep(waiting, data)
        return waiting is not None

    def _keep(self, waiting: WaitingClient, data: Any) -> bool:
        counters = self._ledger.counters
        if len(data) >= BUFFER_SIZE:
            counters.dropped["truncated"] += 1
            return False
        size, own = len(data) + KEPT_OVERHEAD, self._sizes[waiting.host]
        if not waiting.datagrams:
            size += CLIENT_OVERHEAD
        if (
            len(waiting.datagrams) == MAX_KEPT
            or self._size + size > MAX_BYTES
            or own + size > MAX_BYTES // PART
        ):
            counters.dropped[FULL] += 1
            return False
        # A copy: the next batch overwrites the buffer.
        waiting.datagrams.append(bytes(data))
        waiting.size += size
        self._size += size
        self._sizes[waiting.host] = own + size
        counters.received -= 1
        return True

    def _forget(self, waiting: WaitingClient) -> None:
        """This one waits no longer: its datagrams are received now."""
        del self._waiting[waiting.place]
        self._size -= waiting.size
        self._sizes[waiting.host] -= waiting.size
        if not self._sizes[waiting.host]:
            del self._sizes[waiting.host]
        self._ledger.counters.received += len(waiting.datagrams)

    def _drop(self, waiting: WaitingClient, reason: str) -> None:
        self._forget(waiting)
        self._ledger.counters.dropped[reason] += len(waiting.datagrams)
        if waiting.lease is not None:
            give_back(waiting.lease)

    # -- a server is there

    def server_changed(self, server: object = None) -> None:
        """One may have come up: look soon, from no call of a flow's."""
        if self._waiting and self._look_soon is None:
            self._look_soon = self._ledger.clock.callLater(0, self._look)

    def _look(self) -> None:
        self._look_soon = None
        for _ in range(AT_ONCE):
            waiting = next(iter(self._waiting.values()), None)
            if waiting is None:
                break
            try:
                server = self._opener.server_for(waiting)
            except Exception:
                # Of a selector that somebody else has made.
                self._ledger.log_failure("no server for a flow")
                self._drop(waiting, "failed")
                continue
            if server is None:
                break
            self._forget(waiting)
            self._serve(waiting, server)
        else:
            self.server_changed()
        self._wake_at_first()

    def _serve(self, waiting: WaitingClient, server: Server) -> None:
        counters, flow = self._ledger.counters, None
        try:
            flow = self._opener.open_for(waiting, server)
            if flow is None:
                counters.dropped["no_flow"] += len(waiting.datagrams) - 1
                return
            now = self._ledger.now()
            for data in waiting.datagrams:
                flow.forward((data,), now)
        except Exception:
            self._ledger.log_failure("the flow of a client that has waited failed")
            self._ledger.balance()

    # -- none comes

    def _wake_at_first(self) -> None:
        """Have a timer for the first, if there is one.

        Not before a look that is due: it may be served, and the look sets the timer.
        """
        first = next(iter(self._waiting.values()), None)
        if first is None:
            self._cancel()
        elif self._timer is None and self._look_soon is None:
            left = max(first.until - self._ledger.now(), 0.0)
            self._timer = self._ledger.clock.callLater(left, self._expire)

    def _expire(self) -> None:
        self._timer = None
        now, gone = self._ledger.now(), 0
        while self._waiting:
            first = next(iter(self._waiting.values()))
            if first.until > now:
                break
            self._drop(first, NO_SERVER)
            gone += 1
        if gone and self._throttle.is_due():
            in_time = f"could be chosen in {self.limit:g} s"
            log.warn(
                "{relay}: no server {could}: what its clients have sent is dropped"
                " ({count} datagrams for want of a server so far)",
                relay=self._ledger.name,
                could=in_time if self.limit else "can be chosen",
                count=self._ledger.counters.dropped[NO_SERVER],
            )
        self._wake_at_first()

    def refuse_all(self) -> None:
        """Nobody may wait any more."""
        for waiting in list(self._waiting.values()):
            self._drop(waiting, NO_SERVER)

    def take_over(self, before: FlowStandBy) -> None:
        """Those that wait there wait here now, and no longer than others do here."""
        self._waiting, before._waiting = before._waiting, OrderedDict()
        self._sizes, before._sizes = before._sizes, Counter()
        self._size, before._size = before._size, 0
        latest = self._ledger.now() + self.limit
        for waiting in self._waiting.values():
            waiting.until = min(waiting.until, latest)
        self.server_changed()

    def stop(self) -> None:
        """The relay accepts no new client: nobody waits any more."""
        for waiting in list(self._waiting.values()):
            self._drop(waiting, DRAINING)
        self._cancel()
        soon, self._look_soon = self._look_soon, None
        if soon is not None:
            soon.cancel()

    def _cancel(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
