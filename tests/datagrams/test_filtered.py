"""Filters of flows: what is given to them, what comes out, and what is counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from relayd.admission.bandwidth import Bandwidth
from relayd.admission.rates import Rates
from relayd.core.filtering import DatagramWay, FilterFactory
from relayd.preludes.proxy_protocol import write_version_2
from tests.datagrams.filters import (
    OTHER,
    Filters,
    Sees,
    answers,
    appends,
    delay,
    delays,
    doubles,
    drops,
    fails,
    replies,
    run,
)
from tests.datagrams.support import (
    CLIENT,
    NAMED,
    Bench,
    Defect,
    named,
    peers,
    problem,
    refuse,
)


def test_the_first_is_nearest_to_the_source_in_both_directions() -> None:
    bench = Bench(filters=[appends(b"1"), appends(b"2"), appends(b"3", "down")])
    bench.arrive(b"q")
    bench.answer(b"a")
    [sock] = bench.sockets
    assert sock.sent == [b"q12"]
    assert replies(bench) == [b"a123"]
    [flow] = bench.nat.table.flows.values()
    assert flow.filtered == ("1", "2", "3")
    assert (flow.up_datagrams, flow.up_bytes) == (1, 3)
    assert (flow.down_datagrams, flow.down_bytes) == (1, 4)
    bench.check()
    bench.close()


def test_one_without_a_name_has_that_of_its_class() -> None:
    class Unnamed(FilterFactory):
        def build_datagram_filter(self, way: DatagramWay) -> Any:
            return appends(b"1").build_datagram_filter(way)

    bench = Bench(filters=[Unnamed()])
    bench.arrive(b"q")
    [flow] = bench.nat.table.flows.values()
    assert flow.filtered == ("Unnamed",)
    bench.close()


def test_what_a_filter_knows_of_its_flow() -> None:
    one, two = appends(b"1"), appends(b"2", "up")
    bench = Bench(filters=[one, two])
    bench.arrive(b"x")
    bench.arrive(b"x", OTHER)
    up, down, other, _ = [each.way for each in one.made]
    assert [up.course, down.course] == ["up", "down"]
    assert up.client == "192.0.2.1:4000"
    assert [up.ordinal, down.ordinal, other.ordinal] == [0, 0, 1]
    assert up.shared is down.shared
    assert up.shared is not other.shared
    assert up.shared is not two.made[0].way.shared
    assert up.clock.seconds() == bench.clock.seconds()
    assert [each.course for each in (seen.way for seen in two.made)] == ["up", "up"]
    bench.close()
    assert [each.closed for each in one.made + two.made] == [1] * 6


def test_what_does_not_come_out_is_dropped_and_counted() -> None:
    bench = Bench(filters=[drops("up")])
    run(bench, b"1", b"2", b"333")
    assert bench.nat.counters.dropped == {"filtered": 3}
    assert bench.nat.counters.sent == 0
    [flow] = bench.nat.table.flows.values()
    assert (flow.up_datagrams, flow.up_bytes) == (0, 0)
    bench.check()
    # Its client is alive.
    bench.clock.advance(20)
    bench.arrive()
    bench.clock.pump([1] * 20)
    assert list(bench.nat.table) == [flow]
    bench.close()


def test_replies_that_do_not_come_out_are_dropped_and_counted() -> None:
    bench = Bench(filters=[drops("down")])
    bench.arrive()
    answers(bench, *[b"a"] * 3, b"bbb")
    assert bench.listener.sent == []
    assert bench.nat.counters.replies_dropped == {"filtered": 4}
    [flow] = bench.nat.table.flows.values()
    assert flow.down_datagrams == 0
    # Its server has answered, all the same.
    assert flow.replied
    bench.check()
    bench.close()


def test_what_is_made_in_addition_is_counted_as_sent() -> None:
    bench = Bench(filters=[doubles("up down"), doubles("up")])
    bench.arrive(b"12")
    bench.answer(b"3")
    [sock] = bench.sockets
    assert sock.sent == [b"12"] * 4
    assert replies(bench) == [b"3"] * 2
    [flow] = bench.nat.table.flows.values()
    assert (flow.up_datagrams, flow.up_bytes) == (4, 8)
    assert (flow.down_datagrams, flow.down_bytes) == (2, 2)
    counters = bench.nat.counters
    assert (bench.nat.counts.kept, bench.nat.counts.replies_kept) == (-3, -1)
    bench.check()
    # A defect of another kind counts no more than what is missing.
    bench.nat.ledger.balance()
    assert not counters.dropped
    bench.close()


def test_runs_are_given_one_by_one_and_sent_as_runs() -> None:
    seen: list[bytes] = []

    def note(_: Sees, data: bytes) -> Sequence[bytes]:
        seen.append(data)
        return [data]

    bench = Bench(filters=[Filters(note)])
    bench.arrive(b"x")
    [sock] = bench.sockets
    calls: list[int] = []
    sendmsg = sock.sendmsg

    def noting(run: Any, *more: Any) -> None:
        calls.append(len(run))
        sendmsg(run, *more)

    sock.sendmsg = noting  # type: ignore[method-assign]
    datagrams = [b"1", b"2", b"3", b"44", b"55", b"", b"", b"666"]
    run(bench, *datagrams)
    assert sock.sent == [b"x", *datagrams]
    assert calls == [3, 2]
    answers(bench, *datagrams)
    assert replies(bench) == datagrams
    assert seen == [b"x", *datagrams, *datagrams]
    bench.check()
    bench.close()


def test_a_run_that_can_not_be_sent_as_one() -> None:
    bench = Bench(filters=[appends(b"!")])
    bench.arrive(b"x")
    [sock] = bench.sockets
    sock.segments = 22
    sock.errors += [None, problem(90), problem(90)]
    run(bench, b"1", b"2", b"3")
    assert sock.sent == [b"x!", b"1!", b"3!"]
    assert bench.nat.counters.dropped == {"send_EMSGSIZE": 1}
    bench.check()
    bench.close()


def test_what_is_kept_comes_later() -> None:
    bench = Bench(filters=[delays("up down"), appends(b"!")])
    bench.arrive(b"q")
    [sock] = bench.sockets
    [flow] = bench.nat.table.flows.values()
    assert sock.sent == []
    assert (bench.nat.counts.kept, flow.kept, flow.up_datagrams) == (1, 1, 0)
    bench.nat.ledger.balance()
    assert not bench.nat.counters.dropped
    bench.clock.advance(1)
    assert sock.sent == [b"q!"]
    assert (bench.nat.counts.kept, flow.kept, flow.up_datagrams) == (0, 0, 1)
    bench.answer(b"a")
    assert bench.nat.counts.replies_kept == 1
    bench.clock.advance(1)
    assert replies(bench) == [b"a!"]
    bench.check()
    bench.close()


def test_what_is_kept_when_a_flow_ends_is_dropped() -> None:
    late = delays("up down")
    bench = Bench(filters=[late])
    bench.arrive(b"q")
    bench.clock.advance(1)
    bench.arrive(b"q")
    bench.answer(b"a")
    bench.close()
    assert bench.sockets[0].sent == [b"q"]
    assert bench.nat.counters.dropped == {"filtered": 1}
    assert bench.nat.counters.replies_dropped == {"filtered": 1}
    assert not bench.nat.counts.kept
    assert [each.closed for each in late.made] == [1, 1]
    # Whoever has still hold of the way does no harm.
    late.made[0].way.send(b"late")
    late.made[0].way.clock.callLater(0, lambda: pytest.fail("the filter is closed"))
    bench.clock.advance(0)
    assert bench.sockets[0].sent == [b"q"]


def test_a_timer_that_its_filter_has_forgotten_does_nothing() -> None:
    def forget(one: Sees, data: bytes) -> Sequence[bytes]:
        one.way.clock.callLater(1, one.way.send, data)
        return ()

    bench = Bench(filters=[Filters(forget, "up")])
    bench.arrive(b"q")
    bench.nat.close()
    bench.clock.advance(1)
    assert bench.sockets[0].sent == []
    bench.check()
    bench.close()


def test_a_filter_that_has_no_room() -> None:
    def full(one: Sees, data: bytes) -> Sequence[bytes]:
        one.way.count_drop()
        return ()

    bench = Bench(filters=[Filters(full)])
    bench.arrive()
    bench.answer()
    assert bench.nat.counters.dropped == {"filter_full": 1}
    assert bench.nat.counters.replies_dropped == {"filter_full": 1}
    bench.check()
    bench.close()


def test_a_filter_may_answer_a_client_itself() -> None:
    def answer(one: Sees, data: bytes) -> Sequence[bytes]:
        if one.way.course == "down":
            return [data]
        one.way.shared["down"].send(b"mine")
        return ()

    def build(way: DatagramWay) -> Any:
        way.shared[way.course] = way
        return Filters.build_datagram_filter(own, way)

    own = Filters(answer)
    own.build_datagram_filter = build  # type: ignore[method-assign]
    bench = Bench(filters=[own])
    bench.arrive(b"q")
    bench.answer(b"a")
    assert replies(bench) == [b"mine", b"a"]
    assert bench.sockets[0].sent == []
    bench.check()
    bench.close()


# -- filters that fail


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("course", ["up", "down"])
def test_one_that_raises_ends_its_flow_and_nothing_else(
    course: str, together: bool, logged_failures: list[Any]
) -> None:
    bench = Bench(filters=[fails(course)], together=together)
    bench.arrive(b"1")
    bench.answer(b"1")
    bench.arrive(b"2", OTHER)
    if course == "up":
        run(bench, b"one", b"bad", b"six", b"bad", b"xxx")
        assert bench.sockets[0].sent == [b"1", b"one"]
        # What has come with it is not a new flow's.
        assert bench.nat.counters.dropped == {"filter_failed": 4}
    else:
        bench.sockets[0].inbox += [b"one", b"bad", b"six", b"seven"]
        while bench.sockets[0].inbox and not bench.sockets[0].closed:
            bench.watcher.ready(bench.sockets[0].number)
        assert replies(bench) == [b"1", b"one"]
        assert bench.nat.counters.replies_dropped["filter_failed"] >= 1
    assert bench.observer.endings == ["filter_failed"]
    [text] = logged_failures
    assert "filter fails failed; the flow of 192.0.2.1:4000 ends" in text
    assert "Defect" in text
    logged_failures.clear()
    bench.check()
    # The other flow is as it was, and the client gets another.
    bench.answer(b"3")
    bench.arrive(b"4", OTHER)
    bench.arrive(b"5")
    assert [each.sent[-1] for each in bench.sockets[1:]] == [b"4", b"5"]
    bench.check()
    bench.close()


def test_a_single_datagram_that_a_filter_fails_at(logged_failures: list[Any]) -> None:
    bench = Bench(filters=[fails("up")])
    bench.listener.inbox += [(b"bad", CLIENT), (b"x", OTHER), (b"good", CLIENT)]
    bench.watcher.ready(bench.listener.number)
    assert bench.observer.endings == ["filter_failed"]
    assert [each.sent for each in bench.sockets] == [[], [b"x"], [b"good"]]
    assert bench.nat.counters.dropped == {"filter_failed": 1}
    logged_failures.clear()
    bench.check()
    bench.close()


def test_one_that_fails_when_its_flow_would_be_in_use(
    logged_failures: list[Any],
) -> None:
    """The table, which has forgotten it, hears no more of it."""
    bench = Bench(filters=[fails("up")])
    bench.arrive(b"q")
    bench.answer(b"a")
    bench.clock.advance(2.25)
    bench.listener.inbox += [(b"bad", CLIENT), (b"x", OTHER)]
    bench.watcher.ready(bench.listener.number)
    assert bench.observer.endings == ["filter_failed"]
    assert len(logged_failures) == 1
    logged_failures.clear()
    assert bench.sockets[1].sent == [b"x"]
    bench.check()
    bench.close()


def test_one_that_fails_while_a_datagram_is_sent(logged_failures: list[Any]) -> None:
    """A refusal is reported, replies are read; then the datagram goes out still."""
    bench = named(filters=[appends(b"!", "up"), fails("down")])
    bench.arrive(b"1")
    [sock] = bench.sockets
    sock.inbox.append(b"bad")
    sock.errors.append(problem(111))
    bench.arrive(b"2")
    assert sock.sent == [b"1!", b"2!"]
    assert bench.observer.endings == ["filter_failed"]
    assert not bench.nat.counters.dropped
    assert bench.nat.counters.replies_dropped == {"filter_failed": 1}
    logged_failures.clear()
    bench.check()
    bench.close()


def test_in_a_flood_one_traceback_a_second_is_logged(
    logged_failures: list[Any],
) -> None:
    bench = Bench(filters=[fails("up")])
    for port in range(1, 21):
        bench.arrive(b"bad", ("192.0.2.1", port))
    assert len(logged_failures) == 1
    bench.clock.advance(1)
    bench.arrive(b"bad")
    assert len(logged_failures) == 2
    logged_failures.clear()
    assert bench.observer.endings == ["filter_failed"] * 21
    assert bench.nat.counters.dropped == {"filter_failed": 21}
    bench.close()


@pytest.mark.parametrize("answer", [None, [None], ["text"], [bytearray(b"x")], 1, b"x"])
def test_what_is_no_datagram(answer: Any, logged_failures: list[Any]) -> None:
    bench = Bench(filters=[Filters(lambda _, data: answer)])
    bench.arrive(b"q")
    assert bench.observer.endings == ["filter_failed"]
    [text] = logged_failures
    assert "TypeError" in text
    logged_failures.clear()
    bench.check()
    bench.close()


def test_a_timer_that_raises_ends_its_flow(logged_failures: list[Any]) -> None:
    def later(one: Sees, data: bytes) -> Sequence[bytes]:
        one.timers.append(one.way.clock.callLater(1, one.way.send, "text"))
        return [data]

    bench = Bench(filters=[Filters(later, "up")])
    bench.arrive(b"q")
    assert len(bench.clock.getDelayedCalls()) == 2
    bench.clock.advance(1)
    assert bench.observer.endings == ["filter_failed"]
    assert bench.sockets[0].sent == [b"q"]
    logged_failures.clear()
    bench.check()
    bench.close()


def test_a_filter_behind_one_that_passes_on_later_fails(
    logged_failures: list[Any],
) -> None:
    bench = Bench(filters=[delays("down"), fails("down")])
    bench.arrive()
    bench.answer(b"bad")
    assert not bench.observer.endings
    bench.clock.advance(1)
    assert bench.observer.endings == ["filter_failed"]
    assert bench.nat.counters.replies_dropped == {"filter_failed": 1}
    logged_failures.clear()
    bench.check()
    bench.close()


def test_one_that_can_not_be_made_refuses_the_client(
    logged_failures: list[Any],
) -> None:
    good = delays("up down")

    class Broken(FilterFactory):
        name = "broken"

        def build_datagram_filter(self, way: DatagramWay) -> Any:
            raise Defect

    bench = Bench(filters=[good, Broken()])
    run(bench, b"1", b"2")
    assert bench.nat.counters.dropped == {"filter_failed": 2}
    assert not bench.nat.table.flows
    assert not bench.observer.endings
    assert [each.closed for each in good.made] == [1] * 4
    [text] = logged_failures
    assert "filter broken failed" in text
    logged_failures.clear()
    bench.check()
    bench.close()


def test_one_that_can_not_be_closed(logged_failures: list[Any]) -> None:
    one, two = appends(b"1", breaks_at_close=True), appends(b"2")
    bench = Bench(filters=[one, two])
    bench.arrive()
    bench.close()
    assert [each.closed for each in one.made + two.made] == [1] * 4
    assert bench.observer.endings == ["drained"]
    assert len(logged_failures) == 1
    logged_failures.clear()


# -- what else a flow has


def test_limits_are_of_what_is_really_sent() -> None:
    """The two of three that a filter drops cost nothing; its duplicates do."""
    filters = [
        Filters(lambda _, data: [data] if data[:1] == b"+" else [], "up"),
        doubles("down"),
    ]
    bench = Bench(filters=filters, bandwidth=Limits(Rates(4000, 4000)))
    for _ in range(3):
        run(bench, b"-" * 500, b"-" * 500, b"+" * 500)
    [sock] = bench.sockets
    assert [len(each) for each in sock.sent] == [500] * 2
    assert bench.nat.counters.dropped == {"filtered": 6, "bandwidth": 1}
    answers(bench, *[bytes(400)] * 3)
    assert [len(each) for each in replies(bench)] == [400] * 3
    assert bench.nat.counters.replies_dropped == {"bandwidth": 3}
    [flow] = bench.nat.table.flows.values()
    assert (flow.up_bytes, flow.down_bytes) == (1000, 1200)
    bench.check()
    bench.close()


class Limits:
    """Limits of bandwidth, on a clock that stands still."""

    def __init__(self, rates: Rates) -> None:
        self._bandwidth = Bandwidth(rates, clock=Clock())

    def limits_of(self, name: str) -> Any:
        return self._bandwidth.limits_of(name)


@pytest.mark.parametrize("filters", [[doubles("down")], [delays("down")]])
def test_the_cap_of_replies_holds_for_what_comes_out(filters: Any) -> None:
    bench = Bench(filters=filters, reply_cap=3)
    bench.arrive(bytes(10))
    for _ in range(4):
        bench.answer(bytes(10))
    bench.clock.advance(1)
    assert len(bench.listener.sent) == 3
    counters = bench.nat.counters
    assert set(counters.replies_dropped) == {"reply_cap"}
    bench.check()
    bench.close()


@pytest.mark.parametrize("version", ["v2", "v2-first"])
def test_a_header_is_not_filtered(version: str) -> None:
    bench = Bench(filters=[doubles("up"), appends(b"!")], send_proxy=version)
    bench.arrive(b"1")
    bench.arrive(b"2")
    [sock] = bench.sockets
    reached = f"203.0.113.1:{bench.listener.getsockname()[1]}"
    told = write_version_2(f"{CLIENT[0]}:{CLIENT[1]}", reached, datagrams=True)
    again = told if version == "v2" else b""
    out = [b"1!", b"1!", b"2!", b"2!"]
    assert sock.sent == [told + out[0], *[again + each for each in out[1:]]]
    bench.check()
    bench.close()


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("told", [None, "v2"])
@pytest.mark.parametrize("together", [False, True])
def test_each_kind_of_flow_can_have_filters(
    limited: bool, told: str | None, together: bool
) -> None:
    """From the start, or later; and be without them again."""
    settings: dict[str, Any] = {"send_proxy": told, "together": together}
    if limited:
        settings["bandwidth"] = Limits(Rates(1e9, 1e9))
    bench = Bench(filters=[appends(b"!")], **settings)
    plain = Bench(**settings)
    for each in (bench, plain):
        each.arrive(b"q")
    [flow], [other] = bench.nat.table, plain.nat.table
    assert bench.sockets[0].sent[0].endswith(b"q!")
    assert (flow.filtered, other.filtered) == (("!",), ())
    bench.nat.change_filters([appends(b"!")], [])
    plain.nat.change_filters([], [appends(b"!")])
    assert (flow.filtered, other.filtered) == ((), ("!",))
    assert type(flow).__mro__[0] is type(other).__mro__[2]
    for each in (bench, plain):
        for _ in range(3):
            each.arrive(b"more")
            each.answer(b"a")
    assert bench.sockets[0].sent[-1].endswith(b"more")
    assert plain.sockets[0].sent[-1].endswith(b"more!")
    assert (replies(bench), replies(plain)) == ([b"a"] * 3, [b"a!"] * 3)
    for each in (bench, plain):
        each.check()
        each.close()


def test_what_is_kept_goes_to_the_server_that_a_flow_has_moved_to() -> None:
    """What comes out late, and what is sent again: each once through the filters."""
    late, mark = delays("up"), appends(b"!")
    bench = named(filters=[late, mark])
    bench.arrive(b"1")
    bench.clock.advance(1)
    bench.arrive(b"2")
    refuse(bench)
    first, second = bench.sockets
    assert peers(bench) == list(NAMED[:2])
    assert (first.sent, second.sent) == ([b"1!"], [b"1!"])
    bench.clock.advance(1)
    assert second.sent == [b"1!", b"2!"]
    assert [each.closed for each in late.made + mark.made] == [0] * 3
    bench.answer(b"a")
    assert replies(bench) == [b"a!"]
    counters = bench.nat.counters
    assert (counters.sent, counters.resent) == (2, 1)
    bench.check()
    bench.close()


def test_what_a_filter_has_dropped_is_not_sent_again() -> None:
    bench = named(filters=[drops("up")])
    bench.arrive(b"1")
    refuse(bench)
    assert [each.sent for each in bench.sockets] == [[], []]
    assert bench.nat.counters.resent == 0
    bench.check()
    bench.close()


def test_a_refusal_that_a_datagram_kept_back_reports() -> None:
    bench = named(filters=[delays("up")])
    bench.arrive(b"1")
    bench.clock.advance(1)
    bench.arrive(b"2")
    bench.sockets[0].errors.append(problem(111))
    bench.clock.advance(1)
    first, second = bench.sockets
    assert (first.sent, second.sent) == ([b"1"], [b"1", b"2"])
    bench.check()
    bench.close()


def test_a_drain_waits_for_what_is_kept() -> None:
    late = delays("up down")
    bench = Bench(filters=[late])
    bench.arrive(b"q")
    bench.clock.advance(1)
    bench.answer(b"a")
    bench.clock.advance(1)
    # Nothing is owed by the server: it has not been asked.
    bench.arrive(b"more")
    late.made[0].timers[-1].reset(5)
    done: list[Any] = []
    bench.nat.drain(60).addCallback(done.append)
    bench.pass_time(4)
    assert len(bench.nat.table) == 1
    bench.pass_time(4)
    assert bench.sockets[0].sent == [b"q", b"more"]
    bench.answer(b"b")
    bench.pass_time(4)
    assert replies(bench) == [b"a", b"b"]
    assert done == [None]
    bench.check()


@pytest.mark.parametrize(("its", "name"), [("deny", "deny"), ("", "Streams")])
def test_a_filter_of_streams_is_refused(its: str, name: str) -> None:
    class Streams(FilterFactory):
        name = its

        def build_filter(self, way: Any) -> Any: ...

    with pytest.raises(ValueError, match=f"filter {name} is for streams, not for UDP"):
        Bench(filters=[Streams()])


@pytest.mark.parametrize("wrong", ["latency:100ms", FilterFactory, 5])
def test_what_is_no_factory_of_filters(wrong: Any) -> None:
    with pytest.raises(TypeError, match="is no factory of filters"):
        Bench(filters=[wrong])


# -- any filters

PROGRAMS = {
    "pass": lambda one, data: [data],
    "drop": lambda one, data: [],
    "double": lambda one, data: [data, data + b"."],
    "delay": delay,
    "mixed": lambda one, data: delay(one, data) or ([data] if data[:1] < b"5" else []),
}


@given(
    st.lists(st.tuples(st.sampled_from(sorted(PROGRAMS)), st.booleans()), max_size=4),
    st.lists(
        st.tuples(st.booleans(), st.lists(st.binary(max_size=3), max_size=5)),
        max_size=8,
    ),
    st.integers(0, 3),
)
def test_the_sums_hold(
    programs: list[tuple[str, bool]],
    history: list[tuple[bool, list[bytes]]],
    gone: int,
) -> None:
    """Each datagram was sent on, dropped, or is kept, at any time."""
    filters = [
        Filters(PROGRAMS[name], name=f"{name}{number}", courses="up down"[: 7 * wide])
        for number, (name, wide) in enumerate(programs)
    ]
    bench = Bench(filters=filters)
    bench.arrive()
    for upward, datagrams in history:
        if upward:
            run(bench, *datagrams)
        else:
            answers(bench, *datagrams)
        balance(bench)
        bench.clock.advance(0.5)
        balance(bench)
    bench.nat.change_filters(filters[:gone], [])
    balance(bench)
    bench.clock.advance(1)
    bench.nat.close()
    assert not bench.nat.counters.dropped["failed"]
    assert bench.nat.counts.kept <= 0
    bench.close()


def balance(bench: Bench) -> None:
    counters, counts = bench.nat.counters, bench.nat.counts
    assert counters.received == (counters.sent + counters.dropped.total() + counts.kept)
    assert counters.replies_received == (
        counters.replies_sent + counters.replies_dropped.total() + counts.replies_kept
    )
    [flow] = bench.nat.table
    assert (flow.up_datagrams, flow.down_datagrams) == (
        counters.sent,
        counters.replies_sent,
    )
