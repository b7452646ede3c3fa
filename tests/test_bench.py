"""The benchmark's pure parts: figures, limits, tables, and what loads report.

It runs none of the programs; what they print is kept here.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from twisted.logger import ILogObserver, LogLevel
from twisted.python.reflect import namedAny

from bench import __main__, children
from bench.children import CannotMeasure
from bench.datagrams import Moved, bursts_in_turn, delivered, read_moved, round_trips
from bench.facts import Run
from bench.figures import (
    FIGURES,
    GROWTH,
    LIMITS,
    MANY,
    SIZES,
    SOCKS4,
    UDP,
    Limit,
    Results,
    Spread,
    Verdict,
    figure_named,
    judge,
    needed_for_limits,
)
from bench.loads import (
    RATE,
    IdlePairs,
    bulk,
    read_h2load,
    read_iperf3,
    read_wrk,
    short_connections,
    socks4_request,
)
from bench.origins import BODY
from bench.page import json_text, markdown, table
from bench.peers import PEERS, Peer, Setup
from bench.report import limit_lines, lines_of
from bench.rounds import MODES, Plan, measure
from bench.works import WORKS, Readings, Work, afresh
from tests.process import PATIENCE, Server, read_all

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
    for figure, peers in figures.items():
        for peer, values in peers.items():
            for value in values:
                results.add(peer, {figure.replace("_", "-"): value})
    return results


# Medians and ratios


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


# Limits


def test_the_limits_are_those_of_the_documentation() -> None:
    rules = {(*limit.of, *limit.to): limit.rule for limit in LIMITS}
    relayd = "relayd-plane"
    bulk = ("bulk-1", relayd, "bulk-1", "haproxy-splice")
    fast = ("throughput-1", relayd, "throughput-1", "portforward")
    many = ("short@8000", relayd, "short@100", relayd)
    assert rules[bulk] == "at most 0.9"
    assert rules[fast] == "at least 1.7"
    assert rules[many] == "at most 1.3"
    proxy = "relayd-socks4"
    for peer in ("dante", "twistd-socks"):
        short = ("socks4-short", proxy, "socks4-short", peer)
        assert rules[short] == "at most 0.55"
    assert rules["socks4-bulk", proxy, "socks4-bulk", relayd] == "at most 1.05"
    udp = "relayd-udp"
    for name, nginx in (("udp-1", 0.95), ("udp-50", 0.95), ("udp-500", 1)):
        assert rules[name, udp, name, "nginx-udp"] == f"at most {nginx}"
        assert rules[name, udp, name, "twisted-udp"] == "at most 0.85"
    lost = ("udp-delivered", udp, "udp-delivered", "nginx-udp")
    assert rules[lost] == "at least 1"
    assert rules["udp-turns-5000", udp, "udp-turns-50", udp] == "at most 1.3"
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


def test_a_missed_limit_is_told_from_a_kept_one() -> None:
    results = results_of(
        request={
            "relayd-plane": [12.0, 10.0, 11.0],
            "haproxy-splice": [10.0, 10.0, 10.0],
            "portforward": [20.0, 20.0, 20.0],
        }
    )
    lines = {
        line.partition("  ")[0]: line.split("  ")[-1].strip()
        for line in limit_lines(judge(results))
    }
    assert lines["request and response: to HAProxy, splice"] == "ok"
    assert lines["request and response: to portforward"] == "MISSED"
    assert lines["bulk, 1 stream: to portforward"] == "not measured"


def test_what_was_not_measured_keeps_no_limit() -> None:
    assert not Verdict(LIMITS[0], None).ok


def test_a_limits_line_has_the_ratio_its_range_and_the_bound() -> None:
    limit = Limit("bulk", ("a", "b"), ("a", "c"), 0.9)
    [line] = limit_lines([Verdict(limit, Spread(0.9004, 0.8, 1.0))])
    assert " ".join(line.split()) == "bulk 0.900 (0.800-1.000) at most 0.9 MISSED"


def test_the_check_measures_all_that_the_limits_speak_of() -> None:
    pairs = needed_for_limits()
    assert ("growth-open", "relayd-plane") in pairs
    assert ("growth-open", "portforward") not in pairs
    plan = Plan.of(MODES["check"])
    planned = {(work, peer) for work, peers in plan.works.items() for peer in peers}
    assert planned == pairs


def test_the_check_takes_several_turns_at_the_proxies() -> None:
    plan = Plan.of(MODES["check"])
    assert plan.turns > 1
    assert plan.works["socks4-short"] == ["relayd-socks4", "dante", "twistd-socks"]
    assert plan.works["socks4-bulk"] == ["relayd-plane", "relayd-socks4"]
    assert WORKS["socks4-short"].turns
    assert WORKS["socks4-bulk"].turns


def test_the_check_takes_several_turns_at_datagrams() -> None:
    plan = Plan.of(MODES["check"])
    works = {name for name in WORKS if name.startswith("udp-")}
    planned = works & set(plan.works)
    for work in planned:
        others = set() if work == "udp-turns" else {"nginx-udp"}
        assert {"relayd-udp", *others} <= set(plan.works[work])
        assert WORKS[work].turns
    # No limit speaks of thousands of flows with a datagram each.
    assert works - planned == {"udp-5000"}


def test_a_lost_datagram_misses_the_limit() -> None:
    results = results_of(
        udp_delivered={
            "relayd-udp": [100.0, 99.999, 99.999],
            "nginx-udp": [100.0, 100.0, 100.0],
        }
    )
    [verdict] = [v for v in judge(results) if v.ratio]
    assert not verdict.ok


def test_relays_take_turns_and_each_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[tuple[str, str, float]] = []

    def measured(name: str) -> Callable[[Peer, float], Readings]:
        def measure_it(peer: Peer, seconds: float) -> Readings:
            order.append((name, peer.name, seconds))
            return {name: float(len(order))}

        return measure_it

    monkeypatch.setattr(
        "bench.rounds.WORKS",
        {
            name: Work(name, afresh(measured(name)), lambda _: True, (), turns)
            for name, turns in (("bulk-1", 0), ("request", 1))
        },
    )
    peers = ["relayd-plane", "portforward"]
    plan = Plan(1, 2.0, {"bulk-1": peers, "request": peers}, turns=3)
    results = measure(plan)
    capsys.readouterr()
    plane, other = peers
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


def test_a_relay_may_stand_for_all_of_its_turns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []

    @contextmanager
    def begin(peer: Peer, seconds: float) -> Iterator[Callable[[], Readings]]:
        def measure_it() -> Readings:
            told.append(peer.name)
            return {"request": 1.0}

        told.append(f"{peer.name} begins")
        yield measure_it
        told.append(f"{peer.name} ends")

    work = Work("request", begin, lambda _: True, (), 2)
    monkeypatch.setattr("bench.rounds.WORKS", {"request": work})
    plane, other = peers = ["relayd-plane", "portforward"]
    measure(Plan(1, 2.0, {"request": peers}, turns=2))
    capsys.readouterr()
    turns = [plane, other, other, plane] * 2
    begins = [f"{peer} begins" for peer in peers]
    assert told == [*begins, *turns, f"{other} ends", f"{plane} ends"]
    # Where there is one turn, there is one.
    told.clear()
    measure(Plan(1, 2.0, {"request": peers}))
    capsys.readouterr()
    assert told == [*begins, plane, other, f"{other} ends", f"{plane} ends"]


def test_every_figure_is_measured_by_a_work_that_there_is() -> None:
    figures = [
        *(*FIGURES.values(), *SOCKS4.values()),
        *(*UDP.values(), *GROWTH.values()),
    ]
    assert {figure.work for figure in figures} == set(WORKS)


def test_a_name_with_a_size_is_a_growing_figures() -> None:
    assert figure_named("memory@8000") is GROWTH["memory"]
    assert figure_named("memory") is FIGURES["memory"]
    assert figure_named("socks4-bulk") is SOCKS4["socks4-bulk"]
    assert figure_named("udp-5000") is UDP["udp-5000"]
    assert figure_named("udp-turns-5000") is UDP["udp-turns-5000"]


# What is printed and written


def test_a_table_is_markdown() -> None:
    assert table(["", "a"], [["x", "1"]]) == "|  | a |\n| --- | --- |\n| x | 1 |"


def run_facts() -> Run:
    return Run("2026-01-31", 3, 2.0, 0.04, {
        "processor": "Abacus", "cores": "2", "kernel": "Linux 6.1", "system": "Debian",
    }, {"haproxy": "2.6.12"})  # fmt: skip


def full_results() -> Results:
    """Every figure for two relays, in three rounds."""
    results = Results()
    for number in (1.0, 2.0, 3.0):
        for peer, factor in (("relayd-plane", 1.0), ("haproxy-splice", 2.0)):
            results.add(peer, dict.fromkeys(FIGURES, number * factor))
            for figure in GROWTH.values():
                results.add(peer, {figure.at(size): number for size in SIZES})
        for peer, factor in (("relayd-socks4", 1.0), ("dante", 4.0)):
            results.add(peer, dict.fromkeys(SOCKS4, number * factor))
        results.add("relayd-plane", {"socks4-bulk": number * 2.0})
        for peer, factor in (("relayd-udp", 1.0), ("nginx-udp", 2.0)):
            results.add(peer, dict.fromkeys(UDP, number * factor))
    return results


def test_the_page_has_figures_ratios_growth_and_limits() -> None:
    text = markdown(run_facts(), full_results(), TITLES)
    assert "| bulk, 1 stream, CPU ms per GB | 2 (1-3) | 4 (2-6) |" in text
    assert "### Compared with HAProxy with splice" in text
    assert "| request and response | 0.50 |" in text
    assert "| relayd, plane | 2.0 (1.0-3.0) | 2.0 (1.0-3.0) |" in text
    assert "| bulk, 1 stream: to HAProxy, splice | 0.500 | at most 0.9 | ok |" in text
    assert "in 3 rounds" in text
    assert "haproxy 2.6.12" in text


def test_the_page_has_the_proxies_in_a_section_of_their_own() -> None:
    text = markdown(run_facts(), full_results(), {**TITLES, **PROXIES})
    others, _, rest = text.partition("### SOCKS4")
    proxies, _, rest = rest.partition("### UDP")
    _, _, limits = rest.partition("### Limits")
    assert "Dante" not in others
    assert "|  | relayd, plane | relayd, SOCKS4 | Dante |" in proxies
    assert "| SOCKS4, short session, CPU µs | - | 2 (1-3) | 8 (4-12) |" in proxies
    assert "| SOCKS4, bulk | 0.25 | - | 0.50 |" in proxies
    assert "| SOCKS4, short session: to Dante | 0.250 | at most 0.55 | ok |" in limits


def test_the_page_has_datagrams_in_a_section_of_their_own() -> None:
    text = markdown(run_facts(), full_results(), {**TITLES, **PROXIES, **DATAGRAMS})
    others, _, rest = text.partition("### UDP")
    datagrams, _, limits = rest.partition("### Limits")
    assert "nginx stream, UDP" not in others
    assert "|  | relayd, UDP | nginx stream, UDP |" in datagrams
    assert "| UDP, 1 flow of 32, CPU µs | 2.00 (1.00-3.00) | 4.00 " in datagrams
    assert "|  | to nginx stream | to a relay in Twisted |" in datagrams
    assert "| UDP, 500 flows of 1 | 0.50 | - |" in datagrams
    assert "| UDP, 50 bursts of 4, 5,000 flows in turn | 0.50 | - |" in datagrams
    assert "| UDP, delivered: to nginx stream | 0.500 | at least 1 | MISSED |" in limits
    assert "| UDP: 5,000 flows to 50 | 1.000 | at most 1.3 | ok |" in limits


def test_the_pages_tables_are_rectangular() -> None:
    text = markdown(run_facts(), full_results(), {**TITLES, **PROXIES, **DATAGRAMS})
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {line.count("|") for line in block.splitlines()}
        assert len(widths) == 1, block


def test_the_page_names_no_folder_and_no_host() -> None:
    text = markdown(run_facts(), full_results(), TITLES)
    assert "/work" not in text
    assert socket.gethostname() not in text.split()


def test_the_json_has_every_round() -> None:
    told = json.loads(json_text(run_facts(), full_results()))
    assert told["figures"]["request"]["haproxy-splice"] == [2.0, 4.0, 6.0]
    assert told["machine"]["cores"] == "2"


def test_a_figures_lines_compare_the_relays() -> None:
    _, title, ours, theirs = lines_of(["request"], full_results(), TITLES)
    assert title == "request and response (CPU µs)"
    assert " ".join(ours.split()) == (
        "relayd, plane 2.0 (1.0-3.0) 0.50 of HAProxy with splice"
    )
    assert " ".join(theirs.split()) == "HAProxy, splice 4.0 (2.0-6.0)"


def test_a_proxys_lines_compare_it_with_proxies() -> None:
    names = ["socks4-bulk"]
    _, title, plane, ours, dante = lines_of(names, full_results(), PROXIES)
    assert title == "SOCKS4, bulk (CPU ms per GB)"
    assert plane.split()[2:] == ["4", "(2-6)", "0.50", "of", "Dante"]
    assert " ".join(ours.split()) == (
        "relayd, SOCKS4 2 (1-3) 0.25 of Dante 0.50 of relayd's TCP relay"
    )
    assert " ".join(dante.split()) == "Dante 8 (4-12) 2.00 of relayd's TCP relay"


def test_a_datagram_relays_lines_compare_it_with_its_like() -> None:
    _, title, ours, nginx = lines_of(["udp-1"], full_results(), DATAGRAMS)
    assert title == "UDP, 1 flow of 32 (CPU µs)"
    assert ours.split()[2:] == ["2.00", "(1.00-3.00)", "0.50", "of", "nginx", "stream"]
    assert nginx.split()[3:] == ["4.00", "(2.00-6.00)"]
    few = lines_of(["udp-turns-50"], full_results(), DATAGRAMS)[1]
    assert few == "UDP, 50 bursts of 4, 50 flows in turn (CPU µs)"


def test_a_growing_figures_lines_have_a_column_for_each_size() -> None:
    names = [GROWTH["turn"].at(size) for size in SIZES]
    _, title, sizes, ours, _ = lines_of(names, full_results(), TITLES)
    assert title == "request, connections in turn (CPU µs), by connections"
    assert sizes.split() == ["10", "100", "1,000", "8,000"]
    assert ours.split()[2:] == ["2.0", "(1.0-3.0)"] * len(SIZES)


def test_one_round_has_no_range() -> None:
    results = results_of(memory={"relayd-plane": [2.1]})
    [*_, line] = lines_of(["memory"], results, TITLES)
    assert line.split() == ["relayd,", "plane", "2.10"]


# What the loads report

IPERF3 = {
    "start": {"version": "iperf 3.12"},
    "intervals": [],
    "end": {
        "sum_sent": {"seconds": 1.000262, "bytes": 2816737280},
        "sum_received": {"seconds": 1.003305, "bytes": 2815426560},
    },
}

IPERF3_REFUSED = """{
	"start":	{ "connected":	[], "version":	"iperf 3.12" },
	"intervals":	[],
	"end":	{ },
	"error":	"unable to connect to server: Connection refused"
}"""

WRK = """\
Running 60m test @ http://127.0.0.1:21000/
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   211.74us  175.54us   5.09ms   96.09%
    Req/Sec   107.53k    17.28k  140.19k    81.82%
  235337 requests in 2.20s, 40.40MB read
Requests/sec: 106916.84
Transfer/sec:     18.35MB
"""

H2LOAD = """\
starting benchmark...
finished in 1.00s, 3999.45 req/s, 703.03KB/s
requests: {total} total, {total} started, {total} done, {good} succeeded, {bad} failed,\
 {bad} errored, 0 timeout
status codes: {good} 2xx, 0 3xx, 0 4xx, 0 5xx
"""


def test_iperf3s_bytes_are_those_received() -> None:
    moved = read_iperf3(json.dumps(IPERF3))
    assert moved.bytes == 2815426560
    assert round(moved.gigabits, 2) == 22.45


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (IPERF3_REFUSED, "iperf3 reports an error: unable to connect to server"),
        ("iperf3: not found", "iperf3's output is not JSON: 'iperf3: not found'"),
        (
            '{"end": {"sum_received": {"seconds": 1, "bytes": 0}}}',
            "iperf3 moved nothing",
        ),
    ],
)
def test_iperf3s_errors_are_errors(text: str, message: str) -> None:
    with pytest.raises(CannotMeasure, match=re.escape(message)):
        read_iperf3(text)


def test_wrks_requests_are_read() -> None:
    assert read_wrk(WRK) == 235337


@pytest.mark.parametrize(
    "line",
    [
        "Socket errors: connect 0, read 10600, write 0, timeout 0",
        "Non-2xx or 3xx responses: 7",
    ],
)
def test_wrks_errors_are_errors(line: str) -> None:
    with pytest.raises(CannotMeasure) as caught:
        read_wrk(f"{WRK}  {line}\n")
    assert str(caught.value) == f"wrk reports an error: {line}"


@pytest.mark.parametrize("text", ["", "  0 requests in 2.20s, 0.00B read\n"])
def test_no_response_to_wrk_is_an_error(text: str) -> None:
    with pytest.raises(CannotMeasure, match="wrk got no response"):
        read_wrk(text)


def h2load_log(seconds: float, rate: int) -> str:
    """Requests at that rate, each of which takes as many microseconds as its number."""
    step = 1_000_000 // rate
    return "".join(
        f"{1795220871920927 + number * step}\t200\t{number}\n"
        for number in range(int(seconds * rate))
    )


def test_h2loads_requests_count_from_half_a_second_on() -> None:
    output = H2LOAD.format(total=RATE, good=RATE, bad=0)
    took = read_h2load(output, h2load_log(1.0, RATE))
    assert took == [float(number) for number in range(RATE // 2, RATE)]


def test_h2loads_failures_are_errors() -> None:
    output = H2LOAD.format(total=RATE, good=RATE - 1, bad=1)
    with pytest.raises(CannotMeasure, match="h2load reports an error: requests: 4000"):
        read_h2load(output, h2load_log(1.0, RATE))


def test_a_rate_that_is_not_kept_is_an_error() -> None:
    output = H2LOAD.format(total=RATE, good=RATE, bad=0)
    with pytest.raises(CannotMeasure, match="the rate was 300. requests a second, not"):
        read_h2load(output, h2load_log(1.0, 3000))


def test_h2load_without_a_report_is_an_error() -> None:
    with pytest.raises(CannotMeasure, match="h2load reports an error: it crashed"):
        read_h2load("it crashed", "")


# The loads of our own


@contextmanager
def answering(answer: bytes, endings: list[bool], count: int) -> Iterator[int]:
    """A server that answers `count` connections, and the port it is on.

    It closes those that ask for that, and notes whether the client, of each of the
    others, ended first.
    """

    def serve(server: Server) -> None:
        for _ in range(count):
            with server.accept() as connection:
                asked = connection.recv(65536)
                connection.sendall(answer)
                if b"Connection: close" in asked:
                    connection.shutdown(socket.SHUT_WR)
                    endings.append(False)
                # Nothing is read twice: the client has nothing more to say.
                assert read_all(connection) == b""
                if b"Connection: close" not in asked:
                    endings.append(True)

    with Server() as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        yield server.socket.getsockname()[1]
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_short_connections_that_the_client_closes() -> None:
    """The server would keep them: that they end at all is the client's doing."""
    endings: list[bool] = []
    with answering(b"HTTP/1.1 200 OK\r\n\r\n" + BODY, endings, 50) as port:
        short_connections(port, 50, "client")
    assert endings == [True] * 50


def test_short_connections_that_the_server_closes() -> None:
    endings: list[bool] = []
    with answering(b"HTTP/1.1 200 OK\r\n\r\n" + BODY, endings, 50) as port:
        short_connections(port, 50, "server")
    assert endings == [False] * 50


GRANT = b"\0\x5a\x4e\x21\x7f\0\0\x01"


@contextmanager
def proxying(
    replies: list[bytes], count: int, told: list[bytes], clients: list[tuple[str, int]]
) -> Iterator[int]:
    """A SOCKS4 proxy that answers `count` requests itself, and the port it is on.

    :param replies: its reply, in the pieces that it sends.
    :param told: gets what clients send up to the reply's end, and then the rest.
    :param clients: gets where they connect from.
    """

    def serve(server: Server) -> None:
        for _ in range(count):
            with server.accept() as connection:
                clients.append(connection.getpeername())
                asked = connection.recv(65536)
                for piece in replies:
                    # Who does not wait for the whole of it has spoken by now.
                    time.sleep(0.02)
                    connection.setblocking(False)
                    with suppress(BlockingIOError):
                        asked += connection.recv(65536)
                    connection.settimeout(PATIENCE)
                    connection.sendall(piece)
                told.append(asked)
                told.append(connection.recv(65536))
                if told[-1]:
                    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + BODY)
                    assert read_all(connection) == b""

    with Server() as server:
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        yield server.socket.getsockname()[1]
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_a_socks4_request_is_that_of_the_protocol() -> None:
    """Version, CONNECT, port, address, and the end of an empty user id."""
    assert socks4_request(0x4E21) == b"\x04\x01\x4e\x21\x7f\0\0\x01\0"


def test_a_short_session_awaits_the_proxys_reply() -> None:
    told: list[bytes] = []
    with proxying([GRANT[:3], GRANT[3:]], 2, told, []) as port:
        short_connections(port, 2, "client", socks4_to=20001)
    asked, request = told[::2], told[1::2]
    assert asked == [socks4_request(20001)] * 2
    assert all(text.startswith(b"GET / HTTP/1.1\r\n") for text in request)


def test_a_proxys_clients_leave_the_kernels_ports_alone() -> None:
    clients: list[tuple[str, int]] = []
    with proxying([GRANT], 20, [], clients) as port:
        short_connections(port, 20, "client", socks4_to=20001)
    given_away = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    assert len(set(clients)) == 20
    assert all(port < int(given_away[0]) for _, port in clients)


def test_a_source_that_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clients: list[tuple[str, int]] = []
    with socket.socket() as taken, socket.socket() as free:
        for one in (taken, free):
            one.bind(("127.2.0.1", 0))
        sources = [taken.getsockname(), free.getsockname()]
        free.close()
        monkeypatch.setattr("bench.loads._sources", iter(sources))
        with proxying([GRANT], 1, [], clients) as port:
            short_connections(port, 1, "client", socks4_to=20001)
    assert clients == sources[1:]


def test_a_short_session_that_is_refused_is_an_error() -> None:
    with proxying([b"\0\x5b" + GRANT[2:]], 1, [], []) as port:
        with pytest.raises(
            CannotMeasure, match=r"the proxy's reply does not grant: .*\["
        ):
            short_connections(port, 1, "client", socks4_to=20001)


def test_bulk_goes_through_a_proxy_by_proxychains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []

    class Ran:
        def output(self, *_: float, **__: bool) -> str:
            return json.dumps(IPERF3)

    @contextmanager
    def run(_: str, argv: list[str], folder: Path, **__: bool) -> Iterator[Ran]:
        ran.extend(argv)
        ran.append((folder / "proxychains.conf").read_text())
        yield Ran()

    monkeypatch.setattr("bench.loads.program", lambda name: name)
    monkeypatch.setattr("bench.loads.child", run)
    assert bulk(20000, 1, 1.0, socks4_to=20001).bytes == 2815426560
    words = " ".join(ran)
    assert "proxychains4 -q -f proxychains.conf iperf3 -c 127.0.0.1 -p 20001 " in words
    assert "socks4 127.0.0.1 20000\n" in words


def test_a_short_connection_without_its_response_is_an_error() -> None:
    with answering(b"HTTP/1.1 500 No\r\n\r\n", [], 1) as port:
        with pytest.raises(CannotMeasure, match="ended without its response"):
            short_connections(port, 1, "server")


def test_a_refused_short_connection_is_an_error() -> None:
    with Server() as server:
        port = server.socket.getsockname()[1]
    with pytest.raises(CannotMeasure, match="a short connection failed"):
        short_connections(port, 1, "client")


def test_kept_connections_take_turns() -> None:
    """Each of three makes its opening request and two of the six that follow."""
    requests: dict[int, int] = {}

    def serve(connection: socket.socket, number: int) -> None:
        with connection, suppress(ConnectionResetError):
            while connection.recv(65536):
                requests[number] = requests.get(number, 0) + 1
                connection.sendall(BODY)

    with Server() as server:
        pairs = IdlePairs(server.socket.getsockname()[1])

        def accept() -> None:
            for number in range(3):
                threading.Thread(target=serve, args=(server.accept(), number)).start()

        accepting = threading.Thread(target=accept)
        accepting.start()
        pairs.grow(3)
        accepting.join(PATIENCE)
        pairs.take_turns(6)
        pairs.close()
    assert requests == {0: 3, 1: 3, 2: 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the datagrams' counts are unreadable: ''"),
        ("7 seven 1.0\n", "the datagrams' counts are unreadable: '7 seven 1.0"),
        ("32 0 0.5\n", "no datagram came back"),
    ],
)
def test_unreadable_counts_of_datagrams_are_errors(text: str, message: str) -> None:
    with pytest.raises(CannotMeasure, match=re.escape(message)):
        read_moved(text)


def test_counts_of_datagrams_are_read() -> None:
    assert read_moved("1000 999 0.400012\n") == Moved(1000, 999)


@contextmanager
def instead_of_datagrams(
    script: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """A shell script instead of the compiled program."""
    program = folder / "datagrams"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setattr("bench.datagrams.built", lambda: str(program))
        yield


def test_round_trips_begin_when_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read before them counts nothing of them."""
    script = f'echo ready; cat; touch "{tmp_path}/loaded"; echo 320 $4 1.0'
    with instead_of_datagrams(script, tmp_path, monkeypatch):
        with round_trips(20000, 1, 320, 1.0) as load:
            time.sleep(0.1)
            assert not (tmp_path / "loaded").exists()
            assert load() == 320
            assert (tmp_path / "loaded").exists()


def test_flows_in_turn_have_fewer_under_way_than_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of these may be lost."""
    for lost in (20, 21):
        script = 'echo ready; cat >&2; [ "$1 $3 $4 $5" = "turns 5000 50 4" ] || exit 1'
        script += f"; echo 9000 {9000 - lost} 1.0"
        with instead_of_datagrams(script, tmp_path, monkeypatch):
            with bursts_in_turn(20000, 5000, 1.0) as load:
                if lost == 20:
                    assert load() == 8980
                    continue
                with pytest.raises(CannotMeasure, match="21 datagrams .* of 200 under"):
                    load()


def test_many_lost_round_trips_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a tenth of what is under way, it is another load."""
    for lost, fails in ((10, False), (11, True)):
        script = f"echo ready; cat; echo 1000 {1000 - lost} 1.0"
        with instead_of_datagrams(script, tmp_path, monkeypatch):
            with round_trips(20000, 50, 2, 1.0) as load:
                if not fails:
                    assert load() == 990
                    continue
                with pytest.raises(
                    CannotMeasure, match="11 datagrams were lost of 100 under way"
                ):
                    load()


def test_a_flow_that_is_not_answered_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "echo 3 of 5 flows were answered >&2; exit 1"
    with instead_of_datagrams(script, tmp_path, monkeypatch):
        with pytest.raises(CannotMeasure, match="status 1: 3 of 5 flows were answered"):
            with round_trips(20000, 5, 1, 1.0):
                pass


def test_what_is_delivered_is_a_share_of_what_was_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with instead_of_datagrams("echo 10000 9990 1.0", tmp_path, monkeypatch):
        assert delivered(20000, 1.0) == pytest.approx(99.9)


def test_datagrams_that_were_not_sent_in_time_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with instead_of_datagrams("echo 9000 9000 1.0", tmp_path, monkeypatch):
        with pytest.raises(
            CannotMeasure, match="the rate was 9000 datagrams a second, not 10000"
        ):
            delivered(20000, 1.0)


# What is started


def test_a_port_of_udp_is_bound_when_somebody_takes_datagrams_there() -> None:
    """A connected one has a port, too, and takes them from one peer only."""
    with (
        socket.socket(type=socket.SOCK_DGRAM) as bound,
        socket.socket(type=socket.SOCK_DGRAM) as connected,
    ):
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        connected.connect(("127.0.0.1", port))
        found = children.bound_udp()
        assert port in found
        assert connected.getsockname()[1] not in found
    assert port not in children.bound_udp()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_port_that_is_taken_is_not_free(
    kind: socket.SocketKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Below those that the kernel hands out, where nobody's connection takes them.
    ports = [children.free_port() for _ in range(2)]
    with socket.socket(type=kind) as taken:
        taken.bind(("127.0.0.1", ports[0]))
        monkeypatch.setattr("bench.children._ports", iter(ports))
        assert children.free_port() == ports[1]


@pytest.mark.parametrize("transport", ["plane", "twisted"])
@pytest.mark.parametrize("logs", [True, False])
def test_relayds_own_command_line(transport: str, logs: bool, tmp_path: Path) -> None:
    command = PEERS[f"relayd-{transport}"].command(Setup(tmp_path, 20000, 20001, logs))
    words = " ".join(command)
    assert f"--transport {transport}" in words
    assert ("--quiet" in command) is not logs
    assert words.endswith("--listen 127.0.0.1:20000 --dest 127.0.0.1:20001")


def test_portforward_logs_if_asked_to(tmp_path: Path) -> None:
    command = PEERS["portforward"].command
    assert "--log" in command(Setup(tmp_path, 1, 2, logs=True))
    assert "--log" not in command(Setup(tmp_path, 1, 2, logs=False))


def test_relayds_own_proxys_command_line(tmp_path: Path) -> None:
    command = PEERS["relayd-socks4"].command(Setup(tmp_path, 20000, 20001, logs=False))
    words = " ".join(command)
    assert " --reactor=epoll socks4 --transport plane --quiet" in words
    assert words.endswith("--listen 127.0.0.1:20000")
    assert "20001" not in words


@pytest.mark.parametrize(
    ("name", "transport"),
    [("relayd-udp", "plane"), ("relayd-udp-twisted", "twisted")],
)
def test_relayds_own_command_line_for_datagrams(
    name: str, transport: str, tmp_path: Path
) -> None:
    words = " ".join(PEERS[name].command(Setup(tmp_path, 20000, 20001, logs=False)))
    assert f"relayd --transport {transport} --quiet" in words
    assert words.endswith("--listen udp:127.0.0.1:20000 --dest udp:127.0.0.1:20001")


def test_nginx_relays_streams_or_datagrams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.peers.program", lambda name: name)
    monkeypatch.setattr("bench.peers.STREAM_MODULE", tmp_path)
    for name, listen in (
        ("nginx", "backlog=4096"),
        ("nginx-udp", "udp rcvbuf=4194304"),
    ):
        PEERS[name].command(Setup(tmp_path, 20000, 20001, logs=False))
        config = (tmp_path / "nginx.conf").read_text()
        assert f"  listen 127.0.0.1:20000 {listen};\n" in config
        assert "  access_log off;\n" in config


def test_dante_listens_where_it_should_and_never_connects_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.peers.program", lambda name: name)
    said = set()
    for port in (20223, 20224):
        PEERS["dante"].command(Setup(tmp_path, port, 1, logs=False))
        config = (tmp_path / "danted.conf").read_text()
        assert f"internal: 127.0.0.1 port = {port}\n" in config
        [external] = re.findall(
            r"^external: 127\.1\.(\d+)\.(\d+)$", config, re.MULTILINE
        )
        assert max(map(int, external)) < 256
        said.add(external)
    assert len(said) == 2


def test_twistd_socks_logs_to_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it names is a log's observer, and one that writes nothing."""
    command = PEERS["twistd-socks"].command(Setup(tmp_path, 20000, 20001, logs=False))
    observer = namedAny(command[command.index("--logger") + 1])()
    assert ILogObserver.providedBy(observer)
    observer({"log_format": "a session", "log_level": LogLevel.info, "log_time": 0.0})
    assert capsys.readouterr() == ("", "")


def test_the_cpu_of_children_that_live_on_is_counted() -> None:
    """Dante's processes: the parent of one that is busy has used next to nothing."""
    busy = "while time.process_time() < 0.3: pass"
    program = f"""\
import os, sys, time
if not os.fork():
    {busy}
    print(flush=True)
    time.sleep({PATIENCE})
time.sleep({PATIENCE})
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline() == b"\n"
            alone = children.cpu(parent.pid)
            assert children.cpu(parent.pid, forks=True) >= alone + 0.3
        finally:
            os.killpg(parent.pid, signal.SIGKILL)


def test_a_plan_leaves_out_what_a_relay_cannot_do() -> None:
    works = Plan.of(MODES["full"]).works
    assert "socat" in works["bulk-8"]
    assert "socat" not in works["memory"]
    assert "haproxy" not in works["growth-open"]


def test_each_kind_of_relay_is_measured_apart() -> None:
    works = Plan.of(MODES["full"]).works
    kinds = {
        kind: {name for name, peer in PEERS.items() if peer.kind == kind}
        for kind in ("stream", "socks4", "udp")
    }
    proxies = kinds["socks4"]
    assert set(works["socks4-short"]) == proxies
    assert set(works["socks4-bulk"]) == {*proxies, "relayd-plane"}
    for work, peers in works.items():
        if work.startswith("udp-"):
            assert set(peers) == kinds["udp"]
        elif not work.startswith("socks4-"):
            assert set(peers) <= kinds["stream"]


def test_a_plan_may_be_narrowed() -> None:
    plan = Plan.of(MODES["full"], ["memory"], ["nginx", "socat"], rounds=1, seconds=1.0)
    assert plan == Plan(1, 1.0, {"memory": ["nginx"]}, turns=2)
    assert plan.titles == {"nginx": "nginx stream"}


# Errors in one line


def test_a_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(CannotMeasure) as caught:
        children.program("h2load")
    assert str(caught.value) == (
        "h2load is not installed: it is in Debian's package nghttp2-client;"
        " `make system-deps` installs it"
    )


def test_too_few_open_files_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 9000))
    with pytest.raises(CannotMeasure, match="needs 18000 open files .* limit is 9000"):
        children.allow_descriptors(2 * MANY + 2000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--work", "bulk"], "argument --work: 'bulk' is no work; there are bulk-1, "),
        (["--only", "nginx,"], "argument --only: '' is no relay; there are relayd-"),
        (["--rounds", "0"], "argument --rounds: '0' is not a number from 1 to 100"),
        (["--seconds", "x"], "argument --seconds: 'x' is not a number from 0.5 to 60"),
        (["--seconds", "nan"], "'nan' is not a number from 0.5 to 60"),
        (["check", "--only", "nginx"], "check takes neither --only nor --work"),
        (["quick", "--output", "x"], "quick writes no files: --output is for full"),
        (["slow"], "argument mode: invalid choice: 'slow'"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        __main__.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_nothing_to_measure_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["quick", "--work", "memory", "--only", "socat"]) == 1
    told = capsys.readouterr().err
    assert told == ("bench: none of these relays is measured at any of these works\n")
