"""UDP by the relay as a gateway: who the server sees, and what is on each cable.

The rows of the kernel relay's table, by their numbers:

    U1  client to relay   10.0.0.1:x > 192.168.0.2:53
    U2  relay to server   10.0.0.1:x > 192.168.0.1:53
    U3  server to relay   192.168.0.1:53 > 10.0.0.1:x, to the relay's socket
    U4  relay to client   192.168.0.2:53 > 10.0.0.1:x
"""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack
from pathlib import Path

import attrs
import pytest

from tests.support.process import PATIENCE, RelayProcess
from tests.system.gateway import (
    GATEWAY_PORT,
    V4,
    Addresses,
    Gateway,
    Translation,
    Way,
    both_ways,
    each_family,
    end,
    stopped,
)
from tests.system.namespaces import Machine
from tests.system.wire import at

pytestmark = pytest.mark.system

#: What clients ask for.
PORT = 53

#: How many clients at once.
MANY = 200

#: What a socket may keep unread, in bytes.
UNREAD = 4 << 20

IP_TRANSPARENT = 19  # ip(7)

#: The relay listens on the port that clients ask for; or on its own, where the kernel
#: brings them; or clients ask for the server itself, or a host that is none.
WAYS = {
    "direct": Way(
        "-l udp:{asked}:53 -d udp:{server}:53 --transparent",
        "asked",
        False,
    ),
    "redirect": Way(
        "-l udp:{asked}:{port} -d udp:{server}:53 --transparent --intercept {asked}:53",
        "asked",
        True,
    ),
    # NAT would bring the relay its own datagrams, for ever.
    "its-own-server": Way(
        "-l udp:{every}:{port} -d udp:{server}:53 --transparent "
        "--intercept {server}:50-60",
        "server",
        False,
    ),
    "original": Way(
        "-l udp:{every}:{port} -d udp:original --transparent --intercept {server}:53",
        "server",
        False,
    ),
    "host-original": Way(
        "-l udp:{every}:{port} -d udp:{server}:original --transparent "
        "--intercept {asked}:50-60",
        "asked",
        False,
    ),
}

WAYS["original-twisted"] = attrs.evolve(
    WAYS["original"], options=f"{WAYS['original'].options} --transport twisted"
)

each_way = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))


def bound(machine: Machine, family: Addresses, host: str, port: int) -> socket.socket:
    """A socket of a machine's, at this address and port."""
    with machine.inside():
        sock = socket.socket(family.kind, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UNREAD)
    sock.bind((host, port))
    sock.settimeout(PATIENCE)
    return sock


def client_of(network: Gateway, family: Addresses, host: str) -> socket.socket:
    """A client, which hears nobody but whom it asks."""
    client = bound(network.client, family, family.client, 0)
    client.connect((host, PORT))
    return client


def asks(client: socket.socket, server: socket.socket, data: bytes) -> str:
    """The client says something and is answered; whom the server has seen."""
    client.send(data)
    heard, peer = server.recvfrom(100)
    assert heard == data
    server.sendto(data[::-1], peer)
    assert client.recv(100) == data[::-1]
    return at(*peer[:2])


@each_family
@each_way
def test_rows(network: Gateway, way: Way, family: Addresses, tmp_path: Path) -> None:
    """U1 to U4, several times, of two clients."""
    asked, served = at(way.host(family), PORT), at(family.server, PORT)
    with (
        network.relaying(*way.args(family)) as running,
        bound(network.server, family, family.server, PORT) as server,
        network.captured(tmp_path) as wires,
        client_of(network, family, way.host(family)) as one,
        client_of(network, family, way.host(family)) as other,
    ):
        ends = [end(one), end(other)]
        for number in range(3):
            for client in (one, other):
                # The server sees the client, on its own port.
                assert asks(client, server, b"question %d" % number) == end(client)
        # By getsockname and getpeername of the relay's sockets.
        assert {(each, served) for each in ends} <= network.sockets("udp")
        # And by what the kernel keeps in mind, of earlier tests as well: it says what
        # there is, not what there is not.
        if way.rewritten:
            own = at(family.asked, GATEWAY_PORT)
            translated = {Translation(each, asked, own) for each in ends}
            assert translated <= network.translations()
        for packets, far in zip(wires.packets(), (asked, served), strict=True):
            ways = set().union(*(both_ways(each, far) for each in ends))
            assert {each.way for each in packets} == ways
            assert len(packets) == 12
        flows = ended(running, 2)
        assert {each["client"] for each in flows} == set(ends)
        assert {each["server"] for each in flows} == {served}
        assert {each["up"].partition("/")[0] for each in flows} == {"3"}
        assert {each["down"].partition("/")[0] for each in flows} == {"3"}


def ended(running: RelayProcess, count: int) -> list[dict[str, str]]:
    """Stop the relay: the flows that it has had."""
    stopped(running)
    flows = running.flows(count)
    assert len(flows) == count
    return flows


@each_family
@pytest.mark.parametrize(
    "way", [WAYS["redirect"], WAYS["original"]], ids=["redirect", "original"]
)
def test_many_at_once(
    network: Gateway, way: Way, family: Addresses, tmp_path: Path
) -> None:
    """200 clients: each is seen by its own address and port, and answered."""
    with (
        network.relaying(*way.args(family)),
        bound(network.server, family, family.server, PORT) as server,
        network.captured(tmp_path) as wires,
        ExitStack() as stack,
    ):
        host = way.host(family)
        clients = [
            stack.enter_context(client_of(network, family, host)) for _ in range(MANY)
        ]
        for number, client in enumerate(clients):
            client.send(number.to_bytes(4))
        seen = {}
        for _ in clients:
            data, peer = server.recvfrom(100)
            seen[at(*peer[:2])] = int.from_bytes(data)
            server.sendto(data * 2, peer)
        assert seen == {end(each): number for number, each in enumerate(clients)}
        for number, client in enumerate(clients):
            assert client.recv(100) == number.to_bytes(4) * 2
        ends = (at(host, PORT), at(family.server, PORT))
        for packets, far in zip(wires.packets(), ends, strict=True):
            ways = set().union(*(both_ways(each, far) for each in seen))
            assert {each.way for each in packets} == ways
            assert len(packets) == 2 * MANY


@each_family
def test_two_destinations_of_one_client(network: Gateway, family: Addresses) -> None:
    """One socket of a client's asks two servers: each answers by its own address."""
    words = "-l udp:{every}:{port} -d udp:original --transparent "
    words += "--intercept {server}:53 --intercept {other}:53"
    hosts = (family.server, family.other)
    args = Way(words, "server", False).args(family)
    with network.relaying(*args) as running, ExitStack() as on:
        servers = {
            host: on.enter_context(bound(network.server, family, host, PORT))
            for host in hosts
        }
        client = on.enter_context(bound(network.client, family, family.client, 0))
        for data in (b"one", b"two"):
            for host, server in servers.items():
                client.sendto(data, (host, PORT))
                heard, peer = server.recvfrom(100)
                assert (heard, at(*peer[:2])) == (data, end(client))
                server.sendto(host.encode(), peer)
                answer, whose = client.recvfrom(100)
                assert (answer.decode(), whose[:2]) == (host, (host, PORT))
        flows = ended(running, 2)
        assert {each["server"] for each in flows} == {at(host, PORT) for host in hosts}
        assert {each["listener"] for each in flows} == {
            each["server"] for each in flows
        }


#: Of a datagram: in one packet, in two, in many, and the largest that there is.
SIZES = [0, 1400, 1500, 4000, 65507]


@each_family
def test_datagrams_in_fragments(network: Gateway, family: Addresses) -> None:
    """Those of servers are put together, by nothing else than this relay's rules."""
    way = WAYS["direct"]
    with (
        network.relaying(*way.args(family)),
        bound(network.server, family, family.server, PORT) as server,
        client_of(network, family, way.host(family)) as client,
    ):
        for size in SIZES:
            data = random.Random(size).randbytes(size)
            client.send(data)
            heard, peer = server.recvfrom(UNREAD)
            assert (heard, at(*peer[:2])) == (data, end(client))
            server.sendto(data[::-1], peer)
            assert client.recv(UNREAD) == data[::-1]


@each_family
def test_a_server_that_is_not_there(
    network: Gateway, family: Addresses, tmp_path: Path
) -> None:
    """Its machine's error (ICMP) comes to the relay, which asks another server.

    The client, whose address it is about, hears nothing of it.
    """
    words = "-l udp:{asked}:53 -d udp:{other}:53 -d udp:{server}:53 --transparent"
    way = Way(words, "asked", False)
    args = (*way.args(family), "--max-fails", "1")
    with (
        network.relaying(*args) as running,
        bound(network.server, family, family.server, PORT) as server,
        network.captured(tmp_path) as wires,
        client_of(network, family, family.asked) as client,
    ):
        # The datagram of the one that is not there goes to the other.
        assert asks(client, server, b"question") == end(client)
        running.wait_for("is out: a dial has failed")
        inside, outside = wires.packets()
        assert {each.kind for each in inside} == {"udp"}
        assert "icmp" in {each.kind for each in outside}


def test_a_clash_of_addresses(network: Gateway, tmp_path: Path) -> None:
    """Another program has the client's address and port: nothing is relayed.

    Least of all from the relay's own address.
    """
    family, way = V4, WAYS["direct"]
    with (
        network.relaying(*way.args(family)) as running,
        bound(network.server, family, family.server, PORT) as server,
        network.captured(tmp_path) as wires,
        client_of(network, family, way.host(family)) as client,
    ):
        with network.relay.inside(), socket.socket(type=socket.SOCK_DGRAM) as foreign:
            foreign.setsockopt(socket.IPPROTO_IP, IP_TRANSPARENT, 1)
            foreign.bind(client.getsockname())
            client.send(b"question")
            running.wait_for(end(client))
            assert wires.packets()[1] == []
        assert asks(client, server, b"question") == end(client)
