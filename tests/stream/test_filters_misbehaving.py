"""Filters that do what they should not, or when nobody expects it: sessions end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.error import ConnectionDone, ConnectionLost

from relayd.core.filtering import LATER, MOST_HELD, SPLICE, Answer, EndSession, Way
from relayd.core.session import Ending
from relayd.net.transports import WriteRefused
from relayd.stream.chain import MOST_FLUSHED, TURN
from tests.conftest import LoggedFailures
from tests.stream.test_filtered_bridge import SIDES, Filtered
from tests.stream.test_redial import HEARD, Joined
from tests.support.own_filters import Delays, Ends, Grows, Keeps, Makes, Marks, Own

# -- sessions that have an ending already


class EndsAtEnd(Own):
    """Ends its session at the end of data."""

    def end(self) -> bytes:
        raise EndSession("it ends here", b", the end")


@pytest.mark.parametrize("course", SIDES)
def test_a_filter_ends_a_session_that_was_reset(course: str) -> None:
    """The other side is reset all the same."""
    relay = Filtered(Makes(EndsAtEnd, course=course))
    source, sink = relay.way(course)
    source.receive(b"said")
    source.lose(ConnectionLost())
    assert relay.passed(course) == b"said, the end"
    relay.clock.advance(1)
    assert sink.aborted
    side = "DOWNSTREAM" if course == "up" else "UPSTREAM"
    relay.ended(Ending[f"{side}_RESET"])


def test_a_session_is_ended_while_others_have_their_turn() -> None:
    class Slow(Own):
        most_at_once = 1000

        def data(self, data: bytes) -> bytes:
            relay.clock.rightNow += TURN
            return data

    slow = Makes(Slow, course="up")
    relay = Filtered(slow)
    relay.protocol.dataReceived(b"x" * 2500)
    slow.made[0].way.end_session("enough")
    assert relay.passed("up") == b"x" * 1000
    relay.clock.advance(1)
    relay.ended(Ending.FILTERED)


# -- answers that are none


@pytest.mark.parametrize("wrong", [None, "text", bytearray(b"x"), 1, LATER])
@pytest.mark.parametrize("where", ["data", "end", "remove", "SPLICE"])
def test_an_answer_that_is_no_bytes(
    where: str, wrong: Any, logged_failures: LoggedFailures
) -> None:
    class Answers(Own):
        def data(self, data: bytes) -> Any:
            return {"data": wrong, "SPLICE": SPLICE}.get(where, data)

        def end(self) -> Any:
            return b"" if where == "data" else wrong

        def remove(self) -> Any:
            return wrong

    if where == "end" and wrong is LATER:
        return
    own = Makes(Answers, course="up", name="mine")
    relay = Filtered(own)
    if where == "remove":
        relay.protocol.change_filters([own], [])
    else:
        relay.down.receive(b"data")
        relay.down.receive_eof()
    relay.ended(Ending.FILTER_FAILED)
    logged_failures.take("filter mine of session")


def test_a_fact_that_is_no_text(logged_failures: LoggedFailures) -> None:
    class Counts(Own):
        def data(self, data: bytes) -> bytes:
            self.way.note("lines", len(data))
            return data

    relay = Filtered(Makes(Counts, course="up", name="mine"))
    relay.down.receive(b"data")
    relay.ended(Ending.FILTER_FAILED)
    logged_failures.take("filter mine of session")
    assert relay.session.detail == "filter mine: note: found int, expected text"


@pytest.mark.parametrize("wrong", [None, "text", bytearray(b"x")])
@pytest.mark.parametrize("where", ["pass_on", "finish", "last"])
def test_what_a_timer_passes_on_is_no_bytes(
    where: str, wrong: Any, logged_failures: LoggedFailures
) -> None:
    class Passes(Own):
        def end(self) -> Answer:
            self.way.clock.callLater(1, self.now)
            return LATER

        def now(self) -> None:
            if where == "last":
                raise EndSession("why", wrong)
            getattr(self.way, where)(wrong)

    relay = Filtered(Makes(Passes, course="up"))
    relay.down.receive_eof()
    relay.clock.advance(1)
    relay.ended(Ending.FILTER_FAILED)
    logged_failures.take("filter own of session")


@pytest.mark.parametrize("name", ["held", "most_held", "growth", "most_at_once"])
def test_a_number_that_is_none(name: str, logged_failures: LoggedFailures) -> None:
    """It is a method, and not a property, for instance."""
    wrong: Any = type("Wrong", (Own,), {name: lambda _: 0})
    relay = Filtered(Makes(wrong, course="up", name="mine"), early=b"x" * 100_000)
    assert relay.session.detail.startswith("filter mine: ")
    relay.ended(Ending.FILTER_FAILED)
    logged_failures.take("filter mine of session")


def test_an_error_that_quotes_all_that_was_said(
    logged_failures: LoggedFailures,
) -> None:
    class Quotes(Own):
        def data(self, data: bytes) -> bytes:
            raise ValueError(f"what is {data!r}?")

    relay = Filtered(Makes(Quotes, course="up", name="mine"))
    relay.down.receive(b"x" * 60_000)
    assert relay.session.detail.startswith("filter mine: what is b'xxx")
    assert len(relay.session.detail) < 300
    relay.ended(Ending.FILTER_FAILED)
    logged_failures.take("filter mine of session")


# -- timers that raise


class Waits(Own):
    """Does something in a second."""

    def __init__(self, way: Way, then: Callable[[Any], object]) -> None:
        super().__init__(way)
        way.clock.callLater(1, then, self)


def raises(_: Waits) -> None:
    raise ZeroDivisionError("in a timer")


def ends(_: Waits) -> None:
    raise EndSession("its time was over", b"bye", reset=False)


def test_a_timer_that_raises_ends_its_session(logged_failures: LoggedFailures) -> None:
    relay = Filtered(Makes(Waits, raises, course="up", name="mine"))
    relay.clock.advance(1)
    assert relay.session.detail == "filter mine: in a timer"
    relay.ended(Ending.FILTER_FAILED)
    assert "Traceback" in logged_failures.take("filter mine of session")


def test_a_timer_that_ends_its_session() -> None:
    relay = Filtered(Makes(Waits, ends, course="up"))
    relay.clock.advance(1)
    assert relay.passed("up") == b"bye"
    relay.closed()


def test_a_timer_that_was_left_behind_harms_nobody() -> None:
    """It is not of the session any more, and is logged as any timer's."""
    own = Makes(Waits, raises, course="up")
    relay = Filtered(own)
    own.made[0].way.leave()
    with pytest.raises(ZeroDivisionError):
        relay.clock.advance(1)
    assert relay.session.ending is None
    relay.protocol.abort_session(Ending.KILLED)
    relay.ended(Ending.KILLED)


# -- calls within calls


class Does(Own):
    """Does something in each call of one kind."""

    def __init__(self, way: Way, where: str, what: Callable[[Way], object]) -> None:
        super().__init__(way)
        self.where, self.what = where, what

    def data(self, data: bytes) -> bytes:
        return self._do("data", data)

    def end(self) -> bytes:
        return self._do("end", b", end")

    def remove(self) -> bytes:
        return self._do("remove", b", gone")

    def close(self) -> None:
        self._do("close", b"")
        super().close()

    def _do(self, where: str, answer: bytes) -> bytes:
        if where == self.where:
            self.what(self.way)
        return answer


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("where", ["data", "end", "remove", "close"])
def test_one_that_leaves_in_a_call(where: str, behind: bool) -> None:
    does = Makes(Does, where, lambda way: way.leave(), course="up")
    marks = [Makes(Marks, b".", course="up")] * behind
    relay = Filtered(does, *marks)
    relay.down.receive(b"said")
    if where == "remove":
        relay.protocol.change_filters([does], [])
    relay.down.receive(b", more")
    relay.down.receive_eof()
    out = {
        "remove": [b"said", b", gone", b", more"],
        "data": [b"said", b", more"],
    }.get(where, [b"said", b", more", b", end"])
    mark = b"." * behind
    assert relay.passed("up") == b"".join(each + mark for each in out)
    assert relay.up.write_shut
    relay.up.receive_eof()
    relay.ended(Ending.DONE)


@pytest.mark.parametrize("behind", [False, True])
def test_one_that_is_taken_off_in_a_call(behind: bool) -> None:
    """Who reads a capture may have seen enough."""

    def take_off(_: Way) -> None:
        relay.protocol.change_filters([does], [])

    does = Makes(Does, "data", take_off, course="up")
    marks = [Makes(Marks, b".", course="up")] * behind
    relay = Filtered(does, *marks)
    relay.down.receive(b"said")
    relay.down.receive(b"more")
    mark = b"." * behind
    # What it had left is what comes first.
    assert relay.passed("up") == b", gone" + mark + b"said" + mark + b"more" + mark
    relay.protocol.abort_session(Ending.KILLED)
    relay.ended(Ending.KILLED)


def test_one_that_leaves_and_puts_the_end_off() -> None:
    class Both(Own):
        def end(self) -> Answer:
            self.way.leave()
            return LATER

    relay = Filtered(Makes(Both, course="up"), Makes(Marks, b".", course="up"))
    relay.down.receive(b"said")
    relay.down.receive_eof()
    assert relay.passed("up") == b"said."
    assert relay.up.write_shut
    relay.up.receive_eof()
    relay.ended(Ending.DONE)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("where", ["data", "end", "remove", "close"])
def test_one_that_ends_its_session_in_a_call(where: str, reset: bool) -> None:
    """What the call answers is not passed on; a filter that is closed says nothing."""
    does = Makes(
        Does, where, lambda way: way.end_session("now", reset=reset), course="up"
    )
    relay = Filtered(does, Makes(Delays, course="up"))
    relay.down.receive(b"said")
    relay.turns()
    if where == "remove":
        relay.protocol.change_filters([does], [])
    else:
        relay.down.receive_eof()
    relay.turns()
    out = {"data": b"", "close": b"said, end"}.get(where, b"said")
    assert relay.passed("up") == out
    if where == "close":
        relay.up.receive_eof()
    relay.clock.advance(1)
    if where == "close":
        relay.ended(Ending.DONE)
    elif reset:
        relay.ended(Ending.FILTERED)
    else:
        relay.closed()


@pytest.mark.parametrize("where", ["data", "end", "remove", "close"])
def test_one_that_passes_on_in_a_call(where: str) -> None:
    """It comes before what the call answers; nothing once it is closed."""
    does = Makes(Does, where, lambda way: way.pass_on(b"first: "), course="up")
    relay = Filtered(does, Makes(Marks, b".", course="up"))
    relay.down.receive(b"said")
    if where == "remove":
        relay.protocol.change_filters([does], [])
    relay.down.receive_eof()
    out = {
        "data": b"first: .said., end.",
        "end": b"said.first: ., end.",
        "remove": b"said.first: ., gone.",
        "close": b"said., end.",
    }
    assert relay.passed("up") == out[where]
    relay.up.receive_eof()
    relay.ended(Ending.DONE)


def test_one_that_finishes_before_it_has_put_the_end_off(
    logged_failures: LoggedFailures,
) -> None:
    class Finishes(Own):
        def end(self) -> Answer:
            self.way.finish(b"too early")
            return LATER

    relay = Filtered(Makes(Finishes, course="up"))
    relay.down.receive_eof()
    relay.ended(Ending.FILTER_FAILED)
    logged_failures.take("finish is for one that has answered LATER")


# -- filters that come late


@pytest.mark.parametrize("course", SIDES)
def test_a_session_that_closes_behind_its_first_end_gets_none(course: str) -> None:
    """With half-close off what comes now is dropped, also by one that had filters."""
    relay = Filtered(Makes(Own), half_close=False)
    source, sink = relay.way(course)
    source.receive(b"said")
    source.receive_eof()
    late = Makes(Own)
    relay.protocol.change_filters([], [late])
    assert not late.made
    sink.receive(b"too late")
    sink.receive_eof()
    assert relay.passed(course) == b"said"
    relay.ended(Ending.DONE)
    assert bytes(source.taken) == b""


@pytest.mark.parametrize("count", [0, 1])
def test_a_direction_whose_sink_has_left_gets_none(count: int) -> None:
    """As TLS leaves, which can't half-close: what is read for it ends the session."""
    relay = Filtered(*[Makes(Own)] * count)
    relay.down.lose(ConnectionDone())
    late = Makes(Own)
    relay.protocol.change_filters([], [late])
    assert not late.made
    relay.up.receive(b"too late")
    relay.ended(Ending.DOWNSTREAM_WRITE_FAILED)


# -- what waits as the other side ends


class Shouts(Own):
    """Makes capital letters, and ends its session at an exclamation mark."""

    most_held = 100

    def data(self, data: bytes) -> bytes:
        if b"!" in data:
            raise EndSession("it was shouted")
        return data.upper()


@pytest.mark.parametrize("reset", [False, True])
def test_what_waits_is_filtered_as_the_other_side_ends(reset: bool) -> None:
    """With half-close off, or as a filter closes the session."""
    ends = [Makes(Ends, False, course="up")] * reset
    relay = Filtered(Makes(Shouts, course="down"), *ends, half_close=reset)
    relay.up.receive(b"x" * 200_000)
    if reset:
        relay.down.receive(b"!")
    else:
        relay.down.receive_eof()
    assert relay.passed("down") == b"X" * 200_000
    relay.up.receive_eof()
    if reset:
        relay.closed()
    else:
        relay.ended(Ending.DONE)


@pytest.mark.parametrize("reset", [False, True])
def test_what_waits_ends_the_session_as_the_other_side_ends(reset: bool) -> None:
    ends = [Makes(Ends, False, course="up")] * reset
    keeps = Makes(Keeps, course="down")
    relay = Filtered(Makes(Shouts, course="down"), keeps, *ends, half_close=reset)
    relay.protocol.bridge.upstream.dataReceived(b"x" * 131_072 + b"y" * 70_000 + b"!z")
    if reset:
        relay.down.receive(b"!")
    else:
        relay.down.receive_eof()
        assert relay.down.connected
        keeps.of("down").let_go()
    assert relay.passed("down") == b"X" * 131_072 + b"Y" * 65_536
    relay.clock.advance(1)
    if reset:
        relay.closed()
    else:
        relay.ended(Ending.FILTERED)


@pytest.mark.parametrize("later", [False, True])
def test_what_is_held_has_its_end_as_the_other_side_ends(later: bool) -> None:
    """A match may be decided by it.  What is put off is passed on at once."""

    class Decides(Keeps):
        def end(self) -> bytes | Answer:
            return LATER if later else self.remove() + b", at the end"

    relay = Filtered(Makes(Decides, course="down"), half_close=False)
    relay.up.receive(b"held")
    relay.down.receive_eof()
    assert relay.passed("down") == (b"held" if later else b"held, at the end")
    relay.up.receive_eof()
    relay.ended(Ending.DONE)


def test_what_grows_is_bounded_as_the_other_side_ends() -> None:
    relay = Filtered(Makes(Grows, 1000, course="down"), half_close=False)
    relay.up.receive(b"x" * 60_000)
    relay.down.receive_eof()
    assert len(relay.passed("down")) < 60_000 + MOST_FLUSHED + 2 * MOST_HELD
    relay.clock.advance(1)
    assert relay.down.aborted
    relay.ended(Ending.FILTERED)


# -- another server


def test_what_a_filter_has_seen_goes_to_no_other_server() -> None:
    """It would be seen, and changed, twice; also if the filter has left since."""

    class Once(Own):
        def data(self, data: bytes) -> bytes:
            self.way.leave()
            return b"changed: " + data

    relay = Joined(filters=[Makes(Once, course="up")])
    relay.down.receive(b"said")
    assert relay.protocol.filtered == ()
    relay.up.lose(WriteRefused(b"changed: said"))
    relay.is_cut(Ending.UPSTREAM_RESET)


def test_before_a_filter_has_seen_anything_another_server_is_dialled() -> None:
    own = Makes(Own)
    relay = Joined(filters=[own])
    relay.up.lose(ConnectionLost())
    relay.serves(relay.next())
    relay.over(*HEARD, "closed done")
    assert len(own.made) == 4
    assert own.closed_once()


# -- drains


@pytest.mark.parametrize("course", SIDES)
def test_a_session_is_in_use_while_a_filter_holds_something(course: str) -> None:
    """A drain does not end it as idle: what is held would be lost."""
    keeps = Makes(Keeps, course=course)
    relay = Filtered(keeps)
    source, _ = relay.way(course)
    source.receive(b"held")
    relay.clock.pump([1.0] * 10)
    bridge = relay.protocol.bridge
    assert bridge.idle_since() is None
    assert bridge.idle_for(relay.clock.seconds()) == 0.0
    keeps.of(course).let_go()
    assert relay.passed(course) == b"held"
    relay.clock.pump([1.0] * 10)
    assert bridge.idle_since() is not None
    relay.protocol.abort_session(Ending.DRAINED)
    relay.ended(Ending.DRAINED)
