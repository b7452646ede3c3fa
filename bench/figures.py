"""The figures, and how they are compared. Nothing is measured here.

A figure has a value for each round. Relays are compared within each round, since the
machine may be slower in one than in another; of comparisons and figures, the median of
the rounds is shown, with the lowest and the highest.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Self

from attrs import frozen

#: Open connections, where growth is measured.
SIZES = (10, 100, 1_000, 8_000)

#: The sizes that the limits compare.
FEW, MANY = 100, 8_000

#: Flows that send in turn, where growth with datagrams is measured; the limit compares
#: both.
FLOWS = (50, 5_000)

#: Idle pairs over which memory is measured.
MEMORY_PAIRS = 3_000


@frozen
class Figure:
    """A figure that is measured.

    :param workload: the workload that measures it.
    :param digits: decimals that are shown.
    """

    name: str
    title: str
    unit: str
    workload: str
    digits: int = 0

    def show(self, value: float) -> str:
        """The value as text, without its unit."""
        return f"{value:.{self.digits}f}"

    def at(self, size: int) -> str:
        """The name that the figure has with so many connections."""
        return f"{self.name}@{size}"


#: In the order in which they are shown.
FIGURES = {
    figure.name: figure
    for figure in (
        Figure("bulk-1", "bulk, 1 stream", "CPU ms per GB", "bulk-1"),
        Figure("bulk-8", "bulk, 8 streams", "CPU ms per GB", "bulk-8"),
        Figure("throughput-1", "throughput, 1 stream", "Gb/s", "bulk-1", 1),
        Figure("throughput-8", "throughput, 8 streams", "Gb/s", "bulk-8", 1),
        Figure("request", "request and response", "CPU µs", "requests", 1),
        *(
            Figure(
                f"short-{side}{'-quiet' * quiet}",
                f"short, {side} closes first, {'quiet' if quiet else 'all log'}",
                "CPU µs",
                f"short-{side}{'-quiet' * quiet}",
            )
            for quiet in (False, True)
            for side in ("server", "client")
        ),
        Figure("latency-p50", "latency, median", "µs", "latency"),
        Figure("latency-p99", "latency, 99th percentile", "µs", "latency"),
        Figure("memory", "memory of an idle pair", "kB", "memory", 2),
    )
}

#: The figures of SOCKS4 proxies, shown in a section of their own.
SOCKS4 = {
    figure.name: figure
    for figure in (
        Figure(
            "socks4-short", "SOCKS4, short session, all log", "CPU µs", "socks4-short"
        ),
        Figure(
            "socks4-short-quiet",
            "SOCKS4, short session, quiet",
            "CPU µs",
            "socks4-short-quiet",
        ),
        Figure("socks4-bulk", "SOCKS4, bulk", "CPU ms per GB", "socks4-bulk"),
    )
}

#: The figures of UDP relays, likewise.
UDP = {
    figure.name: figure
    for figure in (
        Figure("udp-1", "UDP, 1 flow of 32", "CPU µs", "udp-1", 2),
        Figure("udp-50", "UDP, 50 flows of 4", "CPU µs", "udp-50", 2),
        Figure("udp-500", "UDP, 500 flows of 1", "CPU µs", "udp-500", 2),
        Figure("udp-5000", "UDP, 5,000 flows of 1", "CPU µs", "udp-5000", 2),
        *(
            Figure(
                f"udp-turns-{flows}",
                f"UDP, 50 bursts of 4, {flows:,} flows in turn",
                "CPU µs",
                "udp-turns",
                2,
            )
            for flows in FLOWS
        ),
        Figure("udp-delivered", "UDP, delivered", "%", "udp-delivered", 3),
    )
}

#: The figures of pools with very many servers, likewise.
POOLS = {
    "short-clients": Figure(
        "short-clients",
        "10,000 clients, short, server closes first, quiet",
        "CPU µs",
        "short-clients",
        1,
    )
}

#: The figures of relays with filters, likewise.
FILTERS = {
    "filtered-bulk": Figure(
        "filtered-bulk", "filters, bulk", "CPU ms per GB", "filtered-bulk"
    )
}

#: The figures of relays with a route, or with server names, likewise.
ROUTES = {
    figure.name: figure
    for figure in (
        Figure(
            "route", "a route that answers at once, short session", "CPU µs", "route", 1
        ),
        Figure(
            "route-peek",
            "a route that peeks, short session",
            "CPU µs",
            "route-peek",
            1,
        ),
        Figure("sni", "a server name, short TLS session", "CPU µs", "sni", 1),
        Figure("route-bulk", "routes, bulk", "CPU ms per GB", "route-bulk"),
    )
}

#: The figures of relays that dial from their clients' addresses, and of plain ones in
#: the same namespaces, likewise.
TRANSPARENT = {
    figure.name: figure
    for figure in (
        Figure(
            "transparent",
            "between namespaces, short session",
            "CPU µs",
            "transparent",
            1,
        ),
        Figure(
            "transparent-udp",
            "between namespaces, UDP, 500 flows of 1",
            "CPU µs",
            "transparent-udp",
            2,
        ),
        Figure(
            "transparent-udp-new",
            "between namespaces, UDP, a new flow of 1",
            "CPU µs",
            "transparent-udp",
            1,
        ),
    )
}

#: The figure of a server to which very many connections have ended, likewise.
ENDED = {
    figure.name: figure
    for figure in (
        Figure(
            "ended",
            "between namespaces, short session after 15,000",
            "CPU µs",
            "ended",
            1,
        ),
    )
}

#: The figures of operating many relays, likewise.
OPERATING = {
    figure.name: figure
    for figure in (
        *(
            Figure(
                f"scrape-{relays}{name}",
                f"scrape, {relays:,} relays{title}",
                "ms",
                f"scrape-{relays}",
                1,
            )
            for relays in (100, 1_000)
            for name, title in (
                ("", ""),
                ("-request", ": longest request"),
                ("-request-without", ": longest request without it"),
                ("-short", ": longest short session"),
                ("-short-without", ": longest short session without it"),
            )
        ),
        Figure("check-1000", "relayctl check, 1,000 relays", "s", "check-1000", 2),
        Figure(
            "check-1000-cpu", "relayctl check, 1,000 relays", "CPU s", "check-1000", 2
        ),
    )
}

#: The figures with more and more connections; `name@size` is the one at a size.
GROWTH = {
    figure.name: figure
    for figure in (
        Figure("request", "request, all connections busy", "CPU µs", "growth-busy", 1),
        Figure("turn", "request, connections in turn", "CPU µs", "growth-turn", 1),
        Figure("short", "short connection beside idle ones", "CPU µs", "growth-short"),
        Figure("memory", "memory of an idle pair", "kB", "memory", 2),
    )
}


def figure_named(name: str) -> Figure:
    """The figure of this name, `name@size` included."""
    base, at, _ = name.partition("@")
    if at:
        return GROWTH[base]
    kinds = (FIGURES, SOCKS4, UDP, POOLS, FILTERS, ROUTES, TRANSPARENT, ENDED)
    return ChainMap(*kinds, OPERATING)[name]


@frozen
class Spread:
    """Several rounds: the median, the lowest, the highest."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        return cls(median(values), min(values), max(values))


class Results:
    """The value of every figure, for every relay, in every round."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, list[float]]] = {}

    def add(self, relay: str, readings: Mapping[str, float]) -> None:
        """Add the readings of one measurement."""
        for figure, value in readings.items():
            self._values.setdefault(figure, {}).setdefault(relay, []).append(value)

    def values(self) -> dict[str, dict[str, list[float]]]:
        """Values by figure and relay, in the order of the rounds."""
        return self._values

    def measured(
        self, figures: Iterable[Figure], titles: Mapping[str, str]
    ) -> dict[str, str]:
        """The relays, with their titles, that have any of these figures."""
        have = {
            relay for figure in figures for relay in self._values.get(figure.name, ())
        }
        return {relay: title for relay, title in titles.items() if relay in have}

    def spread(self, figure: str, relay: str) -> Spread | None:
        """The spread of a figure; None if it was not measured."""
        values = self._values.get(figure, {}).get(relay)
        return Spread.of(values) if values else None

    def ratio(self, of: tuple[str, str], to: tuple[str, str]) -> Spread | None:
        """The spread of one (figure, relay) divided by another."""
        above = self._values.get(of[0], {}).get(of[1])
        below = self._values.get(to[0], {}).get(to[1])
        if not above or not below:
            return None
        return Spread.of([a / b for a, b in zip(above, below, strict=True)])
