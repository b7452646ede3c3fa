"""What the charts show."""

from __future__ import annotations

from itertools import chain

import pytest

from bench.charted import (
    COLOURS,
    PANELS,
    REFERENCE,
    SHORT_PANELS,
    SOCKS4_PANELS,
    UDP_PANELS,
    charted,
)
from bench.figures import GROWTH, SIZES, Results, figure_named
from bench.relays import RELAYS
from bench.workloads import WORKLOADS

CHARTS = {
    "costs": dict.fromkeys(chain(*PANELS), REFERENCE),
    "short": SHORT_PANELS,
    "socks4": SOCKS4_PANELS,
    "udp": UDP_PANELS,
    "growth": {
        figure.at(size): "relayd-plane" for figure in GROWTH.values() for size in SIZES
    },
}


def all_measured() -> Results:
    """Each workload was, with each relay with which it can be."""
    results = Results()
    names = {name for panels in CHARTS.values() for name in panels}
    for name in names:
        for relay in RELAYS.values():
            if WORKLOADS[figure_named(name).workload].takes(relay):
                results.add(relay.name, {name: 1.0})
    return results


@pytest.mark.parametrize("chart", CHARTS)
def test_each_relay_that_is_shown_has_a_colour(chart: str) -> None:
    """A run that measures all of them ends with its charts."""
    titles = {relay.name: relay.title for relay in RELAYS.values()}
    figures = [figure_named(name) for name in CHARTS[chart] if "@" not in name]
    results = all_measured()
    shown = charted(results, figures, titles)
    if chart == "growth":
        values = results.values()
        shown = {relay: "" for name in CHARTS[chart] for relay in values[name]}
    assert shown
    assert {*shown} <= {*COLOURS}
    assert {*CHARTS[chart].values()} <= {*shown}
