"""A pool's servers: which may be chosen, and how many sessions each has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import succeed
from twisted.internet.task import Clock

from relayd.core.session import Ending
from relayd.upstreams.checks import Checker
from relayd.upstreams.flow_server import FlowServer
from relayd.upstreams.judging import Schedule, Verdict
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server


def server(name: str = "a", **settings: Any) -> Server:
    return Server(SimpleNamespace(), name, **settings)  # type: ignore[arg-type]


def asked(ordinal: int = 0) -> Any:
    return SimpleNamespace(ordinal=ordinal)


def test_a_server_that_is_full_is_left_out_until_a_session_is_over() -> None:
    one, two = server("a", max_sessions=1), server("b")
    pool = Pool([one, two])
    assert pool.choose(asked()) is one
    one.began()
    assert {pool.choose(asked(n)) for n in range(4)} == {two}
    one.connected()
    one.closed()
    assert {pool.choose(asked(n)) for n in range(4)} == {one, two}


def test_backups_are_chosen_while_no_other_is_usable() -> None:
    one, spare = server("a"), server("b", tier=1)
    pool = Pool([spare, one])
    assert pool.choose(asked()) is one
    one.checked(False, "no answer")
    assert pool.choose(asked()) is spare
    one.checked(True, "connected")
    assert pool.choose(asked()) is one


def test_what_has_failed_is_tried_last() -> None:
    one, two, spare = server("a"), server("b"), server("c", tier=1)
    pool = Pool([one, two, spare])
    assert pool.choose(asked(), [one]) is two
    assert pool.choose(asked(), [one, two]) is spare
    assert pool.choose(asked(), [one, two, spare]) is None


@pytest.mark.parametrize(
    "settings", [{"disabled": True}, {"weight": 0}], ids=["disabled", "no weight"]
)
def test_what_takes_no_session(settings: Any) -> None:
    assert Pool([server("a", **settings)]).choose(asked()) is None


def test_a_server_that_drains_takes_no_new_session() -> None:
    one = server("a")
    pool = Pool([one])
    assert pool.choose(asked()) is one
    one.draining = True
    one.changed()
    assert pool.choose(asked()) is None


def test_a_trial_is_for_one_session_at_a_time() -> None:
    """Whatever sessions it has from before."""
    one = server("a")
    pool = Pool([one])
    one.began()
    one.ejected = one.on_trial = True
    one.changed()
    assert pool.choose(asked()) is one
    one.began()
    assert pool.choose(asked()) is None


def test_a_server_is_in_one_pool() -> None:
    one = server("web")
    Pool([one])
    with pytest.raises(ValueError, match="web is in another pool already"):
        Pool([one])


@pytest.mark.parametrize("settings", [{"weight": 257}, {"max_sessions": 0}])
def test_settings_out_of_range(settings: Any) -> None:
    with pytest.raises(ValueError, match="is "):
        server("a", **settings)


def test_a_selector_is_told_of_sessions_that_are_over() -> None:
    loads = []

    class Least:
        def choose(self, candidates: Any, session: Any) -> Any:
            return min(candidates, key=lambda each: each.sessions / each.weight)

        def session_over(self, one: Server) -> None:
            loads.append((one.name, one.sessions))

    one, two = server("a"), server("b", weight=2)
    pool = Pool([one, two], Least())  # type: ignore[arg-type]
    assert pool.choose(asked()) is one
    one.began()
    assert pool.choose(asked()) is two
    two.began()
    two.cancelled()
    assert loads == [("b", 0)]


@given(st.lists(st.sampled_from(["refused", "left", "done"]), max_size=30))
def test_each_session_is_counted_once(outcomes: list[str]) -> None:
    one = server("a", max_sessions=2)
    pool = Pool([one])
    under_way = 0
    for outcome in outcomes:
        if pool.choose(asked()) is None:
            assert one.sessions == under_way == 2
            one.closed()
            under_way -= 1
        one.began()
        if outcome == "refused":
            one.failed(Ending.CONNECT_REFUSED, "refused")
        elif outcome == "left":
            one.cancelled()
        else:
            one.connected()
            under_way += 1
        assert one.sessions == under_way


def test_a_server_that_begins_as_down_is_told_that_it_is_up() -> None:
    clock = Clock()
    one = server("a")
    one.checked_up = False
    pool = Pool([one])
    checker = Checker(clock)
    checker.add(one, lambda: succeed(Verdict(True, "it answers")), Schedule())
    assert pool.choose(asked()) is None
    checker.start()
    clock.advance(2)
    assert pool.choose(asked()) is one
    checker.stop()


@pytest.mark.parametrize("kind", [Server, FlowServer])
def test_counting_a_session_is_no_call(kind: type) -> None:
    """A setter of attrs' is eight, for each that begins and for each that ends."""
    assert kind.__setattr__ is object.__setattr__
