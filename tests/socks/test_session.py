"""One client of the proxy: ended from within what it asks."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.error import ConnectionDone, ConnectionRefusedError

from relayd.core.session import Ending, Session
from relayd.core.stage import Stage
from tests.support.fakes import FakeTransport
from tests.support.proxies import (
    BIND,
    BIND_ANY,
    BIND_BY_NAME,
    CONNECT,
    CONNECT_BY_NAME,
    SERVER,
    Proxy,
)

REQUESTS = [CONNECT, CONNECT_BY_NAME, BIND, BIND_BY_NAME, BIND_ANY]


def ends_the_session(proxy: Proxy) -> Callable[..., None]:
    """What ends the session of its last argument instead of refusing it."""

    def end(*arguments: Any) -> None:
        session: Session = arguments[-1]
        proxy.factory.sessions[session.id].abort_session(Ending.DENIED, "not today")

    return end


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("ident", [False, True])
def test_a_policy_may_end_a_session_that_it_is_asked_about(
    request_: bytes, ident: bool
) -> None:
    proxy = Proxy(ident=ident, bind_any=True)
    proxy.policy.admit = ends_the_session(proxy)  # type: ignore[method-assign]
    client = proxy.client(request_)
    client.turn()
    assert not proxy.dialled
    assert not proxy.listeners
    assert not proxy.resolver.asked
    assert not proxy.clock.tcpClients
    assert proxy.session.detail == "not today"
    proxy.over(Ending.DENIED)


@pytest.mark.parametrize("request_", [CONNECT, CONNECT_BY_NAME, BIND, BIND_BY_NAME])
def test_a_policy_may_end_a_session_whose_destination_it_is_asked_about(
    request_: bytes,
) -> None:
    proxy = Proxy()
    proxy.policy.permit = ends_the_session(proxy)  # type: ignore[method-assign]
    client = proxy.client(request_)
    if request_ in (CONNECT_BY_NAME, BIND_BY_NAME):
        proxy.resolver.answer(SERVER)
    client.turn()
    assert not proxy.listeners
    assert not client.connected
    assert proxy.session.detail == "not today"
    proxy.over(Ending.DENIED)


# -- what is left of a session


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("ended", ["joined", "refused", "cancelled"])
def test_a_session_that_is_over_is_freed_at_once(request_: bytes, ended: str) -> None:
    """It is in no cycle of references, which would wait for the collector."""
    proxy = Proxy(bind_any=True)
    client = proxy.client(request_)
    protocol = weakref.ref(client.protocol)
    if request_ in (CONNECT_BY_NAME, BIND_BY_NAME):
        proxy.resolver.answer(SERVER)
    if ended == "refused":
        for server in proxy.servers:
            server.dial.fail(ConnectionRefusedError())
        proxy.clock.pump([1.0] * 130)
        client.take()
    elif ended == "joined":
        made = (
            proxy.server.dial.connect() if proxy.servers else proxy.port.accept(SERVER)
        )
        made.lose(ConnectionDone())
        made.protocol = None
    if client.connected:
        client.lose(ConnectionDone())
    proxy.nothing_left()
    # The fakes keep what real ones don't.
    proxy.servers.clear()
    for each in (*proxy.listeners, *proxy.ports):
        each.factory = None
    proxy.resolver.forget()
    client.protocol = None
    assert protocol() is None


# -- whatever happens, in whatever order


class Happening:
    """A client of a proxy, and all that may happen to it."""

    def __init__(self, request: bytes, *, ident: bool, timeout: float) -> None:
        self.request = request
        proxy = self.proxy = Proxy(
            opens=False,
            ident=ident,
            bind_any=True,
            handshake_timeout=timeout,
            connect_timeout=timeout,
            bind_timeout=timeout,
        )
        self.client = proxy.client()
        self.others: list[FakeTransport] = []
        self.question: Any = None

    def says(self, length: int) -> None:
        """The client sends a part of its request, or something behind it."""
        part, self.request = self.request[:length], self.request[length:]
        if self.client.connected and self.client.reading and not self.eof:
            self.client.receive(part or b"data")

    @property
    def eof(self) -> bool:
        return self.proxy.session.up.eof

    def happens(self, what: str) -> None:
        getattr(self, what)()

    def client_says_little(self) -> None:
        self.says(3)

    def client_says_all(self) -> None:
        self.says(1000)

    def client_ends(self) -> None:
        if self.client.connected and self.client.reading and not self.eof:
            self.client.receive_eof()

    def client_resets(self) -> None:
        if self.client.connected:
            self.client.lose()

    def client_reads(self) -> None:
        if self.client.connected:
            self.client.take()

    def time_passes(self) -> None:
        self.proxy.clock.pump([0.25] * 5)

    def name_is_found(self) -> None:
        resolver = self.proxy.resolver
        if resolver.asked and not resolver.cancelled and not self.found:
            self.found = True
            resolver.answer(SERVER)

    found = False

    def server_answers(self) -> None:
        for server in self.proxy.servers:
            for dial in server.dials:
                if not dial.deferred.called:
                    self.others.append(dial.connect())

    def server_refuses(self) -> None:
        for server in self.proxy.servers:
            for dial in server.dials:
                if not dial.deferred.called:
                    dial.fail(ConnectionRefusedError())

    def server_says(self) -> None:
        for other in self.others:
            if other.connected and other.reading and not self.proxy.session.down.eof:
                other.receive(b"answer")

    def server_ends(self) -> None:
        for other in self.others:
            if other.connected and other.reading and not self.proxy.session.down.eof:
                other.receive_eof()

    def server_resets(self) -> None:
        for other in self.others:
            if other.connected:
                other.lose()

    def listener_opens(self) -> None:
        for listener in self.proxy.listeners:
            if listener.factory is not None and not listener.opened.called:
                self.proxy.ports.append(listener.open())

    def peer_comes(self) -> None:
        for port in self.proxy.ports:
            if port.is_open:
                self.others.append(port.accept(SERVER))

    def stranger_comes(self) -> None:
        for port in self.proxy.ports:
            if port.is_open:
                self.others.append(port.accept("203.0.113.99"))

    def identd_answers(self) -> None:
        # Twisted's own endpoint does not connect what was cancelled.
        asks = self.proxy.session.stage is Stage.DECIDING
        if asks and self.proxy.clock.tcpClients and self.question is None:
            self.question, _ = self.proxy.identd()
            self.question.dataReceived(b"50000, 80 : USERID : UNIX : joe\r\n")

    def is_evicted(self) -> None:
        for each in self.proxy.factory.handshakes.oldest(1):
            each.end(Ending.EVICTED)

    def is_drained(self) -> None:
        self.proxy.factory.drain(1.0)

    def is_aborted(self) -> None:
        self.proxy.factory.abort_all()


EVENTS = [
    name
    for name in vars(Happening)
    if not name.startswith("_") and name not in ("says", "eof", "happens", "found")
]


@given(
    st.sampled_from(REQUESTS),
    st.booleans(),
    st.sampled_from([0.0, 2.0]),
    st.lists(st.sampled_from(EVENTS), max_size=12),
)
def test_no_order_of_events_breaks_a_session(
    request_: bytes, ident: bool, timeout: float, events: list[str]
) -> None:
    """It ends once, nothing is left of it, and nothing is logged as a failure."""
    happening = Happening(request_, ident=ident, timeout=timeout)
    # Mostly it gets somewhere.
    happening.happens("client_says_all")
    for event in events:
        happening.happens(event)
    proxy = happening.proxy
    proxy.factory.drain(0)
    proxy.clock.pump([0.0, 0.0])
    heard = [each.split()[0] for each in proxy.witness.heard]
    assert heard.count("closed") == 1
    assert heard.count("dialing") <= 1
    assert heard.count("connected") <= heard.count("dialing")
    assert not any(other.connected for other in happening.others)
    assert proxy.session.stage is Stage.OVER
    proxy.nothing_left()
