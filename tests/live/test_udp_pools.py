"""UDP relays with several servers, by `twistd relayd`, over loopback."""

from __future__ import annotations

import select
import socket
import sys
from collections import Counter
from contextlib import ExitStack

import pytest

from tests.live.test_metrics import METRICS, Samples
from tests.support.live_udp import LISTEN, balanced
from tests.support.ports import free_port
from tests.support.process import RelayProcess, UdpServer, udp_client


def port_of(running: RelayProcess) -> int:
    [line] = running.listening(1)
    return int(line.rpartition(":")[2])


def create_health(port: int) -> socket.socket:
    """What a check connects to, as often as it likes."""
    return socket.create_server(("127.0.0.1", port), backlog=1024)


def closed_port() -> str:
    """The address of a server that is not there, nor is any client."""
    return f"udp:127.0.0.1:{free_port()}"


def asked(port: int, *servers: UdpServer) -> UdpServer:
    """One client asks, and is answered by the server that this returns."""
    with udp_client(port) as client:
        client.send(b"question")
        ready, _, _ = select.select([each.socket for each in servers], [], [], 5)
        [there] = [each for each in servers if each.socket in ready]
        data, peer = there.receive()
        assert data == b"question"
        there.send(b"answer", peer)
        assert client.recv(16) == b"answer"
    return there


def test_weights_and_backups() -> None:
    with UdpServer() as large, UdpServer() as small, UdpServer() as spare:
        servers = (
            *("-d", f"{large.address},weight=3,name=large"),
            *("-d", small.address, "-d", f"{spare.address},backup"),
        )
        with balanced(*LISTEN, *servers) as running:
            port = port_of(running)
            found = Counter(asked(port, large, small, spare) for _ in range(8))
            assert found == {large: 6, small: 2}
        running.wait_for(f"server=large/127.0.0.1:{large.port} ", 6)


def test_a_server_that_refuses_costs_no_client_anything() -> None:
    """Its clients are served by the other one; then it is out."""
    with UdpServer() as server:
        servers = ("-d", closed_port(), "-d", server.address, "--max-fails", "2")
        with balanced(*LISTEN, *servers) as running:
            port = port_of(running)
            for _ in range(8):
                assert asked(port, server) is server
        # It was out from the second refusal on.
        running.wait_for("relay1: .* is out: 2 dials have failed")
        [totals] = running.wait_for(r"icmp_errors=(\d+) .* resent=(\d+)")
        assert totals.groups() == ("2", "2")


def test_a_conversation_goes_on_at_the_other_server() -> None:
    """When its own is gone; the client's port stays the same."""
    with ExitStack() as held:
        both = [held.enter_context(UdpServer()) for _ in range(2)]
        servers = [arg for each in both for arg in ("-d", each.address)]
        running = held.enter_context(balanced(*LISTEN, *servers))
        client = held.enter_context(udp_client(port_of(running)))
        client.send(b"one")
        ready, _, _ = select.select([each.socket for each in both], [], [], 5)
        [first] = [each for each in both if each.socket in ready]
        [second] = [each for each in both if each is not first]
        _, peer = first.receive()
        first.send(b"answer", peer)
        assert client.recv(16) == b"answer"
        first.close()
        for number in range(20):
            client.send(b"more %d" % number)
            if select.select([second.socket], [], [], 0.2)[0]:
                break
        data, peer = second.receive()
        assert data.startswith(b"more")
        second.send(b"from the second", peer)
        assert client.recv(16) == b"from the second"


def test_each_datagram_to_the_next_server() -> None:
    with UdpServer() as one, UdpServer() as two:
        servers = ("-d", one.address, "-d", two.address, "--udp-balance", "datagram")
        with (
            balanced(*LISTEN, *servers) as running,
            udp_client(port_of(running)) as client,
        ):
            peers = set()
            for number in range(6):
                client.send(b"%d" % number)
                there = [one, two][number % 2]
                # Which is the first is of no importance.
                if not number and not select.select([one.socket], [], [], 1)[0]:
                    one, two = two, one
                    there = one
                data, peer = there.receive()
                assert data == b"%d" % number
                peers.add(peer)
            assert len(peers) == 1
            two.send(b"unheard", peer)
            running.signal()
        [totals] = running.wait_for(r"replies_dropped=(\S+)")
        assert totals[1] in ("one_way:1", "-")


def test_metrics_know_the_servers_of_datagrams() -> None:
    dead = closed_port()
    with UdpServer() as server:
        servers = ("-d", f"{dead},weight=3", "-d", f"{server.address},name=a")
        with balanced(*METRICS, *LISTEN, *servers, "--max-fails", "1") as running:
            for _ in range(4):
                asked(int(running.listening()[0].rpartition(":")[2]), server)
            said = Samples(running)
            names = {dead.removeprefix("udp:"): 0, f"a/{server.address[4:]}": 1}
            for name, up in names.items():
                labels = {"relay": "relay1", "upstream": name}
                assert said("relayd_upstream_up", **labels) == up
                assert said("relayd_upstream_weight", **labels) == (1 if up else 3)
            flows = said("relayd_udp_flows_active", relay="relay1")
            assert said.total("relayd_upstream_sessions_active") == flows > 0


@pytest.mark.skipif(sys.platform != "linux", reason="others have one loopback address")
def test_each_server_is_sent_to_in_its_own_way() -> None:
    """Also what moves there from another."""
    with UdpServer() as server:
        own = f"{server.address},source=127.0.0.9,interface=lo"
        args = ("-d", closed_port(), "-d", own, "--source", "127.0.0.8")
        with balanced(*LISTEN, *args) as running, ExitStack() as held:
            for _ in range(2):
                client = held.enter_context(udp_client(port_of(running)))
                client.send(b"question")
                data, peer = server.receive()
                assert (data, peer[0]) == (b"question", "127.0.0.9")
                server.send(b"answer", peer)
                assert client.recv(16) == b"answer"


def test_a_conversation_leaves_a_server_that_is_down_and_a_new_one_waits() -> None:
    """Its checks ask at a port of TCP, which nobody has for a while."""
    with ExitStack() as held:
        servers = [held.enter_context(UdpServer()) for _ in range(2)]
        health = [create_health(free_port()) for _ in servers]
        ports = [each.getsockname()[1] for each in health]
        args = ["--check-every", "50ms", "--balance", "first", "--fall", "1"]
        args += ["--rise", "1", "--on-down", "cut", "--when-none", "wait=60"]
        for server, port in zip(servers, ports, strict=True):
            args += ["-d", f"{server.address},check=tcp port={port}"]
        running = held.enter_context(balanced(*LISTEN, *args))
        client = held.enter_context(udp_client(port_of(running)))
        seen = []
        for number, server in enumerate(servers):
            client.send(b"%d" % number)
            data, peer = server.receive()
            assert data == b"%d" % number
            server.send(b"answer", peer)
            assert client.recv(16) == b"answer"
            health[number].close()
            running.wait_for(f"{server.port} is down: ")
            seen.append(peer)
        running.wait_for("ending=upstream_down")
        client.send(b"held")
        client.send(b"on")
        assert not select.select([each.socket for each in servers], [], [], 0.1)[0]
        with create_health(ports[1]):
            running.wait_for(f"{servers[1].port} is up")
            assert [servers[1].receive()[0] for _ in range(2)] == [b"held", b"on"]
    assert seen[0] != seen[1]
