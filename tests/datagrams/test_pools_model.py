"""Whatever happens to flows of a pool, the sums hold."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from relayd.udp_nat import FlowServer, Server
from relayd.upstreams.balance import LeastSessions
from relayd.upstreams.passive import Ejector, FailLimits
from relayd.upstreams.pool import Pool
from tests.datagrams.support import Bench, refuse

COUNT = st.integers(0, 7)

STEPS = st.one_of(
    st.tuples(
        st.sampled_from(["arrive", "answer", "refuse", "down", "up", "empty"]), COUNT
    ),
    st.tuples(st.just("replace"), COUNT),
    st.tuples(st.just("pass"), st.sampled_from([0, 1, 3, 12])),
)


class Gate:
    """Counts its leases."""

    held = 0

    def enter(self, session: Any) -> Gate:
        self.held += 1
        return self

    def release(self) -> None:
        self.held -= 1


def a_server(number: int) -> FlowServer:
    return FlowServer.at(Server(f"198.51.100.{number}", 53), max_sessions=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(STEPS, max_size=40), st.booleans(), st.sampled_from([0, 2]))
def test_each_flow_is_counted_once(
    steps: list[tuple[str, int]], cut: bool, wait: int
) -> None:
    """At the server that it has, also after it has moved; sockets are not lost."""
    own = [a_server(number) for number in range(1, 4)]
    pool = Pool(own, LeastSessions(), try_all=not wait and cut)
    gate: Any = Gate()
    bench = Bench(
        pool,
        timeout=8,
        unreplied_timeout=4,
        max_flows=6,
        gate=gate,
        cut=cut,
        wait_for_server=wait,
    )
    ejector = Ejector(pool, bench.clock, FailLimits(max_fails=2))
    made = 3
    for what, number in steps:
        live = [n for n, each in enumerate(bench.sockets) if not each.closed]
        if what == "arrive":
            bench.arrive(source=("192.0.2.1", 1 + number))
        elif what == "answer" and live:
            bench.answer(number=live[number % len(live)])
        elif what == "refuse" and live:
            refuse(bench, live[number % len(live)])
        elif what in ("down", "up"):
            own[number % len(own)].checked(what == "up", "so it is")
        elif what == "empty":
            # The name has no address for a moment.
            pool.replace(own, [])
            bench.arrive(source=("192.0.2.1", 1 + number))
            made += 3
            own = [a_server(each) for each in range(made - 2, made + 1)]
            pool.replace([], own)
        elif what == "replace":
            made += 1
            place = number % 3
            left, own[place] = own[place], a_server(made)
            pool.replace([left], [own[place]])
        elif what == "pass":
            bench.pass_time(number)
        flows = list(bench.nat.table)
        for each in own:
            there = [flow for flow in flows if flow.server is each.endpoint]
            assert each.sessions == len(there)
        assert all(flow.server.state.sessions > 0 for flow in flows)
        counters = bench.nat.counters
        assert counters.received == counters.sent + counters.dropped.total()
        assert {flow.sock for flow in flows} == set(bench.live)
        if not wait:
            assert gate.held == len(flows)
        assert gate.held >= len(flows)
    ejector.stop()
    bench.close()
    assert gate.held == 0
    assert not any(each.sessions for each in own)
