"""BIND on fakes: the two replies, who may come, and listeners that do not open."""

from __future__ import annotations

import pytest
from twisted.internet import error
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.interfaces import IAddress

from relayd.core.errors import ListenError
from relayd.core.session import Ending, Session
from relayd.preludes.socks4 import Code, Command, write_reply, write_request
from relayd.socks.destinations import ProxyPolicy
from relayd.socks.rules import parse_rule
from tests.conftest import LoggedFailures
from tests.support.proxies import (
    BIND,
    BIND_ANY,
    BIND_BY_NAME,
    SERVER,
    Proxy,
    Witness,
    refused,
)


def test_bind_from_accept_to_end() -> None:
    proxy = Proxy(bind_address="192.0.2.2")
    client = proxy.client(BIND)
    [listener] = proxy.listeners
    assert listener.host == "192.0.2.2"
    client.take()
    assert client.taken == write_reply(Code.GRANTED, "192.0.2.2", 7000)
    assert len(proxy.factory.binds) == 1
    proxy.clock.advance(3)
    peer = proxy.port.accept(SERVER, 20)
    assert not proxy.port.is_open, "one is enough"
    assert len(proxy.factory.binds) == 0
    client.take()
    second = write_reply(Code.GRANTED, SERVER, 20)
    assert client.taken[8:] == second
    peer.receive(b"a file")
    client.take()
    assert client.taken[16:] == b"a file"
    client.receive(b"thanks")
    peer.take()
    assert peer.taken == b"thanks"
    peer.receive_eof()
    assert client.write_shut
    client.receive_eof()
    session = proxy.session
    assert (session.up.read, session.down.read) == (6, 6)
    assert session.connected_at == session.connect_seconds == 3
    assert (session.attempts, session.queue_seconds) == (1, 0)
    assert session.upstream == f"{SERVER}:20"
    assert proxy.witness.heard == [
        "dialing bind:192.0.2.2:7000",
        f"connected {SERVER}:20",
        "closed done",
    ]
    assert proxy.dialled == []
    assert peer.getTcpNoDelay()
    proxy.over(Ending.DONE)


@pytest.mark.parametrize("opens", [True, False])
@pytest.mark.parametrize("politely", [True, False])
def test_an_observer_that_ends_a_bind_is_not_overruled(
    monkeypatch: pytest.MonkeyPatch, opens: bool, politely: bool
) -> None:
    def dialing(_: Witness, session: Session) -> None:
        protocol = proxy.factory.sessions[session.id]
        leave = protocol.end if politely else protocol.abort_session
        leave(Ending.NO_UPSTREAM, "by the observer")

    monkeypatch.setattr(Witness, "dialing", dialing)
    proxy = Proxy(opens=opens)
    client = proxy.client(BIND)
    if not opens:
        [listener] = proxy.listeners
        proxy.ports.append(listener.open())
    if politely:
        refused(client)
    assert not client.connected
    assert proxy.session.reply == (int(Code.REJECTED) if politely else None)
    assert proxy.session.detail == "by the observer"
    proxy.over(Ending.NO_UPSTREAM)


def test_what_a_client_sends_before_the_second_reply_is_kept_for_the_peer() -> None:
    proxy = Proxy()
    client = proxy.client(BIND + b"with it, ")
    client.receive(b"after the first, ")
    peer = proxy.port.accept(SERVER)
    client.receive(b"after the second")
    peer.take()
    assert peer.taken == b"with it, after the first, after the second"
    assert proxy.session.up.read == len(peer.taken)
    client.lose()


def test_another_peer_than_the_expected_is_closed_and_the_client_is_told() -> None:
    proxy = Proxy()
    client, port = proxy.bound()
    stranger = port.accept("203.0.113.13", 1313)
    assert not stranger.connected
    assert not port.is_open
    refused(client)
    assert proxy.session.reply == 91
    assert proxy.session.detail == f"203.0.113.13:1313 came instead of {SERVER}"
    proxy.over(Ending.WRONG_PEER)


def test_a_second_peer_finds_nobody() -> None:
    proxy = Proxy()
    client, port = proxy.bound()
    peer = port.accept(SERVER)
    with pytest.raises(AssertionError, match="nobody listens"):
        port.accept(SERVER)
    # One that was accepted in the same turn as the first.
    assert port.factory.buildProtocol(IPv4Address("TCP", SERVER, 4322)) is None
    client.receive(b"hello")
    peer.take()
    assert peer.taken == b"hello"
    client.lose()


def test_a_named_peer_may_come_from_each_of_its_permitted_addresses() -> None:
    for comes, ending in ((SERVER, None), ("203.0.113.8", None)):
        proxy = Proxy()
        client = proxy.client(BIND_BY_NAME)
        proxy.resolver.answer("2001:db8::1", SERVER, "203.0.113.8")
        assert proxy.policy.asked == [
            (SERVER, 80, "example.com"),
            ("203.0.113.8", 80, "example.com"),
        ]
        proxy.port.accept(comes)
        assert proxy.session.ending is ending
        client.lose()


def test_a_named_peer_may_not_come_from_an_address_that_is_denied() -> None:
    proxy = Proxy()
    proxy.policy.against = {SERVER}
    client = proxy.client(BIND_BY_NAME)
    proxy.resolver.answer(SERVER, "203.0.113.8")
    client.take()
    client.taken = b""
    assert not proxy.port.accept(SERVER).connected
    refused(client)
    proxy.over(Ending.WRONG_PEER)


@pytest.mark.parametrize(
    ("addresses", "why"),
    [
        (["192.0.2.66"], "out of bounds"),
        (["2001:db8::1"], "no IPv4 address"),
    ],
)
def test_a_named_peer_without_an_address_to_come_from(
    addresses: list[str], why: str
) -> None:
    proxy = Proxy()
    proxy.policy.against = {"192.0.2.66"}
    client = proxy.client(BIND_BY_NAME)
    proxy.resolver.answer(*addresses)
    refused(client)
    assert proxy.listeners == []
    assert why in proxy.session.detail
    proxy.over(Ending.DENIED)


@pytest.mark.parametrize("host", [SERVER, "example.com", "0.0.0.0"])
def test_bind_for_a_peer_whose_port_nobody_knows(host: str) -> None:
    """Port 0, as the memo does not forbid it; which port it comes from is no matter."""
    proxy = Proxy(bind_address="192.0.2.2", bind_any=True)
    client = proxy.client(write_request(Command.BIND, host, 0))
    if host == "example.com":
        proxy.resolver.answer(SERVER)
    client.take()
    assert client.taken == write_reply(Code.GRANTED, "192.0.2.2", 7000)
    assert proxy.session.requested == f"{host}:0"
    proxy.port.accept(SERVER, 20)
    client.take()
    assert client.taken[8:] == write_reply(Code.GRANTED, SERVER, 20)
    client.lose()


def test_bind_for_a_peer_that_is_denied() -> None:
    proxy = Proxy()
    proxy.policy.against = {SERVER}
    refused(proxy.client(BIND))
    assert proxy.listeners == []
    proxy.over(Ending.DENIED)


def test_bind_for_anyone_takes_permission() -> None:
    proxy = Proxy()
    refused(proxy.client(BIND_ANY))
    assert proxy.listeners == []
    assert "--bind-any" in proxy.session.detail
    proxy.over(Ending.DENIED)


def test_bind_for_anyone_with_permission() -> None:
    proxy = Proxy(bind_any=True)
    client = proxy.client(BIND_ANY)
    [listener] = proxy.listeners
    assert listener.host == "0.0.0.0"
    client.take()
    # Not the wildcard: what the client calls this machine.
    assert client.taken == write_reply(Code.GRANTED, "192.0.2.2", 7000)
    proxy.port.accept("203.0.113.99", 99)
    client.take()
    assert client.taken[8:] == write_reply(Code.GRANTED, "203.0.113.99", 99)
    client.lose()


def test_the_rules_are_for_whoever_comes_too() -> None:
    policy = ProxyPolicy(
        [parse_rule("--deny-dest", "203.0.113.0/24", allow=False)], guarded=False
    )
    proxy = Proxy(bind_any=True, policy=policy)
    client = proxy.client(BIND_ANY)
    client.take()
    proxy.port.accept("203.0.113.99", 99)
    client.take()
    assert client.taken[8:] == write_reply(Code.REJECTED)
    assert "--deny-dest 203.0.113.0/24" in proxy.session.detail
    proxy.over(Ending.DENIED)


def test_bind_that_is_switched_off() -> None:
    proxy = Proxy(bind=False)
    refused(proxy.client(BIND))
    assert proxy.listeners == []
    assert "--no-bind" in proxy.session.detail
    proxy.over(Ending.DENIED)


@pytest.mark.parametrize("bind_address", [None, "0.0.0.0", "192.0.2.2"])
def test_the_external_address_is_what_the_reply_names(bind_address: str | None) -> None:
    proxy = Proxy(bind_address=bind_address, external_address="203.0.113.1")
    client = proxy.client(BIND)
    client.take()
    assert client.taken == write_reply(Code.GRANTED, "203.0.113.1", 7000)
    client.lose()


def test_a_wildcard_is_named_by_the_ipv4_address_that_faces_a_mapped_client() -> None:
    proxy = Proxy(bind_address="0.0.0.0")
    facing = IPv6Address("TCP", "::ffff:192.0.2.9", 1080, 0, 0)
    client = proxy.client(BIND, facing=facing)
    assert client.dataBuffer == write_reply(Code.GRANTED, "192.0.2.9", 7000)
    assert proxy.session.upstream == "bind:192.0.2.9:7000"
    client.lose()


@pytest.mark.parametrize(
    "facing", [IPv6Address("TCP", "2001:db8::1", 1080, 0, 0), UNIXAddress("/run/x")]
)
def test_a_wildcard_that_no_reply_can_name(facing: IAddress) -> None:
    proxy = Proxy(bind_address="0.0.0.0")
    client = proxy.client(BIND, facing=facing)
    refused(client)
    assert "--external-address" in proxy.session.detail
    proxy.over(Ending.CONNECT_FAILED)


def test_the_listener_is_on_the_way_to_the_peer_unless_told() -> None:
    proxy = Proxy()
    client = proxy.client(write_request(Command.BIND, "127.0.0.1", 80))
    assert [each.host for each in proxy.listeners] == ["127.0.0.1"]
    client.lose()


def test_a_peer_to_whom_there_is_no_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_way(address: object) -> str:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("relayd.socks.bind.address_towards", no_way)
    proxy = Proxy()
    refused(proxy.client(BIND))
    assert "Network is unreachable" in proxy.session.detail
    proxy.over(Ending.CONNECT_FAILED)


@pytest.mark.parametrize(
    "problem",
    [
        ListenError("can't listen on 192.0.2.2:0: Too many open files"),
        OSError(24, "Too many open files"),
        # What Twisted's own endpoints say.
        error.CannotListenError("192.0.2.2", 0, OSError(24, "Too many open files")),
    ],
)
def test_a_listener_that_can_not_be_opened(problem: Exception) -> None:
    proxy = Proxy(opens=False)
    client = proxy.client(BIND)
    proxy.listeners[0].opened.errback(problem)
    refused(client)
    assert "Too many open files" in proxy.session.detail
    proxy.over(Ending.CONNECT_FAILED)


def test_a_listener_with_a_bug_ends_its_session_only(
    logged_failures: LoggedFailures,
) -> None:
    proxy = Proxy(opens=False)
    client = proxy.client(BIND)
    proxy.listeners[0].opened.errback(ZeroDivisionError("in the listener"))
    client.turn()
    assert not client.connected
    logged_failures.take("in the listener")
    proxy.over(Ending.FAILED)


def test_a_listener_that_opens_too_late_is_closed() -> None:
    proxy = Proxy(opens=False)
    client = proxy.client(BIND)
    client.lose()
    port = proxy.listeners[0].open()
    assert not port.is_open
    proxy.over(Ending.CLIENT_LEFT)


@pytest.mark.parametrize("method", ["write", "registerProducer"])
def test_a_join_that_fails_leaves_neither_connection(
    method: str, logged_failures: LoggedFailures, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Proxy()
    client, port = proxy.bound()

    def broken(*_: object) -> None:
        raise ZeroDivisionError(f"in {method}")

    monkeypatch.setattr(client, method, broken)
    peer = port.accept(SERVER)
    assert not peer.connected
    assert not client.connected
    logged_failures.take(f"in {method}")
    proxy.over(Ending.FAILED)
