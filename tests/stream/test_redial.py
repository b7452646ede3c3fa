"""A server that resets its connection at once is followed by another, on fakes."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory

from relayd.admission.bandwidth import Bandwidth
from relayd.admission.rates import Rates
from relayd.core.counts import SessionCounts
from relayd.core.pauses import HOLDING, PEER_FULL
from relayd.core.session import Ending
from relayd.core.stage import Stage
from relayd.net.transports import PeerReset, PeerVanished, WriteRefused
from relayd.net.upstream import Upstream
from relayd.stream.legs import HOLD_LIMIT
from relayd.stream.redial import RESET_DETAIL, refused_bytes
from relayd.stream.retries import PAUSE_FIRST
from relayd.upstreams.passive import Ejector, FailLimits
from relayd.upstreams.server import Server
from tests.conftest import LoggedFailures
from tests.stream.test_retries import Relay
from tests.support.fakes import FakeTLSTransport, FakeTransport
from tests.support.proxies import CONNECT, Proxy

HEARD = (
    *("opened", "dialing server0:80", "connected 192.0.2.1:9000"),
    *("dialing server1:80", "connected 192.0.2.1:9000"),
)

#: Of the client at 192.0.2.1.
V1 = b"PROXY TCP4 192.0.2.1 192.0.2.2 50000 80\r\n"


class Joined(Relay):
    """A relay with a client that is relayed to the first of its servers."""

    def __init__(self, count: int = 2, early: bytes = b"", **options: Any) -> None:
        super().__init__(count, **options)
        self.factory.counts = SessionCounts(each.name for each in self.servers)
        self.down = self.client()
        if early:
            self.down.receive(early)
        self.up = self.endpoints[0].dials[-1].connect()
        [self.session] = self.witness.sessions
        [self.protocol] = self.factory.sessions.values()
        assert self.session.stage is Stage.RELAYING

    def next(self, number: int = 1) -> FakeTransport:
        """This server is dialled now, and answers."""
        assert self.session.stage is Stage.DIALING
        assert self.session.connected_at is None
        transport: FakeTransport = self.endpoints[number].dials[-1].connect()
        assert self.session.server is self.servers[number]
        return transport

    def serves(self, server: FakeTransport, said: bytes = b"") -> None:
        """The session goes on with this server, which has had all that was said."""
        server.take()
        assert server.taken == said
        self.down.receive(b"more")
        server.take()
        assert server.taken == said + b"more"
        server.receive(b"answer")
        self.down.take()
        assert self.down.taken == b"answer"
        up = self.session.up
        assert up.read == up.written == len(said) + 4
        server.receive_eof()
        self.down.receive_eof()
        assert self.session.ending is Ending.DONE
        assert not any(self.counts)

    def is_cut(self, ending: Ending = Ending.UPSTREAM_RESET, attempts: int = 1) -> None:
        """The client is reset, and nobody else is dialled."""
        self.clock.pump([0.0] * 3)
        self.down.turn()
        assert self.session.ending is ending
        assert self.session.attempts == attempts
        assert not self.factory.sessions
        assert not any(self.counts)
        self.factory.stopFactory()
        assert not self.clock.getDelayedCalls()


def run(relay: Relay, seconds: float) -> None:
    """Let this time pass, and do what is to be done in each turn."""
    for _ in range(round(seconds / 0.05)):
        relay.clock.pump([0.05, 0, 0, 0])


@pytest.mark.parametrize("why", [ConnectionLost(), PeerReset(), WriteRefused(b"")])
def test_another_server_is_dialled_before_the_client_notices(why: Exception) -> None:
    relay = Joined()
    relay.up.lose(why)
    assert relay.counts == [0, 1]
    assert not relay.down.aborted
    assert not relay.down.disconnecting
    relay.serves(relay.next())
    relay.over(*HEARD, "closed done")
    assert relay.session.attempts == 2
    assert relay.factory.retries is not None
    assert relay.factory.retries.count == 1
    counts = relay.factory.counts
    assert counts is not None
    first = counts.servers["server0:80"]
    assert first.results == {"connected": 1, "upstream_reset": 1}
    assert first.failed_at is not None
    assert counts.servers["server1:80"].results == {"connected": 1}


@pytest.mark.parametrize("early", [b"", b"early "])
def test_what_the_kernel_has_not_taken_goes_to_the_next_server(early: bytes) -> None:
    relay = Joined(early=early)
    relay.down.receive(b"request")
    relay.up.lose()
    assert relay.session.up.written == 0
    assert relay.session.up.read == len(early) + 7
    relay.serves(relay.next(), early + b"request")


def test_what_a_transport_hands_back_goes_to_the_next_server() -> None:
    relay = Joined()
    relay.down.receive(b"request")
    # As the plane's: they keep nothing.
    relay.up.dataBuffer = b""
    relay.up.lose(WriteRefused(b"request"))
    relay.serves(relay.next(), b"request")


def test_what_comes_while_the_next_is_dialled_is_kept_behind_it() -> None:
    relay = Joined()
    relay.down.receive(b"one ")
    relay.up.lose()
    relay.down.receive(b"two ")
    relay.serves(relay.next(), b"one two ")


@pytest.mark.parametrize("taken", [1, 6, 7])
def test_what_was_written_is_never_sent_again(taken: int) -> None:
    relay = Joined()
    relay.down.receive(b"request")
    relay.up.take(taken)
    relay.up.lose()
    relay.is_cut()
    assert not relay.endpoints[1].dials


def test_a_part_that_a_transport_hands_back_is_not_enough() -> None:
    relay = Joined()
    relay.down.receive(b"request")
    relay.up.take()
    relay.down.receive(b" more")
    relay.up.dataBuffer = b""
    relay.up.lose(WriteRefused(b" more"))
    relay.is_cut()


def test_a_server_that_has_spoken_is_not_replaced() -> None:
    relay = Joined()
    relay.up.receive(b"hello")
    relay.down.take()
    relay.up.lose()
    relay.is_cut()


def test_an_end_of_data_is_an_answer() -> None:
    relay = Joined()
    relay.up.receive_eof()
    assert relay.down.write_shut
    relay.up.lose()
    relay.is_cut(Ending.UPSTREAM_WRITE_FAILED)


@pytest.mark.parametrize("half_close", [True, False])
def test_a_close_is_an_answer(half_close: bool) -> None:
    relay = Joined(half_close=half_close)
    relay.up.lose(ConnectionDone())
    assert not relay.endpoints[1].dials
    relay.down.lose(ConnectionDone())
    assert relay.session.ending is Ending.DONE


def test_a_server_that_vanishes_is_not_replaced() -> None:
    relay = Joined()
    relay.up.lose(PeerVanished("timed out"))
    relay.is_cut(Ending.UPSTREAM_LOST)


# -- what is written besides


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("early", [b"", b"early"])
def test_each_server_gets_its_own_header(early: bytes, taken: bool) -> None:
    """That one was written is nothing to the client."""
    relay = Joined(early=early, send_proxy="v1")
    if taken and early:
        relay.up.take()
        relay.up.lose()
        relay.is_cut()
        return
    if taken:
        relay.up.take()
        assert relay.up.taken == V1
    relay.up.lose()
    server = relay.next()
    server.take()
    assert server.taken == V1 + early
    up = relay.session.up
    assert up.read == len(early)
    assert up.written == len(V1 + early)
    relay.down.lose()
    server.lose()
    relay.over(*HEARD, "closed downstream_reset")


@pytest.mark.parametrize("taken", [0, 10, len(V1)])
def test_a_header_that_was_taken_in_part(taken: int) -> None:
    relay = Joined(early=b"early", send_proxy="v1")
    relay.up.take(taken)
    relay.up.lose()
    server = relay.next()
    server.take()
    assert server.taken == V1 + b"early"
    relay.down.lose()
    server.lose()


def test_a_server_of_another_kind_gets_no_header() -> None:
    relay = Joined(early=b"early", send_proxy="v1")
    relay.servers[1].preamble = lambda session: b"hello "
    relay.up.lose()
    server = relay.next()
    server.take()
    assert server.taken == b"hello early"
    relay.down.lose()
    server.lose()


def test_a_header_of_the_first_server_is_not_taken_for_the_next_one_s() -> None:
    relay = Joined(3, send_proxy="v1")
    for each in relay.servers[1:]:
        each.preamble = lambda session: b""
    relay.up.lose()
    server = relay.next()
    relay.down.receive(b"request")
    server.take()
    assert server.taken == b"request"
    server.lose()
    relay.is_cut(attempts=2)


# -- who is left out


def test_a_client_that_has_ended_its_side_after_a_request() -> None:
    relay = Joined()
    relay.down.receive(b"request")
    relay.down.receive_eof()
    relay.up.lose()
    server = relay.next()
    server.take()
    assert server.taken == b"request"
    server.turn()
    assert server.write_shut
    server.receive(b"answer")
    relay.down.take()
    assert relay.down.taken == b"answer"
    server.receive_eof()
    assert relay.session.ending is Ending.DONE


def test_a_client_that_has_ended_its_side_without_a_word_has_left() -> None:
    relay = Joined()
    relay.down.receive_eof()
    relay.up.lose()
    relay.is_cut()


def test_a_client_that_has_closed_its_connection_is_not_there() -> None:
    """What can't half-close is lost with its end of data."""
    relay = Joined()
    relay.down.receive(b"request")
    relay.down.lose(ConnectionDone())
    assert relay.session.ending is None
    relay.up.lose()
    relay.is_cut()


def test_a_session_that_ends_with_its_client_s_end_of_data() -> None:
    relay = Joined(half_close=False)
    # Its close takes a while, as with TLS.
    close, relay.down.loseConnection = relay.down.loseConnection, lambda: None  # type: ignore[method-assign]
    relay.down.receive(b"request")
    relay.down.receive_eof()
    relay.up.lose()
    assert not relay.endpoints[1].dials
    close()
    relay.down.turn()
    assert not any(relay.counts)


@pytest.mark.parametrize(
    "options", [{"retries": 0}, {"retries": 0, "dial_timeout": 1}], ids=str
)
def test_without_retries_the_session_ends(options: dict[str, Any]) -> None:
    relay = Joined(**options)
    relay.up.lose()
    relay.is_cut()
    # As it always did: it was connected.
    assert relay.session.connected_at is not None


def test_there_are_so_many_attempts() -> None:
    relay = Joined(4, retries=2)
    relay.up.lose()
    relay.next(1).lose()
    relay.next(2).lose()
    relay.is_cut(attempts=3)


def test_the_time_of_all_attempts_counts_from_the_first() -> None:
    relay = Joined(dial_timeout=3, connect_timeout=2)
    relay.clock.advance(2.5)
    relay.up.lose()
    relay.clock.pump([0.3] * 4)
    assert relay.session.detail == "no connection in 0.5 s"
    relay.is_cut(Ending.CONNECT_TIMEOUT, 2)
    relay = Joined(dial_timeout=3)
    relay.clock.advance(3)
    relay.up.lose()
    relay.is_cut()


def test_the_only_server_is_dialled_again_after_a_pause() -> None:
    relay = Joined(1, retries=2)
    relay.down.receive(b"request")
    relay.up.lose()
    assert relay.session.stage is Stage.DIALING
    assert relay.counts == [0]
    relay.clock.advance(PAUSE_FIRST)
    relay.serves(relay.next(0), b"request")


def test_with_nobody_left_the_client_is_reset() -> None:
    relay = Joined(retries=1, dial_timeout=PAUSE_FIRST / 2)
    relay.servers[1].disabled = True  # type: ignore[attr-defined]
    relay.servers[1].changed()  # type: ignore[attr-defined]
    relay.up.lose()
    relay.is_cut()
    assert relay.session.detail == RESET_DETAIL


def test_a_client_waits_while_no_server_is_left() -> None:
    relay = Joined(1, retries=2, wait_for_server=5)
    relay.down.receive(b"request")
    [server] = relay.servers
    assert isinstance(server, Server)
    relay.up.lose()
    server.checked(False, "no answer")
    relay.clock.advance(PAUSE_FIRST)
    server.checked(True, "connected")
    relay.clock.advance(0)
    relay.serves(relay.next(0), b"request")


@pytest.mark.parametrize("what", ["leaves", "is drained", "is aborted"])
def test_a_session_that_ends_while_the_next_is_dialled(what: str) -> None:
    relay = Joined()
    relay.up.lose()
    if what == "leaves":
        relay.down.lose()
    elif what == "is drained":
        relay.factory.drain(0)
    else:
        relay.factory.abort_all()
    relay.is_cut(Ending.CLIENT_LEFT if what == "leaves" else Ending.DRAINED, attempts=2)
    assert relay.endpoints[1].cancelled == 1


def test_a_client_that_has_left_already_is_not_served() -> None:
    """Its reset was read first: there is nobody to dial for."""
    relay = Joined()
    relay.down.lose()
    relay.up.lose()
    relay.is_cut(Ending.DOWNSTREAM_RESET)


def test_a_server_that_is_cut_is_not_replaced() -> None:
    relay = Joined(cut=True)
    relay.servers[0].checked(False, "no answer")  # type: ignore[attr-defined]
    relay.is_cut(Ending.UPSTREAM_DOWN)


def test_a_program_s_own_answer_to_a_failure_hears_of_it() -> None:
    heard = []
    relay = Joined()

    def failed(attempt: Any) -> None:
        heard.append((attempt.ending, attempt.detail, attempt.upstream))
        type(relay.protocol).attempt_failed(relay.protocol, attempt)

    relay.protocol.attempt_failed = failed
    relay.up.lose()
    assert heard == [(Ending.UPSTREAM_RESET, RESET_DETAIL, relay.servers[0])]
    relay.serves(relay.next())


def test_a_judge_that_fails_ends_the_session(logged_failures: LoggedFailures) -> None:
    class Judge:
        def reset(self, *_: object) -> None:
            raise ZeroDivisionError

    relay = Joined()
    relay.servers[0].passive = Judge()  # type: ignore[attr-defined]
    relay.up.lose()
    logged_failures.take("ZeroDivisionError")
    relay.is_cut(Ending.FAILED)


# -- what is read and held meanwhile


def test_much_that_was_refused_is_held_and_the_client_read_on_later() -> None:
    relay = Joined()
    sent = bytes(HOLD_LIMIT + 1)
    relay.down.receive(sent)
    assert relay.protocol.paused == PEER_FULL
    relay.up.lose()
    assert relay.protocol.paused == HOLDING
    assert not relay.down.reading
    server = relay.next()
    assert server.dataBuffer == sent
    server.take()
    assert relay.down.reading
    relay.serves(server, sent)


def test_a_client_whose_bandwidth_is_limited() -> None:
    relay = Relay(2)
    relay.factory.bandwidth = Bandwidth(Rates(1e4, 1e4), clock=relay.clock)
    client = relay.client()
    client.arrive(bytes(3000))
    up = relay.endpoints[0].dial.connect()
    run(relay, 1)
    # The rest was not read: it waits for the server.
    assert 0 < len(up.dataBuffer) < 3000
    up.lose()
    server = relay.endpoints[1].dial.connect()
    for each in (server, client):
        each.add_capacity(1 << 20)
    client.arrive(bytes(20_000))
    server.arrive(bytes(5000))
    run(relay, 5)
    assert len(server.taken) == 23_000
    assert len(client.taken) == 5000
    client.lose()
    server.lose()
    relay.clock.advance(0)
    assert not relay.factory.sessions
    relay.factory.stopFactory()
    assert not relay.clock.getDelayedCalls()


# -- other transports


@pytest.mark.parametrize("said", [b"", b"request"])
def test_of_tls_nothing_comes_back(said: bytes) -> None:
    """What it holds is encrypted; but with nothing said there is nothing to lose."""
    relay = Joined()
    relay.up.lose()
    tls: Any = relay.endpoints[1].dials[-1].connect(transport=FakeTLSTransport(9000))
    tls.clock = relay.clock
    tls.shake_hands()
    if said:
        relay.down.receive(said)
    tls.lose()
    if said:
        relay.is_cut(attempts=2)
    else:
        relay.clock.advance(PAUSE_FIRST * 2)
        relay.serves(relay.next(0))


def test_of_a_wrapper_nothing_comes_back() -> None:
    below = FakeTransport()
    below.dataBuffer = b"changed"
    wrapper: Any = ProtocolWrapper(WrappingFactory(None), None)
    wrapper.transport = below
    assert wrapper.dataBuffer == b"changed"
    assert refused_bytes(wrapper, None) == b""
    assert refused_bytes(below, None) == b"changed"
    assert refused_bytes(object(), None) == b""


def test_a_socks_client_was_told_that_it_is_connected() -> None:
    proxy = Proxy()
    client = proxy.client()
    client.receive(CONNECT)
    server = proxy.server.dial.connect()
    client.take()
    assert client.taken.startswith(b"\0\x5a")
    proxy.factory.retries = Relay(2).factory.retries
    server.lose()
    client.turn()
    [session] = proxy.witness.sessions
    assert session.ending is Ending.UPSTREAM_RESET
    assert session.attempts == 1


# -- passive health


def judged(relay: Relay, **limits: Any) -> Ejector:
    return Ejector(relay.factory.pool, relay.clock, FailLimits(**limits))


def test_a_server_that_resets_each_session_is_taken_out() -> None:
    relay = Relay(2)
    ejector = judged(relay)
    for _ in range(3):
        client = relay.client()
        relay.endpoints[0].dials[-1].connect().lose()
        server = relay.endpoints[1].dials[-1].connect()
        client.lose()
        server.lose()
        relay.client().lose()
    first = relay.servers[0]
    assert ejector.out == [first]
    assert RESET_DETAIL in first.why  # type: ignore[attr-defined]
    ejector.stop()


@pytest.mark.parametrize("kind", [Server, Upstream])
def test_so_it_is_where_that_can_not_be_retried(kind: Any) -> None:
    relay = Relay(2, kind)
    ejector = judged(relay, max_fails=2)
    for _ in range(2):
        client = relay.client()
        client.receive(b"request")
        up = relay.endpoints[0].dials[-1].connect()
        up.take()
        up.lose()
        client.turn()
        relay.client().lose()
    assert ejector.out == ([relay.servers[0]] if kind is Server else [])
    assert not any(relay.counts)
    ejector.stop()


@pytest.mark.parametrize("how", ["closed", "answered", "left", "lost", "of the client"])
def test_what_does_not_speak_against_a_server(how: str) -> None:
    relay = Relay(2, retries=0)
    ejector = judged(relay, max_fails=1)
    client = relay.client()
    up = relay.endpoints[0].dial.connect()
    if how == "closed":
        up.lose(ConnectionDone())
        client.lose(ConnectionDone())
    elif how == "answered":
        up.receive(b"hello")
        client.take()
        up.lose()
    elif how == "left":
        client.receive_eof()
        up.lose()
    elif how == "lost":
        up.lose(PeerVanished("timed out"))
    else:
        client.lose()
        up.lose()
    relay.clock.pump([0.0] * 3)
    assert not relay.factory.sessions
    assert not any(relay.counts)
    assert not ejector.out
    relay.factory.stopFactory()
