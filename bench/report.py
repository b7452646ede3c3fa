"""The printed report: a block of lines for each figure, a line for each limit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from bench.figures import (
    GROWTH,
    SIZES,
    SOCKS4,
    TRANSPARENT,
    UDP,
    Figure,
    Results,
    Spread,
    figure_named,
)
from bench.limits import Verdict

#: Columns of a relay's title.
WIDTH = 23

#: Relays that the others are compared with, and their names in a sentence.
REFERENCES = {"haproxy-splice": "HAProxy with splice", "portforward": "portforward"}

#: Likewise, for the SOCKS4 proxies.
SOCKS4_REFERENCES = {
    "dante": "Dante",
    "twistd-socks": "twistd socks",
    "relayd-plane": "relayd's TCP relay",
}

#: Likewise, for the UDP relays.
UDP_REFERENCES = {"nginx-udp": "nginx stream", "twisted-udp": "a relay in Twisted"}

#: Likewise, where some relays dial from their clients' addresses.
TRANSPARENT_REFERENCES = {
    "relayd-plane": "plain relaying",
    "relayd-udp": "plain relaying",
}


def lines_of(
    names: Iterable[str], results: Results, titles: Mapping[str, str]
) -> list[str]:
    """A block of lines for each figure, with a line for each relay.

    :param names: figures, as a measurement names them.
    :param titles: titles of relays by their names.
    """
    plain = [name for name in names if "@" not in name]
    grown = dict.fromkeys(name.partition("@")[0] for name in names if "@" in name)
    lines = []
    for name in plain:
        lines += ["", *_plain_lines(figure_named(name), results, titles)]
    for name in grown:
        lines += ["", *_growth_lines(GROWTH[name], results, titles)]
    return lines


def _references(figure: Figure) -> Mapping[str, str]:
    if figure.name in SOCKS4:
        return SOCKS4_REFERENCES
    if figure.name in TRANSPARENT:
        return TRANSPARENT_REFERENCES
    return UDP_REFERENCES if figure.name in UDP else REFERENCES


def _plain_lines(
    figure: Figure, results: Results, titles: Mapping[str, str]
) -> list[str]:
    lines = [f"{figure.title} ({figure.unit})"]
    for relay, title in titles.items():
        if spread := results.spread(figure.name, relay):
            line = f"  {title:<{WIDTH}}{with_range(figure, spread):>20}"
            for to, called in _references(figure).items():
                ratio = results.ratio((figure.name, relay), (figure.name, to))
                if ratio and relay != to:
                    line += f"   {ratio.middle:5.2f} of {called}"
            lines.append(line)
    return lines


def _growth_lines(
    figure: Figure, results: Results, titles: Mapping[str, str]
) -> list[str]:
    sizes = [size for size in SIZES if figure.at(size) in results.values()]
    lines = [
        f"{figure.title} ({figure.unit}), by connections",
        " " * (WIDTH + 2) + "".join(f"{size:>20,}" for size in sizes),
    ]
    for relay, title in titles.items():
        spreads = [results.spread(figure.at(size), relay) for size in sizes]
        if any(spreads):
            cells = "".join(
                f"{with_range(figure, s) if s else '-':>20}" for s in spreads
            )
            lines.append(f"  {title:<{WIDTH}}{cells}")
    return lines


def limit_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """A line for each limit: the ratio or figure, the bound, ok or MISSED."""
    width = max(len(verdict.limit.title) for verdict in verdicts)
    rule = max(len(verdict.limit.rule) for verdict in verdicts)
    return [
        f"{verdict.limit.title:<{width}}  {measured_text(verdict):<21}"
        f"  {verdict.limit.rule:<{rule}}  {word(verdict)}"
        for verdict in verdicts
    ]


def measured_text(verdict: Verdict) -> str:
    """What a limit bounds, as it was measured: a ratio, or a figure in its unit."""
    if verdict.measured is None or verdict.limit.to:
        return ratio_text(verdict.measured, 3)
    return with_range(figure_named(verdict.limit.of[0]), verdict.measured)


def with_range(figure: Figure, spread: Spread) -> str:
    """A figure's median, and its range if it has one."""
    return _ranged(*map(figure.show, (spread.low, spread.middle, spread.high)))


def ratio_text(ratio: Spread | None, digits: int = 2) -> str:
    """A ratio's median, and its range if it has one; `-` for None."""
    if ratio is None:
        return "-"
    values = (ratio.low, ratio.middle, ratio.high)
    return _ranged(*(f"{value:.{digits}f}" for value in values))


def _ranged(low: str, middle: str, high: str) -> str:
    return middle if low == high else f"{middle} ({low}-{high})"


def word(verdict: Verdict) -> str:
    """ok, with what makes it so if the bound does not; MISSED; or not measured."""
    if verdict.measured is None:
        return "not measured"
    if verdict.excuse:
        return f"ok: {verdict.excuse}"
    return "ok" if verdict.ok else "MISSED"
