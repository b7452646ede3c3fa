"""Results of a benchmark that never ran, for the tests of what is made of them."""

from __future__ import annotations

from bench.facts import Run
from bench.figures import FIGURES, GROWTH, OPERATING, POOLS, SIZES, SOCKS4, UDP, Results

TITLES = {"relayd-plane": "relayd, plane", "haproxy-splice": "HAProxy, splice"}


PROXIES = {
    "relayd-plane": "relayd, plane",
    "relayd-socks4": "relayd, SOCKS4",
    "dante": "Dante",
}


DATAGRAMS = {
    "relayd-udp": "relayd, UDP",
    "nginx-udp": "nginx stream, UDP",
    "twisted-udp": "Twisted, UDP",
}


def results_of(**figures: dict[str, list[float]]) -> Results:
    """Results with these rounds; `_` in a figure's name stands for `-`."""
    results = Results()
    for figure, relays in figures.items():
        for relay, values in relays.items():
            for value in values:
                results.add(relay, {figure.replace("_", "-"): value})
    return results


def run_facts() -> Run:
    return Run("2026-01-31", 3, 2.0, 7, 0.4, 0.04, {
        "processor": "Abacus", "cores": "2", "kernel": "Linux 6.1", "system": "Debian",
    }, {"haproxy": "2.6.12"}, {"relayd, other Python": "there is none"})  # fmt: skip


def full_results() -> Results:
    """Every figure for two relays, in three rounds."""
    results = Results()
    for number in (1.0, 2.0, 3.0):
        for relay, factor in (("relayd-plane", 1.0), ("haproxy-splice", 2.0)):
            results.add(relay, dict.fromkeys(FIGURES, number * factor))
            for figure in GROWTH.values():
                results.add(relay, {figure.at(size): number for size in SIZES})
        for relay, factor in (("relayd-socks4", 1.0), ("dante", 4.0)):
            results.add(relay, dict.fromkeys(SOCKS4, number * factor))
        results.add("relayd-plane", {"socks4-bulk": number * 2.0})
        for relay, factor in (("relayd-udp", 1.0), ("nginx-udp", 2.0)):
            results.add(relay, dict.fromkeys(UDP, number * factor))
        for relay, factor in (("relayd-plane", 1.0), ("relayd-hash", 1.2)):
            results.add(relay, dict.fromkeys(POOLS, number * factor))
        results.add("relayd-plane", dict.fromkeys(OPERATING, number))
    return results
