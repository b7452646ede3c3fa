"""What is counted of sessions and flows."""

from __future__ import annotations

from collections import Counter

from relayd.core.counts import (
    CANCELLED,
    CONNECTED,
    REFUSALS,
    FlowCounts,
    Histogram,
    SessionCounts,
)
from relayd.core.flows import Flow
from relayd.core.session import Ending, Session
from relayd.net.upstream import Upstream


def session(
    server: str = "db:1", *, dialed: float = 1.0, connected: float = 1.5
) -> Session:
    """A session that was relayed from 0 s to 7 s."""
    made = Session(1, "client", "listener", 0.0)
    made.server = Upstream(object(), server)
    made.dialed_at, made.connected_at, made.ended_at = 1.0, 1.5, 7.0
    made.up.read, made.down.read, made.down.spliced = 10, 200, 150
    made.ending = Ending.DONE
    return made


def test_a_value_is_in_the_first_bucket_that_holds_it() -> None:
    """A bound belongs to its bucket, as Prometheus's `le` says."""
    histogram = Histogram((1, 2.5))
    for value in (0.0, 1, 1.1, 2.5, 2.6, 100):
        histogram.add(value)
    assert histogram.counts == [2, 2, 2]
    assert histogram.total == 0.0 + 1 + 1.1 + 2.5 + 2.6 + 100
    other = Histogram((1, 2.5))
    other.add(2)
    other.include(histogram)
    assert (other.counts, other.total) == ([2, 3, 2], histogram.total + 2)


def test_a_session_that_has_ended() -> None:
    counts = SessionCounts()
    counts.close(session())
    counts.close(session())
    assert counts.closed == {"done": 2}
    assert (counts.up, counts.down, counts.spliced) == (20, 400, 300)
    place = counts.durations.counts.index(2)
    assert counts.durations.bounds[place - 1 : place + 1] == (5, 10)
    assert counts.durations.total == 14.0


def test_a_client_that_is_not_admitted_is_no_session() -> None:
    counts = SessionCounts()
    counts.refuse(Ending.LOOP.word)
    assert counts.refused == {"loop": 1}
    assert not counts.closed.total()


def test_the_dials_to_a_server() -> None:
    """The last that had an outcome says whether it is up."""
    counts = SessionCounts(["db:1", "db:2"])
    one, other = counts.servers.values()
    assert (one.failed_at, other.failed_at) == (None, None)
    counts.fail("db:1", Ending.CONNECT_REFUSED, 3.0)
    counts.cancel("db:1")
    assert one.results == {"connect_refused": 1, CANCELLED: 1}
    assert one.failed_at == 3.0
    counts.connect(session())
    assert one.results == {"connect_refused": 1, CANCELLED: 1, CONNECTED: 1}
    assert (one.failed_at, other.failed_at) == (None, None)
    assert not other.results
    assert counts.connects.total == 0.5


def test_a_server_that_a_client_chose_has_no_name() -> None:
    """A proxy's clients could make as many as they like."""
    counts = SessionCounts()
    counts.connect(session("evil.example:1"))
    counts.fail("evil.example:1", Ending.UNRESOLVED, 0.0)
    counts.cancel("evil.example:1")
    assert not counts.servers
    assert counts.connects.total == 0.5


def test_the_peer_of_a_bind_was_not_dialled() -> None:
    counts = SessionCounts()
    bound = session()
    bound.server = None
    counts.connect(bound)
    assert not sum(counts.connects.counts)


def test_refusals_are_the_endings_of_clients_that_were_not_served() -> None:
    served_not = {"refused", "loop", "bad_request", "handshake_timeout", "evicted"}
    served_not.add("route_failed")
    assert served_not | {"denied", "ident_failed"} == REFUSALS


def test_a_flow_that_has_ended() -> None:
    counts = FlowCounts()
    flow = Flow("key", "host", 0.0)
    flow.up_bytes, flow.down_bytes = 3, 40
    counts.close(flow)
    counts.close(flow)
    assert (counts.up, counts.down) == (6, 80)
    assert isinstance(SessionCounts().closed, Counter)
