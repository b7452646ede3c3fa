"""What programs plug in that is not as ours: endpoints, gates, wrapping factories."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.protocols.policies import WrappingFactory
from zope.interface import implementer

from relayd.net.upstream import Upstream
from tests.conftest import LoggedFailures
from tests.support.fakes import FakeTransport
from tests.support.relays import Relay


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")

    __repr__ = __str__


@implementer(IStreamClientEndpoint)
class Calls:
    """An endpoint that is a function.

    :ivar factory: what it was given last.
    """

    def __init__(self, dial: Any) -> None:
        self._dial = dial
        self.factory: Any = None

    def connect(self, factory: Any) -> Any:
        self.factory = factory
        return self._dial(factory)


def relay(dial: Any) -> tuple[Relay, Calls]:
    made = Relay()
    endpoint = Calls(dial)
    [pool] = made.factory.all_pools
    pool._only = Upstream(endpoint, "server:80")
    return made, endpoint


def _raises(*_: object) -> Any:
    raise Unspeakable


class NoDeferred:
    """What `connect` may not answer, as a coroutine: it can't even be cancelled."""


# -- a drain


def test_a_client_that_comes_in_a_drain_is_closed_behind_a_wrapper() -> None:
    """Not a protocol of None, whose traceback it is, and which nobody closes."""
    made = Relay()
    made.factory.drain(0)
    transport = FakeTransport(clock=made.clock)
    wrapper: Any = WrappingFactory(made.factory).buildProtocol(transport.peer)
    transport.connect(wrapper)
    made.clock.advance(0)
    assert not transport.connected
    assert not made.factory.sessions


def test_a_listener_that_opens_ends_a_drain_though_another_is_open() -> None:
    made = Relay()
    made.factory.doStart()
    made.factory.drain(5)
    made.factory.doStart()
    assert not made.factory.registry.draining
    made.client()
    assert made.witness.heard == ["opened", "dialing server:80"]
    made.factory.drain(0)


def test_a_gate_that_begins_a_drain_lets_nobody_in() -> None:
    made = Relay()
    inner = made.gate

    class Last:
        def enter(self, session: Any) -> Any:
            made.factory.drain(0)
            return inner.enter(session)

    made.factory.gate = Last()  # type: ignore[assignment]
    client = made.client()
    made.clock.advance(0)
    assert not client.connected
    made.over("refused before it was admitted")


# -- an endpoint


@pytest.mark.parametrize("how", ["leaves", "overdue", "drain"])
def test_a_canceller_that_raises_keeps_no_session(
    how: str, logged_failures: LoggedFailures
) -> None:
    made, _ = relay(lambda _: Deferred(_raises))
    client = made.client()
    if how == "leaves":
        client.lose()
    elif how == "drain":
        made.factory.drain(0)
    else:
        made.clock.pump([1.0] * 12)
    made.clock.pump([1.0] * 6)
    assert not made.factory.sessions
    assert made.gate.inside == 0
    assert "can't be cancelled" in logged_failures.pop()


@pytest.mark.parametrize("dial", [_raises, lambda _: NoDeferred()])
def test_an_endpoint_that_is_none(dial: Any, logged_failures: LoggedFailures) -> None:
    made, _ = relay(dial)
    client = made.client()
    made.clock.advance(0)
    assert not client.connected
    assert made.factory.endings == {"failed": 1}
    assert made.gate.inside == 0
    logged_failures.clear()


def test_an_error_without_words(logged_failures: LoggedFailures) -> None:
    dialled: Deferred[Any] = Deferred()
    made, _ = relay(lambda _: dialled)
    client = made.client()
    dialled.errback(Unspeakable())
    made.clock.advance(0)
    assert not client.connected
    assert made.session.detail == "Unspeakable"
    logged_failures.take("the endpoint of server:80 failed")


def test_the_connection_that_an_endpoint_answers_with_is_the_one() -> None:
    """It has connected to a second server as well, and does not want that one."""
    dialled: Deferred[Any] = Deferred()
    made, endpoint = relay(lambda _: dialled)
    client = made.client()
    client.receive(b"for the first")
    first, second = (FakeTransport(clock=made.clock) for _ in range(2))
    answer = endpoint.factory.buildProtocol(first.peer)
    first.connect(answer)
    second.connect(endpoint.factory.buildProtocol(second.peer))
    second.receive(b"not asked")
    dialled.callback(answer)
    made.clock.advance(0)
    first.take()
    assert first.taken == b"for the first"
    assert not second.connected
    assert made.session.down.read == 0
    made.factory.drain(0)
