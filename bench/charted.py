"""What the charts show: which figures, of which relays, in which colours.

They are drawn by `charts`, which needs matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bench.figures import Figure, Results
from bench.relays import RELAYS

#: The relay whose figure is 1 in each panel.
REFERENCE = "haproxy-splice"

#: Likewise, in the panels of short sessions.
SHORT_PANELS = dict.fromkeys(
    ("short-server", "short-client", "short-server-quiet", "short-client-quiet"),
    REFERENCE,
)

#: Likewise, in the panels of the SOCKS4 proxies.
SOCKS4_PANELS = {
    "socks4-short": "dante",
    "socks4-short-quiet": "dante",
    "socks4-bulk": "relayd-plane",
}

#: Likewise, in the panels of the UDP relays.
UDP_PANELS = dict.fromkeys(
    ("udp-1", "udp-50", "udp-500", "udp-5000", "udp-turns-5000"), "nginx-udp"
)

#: Figures that have a panel, in rows of three.
PANELS = (
    ("short-server", "short-client", "request"),
    ("bulk-1", "bulk-8", "throughput-1"),
    ("latency-p50", "latency-p99", "memory"),
)

#: Okabe and Ito's colours, which colour-blind people can distinguish.
COLOURS = {
    "relayd-plane": "#0072b2",
    "relayd-twisted": "#56b4e9",
    "relayd-other-python": "#8fb8de",
    "haproxy-splice": "#555555",
    "haproxy-smart": "#777777",
    "haproxy": "#999999",
    "nginx": "#009e73",
    "portforward": "#d55e00",
    "socat": "#cc79a7",
    # Shown without the TCP relays above, but for relayd's, so colours are reused.
    "relayd-socks4": "#56b4e9",
    "dante": "#555555",
    "twistd-socks": "#d55e00",
    # Likewise.
    "relayd-udp": "#0072b2",
    "relayd-udp-twisted": "#56b4e9",
    "nginx-udp": "#009e73",
    "twisted-udp": "#d55e00",
}


def charted(
    results: Results, figures: Iterable[Figure], titles: Mapping[str, str]
) -> dict[str, str]:
    """The relays of a chart of these figures, with their titles.

    Without those that are measured at a few figures only.
    """
    return {
        relay: title
        for relay, title in results.measured(figures, titles).items()
        if not RELAYS[relay].narrow
    }
