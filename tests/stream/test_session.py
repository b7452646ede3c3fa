"""One client's way through the stages, where a relay of one's own decides.

A subclass of StreamProtocol may decide late, dial again after a pause, pause its legs,
and be ended from within whatever it calls.
"""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet import error
from twisted.python.failure import Failure

from relayd.core.prelude import BadRequest, Prelude
from relayd.core.session import Ending
from relayd.core.stage import Stage
from relayd.net.upstream import Upstream
from relayd.stream.attempt import Attempt
from relayd.stream.lifecycle import LEFT_GRACE
from relayd.tcp import RelayProtocol
from tests.conftest import LoggedFailures
from tests.support.fakes import FakeTransport
from tests.support.relays import Relay, secret_client


def read_line(data: bytes) -> tuple[bytes, int] | None:
    """A prelude of one line."""
    if data.startswith(b"!"):
        raise BadRequest("no line")
    line, newline, _ = data.partition(b"\n")
    return (line, len(line) + 1) if newline else None


class Ponderer(RelayProtocol):
    """Decides when it is told to."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.asked: list[tuple[Any, ...]] = []

    def decide(self, *said: Any) -> None:
        self.asked.append(said)

    def decided(self) -> None:
        self.dial(self.factory.pool.choose(self.session))


class Deciding:
    """A relay whose clients wait for a decision, with their handshake done."""

    def __init__(self, before: str) -> None:
        relay = self.relay = Relay(handshake_timeout=2.0)
        relay.factory.protocol = Ponderer
        if before == "prelude":
            relay.factory.preludes = (Prelude("line", read_line),)
        if before == "handshake":
            secret = secret_client(relay)
            secret.shake_hands()
            self.client: FakeTransport = secret
        else:
            self.client = relay.client()
        if before == "prelude":
            self.client.receive(b"hello\n")
        [self.protocol] = relay.factory.sessions.values()
        self.session = relay.session


BEFORE = ["nothing", "handshake", "prelude"]


@pytest.mark.parametrize("before", BEFORE)
def test_what_a_client_sends_while_it_is_decided_is_kept(before: str) -> None:
    deciding = Deciding(before)
    assert deciding.session.stage is Stage.DECIDING
    deciding.client.receive(b"early ")
    deciding.client.receive(b"bird")
    deciding.client.receive_eof()
    assert len(deciding.protocol.asked) == 1
    deciding.protocol.decided()
    server = deciding.relay.server.dial.connect()
    server.take()
    assert server.taken == b"early bird"
    assert server.write_shut


@pytest.mark.parametrize("before", BEFORE)
def test_a_decision_may_take_its_time(before: str) -> None:
    """The deadline of the handshake has nothing to do with it."""
    deciding = Deciding(before)
    deciding.relay.clock.pump([0.25] * 40)
    session = deciding.session
    assert session.ending is None
    assert session.queue_seconds is None
    deciding.protocol.decided()
    deciding.relay.server.dial.connect()
    assert session.stage is Stage.RELAYING
    assert (session.queue_seconds, session.connect_seconds) == (10, 0)


@pytest.mark.parametrize("before", BEFORE)
def test_a_client_that_has_most_likely_left_is_not_decided_about(before: str) -> None:
    deciding = Deciding(before)
    deciding.client.receive_eof()
    deciding.relay.clock.pump([0.25] * int(4 * LEFT_GRACE + 2))
    assert deciding.session.ending is Ending.CLIENT_LEFT


@pytest.mark.parametrize("before", BEFORE)
def test_a_decision_that_comes_too_late_changes_nothing(before: str) -> None:
    deciding = Deciding(before)
    deciding.client.lose(error.ConnectionLost())
    assert deciding.session.ending is Ending.CLIENT_LEFT
    assert deciding.session.detail == ""
    deciding.protocol.decided()
    assert deciding.session.stage is Stage.OVER
    assert not deciding.relay.server.dials
    deciding.relay.over("opened", "closed client_left")


class Talker(RelayProtocol):
    """Tells its client that it is not served."""

    def last_words(self) -> bytes:
        return b"no\n"


def test_what_a_client_sends_while_it_is_closed_is_not_counted() -> None:
    """It is not relayed.  TLS hands it on while the words for the client wait."""
    relay = Relay()
    relay.factory.protocol = Talker
    relay.factory.preludes = (Prelude("line", read_line),)
    client = relay.client()
    client.receive(b"!")
    assert relay.session.stage is Stage.CLOSING
    client.protocol.dataReceived(b"and so on")
    assert relay.session.up.read == 0
    client.take()
    assert client.taken == b"no\n"
    relay.over("opened", "closed bad_request")


def test_a_session_that_is_relayed_can_only_be_aborted() -> None:
    """No words for a client are written into what its server sends."""
    relay = Relay()
    relay.factory.protocol = Talker
    client = relay.client()
    server = relay.server.dial.connect()
    [protocol] = relay.factory.sessions.values()
    protocol.end(Ending.DENIED)
    client.turn()
    assert not client.dataBuffer
    assert client.aborted
    assert server.aborted
    assert relay.witness.heard[-1] == "closed denied"


class Counter:
    """Reads three bytes, and remembers how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, data: bytes) -> tuple[int, int] | None:
        self.asked += 1
        return (self.asked, 3) if len(data) >= 3 else None


def test_a_prelude_with_a_state_has_one_for_each_client() -> None:
    relay = Relay()
    relay.factory.protocol = Ponderer
    counting = Prelude("three bytes", start=Counter)
    relay.factory.preludes = (counting, Prelude("line", read_line), counting)
    first, second = relay.client(), relay.client()
    for piece in (b"ab", b"c\n", b"def"):
        first.receive(piece)
    second.receive(b"abc\ndef")
    asked = [protocol.asked for protocol in relay.factory.sessions.values()]
    assert asked == [[(2, b"", 2)], [(1, b"", 1)]]


def test_a_prelude_with_a_bug_ends_its_session_only(
    logged_failures: LoggedFailures,
) -> None:
    def broken(data: bytes) -> tuple[Any, int] | None:
        raise ZeroDivisionError

    relay = Relay()
    relay.factory.preludes = (Prelude("line", broken),)
    client = relay.client()
    client.receive(b"hello")
    client.turn()
    relay.over("opened", "closed failed")
    logged_failures.take("ZeroDivisionError")


class Patient(RelayProtocol):
    """Dials again a while after a dial that failed."""

    def attempt_failed(self, attempt: Attempt) -> None:
        self.pending = None
        self.factory.clock.callLater(
            0.5,
            self.dial,
            Upstream(attempt.upstream.endpoint, "again"),  # type: ignore[attr-defined]
        )


def test_a_server_may_be_dialled_again_after_a_pause() -> None:
    relay = Relay(connect_timeout=0.2)
    relay.factory.protocol = Patient
    client = relay.client()
    relay.server.dial.deferred.errback(Failure(error.ConnectionRefusedError()))
    # Its deadline is over meanwhile.
    relay.clock.pump([0.05] * 11)
    assert relay.session.ending is None
    session = relay.session
    assert session.connect_seconds is None
    relay.clock.advance(0.125)
    relay.server.dials[-1].connect()
    assert session.upstream == "192.0.2.1:9000"
    # The first attempt ended at once, and the second began half a second later.
    assert (session.attempts, session.queue_seconds) == (2, 0)
    assert session.connect_seconds == pytest.approx(0.125)
    client.lose()


def test_a_pause_before_the_legs_are_joined_that_no_other_leg_asked_for_ends() -> None:
    """`pauseProducing` says that the other leg is full, of which there was none."""
    relay = Relay()
    client = relay.client()
    [protocol] = relay.factory.sessions.values()
    protocol.pauseProducing()
    relay.server.dial.connect()
    assert not protocol.paused
    client.lose()
