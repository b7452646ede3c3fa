"""What a listener of the plane does when the kernel is short of something."""

from __future__ import annotations

import errno
import os
import resource
import select
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.address import IPv4Address, IPv6Address
from twisted.logger import LogLevel, capturedLogs, formatEvent

from relayd.net.descriptors import PAUSE
from relayd.plane.endpoints import PlaneTCPListenerEndpoint, PlaneUNIXListenerEndpoint
from relayd.plane.poller import Plane
from tests.conftest import LoggedFailures, descriptors
from tests.support.contracts import until
from tests.support.listeners import REFUSALS, Greeters, answer, scripted
from tests.support.plane_listeners import (
    Listening,
    answered,
    greeted,
    listening,
    refusal,
)
from tests.support.process import connect
from tests.support.standing import Still, refuse, still

__all__ = ["still"]

#: Where a dial is to be watched while it waits.
pytestmark = pytest.mark.usefixtures("far")


class Short(socket.socket):
    """A listening socket whose accept fails as often as the script says."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.script: list[Exception] = []
        self.asked = 0

    def _accept(self) -> Any:
        self.asked += 1
        if self.script:
            raise self.script.pop(0)
        return super()._accept()  # type: ignore[misc]


def failing(number: int) -> OSError:
    """The error of a system call."""
    return OSError(number, os.strerror(number))


@contextmanager
def short(still: Still) -> Iterator[tuple[Listening, Short]]:
    """A listener whose socket may be told to fail."""
    sock = Short()
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    endpoint = PlaneTCPListenerEndpoint(still, "127.0.0.1", 0, 16)
    endpoint.bind = lambda: [(sock, lambda: None)]  # type: ignore[method-assign]
    made = Listening(still, endpoint)
    try:
        yield made, sock
    finally:
        made.stop()
    assert sock.fileno() == -1


@pytest.mark.parametrize(
    "number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM]
)
def test_a_listener_without_descriptors_pauses(number: int, still: Still) -> None:
    """It is not watched meanwhile, or its client would be reported again and again."""
    with short(still) as (made, sock), made.connect() as client:
        pauses = made.port.pauses
        sock.script = [failing(number)]
        with capturedLogs() as events:
            still.turn()
        assert (sock.asked, made.port.pauses) == (1, pauses + 1)
        assert os.strerror(number) in formatEvent(events[-1])
        # Nobody else is there, so not even the plane.
        assert still.readers == set()
        still.settle()
        still.advance(PAUSE * 0.99)
        assert sock.asked == 1
        still.advance(PAUSE * 0.02)
        assert len(still.readers) == 1
        assert answered(still, client) == b"hello"


def test_a_listener_that_pauses_can_be_stopped(still: Still) -> None:
    with short(still) as (made, sock):
        sock.script = [failing(errno.EMFILE)]
        with made.connect():
            still.turn()
            made.port.stopListening()
        assert not still.getDelayedCalls()
        still.advance(10 * PAUSE)
        assert still.readers == set()


def test_a_listener_that_pauses_may_not_be_the_only_one(still: Still) -> None:
    """Its descriptor is not watched, though the plane is."""
    with short(still) as (made, sock), listening(still) as other:
        with made.connect() as client, closing(connect(other.number)) as another:
            sock.script = [failing(errno.EMFILE)]
            still.until(lambda: sock.asked)
            assert answered(still, another) == b"hello"
            assert sock.asked == 1
            still.advance(PAUSE)
            assert answered(still, client) == b"hello"


def test_a_listener_pauses_before_the_last_descriptor_is_taken(
    still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client is served; dialling a server for it needs one more."""
    with listening(still) as made, made.connect(), made.connect():
        pauses = made.port.pauses
        with monkeypatch.context() as patched:
            patched.setattr(resource, "getrlimit", lambda _: (8, 8))
            still.turn()
            assert len(made.factory.served) == 1
            assert made.port.pauses == pauses + 1
            # And again, as long as there are so few.
            still.advance(PAUSE)
            assert made.port.pauses == pauses + 2
            still.turn()
            assert len(made.factory.served) == 1
        still.advance(PAUSE)
        still.until(lambda: len(made.factory.served) == 2)
        still.until(lambda: all("lost" in each.events for each in made.factory.served))


def test_an_error_that_nobody_knows_does_not_close_a_listener(
    still: Still, logged_failures: LoggedFailures
) -> None:
    """It is logged with its traceback, and accepting goes on in a moment."""
    with short(still) as (made, sock), made.connect() as client:
        sock.script = [MemoryError()]
        still.turn()
        assert still.readers == set()
        logged_failures.take("MemoryError")
        still.advance(PAUSE)
        assert answered(still, client) == b"hello"


@pytest.mark.parametrize("number", REFUSALS)
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", None])
def test_an_accept_that_is_refused_is_made_in_the_plain_way(
    host: str | None,
    number: int,
    still: Still,
    tmp_socket: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its client's connection is as any other: what it is, and what it is known by."""
    made = Listening(
        still,
        PlaneTCPListenerEndpoint(still, host, 0, 16)
        if host
        else PlaneUNIXListenerEndpoint(still, str(tmp_socket), 16),
    )
    monkeypatch.setattr(made.port, "_accept", refuse(number))
    pauses = made.port.pauses
    if host:
        client = connect(made.number, host)
    else:
        client = socket.socket(socket.AF_UNIX)
        client.connect(str(tmp_socket))
    with client:
        assert answered(still, client) == b"hello"
        [greeter] = made.factory.served
        assert greeter.blocks_or_is_inherited == (False, False)
        if host:
            kind = IPv6Address if ":" in host else IPv4Address
            assert greeter.remote == kind("TCP", *client.getsockname()[:2])
            assert greeter.options == (True, True)
    # Nobody waits, which is no reason to pause.
    made.port.doRead()
    assert made.port.pauses == pauses
    made.stop()


def test_an_accept_that_is_refused_in_every_way_is_no_busy_loop(
    still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client stays in the queue, and its event would come again and again."""
    with listening(still) as made, made.connect() as client:
        pauses = made.port.pauses
        with monkeypatch.context() as patched:
            patched.setattr("relayd.net.listener.accept", refuse(errno.EPERM))
            patched.setattr(made.port, "_accept", refuse(errno.EPERM))
            with capturedLogs() as events:
                still.turn()
                assert still.readers == set()
                still.advance(PAUSE)
                still.turn()
            assert made.port.pauses == pauses + 2
        [line] = [formatEvent(event) for event in events]
        assert line.endswith(
            "accept failed: Operation not permitted; clients wait"
            f" (paused {pauses + 1} times so far; tried again after 0.1 s)"
        )
        still.advance(PAUSE)
        assert answered(still, client) == b"hello"


def test_a_client_that_the_plane_can_not_watch_is_turned_away(
    still: Still, logged_failures: LoggedFailures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel is short of something; its socket is closed, the listener goes on."""
    with listening(still) as made:
        before = descriptors()
        with made.connect() as client:
            with monkeypatch.context() as patched:
                patched.setattr(Plane, "watch", refuse(errno.ENOSPC))
                still.turn()
            assert client.recv(1) == b""
        assert os.strerror(errno.ENOSPC) in logged_failures.take("could not be served")
        assert made.factory.served[0].events == []
        assert descriptors() == before
        assert greeted(still, ("127.0.0.1", made.number))


def test_a_listener_that_can_not_be_watched_is_an_error(
    still: Still, tmp_socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the Deferred; nothing is left, not even the socket's file."""
    before = descriptors()
    unix = PlaneUNIXListenerEndpoint(still, str(tmp_socket), 16)
    both = PlaneTCPListenerEndpoint(still, None, 0, 16)
    for endpoint, where in ((unix, f"unix:{tmp_socket}"), (both, "port 0 of all")):
        with monkeypatch.context() as patched:
            patched.setattr(select, "epoll", refuse(errno.EMFILE))
            says = refusal(endpoint)
        assert says.startswith(f"can't listen on {where}")
        assert says.endswith(os.strerror(errno.EMFILE))
    assert descriptors() == before
    assert not tmp_socket.exists()
    made = Listening(still, unix)
    assert greeted(still, str(tmp_socket))
    made.stop()


def test_a_listener_that_can_not_be_watched_again_waits_longer(
    still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a pause; else it would be deaf from then on."""
    with short(still) as (made, sock), made.connect() as client:
        sock.script = [failing(errno.EMFILE)]
        still.turn()
        with monkeypatch.context() as patched:
            patched.setattr(select, "epoll", refuse(errno.EMFILE))
            still.advance(PAUSE)
            assert still.readers == set()
            assert len(still.getDelayedCalls()) == 1
        still.advance(PAUSE)
        assert answered(still, client) == b"hello"


@pytest_twisted.ensureDeferred
async def test_clients_outlast_a_full_descriptor_table() -> None:
    """For real: the kernel refuses descriptors, then has some again."""
    factory = Greeters()
    port: Any = await PlaneTCPListenerEndpoint(reactor, "127.0.0.1", 0, 16).listen(
        factory
    )
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
    assert [each for each in events if each["log_level"] is LogLevel.warn]
    await port.stopListening()


def test_twisteds_listener_outlasts_a_reactor_that_refuses_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same, without the plane."""
    with scripted() as (listener, sock, watcher, factory):
        sock.script = [errno.EMFILE]
        listener.doRead()
        with monkeypatch.context() as patched:
            patched.setattr(watcher, "addReader", refuse(errno.ENOSPC))
            watcher.advance(PAUSE)
            assert watcher.readers == set()
        watcher.advance(PAUSE)
        assert watcher.readers == {listener}
        assert factory.served == []
