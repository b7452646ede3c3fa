"""The UDP relay over real sockets: a `twistd` process, and plain clients and servers.

How the tests share a relay is in `tests/support/live_udp.py`.
"""

from __future__ import annotations

import random
import select
import time
from contextlib import ExitStack

import pytest

from tests.support.live_udp import (
    LISTEN,
    Stage,
    balanced,
    exchange,
    nothing_came,
    server,
    stage,
)
from tests.support.ports import free_port
from tests.support.process import (
    DATAGRAM,
    PATIENCE,
    Server,
    UdpServer,
    connect,
    read_exactly,
    udp_client,
)

__all__ = ["server", "stage"]

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


#: Of datagrams: at and around what other relays cut, and the most that IPv4 has.
SIZES = (0, 1, 512, 1472, 8192, 8193, 65507)


#: The most that IPv6 has.
MAX_IPV6 = 65527


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
    # And that the client is not given.
    with UdpServer("127.0.0.77", free_port()) as server:
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
