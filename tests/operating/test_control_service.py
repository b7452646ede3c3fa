"""The service behind --control: its socket, from its first moment to its last."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import maybeDeferred
from twisted.logger import capturedLogs, formatEvent

from relayd.control.site import MAX_CLIENTS, MAX_STRANGERS
from relayd.core.errors import CannotStart, ConfigError
from relayd.net import binding
from relayd.operating import control_service
from relayd.operating.control_service import ControlService
from tests.control.bench import Answer, request
from tests.control.clients import SocketClient, ask, connected
from tests.control.fake_steering import FakeSteering
from tests.support.contracts import turns, until


@pytest.fixture(autouse=True)
def frozen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the tests' process collects stays."""
    told: list[str] = []
    monkeypatch.setattr("gc.freeze", lambda: told.append("frozen"))
    return told


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "c"


@pytest.fixture
def no_umask() -> Iterator[None]:
    """What is made has all of its mode."""
    before = os.umask(0)
    yield
    os.umask(before)


def service_at(path: Path, *args: Any, sessions: int = 3) -> ControlService:
    return ControlService(reactor, str(path), FakeSteering(sessions), *args)


@asynccontextmanager
async def running(service: ControlService) -> AsyncIterator[ControlService]:
    """A service that has started; all of it is gone in the end."""
    service.privilegedStartService()
    service.startService()
    try:
        yield service
    finally:
        await maybeDeferred(service.stopService)
        await until(lambda: not service.site.channels)
        assert not service.site.exchanges.answers.under_way


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest_twisted.ensureDeferred
async def test_it_answers_whom_the_kernel_says_it_is(
    path: Path, frozen: list[str]
) -> None:
    with capturedLogs() as logged:
        async with running(service_at(path)):
            # Else the collector would look at all of it, during a long answer.
            assert frozen == ["frozen"]
            answer = await ask(path, "GET", "/v1/status")
            assert answer.status == 200
            stopped = await ask(path, "POST", "/v1/relays/web/stop")
            assert stopped.json["state"] == "stopped"
    assert not path.exists()
    me = f"uid {os.getuid()}, pid {os.getpid()}"
    assert [formatEvent(each) for each in logged] == [
        f"control socket at {path}",
        f'{me}: POST /v1/relays/web/stop {{"cut": false}}: done',
    ]


@pytest_twisted.ensureDeferred
async def test_its_file_is_never_for_others(
    path: Path, no_umask: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the moment that it is there."""
    seen = []
    chmod = os.chmod

    def look(where: str, mode_: int) -> None:
        seen.append(mode(Path(where)))
        chmod(where, mode_)

    monkeypatch.setattr(binding.os, "chmod", look)
    async with running(service_at(path)):
        assert mode(path) == 0o600
    assert seen == [0o600]


@pytest.mark.parametrize("uids", [([4001], []), ([], [4002])])
@pytest_twisted.ensureDeferred
async def test_its_file_is_for_all_if_others_may_come(
    path: Path, uids: tuple[list[int], list[int]]
) -> None:
    async with running(service_at(path, *uids)):
        assert mode(path) == 0o666


@pytest_twisted.ensureDeferred
async def test_a_socket_of_a_process_that_has_ended_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
    async with running(service_at(path)):
        assert (await ask(path, "GET", "/v1/status")).status == 200
    assert not path.exists()


@pytest_twisted.ensureDeferred
async def test_why_it_can_not_be_opened(path: Path) -> None:
    """One clear line; and nothing of the others is touched."""

    def refusal(where: Path) -> str:
        with pytest.raises(CannotStart) as caught:
            service_at(where).privilegedStartService()
        return str(caught.value).replace(str(path.parent), "")

    taken = "relayd: --control: can't listen on unix:/c: Address already in use"
    async with running(service_at(path)):
        assert refusal(path) == f"{taken}: another process listens there"
        assert (await ask(path, "GET", "/v1/status")).status == 200
    path.write_text("mine")
    assert refusal(path) == f"{taken}: there is a file that is no socket"
    assert path.read_text() == "mine"
    assert refusal(path.parent / "no" / "c") == (
        "relayd: --control: can't listen on unix:/no/c: No such file or directory:"
        " there is no folder /no: make it"
    )


def test_where_nobody_knows_who_connects(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_service, "KNOWS_PEERS", False)
    with pytest.raises(ConfigError, match="SO_PEERCRED"):
        service_at(path)


@pytest_twisted.ensureDeferred
async def test_twist_starts_it_without_the_privileged_step(path: Path) -> None:
    service = service_at(path)
    service.startService()
    assert (await ask(path, "GET", "/v1/status")).status == 200
    await maybeDeferred(service.stopService)
    # And once more.
    async with running(service):
        assert (await ask(path, "GET", "/v1/status")).status == 200


@pytest_twisted.ensureDeferred
async def test_one_that_has_not_started_is_closed(path: Path) -> None:
    """As another part could not start."""
    service = service_at(path)
    service.privilegedStartService()
    await maybeDeferred(service.close)
    assert not path.exists()


@pytest_twisted.ensureDeferred
async def test_whoever_is_connected_as_it_stops_is_let_go(path: Path) -> None:
    service = service_at(path, sessions=20_000)
    service.startService()
    with connected(path) as idle, connected(path) as reads:
        reads.send(request("GET", "/v1/sessions?limit=100000"))
        await until(lambda: reads.read() or reads.said)
        await maybeDeferred(service.stopService)
        await until(idle.has_ended)
        await until(reads.has_ended)
        assert not reads.has_answer()


@pytest_twisted.ensureDeferred
async def test_ten_thousand_sessions(path: Path) -> None:
    async with running(service_at(path, sessions=10_000)):
        answer = await ask(path, "GET", "/v1/sessions?limit=10000")
        assert len(answer.json["sessions"]) == 10_000


@pytest_twisted.ensureDeferred
async def test_a_client_that_leaves_in_the_middle(path: Path) -> None:
    """Of an answer that is longer than what its socket holds."""
    service = service_at(path, sessions=100_000)
    steering: Any = service.site.exchanges.steering
    async with running(service):
        for read in (False, True):
            steering.closed = 0
            with connected(path) as client:
                client.send(request("GET", "/v1/sessions?limit=100000"))
                await until(lambda: steering.parts)
                if read:
                    await until(lambda client=client: client.read() or client.said)
            await until(lambda: not service.site.channels)
            # Sooner or later than the parts were made.
            assert steering.closed == (not read)
            assert not service.site.exchanges.answers.under_way
            steering.parts = 0
        assert (await ask(path, "GET", "/v1/status")).status == 200


@pytest_twisted.ensureDeferred
async def test_a_thousand_at_once(path: Path) -> None:
    """As many as may are served; the others are told so, and none is left."""
    service = service_at(path)
    clients: list[SocketClient] = []
    async with running(service):
        while len(clients) < 1000:
            try:
                clients.append(SocketClient(path))
            except BlockingIOError:
                # The kernel's queue is full.
                await turns(1)
        await until(lambda: service.site.refused["change"] == 1000 - MAX_CLIENTS)
        for each in clients:
            each.send(request("GET", "/v1/status"))
        for each in clients:
            await until(each.has_answer)
        found = [Answer(each.said).status for each in clients]
        assert found.count(503) == 1000 - MAX_CLIENTS
        assert found.count(200) == MAX_CLIENTS
        for each in clients:
            each.sock.close()
        await until(lambda: not service.site.channels)
        assert (await ask(path, "GET", "/v1/status")).status == 200


@pytest_twisted.ensureDeferred
async def test_strangers_are_in_nobodys_way(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = service_at(path, [4001])
    right = [""]
    monkeypatch.setattr(type(service.site.rights), "of", lambda self, by: right[0])
    clients: list[SocketClient] = []
    with capturedLogs() as logged:
        async with running(service):
            for _ in range(3 * MAX_STRANGERS):
                clients.append(SocketClient(path))
                clients[-1].send(request("GET", "/v1/status"))
                await turns(1)
            for each in clients:
                await until(each.has_answer)
            found = {Answer(each.said).status for each in clients}
            assert found == {403, 503}
            right[0] = "change"
            assert (await ask(path, "GET", "/v1/status")).status == 200
            for each in clients:
                each.sock.close()
    # One is the socket's, and one a second of the others.
    assert len(logged) < 5


@pytest_twisted.ensureDeferred
async def test_a_body_that_is_too_long_is_told_so(path: Path) -> None:
    """Though it has not been read."""
    async with running(service_at(path)):
        with connected(path) as client:
            body = b"x" * (1 << 20)
            text = request("POST", "/v1/kill", body)
            sent = client.send(text)
            assert sent < len(text)
            await until(client.has_ended)
            assert Answer(client.said).status == 413
