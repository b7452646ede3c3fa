"""The replies of several flows leave in one call."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from relayd.datagrams.mmsg import BATCH
from tests.conftest import LoggedFailures
from tests.datagrams.support import (
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
