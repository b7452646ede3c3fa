"""The service as it starts, listens, drains and stops."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import pytest_twisted
from twisted.application.service import IService
from twisted.internet import reactor
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, fail, maybeDeferred, succeed
from twisted.internet.error import CannotListenError
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent
from zope.interface.verify import verifyObject

from relayd.configuring.address_grammar import parse_destination, parse_listener
from relayd.configuring.config import Config, Relay
from relayd.core.errors import CannotStart, ListenError
from relayd.core.observers import Observer
from relayd.core.session import Ending, Session
from relayd.observing.line_log import EVENTS
from relayd.operating.relays import unit_of
from relayd.operating.running import LAST, RelayService
from relayd.operating.standing import Listening
from relayd.operating.units import Workshop
from tests.conftest import LoggedFailures, descriptors
from tests.support.contracts import turns, until
from tests.support.process import Server, connect, reset


def listening(listen: str, *destinations: str, **settings: Any) -> Listening:
    """A listener to be opened, from texts."""
    to = tuple(map(parse_destination, destinations))
    where = Relay((parse_listener(listen),), to, "web", **settings)
    [made] = unit_of(where, Workshop(Config(()), reactor, EVENTS)).listenings
    return made


class Endings(Observer):
    """How the sessions of a listener end."""

    def __init__(self, each: Listening) -> None:
        self.endings: list[Ending | None] = []
        each.factory.observer = self

    def closed(self, session: Session) -> None:
        self.endings.append(session.ending)


def port_of(service: RelayService, number: int = 0) -> int:
    """The port of one of its listeners."""
    host: Any = service.ports[number].getHost()
    return int(host.port)


def refuses(port: int, host: str = "127.0.0.1") -> bool:
    """Whether nobody listens there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family)) as client:
        return client.connect_ex((host, port)) == errno.ECONNREFUSED


@asynccontextmanager
async def session(
    service: RelayService, server: Server
) -> AsyncIterator[tuple[socket.socket, socket.socket]]:
    """A session through the service: its client and its server, joined."""
    with connect(port_of(service)) as client:
        client.sendall(b"?")
        server.socket.setblocking(False)
        accepted: list[socket.socket] = []

        def dialled() -> bool:
            try:
                accepted.append(server.socket.accept()[0])
            except BlockingIOError:
                return False
            return True

        await until(dialled, "a dial")
        with accepted[0] as upstream:
            upstream.setblocking(False)

            def arrived() -> bool:
                try:
                    return upstream.recv(1) == b"?"
                except BlockingIOError:
                    return False

            await until(arrived, "the client's byte")
            yield client, upstream


# -- starting


@pytest_twisted.ensureDeferred
async def test_it_listens_while_it_runs() -> None:
    """From start to stop, and the log says where and for whom."""
    with Server() as server:
        service = RelayService([listening("127.0.0.1:0", server.address)], 1, reactor)
        assert verifyObject(IService, service)
        with capturedLogs() as events:
            service.privilegedStartService()
            service.startService()
        port = port_of(service)
        lines = [formatEvent(event) for event in events]
        to = f"relaying to {server.address}"
        assert f"listening on 127.0.0.1:{port}, relay=web, {to}" in lines
        assert len([line for line in lines if "listening" in line]) == 1
        async with session(service, server):
            assert service.sessions == 1
        await until(lambda: not service.sessions)
        await service.stopService()
        assert service.ports == []
        assert refuses(port)


@pytest_twisted.ensureDeferred
async def test_it_listens_without_the_privileged_step_too() -> None:
    """`twist` leaves it out."""
    service = RelayService([listening("127.0.0.1:0", "9")], 1, reactor)
    service.startService()
    assert not refuses(port_of(service))
    await service.stopService()


@pytest_twisted.ensureDeferred
async def test_a_relay_that_is_stopped() -> None:
    """The log says so, and nothing waits for it."""
    with Server() as server:
        runs = listening("127.0.0.1:0", server.address)
        stopped = listening("127.0.0.1:0", server.address, enabled=False)
        assert not stopped.enabled
        # Of two listeners: it is said once.
        other = attrs.evolve(stopped, name="other")
        service = RelayService([stopped, runs, other], 1, reactor)
        with capturedLogs() as events:
            service.privilegedStartService()
            service.startService()
        lines = [formatEvent(event) for event in events]
        assert lines.count("relay web is stopped") == 1
        assert len([line for line in lines if "listening" in line]) == 1
        assert service.standing == {runs}
        assert service.all_listening
        assert len(service.ports) == 1
        await service.stopService()


@pytest_twisted.ensureDeferred
async def test_a_service_of_relays_that_are_stopped() -> None:
    """It runs, and has nothing to wait for as it stops."""
    service = RelayService([listening("1", "9", enabled=False)], 1, reactor)
    service.startService()
    assert service.all_listening
    assert service.ports == []
    await service.stopService()


@pytest_twisted.ensureDeferred
async def test_it_can_be_started_again() -> None:
    """After a stop it relays as before, with the privileged step and without."""
    with Server() as server:
        service = RelayService([listening("127.0.0.1:0", server.address)], 1, reactor)
        for privileged in (False, True, False):
            if privileged:
                service.privilegedStartService()
            service.startService()
            assert len(service.ports) == 1
            async with session(service, server):
                assert service.sessions == 1
            await service.stopService()
            assert service.sessions == 0


@pytest_twisted.ensureDeferred
async def test_starting_again_ends_a_drain_that_is_under_way() -> None:
    """Those that were to finish may go on, beside those that come."""
    with Server() as server:
        service = RelayService([listening("127.0.0.1:0", server.address)], 60, reactor)
        service.startService()
        async with session(service, server) as (client, upstream):
            stopping = service.stopService()
            await turns()
            assert not stopping.called
            service.startService()
            await stopping
            async with session(service, server):
                client.sendall(b"still")
                await until(lambda: _received(upstream) == b"still")
                assert service.sessions == 2
        await service.stopService()


@pytest_twisted.ensureDeferred
async def test_every_address_of_a_listener_is_logged() -> None:
    """The port that was left to the kernel is the same on both families."""
    service = RelayService([listening("0", "9")], 1, reactor)
    with capturedLogs() as events:
        service.startService()
    port = port_of(service)
    lines = [formatEvent(event) for event in events]
    for address in (f"0.0.0.0:{port}", f"[::]:{port}"):
        assert f"listening on {address}, relay=web, relaying to 127.0.0.1:9" in lines
    await service.stopService()
    assert refuses(port)
    assert refuses(port, "::1")


@pytest_twisted.ensureDeferred
async def test_all_listeners_or_none(tmp_socket: Path) -> None:
    """The third fails: the two before it are closed, the fourth is not tried."""
    before = descriptors()
    with Server() as taken:
        own = [
            listening("127.0.0.1:0", "9"),
            listening(f"unix:{tmp_socket}", "9"),
            listening(taken.address, "9"),
        ]
        last: Any = Never()
        service = RelayService([*own, attrs.evolve(own[0], endpoint=last)], 1, reactor)
        ports: list[Any] = []
        with capturedLogs() as events, pytest.raises(CannotStart) as caught:
            service.privilegedStartService()
        ports = [event["address"] for event in events if "address" in event]
        assert caught.value.code == (
            f"relayd: can't listen on {taken.address}: Address already in use"
        )
    assert service.ports == []
    assert ports[1] == f"unix:{tmp_socket}"
    assert refuses(int(ports[0].rpartition(":")[2]))
    assert not tmp_socket.exists()
    assert not last.asked
    assert descriptors() == before


class Never:
    """An endpoint that nobody should ask."""

    asked = False

    def listen(self, factory: Any) -> Any:
        self.asked = True
        return Deferred()


class Late:
    """A listening endpoint that answers when the test says so."""

    def __init__(self) -> None:
        self.answer: Deferred[Any] = Deferred()

    def listen(self, factory: Any) -> Any:
        return self.answer


class Fails:
    """A listening endpoint with a problem."""

    def __init__(self, problem: Exception) -> None:
        self.problem = problem

    def listen(self, factory: Any) -> Any:
        return fail(self.problem)


def test_why_a_listener_failed_is_one_line() -> None:
    """Ours says it by itself; of Twisted's errors the system's own is taken."""
    in_use = OSError(errno.EADDRINUSE, "Address already in use")
    for problem, says in (
        (ListenError("can't listen on x: because"), "can't listen on x: because"),
        (CannotListenError("::", 80, in_use), "can't listen on :0: Address already"),
        (in_use, "can't listen on :0: Address already in use"),
        (FileNotFoundError(2, "No such file", "/f"), "can't listen on :0: /f: No such"),
        (ValueError("no such thing"), "can't listen on :0: no such thing"),
    ):
        endpoint: Any = Fails(problem)
        each = attrs.evolve(listening("0", "9"), endpoint=endpoint)
        with pytest.raises(CannotStart) as caught:
            RelayService([each], 1, reactor).startService()
        assert str(caught.value.code).startswith(f"relayd: {says}")


def test_a_listener_that_fails_later_is_logged(
    logged_failures: LoggedFailures,
) -> None:
    """An endpoint may take its time; that nobody listens is in the log at least."""
    late: Any = Late()
    service = RelayService(
        [attrs.evolve(listening("0", "9"), endpoint=late)], 1, reactor
    )
    service.startService()
    with capturedLogs() as events:
        late.answer.errback(ListenError("can't listen on the moon: too far"))
    says = "relayd: can't listen on the moon: too far"
    assert [formatEvent(event) for event in events] == [says]
    logged_failures.take("")


class Port:
    """A listening port that remembers being stopped."""

    stopped = False

    def getHost(self) -> Any:
        return IPv4Address("TCP", "192.0.2.1", 80)

    def stopListening(self) -> Any:
        self.stopped = True
        return succeed(None)


def opens(port: Any, each: Listening) -> Listening:
    """The same with an endpoint that opens this port."""
    endpoint: Any = SimpleNamespace(listen=lambda factory: succeed(port))
    return attrs.evolve(each, endpoint=endpoint)


@pytest_twisted.ensureDeferred
async def test_a_listener_that_opens_too_late_is_closed() -> None:
    """The service was told to stop meanwhile."""
    late: Any = Late()
    service = RelayService(
        [attrs.evolve(listening("0", "9"), endpoint=late)], 1, reactor
    )
    service.startService()
    await service.stopService()
    port = Port()
    late.answer.callback(port)
    assert port.stopped


# -- stopping


@pytest_twisted.ensureDeferred
async def test_sessions_may_finish_when_it_stops() -> None:
    """New clients are refused at once; the last one that leaves ends the wait."""
    with Server() as server:
        each = listening("127.0.0.1:0", server.address)
        endings = Endings(each)
        service = RelayService([each], 60, reactor)
        service.startService()
        port = port_of(service)
        async with session(service, server) as (client, upstream):
            with capturedLogs() as events:
                stopping = service.stopService()
            assert formatEvent(events[0]) == "1 sessions may finish within 60 s"
            assert refuses(port)
            client.sendall(b"still")
            await until(lambda: _received(upstream) == b"still")
            assert not stopping.called
        await stopping
        assert endings.endings == [Ending.DONE]
        assert service.sessions == 0


def _received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(100)
    except BlockingIOError:
        return b""


@pytest_twisted.ensureDeferred
async def test_sessions_that_do_not_finish_are_aborted() -> None:
    """After the drain timeout, by a reset on both sides."""
    with Server() as server:
        each = listening("127.0.0.1:0", server.address)
        endings = Endings(each)
        service = RelayService([each], 0.05, reactor)
        service.startService()
        async with session(service, server) as (client, upstream):
            await service.stopService()
            assert endings.endings == [Ending.DRAINED]
            for sock in (client, upstream):
                sock.settimeout(1)
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)


@pytest_twisted.ensureDeferred
async def test_a_drain_can_be_ended_by_stop_now() -> None:
    """By the second signal; the stop then completes."""
    with Server() as server:
        each = listening("127.0.0.1:0", server.address)
        endings = Endings(each)
        service = RelayService([each], 60, reactor)
        service.startService()
        async with session(service, server):
            stopping = service.stopService()
            await turns(3)
            assert not stopping.called
            service.stop_now()
            await until(lambda: stopping.called)
        assert endings.endings == [Ending.DRAINED]


@pytest_twisted.ensureDeferred
async def test_without_sessions_it_stops_at_once() -> None:
    """However long they would get."""
    service = RelayService([listening("127.0.0.1:0", "9")], 60, reactor)
    service.startService()
    with capturedLogs() as events:
        stopping = service.stopService()
    assert stopping.called
    assert not [event for event in events if "finish" in str(formatEvent(event))]
    await stopping


@pytest_twisted.ensureDeferred
async def test_it_is_stopped_when_its_listeners_are() -> None:
    """Twisted's own take a turn to close, and the reactor must not end before."""
    slow: Any = Port()
    closed: Deferred[None] = Deferred()
    slow.stopListening = lambda: closed
    each = listening("127.0.0.1:0", "9")
    service = RelayService([each, opens(slow, each)], 60, reactor)
    service.startService()
    stopping = service.stopService()
    await turns(3)
    assert not stopping.called
    closed.callback(None)
    await stopping


@pytest_twisted.ensureDeferred
async def test_a_listener_that_fails_to_close_does_not_stop_the_drain(
    logged_failures: LoggedFailures,
) -> None:
    """One listener has a problem: the sessions of the others get their time."""
    with Server() as server:
        each = listening("127.0.0.1:0", server.address)
        endings = Endings(each)
        broken: Any = Port()
        broken.stopListening = lambda: 1 // 0
        service = RelayService([each, opens(broken, each)], 60, reactor)
        service.startService()
        async with session(service, server) as (client, _):
            stopping = maybeDeferred(service.stopService)
            outcome: list[Any] = []
            stopping.addBoth(outcome.append)
            await turns()
            assert (outcome, service.sessions) == ([], 1)
            reset(client)
        await until(lambda: outcome)
        assert endings.endings == [Ending.DOWNSTREAM_RESET]
    assert logged_failures.take("ZeroDivisionError")


# -- the delay before, and the end


def clocked(each: Listening, clock: Clock, **times: float) -> RelayService:
    """A service on a clock of the test's, which runs."""
    service = RelayService([each], 60, clock, **times)
    service.startService()
    return service


@pytest_twisted.ensureDeferred
async def test_clients_are_accepted_before_the_drain() -> None:
    """For the delay and no longer; it says from the start that it stops."""
    with Server() as server:
        clock = Clock()
        each = listening("127.0.0.1:0", server.address)
        service = clocked(each, clock, shutdown_delay=5)
        port = port_of(service)
        assert (service.stopping, service.draining) == (False, False)
        with capturedLogs() as events:
            stopping = service.stopService()
        lines = [formatEvent(event) for event in events]
        assert lines == ["clients are accepted for 5 s more"]
        assert (service.stopping, service.draining) == (True, False)
        clock.advance(4.9)
        async with session(service, server):
            assert service.sessions == 1
            clock.advance(0.1)
            assert service.draining
            assert refuses(port)
            assert not stopping.called
        await stopping
        assert not clock.getDelayedCalls()


@pytest_twisted.ensureDeferred
async def test_the_second_signal_ends_the_delay() -> None:
    """Nobody is waited for any more, whenever it comes."""
    with Server() as server:
        for early in (False, True):
            clock = Clock()
            each = listening("127.0.0.1:0", server.address)
            service = clocked(each, clock, shutdown_delay=5)
            async with session(service, server):
                # Both may be there before the reactor begins to stop.
                if early:
                    service.stop_now()
                stopping = service.stopService()
                if not early:
                    assert not stopping.called
                    service.stop_now()
                await stopping
                assert service.sessions == 0
            assert not clock.getDelayedCalls()


@pytest_twisted.ensureDeferred
async def test_to_start_again_ends_the_delay() -> None:
    """It goes on as if it had not been stopped, with the listeners that it has."""
    clock = Clock()
    service = clocked(listening("127.0.0.1:0", "9"), clock, shutdown_delay=5)
    port = port_of(service)
    stopping = service.stopService()
    service.startService()
    await stopping
    assert not clock.getDelayedCalls()
    assert not service.stopping
    assert not service.draining
    assert not refuses(port)
    stopping = service.stopService()
    clock.advance(5)
    await stopping
    assert refuses(port)


@pytest_twisted.ensureDeferred
@pytest.mark.parametrize("hasty", [False, True])
async def test_it_stops_whatever_does_not_close(hasty: bool) -> None:
    """A listener may never say that it has closed: the process ends all the same."""
    clock = Clock()
    stuck: Any = Port()
    stuck.stopListening = Deferred
    service = clocked(opens(stuck, listening("127.0.0.1:0", "9")), clock)
    stopping = service.stopService()
    if hasty:
        service.stop_now()
    await turns(3)
    with capturedLogs() as events:
        clock.advance(LAST + (0 if hasty else 60) - 0.1)
        assert not stopping.called
        clock.advance(0.1)
        await stopping
    assert [formatEvent(event) for event in events] == [
        "stopping, though 0 sessions have not ended, or a listener has not closed"
    ]
    assert not clock.getDelayedCalls()
