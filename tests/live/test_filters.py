"""Filters on a command line: one that a package brings, and those that can't be had."""

from __future__ import annotations

import re
import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.endings import ending, one_line
from tests.support.filter_packages import install
from tests.support.process import (
    RelayProcess,
    Server,
    UdpServer,
    connect,
    read_all,
    relay,
    udp_client,
)

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

LISTEN = ("-l", "127.0.0.1:0")

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_filter.py"


@pytest.fixture
def packages(tmp_path: Path) -> Iterator[Path]:
    """A folder of packages; give it as PYTHONPATH."""
    folder = tmp_path / "packages"
    folder.mkdir()
    text = EXAMPLE.read_text()
    found = re.search(r"(?:^    .*\n)+", text, re.MULTILINE)
    assert found
    project = tomllib.loads(found[0].replace("\n    ", "\n").strip())["project"]
    assert project["name"] == "louder"
    install(folder, "own_filter", text, **project["entry-points"]["relayd.filters"])
    return folder


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 30


def test_a_filter_of_a_package(packages: Path) -> None:
    words = ("--filter", "louder:1", "--filter", "louder:by=3")
    env = {"PYTHONPATH": str(packages)}
    with (
        Server() as server,
        relay("-l", "127.0.0.1:0", "-d", server.address, *words, env=env) as running,
        connect(running.port) as client,
    ):
        client.sendall(b"hello!")
        client.shutdown(socket.SHUT_WR)
        with server.accept() as upstream:
            assert read_all(upstream) == b"hello!"
            upstream.sendall(b"what? you!")
        assert read_all(client) == b"what? you!!!"
        running.ended("done")


def test_those_of_relayd_work_in_their_order() -> None:
    """The second one sees what the first one has made of it."""
    words = ("--filter=replace:old=a\\,b,new=c", "--filter", "replace:c,new=d!,wait=0")
    with (
        Server() as server,
        relay(*LISTEN, "-d", server.address, *words, "--filter=first:9") as running,
        connect(running.port) as client,
    ):
        client.sendall(b"1a,b2")
        client.shutdown(socket.SHUT_WR)
        with server.accept() as upstream:
            assert read_all(upstream) == b"1d!2"
            upstream.sendall(b"c")
        assert read_all(client) == b"d!"
        running.ended("done")
        [line] = [each for each in running.lines if "] session=" in each]
    assert "first_up=1d!2 first_down=d!" in line


def test_those_of_datagrams_work() -> None:
    """Some of their own, and one that streams have, too."""
    words = ("--filter=duplicate:1,direction=up", "--filter", "latency:1")
    with (
        UdpServer() as server,
        relay("-l", "udp:127.0.0.1:0", "-d", server.address, *words) as running,
        udp_client(running.port) as client,
    ):
        client.send(b"up")
        for _ in range(2):
            data, there = server.receive()
            assert data == b"up"
        server.send(b"down", there)
        assert client.recv(9) == b"down"


#: What is said of filters that packages bring.
BAD_PACKAGES = {
    "broken": "broken:Broken of the package broken 1.0 can't be imported:"
    " ZeroDivisionError: division by zero",
    "slicer": "the package thief 1.0 brings one of this name, too, which is relayd's"
    " own: uninstall it, or name its filter otherwise",
}

#: What is said of command lines, by what they have beside a relay of TCP.
BAD = {
    ("--filter", ""): "bad --filter '': expected a filter, as NAME, NAME:VALUE or ",
    ("--filter=latency:",): "bad --filter 'latency:': expected a value, or key=value, ",
    (
        "--filter=latency:1,2",
    ): "bad --filter 'latency:1,2': expected key=value, not '2'",
    ("--filter", "latncy:100"): "filter 'latncy:100': there is no such filter; did you"
    " mean latency?",
    ("--filter", "latency:1,jiter=5"): "filter 'latency:1,jiter=5': it has no 'jiter';"
    " did you mean jitter?",
    ("--filter", "latency:soon"): "filter 'latency:soon': bad latency 'soon': expected",
    ("--filter", "replace:old=a"): "filter 'replace:old=a': it needs new=BYTES",
    ("--filter", "first"): "filter 'first': it needs a value: first:BYTES, or size=",
    ("--filter", "deny:re:("): "filter 'deny:re:(': bad pattern 're:(': it does not"
    " compile: missing )",
    ("--filter", "deny:re:a*"): "filter 'deny:re:a*': bad pattern 're:a*': it has a"
    " repeat without a bound",
    ("--filter", "capture:/no/such.pcapng"): "filter 'capture:/no/such.pcapng': can't"
    " capture to /no/such.pcapng: No such file or directory",
    ("--filter=latency",) * 17: "17 filters: a relay has at most 16",
}


def refused(process: RelayProcess, says: str) -> None:
    """One line, and nothing was opened."""
    status, lines = ending(process)
    assert status == 1
    assert one_line(lines).startswith(says)
    assert not any("listening on" in line for line in lines)


def test_a_package_that_can_not_be_used_ends_with_one_line(packages: Path) -> None:
    install(packages, "broken", "1 / 0", broken="broken:Broken")
    install(packages, "thief", "", slicer="thief:Slicer")
    started = {
        text: RelayProcess(
            *("-l", "127.0.0.1:0", "-d", "127.0.0.1:9", "--filter", text),
            env={"PYTHONPATH": str(packages)},
        )
        for text in BAD_PACKAGES
    }
    for text, process in started.items():
        refused(process, f"relayd: filter {text!r}: {BAD_PACKAGES[text]}")


def test_a_filter_that_can_not_be_had_ends_with_one_line() -> None:
    """Of each kind of relay."""
    started = {
        words: RelayProcess("-l", "127.0.0.1:0", "-d", "127.0.0.1:9", *words)
        for words in BAD
    }
    udp = ("-l", "udp:127.0.0.1:0", "-d", "udp:127.0.0.1:9", "--filter=slicer:9")
    datagrams = RelayProcess(*udp)
    proxy = RelayProcess("--filter", "slicr:9", plugin="socks4")
    for words, process in started.items():
        refused(process, f"relayd: {BAD[words]}")
    refused(
        datagrams,
        "relayd: filter 'slicer:9': it is for connections, not for a relay of udp",
    )
    refused(
        proxy, "socks4: filter 'slicr:9': there is no such filter; did you mean slicer?"
    )
