"""The replies of several flows leave in one call."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from relayd.datagrams.mmsg import BATCH
from relayd.udp_nat import Server, UdpNat
from tests.conftest import LoggedFailures
from tests.datagrams.support import (
    SERVER,
    Bench,
    Defect,
    busy,
    problem,
)


@pytest.mark.parametrize("host", ["203.0.113.1", "0.0.0.0"])
def test_replies_of_several_flows_leave_together(host: str) -> None:
    """When all that are ready have been read, each to its own client."""
    bench = busy(3, host=host)
    for number in (2, 0, 1):
        bench.answer(b"%d" % number, number)
    assert not bench.listener.sent
    bench.watcher.release()
    assert bench.listener.sent == [
        (b"2", ("192.0.2.1", 3)),
        (b"0", ("192.0.2.1", 1)),
        (b"1", ("192.0.2.1", 2)),
    ]
    assert [f.down_datagrams for f in bench.nat.table.flows.values()] == [2, 2, 2]
    bench.check()
    bench.close()


def test_a_full_outbox_is_sent_at_once() -> None:
    """It has room for a batch."""
    bench = busy(BATCH + 1)
    for number in range(BATCH + 1):
        bench.answer(b"!", number)
    assert len(bench.listener.sent) == BATCH
    bench.watcher.release()
    assert len(bench.listener.sent) == BATCH + 1
    bench.check()
    bench.close()


def test_a_reply_that_can_not_be_sent_counts_for_its_flow() -> None:
    """It is counted, and the others have left."""
    bench = busy(3)
    for number in range(3):
        bench.answer(b"four", number)
    bench.listener.errors.extend([None, problem(errno.EPERM)])
    bench.watcher.release()
    assert [to for _, to in bench.listener.sent] == [("192.0.2.1", 1), ("192.0.2.1", 3)]
    assert bench.nat.counters.replies_dropped == {"send_EPERM": 1}
    flows = bench.nat.table.flows.values()
    assert [(f.down_datagrams, f.down_bytes) for f in flows] == [(2, 5), (1, 1), (2, 5)]
    bench.check()
    bench.close()


def test_a_flow_that_ends_sends_its_reply_first() -> None:
    """It is not lost, and its line counts it."""
    bench = busy(2)
    bench.answer(b"last", 0)
    bench.nat.abort_all()
    assert bench.listener.sent == [(b"last", ("192.0.2.1", 1))]
    assert bench.observer.endings == ["drained"] * 2
    bench.close()


def test_a_pending_reply_keeps_its_flow() -> None:
    """It is alive, as one is whose reply has left."""
    bench = busy(1, timeout=3)
    bench.clock.advance(2)
    bench.answer(b"still here")
    bench.clock.advance(1)
    assert bench.listener.sent
    assert bench.live
    bench.watcher.release()
    bench.clock.pump([1] * 3)
    assert bench.observer.endings == ["expired"]
    bench.close()


def test_an_exception_after_a_batch_drops_the_pending_replies(
    logged_failures: LoggedFailures,
) -> None:
    """And neither their flows nor whoever calls it, which is the plane."""
    bench = busy(3)
    for number in range(3):
        bench.answer(b"!", number)
    outbox: Any = bench.nat.listeners[0].replies._outbox
    really = outbox.send

    def broken(*_: Any) -> Any:
        raise Defect

    outbox.send = broken
    bench.watcher.release()
    assert bench.nat.counters.replies_dropped == {"failed": 3}
    logged_failures.take("a listener failed to send replies")
    outbox.send = really
    bench.answer(b"again", 0)
    assert bench.listener.sent == [(b"again", ("192.0.2.1", 1))]
    assert len(bench.live) == 3
    bench.check()
    bench.close()


# -- a relay whose cap of replies changes


def cap(bench: Bench, times: float) -> None:
    """It has another cap from now on."""
    other = UdpNat(
        None,
        [Server(*SERVER)],
        watcher=bench.watcher,
        clock=bench.clock,
        open_socket=lambda family: bench.open(family),
        max_flows=100,
        reply_cap=times,
    )
    bench.nat.become(other)


def test_a_cap_that_is_set_later() -> None:
    """It holds for flows whose replies have left together, and for those to come."""
    bench = busy(2)
    bench.answer(b"last", 0)
    cap(bench, 2)
    assert bench.listener.sent == [(b"last", ("192.0.2.1", 1))]
    bench.answer(b"!", 0)
    bench.answer(b"!", 1)
    bench.answer(b"!", 1)
    bench.arrive(source=("192.0.2.1", 3))
    bench.watcher.held = True
    for _ in range(5):
        bench.answer(b"!", 2)
    assert [to[1] for _, to in bench.listener.sent] == [1, 2, 3, 3]
    assert bench.nat.counters.replies_dropped == {"reply_cap": 5}
    bench.check()
    bench.close()


def test_a_cap_that_is_removed() -> None:
    """Replies leave together again, of flows that were opened with it, too."""
    bench = busy(2, reply_cap=1)
    bench.answer(b"!", 0)
    assert bench.nat.counters.replies_dropped == {"reply_cap": 1}
    cap(bench, 0)
    for number in (0, 1):
        # The first of each tells how many there are at a time.
        bench.answer(b"first", number)
    assert len(bench.listener.sent) == 2
    for number in (0, 1):
        bench.answer(b"next", number)
    assert len(bench.listener.sent) == 2
    bench.watcher.release()
    assert bench.listener.sent[2:] == [
        (b"next", ("192.0.2.1", 1)),
        (b"next", ("192.0.2.1", 2)),
    ]
    bench.check()
    bench.close()
