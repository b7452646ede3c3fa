"""A name with several addresses: each is an attempt; the client hears of the last."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet import error
from twisted.internet.address import IPv4Address

from relayd.core.session import Ending
from relayd.net.resolving import MAX_ADDRESSES
from relayd.preludes.socks4 import Command, write_request
from relayd.socks import named
from relayd.socks.named import BEHIND_FOR
from tests.support.proxies import (
    BIND,
    BIND_BY_NAME,
    CONNECT,
    CONNECT_BY_NAME,
    GRANTED,
    SERVER,
    Proxy,
    line,
    refused,
)

OTHER, THIRD = "203.0.113.9", "203.0.113.10"

#: How an address fails, so that the next one is tried.
REFUSED = error.ConnectionRefusedError("no")


def dialled(proxy: Proxy) -> list[str]:
    """The addresses, in the order of the attempts."""
    return [address[0] for [(_, address)] in proxy.dialled]


def pass_time(proxy: Proxy, seconds: float) -> None:
    proxy.clock.pump([0.25] * round(seconds * 4))


def test_the_next_is_tried_when_one_fails() -> None:
    """All that the client has sent goes there, and one reply says which it was."""
    proxy = Proxy()
    client = proxy.client(CONNECT_BY_NAME + b"da")
    proxy.resolver.answer(OTHER, SERVER)
    proxy.servers[0].dial.fail(REFUSED)
    assert dialled(proxy) == [OTHER, SERVER]
    client.receive(b"ta")
    client.take()
    assert client.taken == b"", "nothing is said yet"
    server = proxy.servers[1].dial.connect(IPv4Address("TCP", SERVER, 80))
    client.take()
    assert client.taken == GRANTED
    server.take()
    assert server.taken == b"data"
    assert proxy.session.attempts == 2
    assert proxy.factory.totals.retried.count == 1
    client.receive_eof()
    server.receive_eof()
    assert f" upstream={SERVER}:80 " in line(proxy)
    assert " attempts=2 " in line(proxy)
    assert len(proxy.resolver.asked) == 1, "what was judged is dialled"
    proxy.over(Ending.DONE)


def test_the_last_failure_is_the_sessions() -> None:
    """At once: no address is tried again, and none is waited for."""
    proxy = Proxy()
    client = proxy.client(CONNECT_BY_NAME)
    proxy.resolver.answer(OTHER, SERVER)
    proxy.servers[0].dial.fail(REFUSED)
    proxy.servers[1].dial.fail(error.NoRouteError("no way"))
    refused(client)
    assert proxy.session.attempts == 2
    assert proxy.session.upstream == "example.com:80"
    assert "no way" in proxy.session.detail
    proxy.over(Ending.CONNECT_FAILED)


def test_as_many_as_a_name_has() -> None:
    proxy = Proxy()
    client = proxy.client(CONNECT_BY_NAME)
    proxy.resolver.answer(*(f"203.0.113.{n}" for n in range(MAX_ADDRESSES)))
    for number in range(MAX_ADDRESSES):
        client.take()
        assert client.taken == b""
        proxy.servers[number].dial.fail(REFUSED)
    refused(client)
    assert proxy.session.attempts == MAX_ADDRESSES
    proxy.over(Ending.CONNECT_REFUSED)


@pytest.mark.parametrize("request_", [CONNECT, CONNECT_BY_NAME])
def test_a_single_address_is_tried_once(request_: bytes) -> None:
    proxy = Proxy()
    client = proxy.client(request_)
    if request_ is CONNECT_BY_NAME:
        proxy.resolver.answer(SERVER)
    proxy.server.dial.fail(REFUSED)
    refused(client)
    assert proxy.session.attempts == 1
    proxy.over(Ending.CONNECT_REFUSED)


def test_a_name_that_is_not_found_is_looked_up_once() -> None:
    proxy = Proxy()
    client = proxy.client(CONNECT_BY_NAME)
    proxy.resolver.fail(error.DNSLookupError("no such name"))
    refused(client)
    assert len(proxy.resolver.asked) == 1
    proxy.over(Ending.UNRESOLVED)


def test_each_has_its_time_and_all_have_theirs() -> None:
    """One that does not answer is given up for the next."""
    proxy = Proxy(connect_timeout=2, dial_timeout=3)
    client = proxy.client(CONNECT_BY_NAME)
    proxy.resolver.answer(OTHER, SERVER, THIRD)
    pass_time(proxy, 1.5)
    assert dialled(proxy) == [OTHER]
    pass_time(proxy, 1)
    assert dialled(proxy) == [OTHER, SERVER]
    pass_time(proxy, 1)
    refused(client)
    assert dialled(proxy) == [OTHER, SERVER], "the time of all of them is over"
    assert proxy.session.detail.startswith("no connection in ")
    proxy.over(Ending.CONNECT_TIMEOUT)


def test_a_client_that_leaves_ends_it() -> None:
    proxy = Proxy()
    client = proxy.client(CONNECT_BY_NAME)
    proxy.resolver.answer(OTHER, SERVER, THIRD)
    proxy.servers[0].dial.fail(REFUSED)
    client.lose()
    assert dialled(proxy) == [OTHER, SERVER]
    assert proxy.servers[1].cancelled
    proxy.over(Ending.CLIENT_LEFT)


def test_an_address_that_is_silent_goes_behind_the_others_for_a_while() -> None:
    """So that the next clients of a name do not wait for it, too."""
    proxy = Proxy(connect_timeout=2, max_handshakes=1000)

    def first_of(*found: str) -> str:
        """The address that a new client's first attempt is for."""
        client = proxy.client(CONNECT_BY_NAME)
        proxy.resolver.answer(*found)
        client.lose()
        return dialled(proxy)[-1]

    assert first_of(OTHER, SERVER) == OTHER
    client = proxy.client(CONNECT_BY_NAME)
    proxy.resolver.answer(OTHER, SERVER)
    pass_time(proxy, 2.5)
    client.lose()
    assert dialled(proxy)[-2:] == [OTHER, SERVER]
    assert first_of(OTHER, SERVER) == SERVER
    assert first_of(OTHER, THIRD, SERVER) == THIRD
    assert first_of(OTHER) == OTHER
    pass_time(proxy, BEHIND_FOR)
    assert first_of(OTHER, SERVER) == OTHER
    proxy.nothing_left()


def test_how_many_silent_addresses_are_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(named, "MAX_SILENT", 2)
    proxy = Proxy(connect_timeout=1)
    for last in (1, 2, 3):
        client = proxy.client(CONNECT_BY_NAME)
        proxy.resolver.answer(f"203.0.113.{last}", SERVER)
        pass_time(proxy, 1.5)
        client.lose()
    retries: Any = proxy.factory.retries
    found = [(2, (f"203.0.113.{last}", 80)) for last in (1, 2, 3)]
    behind = retries.in_order([*found, (2, (SERVER, 80))], proxy.factory.now())
    assert [host[-1] for _, (host, _) in behind] == ["1", SERVER[-1], "2", "3"]


@pytest.mark.parametrize("request_", [BIND, BIND_BY_NAME])
def test_a_bind_is_tried_once(request_: bytes) -> None:
    """Its listener can't be opened; or nobody knows its peer."""
    proxy = Proxy(opens=False)
    client = proxy.client(request_)
    if request_ is BIND:
        [listener] = proxy.listeners
        listener.opened.errback(error.CannotListenError(None, 0, OSError(98, "taken")))
    else:
        proxy.resolver.fail(error.DNSLookupError("no such name"))
    refused(client)
    ending = proxy.session.ending
    assert ending in (Ending.CONNECT_FAILED, Ending.UNRESOLVED)
    proxy.over(ending)


def test_the_look_up_for_a_bind_has_the_time_of_an_attempt() -> None:
    proxy = Proxy(connect_timeout=2)
    client = proxy.client(BIND_BY_NAME)
    pass_time(proxy, 2.5)
    refused(client)
    assert proxy.session.detail == "no address in 2 s"
    proxy.over(Ending.CONNECT_TIMEOUT)


def test_a_time_is_none() -> None:
    with pytest.raises(ValueError, match="dial_timeout must not be negative"):
        Proxy(dial_timeout=-1)


def test_an_address_as_a_name_has_no_others() -> None:
    proxy = Proxy()
    client = proxy.client(write_request(Command.CONNECT, "2001:db8::7", 80))
    proxy.server.dial.fail(REFUSED)
    refused(client)
    proxy.over(Ending.CONNECT_REFUSED)


def test_once_the_client_was_told_no_other_is_tried() -> None:
    """It has had its reply, and may not get another."""
    proxy = Proxy()
    client = proxy.client(CONNECT_BY_NAME)
    proxy.resolver.answer(SERVER, OTHER)
    server = proxy.servers[0].dial.connect(IPv4Address("TCP", SERVER, 80))
    client.take()
    server.lose(error.ConnectionLost())
    client.take()
    assert client.taken == GRANTED
    assert dialled(proxy) == [SERVER]
    proxy.over(Ending.UPSTREAM_RESET)
