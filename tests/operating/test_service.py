"""What a command consists of, by its settings; and the demo."""

from __future__ import annotations

import re
import signal
import socket
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import attrs
import pytest
import pytest_twisted
from twisted.application.service import MultiService, Service
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory
from twisted.logger import LogLevel, capturedLogs, formatEvent

from relayd.configuring.address_grammar import (
    UdpAddress,
    parse_destination,
    parse_listener,
)
from relayd.configuring.config import (
    DEMO_LISTENER,
    Config,
    PoolSettings,
    Relay,
    Socks4Relay,
    Socks4Settings,
    UdpRelay,
    UdpSettings,
)
from relayd.core.errors import ConfigError
from relayd.core.pool_settings import CHECK
from relayd.observing.flow_lines import FlowLog, QuietFlowLog
from relayd.operating.checks import ServerCheckService
from relayd.operating.demo import DemoInvitation, DemoSite
from relayd.operating.logs import Logs
from relayd.operating.pool_tasks import PoolTasks
from relayd.operating.running import RelayService
from relayd.operating.service import CommandService, make_service
from relayd.operating.signals import Signals
from relayd.tcp import RelayFactory
from tests.conftest import LoggedFailures
from tests.support.contracts import Recorder, until
from tests.support.process import RelayProcess, connect, own_host, read_all

# -- putting it together


def test_the_service_of_a_relay() -> None:
    """One service for all listeners, and the signals that stop them."""
    relays = (
        Relay((parse_listener("1"),), (parse_destination("2"),)),
        Relay((parse_listener("3"),), (parse_destination("db:4"),)),
    )
    service = make_service(Config(relays, drain_timeout=7), reactor)
    assert isinstance(service, MultiService)
    kinds = [type(each) for each in service]
    assert kinds == [Signals, ServerCheckService, PoolTasks, RelayService]
    [*_, made] = service
    assert made.drain_timeout == 7
    assert [(each.name, each.purpose) for each in made.listenings] == [
        (":1", "relaying to 127.0.0.1:2"),
        (":3", "relaying to db:4"),
    ]
    assert {type(each.factory) for each in made.listenings} == {RelayFactory}


def test_the_service_of_a_udp_relay() -> None:
    """The same, beside a stream's; a server without a host is this machine."""
    relays = (
        UdpRelay(
            (UdpAddress(None, 1),), (UdpAddress(None, 2), UdpAddress("db", 3)), "dns"
        ),
        Relay((parse_listener("1"),), (parse_destination("2"),), "web"),
    )
    # The pool of its two servers has tasks.
    [*_, made] = make_service(Config(relays), reactor)
    assert [each.factory.name for each in made.listenings] == ["dns", "web"]
    assert [(each.name, each.purpose) for each in made.listenings] == [
        ("udp:1", "relaying datagrams to 127.0.0.1:2, db:3"),
        (":1", "relaying to 127.0.0.1:2"),
    ]
    for quiet, kind in ((True, QuietFlowLog), (False, FlowLog)):
        [*_, made] = make_service(Config(relays, quiet=quiet), reactor)
        assert type(made.listenings[0].factory.observer.observer) is kind


def test_relays_that_are_stopped() -> None:
    """They are made, so that what is wrong with them is told; their tasks don't run."""
    two = (parse_destination("db:2"), parse_destination("db:3"))
    pool = PoolSettings(check=CHECK.parse("tcp"))
    relays = [
        Relay((parse_listener("1"),), two, "web", pool=pool, enabled=False),
        UdpRelay(
            (UdpAddress(None, 1),),
            (UdpAddress("db", 2), UdpAddress("db", 3)),
            "dns",
            enabled=False,
        ),
        Socks4Relay(name="proxy", enabled=False),
        Relay((parse_listener("3"),), (parse_destination("db:4"),), "other"),
    ]
    [_, checks, tasks, made] = make_service(Config(relays), reactor)
    assert isinstance(checks, ServerCheckService)
    assert not len(checks.checker)
    assert [each.enabled for each in made.listenings] == [False, False, False, True]
    relays[0] = attrs.evolve(relays[0], enabled=True)
    [_, checks, tasks, made] = make_service(Config(relays), reactor)
    assert isinstance(tasks, PoolTasks)
    assert len(checks.checker) == 2
    bad = Socks4Settings(bind_address="192.0.2.1")
    relays[2] = Socks4Relay(name="proxy", enabled=False, socks4=bad)
    with pytest.raises(ConfigError, match="^relay proxy: bind-address '192"):
        make_service(Config(relays), reactor)


def test_udp_relays_divide_the_limit_of_flows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """None gets what another was promised, and more than there is can't be had."""
    monkeypatch.setattr("relayd.operating.units.possible_flows", lambda **_: 101)

    def relays(*ports: int, **udp: int) -> list[UdpRelay]:
        return [
            UdpRelay(
                (UdpAddress(None, port),),
                (UdpAddress("127.0.0.1", 9),),
                udp=UdpSettings(**udp),
            )
            for port in ports
        ]

    [*_, made] = make_service(Config(relays(1, 2)), reactor)
    assert [each.factory.table.max_flows for each in made.listenings] == [50, 50]
    [*_, made] = make_service(Config(relays(1)), reactor)
    assert [each.factory.table.max_flows for each in made.listenings] == [101]
    [*_, made] = make_service(Config(relays(1, 2, max_flows=50)), reactor)
    assert [each.factory.table.max_flows for each in made.listenings] == [50, 50]
    for given, why in (
        (
            relays(1, 2, max_flows=102),
            r"^relay \w+: max-flows 102 .* 50 for each of 2 l",
        ),
        (relays(1, max_flows=102), "^max-flows 102 .* which is 101: raise"),
    ):
        with pytest.raises(ConfigError, match=why):
            make_service(Config(given), reactor)


def test_the_service_of_the_demo() -> None:
    """The file server starts before the relay, and the invitation comes last."""
    service = make_service(Config([Relay((DEMO_LISTENER,), ())], demo=True), reactor)
    kinds = [type(each) for each in service]
    assert kinds[:2] == [Signals, DemoSite]
    assert kinds[-2:] == [RelayService, DemoInvitation]
    [*_, made, _] = service
    [each] = made.listenings
    assert (each.name, each.purpose) == (
        str(DEMO_LISTENER),
        "relaying to the demo's file server",
    )


class Part(Service):
    """Notes when it is told to stop, and has stopped when the test says so."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self._told = name, told
        self.stopped: Deferred[None] = Deferred()

    def stopService(self) -> Deferred[None]:
        self._told.append(self.name)
        return self.stopped


def test_parts_stop_one_after_another(logged_failures: LoggedFailures) -> None:
    """The last first: what the relays need outlives them, and one failure."""
    told: list[str] = []
    parts = [Part(name, told) for name in ("site", "relays", "notifier")]
    service = CommandService(parts, Logs(reactor, "relayd", access_log=None))
    stopping = service.stopService()
    assert told == ["notifier"]
    parts[2].stopped.callback(None)
    assert told == ["notifier", "relays"]
    parts[1].stopped.errback(ZeroDivisionError())
    logged_failures.take("a part of the service could not be stopped")
    assert told == ["notifier", "relays", "site"]
    assert not stopping.called
    parts[0].stopped.callback(None)
    assert stopping.called


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
async def test_the_demos_file_server_can_be_stopped_without_a_start() -> None:
    """As where its relay can't listen."""
    await DemoSite(reactor).stopService()


def test_the_demo_logs_what_to_try() -> None:
    """To a command that can be copied from the log."""
    with capturedLogs() as events:
        DemoInvitation().startService()
    assert "    curl http://127.0.0.1:8080/" in [formatEvent(event) for event in events]
    assert {event["log_level"] for event in events} == {LogLevel.info}


#: `twistd`, with the demo on another port: 8080 may be taken where the tests run.
DEMO_ELSEWHERE = """
import sys
from relayd.configuring import config
from relayd.operating import endpoints
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
