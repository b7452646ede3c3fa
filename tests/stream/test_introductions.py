"""Balancers that say whose connection it is, on fakes: before the gate, once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone

from relayd.core.errors import Refused
from relayd.core.session import Ending, Session
from relayd.core.stage import Stage
from relayd.observing.line_log import LineLog
from relayd.observing.session_log import SessionLog
from relayd.preludes.socks4 import Code, write_reply
from relayd.stream.factory import Unserved
from tests.conftest import LoggedFailures
from tests.support.fakes import FakeTransport
from tests.support.proxies import CONNECT, Proxy, refused
from tests.support.relays import Relay, secret_client

#: Of a client, from the balancer at 192.0.2.1.
V1 = b"PROXY TCP4 198.51.100.9 203.0.113.1 1234 443\r\n"
LOCAL = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"
CLIENT = "198.51.100.9:1234"
BALANCER = "192.0.2.1:50000"


class Behind(Relay):
    """A relay behind a balancer, and a connection of it."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("accept_proxy", ["192.0.2.1"])
        super().__init__(handshake_timeout=2, **options)
        self.asked: list[tuple[str, str]] = []
        enter = self.gate.enter
        self.gate.enter = self.note_and(enter)  # type: ignore[method-assign]

    def note_and(self, enter: Any) -> Any:
        def noted(session: Session) -> Any:
            self.asked.append((session.client, session.peer))
            return enter(session)

        return noted

    @property
    def protocol(self) -> Any:
        [protocol] = self.factory.sessions.values()
        return protocol


def relayed(relay: Behind, client: FakeTransport, early: bytes = b"") -> None:
    """The client is relayed: what it says, and what its server says."""
    server = relay.server.dial.connect()
    client.receive(b"late")
    server.take()
    assert server.taken == early + b"late"
    server.receive(b"answer")
    client.take()
    assert client.taken == b"answer"
    assert relay.session.up.read == len(early) + 4
    client.lose(ConnectionDone())
    server.lose(ConnectionDone())


@pytest.mark.parametrize("early", [b"", b"early"])
def test_the_gate_is_asked_for_the_client_behind_the_header(early: bytes) -> None:
    relay = Behind()
    client = relay.client()
    for byte in V1[:-1]:
        client.receive(bytes([byte]))
    assert relay.protocol.session.stage is Stage.HEADER
    assert not relay.asked
    assert not relay.witness.heard
    assert not relay.server.dials
    client.receive(V1[-1:] + early)
    assert relay.asked == [(CLIENT, BALANCER)]
    assert relay.session.client == CLIENT
    assert relay.session.peer == BALANCER
    assert relay.session.ordinal == 0
    relayed(relay, client, early)
    heard = [each.partition(" ")[0] for each in relay.witness.heard]
    assert heard == ["opened", "dialing", "connected", "closed"]
    relay.over(*relay.witness.heard)


def test_a_balancer_may_speak_for_itself() -> None:
    relay = Behind()
    client = relay.client()
    client.receive(LOCAL)
    assert relay.asked == [(BALANCER, BALANCER)]
    relayed(relay, client)
    assert relay.session.header.source == ""


@pytest.mark.parametrize(
    ("peer", "networks", "trusted"),
    [
        (IPv4Address("TCP", "192.0.2.1", 1), ["192.0.2.0/24"], True),
        (IPv4Address("TCP", "192.0.3.1", 1), ["192.0.2.0/24"], False),
        (IPv6Address("TCP", "::ffff:192.0.2.1", 1), ["192.0.2.1"], True),
        (IPv6Address("TCP", "fe80::1%eth0", 1), ["fe80::/10"], True),
        (UNIXAddress(None), ["192.0.2.0/24"], False),
        (UNIXAddress(None), ["unix"], True),
    ],
)
def test_only_the_peers_that_are_named_are_trusted(
    peer: Any, networks: list[str], trusted: bool
) -> None:
    """What others send is their data, whatever it looks like."""
    relay = Behind(accept_proxy=networks)
    client = FakeTransport(clock=relay.clock)
    client.peer = peer
    client.connect(relay.factory.buildProtocol(peer))
    assert bool(relay.asked) is not trusted
    client.receive(V1)
    server = relay.server.dial.connect()
    server.take()
    assert server.taken == (b"" if trusted else V1)
    assert (relay.session.client == CLIENT) is trusted
    client.lose()
    server.lose()


@pytest.mark.parametrize("start", [b"", V1[:10], LOCAL[:13]])
def test_a_header_has_a_deadline(start: bytes) -> None:
    relay = Behind()
    client = relay.client()
    if start:
        client.receive(start)
    relay.clock.pump([0.25] * 16)
    assert not client.connected
    assert not relay.server.dials
    assert relay.factory.endings == {"handshake_timeout": 1}
    assert relay.session.detail == "no PROXY header in 2 s"
    relay.over("refused no PROXY header in 2 s")


def test_the_deadline_is_one_for_the_header_and_the_request() -> None:
    proxy = Proxy(handshake_timeout=2, accept_proxy=["192.0.2.1"])
    client = proxy.client()
    proxy.clock.pump([0.25] * 6)
    client.receive(V1 + CONNECT[:5])
    proxy.clock.pump([0.25] * 4)
    client.take()
    client.turn()
    proxy.over(Ending.HANDSHAKE_TIMEOUT)
    assert proxy.session.detail == "no request in 2 s"


@pytest.mark.parametrize(
    "start", [b"GET / HTTP/1.0\r\n\r\n", V1[:-4] + b"65536\r\n", b"PROXY " + bytes(120)]
)
def test_a_bad_header_is_a_bad_request(start: bytes) -> None:
    relay = Behind()
    client = relay.client()
    client.receive(start)
    assert not client.connected
    assert not client.aborted
    assert client.taken == b""
    assert not relay.server.dials
    assert not relay.asked
    assert relay.factory.endings == {"bad_request": 1}
    assert relay.session.client == relay.session.peer
    relay.over(f"refused {relay.session.detail}")


def test_a_bad_header_is_not_answered_by_a_proxy() -> None:
    """Who speaks no PROXY protocol speaks no SOCKS yet."""
    proxy = Proxy(accept_proxy=["192.0.2.1"])
    client = proxy.client(CONNECT)
    client.turn()
    assert not client.connected
    assert client.taken == b""
    assert proxy.factory.endings == {"bad_request": 1}


@pytest.mark.parametrize("start", [b"", V1[:10]])
def test_a_balancer_that_leaves_before_its_header(start: bytes) -> None:
    relay = Behind()
    client = relay.client()
    client.receive(start)
    client.receive_eof()
    said = "in the middle of its PROXY header" if start else "said nothing"
    assert relay.session.detail == said
    assert not relay.server.dials
    relay.over(f"refused {said}")


def test_a_balancer_that_resets_before_its_header() -> None:
    relay = Behind()
    relay.client().lose()
    assert relay.session.ending is Ending.CLIENT_LEFT
    relay.over("refused ")


def test_a_client_that_the_gate_refuses_is_reset() -> None:
    relay = Behind()
    client = relay.client()
    relay.gate.problem = Refused("not this one")
    client.receive(V1 + b"early")
    assert relay.asked == [(CLIENT, BALANCER)]
    assert client.aborted
    assert not relay.server.dials
    assert relay.session.ending is Ending.REFUSED
    assert relay.session.client == CLIENT
    assert relay.factory.endings == {"refused": 1}
    relay.over("refused not this one")


def test_a_client_that_the_gate_refuses_is_not_answered_by_a_proxy() -> None:
    proxy = Proxy(accept_proxy=["192.0.2.1"])

    def against(session: Session) -> Any:
        raise Refused("not this one")

    proxy.gate.enter = against  # type: ignore[method-assign]
    client = proxy.client(V1 + CONNECT)
    client.turn()
    assert client.taken == b""
    assert proxy.factory.endings == {"refused": 1}
    assert not proxy.factory.sessions
    assert not proxy.factory.handshakes


def test_a_gate_that_fails_ends_one_session(logged_failures: LoggedFailures) -> None:
    relay = Behind()
    client = relay.client()
    relay.gate.problem = RuntimeError("gate")
    client.receive(V1)
    assert client.aborted
    assert relay.session.ending is Ending.FAILED
    relay.over("refused could not be opened")
    logged_failures.take("RuntimeError: gate")


@pytest.mark.parametrize("at_once", [True, False])
def test_a_gate_may_end_the_session_that_it_admits(at_once: bool) -> None:
    """The lease that it returns is given back, before or after the end."""
    relay = Behind()
    client = relay.client()
    enter = relay.gate.enter

    def ends(session: Session) -> Any:
        relay.protocol.abort_session(Ending.DENIED, "by its gate")
        if at_once:
            client.turn()
        return enter(session)

    relay.gate.enter = ends  # type: ignore[method-assign]
    client.receive(V1)
    client.turn()
    assert relay.gate.inside == 0
    assert relay.session.ending is Ending.DENIED
    relay.over("refused by its gate")


@pytest.mark.parametrize("header", [b"", V1[:20], V1])
def test_a_drain_ends_it_in_whatever_stage(header: bytes) -> None:
    relay = Behind()
    client = relay.client()
    client.receive(header)
    drained = relay.factory.drain(0)
    client.turn()
    assert drained.called
    assert relay.session.ending is Ending.DRAINED
    assert relay.gate.inside == 0
    assert client.aborted


@pytest.mark.parametrize("header", [b"", V1[:20]])
def test_a_drain_admits_nobody_whose_header_has_not_come(header: bytes) -> None:
    """As it admits nobody who waits for the gate."""
    relay = Behind()
    client = relay.client()
    client.receive(header)
    drained = relay.factory.drain(60)
    relay.clock.advance(0)
    assert drained.called
    assert client.aborted
    assert not relay.asked
    assert relay.factory.endings == {"drained": 1}


def test_a_factory_that_drains_serves_no_balancer() -> None:
    relay = Behind()
    relay.factory.drain(0)
    assert isinstance(relay.factory.buildProtocol(FakeTransport().peer), Unserved)


def test_a_header_does_not_come_after_tls() -> None:
    """It comes before, and this listener has ended TLS already."""
    relay = Behind()
    client = secret_client(relay)
    client.turn()
    assert client.aborted
    late = "a PROXY header comes before TLS, which this listener ends"
    relay.over(f"refused {late}")


# -- what a proxy makes of it


def behind(proxy: Proxy, *clients: str) -> list[FakeTransport]:
    """Clients whose balancer names them, and who say nothing more."""
    made = []
    for host in clients:
        transport = FakeTransport(clock=proxy.clock)
        transport.connect(proxy.factory.buildProtocol(transport.peer))
        transport.receive(b"PROXY TCP4 %b 192.0.2.2 1234 80\r\n" % host.encode())
        made.append(transport)
    return made


def test_handshakes_count_for_the_client_that_the_header_names() -> None:
    """Not for its balancer, of which they would all share one limit."""
    proxy = Proxy(max_handshakes_per_client=2, accept_proxy=["192.0.2.1"])
    others = behind(proxy, "198.51.100.8", "198.51.100.9")
    greedy = behind(proxy, *["198.51.100.7"] * 3)
    refused(greedy[0])
    for client in (*others, *greedy[1:]):
        client.take()
        assert client.connected
    assert proxy.factory.endings == {"evicted": 1}
    proxy.factory.drain(0)
    greedy[0].turn()
    proxy.nothing_left()


def test_a_header_that_is_awaited_is_a_handshake_of_the_balancer() -> None:
    proxy = Proxy(
        max_handshakes=2, max_handshakes_per_client=2, accept_proxy=["192.0.2.1"]
    )
    first, second, third = (proxy.client() for _ in range(3))
    assert not first.connected
    assert first.taken == b"", "nothing is said before the header"
    assert second.connected
    assert third.connected
    second.receive(V1 + CONNECT)
    assert len(proxy.factory.handshakes) == 1
    proxy.factory.drain(0)
    second.turn()
    proxy.nothing_left()


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_request_behind_the_header(size: int) -> None:
    proxy = Proxy(accept_proxy=["192.0.2.1"])
    client = proxy.client()
    said = V1 + CONNECT + b"early"
    for begin in range(0, len(said), size):
        client.receive(said[begin : begin + size])
    assert proxy.session.client == CLIENT
    assert proxy.session.requested == "198.51.100.7:80"
    server = proxy.server.dial.connect()
    server.take()
    assert server.taken == b"early"
    assert proxy.session.up.read == 5
    assert proxy.session.up.written == 5
    client.lose()
    server.lose()


def test_a_full_buffer_behind_the_header() -> None:
    """What does not fit waits; nothing is lost, and nothing is out of order."""
    proxy = Proxy(accept_proxy=["192.0.2.1"])
    client = proxy.client()
    client.receive(V1 + CONNECT + b"x" * 70000)
    assert not client.reading
    server = proxy.server.dial.connect()
    server.take()
    client.receive(b"end!")
    server.take()
    assert server.taken == b"x" * 70000 + b"end!"
    client.lose()
    server.lose()


def test_the_identd_of_a_client_behind_a_balancer_is_not_asked() -> None:
    proxy = Proxy(ident=True, accept_proxy=["192.0.2.1"])
    client = proxy.client(V1 + CONNECT)
    client.take()
    assert client.taken == write_reply(Code.NO_IDENT)
    assert proxy.session.detail == (
        "the identd of a client behind a balancer can't be asked"
    )
    proxy.over(Ending.IDENT_FAILED)


# -- the log


def lines_of(relay: Behind) -> list[str]:
    found: list[str] = []
    lines = LineLog(lambda namespace, line: found.append(line))
    SessionLog(lines).closed(relay.session)
    return found


def test_the_log_names_the_client_and_the_balancer_and_what_it_says() -> None:
    relay = Behind()
    client = relay.client()
    block = bytes(12) + b"\x02\0\x0bexample.com" + b"\x05\0\x03a b"
    client.receive(b"\r\n\r\n\0\r\nQUIT\n\x21\x11" + len(block).to_bytes(2) + block)
    client.receive(b"data")
    client.lose()
    [line] = lines_of(relay)
    assert f" client=0.0.0.0:0 peer={BALANCER} " in line
    assert line.endswith(" authority=example.com unique_id='a\\x20b'")


# -- whatever happens, in whatever order


class Happening(Behind):
    """A connection behind a balancer, and all that may happen to it."""

    def __init__(self) -> None:
        super().__init__()
        self.left = V1 + b"data"
        self.takes_time = False
        self.asked_later: list[tuple[Deferred[Any], Session]] = []
        self.answer_at_once = self.gate.enter
        self.gate.enter = self._enter  # type: ignore[method-assign]
        self.transport = self.client()

    def _enter(self, session: Session) -> Any:
        if not self.takes_time:
            return self.answer_at_once(session)
        answer: Deferred[Any] = Deferred()
        self.asked_later.append((answer, session))
        return answer

    def happens(self, what: str) -> None:
        getattr(self, what)()

    def balancer_says_little(self) -> None:
        self._says(7)

    def balancer_says_all(self) -> None:
        self._says(100)

    def _says(self, count: int) -> None:
        part, self.left = self.left[:count], self.left[count:]
        if part and self.transport.connected and self.transport.reading:
            self.transport.receive(part)

    def balancer_says_nonsense(self) -> None:
        if self.transport.connected and self.transport.reading:
            self.transport.receive(b"\0" * 120)

    def balancer_ends(self) -> None:
        if self.transport.connected and self.transport.reading:
            self.transport.receive_eof()

    def balancer_resets(self) -> None:
        if self.transport.connected:
            self.transport.lose()

    def gate_takes_its_time(self) -> None:
        self.takes_time = True

    def gate_answers(self) -> None:
        for answer, session in self.asked_later:
            if not answer.called:
                try:
                    answer.callback(self.answer_at_once(session))
                except Refused:
                    answer.errback()
        self.asked_later.clear()

    def gate_closes(self) -> None:
        self.gate.problem = Refused("closed")

    def observer_ends_it(self) -> None:
        if self.factory.sessions:
            self.protocol.abort_session(Ending.DENIED)

    def server_answers(self) -> None:
        for dial in self.server.dials[-1:]:
            if not dial.deferred.called:
                dial.connect()

    def time_passes(self) -> None:
        self.clock.pump([0.25] * 4)

    def a_moment_passes(self) -> None:
        self.clock.advance(0.1)

    def drain_begins(self) -> None:
        self.factory.drain(0)


EVENTS = [name for name in vars(Happening) if name[0] != "_" and name != "happens"]


@given(st.lists(st.sampled_from(EVENTS), max_size=8))
@example(["gate_takes_its_time", "a_moment_passes", "balancer_says_all"])
def test_whatever_happens_its_lease_is_given_back_once(events: list[str]) -> None:
    happening = Happening()
    for each in events:
        happening.happens(each)
    happening.factory.drain(0)
    happening.transport.turn()
    assert not happening.factory.sessions
    assert happening.gate.inside == 0
    heard = happening.witness.heard
    ended = [each for each in heard if each.startswith(("closed", "refused"))]
    assert len(ended) == 1
    assert ended[0].startswith("closed" if "opened" in heard else "refused")
    happening.factory.stopFactory()
    assert not happening.clock.getDelayedCalls()


def test_a_balancer_s_check_is_silent() -> None:
    """With a header that names nobody, or with none."""
    for said in (LOCAL, b""):
        relay = Behind()
        client = relay.client()
        if said:
            client.receive(said)
        client.lose(ConnectionDone())
        assert relay.session.is_silent
        assert relay.factory.silent == 1
        assert not lines_of(relay)
    relay = Behind()
    client = relay.client()
    client.receive(V1[:9])
    client.lose(ConnectionDone())
    assert lines_of(relay)


# -- with a gate that takes its time


@pytest.mark.parametrize("admits", [True, False])
@pytest.mark.parametrize("request_", [b"", CONNECT[:4], CONNECT + b"early"])
def test_a_client_waits_for_its_gate_behind_the_header(
    request_: bytes, admits: bool
) -> None:
    """What came with the header is kept, and read as what it is."""
    proxy = Proxy(accept_proxy=["192.0.2.1"])
    enter, answer = proxy.gate.enter, Deferred[Any]()
    proxy.gate.enter = lambda session: answer  # type: ignore[method-assign]
    client = proxy.client(V1 + request_)
    [protocol] = proxy.factory.sessions.values()
    session = protocol.session
    assert session.stage is Stage.WAITING
    assert session.client == CLIENT
    assert not client.reading
    if admits:
        answer.callback(enter(session))
        assert client.reading
        client.receive((CONNECT + b"early late")[len(request_) :])
        server = proxy.server.dial.connect()
        server.take()
        assert server.taken == b"early late"
        assert session.up.read == session.up.written == 10
        server.lose()
    else:
        answer.errback(Refused("not this one"))
        assert client.aborted
        assert session.ending is Ending.REFUSED
    client.lose()
    assert proxy.gate.inside == 0
    assert not proxy.factory.sessions
    assert not len(proxy.factory.handshakes)


@pytest.mark.parametrize("moment", [0.0, 0.1, 0.2, 0.3])
def test_a_late_header_and_a_gate_that_takes_its_time_leave_nothing(
    moment: float,
) -> None:
    """Each of the two has its session watched."""
    relay = Behind()
    answer = Deferred[Any]()
    relay.gate.enter = lambda session: answer  # type: ignore[method-assign]
    client = relay.client()
    relay.clock.advance(moment)
    client.receive(V1)
    assert len(relay.factory.sessions) == 1
    client.lose()
    assert not relay.factory.sessions
    drained = relay.factory.drain()
    assert drained.called
    relay.factory.stopFactory()
    assert not relay.clock.getDelayedCalls()


def test_a_route_has_what_the_header_has_left_of_its_time() -> None:
    """As a handshake and preludes have."""

    async def route(conn: Any) -> Any:
        await conn.peek(1)
        return conn.pool()

    relay = Behind(route=route)
    client = relay.client()
    session = relay.protocol.session
    relay.clock.pump([0.25] * 6)
    client.receive(V1)
    assert session.stage is Stage.DECIDING
    relay.clock.pump([0.25] * 6)
    assert session.ending is Ending.HANDSHAKE_TIMEOUT
    relay.clock.pump([1.0] * 6)
    relay.over("opened", "closed handshake_timeout")
