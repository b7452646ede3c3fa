"""Whatever happens to a session with filters, in whatever order, its bytes are right.

Random steps: data and ends of both sides, a sink that reads or does not, turns of the
reactor, and filters that are put on and taken off, all of which pass everything on,
now or later.
"""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from relayd.core.session import Ending
from tests.support.own_filters import Delays, Grows, Makes, Own, Sees
from tests.support.relays import Relay

KINDS = [
    lambda: Makes(Own),
    lambda: Makes(Delays),
    lambda: Makes(Delays, course="up"),
    lambda: Makes(Delays, course="down"),
    lambda: Makes(Sees, 1000, 10),
    lambda: Makes(Sees, 70_000, 999, course="up"),
    lambda: Makes(Grows, 1),
]

STEPS = st.one_of(
    st.tuples(
        st.sampled_from(["up", "down"]), st.sampled_from([1, 500, 65_536, 150_000])
    ),
    st.tuples(st.just("end"), st.sampled_from(["up", "down"])),
    st.tuples(st.just("take"), st.sampled_from(["up", "down"])),
    st.tuples(st.just("turn"), st.just(0)),
    st.tuples(st.just("put on"), st.integers(0, len(KINDS) - 1)),
    st.tuples(st.just("take off"), st.integers(0, 3)),
)


@given(
    st.lists(st.integers(0, len(KINDS) - 1), max_size=3),
    st.booleans(),
    st.lists(STEPS, max_size=25),
)
def test_the_bytes_and_the_ends_are_right(
    kinds: list[int], half_close: bool, steps: list[tuple[str, Any]]
) -> None:
    filters = [KINDS[each]() for each in kinds]
    all_of_them = list(filters)
    relay = Relay(filters=filters, half_close=half_close)
    down = relay.client()
    up = relay.server.dial.connect()
    session = relay.session
    [protocol] = relay.factory.sessions.values()
    source, sink = {"up": down, "down": up}, {"up": up, "down": down}
    sent = {"up": b"", "down": b""}
    ends: list[str] = []
    count = 0
    for what, more in steps:
        if session.ended_at is not None:
            break
        if what in source:
            if what in ends or not source[what].reading or (ends and not half_close):
                continue
            count += 1
            data = bytes([count % 251]) * more
            source[what].receive(data)
            sent[what] += data
        elif what == "end" and more not in ends and source[more].connected:
            ends.append(more)
            source[more].receive_eof()
        elif what == "take" and sink[more].connected:
            sink[more].take()
        elif what == "turn":
            relay.clock.pump([0.0, 0.0])
        elif session.ending is not None or protocol.bridge.closing:
            continue
        elif what == "put on":
            filters.append(KINDS[more]())
            all_of_them.append(filters[-1])
            protocol.change_filters([], filters[-1:])
        elif what == "take off" and filters:
            gone = filters.pop(more % len(filters))
            protocol.change_filters([gone], [])
        for course in sent:
            assert sent[course].startswith(bytes(sink[course].taken))
    for course in ("up", "down"):
        one = source[course]
        if course not in ends and one.connected and not one.disconnecting:
            one.receive_eof()
    for _ in range(8):
        relay.clock.pump([0.0] * 4)
        for each in (up, down):
            if each.connected:
                each.take()
    assert session.ending is Ending.DONE
    for course in ("up", "down"):
        assert bytes(sink[course].taken) == sent[course]
        assert getattr(session, course).read == len(sent[course])
        assert getattr(session, course).kept == 0
    assert not relay.factory.sessions
    assert all(each.closed_once() for each in all_of_them)
    relay.factory.stopFactory()
    assert not relay.clock.getDelayedCalls()
