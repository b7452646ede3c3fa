"""What rules of the kernel bring to a relay in this process, and what comes back to it.

The relay's sockets are those of a machine between its clients and its servers; its
rules are written by hand here, so that each way is tried alone.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor

from relayd.core.addresses import socket_name
from relayd.core.hops import streams
from relayd.net.dial_options import DialOptions, is_transparent
from relayd.net.listening import AdoptedListenerEndpoint
from relayd.net.original import OriginalEndpoint
from relayd.net.with_options import having
from relayd.plane.endpoints import PlaneAdoptedListenerEndpoint
from relayd.preludes.proxy_protocol import write_version_1, write_version_2
from relayd.stream.attempt import LOOP_DETAIL
from tests.support.contracts import until
from tests.support.live_sessions import KINDS, TRANSPARENT, Kind, Relay, accepted, read
from tests.system.gateway import FAMILIES, GATEWAY_PORT, PORT, Addresses, Gateway
from tests.system.gateway import gateway as made_gateway
from tests.system.namespaces import Machine
from tests.system.programs import program, run

pytestmark = pytest.mark.system

#: How the relay is given what was meant for others.
WAYS = ("redirect", "dnat", "tproxy")

HEADERS = {"v1": write_version_1, "v2": write_version_2}

#: The mark of packets that are for this machine, whatever their address; and of what
#: the relay sends, where that is not to be brought back to it.
MARK, OWN_MARK = 1, 2


@pytest.fixture(scope="module")
def three() -> Iterator[Gateway]:
    with made_gateway() as machines:
        for flag in ("-4", "-6"):
            ip = machines.relay.runs("ip", flag)
            rule = f"rule add pref 100 fwmark {MARK}/{MARK} lookup 100"
            run(*ip, *rule.split())
            run(*ip, *["route", "add", "local", "default", "dev", "lo", "table", "100"])
        yield machines


@pytest.fixture(params=FAMILIES, ids=["ipv4", "ipv6"])
def where(request: pytest.FixtureRequest) -> Addresses:
    found: Addresses = request.param
    return found


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def held() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@contextmanager
def rules(machine: Machine, text: str) -> Iterator[None]:
    """The chains of a table, for the length of a block."""
    run(*machine.runs(program("nft"), f"table inet tests {{\n{text}\n}}"))
    try:
        yield
    finally:
        run(*machine.runs("nft", "delete table inet tests"))


def brought(way: str, where: Addresses, link: str = "iifname inside") -> str:
    """What brings the relay connections to `PORT`."""
    kind = "ip" if where.family == 4 else "ip6"
    what = f"{link} meta nfproto ipv{where.family} tcp dport {PORT}"
    if way == "tproxy":
        hook = "type filter hook prerouting priority mangle;"
        to = f"tproxy {kind} to :{GATEWAY_PORT} meta mark set {MARK}"
    else:
        hook = "type nat hook prerouting priority dstnat;"
        to = f"redirect to :{GATEWAY_PORT}"
        if way == "dnat":
            host = f"[{where.asked}]" if where.family == 6 else where.asked
            to = f"dnat {kind} to {host}:{GATEWAY_PORT}"
    return f"chain brought {{ {hook}\n{what} {to}\n}}\n"


ANSWERS = f"""
chain answers {{ type filter hook prerouting priority mangle + 1;
meta l4proto tcp socket wildcard 0 socket transparent 1 meta mark set {MARK}
}}
"""


def every(where: Addresses) -> str:
    return "::" if where.family == 6 else "0.0.0.0"


def serving(machine: Machine, where: Addresses, *hosts: str) -> list[socket.socket]:
    """Servers at some addresses of a machine."""
    with machine.inside():
        return [
            socket.create_server((each, PORT), family=where.kind, backlog=1000)
            for each in hosts
        ]


def asking(machine: Machine, host: str, own: Any = None) -> socket.socket:
    """A client that is being connected."""
    with machine.inside():
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setblocking(False)
    if own is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(own)
    sock.connect_ex((host, PORT))
    return sock


class At:
    """A server that its socket alone is known of."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock


async def served(held: ExitStack, server: socket.socket, client: socket.socket) -> Any:
    """Both ends say something; whom the server has seen."""
    there: Any = At(server)
    upstream = held.enter_context(await accepted(there))
    client.sendall(b"hello")
    assert await read(upstream) == b"hello"
    upstream.sendall(b"welcome")
    assert await read(client) == b"welcome"
    return upstream


@pytest.mark.parametrize("way", WAYS)
@pytest_twisted.ensureDeferred
async def test_clients_reach_whom_they_ask(
    three: Gateway, where: Addresses, kind: Kind, held: ExitStack, way: str
) -> None:
    servers = serving(three.server, where, where.server, where.other)
    for each in servers:
        held.enter_context(each)
    held.enter_context(rules(three.relay, brought(way, where)))
    held.enter_context(three.relay.inside())
    relay = Relay(kind, OriginalEndpoint(reactor, kind.dials), redirected=True)
    held.callback(relay.stop)
    await relay.listen(every(where), GATEWAY_PORT)
    for server in servers * 2:
        host = server.getsockname()[0]
        client = held.enter_context(asking(three.client, host))
        upstream = await served(held, server, client)
        assert upstream.getpeername()[0] == where.asked
        client.close()
        upstream.close()
    sessions = await relay.over()
    assert [each.upstream for each in sessions] == [
        f"[{host}]:{PORT}" if where.family == 6 else f"{host}:{PORT}"
        for host in (where.server, where.other) * 2
    ]
    assert not relay.factory.endings["loop"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("version", HEADERS)
@pytest_twisted.ensureDeferred
async def test_servers_are_told_what_clients_ask_for(
    three: Gateway,
    where: Addresses,
    kind: Kind,
    held: ExitStack,
    version: str,
    way: str,
) -> None:
    """By the PROXY header and by the log, whatever the kernel has made of it."""
    [server] = serving(three.server, where, where.server)
    held.enter_context(server)
    held.enter_context(rules(three.relay, brought(way, where)))
    held.enter_context(three.relay.inside())
    relay = Relay(
        kind,
        kind.dials(reactor, where.kind, server.getsockname()),
        send_proxy=version,
        translated=way != "tproxy",
        redirected=way == "tproxy",
    )
    held.callback(relay.stop)
    # An address of its own, for which no client asks.
    await relay.listen(every(where), GATEWAY_PORT)
    [port] = relay.opened
    assert is_transparent(port._socket) == (way == "tproxy")
    asked = (where.asked, where.other)
    for host in asked:
        client = held.enter_context(asking(three.client, host))
        there: Any = At(server)
        upstream = held.enter_context(await accepted(there))
        client.sendall(b"hello")
        ends = socket_name(client.getsockname()), socket_name((host, PORT))
        told = HEADERS[version](*ends) + b"hello"
        got = b""
        while len(got) < len(told):
            got += await read(upstream)
        assert got == told
        client.close()
        upstream.close()
    sessions = await relay.over()
    assert [each.listener for each in sessions] == [
        socket_name((host, PORT)) for host in asked
    ]


@pytest_twisted.ensureDeferred
async def test_who_was_not_redirected_asks_for_the_listener(
    three: Gateway, where: Addresses, kind: Kind, held: ExitStack
) -> None:
    [server] = serving(three.server, where, where.server)
    held.enter_context(server)
    held.enter_context(three.relay.inside())
    dials = kind.dials(reactor, where.kind, server.getsockname())
    relay = Relay(kind, dials, translated=True)
    held.callback(relay.stop)
    await relay.listen(every(where), PORT)
    client = held.enter_context(asking(three.client, where.asked))
    upstream = await served(held, server, client)
    client.close()
    upstream.close()
    [session] = await relay.over()
    assert session.listener == socket_name((where.asked, PORT))


@pytest.mark.parametrize("way", WAYS)
@pytest_twisted.ensureDeferred
async def test_ipv4_clients_of_a_listener_of_both(
    three: Gateway, kind: Kind, held: ExitStack, way: str
) -> None:
    """As systemd passes one on."""
    where = FAMILIES[0]
    [server] = serving(three.server, where, where.server)
    held.enter_context(server)
    held.enter_context(rules(three.relay, brought(way, where)))
    held.enter_context(three.relay.inside())
    relay = Relay(kind, OriginalEndpoint(reactor, kind.dials), redirected=True)
    held.callback(relay.stop)
    both = held.enter_context(socket.socket(socket.AF_INET6))
    both.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    both.bind(("::", GATEWAY_PORT))
    both.listen()
    adopts: Any = AdoptedListenerEndpoint
    if kind is KINDS["plane"]:
        adopts = PlaneAdoptedListenerEndpoint
    relay.opened.append(await adopts(reactor, [both.fileno()]).listen(relay.factory))
    client = held.enter_context(asking(three.client, where.server))
    upstream = await served(held, server, client)
    client.close()
    upstream.close()
    [session] = await relay.over()
    assert session.upstream == f"{where.server}:{PORT}"


@pytest_twisted.ensureDeferred
async def test_many_of_one_client_at_once(
    three: Gateway, where: Addresses, kind: Kind, held: ExitStack
) -> None:
    """From its own address, to where it meant to go: none is taken for another."""
    [server] = serving(three.server, where, where.server)
    held.enter_context(server)
    held.enter_context(rules(three.relay, brought("tproxy", where) + ANSWERS))
    held.enter_context(three.relay.inside())
    endpoint = OriginalEndpoint(reactor, having(kind.dials, TRANSPARENT))
    relay = Relay(kind, endpoint, redirected=True)
    held.callback(relay.stop)
    await relay.listen(every(where), GATEWAY_PORT)
    first = held.enter_context(asking(three.client, where.server))
    upstream = await served(held, server, first)
    seen = upstream.getpeername()
    assert seen[0] == where.client
    # The very port that the relay has chosen; of the same kernel, and so with the same
    # timestamps, but for the time.
    later = reactor.seconds() + 0.02
    await until(lambda: reactor.seconds() > later)
    client = held.enter_context(asking(three.client, where.server, seen))
    assert client.getsockname() == seen
    second = await served(held, server, client)
    assert second.getpeername()[0] == where.client
    for each in (first, upstream, client, second):
        each.close()
    many = [held.enter_context(asking(three.client, where.server)) for _ in range(200)]
    for _ in many:
        there: Any = At(server)
        held.enter_context(await accepted(there)).close()
    for each in many:
        each.close()
    assert len(await relay.over()) == 202
    assert not relay.factory.endings["loop"]


@pytest.mark.parametrize("way", ["redirect", "tproxy", "transparent"])
@pytest_twisted.ensureDeferred
async def test_what_the_relay_sends_is_brought_back(
    three: Gateway, where: Addresses, kind: Kind, held: ExitStack, way: str
) -> None:
    """By rules for what leaves this machine, as an operator may write them.

    From another machine's address nothing comes back: what the listener answers goes
    there.  So the client is this machine's own.
    """
    if way == "redirect":
        own = (
            "chain own { type nat hook output priority -100;\n"
            f"tcp dport {PORT} redirect to :{GATEWAY_PORT}\n}}\n"
        )
    else:
        own = (
            "chain own { type route hook output priority mangle;\n"
            f"tcp dport {PORT} meta mark set {MARK}\n"
            f"tcp sport {PORT} meta mark set {MARK}\n}}\n"
            + brought("tproxy", where, "iifname lo")
            + ANSWERS
        )
    held.enter_context(rules(three.relay, own))
    held.enter_context(three.relay.inside())
    dials = having(kind.dials, TRANSPARENT) if way == "transparent" else kind.dials
    relay = Relay(kind, OriginalEndpoint(reactor, dials), redirected=True)
    held.callback(relay.stop)
    await relay.listen(every(where), GATEWAY_PORT)
    client = held.enter_context(asking(three.relay, where.server))
    assert await read(client) == b""
    sessions = await relay.over()
    assert relay.factory.endings["loop"] == 1
    # A round more, if this process had to wait between a SYN and its timestamp.
    assert 2 <= len(sessions) <= 5
    assert LOOP_DETAIL in [each.detail for each in sessions]
    assert relay.fails == [0]


@pytest_twisted.ensureDeferred
async def test_a_relay_that_its_rules_leave_alone(
    three: Gateway, where: Addresses, kind: Kind, held: ExitStack
) -> None:
    """By the mark of what it sends."""
    [server] = serving(three.server, where, where.server)
    held.enter_context(server)
    own = (
        "chain own { type nat hook output priority -100;\n"
        f"meta mark {OWN_MARK} return\n"
        f"tcp dport {PORT} redirect to :{GATEWAY_PORT}\n}}\n"
    )
    held.enter_context(rules(three.relay, brought("redirect", where) + own))
    held.enter_context(three.relay.inside())
    dials = having(kind.dials, DialOptions(mark=OWN_MARK))
    relay = Relay(kind, OriginalEndpoint(reactor, dials), redirected=True)
    held.callback(relay.stop)
    await relay.listen(every(where), GATEWAY_PORT)
    # One of this machine's own, and another's.
    for machine in (three.relay, three.client):
        client = held.enter_context(asking(machine, where.server))
        upstream = await served(held, server, client)
        client.close()
        upstream.close()
    await until(lambda: not relay.factory.sessions)
    await relay.over()
    assert not relay.factory.endings["loop"]
    assert not streams.hops
