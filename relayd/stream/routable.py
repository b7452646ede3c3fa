"""A client that a route decides about, or that goes to one of several pools.

Of a relay without either nothing of this is used.  What a route decides is done in one
place, :meth:`Routable.carry_out`; the session is as any other then.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import IHalfCloseableDescriptor, INegotiated
from twisted.python.failure import Failure

from relayd.core.addresses import host_of
from relayd.core.errors import Refused
from relayd.core.pauses import BEFORE_JOINING
from relayd.core.route_spec import DEFAULT
from relayd.core.routing import LONGEST_WHY, NO_LIMITS, Decision, RouteFailed
from relayd.core.session import TAKEN, Ending
from relayd.core.stage import Stage
from relayd.net.upstream import Upstream
from relayd.stream.deadlines import CLOSE_GRACE
from relayd.stream.deciding import Deciding, begin_deciding
from relayd.stream.pools_of import NOWHERE, PoolOf
from relayd.stream.session import StreamProtocol


class Routable(StreamProtocol):
    """A client's leg whose server may be decided late, and by somebody else.

    :ivar going_to: the pool that it is for, once that is known; of a relay that has
        several.
    """

    #: A factory with `router`, and with `pools` and `named`, if it has servers.
    factory: Any
    going_to: PoolOf = NOWHERE

    # -- deciding

    def ask_route(self) -> None:
        """Have the route decide; the session is DECIDING meanwhile."""
        if self.factory.looks_first and self.held is None and not self.paused:
            # What has come is read before the route is asked, at the end of the batch
            # as without a route: one that has to wait for it is three times as dear.
            # One that does not look would be dearer by that.
            unread = getattr(self.transport, "has_unread", None)
            if unread is not None and unread():
                begin_deciding(self)
                self.transport.relay_soon(self._ask_about_first)
                return
        Deciding(self).start(self.factory.router)

    def _ask_about_first(self) -> None:
        if not self.alive or self.session.ending is not None:
            return
        try:
            Deciding(self).start(self.factory.router)
        except Exception:
            self.failed(Failure())

    def wait_undecided(self) -> None:
        """It has to wait for a decision: count it with those that do."""
        queue = self.factory.handshakes
        if queue is not None and self not in queue:
            self._enter_queue(host_of(self.session.client))

    def carry_out(self, decision: Decision) -> None:
        """Do what the route has decided."""
        session = self.session
        if decision.facts:
            # What a client has said in its request is not what its route says.
            taken = {"pool", *session.facts}
            for name, text in decision.facts.items():
                session.note(TAKEN + name if name in taken else name, text)
        if decision.refused is not None:
            self.turn_away(decision.refused[:LONGEST_WHY], decision.reply)
            return
        try:
            if decision.limits is not NO_LIMITS:
                self.limit_alone(decision.limits)
            if decision.filters:
                self.filter_alone(decision.filters)
        except Refused as refusal:
            self.turn_away(refusal.why)
            return
        except (TypeError, ValueError) as problem:
            # What its relay can't have, as a program has made it.
            raise RouteFailed(str(problem)) from problem
        if decision.pool is None:
            self.go_by_itself(decision.server)
            return
        place = self.factory.pools.get(decision.pool)
        if place is None:
            # A program's own router does not know which there are.
            raise RouteFailed(f"there is no pool {decision.pool!r:.60}")
        self.go_to(place)

    def go_to(self, place: PoolOf) -> None:
        """Dial a server of one of the relay's pools, or wait for one."""
        self.going_to = place
        session = self.session
        if place.name != DEFAULT:
            session.note("pool", place.name)
        server = place.pool.choose(session)
        standby = place.standby
        if server is None and standby is not None and place.waits:
            self.leave_queue()
            standby.wait(self)
        else:
            self.dial(server)

    def go_by_itself(self, where: Any) -> None:
        """Dial the server that the route has named."""
        self.going_to = self.factory.named
        self.dial(self.upstream_of(where))

    def upstream_of(self, where: Any) -> Upstream:
        """The server that the route has named."""
        upstream: Upstream = self.factory.router.upstream(where)
        return upstream

    def turn_away(self, why: str, reply: bytes = b"") -> None:
        """The client is refused.

        :param reply: what it is told first.  It has CLOSE_GRACE seconds to read that,
            and is reset if there is none.
        """
        if not reply:
            self.abort_session(Ending.DENIED, why)
            return
        session, transport = self.session, self.transport
        session.ending, session.detail = Ending.DENIED, why
        self.stop_waiting()
        self.enter(Stage.CLOSING, CLOSE_GRACE)
        self.reader, self.held = self._drop, None
        transport.write(reply)
        half_closes = IHalfCloseableDescriptor.providedBy(transport)
        if self.direction.eof or not half_closes or INegotiated.providedBy(transport):
            transport.loseConnection()
            return
        # A close with something unread would be a reset, and the reply be lost.
        transport.loseWriteConnection()
        self.resume(BEFORE_JOINING)

    def route_failed(self, why: str) -> None:
        """The route has raised, or has answered what is no decision."""
        self.abort_session(Ending.ROUTE_FAILED, why)

    # -- the client's side

    def ended_alone(self) -> None:
        """See :meth:`Leg.ended_alone`."""
        if self.session.stage is Stage.CLOSING:
            self.transport.loseConnection()
            return
        StreamProtocol.ended_alone(self)
        if isinstance(self.pending, Deciding):
            self.pending.client_ended()
