"""The UDP relay: on sockets that never touch the network, and once on real ones."""

from __future__ import annotations

import errno
import gc
import os
import socket
import struct
import sys
import weakref
from collections import deque
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import pytest_twisted
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import DNSLookupError
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent
from twisted.python.failure import Failure

from relayd import udp_nat
from relayd.endpoints import Transport, watcher
from relayd.errors import ListenError
from relayd.flow_log import (
    MOST_LINES,
    Counters,
    FlowFacts,
    FlowLog,
    QuietFlowLog,
)
from relayd.hops import datagrams
from relayd.nat_table import Flow
from relayd.udp_batches import BATCH
from relayd.udp_listening import (
    UdpListener,
    UdpPort,
)
from relayd.udp_nat import (
    LOOK_UP_EVERY,
    LOOKS,
    MANY,
    MOST_ASKED,
    SELF_TRIES,
    Server,
    UdpNat,
)
from relayd.udp_servers import KEPT_BESIDE, KEPT_FOR, MOST_KEPT, MOST_KEPT_BYTES, Kept
from relayd.udp_sockets import (
    BUFFER_SIZE,
    MOST_SEGMENTED,
    MOST_SEGMENTS,
    affordable_flows,
    bind_udp,
    bound_socket,
    is_broadcast,
)
from tests.conftest import LoggedFailures
from tests.contracts import until

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
            assert 1 < len(run) <= MOST_SEGMENTS
            assert sum(map(len, run)) <= 65507
        if self.errors and (wrong := self.errors.popleft()) is not None:
            raise wrong
        for data in run:
            self.sent.append(bytes(data) if to is None else (bytes(data), to))


class FakeOutbox:
    """Sends what is in its rooms one by one."""

    rooms = [memoryview(bytearray(BUFFER_SIZE)) for _ in range(BATCH)]

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
                self._sock.sendto(self.rooms[number][:size], to)
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

    def give_up(self, sock: Any) -> None:
        self.handlers.pop(sock.fileno(), None)
        sock.close()


class Observer:
    """Keeps how flows ended."""

    def __init__(self) -> None:
        self.facts: list[FlowFacts] = []
        self.totals: list[tuple[str, str]] = []

    @property
    def endings(self) -> list[str]:
        return [each.ending for each in self.facts]

    def ended(self, flow: Any, facts: FlowFacts) -> None:
        self.facts.append(facts)

    def closed(self, listeners: str, counters: Counters) -> None:
        self.totals.append((listeners, counters.line))


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
        self.sockets: list[FakeSocket] = []
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
            open_socket=self._open,
            **settings,
        )
        self.front = FakeSocket(host)
        with patch.object(udp_nat, "outbox", FakeOutbox):
            self.nat.listen([self.front])

    def _open(self, family: int) -> FakeSocket:
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
        self.front.inbox.append((data, source))
        self.watcher.ready(self.front.number)

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
        counters = self.nat.counters
        assert counters.received == counters.sent + sum(counters.dropped.values())
        assert counters.replies_received == (
            counters.replies_sent + sum(counters.replies_dropped.values())
        )
        left = sum(len(each.sent) for each in self.sockets)
        assert counters.sent + counters.sent_again == left
        assert counters.replies_sent == len(self.front.sent)
        flows = {each.sock for each in self.nat.table.flows.values()}
        assert flows == set(self.live)
        fronts = set() if self.front.closed else {self.front.number}
        assert set(self.watcher.handlers) == fronts | {each.number for each in flows}
        ticks = self.clock.getDelayedCalls()
        draining = self.nat.draining and not self.front.closed
        assert bool(flows) <= len(ticks) <= 1 + bool(self.nat._lookups) + draining

    def close(self) -> None:
        """And nothing is left."""
        self.nat.close()
        self.check()
        assert self.front.closed
        assert not self.live
        assert not self.watcher.handlers
        assert not self.clock.getDelayedCalls()

    def pass_time(self, seconds: float) -> None:
        self.clock.pump([0.25] * round(seconds * 4))


#: What a sandbox says of a call that it does not let through.
REFUSED = [errno.EPERM, errno.ENOSYS, errno.EACCES, errno.EOPNOTSUPP]


# -- the sums


ERRNOS = [errno.ECONNREFUSED, errno.EAGAIN, errno.ENOBUFS, errno.EPERM, errno.EMSGSIZE]
_ERRORS = st.lists(st.sampled_from([None, *ERRNOS]), max_size=3)
_SIZES = st.sampled_from([0, 1, 200, 65507, BUFFER_SIZE])
_SOURCES = st.tuples(
    st.sampled_from(["192.0.2.1", "192.0.2.2", "192.0.2.3"]),
    st.sampled_from([0, 4000, 4001]),
)
_EVENTS = st.one_of(
    st.tuples(st.just("arrive"), st.lists(st.tuples(_SOURCES, _SIZES), max_size=5)),
    st.tuples(st.just("unread"), st.lists(st.tuples(_SOURCES, _SIZES), max_size=5)),
    st.tuples(st.just("answer"), st.lists(_SIZES, max_size=5)),
    st.tuples(st.just("up_errors"), _ERRORS),
    st.tuples(st.just("down_errors"), _ERRORS),
    st.tuples(st.just("segments"), st.sampled_from([True, errno.EINVAL, *ERRNOS[:3]])),
    st.tuples(st.just("recv_error"), st.sampled_from(ERRNOS[:1] + ERRNOS[2:])),
    st.tuples(st.just("front_error"), st.sampled_from([errno.ENOMEM])),
    st.tuples(st.just("open"), st.sampled_from([None, errno.EMFILE])),
    st.tuples(st.just("connect"), st.sampled_from([None, errno.ENETUNREACH])),
    st.tuples(st.just("full"), st.booleans()),
    st.tuples(st.just("held"), st.booleans()),
    st.tuples(st.just("time"), st.integers(1, 12)),
    st.tuples(st.just("drain"), st.just(2)),
    st.tuples(st.just("close"), st.none()),
)


@given(
    st.lists(_EVENTS, max_size=30),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([0.0, 1.0, 3.5]),
    st.booleans(),
    st.sampled_from(["203.0.113.1", "0.0.0.0"]),
    st.booleans(),
)
def test_every_datagram_is_accounted_for(
    events: list[tuple[str, Any]],
    most: int,
    each: int,
    cap: float,
    refresh: bool,
    host: str,
    together: bool,
) -> None:
    """Sent or counted as dropped, in any history; then nothing is left."""
    bench = Bench(
        together=together,
        host=host,
        max_flows=most,
        max_flows_per_client=each,
        reply_cap=cap,
        refresh_inbound=refresh,
        timeout=3,
        unreplied_timeout=2,
    )
    put = replies = 0
    for what, value in events:
        if what in ("arrive", "unread") and not bench.front.closed:
            bench.front.inbox.extend((bytes(size), source) for source, size in value)
            put += len(value)
            if what == "arrive":
                bench.watcher.ready(bench.front.number)
        elif what == "answer" and bench.live:
            sock = bench.live[0]
            sock.inbox.extend(bytes(size) for size in value)
            replies += len(value)
            while sock.inbox:
                bench.watcher.ready(sock.number)
        elif what == "up_errors" and bench.live:
            bench.live[0].errors.extend(n and problem(n) for n in value)
        elif what == "down_errors":
            bench.front.errors.extend(n and problem(n) for n in value)
        elif what == "segments":
            for sock in (bench.front, *bench.live):
                sock.segments = value
        elif what == "recv_error" and bench.live:
            bench.live[0].inbox.append(problem(value))
        elif what == "front_error":
            bench.front.inbox.append(problem(value))
        elif what == "open":
            bench.open_error = value and problem(value)
        elif what == "connect":
            bench.connect_error = value and problem(value)
        elif what == "full":
            bench.watcher.full = value
        elif what == "held":
            bench.watcher.held = value
        elif what == "time":
            bench.watcher.release()
            bench.clock.advance(value / 4)
        elif what == "drain":
            bench.nat.drain(value)
        elif what == "close":
            bench.nat.close()
        bench.check()
        unread = sum(not isinstance(each, OSError) for each in bench.front.inbox)
        assert bench.nat.counters.received == put - unread
        waiting = sum(len(front.waiting) for front in bench.nat.fronts)
        assert bench.nat.counters.replies_received + waiting == replies
    bench.close()


# -- errors


def test_a_refused_datagram_is_sent_again() -> None:
    """The error was an earlier one's; the flow stays, and it is counted."""
    bench = Bench()
    bench.arrive()
    bench.sockets[0].errors.append(problem(errno.ECONNREFUSED))
    bench.arrive(b"again")
    assert bench.sockets[0].sent == [b"?", b"again"]
    assert bench.nat.counters.icmp_errors == 1
    assert not bench.nat.counters.dropped
    bench.sockets[0].errors.extend([problem(errno.ECONNREFUSED)] * 2)
    bench.arrive(b"lost")
    assert bench.nat.counters.dropped == {"send_ECONNREFUSED": 1}
    assert bench.live == bench.sockets[:1]
    bench.sockets[0].inbox.append(problem(errno.ECONNREFUSED))
    bench.answer()
    assert bench.nat.counters.icmp_errors == 3
    assert bench.front.sent == [(b"!", CLIENT)]
    bench.close()


def test_what_was_too_large_for_the_path_eats_no_other_datagram() -> None:
    """A pending EMSGSIZE ('fragmentation needed') is an earlier one's.

    A run is sent again as a run; one that is too large itself, one by one from then on.
    """
    bench = Bench()
    bench.arrive()
    [sock] = bench.sockets
    sock.errors.append(problem(errno.EMSGSIZE))
    bench.arrive(b"next")
    assert sock.sent == [b"?", b"next"]
    assert bench.nat.counters.icmp_errors == 1
    # For good and all, it is the datagram's own.
    sock.errors.extend([problem(errno.EMSGSIZE)] * 2)
    bench.arrive(b"too large")
    assert bench.nat.counters.dropped == {"send_EMSGSIZE": 1}
    assert bench.nat.counters.icmp_errors == 1
    up = runs_of(bench, True)
    sock.errors.append(problem(errno.EMSGSIZE))
    bench.front.inbox.extend([(b"run", CLIENT)] * 3)
    bench.arrive(b"run")
    assert sock.sent[2:] == [b"run"] * 4
    assert up == [4, 4]
    assert bench.nat.counters.icmp_errors == 2
    bench.check()
    bench.close()


@pytest.mark.parametrize("number", ERRNOS[1:])
def test_a_send_error_drops_one_datagram(number: int) -> None:
    """By its name, in either direction, and is not tried for ever."""
    bench = Bench()
    bench.arrive()
    # One that may be an earlier datagram's is tried again, once.
    tries = 2 if number == errno.EMSGSIZE else 1
    bench.sockets[0].errors.extend([problem(number)] * tries)
    bench.arrive()
    bench.front.errors.append(problem(number))
    bench.answer()
    name = f"send_{errno.errorcode[number]}"
    assert bench.nat.counters.dropped == {name: 1}
    assert bench.nat.counters.replies_dropped == {name: 1}
    assert len(bench.live) == 1
    bench.close()


def test_a_client_whose_datagrams_can_not_be_sent_is_still_there() -> None:
    """It keeps its flow, and so its port."""
    bench = Bench(unreplied_timeout=3)
    bench.arrive()
    for _ in range(8):
        bench.sockets[0].errors.append(problem(errno.EPERM))
        bench.arrive()
        bench.pass_time(1)
    assert len(bench.live) == len(bench.sockets) == 1
    bench.close()


def test_what_has_no_flow_is_counted_by_its_reason() -> None:
    """Nobody at port 0 can be answered; a server without an address is none."""
    bench = Bench()
    bench.arrive(source=("192.0.2.1", 0))
    assert bench.nat.counters.dropped == {"source_port_0": 1}
    bench.close()
    bench = Bench([Server("name.example", 53)], resolver=FakeResolver())
    bench.arrive()
    assert bench.nat.counters.dropped == {"no_server": 1}
    assert not bench.sockets
    bench.close()


def test_what_would_come_back_is_dropped() -> None:
    """A source that is the listener's, a server's, or nobody's, in every spelling.

    Each would have had a flow whose answers are the next requests, for ever.
    """
    servers = [Server(*SERVER), Server("2001:db8::1", 53), Server("fe80::1%lo", 53)]
    for host in ("203.0.113.1", "0.0.0.0"):
        bench = Bench(servers, host=host, own=lambda ip: str(ip) == "203.0.113.1")
        port = bench.front.number % 60000
        forged: list[Any] = [
            ("203.0.113.1", port),
            SERVER,
            ("2001:db8::1", 53, 0, 0),
            ("fe80::1", 53, 0, 1),
            ("0.0.0.0", 7),
            ("::", 7, 0, 0),
            ("::ffff:0.0.0.0", 7, 0, 0),
            ("::ffff:203.0.113.1", port, 0, 0),
            (f"::ffff:{SERVER[0]}", SERVER[1], 0, 0),
        ]
        for source in forged:
            bench.arrive(source=source)
        assert bench.nat.counters.dropped == {"source_loops": len(forged)}
        assert not bench.sockets
        # Each is a client like another with another port, or another interface.
        for number, source in enumerate(forged[:4], 1):
            other = (*source[:1], source[1] + 1, *source[2:])
            bench.arrive(source=other)
            assert len(bench.sockets) == number
        bench.arrive(source=("fe80::1", 53, 0, 2))
        assert len(bench.sockets) == 5
        bench.check()
        bench.close()


def test_every_address_of_this_machine_is_a_wildcards() -> None:
    """It is asked only of those who speak from the listener's own port number."""
    asked: list[str] = []

    def own(address: Any) -> bool:
        asked.append(str(address))
        return "own" in names[str(address)]

    names = {"198.51.100.77": "own", "fe80::5%lo": "own", "192.0.2.1": "another's"}
    bench = Bench(host="0.0.0.0", own=own)
    port = bench.front.number % 60000
    bench.arrive(source=("198.51.100.77", port))
    bench.arrive(source=("fe80::5", port, 0, 1))
    assert bench.nat.counters.dropped == {"source_loops": 2}
    bench.arrive(source=("198.51.100.77", port + 1))
    bench.arrive(source=("192.0.2.1", port))
    assert len(bench.sockets) == 2
    assert asked == ["198.51.100.77", "fe80::5%lo", "192.0.2.1"]
    # Not for each datagram, only when a flow is admitted.
    bench.arrive(source=("192.0.2.1", port))
    assert len(asked) == 3
    bench.close()


def test_what_leads_back_follows_listeners_and_servers() -> None:
    """As they come and go, and as a name's addresses do."""
    resolver = FakeResolver()
    name = Server("name.example", 53)
    bench = Bench([name, Server(*SERVER)], resolver=resolver)
    nat, port = bench.nat, bench.front.number % 60000
    assert not nat.leads_back(("198.51.100.5", 53))
    resolver.answer("198.51.100.4", "198.51.100.5")
    assert nat.leads_back(("198.51.100.4", 53))
    assert nat.leads_back(("198.51.100.5", 53))
    nat.servers = [Server("198.51.100.9", 9)]
    assert nat.leads_back(("198.51.100.9", 9))
    assert not nat.leads_back(SERVER)
    assert nat.leads_back(("203.0.113.1", port))
    bench.close()
    assert not nat.leads_back(("203.0.113.1", port))


def test_every_address_of_this_machine_is_a_local_servers() -> None:
    """It may listen on all of them; it is asked only who speaks from its port."""
    asked: list[str] = []

    def own(address: Any) -> bool:
        asked.append(str(address))
        return str(address) in ("::1", "fd77::1", "127.0.0.1", "203.0.113.1")

    bench = Bench([Server("::1", 53), Server(*SERVER)], own=own)
    bench.arrive(source=("192.0.2.1", 4000))
    assert not asked
    for host in ("fd77::1", "127.0.0.1", "::ffff:203.0.113.1"):
        source = (host, 53, 0, 0) if ":" in host else (host, 53)
        bench.arrive(source=source)
    assert bench.nat.counters.dropped == {"source_loops": 3}
    bench.arrive(source=("192.0.2.1", 53))
    assert len(bench.sockets) == 2
    # A server elsewhere says nothing of this machine's addresses.
    bench.nat.servers = [Server(*SERVER)]
    bench.arrive(source=("127.0.0.1", 53))
    assert len(bench.sockets) == 3
    bench.close()


@pytest.mark.parametrize("here", [True, False])
def test_a_source_that_is_another_relays_server(here: bool) -> None:
    """On this machine it may echo; on another, two peers are relayed to each other."""

    def own(address: Any) -> bool:
        return here

    one, two = Bench(own=own), Bench([Server("198.51.100.2", 54)], own=own)
    one.arrive(source=("198.51.100.2", 54))
    two.arrive(source=SERVER)
    for bench in (one, two):
        assert bench.nat.counters.dropped["source_loops"] == here
        assert len(bench.sockets) == (not here)
    two.close()
    one.arrive(source=("198.51.100.2", 54))
    assert len(one.sockets) == 1
    one.close()


def test_oversize_reads_are_not_passed_on() -> None:
    """What fills the buffer may have been longer; the largest datagrams pass."""
    bench = Bench()
    for size in (0, 1, 65507, 65535, BUFFER_SIZE):
        bench.arrive(bytes(size))
        bench.answer(bytes(size))
    sizes = [0, 1, 65507, 65535]
    assert [len(each) for each in bench.sockets[0].sent] == sizes
    assert [len(data) for data, _ in bench.front.sent] == sizes
    assert bench.nat.counters.dropped == {"truncated": 1}
    assert bench.nat.counters.replies_dropped == {"truncated": 1}
    [flow] = bench.nat.table.flows.values()
    assert (flow.up_datagrams, flow.up_bytes) == (4, sum(sizes))
    assert (flow.down_datagrams, flow.down_bytes) == (4, sum(sizes))
    bench.close()


def test_want_of_a_flow_is_logged_once_a_second() -> None:
    """With what is in the way, and how many it cost so far."""
    bench = Bench(max_flows=1)
    bench.converse(CLIENT)
    with capturedLogs() as events:
        for _ in range(5):
            bench.arrive(source=("192.0.2.9", 1))
        bench.clock.advance(1)
        bench.arrive(source=("192.0.2.9", 1))
    so_far = "datagrams dropped for want of a flow so far"
    assert [formatEvent(each) for each in events] == [
        f"no room for another flow of 192.0.2.9 (1 {so_far})",
        f"no room for another flow of 192.0.2.9 (6 {so_far})",
    ]
    assert bench.nat.table.refused == 6
    bench.close()


def test_a_circle_and_want_of_room_have_a_line_each() -> None:
    """In one second: neither hides the other one."""
    bench = Bench(max_flows=1)
    bench.converse(CLIENT)
    port = bench.front.number % 60000
    name = udp_nat._hop(("192.0.2.8", 8), port)
    datagrams.add(name, bench.nat, "")
    with capturedLogs() as events:
        bench.arrive(source=("192.0.2.8", 8))
        bench.arrive(source=("192.0.2.9", 9))
    datagrams.remove(name)
    lines = [formatEvent(each) for each in events]
    assert len(lines) == 2
    assert "lead back to their own relay" in lines[0]
    assert "no room for another flow of 192.0.2.9" in lines[1]
    bench.close()


def test_no_socket_to_be_had() -> None:
    """The datagram is dropped, the relay goes on, and no socket is left open."""
    bench = Bench()
    bench.open_error = problem(errno.EMFILE)
    with capturedLogs() as events:
        bench.arrive()
    assert "no socket for a flow of 192.0.2.1: " in formatEvent(events[0])
    bench.open_error, bench.connect_error = None, problem(errno.ENETUNREACH)
    bench.arrive()
    bench.connect_error, bench.watcher.full = None, True
    bench.arrive()
    assert [each.closed for each in bench.sockets] == [True, True]
    assert bench.nat.counters.dropped == {"no_flow": 3}
    bench.watcher.full = False
    bench.arrive()
    assert bench.sockets[-1].sent == [b"?"]
    bench.close()


def test_the_flow_that_was_quiet_longest_makes_room() -> None:
    """One that is in use does not, however many come."""
    bench = Bench(max_flows=3, max_flows_per_client=3)
    bench.converse(CLIENT)
    for port in range(1, 50):
        bench.arrive(source=("192.0.2.2", port))
        bench.check()
    assert bench.observer.endings == ["evicted"] * 47
    assert not bench.sockets[0].closed
    facts = bench.observer.facts[0]
    assert (facts.client, facts.by) == ("192.0.2.2:1", "192.0.2.2:3")
    assert bench.nat.table.evicted == 47
    bench.arrive(b"still here")
    assert bench.sockets[0].sent[-1] == b"still here"
    bench.close()


@pytest.mark.parametrize("together", [False, True])
def test_to_be_answered_once_is_no_protection(together: bool) -> None:
    """A flood from two hosts, each datagram answered, ends no conversation.

    Nor does it keep a newcomer out.
    """
    bench = Bench(together=together, max_flows=100)
    talkers = [("198.51.100.7", port) for port in range(1, 11)]
    streamed = ("198.51.100.8", 1)
    bench.converse(*talkers)
    # One that spoke once, and is sent a stream.
    bench.arrive(b"subscribe", streamed)
    stream = len(bench.sockets) - 1
    bench.answer()
    bench.clock.advance(2.25)
    bench.answer()
    for number in range(400):
        bench.arrive(source=(f"192.0.2.{number % 2 + 1}", 1 + number))
        bench.answer()
    assert len(bench.nat.table) == 100
    for number in range(20):
        # Each newcomer is let in and answered, as the flood goes on.
        newcomer = ("203.0.113.77", 1 + number)
        bench.arrive(b"hello", newcomer)
        bench.answer(b"welcome")
        assert bench.front.sent[-1] == (b"welcome", newcomer)
        bench.arrive(source=(f"192.0.2.{number % 2 + 1}", 1000 + number))
        bench.answer()
    bench.answer(b"stream", stream)
    assert bench.front.sent[-1] == (b"stream", streamed)
    assert not any(each.closed for each in bench.sockets[: stream + 1])
    assert set(bench.observer.endings) == {"evicted"}
    assert not bench.nat.counters.dropped
    # Half of a minute later the flood is forgotten, and they are not.
    bench.pass_time(31)
    assert len(bench.nat.table) == len(talkers) + 1
    assert {each.ending for each in bench.observer.facts} == {"evicted", "expired"}
    bench.check()
    bench.close()


def test_to_be_answered_once_is_none_within_a_share_either() -> None:
    """What a client host has that is not in use makes room for more of it."""
    bench = Bench(max_flows=100, max_flows_per_client=3)
    bench.converse(CLIENT)
    for port in range(1, 20):
        bench.arrive(source=(CLIENT[0], port))
        bench.answer()
    assert bench.observer.endings == ["evicted"] * 17
    assert not bench.sockets[0].closed
    assert not bench.nat.counters.dropped
    bench.close()


@pytest.mark.parametrize("together", [False, True])
def test_after_a_burst_as_many_replies_are_looked_for(together: bool) -> None:
    """All are read at once, and then what is usual; one client's are no other's."""
    bench = Bench(together=together)
    bench.arrive()
    [sock] = bench.sockets

    def left(replies: int) -> int:
        sock.inbox.extend([b"!"] * replies)
        bench.watcher.ready(sock.number)
        rest = len(sock.inbox)
        sock.inbox.clear()
        return rest

    assert left(1) == 0
    assert left(4) == 3
    bench.front.inbox.extend([(b"?", CLIENT)] * 3)
    bench.arrive()
    assert left(4) == 0
    assert left(6) == 2
    # A burst that is no longer than one before is no reason to look.
    bench.front.inbox.extend([(b"?", CLIENT)] * 3)
    bench.arrive()
    assert left(6) == 2
    # Of many, there is always a look for more.
    bench.front.inbox.extend([(b"?", CLIENT)] * 4)
    bench.arrive()
    assert left(MANY) == 0
    assert left(2 * MANY) == 0
    bench.close()


def test_a_batch_is_bounded() -> None:
    """By datagrams, empty ones included, so that others have their turn."""
    bench = Bench()
    bench.front.inbox.extend([(b"", CLIENT)] * (BATCH + 5))
    bench.watcher.ready(bench.front.number)
    assert bench.nat.counters.received == BATCH
    [sock] = bench.sockets
    sock.inbox.extend([b""] * 3 * BATCH)
    while sock.inbox:
        before = len(sock.inbox)
        bench.watcher.ready(sock.number)
        assert 1 <= before - len(sock.inbox) <= BATCH
    assert bench.nat.counters.replies_sent == 3 * BATCH
    bench.close()


@pytest.mark.parametrize("together", [False, True])
def test_the_reply_cap(together: bool) -> None:
    """Bytes of replies, to those of requests; what would exceed it is dropped."""
    bench = Bench(reply_cap=2, together=together)
    bench.arrive(bytes(10))
    for size in (15, 6, 5, 1):
        bench.answer(bytes(size))
    assert [len(data) for data, _ in bench.front.sent] == [15, 5]
    assert bench.nat.counters.replies_dropped == {"reply_cap": 2}
    bench.arrive(bytes(1))
    bench.answer(bytes(2))
    assert len(bench.front.sent) == 3
    bench.close()


# -- replies of several flows, together


def busy(flows: int, **settings: Any) -> Bench:
    """A relay of so many flows, each of which has had an answer."""
    bench = Bench(together=True, max_flows_per_client=100, **settings)
    for port in range(1, flows + 1):
        bench.arrive(source=("192.0.2.1", port))
        bench.answer()
    bench.front.sent.clear()
    bench.nat.counters.replies_sent = bench.nat.counters.replies_received = 0
    bench.watcher.held = True
    return bench


@pytest.mark.parametrize("host", ["203.0.113.1", "0.0.0.0"])
def test_replies_of_several_flows_leave_together(host: str) -> None:
    """When all that are ready have been read, each to its own client."""
    bench = busy(3, host=host)
    for number in (2, 0, 1):
        bench.answer(b"%d" % number, number)
    assert not bench.front.sent
    bench.watcher.release()
    assert bench.front.sent == [
        (b"2", ("192.0.2.1", 3)),
        (b"0", ("192.0.2.1", 1)),
        (b"1", ("192.0.2.1", 2)),
    ]
    assert [f.down_datagrams for f in bench.nat.table.flows.values()] == [2, 2, 2]
    bench.check()
    bench.close()


def test_a_full_outbox_does_not_wait() -> None:
    """It has room for a batch."""
    bench = busy(BATCH + 1)
    for number in range(BATCH + 1):
        bench.answer(b"!", number)
    assert len(bench.front.sent) == BATCH
    bench.watcher.release()
    assert len(bench.front.sent) == BATCH + 1
    bench.check()
    bench.close()


def test_a_reply_that_can_not_be_sent_is_its_own_flows() -> None:
    """It is counted, and the others have left."""
    bench = busy(3)
    for number in range(3):
        bench.answer(b"four", number)
    bench.front.errors.extend([None, problem(errno.EPERM)])
    bench.watcher.release()
    assert [to for _, to in bench.front.sent] == [("192.0.2.1", 1), ("192.0.2.1", 3)]
    assert bench.nat.counters.replies_dropped == {"send_EPERM": 1}
    flows = bench.nat.table.flows.values()
    assert [(f.down_datagrams, f.down_bytes) for f in flows] == [(2, 5), (1, 1), (2, 5)]
    bench.check()
    bench.close()


def test_what_ends_a_flow_sends_its_reply_first() -> None:
    """It is not lost, and its line counts it."""
    bench = busy(2)
    bench.answer(b"last", 0)
    bench.nat.abort_all()
    assert bench.front.sent == [(b"last", ("192.0.2.1", 1))]
    assert bench.observer.endings == ["drained"] * 2
    bench.close()


def test_a_reply_that_waits_keeps_its_flow() -> None:
    """It is alive, as one is whose reply has left."""
    bench = busy(1, timeout=3)
    bench.clock.advance(2)
    bench.answer(b"still here")
    bench.clock.advance(1)
    assert bench.front.sent
    assert bench.live
    bench.watcher.release()
    bench.clock.pump([1] * 3)
    assert bench.observer.endings == ["expired"]
    bench.close()


# -- runs: several datagrams in one call


def runs_of(bench: Bench, flow: bool) -> list[int]:
    """How many datagrams each call of `sendmsg` is given from now on."""
    sock: Any = bench.sockets[0] if flow else bench.front
    given: list[int] = []
    real = sock.sendmsg

    def sendmsg(run: Any, *more: Any) -> None:
        given.append(len(run))
        real(run, *more)

    sock.sendmsg = sendmsg
    return given


@pytest.mark.cost
@pytest.mark.parametrize("host", ["203.0.113.1", "0.0.0.0"])
def test_datagrams_of_one_size_go_together(host: str) -> None:
    """A test of cost.

    In order, as they came; another size, or another client, ends a run.
    """
    bench = Bench(host=host)
    bench.arrive(b"first")
    up, down = runs_of(bench, True), runs_of(bench, False)
    other = ("192.0.2.9", 9)
    datas = [*(b"%03d" % n for n in range(MOST_SEGMENTS - 10)), b"ab", b"cd", b"", b""]
    bench.front.inbox.extend((data, CLIENT) for data in datas)
    bench.front.inbox.extend([(b"xy", other), (b"ef", CLIENT), (b"gh", CLIENT)])
    bench.watcher.ready(bench.front.number)
    assert bench.sockets[0].sent == [b"first", *datas, b"ef", b"gh"]
    assert bench.sockets[1].sent == [b"xy"]
    assert up == [MOST_SEGMENTS - 10, 2, 2]
    sock = bench.sockets[0]
    sock.inbox.extend(datas)
    while sock.inbox:
        bench.watcher.ready(sock.number)
    assert bench.front.sent == [(data, CLIENT) for data in datas]
    assert sum(size for size in down if size > 1) > MOST_SEGMENTS // 2
    bench.check()
    bench.close()


def test_a_run_has_a_bound() -> None:
    """In datagrams and in bytes; those are udp(7)'s and IP's."""
    bench = Bench()
    bench.arrive(b"first")
    up = runs_of(bench, True)
    bench.front.inbox.extend([(bytes(MOST_SEGMENTED // 3), CLIENT)] * 8)
    bench.watcher.ready(bench.front.number)
    assert up == [3, 3, 2]
    bench.front.inbox.extend([(b"x", CLIENT)] * BATCH)
    bench.watcher.ready(bench.front.number)
    assert max(up) <= MOST_SEGMENTS
    assert bench.nat.counters.sent == 9 + BATCH
    bench.close()


@pytest.mark.parametrize(
    ("number", "calls"),
    [
        (errno.EINVAL, 1),
        (errno.EIO, 1),
        # An earlier datagram may have been too large: that is asked once.
        (errno.EMSGSIZE, 2),
        (errno.EAGAIN, 1 + 1),
        (errno.ECONNREFUSED, 2 + 2),
        # A sandbox may say anything.
        (errno.EPERM, 1),
        (errno.ENOSYS, 1),
        (errno.EACCES, 2),
        (errno.EOPNOTSUPP, 2),
    ],
)
def test_a_run_that_is_not_taken_is_sent_one_by_one(number: int, calls: int) -> None:
    """Either way; and where the kernel can't do it, it is not asked again."""
    bench = Bench()
    bench.arrive(b"first")
    sock = bench.sockets[0]
    bench.front.segments = sock.segments = number
    up, down = runs_of(bench, True), runs_of(bench, False)
    for _ in range(2):
        bench.front.inbox.extend([(b"up", CLIENT)] * 3)
        bench.watcher.ready(bench.front.number)
    assert sock.sent == [b"first", *[b"up"] * 6]
    assert up == [3] * calls
    bench.nat.table.flows[next(iter(bench.nat.table.flows))].read_all()
    sock.inbox.extend([b"down"] * 3)
    bench.nat.table.flows[next(iter(bench.nat.table.flows))].read_all()
    assert bench.front.sent == [(b"down", CLIENT)] * 3
    assert down == [3]
    assert not bench.nat.counters.dropped
    told = {errno.ECONNREFUSED: 2, errno.EACCES: 1, errno.EOPNOTSUPP: 1}
    assert bench.nat.counters.icmp_errors == told.get(number, 0)
    bench.check()
    bench.close()


def test_a_run_of_which_some_may_have_left_is_not_sent_again() -> None:
    """ENOBUFS: a queue was full, maybe in the middle of it."""
    bench = Bench()
    bench.arrive(b"first")
    sock = bench.sockets[0]
    bench.front.segments = sock.segments = errno.ENOBUFS
    bench.front.inbox.extend([(b"up", CLIENT)] * 3)
    bench.watcher.ready(bench.front.number)
    sock.inbox.extend([b"down"] * 3)
    bench.nat.table.flows[next(iter(bench.nat.table.flows))].read_all()
    assert sock.sent == [b"first"]
    assert not bench.front.sent
    assert bench.nat.counters.dropped == {"send_ENOBUFS": 3}
    assert bench.nat.counters.replies_dropped == {"send_ENOBUFS": 3}
    bench.check()
    bench.close()


# -- one client, one flow


def test_one_client_of_a_wildcard_is_one_flow() -> None:
    """By the address that it spoke to; the way there may change, and the answer's."""
    bench = Bench(host="0.0.0.0")
    real = bench.front.recvmsg

    def recvmsg(size: int, extra: int) -> Any:
        # Each time on another interface, and to another header's destination.
        data, _, flags, source = real(size, extra)
        told = struct.pack(
            "=I4s4s",
            len(bench.front.inbox) + 1,
            socket.inet_aton("203.0.113.9"),
            bytes([len(bench.front.inbox)] * 4),
        )
        return data, [(socket.IPPROTO_IP, 8, told)], flags, source

    bench.nat.fronts[0].sock.recvmsg = recvmsg
    bench.front.inbox.extend([(b"a", CLIENT), (b"bc", CLIENT), (b"def", CLIENT)])
    bench.watcher.ready(bench.front.number)
    [sock] = bench.sockets
    assert sock.sent == [b"a", b"bc", b"def"]
    [flow] = bench.nat.table.flows.values()
    assert flow.front.name(flow.here) == f"203.0.113.9:{bench.front.number % 60000}"
    bench.close()


def test_a_client_that_speaks_keeps_its_flow_on_a_wildcard_too() -> None:
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


def test_what_the_kernel_does_not_say_the_address_of_is_dropped() -> None:
    """It could not be answered from there."""
    bench = Bench(host="0.0.0.0")
    bench.nat.fronts[0].sock.recvmsg = lambda *_: (b"?", [], 0, CLIENT)
    bench.front.inbox.append((b"?", CLIENT))
    assert not bench.nat.fronts[0].read()
    assert bench.nat.counters.dropped == {"no_local_address": BATCH}
    assert not bench.sockets
    bench.close()


# -- no room


def test_an_answer_that_waits_to_be_read_is_passed_on() -> None:
    """Then another one makes room, if there is one that was quiet longer by now."""
    bench = Bench(max_flows=2, max_flows_per_client=2)
    bench.arrive()
    bench.arrive(source=("192.0.2.6", 6))
    bench.sockets[0].inbox.append(b"answer")
    bench.arrive(b"new", ("192.0.2.7", 7))
    assert bench.front.sent == [(b"answer", CLIENT)]
    assert [each.client for each in bench.observer.facts] == ["192.0.2.6:6"]
    # Of a single one, the answer was passed on: that is all it wanted.
    bench.sockets[2].inbox.append(b"another")
    bench.nat.table.most = 1
    bench.nat.end(bench.nat.table.oldest(), "drained")  # type: ignore[arg-type]
    bench.arrive(b"newer", ("192.0.2.8", 8))
    assert bench.front.sent[-1] == (b"another", ("192.0.2.7", 7))
    assert bench.observer.endings == ["evicted", "drained", "evicted"]
    assert not bench.nat.counters.dropped
    bench.close()


def test_an_answer_that_waits_may_show_that_a_flow_is_in_use() -> None:
    """It is kept, and who came is refused."""
    bench = Bench(max_flows=1)
    bench.arrive()
    bench.clock.advance(2.25)
    bench.sockets[0].inbox.append(b"answer")
    bench.arrive(b"new", ("192.0.2.7", 7))
    assert bench.front.sent == [(b"answer", CLIENT)]
    assert bench.nat.counters.dropped == {"no_flow": 1}
    assert bench.nat.table.refused == 1
    assert not bench.observer.endings
    bench.close()


@pytest.mark.parametrize("late", [False, True])
def test_so_many_are_asked_for_an_answer_and_no_more(late: bool) -> None:
    """A new client is worth no more of the others' time, and is let in all the same."""
    most = MOST_ASKED + 2
    bench = Bench(max_flows=most, max_flows_per_client=most)
    for port in range(1, MOST_ASKED + 3):
        bench.arrive(source=("192.0.2.1", port))
    if late:
        bench.clock.advance(2.25)
    for sock in bench.sockets:
        sock.inbox.append(b"answer")
    bench.arrive(source=("192.0.2.7", 7))
    assert len(bench.front.sent) == MOST_ASKED
    # Late, all that were asked turned out to be in use.
    assert bench.nat.counters.dropped == ({"no_flow": 1} if late else {})
    assert bench.nat.table.refused == late
    assert bench.observer.endings == ([] if late else ["evicted"])
    bench.close()


@pytest.mark.parametrize("number", [errno.EADDRNOTAVAIL, errno.ENETUNREACH])
def test_want_of_a_way_to_a_server_ends_nobodys_flow(number: int) -> None:
    """Where IPv6 is switched off, for one; other servers have the turn."""
    bench = Bench([Server("2001:db8::1", 53), Server(*SERVER)])
    real = bench.nat._open

    def open_socket(family: int) -> Any:
        sock = real(family)
        if family == socket.AF_INET6:
            sock.connect = Mock(side_effect=problem(number))
        return sock

    bench.nat._open = open_socket
    for port in range(1, 6):
        bench.arrive(source=("192.0.2.2", port))
    assert [each.peer for each in bench.live] == [SERVER] * 5
    [flow, *_] = bench.nat.table.flows.values()
    assert flow.server == "198.51.100.1:53"
    assert not bench.nat.counters.dropped
    # Where there is no other, who comes is refused.
    bench.nat.servers = [Server("2001:db8::1", 53)]
    with capturedLogs() as events:
        bench.arrive(source=("192.0.2.2", 6))
    assert os.strerror(number) in formatEvent(events[0])
    assert bench.nat.counters.dropped == {"no_flow": 1}
    assert len(bench.live) == 5
    assert not bench.observer.endings
    bench.check()
    bench.close()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EAGAIN, errno.ENOSPC])
def test_the_oldest_makes_room_where_the_machine_has_no_more(number: int) -> None:
    """Ports and descriptors may be fewer than the table has room for."""
    bench = Bench()
    bench.converse(("192.0.2.2", 1))
    bench.arrive(source=("192.0.2.2", 2))
    bench.answer()
    real = bench.nat._open

    def open_if_one_was_closed(family: int) -> Any:
        if len(bench.live) >= 2:
            raise problem(number)
        return real(family)

    bench.nat._open = open_if_one_was_closed
    bench.arrive(source=("192.0.2.3", 3))
    assert [each.client for each in bench.observer.facts] == ["192.0.2.2:2"]
    assert bench.observer.endings == ["evicted"]
    assert not bench.nat.counters.dropped
    assert bench.observer.facts[0].by == "192.0.2.3:3"
    # One in use is not ended for another's sake, here either.
    bench.clock.advance(2.25)
    bench.answer(number=2)
    bench.arrive(source=("192.0.2.4", 4))
    assert bench.nat.counters.dropped == {"no_flow": 1}
    assert len(bench.live) == 2
    # Nor is any where that would not help.
    bench.nat._open = real
    bench.arrive(source=("192.0.2.5", 5))
    bench.connect_error = problem(errno.ENETUNREACH)
    bench.arrive(source=("192.0.2.6", 6))
    assert len(bench.live) == 3
    bench.close()


# -- time


@given(
    st.integers(0, 7),
    st.sampled_from(["silent", "answered", "in use"]),
    st.sampled_from([(6.0, 3.0), (1.0, 0.5), (1.0, 30.0), (300.0, 30.0)]),
)
def test_a_flow_expires_within_a_step(
    quarters: int, kind: str, timeouts: tuple[float, float]
) -> None:
    """Whenever it began, in relation to the steps; and its socket is closed."""
    timeout, unreplied = timeouts
    bench = Bench(timeout=timeout, unreplied_timeout=unreplied)
    bench.clock.advance(quarters / 4)
    bench.arrive()
    if kind != "silent":
        bench.answer()
    if kind == "in use":
        for _ in range(5):
            bench.clock.advance(29 / 64)
            bench.arrive()
    began, grain = bench.clock.seconds(), 1 / 64 if timeout < 10 else 1 / 4
    while bench.live:
        bench.clock.advance(grain)
        assert bench.clock.seconds() < 400
    [facts] = bench.observer.facts
    lasts = {
        "silent": unreplied,
        "answered": min(timeout, unreplied),
        "in use": timeout,
    }[kind]
    late = bench.clock.seconds() - began - lasts
    assert 0 <= late <= min(1, min(timeouts) / 20) + grain
    assert facts.ending == ("unreplied" if kind == "silent" else "expired")
    assert not bench.clock.getDelayedCalls()
    bench.close()


@pytest.mark.parametrize("refresh", [True, False])
def test_what_a_server_sends_keeps_a_flow_alive_if_wanted(refresh: bool) -> None:
    """It lasts as long as the server talks; or for a timeout after its client did."""
    bench = Bench(timeout=3, unreplied_timeout=3, refresh_inbound=refresh)
    bench.arrive()
    for _ in range(10):
        if bench.live:
            bench.answer()
        bench.pass_time(1)
    assert bench.observer.endings == ([] if refresh else ["expired"])
    bench.close()


def test_a_flow_in_use_loses_nothing_to_expiry() -> None:
    """What has arrived by the time it would end is passed on, either way."""
    bench = Bench(unreplied_timeout=3, timeout=5)
    bench.arrive()
    bench.clock.advance(2)
    bench.front.inbox.append((b"late", CLIENT))
    bench.clock.advance(1)
    assert bench.sockets[0].sent == [b"?", b"late"]
    bench.clock.advance(2)
    bench.sockets[0].inbox.append(b"just in time")
    bench.clock.advance(1)
    assert bench.front.sent == [(b"just in time", CLIENT)]
    assert bench.live
    bench.pass_time(5)
    assert bench.observer.endings == ["expired"]
    bench.close()


def test_a_flood_of_ends_is_not_a_flood_of_lines() -> None:
    """A hundred of those that were never in use in a second, and that there are more.

    Whether they were answered or not: answers are to be had by a flood as well.
    """
    told = FlowLog()
    facts = FlowFacts("c", "l", "p", "s", 1.0, "evicted")
    with capturedLogs() as events:
        for began in [5.0] * (MOST_LINES + 7) + [6.0] * (MOST_LINES + 1):
            flow = Flow("key", "192.0.2.1", began)
            flow.replied = began > 5
            told.ended(flow, facts)
    lines = [formatEvent(event) for event in events]
    assert len(lines) == 2 * (MOST_LINES + 1)
    warning = (
        f"{MOST_LINES} flows that were never in use ended in a second: the rest of them"
        " have no line ({} left out so far)"
    )
    assert lines[MOST_LINES] == warning.format(0)
    assert lines[-1] == warning.format(7)
    assert told.left_out == 8


def test_each_flow_in_use_has_its_line() -> None:
    """However many of them end in a second: that is what the relay is for."""
    told = FlowLog()
    flow = Flow("key", "192.0.2.1", 5.0)
    flow.replied = flow.in_use = True
    with capturedLogs() as events:
        for _ in range(3 * MOST_LINES):
            told.ended(flow, FlowFacts("c", "l", "p", "s", 1.0, "expired"))
    assert {event["ending"] for event in events} == {"expired"}
    assert len(events) == 3 * MOST_LINES
    assert told.left_out == 0


def test_nobody_is_ended_while_clients_wait_to_be_read() -> None:
    """Among those may be one whose flow would have expired."""
    bench = Bench(unreplied_timeout=3)
    bench.arrive()
    bench.front.inbox.extend([(b"", ("192.0.2.2", 1))] * BATCH * 2)
    bench.front.inbox.append((b"late", CLIENT))
    for _ in range(3):
        bench.clock.advance(1)
    assert bench.sockets[0].sent == [b"?", b"late"]
    assert not bench.observer.facts
    bench.close()


def test_a_flood_does_not_keep_others_alive() -> None:
    """What waits to be read is bounded, so at some time all that came before is."""
    bench = Bench(unreplied_timeout=3, receive_buffer=512 * BATCH)
    bench.arrive()
    flood = [(b"", ("192.0.2.2", 1))] * BATCH * 2
    for _ in range(6):
        bench.front.inbox.clear()
        bench.front.inbox.extend(flood)
        bench.clock.advance(1)
    [facts] = bench.observer.facts
    assert (facts.client, facts.ending) == ("192.0.2.1:4000", "unreplied")
    bench.close()


# -- servers


def test_a_pool_takes_turns_by_flow() -> None:
    """One flow speaks to one server."""
    bench = Bench([Server("198.51.100.1", 1), Server("2001:db8::1", 2)])
    for port in (1, 2, 3, 1, 2):
        bench.arrive(source=("192.0.2.1", port))
    assert [each.peer[:2] for each in bench.sockets] == [
        ("198.51.100.1", 1),
        ("2001:db8::1", 2),
        ("198.51.100.1", 1),
    ]
    bench.close()


def test_names_are_looked_up_again() -> None:
    """Flows keep their address; a look-up that fails changes nothing."""
    resolver = FakeResolver()
    bench = Bench([Server("name.example", 53)], resolver=resolver, timeout=1000)
    resolver.answer("198.51.100.1", "198.51.100.2")
    bench.converse(("192.0.2.1", 1))
    bench.clock.advance(LOOK_UP_EVERY - 2.25)
    assert resolver.asked == [("name.example", 53)] * 2
    resolver.answer("198.51.100.2", "198.51.100.1")
    bench.arrive(source=("192.0.2.1", 2))
    bench.clock.advance(LOOK_UP_EVERY)
    resolver.answer("198.51.100.3")
    bench.arrive(source=("192.0.2.1", 1))
    bench.arrive(source=("192.0.2.1", 3))
    bench.clock.advance(LOOK_UP_EVERY)
    with capturedLogs() as events:
        resolver.fail(DNSLookupError("name.example: gone"))
    assert "its last address is kept" in formatEvent(events[0])
    bench.arrive(source=("192.0.2.1", 4))
    peers = [each.peer[0][-1] for each in bench.sockets]
    assert peers == ["1", "1", "3", "3"]
    assert len(bench.sockets[0].sent) == 3
    bench.close()


def test_a_name_added_at_run_time_is_looked_up_like_one_at_start() -> None:
    """At once, and again and again; what was there before is not looked up twice."""
    resolver = FakeResolver()
    bench = Bench(resolver=resolver)
    bench.nat.servers = [Server(*SERVER)]
    assert not resolver.asked
    bench.nat.servers = [Server("name.example", 53)]
    bench.arrive(source=("192.0.2.1", 1))
    assert bench.nat.counters.dropped == {"no_server": 1}
    resolver.answer("198.51.100.7")
    bench.arrive(source=("192.0.2.1", 1))
    assert bench.sockets[0].peer == ("198.51.100.7", 53)
    for number in (2, 3):
        bench.clock.advance(LOOK_UP_EVERY)
        assert resolver.asked == [("name.example", 53)] * number
    # None is left to look up.
    bench.nat.servers = [Server(*SERVER)]
    bench.clock.advance(2 * LOOK_UP_EVERY)
    bench.nat.servers = [Server("other.example", 53)]
    assert resolver.asked[3:] == [("other.example", 53)]
    with pytest.raises(ValueError, match="needs a server"):
        bench.nat.servers = []
    bench.close()


def test_a_name_set_before_it_listens_is_looked_up_when_it_does() -> None:
    """A relay that does not serve asks nobody."""
    resolver = FakeResolver()
    bench = Bench(resolver=resolver)
    bench.nat.close()
    bench.nat.servers = [Server("name.example", 53)]
    assert not resolver.asked
    bench.front = FakeSocket()
    bench.nat.listen([bench.front])
    assert resolver.asked == [("name.example", 53)]
    bench.close()


def test_a_server_that_was_never_found() -> None:
    """The others have its turns."""
    resolver = FakeResolver()
    servers = [Server("name.example", 53), Server(*SERVER)]
    with capturedLogs() as events:
        bench = Bench(servers, resolver=resolver)
        resolver.fail(DNSLookupError("no such name"))
    assert "nothing is sent" in formatEvent(events[0])
    for port in (1, 2, 3):
        bench.arrive(source=("192.0.2.1", port))
    assert [each.peer for each in bench.sockets] == [SERVER] * 3
    bench.close()


NAMED = ("198.51.100.1", "198.51.100.2", "198.51.100.3")


def test_a_name_that_leads_to_no_host() -> None:
    """Groups and wildcards, such as those of block lists, are left out."""
    with capturedLogs() as events:
        bench = named("0.0.0.0", "224.0.0.1", "255.255.255.255")
        bench.arrive()
    assert bench.nat.counters.dropped == {"no_server": 1}
    [line] = [formatEvent(each) for each in events]
    assert line == (
        "name.example:53: none of its addresses is a host's (0.0.0.0:53,"
        " 224.0.0.1:53, 255.255.255.255:53); nothing is sent"
    )
    bench.close()
    bench = named("0.0.0.0", NAMED[1])
    bench.arrive()
    assert peers(bench) == [NAMED[1]]
    bench.close()


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


def test_after_a_refusal_it_is_the_next_address() -> None:
    """For the flow that met it, whose datagrams are sent again, and for new ones."""
    bench = named()
    bench.arrive(b"one")
    bench.arrive(b"two")
    with capturedLogs() as events:
        refuse(bench)
    [line] = [formatEvent(each) for each in events]
    assert line == (
        "name.example:53: 198.51.100.1:53 refuses (Connection refused): the next of its"
        " addresses is tried, 198.51.100.2:53"
    )
    assert peers(bench) == list(NAMED[:2])
    assert bench.sockets[0].closed
    assert bench.sockets[1].sent == [b"one", b"two"]
    bench.answer(b"here")
    assert bench.front.sent == [(b"here", CLIENT)]
    [flow] = bench.nat.table.flows.values()
    assert (flow.up_datagrams, flow.down_datagrams) == (2, 1)
    counters = bench.nat.counters
    assert (counters.sent, counters.sent_again, counters.icmp_errors) == (2, 2, 1)
    bench.arrive(source=("192.0.2.2", 1))
    assert peers(bench)[2] == NAMED[1]
    assert not len(bench.nat.kept) - 1
    bench.check()
    bench.close()
    assert not len(bench.nat.kept)
    assert bench.nat.kept.size == 0


@pytest.mark.parametrize("how", ["read", "send", "run"])
def test_an_answer_that_waits_behind_a_refusal_keeps_the_flow(how: str) -> None:
    """The kernel tells of the error first; what came before it is passed on."""
    bench = named()
    bench.arrive(b"one")
    sock = bench.sockets[0]
    if how == "read":
        sock.inbox.extend([problem(errno.ECONNREFUSED), b"answer"])
        bench.watcher.ready(sock.number)
    else:
        sock.inbox.append(b"answer")
        sock.errors.append(problem(errno.ECONNREFUSED))
        for _ in range(1 if how == "send" else 3):
            bench.front.inbox.append((b"two", CLIENT))
        bench.watcher.ready(bench.front.number)
    assert bench.front.sent == [(b"answer", CLIENT)]
    assert peers(bench) == [NAMED[0]]
    assert sock.sent == [b"one", *{"read": 0, "send": 1, "run": 3}[how] * [b"two"]]
    [flow] = bench.nat.table.flows.values()
    assert flow.replied
    assert not bench.nat.counters.sent_again
    bench.check()
    bench.close()


@pytest.mark.parametrize("run", [1, 3])
def test_a_refusal_that_the_next_send_meets(run: int) -> None:
    """That datagram, or run, goes to the next address, after what went before."""
    bench = named()
    bench.arrive(b"first")
    bench.sockets[0].errors.append(problem(errno.EHOSTUNREACH))
    bench.front.inbox.extend([(b"%d" % n, CLIENT) for n in range(run)])
    bench.watcher.ready(bench.front.number)
    assert bench.sockets[1].sent == [b"first", *(b"%d" % n for n in range(run))]
    assert bench.nat.counters.sent_again == 1
    assert not bench.nat.counters.dropped
    bench.check()
    bench.close()


def test_each_address_has_one_chance_after_each_look_up() -> None:
    """Then the flow stays where it is, and the line is written once."""
    bench = named()
    resolver: Any = bench.nat._resolver
    with capturedLogs() as events:
        for _ in range(3):
            bench.arrive()
            for _ in range(4):
                refuse(bench)
        assert peers(bench) == list(NAMED)
        # All have refused: the first has another chance, with the next flow.
        bench.arrive(source=("192.0.2.2", 1))
        assert peers(bench)[3:] == [NAMED[0]]
        assert len([each for each in events if "refuses" in formatEvent(each)]) == 1
        bench.clock.advance(LOOK_UP_EVERY - 1)
        bench.arrive()
        bench.clock.advance(1)
        resolver.answer(NAMED[1], NAMED[2], NAMED[0])
        refuse(bench, 2)
        refuse(bench)
        refuse(bench)
        assert peers(bench)[4:] == [NAMED[0], NAMED[1]]
    bench.close()


def test_a_flow_that_was_answered_keeps_its_address() -> None:
    """Its server may be back in a moment; nobody else would know the conversation."""
    bench = named()
    bench.arrive()
    bench.answer()
    refuse(bench)
    bench.sockets[0].errors.append(problem(errno.ECONNREFUSED))
    bench.arrive(b"again")
    assert bench.sockets[0].sent == [b"?", b"again"]
    assert peers(bench) == [NAMED[0]]
    # Nor does a datagram that was too large say anything of an address.
    bench.arrive(source=("192.0.2.2", 1))
    refuse(bench, why=errno.EMSGSIZE)
    assert peers(bench) == [NAMED[0]] * 2
    bench.close()


def test_an_address_without_a_way_there_has_refused() -> None:
    """connect() says so at once; the next takes the flow, with one warning."""
    bench = named()
    real = bench.nat._open

    def open_socket(family: int) -> Any:
        sock = real(family)

        def connect(address: Any) -> None:
            sock.peer = address
            if address[0] in NAMED[:2]:
                raise problem(errno.ENETUNREACH if len(calls) else errno.EADDRNOTAVAIL)
            calls.append(address)

        sock.connect = connect
        return sock

    calls: list[Any] = []
    bench.nat._open = open_socket
    with capturedLogs() as events:
        for port in (1, 2, 3):
            bench.arrive(source=("192.0.2.1", port))
    assert len(events) == 1
    assert [each.peer[0] for each in bench.live] == [NAMED[2]] * 3
    assert peers(bench) == [*NAMED, NAMED[2], NAMED[2]]
    assert not bench.nat.counters.dropped
    bench.check()
    bench.close()


@pytest.mark.parametrize("what", ["descriptor", "watch"])
def test_a_flow_that_can_not_have_another_socket_keeps_the_one_it_has(
    what: str,
) -> None:
    """There is no descriptor, or the kernel can't watch it."""
    bench = named()
    bench.arrive()
    if what == "descriptor":
        bench.open_error = problem(errno.EMFILE)
    else:
        bench.watcher.full = True
    refuse(bench)
    assert not bench.sockets[0].closed
    bench.open_error, bench.watcher.full = None, False
    bench.check()
    refuse(bench, 0)
    assert peers(bench)[-1] == NAMED[1]
    bench.check()
    bench.close()


def test_what_is_sent_again_is_what_was_sent_last() -> None:
    """Nothing that is seconds old, but always what was refused."""
    bench = named()
    for number in range(8):
        bench.arrive(b"%d" % number)
        bench.clock.advance(0.75)
    # The last is 0.75 seconds old.
    refuse(bench)
    assert bench.sockets[1].sent == [b"6", b"7"]
    # A host that can't be found is said to be so after three seconds.
    bench.clock.advance(3)
    refuse(bench, why=errno.EHOSTUNREACH)
    assert bench.sockets[2].sent == [b"7"]
    bench.check()
    bench.close()


def test_what_is_refused_in_the_middle_of_a_run_is_sent_again() -> None:
    """By a host that is near, where the run is sent one by one."""
    bench = named()
    bench.arrive(b"first")
    sock = bench.sockets[0]
    sock.segments = errno.EIO
    sock.errors.extend([None, None, problem(errno.ECONNREFUSED)])
    bench.front.inbox.extend((b"%d" % number, CLIENT) for number in range(4))
    bench.watcher.ready(bench.front.number)
    assert sock.sent == [b"first", b"0", b"1"]
    assert bench.sockets[1].sent == [b"first", b"0", b"1", b"2", b"3"]
    [flow] = bench.nat.table.flows.values()
    assert bench.nat.kept.of(flow, 0) == [b"0", b"1", b"2", b"3"]
    bench.check()
    bench.close()


def test_what_can_not_be_sent_again_is_counted() -> None:
    """The next address may take less."""
    bench = named()
    bench.arrive(b"one")
    bench.arrive(b"two")
    real = bench.nat._open

    def open_socket(family: int) -> Any:
        sock = real(family)
        sock.errors.append(problem(errno.EMSGSIZE))
        return sock

    bench.nat._open = open_socket
    refuse(bench)
    assert bench.sockets[1].sent == [b"two"]
    counters = bench.nat.counters
    assert (counters.sent_again, counters.not_sent_again) == (1, 1)
    bench.close()


def test_nothing_is_kept_where_there_is_no_other_address() -> None:
    """Nor of a flow that has failed as its datagram was sent."""
    bench = named(NAMED[0])
    bench.arrive()
    assert not len(bench.nat.kept)
    bench.close()
    bench = named()
    bench.arrive()
    sock = bench.sockets[0]
    sock.errors.append(problem(errno.ECONNREFUSED))
    sock.inbox.extend(problem(errno.EACCES) for _ in range(BATCH))
    bench.arrive(b"more")
    assert bench.observer.endings == ["failed"]
    assert not len(bench.nat.kept)
    bench.close()


def test_what_is_kept_is_bounded() -> None:
    """Of a flow, and in all: the oldest goes first."""
    kept = Kept()
    kept.add("flow", [b"%d" % n for n in range(MOST_KEPT + 3)], 5)
    kept.add("flow", [b"more"], 6)
    last = [b"%d" % n for n in range(4, MOST_KEPT + 3)] + [b"more"]
    assert len(last) == MOST_KEPT
    assert kept.of("flow", 6) == kept.of("flow", 5 + KEPT_FOR) == last
    for number in range(50):
        kept.add(number, [bytes(65507)], 7)
        assert kept.size <= MOST_KEPT_BYTES
    assert kept.of("flow", 7) == kept.of(0, 7) == []
    assert len(kept.of(49, 7)[0]) == 65507
    for number in range(20_000):
        kept.add((1, number), [b""], 8)
        # Who speaks again is among the last that have spoken.
        kept.add((1, 0), [b"again"], 8)
    assert kept.of((1, 0), 8) == [b"again"] * MOST_KEPT
    assert len(kept) <= MOST_KEPT_BYTES // KEPT_BESIDE
    for number in range(20_000):
        kept.forget((1, number))
    assert (len(kept), kept.size) == (0, 0)


# -- the end


def test_a_drain_lets_quiet_flows_go() -> None:
    """New clients are refused, the known are served, until nothing has moved."""
    bench = Bench()
    bench.arrive()
    done: list[Any] = []
    bench.nat.drain(10).addCallback(done.append)
    assert bench.nat.draining
    for _ in range(4):
        bench.clock.advance(0.5)
        bench.arrive()
        bench.answer()
    bench.arrive(source=("192.0.2.2", 1))
    assert bench.nat.counters.dropped == {"draining": 1}
    # The first has had no answer yet.
    bench.pass_time(2.25)
    assert not done
    bench.answer()
    bench.pass_time(2.25)
    assert done == [None]
    assert bench.observer.endings == ["drained"]
    bench.nat.drain(10).addCallback(done.append)
    assert done == [None, None]
    bench.close()


def test_a_drain_has_an_end() -> None:
    """At its timeout, or at once when there is none or it is cut short."""
    for ending in ("timeout", "zero", "later zero", "cut", "close"):
        bench = Bench()
        bench.arrive()
        done: list[Any] = []
        timeout = 0 if ending == "zero" else 3
        for _ in range(2):
            bench.nat.drain(timeout).addCallback(done.append)
        if ending == "later zero":
            bench.nat.drain(0).addCallback(lambda _: None)
        elif ending == "cut":
            bench.nat.abort_all()
        elif ending == "close":
            bench.nat.close()
        elif ending == "timeout":
            for _ in range(12):
                assert not done
                bench.arrive()
                bench.clock.advance(0.25)
        assert done == [None, None], ending
        assert bench.front.closed
        bench.close()


def test_a_relay_that_was_drained_can_listen_again() -> None:
    """And serves, and can be drained again."""
    bench = Bench()
    bench.nat.drain(0)
    assert bench.front.closed
    for _ in range(2):
        bench.front = FakeSocket()
        bench.nat.listen([bench.front])
        before = len(bench.sockets)
        bench.arrive()
        assert [each.sent for each in bench.sockets[before:]] == [[b"?"]]
        bench.check()
        done: list[Any] = []
        bench.nat.drain(0).addCallback(done.append)
        assert done == [None]
        assert bench.front.closed
    bench.close()


@pytest.mark.parametrize("seconds", [0.1, 2.25])
def test_a_drain_ends_when_it_is_to(seconds: float) -> None:
    """And not at the next look at the flows."""
    bench = Bench()
    bench.arrive()
    done: list[Any] = []
    bench.nat.drain(seconds).addCallback(done.append)
    bench.clock.advance(seconds - 0.01)
    assert not done
    bench.clock.advance(0.01)
    assert done == [None]
    assert bench.observer.endings == ["drained"]
    bench.close()


def test_an_observer_that_raises_hurts_nobody(
    logged_failures: LoggedFailures,
) -> None:
    """It is logged, once; the flow has ended all the same."""

    class Broken:
        calls = 0

        def ended(self, flow: Any, facts: Any) -> None:
            self.calls += 1
            raise ZeroDivisionError

        def closed(self, listeners: str, counters: Any) -> None:
            self.calls += 1
            raise ZeroDivisionError

    broken = Broken()
    bench = Bench(observer=broken, max_flows=1)
    bench.arrive()
    bench.arrive(source=("192.0.2.2", 1))
    assert len(bench.live) == 1
    assert "the observer of flows failed" in logged_failures.take("observer")
    bench.nat.abort_all()
    bench.close()
    assert broken.calls == 1
    bench = Bench(observer=broken)
    bench.close()
    logged_failures.take("observer")
    assert broken.calls == 2


class Defect(Exception):
    """What nobody has thought of."""


def test_an_exception_costs_a_listener_its_batch(
    logged_failures: LoggedFailures,
) -> None:
    """What comes next is served; the log has a traceback in a second at most."""

    def own(address: Any) -> bool:
        raise Defect

    bench = Bench(host="0.0.0.0", own=own)
    bad = ("192.0.2.66", bench.front.number % 60000)
    bench.arrive(b"known")
    for number in range(1, 4):
        bench.front.inbox.extend(
            [(b"before", CLIENT), (b"this", bad), (b"a", CLIENT), (b"bc", CLIENT)]
        )
        bench.watcher.ready(bench.front.number)
        assert bench.nat.counters.dropped == {"failed": 3 * number}
        bench.check()
    assert bench.sockets[0].sent == [b"known"] + [b"before"] * 3
    bench.arrive(b"goes on")
    bench.answer(b"and back")
    assert bench.sockets[0].sent[-1] == b"goes on"
    assert bench.front.sent == [(b"and back", CLIENT)]
    told = logged_failures.take("a listener failed; it goes on with the next batch")
    assert "Defect" in told
    bench.close()


@pytest.mark.parametrize("together", [False, True])
def test_an_exception_costs_a_flow_itself(
    together: bool, logged_failures: LoggedFailures
) -> None:
    """However it is read: told of, or before it would expire or make room."""

    def broken(*_: Any) -> Any:
        raise Defect

    bench = Bench(
        together=together, max_flows=4, max_flows_per_client=4, unreplied_timeout=5
    )
    for port in (1, 2, 3, 4):
        bench.arrive(source=("192.0.2.1", port))
    flows = list(bench.nat.table.flows.values())
    # Told of, with more than one reply: the second is its undoing.
    flows[0].reply = broken
    bench.sockets[0].inbox.extend([b"!", b"??"])
    flows[0]._usual = MANY
    bench.watcher.ready(bench.sockets[0].number)
    assert bench.observer.endings == ["failed"]
    assert bench.nat.counters.replies_dropped == {"failed": 2}
    assert "the flow of 192.0.2.1:1 failed and is ended" in logged_failures.take("flow")
    bench.check()
    # It was to make room: it has.
    bench.arrive(source=("192.0.2.2", 5))
    flows[1].recv = broken
    bench.clock.advance(1)
    bench.arrive(source=("192.0.2.2", 6))
    assert bench.observer.endings == ["failed"] * 2
    assert len(bench.nat.table) == 4
    logged_failures.take("192.0.2.1:2 failed")
    # It would expire, beside others.
    flows[2].recv = broken
    bench.clock.advance(5)
    assert bench.observer.endings[2:] == ["failed"] + ["unreplied"] * 3
    logged_failures.take("192.0.2.1:3 failed")
    bench.arrive()
    assert bench.sockets[-1].sent == [b"?"]
    bench.close()


def test_an_exception_after_a_batch_costs_the_replies_that_wait(
    logged_failures: LoggedFailures,
) -> None:
    """And neither their flows nor whoever calls it, which is the plane."""
    bench = busy(3)
    for number in range(3):
        bench.answer(b"!", number)
    outbox: Any = bench.nat.fronts[0].outbox
    really = outbox.send

    def broken(*_: Any) -> Any:
        raise Defect

    outbox.send = broken
    bench.watcher.release()
    assert bench.nat.counters.replies_dropped == {"failed": 3}
    logged_failures.take("a listener failed to send replies")
    outbox.send = really
    bench.answer(b"again", 0)
    assert bench.front.sent == [(b"again", ("192.0.2.1", 1))]
    assert len(bench.live) == 3
    bench.check()
    bench.close()


def test_an_exception_in_the_look_at_flows_is_not_the_last_look(
    logged_failures: LoggedFailures,
) -> None:
    """Flows expire in the next one."""
    bench = Bench(unreplied_timeout=3)
    bench.arrive()
    really = bench.nat.table.expire

    def broken(now: float) -> Any:
        bench.nat.table.expire = really  # type: ignore[method-assign]
        raise Defect

    bench.nat.table.expire = broken  # type: ignore[method-assign]
    bench.clock.advance(1)
    logged_failures.take("the look at flows failed")
    bench.pass_time(4)
    assert bench.observer.endings == ["unreplied"]
    bench.close()


@pytest.mark.parametrize("transport", ["plane", "twisted"])
@pytest_twisted.ensureDeferred
async def test_an_exception_leaves_no_listener_deaf(
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
        nat.ports = nat._wild_ports = frozenset({clients[0].getsockname()[1]})
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


def test_an_observer_may_close_the_relay() -> None:
    """Even as a flow makes room for another, which is then not opened."""

    class Closing(Observer):
        def ended(self, flow: Any, facts: FlowFacts) -> None:
            bench.nat.close()

    bench = Bench(observer=Closing(), max_flows=1)
    bench.arrive()
    bench.arrive(source=("192.0.2.2", 1))
    assert bench.nat.counters.dropped == {"draining": 1}
    bench.close()


@pytest.mark.parametrize("full", ["table", "machine"])
def test_an_observer_may_open_the_relay_again(full: str) -> None:
    """Those who had sent to the closed listener are not admitted to the new one."""

    class Restarting(Observer):
        def ended(self, flow: Any, facts: FlowFacts) -> None:
            if not bench.front.closed:
                bench.nat.close()
                bench.nat.listen([again])

    again = FakeSocket()
    bench = Bench(observer=Restarting(), max_flows=1 if full == "table" else 9)
    bench.arrive()
    if full == "machine":
        real = bench.nat._open
        refusals = iter([problem(errno.EMFILE)])

        def open_socket(family: int) -> Any:
            for refusal in refusals:
                raise refusal
            return real(family)

        bench.nat._open = open_socket
    bench.front.inbox.extend((b"?", ("192.0.2.2", port)) for port in (1, 2, 3))
    bench.watcher.ready(bench.front.number)
    assert bench.nat.counters.dropped == {"draining": 3}
    assert not bench.live
    bench.front = again
    bench.arrive()
    assert len(bench.live) == 1
    bench.close()


@pytest.mark.cost
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_closed_listener_keeps_no_memory(host: str) -> None:
    """A test of cost.

    Nor does it wait for a collection, which a quiet program may not have.
    """
    nat = UdpNat(reactor, [Server(*SERVER)], watcher=watcher(reactor, "auto"))
    nat.listen([bind_udp(host, 0)])
    kept = [weakref.ref(nat.fronts[0].outbox), weakref.ref(nat.fronts[0]._receiver)]
    gc.disable()
    try:
        nat.close()
        assert [each() for each in kept] == [None, None]
    finally:
        gc.enable()


def test_a_flow_that_the_reactor_gives_up_has_failed() -> None:
    """Its socket is closed once."""
    bench = Bench()
    bench.arrive()
    handler = bench.watcher.handlers[bench.sockets[0].number]
    for _ in range(2):
        handler.connectionLost(Failure(ZeroDivisionError()))
    assert bench.observer.endings == ["failed"]
    bench.close()


@pytest.mark.parametrize("number", REFUSED)
@pytest.mark.parametrize("host", ["203.0.113.1", "0.0.0.0"])
def test_a_listener_that_can_not_receive_is_left_alone_for_a_while(
    number: int, host: str
) -> None:
    """It would be told again and again; there is one line, and it comes back."""
    bench = Bench(host=host)
    name = "recvmsg" if host == "0.0.0.0" else "recvfrom"
    really = getattr(bench.front, name)
    asked: list[int] = []

    def refused(*_: Any) -> Any:
        asked.append(1)
        raise problem(number)

    setattr(bench.front, name, refused)
    with capturedLogs() as events:
        bench.watcher.ready(bench.front.number)
        assert bench.front.number not in bench.watcher.handlers
        bench.clock.advance(1)
        bench.watcher.ready(bench.front.number)
    assert len(asked) == 2
    port = bench.front.number % 60000
    assert [formatEvent(each) for each in events] == [
        f"{host}:{port}: can't receive: {os.strerror(number)}; tried again in 1 s"
    ] * 2
    setattr(bench.front, name, really)
    bench.clock.advance(1)
    bench.arrive()
    assert bench.sockets[0].sent == [b"?"]
    bench.close()
    bench = Bench(host=host)
    setattr(bench.front, name, refused)
    bench.watcher.ready(bench.front.number)
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


@pytest.mark.parametrize("number", REFUSED)
def test_a_flow_that_can_not_be_read_has_failed(number: int) -> None:
    """What is told for ever is no host's refusal."""
    bench = Bench()
    bench.arrive()
    bench.arrive(source=("192.0.2.2", 2))
    bench.sockets[0].inbox.extend(problem(number) for _ in range(BATCH))
    bench.watcher.ready(bench.sockets[0].number)
    assert bench.observer.endings == ["failed"]
    assert len(bench.live) == 1
    bench.check()
    bench.close()


@pytest.mark.parametrize("number", REFUSED)
def test_a_kernel_that_does_not_say_what_clients_spoke_to(number: int) -> None:
    """A wildcard listener answers from what the kernel chooses, and says so."""
    with patch.object(FakeSocket, "setsockopt", side_effect=problem(number)):
        with capturedLogs() as events:
            bench = Bench(host="0.0.0.0")
        [line] = [formatEvent(each) for each in events]
        assert "the kernel does not say which address clients speak to" in line
        bench.arrive()
        bench.answer()
    assert bench.front.sent == [(b"!", CLIENT)]
    bench.check()
    bench.close()


def test_drops_that_can_no_longer_be_asked_for_are_none() -> None:
    """And not the 2**32 that are missing from the last answer."""
    bench = Bench()
    bench.front.dropped = 5
    bench.nat.look_at_drops()
    for broken in (
        {"side_effect": problem(errno.EPERM)},
        {"return_value": bytes(32)},
    ):
        with patch.object(FakeSocket, "getsockopt", **broken):
            bench.nat.look_at_drops()
    bench.front.dropped = 7
    bench.nat.look_at_drops()
    assert bench.nat.counters.kernel_dropped == 7
    bench.close()


def test_what_the_kernel_dropped_is_counted() -> None:
    """The listener's at each step, the flows' in turn and as they end; each once."""
    bench = Bench(
        unreplied_timeout=20, max_flows=2 * LOOKS, max_flows_per_client=LOOKS * 2
    )
    for port in range(1, LOOKS + 2):
        bench.arrive(source=("192.0.2.1", port))
    bench.front.dropped = 3
    for sock in bench.sockets:
        sock.dropped = 4
    bench.clock.advance(1)
    assert bench.nat.counters.kernel_dropped == 3 + 4 * LOOKS
    bench.clock.advance(1)
    assert bench.nat.counters.kernel_dropped == 3 + 4 * (LOOKS + 1)
    bench.sockets[0].dropped = 5
    bench.close()
    assert bench.nat.counters.kernel_dropped == 4 + 4 * (LOOKS + 1)


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
    assert len(bench.nat.fronts) == 1
    bench.close()


# -- the log


def test_the_line_of_a_flow() -> None:
    """Who, from where to where, how long, how much, and why it ended."""
    bench = Bench(observer=FlowLog(), unreplied_timeout=3)
    with capturedLogs() as events:
        bench.arrive(bytes(10))
        bench.arrive(bytes(5))
        bench.answer(bytes(7))
        bench.clock.advance(1.5)
        port = bench.sockets[0].number % 60000
        listener = bench.front.number % 60000
        bench.nat.close()
    line, _ = [formatEvent(each) for each in events]
    assert line == (
        f"flow client=192.0.2.1:4000 listener=203.0.113.1:{listener}"
        f" port=203.0.113.1:{port} server=198.51.100.1:53 age=1.500"
        " up=2/15 down=1/7 ending=drained"
    )
    assert events[0]["client"] == "192.0.2.1:4000"


def test_the_line_of_a_flow_that_made_room() -> None:
    """Ends with for whom; with its interface, if it has one."""
    bench = Bench(observer=FlowLog(), max_flows=1)
    bench.arrive()
    with capturedLogs() as events:
        bench.arrive(source=("192.0.2.7", 5353))
        bench.arrive(source=("fe80::1", 5353, 0, 1))
        bench.close()
    assert formatEvent(events[0]).endswith(" ending=evicted by=192.0.2.7:5353")
    assert formatEvent(events[1]).endswith(" ending=evicted by=[fe80::1%lo]:5353")
    assert " client=[fe80::1%lo]:5353 " in formatEvent(events[2])
    assert formatEvent(events[2]).endswith(" ending=drained")


def test_the_quiet_log_leaves_out_those_that_went_well() -> None:
    """An answered flow that expired is no news."""
    bench = Bench(observer=QuietFlowLog(), unreplied_timeout=2, timeout=2)
    with capturedLogs() as events:
        bench.arrive()
        bench.answer()
        bench.arrive(source=("192.0.2.2", 1))
        bench.pass_time(4)
        bench.close()
    assert [each["ending"] for each in events] == ["unreplied"]


def test_the_line_of_a_relay() -> None:
    """What became of all datagrams; quietly only if some were dropped."""
    for kind in (FlowLog, QuietFlowLog):
        for kernel in (0, 2):
            bench = Bench(observer=kind())
            bench.front.dropped = kernel
            with capturedLogs() as events:
                bench.nat.close()
            assert len(events) == (kind is FlowLog or kernel > 0)
        bench = Bench(observer=kind())
        bench.arrive(source=("192.0.2.1", 0))
        bench.arrive(source=("192.0.2.1", 0))
        bench.arrive(bytes(BUFFER_SIZE))
        bench.arrive()
        bench.answer()
        with capturedLogs() as events:
            bench.close()
        assert formatEvent(events[-1]) == (
            f"datagrams listener=203.0.113.1:{bench.front.number % 60000}"
            " received=4 sent=1 replies_received=1 replies_sent=1"
            " dropped=source_port_0:2,truncated:1 replies_dropped=-"
            " icmp_errors=0 kernel_dropped=0 sent_again=0"
            " not_sent_again=0"
        )
        assert events[-1]["received"] == 4


def test_settings_that_can_not_be() -> None:
    """Are refused as the relay is made."""
    for servers, settings in (
        ([], {}),
        ([Server(*SERVER)], {"reply_cap": -1}),
        ([Server(*SERVER)], {"reply_cap": float("nan")}),
        ([Server(*SERVER)], {"timeout": 0}),
        ([Server(*SERVER)], {"max_flows": 0}),
        ([Server(*SERVER)], {"max_flows_per_client": 0}),
    ):
        with pytest.raises(ValueError, match="must|needs|room"):
            UdpNat(Clock(), servers, **settings)  # type: ignore[arg-type]


def test_one_client_may_have_half_of_the_flows() -> None:
    """Unless it is told otherwise."""
    for most, each in ((10, 5), (1, 1)):
        table = UdpNat(Clock(), [Server(*SERVER)], max_flows=most).table
        assert (table.most, table.most_each) == (most, each)


def test_how_many_flows_the_limit_allows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And the ports; some are left to everything else."""
    ports = tmp_path / "ports"
    monkeypatch.setattr("relayd.ports.PORT_RANGE", ports)
    for limit, between, flows in (
        (65536, "1024\t65023\n", 56000),
        (65536, "32768 60999", 24703),
        (1024, "32768 60999", 768),
        (1, "32768 60999", 1),
        (-1, "32768 60999", 24703),
        (65536, "32768 32768", 1),
        (65536, "", 14336),
    ):
        ports.write_text(between)
        monkeypatch.setattr(
            "relayd.udp_sockets.resource.getrlimit", lambda _, is_=limit: (is_, is_)
        )
        assert affordable_flows() == flows
    ports.unlink()
    assert affordable_flows() == 14336


# -- real sockets


@pytest.mark.parametrize("transport", ["plane", "twisted"])
@pytest.mark.parametrize("host", ["127.0.0.1", None])
@pytest_twisted.ensureDeferred
async def test_over_real_sockets(transport: Transport, host: str | None) -> None:
    """There and back; a server that refuses and comes back finds the same flow."""
    live: Any = reactor
    observer = Observer()
    with closing(socket.socket(type=socket.SOCK_DGRAM)) as server:
        server.bind(("127.0.0.1", 0))
        where = server.getsockname()
        nat = UdpNat(
            live,
            [Server(*where)],
            watcher=watcher(live, transport),
            observer=observer,
        )
        port = await UdpListener(host, 0).listen(nat)
        with closing(socket.socket(type=socket.SOCK_DGRAM)) as client:
            client.connect(("127.0.0.1", port.getHost().port))
            client.setblocking(False)
            server.setblocking(False)
            for data in (b"", b"x", bytes(65507)):
                client.send(data)
                received: list[Any] = []
                await until(lambda got=received: arrived(server, got), "a request")
                assert received[0][0] == data
                server.sendto(data[::-1], received[0][1])
                received.clear()
                await until(lambda got=received: arrived(client, got), "a reply")
                assert received[0][0] == data
            server.close()
            client.send(b"nobody")
            await until(lambda: nat.counters.icmp_errors, "ICMP")
            with closing(socket.socket(type=socket.SOCK_DGRAM)) as again:
                again.bind(where)
                again.setblocking(False)
                client.send(b"back")
                received = []
                await until(lambda: arrived(again, received), "the server is back")
                assert received[0][0] == b"back"
                again.sendto(b"yes", received[0][1])
                received.clear()
                await until(lambda: arrived(client, received), "its reply")
            assert len(nat.table.flows) == 1
            assert not observer.facts
            with pytest.raises(BlockingIOError):
                client.recv(1)
        await port.stopListening()
    counters = nat.counters
    assert counters.received == counters.sent == 5
    assert counters.replies_received == counters.replies_sent == 4
    assert observer.endings == ["drained"]


@pytest.mark.parametrize("number", [errno.ENETUNREACH, errno.EACCES, None])
def test_what_is_a_broadcast(number: int | None) -> None:
    """EACCES may be a route's that prohibits it, and then is so again."""
    assert is_broadcast("127.255.255.255")
    assert not is_broadcast("127.0.0.1")
    assert not is_broadcast("::1")
    wrong = None if number is None else problem(number)
    with patch("relayd.udp_sockets.socket.socket") as made:
        made.return_value.__enter__.return_value.connect.side_effect = wrong
        assert not is_broadcast("192.0.2.255")


@pytest_twisted.ensureDeferred
async def test_a_broadcast_address_is_no_listener() -> None:
    """It would hear only what is sent to all, and answer from another address."""
    live: Any = reactor
    nat = UdpNat(live, [Server(*SERVER)])
    with pytest.raises(ListenError, match="udp:127.255.255.255:0: it is a broadcast"):
        await UdpListener("127.255.255.255", 0).listen(nat)
    assert not nat.fronts


def test_where_a_link_local_listener_is_has_its_interface() -> None:
    """In every line of the log: where it listens, and what its clients spoke to."""
    index, interface = socket.if_nameindex()[0]
    packed = socket.inet_pton(socket.AF_INET6, "fe80::5")
    front, servers = FakeSocket("fe80::5"), [Server(*SERVER)]
    address = ("fe80::5", 53, 0, index)
    with patch.object(front, "getsockname", return_value=address):
        nat = UdpNat(None, servers, watcher=FakeWatcher(batches=False), clock=Clock())
        nat.listen([front])
        assert nat.fronts[0].name(None) == f"[fe80::5%{interface}]:53"
        assert UdpPort(nat, address).getHost().host == f"fe80::5%{interface}"
        nat.close()
    wildcard = FakeSocket("::")
    with patch.object(wildcard, "getsockname", return_value=("::", 53, 0, 0)):
        nat = UdpNat(None, servers, watcher=FakeWatcher(batches=False), clock=Clock())
        nat.listen([wildcard])
        told = packed + index.to_bytes(4, sys.byteorder)
        key = (("fe80::9", 4000, 0, index), told)
        assert nat.fronts[0].name(key) == f"[fe80::5%{interface}]:53"
        key = (("2001:db8::9", 4000, 0, 0), socket.inet_pton(socket.AF_INET6, "::1"))
        assert nat.fronts[0].name(key) == "[::1]:53"
        nat.close()


def arrived(sock: socket.socket, into: list[Any]) -> bool:
    """Whether a datagram has; it is put `into`."""
    try:
        into.append(sock.recvfrom(BUFFER_SIZE))
    except BlockingIOError:
        return False
    return True


@pytest_twisted.ensureDeferred
async def test_an_address_in_use() -> None:
    """Is one line, and the other sockets are closed."""
    live: Any = reactor
    with closing(socket.socket(type=socket.SOCK_DGRAM)) as other:
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        nat = UdpNat(live, [Server(*SERVER)])
        with pytest.raises(ListenError, match=f"can't listen on udp:.*:{port}: Addr"):
            await UdpListener("127.0.0.1", port).listen(nat)
        with pytest.raises(ListenError, match="can't listen on udp:"):
            await UdpListener(None, port).listen(nat)
    assert not nat.fronts


def failing_v6(
    monkeypatch: pytest.MonkeyPatch, number: int, times: int = 1000
) -> list[int]:
    """Let IPv6 sockets fail to bind `times` times; the ports that were tried."""
    tried: list[int] = []

    def bind(host: str, port: int) -> Any:
        if ":" in host:
            tried.append(port)
            if len(tried) <= times:
                raise problem(number)
        return bound_socket(host, port)

    monkeypatch.setattr("relayd.udp_listening.bound_socket", bind)
    return tried


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
@pytest.mark.parametrize("host", [None, "both.test"])
@pytest_twisted.ensureDeferred
async def test_a_family_that_the_machine_lacks_is_left_out(
    monkeypatch: pytest.MonkeyPatch, number: int, host: str | None
) -> None:
    """As of a TCP listener; what is asked for by its address must be there."""
    found = [
        (socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.0.1", 0)),
    ]
    real = socket.getaddrinfo

    def look_up(name: Any, *more: Any, **kinds: Any) -> Any:
        return found if name == "both.test" else real(name, *more, **kinds)

    monkeypatch.setattr("relayd.binding.socket.getaddrinfo", look_up)
    failing_v6(monkeypatch, number)
    live: Any = reactor
    nat = UdpNat(live, [Server(*SERVER)])
    port: Any = await UdpListener(host, 0).listen(nat)
    assert [front.sock.family for front in nat.fronts] == [socket.AF_INET]
    assert port.getHost().host == ("127.0.0.1" if host else "0.0.0.0")
    await port.stopListening()
    with pytest.raises(ListenError, match="can't listen on udp:.::1.:0: "):
        await UdpListener("::1", 0).listen(nat)
    assert not nat.fronts


@pytest_twisted.ensureDeferred
async def test_a_free_port_must_be_free_in_both_families(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel's choice for one family may be taken in the other: choose again."""
    tried = failing_v6(monkeypatch, errno.EADDRINUSE, 3)
    live: Any = reactor
    nat = UdpNat(live, [Server(*SERVER)])
    port: Any = await UdpListener(None, 0).listen(nat)
    assert len(tried) == 4
    assert len({front.address[1] for front in nat.fronts}) == 1
    await port.stopListening()


@pytest.mark.parametrize("transport", ["plane", "twisted"])
@pytest.mark.parametrize("first", ["::1", "127.0.0.9"])
@pytest_twisted.ensureDeferred
async def test_a_name_whose_first_address_refuses(
    transport: Transport, first: str
) -> None:
    """Every client is answered, by what it sent first."""
    live: Any = reactor
    resolver: Any = FakeResolver()
    with ExitStack() as held:
        server = held.enter_context(closing(socket.socket(type=socket.SOCK_DGRAM)))
        server.bind(("127.0.0.1", 0))
        server.setblocking(False)
        port = server.getsockname()[1]
        nat = UdpNat(
            live,
            [Server("name.example", port)],
            watcher=watcher(live, transport),
            resolver=resolver,
        )
        listening: Any = await UdpListener("127.0.0.1", 0).listen(nat)
        family = socket.AF_INET6 if ":" in first else socket.AF_INET
        dead = (first, port, 0, 0) if ":" in first else (first, port)
        there = (socket.AF_INET, ("127.0.0.1", port))
        resolver.last.callback([(family, dead), there])
        for number in range(15):
            client = held.enter_context(closing(socket.socket(type=socket.SOCK_DGRAM)))
            client.connect(("127.0.0.1", listening.getHost().port))
            client.setblocking(False)
            client.send(b"%d" % number)
            received: list[Any] = []
            await until(lambda got=received: arrived(server, got), "a request")
            assert received[0][0] == b"%d" % number
            server.sendto(b"yes", received[0][1])
            await until(lambda: arrived(client, received), "a reply")  # noqa: B023
        assert nat.counters.sent_again == 1
        await listening.stopListening()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("unlucky", [1, SELF_TRIES, 1000])
def test_a_socket_that_is_connected_to_itself_is_no_flow(
    host: str, unlucky: int
) -> None:
    """The kernel may hand out the very port that is called, if nobody has it."""
    live: Any = reactor
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened: list[Any] = []
    with closing(bind_udp(host, 0)) as free:
        port = free.getsockname()[1]

    def open_socket(family: int) -> Any:
        sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        if len(opened) < unlucky:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
        opened.append(sock)
        return sock

    with closing(socket.socket(family, socket.SOCK_DGRAM)) as client:
        client.bind((host, 0))
        nat = UdpNat(live, [Server(host, port)], open_socket=open_socket)
        listener = bind_udp(host, 0)
        nat.listen([listener])
        client.sendto(b"hello?", listener.getsockname())
        with capturedLogs() as events:
            assert nat.fronts[0].read() is not None
        if unlucky < SELF_TRIES:
            assert len(nat.table) == 1
            assert len(opened) == unlucky + 1
        else:
            assert not nat.table.flows
            assert nat.counters.dropped == {"no_flow": 1}
            assert len(opened) == SELF_TRIES
            assert f":{port} but its own socket (1 datagrams" in formatEvent(events[0])
        nat.close()
    assert all(each.fileno() < 0 for each in opened)
