"""TCP by the relay as a gateway: who the server sees, and what is on each cable.

The rows of the kernel relay's table, by their numbers:

    T1  client to relay   10.0.0.1:x > 192.168.0.2:80, and comes to the relay's port
    T2  relay to client   192.168.0.2:80 > 10.0.0.1:x, which says nothing of that port
    T3  relay to server   10.0.0.1:y > 192.168.0.1:80
    T4  server to relay   192.168.0.1:80 > 10.0.0.1:y, to the relay's socket
"""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

import attrs
import pytest

from tests.support.process import (
    PATIENCE,
    eventually,
    read_all,
    read_exactly,
    reset,
)
from tests.system.gateway import (
    GATEWAY_PORT,
    PORT,
    V4,
    V6,
    Addresses,
    Gateway,
    Translation,
    Way,
    Wires,
    accepted,
    asking,
    both_ways,
    each_family,
    end,
    listening,
    says,
)
from tests.system.wire import at

pytestmark = pytest.mark.system

#: How many clients at once.
MANY = 200

#: The client asks for an address of the relay's, or for the server itself.
WAYS = {
    "redirect": Way(
        "-l {asked}:{port} -d {server}:80 --transparent --intercept {asked}:80",
        "asked",
        True,
    ),
    "tproxy": Way(
        "-l {asked}:{port} -d {server}:80 --transparent "
        "--intercept {asked}:80,by=tproxy",
        "asked",
        False,
    ),
    "original": Way(
        "-l {every}:{port} -d original --transparent --intercept {server}:80",
        "server",
        False,
    ),
    "host-original": Way(
        "-l {asked}:{port} -d {server}:original --transparent "
        "--intercept {asked}:70-90",
        "asked",
        False,
    ),
}

for _name in ("redirect", "original"):
    _way = WAYS[_name]
    WAYS[f"{_name}-twisted"] = attrs.evolve(
        _way, options=f"{_way.options} --transport twisted"
    )

#: One by DNAT, one by TPROXY.
SOME = ["redirect", "original"]

each_way = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))


@each_family
@each_way
def test_rows(network: Gateway, way: Way, family: Addresses, tmp_path: Path) -> None:
    """T1 to T4, and the close: by the client first, then by the server first."""
    asked, served = at(way.host(family), PORT), at(family.server, PORT)
    own = at(family.asked, GATEWAY_PORT)
    with (
        network.relaying(*way.args(family)) as running,
        listening(network, family.server) as server,
        network.captured(tmp_path) as wires,
    ):
        for first in ("client", "server"):
            wires.forget()
            client = asking(network, way.host(family))
            upstream, seen = accepted(server)
            mine = end(client)
            with client, upstream:
                # The server sees the client.
                assert seen.rpartition(":")[0] == mine.rpartition(":")[0]
                says(client, upstream, b"question")
                says(upstream, client, b"answer")
                # By getsockname and getpeername of the relay's sockets.
                sockets = network.sockets("tcp")
                assert (seen, served) in sockets
                assert (own if way.rewritten else asked, mine) in sockets
                # And by what the kernel keeps in mind, for two minutes after a close
                # as well: it says what there is, not what there is not.
                if way.rewritten:
                    translated = Translation(mine, asked, own)
                    assert translated in network.translations()
                ends = (client, upstream) if first == "client" else (upstream, client)
                closes_first(*ends)
            running.ended("done", 1 if first == "client" else 2)
            inside, outside = wires.packets()
            for packets, ways, started in (
                (inside, both_ways(mine, asked), mine),
                (outside, both_ways(seen, served), seen),
            ):
                assert {each.way for each in packets} == ways
                assert not [each for each in packets if each.resets]
                assert packets[0].opens
                assert packets[0].source == started
                fins = [each.source for each in packets if each.ends]
                # Each side's own, and in the order in which they have closed.
                other = (ways - {packets[0].way}).pop().partition(" ")[0]
                order = [started, other]
                assert fins == (order if first == "client" else order[::-1])
                for source, data in ((started, b"question"), (other, b"answer")):
                    said = [each.data for each in packets if each.source == source]
                    assert data in b"".join(said)


def closes_first(one: socket.socket, other: socket.socket) -> None:
    """One has said all; the other says more, which is heard, and closes then."""
    one.shutdown(socket.SHUT_WR)
    assert read_all(other) == b""
    says(other, one, b"more")
    other.shutdown(socket.SHUT_WR)
    assert read_all(one) == b""


@each_family
def test_resets(network: Gateway, family: Addresses, tmp_path: Path) -> None:
    """A reset of either side goes the same ways to the other."""
    asked, served = at(family.asked, PORT), at(family.server, PORT)
    with (
        network.relaying(*WAYS["redirect"].args(family)) as running,
        listening(network, family.server) as server,
        network.captured(tmp_path) as wires,
    ):
        for ending in ("downstream_reset", "upstream_reset"):
            wires.forget()
            client = asking(network, family.asked)
            upstream, seen = accepted(server)
            mine = end(client)
            says(client, upstream, b"hello")
            one, other = client, upstream
            if ending == "upstream_reset":
                one, other = upstream, client
            reset(one)
            with other, pytest.raises(ConnectionResetError):
                other.recv(1)
            running.ended(ending)
            inside, outside = wires.packets()
            for packets, near, far in (
                (inside, mine, asked),
                (outside, seen, served),
            ):
                assert {each.way for each in packets} == both_ways(near, far)
                resets = {each.source for each in packets if each.resets}
                assert resets == {near if ending == "downstream_reset" else far}


def test_a_server_that_closes_last(network: Gateway, tmp_path: Path) -> None:
    """Its FIN comes to the relay, which has closed its own socket by then.

    What the kernel has kept of that socket is no whole socket any more.
    """
    family = V4
    args = (*WAYS["redirect"].args(family), "--half-close", "off")
    # It waits no longer for the server to close, too.
    args += ("--half-close-timeout", "0.2")
    with (
        network.relaying(*args) as running,
        listening(network, family.server) as server,
        network.captured(tmp_path) as wires,
    ):
        with asking(network, family.asked) as client:
            upstream, seen = accepted(server)
            with upstream:
                says(client, upstream, b"hello")
                client.shutdown(socket.SHUT_WR)
                running.ended("done")
                assert upstream.recv(1) == b""
                mini = network.sockets("tcp", "state", "fin-wait-2")
                assert (seen, at(family.server, PORT)) in mini
                wires.forget()
            # Its FIN is answered, by an ACK of the same address.
            eventually(lambda: answered(wires, seen), "the FIN is answered")
            inside, _ = wires.packets()
            assert not [each for each in inside if family.server in each.way]


def answered(wires: Wires, seen: str) -> bool:
    _, outside = wires.packets()
    closed = [each.ends for each in outside if each.destination == seen]
    assert closed.count(True) < 2, "the FIN came again"
    return any(each.source == seen and not each.resets for each in outside)


@each_family
@pytest.mark.parametrize("way", [WAYS[each] for each in SOME], ids=SOME)
def test_many_at_once(
    network: Gateway, way: Way, family: Addresses, tmp_path: Path
) -> None:
    """200 clients, each of them served by a connection of its own address."""
    asked, served = at(way.host(family), PORT), at(family.server, PORT)
    clients, upstreams = {}, {}
    with (
        network.relaying(*way.args(family)) as running,
        listening(network, family.server) as server,
        network.captured(tmp_path) as wires,
        ExitStack() as stack,
    ):
        for number in range(MANY):
            client = stack.enter_context(asking(network, way.host(family)))
            clients[end(client)] = client
            client.sendall(number.to_bytes(4))
        for _ in range(MANY):
            upstream, seen = accepted(server)
            upstreams[seen] = stack.enter_context(upstream)
        assert len(clients) == len(upstreams) == MANY
        assert {each.rpartition(":")[0] for each in upstreams} == {
            each.rpartition(":")[0] for each in clients
        }
        said = set()
        for upstream in upstreams.values():
            number = int.from_bytes(read_exactly(upstream, 4))
            said.add(number)
            upstream.sendall(number.to_bytes(4) * 1000)
        assert said == set(range(MANY))
        for number, client in enumerate(clients.values()):
            assert read_exactly(client, 4000) == number.to_bytes(4) * 1000
            client.shutdown(socket.SHUT_WR)
        for upstream in upstreams.values():
            assert read_all(upstream) == b""
            upstream.shutdown(socket.SHUT_WR)
        for client in clients.values():
            assert read_all(client) == b""
        running.ended("done", MANY)
        inside, outside = wires.packets()
        for packets, ends, far in (
            (inside, clients, asked),
            (outside, upstreams, served),
        ):
            ways = set().union(*(both_ways(each, far) for each in ends))
            assert {each.way for each in packets} == ways
            assert not [each for each in packets if each.resets]
            assert sum(each.ends for each in packets) == 2 * MANY


@pytest.mark.parametrize(("family", "other"), [(V4, V6), (V6, V4)], ids=["v4", "v6"])
def test_a_client_of_another_family(
    network: Gateway, family: Addresses, other: Addresses, tmp_path: Path
) -> None:
    """Its address can't dial the server: it is refused, and nobody else dials.

    Nothing counts against the server: who can dial it is served by it.
    """
    server = at(other.server, PORT)
    args = ["-l", str(GATEWAY_PORT), "-d", server, "--transparent", "--max-fails", "1"]
    for each in (family, other):
        args += ("--intercept", f"{at(each.asked, PORT)},by=redirect")
    with (
        network.relaying(*args) as running,
        listening(network, other.server) as listener,
        network.captured(tmp_path) as wires,
    ):
        with asking(network, family.asked) as client:
            assert read_all(client) == b""
        [line] = running.wait_for(r"ending=connect_failed .*detail=(.*)")
        assert f"transparent: the client's address {family.client} " in line[1]
        assert wires.packets()[1] == []
        with asking(network, other.asked) as client:
            upstream, seen = accepted(listener)
            with upstream:
                says(client, upstream, b"hello")
            assert seen.startswith(at(other.client, ""))


def test_with_a_proxy_header(network: Gateway) -> None:
    """Both say who the client is; and checks come from the relay's own address."""
    args = (*WAYS["redirect"].args(V4), "--send-proxy", "v1")
    args += ("--check", "tcp", "--check-every", "0.2")
    with (
        listening(network, V4.server) as server,
        network.relaying(*args),
    ):
        checks, whose = accepted(server)
        checks.close()
        assert whose.startswith(f"{V4.asked}:")
        with asking(network, V4.asked) as client:
            host, _, port = end(client).rpartition(":")
            client.sendall(b"hello")
            said = b""
            while not said:
                # Checks go on, and say nothing.
                upstream, seen = accepted(server)
                with upstream:
                    said = upstream.recv(200)
                    while said and not said.endswith(b"hello"):
                        said += upstream.recv(200)
            # Where it meant to go, and not where the kernel has brought it.
            header = f"PROXY TCP4 {host} {V4.asked} {port} {PORT}\r\n"
            assert said.decode() == f"{header}hello"
            assert seen.startswith(f"{host}:")


def test_plain_relaying(network: Gateway, tmp_path: Path) -> None:
    """What is brought to a relay that is not transparent comes from its own address.

    By T1 and T2 all the same.
    """
    family = V4
    words = "-l {asked}:{port} -d {server}:80 --intercept {asked}:80"
    way = Way(words, "asked", True)
    with (
        network.relaying(*way.args(family)),
        listening(network, family.server) as server,
        network.captured(tmp_path) as wires,
        asking(network, family.asked) as client,
    ):
        upstream, seen = accepted(server)
        with upstream:
            says(client, upstream, b"hello")
        assert seen.startswith(f"{family.asked}:")
        assert read_all(client) == b""
        inside, _ = wires.packets()
        assert {each.way for each in inside} == both_ways(
            end(client), at(family.asked, PORT)
        )


@each_family
@pytest.mark.parametrize("by", ["redirect", "tproxy"])
def test_where_the_client_meant_to_go(
    network: Gateway, by: str, family: Addresses
) -> None:
    """Without --transparent: to each of two servers, from the relay's own address."""
    words = f"-l {{every}}:{{port}} -d original --intercept {{server}}:80,by={by}"
    words += f" --intercept {{other}}:80,by={by}"
    with network.relaying(*Way(words, "server", by == "redirect").args(family)) as run:
        for number, host in enumerate((family.server, family.other), 1):
            with (
                listening(network, host) as server,
                asking(network, host) as client,
            ):
                upstream, seen = accepted(server)
                with upstream:
                    says(client, upstream, b"hello")
                    says(upstream, client, b"hello")
                assert seen.startswith(at(family.asked, ""))
            line = run.ended("done", number)[-1]
            assert line["upstream"] == at(host, PORT)


@each_family
def test_a_client_of_the_listener_itself(network: Gateway, family: Addresses) -> None:
    """It meant to go nowhere else: it is refused, and no other is."""
    way = WAYS["original"]
    with network.relaying(*way.args(family)) as running:
        with network.client.inside():
            client = socket.create_connection((family.asked, GATEWAY_PORT), PATIENCE)
        with client:
            assert read_all(client) == b""
        running.ended("loop")
        with (
            listening(network, family.server) as server,
            asking(network, way.host(family)) as client,
        ):
            upstream, _ = accepted(server)
            with upstream:
                says(client, upstream, b"hello")
