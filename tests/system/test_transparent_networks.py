"""What docs/transparent.md says of the network around a gateway, and of its kernel.

A client comes by each way: by NAT, by TPROXY, and with datagrams.  What it is answered,
which is whom the server has seen, says whether that works.
"""

from __future__ import annotations

import re
import shlex
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.process import PATIENCE, RelayProcess, command, read_all, relay
from tests.system.gateway import INSIDE, OUTSIDE, V4, Gateway, stopped
from tests.system.namespaces import Machine, connect, made
from tests.system.programs import program, run

pytestmark = pytest.mark.system

PAGE = (Path(__file__).parents[2] / "docs" / "transparent.md").read_text()

SETTINGS = """
manage_netfilter = true
drain_timeout = "0"

[defaults]
connect_timeout = "1s"

[tcp.nat]
listen = "192.168.0.2:16000"
intercept = "192.168.0.2:80"
dest = "192.168.0.1:80"
transparent = true

[tcp.tproxy]
listen = "16001"
intercept = "192.168.0.0/24:8080"
dest = "original"
transparent = true

[udp.dns]
listen = "192.168.0.2:53"
dest = "192.168.0.1:53"
transparent = true

[tcp.near]
listen = "192.168.0.2:16003"
dest = "127.0.0.1:8081"
transparent = true
"""

#: How many listeners that has.
LISTENERS = 5

#: What the servers answer if all is well, by each way.
CLIENT = [V4.client] * 3


@contextmanager
def server(machine: Machine, host: str, port: int) -> Iterator[None]:
    """A server that answers whom it has seen."""
    with machine.inside():
        sock = socket.create_server((host, port))

    def serve() -> None:
        with suppress(OSError):
            while True:
                connection, peer = sock.accept()
                with connection:
                    connection.sendall(peer[0].encode())

    yield from _serving(sock, serve)


@contextmanager
def name_server(machine: Machine, host: str) -> Iterator[None]:
    """The same, with datagrams; an empty one is its last."""
    with machine.inside():
        sock = socket.socket(type=socket.SOCK_DGRAM)
    sock.bind((host, 53))

    def serve() -> None:
        with suppress(OSError):
            while True:
                data, peer = sock.recvfrom(100)
                if not data:
                    return
                sock.sendto(peer[0].encode(), peer)

    yield from _serving(sock, serve)


def _serving(sock: socket.socket, serve: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        # It wakes who waits there; of datagrams, though it is not connected.
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        thread.join()
        sock.close()


def asks(machine: Machine, host: str, port: int, source: str = "") -> str:
    """What a client is answered; nothing if it is not served."""
    with machine.inside():
        client = socket.create_connection((host, port), PATIENCE, (source, 0))
    with client, suppress(ConnectionResetError):
        return read_all(client).decode()
    return ""


def sends(machine: Machine, host: str) -> str:
    """The same of one with datagrams."""
    with machine.inside():
        client = socket.socket(type=socket.SOCK_DGRAM)
    with client:
        client.settimeout(1)
        client.connect((host, 53))
        client.send(b"?")
        try:
            return client.recv(100).decode()
        except TimeoutError:
            return ""


def by_each_way(network: Gateway) -> list[str]:
    return [
        asks(network.client, V4.asked, 80),
        asks(network.client, V4.server, 8080),
        sends(network.client, V4.asked),
    ]


@pytest.fixture
def running(network: Gateway, tmp_path: Path) -> Iterator[RelayProcess]:
    """A relay for each way, and what they lead to."""
    file = tmp_path / "relayd.toml"
    file.write_text(SETTINGS)
    with ExitStack() as stack:
        for port in (80, 8080):
            stack.enter_context(server(network.server, V4.server, port))
        stack.enter_context(name_server(network.server, V4.server))
        options = ("--config", str(file))
        started = stack.enter_context(relay(*options, namespace=network.relay.name))
        started.listening(LISTENERS)
        assert by_each_way(network) == CLIENT
        yield started
        # Its rules go with it.
        stopped(started)


@contextmanager
def set_to(machine: Machine, name: str, value: int) -> Iterator[None]:
    """A setting of a machine's kernel, for the length of a block."""
    with machine.inside():
        before = int(Path("/proc/sys/net", name).read_text())
    machine.set(name, value)
    try:
        yield
    finally:
        machine.set(name, before)


@contextmanager
def firewall(machine: Machine, *chains: str) -> Iterator[None]:
    """A table of the operator's own, for the length of a block."""
    text = "".join(
        f"chain c{number} {{\n{each}\n}}\n" for number, each in enumerate(chains)
    )
    run(*machine.runs(program("nft"), f"table inet own {{\n{text}}}"))
    try:
        yield
    finally:
        run(*machine.runs("nft", "delete table inet own"))


def test_settings_of_the_kernel(network: Gateway, running: RelayProcess) -> None:
    """Each, and what the page says about it."""
    for name, value in (
        ("ipv4/ip_forward", 0),
        *(
            (f"ipv4/conf/{each}/rp_filter", value)
            for value in (0, 2)
            for each in ("all", INSIDE, OUTSIDE)
        ),
        *((each, 1) for each in BY_MARKS),
    ):
        assert f"**{name.rpartition('/')[2]}**" in PAGE
        with set_to(network.relay, name, value):
            assert by_each_way(network) == CLIENT, (name, value)


#: What has the kernel look at marks where it would not.
BY_MARKS = ("ipv4/conf/all/src_valid_mark", "ipv4/tcp_fwmark_accept")


@contextmanager
def routes_elsewhere(machine: Machine) -> Iterator[None]:
    """A machine's networks are in a table that a routing rule of its own names."""
    ip = (program("ip"), "-n", machine.name)
    found = run(*ip, "-4", "route", "list").splitlines()
    ways = [each.split() for each in found if "/" in each.split()[0]]
    table, named = ("table", "100"), ("pref", "10000", "lookup", "100")
    with ExitStack() as stack:
        for each in ways:
            run(*ip, "route", "add", *each, *table)
            run(*ip, "route", "del", *each)
            stack.callback(run, *ip, "route", "del", *each, *table)
            stack.callback(run, *ip, "route", "add", *each)
        run(*ip, "rule", "add", *named)
        stack.callback(run, *ip, "rule", "del", *named)
        assert len(ways) == 2
        yield


def test_routes_by_other_rules(network: Gateway, running: RelayProcess) -> None:
    """The main table does not know the clients, nor the servers."""
    with routes_elsewhere(network.relay):
        assert by_each_way(network) == CLIENT
        for name in BY_MARKS:
            with set_to(network.relay, name, 1):
                assert by_each_way(network) == CLIENT, name


def test_a_firewall(network: Gateway, running: RelayProcess) -> None:
    """Its input chain sees clients, and the answers of servers."""
    head = "type filter hook input priority filter; policy drop;"
    clients = "tcp dport { 16000, 8080 } accept\nudp dport 53 accept"
    answers = "ct state established accept"
    assert f"`{answers}`" in PAGE
    with firewall(network.relay, f"{head}\n{clients}\n{answers}"):
        assert by_each_way(network) == CLIENT
    with firewall(network.relay, f"{head}\n{clients}"):
        assert by_each_way(network) == ["", "", ""]


def test_nat_of_the_gateways_own(network: Gateway, running: RelayProcess) -> None:
    head = "type nat hook postrouting priority srcnat;"
    with firewall(network.relay, f"{head}\noifname {OUTSIDE} masquerade"):
        assert by_each_way(network) == [V4.asked] * 3


def test_without_connection_tracking(network: Gateway, running: RelayProcess) -> None:
    """Of what is not brought by NAT, and of the servers' side."""
    come = f"type filter hook prerouting priority raw;\niifname {OUTSIDE} notrack"
    go = f"type filter hook output priority raw;\noifname {OUTSIDE} notrack"
    tproxy = f"iifname {INSIDE} tcp dport 8080 notrack"
    with firewall(network.relay, f"{come}\n{tproxy}", go):
        assert by_each_way(network) == CLIENT


def test_a_client_in_the_servers_network(
    network: Gateway, running: RelayProcess
) -> None:
    """It is answered past the relay."""
    assert asks(network.server, V4.asked, 16000, V4.other) == ""
    running.ended("connect_timeout")


def test_a_server_on_the_gateway(network: Gateway, running: RelayProcess) -> None:
    """Past the relay, too, unless a routing rule brings it back."""
    [words] = re.findall(r"`ip (rule add pref 4000 .*?)`", PAGE)
    with server(network.relay, "127.0.0.1", 8081):
        assert asks(network.client, V4.asked, 16003) == ""
        running.ended("connect_timeout")
        run(*network.relay.runs("ip", *words.split()))
        try:
            assert asks(network.client, V4.asked, 16003) == V4.client
        finally:
            run(*network.relay.runs("ip", "rule", "del", "pref", "4000"))


def test_a_user_that_has_one_right(network: Gateway, tmp_path: Path) -> None:
    """As the page starts it; the rules are root's."""
    [line] = re.findall(r"^    (setpriv .*)$", PAGE, re.MULTILINE)
    words = shlex.split(line.replace("=relayd ", "=65534 "))
    rights = words[: words.index("twistd")]
    assert words[len(rights) :] == shlex.split(
        "twistd -n --pidfile= relayd --config /etc/relayd/relayd.toml"
    )
    options = ("-l", "16000", "-d", f"{V4.server}:80", "--transparent")
    file = tmp_path / "relayd.toml"
    file.write_text(SETTINGS)
    network.relayctl("netfilter", "apply", "--config", file)
    try:
        with (
            server(network.server, V4.server, 80),
            relay(*options, twistd=network.relay.runs(*rights, *command())),
        ):
            assert asks(network.client, V4.asked, 80) == V4.client
    finally:
        network.relayctl("netfilter", "remove", "--config", file)


#: A client behind a router, its router, and what is more than their link takes.
BEHIND, ROUTER, LINK, LARGE = "10.77.0.1", "10.77.0.2", 1400, 1450


def test_replies_larger_than_a_link_takes(network: Gateway, tmp_path: Path) -> None:
    """Of a server that the client has asked itself: routers split them.

    The kernel does not learn of the link, so that no later one would arrive either.
    """
    file = tmp_path / "relayd.toml"
    file.write_text(
        "manage_netfilter = true\n[udp.any]\n"
        'listen = "16001"\nintercept = "192.168.0.0/24:5353"\n'
        'dest = "original"\ntransparent = true\n'
    )
    ip, router = program("ip"), network.client
    with made("behind") as (behind,), ExitStack() as stack:
        connect("cable", (behind, [f"{BEHIND}/30"]), (router, [f"{ROUTER}/30"]))
        for machine in (behind, router):
            run(ip, "-n", machine.name, "link", "set", "cable", "mtu", str(LINK))
        for machine, to, by in (
            (behind, "default", ROUTER),
            (network.relay, f"{BEHIND}/32", V4.client),
        ):
            run(ip, "-n", machine.name, "route", "add", to, "via", by)
        stack.callback(
            run, ip, "-n", network.relay.name, "route", "del", f"{BEHIND}/32"
        )
        stack.enter_context(set_to(router, "ipv4/ip_forward", 1))
        options = ("--config", str(file))
        started = stack.enter_context(relay(*options, namespace=network.relay.name))
        started.listening(2)
        with network.server.inside():
            answers = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        answers.bind((V4.server, 5353))
        with behind.inside():
            client = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        for each in (client, answers):
            each.settimeout(PATIENCE)
        client.connect((V4.server, 5353))
        client.send(b"?")
        _, seen = answers.recvfrom(100)
        assert seen[0] == BEHIND
        answers.sendto(bytes(LARGE), seen)
        assert client.recv(2 * LARGE) == bytes(LARGE)
        stopped(started)
