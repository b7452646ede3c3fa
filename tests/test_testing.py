"""What `relayd.testing` gives to embedders: a fake that is as real, and a contract."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionAborted, ConnectionDone
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.task import Clock, deferLater
from twisted.python.failure import Failure

from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.core.errors import ConfigError, RelayError
from relayd.routes import BadRequest, Connection, Decision
from relayd.testing import (
    FakeTransport,
    Peer,
    StreamTransportContract,
    decide,
    decide_later,
    explain,
)
from tests.support.contracts import FakeContract

#: What the kernel takes on behalf of a peer that does not read.
ROOM = 500_000


class FakePeer(Peer):
    """The far end of a FakeTransport."""

    def __init__(self, transport: FakeTransport) -> None:
        super().__init__()
        self.transport = transport
        transport.capacity = ROOM
        self._waiting = 0
        self._closed = False

    def send_some(self, data: bytes) -> int:
        if not self.transport.connected:
            raise ConnectionResetError
        # As much as a kernel would hold for a transport that does not read.
        sent = data[: max(0, ROOM - self.transport.waiting)]
        if sent:
            self.transport.arrive(sent)
        return len(sent)

    def receive_some(self, count: int) -> bytes | None:
        transport = self.transport
        data, transport.taken = transport.taken[:count], transport.taken[count:]
        if data:
            transport.add_capacity(len(data))
            return data
        if transport.aborted:
            raise ConnectionResetError
        return None if transport.connected and not transport.write_shut else b""

    def end(self) -> None:
        self.transport.arrive_eof()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.transport.arrive_close()

    def reset(self) -> None:
        self._closed = True
        self.transport.arrive_reset()


class OnFakes:
    """Connects a kind of them, in the turns of the real reactor."""

    kind = FakeTransport

    async def connect(self, protocol: Protocol) -> Peer:
        transport = self.kind(clock=reactor)
        peer = FakePeer(transport)
        transport.connect(protocol)
        return peer


class TestFakeTransport(OnFakes, FakeContract):
    """It is held to what every stream transport must do."""


class Heard(Protocol):
    def __init__(self) -> None:
        self.reasons: list[Any] = []

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.reasons.append(reason.type)


def test_a_turn_follows_what_the_network_does() -> None:
    """With a clock that a test advances; and what the test calls waits for one."""
    clock, heard = Clock(), Heard()
    one, two = FakeTransport(clock=clock).connect(heard), FakeTransport(clock=clock)
    two.connect(Protocol())
    one.abortConnection()
    assert heard.reasons == []
    two.receive(b"anything")
    assert heard.reasons == [ConnectionAborted]
    two.abortConnection()
    assert two.connected
    two.turn()
    assert not two.connected
    assert not clock.getDelayedCalls()


def test_nothing_is_received_by_one_that_is_paused() -> None:
    transport = FakeTransport().connect(Protocol())
    transport.pauseProducing()
    with pytest.raises(AssertionError, match="paused"):
        transport.receive(b"x")


# -- the contract finds what is broken


class TellsOfAbortsAtOnce(FakeTransport):
    def abortConnection(self) -> None:
        super().abortConnection()
        self.lose(ConnectionAborted())


class ReadsWhilePaused(FakeTransport):
    def pauseProducing(self) -> None:
        self.log.append("pause")


class DropsWhatIsBufferedAsItCloses(FakeTransport):
    def loseConnection(self) -> None:
        self.dataBuffer = b""
        super().loseConnection()


class NeverPausesItsProducer(FakeTransport):
    bufferSize = 1 << 40


class ClosesWhenThePeerHalfCloses(FakeTransport):
    def readConnectionLost(self, reason: Failure) -> None:
        self.lose(ConnectionDone())


class ClosesWhenItShouldHalfClose(FakeTransport):
    def loseWriteConnection(self) -> None:
        self.loseConnection()


class WritesAfterAHalfClose(FakeTransport):
    def write(self, data: bytes) -> None:
        shut, self.write_shut = self.write_shut, False
        super().write(data)
        self.write_shut = shut


class DeliversFromWithinResume(FakeTransport):
    kept = b""

    def arrive(self, data: bytes) -> None:
        self.kept += data

    def resumeProducing(self) -> None:
        super().resumeProducing()
        self.receive(self.kept)


class TakesAResetForAnEnd(FakeTransport):
    def arrive_reset(self) -> None:
        self.arrive_eof()


class SaysDoneForALoss(FakeTransport):
    def arrive_reset(self) -> None:
        self.lose(ConnectionDone())


class ForgetsItsProducer(FakeTransport):
    def abortConnection(self) -> None:
        self.producer = None
        super().abortConnection()


class WritesBackwards(FakeTransport):
    def writeSequence(self, data: Any) -> None:
        super().writeSequence(reversed(list(data)))


class TellsOfTheEndTwice(FakeTransport):
    def readConnectionLost(self, reason: Failure) -> None:
        super().readConnectionLost(reason)
        if self.connected:
            self.protocol.readConnectionLost()


BROKEN: dict[type[FakeTransport], str] = {
    TellsOfAbortsAtOnce: "abort_drops_what_is_buffered_and_resets",
    ReadsWhilePaused: "a_paused_transport_delivers_nothing_and_loses_nothing",
    DropsWhatIsBufferedAsItCloses: "close_follows_what_is_buffered",
    NeverPausesItsProducer: "a_full_buffer_pauses_its_producer_until_it_is_empty",
    ClosesWhenThePeerHalfCloses: "the_peers_half_close_leaves_writing_open",
    ClosesWhenItShouldHalfClose: "half_close_follows_what_is_buffered",
    WritesAfterAHalfClose: "a_write_after_half_close_is_ignored",
    DeliversFromWithinResume: "a_paused_transport_delivers_nothing_and_loses_nothing",
    TakesAResetForAnEnd: "a_reset_is_a_lost_connection_after_the_data",
    ForgetsItsProducer: "the_loss_of_the_connection_stops_the_producer",
    WritesBackwards: "bytes_arrive_in_order_both_ways",
    SaysDoneForALoss: "a_reset_after_half_close",
    TellsOfTheEndTwice: "the_peers_half_close_leaves_writing_open",
}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
@pytest_twisted.ensureDeferred
async def test_a_broken_transport_fails_the_contract(
    kind: type[FakeTransport], monkeypatch: pytest.MonkeyPatch, logged_failures: Any
) -> None:
    """Quickly: what never happens is not waited for as long as by a real one's test."""
    monkeypatch.setattr("relayd.testing.suite.PATIENCE", 100)

    class Case(OnFakes, StreamTransportContract):
        pass

    Case.kind = kind
    failed: list[BaseException] = []
    try:
        await getattr(Case(), f"test_{BROKEN[kind]}")()
    except (AssertionError, ConnectionError) as problem:
        failed.append(problem)
    assert failed
    logged_failures.clear()


def test_the_example_of_a_policy_passes_and_can_fail(tmp_path: Path) -> None:
    examples = Path(__file__).parent.parent / "examples"
    settings = (examples / "policy.toml").read_text()
    test = (examples / "test_policy.py").read_text()
    other = settings.replace("deny 10.1.0.66", "deny 10.1.0.67")
    for folder, text in (("same", settings), ("other", other)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test_policy.py").write_text(test)
        (tmp_path / folder / "policy.toml").write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib"]
    done = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 2
    assert all("other/test_policy.py" in line for line in failed)


def test_what_becomes_of_a_client_by_settings_of_any_kind(tmp_path: Path) -> None:
    file = tmp_path / "relayd.toml"
    file.write_text('[tcp.web]\nlisten = "8080"\ndest = "10.0.0.1:80"\n')
    config = configure(read_layers(str(file)))
    for given in (file, str(file), config, config.relays[0]):
        found = explain(given, client="10.0.0.5")
        assert (found.admitted, found.server) == (True, "10.0.0.1:80")
    with pytest.raises(ConfigError, match="no relay 'mail': there are web"):
        explain(config, relay="mail", client="10.0.0.5")


def test_tests_of_transports_need_no_settings() -> None:
    code = "import sys, relayd.testing; print('relayd.operating' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n"


# -- routes


async def by_protocol(conn: Connection) -> Any:
    if await conn.peek(3) == b"SSH":
        conn.facts["protocol"] = "ssh"
        return conn.pool("ssh")
    name = await conn.sni()
    if name is None:
        conn.reply(b"no\r\n")
        conn.refuse("no protocol")
    return conn.server(f"{name}:443")


def test_a_route_is_tested_without_a_socket() -> None:
    assert decide(by_protocol, first=b"SSH-2.0-x") == Decision(
        pool="ssh", facts={"protocol": "ssh"}
    )
    assert decide(by_protocol, sni="www.example.com").server == "www.example.com:443"
    assert decide(by_protocol, first=b"GET /") == Decision(
        refused="no protocol", reply=b"no\r\n"
    )
    with pytest.raises(ValueError, match="no pool 'ssh'; there are default"):
        decide(by_protocol, first=b"SSH-2.0-x", pools=["default"])


def test_what_a_route_is_told_of_its_client() -> None:
    seen: list[Any] = []
    meant: list[str] = []

    async def route(conn: Connection) -> Any:
        seen.append([str(conn.client), str(conn.peer), str(conn.listener)])
        seen.append([conn.requested, conn.user_id, await conn.peek(5, wait=3600)])
        meant.append(str(conn.original))
        return conn.pool()

    decide(route, client="192.0.2.7", first=b"abc")
    decide(route, client="2001:db8::1", peer="10.0.0.1:5", listener="unix:/run/x")
    decide(route, requested="example.com:80", user_id=b"fred", ended=True)
    there = "203.0.113.9:80"
    decide(route, first=b"abcdefgh", original=there, server_speaks_first=True)
    # Where it has connected to, unless it is said; of a UNIX socket nothing.
    listener = "192.0.2.254:443"
    assert meant == [listener, "None", listener, there]
    plain = ["192.0.2.1:40000", "192.0.2.1:40000", "192.0.2.254:443"]
    assert seen == [
        ["192.0.2.7:40000", "192.0.2.7:40000", "192.0.2.254:443"],
        [None, b"", b"abc"],
        ["[2001:db8::1]:40000", "10.0.0.1:5", "unix:/run/x"],
        [None, b"", b""],
        plain,
        ["example.com:80", b"fred", b""],
        plain,
        [None, b"", b""],
    ]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"first": "SSH-"}, "first is bytes, as from a socket, not 'SSH-'"),
        ({"client": 5}, "an address is text, such as '192.0.2.7', not 5"),
        ({"client": "example.com"}, "bad address 'example.com': expected one such as"),
        ({"peer": "10.0.0.1:http"}, "bad address '10.0.0.1:http': expected one such"),
        ({"listener": "443"}, "bad address '443': expected one such as 192.0.2.7"),
    ],
)
def test_what_no_client_can_be_is_said(given: Any, why: str) -> None:
    """A slip in a test would else be a test of something else."""
    with pytest.raises((TypeError, ValueError), match=f"^{why}"):
        decide(by_protocol, **given)


def test_a_route_that_waits_for_bytes_is_told_what_to_say() -> None:
    said = r"waits for 3 bytes, and 2 bytes have come: say first=\.\.\., or ended=True"
    with pytest.raises(RelayError, match=said):
        decide(by_protocol, first=b"SS")
    assert decide(by_protocol, first=b"SS", ended=True).refused == "no protocol"


def test_what_a_route_raises_is_raised() -> None:
    async def wrong(conn: Connection) -> Any:
        return {}[conn.client.host]

    async def hostile(conn: Connection) -> Any:
        await conn.until(b"\n", 5)

    async def nothing(conn: Connection) -> Any:
        """It forgets to return anything."""

    with pytest.raises(KeyError):
        decide(wrong)
    with pytest.raises(BadRequest):
        decide(hostile, first=b"123456")
    with pytest.raises(RelayError, match="nothing has returned nothing"):
        decide(nothing)


@pytest.mark.parametrize(
    "where", ["", "nonsense:", "10.0.0.1:1-3", "udp:10.0.0.1:53", "10.0.0.1:5,weight=x"]
)
def test_servers_and_filters_of_a_route_are_checked(where: str) -> None:
    async def server(conn: Connection) -> Any:
        return conn.server(where)

    async def filtered(conn: Connection) -> Any:
        conn.filter("first", size=where)
        return conn.pool()

    for route in (server, filtered):
        with pytest.raises(ConfigError):
            decide(route)


async def takes_a_reactor(conn: Connection) -> Any:
    await deferLater(reactor, 0.001)
    await conn.peek(5, wait=0.001)
    return conn.pool()


@pytest_twisted.ensureDeferred
async def test_a_route_that_takes_a_reactor() -> None:
    with pytest.raises(RelayError, match="takes a reactor: `await decide_later"):
        decide(takes_a_reactor)
    assert await decide_later(takes_a_reactor) == Decision(pool="default")
    with pytest.raises(RelayError, match="waits for 3 bytes, and 0 bytes have come"):
        await decide_later(by_protocol)
    with pytest.raises(BadRequest):
        await decide_later(by_protocol, first=b"\x16\x03\x01\0\0")


@pytest_twisted.ensureDeferred
async def test_a_test_that_is_over_cancels_its_route() -> None:
    waiting = Deferred.fromCoroutine(decide_later(takes_a_reactor))
    waiting.addErrback(lambda reason: reason.trap(CancelledError))
    waiting.cancel()
    await waiting
