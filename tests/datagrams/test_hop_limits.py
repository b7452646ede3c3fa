"""What is relayed from its client's address loses a hop, as at a router."""

from __future__ import annotations

import socket

import pytest
from twisted.logger import capturedLogs, formatEvent

from relayd.datagrams import original_listener
from relayd.net.dial_options import DialOptions
from tests.datagrams.support import CLIENT
from tests.datagrams.test_original import ASKED, OTHER, OriginalBench


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> OriginalBench:
    made = OriginalBench(dialing=DialOptions(transparent=True))
    monkeypatch.setattr(original_listener, "udp_socket", made.open_reply_socket)
    return made


def arrive(bench: OriginalBench, *hops: int) -> None:
    """Datagrams of one client arrive at once, with so many hops left."""
    for each in hops:
        bench.listener.inbox.append(((b"?", ASKED, each), CLIENT))
    bench.watcher.ready(bench.listener.number)


def sends_with(bench: OriginalBench, number: int = 0) -> list[int]:
    """How many hops a flow's socket was told to send with, so far."""
    options = bench.sockets[number].options  # type: ignore[attr-defined]
    option = socket.IPPROTO_IP, socket.IP_TTL
    return [value for *key, value in options if tuple(key) == option]


def test_a_datagram_is_sent_with_one_less(bench: OriginalBench) -> None:
    """The socket is told when that changes; the first is sent as any new one."""
    arrive(bench, 64)
    assert not sends_with(bench)
    arrive(bench, 64)
    arrive(bench, 64, 64)
    assert sends_with(bench) == [63]
    arrive(bench, 61)
    assert sends_with(bench) == [63, 60]
    arrive(bench, 64)
    assert sends_with(bench) == [63, 60, 63]
    bench.check()
    bench.close()


def test_none_of_a_batch_is_sent_with_more_than_it_had(bench: OriginalBench) -> None:
    """Else one that goes round beside others would gain by them."""
    arrive(bench, 64)
    for batch in ((64, 60, 64), (60, 64), (64, 60)):
        arrive(bench, *batch)
    assert sends_with(bench) == [59]
    bench.check()
    bench.close()


def test_what_has_none_left_is_dropped(bench: OriginalBench) -> None:
    """And counted, with one line; others of the batch go on."""
    arrive(bench, 64)
    with capturedLogs() as logs:
        arrive(bench, 1, 64, 0)
        arrive(bench, 1)
    assert bench.nat.counters.dropped == {"loop": 3}
    assert sends_with(bench) == [63]
    [line] = map(formatEvent, logs)
    assert line is not None
    assert line.endswith("they are dropped (2 for a loop so far)")
    assert len(bench.sockets[0].sent) == 2
    bench.check()
    bench.close()


def test_a_datagram_that_goes_round_ends(bench: OriginalBench) -> None:
    """However many routers there are, and other datagrams beside it."""
    arrive(bench, 64)
    left, rounds = 62, 0
    while left > 0:
        arrive(bench, 64)
        arrive(bench, left)
        left = sends_with(bench)[-1] - 1 if left > 1 else 0
        rounds += 1
    assert rounds <= 32
    bench.check()
    bench.close()


def test_where_the_kernel_does_not_tell_nothing_changes(bench: OriginalBench) -> None:
    for _ in range(2):
        bench.ask()
    assert not sends_with(bench)
    bench.check()
    bench.close()


def test_flows_from_the_relays_own_address_pass_none_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They can't come back as their client's."""
    bench = OriginalBench()
    monkeypatch.setattr(original_listener, "udp_socket", bench.open_reply_socket)
    for hops in (64, 60, 1):
        arrive(bench, hops)
    bench.ask(OTHER)
    assert not sends_with(bench)
    assert len(bench.sockets[0].sent) == 3
    bench.check()
    bench.close()
