"""Flows whose servers see their clients' own addresses."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import pytest
from twisted.internet.task import Clock
from twisted.logger import capturedLogs

from relayd.datagrams import transparent as transparent_sockets
from relayd.datagrams.transparent import places
from relayd.net.dial_options import DialOptions
from relayd.udp_nat import FlowServer, Server, UdpNat
from relayd.upstreams.balance import First
from relayd.upstreams.pool import Pool
from tests.datagrams.places import PlacingBench
from tests.datagrams.support import (
    CLIENT,
    SERVER,
    FakeResolver,
    problem,
    refuse,
)

TRANSPARENT = DialOptions(transparent=True)

OTHER = ("198.51.100.2", 53)


@pytest.fixture(autouse=True)
def _left() -> Iterator[None]:
    yield
    left, places.taken = places.taken, {}
    assert not left


def transparent(servers: Any = None, **settings: Any) -> PlacingBench:
    return PlacingBench(servers, dialing=TRANSPARENT, **settings)


def test_a_flow_has_its_clients_address_and_port() -> None:
    bench = transparent()
    clients = [CLIENT, ("192.0.2.1", 4001), ("192.0.2.2", 4000)]
    for client in clients:
        bench.arrive(source=client)
        bench.answer()
    assert bench.bound == [(client, SERVER) for client in clients]
    # IP_TRANSPARENT, before it is bound.
    assert all((0, 19, 1) in each.options for each in bench.sockets)  # type: ignore[attr-defined]
    assert [to for _, to in bench.listener.sent] == clients
    bench.check()
    bench.close()
    assert [each.port for each in bench.observer.facts] == [
        f"{host}:{port}" for host, port in clients
    ]
    assert not places.taken


def test_a_server_with_a_source_of_its_own_does_not_see_it() -> None:
    own = DialOptions(source4="203.0.113.7")
    bench = transparent([Server(*SERVER, None, own), Server(*OTHER)])
    bench.arrive(source=("192.0.2.1", 1))
    bench.arrive(source=("192.0.2.1", 2))
    assert bench.bound == [
        (("203.0.113.7", 0), SERVER),
        (("192.0.2.1", 2), OTHER),
    ]
    bench.close()


def test_a_server_may_see_it_where_others_do_not() -> None:
    bench = PlacingBench([Server(*SERVER, None, TRANSPARENT), Server(*OTHER)])
    for port in (1, 2):
        bench.arrive(source=("192.0.2.1", port))
    assert bench.bound == [(("192.0.2.1", 1), SERVER), (None, OTHER)]
    bench.close()


def test_no_two_sockets_have_both_ends_the_same() -> None:
    """A client that sends to two listeners has two flows, and one server, here."""
    bench = transparent()
    second = bench.listen("203.0.113.2", 5300)
    bench.arrive()
    with capturedLogs() as logs:
        for _ in range(3):
            bench.arrive_at(second, CLIENT)
    assert bench.nat.counters.dropped == {"no_source": 3}
    [line] = logs
    assert line["why"] == (
        "no socket for a flow of 192.0.2.1: another flow of 192.0.2.1:4000 has the same"
        " server already"
    )
    # The first goes on; when it has ended, the second may begin.
    bench.answer(number=0)
    bench.check()
    bench.pass_time(400)
    bench.arrive_at(second, CLIENT)
    assert bench.bound == [(CLIENT, SERVER)]
    bench.check()
    bench.close()


def test_a_client_has_a_socket_for_each_of_its_servers() -> None:
    bench = transparent([Server(*SERVER), Server(*OTHER)])
    second = bench.listen("203.0.113.2", 5300)
    bench.arrive()
    bench.arrive_at(second, CLIENT)
    assert bench.bound == [(CLIENT, SERVER), (CLIENT, OTHER)]
    # Nobody else gets the port, as long as there was one alone; they share it now.
    assert all(each.shared for each in bench.sockets)  # type: ignore[attr-defined]
    bench.check()
    bench.close()


def test_a_client_can_not_have_more_and_more_sockets_of_one_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each makes the next one take longer."""
    monkeypatch.setattr(transparent_sockets, "MOST_ALIKE", 2)
    bench = transparent([Server(*SERVER)])
    others = [("198.51.100.2", 53), ("198.51.100.3", 53)]
    first = bench.nat.servers
    for number, address in enumerate([SERVER, *others]):
        bench.nat.servers = [Server(*address)]
        bench.arrive_at(bench.listen(f"203.0.113.{9 + number}", 5300), CLIENT)
    assert bench.bound == [(CLIENT, SERVER), (CLIENT, others[0])]
    assert bench.nat.counters.dropped == {"no_source": 1}
    bench.nat.servers = first
    bench.arrive(source=("192.0.2.9", 4000))
    assert len(bench.bound) == 3
    bench.close()


def test_a_retired_listeners_flow_gives_way() -> None:
    """What listens has moved: its clients' flows there are not in the way here."""
    bench = transparent()
    [before] = bench.nat.listeners
    second = bench.listen("203.0.113.2", 5300)
    bench.arrive()
    bench.nat.retire([before])
    bench.arrive_at(second, CLIENT)
    assert bench.nat.counters.sent == 2
    assert bench.bound == [(CLIENT, SERVER)]
    assert bench.observer.endings == ["drained"]
    bench.answer()
    bench.check()
    bench.close()


def test_a_flow_of_another_relay_gives_way_if_its_socket_was_handed_on() -> None:
    """A relay that is replaced has given its listeners' sockets away."""
    one = transparent()
    one.arrive()
    two = transparent()
    two.arrive()
    assert two.nat.counters.dropped == {"no_source": 1}
    [given] = one.nat.listeners
    given.stop_reading()
    # Two kernels, as far as these fakes know: what counts is the table of places.
    two.arrive()
    assert one.observer.endings == ["drained"]
    assert two.bound == [(CLIENT, SERVER)]
    one.close_only()
    two.check()
    two.close()


def test_an_observer_may_close_the_relay_as_a_flow_gives_way() -> None:
    bench = transparent()
    [before] = bench.nat.listeners
    second = bench.listen("203.0.113.2", 5300)
    bench.arrive()
    bench.nat.retire([before])
    ended = bench.observer.ended

    def closing(flow: Any, facts: Any) -> None:
        ended(flow, facts)
        bench.nat.close()

    bench.observer.ended = closing
    bench.arrive_at(second, CLIENT)
    assert not bench.live
    assert not places.taken
    assert not len(bench.nat.table)
    bench.check()


def test_a_clients_port_may_be_that_of_the_listener() -> None:
    """As with NTP and IKE, where both ends have it."""
    bench = transparent()
    wild = bench.listen("0.0.0.0", 123)
    for host in ("192.0.2.1", "192.0.2.2"):
        bench.arrive_at(wild, (host, 123))
    assert bench.bound == [((f"192.0.2.{n}", 123), SERVER) for n in (1, 2)]
    # It does not stay so: whoever else binds the port finds that it is taken.
    assert not wild.shared
    bench.check()
    bench.close()


@pytest.mark.parametrize(
    ("source", "server", "said"),
    [
        (
            ("192.0.2.1", 4000),
            ("2001:db8::1", 53),
            "192.0.2.1 is IPv4, and the server's IPv6",
        ),
        (
            ("2001:db8::7", 4000, 0, 0),
            SERVER,
            "2001:db8::7 is IPv6, and the server's IPv4",
        ),
        (
            ("127.0.0.5", 4000),
            SERVER,
            "127.0.0.5 never leaves this machine",
        ),
        (
            ("224.0.0.9", 4000),
            SERVER,
            "224.0.0.9 is not that of one host",
        ),
        (
            ("255.255.255.255", 4000),
            SERVER,
            "255.255.255.255 is not that of one host",
        ),
        # From another port of the server's own machine.
        ((SERVER[0], 4000), SERVER, f"{SERVER[0]} is the server's own"),
        (
            ("2001:db8::1", 4000, 0, 0),
            ("2001:db8::1", 53),
            "2001:db8::1 is the server's own",
        ),
    ],
)
def test_what_can_not_be_sent_on_is_dropped(
    source: Any, server: tuple[str, int], said: str
) -> None:
    """Never from the relay's own address."""
    bench = transparent([Server(*server)])
    with capturedLogs() as logs:
        bench.arrive(source=source)
    assert bench.nat.counters.dropped == {"no_source": 1}
    [line] = logs
    assert line["why"] == (
        f"no socket for a flow of {source[0]}: transparent: the client's address {said}"
    )
    assert not bench.live
    bench.check()
    bench.close()


@pytest.mark.parametrize(
    ("source", "where", "said"),
    [
        (("127.0.0.1", 4000), ("127.0.0.1", 53), ""),
        (("127.0.0.5", 4000), ("127.0.0.1", 53), ""),
        (("::1", 4000, 0, 0), ("::1", 53, 0, 0), ""),
        (
            ("127.0.0.1", 53),
            ("127.0.0.1", 53),
            "127.0.0.1:53 would be its own server",
        ),
        (
            ("fe80::1", 4000, 0, 1),
            ("fe80::2", 53, 0, 2),
            "transparent: the client's address fe80::1%lo is known on its link only",
        ),
    ],
)
def test_a_server_on_this_machine_may_be_sent_to(
    source: Any, where: Any, said: str
) -> None:
    """As it is dialled: its clients may have its address, on another port."""
    try:
        transparent_sockets.check_source(source, where)
    except transparent_sockets.NotAsClient as refused:
        assert refused.strerror == said
    else:
        assert not said


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EADDRNOTAVAIL])
def test_the_kernel_may_not_send_from_there(number: int) -> None:
    bench = transparent()
    bench.connect_error = problem(number)
    opened = bench.open

    def failing(family: int) -> Any:
        sock = opened(family)

        def connect(_: Any) -> None:
            raise problem(number)

        sock.connect = connect
        return sock

    bench.open = failing
    bench.arrive()
    assert bench.nat.counters.dropped.total() == 1
    assert not bench.live
    assert not places.taken
    bench.open = opened
    bench.arrive()
    assert bench.bound == [(CLIENT, SERVER)]
    bench.close()


def pool(*ends: tuple[str, int], **settings: Any) -> Pool:
    made = [FlowServer.at(Server(*end)) for end in ends]
    return Pool(made, First(), **settings)


def test_who_can_not_be_sent_on_keeps_nothing_else_out_of_the_log() -> None:
    bench = transparent()
    with capturedLogs() as logs:
        bench.arrive(source=("224.0.0.9", 4000))
        bench.open_error = problem(errno.EMFILE)
        for _ in range(2):
            bench.arrive()
    assert bench.nat.counters.dropped == {"no_source": 1, "no_flow": 2}
    assert len(logs) == 2
    bench.close()


def test_no_server_is_blamed() -> None:
    """The next is tried, which may be of the client's family."""
    servers = pool(("2001:db8::1", 53), OTHER)
    bench = transparent(servers)
    bench.arrive()
    assert bench.bound == [(CLIENT, OTHER)]
    assert [each.fails for each in servers.upstreams] == [0, 0]
    assert [each.sessions for each in servers.upstreams] == [0, 1]
    bench.check()
    bench.close()


def test_a_names_address_of_another_family_is_passed_over() -> None:
    """And stays the one for clients of its family."""
    resolver = FakeResolver()
    bench = transparent([Server("name.example", 53)], resolver=resolver)
    six, four = (10, ("2001:db8::1", 53, 0, 0)), (2, OTHER)
    resolver.last.callback([six, four])
    with capturedLogs() as logs:
        bench.arrive()
        bench.arrive(source=("2001:db8::7", 4000, 0, 0))
    assert not logs
    assert bench.bound == [
        (CLIENT, OTHER),
        (("2001:db8::7", 4000, 0, 0), ("2001:db8::1", 53, 0, 0)),
    ]
    bench.check()
    bench.close()


def test_a_flow_that_moves_keeps_its_clients_address() -> None:
    """The old socket is still open when the new one is bound."""
    bench = transparent(pool(SERVER, OTHER))
    bench.arrive()
    refuse(bench)
    assert bench.bound == [(CLIENT, OTHER)]
    assert bench.sockets[-1].sent == [b"?"]
    bench.check()
    bench.answer()
    bench.close()
    assert not places.taken


def test_a_flow_does_not_give_way_to_itself() -> None:
    """Its next server is at the address of the one that it is to leave."""
    bench = transparent(pool(SERVER, SERVER))
    [before] = bench.nat.listeners
    bench.listen("203.0.113.2", 5300)
    bench.arrive()
    bench.nat.retire([before])
    refuse(bench)
    assert not bench.observer.endings
    assert bench.bound == [(CLIENT, SERVER)]
    bench.answer(number=0)
    bench.check()
    bench.close()


def test_a_relay_is_not_led_back_to_itself() -> None:
    """The datagram would be taken for the client's, and be sent on for ever."""
    bench = PlacingBench(dialing=TRANSPARENT, host="203.0.113.1")
    port = bench.listener.number % 60000
    bench.nat.servers = [Server("203.0.113.1", port)]
    with capturedLogs() as logs:
        bench.arrive()
    assert bench.nat.counters.dropped == {"loop": 1}
    [line] = logs
    assert line["why"].endswith(f"203.0.113.1:{port} leads back to its own relay")
    assert not bench.live
    # Another program of this machine has that port at another address.
    bench.nat.servers = [Server("203.0.113.2", port)]
    bench.arrive()
    assert bench.bound == [(CLIENT, ("203.0.113.2", port))]
    bench.check()
    bench.close()


def test_relays_that_lead_to_each_other_are_found() -> None:
    """Each datagram has the client's address at both, and no socket of theirs."""
    one, two = transparent(), transparent()
    first, second = (each.listener.number % 60000 for each in (one, two))
    one.nat.servers = [Server("203.0.113.1", second)]
    two.nat.servers = [Server("203.0.113.1", first)]
    one.arrive()
    assert one.nat.counters.sent == 1
    two.arrive()
    assert two.nat.counters.dropped == {"loop": 1}
    # It is none if it goes on to somebody else.
    two.nat.servers = [Server(*SERVER)]
    two.arrive()
    assert two.bound == [(CLIENT, SERVER)]
    one.close_only()
    two.close()


def test_datagrams_of_one_flow_to_many_servers_have_no_such_address() -> None:
    with pytest.raises(ValueError, match="neither transparent nor original"):
        UdpNat(
            None,
            [Server(*SERVER)],
            clock=Clock(),
            dialing=TRANSPARENT,
            udp_balance="datagram",
            max_flows=1,
        )
