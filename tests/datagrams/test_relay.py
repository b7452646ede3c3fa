"""The relay: time, drains, observers and defects."""

from __future__ import annotations

import errno
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.core.flows import Counters
from relayd.datagrams.ledger import DROP_CHECKS
from relayd.datagrams.mmsg import BATCH
from relayd.udp_nat import Server
from tests.conftest import LoggedFailures
from tests.datagrams.support import (
    CLIENT,
    Bench,
    Defect,
    FakeResolver,
    FakeSocket,
    Observer,
    problem,
)


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
    bench.listener.inbox.append((b"late", CLIENT))
    bench.clock.advance(1)
    assert bench.sockets[0].sent == [b"?", b"late"]
    bench.clock.advance(2)
    bench.sockets[0].inbox.append(b"just in time")
    bench.clock.advance(1)
    assert bench.listener.sent == [(b"just in time", CLIENT)]
    assert bench.live
    bench.pass_time(5)
    assert bench.observer.endings == ["expired"]
    bench.close()


def test_no_flow_expires_while_datagrams_are_unread() -> None:
    """Among those may be one whose flow would have expired."""
    bench = Bench(unreplied_timeout=3)
    bench.arrive()
    bench.listener.inbox.extend([(b"", ("192.0.2.2", 1))] * BATCH * 2)
    bench.listener.inbox.append((b"late", CLIENT))
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
        bench.listener.inbox.clear()
        bench.listener.inbox.extend(flood)
        bench.clock.advance(1)
    [facts] = bench.observer.facts
    assert (facts.client, facts.ending) == ("192.0.2.1:4000", "unreplied")
    bench.close()


def test_a_drain_ends_idle_flows() -> None:
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


def test_a_drain_has_a_limit() -> None:
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
        assert bench.listener.closed
        bench.close()


def test_a_relay_that_was_drained_can_listen_again() -> None:
    """And serves, and can be drained again."""
    bench = Bench()
    bench.nat.drain(0)
    assert bench.listener.closed
    for _ in range(2):
        bench.listener = FakeSocket()
        bench.nat.listen([bench.listener])
        before = len(bench.sockets)
        bench.arrive()
        assert [each.sent for each in bench.sockets[before:]] == [[b"?"]]
        bench.check()
        done: list[Any] = []
        bench.nat.drain(0).addCallback(done.append)
        assert done == [None]
        assert bench.listener.closed
    bench.close()


@pytest.mark.parametrize("seconds", [0.1, 2.25])
def test_a_drain_ends_exactly_at_its_limit(seconds: float) -> None:
    """And not at the next check of the flows."""
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


def test_an_observer_that_raises_ends_no_flow(
    logged_failures: LoggedFailures,
) -> None:
    """It is logged, once; the flow has ended all the same."""

    class Broken:
        calls = 0

        def ended(self, flow: Any, facts: Any) -> None:
            self.calls += 1
            raise ZeroDivisionError

        def closed(self, relay: str, listeners: str, counters: Any) -> None:
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


def test_the_check_of_flows_goes_on_after_an_exception(
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
    logged_failures.take("the check of flows failed")
    bench.pass_time(4)
    assert bench.observer.endings == ["unreplied"]
    bench.close()


def test_unknown_kernel_drops_count_as_none() -> None:
    """And not the 2**32 that are missing from the last answer."""
    bench = Bench()
    bench.listener.dropped = 5
    bench.nat.count_kernel_drops()
    for broken in (
        {"side_effect": problem(errno.EPERM)},
        {"return_value": bytes(32)},
    ):
        with patch.object(FakeSocket, "getsockopt", **broken):
            bench.nat.count_kernel_drops()
    bench.listener.dropped = 7
    bench.nat.count_kernel_drops()
    assert bench.nat.counters.kernel_dropped == 7
    bench.close()


def test_what_the_kernel_dropped_is_counted() -> None:
    """The listener's at each step, the flows' in turn and as they end; each once."""
    bench = Bench(
        unreplied_timeout=20,
        max_flows=2 * DROP_CHECKS,
        max_flows_per_client=DROP_CHECKS * 2,
    )
    for port in range(1, DROP_CHECKS + 2):
        bench.arrive(source=("192.0.2.1", port))
    bench.listener.dropped = 3
    for sock in bench.sockets:
        sock.dropped = 4
    bench.clock.advance(1)
    assert bench.nat.counters.kernel_dropped == 3 + 4 * DROP_CHECKS
    bench.clock.advance(1)
    assert bench.nat.counters.kernel_dropped == 3 + 4 * (DROP_CHECKS + 1)
    bench.sockets[0].dropped = 5
    bench.close()
    assert bench.nat.counters.kernel_dropped == 4 + 4 * (DROP_CHECKS + 1)


def test_an_observer_may_open_a_drained_relay_again() -> None:
    """Who waits for the drain hears of its end; the new listener is served."""

    class Reopening(Observer):
        def closed(self, relay: str, listeners: str, counters: Counters) -> None:
            super().closed(relay, listeners, counters)
            if len(self.totals) == 1:
                bench.listener = FakeSocket()
                bench.nat.listen([bench.listener])

    resolver = FakeResolver()
    bench = Bench([Server("name.example", 53)], resolver=resolver, observer=Reopening())
    resolver.answer("198.51.100.1")
    bench.arrive()
    bench.clock.advance(2)
    done: list[Any] = []
    bench.nat.drain(10).addCallback(done.append)
    bench.nat.drain(0).addCallback(done.append)
    assert done == [None, None]
    assert not bench.nat.draining
    bench.arrive()
    assert len(bench.live) == 1
    bench.check()
    # Its names are looked up, and its flows expire.
    assert len(resolver.asked) == 2
    bench.pass_time(31)
    assert len(resolver.asked) == 3
    assert not bench.live
    bench.close()
