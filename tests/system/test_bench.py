"""The benchmark and the soak, on a small scale: they run, and say what they should."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.places import no_namespaces
from tests.system.programs import lacking, program

pytestmark = pytest.mark.system

ROOT = Path(__file__).parent.parent.parent


def run(*arguments: str, timeout: float = 300, **environment: str) -> str:
    """Run one of the two tools, with more variables; its standard output."""
    with subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            said, problems = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            # Not killed: it is to stop what it has started.
            process.send_signal(signal.SIGINT)
            said, problems = process.communicate(timeout=60)
            raise AssertionError(f"{timeout:g} s: {said}{problems}") from None
        finally:
            process.kill()
    assert process.returncode == 0, said + problems
    return said


def test_the_benchmark_measures_each_kind_of_relay() -> None:
    for name in ("haproxy", "iperf3", "nginx", "socat", "wrk"):
        program(name)
    said = run("bench", "quick", "--workload", "bulk-1,requests", "--seconds", "0.5")
    for title in ("relayd, plane", "HAProxy, splice", "portforward"):
        assert len(re.findall(rf"^  {title} +\d", said, re.MULTILINE)) >= 2, said


def test_the_benchmark_measures_relayd_under_another_python() -> None:
    """Here it is the same one, in an environment of its own."""
    for name in ("haproxy", "nginx"):
        program(name)
    relays = "relayd-plane,relayd-other-python,haproxy-smart"
    said = run(
        *("bench", "full", "--workload", "short-server,short-server-quiet"),
        *("--only", relays, "--rounds", "1", "--seconds", "0.5"),
        BENCH_OTHER_PYTHON=sys.executable,
    )
    for title in ("relayd, plane", "relayd, other Python", "HAProxy, splice, smart"):
        assert len(re.findall(rf"^  {title} +\d", said, re.MULTILINE)) == 2, said


def test_the_benchmark_measures_each_kind_of_proxy() -> None:
    for name in ("danted", "iperf3", "nginx", "proxychains4"):
        program(name)
    workloads = "socks4-short,socks4-short-quiet,socks4-bulk"
    said = run("bench", "quick", "--workload", workloads, "--seconds", "0.5")
    for title in ("relayd, SOCKS4", "Dante", "twistd socks"):
        assert len(re.findall(rf"^  {title} +\d", said, re.MULTILINE)) == 3, said


def test_the_benchmark_measures_each_kind_of_relay_for_datagrams() -> None:
    for name in ("gcc", "nginx"):
        program(name)
    workloads = "udp-50,udp-5000,udp-delivered"
    said = run(
        "bench", "full", "--workload", workloads, "--rounds", "1", "--seconds", "0.5"
    )
    titles = (
        "relayd, UDP",
        "relayd, UDP, twisted",
        "nginx stream, UDP",
        "Twisted, UDP",
    )
    for title in titles:
        assert len(re.findall(rf"^  {title} +\d", said, re.MULTILINE)) == 3, said


def test_the_benchmark_measures_routes_and_server_names() -> None:
    for name in ("nginx", "openssl"):
        program(name)
    said = run(
        *("bench", "full", "--workload", "route-peek,sni"),
        *("--rounds", "1", "--seconds", "0.5"),
    )
    for title, count in (
        ("relayd, plane", 2),
        ("relayd, a route that peeks", 1),
        ("relayd, by server name", 1),
    ):
        found = re.findall(rf"^  {title} +\d", said, re.MULTILINE)
        assert len(found) == count, said


def test_the_benchmark_measures_transparent_relaying_between_namespaces() -> None:
    """They and all that was in them are gone afterwards."""
    for name in ("gcc", "ip", "nft", "nginx"):
        program(name)
    if why := no_namespaces():
        lacking(why)
    said = run(
        *("bench", "full", "--workload", "transparent,transparent-udp"),
        *("--rounds", "1", "--seconds", "0.5"),
    )
    for title, count in (
        ("relayd, plane", 1),
        ("relayd, transparent", 1),
        ("relayd, UDP", 2),
        ("relayd, UDP, transparent", 2),
    ):
        found = re.findall(rf"^  {title} +\d", said, re.MULTILINE)
        assert len(found) == count, said
    assert not any(Path("/run/netns").glob("relayd-bench-*"))


def test_the_benchmark_measures_a_scrape_and_what_it_delays() -> None:
    for name in ("curl", "nginx"):
        program(name)
    said = run("bench", "full", "--workload", "scrape-100", "--rounds", "1")
    for title in ("scrape, 100 relays", "longest request", "longest short session"):
        assert re.search(rf"{title} \(ms\)\n  relayd, plane +\d", said), said


@pytest.mark.parametrize("transport", ["plane", "twisted"])
def test_a_short_soak_ends_as_it_began(transport: str) -> None:
    said = run(
        *("soak", "--minutes", "0.1", "--connections", "100", "--flows", "20"),
        # Longer than most of what the relay waits for.
        *("--stop", "4", "--transport", transport, "--seed", "1"),
    )
    for done in ("stopped", "its wall clock set", "more in"):
        assert re.search(rf"\b{done} [1-9]", said), said
