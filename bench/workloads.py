"""The workloads: which figures, by which measurement, with which relays.

`bench.streams`, `bench.growth`, `bench.udp` and `bench.scrapes` have the measurements.
Each starts its own relays and its own servers, on ports of their own, and warms the
relays up with the same work.  Most can be repeated on a relay that stays: relays that
are compared take turns in windows of a fraction of a second.  CPU is that of the
relay's process, by the kernel's account.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from attrs import frozen

from bench.growth import begin_growth_short, begin_growth_turn, measure_growth_busy
from bench.places import no_namespaces
from bench.relays import Begin, Relay, afresh
from bench.scrapes import begin_check, begin_scrape
from bench.streams import (
    PROXY_WARM_UP,
    begin_bulk,
    begin_clients,
    begin_ended,
    begin_requests,
    begin_short,
    begin_tls,
    begin_transparent,
    leaves_odd_ports,
    measure_latency,
    measure_memory,
)
from bench.udp import (
    begin_transparent_udp,
    begin_udp,
    begin_udp_turns,
    measure_delivered,
)


@frozen
class Workload:
    """A kind of load, and how it is measured.

    :param begin: called with the relay and about how many seconds a load may last;
        yields a function that measures, and returns figures by name.
    :param takes: whether it can be measured with a relay.
    :param programs: the programs that it needs besides the relay.
    :param windows: it is measured in as many windows in a round as the mode has;
        otherwise once.
    :param times: it has so many times as many of them as others: where a limit is
        nearer than what a median of the others' number can tell.
    :param alone: the relays do not take turns in windows, but have them one relay after
        the other: where what is compared is the same relay with few connections and
        many, or where all at once would need more ports than there are.
    :param lacking: why it can't be measured here, so that it is left out; None if it
        can.
    """

    name: str
    begin: Begin
    takes: Callable[[Relay], bool]
    programs: tuple[str, ...]
    windows: bool = True
    times: int = 1
    alone: bool = False
    lacking: Callable[[], str | None] = lambda: None


def _streams(relay: Relay) -> bool:
    return relay.kind == "stream"


def _whole(relay: Relay) -> bool:
    return _streams(relay) and not relay.narrow


def _logs(relay: Relay) -> bool:
    return _streams(relay) and relay.logs


def _thousands(relay: Relay) -> bool:
    return _whole(relay) and not relay.forks


def _grows(relay: Relay) -> bool:
    return _whole(relay) and relay.grows


def _pools(relay: Relay) -> bool:
    """Those with very many servers, and relayd with one."""
    return relay.kind == "pool" or relay.name == "relayd-plane"


def _filtered(relay: Relay) -> bool:
    """Those with filters, that which copies, and relayd without either."""
    return relay.kind == "filtered" or relay.name == "relayd-plane"


def _routed(*names: str) -> Callable[[Relay], bool]:
    """These, and relayd without a route."""
    return lambda relay: relay.name in ("relayd-plane", *names)


def _transparent(relay: Relay) -> bool:
    """What dials from its clients' addresses, and relayd without that."""
    return relay.kind == "transparent" or relay.name == "relayd-plane"


def _between_namespaces(relay: Relay) -> bool:
    """Those that can be told where their clients and servers are."""
    return relay.name in ("relayd-plane", "haproxy-splice", "nginx")


def _transparent_datagrams(relay: Relay) -> bool:
    return relay.kind == "transparent-udp" or relay.name == "relayd-udp"


def _proxies(relay: Relay) -> bool:
    return relay.kind == "socks4"


def _proxies_and_ours(relay: Relay) -> bool:
    """The proxies, and relayd's TCP relay, with which its proxy is compared."""
    return _proxies(relay) or relay.name == "relayd-plane"


def _ours(relay: Relay) -> bool:
    """What is measured of relayd as its defaults are, and of no other relay."""
    return relay.name == "relayd-plane"


def _datagrams(relay: Relay) -> bool:
    return relay.kind == "udp"


_WRK, _IPERF3, _H2LOAD = ("nginx", "wrk"), ("iperf3",), ("nginx", "h2load")
_OWN, _GCC, _CURL = ("nginx",), ("gcc",), ("nginx", "curl")
_TLS = ("nginx", "openssl")
_NAMESPACES = ("ip", "nft")

#: Ordered with other work between the short connections, so that those in TIME_WAIT are
#: gone before there are more.
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("bulk-1", partial(begin_bulk, 1), _whole, _IPERF3),
        Workload(
            "short-client",
            partial(begin_short, "short-client", "client"),
            _logs,
            _OWN,
        ),
        Workload("requests", begin_requests, _streams, _WRK),
        Workload(
            "short-server-quiet",
            partial(begin_short, "short-server-quiet", "server", quiet=True),
            _streams,
            _OWN,
        ),
        Workload("bulk-8", partial(begin_bulk, 8), _whole, _IPERF3),
        Workload(
            "short-server",
            partial(begin_short, "short-server", "server"),
            _logs,
            _OWN,
        ),
        Workload("latency", afresh(measure_latency), _whole, _H2LOAD, windows=False),
        Workload("growth-turn", begin_growth_turn, _grows, _OWN, times=3, alone=True),
        Workload(
            "short-client-quiet",
            partial(begin_short, "short-client-quiet", "client", quiet=True),
            _streams,
            _OWN,
        ),
        Workload(
            "growth-busy", afresh(measure_growth_busy), _grows, _WRK, windows=False
        ),
        Workload("memory", afresh(measure_memory), _thousands, _OWN, windows=False),
        Workload("growth-short", begin_growth_short, _grows, _OWN, alone=True),
        Workload("short-clients", begin_clients, _pools, _OWN),
        Workload(
            "filtered-bulk",
            partial(begin_bulk, 1, name="filtered-bulk"),
            _filtered,
            _IPERF3,
            times=3,
        ),
        *(
            Workload(
                name,
                partial(begin_short, name, "client", quiet=True),
                _routed(relay),
                _OWN,
                times=3,
            )
            for name, relay in (
                ("route", "relayd-route"),
                ("route-peek", "relayd-peek"),
            )
        ),
        Workload("sni", partial(begin_tls, "sni"), _routed("relayd-sni"), _TLS),
        Workload(
            "route-bulk",
            partial(begin_bulk, 1, name="route-bulk"),
            _routed("relayd-route", "relayd-peek"),
            _IPERF3,
            times=3,
        ),
        Workload(
            "transparent",
            begin_transparent,
            _transparent,
            (*_OWN, *_NAMESPACES),
            times=3,
            lacking=no_namespaces,
        ),
        Workload(
            "ended",
            begin_ended,
            _between_namespaces,
            (*_OWN, "ip"),
            lacking=lambda: no_namespaces() or leaves_odd_ports(),
        ),
        Workload(
            "socks4-bulk",
            partial(begin_bulk, 1, name="socks4-bulk"),
            _proxies_and_ours,
            ("iperf3", "proxychains4"),
            times=3,
        ),
        Workload(
            "socks4-short",
            partial(begin_short, "socks4-short", "client", warm_up=PROXY_WARM_UP),
            _proxies,
            _OWN,
        ),
        *(
            Workload(name, begin, _datagrams, _GCC, alone=alone)
            for name, begin, alone in (
                ("udp-1", partial(begin_udp, 1, 32), False),
                ("udp-50", partial(begin_udp, 50, 4), False),
                ("udp-500", partial(begin_udp, 500, 1), False),
                ("udp-5000", partial(begin_udp, 5_000, 1), True),
                ("udp-turns", begin_udp_turns, True),
            )
        ),
        Workload(
            "socks4-short-quiet",
            partial(
                begin_short,
                "socks4-short-quiet",
                "client",
                quiet=True,
                warm_up=PROXY_WARM_UP,
            ),
            _proxies,
            _OWN,
        ),
        Workload(
            "udp-delivered", afresh(measure_delivered), _datagrams, _GCC, windows=False
        ),
        Workload(
            "transparent-udp",
            begin_transparent_udp,
            _transparent_datagrams,
            (*_GCC, *_NAMESPACES),
            times=3,
            lacking=no_namespaces,
        ),
        Workload("scrape-100", partial(begin_scrape, 100), _ours, _CURL),
        Workload("scrape-1000", partial(begin_scrape, 1_000), _ours, _CURL),
        Workload("check-1000", partial(begin_check, 1_000), _ours, ()),
    )
}
