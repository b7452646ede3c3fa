"""Name servers behind the relay, asked by dig and by dnsperf.

dnsperf counts what it has asked, what was answered and what was lost; the relay's
log says how many datagrams each flow had.  No datagram may be in one and not in the
other.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import attrs
import pytest

from tests.support.ports import free_port
from tests.support.process import eventually
from tests.system.datagrams import (
    carried,
    flows_of,
    flows_so_far,
    relayed,
    serving,
)
from tests.system.programs import program, run

pytestmark = pytest.mark.system

#: The names that the servers know, and their addresses.
HOSTS = {
    f"host-{number:03}.test": f"10.53.{number // 100}.{number % 100}"
    for number in range(400)
}

#: A name with this many bytes of text: an answer that EDNS allows, in one datagram.
LARGE = "large.test"
TEXTS = [f"{number:02}".ljust(250, "x") for number in range(16)]
TEXT_BYTES = sum(map(len, TEXTS))

#: What the servers may send, and what dig says it takes, in bytes.
EDNS = 8192

#: How many sockets dnsperf asks from, and for how long, in seconds.
CLIENTS, SECONDS = 20, 2


@contextmanager
def dnsmasq(folder: Path) -> Iterator[int]:
    """dnsmasq on a free port of 127.0.0.1, which it hands out."""
    port = free_port()
    config = folder / "dnsmasq.conf"
    config.write_text(
        "\n".join(
            [
                f"port={port}",
                "listen-address=127.0.0.1",
                "bind-interfaces",
                # Nothing of this machine's, and nobody else to ask.
                *("no-resolv", "no-hosts", "no-poll", "local=/test/"),
                "user=root",
                "pid-file=",
                "log-facility=-",
                f"edns-packet-max={EDNS}",
                *(f"host-record={name},{at}" for name, at in HOSTS.items()),
                *(f'txt-record={LARGE},"{text}"' for text in TEXTS),
            ]
        )
        + "\n"
    )
    # With --no-daemon it would serve one connection at a time, and nothing else.
    with serving(
        *(program("dnsmasq"), "--keep-in-foreground", f"--conf-file={config}"),
        saying="started, version",
    ):
        yield port


@contextmanager
def unbound(folder: Path) -> Iterator[int]:
    """unbound on a free port of 127.0.0.1, which it hands out."""
    port = free_port()
    config = folder / "unbound.conf"
    settings = [
        f'directory: "{folder}"',
        # It stays who it is, and where.
        *('chroot: ""', 'username: ""', 'pidfile: ""', "use-syslog: no"),
        "interface: 127.0.0.1",
        f"port: {port}",
        f"max-udp-size: {EDNS}",
        'module-config: "iterator"',
        'local-zone: "test." static',
        *(f'local-data: "{name}. A {at}"' for name, at in HOSTS.items()),
        *(f"local-data: '{LARGE}. TXT \"{text}\"'" for text in TEXTS),
    ]
    config.write_text(
        "".join(
            f"{section}:\n" + "".join(f"  {line}\n" for line in lines)
            for section, lines in (
                ("server", settings),
                ("remote-control", ["control-enable: no"]),
            )
        )
    )
    with serving(
        program("unbound"), "-d", "-p", "-c", config, saying="start of service"
    ):
        yield port


NameServer = Callable[[Path], AbstractContextManager[int]]

each_server = pytest.mark.parametrize("server", [dnsmasq, unbound])


def dig(host: str, port: int, *question: str | Path) -> str:
    """Ask once, and fail if nothing comes."""
    return run(
        # Without the settings of whoever runs the tests.
        *(program("dig"), "-r", f"@{host}", "-p", str(port)),
        *("+tries=1", "+time=5", *question),
    )


@each_server
def test_dig(server: NameServer, tmp_path: Path) -> None:
    """90 questions are 90 datagrams each way, and their flows end by themselves.

    Of more, whose flows end in one second, not all would have a line.
    """
    asked = dict(list(HOSTS.items())[:90])
    names = tmp_path / "names"
    names.write_text("".join(f"{name} A\n" for name in asked))
    with server(tmp_path) as port, relayed(port, "--udp-timeout", "1") as running:
        at = running.port
        said = dig("127.0.0.1", at, "+short", "+notcp", "-f", names)
        assert said.split() == list(asked.values())
        # dig takes a port at random for each question, and some twice.
        wanted = (len(asked), len(asked))
        eventually(lambda: carried(flows_so_far(running)) == wanted, "all expire")
        flows = flows_so_far(running)
        assert {each.ending for each in flows} == {"expired"}
        assert min(each.age for each in flows) >= 1.0
        # None ends twice, and one more has a flow of its own.
        dig("127.0.0.1", at, "+notcp", "host-000.test")
        *before, last = flows_of(running, port)
        assert before == flows
        assert (last.up[0], last.down[0], last.ending) == (1, 1, "drained")


@each_server
def test_large_answer(server: NameServer, tmp_path: Path) -> None:
    """4,000 bytes of text come in one datagram, and over TCP from the same port."""
    with server(tmp_path) as port, relayed(port, streams=True) as running:
        at = running.port
        for way, transport in (
            (("+notcp", "+ignore", f"+bufsize={EDNS}"), "UDP"),
            (("+tcp",), "TCP"),
        ):
            said = dig("127.0.0.1", at, *way, LARGE, "TXT")
            assert f"(127.0.0.1) ({transport})" in said
            [flags] = re.findall(r";; flags: ([a-z ]+);", said)
            assert "tc" not in flags.split()
            assert sorted(re.findall(r'"(\d\dx+)"', said)) == TEXTS
        # With little room for it dig is told to come again, by TCP, and does.
        said = dig("127.0.0.1", at, "+bufsize=512", LARGE, "TXT")
        assert "(127.0.0.1) (TCP)" in said
        assert sorted(re.findall(r'"(\d\dx+)"', said)) == TEXTS
        running.ended("done", 2)
        flows = flows_of(running, port)
        assert [(each.up[0], each.down[0]) for each in flows] == [(1, 1)] * 2
        small, large = sorted(each.down[1] for each in flows)
        assert small <= 512
        assert TEXT_BYTES < large < EDNS
        sessions = running.sessions(2)
        assert len(sessions) == 2
        assert all(int(each["down"]) > TEXT_BYTES for each in sessions)


def test_wildcard(tmp_path: Path) -> None:
    """Who listens on all addresses answers from the one that dig has asked.

    dig hears nothing that comes from elsewhere.
    """
    hosts = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    with suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        hosts.append("::1")
    with dnsmasq(tmp_path) as port, relayed(port, host="") as running:
        at = running.port
        for host in hosts:
            said = dig(host, at, "+short", "+notcp", "host-123.test")
            assert said.split() == [HOSTS["host-123.test"]]
        listeners = {each.listener for each in flows_of(running, port)}
        assert listeners == {
            f"[{host}]:{at}" if ":" in host else f"{host}:{at}" for host in hosts
        }


@attrs.frozen
class Count:
    """What dnsperf says of a run."""

    sent: int
    completed: int
    lost: int
    noerror: int


def dnsperf(port: int, folder: Path, *args: str) -> Count:
    """Ask for all hosts, over and over, for two seconds."""
    names = folder / "names"
    names.write_text("".join(f"{name} A\n" for name in HOSTS))
    said = run(
        *(program("dnsperf"), "-s", "127.0.0.1", "-p", str(port), "-d", names),
        *("-l", str(SECONDS), *args),
    )
    found = {
        name: re.search(pattern, said)
        for name, pattern in (
            ("sent", r"Queries sent: +(\d+)"),
            ("completed", r"Queries completed: +(\d+)"),
            ("lost", r"Queries lost: +(\d+)"),
            ("noerror", r"Response codes: +NOERROR (\d+) \(100\.00%\)"),
        )
    }
    assert all(found.values()), said
    return Count(**{name: int(match[1]) for name, match in found.items() if match})


def assert_all_answered(count: Count) -> None:
    assert count.lost == 0
    assert count.sent == count.completed == count.noerror
    # More than a name for each socket, several times.
    assert count.sent > 1000


@pytest.mark.parametrize("transport", ["plane", "twisted"])
@each_server
def test_dnsperf(server: NameServer, transport: str, tmp_path: Path) -> None:
    """As fast as it goes, 100 questions at a time, from 20 sockets."""
    with (
        server(tmp_path) as port,
        relayed(port, "--transport", transport) as running,
    ):
        count = dnsperf(running.port, tmp_path, "-c", str(CLIENTS))
        assert_all_answered(count)
        flows = flows_of(running, port)
        assert len(flows) == CLIENTS
        assert carried(flows) == (count.sent, count.completed)


def test_dnsperf_wildcard(tmp_path: Path) -> None:
    """The same to a listener on all addresses, which reads in another way."""
    with dnsmasq(tmp_path) as port, relayed(port, host="") as running:
        count = dnsperf(running.port, tmp_path, "-c", str(CLIENTS))
        assert_all_answered(count)
        flows = flows_of(running, port)
        assert len(flows) == CLIENTS
        assert {each.listener for each in flows} == {f"127.0.0.1:{running.port}"}
        assert carried(flows) == (count.sent, count.completed)


def test_dnsperf_both_ways(tmp_path: Path) -> None:
    """Connections and datagrams to one port of one process: neither loses any."""
    with unbound(tmp_path) as port, relayed(port, streams=True) as running:
        streams = dnsperf(running.port, tmp_path, "-m", "tcp", "-c", "8")
        assert_all_answered(streams)
        datagrams = dnsperf(running.port, tmp_path, "-m", "udp", "-c", "8")
        assert_all_answered(datagrams)
        running.ended("done", 8)
        flows = flows_of(running, port)
        assert len(flows) == 8
        assert carried(flows) == (datagrams.sent, datagrams.completed)
