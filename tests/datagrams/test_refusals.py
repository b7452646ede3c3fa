"""A server's address refuses: the next one is tried."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from twisted.logger import capturedLogs, formatEvent

from relayd.datagrams.mmsg import BATCH
from relayd.datagrams.servers import LOOK_UP_INTERVAL
from tests.datagrams.support import (
    CLIENT,
    NAMED,
    named,
    peers,
    problem,
    refuse,
)


def test_a_refusal_moves_on_to_the_next_address() -> None:
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
    assert bench.listener.sent == [(b"here", CLIENT)]
    [flow] = bench.nat.table.flows.values()
    assert (flow.up_datagrams, flow.down_datagrams) == (2, 1)
    counters = bench.nat.counters
    assert (counters.sent, counters.resent, counters.icmp_errors) == (2, 2, 1)
    bench.arrive(source=("192.0.2.2", 1))
    assert peers(bench)[2] == NAMED[1]
    assert not len(bench.nat.ledger.unanswered) - 1
    bench.check()
    bench.close()
    assert not len(bench.nat.ledger.unanswered)
    assert bench.nat.ledger.unanswered.size == 0


@pytest.mark.parametrize("how", ["read", "send", "run"])
def test_an_answer_pending_behind_a_refusal_keeps_the_flow(how: str) -> None:
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
            bench.listener.inbox.append((b"two", CLIENT))
        bench.watcher.ready(bench.listener.number)
    assert bench.listener.sent == [(b"answer", CLIENT)]
    assert peers(bench) == [NAMED[0]]
    assert sock.sent == [b"one", *{"read": 0, "send": 1, "run": 3}[how] * [b"two"]]
    [flow] = bench.nat.table.flows.values()
    assert flow.replied
    assert not bench.nat.counters.resent
    bench.check()
    bench.close()


@pytest.mark.parametrize("run", [1, 3])
def test_a_refusal_reported_by_the_next_send(run: int) -> None:
    """That datagram, or run, goes to the next address, after what went before."""
    bench = named()
    bench.arrive(b"first")
    bench.sockets[0].errors.append(problem(errno.EHOSTUNREACH))
    bench.listener.inbox.extend([(b"%d" % n, CLIENT) for n in range(run)])
    bench.watcher.ready(bench.listener.number)
    assert bench.sockets[1].sent == [b"first", *(b"%d" % n for n in range(run))]
    assert bench.nat.counters.resent == 1
    assert not bench.nat.counters.dropped
    bench.check()
    bench.close()


def test_each_address_is_tried_once_after_each_look_up() -> None:
    """Then the flow stays where it is, and the line is written once."""
    bench = named()
    resolver = bench.resolver
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
        bench.clock.advance(LOOK_UP_INTERVAL - 1)
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


def test_an_address_without_a_route_counts_as_refused() -> None:
    """connect() says so at once; the next takes the flow, with one warning."""
    bench = named()
    real = bench.open

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
    bench.open = open_socket
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
def test_a_flow_without_another_socket_keeps_its_own(
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


def test_the_last_datagrams_are_sent_again() -> None:
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


def test_a_refusal_in_the_middle_of_a_run_is_sent_again() -> None:
    """By a host that is near, where the run is sent one by one."""
    bench = named()
    bench.arrive(b"first")
    sock = bench.sockets[0]
    sock.segments = errno.EIO
    sock.errors.extend([None, None, problem(errno.ECONNREFUSED)])
    bench.listener.inbox.extend((b"%d" % number, CLIENT) for number in range(4))
    bench.watcher.ready(bench.listener.number)
    assert sock.sent == [b"first", b"0", b"1"]
    assert bench.sockets[1].sent == [b"first", b"0", b"1", b"2", b"3"]
    [flow] = bench.nat.table.flows.values()
    assert bench.nat.ledger.unanswered.of(flow, 0) == [b"0", b"1", b"2", b"3"]
    bench.check()
    bench.close()


def test_datagrams_that_can_not_be_sent_again_are_counted() -> None:
    """The next address may take less."""
    bench = named()
    bench.arrive(b"one")
    bench.arrive(b"two")
    real = bench.open

    def open_socket(family: int) -> Any:
        sock = real(family)
        sock.errors.append(problem(errno.EMSGSIZE))
        return sock

    bench.open = open_socket
    refuse(bench)
    assert bench.sockets[1].sent == [b"two"]
    counters = bench.nat.counters
    assert (counters.resent, counters.not_resent) == (1, 1)
    bench.close()


def test_nothing_is_kept_without_another_address() -> None:
    """Nor of a flow that has failed as its datagram was sent."""
    bench = named(NAMED[0])
    bench.arrive()
    assert not len(bench.nat.ledger.unanswered)
    bench.close()
    bench = named()
    bench.arrive()
    sock = bench.sockets[0]
    sock.errors.append(problem(errno.ECONNREFUSED))
    sock.inbox.extend(problem(errno.EACCES) for _ in range(BATCH))
    bench.arrive(b"more")
    assert bench.observer.endings == ["failed"]
    assert not len(bench.nat.ledger.unanswered)
    bench.close()
