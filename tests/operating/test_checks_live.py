"""`--check`, from the settings to where clients go: servers in the test's process."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor as _reactor
from twisted.internet.defer import maybeDeferred
from twisted.internet.protocol import DatagramProtocol, Factory, Protocol
from twisted.web.client import Agent
from twisted.web.resource import Resource
from twisted.web.server import Site

from relayd.core.errors import ConfigError
from relayd.core.flows import NewFlow
from relayd.operating.checks import ServerCheckService
from relayd.operating.running import RelayService
from relayd.operating.service import make_service
from tests.conftest import pause
from tests.support.files import config_of

reactor: Any = _reactor

#: Checks fast.
FAST = "check_every = 0.02\ncheck_timeout = 5\nrise = 2\nfall = 2\nretries = 0"


async def until(condition: Callable[[], object]) -> None:
    for _ in range(5000):
        if condition():
            return
        await pause(0.001)
    pytest.fail("it did not come")


class Page(Resource):
    """A server that says its name, and at /up whether it is up."""

    isLeaf = True

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.status = name, 200
        self.checked = 0
        self.peers: set[str] = set()

    def render_GET(self, request: Any) -> bytes:
        self.peers.add(request.getClientAddress().host)
        request.setHeader(b"connection", b"close")
        request.setHeader(b"x-name", self.name.encode())
        if request.uri == b"/up":
            self.checked += 1
            request.setResponseCode(self.status)
        return self.name.encode()


class Running:
    """A service that was started."""

    def __init__(self, service: Any) -> None:
        self.service = service
        kinds = {type(each): each for each in service}
        self.relays: Any = kinds[RelayService]
        self.checks: Any = kinds.get(ServerCheckService)

    @property
    def port(self) -> int:
        port: int = self.relays.ports[0].getHost().port
        return port

    @property
    def servers(self) -> list[Any]:
        """The servers that are checked."""
        return list(self.checks.checker._targets)

    async def asked(self, count: int) -> set[str]:
        """Who answers so many clients."""
        found = set()
        for _ in range(count):
            agent = Agent(reactor)
            url = f"http://127.0.0.1:{self.port}/".encode()
            response = await agent.request(b"GET", url)
            response.deliverBody(Protocol())
            found.update(response.headers.getRawHeaders("x-name"))
        return found


@asynccontextmanager
async def running(tmp_path: Path, text: str) -> AsyncIterator[Running]:
    config = config_of(tmp_path / "relayd.toml", f"quiet = true\n{text}")
    made = Running(make_service(config, reactor))
    # As twistd starts it.
    made.service.privilegedStartService()
    made.service.startService()
    try:
        yield made
    finally:
        await maybeDeferred(made.service.stopService)


@asynccontextmanager
async def serving(*factories: Any) -> AsyncIterator[list[str]]:
    """Servers, by their addresses."""
    ports = [reactor.listenTCP(0, each, interface="127.0.0.1") for each in factories]
    try:
        yield [f'"127.0.0.1:{each.getHost().port}"' for each in ports]
    finally:
        for each in ports:
            await maybeDeferred(each.stopListening)


def site(page: Page) -> Site:
    made = Site(page)
    made.noisy = False  # type: ignore[attr-defined]
    return made


def relay_to(addresses: list[str], check: str, kind: str = "tcp") -> str:
    fast = FAST if kind == "tcp" else FAST.replace("retries = 0", "")
    return (
        f'[{kind}.web]\nlisten = "127.0.0.1:0"\ndest = [{", ".join(addresses)}]\n'
        f"check = '{check}'\n{fast}"
    )


@pytest_twisted.ensureDeferred
async def test_clients_go_where_servers_are_up(tmp_path: Path) -> None:
    """A role that moves from one to the other, and back."""
    a, b = Page("a"), Page("b")
    a.status = 503
    async with serving(site(a), site(b)) as where:
        text = relay_to(where, "http:///up")
        async with running(tmp_path, text) as made:
            first, second = made.servers
            await until(lambda: first.why)
            assert first.why == "HTTP status 503"
            assert await made.asked(4) == {"b"}
            a.status, b.status = 200, 404
            await until(lambda: first.checked_up and not second.checked_up)
            assert await made.asked(4) == {"a"}
            b.status = 204
            await until(lambda: second.checked_up)
            assert await made.asked(4) == {"a", "b"}


@pytest_twisted.ensureDeferred
async def test_a_single_server_is_checked_too(tmp_path: Path) -> None:
    """And no check is a session."""
    page = Page("a")
    async with serving(site(page)) as where:
        async with running(tmp_path, relay_to(where, "tcp")) as made:
            [server] = made.servers
            await until(lambda: made.checks.checker.count > 5)
            assert server.checked_up
            assert server.sessions == 0
            assert await made.asked(1) == {"a"}
        assert made.checks.checker.running == 0
        count = made.checks.checker.count
        await pause(0.1)
        assert made.checks.checker.count == count, "it has stopped"


class Listening(Protocol):
    """A server that wants to know who comes: a PROXY header."""

    said = b""

    def dataReceived(self, data: bytes) -> None:
        self.said += data
        self.factory.said.add(self.said)  # type: ignore[union-attr]
        if self.said.endswith(b"PING"):
            self.transport.write(b"PONG")  # type: ignore[union-attr]


@pytest.mark.parametrize("where", ["relay", "server"])
@pytest.mark.parametrize(
    ("version", "header"),
    [("v1", b"PROXY UNKNOWN\r\n"), ("v2", b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0")],
)
@pytest_twisted.ensureDeferred
async def test_a_server_that_wants_a_header(
    tmp_path: Path, where: str, version: str, header: bytes
) -> None:
    """It is told that this is nobody's connection."""
    factory: Any = Factory.forProtocol(Listening)
    factory.noisy, factory.said = False, set()
    async with serving(factory) as [address]:
        text = relay_to([address], "tcp send=PING expect=PONG")
        if where == "relay":
            text += f'\nsend_proxy = "{version}"'
        else:
            text = text.replace(
                address, f'{{address = {address}, send_proxy = "{version}"}}'
            )
        async with running(tmp_path, text) as made:
            await until(lambda: made.checks.checker.count > 2)
            assert made.checks.checker.failed == 0
    assert header + b"PING" in factory.said


@pytest_twisted.ensureDeferred
async def test_another_port_of_a_server(tmp_path: Path) -> None:
    data, health = Page("data"), Page("health")
    async with serving(site(data), site(health)) as [address, other]:
        port = other.strip('"').rpartition(":")[2]
        text = relay_to([address], f"http://:{port}/up") + '\nsource = "127.0.0.7"'
        async with running(tmp_path, text) as made:
            await until(lambda: health.checked > 2)
            assert health.peers == {"127.0.0.7"}
            assert made.servers[0].checked_up
    assert data.checked == 0


MODULE = """
ROLES = {}

async def check(server):
    return ROLES[server.name]
"""


@pytest_twisted.ensureDeferred
async def test_a_check_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the server, as the operator has named it; it may say a weight."""
    name = "roles_of_this_test"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    a, b = Page("a"), Page("b")
    async with serving(site(a), site(b)) as where:
        text = relay_to(where, f"python:{name}:check")
        roles: Any = {}
        async with running(tmp_path, text) as made:
            module: Any = sys.modules.pop(name)
            roles = module.ROLES
            first, second = made.servers
            roles[first.name], roles[second.name] = 0, True
            await until(lambda: first.weight == 0)
            assert await made.asked(4) == {"b"}
            roles[first.name] = 7
            await until(lambda: first.weight == 7)
            roles[first.name] = True
            await until(lambda: first.weight == 1)
            assert await made.asked(4) == {"a", "b"}


class Echo(DatagramProtocol):
    noisy = False

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.peers: set[str] = set()

    def datagramReceived(self, datagram: bytes, addr: Any) -> None:
        self.peers.add(addr[0])
        self.transport.write(self.answer, addr)  # type: ignore[union-attr]


@pytest_twisted.ensureDeferred
async def test_servers_of_datagrams(tmp_path: Path) -> None:
    """One that answers, one that says something else, and one that is not there."""
    echoes = [Echo(b"pong"), Echo(b"no")]
    ports = [reactor.listenUDP(0, each, interface="127.0.0.1") for each in echoes]
    gone = reactor.listenUDP(0, Echo(b""), interface="127.0.0.1")
    where = [f'"127.0.0.1:{each.getHost().port}"' for each in (*ports, gone)]
    await gone.stopListening()
    text = relay_to(where, "udp send=ping expect=pong", "udp")
    text = text.replace("check_timeout = 5", "check_timeout = 0.5")
    text += '\nsource = "127.0.0.7"'
    async with running(tmp_path, text) as made:
        first, second, third = made.servers
        await until(lambda: second.why and third.why)
        assert [each.checked_up for each in made.servers] == [True, False, False]
        assert second.why == "'pong' did not come, but 'no'"
        assert "refused" in third.why
        [listening] = made.relays.listenings
        pool = listening.factory.balance
        asked = NewFlow("192.0.2.1:1", "192.0.2.1:1", "", "")
        assert {pool.choose(asked) for _ in range(9)} == {first}
        echoes[1].answer = b"pong"
        await until(lambda: second.checked_up)
    for each in ports:
        await each.stopListening()
    assert echoes[0].peers == {"127.0.0.7"}


@pytest_twisted.ensureDeferred
async def test_a_server_of_datagrams_by_http(tmp_path: Path) -> None:
    page = Page("a")
    page.status = 500
    async with serving(site(page)) as [address]:
        port = address.strip('"').rpartition(":")[2]
        text = relay_to(['"127.0.0.1:9"'], f"http://:{port}/up", "udp")
        async with running(tmp_path, text) as made:
            [server] = made.servers
            await until(lambda: not server.checked_up)
            assert server.why == "HTTP status 500"


def test_without_checks_there_is_nothing(tmp_path: Path) -> None:
    text = '[tcp.web]\nlisten = "0"\ndest = ["1", "2"]'
    service: Any = make_service(config_of(tmp_path / "c.toml", text), reactor)
    assert not len(Running(service).checks.checker)


def test_a_check_that_can_t_be_imported(tmp_path: Path) -> None:
    """The service does not start; the line says which relay has it."""
    config = config_of(tmp_path / "c.toml", relay_to(['"1"'], "python:no_such:check"))
    with pytest.raises(ConfigError) as problem:
        make_service(config, reactor)
    assert str(problem.value) == (
        "relay web: can't import the check python:no_such:check:"
        " ModuleNotFoundError: No module named 'no_such'"
    )
