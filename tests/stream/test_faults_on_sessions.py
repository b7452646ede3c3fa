"""Faults on sessions: in any number and order, put on and taken off as bytes move.

None of these drops anything, so what arrives is what was sent, and the ends behind it.
"""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from relayd.core.filtering import MOST_HELD
from relayd.core.session import Ending
from relayd.filters.fault_bandwidth import Bandwidth
from relayd.filters.fault_endings import SlowClose
from relayd.filters.fault_latency import Latency
from relayd.filters.fault_slicer import Slicer
from relayd.filters.faults import StreamFault
from tests.support.relays import Relay

FAULTS: list[StreamFault] = [
    Latency(20, 15, seed=1),
    Latency(5, direction="up"),
    Bandwidth(1000),
    Bandwidth(300, direction="up"),
    Slicer(1000, 900, 100, seed=1),
    Slicer(700, direction="up"),
    SlowClose(30),
    SlowClose(30, direction="up"),
]

STEPS = st.one_of(
    st.tuples(st.sampled_from(["up", "down"]), st.sampled_from([1, 500, 9_000])),
    st.tuples(st.just("end"), st.sampled_from(["up", "down"])),
    st.tuples(st.just("take"), st.sampled_from(["up", "down"])),
    st.tuples(st.just("time"), st.sampled_from([0, 0.001, 0.02])),
    st.tuples(st.just("put on"), st.integers(0, len(FAULTS) - 1)),
    st.tuples(st.just("take off"), st.integers(0, 3)),
)


@given(
    st.lists(st.sampled_from(FAULTS), max_size=4, unique=True),
    st.lists(STEPS, max_size=25),
)
def test_the_bytes_and_the_ends_are_right(
    filters: list[StreamFault], steps: list[tuple[str, Any]]
) -> None:
    relay = Relay(filters=filters)
    down = relay.client()
    up = relay.server.dial.connect()
    session = relay.session
    [protocol] = relay.factory.sessions.values()
    on = list(filters)
    source, sink = {"up": down, "down": up}, {"up": up, "down": down}
    sent = {"up": b"", "down": b""}
    ends: list[str] = []
    for number, (what, more) in enumerate(steps):
        if session.ended_at is not None:
            break
        if what in source:
            if what not in ends and source[what].reading:
                data = bytes([number]) * more
                source[what].receive(data)
                sent[what] += data
        elif what == "end" and more not in ends and source[more].connected:
            ends.append(more)
            source[more].receive_eof()
        elif what == "take" and sink[more].connected:
            sink[more].take()
        elif what == "time":
            relay.clock.advance(more)
        elif session.ending is not None or protocol.bridge.closing:
            continue
        elif what == "put on" and FAULTS[more] not in on:
            on.append(FAULTS[more])
            protocol.change_filters([], [FAULTS[more]])
        elif what == "take off" and on:
            protocol.change_filters([on.pop(more % len(on))], [])
        for course in sent:
            assert sent[course].startswith(bytes(sink[course].taken))
    for course in ("up", "down"):
        if course not in ends and source[course].connected:
            source[course].receive_eof()
    for _ in range(300):
        if not (up.connected or down.connected):
            break
        relay.clock.advance(0.01)
        for each in (up, down):
            if each.connected:
                each.take()
    assert session.ending is Ending.DONE
    for course in ("up", "down"):
        assert bytes(sink[course].taken) == sent[course]
        assert getattr(session, course).kept == 0
    assert not relay.factory.sessions
    relay.factory.stopFactory()
    assert not relay.clock.getDelayedCalls()


def test_what_one_passes_on_at_once_is_not_too_much_for_the_next() -> None:
    """A slow line behind a long one: what both hold together is what one may."""
    relay = Relay(filters=[Latency(50), Latency(80), Bandwidth(100)])
    down = relay.client()
    up = relay.server.dial.connect()
    sent = 0
    while relay.clock.seconds() < 10:
        for _ in range(8):
            if up.reading:
                up.receive(bytes(65_536))
                sent += 65_536
        relay.clock.advance(0.01)
        down.take()
        assert relay.session.ending is None
        assert relay.session.down.kept <= MOST_HELD
    # The line was never idle.
    assert len(down.taken) >= 100_000 * 9.8
    down.lose()
    relay.clock.pump([0.0] * 4)
    assert not relay.factory.sessions
    relay.factory.stopFactory()
    assert not relay.clock.getDelayedCalls()
