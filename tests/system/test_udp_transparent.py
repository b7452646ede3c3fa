"""Datagrams with their clients' own addresses, and to where those meant to go.

The relay runs in this process; its sockets are those of a machine between its clients
and its servers, whose kernel brings it what the rules here say.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import attrs
import pytest
from twisted.internet.task import Clock
from twisted.logger import capturedLogs

from relayd.datagrams import original_listener
from relayd.datagrams.mmsg import can_batch
from relayd.datagrams.original import OriginalServer
from relayd.datagrams.sockets import bound_socket
from relayd.datagrams.transparent import places
from relayd.net.dial_options import DialOptions
from relayd.udp_nat import Server, UdpNat
from tests.datagrams.support import FakeWatcher, Observer
from tests.system.gateway import FAMILIES, GATEWAY_PORT, Addresses, Gateway, gateway
from tests.system.namespaces import Machine
from tests.system.programs import program, run

pytestmark = pytest.mark.system

TRANSPARENT = DialOptions(transparent=True)

#: What a destination asks for that nobody but the relay is to see.
DOMAIN = 53


@pytest.fixture(scope="module")
def three() -> Iterator[Gateway]:
    with gateway() as machines:
        for flag in ("-4", "-6"):
            ip = machines.relay.runs("ip", flag)
            run(*ip, "rule", "add", "pref", "100", "fwmark", "1/1", "lookup", "100")
            run(*ip, "route", "add", "local", "default", "dev", "lo", "table", "100")
        yield machines


@pytest.fixture(params=FAMILIES, ids=["ipv4", "ipv6"])
def where(request: pytest.FixtureRequest) -> Addresses:
    found: Addresses = request.param
    return found


@contextmanager
def rules(machine: Machine, *lines: str) -> Iterator[None]:
    """A chain with these rules, for the length of a block."""
    head = "type filter hook prerouting priority mangle;"
    chain = "\n".join((head, *lines))
    text = f"table inet tests {{\nchain brought {{\n{chain}\n}}\n}}"
    run(*machine.runs(program("nft"), text))
    try:
        yield
    finally:
        run(*machine.runs("nft", "delete table inet tests"))


def brought(where: Addresses, port: int = GATEWAY_PORT) -> str:
    """The rule that brings the relay what is sent to the port of `DOMAIN`."""
    kind = "ip" if where.family == 4 else "ip6"
    return (
        f"iifname inside meta nfproto ipv{where.family} udp dport {DOMAIN}"
        f" tproxy {kind} to :{port} meta mark set 1"
    )


def answers(where: Addresses, host: str) -> str:
    """The rule that brings the relay what a server answers."""
    kind = "ip" if where.family == 4 else "ip6"
    return f"{kind} saddr {host} meta l4proto udp socket transparent 1 meta mark set 1"


@attrs.define
class Relaying:
    """A relay whose turns are the test's."""

    nat: UdpNat
    watcher: FakeWatcher
    observer: Observer
    sockets: list[Any]

    def turn(self) -> None:
        """Read what is there, once something is."""
        ready, _, _ = select.select(list(self.watcher.handlers), [], [], 10)
        assert ready, self.nat.counters.line
        for each in ready:
            if each in self.watcher.handlers:
                self.watcher.ready(each)

    def exchange(self, client: Any, server: Any, to: Any, data: bytes = b"?") -> Any:
        """A datagram goes to a server, which answers.

        :return: whom the server has seen, and where the client's answer came from.
        """
        client.sendto(data, to)
        self.turn()
        got, source = server.recvfrom(100)
        assert got == data
        server.sendto(b"!" + data, source)
        self.turn()
        answer, origin = client.recvfrom(100)
        assert answer == b"!" + data
        return source[:2], origin[:2]


@contextmanager
def relaying(
    machine: Machine, host: str, port: int, servers: Any, **settings: Any
) -> Iterator[Relaying]:
    watcher, observer = FakeWatcher(batches=True), Observer()
    with machine.inside():
        nat = UdpNat(
            None,
            servers,
            watcher=watcher,
            clock=Clock(),
            observer=observer,
            name="dns",
            **settings,
        )
        sock = bound_socket(host, port)
        assert can_batch(sock)
        nat.listen([sock])
        try:
            yield Relaying(nat, watcher, observer, [sock])
        finally:
            nat.close()
    assert not watcher.handlers
    assert not places.taken


@contextmanager
def opened(machine: Machine, *ends: tuple[str, int]) -> Iterator[list[Any]]:
    """Blocking sockets of a machine, bound there."""
    with ExitStack() as stack:
        made = []
        with machine.inside():
            for host, port in ends:
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                sock = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
                sock.settimeout(10)
                sock.bind((host, port))
                made.append(sock)
        yield made


def anywhere(where: Addresses) -> str:
    return "0.0.0.0" if where.family == 4 else "::"


def test_the_server_sees_the_client(three: Gateway, where: Addresses) -> None:
    """Its address and its port; whatever the listener is bound to."""
    for host in (where.asked, anywhere(where)):
        with (
            opened(three.client, (where.client, 4000), (where.client, DOMAIN)) as own,
            opened(three.server, (where.server, DOMAIN)) as [server],
            rules(three.relay, answers(where, where.server)),
            relaying(
                three.relay,
                host,
                DOMAIN,
                [Server(where.server, DOMAIN)],
                dialing=TRANSPARENT,
            ) as relay,
        ):
            for client in own:
                # The second one has the port of the listener.
                end = client.getsockname()[:2]
                for _ in range(3):
                    seen, origin = relay.exchange(client, server, (where.asked, DOMAIN))
                    assert seen == end
                    assert origin == (where.asked, DOMAIN)
            assert len(relay.nat.table) == 2
        assert [each.port for each in relay.observer.facts] == [
            each.client for each in relay.observer.facts
        ]


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "singly"])
@pytest.mark.parametrize("transparent", [True, False], ids=["transparent", "plain"])
@pytest.mark.parametrize("port", [GATEWAY_PORT, DOMAIN], ids=["gateway", "the-same"])
def test_clients_reach_whom_they_ask(
    three: Gateway,
    where: Addresses,
    port: int,
    transparent: bool,
    batched: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And are answered from there, whether the listener's port is the same or not."""
    if not batched:
        # As where a sandbox refuses the calls.
        monkeypatch.setattr(original_listener, "can_batch", lambda _: False)
    servers = [(where.server, DOMAIN), (where.other, DOMAIN)]
    with (
        opened(three.client, (where.client, 4000)) as [client],
        opened(three.server, *servers) as listening,
        rules(
            three.relay,
            brought(where, port),
            answers(where, where.server),
            answers(where, where.other),
        ),
        relaying(
            three.relay,
            anywhere(where),
            port,
            [OriginalServer()],
            redirected=True,
            dialing=TRANSPARENT if transparent else None,
        ) as relay,
    ):
        for end, server in zip(servers, listening, strict=True):
            for data in (b"?", b"??", b"?"):
                seen, origin = relay.exchange(client, server, end, data)
                assert origin == end
                own = (where.client, 4000)
                assert (seen == own) is transparent
                assert seen[0] == (where.client if transparent else where.asked)
        assert len(relay.nat.table) == 2
        # Who asks for the listener itself has not been redirected.
        if port == GATEWAY_PORT:
            client.sendto(b"?", (where.asked, port))
            relay.turn()
            assert relay.nat.counters.dropped == {"loop": 1}
    assert [(each.listener, each.server) for each in relay.observer.facts] == [
        (_name(end), _name(end)) for end in servers
    ]


def _name(end: tuple[str, int]) -> str:
    host, port = end
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def test_a_known_host_is_reached_at_the_port_that_was_asked_for(
    three: Gateway, where: Addresses
) -> None:
    with (
        opened(three.client, (where.client, 4000)) as [client],
        opened(three.server, (where.other, DOMAIN)) as [server],
        rules(three.relay, brought(where), answers(where, where.other)),
        relaying(
            three.relay,
            anywhere(where),
            GATEWAY_PORT,
            [OriginalServer(where.other)],
            redirected=True,
            dialing=TRANSPARENT,
        ) as relay,
    ):
        seen, origin = relay.exchange(client, server, (where.server, DOMAIN))
        assert seen == (where.client, 4000)
        assert origin == (where.server, DOMAIN)


def test_many_clients_at_once(three: Gateway, where: Addresses) -> None:
    """Each gets its own answers, and no socket is left."""
    ends = [(where.client, 20000 + number) for number in range(200)]
    with (
        opened(three.client, *ends) as clients,
        opened(three.server, (where.server, DOMAIN)) as [server],
        rules(three.relay, brought(where), answers(where, where.server)),
        relaying(
            three.relay,
            anywhere(where),
            GATEWAY_PORT,
            [OriginalServer()],
            redirected=True,
            max_flows=1000,
            max_flows_per_client=1000,
            dialing=TRANSPARENT,
        ) as relay,
    ):
        for number, client in enumerate(clients):
            client.sendto(b"%d" % number, (where.server, DOMAIN))
            if number % 50 == 49:
                relay.turn()
        while relay.nat.counters.sent < len(clients):
            relay.turn()
        for _ in clients:
            data, source = server.recvfrom(100)
            server.sendto(data, source)
        while relay.nat.counters.replies_sent < len(clients):
            relay.turn()
        for number, client in enumerate(clients):
            data, source = client.recvfrom(100)
            assert (data, source[:2]) == (b"%d" % number, (where.server, DOMAIN))
        [listener] = relay.nat.listeners
        found: Any = listener
        assert len(found._reply_sockets) == 1


def test_a_socket_goes_from_one_kind_of_relay_to_the_other(
    three: Gateway, where: Addresses
) -> None:
    """And back, if the change can't be made: each asks the kernel for its own."""
    servers = [Server(where.server, DOMAIN)]
    with (
        opened(three.client, (where.client, 4000)) as [client],
        opened(three.server, (where.server, DOMAIN)) as [server],
        rules(three.relay, brought(where, DOMAIN)),
        relaying(three.relay, anywhere(where), DOMAIN, servers) as plain,
    ):
        asked = where.server, DOMAIN
        [listener] = plain.nat.listeners
        for _ in range(2):
            seen, origin = plain.exchange(client, server, (where.asked, DOMAIN))
            assert seen[0] == where.asked
            assert origin == (where.asked, DOMAIN)
            copy: Any = socket.SocketType(fileno=os.dup(listener.sock.fileno()))
            watcher = FakeWatcher(batches=True)
            nat = UdpNat(
                None,
                [OriginalServer()],
                watcher=watcher,
                clock=Clock(),
                observer=Observer(),
                redirected=True,
            )
            nat.listen([copy])
            listener.stop_reading()
            redirected = Relaying(nat, watcher, Observer(), [copy])
            seen, origin = redirected.exchange(client, server, asked)
            assert seen[0] == where.asked
            assert origin == asked
            nat.close()
            listener.read_again()
        assert not plain.nat.counters.dropped


def test_the_servers_own_host_is_refused_as_by_tcp(
    three: Gateway, where: Addresses
) -> None:
    """It has its own address already: what it answers would never come back."""
    with (
        opened(three.server, (where.server, 4000)) as [client],
        rules(three.relay, answers(where, where.server)),
        relaying(
            three.relay,
            anywhere(where),
            DOMAIN,
            [Server(where.server, DOMAIN)],
            dialing=TRANSPARENT,
        ) as relay,
    ):
        with capturedLogs() as logs:
            client.sendto(b"?", (where.asked, DOMAIN))
            relay.turn()
        assert relay.nat.counters.dropped == {"no_source": 1}
        assert not relay.nat.table.flows
        [line] = logs
        assert line["why"] == (
            f"no socket for a flow of {where.server}: transparent: the client's address"
            f" {where.server} is the server's own"
        )


def test_a_port_that_another_program_has_is_not_taken(
    three: Gateway, where: Addresses
) -> None:
    """Even if that one would share it; one line says so."""
    with (
        opened(three.client, (where.client, 4000)) as [client],
        rules(three.relay, answers(where, where.server)),
        relaying(
            three.relay,
            where.asked,
            DOMAIN,
            [Server(where.server, DOMAIN)],
            dialing=TRANSPARENT,
        ) as relay,
        socket.socket(where.kind, socket.SOCK_DGRAM) as other,
    ):
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind((anywhere(where), 4000))
        with capturedLogs() as logs:
            for _ in range(2):
                client.sendto(b"?", (where.asked, DOMAIN))
                relay.turn()
        assert relay.nat.counters.dropped == {"no_source": 2}
        [line] = logs
        assert line["why"] == (
            f"no socket for a flow of {where.client}: another program of this machine"
            f" has {_name((where.client, 4000))}"
        )


def test_a_refusal_is_heard(three: Gateway, where: Addresses) -> None:
    """An ICMP error about what has the client's address comes to the flow."""
    l4 = "icmp" if where.family == 4 else "ipv6-icmp"
    with (
        opened(three.client, (where.client, 4000)) as [client],
        rules(
            three.relay,
            f"meta l4proto {l4} socket transparent 1 meta mark set 1",
        ),
        relaying(
            three.relay,
            where.asked,
            DOMAIN,
            [Server(where.server, DOMAIN)],
            dialing=TRANSPARENT,
        ) as relay,
    ):
        client.sendto(b"?", (where.asked, DOMAIN))
        relay.turn()
        relay.turn()
        assert relay.nat.counters.icmp_errors == 1


def test_what_a_router_brings_back_does_not_go_round_for_ever(
    three: Gateway, where: Addresses
) -> None:
    """Its hops are passed on, one less each time; nobody has to notice the circle."""
    network, host, version = (
        ("203.0.113.0/24", "203.0.113.9", "-4")
        if where.family == 4
        else ("2001:db8:9::/64", "2001:db8:9::9", "-6")
    )
    on_its_way = three.relay.runs("ip", version, "route")
    for which in ("all", "outside"):
        three.relay.set(f"ipv4/conf/{which}/rp_filter", 0)
    for way in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        three.server.set(way, 1)
    run(*on_its_way, "add", network, "via", where.server)
    try:
        with (
            opened(three.client, (where.client, 4000)) as [client],
            rules(three.relay, brought(where).removeprefix("iifname inside ")),
            relaying(
                three.relay,
                anywhere(where),
                GATEWAY_PORT,
                [OriginalServer()],
                redirected=True,
                dialing=TRANSPARENT,
            ) as relay,
        ):
            client.sendto(b"?", (host, DOMAIN))
            counters = relay.nat.counters
            while not counters.dropped:
                relay.turn()
                assert counters.received < 100
            assert counters.dropped == {"loop": 1}
            assert counters.received > 10
    finally:
        run(*on_its_way, "delete", network)
        for way in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            three.server.set(way, 0)
        for which in ("all", "outside"):
            three.relay.set(f"ipv4/conf/{which}/rp_filter", 1)
