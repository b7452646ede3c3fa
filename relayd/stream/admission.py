"""A client whose gate takes its time: it waits, and nothing is read from it.

The gate has answered a Deferred or a coroutine.  Until that says more, the session is
WAITING: it stands on the wheel, so that it ends when its time is over or its client has
left, and a drain ends it.  Its client is reset then, as one that is refused at once.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import INegotiated
from twisted.python.failure import Failure

from relayd.core import pauses
from relayd.core.errors import Refused
from relayd.core.interfaces import ILease
from relayd.core.leases import checked, give_back, lease_of
from relayd.core.session import Ending
from relayd.core.stage import Stage
from relayd.net.tcp_info import ended_unread, has_ended, was_reset


def has_left(client: Any) -> bool:
    """Whether a client that waits, and is not read, has left.

    One that has sent something and then ended its side may be waiting for the answer to
    that, and keeps its place.  Not so a client of a proxy, which has yet to hear that
    it is served; one of TLS, which can't half-close; nor of a relay that does not.

    :param client: a :class:`relayd.stream.session.StreamProtocol`.
    """
    transport, factory = client.transport, client.factory
    if was_reset(transport):
        return True
    awaits_answer = (
        factory.bridge.half_closes
        and not factory.preludes
        and not INegotiated.providedBy(transport)
    )
    if not awaits_answer:
        return has_ended(transport)
    # What came with its PROXY header was read.
    return client.held is None and ended_unread(transport)


class Admission:
    """Waits for what the gate says about a client.

    :param client: a :class:`relayd.stream.session.StreamProtocol`.
    :param answer: the gate's: a Deferred or a coroutine of a lease.
    """

    def __init__(self, client: Any, answer: Any) -> None:
        self._client = client
        self._lease = lease_of(answer).addCallback(checked)
        #: Seconds that it may take, 0 is for ever; and since when.
        self._limit = self._since = 0.0

    def start(self) -> None:
        """Wait; the answer may come from within."""
        client = self._client
        factory = client.factory
        self._limit, self._since = self._time, factory.now()
        client.enter(Stage.WAITING, self._limit)
        client.pause(pauses.WAITING)
        factory.wheel.add(client)
        self._lease.addCallbacks(self._admitted, self._refused)
        self._lease.addErrback(client.failed)

    @property
    def _time(self) -> float:
        """The seconds that the gate has, as it is now; 0 is for ever."""
        factory = self._client.factory
        limit: float = factory.timeouts.handshake
        # A gate in which clients queue bounds the time of that itself.
        return limit and limit + getattr(factory.gate, "patience", 0.0)

    def overdue(self) -> None:
        """The gate has had its time, unless the queue may take longer now."""
        limit = self._time
        if limit > self._limit:
            self._limit = limit
            self._client.set_deadline(limit, self._since)
            return
        self._client.abort_session(
            Ending.HANDSHAKE_TIMEOUT, f"the gate did not answer in {self._limit:g} s"
        )

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self._lease.cancel()

    def _admitted(self, lease: ILease) -> None:
        client = self._client
        client.pending = None
        if has_left(client):
            give_back(lease)
            client.abort_session(Ending.CLIENT_LEFT, "before it was admitted")
            return
        client.take_lease(lease)

    def _refused(self, reason: Failure) -> None:
        client = self._client
        client.pending = None
        if client.session.ending is not None:
            # It was cancelled.
            return
        problem = reason.value
        if isinstance(problem, Refused):
            client.refuse_client(Ending.REFUSED, problem.why, problem.reason)
            return
        client.factory.log_failure("the gate failed", client.session, reason)
        client.refuse_client(Ending.FAILED, "the gate failed")
