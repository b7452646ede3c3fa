"""Slow start: how the weight of a server grows that has come up."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from twisted.internet.task import Clock

from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server
from relayd.upstreams.slow_start import SlowStart
from tests.support.shares import SELECTORS


def server(name: str) -> Server:
    return Server(SimpleNamespace(), name)  # type: ignore[arg-type]


def asked(ordinal: int) -> Any:
    return SimpleNamespace(ordinal=ordinal, client=f"10.0.{ordinal >> 8}.{ordinal}:1")


def a_pool(balance: str = "round-robin") -> tuple[Clock, Pool, SlowStart]:
    clock = Clock()
    pool = Pool([server("a"), server("b")], SELECTORS[balance]())
    return clock, pool, SlowStart(pool, 30, clock)


def test_a_share_grows_linearly() -> None:
    clock, pool, slow = a_pool()
    a, b = pool.servers
    slow.start()
    b.checked(False, "no answer")
    assert (a.share, b.share) == (1, 1)
    b.checked(True, "connected")
    shares = []
    for _ in range(21):
        shares.append(b.share)
        clock.advance(1.5)
    assert shares == pytest.approx([0.05, *(step / 20 for step in range(1, 21))])
    assert (a.share, b.share) == (1, 1)
    assert not clock.getDelayedCalls()


@pytest.mark.parametrize("balance", ["round-robin", "random", "client-hash"])
def test_sessions_follow(balance: str) -> None:
    clock, pool, _ = a_pool(balance)
    a, b = pool.servers
    b.checked(False, "no answer")
    b.checked(True, "connected")

    def shares() -> float:
        counts = Counter(pool.choose(asked(n)) for n in range(4000))
        return counts[b] / counts[a]

    assert shares() == pytest.approx(0.05, abs=0.02)
    clock.advance(15)
    assert shares() == pytest.approx(0.5, rel=0.1)
    clock.advance(15)
    assert shares() == pytest.approx(1.0, rel=0.05)


def test_ejected_disabled_and_new_servers_start_slowly() -> None:
    clock, pool, slow = a_pool()
    a, b = pool.servers
    for one, attribute in ((a, "ejected"), (b, "disabled")):
        setattr(one, attribute, True)
        one.changed()
        setattr(one, attribute, False)
        one.changed()
        assert one.share == 0.05
    c = server("c")
    clock.advance(15)
    pool.replace([a], [c])
    # Who leaves is nobody's concern.
    assert (a.share, c.share, b.share) == (1, 0.05, 0.5)
    slow.stop()
    assert (b.share, c.share) == (1, 1)
    assert not clock.getDelayedCalls()


def test_a_server_that_goes_down_meanwhile_begins_again() -> None:
    clock, pool, _ = a_pool()
    b = pool.servers[1]
    b.checked(False, "no answer")
    b.checked(True, "connected")
    clock.advance(15)
    assert b.share == 0.5
    b.checked(False, "no answer")
    assert not clock.getDelayedCalls()
    b.checked(True, "connected")
    assert b.share == 0.05
    b.checked(True, "connected")
    clock.advance(30)
    assert b.share == 1
    assert not clock.getDelayedCalls()


def test_it_takes_some_time() -> None:
    _, pool, _ = a_pool()
    with pytest.raises(ValueError, match="takes more than 0 seconds"):
        SlowStart(pool, 0, Clock())
