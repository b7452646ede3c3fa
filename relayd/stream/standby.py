"""Clients that wait for a server, while none can be chosen.

A pool whose database fails over has none for some seconds.  Until it has, new clients
are kept: connected, their first bytes held as while a server is dialled, in order, so
many and so long.  So are those whose dial has failed and has nobody left to go to.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure

from relayd.core.session import Ending
from relayd.core.stage import Stage
from relayd.stream.retries import NEVER, Choosing

#: The most clients of a relay that wait.
MAX_WAITING = 4096


class _Waiting:
    """One client that waits."""

    def __init__(
        self, room: StandBy, client: Any, limit: float, dial: Callable[[Any], object]
    ) -> None:
        self._room = room
        self.client = client
        self.limit = limit
        self.dial = dial

    def cancel(self) -> None:
        """The client has left."""
        self._room.forget(self)

    def comes_on(self) -> bool:
        """It has a deadline, and that is all."""
        return False

    def overdue(self) -> None:
        """It has waited for too long."""
        self._room.forget(self)
        self.client.pending = None
        why = f"no server could be chosen in {self.limit:g} s"
        self.client.end(Ending.NO_UPSTREAM, why)


class StandBy:
    """Where the clients of one relay wait for a server.

    :param pool: its servers.
    :param limit: the seconds for which a client waits.
    :param clock: calls back soon after a server has changed.
    :param most: the clients that may wait.

    :ivar turned_away: how many clients did not get in, as `most` waited.
    """

    def __init__(
        self,
        pool: Choosing,
        limit: float,
        clock: IReactorTime,
        most: int = MAX_WAITING,
    ) -> None:
        self._pool = pool
        self.limit = limit
        self._clock = clock
        self.most = most
        # A dict would be searched for its first entry, past all that are deleted.
        self._waiting: OrderedDict[_Waiting, None] = OrderedDict()
        self._called = False
        self.turned_away = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def wait(
        self,
        client: Any,
        limit: float = NEVER,
        dial: Callable[[Any], object] | None = None,
    ) -> None:
        """A client for which there is no server.

        :param limit: the seconds that are left to it, if it has dialled one.
        :param dial: called with its server, once there is one; unless given, the client
            dials it.
        """
        if len(self._waiting) >= self.most:
            self.turned_away += 1
            client.end(Ending.NO_UPSTREAM, f"{self.most} clients wait for a server")
            return
        seconds = min(self.limit, round(limit, 3)) if limit < NEVER else self.limit
        if client.session.stage in (Stage.DIALING, Stage.DECIDING):
            client.set_deadline(seconds)
        else:
            client.enter(Stage.DECIDING, seconds)
        waiting = _Waiting(self, client, seconds, dial or client.dial)
        client.pending = waiting
        self._waiting[waiting] = None

    def forget(self, waiting: _Waiting) -> None:
        """This one waits no longer."""
        self._waiting.pop(waiting, None)

    def server_changed(self, server: object = None) -> None:
        """A server may have come up: look soon, from no call of a session's."""
        if self._waiting and not self._called:
            self._called = True
            self._clock.callLater(0, self._look)

    def _look(self) -> None:
        self._called = False
        while self._waiting:
            # Not a list of them: where one leaves as another ends, that is each time.
            waiting = next(iter(self._waiting))
            client = waiting.client
            try:
                server = self._pool.choose(client.session)
                if server is None:
                    return
                self.forget(waiting)
                client.pending = None
                waiting.dial(server)
            except Exception:
                self.forget(waiting)
                client.failed(Failure())
