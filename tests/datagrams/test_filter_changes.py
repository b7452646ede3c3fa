"""Filters that are put on flows that live, and taken off them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

from relayd.core.filtering import DatagramWay, FilterFactory
from relayd.datagrams.filtered import AT_ONCE
from relayd.datagrams.flow import ClientFlow
from tests.datagrams.filters import (
    OTHER,
    appends,
    delays,
    replies,
)
from tests.datagrams.support import (
    Bench,
    Defect,
    turns,
)


def test_a_relay_that_becomes_another_changes_what_may_join() -> None:
    settings: dict[str, Any] = {"timeout": 60.0}
    stays, gone, old = appends(b"s"), appends(b"g"), appends(b"o", joins=False)
    bench = Bench(filters=[stays, gone, old], **settings)
    bench.arrive(b"1")
    new = [appends(b"n"), appends(b"s"), appends(b"w", joins=False)]
    other = Bench(filters=new, **settings)
    other.nat.close()
    bench.nat.become(other.nat)
    bench.arrive(b"2")
    bench.arrive(b"3", OTHER)
    assert bench.sockets[0].sent == [b"1sgo", b"2son"]
    assert other.sockets[0].sent == [b"3nsw"]
    assert [each.closed for each in gone.made] == [1, 1]
    assert [flow.filtered for flow in bench.nat.table] == [
        ("s", "o", "n"),
        ("n", "s", "w"),
    ]
    bench.nat.close()


def test_what_a_filter_keeps_that_is_taken_off_is_dropped() -> None:
    bench = Bench(filters=[delays("up"), appends(b"!")])
    bench.arrive(b"1")
    bench.nat.change_filters([delays("up")], [])
    assert bench.nat.counters.dropped == {"filtered": 1}
    bench.arrive(b"2")
    bench.clock.advance(1)
    assert bench.sockets[0].sent == [b"2!"]
    bench.check()
    bench.close()


def test_filters_that_serve_no_direction_are_on_no_flow() -> None:
    bench = Bench(filters=[appends(b"!", "")])
    bench.arrive(b"1")
    [flow] = bench.nat.table
    assert type(flow) is ClientFlow
    bench.nat.change_filters([], [appends(b"?", "")])
    assert type(flow) is ClientFlow
    # One that is not there can be taken off.
    bench.nat.change_filters([appends(b"-")], [])
    bench.arrive(b"2")
    assert bench.sockets[0].sent == [b"1", b"2"]
    bench.check()
    bench.close()


def test_of_two_that_are_equal_one_is_taken_off() -> None:
    bench = Bench(filters=[appends(b"1"), appends(b"2"), appends(b"1")])
    bench.arrive(b"x")
    bench.nat.change_filters([appends(b"1")], [])
    bench.arrive(b"x")
    bench.nat.change_filters([appends(b"1")], [])
    bench.arrive(b"x")
    assert bench.sockets[0].sent == [b"x121", b"x21", b"x2"]
    bench.close()


def test_a_reply_that_waits_for_its_batch_when_a_filter_comes() -> None:
    bench = Bench(together=True)
    for _ in range(2):
        bench.arrive()
        bench.answer()
    bench.watcher.held = True
    bench.answer(b"before")
    assert replies(bench) == [b"!"] * 2
    bench.nat.change_filters([], [appends(b"?")])
    assert replies(bench) == [b"!", b"!", b"before"]
    bench.watcher.release()
    bench.answer(b"after")
    assert replies(bench)[3:] == [b"after?"]
    bench.check()
    bench.close()


def test_many_flows_are_changed_in_several_turns() -> None:
    many = 2 * AT_ONCE + 1
    bench = Bench(max_flows=many + 1, max_flows_per_client=many + 1)
    for port in range(1, many + 1):
        bench.arrive(source=("192.0.2.1", port))
    flows = list(bench.nat.table)

    def filtered() -> int:
        return sum(bool(each.filtered) for each in flows)

    each_turn = turns(bench, filtered)
    bench.nat.change_filters([], [appends(b"!")])
    assert filtered() == AT_ONCE
    # One that ends meanwhile, and a second change.
    bench.nat.end(flows[-1], "killed")
    bench.nat.change_filters([appends(b"!")], [appends(b"?")])
    for _ in range(6):
        bench.clock.advance(0)
    assert [flow.filtered for flow in flows] == [("?",)] * (many - 1) + [()]
    assert each_turn[:2] == [AT_ONCE, 2 * AT_ONCE]
    bench.check()
    bench.nat.change_filters([appends(b"?")], [])
    bench.close()


def test_a_new_filter_that_fails_on_flows_that_live(
    logged_failures: list[Any],
) -> None:
    class Broken(FilterFactory):
        name = "broken"

        def build_datagram_filter(self, way: DatagramWay) -> Any:
            raise Defect

    bench = Bench()
    bench.arrive()
    bench.nat.change_filters([], [Broken()])
    assert bench.observer.endings == ["filter_failed"]
    logged_failures.clear()
    bench.check()
    bench.close()


def test_a_flow_that_is_over_is_no_cycle_of_references() -> None:
    bench = Bench(filters=[mark := appends(b"!")])
    bench.arrive()
    mark.made.clear()
    [flow] = bench.nat.table
    # A flow can't be referred to weakly; what only it has can.
    one = weakref.ref(bench.sockets.pop())
    gc.disable()
    try:
        bench.nat.end(flow, "killed")
        del flow
        assert one() is None
    finally:
        gc.enable()
    bench.nat.close()
