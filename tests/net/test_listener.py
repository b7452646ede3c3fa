"""Accepting clients: those that can't be served, and descriptors that run out."""

from __future__ import annotations

import errno
import os
import resource
import socket
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.logger import LogLevel, capturedLogs, formatEvent
from zope.interface import implementer

from relayd.core.interfaces import IShedsClients
from relayd.net.descriptors import PAUSE
from relayd.net.listener import ACCEPTS_PER_TURN, Listener
from relayd.net.listening import UNIXListenerEndpoint
from tests.conftest import LoggedFailures, descriptors
from tests.support.contracts import turns, until
from tests.support.listeners import (
    _GONE,
    REFUSALS,
    Faulty,
    Greeters,
    Scripted,
    Unconnectable,
    Watcher,
    answer,
    greeted,
    listen_tcp,
    scripted,
    where,
)
from tests.support.process import connect, reset
from tests.support.standing import refuse


@pytest_twisted.ensureDeferred
async def test_stopping_again_does_nothing() -> None:
    """It may come from the service and from the reactor as it stops."""
    factory, closed = Greeters(), []
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    port = Listener(reactor, sock, factory, lambda: closed.append(sock.fileno()))
    port.startListening()
    await port.stopListening()
    await port.stopListening()
    port.connectionLost(_GONE)
    assert factory.running == 0
    # What is done once the socket is closed, is done once.
    assert closed == [-1]
    assert not port.connected


@pytest_twisted.ensureDeferred
async def test_a_factory_that_raises_closes_only_its_client(
    logged_failures: LoggedFailures,
) -> None:
    """That client is closed, the traceback is logged, and the next is served."""
    port = await listen_tcp("127.0.0.1", Faulty(lambda: 1 // 0))
    with connect(port.getHost().port) as client:
        assert await answer(client) == b""
    assert "in buildProtocol" in logged_failures.take("ZeroDivisionError")
    assert await greeted(where(port))
    await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_factory_that_declines_closes_the_client() -> None:
    """As Twisted's ports do, and without a word."""
    port = await listen_tcp("127.0.0.1", Faulty(lambda: None))
    with connect(port.getHost().port) as client:
        assert await answer(client) == b""
    assert await greeted(where(port))
    await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_protocol_that_raises_closes_only_its_client(
    logged_failures: LoggedFailures,
) -> None:
    """It is reset, and its protocol hears that it is gone."""
    protocol = Unconnectable()
    port = await listen_tcp("127.0.0.1", Faulty(lambda: protocol))
    with connect(port.getHost().port) as client, pytest.raises(ConnectionResetError):
        await answer(client)
    assert protocol.events == ["lost"]
    assert "in connectionMade" in logged_failures.take("ZeroDivisionError")
    assert await greeted(where(port))
    await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_listener_that_is_stopped_by_a_client_accepts_no_more() -> None:
    """Others that wait in the same turn are not served by a port that is closed."""
    factory = Faulty(lambda: port.stopListening() and None)
    port = await listen_tcp("127.0.0.1", factory)
    with connect(port.getHost().port) as first, connect(port.getHost().port) as second:
        assert await answer(first) == b""
        with suppress(ConnectionResetError):
            assert await answer(second) == b""
    assert len(factory.addresses) == 1


@pytest.mark.parametrize(
    "number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM]
)
def test_a_listener_without_descriptors_pauses(number: int) -> None:
    """The clients stay in the kernel's queue, and are served after a moment."""
    with scripted() as (listener, sock, watcher, factory):
        with connect(listener.getHost().port):  # type: ignore[attr-defined]
            sock.script = [number]
            with capturedLogs() as events:
                listener.doRead()
            assert watcher.readers == set()
            assert listener.pauses == 1
            [event] = events
            assert event["log_level"] is LogLevel.warn
            assert os.strerror(number) in formatEvent(event)
            assert f"127.0.0.1:{sock.getsockname()[1]}" in formatEvent(event)
            watcher.advance(PAUSE * 0.99)
            assert watcher.readers == set()
            watcher.advance(PAUSE * 0.02)
            assert watcher.readers == {listener}
            assert not watcher.getDelayedCalls()
            listener.doRead()
            [protocol] = factory.served
            protocol.transport.connectionLost(_GONE)


def test_a_listener_waits_until_there_are_descriptors_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It looks by itself, as no event tells, and pauses again if there are none."""
    with scripted() as (listener, sock, watcher, _):
        sock.script = [errno.EMFILE]
        listener.doRead()

        def none_left(_: int) -> int:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        with monkeypatch.context() as patched:
            patched.setattr(os, "dup", none_left)
            for pauses in (2, 3, 4):
                watcher.advance(PAUSE)
                assert listener.pauses == pauses
                assert watcher.readers == set()
                assert len(watcher.getDelayedCalls()) == 1
        with monkeypatch.context() as patched:
            # There is one, but it is one of the last.
            patched.setattr(resource, "getrlimit", lambda _: (8, 8))
            watcher.advance(PAUSE)
            assert (listener.pauses, watcher.readers) == (5, set())
        before = descriptors()
        watcher.advance(PAUSE)
        assert watcher.readers == {listener}
        assert descriptors() == before


def test_a_factory_is_asked_to_shed_clients_at_each_pause(
    logged_failures: LoggedFailures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that fails to does not keep the listener from looking again."""
    asked = []

    @implementer(IShedsClients)
    class Sheds(Greeters):
        def shed_clients(self) -> None:
            asked.append(listener.pauses)
            raise ZeroDivisionError

    with closing(Scripted()) as sock:
        watcher = Watcher()
        listener = Listener(watcher, sock, Sheds())
        listener.startListening()
        for pauses in (1, 2):
            sock.script = [errno.EMFILE]
            listener.doRead()
            assert asked[-1] == pauses
            logged_failures.take("no clients could be shed")
            watcher.advance(PAUSE)
            assert watcher.readers == {listener}
        # What is refused is not for want of descriptors.
        monkeypatch.setattr("relayd.net.listener.accept", refuse(errno.EPERM))
        sock.script = [errno.EPERM]
        listener.doRead()
        assert (listener.pauses, asked) == (3, [1, 2])
        listener.stopListening()


def test_a_listener_that_pauses_can_be_stopped() -> None:
    """It does not come back."""
    with scripted() as (listener, sock, watcher, _):
        sock.script = [errno.EMFILE]
        listener.doRead()
        listener.stopListening()
        assert not watcher.getDelayedCalls()
        watcher.advance(10 * PAUSE)
        assert watcher.readers == set()


def test_a_listener_pauses_before_the_last_descriptor_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its client is served; dialling a server for it needs one more."""
    with scripted() as (listener, _, watcher, factory):
        port = listener.getHost().port  # type: ignore[attr-defined]
        with connect(port), connect(port):
            monkeypatch.setattr(resource, "getrlimit", lambda _: (8, 8))
            with capturedLogs() as events:
                listener.doRead()
            monkeypatch.undo()
            assert len(factory.served) == 1
            assert watcher.readers == set()
            assert listener.pauses == 1
            assert "hardly any file descriptor is left" in formatEvent(events[-1])
            watcher.advance(PAUSE)
            listener.doRead()
            assert len(factory.served) == 2
            for protocol in factory.served:
                protocol.transport.connectionLost(_GONE)


def test_a_listener_that_is_stopped_by_its_last_client_stays_stopped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No timer goes on for a socket that is closed."""
    with scripted() as (listener, _, watcher, factory):
        factory.buildProtocol = lambda _: listener.stopListening() and None  # type: ignore[method-assign, func-returns-value]
        with connect(listener.getHost().port):  # type: ignore[attr-defined]
            monkeypatch.setattr(resource, "getrlimit", lambda _: (8, 8))
            listener.doRead()
            monkeypatch.undo()
        assert not watcher.getDelayedCalls()
        assert watcher.readers == set()


@pytest_twisted.ensureDeferred
async def test_clients_outlast_a_full_descriptor_table() -> None:
    """For real: the kernel refuses descriptors, then has some again."""
    factory = Greeters()
    port: Any = await listen_tcp("127.0.0.1", factory)
    clients = [connect(port.getHost().port) for _ in range(3)]
    pauses = port.pauses
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    with capturedLogs() as events:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            await until(lambda: port.pauses >= pauses + 2, "two pauses")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert factory.served == []
    for client in clients:
        assert await answer(client) == b"hello"
        client.close()
    [event] = [each for each in events if each["log_level"] is LogLevel.warn]
    assert "Too many open files; clients wait until a session ends" in formatEvent(
        event
    )
    await port.stopListening()


def test_the_listeners_of_a_reactor_pause_and_log_together() -> None:
    """They share the descriptors, and the line a second."""
    watcher, closed = Watcher(), Greeters()
    with closing(Scripted()) as one, closing(Scripted()) as two:
        listeners = [Listener(watcher, sock, closed) for sock in (one, two)]
        with capturedLogs() as events:
            for sock, listener in zip((one, two), listeners, strict=True):
                listener.startListening()
                sock.script = [errno.EMFILE]
                listener.doRead()
        assert [listener.pauses for listener in listeners] == [2, 2]
        assert len([each for each in events if each["log_level"] is LogLevel.warn]) == 1
        for listener in listeners:
            listener.stopListening()


def test_a_client_that_the_reactor_can_not_watch_is_closed(
    logged_failures: LoggedFailures,
) -> None:
    """The kernel is short of something; that client is closed, the listener goes on."""
    with scripted() as (listener, _, watcher, factory):

        def full(_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        watcher.addReader = full  # type: ignore[method-assign]
        with connect(listener.getHost().port) as client:  # type: ignore[attr-defined]
            listener.doRead()
            assert client.recv(1) == b""
        assert os.strerror(errno.ENOSPC) in logged_failures.take("addReader")
        assert factory.served[0].events == []
        assert listener.connected


def test_clients_that_left_are_skipped() -> None:
    """They were gone before they were accepted; those behind them are served."""
    with scripted() as (listener, sock, watcher, factory):
        with connect(listener.getHost().port):  # type: ignore[attr-defined]
            sock.script = [errno.ECONNABORTED, errno.EPROTO]
            with capturedLogs() as events:
                listener.doRead()
            assert not events
            assert (len(factory.served), listener.pauses) == (1, 0)
            assert watcher.readers == {listener}
            factory.served[0].transport.connectionLost(_GONE)


def test_accepts_in_a_turn_are_limited() -> None:
    """So many accepts, then whoever else has something to do."""
    with scripted() as (listener, sock, watcher, _):
        sock.script = [errno.ECONNABORTED] * 1000
        listener.doRead()
        assert sock.asked == ACCEPTS_PER_TURN
        assert watcher.readers == {listener}


@pytest.mark.parametrize("number", REFUSALS)
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX])
@pytest_twisted.ensureDeferred
async def test_a_refused_accept4_falls_back_to_accept(
    family: int, number: int, tmp_socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client's connection is as any other: what it is, and what it is known by."""
    factory = Greeters()
    if family == socket.AF_UNIX:
        port: Any = await UNIXListenerEndpoint(reactor, str(tmp_socket), 16).listen(
            factory
        )
        address: Any = str(tmp_socket)
    else:
        host = "127.0.0.1" if family == socket.AF_INET else "::1"
        port = await listen_tcp(host, factory)
        address = where(port)
    monkeypatch.setattr(port, "_accept", refuse(number))
    pauses = port.pauses
    with closing(socket.socket(family)) as client:
        client.connect(address)
        assert await answer(client) == b"hello"
        [greeter] = factory.served
        assert greeter.blocks_or_is_inherited == (False, False)
        if family != socket.AF_UNIX:
            assert greeter.options == (True, True)
            assert (greeter.remote.host, greeter.remote.port) == client.getsockname()[
                :2
            ]
    # Nobody waits, which is no reason to pause.
    port.doRead()
    assert port.pauses == pauses
    await port.stopListening()


def test_a_client_gone_before_the_fallback_is_skipped() -> None:
    """accept(2) alone does not say its name, and then nobody knows it."""
    with scripted() as (listener, sock, _, factory):
        reset(connect(listener.getHost().port))  # type: ignore[attr-defined]
        with connect(listener.getHost().port):  # type: ignore[attr-defined]
            sock.script = [errno.EPERM] * 3
            before = descriptors()
            with capturedLogs() as events:
                listener.doRead()
                assert descriptors() == before
                listener.doRead()
            assert not events
            assert (len(factory.served), listener.pauses) == (1, 0)
            factory.served[0].transport.connectionLost(_GONE)


@pytest.mark.parametrize("number", [*REFUSALS, errno.EIO])
def test_a_listener_pauses_if_both_accepts_are_refused(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client stays in the queue, and would be reported again and again.

    One line, and not for each time.
    """
    with scripted() as (listener, sock, watcher, _):
        sock.script = [number] * 2
        monkeypatch.setattr("relayd.net.listener.accept", refuse(number))
        with capturedLogs() as events:
            listener.doRead()
            assert watcher.readers == set()
            watcher.advance(PAUSE)
            assert watcher.readers == {listener}
            listener.doRead()
        assert watcher.readers == set()
        [line] = [formatEvent(event) for event in events]
        assert line.endswith(
            f": accept failed: {os.strerror(number)}; clients wait"
            " (paused 1 times so far; tried again after 0.1 s)"
        )
        watcher.advance(PAUSE)
        assert watcher.readers == {listener}


def test_a_full_table_is_noticed_by_the_fallback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with scripted() as (listener, sock, watcher, _):
        sock.script = [errno.EPERM]
        monkeypatch.setattr("relayd.net.listener.accept", refuse(errno.EMFILE))
        with capturedLogs() as events:
            listener.doRead()
        assert "raise the limit with ulimit -n" in formatEvent(events[0])
        watcher.advance(PAUSE)


@pytest_twisted.ensureDeferred
async def test_a_turn_without_clients_does_nothing() -> None:
    """A client may be gone between the event and the accept."""
    port = await listen_tcp("127.0.0.1", Greeters())
    pauses = port.pauses
    port.doRead()
    await turns(2)
    assert port.pauses == pauses
    assert await greeted(where(port))
    await port.stopListening()
