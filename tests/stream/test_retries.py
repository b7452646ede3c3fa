"""A dial that fails is followed by another, before the client notices."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet import error
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs, formatEvent

from relayd.core.session import Ending
from relayd.net.upstream import Upstream
from relayd.stream.retries import PAUSE_FIRST
from relayd.tcp import RelayFactory
from relayd.upstreams.balance import RoundRobin
from relayd.upstreams.passive import Ejector, FailLimits
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server
from tests.conftest import LoggedFailures
from tests.support.fakes import FakeEndpoint, FakeTransport
from tests.support.relays import Witness

REFUSED = error.ConnectionRefusedError("no")


class Relay:
    """A relay to several servers, on fakes."""

    def __init__(
        self, count: int, kind: type[Upstream] = Server, **options: Any
    ) -> None:
        self.clock = Clock()
        self.endpoints = [FakeEndpoint(self.clock) for _ in range(count)]
        self.servers = [
            kind(each, f"server{number}:80")
            for number, each in enumerate(self.endpoints)
        ]
        self.witness = Witness()
        self.factory = RelayFactory(
            Pool(self.servers), clock=self.clock, observer=self.witness, **options
        )

    def client(self) -> FakeTransport:
        transport = FakeTransport(clock=self.clock)
        protocol = self.factory.buildProtocol(transport.peer)
        assert protocol is not None
        return transport.connect(protocol)

    def fail(self, number: int, problem: Exception = REFUSED) -> None:
        """The last dial to this server fails."""
        self.endpoints[number].dials[-1].deferred.errback(problem)

    @property
    def counts(self) -> list[int]:
        return [each.sessions for each in self.servers if isinstance(each, Server)]

    @property
    def retried(self) -> int:
        """The attempts that were retries."""
        assert self.factory.retries is not None
        return self.factory.retries.count

    def over(self, *heard: str) -> None:
        assert self.witness.heard == list(heard)
        assert not self.factory.sessions
        assert not any(self.counts)
        self.factory.stopFactory()
        assert not self.clock.getDelayedCalls()


@pytest.mark.parametrize("kind", [Server, Upstream])
def test_another_server_gets_all_that_the_client_has_sent(kind: Any) -> None:
    relay = Relay(2, kind)
    client = relay.client()
    client.receive(b"request")
    relay.fail(0)
    server = relay.endpoints[1].dial.connect()
    server.take()
    assert server.taken == b"request"
    [session] = relay.witness.sessions
    assert session.attempts == 2
    assert session.server is relay.servers[1]
    assert relay.retried == 1
    server.receive_eof()
    client.receive_eof()
    relay.over(
        *("opened", "dialing server0:80", "dialing server1:80"),
        *("connected 192.0.2.1:9000", "closed done"),
    )


@pytest.mark.parametrize(
    ("problem", "ending"),
    [
        (error.TimeoutError("slow"), Ending.CONNECT_TIMEOUT),
        (error.DNSLookupError("who"), Ending.UNRESOLVED),
        (error.NoRouteError("where"), Ending.CONNECT_FAILED),
    ],
)
def test_each_way_to_fail_is_followed_by_another(
    problem: Exception, ending: Ending
) -> None:
    relay = Relay(3)
    relay.client()
    assert relay.counts == [1, 0, 0]
    for number in range(3):
        relay.fail(number, problem)
    [session] = relay.witness.sessions
    assert session.attempts == 3
    assert session.ending is ending
    relay.clock.advance(0)
    relay.over(
        *("opened", *(f"dialing server{number}:80" for number in range(3))),
        f"closed {ending.word}",
    )


def test_an_attempt_without_an_answer_makes_room_for_another() -> None:
    relay = Relay(2, connect_timeout=2)
    client = relay.client()
    relay.clock.pump([0.5] * 6)
    assert relay.endpoints[0].cancelled == 1
    relay.endpoints[1].dial.connect()
    assert relay.counts == [0, 1]
    client.lose()


def test_all_attempts_have_one_time_together() -> None:
    relay = Relay(3, connect_timeout=2, dial_timeout=3)
    relay.client()
    relay.clock.pump([0.25] * 20)
    [session] = relay.witness.sessions
    assert session.ending is Ending.CONNECT_TIMEOUT
    assert session.attempts == 2
    assert session.ended_at == pytest.approx(3, abs=0.6)
    assert not any(relay.counts)


@pytest.mark.parametrize(("connect", "retries"), [(2, 0), (0, 0), (2, 2)])
def test_one_attempt_has_no_more_time_than_all_of_them(
    connect: float, retries: int
) -> None:
    relay = Relay(1, connect_timeout=connect, dial_timeout=0.5, retries=retries)
    relay.client()
    relay.clock.pump([0.25] * 6)
    [session] = relay.witness.sessions
    assert session.ending is Ending.CONNECT_TIMEOUT
    assert session.detail == "no connection in 0.5 s"
    relay.clock.advance(0)
    relay.over("opened", "dialing server0:80", "closed connect_timeout")


@pytest.mark.parametrize(("connect", "dial"), [(10, 30), (60, 60), (0, 0)])
def test_all_attempts_have_as_much_as_one_unless_said(
    connect: float, dial: float
) -> None:
    retries = Relay(2, connect_timeout=connect).factory.retries
    assert retries is not None
    assert retries.dial_timeout == dial
    # A single server costs no session anything.
    assert Relay(1, connect_timeout=connect).factory.retries is None


def test_a_pool_whose_servers_come_later_has_retries_while_it_has_several() -> None:
    """Of a name that is followed, nobody knows how many addresses it has."""
    pool = Pool([])
    pool.followed.append("dns:db.example")
    relay = Relay(0)
    factory = RelayFactory(pool, clock=relay.clock)
    retries = factory.retries
    assert retries is not None
    assert retries.retries == 0
    found = [Server(FakeEndpoint(relay.clock), f"a{number}") for number in range(2)]
    pool.replace([], found[:1])
    assert retries.retries == 0
    pool.replace([], found[1:])
    assert retries.retries == 2
    # Also of those of before a change.
    Pool(()).succeed(pool)
    assert retries.retries == 0
    assert RelayFactory(pool, clock=relay.clock, retries=0).retries is None


class Fickle(RoundRobin):
    """A selector that is plugged in, with a defect."""

    works = True

    def choose(self, candidates: Any, session: Any) -> Any:
        if not self.works:
            raise ZeroDivisionError
        return RoundRobin.choose(self, candidates, session)


@pytest.mark.parametrize("count", [1, 2])
def test_a_selector_that_fails_in_a_retry_ends_its_session(
    count: int, logged_failures: LoggedFailures
) -> None:
    relay = Relay(count, retries=2)
    selector = relay.factory.pool.selector = Fickle()
    relay.client()
    if count == 1:
        relay.fail(0)
        selector.works = False
        relay.clock.advance(PAUSE_FIRST)
    else:
        selector.works = False
        relay.fail(0)
    logged_failures.take("ZeroDivisionError")
    relay.clock.advance(0)
    relay.over("opened", "dialing server0:80", "closed failed")


def test_a_selector_that_fails_as_a_server_comes_up(
    logged_failures: LoggedFailures,
) -> None:
    relay = Relay(2, wait_for_server=5)
    for each in relay.servers:
        each.checked(False, "no answer")  # type: ignore[attr-defined]
    selector = relay.factory.pool.selector = Fickle()
    relay.client()
    selector.works = False
    relay.servers[0].checked(True, "connected")  # type: ignore[attr-defined]
    relay.clock.advance(0)
    logged_failures.take("ZeroDivisionError")
    relay.clock.advance(0)
    assert relay.factory.standby is not None
    assert not len(relay.factory.standby)
    relay.over("opened", "closed failed")


def test_the_only_server_is_dialled_again_after_a_pause() -> None:
    relay = Relay(1, Upstream, retries=2)
    client = relay.client()
    client.receive(b"request")
    relay.fail(0)
    assert len(relay.endpoints[0].dials) == 1
    relay.clock.advance(PAUSE_FIRST)
    relay.fail(0)
    relay.clock.advance(PAUSE_FIRST)
    assert len(relay.endpoints[0].dials) == 2
    relay.clock.advance(PAUSE_FIRST)
    server = relay.endpoints[0].dials[2].connect()
    server.take()
    assert server.taken == b"request"
    client.lose()


def test_a_single_server_is_not_dialled_again_unless_asked() -> None:
    relay = Relay(1)
    relay.client()
    relay.fail(0)
    relay.clock.advance(0)
    relay.over("opened", "dialing server0:80", "closed connect_refused")


def test_a_pause_that_is_longer_than_what_is_left_ends_the_session() -> None:
    relay = Relay(1, retries=9, dial_timeout=PAUSE_FIRST / 2)
    relay.client()
    relay.fail(0)
    relay.clock.advance(0)
    relay.over("opened", "dialing server0:80", "closed connect_refused")


def test_a_client_that_leaves_in_a_pause_is_forgotten() -> None:
    relay = Relay(1, retries=9)
    client = relay.client()
    relay.fail(0)
    client.lose()
    relay.over("opened", "dialing server0:80", "closed client_left")


def test_a_drain_ends_a_session_in_a_pause() -> None:
    relay = Relay(1, retries=9)
    relay.client()
    relay.fail(0)
    relay.factory.abort_all()
    relay.clock.advance(0)
    relay.over("opened", "dialing server0:80", "closed drained")


def test_a_server_that_comes_up_in_a_pause_is_tried() -> None:
    relay = Relay(2)
    down = relay.servers[1]
    assert isinstance(down, Server)
    down.checked(False, "no answer")
    client = relay.client()
    relay.fail(0)
    down.checked(True, "connected")
    relay.servers[0].disabled = True  # type: ignore[attr-defined]
    relay.servers[0].changed()  # type: ignore[attr-defined]
    relay.clock.advance(PAUSE_FIRST)
    relay.endpoints[1].dial.connect()
    assert relay.counts == [0, 1]
    client.lose()


def test_nobody_is_left_after_a_pause() -> None:
    relay = Relay(1, retries=2)
    relay.client()
    relay.fail(0)
    relay.servers[0].checked(False, "no answer")  # type: ignore[attr-defined]
    relay.clock.advance(PAUSE_FIRST)
    relay.clock.advance(0)
    relay.over("opened", "dialing server0:80", "closed connect_refused")


def test_a_client_that_leaves_while_another_is_dialled_gives_its_place_back() -> None:
    relay = Relay(2)
    client = relay.client()
    relay.fail(0)
    assert relay.counts == [0, 1]
    client.lose()
    assert relay.endpoints[1].cancelled == 1
    relay.over(
        *("opened", "dialing server0:80", "dialing server1:80"), "closed client_left"
    )


def test_a_client_whose_gate_is_up_gets_one_grace_for_all_attempts() -> None:
    relay = Relay(3, retries=9)
    client = relay.client()
    client.receive_eof()
    for number in (0, 1, 2, 0, 0):
        relay.clock.pump([0.4])
        if len(relay.endpoints[number].dials) and relay.factory.sessions:
            relay.fail(number)
    relay.clock.pump([0.4] * 4)
    assert not relay.factory.sessions
    assert relay.witness.heard[-1] == "closed client_left"


def dialled_as_client(relay: Relay) -> tuple[FakeTransport, Any]:
    """A client of the first server, which is dialled from its address; and the dial."""
    dials = relay.endpoints[0].dials
    before = len(dials)
    client = relay.client()
    if len(dials) == before:
        # It has gone to the other one.
        client.lose()
        client = relay.client()
    assert len(dials) == before + 1
    # It is asked for each address of a name.
    for _ in range(2):
        assert dials[-1].factory.client_host() == "192.0.2.1"
    return client, dials[-1]


def test_clients_that_a_server_answers_elsewhere_can_not_have_it_taken_out() -> None:
    """They are in its own network: it answers them, and not the relay."""
    relay = Relay(2, retries=0, connect_timeout=2)
    ejector = Ejector(relay.factory.pool, relay.clock, FailLimits(max_fails=2))
    served = []
    for _ in range(4):
        for answered in (False, False, True):
            client, dial = dialled_as_client(relay)
            if answered:
                dial.connect()
                served.append(client)
        relay.clock.pump([0.5] * 6)
        assert len(served) == sum(relay.counts)
    assert not ejector.out
    for client in served:
        client.lose()
    assert not any(relay.counts)
    ejector.stop()


def test_a_server_that_answers_no_client_is_taken_out() -> None:
    relay = Relay(2, retries=0, connect_timeout=2)
    ejector = Ejector(relay.factory.pool, relay.clock, FailLimits(max_fails=2))
    for _ in range(2):
        dialled_as_client(relay)
    relay.clock.pump([0.5] * 6)
    assert ejector.out == [relay.servers[0]]
    assert not any(relay.counts)
    ejector.stop()


def test_what_fails_for_want_of_descriptors_says_nothing_about_a_server() -> None:
    blamed = []

    class Judge:
        def connected(self, server: Server) -> None:
            raise AssertionError

        def failed(self, server: Server, why: str) -> None:
            blamed.append(server.name)

        def cancelled(self, server: Server) -> None:
            blamed.append("nobody")

    relay = Relay(2)
    for each in relay.servers:
        each.passive = Judge()  # type: ignore[attr-defined]
    relay.client()
    relay.fail(0, error.ConnectError(24, "too many open files"))
    relay.fail(1)
    assert blamed == ["nobody", "server1:80"]


def test_a_labelled_server_is_told_with_its_address() -> None:
    relay = Relay(1)
    relay.servers[0].label = "db1"  # type: ignore[attr-defined]
    client = relay.client()
    relay.endpoints[0].dial.connect()
    [session] = relay.witness.sessions
    assert session.upstream == "db1/192.0.2.1:9000"
    client.lose()


# -- clients that wait for a server


def test_a_client_waits_for_a_server() -> None:
    relay = Relay(1, wait_for_server=5, retries=3)
    [server] = relay.servers
    assert isinstance(server, Server)
    server.checked(False, "no answer")
    client = relay.client()
    client.receive(b"request")
    relay.clock.pump([1, 1])
    assert not relay.endpoints[0].dials
    server.checked(True, "connected")
    relay.clock.advance(0)
    upstream = relay.endpoints[0].dial.connect()
    upstream.take()
    assert upstream.taken == b"request"
    assert relay.retried == 0
    client.lose()


def test_a_client_whose_dial_has_failed_waits_when_nobody_is_left() -> None:
    relay = Relay(1, wait_for_server=5, retries=3)
    [server] = relay.servers
    assert isinstance(server, Server)
    client = relay.client()
    client.receive(b"request")
    relay.fail(0)
    server.checked(False, "no answer")
    relay.clock.advance(PAUSE_FIRST)
    assert len(relay.endpoints[0].dials) == 1
    relay.clock.pump([1, 1])
    server.checked(True, "connected")
    relay.clock.advance(0)
    upstream = relay.endpoints[0].dials[1].connect()
    upstream.take()
    assert upstream.taken == b"request"
    assert relay.retried == 1
    client.lose()


def test_it_waits_no_longer_than_all_its_attempts_have() -> None:
    relay = Relay(1, wait_for_server=60, retries=3, dial_timeout=2)
    relay.client()
    relay.fail(0)
    relay.servers[0].checked(False, "no answer")  # type: ignore[attr-defined]
    relay.clock.pump([PAUSE_FIRST, *[0.5] * 6])
    [session] = relay.witness.sessions
    assert session.detail == "no server could be chosen in 1.9 s"
    assert relay.retried == 0
    relay.clock.advance(0)
    relay.over("opened", "dialing server0:80", "closed no_upstream")


def test_a_client_waits_only_so_long() -> None:
    relay = Relay(1, wait_for_server=2)
    relay.servers[0].checked(False, "no answer")  # type: ignore[attr-defined]
    relay.client()
    relay.clock.pump([0.5] * 8)
    [session] = relay.witness.sessions
    assert session.ending is Ending.NO_UPSTREAM
    assert session.detail == "no server could be chosen in 2 s"
    relay.over("opened", "closed no_upstream")


def test_a_client_that_leaves_while_it_waits_is_forgotten() -> None:
    relay = Relay(1, wait_for_server=2)
    relay.servers[0].checked(False, "no answer")  # type: ignore[attr-defined]
    client = relay.client()
    client.lose()
    assert relay.factory.standby is not None
    assert not len(relay.factory.standby)
    relay.over("opened", "closed client_left")


def test_so_many_wait_as_there_is_room_for() -> None:
    relay = Relay(1, wait_for_server=2)
    server = relay.servers[0]
    assert isinstance(server, Server)
    assert relay.factory.standby is not None
    relay.factory.standby.most = 2
    server.max_sessions = 1
    server.checked(False, "no answer")
    clients = [relay.client() for _ in range(3)]
    assert relay.factory.standby.turned_away == 1
    server.checked(True, "connected")
    relay.clock.advance(0)
    # There is room for one; the other goes on when that has left.
    relay.endpoints[0].dial.connect()
    assert len(relay.factory.standby) == 1
    clients[0].lose()
    relay.clock.advance(0)
    relay.endpoints[0].dials[1].connect()
    assert server.sessions == 1
    clients[1].lose()
    assert server.sessions == 0


def test_servers_that_are_down_are_tried_if_no_other_can_be() -> None:
    one, two = (
        Server(FakeEndpoint(), name, weight=weight)
        for name, weight in (("a", 1), ("b", 0))
    )
    pool = Pool([one, two], try_all=True)
    one.checked(False, "no answer")

    class Asked:
        ordinal = 0

    assert pool.choose(Asked()) is one
    assert pool.choose(Asked(), [one]) is None


@pytest.mark.parametrize(
    "options", [{"retries": -1}, {"dial_timeout": -1.0}, {"wait_for_server": -1.0}]
)
def test_what_is_negative_is_refused(options: Any) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        Relay(1, **options)


# -- sessions of a server that goes down


def test_sessions_of_a_server_that_goes_down_are_reset_if_so_asked() -> None:
    relay = Relay(2, cut=True)
    clients = [relay.client() for _ in range(2)]
    connected = [each.dial.connect() for each in relay.endpoints]
    down = relay.servers[0]
    assert isinstance(down, Server)
    for _ in range(2):
        down.checked(False, "no answer")
    relay.clock.advance(0)
    assert [each.connected for each in clients] == [False, True]
    assert connected[0].aborted
    session = relay.witness.sessions[0]
    assert session.ending is Ending.UPSTREAM_DOWN
    assert session.detail == "server0:80 is down: no answer"
    assert relay.counts == [0, 1]
    down.checked(True, "connected")
    relay.client()
    relay.endpoints[0].dials[-1].connect()
    down.checked(False, "no answer")
    relay.clock.advance(0)
    assert relay.counts == [0, 1]
    clients[1].lose()
    connected[1].lose()


def test_sessions_of_a_server_that_its_operator_takes_down_are_reset_as_well() -> None:
    """Not those of one that it drains, or that it says is up."""
    relay = Relay(3, cut=True)
    clients = [relay.client() for _ in range(3)]
    connected = [each.dial.connect() for each in relay.endpoints]
    down, drained, up = relay.servers
    assert isinstance(down, Server)
    assert isinstance(drained, Server)
    assert isinstance(up, Server)
    drained.operate("drain")
    up.operate("up")
    up.checked(False, "no answer")
    down.operate("down")
    relay.clock.advance(0)
    assert [each.connected for each in clients] == [False, True, True]
    session = relay.witness.sessions[0]
    assert session.ending is Ending.UPSTREAM_DOWN
    assert session.detail == "server0:80 is down: its operator has taken it down"
    # Once its word no longer stands, what the checks say does.
    up.operate(None)
    relay.clock.advance(0)
    assert relay.counts == [0, 1, 0]
    clients[1].lose()
    connected[1].lose()


def test_a_dial_to_a_server_that_goes_down_is_made_elsewhere() -> None:
    relay = Relay(2, cut=True)
    down = relay.servers[0]
    assert isinstance(down, Server)
    ejector = Ejector(relay.factory.pool, relay.clock, FailLimits(max_fails=1))
    client = relay.client()
    client.receive(b"request")
    down.checked(False, "no answer")
    upstream = relay.endpoints[1].dial.connect()
    upstream.take()
    assert upstream.taken == b"request"
    # The checks have said so; nothing is held against it beside.
    assert not ejector.out
    assert relay.counts == [0, 1]
    client.lose()


def test_a_dial_to_the_last_server_that_goes_down_is_reset() -> None:
    relay = Relay(1, cut=True)
    client = relay.client()
    relay.servers[0].checked(False, "no answer")  # type: ignore[attr-defined]
    assert client.aborted
    relay.clock.advance(0)
    relay.over("opened", "dialing server0:80", "closed upstream_down")


def test_a_client_in_a_pause_is_not_cut_off() -> None:
    relay = Relay(1, cut=True, retries=2)
    down = relay.servers[0]
    assert isinstance(down, Server)
    client = relay.client()
    relay.fail(0)
    down.checked(False, "no answer")
    down.checked(True, "connected")
    relay.clock.advance(PAUSE_FIRST)
    relay.endpoints[0].dials[1].connect()
    assert relay.counts == [1]
    client.lose()


def test_sessions_of_a_server_that_goes_down_go_on_unless_asked() -> None:
    relay = Relay(1)
    client = relay.client()
    relay.endpoints[0].dial.connect()
    relay.servers[0].checked(False, "no answer")  # type: ignore[attr-defined]
    relay.clock.advance(0)
    assert client.connected
    assert relay.counts == [1]
    client.lose()


def test_who_wants_to_know_is_told_of_each_retry() -> None:
    """At the level of debug, which a log shows when it is told to."""
    relay = Relay(2, name="web")
    relay.client()
    with capturedLogs() as events:
        relay.fail(0)
    relay.fail(1)
    [session] = relay.witness.sessions
    told = events[0]
    assert told["log_level"] is LogLevel.debug
    assert told["log_namespace"] == "relayd.stream"
    assert formatEvent(told) == (
        f"web: session {session.id}: connect_refused of server0:80, next is server1:80"
    )
    relay.clock.advance(1)
    relay.fail(0)
    relay.clock.advance(0)
    assert session.ending is Ending.CONNECT_REFUSED
