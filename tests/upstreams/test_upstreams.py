"""Pools of servers, and which of them a session gets."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zope.interface.verify import verifyObject

from relayd.core.interfaces import ISelector
from relayd.core.session import Session
from relayd.net.upstream import Upstream
from relayd.upstreams.balance import RoundRobin
from relayd.upstreams.pool import Pool
from tests.support.fakes import FakeEndpoint


def a_session(ordinal: int = 0) -> Session:
    """Of a client that its relay has admitted as this one."""
    return Session(1, "c:1", "l:1", 0.0, ordinal=ordinal)


@given(st.integers(1, 9), st.integers(0, 1000), st.integers(1, 5))
def test_round_robin_is_fair(size: int, start: int, rounds: int) -> None:
    """Of sessions in a row, every candidate gets the same share, in order."""
    candidates = [object() for _ in range(size)]
    selector = RoundRobin()
    chosen = [
        selector.choose(candidates, a_session(ordinal=start + i))
        for i in range(size * rounds)
    ]
    assert {chosen.count(each) for each in candidates} == {rounds}
    assert chosen[:size] == chosen[-size:]


def test_round_robin_changes_nothing() -> None:
    """Asked again for the same session it answers the same, whatever came between."""
    selector, candidates = RoundRobin(), ["a", "b", "c"]
    assert verifyObject(ISelector, selector)
    session, other = a_session(ordinal=4), a_session(ordinal=5)
    answers = [selector.choose(candidates, each) for each in (session, other, session)]
    assert answers == ["b", "c", "b"]
    assert candidates == ["a", "b", "c"]
    assert selector.choose([], session) is None


def test_a_pool_is_made_of_a_pool_a_server_or_an_endpoint() -> None:
    """A pool as it is, a server, an endpoint; nothing else."""
    endpoint = FakeEndpoint()
    upstream = Upstream(endpoint, "db:5432")
    pool = Pool([upstream])
    assert Pool.of(pool) is pool
    assert list(Pool.of(upstream).upstreams) == [upstream]
    [made] = Pool.of(endpoint).upstreams
    assert (made.endpoint, made.name) == (endpoint, "FakeEndpoint")
    wrong: Any = ("127.0.0.1", 80)
    with pytest.raises(TypeError, match=r"not \('127.0.0.1', 80\)"):
        Pool.of(wrong)


def test_a_pool_keeps_the_operators_order() -> None:
    """The first of them is the first to be chosen."""
    pool = Pool([Upstream(FakeEndpoint(), name) for name in ("b:1", "a:1", "c:1")])
    assert pool.names == "b:1, a:1, c:1"
    assert [pool.choose(a_session(ordinal=i)).name for i in (0, 1, 2, 3)] == [
        "b:1",
        "a:1",
        "c:1",
        "b:1",
    ]


class Chooses:
    """A selector that always says the same."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def choose(self, candidates: Any, session: Session) -> Any:
        self.asked = (candidates, session)
        return self.answer


def test_a_pool_uses_its_selector() -> None:
    """None is a refusal; what is no upstream is the selector's mistake."""
    server = Upstream(FakeEndpoint(), "a:1")
    session = a_session()
    selector: Any = Chooses(server)
    assert Pool([server], selector).choose(session) is server
    assert selector.asked == ((server,), session)
    nobody: Any = Chooses(None)
    assert Pool([server], nobody).choose(session) is None
    assert Pool([]).choose(session) is None
    wrong: Any = Chooses("a:1")
    with pytest.raises(TypeError, match="chose 'a:1', which is not an Upstream"):
        Pool([server], wrong).choose(session)


def test_a_subclass_of_round_robin_is_called_for_one_server_too() -> None:
    """In a subclass, or on the object as it is made."""

    class Own(RoundRobin):
        def choose(self, candidates: Any, session: Session) -> Any:
            return None

    placed = RoundRobin()
    placed.choose = lambda candidates, session: None  # type: ignore[method-assign]
    server = Upstream(FakeEndpoint(), "a:1")
    session = a_session()
    for selector in (Own(), placed):
        assert Pool([server], selector).choose(session) is None
    assert Pool([server], RoundRobin()).choose(session) is server
