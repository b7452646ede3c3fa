"""One try at one server: whatever makes it fail is told once, in one way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet import error
from twisted.python.failure import Failure

from relayd.core.errors import Refused
from relayd.core.session import Ending
from relayd.core.stage import Stage
from relayd.net.tls import ServerIdentity
from relayd.stream.attempt import Attempt
from relayd.stream.server_attempt import ServerAttempt
from relayd.tcp import RelayProtocol
from tests.support.fakes import FakeTLSTransport, FakeTransport
from tests.support.relays import Relay


class Noting(RelayProtocol):
    """Notes each attempt that fails."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.attempts: list[Attempt] = []

    def attempt_failed(self, attempt: Attempt) -> None:
        self.attempts.append(attempt)
        super().attempt_failed(attempt)


class Persistent(Noting):
    """Tries again, three times at most."""

    def attempt_failed(self, attempt: Attempt) -> None:
        self.attempts.append(attempt)
        if len(self.attempts) < 3:
            self.dial(self.factory.pool.choose(self.session))
        else:
            self.end(Ending.NO_UPSTREAM)


def relaying(protocol: Any, **options: Any) -> tuple[Relay, FakeTransport, Any]:
    relay = Relay(connect_timeout=2.0, **options)
    relay.factory.protocol = protocol
    client = relay.client()
    [session] = relay.factory.sessions.values()
    return relay, client, session


def fails_with(problem: Exception) -> Callable[[Relay], None]:
    def fail(relay: Relay) -> None:
        relay.server.dial.deferred.errback(Failure(problem))

    return fail


def times_out(relay: Relay) -> None:
    relay.clock.pump([0.25] * 10)


def hands_are_not_shaken(relay: Relay) -> None:
    relay.server.dial.connect(transport=FakeTLSTransport())
    times_out(relay)


def is_for_somebody_else(relay: Relay) -> None:
    [upstream] = relay.factory.pool.upstreams
    upstream.identity = ServerIdentity("example.com")
    dial = relay.server.dial
    leg = dial.factory.buildProtocol(None)
    upstream.identity = None
    FakeTransport(9000).connect(leg)
    dial.deferred.callback(leg)


def is_lost_at_once(relay: Relay) -> None:
    dial = relay.server.dial
    leg = dial.factory.buildProtocol(None)
    FakeTransport(9000).connect(leg).lose()
    dial.deferred.callback(leg)


FAILURES = [
    (fails_with(error.ConnectionRefusedError()), Ending.CONNECT_REFUSED),
    (fails_with(error.DNSLookupError()), Ending.UNRESOLVED),
    (fails_with(error.TCPTimedOutError()), Ending.CONNECT_TIMEOUT),
    (fails_with(error.NoRouteError()), Ending.CONNECT_FAILED),
    (fails_with(Refused("not there")), Ending.DENIED),
    (times_out, Ending.CONNECT_TIMEOUT),
    (hands_are_not_shaken, Ending.CONNECT_TIMEOUT),
    (is_for_somebody_else, Ending.CONNECT_FAILED),
    (is_lost_at_once, Ending.CONNECT_FAILED),
]


@pytest.mark.parametrize(("how", "ending"), FAILURES)
def test_each_failure_is_told_once(
    how: Callable[[Relay], None], ending: Ending
) -> None:
    relay, client, session = relaying(Noting)
    how(relay)
    client.turn()
    [attempt] = session.attempts
    assert isinstance(attempt, ServerAttempt)
    assert attempt.upstream is session.session.server
    assert attempt.ending is ending
    assert attempt.is_over
    assert session.session.ending is ending
    assert session.session.detail == attempt.detail
    assert not client.connected
    assert session.session.stage is Stage.OVER
    relay.factory.stopFactory()


@pytest.mark.parametrize(("how", "ending"), FAILURES)
def test_after_each_failure_another_server_may_be_tried(
    how: Callable[[Relay], None], ending: Ending
) -> None:
    relay, client, session = relaying(Persistent)
    first = relay.server.dials[0]
    how(relay)
    assert [each.ending for each in session.attempts] == [ending]
    assert client.connected
    second = relay.server.dials.pop()
    assert second is not first
    server = second.connect()
    server.receive(b"served")
    client.take()
    assert client.taken == b"served"
    client.lose()
    relay.factory.stopFactory()


def test_what_connects_after_its_time_is_reset() -> None:
    relay, client, session = relaying(Persistent)
    dial = relay.server.dials[0]
    leg = dial.factory.buildProtocol(None)
    times_out(relay)
    late = FakeTransport(9000)
    late.connect(leg)
    assert late.aborted
    assert client.connected
    assert session.session.stage is Stage.DIALING
    relay.server.dials.pop().connect()
    assert session.session.stage is Stage.RELAYING
    client.lose()
    relay.factory.stopFactory()


def test_the_server_stays_known_to_its_session() -> None:
    relay, client, session = relaying(Noting)
    relay.server.dial.connect()
    [upstream] = relay.factory.pool.upstreams
    assert session.session.server is upstream
    assert session.session.upstream == "192.0.2.1:9000"
    client.lose()
    relay.factory.stopFactory()


def test_a_client_that_has_left_does_not_shorten_another_deadline() -> None:
    """A server's certificate below a wrapper has the time of a dial, not the grace."""
    from twisted.protocols.policies import ProtocolWrapper, WrappingFactory

    relay, client, _ = relaying(Noting)
    client.receive_eof()
    dial = relay.server.dial
    leg: Any = dial.factory.buildProtocol(None)
    transport = FakeTLSTransport(9000)
    # It waits for the server's goodbye.
    transport.loseConnection = lambda: None  # type: ignore[method-assign]
    transport.connect(ProtocolWrapper(WrappingFactory(relay.factory), leg))
    dial.deferred.callback(leg)
    transport.connection.certificate = None
    relay.clock.pump([0.25] * 6)
    assert transport.connected
    relay.clock.pump([0.25] * 4)
    assert transport.aborted
    transport.turn()
    client.turn()
    assert relay.witness.heard[-1] == "closed connect_timeout"
    relay.factory.stopFactory()
