"""What the benchmark measures, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import get_args

import pytest

from bench.children import CannotMeasure
from bench.limits import needed_for_limits
from bench.own_relays import Setup
from bench.relays import RELAYS, Kind, Readings, Relay, afresh
from bench.rounds import (
    MODES,
    Plan,
    check_requirements,
    lacking_workloads,
    measure,
)
from bench.workloads import WORKLOADS, Workload


def test_the_check_measures_all_that_the_limits_need() -> None:
    pairs = needed_for_limits()
    for workload in ("growth-turn", "growth-short"):
        assert (workload, "relayd-plane") in pairs
        assert (workload, "portforward") not in pairs
    plan = Plan.of(MODES["check"])
    planned = {
        (workload, relay)
        for workload, relays in plan.workloads.items()
        for relay in relays
    }
    assert planned == pairs


def test_what_has_a_limit_has_many_short_windows() -> None:
    plan = Plan.of(MODES["check"])
    assert plan.rounds * plan.windows >= 20
    assert plan.window < 0.5
    once = {name for name in plan.workloads if not WORKLOADS[name].windows}
    # Of these, little depends on how fast the machine is.
    limited = {workload for workload, _ in needed_for_limits()}
    assert once & limited == {"memory", "udp-delivered"}


def test_the_check_compares_the_proxies() -> None:
    plan = Plan.of(MODES["check"])
    for workload in ("socks4-short", "socks4-short-quiet"):
        assert plan.workloads[workload] == ["relayd-socks4", "dante", "twistd-socks"]
    assert plan.workloads["socks4-bulk"] == ["relayd-plane", "relayd-socks4"]


def test_the_check_compares_relays_of_datagrams() -> None:
    plan = Plan.of(MODES["check"])
    workloads = {name for name in WORKLOADS if name.startswith("udp-")}
    planned = workloads & set(plan.workloads)
    for workload in planned:
        others = set() if workload == "udp-turns" else {"nginx-udp"}
        assert {"relayd-udp", *others} <= set(plan.workloads[workload])
    # No limit speaks of thousands of flows with a datagram each.
    assert workloads - planned == {"udp-5000"}


def test_the_check_scrapes_relayd_with_many_relays_and_nothing_else() -> None:
    for mode in ("check", "full"):
        plan = Plan.of(MODES[mode])
        for workload in ("scrape-100", "scrape-1000", "check-1000"):
            assert plan.workloads[workload] == ["relayd-plane"]
            # Each window is a scrape, and the median is of all of them.
            assert WORKLOADS[workload].windows


def test_relays_take_turns_in_windows_and_each_counts(
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
            name: Workload(name, afresh(measured(name)), lambda _: True, (), windows)
            for name, windows in (("bulk-1", False), ("request", True))
        },
    )
    relays = ["relayd-plane", "portforward"]
    plan = Plan(1, 2.0, {"bulk-1": relays, "request": relays}, windows=3)
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


@pytest.mark.parametrize("alone", [False, True])
def test_a_relay_runs_for_all_of_its_windows(
    alone: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the others, or one after the other."""
    told: list[str] = []

    @contextmanager
    def begin(relay: Relay, seconds: float) -> Iterator[Callable[[], Readings]]:
        def measure_it() -> Readings:
            told.append(relay.name)
            return {"request": 1.0}

        told.append(f"{relay.name} begins")
        yield measure_it
        told.append(f"{relay.name} ends")

    workload = Workload("request", begin, lambda _: True, (), times=2, alone=alone)
    monkeypatch.setattr("bench.rounds.WORKLOADS", {"request": workload})
    plane, other = relays = ["relayd-plane", "portforward"]
    measure(Plan(1, 2.0, {"request": relays}, windows=1))
    capsys.readouterr()
    begins, ends = (
        [f"{relay} {how}" for relay in relays] for how in ("begins", "ends")
    )
    if alone:
        assert told == [
            *(begins[0], plane, plane, ends[0]),
            *(begins[1], other, other, ends[1]),
        ]
    else:
        assert told == [*begins, plane, other, other, plane, *reversed(ends)]


def unavailable(_: Setup) -> list[str]:
    raise CannotMeasure("there is none")


def test_an_optional_relay_is_left_out_if_it_cannot_be_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless it was asked for, by its name or by naming the Python."""
    monkeypatch.delenv("BENCH_OTHER_PYTHON", raising=False)
    monkeypatch.setattr("bench.rounds.allow_descriptors", lambda _: None)
    monkeypatch.setattr("bench.rounds.program", lambda name: name)
    name, other = "relayd-other-python", "relayd-plane"
    monkeypatch.setattr(
        "bench.rounds.RELAYS",
        {
            name: Relay(name, "", unavailable, optional=True),
            other: Relay(other, "", lambda _: []),
        },
    )
    plan = Plan(1, 1.0, {"requests": [name, other], "short-server": [name]})
    lacking = check_requirements(plan)
    assert lacking == {name: "there is none"}
    assert plan.without(lacking) == Plan(1, 1.0, {"requests": [other]})
    with pytest.raises(CannotMeasure, match="there is none"):
        check_requirements(plan, [name])
    monkeypatch.setenv("BENCH_OTHER_PYTHON", "/nowhere")
    with pytest.raises(CannotMeasure, match="there is none"):
        check_requirements(plan)


def test_a_relay_that_must_be_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bench.rounds.allow_descriptors", lambda _: None)
    monkeypatch.setattr("bench.rounds.program", lambda name: name)
    relays = {"nginx": Relay("nginx", "", unavailable)}
    monkeypatch.setattr("bench.rounds.RELAYS", relays)
    with pytest.raises(CannotMeasure, match="there is none"):
        check_requirements(Plan(1, 1.0, {"requests": ["nginx"]}))


def test_a_workload_is_left_out_if_it_cannot_be_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless it was asked for."""
    rooted, other = (
        Workload(name, afresh(lambda *_: {}), lambda _: True, (), lacking=lacking)
        for name, lacking in (("rooted", lambda: "it takes root"), ("other", none))
    )
    monkeypatch.setattr("bench.rounds.WORKLOADS", {"rooted": rooted, "other": other})
    plan = Plan(1, 1.0, {"rooted": ["nginx"], "other": ["nginx"]})
    lacking = lacking_workloads(plan)
    assert lacking == {"rooted": "it takes root"}
    assert plan.without((), lacking) == Plan(1, 1.0, {"other": ["nginx"]})
    with pytest.raises(CannotMeasure, match="rooted can't be measured: it takes root"):
        lacking_workloads(plan, ["rooted"])
    with pytest.raises(CannotMeasure, match="nothing is left to measure"):
        plan.without((), ["rooted", "other"])


def none() -> None:
    """Nothing is lacking."""


def test_a_plan_leaves_out_what_a_relay_cannot_do() -> None:
    workloads = Plan.of(MODES["full"]).workloads
    assert "socat" in workloads["bulk-8"]
    assert "socat" not in workloads["memory"]
    assert "haproxy" not in workloads["growth-turn"]
    assert "socat" in workloads["short-server-quiet"]
    assert "socat" not in workloads["short-server"]


def test_some_relays_are_measured_at_requests_and_short_sessions_only() -> None:
    workloads = Plan.of(MODES["full"]).workloads
    short = {
        f"short-{side}{how}" for side in ("server", "client") for how in ("", "-quiet")
    }
    for name in ("relayd-other-python", "haproxy-smart"):
        found = {workload for workload, relays in workloads.items() if name in relays}
        assert found == {"requests", *short}


def test_each_kind_of_relay_is_measured_apart() -> None:
    workloads = Plan.of(MODES["full"]).workloads
    kinds = {
        kind: {name for name, relay in RELAYS.items() if relay.kind == kind}
        for kind in get_args(Kind)
    }
    proxies = kinds["socks4"]
    for workload in ("socks4-short", "socks4-short-quiet"):
        assert set(workloads[workload]) == proxies
    assert set(workloads["socks4-bulk"]) == {*proxies, "relayd-plane"}
    clients = workloads.pop("short-clients")
    assert set(clients) == {*kinds["pool"], "relayd-plane"}
    filtered = workloads.pop("filtered-bulk")
    assert set(filtered) == {*kinds["filtered"], "relayd-plane"}
    routed = {
        name: set(workloads.pop(name))
        for name in ("route", "route-peek", "sni", "route-bulk")
    }
    assert all("relayd-plane" in relays for relays in routed.values())
    assert set().union(*routed.values()) == {*kinds["routed"], "relayd-plane"}
    transparent = set(workloads.pop("transparent"))
    assert transparent == {*kinds["transparent"], "relayd-plane"}
    transparent = set(workloads.pop("transparent-udp"))
    assert transparent == {*kinds["transparent-udp"], "relayd-udp"}
    for workload, relays in workloads.items():
        if workload.startswith("udp-"):
            assert set(relays) == kinds["udp"]
        elif not workload.startswith("socks4-"):
            assert set(relays) <= kinds["stream"]


def test_a_plan_may_be_narrowed() -> None:
    plan = Plan.of(MODES["full"], ["memory"], ["nginx", "socat"], rounds=1, seconds=1.0)
    assert plan == Plan(1, 1.0, {"memory": ["nginx"]}, windows=5)
    assert plan.titles == {"nginx": "nginx stream"}
