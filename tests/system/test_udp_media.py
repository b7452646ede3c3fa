"""Datagrams that are not questions: streams, calls, clocks, and QUIC connections.

Each program counts what arrived, or proves it; the relay's log says what it has
passed on, and both must be the same.
"""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.ports import free_port
from tests.support.process import RelayProcess
from tests.system.datagrams import carried, flows_of, relayed, serving
from tests.system.programs import LIMIT, module, program, run

pytestmark = pytest.mark.system

# -- iperf3


@contextmanager
def iperf3_server() -> Iterator[int]:
    """iperf3 on a free port of 127.0.0.1, which it hands out, for one client."""
    port = free_port()
    with serving(
        *(program("iperf3"), "--server", "--one-off", "--forceflush"),
        *("--bind", "127.0.0.1", "--port", str(port)),
        saying="Server listening on",
    ):
        yield port


def iperf3(running: RelayProcess, *args: str) -> dict[str, Any]:
    """Send datagrams for two seconds, at 20 Mbit/s; the report's summary."""
    said = run(
        *(program("iperf3"), "--client", "127.0.0.1"),
        *("--port", str(running.port), "--udp", "--bitrate", "20M"),
        # Of both ends: who does not run for a while loses nothing.
        *("--window", "4M"),
        *("--time", "2", "--json", *args),
    )
    summary: dict[str, Any] = json.loads(said)["end"]
    return summary


# 8,192 is where Twisted's own UDP ends.
@pytest.mark.parametrize("size", [1200, 30_000])
def test_iperf3_up(size: int) -> None:
    """What the client sends, the server has; no more and no less went through."""
    with iperf3_server() as port, relayed(port, streams=True) as running:
        summary = iperf3(running, "--length", str(size))["sum"]
        assert summary["lost_packets"] == 0
        assert summary["packets"] > 100
        # Its control connection, and one to learn the datagrams' port by.
        running.ended("done")
        [flow] = flows_of(running, port)
        # A datagram of four bytes asks, another answers, before the stream.
        sent = summary["packets"]
        assert flow.up == (sent + 1, sent * size + 4)
        assert flow.down == (1, 4)


@pytest.mark.parametrize("size", [1200, 65_507])
def test_iperf3_down(size: int) -> None:
    """The same from the server to the client, up to the largest datagram there is."""
    with iperf3_server() as port, relayed(port, streams=True) as running:
        summary = iperf3(running, "--length", str(size), "--reverse")["sum"]
        assert summary["lost_packets"] == 0
        assert summary["packets"] > 50
        running.ended("done")
        [flow] = flows_of(running, port)
        assert flow.up == (1, 4)
        # The server goes on until it hears that the client has stopped counting.
        replies, replied = flow.down
        assert replies > summary["packets"]
        assert replied == (replies - 1) * size + 4


# -- NTP

#: Neither program asks for more than the time: no socket, port or file of the system's.
QUIET_CHRONY = ("user root", "cmdport 0", "bindcmdaddress /")


@contextmanager
def chronyd(folder: Path) -> Iterator[int]:
    """chronyd on a free port of 127.0.0.1; it gives this machine's time as it is."""
    port = free_port()
    config = folder / "chrony.conf"
    lines = [
        *QUIET_CHRONY,
        f"pidfile {folder / 'server.pid'}",
        "local stratum 5",
        f"port {port}",
        "bindaddress 127.0.0.1",
        "allow 127.0.0.0/8",
    ]
    config.write_text("".join(f"{line}\n" for line in lines))
    with serving(
        # -x: it never sets the clock, and -U: so it need not be root.
        *(program("chronyd"), "-4", "-x", "-U", "-d", "-f", config),
        port=port,
    ):
        yield port


def test_ntp(tmp_path: Path) -> None:
    """chronyd asks another a few times, and finds that both have the same time."""
    with chronyd(tmp_path) as port, relayed(port) as running:
        config = tmp_path / "client.conf"
        lines = [
            *QUIET_CHRONY,
            f"pidfile {tmp_path / 'client.pid'}",
            # Its questions follow each other at once, not after two seconds.
            f"server 127.0.0.1 port {running.port} iburst minpoll -4 maxpoll -4",
        ]
        config.write_text("".join(f"{line}\n" for line in lines))
        # -Q: say how wrong the clock is, and leave it alone.
        done = subprocess.run(
            [program("chronyd"), "-4", "-Q", "-x", "-U", "-t", "10", "-f", config],
            stderr=subprocess.STDOUT,
            stdout=subprocess.PIPE,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        [wrong] = re.findall(
            r"System clock wrong by (-?[\d.]+) seconds \(ignored\)", done.stdout
        )
        # It is the same clock.  What a busy machine takes to pass on is in there.
        assert abs(float(wrong)) < 0.05
        flows = flows_of(running, port)
        asked, answered = carried(flows)
        assert asked == answered >= 2
        # A packet without extensions.
        assert sum(each.up[1] for each in flows) == 48 * asked
        assert sum(each.down[1] for each in flows) == 48 * asked


# -- SIP

#: From one socket, or from one each: flows that end in one second, and were not in use,
#: have a hundred lines at most.
CALLS = {"one": 300, "one each": 90}

#: Its own idea is more than what most machines let it open.
MAX_SOCKETS = ("-max_socket", "900")


@contextmanager
def sipp_server() -> Iterator[int]:
    """sipp on a free port of 127.0.0.1, which it hands out: it takes every call."""
    port = free_port()
    with serving(
        *(program("sipp"), "-sn", "uas", "-i", "127.0.0.1", "-p", str(port)),
        *("-nostdin", *MAX_SOCKETS),
        port=port,
    ):
        yield port


@pytest.mark.parametrize("sockets", ["one", "one each"])
def test_sip_calls(sockets: str, tmp_path: Path) -> None:
    """Calls are made, answered and ended, and no message is sent twice.

    From one socket they are one flow; from a socket each, about as many.
    """
    calls = CALLS[sockets]
    report = tmp_path / "calls.csv"
    with sipp_server() as port, relayed(port) as running:
        run(
            *(program("sipp"), "-sn", "uac", f"127.0.0.1:{running.port}"),
            *("-i", "127.0.0.1", "-p", str(free_port())),
            *("-t", "u1" if sockets == "one" else "un", *MAX_SOCKETS),
            # 200 new calls a second, each of which lasts 200 ms.
            *("-m", str(calls), "-r", "200", "-d", "200", "-l", str(calls)),
            *("-nostdin", "-timeout", "30", "-timeout_error"),
            *("-trace_stat", "-stf", report),
            cwd=tmp_path,
        )
        with report.open(newline="") as file:
            counts = list(csv.DictReader(file, delimiter=";"))[-1]
        assert counts["SuccessfulCall(C)"] == str(calls)
        assert counts["FailedCall(C)"] == "0"
        assert counts["Retransmissions(C)"] == "0"
        flows = flows_of(running, port)
        # INVITE, ACK and BYE; 180, and 200 twice.
        assert carried(flows) == (3 * calls, 3 * calls)
        if sockets == "one":
            assert len(flows) == 1
        else:
            # A port that one call has done with may be given to another.
            assert calls * 0.9 < len(flows) <= calls
            assert all(each.up[0] % 3 == each.down[0] % 3 == 0 for each in flows)


# -- QUIC

#: Bytes that go either way.
HALF = 25_000_000


def quic(*args: str | Path) -> tuple[str | Path, ...]:
    return (sys.executable, "-m", "tests.system.quic_peers", *args)


def test_quic_moves(tmp_path: Path) -> None:
    """50 MB over one connection, whose client gets another port, twice.

    For the relay each port is another client, and for the server another path of
    the connection.
    """
    module("aioquic")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    run(
        *(program("openssl"), "req", "-x509", "-newkey", "ec", "-nodes"),
        *("-pkeyopt", "ec_paramgen_curve:P-256", "-days", "2"),
        *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
        *("-keyout", key, "-out", certificate),
    )
    with serving(
        *quic("server", certificate, key, str(HALF)), saying="serving on"
    ) as server:
        port = int(server.wait_for(r"serving on (\d+)")[0][1])
        with relayed(port) as running:
            client = json.loads(
                run(*quic("client", str(running.port), certificate, str(HALF)))
            )
            told = json.loads(server.wait_for(r"^over (.*)")[0][1])
            flows = {each.client: each for each in flows_of(running, port)}
        assert client["size"] == told["size"] == HALF
        assert told["sha256"] == client["sent"]
        assert client["sha256"] == client["expected"]
        assert told["error"] == 0
        first, second, third = (flows[f"127.0.0.1:{each}"] for each in client["ports"])
        assert len(flows) == 3
        assert [f"127.0.0.1:{each}" for each in told["ports"]] == [
            first.port,
            second.port,
            third.port,
        ]
        # Each move was in the middle of a half; what is sent again adds to it.
        assert first.up[1] >= HALF // 2
        assert second.up[1] >= HALF // 3
        assert second.down[1] >= HALF // 2
        assert third.down[1] >= HALF // 3
