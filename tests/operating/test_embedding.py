"""Relays that a program of its own runs and steers."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from twisted.application.service import MultiService

from relayd.control.steering import Conflict, Invalid, Unknown
from relayd.core.errors import CannotStart, ConfigError
from relayd.operating import ControlService, EmbeddedRelays
from tests.support.steered import HOST, Standing, at, result

WEB = {
    "transport": "twisted",
    "drain_timeout": 0,
    "tcp": {"web": {"listen": at(20001), "dest": at(20009)}},
}


@contextmanager
def running(relays: EmbeddedRelays, reactor: Standing) -> Iterator[EmbeddedRelays]:
    relays.privilegedStartService()
    relays.startService()
    try:
        yield relays
    finally:
        relays.stopService()
        reactor.turn()
        assert not reactor.readers
        assert not reactor.getDelayedCalls()


@pytest.fixture
def still() -> Standing:
    return Standing()


def test_a_relay_is_updated_while_it_runs(still: Standing) -> None:
    with running(EmbeddedRelays.from_settings(still, WEB), still) as relays:
        web = relays["web"]
        told = result(web.update({"dest": at(20008), "idle_timeout": 60}))
        assert told["dest"] == [at(20008)]
        assert told["settings"]["idle_timeout"]["source"] == "run time: tcp.web"
        told = result(web.update({"dest": None}))
        assert told["dest"] == [at(20009)]
        with pytest.raises(Invalid, match="idle_timeout"):
            result(web.update({"idle_timeout": "soon"}))
        with pytest.raises(Invalid, match="nothing to set"):
            result(web.update({}))
        assert result(web.stop())["state"] == "stopped"
        assert result(web.start())["listen"] == [at(20001)]
        assert web.pause(5.0)["state"] == "paused"
        assert web.resume()["state"] == "running"
        stopping = web.stop(cut=True)
        still.turn()
        assert result(stopping)["state"] == "stopped"


def test_a_name_that_there_is_not(still: Standing) -> None:
    relays = EmbeddedRelays.from_settings(still, WEB)
    with pytest.raises(Unknown, match="there is no relay 'db': there is web"):
        relays["db"]


def test_they_are_changed_before_they_start(still: Standing) -> None:
    relays = EmbeddedRelays.from_settings(still, WEB)
    result(relays["web"].update({"listen": at(20002)}))
    with running(relays, still):
        assert relays.steering.relay("web")["listen"] == [at(20002)]


def test_they_are_changed_no_more_when_they_have_stopped(still: Standing) -> None:
    relays = EmbeddedRelays.from_settings(still, WEB)
    with running(relays, still):
        pass
    with pytest.raises(Conflict, match="relayd stops"):
        result(relays["web"].update({"idle_timeout": 60}))
    with running(relays, still):
        result(relays["web"].update({"idle_timeout": 60}))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"tcp": {"web": {"listen": at(20001)}}}, "no destination"),
        (
            {**WEB, "metrics": "127.0.0.1:9100", "control": "unix:/x"},
            "control, metrics",
        ),
        ({**WEB, "demo": True}, "demo"),
        ({}, "nothing to relay"),
        ({"tcp": {1, 2}}, "settings are what a file can say"),
        ({"tcp": {"web": {"listen": float("nan")}}}, "NaN"),
    ],
)
def test_what_they_cannot_have(still: Standing, settings: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        EmbeddedRelays.from_settings(still, settings)


def test_a_port_that_somebody_has(still: Standing) -> None:
    with socket.create_server((HOST, 20001)):
        relays = EmbeddedRelays.from_settings(still, WEB)
        with pytest.raises(CannotStart, match="Address already in use"):
            relays.privilegedStartService()


def test_a_file_is_read_again(
    still: Standing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the program has gone to another folder."""
    file = tmp_path / "relayd.toml"
    file.write_text(f'[tcp.web]\nlisten = "{at(20001)}"\ndest = "{at(20009)}"\n')
    monkeypatch.chdir(tmp_path)
    relays = EmbeddedRelays.from_file(still, "relayd.toml")
    monkeypatch.chdir("/")
    with running(relays, still):
        with file.open("a") as more:
            more.write(f'[udp.dns]\nlisten = "{at(20001)}"\ndest = "{at(20009)}"\n')
        by: Any = None
        told = result(relays.steering.reload(False, None, by))
        assert told["added"] == ["dns"]
        assert relays["dns"].pause()["state"] == "paused"
    with pytest.raises(ConfigError, match="No such file"):
        EmbeddedRelays.from_file(still, str(tmp_path / "nowhere.toml"))


def test_tables_cannot_be_read_again(still: Standing) -> None:
    relays = EmbeddedRelays.from_settings(still, WEB)
    by: Any = None
    with pytest.raises(Conflict, match="no file to read again"):
        result(relays.steering.reload(False, None, by))


def test_a_control_socket_beside_them(still: Standing, tmp_socket: Path) -> None:
    together = MultiService()
    relays = EmbeddedRelays.from_settings(still, WEB)
    relays.setServiceParent(together)
    steering = ControlService(still, str(tmp_socket), relays.steering)
    steering.setServiceParent(together)
    together.startService()
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_socket))
            client.sendall(
                b"GET /v1/relays/web HTTP/1.1\r\nHost: localhost\r\n"
                b"Connection: close\r\n\r\n"
            )
            client.setblocking(False)
            heard = bytearray()

            def answered() -> bool:
                try:
                    heard.extend(client.recv(1 << 16))
                except BlockingIOError:
                    return False
                return heard.endswith(b"\r\n0\r\n\r\n")

            still.until(answered, "an answer")
            assert heard.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b'{"name": "web", "kind": "tcp", "state": "running"' in heard
    finally:
        together.stopService()
        still.turn(10)
    assert not tmp_socket.exists()
    assert not still.readers
