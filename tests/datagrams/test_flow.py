"""A flow: errors, how much is read, runs."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from twisted.python.failure import Failure

from relayd.datagrams.flow import BURST
from relayd.datagrams.mmsg import BATCH
from relayd.datagrams.sockets import (
    BUFFER_SIZE,
    MAX_SEGMENTED,
    MAX_SEGMENTS,
)
from tests.conftest import LoggedFailures
from tests.datagrams.support import (
    CLIENT,
    ERRNOS,
    REFUSED,
    Bench,
    Defect,
    problem,
)


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
    assert bench.listener.sent == [(b"!", CLIENT)]
    bench.close()


def test_a_refused_datagram_is_sent_again_before_another_clients() -> None:
    """The same where one read has datagrams of two clients: both are counted."""
    bench = Bench()
    other = (CLIENT[0], CLIENT[1] + 1)
    bench.arrive()
    bench.arrive(source=other)
    bench.sockets[0].errors.append(problem(errno.ECONNREFUSED))
    bench.listener.inbox.append((b"again", CLIENT))
    bench.arrive(b"too", source=other)
    assert [sock.sent for sock in bench.sockets] == [[b"?", b"again"], [b"?", b"too"]]
    assert bench.nat.counters.sent == bench.nat.counters.received == 4
    assert bench.nat.counters.icmp_errors == 1
    assert not bench.nat.counters.dropped
    bench.close()


def test_an_error_for_a_datagram_too_large_drops_no_other() -> None:
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
    bench.listener.inbox.extend([(b"run", CLIENT)] * 3)
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
    bench.listener.errors.append(problem(number))
    bench.answer()
    name = f"send_{errno.errorcode[number]}"
    assert bench.nat.counters.dropped == {name: 1}
    assert bench.nat.counters.replies_dropped == {name: 1}
    assert len(bench.live) == 1
    bench.close()


def test_a_failed_send_still_refreshes_the_flow() -> None:
    """It keeps its flow, and so its port."""
    bench = Bench(unreplied_timeout=3)
    bench.arrive()
    for _ in range(8):
        bench.sockets[0].errors.append(problem(errno.EPERM))
        bench.arrive()
        bench.pass_time(1)
    assert len(bench.live) == len(bench.sockets) == 1
    bench.close()


def test_oversize_reads_are_not_passed_on() -> None:
    """What fills the buffer may have been longer; the largest datagrams pass."""
    bench = Bench()
    for size in (0, 1, 65507, 65535, BUFFER_SIZE):
        bench.arrive(bytes(size))
        bench.answer(bytes(size))
    sizes = [0, 1, 65507, 65535]
    assert [len(each) for each in bench.sockets[0].sent] == sizes
    assert [len(data) for data, _ in bench.listener.sent] == sizes
    assert bench.nat.counters.dropped == {"truncated": 1}
    assert bench.nat.counters.replies_dropped == {"truncated": 1}
    [flow] = bench.nat.table.flows.values()
    assert (flow.up_datagrams, flow.up_bytes) == (4, sum(sizes))
    assert (flow.down_datagrams, flow.down_bytes) == (4, sum(sizes))
    bench.close()


@pytest.mark.parametrize("together", [False, True])
def test_after_a_burst_as_many_replies_are_read(together: bool) -> None:
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
    bench.listener.inbox.extend([(b"?", CLIENT)] * 3)
    bench.arrive()
    assert left(4) == 0
    assert left(6) == 2
    # A burst that is no longer than one before is no reason to look.
    bench.listener.inbox.extend([(b"?", CLIENT)] * 3)
    bench.arrive()
    assert left(6) == 2
    # Of many, there is always a look for more.
    bench.listener.inbox.extend([(b"?", CLIENT)] * 4)
    bench.arrive()
    assert left(BURST) == 0
    assert left(2 * BURST) == 0
    bench.close()


def test_a_batch_is_bounded() -> None:
    """By datagrams, empty ones included, so that others have their turn."""
    bench = Bench()
    bench.listener.inbox.extend([(b"", CLIENT)] * (BATCH + 5))
    bench.watcher.ready(bench.listener.number)
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
    assert [len(data) for data, _ in bench.listener.sent] == [15, 5]
    assert bench.nat.counters.replies_dropped == {"reply_cap": 2}
    bench.arrive(bytes(1))
    bench.answer(bytes(2))
    assert len(bench.listener.sent) == 3
    bench.close()


def runs_of(bench: Bench, flow: bool) -> list[int]:
    """How many datagrams each call of `sendmsg` is given from now on."""
    sock: Any = bench.sockets[0] if flow else bench.listener
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
    datas = [*(b"%03d" % n for n in range(MAX_SEGMENTS - 10)), b"ab", b"cd", b"", b""]
    bench.listener.inbox.extend((data, CLIENT) for data in datas)
    bench.listener.inbox.extend([(b"xy", other), (b"ef", CLIENT), (b"gh", CLIENT)])
    bench.watcher.ready(bench.listener.number)
    assert bench.sockets[0].sent == [b"first", *datas, b"ef", b"gh"]
    assert bench.sockets[1].sent == [b"xy"]
    assert up == [MAX_SEGMENTS - 10, 2, 2]
    sock = bench.sockets[0]
    sock.inbox.extend(datas)
    while sock.inbox:
        bench.watcher.ready(sock.number)
    assert bench.listener.sent == [(data, CLIENT) for data in datas]
    assert sum(size for size in down if size > 1) > MAX_SEGMENTS // 2
    bench.check()
    bench.close()


def test_a_run_is_limited() -> None:
    """In datagrams and in bytes; those are udp(7)'s and IP's."""
    bench = Bench()
    bench.arrive(b"first")
    up = runs_of(bench, True)
    bench.listener.inbox.extend([(bytes(MAX_SEGMENTED // 3), CLIENT)] * 8)
    bench.watcher.ready(bench.listener.number)
    assert up == [3, 3, 2]
    bench.listener.inbox.extend([(b"x", CLIENT)] * BATCH)
    bench.watcher.ready(bench.listener.number)
    assert max(up) <= MAX_SEGMENTS
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
def test_a_run_that_fails_is_sent_one_by_one(number: int, calls: int) -> None:
    """Either way; and where the kernel can't do it, it is not asked again."""
    bench = Bench()
    bench.arrive(b"first")
    sock = bench.sockets[0]
    bench.listener.segments = sock.segments = number
    up, down = runs_of(bench, True), runs_of(bench, False)
    for _ in range(2):
        bench.listener.inbox.extend([(b"up", CLIENT)] * 3)
        bench.watcher.ready(bench.listener.number)
    assert sock.sent == [b"first", *[b"up"] * 6]
    assert up == [3] * calls
    bench.nat.table.flows[next(iter(bench.nat.table.flows))].read_all()
    sock.inbox.extend([b"down"] * 3)
    bench.nat.table.flows[next(iter(bench.nat.table.flows))].read_all()
    assert bench.listener.sent == [(b"down", CLIENT)] * 3
    assert down == [3]
    assert not bench.nat.counters.dropped
    told = {errno.ECONNREFUSED: 2, errno.EACCES: 1, errno.EOPNOTSUPP: 1}
    assert bench.nat.counters.icmp_errors == told.get(number, 0)
    bench.check()
    bench.close()


def test_a_run_that_may_be_partly_sent_is_not_sent_again() -> None:
    """ENOBUFS: a queue was full, maybe in the middle of it."""
    bench = Bench()
    bench.arrive(b"first")
    sock = bench.sockets[0]
    bench.listener.segments = sock.segments = errno.ENOBUFS
    bench.listener.inbox.extend([(b"up", CLIENT)] * 3)
    bench.watcher.ready(bench.listener.number)
    sock.inbox.extend([b"down"] * 3)
    bench.nat.table.flows[next(iter(bench.nat.table.flows))].read_all()
    assert sock.sent == [b"first"]
    assert not bench.listener.sent
    assert bench.nat.counters.dropped == {"send_ENOBUFS": 3}
    assert bench.nat.counters.replies_dropped == {"send_ENOBUFS": 3}
    bench.check()
    bench.close()


@pytest.mark.parametrize("together", [False, True])
def test_an_exception_ends_only_its_flow(
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
    flows[0]._usual = BURST
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
