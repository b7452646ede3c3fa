"""A gate that takes its time: the client waits, and nothing is read or dialled.

And a gate's leases, over random schedules: each is given back, once.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.internet import error
from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock
from zope.interface import implementer

from relayd.admission.connect_rates import ConnectRates
from relayd.admission.gates import Gates, HoursGate
from relayd.admission.hours import OpeningHours, parse_hours
from relayd.admission.lifetimes import Lifetime
from relayd.admission.per_client import ConnectRate
from relayd.admission.session_limits import SessionLimits
from relayd.core.counts import SessionCounts
from relayd.core.errors import Refused
from relayd.core.interfaces import IGate, ILease
from relayd.core.session import Ending, Session
from relayd.core.stage import Stage
from relayd.net.upstream import Upstream
from relayd.preludes.socks4 import Code, Command, write_reply, write_request
from relayd.tcp import RelayFactory
from tests.admission.test_hours import Wall, at
from tests.conftest import LoggedFailures
from tests.support.fakes import FakeEndpoint, FakeTransport
from tests.support.proxies import Proxy
from tests.support.relays import Relay, Turnstile, Witness, secret_client


@implementer(ILease)
class Ticket:
    """A lease that says how often it was given back."""

    released = 0

    def release(self) -> None:
        self.released += 1


@implementer(IGate)
class Slow:
    """A gate that answers when the test says so.

    :ivar answers: by client, in order.
    """

    def __init__(self, *, cancels: bool = False) -> None:
        self.answers: list[Deferred[Any]] = []
        self.cancelled = 0
        self._cancels = cancels

    def _cancelled(self, _: object) -> None:
        self.cancelled += 1

    def enter(self, session: Session) -> Deferred[Any]:
        self.answers.append(Deferred(self._cancelled if self._cancels else None))
        return self.answers[-1]


def relay(gate: Any = None, **options: Any) -> tuple[Relay, Any]:
    """A relay on fakes, and its gate."""
    made = Relay(**options)
    slow = gate if gate is not None else Slow()
    made.factory.gate = slow
    return made, slow


def stage(made: Relay) -> Stage:
    [protocol] = made.factory.sessions.values()
    found: Stage = protocol.session.stage
    return found


def test_a_client_waits_and_nothing_is_read_or_dialled() -> None:
    made, gate = relay()
    client = made.client()
    assert stage(made) is Stage.WAITING
    assert not client.reading
    assert made.server.dials == []
    assert made.witness.heard == []
    ticket = Ticket()
    gate.answers[0].callback(ticket)
    assert client.reading
    assert made.witness.heard == ["opened", "dialing server:80"]
    client.receive(b"hello")
    server = made.server.dial.connect()
    server.take()
    assert server.taken == b"hello"
    client.receive_eof()
    server.receive_eof()
    made.clock.advance(0)
    assert ticket.released == 1
    made.over("opened", "dialing server:80", "connected 192.0.2.1:9000", "closed done")


def test_an_answer_that_is_there_already() -> None:
    """A Deferred that has fired, or a coroutine that waits for nothing."""

    class Quick:
        ticket = Ticket()

        async def enter(self, session: Session) -> Any:
            return self.ticket

    made, gate = relay(Quick())
    client = made.client()
    assert stage(made) is Stage.DIALING
    client.lose()
    assert gate.ticket.released == 1


def test_a_refusal_that_takes_its_time() -> None:
    made, gate = relay()
    client = made.client()
    gate.answers[0].errback(Refused("not today", "hours"))
    made.clock.advance(0)
    assert not client.connected
    assert client.log[-1] == "abort"
    session = made.session
    assert (session.ending, session.reason) == (Ending.REFUSED, "hours")
    assert session.detail == "hours: not today"
    assert made.factory.refusals == {"hours": 1}
    assert made.factory.endings == {"refused": 1}
    made.over("refused not today")


def test_a_gate_that_fails_later(logged_failures: LoggedFailures) -> None:
    made, gate = relay()
    client = made.client()
    gate.answers[0].errback(ZeroDivisionError("in the gate"))
    made.clock.advance(0)
    logged_failures.take("in the gate")
    assert not client.connected
    made.over("refused the gate failed")
    assert made.session.ending is Ending.FAILED


def test_a_gate_that_fails_for_each_client_does_not_fill_the_log(
    logged_failures: LoggedFailures,
) -> None:
    """A traceback a second, and how many failures there were."""
    made, gate = relay()
    for _ in range(3):
        made.client()
    for answer in list(gate.answers):
        answer.errback(ZeroDivisionError("in the gate"))
    made.clock.advance(0)
    logged_failures.take("in the gate")
    assert made.factory.failures == 3


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_who_gets_no_lease_does_not_come_in(
    later: bool, several: bool, logged_failures: LoggedFailures
) -> None:
    """A gate that forgets to answer has admitted nobody."""

    class Forgetful:
        def enter(self, session: Session) -> Any:
            return succeed(None) if later else None

    gate = Forgetful()
    made, _ = relay(Gates([gate, gate]) if several else gate)
    client = made.client()
    made.clock.advance(0)
    logged_failures.take("a gate answered None, which is no lease")
    assert not client.connected
    assert made.server.dials == []
    assert made.session.ending is Ending.FAILED


@pytest.mark.parametrize("cancels", [False, True])
@pytest.mark.parametrize("how", ["leaves", "reset", "overdue", "drain", "abort"])
def test_who_does_not_wait_to_the_end(cancels: bool, how: str) -> None:
    """The gate is told, if it wants to be; a lease that comes is given back."""
    made, gate = relay(Slow(cancels=cancels), handshake_timeout=3)
    counts = made.factory.counts = SessionCounts()
    client = made.client()
    if how in ("leaves", "reset"):
        client.lose(error.ConnectionLost() if how == "reset" else None)
        ending = Ending.CLIENT_LEFT
    elif how == "overdue":
        made.clock.pump([0.25] * 16)
        ending = Ending.HANDSHAKE_TIMEOUT
        assert made.session.detail == "the gate did not answer in 3 s"
    elif how == "drain":
        drained = made.factory.drain(60)
        made.clock.advance(0)
        assert drained.called, "it is a new client"
        ending = Ending.DRAINED
    else:
        made.factory.abort_all()
        made.clock.advance(0)
        ending = Ending.DRAINED
    assert not client.connected
    assert made.session.ending is ending
    assert made.factory.endings == {ending.word: 1}
    assert not made.factory.refusals
    assert counts.refused == {ending.word: 1}
    assert not counts.closed.total()
    [heard] = made.witness.heard
    assert heard.startswith("refused")
    if cancels:
        assert gate.cancelled == 1
    else:
        ticket = Ticket()
        gate.answers[0].callback(ticket)
        assert ticket.released == 1
    made.over(heard)


def test_a_gate_without_a_limit() -> None:
    made, gate = relay(handshake_timeout=0)
    client = made.client()
    made.clock.pump([1] * 100)
    assert client.connected
    gate.answers[0].callback(Ticket())
    assert stage(made) is Stage.DIALING
    client.lose()


def test_a_queue_has_its_time_beside_the_gates() -> None:
    clock = Clock()
    limits = SessionLimits(1, queue=5, queue_timeout=20, clock=clock)
    made, _ = relay(limits, handshake_timeout=3)
    first, second = made.client(), made.client()
    server = made.server.dial.connect()
    made.clock.pump([0.5] * 30)
    assert second.connected
    assert (limits.sessions, limits.waiting) == (1, 1)
    first.lose()
    server.lose()
    made.clock.advance(0)
    assert (limits.sessions, limits.waiting) == (1, 0)
    assert made.witness.heard[-3:-1] == ["opened", "dialing server:80"]
    second.lose()
    assert (limits.sessions, limits.waiting) == (0, 0)


def test_a_queue_that_has_more_time_since() -> None:
    """After a change of settings: whoever waits is not ended before."""
    clock = Clock()
    short, longer = (
        SessionLimits(1, queue=5, queue_timeout=each, clock=clock) for each in (5, 20)
    )
    made, _ = relay(short, handshake_timeout=3)
    made.client()
    made.server.dial.connect()
    waits = made.client()
    longer.succeed(short)
    made.factory.gate = longer
    made.clock.pump([0.5] * 40)
    assert waits.connected
    made.clock.pump([0.5] * 12)
    assert not waits.connected
    assert made.witness.heard[-1] == "refused the gate did not answer in 23 s"


def test_tls_waits_as_well() -> None:
    """Its handshake has its whole time, from the answer on."""
    made, gate = relay(handshake_timeout=3)
    client = secret_client(made)
    assert stage(made) is Stage.WAITING
    made.clock.pump([0.25] * 8)
    gate.answers[0].callback(Ticket())
    assert stage(made) is Stage.HANDSHAKE
    made.clock.pump([0.25] * 8)
    assert client.connected
    client.protocol.handshakeCompleted()
    assert stage(made) is Stage.DIALING
    client.lose()
    made.over("opened", "dialing server:80", "closed client_left")


def test_a_handshake_that_was_done_before() -> None:
    """Of a transport that can't be paused."""
    made, gate = relay()
    client = secret_client(made)
    client.protocol.handshakeCompleted()
    assert stage(made) is Stage.WAITING
    gate.answers[0].callback(Ticket())
    assert stage(made) is Stage.DIALING
    client.lose()
    made.over("opened", "dialing server:80", "closed client_left")


def test_a_proxys_request_is_read_after_that() -> None:
    """Also what was read by a transport that can't be paused."""
    for early in (False, True):
        gate = Slow()
        proxy = Proxy(gate=gate)
        request = write_request(Command.CONNECT, "198.51.100.7", 80)
        client = proxy.client()
        if early:
            client.protocol.dataReceived(request)
        assert not proxy.dialled
        gate.answers[0].callback(Ticket())
        if not early:
            client.receive(request)
        assert len(proxy.dialled) == 1
        server = proxy.servers[0].dial.connect()
        client.take()
        assert client.taken[:2] == write_reply(Code.GRANTED)[:2]
        client.lose()
        server.lose()


def test_a_proxys_client_is_reset_if_no_request_was_read() -> None:
    gate = Slow()
    proxy = Proxy(gate=gate)
    client = proxy.client()
    gate.answers[0].errback(Refused("no", "max_sessions"))
    client.take()
    assert client.taken == b""
    assert client.log[-1] == "abort"


def test_an_observer_that_ends_who_was_admitted() -> None:
    made, gate = relay()

    class Severe(Witness):
        def opened(self, session: Session) -> None:
            super().opened(session)
            [protocol] = made.factory.sessions.values()
            protocol.end(Ending.DENIED, "not you")

    from relayd.core.observers import Observers

    heard = Severe()
    made.factory.observer = Observers(heard)
    client, ticket = made.client(), Ticket()
    gate.answers[0].callback(ticket)
    client.take()
    assert not client.connected
    assert ticket.released == 1
    assert heard.heard == ["opened", "closed denied"]
    assert made.server.dials == []


def test_sessions_that_last_too_long() -> None:
    """Only those that are relayed have an age."""
    made = Relay(lifetime=Lifetime(10), idle_timeout=0)
    client = made.client()
    server = made.server.dial.connect()
    for _ in range(22):
        made.clock.advance(0.5)
        if client.reading:
            client.receive(b"x")
            server.take()
    assert not client.connected
    assert not server.connected
    assert made.session.ending is Ending.MAX_AGE
    assert 9 <= made.session.duration <= 11
    assert made.session.detail == "--max-age 10"
    made.over(
        "opened", "dialing server:80", "connected 192.0.2.1:9000", "closed max_age"
    )


def test_sessions_end_with_the_hours() -> None:
    """Also those that came in time; within a second and a tick."""
    clock, wall = Clock(), Wall("2026-11-30 17:59")
    hours = OpeningHours([parse_hours("08:00-18:00")], clock, wall)
    made = Relay(lifetime=Lifetime(0, hours))
    made.factory.gate = HoursGate(hours)
    client = made.client()
    server = made.server.dial.connect()
    for moment, connected in (("17:59", True), ("18:00", False)):
        wall.moment = at(f"2026-11-30 {moment}")
        clock.advance(1)
        made.clock.pump([0.5] * 4)
        assert client.connected is server.connected is connected
    assert made.session.ending is Ending.HOURS
    late = made.client()
    made.clock.advance(0)
    assert not late.connected
    assert made.witness.heard[-2:] == [
        *("closed hours", "refused outside --hours 08:00-18:00"),
    ]


# -- leases, whatever happens


class Ledger:
    """A gate that counts leases; refuses, or takes its time.

    :param answers: how it answers, in turn.
    """

    def __init__(self, answers: list[str]) -> None:
        self._answers = itertools.cycle(answers)
        self.given = self.back = 0
        #: Those who wait, and whether they can be cancelled.
        self.later: dict[Deferred[Any], bool] = {}

    def enter(self, _: object) -> Any:
        how = next(self._answers)
        if how == "refused":
            raise Refused("no")
        if how in ("later", "cancels"):
            answer: Deferred[Any] = Deferred(
                (lambda _: None) if how == "cancels" else None
            )
            self.later[answer] = how == "cancels"
            return answer
        return self.lease()

    def lease(self) -> Any:
        """A new one."""
        ledger, self.given = self, self.given + 1

        class Counted:
            released = False

            def release(self) -> None:
                assert not self.released
                self.released = True
                ledger.back += 1

        return Counted()

    def answer(self, answer: Deferred[Any], *, admits: bool) -> None:
        """Say something later; unless it was cancelled, by a canceller."""
        if self.later.pop(answer) and answer.called:
            return
        if admits:
            answer.callback(self.lease())
        else:
            answer.errback(Refused("no"))


class Faulty(Witness):
    """An observer that raises now and then."""

    def __init__(self, raises: set[str]) -> None:
        super().__init__()
        self._raises = raises

    def opened(self, session: Session) -> None:
        self._maybe("opened")

    def dialing(self, session: Session) -> None:
        self._maybe("dialing")

    def connected(self, session: Session) -> None:
        self._maybe("connected")

    def closed(self, session: Session) -> None:
        self._maybe("closed")

    def refused(self, session: Session, why: str) -> None:
        self._maybe("refused")

    def _maybe(self, what: str) -> None:
        if what in self._raises:
            raise ZeroDivisionError(f"in {what}")


ANSWERS = ["now", "now", "later", "cancels", "refused"]

HOOKS = ["opened", "dialing", "connected", "closed", "refused"]


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_leases_are_given_back_once_whatever_happens(
    logged_failures: LoggedFailures, data: st.DataObject
) -> None:
    """And the counts of limits end at zero."""
    draw = data.draw
    clock, server = Clock(), FakeEndpoint()
    limits = SessionLimits(
        draw(st.integers(1, 4)),
        draw(st.none() | st.integers(1, 3)),
        queue=draw(st.none() | st.integers(1, 3)),
        queue_timeout=2,
        clock=clock,
    )
    # Not drawn as the gate is asked: what Hypothesis raises must not be caught there.
    answers = st.lists(st.sampled_from(ANSWERS), min_size=1, max_size=8)
    ledgers = [Ledger(draw(answers)), Ledger(draw(answers))]
    rates = ConnectRates(ConnectRate(20, 1.0), clock)
    gate = Gates([ledgers[0], rates, limits, ledgers[1]])
    raises = draw(st.sets(st.sampled_from(HOOKS), max_size=1))
    factory = RelayFactory(
        Upstream(server, "server:80"),
        clock=clock,
        observer=Faulty(raises),
        gate=gate,
        handshake_timeout=3,
        connect_timeout=3,
        lifetime=Lifetime(5),
    )
    clients: list[FakeTransport] = []
    servers: list[FakeTransport] = []
    steps = [
        *("client", "client", "client", "connect", "fail", "lose", "reset", "eof"),
        *("server lose", "advance", "answer", "answer", "refuse", "abort", "drain"),
    ]
    for _ in range(draw(st.integers(1, 25))):
        step = draw(st.sampled_from(steps))
        pending = [(each, one) for each in ledgers for one in each.later]
        live = [each for each in clients if each.connected]
        dials = [each for each in server.dials if not each.deferred.called]
        if step == "client":
            transport = FakeTransport(clock=clock)
            protocol = factory.buildProtocol(transport.peer)
            if protocol is not None:
                clients.append(transport.connect(protocol))
        elif step in ("lose", "reset", "eof") and live:
            one = draw(st.sampled_from(live))
            if step == "eof":
                one.receive_eof()
            else:
                one.lose(error.ConnectionLost() if step == "reset" else None)
        elif step == "connect" and dials:
            servers.append(dials[0].connect())
        elif step == "fail" and dials:
            dials[0].fail(error.ConnectionRefusedError())
        elif step == "server lose" and servers:
            servers.pop().lose()
        elif step in ("answer", "refuse") and pending:
            ledger, answer = draw(st.sampled_from(pending))
            ledger.answer(answer, admits=step == "answer")
        elif step == "advance":
            clock.pump([0.25] * draw(st.integers(1, 8)))
        elif step == "abort":
            factory.abort_all()
        elif step == "drain":
            factory.drain(1)
    factory.drain(0)
    clock.pump([0.25] * 60)
    for ledger in ledgers:
        for answer in list(ledger.later):
            ledger.answer(answer, admits=True)
    assert not factory.sessions
    assert (limits.sessions, limits.clients, limits.waiting) == (0, 0, 0)
    for ledger in ledgers:
        assert ledger.given == ledger.back
    factory.stopFactory()
    assert not clock.getDelayedCalls()
    # Those of the observer.
    logged_failures[:] = [each for each in logged_failures if "Faulty" not in each]


def test_the_gate_of_the_other_tests_is_one() -> None:
    assert isinstance(Turnstile().enter(Session(1, "", "", 0.0)), Turnstile)
