"""Pools of datagrams over a network: servers that refuse, are silent, and come back.

The servers are on a machine of their own, and say who they are.  A client is one socket
the whole time: whichever server answers, it is by the same port of the relay, and the
server sees one port of the relay's for it.
"""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import pytest

from tests.support.process import PATIENCE, RelayProcess, eventually, relay
from tests.system.name_server import NameServer, name_server
from tests.system.namespaces import PROXY, SERVER, Machine, Machines, machines
from tests.system.programs import program, run

pytestmark = pytest.mark.system

#: The ports of the two servers, `a` and `b`, and of the relay.
A, B, RELAY = 8001, 8002, 8053

#: Servers are judged soon, and looked at again soon.
SOON = ("--max-fails", "1", "--fail-time", "1")

#: Of a flow without an answer.
SILENCE = ("--max-fails", "1", "--udp-unreplied-timeout", "600ms")
SILENCE += ("--fail-time", "60")

CHECKED = ("--check", "udp send=are-you-there expect=are-you", "--fall", "2")
CHECKED += ("--rise", "1", "--check-every", "100ms", "--check-timeout", "200ms")

#: How often a client asks anew, and how often it does at most.
AGAIN, OFTEN = 0.1, 100

NAME = "ns.test"

#: The servers' addresses, where they are those of a name.
HOSTS = ("127.0.1.1", "127.0.1.2")


class Answering:
    """A server that answers with its name, and the question.

    :ivar peers: whom it has answered.
    """

    def __init__(self, machine: Machine, name: str, host: str, port: int) -> None:
        self.name = name
        self.peers: set[tuple[str, int]] = set()
        self._machine, self._where = machine, (host, port)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Have the port, and answer."""
        with self._machine.inside():
            self._socket = socket.socket(type=socket.SOCK_DGRAM)
        self._socket.bind(self._where)
        self._thread = threading.Thread(target=self._serve, args=(self._socket,))
        self._thread.start()

    def _serve(self, sock: socket.socket) -> None:
        while True:
            data, peer = sock.recvfrom(100)
            if data == b"stop":
                sock.close()
                return
            if data != b"are-you-there":
                self.peers.add(peer)
            sock.sendto(self.name.encode() + b" " + data, peer)

    def stop(self) -> None:
        """Nobody has its port any more: its machine refuses."""
        thread, self._thread = self._thread, None
        if thread is not None:
            with self._machine.inside(), socket.socket(type=socket.SOCK_DGRAM) as last:
                last.sendto(b"stop", self._where)
            thread.join()


@pytest.fixture(scope="module")
def network() -> Iterator[Machines]:
    with machines() as three:
        with three.server.inside():
            # It says of each datagram what became of it, not of one a second.
            Path("/proc/sys/net/ipv4/icmp_ratelimit").write_text("0")
        yield three


@pytest.fixture
def both(network: Machines) -> Iterator[tuple[Answering, Answering]]:
    with answering(
        Answering(network.server, "a", SERVER, A),
        Answering(network.server, "b", SERVER, B),
    ) as made:
        yield made


@contextmanager
def answering(*both: Answering) -> Iterator[tuple[Answering, Answering]]:
    """For the length of a block."""
    one, other = both
    try:
        for each in (one, other):
            each.start()
        yield one, other
    finally:
        for each in (one, other):
            each.stop()


@contextmanager
def dropping(machine: Machine, port: int) -> Iterator[None]:
    """Whatever comes for a port is lost, without a word."""
    chain = "type filter hook input priority 0;"
    rule = f"udp dport {port} udp length > 12 drop"
    table = f"table inet fault {{ chain coming {{ {chain} {rule}; }}; }}"
    run(*machine.runs(program("nft"), table))
    try:
        yield
    finally:
        run(*machine.runs(program("nft"), "flush ruleset"))


@contextmanager
def relaying(network: Machines, *options: str) -> Iterator[RelayProcess]:
    """To both servers; `a` is the first choice."""
    to = ("-d", f"udp:{SERVER}:{A},name=a", "-d", f"udp:{SERVER}:{B},name=b")
    args = ("-l", f"udp:{PROXY}:{RELAY}", *to, "--balance", "first", *options)
    args += ("--drain-timeout", "0")
    with relay(*args, twistd=network.proxy.twistd) as running:
        yield running


class Client:
    """One that asks until it is answered."""

    def __init__(self, machine: Machine, host: str = PROXY) -> None:
        with machine.inside():
            self.socket = socket.socket(type=socket.SOCK_DGRAM)
        self.socket.settimeout(AGAIN)
        self.socket.connect((host, RELAY))
        self.port: int = self.socket.getsockname()[1]
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def ask(self, often: int = OFTEN) -> str:
        """Who has answered."""
        self._number += 1
        question = f"question {self._number}"
        # Who asks but once waits for as long as a busy machine takes.
        self.socket.settimeout(AGAIN if often > 1 else PATIENCE)
        for _ in range(often):
            self.socket.send(question.encode())
            try:
                while True:
                    name, _, said = self.socket.recv(100).decode().partition(" ")
                    if said == question:
                        return name
            except (TimeoutError, ConnectionRefusedError):
                pass
        raise AssertionError(f"nobody has answered {question}")

    def comes_to(self, name: str) -> None:
        """Before long it is this one that answers."""
        eventually(lambda: self.ask() == name, f"{name} answers")


def clients(network: Machines, count: int, host: str = PROXY) -> Counter[str]:
    """Who answers so many new clients, each at its first datagram."""
    with ExitStack() as stack:
        made = [stack.enter_context(Client(network.client, host)) for _ in range(count)]
        return Counter(each.ask() for each in made)


def test_a_server_that_refuses(
    network: Machines, both: tuple[Answering, Answering]
) -> None:
    """Who talks to it goes on with the other, and new clients wait for nothing."""
    a, b = both
    with relaying(network, *SOON) as running, Client(network.client) as client:
        assert client.ask() == "a"
        a.stop()
        client.comes_to("b")
        running.wait_for("relay1: a/.* is out: ")
        assert clients(network, 5) == {"b": 5}
        assert [client.ask() for _ in range(3)] == ["b"] * 3
        assert len(a.peers) == 1
        assert {host for host, _ in b.peers} == {"10.231.9.1"}
        a.start()
        # One tries it; then it is the first choice again.
        eventually(lambda: clients(network, 3) == {"a": 3}, "a is back")
        running.wait_for("relay1: a/.* is back: ")
        assert client.ask() == "b", "who has gone stays there"
        running.signal()
        assert running.wait() == 0
    flows = running.flows(0)
    # One flow, from its first datagram to its last.
    own = [each for each in flows if each["client"].endswith(f":{client.port}")]
    assert [each["server"][0] for each in own] == ["b"]


def test_a_server_that_is_silent(
    network: Machines, both: tuple[Answering, Answering]
) -> None:
    """Behind a black hole: a new flow proves it, and an old one goes as well."""
    with ExitStack() as stack:
        running = stack.enter_context(relaying(network, *SILENCE))
        old, new = [stack.enter_context(Client(network.client)) for _ in range(2)]
        # It is in use when it lasts longer than two seconds, and so lives on.
        for _ in range(12):
            assert old.ask() == "a"
            time.sleep(0.2)
        with dropping(network.server, A):
            new.comes_to("b")
            running.wait_for("relay1: a/.* is out: .*no answer")
            old.comes_to("b")
            assert clients(network, 5) == {"b": 5}
        running.signal()
        assert running.wait() == 0
    flows = running.flows(0)
    own = [each for each in flows if each["client"].endswith(f":{old.port}")]
    assert [each["server"][0] for each in own] == ["b"]


def test_checks_that_find_a_silent_server(
    network: Machines, both: tuple[Answering, Answering]
) -> None:
    """Its flows are cut: the next datagram goes to the other one already."""
    _, b = both
    with ExitStack() as stack:
        running = stack.enter_context(relaying(network, *CHECKED, "--on-down", "cut"))
        client = stack.enter_context(Client(network.client))
        assert client.ask() == "a"
        with dropping(network.server, A):
            running.wait_for("relay1: a/.* is down: ")
            assert client.ask(often=1) == "b"
        running.wait_for("relay1: a/.* is up: ")
        assert client.ask(often=1) == "b"
        assert clients(network, 3) == {"a": 3}
        assert len(b.peers) == 1


def test_nobody_is_up_for_a_while(
    network: Machines, both: tuple[Answering, Answering]
) -> None:
    """What new clients say meanwhile is answered when somebody is."""
    with ExitStack() as stack:
        running = stack.enter_context(
            relaying(network, *CHECKED, "--when-none", "wait=60")
        )
        for each in both:
            each.stop()
        for name in "ab":
            running.wait_for(f"relay1: {name}/.* is down: ")
        made = [stack.enter_context(Client(network.client)) for _ in range(5)]
        for number, each in enumerate(made):
            each.socket.settimeout(PATIENCE)
            each.socket.send(b"early %d" % number)
        both[1].start()
        for number, each in enumerate(made):
            assert each.socket.recv(100) == b"b early %d" % number
        running.signal()
        assert running.wait() == 0
    [totals] = running.wait_for(r"received=(\d+) sent=(\d+) .* dropped=(\S+)")
    assert totals.groups() == ("5", "5", "-")


# -- servers of a name


@pytest.fixture
def names(network: Machines) -> Iterator[NameServer]:
    """The proxy's machine asks a name server of its own."""
    folder = Path("/etc/netns") / network.proxy.name
    folder.mkdir(parents=True)
    try:
        (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        with name_server(network.proxy) as made:
            yield made
    finally:
        shutil.rmtree(folder)


@contextmanager
def following(network: Machines, *options: str) -> Iterator[RelayProcess]:
    args = ("-l", f"udp:{PROXY}:{RELAY}", "-d", f"udp:dns:{NAME}:{A}")
    args += ("--resolve-every", "100ms", *options)
    with relay(*args, twistd=network.proxy.twistd) as running:
        yield running


def test_a_name_that_moves(network: Machines, names: NameServer) -> None:
    """Conversations go to where it is now, once the old place does not answer."""
    one, two = HOSTS
    names.addresses(NAME, one)
    with ExitStack() as stack:
        old, new = (Answering(network.proxy, host, host, port=A) for host in (one, two))
        stack.enter_context(answering(old, new))
        running = stack.enter_context(following(network))
        client = stack.enter_context(Client(network.client))
        client.comes_to(one)
        names.addresses(NAME, two)
        running.wait_for(f"{two}:{A} joins")
        running.wait_for(f"{one}:{A} leaves")
        assert client.ask() == one, "it drains"
        assert clients(network, 3) == {two: 3}
        old.stop()
        client.comes_to(two)
        # It is silent, and does not know the name: two other cases.
        names.silent = True
        assert [client.ask(), *clients(network, 2)] == [two, two]
        names.silent = False
        names.addresses(NAME, one, two)
        old.start()
        running.wait_for(f"{one}:{A} joins", 2)
        eventually(lambda: set(clients(network, 4)) == {one, two}, "both serve")


def test_a_name_that_has_nobody(network: Machines, names: NameServer) -> None:
    """Who comes meanwhile is answered when it has somebody; who talks, talks on."""
    one, two = HOSTS
    names.addresses(NAME, one)
    with ExitStack() as stack:
        stack.enter_context(
            answering(
                Answering(network.proxy, one, one, A),
                Answering(network.proxy, two, two, A),
            )
        )
        options = ("--resolve-grace", "0", "--when-none", "wait=60")
        running = stack.enter_context(following(network, *options))
        client = stack.enter_context(Client(network.client))
        client.comes_to(one)
        del names.zone[NAME]
        running.wait_for(f"{one}:{A} leaves")
        assert client.ask() == one
        early = stack.enter_context(Client(network.client))
        early.socket.settimeout(PATIENCE)
        early.socket.send(b"early")
        names.addresses(NAME, two)
        assert early.socket.recv(100) == two.encode() + b" early"
        assert client.ask() == one
