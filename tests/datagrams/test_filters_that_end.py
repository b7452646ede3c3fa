"""Filters of datagrams that end their own flow, by the relay, from within a call."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.conftest import LoggedFailures
from tests.datagrams.filters import Filters, Sees, answers, replies
from tests.datagrams.support import Bench


@pytest.mark.parametrize("course", ["up", "down"])
@pytest.mark.parametrize("fails_then", [False, True])
def test_one_that_ends_its_flow_has_its_datagram_dropped_once(
    course: str, fails_then: bool, logged_failures: LoggedFailures
) -> None:
    def ends(_: Sees, data: bytes) -> Sequence[bytes]:
        bench.nat.abort_all()
        if fails_then:
            raise ValueError
        return [data]

    bench = Bench(filters=[Filters(ends, course)])
    bench.arrive(b"q")
    if course == "down":
        answers(bench, b"a")
    counters = bench.nat.counters
    dropped = counters.dropped if course == "up" else counters.replies_dropped
    assert dropped == {"filtered": 1}
    assert bench.nat.counts.kept == bench.nat.counts.replies_kept == 0
    assert replies(bench) == []
    bench.check()
    bench.close()
    if fails_then:
        logged_failures.take("filter test failed")
