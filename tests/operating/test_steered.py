"""What an operator is told of relays that are steered, over real sockets."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor

from relayd.control.steering import Asker
from relayd.operating import EmbeddedRelays
from relayd.operating.killing import kill
from tests.conftest import LoggedFailures
from tests.support.contracts import until
from tests.support.ports import free_port

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

ASKER = Asker(0, 0, 1)


def settings_of(server: socket.socket) -> dict[str, Any]:
    dest = f"127.0.0.1:{server.getsockname()[1]}"
    return {"tcp": {"web": {"listen": "127.0.0.1:0", "dest": dest}}}


@pytest_twisted.ensureDeferred
async def test_a_relay_that_is_drained_is_draining_while_it_has_sessions() -> None:
    """And stopped afterwards; one that is only stopped is not draining."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        relays = EmbeddedRelays.from_settings(reactor, settings_of(server))
        steering = relays.steering
        relays.startService()
        try:
            port = steering.relay("web")["listen"][0].rpartition(":")[2]
            with socket.create_connection(("127.0.0.1", int(port))) as client:
                client.sendall(b"x")
                await until(lambda: steering.relay("web")["sessions"] == 1, "a session")
                stopped: Any = await steering.stop("web", False, ASKER)
                assert (stopped["state"], stopped["sessions"]) == ("stopped", 1)
                drained: Any = await steering.drain("web", 60.0, ASKER)
                assert (drained["state"], drained["sessions"]) == ("draining", 1)
                started: Any = await steering.start("web", ASKER)
                assert (started["state"], started["sessions"]) == ("running", 1)
                [older] = relays.steering._shown_of("web").older
                assert not older.registry.draining
                await steering.drain("web", 60.0, ASKER)
            server.accept()[0].close()
            await until(lambda: steering.relay("web")["sessions"] == 0, "no session")
            assert steering.relay("web")["state"] == "stopped"
        finally:
            await relays.stopService()


#: Each has a relay listen again.
AGAIN: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "start": lambda steering: steering.start("web", ASKER),
    "set": lambda steering: steering.set("web", {"enabled": True}, ASKER),
    "discard": lambda steering: steering.reload(True, None, ASKER),
}


@pytest.mark.parametrize("again", AGAIN)
@pytest_twisted.ensureDeferred
async def test_a_drain_is_over_once_its_relay_listens_again(
    tmp_path: Path, again: str
) -> None:
    """Whatever has it listen: its sessions have no limit any more."""
    file = tmp_path / "f.toml"
    with socket.create_server(("127.0.0.1", 0)) as server:
        dest = f"127.0.0.1:{server.getsockname()[1]}"
        file.write_text(f'[tcp.web]\nlisten = "127.0.0.1:0"\ndest = "{dest}"\n')
        relays = EmbeddedRelays.from_file(reactor, str(file))
        steering = relays.steering
        relays.startService()
        try:
            port = steering.relay("web")["listen"][0].rpartition(":")[2]
            with socket.create_connection(("127.0.0.1", int(port))) as client:
                client.sendall(b"x")
                await until(lambda: steering.relay("web")["sessions"] == 1, "a session")
                drained: Any = await steering.drain("web", 60.0, ASKER)
                assert drained["state"] == "draining"
                await AGAIN[again](steering)
                relay: Any = steering.relay("web")
                assert (relay["state"], relay["sessions"]) == ("running", 1)
                [older] = relays.steering._shown_of("web").older
                assert not older.registry.draining
                server.accept()[0].close()
            await until(lambda: steering.relay("web")["sessions"] == 0, "no session")
        finally:
            await relays.stopService()


async def one_behind_the_other(
    relays: EmbeddedRelays, *asks: Callable[[], Any]
) -> None:
    """Ask for changes at once, as while another one is under way."""
    lock = relays.steering._lock
    await lock.acquire()
    asked = [ask() for ask in asks]
    lock.release()
    for each in asked:
        await each


@pytest_twisted.ensureDeferred
async def test_a_start_that_follows_a_drain_at_once_wins() -> None:
    """Though it was asked for before the drain was answered."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        relays = EmbeddedRelays.from_settings(reactor, settings_of(server))
        steering = relays.steering
        relays.startService()
        try:
            await one_behind_the_other(
                relays,
                lambda: steering.drain("web", 60.0, ASKER),
                lambda: steering.start("web", ASKER),
            )
            [listening] = relays.steering._all.service.listenings
            assert steering.relay("web")["state"] == "running"
            assert not listening.factory.registry.draining
        finally:
            await relays.stopService()


@pytest_twisted.ensureDeferred
async def test_a_stop_cuts_no_session_of_a_start_that_follows_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is begun while the relay is stopped, with the sessions that there are."""
    states = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        relays = EmbeddedRelays.from_settings(reactor, settings_of(server))
        steering = relays.steering
        relays.startService()

        def noted(*args: Any, **wanted: Any) -> Any:
            states.append(steering.relay("web")["state"])
            return kill(*args, **wanted)

        monkeypatch.setattr("relayd.operating.steering.kill", noted)
        try:
            await one_behind_the_other(
                relays,
                lambda: steering.stop("web", True, ASKER),
                lambda: steering.start("web", ASKER),
            )
            assert steering.relay("web")["state"] == "running"
        finally:
            await relays.stopService()
    assert states == ["stopped"]


@pytest_twisted.ensureDeferred
async def test_a_reload_that_went_back_is_told(tmp_path: Path) -> None:
    """It is not in effect, whatever it was when it was made."""
    file = tmp_path / "f.toml"
    text = '[tcp.web]\nlisten = "127.0.0.1:0"\ndest = "127.0.0.1:{}"\n'
    file.write_text(text.format(7))
    relays = EmbeddedRelays.from_file(reactor, str(file))
    steering = relays.steering
    relays.startService()
    try:
        file.write_text(text.format(9))
        loaded = steering.status()["loaded_at"]
        await steering.reload(False, 0.01, ASKER)
        assert steering.status()["loaded_at"] != loaded
        last: Any = steering.status()["last_reload"]
        assert (last["ok"], last["problems"]) == (True, [])
        await until(lambda: not steering.status()["last_reload"]["ok"], "it goes back")
        [problem] = steering.status()["last_reload"]["problems"]
        assert steering.status()["loaded_at"] == loaded
        assert problem == "it was not confirmed in time: all is as it was before"
        assert steering.relay("web")["dest"] == ["127.0.0.1:7"]
    finally:
        await relays.stopService()


@pytest_twisted.ensureDeferred
async def test_what_is_said_of_a_server_is_beside_what_its_file_says() -> None:
    """However the file writes it, and nothing where the file says nothing."""
    dest = [
        "127.0.0.1:7,name=a,weight=3,disabled",
        {"address": "127.0.0.1:8", "name": "b", "weight": 4, "disabled": True},
        "127.0.0.1:9",
    ]
    settings = {"tcp": {"web": {"listen": "127.0.0.1:0", "dest": dest}}}
    relays = EmbeddedRelays.from_settings(reactor, settings)
    relays.startService()
    try:
        for server in ("a", "b", "127.0.0.1:9"):
            relays.steering.set_server("web", server, "up", 6, None, ASKER)
        changes = relays.steering.diff()["changes"]
        assert [(each["server"], each["key"], each["file"]) for each in changes] == [
            *(("a", "state", "disabled"), ("a", "weight", 3)),
            *(("b", "state", "disabled"), ("b", "weight", 4)),
            *(("127.0.0.1:9", "state", None), ("127.0.0.1:9", "weight", None)),
        ]
        assert {each["now"] for each in changes} == {"up", 6}
    finally:
        await relays.stopService()


@pytest_twisted.ensureDeferred
async def test_a_reload_that_can_not_be_taken_back_is_told(
    tmp_path: Path, logged_failures: LoggedFailures
) -> None:
    """It is in effect, and nobody waits for a confirmation any more."""
    before = free_port()
    file = tmp_path / "f.toml"
    text = '[tcp.web]\nlisten = "127.0.0.1:{}"\ndest = "127.0.0.1:7"\n'
    file.write_text(text.format(before))
    relays = EmbeddedRelays.from_file(reactor, str(file))
    steering = relays.steering
    relays.startService()
    try:
        file.write_text(text.format(0))
        await steering.reload(False, 0.05, ASKER)
        with socket.create_server(("127.0.0.1", before)):
            last: Any = {}

            def told() -> bool:
                last.update(steering.status()["last_reload"])
                return bool(last["problems"])

            await until(told, "it is told")
        assert last["ok"]
        [problem] = last["problems"]
        assert problem.startswith(
            "it was not confirmed in time, and could not be taken back: can't listen on"
        )
        assert steering.status()["confirm"] is None
        logged_failures.take("could not be taken back")
    finally:
        await relays.stopService()


@pytest_twisted.ensureDeferred
async def test_clients_are_served_until_the_delay_of_a_stop_is_over() -> None:
    """And whoever asks is told so."""
    settings: Any = {"tcp": {"web": {"listen": "127.0.0.1:0", "dest": "127.0.0.1:7"}}}
    relays = EmbeddedRelays.from_settings(reactor, {**settings, "shutdown_delay": 1})
    steering = relays.steering
    relays.startService()
    stopped = relays.stopService()
    asked = ("web", "10.0.0.5", None, None, None, None)
    assert steering.status()["state"] == "stopping"
    assert steering.relay("web")["state"] == "running"
    found: Any = await steering.explain(*asked)
    assert found["admitted"]
    await until(lambda: steering.status()["state"] == "draining", "it drains")
    await stopped
