"""Listeners: keys, and what can not be received or watched."""

from __future__ import annotations

import errno
import gc
import os
import socket
import struct
import weakref
from contextlib import ExitStack, closing
from typing import Any
from unittest.mock import patch

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.logger import capturedLogs, formatEvent

from relayd.core.process_settings import Transport
from relayd.datagrams.endpoint import UdpListener
from relayd.datagrams.mmsg import BATCH
from relayd.datagrams.sockets import (
    bind_udp,
)
from relayd.operating.endpoints import watcher
from relayd.udp_nat import Server, UdpNat
from tests.conftest import LoggedFailures
from tests.datagrams.support import (
    CLIENT,
    REFUSED,
    SERVER,
    Bench,
    Defect,
    FakeSocket,
    FakeWatcher,
    Observer,
    arrived,
    problem,
)
from tests.support.contracts import until


def test_one_client_of_a_wildcard_is_one_flow() -> None:
    """By the address that it spoke to; the way there may change, and the answer's."""
    bench = Bench(host="0.0.0.0")
    real = bench.listener.recvmsg

    def recvmsg(size: int, extra: int) -> Any:
        # Each time on another interface, and to another header's destination.
        data, _, flags, source = real(size, extra)
        told = struct.pack(
            "=I4s4s",
            len(bench.listener.inbox) + 1,
            socket.inet_aton("203.0.113.9"),
            bytes([len(bench.listener.inbox)] * 4),
        )
        return data, [(socket.IPPROTO_IP, 8, told)], flags, source

    bench.nat.listeners[0].sock.recvmsg = recvmsg
    bench.listener.inbox.extend([(b"a", CLIENT), (b"bc", CLIENT), (b"def", CLIENT)])
    bench.watcher.ready(bench.listener.number)
    [sock] = bench.sockets
    assert sock.sent == [b"a", b"bc", b"def"]
    [flow] = bench.nat.table.flows.values()
    port = bench.listener.number % 60000
    assert flow.listener.name(flow.here) == f"203.0.113.9:{port}"
    bench.close()


def test_a_client_that_sends_keeps_its_flow_on_a_wildcard_too() -> None:
    """Longer than any timeout, whether it was answered or not."""
    bench = Bench(host="0.0.0.0", unreplied_timeout=3, timeout=4)
    bench.arrive()
    for turn in range(20):
        bench.pass_time(1)
        if turn == 10:
            bench.answer()
        bench.arrive()
    assert len(bench.sockets) == 1
    bench.close()


def test_a_datagram_without_a_local_address_is_dropped() -> None:
    """It could not be answered from there."""
    bench = Bench(host="0.0.0.0")
    bench.nat.listeners[0].sock.recvmsg = lambda *_: (b"?", [], 0, CLIENT)
    bench.listener.inbox.append((b"?", CLIENT))
    assert not bench.nat.listeners[0].read()
    assert bench.nat.counters.dropped == {"no_local_address": BATCH}
    assert not bench.sockets
    bench.close()


def test_an_exception_drops_only_the_listeners_batch(
    logged_failures: LoggedFailures,
) -> None:
    """What comes next is served; the log has a traceback in a second at most."""

    def own(address: Any) -> bool:
        raise Defect

    bench = Bench(host="0.0.0.0", own=own)
    bad = ("192.0.2.66", bench.listener.number % 60000)
    bench.arrive(b"known")
    for number in range(1, 4):
        bench.listener.inbox.extend(
            [(b"before", CLIENT), (b"this", bad), (b"a", CLIENT), (b"bc", CLIENT)]
        )
        bench.watcher.ready(bench.listener.number)
        assert bench.nat.counters.dropped == {"failed": 3 * number}
        bench.check()
    assert bench.sockets[0].sent == [b"known"] + [b"before"] * 3
    bench.arrive(b"goes on")
    bench.answer(b"and back")
    assert bench.sockets[0].sent[-1] == b"goes on"
    assert bench.listener.sent == [(b"and back", CLIENT)]
    told = logged_failures.take("a listener failed; it goes on with the next batch")
    assert "Defect" in told
    bench.close()


@pytest.mark.parametrize("transport", ["plane", "twisted"])
@pytest_twisted.ensureDeferred
async def test_a_listener_receives_after_an_exception(
    transport: Transport, logged_failures: LoggedFailures
) -> None:
    """On either kind of watcher; a flow that fails leaves the others."""
    live: Any = reactor
    observer = Observer()

    def own(address: Any) -> bool:
        raise Defect

    with ExitStack() as held:
        server = held.enter_context(closing(socket.socket(type=socket.SOCK_DGRAM)))
        server.bind(("127.0.0.1", 0))
        server.setblocking(False)
        nat = UdpNat(
            live,
            [Server(*server.getsockname())],
            watcher=watcher(live, transport),
            observer=observer,
            own=own,
        )
        listening: Any = await UdpListener("0.0.0.0", 0).listen(nat)
        port = listening.getHost().port
        clients = [
            held.enter_context(closing(socket.socket(type=socket.SOCK_DGRAM)))
            for _ in range(2)
        ]
        clients[0].bind(("127.0.0.1", 0))
        # A listener there would be asked for: whether it is ours.
        wild = [("0.0.0.0", clients[0].getsockname()[1])]
        nat.loops.update(wild, nat.servers)
        for client in clients:
            client.connect(("127.0.0.1", port))
            client.setblocking(False)
        for number in (1, 2):
            clients[0].send(b"bad")
            await until(
                lambda n=number: nat.counters.dropped["failed"] == n, "it fails"
            )
        logged_failures.take("a listener failed")
        clients[1].send(b"good")
        received: list[Any] = []
        await until(lambda: arrived(server, received), "a request")
        [flow] = nat.table.flows.values()

        def broken(*_: Any) -> Any:
            raise Defect

        flow.recv = broken
        server.sendto(b"!", received[0][1])
        await until(lambda: observer.endings == ["failed"], "the flow has ended")
        clients[1].send(b"anew")
        received.clear()
        await until(lambda: arrived(server, received), "a request")
        server.sendto(b"yes", received[0][1])
        received.clear()
        await until(lambda: arrived(clients[1], received), "a reply")
        await listening.stopListening()


@pytest.mark.cost
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_closed_listener_keeps_no_memory(host: str) -> None:
    """A test of cost.

    Nor does it wait for a collection, which a quiet program may not have.
    """
    nat = UdpNat(reactor, [Server(*SERVER)], watcher=watcher(reactor, "auto"))
    nat.listen([bind_udp(host, 0)])
    [listener] = nat.listeners
    kept = [weakref.ref(each) for each in (listener.replies, listener._receiver)]
    del listener
    gc.disable()
    try:
        nat.close()
        assert [each() for each in kept] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("number", REFUSED)
@pytest.mark.parametrize("host", ["203.0.113.1", "0.0.0.0"])
def test_a_listener_that_can_not_receive_pauses(number: int, host: str) -> None:
    """It would be told again and again; there is one line, and it comes back."""
    bench = Bench(host=host)
    name = "recvmsg" if host == "0.0.0.0" else "recvfrom"
    really = getattr(bench.listener, name)
    asked: list[int] = []

    def refused(*_: Any) -> Any:
        asked.append(1)
        raise problem(number)

    setattr(bench.listener, name, refused)
    with capturedLogs() as events:
        bench.watcher.ready(bench.listener.number)
        assert bench.listener.number not in bench.watcher.handlers
        bench.clock.advance(1)
        bench.watcher.ready(bench.listener.number)
    assert len(asked) == 2
    port = bench.listener.number % 60000
    assert [formatEvent(each) for each in events] == [
        f"{host}:{port}: can't receive: {os.strerror(number)}; tried again in 1 s"
    ] * 2
    setattr(bench.listener, name, really)
    bench.clock.advance(1)
    bench.arrive()
    assert bench.sockets[0].sent == [b"?"]
    bench.close()
    bench = Bench(host=host)
    setattr(bench.listener, name, refused)
    bench.watcher.ready(bench.listener.number)
    bench.close()


@pytest.mark.parametrize("how", ["refused", "failed"])
def test_a_listener_that_can_not_receive_keeps_no_flow_alive(
    how: str, logged_failures: LoggedFailures
) -> None:
    """Neither its own nor another listener's."""
    bench = Bench(unreplied_timeout=1)
    other = FakeSocket()
    bench.nat.listen([other])
    bench.arrive()
    other.inbox.append((b"?", ("192.0.2.2", 2)))
    bench.watcher.ready(other.number)
    assert len(bench.live) == 2
    wrong = problem(errno.EPERM) if how == "refused" else ZeroDivisionError()
    with patch.object(other, "recvfrom", side_effect=wrong), capturedLogs():
        bench.watcher.ready(other.number)
        bench.pass_time(2)
    assert not bench.live
    assert bench.observer.endings == ["unreplied"] * 2
    if how == "failed":
        logged_failures.clear()
    bench.close()


def test_flows_of_a_socket_that_was_handed_over_expire() -> None:
    """Nothing is read there any more, so nothing is waited for."""
    bench = Bench(unreplied_timeout=3)
    bench.arrive(b"one")
    [listener] = bench.nat.listeners
    bench.nat.retire([listener])
    listener.stop_reading()
    bench.pass_time(5)
    assert bench.observer.endings == ["unreplied"]
    assert listener.closed


def test_addresses_that_were_opened_together_close_together() -> None:
    """Once they have retired, all of them; others close for themselves."""
    bench = Bench()
    [before] = bench.nat.listeners
    one, other = bench.nat.listen([FakeSocket("203.0.113.2"), FakeSocket("::")])
    bench.arrive()
    bench.nat.retire([before, one])
    assert bench.nat.listeners == [before, one, other]
    bench.nat.end(next(iter(bench.nat.table)), "drained")
    bench.pass_time(2)
    assert bench.nat.listeners == [one, other]
    assert before.closed
    bench.nat.retire([other])
    assert one.closed
    assert other.closed
    assert not bench.nat.listeners


@pytest.mark.parametrize("number", REFUSED)
def test_a_kernel_that_does_not_report_local_addresses(number: int) -> None:
    """A wildcard listener answers from what the kernel chooses, and says so."""
    with patch.object(FakeSocket, "setsockopt", side_effect=problem(number)):
        with capturedLogs() as events:
            bench = Bench(host="0.0.0.0")
        [line] = [formatEvent(each) for each in events]
        assert "the kernel does not tell which address clients send to" in line
        bench.arrive()
        bench.answer()
    assert bench.listener.sent == [(b"!", CLIENT)]
    bench.check()
    bench.close()


def test_all_listeners_are_watched_or_none() -> None:
    """One that can't be leaves nothing of the others."""
    bench = Bench()
    more = [FakeSocket(), FakeSocket()]

    def watch(descriptor: int, handler: Any, mask: int) -> None:
        bench.watcher.full = descriptor == more[1].number
        FakeWatcher.watch(bench.watcher, descriptor, handler, mask)

    bench.watcher.watch = watch  # type: ignore[method-assign]
    with pytest.raises(OSError, match="No space"):
        bench.nat.listen(more)
    assert more[0].closed
    assert len(bench.nat.listeners) == 1
    bench.close()
