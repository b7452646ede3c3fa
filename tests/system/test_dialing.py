"""How servers are dialled: ports, interfaces, marks, rights and user timeouts.

In namespaces of their own: there the kernel's range of ports is ours to set.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.process import (
    PATIENCE,
    START,
    RelayProcess,
    read_all,
    read_exactly,
    relay,
)
from tests.system.namespaces import OUTSIDE, PROXY, SERVER, Machines, machines
from tests.system.programs import program, run

pytestmark = [pytest.mark.system, pytest.mark.usefixtures("connections_of")]

#: How many ports the proxy's kernel hands out, and the first of them.
PORTS, FIRST = 4, 50000

#: A second address of the proxy's, and of the server's.
OTHER_SOURCE, OTHER_SERVER = "10.231.9.33", "10.231.9.34"


@pytest.fixture
def network() -> Iterator[Machines]:
    with machines() as three:
        yield three


def ip(network: Machines, where: str, *args: str) -> None:
    machine = getattr(network, where)
    run(program("ip"), "-n", machine.name, *args)


def few_ports(network: Machines) -> None:
    """The proxy's kernel has only so many."""
    with network.proxy.inside():
        setting = Path("/proc/sys/net/ipv4/ip_local_port_range")
        setting.write_text(f"{FIRST} {FIRST + PORTS - 1}")


@contextmanager
def listening(network: Machines, *hosts: str) -> Iterator[list[socket.socket]]:
    """Servers at the server's addresses."""
    with ExitStack() as stack:
        made = []
        for host in hosts:
            with network.server.inside():
                sock = stack.enter_context(socket.create_server((host, 0)))
            sock.settimeout(PATIENCE)
            made.append(sock)
        yield made


@contextmanager
def dialling(network: Machines, *options: str) -> Iterator[RelayProcess]:
    # The port is none of those that the kernel hands out.
    args = ("-l", f"{PROXY}:8080", *options)
    with relay(*args, twistd=network.proxy.twistd) as running:
        yield running


def to(sock: socket.socket) -> tuple[str, str]:
    host, port = sock.getsockname()
    return "-d", f"{host}:{port}"


def client_of(network: Machines, running: RelayProcess) -> socket.socket:
    with network.client.inside():
        sock = socket.socket()
    sock.settimeout(PATIENCE)
    sock.connect((PROXY, running.port))
    return sock


def test_ports_are_bounded_for_each_server_and_not_for_all(network: Machines) -> None:
    """Twice as many connections as there are ports, to two servers."""
    few_ports(network)
    with listening(network, SERVER, SERVER) as servers, ExitStack() as stack:
        options = ("--source", OUTSIDE, *to(servers[0]), *to(servers[1]))
        running = stack.enter_context(dialling(network, *options))
        seen: list[tuple[str, int]] = []
        for number in range(2 * PORTS):
            client = stack.enter_context(client_of(network, running))
            upstream, peer = servers[number % 2].accept()
            stack.enter_context(upstream)
            client.sendall(b"%d" % number)
            assert read_exactly(upstream, 1) == b"%d" % number
            seen.append(peer)
        assert {host for host, _ in seen} == {OUTSIDE}
        every = set(range(FIRST, FIRST + PORTS))
        assert {port for _, port in seen[::2]} == every
        assert {port for _, port in seen[1::2]} == every
        # And one more than there are, to any of them, has no port.
        with client_of(network, running) as client:
            assert read_all(client) == b""
        [line] = running.wait_for(r"ending=connect_failed .*")
        assert "Cannot assign requested address" in line[0]


def test_a_route_of_the_source_s_own(network: Machines) -> None:
    """An address that is not the one that the kernel would take."""
    ip(network, "proxy", "address", "add", f"{OTHER_SOURCE}/28", "dev", "outside")
    ip(network, "server", "address", "add", f"{OTHER_SERVER}/28", "dev", "outside")
    with listening(network, OTHER_SERVER) as [server]:
        # The server has no way to the other network of the proxy's.
        options = ("--source", OTHER_SOURCE, *to(server))
        with dialling(network, *options) as running:
            with client_of(network, running):
                upstream, peer = server.accept()
                upstream.close()
                assert peer[0] == OTHER_SOURCE


def test_an_interface_is_the_only_way(network: Machines) -> None:
    """By the one on which the server is, or not at all."""
    with listening(network, SERVER) as [server]:
        with dialling(network, "--interface", "outside", *to(server)) as running:
            with client_of(network, running), server.accept()[0] as upstream:
                upstream.sendall(b"hello")
        options = ("--interface", "inside", "--connect-timeout", "1", "--retries", "0")
        with dialling(network, *options, *to(server)) as running:
            with client_of(network, running) as client:
                assert read_all(client) == b""
            running.wait_for("ending=connect_(failed|timeout)")


def test_a_mark_chooses_the_route(network: Machines) -> None:
    """Only what is marked finds the server: its route is in a table of its own."""
    ip(network, "proxy", "route", "delete", "10.231.9.0/30", "dev", "outside")
    link = ("10.231.9.0/30", "dev", "outside", "src", OUTSIDE)
    ip(network, "proxy", "route", "add", *link, "table", "100")
    ip(network, "proxy", "rule", "add", "fwmark", "0x1f", "table", "100")
    with listening(network, SERVER) as [server]:
        with dialling(network, "--mark", "0x1f", *to(server)) as running:
            with client_of(network, running), server.accept()[0] as upstream:
                upstream.sendall(b"hello")
        with dialling(network, "--retries", "0", *to(server)) as running:
            with client_of(network, running) as client:
                assert read_all(client) == b""
            [line] = running.wait_for("ending=connect_failed .*")
            assert "Network is unreachable" in line[0]


@pytest.mark.parametrize("own", [False, True], ids=["relay", "server"])
def test_datagrams_have_mark_interface_and_source(network: Machines, own: bool) -> None:
    """As their relay says, or their server."""
    ip(network, "proxy", "route", "delete", "10.231.9.0/30", "dev", "outside")
    link = ("10.231.9.0/30", "dev", "outside", "src", OUTSIDE)
    ip(network, "proxy", "route", "add", *link, "table", "100")
    ip(network, "proxy", "rule", "add", "fwmark", "31", "table", "100")
    with network.server.inside():
        server = socket.socket(type=socket.SOCK_DGRAM)
    with network.client.inside():
        client = socket.socket(type=socket.SOCK_DGRAM)
    with server, client:
        server.bind((SERVER, 0))
        server.settimeout(PATIENCE)
        client.settimeout(PATIENCE)
        where = f"udp:{SERVER}:{server.getsockname()[1]}"
        options = ["--mark", "31", "--interface", "outside", "--source", OUTSIDE]
        if own:
            where += f",mark=31,interface=outside,source={OUTSIDE}"
            options = []
        args = ("-l", f"udp:{PROXY}:0", "-d", where, *options)
        with relay(*args, twistd=network.proxy.twistd) as running:
            client.connect((PROXY, running.port))
            client.send(b"hello")
            data, peer = server.recvfrom(100)
            assert (data, peer[0]) == (b"hello", OUTSIDE)
            server.sendto(b"bye", peer)
            assert client.recv(100) == b"bye"


# -- rights


def started(network: Machines, *options: str) -> subprocess.CompletedProcess[str]:
    """A relay without any right, which can't start."""
    without = (program("setpriv"), "--bounding-set=-all", "--inh-caps=-all")
    words = network.proxy.runs(*without, "--reuid=65534", "--clear-groups")
    _, _, _, _, *twistd = network.proxy.twistd
    return subprocess.run(
        [*words, *twistd, "relayd", "-l", f"{PROXY}:0", "-d", f"{SERVER}:9", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=START,
        cwd="/",
    )


def test_a_mark_without_the_right(network: Machines) -> None:
    """One line, before anything listens."""
    refused = started(network, "--mark", "7")
    assert refused.returncode == 1
    said = (refused.stdout + refused.stderr).strip()
    assert said == (
        "relayd: mark 7 takes the right CAP_NET_ADMIN, or CAP_NET_RAW since Linux 5.17"
    )


def test_a_right_that_is_given_up_with_the_user(network: Machines) -> None:
    """It was there before anything listened, and is gone when dials begin."""
    _, _, _, _, *twistd = network.proxy.twistd
    args = ("-l", f"{PROXY}:8080", "-d", f"{SERVER}:9", "--mark", "7")
    ended = subprocess.run(
        network.proxy.runs(*twistd, "--uid", "65534", "relayd", *args),
        capture_output=True,
        text=True,
        check=False,
        timeout=START,
        cwd="/",
    )
    assert ended.returncode == 1
    # It logs by then.
    said = (ended.stdout + ended.stderr).strip()
    assert said.endswith(
        " relayd: mark 7 takes the right CAP_NET_ADMIN, or CAP_NET_RAW since Linux 5.17"
        " (as the user that it has become)"
    )


def test_an_interface_takes_no_right(network: Machines) -> None:
    """Since Linux 5.7: it is another problem that keeps this one from starting."""
    refused = started(network, "--interface", "outside", "--source", "192.0.2.77")
    said = (refused.stdout + refused.stderr).strip()
    assert said == "relayd: source '192.0.2.77' is no address of this machine"


# -- peers that are lost


@pytest.mark.parametrize("side", ["downstream", "upstream"])
def test_a_user_timeout_ends_what_nobody_acknowledges(
    network: Machines, side: str
) -> None:
    """With no stall timeout it is the kernel that gives up, and is the first to."""
    with listening(network, SERVER) as [server]:
        # The shortest timeout says when both connections get it.
        options = ("--stall-timeout", "0", "--user-timeout", "1.5")
        often = ("--handshake-timeout", "0.8")
        with dialling(network, *options, *often, *to(server)) as running:
            with client_of(network, running) as client, server.accept()[0] as upstream:
                ends = {"downstream": client, "upstream": upstream}
                client.sendall(b"hello")
                assert read_exactly(upstream, 5) == b"hello"
                time.sleep(0.5)
                machine = network.client if side == "downstream" else network.server
                cable = "inside" if side == "downstream" else "outside"
                machine.cable(cable, "down")
                [other] = ends.keys() - {side}
                ends[other].settimeout(PATIENCE)
                ends[other].sendall(bytes(100))
                began = time.monotonic()
                with pytest.raises(ConnectionResetError):
                    ends[other].recv(1)
                assert 1 < time.monotonic() - began < 8
                running.ended(f"{side}_lost")
