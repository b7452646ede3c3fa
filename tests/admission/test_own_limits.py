"""What limits single sessions: a table of keys, and what is made for one of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from relayd.admission.bandwidth import Bandwidth
from relayd.admission.own_limits import OwnLimits
from relayd.admission.rates import Rates
from relayd.core.errors import Refused
from relayd.core.interfaces import ILease
from relayd.core.session import Ending, PacedDirection, Session
from tests.admission.test_bandwidth import Record


@pytest.fixture
def own() -> OwnLimits:
    return OwnLimits(Clock())


def test_so_many_sessions_of_a_key(own: OwnLimits) -> None:
    first, _ = own.enter("a", 2), own.enter("a", 2)
    with pytest.raises(Refused) as refused:
        own.enter("a", 2)
    assert refused.value.why == "the limit of sessions of 'a' is reached: 2"
    other = own.enter("b", 1)
    first.release()
    # Another number may be said of the same key.
    with pytest.raises(Refused):
        own.enter("a", 1)
    own.enter("a", 2)
    assert own.counts == {"a": 2, "b": 1}
    other.release()
    assert own.counts == {"a": 2}


def test_a_place_is_given_back_once(own: OwnLimits) -> None:
    first, second = own.enter("a", 2), own.enter("a", 2)
    first.release()
    first.release()
    assert own.counts == {"a": 1}
    second.release()
    assert own.counts == {}


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("ab"), st.integers(1, 3))))
def test_the_table_is_of_those_that_live(steps: list[tuple[bool, str, int]]) -> None:
    own, living = OwnLimits(Clock()), list[tuple[str, ILease]]()
    for comes, key, number in steps:
        if comes:
            count = sum(each == key for each, _ in living)
            try:
                living.append((key, own.enter(key, number)))
                assert count < number
            except Refused:
                assert count >= number
        elif living:
            living.pop(number % len(living))[1].release()
        keys = [each for each, _ in living]
        assert own.counts == {each: keys.count(each) for each in set(keys)}


def test_a_long_key_is_not_quoted_whole(own: OwnLimits) -> None:
    own.enter("a" * 1000, 1)
    with pytest.raises(Refused, match="sessions of 'a{60}\\.\\.\\.' is"):
        own.enter("a" * 1000, 1)


def test_what_can_not_be(own: OwnLimits) -> None:
    with pytest.raises(ValueError, match="is at least 1: 0"):
        own.enter("a", 0)
    with pytest.raises(ValueError, match="must not be negative"):
        own.lifetime(-1)
    assert own.counts == {}


def test_a_lifetime() -> None:
    over = OwnLimits(Clock()).lifetime(100).over
    one = Session(1, "192.0.2.1:1000", "192.0.2.2:80", 0.0)
    one.connected_at = 50.0
    assert over(one, 139) is None
    assert over(one, 150) == (Ending.MAX_AGE, "the route's max_age 100")


def buckets_of(direction: PacedDirection) -> list[float]:
    pace = direction.pace
    return [] if pace is None else [each.rate for each in pace._buckets]


def test_its_buckets_are_narrower_than_those_that_it_shares() -> None:
    """They come first, and only where there is a rate."""
    bandwidth = Bandwidth(Rates(up=1e6), Rates(up=1e5), Rates(up=1e4), clock=Clock())
    one = Record()
    limits = bandwidth.enter(one)
    limits.add(one, Rates(up=500, down=600))
    limits.add(one, Rates(up=5))
    assert buckets_of(one.up) == [5, 500, 1e4, 1e5, 1e6]
    assert buckets_of(one.down) == [600]
    limits.release()
    limits.release()
    assert buckets_of(one.up) == buckets_of(one.down) == []
    assert bandwidth.clients == 0
    # It is over: nothing is added any more.
    limits.add(one, Rates(up=5))
    assert buckets_of(one.up) == []


def test_nothing_else_is_limited(own: OwnLimits) -> None:
    one, other = Record(), Record()
    own.bandwidth.enter(one).add(one, Rates(down=600))
    own.bandwidth.enter(other)
    assert one.up.pace is other.up.pace is other.down.pace is None
    assert buckets_of(one.down) == [600]
    assert own.bandwidth is own.bandwidth
