"""Medians, ratios and limits of the benchmark."""

from __future__ import annotations

import pytest

from bench.figures import (
    ENDED,
    FIGURES,
    FILTERS,
    GROWTH,
    OPERATING,
    POOLS,
    ROUTES,
    SOCKS4,
    TRANSPARENT,
    UDP,
    Results,
    Spread,
    figure_named,
)
from bench.limits import (
    INSTEAD,
    LIMITS,
    Limit,
    Verdict,
    judge,
    limits_on,
    needed_for_limits,
)
from bench.workloads import WORKLOADS
from tests.tools.results import results_of


def test_a_spread_is_the_median_the_lowest_and_the_highest() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


def test_an_even_number_of_rounds_has_the_mean_of_the_middle_ones() -> None:
    assert Spread.of([1.0, 2.0, 4.0, 8.0]).middle == 3.0


def test_results_keep_the_rounds_in_their_order() -> None:
    results = results_of(request={"nginx": [3.0, 1.0, 2.0]})
    assert results.values() == {"request": {"nginx": [3.0, 1.0, 2.0]}}
    assert results.spread("request", "nginx") == Spread(2.0, 1.0, 3.0)


def test_what_was_not_measured_has_no_figure_and_no_ratio() -> None:
    results = results_of(request={"nginx": [1.0]})
    assert results.spread("memory", "nginx") is None
    assert results.spread("request", "socat") is None
    assert results.ratio(("request", "nginx"), ("request", "socat")) is None


def test_a_ratio_is_taken_within_each_round() -> None:
    """A round on a slow machine doubles both; the ratio stays what it is."""
    results = results_of(request={"nginx": [5.0, 10.0, 7.0], "socat": [10, 20, 10]})
    ratio = results.ratio(("request", "nginx"), ("request", "socat"))
    assert ratio == Spread(0.5, 0.5, 0.7)


def test_the_limits_are_those_of_the_documentation() -> None:
    rules = {(*limit.of, *(limit.to or ())): limit.rule for limit in LIMITS}
    relayd = "relayd-plane"
    bulk = ("bulk-1", relayd, "bulk-1", "haproxy-splice")
    fast = ("throughput-1", relayd, "throughput-1", "portforward")
    many = ("short@8000", relayd, "short@100", relayd)
    assert rules[bulk] == "at most 1"
    assert rules[fast] == "at least 1.7"
    assert rules[many] == "at most 1.3"
    turns = ("turn@8000", relayd, "turn@100", relayd)
    assert rules[turns] == "at most 1.25, or HAProxy, splice's"
    for name, bound in (
        ("short-server", 1.5),
        ("short-client", 1.5),
        ("short-server-quiet", 1.35),
        ("short-client-quiet", 1.35),
        ("request", 1.1),
    ):
        assert rules[name, relayd, name, "haproxy-splice"] == f"at most {bound}"
    proxy = "relayd-socks4"
    for name, dante, twistd in (
        ("socks4-short", 0.5, 0.6),
        ("socks4-short-quiet", 0.5, 0.65),
    ):
        assert rules[name, proxy, name, "dante"] == f"at most {dante}"
        assert rules[name, proxy, name, "twistd-socks"] == f"at most {twistd}"
    assert rules["socks4-bulk", proxy, "socks4-bulk", relayd] == "at most 1.05"
    udp = "relayd-udp"
    for name in ("udp-1", "udp-50", "udp-500"):
        assert rules[name, udp, name, "nginx-udp"] == "at most 0.95"
        assert rules[name, udp, name, "twisted-udp"] == "at most 0.85"
    lost = ("udp-delivered", udp, "udp-delivered", "nginx-udp")
    assert rules[lost] == "at least 1"
    assert rules["udp-turns-5000", udp, "udp-turns-50", udp] == "at most 1.3"
    for pool, bound in (("relayd-hash", 1.25), ("relayd-thousand", 1.15)):
        many_servers = ("short-clients", pool, "short-clients", relayd)
        assert rules[many_servers] == f"at most {bound}"
    for closed_by in ("server", "client"):
        name = f"short-{closed_by}-quiet"
        assert rules[name, "relayd-pool", name, relayd] == "at most 1.05"
    assert rules["route", "relayd-route", "route", relayd] == "at most 1.1"
    for name, rule in (
        ("scrape-100", "at most 100 ms"),
        ("scrape-1000", "at most 1500 ms"),
        ("scrape-100-request", "at most 20 ms"),
        ("scrape-1000-request", "at most 20 ms"),
        ("scrape-100-short", "at most 20 ms"),
        ("scrape-1000-short", "at most 20 ms"),
        ("check-1000", "at most 1 s"),
    ):
        assert rules[name, relayd] == rule
    assert len(rules) == len(LIMITS)


@pytest.mark.parametrize(
    ("at_least", "ratio", "kept"),
    [
        (False, 0.9, True),
        (False, 0.901, False),
        (True, 0.9, True),
        (True, 0.899, False),
    ],
)
def test_a_bound_itself_is_kept(at_least: bool, ratio: float, kept: bool) -> None:
    limit = Limit("", ("a", "b"), ("a", "c"), 0.9, at_least)
    assert limit.kept(ratio) is kept


def test_what_was_not_measured_keeps_no_limit() -> None:
    assert not Verdict(LIMITS[0], None).ok


@pytest.mark.parametrize(
    ("processor", "rule", "ok"),
    [
        ("AMD EPYC (family 25, model 17)", "at most 1.35", False),
        ("Intel Xeon (family 6, model 167)", "at most 2.1 here, 1.35 elsewhere", True),
        ("Intel Xeon (family 6, model 16)", "at most 1.35", False),
    ],
)
def test_a_processor_may_have_bounds_of_its_own(
    processor: str, rule: str, ok: bool
) -> None:
    results = results_of(
        short_server_quiet={"relayd-plane": [3.6], "haproxy-splice": [2.0]}
    )
    [verdict] = [v for v in judge(results, processor=processor) if v.measured]
    assert (verdict.limit.rule, verdict.ok) == (rule, ok)


def test_each_bound_of_a_processor_is_that_of_a_limit() -> None:
    there = {(limit.of, limit.to[1]) for limit in LIMITS if limit.to}
    for processor, bounds in INSTEAD.items():
        assert bounds.keys() <= there
        own = [limit for limit in limits_on(processor) if limit.elsewhere is not None]
        assert len(own) == len(bounds)
        # A bound that is no wider is not needed.
        for limit in own:
            assert limit.elsewhere is not None
            assert limit.kept(limit.elsewhere)
            assert limit.bound != limit.elsewhere


@pytest.mark.parametrize(
    ("ours", "theirs", "ok", "excuse"),
    [
        ((10.0, 12.5), (10.0, 11.0), True, ""),
        ((10.0, 14.0), (10.0, 15.0), True, "HAProxy, splice's is 1.500"),
        ((10.0, 14.0), (10.0, 13.9), False, ""),
        ((10.0, 14.0), (), False, ""),
    ],
)
def test_growth_is_within_a_limit_if_another_relays_is_as_much(
    ours: tuple[float, ...], theirs: tuple[float, ...], ok: bool, excuse: str
) -> None:
    results = Results()
    for relay, values in (("relayd-plane", ours), ("haproxy-splice", theirs)):
        for size, value in zip((100, 8000), values, strict=False):
            results.add(relay, {f"turn@{size}": value})
    [verdict] = [v for v in judge(results) if v.measured]
    assert (verdict.ok, verdict.excuse) == (ok, excuse)


def test_the_relay_beside_a_limit_is_measured_for_it() -> None:
    assert ("growth-turn", "haproxy-splice") in needed_for_limits()
    assert ("growth-short", "haproxy-splice") not in needed_for_limits()


def test_a_lost_datagram_misses_the_limit() -> None:
    results = results_of(
        udp_delivered={
            "relayd-udp": [100.0, 99.999, 99.999],
            "nginx-udp": [100.0, 100.0, 100.0],
        }
    )
    [verdict] = [v for v in judge(results) if v.measured]
    assert not verdict.ok


def test_a_limit_of_a_figure_itself_is_for_its_median() -> None:
    """One long delay in several scrapes may be the machine's."""
    for delays, kept in (([3.0, 900.0, 20.0], True), ([3.0, 900.0, 20.1], False)):
        results = results_of(scrape_1000_request={"relayd-plane": delays})
        [verdict] = [v for v in judge(results) if v.measured]
        assert verdict.limit.of == ("scrape-1000-request", "relayd-plane")
        assert verdict.ok is kept


def test_limits_of_a_workload_that_cannot_be_measured_are_left_out() -> None:
    of = ("transparent", "relayd-transparent")
    assert of in {verdict.limit.of for verdict in judge(results_of())}
    found = judge(results_of(), ["transparent"])
    assert len(found) == len(LIMITS) - 1
    assert of not in {verdict.limit.of for verdict in found}


def test_every_figure_has_an_existing_workload() -> None:
    figures = [
        *(*FIGURES.values(), *SOCKS4.values()),
        *(*UDP.values(), *GROWTH.values()),
        *(*POOLS.values(), *FILTERS.values(), *ROUTES.values()),
        *(*TRANSPARENT.values(), *ENDED.values(), *OPERATING.values()),
    ]
    assert {figure.workload for figure in figures} == set(WORKLOADS)


def test_a_name_with_a_size_is_a_growth_figure() -> None:
    assert figure_named("memory@8000") is GROWTH["memory"]
    assert figure_named("memory") is FIGURES["memory"]
    assert figure_named("socks4-bulk") is SOCKS4["socks4-bulk"]
    assert figure_named("scrape-100") is OPERATING["scrape-100"]
    assert figure_named("udp-5000") is UDP["udp-5000"]
    assert figure_named("udp-turns-5000") is UDP["udp-turns-5000"]
