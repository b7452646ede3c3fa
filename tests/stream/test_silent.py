"""Sessions that end without a byte, by their clients alone: health checks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from twisted.internet import error
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.logger import capturedLogs
from twisted.python.failure import Failure

from relayd.core.errors import Refused
from relayd.core.prelude import Prelude
from relayd.core.session import Ending, Session
from relayd.observing.session_log import (
    QuietSessionLog,
    SessionLog,
    VerboseSessionLog,
)
from tests.support.fakes import FakeTransport
from tests.support.relays import Relay, secret_client


def lines(session: Session) -> tuple[int, int, int]:
    """How many lines the plain log, the quiet one and the verbose one have of it."""
    counts = []
    for kind in (SessionLog, QuietSessionLog, VerboseSessionLog):
        with capturedLogs() as events:
            kind().closed(session)
        counts.append(len(events))
    plain, quiet, verbose = counts
    return plain, quiet, verbose


def joined(relay: Relay) -> tuple[FakeTransport, FakeTransport]:
    client = relay.client()
    return client, relay.server.dial.connect()


def closes(relay: Relay) -> None:
    """As a balancer checks: it connects and closes, and the server does so then."""
    client, server = joined(relay)
    client.receive_eof()
    server.receive_eof()


def resets(relay: Relay) -> None:
    client, _ = joined(relay)
    client.lose(ConnectionLost())


def leaves_early(relay: Relay) -> None:
    relay.client().lose(ConnectionDone())


def leaves_unanswered(relay: Relay) -> None:
    relay.client().receive_eof()
    relay.clock.pump([0.5] * 5)


def leaves_tls(relay: Relay) -> None:
    """It connects to a TLS listener, and says nothing."""
    secret_client(relay).lose(ConnectionDone())


def shakes_hands_only(relay: Relay) -> None:
    """A TLS check: a handshake, and nothing after it."""
    client = secret_client(relay)
    client.connection.stage = b"done"
    client.shake_hands()
    client.lose(ConnectionDone())


def is_asked_for_a_line(relay: Relay) -> None:
    """It connects where a client has to say something first."""
    relay.factory.preludes = (Prelude("line", lambda data: None),)
    relay.client().receive_eof()


@pytest.mark.parametrize(
    "check",
    [
        *(closes, resets, leaves_early, leaves_unanswered, leaves_tls),
        *(shakes_hands_only, is_asked_for_a_line),
    ],
)
def test_a_health_check_is_counted_and_has_no_line(
    check: Callable[[Relay], None],
) -> None:
    """But where everything is told."""
    relay = Relay()
    check(relay)
    relay.clock.pump([1.0] * 6)
    session = relay.session
    assert session.ended_at is not None
    assert session.is_silent
    assert relay.factory.silent == 1
    assert lines(session) == (0, 0, 1)


def is_answered(relay: Relay) -> None:
    client, server = joined(relay)
    server.receive(b"hello")
    client.take()
    client.receive_eof()
    server.receive_eof()


def asks(relay: Relay) -> None:
    client, server = joined(relay)
    client.receive(b"hello")
    server.take()
    client.receive_eof()
    server.receive_eof()


def is_sent_away(relay: Relay) -> None:
    """Its server closes at once, which is no health check's doing."""
    client, server = joined(relay)
    server.receive_eof()
    client.receive_eof()


def resets_what_was_closed(relay: Relay) -> None:
    client, server = joined(relay)
    server.receive_eof()
    client.lose(ConnectionLost())


def server_resets(relay: Relay) -> None:
    _, server = joined(relay)
    server.lose(ConnectionLost())


def server_refuses(relay: Relay) -> None:
    relay.client()
    relay.server.dial.deferred.errback(Failure(error.ConnectionRefusedError()))


def gate_refuses(relay: Relay) -> None:
    relay.gate.problem = Refused("full")
    relay.client()


def is_idle(relay: Relay) -> None:
    joined(relay)
    relay.clock.pump([1000.0] * 5)


def is_drained(relay: Relay) -> None:
    joined(relay)
    relay.factory.drain(0)


def gives_up(relay: Relay) -> None:
    """It has waited for its server."""
    client = relay.client()
    relay.clock.pump([1.0] * 6)
    client.lose(ConnectionLost())


def dislikes_the_certificate(relay: Relay) -> None:
    """It has begun a TLS handshake, and leaves in the middle of it."""
    client = secret_client(relay)
    client.connection.stage = b"hello was read"
    client.lose(ConnectionDone())


@pytest.mark.parametrize("politely", [True, False])
def test_a_client_that_has_said_something_is_no_health_check(politely: bool) -> None:
    """Even if it was too little to be understood."""
    relay = Relay()
    relay.factory.preludes = (Prelude("line", lambda data: None),)
    client = relay.client()
    client.receive(b"half a li")
    if politely:
        client.receive_eof()
    client.lose()
    assert relay.session.ending is Ending.CLIENT_LEFT
    assert lines(relay.session) == (1, 1, 1)


@pytest.mark.parametrize(
    "end",
    [
        *(is_answered, asks, is_sent_away, resets_what_was_closed, server_resets),
        *(server_refuses, gate_refuses, is_idle, is_drained),
        *(gives_up, dislikes_the_certificate),
    ],
)
def test_what_an_operator_has_to_see_has_a_line(end: Callable[[Relay], None]) -> None:
    relay = Relay(idle_timeout=2000.0)
    end(relay)
    relay.clock.pump([1.0] * 6)
    session = relay.session
    assert session.ended_at is not None
    assert not session.is_silent
    assert relay.factory.silent == 0
    quiet = session.ending is not Ending.DONE
    assert lines(session) == (1, quiet, 1)
