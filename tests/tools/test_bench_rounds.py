"""What the benchmark measures, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from bench.figures import needed_for_limits
from bench.relays import RELAYS, Relay
from bench.rounds import MODES, Plan, measure
from bench.workloads import WORKLOADS, Readings, Workload, afresh


def test_the_check_measures_all_that_the_limits_need() -> None:
    pairs = needed_for_limits()
    assert ("growth-open", "relayd-plane") in pairs
    assert ("growth-open", "portforward") not in pairs
    plan = Plan.of(MODES["check"])
    planned = {
        (workload, relay)
        for workload, relays in plan.workloads.items()
        for relay in relays
    }
    assert planned == pairs


def test_the_check_takes_several_turns_at_the_proxies() -> None:
    plan = Plan.of(MODES["check"])
    assert plan.turns > 1
    assert plan.workloads["socks4-short"] == ["relayd-socks4", "dante", "twistd-socks"]
    assert plan.workloads["socks4-bulk"] == ["relayd-plane", "relayd-socks4"]
    assert WORKLOADS["socks4-short"].turns
    assert WORKLOADS["socks4-bulk"].turns


def test_the_check_takes_several_turns_at_datagrams() -> None:
    plan = Plan.of(MODES["check"])
    workloads = {name for name in WORKLOADS if name.startswith("udp-")}
    planned = workloads & set(plan.workloads)
    for workload in planned:
        others = set() if workload == "udp-turns" else {"nginx-udp"}
        assert {"relayd-udp", *others} <= set(plan.workloads[workload])
        assert WORKLOADS[workload].turns
    # No limit speaks of thousands of flows with a datagram each.
    assert workloads - planned == {"udp-5000"}


def test_relays_take_turns_and_each_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[tuple[str, str, float]] = []

    def measured(name: str) -> Callable[[Relay, float], Readings]:
        def measure_it(relay: Relay, seconds: float) -> Readings:
            order.append((name, relay.name, seconds))
            return {name: float(len(order))}

        return measure_it

    monkeypatch.setattr(
        "bench.rounds.WORKLOADS",
        {
            name: Workload(name, afresh(measured(name)), lambda _: True, (), turns)
            for name, turns in (("bulk-1", 0), ("request", 1))
        },
    )
    relays = ["relayd-plane", "portforward"]
    plan = Plan(1, 2.0, {"bulk-1": relays, "request": relays}, turns=3)
    results = measure(plan)
    capsys.readouterr()
    plane, other = relays
    assert order == [
        ("bulk-1", plane, 2.0),
        ("bulk-1", other, 2.0),
        *(
            ("request", name, pytest.approx(2 / 3))
            for name in (plane, other, other, plane, plane, other)
        ),
    ]
    assert results.values()["request"] == {
        plane: [3.0, 6.0, 7.0],
        other: [4.0, 5.0, 8.0],
    }


def test_a_relay_may_run_for_all_of_its_turns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []

    @contextmanager
    def begin(relay: Relay, seconds: float) -> Iterator[Callable[[], Readings]]:
        def measure_it() -> Readings:
            told.append(relay.name)
            return {"request": 1.0}

        told.append(f"{relay.name} begins")
        yield measure_it
        told.append(f"{relay.name} ends")

    workload = Workload("request", begin, lambda _: True, (), 2)
    monkeypatch.setattr("bench.rounds.WORKLOADS", {"request": workload})
    plane, other = relays = ["relayd-plane", "portforward"]
    measure(Plan(1, 2.0, {"request": relays}, turns=2))
    capsys.readouterr()
    turns = [plane, other, other, plane] * 2
    begins = [f"{relay} begins" for relay in relays]
    assert told == [*begins, *turns, f"{other} ends", f"{plane} ends"]
    # Where there is one turn, there is one.
    told.clear()
    measure(Plan(1, 2.0, {"request": relays}))
    capsys.readouterr()
    assert told == [*begins, plane, other, f"{other} ends", f"{plane} ends"]


def test_a_plan_leaves_out_what_a_relay_cannot_do() -> None:
    workloads = Plan.of(MODES["full"]).workloads
    assert "socat" in workloads["bulk-8"]
    assert "socat" not in workloads["memory"]
    assert "haproxy" not in workloads["growth-open"]


def test_each_kind_of_relay_is_measured_apart() -> None:
    workloads = Plan.of(MODES["full"]).workloads
    kinds = {
        kind: {name for name, relay in RELAYS.items() if relay.kind == kind}
        for kind in ("stream", "socks4", "udp")
    }
    proxies = kinds["socks4"]
    assert set(workloads["socks4-short"]) == proxies
    assert set(workloads["socks4-bulk"]) == {*proxies, "relayd-plane"}
    for workload, relays in workloads.items():
        if workload.startswith("udp-"):
            assert set(relays) == kinds["udp"]
        elif not workload.startswith("socks4-"):
            assert set(relays) <= kinds["stream"]


def test_a_plan_may_be_narrowed() -> None:
    plan = Plan.of(MODES["full"], ["memory"], ["nginx", "socat"], rounds=1, seconds=1.0)
    assert plan == Plan(1, 1.0, {"memory": ["nginx"]}, turns=2)
    assert plan.titles == {"nginx": "nginx stream"}
