"""Relays that dial from their clients' addresses, or to where those meant to go.

Over real sockets of this machine's own loopback, on both transports.  What rules of the
kernel bring is in `tests/system/test_redirected.py`; here a PROXY header says where a
client meant to go.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.endpoints import TCP4ServerEndpoint

from relayd.core.errors import Refused
from relayd.core.hops import streams
from relayd.core.own_listeners import OwnListeners
from relayd.core.session import Session
from relayd.filters.replacing import Replace
from relayd.net import original as net_original
from relayd.net.happy_eyeballs import NameEndpoint
from relayd.net.original import OriginalEndpoint, OriginalNameEndpoint
from relayd.net.resolving import Resolver
from relayd.preludes.proxy_protocol import preamble_of
from relayd.stream import loops
from relayd.stream.attempt import LOOP_DETAIL
from relayd.stream.loops import LoopGuard
from relayd.stream.on_behalf import NOT_REDIRECTED
from relayd.upstreams.passive import Ejector, FailLimits
from tests.support import rights
from tests.support.contracts import until
from tests.support.live_sessions import (
    KINDS,
    Kind,
    Relay,
    accepted,
    at,
    client_at,
    read,
)
from tests.support.process import Server, own_host

IPV4, IPV6 = socket.AF_INET, socket.AF_INET6


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def header(client: str, meant: tuple[Any, ...]) -> bytes:
    """What a balancer says of a client that meant to go there."""
    family = "TCP6" if ":" in client else "TCP4"
    return f"PROXY {family} {client} {meant[0]} 4321 {meant[1]}\r\n".encode()


@pytest.fixture
def held() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


# -- from the client's address


@rights.transparent
@pytest.mark.parametrize("early", [b"", b"request"])
@pytest_twisted.ensureDeferred
async def test_the_server_sees_the_client(
    kind: Kind, held: ExitStack, early: bytes
) -> None:
    server = held.enter_context(Server())
    relay = Relay(kind, kind.transparent(reactor, *at(server)))
    where = await relay.listen()
    client = held.enter_context(client_at("127.0.0.5", where, early))
    upstream = held.enter_context(await accepted(server))
    assert upstream.getpeername()[0] == "127.0.0.5"
    assert upstream.getpeername()[1] != client.getsockname()[1]
    client.sendall(b"and more")
    got = b""
    while len(got) < len(early) + 8:
        got += await read(upstream)
    assert got == early + b"and more"
    upstream.sendall(b"answer")
    assert await read(client) == b"answer"
    upstream.shutdown(socket.SHUT_WR)
    assert await read(client) == b""
    client.shutdown(socket.SHUT_WR)
    assert await read(upstream) == b""
    [session] = await relay.over()
    assert session.ending is not None
    assert session.ending.word == "done"
    assert session.client.startswith("127.0.0.5:")


@rights.transparent
@pytest_twisted.ensureDeferred
async def test_of_ipv6(kind: Kind, held: ExitStack) -> None:
    server = held.enter_context(Server(IPV6))
    relay = Relay(kind, kind.transparent(reactor, *at(server)))
    where = await relay.listen("::1")
    held.enter_context(client_at("::1", where)).close()
    upstream = held.enter_context(await accepted(server))
    assert upstream.getpeername()[0] == "::1"
    upstream.close()
    await relay.over()


@rights.transparent
@pytest.mark.parametrize("told", [None, "v1", "v2"])
@pytest_twisted.ensureDeferred
async def test_a_balancer_s_client(kind: Kind, held: ExitStack, told: Any) -> None:
    """Is the one that its header names; the server may be told as well."""
    server = held.enter_context(Server())
    relay = Relay(
        kind,
        kind.transparent(reactor, *at(server)),
        accept_proxy=["127.0.0.0/8"],
        send_proxy=told,
    )
    where = await relay.listen()
    said = header("127.0.0.7", ("192.0.2.9", 80))
    client = held.enter_context(client_at("127.0.0.1", where, said + b"hello"))
    upstream = held.enter_context(await accepted(server))
    assert upstream.getpeername()[0] == "127.0.0.7"
    got = b""
    while not got.endswith(b"hello"):
        got += await read(upstream)
    session = next(iter(relay.factory.sessions.values())).session
    preamble = preamble_of(told)
    assert got == (preamble(session) if preamble else b"") + b"hello"
    upstream.close()
    client.close()
    await relay.over()


@rights.transparent
@pytest.mark.parametrize("said", ["127.255.255.255", "224.0.0.1", "0.0.0.0"])
@pytest_twisted.ensureDeferred
async def test_a_header_can_not_have_the_relay_s_own_address_used(
    kind: Kind, held: ExitStack, said: str
) -> None:
    """The kernel would take that in the place of these."""
    server = held.enter_context(Server())
    relay = Relay(
        kind, kind.transparent(reactor, *at(server)), accept_proxy=["127.0.0.0/8"]
    )
    where = await relay.listen()
    data = header(said, ("192.0.2.9", 80))
    client = held.enter_context(client_at("127.0.0.1", where, data))
    assert await read(client) == b""
    [session] = await relay.over()
    assert session.detail == (
        f"transparent: the client's address {said} is not that of one host"
    )
    assert relay.fails == [0]
    with pytest.raises(BlockingIOError):
        server.socket.setblocking(False)
        server.socket.accept()


@rights.transparent
@pytest_twisted.ensureDeferred
async def test_another_server_sees_the_client_too(kind: Kind, held: ExitStack) -> None:
    """After one that refuses, and after one that resets at once."""
    server = held.enter_context(Server())
    resets = held.enter_context(Server())
    gone = kind.transparent(reactor, IPV4, (own_host(), 9))
    ends = [kind.transparent(reactor, *at(each)) for each in (resets, server)]
    relay = Relay(kind, gone, *ends, retries=2)
    where = await relay.listen()
    client = held.enter_context(client_at("127.0.0.5", where))
    first = await accepted(resets)
    assert first.getpeername()[0] == "127.0.0.5"
    first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    first.close()
    upstream = held.enter_context(await accepted(server))
    assert upstream.getpeername()[0] == "127.0.0.5"
    client.close()
    upstream.close()
    [session] = await relay.over()
    assert session.attempts == 3
    assert relay.fails == [1, 1, 0]


@rights.transparent
@pytest_twisted.ensureDeferred
async def test_a_server_of_the_client_s_family_is_found(
    kind: Kind, held: ExitStack
) -> None:
    """The other is not blamed."""
    other, server = held.enter_context(Server(IPV6)), held.enter_context(Server())
    ends = [kind.transparent(reactor, *at(each)) for each in (other, server)]
    relay = Relay(kind, *ends, retries=1)
    Ejector(relay.pool, relay.factory.clock, FailLimits(max_fails=1))
    where = await relay.listen()
    for _ in range(2):
        client = held.enter_context(client_at("127.0.0.5", where))
        upstream = held.enter_context(await accepted(server))
        assert upstream.getpeername()[0] == "127.0.0.5"
        client.close()
        upstream.close()
    await relay.over()
    assert relay.fails == [0, 0]
    assert not any(each.ejected for each in relay.servers)


@rights.transparent
@pytest_twisted.ensureDeferred
async def test_a_client_without_an_address(
    kind: Kind, held: ExitStack, tmp_socket: Path
) -> None:
    server = held.enter_context(Server())
    relay = Relay(kind, kind.transparent(reactor, *at(server)))
    relay.opened.append(
        await kind.unix(reactor, str(tmp_socket), 16).listen(relay.factory)
    )
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_socket))
        client.setblocking(False)
        assert await read(client) == b""
    [session] = await relay.over()
    assert session.ending is not None
    assert session.ending.word == "connect_failed"
    assert session.detail == "transparent: the client has no address"
    assert relay.fails == [0]


@rights.transparent
@pytest_twisted.ensureDeferred
async def test_a_server_by_name(kind: Kind, held: ExitStack) -> None:
    """Of its addresses, those of the client's family."""
    other, server = held.enter_context(Server(IPV6)), held.enter_context(Server())
    found = [(family, 0, 0, "", where) for family, where in (at(other), at(server))]
    resolver = Resolver(reactor, lambda _: found)
    port = at(server)[1][1]
    relay = Relay(kind, NameEndpoint(reactor, "db", port, resolver, kind.transparent))
    where = await relay.listen()
    client = held.enter_context(client_at("127.0.0.5", where))
    upstream = held.enter_context(await accepted(server))
    assert upstream.getpeername()[0] == "127.0.0.5"
    client.close()
    upstream.close()
    [session] = await relay.over()
    assert session.upstream == server.address


@rights.transparent
@pytest_twisted.ensureDeferred
async def test_a_gate_that_takes_its_time(kind: Kind, held: ExitStack) -> None:
    """Or refuses: nothing is dialled from there."""

    class Gate:
        async def enter(self, session: Session) -> Any:
            if session.client.startswith("127.0.0.6:"):
                raise Refused("not you")
            return Lease()

    class Lease:
        def release(self) -> None: ...

    server = held.enter_context(Server())
    relay = Relay(kind, kind.transparent(reactor, *at(server)), gate=Gate())
    where = await relay.listen()
    refused = held.enter_context(client_at("127.0.0.6", where))
    assert await read(refused) == b""
    client = held.enter_context(client_at("127.0.0.5", where))
    upstream = held.enter_context(await accepted(server))
    assert upstream.getpeername()[0] == "127.0.0.5"
    client.close()
    upstream.close()
    await relay.over()


@rights.transparent
@pytest_twisted.ensureDeferred
async def test_a_route_and_filters(kind: Kind, held: ExitStack) -> None:
    async def to_the_pool(conn: Any) -> Any:
        return conn.pool()

    server = held.enter_context(Server())
    relay = Relay(
        kind,
        kind.transparent(reactor, *at(server)),
        route=to_the_pool,
        server_speaks_first=True,
        filters=[Replace(b"cat", b"dog")],
    )
    where = await relay.listen()
    client = held.enter_context(client_at("127.0.0.5", where, b"a cat"))
    upstream = held.enter_context(await accepted(server))
    assert upstream.getpeername()[0] == "127.0.0.5"
    client.shutdown(socket.SHUT_WR)
    got = b""
    while part := await read(upstream):
        got += part
    assert got == b"a dog"
    client.close()
    upstream.close()
    await relay.over()


@rights.transparent
@pytest_twisted.ensureDeferred
async def test_many_at_once(kind: Kind, held: ExitStack) -> None:
    """Each from its own address."""
    server = held.enter_context(Server())
    relay = Relay(kind, kind.transparent(reactor, *at(server)))
    where = await relay.listen()
    hosts = {f"127.0.1.{number}" for number in range(1, 101)}
    clients = [held.enter_context(client_at(host, where)) for host in hosts]
    found = [held.enter_context(await accepted(server)) for _ in clients]
    assert {each.getpeername()[0] for each in found} == hosts
    for each in (*clients, *found):
        each.close()
    assert len(await relay.over()) == 100


# -- to where the client meant to go


def original(
    kind: Kind, host: str | None = None, *others: Any, **options: Any
) -> Relay:
    """A relay to there, as balancers at 127.0.0.0/8 say."""
    return Relay(
        kind,
        OriginalEndpoint(reactor, kind.dials, host),
        *others,
        accept_proxy=["127.0.0.0/8", "::1"],
        redirected=True,
        **options,
    )


@pytest.mark.parametrize("family", [IPV4, IPV6])
@pytest_twisted.ensureDeferred
async def test_each_client_goes_where_it_meant_to(
    kind: Kind, held: ExitStack, family: int
) -> None:
    """The log says where; the metrics count by what the operator has written."""
    servers = [held.enter_context(Server(family)) for _ in range(3)]
    relay = original(kind)
    where = await relay.listen("::1" if family == IPV6 else "127.0.0.1")
    client = "2001:db8::7" if family == IPV6 else "192.0.2.7"
    mine = "::1" if family == IPV6 else "127.0.0.1"
    for server in servers:
        said = header(client, at(server)[1]) + b"hello"
        sock = held.enter_context(client_at(mine, where, said))
        upstream = held.enter_context(await accepted(server))
        assert await read(upstream) == b"hello"
        sock.close()
        upstream.close()
    sessions = await relay.over()
    assert [each.upstream for each in sessions] == [each.address for each in servers]
    assert {each.server.name for each in sessions} == {"server0"}


@rights.transparent
@pytest_twisted.ensureDeferred
async def test_both_together(kind: Kind, held: ExitStack) -> None:
    server = held.enter_context(Server())
    relay = Relay(
        kind,
        OriginalEndpoint(reactor, kind.transparent),
        accept_proxy=["127.0.0.0/8"],
        redirected=True,
    )
    where = await relay.listen()
    said = header("127.0.0.7", at(server)[1])
    client = held.enter_context(client_at("127.0.0.1", where, said))
    upstream = held.enter_context(await accepted(server))
    assert upstream.getpeername()[0] == "127.0.0.7"
    client.close()
    upstream.close()
    await relay.over()


@pytest.mark.parametrize("by_name", [True, False])
@pytest_twisted.ensureDeferred
async def test_a_host_at_the_port_that_was_asked_for(
    kind: Kind, held: ExitStack, by_name: bool
) -> None:
    server = held.enter_context(Server())
    relay = original(kind, "127.0.0.1")
    if by_name:
        found = [(*at(server)[:1], 0, 0, "", at(server)[1])]
        resolver = Resolver(reactor, lambda _: found)
        relay.servers[0].endpoint = OriginalNameEndpoint(
            reactor, kind.dials, "db", resolver
        )
        relay.servers[0].dials = False
    where = await relay.listen()
    said = header("192.0.2.7", ("192.0.2.9", at(server)[1][1]))
    client = held.enter_context(client_at("127.0.0.1", where, said))
    upstream = held.enter_context(await accepted(server))
    client.close()
    upstream.close()
    [session] = await relay.over()
    assert session.upstream == server.address


@pytest_twisted.ensureDeferred
async def test_a_label_stands_before_it(kind: Kind, held: ExitStack) -> None:
    """Also of one that can't be reached."""
    server = held.enter_context(Server())
    relay = original(kind)
    relay.servers[0].label = "there"
    where = await relay.listen()
    for meant in (at(server)[1], (own_host(), 9)):
        said = header("192.0.2.7", meant)
        client = held.enter_context(client_at("127.0.0.1", where, said))
        if meant[1] != 9:
            held.enter_context(await accepted(server)).close()
        assert await read(client) == b""
        client.close()
    one, other = await relay.over()
    assert one.upstream == f"there/{server.address}"
    assert other.upstream == f"there/{own_host()}:9"
    assert other.ending is not None
    assert other.ending.word == "connect_refused"


@pytest_twisted.ensureDeferred
async def test_nobody_can_have_it_taken_out(kind: Kind, held: ExitStack) -> None:
    """Its clients choose where it leads: its failures say nothing."""
    server = held.enter_context(Server())
    relay = original(kind, None, kind.dials(reactor, *at(server)), retries=0)
    # It would be out, as there is another.
    relay.servers[1].tier = 1
    Ejector(relay.pool, relay.factory.clock, FailLimits(max_fails=1, eject_most=100))
    where = await relay.listen()
    for _ in range(3):
        said = header("192.0.2.7", (own_host(), 9))
        client = held.enter_context(client_at("127.0.0.1", where, said))
        assert await read(client) == b""
        said = header("192.0.2.7", at(server)[1])
        client = held.enter_context(client_at("127.0.0.1", where, said))
        upstream = await accepted(server)
        upstream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        upstream.close()
        assert await read(client) == b""
    sessions = await relay.over()
    words = [each.ending.word for each in sessions if each.ending]
    assert words == ["connect_refused", "upstream_reset"] * 3
    assert relay.fails == [0, 0]
    assert not relay.servers[0].ejected


# -- and back


@pytest.mark.parametrize(
    ("host", "foreign"),
    [
        *((each, False) for each in ("127.0.0.1", "0.0.0.0", "::1", "::")),
        *((each, True) for each in ("127.0.0.1", "0.0.0.0")),
    ],
)
@pytest_twisted.ensureDeferred
async def test_who_comes_to_the_listener_itself(
    kind: Kind, held: ExitStack, host: str, foreign: bool
) -> None:
    """Meant to go nowhere else."""
    relay = Relay(kind, OriginalEndpoint(reactor, kind.dials), redirected=True)
    if foreign:
        there = TCP4ServerEndpoint(reactor, 0, interface=host)
        relay.opened.append(await there.listen(relay.factory))
        port = relay.opened[0].getHost().port
    else:
        _, port = await relay.listen(host)
    near = "::1" if ":" in host else "127.0.0.1"
    client = held.enter_context(client_at(near, (near, port)))
    assert await read(client) == b""
    sessions = await relay.over()
    assert relay.factory.endings["loop"] == 1
    if not foreign:
        [session] = sessions
        assert session.detail == NOT_REDIRECTED
        assert relay.fails == [0]


@pytest_twisted.ensureDeferred
async def test_a_host_that_is_the_relay_s_own(kind: Kind, held: ExitStack) -> None:
    """At the port of its listener: nothing is dialled."""
    relay = original(kind, "127.0.0.1")
    where = await relay.listen("0.0.0.0")
    said = header("192.0.2.7", ("192.0.2.9", where[1]))
    client = held.enter_context(client_at("127.0.0.1", ("127.0.0.1", where[1]), said))
    assert await read(client) == b""
    [session] = await relay.over()
    assert session.detail == LOOP_DETAIL
    assert relay.fails == [0]


@rights.transparent
@pytest.mark.parametrize("dials", ["dials", "transparent"])
@pytest_twisted.ensureDeferred
async def test_what_is_brought_back_is_found_by_where_it_led(
    kind: Kind, held: ExitStack, monkeypatch: pytest.MonkeyPatch, dials: str
) -> None:
    """Whatever the listener's address is; as rules would bring it."""
    monkeypatch.setattr(OwnListeners, "has", lambda *_: False)
    relay = Relay(
        kind, OriginalEndpoint(reactor, getattr(kind, dials)), redirected=True
    )
    _, port = await relay.listen("0.0.0.0")
    client = held.enter_context(client_at("127.0.0.5", ("127.0.0.9", port)))
    assert await read(client) == b""
    sessions = await relay.over()
    assert relay.factory.endings["loop"] == 1
    # A round more, if this process had to wait between a SYN and its timestamp.
    assert 2 <= len(sessions) <= 5
    assert relay.fails == [0]


@rights.transparent
@pytest_twisted.ensureDeferred
async def test_a_client_with_the_ends_of_a_connection_of_the_relay_s(
    kind: Kind, held: ExitStack
) -> None:
    """Is served: it has sent another SYN."""
    server = held.enter_context(Server())
    relay = Relay(
        kind,
        OriginalEndpoint(reactor, kind.transparent),
        accept_proxy=["127.0.0.1"],
        redirected=True,
    )
    where = await relay.listen("0.0.0.0")
    said = header("127.0.0.7", at(server)[1])
    balancer = held.enter_context(client_at("127.0.0.1", where, said))
    upstream = held.enter_context(await accepted(server))
    [(name, hop)] = streams.hops.items()
    host, port = upstream.getpeername()
    assert name == f"{host}:{port}>{server.address}"
    assert hop.stamp is not None
    assert streams.is_loop(name, relay.factory, hop.stamp)
    assert not streams.is_loop(name, relay.factory, hop.stamp - 50_000)
    balancer.close()
    upstream.close()
    await relay.over()


@pytest_twisted.ensureDeferred
async def test_a_client_that_leaves_while_its_server_is_dialled(
    kind: Kind, held: ExitStack
) -> None:
    """Nothing stays."""
    full = held.enter_context(socket.socket())
    full.bind((own_host(), 0))
    full.listen(0)
    for _ in range(2):
        sock = held.enter_context(socket.socket())
        sock.setblocking(False)
        sock.connect_ex(full.getsockname())
    relay = original(kind)
    where = await relay.listen()
    said = header("192.0.2.7", full.getsockname())
    client = client_at("127.0.0.1", where, said)
    await until(lambda: bool(streams.hops))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    [session] = await relay.over()
    assert session.ending is not None
    assert session.ending.word == "client_left"


# -- what a client has asked for


@pytest_twisted.ensureDeferred
async def test_what_nothing_was_redirected_of_was_asked_for(
    kind: Kind, held: ExitStack, tmp_socket: Path
) -> None:
    """That is the listener itself, which needs no right; also one of a UNIX socket."""
    server = held.enter_context(Server())
    endpoint = kind.dials(reactor, server.socket.family, server.socket.getsockname())
    relay = Relay(kind, endpoint, translated=True)
    assert relay.factory.intercepts is None
    tcp = await relay.listen()
    relay.opened.append(
        await kind.unix(reactor, str(tmp_socket), 16).listen(relay.factory)
    )
    for family, where in ((IPV4, tcp), (socket.AF_UNIX, str(tmp_socket))):
        with socket.socket(family) as client:
            client.connect(where)
            held.enter_context(await accepted(server)).close()
    sessions = await relay.over()
    there = [f"{tcp[0]}:{tcp[1]}", f"unix:{tmp_socket}"]
    assert [each.listener for each in sessions] == there


def test_what_clients_ask_for_is_kept_within_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They choose it, each time anew; one text is kept for those who ask the same."""

    def told(number: int) -> Any:
        return IPV4, ("192.0.2.9", number)

    monkeypatch.setattr(net_original, "destination_of", told)
    nobody: Any = None
    asked = [
        LoopGuard.asked_for(nobody, number) for number in range(loops.REMEMBERED + 9)
    ]
    assert LoopGuard.asked_for(nobody, loops.REMEMBERED + 8) is asked[-1]
    assert loops._same.cache_info().currsize == loops.REMEMBERED
    loops._same.cache_clear()
