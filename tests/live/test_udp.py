"""The UDP relay over real sockets: a `twistd` process, and plain clients and servers.

One relay for each kind of connections, with a listener of every sort, serves the tests
that set no option; the others start their own.  On the loopback nothing is lost but
what a full buffer can't take, so every datagram is waited for, and must come.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import random
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

from relayd.datagrams.table import IN_USE_AFTER
from tests.support.process import (
    DATAGRAM,
    PATIENCE,
    TRANSPORTS,
    RelayProcess,
    Server,
    UdpServer,
    command,
    connect,
    eventually,
    read_exactly,
    relay,
    transport,
    udp_client,
)

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

LISTEN = ("--listen", "udp:127.0.0.1:0")

#: Of datagrams: at and around what other relays cut, and the most that IPv4 has.
SIZES = (0, 1, 512, 1472, 8192, 8193, 65507)

#: The most that IPv6 has.
MAX_IPV6 = 65527

#: Longer than a relay of these tests takes to notice that a flow is over, in seconds.
WELL_EXPIRED = 3.0

_IP_PKTINFO = getattr(socket, "IP_PKTINFO", 8)


#: One counter of the line that a relay ends with, or several by their reason.
_COUNTED = re.compile(r"(\w+)=(\S+)")


@contextmanager
def balanced(*args: str, **options: Any) -> Iterator[RelayProcess]:
    """A relay of which it is sure, when it has ended, that no datagram was lost.

    What it has received is what it sent and what it counted as dropped, either way.
    """
    with relay("--drain-timeout", "0.1", *args, **options) as running:
        yield running
        if running.process.poll() is None:
            running.signal()
        running.wait()
        # A quiet one that has dropped nothing says nothing.
        least = int("--quiet" not in args)
        totals = running.wait_for(r"\[relayd\.flow#info\] (datagrams .*)", least)
    for line in totals:
        told = dict(_COUNTED.findall(line[1]))
        for received, sent, dropped in (
            ("received", "sent", "dropped"),
            ("replies_received", "replies_sent", "replies_dropped"),
        ):
            reasons = re.findall(r":(\d+)", told[dropped])
            assert int(told[received]) == int(told[sent]) + sum(map(int, reasons))


@attrs.frozen
class Stage:
    """A relay with a listener of every sort, and the servers behind it.

    :ivar transport: what the relays use at this time.
    :ivar ports: of its listeners, by sort.
    """

    transport: str
    relay: RelayProcess
    ports: dict[str, int]
    ipv4: UdpServer
    ipv6: UdpServer
    both: UdpServer
    pool: tuple[UdpServer, UdpServer]


@pytest.fixture(autouse=True, params=TRANSPORTS, scope="module")
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    """What the tests that set no option share; other relays get its transport."""
    with ExitStack() as held:
        ipv4, one, two = (held.enter_context(UdpServer()) for _ in range(3))
        ipv6 = held.enter_context(UdpServer("::1"))
        both = held.enter_context(UdpServer(""))
        sorts = {
            "ipv4": ("udp:127.0.0.1:0", ipv4.address),
            "ipv6": ("udp:[::1]:0", ipv6.address),
            "6to4": ("udp:[::1]:0", ipv4.address),
            "4to6": ("udp:127.0.0.1:0", ipv6.address),
            "pool": ("udp:127.0.0.1:0", one.address, two.address),
            "name": ("udp:127.0.0.1:0", f"udp:localhost:{both.port}"),
            # Without a host: two sockets, two lines of the log.
            "wildcard": ("udp:0", ipv4.address),
        }
        args = []
        for listener, *servers in sorts.values():
            args += ["--listen", listener]
            args += [arg for server in servers for arg in ("--dest", server)]
        held.enter_context(transport(request.param))
        running = held.enter_context(balanced(*args))
        lines = running.listening(len(sorts) + 1)
        numbers = [int(line.rpartition(":")[2]) for line in lines]
        ports = dict(zip(sorts, numbers, strict=False))
        yield Stage(request.param, running, ports, ipv4, ipv6, both, (one, two))


@pytest.fixture
def server() -> Iterator[UdpServer]:
    with UdpServer() as listening:
        yield listening


def exchange(
    client: socket.socket, server: UdpServer, request: bytes, *replies: bytes
) -> tuple[str, int]:
    """Ask and be answered; the relay's address that the server saw."""
    client.send(request)
    data, peer = server.receive()
    assert data == request
    for reply in replies:
        server.send(reply, peer)
    for reply in replies:
        assert client.recv(DATAGRAM) == reply
    return peer[0], peer[1]


def be_in_use(server: UdpServer, *clients: socket.socket) -> list[tuple[str, int]]:
    """Have flows that count as in use; that takes two seconds, by their definition."""
    peers = [exchange(client, server, b"a", b"A") for client in clients]
    time.sleep(IN_USE_AFTER + 0.1)
    again = [exchange(client, server, b"b", b"B") for client in clients]
    assert again == peers
    return peers


def answered(client: socket.socket, server: UdpServer, request: bytes) -> Any:
    """The same, in a flood of others' datagrams, which the server leaves alone."""
    client.send(request)
    while (got := server.receive())[0] != request:
        assert got[0] == b"spoofed"
    server.send(b"answer", got[1])
    assert client.recv(DATAGRAM) == b"answer"
    return got[1]


def nothing_came(sock: socket.socket) -> None:
    """Nothing has arrived; what could have, arrived before what the caller got."""
    sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        sock.recv(DATAGRAM)
    sock.settimeout(PATIENCE)


def name(sock: socket.socket) -> str:
    """A client's address, as the log has it."""
    host, port = sock.getsockname()[:2]
    return f"{host}:{port}"


def send_as(sock: socket.socket, source: int, data: bytes, port: int) -> None:
    """Send to the relay from an address of 127.0.0.0/8, which all are this machine's.

    The source of one datagram, by ip(7): a flood of them needs one socket, no root.
    """
    own = struct.pack("=I4s4s", 0, (0x7F000000 | source).to_bytes(4, "big"), bytes(4))
    extra = [(socket.IPPROTO_IP, _IP_PKTINFO, own)]
    sock.sendmsg([data], extra, 0, ("127.0.0.1", port))


def free_port() -> int:
    """A port that neither TCP nor UDP uses here now."""
    while True:
        with socket.socket() as stream, UdpServer() as datagrams:
            try:
                stream.bind(("127.0.0.1", datagrams.port))
            except OSError:
                continue
            return datagrams.port


# -- datagrams

#: The three kinds of listening sockets: their code differs.
fronts = pytest.mark.parametrize(
    ("sort", "host"),
    [("ipv4", "127.0.0.1"), ("wildcard", "127.0.0.1"), ("wildcard", "::1")],
)


@fronts
def test_datagrams_of_every_size_both_ways(stage: Stage, sort: str, host: str) -> None:
    chance = random.Random(1)
    sweep = [chance.randrange(65508) for _ in range(60)]
    with udp_client(stage.ports[sort], host) as client:
        for size in (*SIZES, *sweep):
            request = chance.randbytes(size)
            # As long as its request, and of a length that has nothing to do with it.
            replies = chance.randbytes(size), chance.randbytes(chance.choice(sweep))
            exchange(client, stage.ipv4, request, *replies)
        nothing_came(client)


@fronts
@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_any_number_of_replies(stage: Stage, sort: str, host: str, count: int) -> None:
    with udp_client(stage.ports[sort], host) as client:
        replies = [b"reply %d" % number for number in range(count)]
        peer = exchange(client, stage.ipv4, b"how many?", *replies)
        # A last one shows that there are no more, and that the flow goes on.
        assert exchange(client, stage.ipv4, b"and?", b"that's all") == peer
        nothing_came(client)


def test_many_datagrams_stay_in_order(stage: Stage) -> None:
    """More than a batch in one go, and answered in one go."""
    sent = [b"%d" % number for number in range(200)]
    with udp_client(stage.ports["ipv4"]) as client:
        for data in sent:
            client.send(data)
        got = [stage.ipv4.receive() for _ in sent]
        assert [data for data, _ in got] == sent
        for data, peer in got:
            stage.ipv4.send(data, peer)
        assert [client.recv(DATAGRAM) for _ in sent] == sent


def test_ipv6_to_ipv6_is_longer_still(stage: Stage) -> None:
    data = random.Random(2).randbytes(MAX_IPV6)
    with udp_client(stage.ports["ipv6"], "::1") as client:
        exchange(client, stage.ipv6, data, data[::-1])


@pytest.mark.parametrize(("sort", "host"), [("6to4", "::1"), ("4to6", "127.0.0.1")])
def test_from_one_family_to_the_other(stage: Stage, sort: str, host: str) -> None:
    server = stage.ipv4 if sort == "6to4" else stage.ipv6
    chance = random.Random(3)
    with udp_client(stage.ports[sort], host) as client:
        for size in SIZES:
            exchange(client, server, chance.randbytes(size), chance.randbytes(size))


def test_what_the_other_family_cannot_carry_is_lost_alone(stage: Stage) -> None:
    long = bytes(MAX_IPV6)
    with udp_client(stage.ports["6to4"], "::1") as client:
        peer = exchange(client, stage.ipv4, b"before", b"so far")
        client.send(long)
        assert exchange(client, stage.ipv4, b"after", b"so good") == peer
    with udp_client(stage.ports["4to6"]) as client:
        client.send(b"say much")
        _, back = stage.ipv6.receive()
        stage.ipv6.send(long, back)
        stage.ipv6.send(b"less", back)
        assert client.recv(DATAGRAM) == b"less"


# -- who is whose


def test_a_client_has_one_port_of_the_relay_and_shares_it_with_nobody(
    stage: Stage,
) -> None:
    with ExitStack() as held:
        clients = [
            held.enter_context(udp_client(stage.ports["ipv4"])) for _ in range(10)
        ]
        first = [exchange(each, stage.ipv4, b"a", b"A") for each in clients]
        again = [exchange(each, stage.ipv4, b"b", b"B") for each in clients]
    assert first == again
    assert len(set(first)) == len(clients)


def test_replies_find_their_clients_in_any_order(stage: Stage) -> None:
    with ExitStack() as held:
        clients = [
            held.enter_context(udp_client(stage.ports["wildcard"])) for _ in range(20)
        ]
        for number, client in enumerate(clients):
            client.send(b"%d" % number)
        asked = [stage.ipv4.receive() for _ in clients]
        for data, peer in reversed(asked):
            stage.ipv4.send(b"for " + data, peer)
        for number, client in enumerate(clients):
            assert client.recv(DATAGRAM) == b"for %d" % number


def test_a_client_keeps_its_server_of_a_pool(stage: Stage) -> None:
    served = []
    for _ in range(2):
        with udp_client(stage.ports["pool"]) as client:
            client.send(b"who?")
            # Whose turn it is depends on who came before; one of them has it.
            pool = {each.socket: each for each in stage.pool}
            [asked] = select.select(list(pool), [], [], PATIENCE)[0]
            mine = pool[asked]
            _, peer = mine.receive()
            mine.send(b"me", peer)
            assert client.recv(DATAGRAM) == b"me"
            for _ in range(5):
                assert exchange(client, mine, b"again", b"still me") == peer
            served.append(mine)
    assert set(served) == set(stage.pool)


def test_strangers_cannot_answer(stage: Stage) -> None:
    with udp_client(stage.ports["ipv4"]) as client, UdpServer() as stranger:
        client.send(b"who is there?")
        _, peer = stage.ipv4.receive()
        # Its own address, another port; another address; the same machine's other.
        stranger.send(b"me", peer)
        with UdpServer("127.0.0.2", stage.ipv4.port) as other:
            other.send(b"me, too", peer)
        stage.ipv4.send(b"only me", peer)
        assert client.recv(DATAGRAM) == b"only me"
        assert exchange(client, stage.ipv4, b"sure?", b"sure") == peer
        nothing_came(client)


def test_a_wildcard_answers_from_the_address_that_was_spoken_to(stage: Stage) -> None:
    port = stage.ports["wildcard"]
    hosts = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    with UdpServer() as client:
        for host in hosts:
            client.send(host.encode(), (host, port))
        asked = [stage.ipv4.receive() for _ in hosts]
        # Backwards: it is no matter of who came last.
        for data, peer in reversed(asked):
            stage.ipv4.send(data, peer)
        answers = [client.receive() for _ in hosts]
        assert sorted(answers) == [(host.encode(), (host, port)) for host in hosts]


def test_a_listener_without_a_host_serves_both_families(stage: Stage) -> None:
    port = stage.ports["wildcard"]
    listening = stage.relay.listening(8)
    assert {f"udp:0.0.0.0:{port}", f"udp:[::]:{port}"} <= set(listening)
    for host in ("127.0.0.1", "::1"):
        with udp_client(port, host) as client:
            exchange(client, stage.ipv4, host.encode(), b"welcome")


def test_a_name_as_the_destination(stage: Stage) -> None:
    with udp_client(stage.ports["name"]) as client:
        # Until the name is known, datagrams are lost: ask as clients of UDP do.
        stage.both.socket.settimeout(0.1)
        limit = time.monotonic() + PATIENCE
        while True:
            assert time.monotonic() < limit
            client.send(b"hello")
            try:
                _, peer = stage.both.receive()
            except TimeoutError:
                continue
            break
        stage.both.socket.settimeout(PATIENCE)
        stage.both.send(b"a name's", peer)
        assert client.recv(DATAGRAM) == b"a name's"


def test_tcp_and_udp_on_one_port_number(server: UdpServer) -> None:
    number = free_port()
    here = f"127.0.0.1:{number}"
    with Server() as stream:
        datagrams = ("-l", f"udp:{here}", "-d", server.address)
        with balanced(*datagrams, "-l", here, "-d", stream.address) as running:
            assert running.listening(2) == [f"udp:{here}", here]
            with udp_client(number) as client, connect(number) as other:
                other.sendall(b"stream")
                with stream.accept() as upstream:
                    assert read_exactly(upstream, 6) == b"stream"
                    exchange(client, server, b"datagram", b"back")
                    upstream.sendall(b"back")
                    assert read_exactly(other, 4) == b"back"


# -- those who are not there


def test_a_server_that_is_down_for_a_while(stage: Stage) -> None:
    """Its host refuses (ICMP), which the flow outlives; nobody else notices."""
    # An address whose ports nothing else takes while it is down.
    with UdpServer("127.0.0.77") as server:
        away = server.port
        with balanced(*LISTEN, "-d", server.address) as running:
            with udp_client(running.port) as client, udp_client(running.port) as other:
                peer = exchange(client, server, b"up", b"yes")
                beside = exchange(other, server, b"up, too", b"yes")
                server.close()
                for _ in range(50):
                    client.send(b"down")
                # Whoever had nothing to say meanwhile has nothing to be told.
                with udp_client(stage.ports["ipv4"]) as third:
                    exchange(third, stage.ipv4, b"elsewhere", b"all is well")
                with UdpServer("127.0.0.77", away) as back:
                    # The first one already: the refusal of the last is not its own.
                    client.send(b"up again")
                    while (got := back.receive())[0] == b"down":
                        pass
                    assert got == (b"up again", peer)
                    back.send(b"yes", peer)
                    assert client.recv(DATAGRAM) == b"yes"
                    assert exchange(other, back, b"same here", b"yes") == beside
            assert not [line for line in running.lines if "ending=" in line]


def test_a_server_that_is_down_from_the_start() -> None:
    with UdpServer("127.0.0.77") as server:
        pass
    with balanced(*LISTEN, "-d", server.address) as running:
        with udp_client(running.port) as client:
            client.send(b"down")
            client.send(b"down")
            with UdpServer("127.0.0.77", server.port) as late:
                client.send(b"up")
                while (got := late.receive())[0] == b"down":
                    pass
                assert got[0] == b"up"
                late.send(b"yes", got[1])
                assert client.recv(DATAGRAM) == b"yes"


@fronts
def test_a_client_that_is_gone(stage: Stage, sort: str, host: str) -> None:
    """Its host refuses what the server goes on sending; nobody else notices."""
    port, server = stage.ports[sort], stage.ipv4
    own = "::1" if host == "::1" else "127.0.0.66"
    with udp_client(port, host) as other:
        beside = exchange(other, server, b"here", b"yes")
        with udp_client(port, host, own=(own, 0)) as client:
            where = client.getsockname()[:2]
            peer = exchange(client, server, b"bye", b"bye")
        for _ in range(100):
            server.send(b"still there?", peer)
        assert exchange(other, server, b"still here", b"yes") == beside
        with udp_client(port, host, own=where) as back:
            assert exchange(back, server, b"back") == peer
            server.send(b"at last", peer)
            # What the relay had not sent on yet may come before.
            while (got := back.recv(DATAGRAM)) == b"still there?":
                pass
            assert got == b"at last"


# -- bounds


def test_a_spoofed_flood_beside_an_established_flow(
    stage: Stage, server: UdpServer
) -> None:
    each_time, most = 250, 50
    # Most of its time goes into the log; the table is the same for both.
    sources = 30_000 if stage.transport == TRANSPORTS[0] else 5_000
    options = ("--max-flows", str(most), "--quiet")
    options = (*LISTEN, "-d", server.address, *options)
    with balanced(*options, twistd=command()) as running:
        # Asked for once: it is looked for in the log, which is about to grow.
        port = running.port
        with udp_client(port) as client, socket.socket(type=2) as spoofing:
            [peer] = be_in_use(server, client)
            descriptors, arrived, memory = running.descriptors, 0, 0
            for start in range(0, sources, each_time):
                for source in range(start, start + each_time):
                    send_as(spoofing, 0x10000 + source, b"spoofed", port)
                # The relay reads it after all of those: none waits, none is lost.
                client.send(b"kept %d" % start)
                while (got := server.receive())[1] != peer:
                    assert got[0] == b"spoofed"
                    arrived += 1
                assert got[0] == b"kept %d" % start
                server.send(b"yes, %d" % start, peer)
                assert client.recv(DATAGRAM) == b"yes, %d" % start
                if not memory:
                    memory = running.rss
            assert running.descriptors <= descriptors + most
            # Nor was any of the spoofed ones: each had its flow, for a moment.
            assert arrived == sources
            assert running.rss < memory + (4 << 20)
            assert not [line for line in running.lines if name(client) in line]


def test_a_flood_of_two_listeners_with_few_descriptors(server: UdpServer) -> None:
    """By default, what one relay may have is not another's, nor what TCP needs."""

    def low_limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))

    udp = (*LISTEN, "-d", server.address)
    tcp = ("-l", "127.0.0.1:0", "-d", server.address.removeprefix("udp:"))
    with balanced(*udp, *udp, *tcp, preexec_fn=low_limit) as running:
        ports = [int(each.rpartition(":")[2]) for each in running.listening(3)]
        with ExitStack() as stack:
            clients = [stack.enter_context(udp_client(port)) for port in ports[:2]]
            spoofing = stack.enter_context(socket.socket(type=2))
            peers = [exchange(each, server, b"first", b"yes") for each in clients]
            for start in range(0, 2000, 100):
                for source in range(start, start + 100):
                    for port in ports[:2]:
                        send_as(spoofing, 0x10000 + source, b"spoofed", port)
                # Those who were there, and those who come, are served.
                for client, peer in zip(clients, peers, strict=True):
                    assert answered(client, server, b"more") == peer
                for port in ports[:2]:
                    with udp_client(port) as new:
                        answered(new, server, b"new")
            # Nobody listens there, but the relay could ask.
            with connect(ports[2]) as stream:
                assert stream.recv(1) == b""
            running.ended("connect_refused")


def test_a_flood_of_empty_datagrams_beside_another_listener(server: UdpServer) -> None:
    flood = (
        "import socket, sys\n"
        "sock = socket.socket(type=socket.SOCK_DGRAM)\n"
        "sock.connect(('127.0.0.1', int(sys.argv[1])))\n"
        "while True: sock.send(b'')\n"
    )
    with UdpServer() as flooded:
        args = (*LISTEN, "-d", flooded.address, *LISTEN, "-d", server.address)
        with balanced(*args, "--udp-rcvbuf", "200000") as running:
            ports = [int(each.rpartition(":")[2]) for each in running.listening(2)]
            with udp_client(ports[1]) as client:
                argv = [sys.executable, "-c", flood, str(ports[0])]
                with subprocess.Popen(argv) as flooding:
                    try:
                        # It comes faster than the relay can read.
                        eventually(lambda: kernel_drops(ports[0]), "an overflow")
                        for number in range(100):
                            data = b"%d" % number
                            exchange(client, server, data, data)
                        seen = kernel_drops(ports[0])
                        eventually(lambda: kernel_drops(ports[0]) > seen, "still")
                    finally:
                        flooding.kill()
            assert flooded.receive()[0] == b""


def kernel_drops(port: int) -> int:
    """What the kernel has dropped of an IPv4 listener's datagrams (proc(5))."""
    found: list[int] = []

    def look() -> bool:
        # The list misses some while others on this machine open and close theirs.
        lines = Path("/proc/net/udp").read_text().splitlines()[1:]
        each = (line.split() for line in lines)
        found[:] = [int(x[12]) for x in each if x[1].endswith(f":{port:04X}")]
        return bool(found)

    eventually(look, f"somebody listens on {port}")
    return found[0]


def fill_table(
    many: socket.socket, server: UdpServer, port: int, sources: range
) -> None:
    """A flow for each of these addresses, which is asked, and answered."""
    for start in range(0, len(sources), 100):
        some = sources[start : start + 100]
        for source in some:
            send_as(many, source, b"%d" % source, port)
        for data, peer in [server.receive() for _ in some]:
            server.send(data, peer)
        assert {many.recv(DATAGRAM) for _ in some} == {b"%d" % each for each in some}


def test_8000_flows_and_nothing_left_of_them(server: UdpServer) -> None:
    """Each is answered; when they have expired, their sockets and memory are free."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    # select(2) has no number above 1,023.
    count = 400 if os.environ.get("RELAYD_TEST_REACTOR") == "select" else 8000
    if limit != resource.RLIM_INFINITY:
        count = min(count, (limit - 1500) // 100 * 100)

    def high_limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    options = ("--udp-timeout", "6", "--udp-unreplied-timeout", "6", "--quiet")
    options = (*LISTEN, "-d", server.address, *options)
    with balanced(*options, preexec_fn=high_limit) as running:
        port = running.port
        with udp_client(port) as client, socket.socket(type=2) as many:
            many.bind(("", 0))
            many.settimeout(PATIENCE)
            exchange(client, server, b"warm", b"up")
            descriptors = running.descriptors
            fill_table(many, server, port, range(0x20000, 0x20000 + count))
            # All at once: the first have not expired yet.
            assert running.descriptors >= descriptors + count - 1
            memory = running.rss
            # One that nobody answers is told of, even quietly; the others are not.
            with udp_client(port) as unheard:
                exchange(unheard, server, b"unheard")
                [flow] = running.flows(like="ending=unreplied")
                assert flow["client"] == name(unheard)
            # The first client's own has expired as well.
            eventually(lambda: running.descriptors < descriptors, "all have expired")
            # Python keeps some of the memory, and needs no more for as many others.
            # What 8,000 flows leave behind would be twice this.
            fill_table(many, server, port, range(0x30000, 0x30000 + count))
            assert running.rss < memory + (4 << 20)
        assert not [line for line in running.lines if "ending=expired" in line]


def test_flows_are_bounded_and_those_in_use_are_kept(server: UdpServer) -> None:
    """Of one client host, and in all; refusals are logged once a second at most."""
    listen = (*LISTEN, "-d", server.address)
    with ExitStack() as held:
        own = held.enter_context(balanced(*listen, "--max-flows-per-client", "3"))
        most = ("--max-flows", "2", "--max-flows-per-client", "2")
        whole = held.enter_context(balanced(*listen, *most))
        clients = [held.enter_context(udp_client(own.port)) for _ in range(4)]
        other = held.enter_context(udp_client(own.port, own=("127.0.0.2", 0)))
        one, two, three = (
            held.enter_context(udp_client(whole.port, own=(host, 0)))
            for host in ("127.0.0.1", "127.0.0.2", "127.0.0.3")
        )
        # One that was answered makes room as one that was not.
        exchange(clients[3], server, b"asked", b"answered")
        peers = be_in_use(server, *clients[:3], one, two)
        [flow] = own.flows()
        assert (flow["client"], flow["ending"]) == (name(clients[3]), "evicted")
        assert flow["by"] == name(clients[2])
        # Those in use do not, and another host has flows of its own.
        clients[3].send(b"too many")
        exchange(other, server, b"another host", b"welcome")
        began = time.monotonic()
        for _ in range(100):
            three.send(b"3")
        # Read after them all; had one been let in, the server would have it first.
        again = [
            exchange(each, server, b"c", b"C") for each in (*clients[:3], one, two)
        ]
        took = time.monotonic() - began
        assert again == peers
        own.wait_for(r"the flow table is full: no flow for 127\.0\.0\.1 \(1 datagrams")
        refused = whole.wait_for("the flow table is full: no flow for 127.0.0.3")
        assert len(refused) <= 1 + took
        assert not [line for line in whole.lines if "ending=" in line]


def test_replies_are_capped(server: UdpServer) -> None:
    with balanced(*LISTEN, "-d", server.address, "--reply-cap", "2") as running:
        with udp_client(running.port) as client:
            client.send(bytes(100))
            _, peer = server.receive()
            # 150 of 200 bytes; then 51 would be too many, and 50 are not.
            for size in (150, 51, 50, 1):
                server.send(bytes(size), peer)
            assert [len(client.recv(DATAGRAM)) for _ in range(2)] == [150, 50]
            # Another byte from the client is worth two.
            client.send(b"!")
            assert server.receive() == (b"!", peer)
            for size in (3, 2):
                server.send(bytes(size), peer)
            assert len(client.recv(DATAGRAM)) == 2
            nothing_came(client)


# -- a sandbox


def refusing(number: int, *calls: int) -> Any:
    """What makes a process, and those that come of it, get an error for some calls.

    :param number: the error.
    :param calls: numbers of system calls; seccomp(2).
    """
    # The call's number; a jump for each that is refused; allowed; refused.
    code = [(0x20, 0, 0, 0)]
    code += [(0x15, len(calls) - n, 0, call) for n, call in enumerate(calls)]
    code += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x50000 | number)]
    program = b"".join(struct.pack("=HBBI", *each) for each in code)
    held = ctypes.create_string_buffer(program)
    described = struct.pack("@HP", len(code), ctypes.addressof(held))
    libc = ctypes.CDLL(None, use_errno=True)

    def refuse() -> None:
        no_new_privileges, seccomp, by_filter = 38, 22, 2
        if libc.prctl(no_new_privileges, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")
        if libc.prctl(seccomp, by_filter, described):
            raise OSError(ctypes.get_errno(), f"prctl, with {len(held)} bytes")

    return refuse


#: recvmmsg and sendmmsg, by machine.
BATCH_CALLS = {"x86_64": (299, 307), "aarch64": (243, 269)}


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in BATCH_CALLS,
    reason="knows the numbers of system calls of two machines",
)
@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
def test_a_sandbox_without_the_calls_for_batches(
    server: UdpServer, number: int
) -> None:
    """The same is done one by one."""
    options = (*LISTEN, "-d", server.address, "-l", "udp:0", "-d", server.address)
    refused = refusing(number, *BATCH_CALLS[platform.machine()])
    with balanced(*options, preexec_fn=refused) as running:
        for line in running.listening(2):
            with udp_client(int(line.rpartition(":")[2])) as client:
                for size in (0, 1, 65507):
                    exchange(client, server, bytes(size), b"yes", bytes(size))


# -- time


def test_flows_expire_unless_something_moves(server: UdpServer) -> None:
    """Both ways of taking what a server sends, at once: they take their time."""
    options = (*LISTEN, "-d", server.address)
    options = (*options, "--udp-timeout", "1", "--udp-unreplied-timeout", "0.5")
    with ExitStack() as held:
        both = held.enter_context(balanced(*options))
        outbound = held.enter_context(balanced(*options, "--no-refresh-inbound"))
        sending, hearing, replied, unreplied, deaf = (
            held.enter_context(udp_client(running.port))
            for running in (both, both, both, both, outbound)
        )
        began = time.monotonic()
        peers = {
            client: exchange(client, server, b"go", b"on")
            for client in (sending, hearing, replied, deaf)
        }
        silent = exchange(unreplied, server, b"no answer, please")
        until = time.monotonic() + WELL_EXPIRED
        while time.monotonic() < until:
            # Refreshed ten times in the time that they have, or more seldom by a busy
            # machine.
            time.sleep(0.1)
            assert exchange(sending, server, b"alive") == peers[sending]
            server.send(b"alive", peers[hearing])
            assert hearing.recv(DATAGRAM) == b"alive"
            server.send(b"not enough", peers[deaf])
        # Either may be found to be over first.
        over = {flow["client"]: flow for flow in both.flows(2)}
        over |= {flow["client"]: flow for flow in outbound.flows()}
        expected = {
            name(unreplied): ("unreplied", 0.5),
            name(replied): ("expired", 0.5),
            name(deaf): ("expired", 0.5),
        }
        assert over.keys() == expected.keys()
        for who, (ending, least) in expected.items():
            assert over[who]["ending"] == ending
            assert least <= float(over[who]["age"]) < WELL_EXPIRED + 1
        # What is over is over: the same client gets another port.
        for client, old in ((replied, peers[replied]), (unreplied, silent)):
            assert exchange(client, server, b"anew", b"yes") != old
        # Those that went on are in use by now, and have the longer time.
        lasted = time.monotonic() - began
        in_use = {name(sending), name(hearing)}
        lines = [flow for flow in both.flows(6) if flow["client"] in in_use]
        assert {flow["client"] for flow in lines} == in_use
        for flow in lines:
            assert flow["ending"] == "expired"
            assert WELL_EXPIRED + 1 <= float(flow["age"]) < lasted + 1 + WELL_EXPIRED


# -- the end


def test_sigterm_lets_replies_arrive(server: UdpServer) -> None:
    options = ("--drain-timeout", "60")
    with balanced(*LISTEN, "-d", server.address, *options) as running:
        with udp_client(running.port) as client, udp_client(running.port) as late:
            known = name(client)
            client.send(b"before")
            _, peer = server.receive()
            running.signal()
            running.wait_for("1 sessions may finish within 60 s")
            # It serves nobody new, and those whom it knows as before.
            late.send(b"too late")
            server.send(b"in time", peer)
            assert client.recv(DATAGRAM) == b"in time"
            assert exchange(client, server, b"one more", b"and back") == peer
            # When nothing moves any longer, it does not wait for the whole minute.
            assert running.wait() == 0
        # The late one got none.
        [flow] = running.flows()
        assert (flow["client"], flow["ending"]) == (known, "drained")
        assert (flow["up"], flow["down"]) == ("2/14", "2/15")


def test_sigterm_does_not_wait_for_ever(server: UdpServer) -> None:
    """A client that never stops has --drain-timeout, and no more."""
    options = ("--drain-timeout", "0.5")
    with balanced(*LISTEN, "-d", server.address, *options) as running:
        with udp_client(running.port) as client:
            exchange(client, server, b"hello", b"hello")
            running.signal()
            running.wait_for("may finish")
            limit = time.monotonic() + PATIENCE
            while running.process.poll() is None and time.monotonic() < limit:
                try:
                    client.send(b"and another thing")
                except ConnectionRefusedError:
                    # The listener is closed.
                    break
                time.sleep(0.05)
            assert running.wait() == 0
        [flow] = running.flows()
        assert flow["ending"] == "drained"
        assert 0.5 <= float(flow["age"]) < PATIENCE


def test_a_second_signal_ends_at_once(server: UdpServer) -> None:
    options = ("--drain-timeout", "60")
    with balanced(*LISTEN, "-d", server.address, *options) as running:
        with udp_client(running.port) as client:
            exchange(client, server, b"hello", b"hello")
            running.signal()
            running.wait_for("may finish")
            running.signal(signal.SIGINT)
            assert running.wait() == 0
        [flow] = running.flows()
        # Sooner than a flow that is quiet would have been found to be.
        assert float(flow["age"]) < 1
        assert not any("Traceback" in line for line in running.lines)


def test_a_port_that_is_taken() -> None:
    with UdpServer() as taken:
        process = RelayProcess("--listen", taken.address, "--dest", "udp:127.0.0.1:9")
        try:
            assert process.wait() == 1
        finally:
            process.stop()
        said = [line for line in process.lines if "UnixAppLogger" not in line]
        assert len(said) == 1
        assert said[0].endswith(
            f"relayd: can't listen on {taken.address}: Address already in use"
        )


def test_the_log_has_a_line_for_a_flow_and_none_for_its_datagrams(
    server: UdpServer,
) -> None:
    options = ("--drain-timeout", "0")
    listeners = ("-l", "udp:0", "-d", server.address)
    with balanced(*listeners, *options) as running:
        running.listening(2)
        hosts = ("127.0.0.3", "::1")
        seen = {}
        with ExitStack() as held:
            for host in hosts:
                client = held.enter_context(udp_client(running.port, host))
                peer = exchange(client, server, b"12345", b"123", b"", b"4")
                exchange(client, server, b"")
                address = client.getsockname()[1]
                seen[host] = (address, f"{peer[0]}:{peer[1]}")
            lines = len(running.lines)
            running.signal()
            assert running.wait() == 0
        flows = {each["listener"]: each for each in running.flows(2)}
        for host in hosts:
            shown = f"[{host}]" if ":" in host else host
            flow = flows[f"{shown}:{running.port}"]
            assert float(flow.pop("age")) < PATIENCE
            own, port = seen[host]
            mine = "[::1]" if ":" in host else "127.0.0.1"
            assert flow == {
                "relay": "relay1",
                "client": f"{mine}:{own}",
                "listener": f"{shown}:{running.port}",
                "port": port,
                "server": server.address.removeprefix("udp:"),
                "up": "2/5",
                "down": "3/4",
                "ending": "drained",
            }
        assert len([line for line in running.lines[:lines] if "flow " in line]) == 0
