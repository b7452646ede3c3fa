"""The same session through a route and without one: bytes, endings, counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet import error
from twisted.internet.defer import Deferred

from relayd.core.session import Session
from tests.support.fakes import FakeTransport
from tests.support.relays import Relay


async def at_once(conn: Any) -> Any:
    """Decides before the next turn."""
    return conn.pool()


async def peeks(conn: Any) -> Any:
    """Has to see a byte first."""
    assert (await conn.peek(1)) == b"a"
    return conn.pool()


async def in_a_turn(conn: Any) -> Any:
    """Has something else to ask."""
    answer: Deferred[None] = Deferred()
    conn.clock.callLater(0, answer.callback, None)
    await answer
    return conn.pool()


ROUTES: list[Callable[[Any], Any]] = [at_once, peeks, in_a_turn]

SIDES = st.sampled_from(["client", "server"])

STEPS = st.one_of(
    st.tuples(SIDES, st.sampled_from([1, 700, 70_000, 150_000])),
    st.tuples(st.sampled_from(["end", "reset", "take"]), SIDES),
    st.tuples(st.just("time"), st.sampled_from([0.0, 0.3, 2.0])),
)


class Course:
    """One session, from beginning to end.

    :ivar session: its record; the fakes at both ends of it.
    """

    def __init__(self, first: bytes, steps: list[tuple[str, Any]], **options: Any):
        self.relay = relay = Relay(
            idle_timeout=9.0, half_close_timeout=6.0, stall_timeout=5.0, **options
        )
        self.client: FakeTransport = relay.client()
        self.client.receive(first)
        relay.clock.pump([0.0] * 3)
        self.server: FakeTransport = relay.server.dial.connect()
        self.ends: set[str] = set()
        for what, more in steps:
            self._step(what, more)
        # Whatever is left of it, its timeouts end.
        for _ in range(80):
            relay.clock.pump([0.0, 0.25])

    @property
    def session(self) -> Session:
        return self.relay.session

    def _step(self, what: str, more: Any) -> None:
        ends = {"client": self.client, "server": self.server}
        if what == "time":
            self.relay.clock.pump([0.0, more])
        elif what in ends:
            one = ends[what]
            if one.connected and one.reading and what not in self.ends:
                one.receive(b"x" * more)
        elif what == "take":
            if ends[more].connected:
                ends[more].take()
        elif ends[more].connected and more not in self.ends:
            self.ends.add(more)
            if what == "end":
                ends[more].receive_eof()
            else:
                ends[more].lose(error.ConnectionLost())

    @property
    def outcome(self) -> dict[str, Any]:
        session, factory = self.session, self.relay.factory
        assert not factory.sessions
        return {
            "ending": session.ending,
            "detail": session.detail,
            "up": (session.up.read, session.up.kept, session.up.eof),
            "down": (session.down.read, session.down.kept, session.down.eof),
            "at the server": (len(self.server.taken), self.server.aborted),
            "at the client": (len(self.client.taken), self.client.aborted),
            "facts": dict(session.facts),
            "endings": dict(factory.endings),
            "heard": self.relay.witness.heard,
        }


@given(st.sampled_from(ROUTES), st.booleans(), st.lists(STEPS, max_size=12))
def test_a_route_changes_nothing(
    route: Callable[[Any], Any], half_close: bool, steps: list[tuple[str, Any]]
) -> None:
    without = Course(b"a", steps, half_close=half_close)
    routed = Course(b"a", steps, half_close=half_close, route=route)
    assert routed.outcome == without.outcome
    assert bytes(routed.server.taken) == bytes(without.server.taken)
    for each in (without, routed):
        each.relay.factory.stopFactory()
        assert not each.relay.clock.getDelayedCalls()
