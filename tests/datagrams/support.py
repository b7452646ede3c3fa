"""A UDP relay on sockets that never touch the network."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from relayd.core.flows import Counters, FlowFacts
from relayd.datagrams.mmsg import BATCH
from relayd.datagrams.sockets import (
    BUFFER_SIZE,
    MAX_SEGMENTS,
)
from relayd.udp_nat import Server, UdpNat

CLIENT = ("192.0.2.1", 4000)

SERVER = ("198.51.100.1", 53)


def problem(number: int) -> OSError:
    """An error of the kernel's."""
    return OSError(number, os.strerror(number))


class FakeSocket:
    """A datagram socket that receives what the test puts into `inbox`.

    :ivar inbox: datagrams, with their sources if it is a listener's, and errors.
    :ivar errors: what the next sends fail with; None for one that does not.
    :ivar sent: what left; with where to, if it is a listener's.
    """

    family = socket.AF_INET
    last = 100_000

    def __init__(self, host: str = "203.0.113.1") -> None:
        self.host = host
        #: Whether it makes datagrams of a run; or an error to fail with.
        self.segments: bool | int = True
        FakeSocket.last += 1
        self.number = FakeSocket.last
        self.inbox: deque[Any] = deque()
        self.errors: deque[OSError | None] = deque()
        self.sent: list[Any] = []
        self.peer: Any = None
        self.closed = False
        self.dropped = 0

    def fileno(self) -> int:
        return -1 if self.closed else self.number

    def close(self) -> None:
        self.closed = True

    def connect(self, address: Any) -> None:
        self.peer = address

    def getsockname(self) -> Any:
        return (self.host, self.number % 60000)

    def getpeername(self) -> Any:
        return self.peer

    def setsockopt(self, *_: Any) -> None:
        """Whatever it is."""

    def getsockopt(self, level: int, name: int, size: int = 4) -> bytes:
        return bytes(32) + self.dropped.to_bytes(4, sys.byteorder) + bytes(size - 36)

    def _next(self) -> Any:
        if self.closed:
            raise problem(errno.EBADF)
        if not self.inbox:
            raise BlockingIOError(errno.EAGAIN, "nothing")
        item = self.inbox.popleft()
        if isinstance(item, OSError):
            raise item
        return item

    def recv(self, size: int) -> bytes:
        data: bytes = self._next()
        return data[:size]

    def recv_into(self, room: Any) -> int:
        data: bytes = self._next()
        room[: len(data)] = data
        return len(data)

    def recvfrom(self, size: int) -> tuple[bytes, Any]:
        data, source = self._next()
        return data[:size], source

    def recvmsg(self, size: int, extra: int) -> tuple[bytes, Any, int, Any]:
        data, source = self._next()
        # in_pktinfo, of the third interface; the destination was a broadcast address.
        told = struct.pack("=I4s4s", 3, socket.inet_aton("203.0.113.9"), b"\xff" * 4)
        return data[:size], [(socket.IPPROTO_IP, 8, told)], 0, source

    def _leave(self, what: Any) -> None:
        if self.closed:
            raise problem(errno.EBADF)
        if self.errors and (wrong := self.errors.popleft()) is not None:
            raise wrong
        self.sent.append(what)

    def send(self, data: Any) -> None:
        self._leave(bytes(data))

    def sendto(self, data: Any, to: Any) -> None:
        self._leave((bytes(data), to))

    def sendmsg(
        self, run: Any, extra: Any = (), flags: int = 0, to: Any = None
    ) -> None:
        [size] = [told for level, _, told in extra if level == 17] or [None]
        if self.segments is not True and size is not None:
            raise problem(int(self.segments))
        if size is None:
            assert len(run) == 1
        else:
            assert {len(data) for data in run} == {int.from_bytes(size, sys.byteorder)}
            assert 1 < len(run) <= MAX_SEGMENTS
            assert sum(map(len, run)) <= 65507
        if self.errors and (wrong := self.errors.popleft()) is not None:
            raise wrong
        for data in run:
            self.sent.append(bytes(data) if to is None else (bytes(data), to))


class FakeOutbox:
    """Sends what is in its slots one by one."""

    slots = [memoryview(bytearray(BUFFER_SIZE)) for _ in range(BATCH)]

    def __init__(self, sock: FakeSocket, *, local: bool) -> None:
        self._sock = sock
        self._local = local

    def envelope(self, key: Any) -> Any:
        source, ours = key
        assert bool(ours) == self._local
        return source

    def send(self, sizes: list[int], envelopes: list[Any]) -> dict[int, OSError]:
        assert 1 <= len(sizes) == len(envelopes) <= BATCH
        problems = {}
        for number, (size, to) in enumerate(zip(sizes, envelopes, strict=True)):
            try:
                self._sock.sendto(self.slots[number][:size], to)
            except OSError as why:
                problems[number] = why
        return problems


class FakeResolver:
    """Finds the addresses of a name when the test says so."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.last: Deferred[list[Any]] = Deferred()

    def addresses(self, host: str, port: int) -> Deferred[list[Any]]:
        self.asked.append((host, port))
        self.last = Deferred()
        return self.last

    def answer(self, *hosts: str) -> None:
        port = self.asked[-1][1]
        self.last.callback([(socket.AF_INET, (host, port)) for host in hosts])

    def fail(self, why: Exception) -> None:
        self.last.errback(why)


class FakeWatcher:
    """Keeps who is watched, and refuses when told to.

    :param batches: it calls handlers in batches; each call is one, but while `held`.
    """

    def __init__(self, *, batches: bool) -> None:
        self.handlers: dict[int, Any] = {}
        self.full = False
        self.held = False
        self._after: list[Any] = []
        self.after_batch = self._after.append if batches else None

    def watch(self, descriptor: int, handler: Any, mask: int) -> None:
        if self.full:
            raise problem(errno.ENOSPC)
        assert descriptor not in self.handlers
        self.handlers[descriptor] = handler

    def ready(self, descriptor: int) -> None:
        self.handlers[descriptor].ready(1)
        if not self.held:
            self.release()

    def release(self) -> None:
        """The batch is through."""
        self.held = False
        for call in self._after:
            call()
        self._after.clear()

    def unwatch(self, descriptor: int) -> None:
        self.handlers.pop(descriptor, None)

    def unwatch_and_close(self, sock: Any) -> None:
        self.handlers.pop(sock.fileno(), None)
        sock.close()


class Observer:
    """Keeps how flows ended."""

    def __init__(self) -> None:
        self.facts: list[FlowFacts] = []
        self.totals: list[tuple[str, str, str]] = []

    @property
    def endings(self) -> list[str]:
        return [each.ending for each in self.facts]

    def ended(self, flow: Any, facts: FlowFacts) -> None:
        self.facts.append(facts)

    def closed(self, relay: str, listeners: str, counters: Counters) -> None:
        self.totals.append((relay, listeners, counters.line))


class Bench:
    """A relay of one listener on fakes.

    :param together: replies of several flows leave together.

    :ivar sockets: of the flows, in the order in which they were opened.
    """

    def __init__(
        self, servers: Any = None, *, together: bool = False, **settings: Any
    ) -> None:
        self.clock = Clock()
        self.watcher = FakeWatcher(batches=together)
        self.observer: Any = settings.pop("observer", Observer())
        self.resolver: Any = settings.get("resolver")
        self.sockets: list[FakeSocket] = []
        #: Opens the sockets of flows; a test may put another in its place.
        self.open: Any = self._open_fake
        self.open_error: OSError | None = None
        #: For the sockets to come.
        self.connect_error: OSError | None = None
        host = settings.pop("host", "203.0.113.1")
        settings.setdefault("max_flows", 100)
        self.nat = UdpNat(
            None,
            [Server(*SERVER)] if servers is None else servers,
            watcher=self.watcher,
            clock=self.clock,
            observer=self.observer,
            open_socket=lambda family: self.open(family),
            **settings,
        )
        self.listener = self._open_listener(host)
        with patch("relayd.datagrams.listener.outbox", FakeOutbox):
            self.nat.listen([self.listener])

    def _open_listener(self, host: str) -> FakeSocket:
        return FakeSocket(host)

    def _open_fake(self, family: int) -> FakeSocket:
        if self.open_error is not None:
            raise self.open_error
        self.sockets.append(FakeSocket())
        wrong = self.connect_error
        if wrong is not None:

            def connect(_: Any) -> None:
                raise wrong

            self.sockets[-1].connect = connect  # type: ignore[method-assign]
        return self.sockets[-1]

    def arrive(self, data: bytes = b"?", source: Any = CLIENT) -> None:
        """A client's datagram arrives and is read."""
        self.listener.inbox.append((data, source))
        self.watcher.ready(self.listener.number)

    def answer(self, data: bytes = b"!", number: int = -1) -> None:
        """A server's datagram arrives and is read."""
        sock = self.sockets[number]
        sock.inbox.append(data)
        while sock.inbox:
            self.watcher.ready(sock.number)

    def converse(self, *sources: Any) -> None:
        """Clients that speak, are answered, and speak on: their flows are in use."""
        for source in sources:
            self.arrive(source=source)
            self.answer()
        self.clock.advance(2.25)
        for source in sources:
            self.arrive(source=source)

    @property
    def live(self) -> list[FakeSocket]:
        return [each for each in self.sockets if not each.closed]

    def check(self) -> None:
        """The sums hold, and what lives is watched and timed."""
        counters, counts = self.nat.counters, self.nat.counts
        assert counters.received == (
            counters.sent + sum(counters.dropped.values()) + counts.kept
        )
        assert counters.replies_received == (
            counters.replies_sent
            + sum(counters.replies_dropped.values())
            + counts.replies_kept
        )
        left = sum(len(each.sent) for each in self.sockets)
        assert counters.sent + counters.resent == left
        assert counters.replies_sent == len(self.listener.sent)
        flows = {each.sock for each in self.nat.table.flows.values()}
        assert flows == set(self.live)
        listening = set() if self.listener.closed else {self.listener.number}
        assert set(self.watcher.handlers) == listening | {each.number for each in flows}
        ticks = self.clock.getDelayedCalls()
        draining = self.nat.draining and not self.listener.closed
        names = any(each.named for each in self.nat.servers)
        assert bool(flows) <= len(ticks) <= 1 + names + draining

    def close(self) -> None:
        """And nothing is left."""
        self.nat.close()
        self.check()
        assert self.listener.closed
        assert not self.live
        assert not self.watcher.handlers
        assert not self.clock.getDelayedCalls()

    def pass_time(self, seconds: float) -> None:
        self.clock.pump([0.25] * round(seconds * 4))


#: What a sandbox says of a call that it does not let through.
REFUSED = [errno.EPERM, errno.ENOSYS, errno.EACCES, errno.EOPNOTSUPP]

ERRNOS = [errno.ECONNREFUSED, errno.EAGAIN, errno.ENOBUFS, errno.EPERM, errno.EMSGSIZE]


def busy(flows: int, **settings: Any) -> Bench:
    """A relay of so many flows, each of which has had an answer."""
    bench = Bench(together=True, max_flows_per_client=100, **settings)
    for port in range(1, flows + 1):
        bench.arrive(source=("192.0.2.1", port))
        bench.answer()
    bench.listener.sent.clear()
    bench.nat.counters.replies_sent = bench.nat.counters.replies_received = 0
    bench.watcher.held = True
    return bench


NAMED = ("198.51.100.1", "198.51.100.2", "198.51.100.3")


def named(*hosts: str, **settings: Any) -> Bench:
    """A relay to a name that has these addresses."""
    resolver = FakeResolver()
    bench = Bench([Server("name.example", 53)], resolver=resolver, **settings)
    resolver.answer(*(hosts or NAMED))
    return bench


def refuse(bench: Bench, number: int = -1, why: int = errno.ECONNREFUSED) -> None:
    """The host that a flow's socket is connected to refuses."""
    sock = bench.sockets[number]
    sock.inbox.append(problem(why))
    bench.watcher.ready(sock.number)


def peers(bench: Bench) -> list[str]:
    return [each.peer[0] for each in bench.sockets]


def turns(bench: Bench, count: Callable[[], int]) -> list[int]:
    """What `count` returns when a call of another turn begins, from now on."""
    found: list[int] = []
    call_later = bench.clock.callLater

    def noting(delay: float, call: Any, *args: Any, **more: Any) -> Any:
        if delay:
            return call_later(delay, call, *args, **more)

        def noted() -> None:
            found.append(count())
            call(*args, **more)

        return call_later(delay, noted)

    bench.clock.callLater = noting  # type: ignore[method-assign]
    return found


def become(bench: Bench, where: Any, **settings: Any) -> UdpNat:
    """Give it other settings, and these servers."""
    other = UdpNat(
        None,
        where,
        watcher=bench.watcher,
        clock=bench.clock,
        open_socket=lambda family: bench.open(family),
        max_flows=100,
        **settings,
    )
    bench.nat.become(other)
    return other


class Defect(Exception):
    """What nobody has thought of."""


def arrived(sock: socket.socket, into: list[Any]) -> bool:
    """Whether a datagram has; it is put `into`."""
    try:
        into.append(sock.recvfrom(BUFFER_SIZE))
    except BlockingIOError:
        return False
    return True
