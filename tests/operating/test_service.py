"""From settings to a relay that runs, and back to nothing."""

from __future__ import annotations

import errno
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import attrs
import pytest
import pytest_twisted
from twisted.application.service import IService, MultiService
from twisted.internet import reactor
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred, fail, maybeDeferred, succeed
from twisted.internet.error import CannotListenError
from twisted.internet.protocol import Factory
from twisted.logger import LogLevel, capturedLogs, formatEvent
from zope.interface.verify import verifyObject

from relayd.core.errors import CannotStart, ConfigError, ListenError
from relayd.core.observers import Observer
from relayd.core.session import Ending, Session
from relayd.observing.flow_lines import FlowLog, QuietFlowLog
from relayd.operating.config import DEMO_LISTENER, Config, Relay, UdpRelay, UdpSettings
from relayd.operating.demo import DemoInvitation, DemoSite
from relayd.operating.endpoints import UdpAddress, parse_destination, parse_listener
from relayd.operating.relays import relay_listening
from relayd.operating.running import Listening, RelayService
from relayd.operating.service import make_service
from relayd.operating.signals import Signals
from relayd.tcp import RelayFactory
from tests.conftest import LoggedFailures, descriptors
from tests.support.contracts import Recorder, turns, until
from tests.support.process import (
    RelayProcess,
    Server,
    connect,
    own_host,
    read_all,
    reset,
)


def listening(listen: str, *destinations: str, **settings: Any) -> Listening:
    """A listener to be opened, from texts."""
    to = tuple(map(parse_destination, destinations))
    where = Relay(parse_listener(listen), to, "web")
    return relay_listening(where, Config((), **settings), reactor)


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
        service = RelayService([listening("127.0.0.1:0", server.address)], 1)
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
    service = RelayService([listening("127.0.0.1:0", "9")], 1)
    service.startService()
    assert not refuses(port_of(service))
    await service.stopService()


@pytest_twisted.ensureDeferred
async def test_it_can_be_started_again() -> None:
    """After a stop it relays as before, with the privileged step and without."""
    with Server() as server:
        service = RelayService([listening("127.0.0.1:0", server.address)], 1)
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
        service = RelayService([listening("127.0.0.1:0", server.address)], 60)
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
    service = RelayService([listening("0", "9")], 1)
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
        service = RelayService([*own, attrs.evolve(own[0], endpoint=last)], 1)
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
            RelayService([each], 1).startService()
        assert str(caught.value.code).startswith(f"relayd: {says}")


def test_a_listener_that_fails_later_is_not_passed_over(
    logged_failures: LoggedFailures,
) -> None:
    """An endpoint may take its time; that nobody listens is in the log at least."""
    late: Any = Late()
    service = RelayService([attrs.evolve(listening("0", "9"), endpoint=late)], 1)
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


@pytest_twisted.ensureDeferred
async def test_a_listener_that_opens_too_late_is_closed() -> None:
    """The service was told to stop meanwhile."""
    late: Any = Late()
    service = RelayService([attrs.evolve(listening("0", "9"), endpoint=late)], 1)
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
        service = RelayService([each], 60)
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
        service = RelayService([each], 0.05)
        service.startService()
        async with session(service, server) as (client, upstream):
            await service.stopService()
            assert endings.endings == [Ending.DRAINED]
            for sock in (client, upstream):
                sock.settimeout(1)
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)


@pytest_twisted.ensureDeferred
async def test_waiting_can_be_ended() -> None:
    """By the second signal; what was waiting for the sessions goes on."""
    with Server() as server:
        each = listening("127.0.0.1:0", server.address)
        endings = Endings(each)
        service = RelayService([each], 60)
        service.startService()
        async with session(service, server):
            stopping = service.stopService()
            await turns(3)
            assert not stopping.called
            service.stop_now()
            await until(lambda: stopping.called)
        assert endings.endings == [Ending.DRAINED]


@pytest_twisted.ensureDeferred
async def test_nothing_is_waited_for_without_sessions() -> None:
    """However long they would get."""
    service = RelayService([listening("127.0.0.1:0", "9")], 60)
    service.startService()
    with capturedLogs() as events:
        stopping = service.stopService()
    assert stopping.called
    assert not [event for event in events if "finish" in str(formatEvent(event))]
    await stopping


@pytest_twisted.ensureDeferred
async def test_it_is_stopped_when_its_listeners_are() -> None:
    """Twisted's own take a turn to close, and the reactor must not end before."""
    service = RelayService([listening("127.0.0.1:0", "9")], 60)
    service.startService()
    slow: Any = Port()
    closed: Deferred[None] = Deferred()
    slow.stopListening = lambda: closed
    service.ports.append(slow)
    stopping = service.stopService()
    await turns(3)
    assert not stopping.called
    closed.callback(None)
    await stopping


@pytest_twisted.ensureDeferred
async def test_a_listener_that_can_not_stop_does_not_cost_sessions_their_time(
    logged_failures: LoggedFailures,
) -> None:
    """One listener has a problem: the sessions of the others get their time."""
    with Server() as server:
        each = listening("127.0.0.1:0", server.address)
        endings = Endings(each)
        service = RelayService([each], 60)
        service.startService()
        broken: Any = Port()
        broken.stopListening = lambda: 1 // 0
        service.ports.append(broken)
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


# -- putting it together


def test_what_a_relay_consists_of() -> None:
    """One service for all listeners, and the signals that stop them."""
    relays = (
        Relay(parse_listener("1"), (parse_destination("2"),)),
        Relay(parse_listener("3"), (parse_destination("db:4"),)),
    )
    service = make_service(Config(relays, drain_timeout=7), reactor)
    assert isinstance(service, MultiService)
    kinds = [type(each) for each in service]
    assert kinds == [Signals, RelayService]
    [_, made] = service
    assert made.drain_timeout == 7
    assert [(each.name, each.purpose) for each in made.listenings] == [
        (":1", "relaying to 127.0.0.1:2"),
        (":3", "relaying to db:4"),
    ]
    assert {type(each.factory) for each in made.listenings} == {RelayFactory}


def test_what_a_relay_of_datagrams_consists_of() -> None:
    """The same, beside a stream's; a server without a host is this machine."""
    relays = (
        UdpRelay(
            UdpAddress(None, 1), (UdpAddress(None, 2), UdpAddress("db", 3)), "dns"
        ),
        Relay(parse_listener("1"), (parse_destination("2"),), "web"),
    )
    [_, made] = make_service(Config(relays), reactor)
    assert [each.factory.name for each in made.listenings] == ["dns", "web"]
    assert [(each.name, each.purpose) for each in made.listenings] == [
        ("udp:1", "relaying datagrams to 127.0.0.1:2, db:3"),
        (":1", "relaying to 127.0.0.1:2"),
    ]
    for quiet, kind in ((True, QuietFlowLog), (False, FlowLog)):
        [_, made] = make_service(Config(relays, quiet=quiet), reactor)
        assert type(made.listenings[0].factory.observer.observer) is kind


def test_relays_of_datagrams_share_what_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """None gets what another was promised, and more than there is can't be had."""
    monkeypatch.setattr("relayd.operating.relays.default_max_flows", lambda: 101)
    relays = tuple(
        UdpRelay(UdpAddress(None, port), (UdpAddress("127.0.0.1", 9),))
        for port in (1, 2)
    )
    [_, made] = make_service(Config(relays), reactor)
    assert [each.factory.table.max_flows for each in made.listenings] == [50, 50]
    [_, made] = make_service(Config(relays[:1]), reactor)
    assert [each.factory.table.max_flows for each in made.listenings] == [101]
    [_, made] = make_service(Config(relays, udp=UdpSettings(max_flows=50)), reactor)
    assert [each.factory.table.max_flows for each in made.listenings] == [50, 50]
    for given, why in (
        (relays, "--max-flows 102 .* which is 50 for each of 2 listeners: raise"),
        (relays[:1], "--max-flows 102 .* which is 101: raise"),
    ):
        with pytest.raises(ConfigError, match=why):
            make_service(Config(given, udp=UdpSettings(max_flows=102)), reactor)


def test_what_the_demo_consists_of() -> None:
    """The file server starts before the relay, and the invitation comes last."""
    service = make_service(Config((), demo=True), reactor)
    kinds = [type(each) for each in service]
    assert kinds == [Signals, DemoSite, RelayService, DemoInvitation]
    [_, _, made, _] = service
    [each] = made.listenings
    assert (each.name, each.purpose) == (
        str(DEMO_LISTENER),
        "relaying to the demo's file server",
    )


# -- the demo


@pytest_twisted.ensureDeferred
async def test_the_demos_file_server(tmp_path: Path) -> None:
    """It serves a folder to those who dial it, and to this machine only."""
    (tmp_path / "note.txt").write_text("from the folder")
    site = DemoSite(reactor, str(tmp_path))
    factory: Any = Factory.forProtocol(Recorder)
    factory.noisy = False
    with pytest.raises(RuntimeError, match="not running"):
        site.connect(factory)
    site.startService()
    client: Any = await site.connect(factory)
    assert client.transport.getPeer().host == "127.0.0.1"
    client.transport.write(b"GET /note.txt HTTP/1.0\r\n\r\n")
    await until(lambda: "eof" in client.events)
    assert bytes(client.data).endswith(b"\r\n\r\nfrom the folder")
    client.transport.loseConnection()
    await until(lambda: "lost" in client.events)
    await site.stopService()
    with pytest.raises(RuntimeError, match="not running"):
        site.connect(factory)


@pytest_twisted.ensureDeferred
async def test_the_demos_file_server_that_never_ran_can_be_stopped() -> None:
    """As where its relay can't listen."""
    await DemoSite(reactor).stopService()


def test_the_demo_invites() -> None:
    """To a command that can be copied from the log."""
    with capturedLogs() as events:
        DemoInvitation().startService()
    assert "    curl http://127.0.0.1:8080/" in [formatEvent(event) for event in events]
    assert {event["log_level"] for event in events} == {LogLevel.info}


#: `twistd`, with the demo on another port: 8080 may be taken where the tests run.
DEMO_ELSEWHERE = """
import sys
from relayd.operating import config, endpoints
config.DEMO_LISTENER = endpoints.HostPort(sys.argv.pop(1), int(sys.argv.pop(1)))
from twisted.scripts.twistd import run
run()
"""


def test_the_demo_shows_the_current_folder(tmp_path: Path) -> None:
    """Through the relay, until Ctrl-C; the folder is as it was."""
    with closing(socket.socket()) as free:
        free.bind((own_host(), 0))
        host, port = free.getsockname()
    (tmp_path / "shown.txt").write_text("content")
    twistd = (sys.executable, "-c", DEMO_ELSEWHERE, host, str(port), "-n")
    running = RelayProcess("--demo", twistd=twistd, cwd=tmp_path)
    try:
        assert running.listening() == [f"{host}:{port}"]
        running.wait_for(rf"curl http://{re.escape(host)}:{port}/")
        for path, expected in (("/", b"shown.txt"), ("/shown.txt", b"content")):
            with connect(port, host) as client:
                client.sendall(b"GET " + path.encode() + b" HTTP/1.0\r\n\r\n")
                assert expected in read_all(client)
        [first, _] = running.sessions(2)
        assert first["ending"] == "done"
        running.signal(signal.SIGINT)
        assert running.wait() == 0
    finally:
        running.stop()
    assert [path.name for path in tmp_path.iterdir()] == ["shown.txt"]
