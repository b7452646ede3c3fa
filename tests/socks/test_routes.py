"""A SOCKS4 proxy whose route has the last word, on fakes."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet import error

from relayd.core.routing import Decision
from relayd.core.session import Ending
from relayd.core.stage import Stage
from tests.conftest import LoggedFailures
from tests.support.proxies import (
    BIND,
    CONNECT,
    CONNECT_BY_NAME,
    GRANTED,
    REJECTED,
    SERVER,
    Proxy,
    refused,
)
from tests.support.routers import FakeRouter


def proxy(answer: Decision | None = None, **options: Any) -> tuple[Proxy, FakeRouter]:
    """A proxy on fakes, and its router."""
    router = FakeRouter(answer)
    return Proxy(route=router, **options), router


def test_it_is_asked_with_the_request() -> None:
    made, router = proxy()
    client = made.client(CONNECT + b"early")
    session = router.arriving.session
    assert session.stage is Stage.DECIDING
    assert (session.requested, session.user_id) == (f"{SERVER}:80", b"joe")
    # What comes behind the request can be looked at.
    assert router.arriving.data == b"early"
    assert not made.dialled
    router.decide(server=f"{SERVER}:80")
    server = made.server.dial.connect()
    server.take()
    client.take()
    assert server.taken == b"early"
    assert client.taken[:2] == GRANTED[:2]


def test_what_is_asked_for_is_judged_as_ever() -> None:
    made, router = proxy()
    made.policy.against.add(SERVER)
    client = made.client(CONNECT)
    router.decide(server=f"{SERVER}:80")
    refused(client)
    assert made.policy.asked == [(SERVER, 80, "")]
    made.over(Ending.DENIED)


def test_a_name_is_looked_up_when_it_is_decided() -> None:
    made, router = proxy()
    made.client(CONNECT_BY_NAME)
    assert not made.resolver.asked
    router.decide(server="example.com:80")
    assert made.resolver.asked


def test_another_server_is_its_operators_word() -> None:
    made, router = proxy()
    named = router.add("10.0.0.5:1080", made.clock)
    made.policy.against.add("10.0.0.5")
    client = made.client(CONNECT + b"early")
    router.decide(server="10.0.0.5:1080", facts={"by": "route"})
    assert made.session.upstream == "10.0.0.5:1080"
    server = named.dial.connect()
    server.take()
    client.take()
    assert server.taken == b"early"
    assert client.taken
    assert made.policy.asked == []
    assert made.session.facts["by"] == "route"


def test_a_fact_does_not_stand_for_what_the_client_has_asked_for() -> None:
    made, router = proxy()
    router.add("10.0.0.5:1080", made.clock)
    made.client(CONNECT)
    before = dict(made.session.facts)
    said = dict.fromkeys(("user", "requested", "command", "reply", "tenant"), "forged")
    router.decide(server="10.0.0.5:1080", facts=said)
    facts = made.session.facts
    assert {name: facts[name] for name in before} == before
    assert {name: facts[name] for name in facts.keys() - before.keys()} == {
        name if name == "tenant" else f"fact_{name}": "forged" for name in said
    }


def test_one_that_can_not_be_reached() -> None:
    made, router = proxy()
    named = router.add("10.0.0.5:1080", made.clock)
    client = made.client(CONNECT)
    router.decide(server="10.0.0.5:1080")
    named.dial.fail(error.ConnectionRefusedError())
    refused(client)
    made.over(Ending.CONNECT_REFUSED)


def test_a_client_that_it_refuses_is_told_by_socks() -> None:
    made, router = proxy()
    client = made.client(CONNECT)
    router.decide(refused="banned", reply=b"HTTP/1.1 403 no\r\n\r\n")
    client.take()
    assert client.taken == REJECTED
    assert made.session.detail == "banned"
    made.over(Ending.DENIED)


def test_bind_goes_as_it_was_asked_for() -> None:
    made, router = proxy()
    made.client(BIND)
    router.decide(server=f"{SERVER}:80")
    assert made.session.stage is Stage.LISTENING
    made.port.accept(SERVER)
    assert made.session.stage is Stage.RELAYING


def test_and_nowhere_else(logged_failures: LoggedFailures) -> None:
    made, router = proxy()
    router.add("10.0.0.5:1080", made.clock)
    client = made.client(BIND)
    router.decide(server="10.0.0.5:1080")
    client.take()
    assert client.taken == REJECTED
    assert "BIND has no server" in logged_failures.take("its route failed")
    made.over(Ending.ROUTE_FAILED)


def test_a_route_that_fails_is_a_rejection(logged_failures: LoggedFailures) -> None:
    made, router = proxy()
    client = made.client(CONNECT)
    router.answer.errback(ZeroDivisionError("by nobody"))
    client.take()
    assert client.taken == REJECTED
    logged_failures.take("its route failed")
    assert made.session.detail == "ZeroDivisionError: by nobody"
    made.over(Ending.ROUTE_FAILED)


def test_it_is_asked_behind_ident() -> None:
    made, router = proxy(ident=True)
    made.client(CONNECT)
    assert not router.asked
    question, _ = made.identd()
    question.dataReceived(b"50000, 80 : USERID : UNIX : joe\r\n")
    assert router.asked
    router.decide(server=f"{SERVER}:80")
    made.server.dial.connect()
    assert made.session.stage is Stage.RELAYING


@pytest.mark.parametrize("request_", [CONNECT, BIND])
def test_a_client_that_leaves_cancels_it(request_: bytes) -> None:
    made, router = proxy()
    client = made.client(request_)
    client.lose(error.ConnectionLost())
    assert router.cancelled == 1
    made.over(Ending.CLIENT_LEFT)


def test_those_who_wait_are_in_the_handshake() -> None:
    made, router = proxy(max_handshakes=1)
    made.client(CONNECT)
    made.client(CONNECT)
    assert router.cancelled == 1
    endings = [each.ending for each in made.witness.sessions]
    assert endings == [Ending.EVICTED, None]


def test_its_time_is_that_of_the_handshake() -> None:
    made, router = proxy(handshake_timeout=3.0)
    client = made.client(CONNECT)
    made.clock.pump([0.5] * 8)
    client.take()
    assert client.taken == REJECTED
    assert router.cancelled == 1
    made.over(Ending.HANDSHAKE_TIMEOUT)


def test_a_pool_which_no_proxy_has(logged_failures: LoggedFailures) -> None:
    made, router = proxy()
    client = made.client(CONNECT)
    router.decide(pool="default")
    refused(client)
    assert "there is no pool 'default'" in logged_failures.take("its route failed")
    made.over(Ending.ROUTE_FAILED)


def test_a_route_that_names_a_pool_is_told(logged_failures: LoggedFailures) -> None:
    async def route(conn: Any) -> Any:
        return conn.pool()

    made = Proxy(route=route)
    refused(made.client(CONNECT))
    assert "there are none" in logged_failures.take("its route failed")
    made.over(Ending.ROUTE_FAILED)
