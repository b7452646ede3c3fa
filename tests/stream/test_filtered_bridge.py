"""Sessions with filters, on fakes: order, ends, losses, bounds, and living changes."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.error import ConnectionLost

from relayd.core.filtering import MOST_HELD, EndSession
from relayd.core.pauses import FILTERS, PEER_FULL
from relayd.core.session import Ending
from relayd.stream.bridge import Bridge
from relayd.stream.chain import TURN
from relayd.stream.filterable import NotRelayed
from tests.conftest import LoggedFailures
from tests.support.fakes import FakeTransport
from tests.support.own_filters import (
    Breaks,
    Delays,
    Ends,
    Grows,
    Keeps,
    Makes,
    Marks,
    Own,
    Sees,
)
from tests.support.relays import Relay

SIDES = ["up", "down"]


class Filtered(Relay):
    """A relay with filters, and a client that is relayed."""

    def __init__(self, *filters: Makes, early: bytes = b"", **options: Any) -> None:
        super().__init__(filters=filters, **options)
        self.filters = list(filters)
        self.down = self.client()
        if early:
            self.down.receive(early)
        self.up = self.server.dial.connect()

    @property
    def protocol(self) -> Any:
        [found] = self.factory.sessions.values()
        return found

    def way(self, course: str) -> tuple[FakeTransport, FakeTransport]:
        """The source and the sink of a direction."""
        return (self.down, self.up) if course == "up" else (self.up, self.down)

    def passed(self, course: str) -> bytes:
        """What has come out at the sink."""
        _, sink = self.way(course)
        if sink.connected:
            sink.take()
        return bytes(sink.taken)

    def turns(self) -> None:
        """Some turns of the reactor."""
        self.clock.pump([0.0] * 4)

    def closed(self) -> None:
        """A filter has closed it: both peers got an end of data, and end as well."""
        for each in self.down, self.up:
            if each.connected:
                each.take()
                assert each.write_shut
                each.receive_eof()
        self.ended(Ending.FILTERED)

    def ended(self, ending: Ending) -> None:
        """It has, and nothing is left of it; each filter was closed, once."""
        self.turns()
        assert self.session.ending is ending
        assert not self.factory.sessions
        assert not self.down.connected
        assert not self.up.connected
        assert all(each.closed_once() for each in self.filters)
        self.factory.stopFactory()
        assert not self.clock.getDelayedCalls()


@pytest.mark.parametrize("course", SIDES)
def test_the_first_filter_is_nearest_to_the_source(course: str) -> None:
    relay = Filtered(Makes(Marks, b"1"), Makes(Marks, b"2"))
    source, _ = relay.way(course)
    source.receive(b"a")
    source.receive(b"b")
    assert relay.passed(course) == b"a12b12"
    counts = getattr(relay.session, course)
    assert (counts.read, counts.written) == (2, 6)
    relay.up.receive_eof()
    relay.down.receive_eof()
    relay.ended(Ending.DONE)


def test_what_came_before_the_server_is_filtered_and_its_header_is_not() -> None:
    relay = Filtered(Makes(Marks, b"."), early=b"early", send_proxy="v1")
    head, _, rest = relay.passed("up").partition(b"\r\n")
    assert head.startswith(b"PROXY TCP4 192.0.2.1 ")
    assert rest == b"early."
    counts = relay.session.up
    assert (counts.read, counts.written) == (5, len(head) + 2 + 6)


def test_a_filter_of_one_direction() -> None:
    relay = Filtered(Makes(Marks, b".", course="down"))
    relay.down.receive(b"question")
    relay.up.receive(b"answer")
    assert relay.passed("up") == b"question"
    assert relay.passed("down") == b"answer."
    assert relay.protocol.filtered == ["own"]


def test_no_filter_wants_to_see_it() -> None:
    relay = Filtered(Makes(Own, course="neither"))
    assert type(relay.protocol.bridge) is Bridge
    assert relay.protocol.filtered == ()


# -- ends


@pytest.mark.parametrize("course", SIDES)
def test_an_end_passes_behind_what_is_held(course: str) -> None:
    keeps = Makes(Keeps, course=course)
    relay = Filtered(keeps)
    (source, sink), filter_ = relay.way(course), keeps.of(course)
    source.receive(b"held")
    source.receive_eof()
    assert not sink.write_shut
    sink.receive(b"the other direction goes on")
    filter_.let_go(2)
    assert relay.passed(course) == b"he"
    assert not sink.write_shut
    filter_.let_go()
    assert relay.passed(course) == b"held"
    assert sink.write_shut
    assert relay.session.server_first is (course == "down")
    source.take()
    sink.receive_eof()
    relay.ended(Ending.DONE)


def test_both_ends_are_held_back() -> None:
    relay = Filtered(Makes(Keeps))
    [keeps] = relay.filters
    for side, transport in (("up", relay.down), ("down", relay.up)):
        transport.receive(side.encode())
        transport.receive_eof()
    keeps.of("up").let_go()
    assert relay.passed("up") == b"up"
    assert relay.up.write_shut
    assert relay.down.connected
    keeps.of("down").let_go()
    assert relay.passed("down") == b"down"
    relay.ended(Ending.DONE)


def test_each_filter_puts_the_end_off() -> None:
    first, second = Makes(Keeps, course="up"), Makes(Keeps, course="up")
    relay = Filtered(first, second)
    relay.down.receive(b"held")
    relay.down.receive_eof()
    assert not second.of("up").is_ending
    first.of("up").let_go()
    assert second.of("up").is_ending
    assert relay.passed("up") == b""
    second.of("up").let_go()
    assert relay.passed("up") == b"held"
    assert relay.up.write_shut


@pytest.mark.parametrize("course", SIDES)
def test_a_reset_passes_behind_what_is_held(course: str) -> None:
    keeps = Makes(Keeps, course=course)
    relay = Filtered(keeps)
    source, sink = relay.way(course)
    source.receive(b"held")
    source.lose(ConnectionLost())
    assert sink.connected
    assert not sink.aborted
    keeps.of(course).let_go()
    assert relay.passed(course) == b"held"
    relay.clock.advance(1)
    assert sink.aborted
    relay.ended(Ending.DOWNSTREAM_RESET if course == "up" else Ending.UPSTREAM_RESET)


def test_the_other_side_leaves_while_a_reset_is_held_back() -> None:
    relay = Filtered(Makes(Keeps))
    relay.down.receive(b"held")
    relay.down.lose(ConnectionLost())
    relay.up.lose(ConnectionLost())
    relay.ended(Ending.DOWNSTREAM_RESET)


@pytest.mark.parametrize("ends", [False, True])
def test_a_session_is_not_idle_while_a_filter_holds_something(ends: bool) -> None:
    """But no longer than an hour."""
    keeps = Makes(Keeps, course="up")
    relay = Filtered(keeps, idle_timeout=5, half_close_timeout=5)
    relay.down.receive(b"held")
    if ends:
        relay.down.receive_eof()
    for _ in range(30):
        relay.clock.advance(1)
    assert relay.session.ending is None
    keeps.of("up").let_go(1)
    assert relay.passed("up") == b"h"
    for _ in range(3700):
        relay.clock.advance(1)
    relay.ended(Ending.HALF_CLOSED if ends else Ending.IDLE)


def test_an_abort_holds_nothing_back() -> None:
    relay = Filtered(Makes(Keeps))
    relay.down.receive(b"held")
    relay.protocol.abort_session(Ending.KILLED)
    relay.ended(Ending.KILLED)


@pytest.mark.parametrize("first", SIDES)
def test_without_half_close_the_first_end_closes_both_behind_what_is_held(
    first: str,
) -> None:
    keeps = Makes(Keeps)
    relay = Filtered(keeps, half_close=False)
    source, sink = relay.way(first)
    source.receive(b"forth")
    sink.receive(b"back")
    source.receive_eof()
    assert sink.connected
    assert not sink.write_shut
    keeps.of(first).let_go()
    assert relay.passed(first) == b"forth"
    source.take()
    assert bytes(source.taken) == b"back", "what was held for it came at once"
    sink.receive(b"is dropped")
    sink.receive_eof()
    relay.ended(Ending.DONE)


def test_without_half_close_both_ends_are_held_back() -> None:
    keeps = Makes(Keeps)
    relay = Filtered(keeps, half_close=False)
    relay.down.receive_eof()
    relay.up.receive_eof()
    assert relay.down.connected
    keeps.of("down").let_go()
    relay.ended(Ending.DONE)


# -- leaving


@pytest.mark.parametrize("course", SIDES)
def test_one_that_has_seen_enough_leaves(course: str) -> None:
    """What it holds comes first, then the chunk as it is, then all unseen."""
    sees, marks = Makes(Sees, 4, 3, course=course), Makes(Marks, b".", course=course)
    relay = Filtered(sees, marks)
    source, _ = relay.way(course)
    source.receive(b"abcd")
    assert relay.passed(course) == b"a."
    source.receive(b"efgh")
    source.receive(b"ij")
    assert relay.passed(course) == b"a.bcdefgh.ij."
    assert sees.closed_once()
    assert relay.protocol.filtered == ["own"]


def test_when_the_last_has_left_it_is_a_plain_session() -> None:
    relay = Filtered(Makes(Sees))
    relay.down.receive(b"question")
    assert type(relay.protocol.bridge) is not Bridge
    relay.up.receive(b"answer")
    assert type(relay.protocol.bridge) is Bridge
    relay.down.receive(b", and another")
    assert relay.passed("up") == b"question, and another"
    assert relay.passed("down") == b"answer"
    relay.down.receive_eof()
    relay.up.receive_eof()
    relay.ended(Ending.DONE)


def test_it_is_plain_from_what_came_before_the_server_on() -> None:
    relay = Filtered(Makes(Sees, course="up"), early=b"early")
    assert type(relay.protocol.bridge) is Bridge
    relay.down.receive_eof()
    assert relay.passed("up") == b"early"
    assert relay.up.write_shut


def test_one_that_leaves_outside_of_a_call() -> None:
    own = Makes(Own)
    relay = Filtered(own)
    for each in list(own.made):
        each.way.leave()
        each.way.leave()
        each.way.pass_on(b"too late")
    assert type(relay.protocol.bridge) is Bridge
    assert own.closed_once()
    assert relay.passed("up") == b""


def test_a_full_side_is_read_on_after_the_filters_have_left() -> None:
    sees = Makes(Sees, 100_000)
    relay = Filtered(sees)
    relay.down.receive(b"x" * 65536)
    relay.down.receive(b"x" * 65536)
    relay.up.receive(b"y" * 200_000)
    assert relay.protocol.paused & PEER_FULL
    for each in list(sees.made):
        each.way.leave()
    relay.up.take()
    relay.down.take()
    assert type(relay.protocol.bridge) is Bridge
    assert relay.down.reading
    assert relay.up.reading
    relay.down.receive(b"z")
    assert relay.passed("up") == b"x" * 131072 + b"z"


# -- sessions that filters end


@pytest.mark.parametrize("course", SIDES)
def test_a_filter_resets_its_session(course: str) -> None:
    """What it has passed on arrives, through the filters behind it."""
    marks = Makes(Marks, b".", course=course)
    relay = Filtered(Makes(Ends, course=course, name="deny"), marks)
    source, sink = relay.way(course)
    source.receive(b"said")
    source.receive(b" and shouted! And more")
    assert source.aborted
    assert relay.passed(course) == b"said. and shouted."
    relay.clock.advance(1)
    assert sink.aborted
    assert relay.session.detail == "deny: it was shouted"
    relay.ended(Ending.FILTERED)


def test_a_filter_ends_its_session_outside_of_a_call() -> None:
    own = Makes(Own, name="watch")
    relay = Filtered(own)
    relay.down.receive(b"said")
    own.of("down").way.end_session("its time was over")
    assert relay.up.aborted
    relay.passed("up")
    relay.clock.advance(1)
    assert relay.session.detail == "watch: its time was over"
    relay.ended(Ending.FILTERED)


def test_a_filter_ends_its_session_at_the_end() -> None:
    class AtEnd(Own):
        def end(self) -> bytes:
            raise EndSession("nothing was said")

    relay = Filtered(Makes(AtEnd, course="up"))
    relay.down.receive_eof()
    relay.clock.advance(1)
    relay.ended(Ending.FILTERED)


# -- what is broken


@pytest.mark.parametrize("where", ["data", "answer", "end", "end's answer"])
def test_a_filter_that_raises_ends_its_session_alone(
    where: str, logged_failures: LoggedFailures
) -> None:
    relay = Filtered(Makes(Breaks, where, course="up", name="mine"))
    other = relay.client()
    relay.server.dials[-1].connect()
    relay.down.receive(b"data")
    if where.startswith("end"):
        relay.down.receive_eof()
    relay.turns()
    session = relay.witness.sessions[0]
    assert session.ending is Ending.FILTER_FAILED
    assert session.detail.startswith("filter mine: ")
    assert relay.down.aborted
    assert relay.up.aborted
    assert other.connected
    said = logged_failures.take("filter mine of session")
    assert "Traceback" in said


def test_a_filter_that_can_t_be_made_fails_its_session(
    logged_failures: LoggedFailures,
) -> None:
    relay = Filtered(Makes(Own), Makes(Breaks, "build"), early=b"early")
    relay.ended(Ending.FILTER_FAILED)
    assert relay.passed("up") == b""
    logged_failures.take("ZeroDivisionError")


def test_one_that_holds_more_than_it_may_has_failed(
    logged_failures: LoggedFailures,
) -> None:
    relay = Filtered(Makes(Keeps, 100, course="up"))
    relay.down.receive(b"x" * 101)
    relay.ended(Ending.FILTER_FAILED)
    assert "it holds 101 bytes, 100 are allowed" in relay.session.detail
    logged_failures.take("of session")


def test_one_that_can_t_be_closed_harms_nobody(logged_failures: LoggedFailures) -> None:
    class Sticks(Own):
        def close(self) -> None:
            super().close()
            raise ZeroDivisionError("stuck")

    relay = Filtered(Makes(Sticks, course="up"))
    relay.down.receive_eof()
    relay.up.receive_eof()
    relay.ended(Ending.DONE)
    logged_failures.take("ZeroDivisionError")


def test_a_note_that_can_t_be_one(logged_failures: LoggedFailures) -> None:
    class Notes(Own):
        def data(self, data: bytes) -> bytes:
            self.way.note("no such=name", "x")
            return data

    relay = Filtered(Makes(Notes))
    relay.down.receive(b"data")
    relay.ended(Ending.FILTER_FAILED)
    logged_failures.take("of session")


def test_notes_are_facts_of_the_session() -> None:
    own = Makes(Own)
    relay = Filtered(own)
    own.of("up").way.note("asked", "GET")
    own.of("down").way.note("told", "200")
    own.of("up").way.note("asked", "PUT")
    assert relay.session.facts == {"asked": "PUT", "told": "200"}


# -- bounds


def test_the_source_is_not_read_while_a_filter_holds_much() -> None:
    keeps = Makes(Keeps, course="up")
    relay = Filtered(keeps)
    for _ in range(3):
        relay.down.receive(b"x" * 65536)
    assert not relay.down.reading
    assert relay.protocol.paused == FILTERS
    keeps.of("up").let_go(65536)
    assert relay.down.reading
    relay.down.receive(b"x" * 65536)
    assert not relay.down.reading
    relay.passed("up")
    # It drops what it holds, and tells nobody: the next check finds that.
    keeps.of("up").kept = b""
    relay.protocol.check(relay.clock.seconds())
    assert relay.down.reading


def test_a_large_chunk_that_is_held_waits_in_pieces() -> None:
    """More than a filter may hold came at once: what was held before the join."""
    keeps = Makes(Keeps, 140_000, course="up")
    relay = Filtered(keeps, early=b"x" * 300_000)
    assert keeps.of("up").held <= 140_000
    passed = 0
    while keeps.of("up").held:
        passed += keeps.of("up").held
        keeps.of("up").let_go()
        relay.up.take()
    assert passed == 300_000
    assert relay.passed("up") == b"x" * 300_000
    assert relay.down.reading


def test_what_grows_is_made_while_the_sink_takes_it() -> None:
    grows = Makes(Grows, 1000, course="up")
    relay = Filtered(grows)
    relay.down.receive(b"x" * 10_000)
    relay.down.receive_eof()
    most = 0
    for _ in range(100):
        most = max(most, len(relay.up.dataBuffer))
        relay.up.take()
    assert most <= 65536 + MOST_HELD
    assert grows.made[0].largest <= MOST_HELD
    assert bytes(relay.up.taken) == b"x" * 10_000_000
    assert relay.up.write_shut


def test_what_takes_long_gives_others_their_turn() -> None:
    class Slow(Own):
        """Each piece takes as long as a turn may."""

        most_at_once = 1000

        def data(self, data: bytes) -> bytes:
            relay.clock.rightNow += TURN
            return data

    relay = Filtered(Makes(Slow, course="up"))
    relay.protocol.dataReceived(b"x" * 2500)
    assert relay.session.up.written == 1000
    assert not relay.down.reading
    relay.protocol.readConnectionLost()
    assert not relay.up.write_shut
    relay.clock.advance(0)
    assert relay.passed("up") == b"x" * 2500
    assert relay.up.write_shut
    relay.up.receive(b"answer")
    relay.protocol.abort_session(Ending.KILLED)
    relay.ended(Ending.KILLED)


def test_a_session_that_ends_while_others_have_their_turn() -> None:
    class Slow(Own):
        most_at_once = 1000

        def data(self, data: bytes) -> bytes:
            relay.clock.rightNow += TURN
            return data

    relay = Filtered(Makes(Slow, course="up"))
    relay.protocol.dataReceived(b"x" * 2500)
    relay.protocol.abort_session(Ending.KILLED)
    relay.ended(Ending.KILLED)


# -- living sessions


@pytest.mark.parametrize("half_close", [True, False])
def test_filters_are_put_on_a_living_session_and_taken_off(half_close: bool) -> None:
    relay = Filtered(half_close=half_close)
    relay.down.receive(b"1")
    marks, keeps = Makes(Marks, b"."), Makes(Keeps, course="up", name="keeps")
    relay.protocol.change_filters([], [marks])
    relay.down.receive(b"2")
    relay.protocol.change_filters([], [keeps])
    assert relay.protocol.filtered == ["own", "keeps"]
    relay.down.receive(b"3")
    relay.up.receive(b"a")
    assert relay.passed("up") == b"12."
    relay.protocol.change_filters([keeps], [])
    assert relay.passed("up") == b"12.3."
    relay.protocol.change_filters([marks], [])
    relay.down.receive(b"4")
    assert relay.passed("up") == b"12.3.4"
    assert relay.passed("down") == b"a."
    assert relay.protocol.filtered == ()
    assert marks.closed_once()
    assert keeps.closed_once()
    relay.protocol.change_filters([marks], [keeps])
    relay.down.receive(b"5")
    relay.down.receive_eof()
    relay.up.receive_eof()
    keeps.made[-1].let_go()
    assert relay.passed("up") == b"12.3.45"
    relay.ended(Ending.DONE)


def test_a_filter_in_place_of_the_only_one() -> None:
    before, after = Makes(Marks, b"-"), Makes(Marks, b"+")
    relay = Filtered(before)
    relay.down.receive(b"1")
    relay.protocol.change_filters([before], [after])
    relay.down.receive(b"2")
    assert relay.passed("up") == b"1-2+"
    assert before.closed_once()


def test_of_two_that_are_equal_one_is_taken_off() -> None:
    marks = Makes(Marks, b".", course="up")
    relay = Filtered(marks, marks)
    relay.down.receive(b"a")
    relay.protocol.change_filters([marks], [])
    relay.down.receive(b"b")
    relay.protocol.change_filters([marks], [])
    relay.down.receive(b"c")
    assert relay.passed("up") == b"a..b.c"


def test_a_direction_that_has_ended_gets_no_filter() -> None:
    relay = Filtered()
    relay.down.receive_eof()
    marks = Makes(Marks, b".")
    relay.protocol.change_filters([], [marks])
    relay.up.receive(b"answer")
    assert relay.passed("down") == b"answer."
    assert [each.way.course for each in marks.made] == ["down"]
    relay.up.receive_eof()
    relay.ended(Ending.DONE)


def test_one_that_puts_the_end_off_is_taken_off() -> None:
    keeps = Makes(Keeps, course="up")
    relay = Filtered(keeps)
    relay.down.receive(b"held")
    relay.down.receive_eof()
    relay.protocol.change_filters([keeps], [])
    assert relay.passed("up") == b"held"
    assert relay.up.write_shut
    relay.up.receive_eof()
    relay.ended(Ending.DONE)


def test_a_filter_that_breaks_as_it_is_put_on_or_taken_off(
    logged_failures: LoggedFailures,
) -> None:
    relay = Filtered()
    relay.protocol.change_filters([], [Makes(Breaks, "build")])
    relay.ended(Ending.FILTER_FAILED)
    breaks = Makes(Breaks, "remove")
    other = Filtered(breaks)
    other.protocol.change_filters([breaks], [])
    other.ended(Ending.FILTER_FAILED)
    logged_failures.take("as it was made")
    logged_failures.take("by removal")


def test_a_session_that_is_not_relayed_gets_none() -> None:
    relay = Relay()
    client = relay.client()
    [protocol] = relay.factory.sessions.values()
    with pytest.raises(NotRelayed, match=r"session \d+ is not relayed"):
        protocol.change_filters([], [Makes(Own)])
    server = relay.server.dial.connect()
    client.receive_eof()
    server.receive(b"x")
    server.receive_eof()
    with pytest.raises(NotRelayed, match=r"session \d+ is ending"):
        protocol.change_filters([], [Makes(Own)])
    client.take()
    assert protocol.filtered == ()


def test_a_bridge_of_a_program_s_own_has_no_filters() -> None:
    class OwnBridge(Bridge):
        pass

    relay = Relay()
    relay.factory.bridge = OwnBridge
    with pytest.raises(TypeError, match="OwnBridge has no filters"):
        relay.factory.filter_by([Makes(Own)])
    relay.factory.filter_by([])
    relay.client()
    relay.server.dial.connect()
    [protocol] = relay.factory.sessions.values()
    with pytest.raises(TypeError, match="OwnBridge has no filters"):
        protocol.change_filters([], [Makes(Own)])
    protocol.abort_session(Ending.KILLED)


def test_timers_of_filters_end_with_the_session() -> None:
    relay = Filtered(Makes(Delays))
    relay.down.receive(b"held")
    relay.up.receive(b"as well")
    relay.protocol.abort_session(Ending.KILLED)
    relay.ended(Ending.KILLED)
