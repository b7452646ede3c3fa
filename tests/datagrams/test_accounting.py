"""Every datagram is sent or counted as dropped, in any history."""

from __future__ import annotations

import errno
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from relayd.datagrams.sockets import (
    BUFFER_SIZE,
)
from tests.datagrams.support import (
    ERRNOS,
    Bench,
    problem,
)

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
    st.tuples(st.just("listener_error"), st.sampled_from([errno.ENOMEM])),
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
        if what in ("arrive", "unread") and not bench.listener.closed:
            bench.listener.inbox.extend((bytes(size), source) for source, size in value)
            put += len(value)
            if what == "arrive":
                bench.watcher.ready(bench.listener.number)
        elif what == "answer" and bench.live:
            sock = bench.live[0]
            sock.inbox.extend(bytes(size) for size in value)
            replies += len(value)
            while sock.inbox:
                bench.watcher.ready(sock.number)
        elif what == "up_errors" and bench.live:
            bench.live[0].errors.extend(n and problem(n) for n in value)
        elif what == "down_errors":
            bench.listener.errors.extend(n and problem(n) for n in value)
        elif what == "segments":
            for sock in (bench.listener, *bench.live):
                sock.segments = value
        elif what == "recv_error" and bench.live:
            bench.live[0].inbox.append(problem(value))
        elif what == "listener_error":
            bench.listener.inbox.append(problem(value))
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
        unread = sum(not isinstance(each, OSError) for each in bench.listener.inbox)
        assert bench.nat.counters.received == put - unread
        pending = sum(len(each.replies.pending) for each in bench.nat.listeners)
        assert bench.nat.counters.replies_received + pending == replies
    bench.close()
