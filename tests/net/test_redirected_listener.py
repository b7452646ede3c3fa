"""Listeners that are given what was meant for others."""

from __future__ import annotations

import errno
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.interfaces import IListeningPort
from twisted.logger import LogLevel, capturedLogs, formatEvent

from relayd.core.own_listeners import OwnListeners
from relayd.net import transparent
from relayd.net.dial_options import is_transparent, set_transparent
from relayd.net.listening import (
    AdoptedListenerEndpoint,
    TCPListenerEndpoint,
    UNIXListenerEndpoint,
)
from relayd.plane.endpoints import PlaneTCPListenerEndpoint
from tests.support import rights
from tests.support.listeners import Greeters, greeted, where

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of Linux")


class Intercepting(Greeters):
    """A factory that is for that."""

    def __init__(self) -> None:
        super().__init__()
        self.intercepts = OwnListeners()


@pytest.fixture(params=[TCPListenerEndpoint, PlaneTCPListenerEndpoint])
def kind(request: pytest.FixtureRequest) -> Any:
    """What listens."""
    return request.param


async def listen(kind: Any, host: str | None, factory: Any) -> Any:
    port: IListeningPort = await kind(reactor, host, 0, 16).listen(factory)
    return port


@rights.transparent
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0", "::"])
@pytest_twisted.ensureDeferred
async def test_it_is_transparent_and_knows_its_address(kind: Any, host: str) -> None:
    factory = Intercepting()
    port = await listen(kind, host, factory)
    number = port.getHost().port
    assert is_transparent(port._socket)
    assert factory.intercepts.opened == {(host, number): 1}
    assert await greeted((host, number))
    await port.stopListening()
    assert not factory.intercepts.opened


@pytest_twisted.ensureDeferred
async def test_others_are_not(kind: Any) -> None:
    port = await listen(kind, "127.0.0.1", Greeters())
    assert not is_transparent(port._socket)
    assert port._local is port.getHost()
    await port.stopListening()


@rights.transparent
@pytest_twisted.ensureDeferred
async def test_each_client_is_asked_where_it_is(kind: Any) -> None:
    """Under TPROXY the listener's address is not its clients'."""
    factory = Intercepting()
    port = await listen(kind, "127.0.0.1", factory)
    assert port._local is None
    assert await greeted(where(port))
    [served] = factory.served
    assert served.local == port.getHost()
    await port.stopListening()


@rights.transparent
@pytest_twisted.ensureDeferred
async def test_it_may_begin_while_it_listens_and_end(kind: Any) -> None:
    """When the relay's settings are changed."""
    before, after = Greeters(), Intercepting()
    port = await listen(kind, "127.0.0.1", before)
    address = where(port)
    port.serve(after)
    assert is_transparent(port._socket)
    assert after.intercepts.opened == {address: 1}
    assert await greeted(address)
    port.serve(before)
    assert not after.intercepts.opened
    assert port._local is port.getHost()
    assert await greeted(address)
    await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_without_the_right_the_log_says_so_once(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "transparent takes the right CAP_NET_RAW")

    monkeypatch.setattr(transparent, "set_transparent", refuse)
    with capturedLogs() as logs:
        port = await listen(kind, "127.0.0.1", Intercepting())
        assert await greeted(where(port))
        assert await greeted(where(port))
    [warning] = [each for each in logs if each["log_level"] == LogLevel.warn]
    host, number = where(port)
    assert formatEvent(warning) == (
        f"the listener {host}:{number} can't accept what TPROXY brings: transparent"
        " takes the right CAP_NET_RAW"
    )
    await port.stopListening()


@rights.transparent
@pytest_twisted.ensureDeferred
async def test_one_that_is_transparent_already_takes_no_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was passed on, or the right was given up since."""
    with socket.socket() as sock:
        set_transparent(sock, sock.family)
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        monkeypatch.setattr(transparent, "set_transparent", None)
        endpoint: Any = AdoptedListenerEndpoint(reactor, [sock.fileno()])
        port = await endpoint.listen(Intercepting())
        assert await greeted(where(port))
        await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_unix_socket_is_never(tmp_socket: Path) -> None:
    factory = Intercepting()
    endpoint: Any = UNIXListenerEndpoint(reactor, str(tmp_socket), 16)
    with capturedLogs() as logs:
        port = await endpoint.listen(factory)
    assert not factory.intercepts.opened
    assert not [each for each in logs if each["log_level"] == LogLevel.warn]
    await port.stopListening()
