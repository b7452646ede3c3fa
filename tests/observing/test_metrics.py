"""The families of the metrics, and their text, as Prometheus's own parsers read it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from relayd.core.counts import FlowCounts, SessionCounts
from relayd.core.flows import Counters
from relayd.core.session import Ending
from relayd.observing.metrics import (
    PIECE,
    RelayCollector,
    exposition,
)
from relayd.observing.readings import Flows, ProcessReading, RuleCounts, Sessions

OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.2"

#: Each family, its type, and its labels: what dashboards and alerts are made of.
FAMILIES = {
    "relayd_build_info": ("gauge", {"version", "twisted", "python"}),
    "relayd_sessions_opened_total": ("counter", {"relay"}),
    "relayd_sessions_closed_total": ("counter", {"relay", "ending"}),
    "relayd_sessions_active": ("gauge", {"relay"}),
    "relayd_deciding": ("gauge", {"relay"}),
    "relayd_session_duration_seconds": ("histogram", {"relay", "le"}),
    "relayd_relayed_bytes_total": ("counter", {"relay", "direction"}),
    "relayd_spliced_bytes_total": ("counter", {"relay"}),
    "relayd_bandwidth_waits_total": ("counter", {"relay"}),
    "relayd_refused_total": ("counter", {"relay", "reason"}),
    "relayd_upstream_connects_total": ("counter", {"relay", "upstream", "result"}),
    "relayd_upstream_connect_seconds": ("histogram", {"relay", "le"}),
    "relayd_upstream_sessions_active": ("gauge", {"relay", "upstream"}),
    "relayd_upstream_up": ("gauge", {"relay", "upstream"}),
    "relayd_upstream_weight": ("gauge", {"relay", "upstream"}),
    "relayd_upstream_retries_total": ("counter", {"relay"}),
    "relayd_udp_flows_active": ("gauge", {"relay"}),
    "relayd_udp_datagrams_total": ("counter", {"relay", "direction"}),
    "relayd_udp_bytes_total": ("counter", {"relay", "direction"}),
    "relayd_udp_dropped_total": ("counter", {"relay", "direction", "reason"}),
    "relayd_accept_pauses_total": ("counter", set[str]()),
    "relayd_open_descriptors": ("gauge", set[str]()),
    "relayd_max_descriptors": ("gauge", set[str]()),
    "relayd_pipes_in_use": ("gauge", set[str]()),
    "relayd_reactor_lag_seconds": ("gauge", set[str]()),
    "relayd_log_lines_dropped_total": ("counter", set[str]()),
    "relayd_stopping": ("gauge", set[str]()),
    "relayd_config_last_load_success_timestamp_seconds": ("gauge", set[str]()),
    "relayd_netfilter_failures_total": ("counter", set[str]()),
    "relayd_netfilter_lost_total": ("counter", set[str]()),
}


def process() -> Generator[None, None, ProcessReading]:
    """What concerns the process, made up."""
    yield
    return ProcessReading(
        build={"version": "1.2", "twisted": "26.10", "python": "3.11"},
        accept_pauses=3,
        open_descriptors=17,
        max_descriptors=1024,
        pipes_in_use=2,
        reactor_lag=0.25,
        log_lines_dropped=9,
        stopping=True,
        loaded_at=1.5e9,
        rules=RuleCounts(2, 5),
    )


def streams(name: str, *servers: str) -> Sessions:
    """A relay that has something in each of its families."""
    counts = SessionCounts(servers)
    counts.closed.update(done=5, idle=1)
    counts.refuse(Ending.LOOP.word)
    counts.durations.add(0.02)
    for server in servers:
        counts.fail(server, Ending.CONNECT_REFUSED, 0.0)
    return Sessions(name, counts, [[]], undecided=[["a", "b"], ["c"]])


def flows(name: str) -> Flows:
    """Likewise."""
    counters = Counters(sent=4, replies_sent=3)
    counters.dropped.update(truncated=1, client=2)
    source: Any = SimpleNamespace(counters=counters, counts=FlowCounts(), registry=[])
    return Flows(name, [source])


def collector(*relays: Sessions | Flows) -> RelayCollector:
    return RelayCollector(lambda: relays, process)


def text(of: RelayCollector, accept: str = "") -> str:
    _, pieces = exposition(of, accept)
    return b"".join(pieces).decode()


def samples(
    said: str, parse: Callable[[str], Iterable[Any]] = parse_text
) -> dict[tuple[str, ...], float]:
    """The samples of a text, by name and labels."""
    return {
        (each.name, *(f"{k}={v}" for k, v in sorted(each.labels.items()))): each.value
        for family in parse(said)
        for each in family.samples
    }


def test_the_families_and_their_labels() -> None:
    """Exactly these: a query that somebody has written goes on working."""
    said = text(collector(streams("web", "db:1"), flows("dns")))
    found = {}
    for line in said.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            found[name] = kind, set[str]()
    for family in parse_text(said):
        for each in family.samples:
            name = each.name
            for suffix in ("_bucket", "_count", "_sum"):
                if name.removesuffix(suffix) in found:
                    name = name.removesuffix(suffix)
            found[name][1].update(each.labels)
    assert found == FAMILIES


def test_what_they_say() -> None:
    said = samples(text(collector(streams("web", "db:1"), flows("dns"))))
    for name, value in (
        (("relayd_sessions_closed_total", "ending=done", "relay=web"), 5),
        (("relayd_sessions_opened_total", "relay=web"), 6),
        (("relayd_deciding", "relay=web"), 3),
        (("relayd_session_duration_seconds_bucket", "le=0.01", "relay=web"), 0),
        (("relayd_session_duration_seconds_bucket", "le=0.05", "relay=web"), 1),
        (("relayd_session_duration_seconds_bucket", "le=+Inf", "relay=web"), 1),
        (("relayd_session_duration_seconds_sum", "relay=web"), 0.02),
        (("relayd_refused_total", "reason=loop", "relay=web"), 1),
        (("relayd_refused_total", "reason=client", "relay=dns"), 2),
        (("relayd_udp_dropped_total", "direction=up", "reason=client", "relay=dns"), 2),
        (("relayd_upstream_up", "relay=web", "upstream=db:1"), 0),
        (("relayd_udp_datagrams_total", "direction=down", "relay=dns"), 3),
        (("relayd_accept_pauses_total",), 3),
        (("relayd_reactor_lag_seconds",), 0.25),
        (("relayd_stopping",), 1),
        (("relayd_config_last_load_success_timestamp_seconds",), 1.5e9),
    ):
        assert said[name] == value, name
    assert ("relayd_refused_total", "reason=truncated", "relay=dns") not in said


def test_any_exposition_of_prometheus_client_has_the_same() -> None:
    """The collector can be registered, as an embedder would."""
    registry = CollectorRegistry(auto_describe=False)
    many = [streams(f"web{n}", "db:1", "db:2") for n in range(100)]
    ours = collector(*many, flows("dns"))
    registry.register(ours)
    assert generate_latest(registry).decode() == text(ours)


@pytest.mark.parametrize(
    ("accept", "content_type", "parse"),
    [
        ("", "text/plain", parse_text),
        ("text/html, */*", "text/plain", parse_text),
        (OPENMETRICS, "application/openmetrics-text", parse_openmetrics),
    ],
)
def test_each_format_is_read_by_its_parser(
    accept: str, content_type: str, parse: Callable[[str], Iterable[Any]]
) -> None:
    """In many pieces, each family is one all the same."""
    many = [streams(f"web{n}", "db:1") for n in range(PIECE)]
    made = collector(*many, flows("dns"))
    kind, _ = exposition(made, accept)
    assert kind.startswith(content_type)
    said = text(made, accept)
    assert len(samples(said, parse)) == len(samples(text(made)))
    assert said.count("# TYPE relayd_sessions_closed") == 1
    assert said.endswith("# EOF\n") == (parse is parse_openmetrics)
    assert said.count("# EOF") <= 1


def test_a_piece_is_little_work() -> None:
    """However many relays there are, and servers of one."""
    crowd = streams("crowd", *(f"db:{n}" for n in range(3 * PIECE)))
    made = collector(crowd, *(streams(f"web{n}", "db:1") for n in range(PIECE)))
    sizes = [len(each.samples) for each in made.pieces() if each is not None]
    # A histogram is not divided.
    assert max(sizes) < PIECE + 20


def test_a_relay_that_is_gone_has_no_series() -> None:
    relays = [streams("web", "db:1"), streams("mail", "mx:25")]
    made = RelayCollector(lambda: relays, process)
    assert 'relay="mail"' in text(made)
    del relays[1]
    said = text(made)
    assert "mail" not in said
    assert "mx" not in said


def test_names_are_escaped() -> None:
    """A UNIX socket may be called anything."""
    path = 'unix:/run/a "b"\\c\n'
    said = text(collector(streams("web", path)))
    assert ("relayd_upstream_up", "relay=web", f"upstream={path}") in samples(said)
