"""Charts of the results, as PNG and SVG.

`costs`: a panel for each figure, a bar for each relay, as a multiple of HAProxy with
splice; all log, as relayd does by default. `short`: the same for short sessions, with
their logs and quiet, and with the relays that are measured at little else. `growth`: a
panel for each cost, a line for each relay. `socks4` and `udp`: as `costs`, for the
SOCKS4 proxies and the UDP relays. The same results make the same SVG: its ids are
salted with a constant, and it has no date.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing
from matplotlib.layout_engine import ConstrainedLayoutEngine

from bench.charted import (
    COLOURS,
    PANELS,
    REFERENCE,
    SHORT_PANELS,
    SOCKS4_PANELS,
    UDP_PANELS,
    charted,
)
from bench.figures import FIGURES, GROWTH, SIZES, SOCKS4, UDP, Figure, Results

#: Longer bars are cut off, shown by a gap near their end.
LONGEST = 4.0

_KEY = (
    "A label has the multiple and, in brackets, the figure; a thin line reaches from"
    " the lowest round to the highest."
)

_TEXT = "#222222"
_FAINT = "#bbbbbb"


def draw(results: Results, titles: Mapping[str, str], folder: Path) -> None:
    """Write costs, short, growth, socks4 and udp, each as .png and .svg.

    :param titles: titles of relays by their names.
    """
    style: dict[Any, Any] = {
        "svg.hashsalt": "relayd",
        "font.size": 9.0,
        "font.family": "DejaVu Sans",
        "text.color": _TEXT,
        "axes.labelcolor": _TEXT,
        "xtick.color": _TEXT,
        "ytick.color": _TEXT,
    }
    with mpl.rc_context(style):
        for name, drawing in (
            ("costs", _costs(results, titles)),
            (
                "short",
                _row("a short session", FIGURES, SHORT_PANELS, results, titles),
            ),
            ("growth", _growth(results, titles)),
            (
                "socks4",
                _row("a SOCKS4 proxy", SOCKS4, SOCKS4_PANELS, results, titles),
            ),
            ("udp", _row("relaying a datagram", UDP, UDP_PANELS, results, titles)),
        ):
            drawing.savefig(folder / f"{name}.png", dpi=150)
            drawing.savefig(folder / f"{name}.svg", metadata={"Date": None})


def _drawing(width: float, height: float) -> Drawing:
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.12)
    drawing = Drawing(figsize=(width, height), layout=layout, facecolor="white")
    FigureCanvasAgg(drawing)
    return drawing


def _costs(results: Results, titles: Mapping[str, str]) -> Drawing:
    relays = charted(results, FIGURES.values(), titles)
    drawing = _drawing(11, 9)
    drawing.suptitle(
        "What relaying costs with the logs on, HAProxy with splice = 1 (shorter is"
        " cheaper; for throughput, longer is faster)",
        fontsize=11,
        fontweight="bold",
    )
    drawing.supxlabel(_KEY, fontsize=8)
    grid = drawing.subplots(len(PANELS), len(PANELS[0]), squeeze=False)
    for row, names in zip(grid, PANELS, strict=True):
        for axes, name in zip(row, names, strict=True):
            _panel(axes, FIGURES[name], results, relays, REFERENCE, axes is row[0])
    return drawing


def _row(
    what: str,
    figures: Mapping[str, Figure],
    panels: Mapping[str, str],
    results: Results,
    titles: Mapping[str, str],
) -> Drawing:
    """Panels in a row, each with the relay whose figure is 1."""
    relays = charted(results, [figures[name] for name in panels], titles)
    height = max(3.4, 1.4 + 0.3 * len(relays))
    drawing = _drawing(max(11, 4 * len(panels)), height)
    drawing.suptitle(
        f"What {what} costs (shorter is cheaper)", fontsize=12, fontweight="bold"
    )
    drawing.supxlabel(_KEY, fontsize=8)
    grid = drawing.subplots(1, len(panels))
    for axes, (name, to) in zip(grid, panels.items(), strict=True):
        _panel(axes, figures[name], results, relays, to, axes is grid[0])
        axes.set_xlabel(f"{titles.get(to, to)} = 1", loc="left", fontsize=8)
    return drawing


def _panel(
    axes: Axes,
    figure: Figure,
    results: Results,
    titles: Mapping[str, str],
    reference: str,
    named: bool,
) -> None:
    """A bar for each relay, the first at the top; `named`: with their names."""
    axes.set_title(f"{figure.title} ({figure.unit})", loc="left", fontsize=9.5)
    for place, relay in enumerate(titles):
        ratio = results.ratio((figure.name, relay), (figure.name, reference))
        spread = results.spread(figure.name, relay)
        if ratio is None or spread is None:
            axes.text(0.05, place, "-", va="center")
            continue
        axes.barh(place, min(ratio.middle, LONGEST), height=0.72, color=COLOURS[relay])
        low, high = min(ratio.low, LONGEST), min(ratio.high, LONGEST)
        axes.plot([low, high], [place, place], color=_TEXT, linewidth=1)
        if ratio.middle > LONGEST:
            axes.barh(place, 0.08, left=LONGEST - 0.3, height=0.8, color="white")
        axes.text(
            max(min(ratio.middle, LONGEST), high) + 0.08,
            place,
            f"{ratio.middle:.2f}  ({figure.show(spread.middle)})",
            va="center",
            fontsize=8,
            fontweight="bold" if relay.startswith("relayd") else "normal",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )
    axes.axvline(1, color=_TEXT, linewidth=0.8, linestyle=(0, (3, 3)), zorder=1.5)
    axes.set_xlim(0, LONGEST + 1.6)
    axes.set_xticks(range(int(LONGEST) + 1))
    axes.set_ylim(len(titles) - 0.4, -0.6)
    axes.set_yticks(range(len(titles)), list(titles.values()) if named else [])
    axes.tick_params(length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(_FAINT)


def _growth(results: Results, titles: Mapping[str, str]) -> Drawing:
    drawing = _drawing(11, 7.5)
    drawing.suptitle(
        "The same costs with more connections open", fontsize=12, fontweight="bold"
    )
    grid = drawing.subplots(2, 2)
    for axes, figure in zip(grid.flat, GROWTH.values(), strict=True):
        _lines(axes, figure, results, titles)
    return drawing


def _lines(
    axes: Axes, figure: Figure, results: Results, titles: Mapping[str, str]
) -> None:
    """A line for each relay, with its name at its end."""
    axes.set_title(f"{figure.title} ({figure.unit})", loc="left", fontsize=9.5)
    ends = {}
    for relay in titles:
        points = [
            (size, spread)
            for size in SIZES
            if (spread := results.spread(figure.at(size), relay))
        ]
        if not points:
            continue
        sizes = [size for size, _ in points]
        axes.fill_between(
            sizes,
            [spread.low for _, spread in points],
            [spread.high for _, spread in points],
            color=COLOURS[relay],
            alpha=0.15,
            linewidth=0,
        )
        axes.plot(
            sizes,
            [spread.middle for _, spread in points],
            color=COLOURS[relay],
            linewidth=2.4 if relay.startswith("relayd") else 1.4,
            marker="o",
            markersize=4,
        )
        ends[relay] = points[-1][1].middle
    axes.set_xscale("log")
    axes.set_xticks(SIZES, [f"{size:,}" for size in SIZES])
    axes.minorticks_off()
    axes.set_xlim(SIZES[0] * 0.8, SIZES[-1] * 12)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.08)
    axes.set_xlabel("connections", loc="left")
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FAINT)
    for relay, height in _apart(ends, axes.get_ylim()[1] * 0.065).items():
        axes.text(
            SIZES[-1] * 1.25,
            height,
            f"{titles[relay]}  {figure.show(ends[relay])}",
            va="center",
            fontsize=8,
            color=COLOURS[relay],
            fontweight="bold" if relay.startswith("relayd") else "normal",
        )


def _apart(heights: Mapping[str, float], least: float) -> dict[str, float]:
    """The heights, moved up where labels would be closer than `least`."""
    placed: dict[str, float] = {}
    floor = 0.0
    for name, height in sorted(heights.items(), key=lambda item: item[1]):
        placed[name] = max(height, floor)
        floor = placed[name] + least
    return placed
