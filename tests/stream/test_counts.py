"""What a stream relay counts, if somebody wants to know: on fakes."""

from __future__ import annotations

from twisted.internet import error

from relayd.core.counts import SessionCounts
from relayd.core.errors import Refused
from tests.support.relays import Relay


def counted(*servers: str) -> tuple[Relay, SessionCounts]:
    relay = Relay()
    counts = relay.factory.counts = SessionCounts(servers)
    return relay, counts


def test_nothing_is_counted_unless_somebody_wants_to_know() -> None:
    relay = Relay()
    relay.client()
    server = relay.server.dial.connect()
    server.receive_eof()
    assert relay.factory.counts is None


def test_a_session_that_is_relayed() -> None:
    """The bytes that the log says, once it is over; the dial once it has succeeded."""
    relay, counts = counted("server:80")
    client = relay.client()
    relay.clock.advance(0.02)
    server = relay.server.dial.connect()
    assert counts.servers["server:80"].results == {"connected": 1}
    assert counts.connects.total == 0.02
    client.receive(b"question")
    server.receive(b"answer!")
    server.take()
    client.take()
    assert (counts.up, counts.down) == (0, 0)
    client.receive_eof()
    server.receive_eof()
    assert counts.closed == {"done": 1}
    assert (counts.up, counts.down, counts.spliced) == (8, 7, 0)
    assert not counts.refused


def test_a_client_that_is_refused_is_no_session() -> None:
    relay, counts = counted("server:80")
    for reason in ("hours", "client", "hours"):
        relay.gate.problem = Refused("closed today", reason)
        relay.client()
    assert counts.refused == {"hours": 2, "client": 1}
    assert not counts.closed.total()


def test_a_dial_that_fails() -> None:
    """With the time, after which it is forgotten."""
    relay, counts = counted("server:80")
    relay.client()
    relay.clock.advance(3)
    relay.server.dial.fail(error.ConnectionRefusedError())
    server = counts.servers["server:80"]
    assert server.results == {"connect_refused": 1}
    assert server.failed_at == 3
    assert counts.closed == {"done": 0, "connect_refused": 1}
    relay.client()
    relay.server.dials[1].connect()
    assert server.failed_at is None
    assert server.results == {"connect_refused": 1, "connected": 1}


def test_a_dial_that_takes_too_long() -> None:
    """Once, though the dial that is cancelled then fails as well."""
    relay, counts = counted("server:80")
    relay.client()
    for _ in range(40):
        relay.clock.advance(0.5)
    assert counts.servers["server:80"].results == {"connect_timeout": 1}


def test_a_client_that_leaves_while_its_server_is_dialled() -> None:
    """That says nothing about the server."""
    relay, counts = counted("server:80")
    client = relay.client()
    client.lose(error.ConnectionLost())
    server = counts.servers["server:80"]
    assert server.results == {"cancelled": 1}
    assert server.failed_at is None
    assert counts.closed == {"done": 0, "client_left": 1}
