"""RelayFactory on fakes: the client during the dial, and dials that fail."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
from twisted.internet import error
from twisted.internet.defer import CancelledError
from twisted.internet.task import Clock

from relayd.core.observers import Observer
from relayd.core.session import Ending
from relayd.net.upstream import Upstream
from relayd.stream.bridge import HOLD_LIMIT
from relayd.stream.lifecycle import LEFT_GRACE
from relayd.tcp import RelayFactory, RelayProtocol
from relayd.upstreams.pool import Pool
from tests.conftest import LoggedFailures
from tests.support.fakes import FakeEndpoint, FakeTransport
from tests.support.relays import Relay, Witness

# -- the client while the server is dialled


def test_a_client_that_resets_cancels_the_dial() -> None:
    relay = Relay()
    client = relay.client()
    client.lose()
    assert relay.server.cancelled == 1
    relay.over("opened", "dialing server:80", "closed client_left")


def test_a_client_that_only_ends_its_side_gets_a_grace() -> None:
    relay = Relay()
    client = relay.client()
    client.receive_eof()
    relay.clock.advance(LEFT_GRACE / 2)
    assert relay.server.cancelled == 0
    relay.clock.pump([0.2] * 10)
    assert relay.server.cancelled == 1
    relay.over("opened", "dialing server:80", "closed client_left")


def test_a_client_that_waits_for_a_banner_gets_it() -> None:
    relay = Relay()
    client = relay.client()
    client.receive_eof()
    server = relay.server.dial.connect()
    assert server.write_shut
    relay.clock.pump([0.2] * 10)
    server.receive(b"banner")
    server.receive_eof()
    client.take()
    assert client.taken == b"banner"
    relay.over("opened", "dialing server:80", "connected 192.0.2.1:9000", "closed done")


def test_a_client_that_sent_a_request_waits_for_its_answer() -> None:
    relay = Relay()
    client = relay.client()
    client.receive(b"request")
    client.receive_eof()
    relay.clock.pump([0.5] * 10)
    assert relay.server.cancelled == 0
    server = relay.server.dial.connect()
    server.take()
    assert server.taken == b"request"
    assert server.write_shut
    client.lose()


def test_what_a_client_sends_meanwhile_is_bounded() -> None:
    relay = Relay()
    client = relay.client()
    sent = 0
    while client.reading:
        client.receive(bytes(10_000))
        sent += 10_000
    assert HOLD_LIMIT <= sent < HOLD_LIMIT + 10_000
    client.lose()


def test_an_endpoint_that_connects_after_all_is_reset() -> None:
    relay = Relay()
    client = relay.client()
    dial = relay.server.dial
    protocol: Any = dial.factory.buildProtocol(None)
    late = FakeTransport()
    client.lose()
    # The Deferred was cancelled, and what it says now Twisted drops: the leg
    # itself must see that nobody waits for it.
    late.connect(protocol)
    relay.over("opened", "dialing server:80", "closed client_left")
    assert not late.connected


# -- dials that fail


@pytest.mark.parametrize(
    ("problem", "ending"),
    [
        (error.ConnectionRefusedError("no"), Ending.CONNECT_REFUSED),
        (error.TimeoutError("slow"), Ending.CONNECT_TIMEOUT),
        (error.TCPTimedOutError("slow"), Ending.CONNECT_TIMEOUT),
        (error.DNSLookupError("who"), Ending.UNRESOLVED),
        (error.NoRouteError("where"), Ending.CONNECT_FAILED),
        (error.ConnectBindError("EMFILE"), Ending.CONNECT_FAILED),
        (OSError(5, "odd"), Ending.CONNECT_FAILED),
        (CancelledError(), Ending.CONNECT_FAILED),
    ],
)
def test_a_failed_dial_closes_the_client_and_says_why(
    problem: Exception, ending: Ending
) -> None:
    relay = Relay()
    client = relay.client()
    client.receive(b"request")
    relay.server.dial.fail(problem)
    assert client.log[-1] == "close"
    assert relay.session.ending is ending
    assert relay.session.detail
    assert "\n" not in relay.session.detail
    relay.over("opened", "dialing server:80", f"closed {ending.word}")


@pytest.mark.parametrize("side", ["client", "server", "client, not joined"])
def test_a_loss_that_nobody_tells_of_keeps_no_session(side: str) -> None:
    """An override that a foreign transport has called, and that keeps it to itself."""

    class Silent(RelayProtocol):
        def connectionLost(self, reason: Any = None) -> None:
            """Not ours."""

    relay = Relay(idle_timeout=2)
    ending = "closed idle"
    if side != "server":
        relay.factory.protocol = Silent
    client = relay.client()
    if side == "client, not joined":
        [protocol] = relay.factory.sessions.values()
        protocol.abort_session(Ending.DRAINED)
        ending = "closed drained"
    else:
        server = relay.server.dial.connect()
        if side == "server":
            server.protocol.connectionLost = Silent.connectionLost
        (client if side == "client" else server).lose()
    relay.clock.pump([0.25] * 20)
    assert not client.connected
    heard = [] if side == "client, not joined" else ["connected 192.0.2.1:9000"]
    relay.over("opened", "dialing server:80", *heard, ending)


@pytest.mark.cost
@pytest.mark.parametrize("outcome", ["connects", "fails", "is cancelled"])
def test_an_endpoint_that_keeps_its_factory_keeps_no_session(outcome: str) -> None:
    """A test of cost.

    As Twisted's do, in a cycle of references, until the collector finds it.
    """
    relay = Relay()
    client = relay.client()
    [protocol] = map(weakref.ref, relay.factory.sessions.values())
    factory = relay.server.dial.factory
    if outcome == "connects":
        server = relay.server.dial.connect()
        client.receive_eof()
        server.receive_eof()
        del server
    elif outcome == "fails":
        relay.server.dial.fail(error.ConnectError())
    else:
        client.lose()
    assert not relay.factory.sessions
    # What the fakes keep.
    del client.protocol
    relay.server.dials.clear()
    gc.disable()
    try:
        assert protocol() is None
    finally:
        gc.enable()
    # Built late, it is not left connected.
    assert not FakeTransport().connect(factory.buildProtocol(None)).connected


def test_last_words_may_take_longer_than_an_abort() -> None:
    """A session whose ending is decided goes on until they are delivered."""
    relay = Relay()
    client = relay.client()
    server = relay.server.dial.connect()
    client.receive(b"last words")
    client.lose(error.ConnectionLost())
    relay.clock.pump([0.25] * 20)
    assert server.connected
    server.take()
    relay.clock.pump([0.25] * 4)
    assert server.taken == b"last words"
    relay.over(
        *("opened", "dialing server:80", "connected 192.0.2.1:9000"),
        "closed downstream_reset",
    )


@pytest.mark.parametrize("late", ["fails", "is cancelled", "connects"])
def test_an_endpoint_that_goes_on_after_it_connected(late: str) -> None:
    """It connected the leg, and had more to do: the connection is not left behind."""
    relay = Relay(connect_timeout=1)
    client = relay.client()
    dial = relay.server.dial
    protocol: Any = dial.factory.buildProtocol(None)
    transport = FakeTransport(clock=relay.clock).connect(protocol)
    if late == "fails":
        dial.fail(error.ConnectError(string="no handshake"))
    elif late == "is cancelled":
        client.lose()
    else:
        client.receive(b"x")
        relay.clock.pump([0.2] * 10)
        assert relay.server.cancelled == 1
    assert not transport.connected
    assert not relay.factory.sessions
    client.lose()


def test_an_endpoint_with_a_bug_ends_its_session_only(
    logged_failures: LoggedFailures,
) -> None:
    relay = Relay()
    relay.client()
    relay.server.dial.fail(ZeroDivisionError("the endpoint's"))
    assert "the endpoint's" in logged_failures.take("ZeroDivisionError")
    relay.over("opened", "dialing server:80", "closed failed")


def test_an_endpoint_that_raises_ends_its_session_only(
    logged_failures: LoggedFailures, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = Relay()

    def broken(_: object) -> None:
        raise ZeroDivisionError("in connect")

    monkeypatch.setattr(relay.server, "connect", broken)
    client = relay.client()
    assert not client.connected
    logged_failures.take("in connect")
    relay.over("opened", "dialing server:80", "closed failed")


def test_an_endpoint_that_connects_something_else_is_a_failure(
    logged_failures: LoggedFailures,
) -> None:
    relay = Relay()
    client = relay.client()
    relay.server.dial.deferred.callback(None)  # type: ignore[arg-type]
    client.turn()
    assert not client.connected
    logged_failures.take("not what it was given")
    relay.over("opened", "dialing server:80", "closed failed")


def test_a_join_that_fails_leaves_neither_connection(
    logged_failures: LoggedFailures, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = Relay()
    client = relay.client()

    def broken(*_: object) -> None:
        raise ZeroDivisionError("in registerProducer")

    monkeypatch.setattr(client, "registerProducer", broken)
    server = relay.server.dial.connect()
    assert not client.connected
    assert not server.connected
    logged_failures.take("in registerProducer")
    assert relay.session.ending is Ending.FAILED


def test_a_server_lost_as_soon_as_it_was_connected() -> None:
    relay = Relay()
    client = relay.client()
    dial = relay.server.dial
    protocol: Any = dial.factory.buildProtocol(None)
    transport = FakeTransport().connect(protocol)
    transport.lose()
    dial.deferred.callback(protocol)
    client.turn()
    assert not client.connected
    relay.over("opened", "dialing server:80", "closed connect_failed")


def test_a_server_that_does_not_answer_in_time() -> None:
    relay = Relay(connect_timeout=10)
    client = relay.client()
    relay.clock.pump([1] * 9)
    assert client.connected
    relay.clock.pump([1] * 3)
    assert relay.server.cancelled == 1
    assert client.log[-1] == "close"
    assert relay.session.detail == "no connection in 10 s"
    relay.over("opened", "dialing server:80", "closed connect_timeout")


def test_no_connect_timeout_means_never() -> None:
    relay = Relay(connect_timeout=0)
    client = relay.client()
    relay.clock.pump([1] * 1000)
    assert client.connected
    client.lose()


def test_a_client_that_does_not_answer_the_close_is_reset() -> None:
    relay = Relay()
    client = relay.client()
    # TLS: the close waits for the client's own.
    client.dataBuffer = b"close_notify"
    relay.server.dial.fail(error.ConnectionRefusedError())
    assert client.connected
    relay.clock.pump([1] * 8)
    assert client.log[-1] == "abort"
    relay.over("opened", "dialing server:80", "closed connect_refused")


def test_an_empty_pool_closes_the_client() -> None:
    clock, witness = Clock(), Witness()
    factory = RelayFactory(Pool([]), clock=clock, observer=witness)
    client = FakeTransport()
    protocol: Any = factory.buildProtocol(None)
    client.connect(protocol)
    assert witness.heard == ["opened", "closed no_upstream"]
    factory.stopFactory()
    assert not clock.getDelayedCalls()


def test_several_servers_take_turns() -> None:
    servers = [FakeEndpoint(), FakeEndpoint(), FakeEndpoint()]
    pool = Pool(Upstream(each, str(n)) for n, each in enumerate(servers))
    factory = RelayFactory(pool, clock=Clock(), observer=Observer())
    for _ in range(7):
        protocol: Any = factory.buildProtocol(None)
        FakeTransport().connect(protocol)
    assert [len(each.dials) for each in servers] == [3, 2, 2]
