"""Which server a session gets: the selectors' shares, exactly or by chi-squared."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zope.interface.verify import verifyObject

from relayd.core.interfaces import ISelector
from relayd.upstreams.balance import (
    First,
    LeastSessions,
    OwnTurns,
    RandomOfTwo,
    RoundRobin,
)
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server
from tests.support.shares import SELECTORS, OfMany, OfSome, is_by_chance

WEIGHTS = st.lists(st.integers(1, 30) | st.just(256), min_size=1, max_size=6)


def servers(*weights: int, **settings: Any) -> tuple[Server, ...]:
    """Servers s0, s1 and so on."""
    return tuple(
        Server(SimpleNamespace(), f"s{n}", weight=weight, **settings)  # type: ignore[arg-type]
        for n, weight in enumerate(weights)
    )


def asked(ordinal: int = 0) -> Any:
    return SimpleNamespace(ordinal=ordinal, client=f"10.0.{ordinal >> 8}.{ordinal}:1")


def chosen(selector: Any, candidates: Any, count: int) -> list[str]:
    """The names of those that so many sessions get, each over before the next."""
    names = []
    for ordinal in range(count):
        server = selector.choose(candidates, asked(ordinal))
        server.began()
        server.closed()
        names.append(server.name)
    return names


@pytest.mark.parametrize("name", SELECTORS)
def test_what_all_selectors_do(name: str) -> None:
    selector = SELECTORS[name]()
    assert verifyObject(ISelector, selector)
    assert selector.choose((), asked()) is None
    [one] = alone = servers(3)
    assert selector.choose(alone, asked()) is one
    # Others, as after a change: none of those before is chosen.
    for others in (servers(1, 2), servers(2, 2, 2), list(servers(1, 5))):
        assert all(selector.choose(others, asked(n)) in others for n in range(20))
    assert selector.choose((), asked()) is None


@pytest.mark.parametrize("name", SELECTORS)
def test_a_list_may_change_between_two_choices(name: str) -> None:
    selector = SELECTORS[name]()
    candidates = list(servers(1, 2))
    for _ in range(3):
        selector.choose(candidates, asked())
    candidates[:] = servers(4, 1, 1)
    assert all(selector.choose(candidates, asked(n)) in candidates for n in range(9))


# -- round robin


@given(WEIGHTS)
def test_weighted_turns_are_exact(weights: list[int]) -> None:
    """In each row of as many choices as the weights' sum, each has its weight."""
    candidates, total = servers(*weights), sum(weights)
    selector = RoundRobin()
    for _ in range(2):
        shares = Counter(
            selector.choose(candidates, asked(n)).name  # type: ignore[union-attr]
            for n in range(total)
        )
        assert [shares[each.name] for each in candidates] == weights


@given(WEIGHTS)
def test_weighted_turns_are_smooth(weights: list[int]) -> None:
    """At no time does a server have much more, or less, than its share so far."""
    candidates, total = servers(*weights), sum(weights)
    names = [each.name for each in candidates]
    counts: Counter[str] = Counter()
    for done, name in enumerate(chosen(RoundRobin(), candidates, total), 1):
        counts[name] += 1
        for each, weight in zip(names, weights, strict=True):
            if len(set(weights)) > 1:
                much = 1 + len(weights) * weight / total
                assert abs(counts[each] - done * weight / total) <= much


def test_turns_of_unequal_weights_are_spread() -> None:
    candidates = servers(5, 1, 1)
    names = chosen(RoundRobin(), candidates, 14)
    assert names == ["s0", "s1", "s0", "s0", "s0", "s2", "s0"] * 2
    # One that weighs as much as all others has one of each two turns, not 50 in a row.
    heavy = chosen(RoundRobin(), servers(50, *[1] * 50), 100)
    assert all(heavy[n : n + 2].count("s0") == 1 for n in range(0, 100, 2))


def test_turns_stay_fair_while_servers_come_and_go() -> None:
    """Each choice is among others, as when a third server is full now and then."""
    one, two, third = servers(1, 2, 5)
    selector, counts = RoundRobin(), Counter[str]()
    for n in range(300):
        among = (one, two) if n % 2 else (one, two, third)
        counts[selector.choose(among, asked(n)).name] += 1  # type: ignore[union-attr]
    assert counts["s1"] == pytest.approx(2 * counts["s0"], abs=2)
    # It has no more than its weight would give it.
    assert counts["s2"] <= 5 * counts["s0"] + 5


def test_a_server_that_grows_slowly_has_a_part_of_its_share() -> None:
    """And all of it from the moment on at which its share is whole."""
    one, two = servers(4, 4)
    two.share = 0.25
    selector = RoundRobin()
    assert Counter(chosen(selector, (one, two), 50)) == {"s0": 40, "s1": 10}
    two.share = 0.75
    assert Counter(chosen(selector, (one, two), 70)) == pytest.approx(
        {"s0": 40, "s1": 30}, abs=1
    )
    two.share = 1.0
    names = chosen(selector, (one, two), 100)
    assert Counter(names) == {"s0": 50, "s1": 50}


def test_a_share_that_grows_brings_the_next_turn_nearer() -> None:
    """It is not as far away as it was with the least weight of all."""
    one, two = servers(256, 256)
    two.share = 1 / 2560
    selector = RoundRobin()
    chosen(selector, (one, two), 100)
    two.share = 0.5
    assert Counter(chosen(selector, (one, two), 30)) == pytest.approx(
        {"s0": 20, "s1": 10}, abs=1
    )


# -- least sessions

LEAST = [LeastSessions, OfMany, OfSome]


@given(
    st.sampled_from(LEAST),
    WEIGHTS.filter(lambda weights: len(weights) > 1),
    st.lists(st.integers(0, 2**16), max_size=200),
)
def test_the_least_loaded_is_chosen(
    kind: type[LeastSessions], weights: list[int], steps: list[int]
) -> None:
    """Whatever begins and ends, and whichever servers there are meanwhile."""
    everyone = servers(*weights)
    selector = kind()
    pool = Pool(everyone, selector)
    under_way: list[Server] = []
    for step in steps:
        if step % 3 == 0 and under_way:
            under_way.pop(step % len(under_way)).closed()
        elif step % 7 == 1:
            out = everyone[step % len(everyone)]
            out.disabled = not out.disabled
            out.changed()
        else:
            server: Any = pool.choose(asked(step))
            usable = [each for each in everyone if each.usable and not each.is_full]
            if not usable:
                assert server is None
                continue
            least = min(each.sessions / each.weight for each in usable)
            assert server.sessions / server.weight == least
            server.began()
            under_way.append(server)
    for server in under_way:
        server.closed()
    assert [each.sessions for each in everyone] == [0] * len(everyone)
    assert len(selector._heap) <= 2 * len(everyone) + 65


@settings(max_examples=60)
@given(st.sampled_from(LEAST), WEIGHTS)
def test_sessions_that_stay_are_shared_by_weight(
    kind: type[LeastSessions], weights: list[int]
) -> None:
    """As many as the weights' sum: each server has as many as its weight says."""
    candidates = servers(*weights)
    pool = Pool(candidates, kind())
    for n in range(sum(weights)):
        pool.choose(asked(n)).began()  # type: ignore[union-attr]
    assert [each.sessions for each in candidates] == weights


@settings(max_examples=60)
@given(st.sampled_from(LEAST), WEIGHTS)
def test_servers_of_equal_load_have_turns(
    kind: type[LeastSessions], weights: list[int]
) -> None:
    """Of sessions one after the other, each has as many as its weight says."""
    candidates = servers(*weights)
    pool, total = Pool(candidates, kind()), sum(weights)
    for _ in range(2):
        shares = Counter(chosen(pool.selector, candidates, total))
        assert [shares[each.name] for each in candidates] == weights


@pytest.mark.parametrize("kind", LEAST)
def test_who_was_passed_over_does_not_get_what_it_missed(
    kind: type[LeastSessions],
) -> None:
    one, two = servers(1, 1)
    pool = Pool([one, two], kind())
    candidates = (one, two)
    assert pool.selector.choose(candidates, asked()) is one
    one.began()
    assert set(chosen(pool.selector, candidates, 50)) == {"s1"}
    one.closed()
    # One turn more than half, and not the next fifty.
    assert Counter(chosen(pool.selector, candidates, 10)) == {"s0": 6, "s1": 4}


def test_what_is_outdated_does_not_pile_up() -> None:
    """While sessions end, and no other one begins."""
    one, two = servers(1, 1)
    one.sessions = 1000
    selector = OfMany()
    pool = Pool([one, two], selector)
    assert pool.choose(asked()) is two
    for _ in range(1000):
        one.closed()
        assert len(selector._heap) < 70
    two.began()
    assert pool.choose(asked()) is one


@pytest.mark.parametrize("kind", LEAST)
def test_other_servers_are_no_concern_of_a_selector(
    kind: type[LeastSessions],
) -> None:
    one, stranger = servers(1, 1)
    selector = kind()
    selector.session_over(stranger)
    assert selector.choose((one,), asked()) is one
    selector.session_over(stranger)
    assert selector.choose((one,), asked()) is one


# -- random


@pytest.mark.parametrize(
    "weights",
    [(1, 1), (1,) * 10, (3, 1), (5, 1, 1), (256, 1, 128, 7)],
    ids=["two", "ten", "3 to 1", "5 to 1 to 1", "far apart"],
)
def test_random_shares_follow_the_weights(weights: tuple[int, ...]) -> None:
    candidates, count = servers(*weights), 20_000
    selector = RandomOfTwo(random.Random(19))
    shares = Counter(chosen(selector, candidates, count))
    total = sum(weights)
    assert is_by_chance(
        [shares[each.name] for each in candidates],
        [count * weight / total for weight in weights],
    )


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (200, 1)])
def test_of_two_servers_the_less_loaded_one_is_chosen(
    weights: tuple[int, int],
) -> None:
    """Both are looked at, always."""
    one, two = candidates = servers(*weights)
    selector = RandomOfTwo(random.Random(1))
    one.sessions = weights[0]
    assert set(chosen(selector, candidates, 100)) == {"s1"}
    two.sessions = 2
    assert set(chosen(selector, candidates, 100)) == {"s0"}


@settings(max_examples=30)
@given(st.sampled_from([(1,) * 50, (1, 2, 3, 4) * 12]), st.integers(0, 2**32))
def test_two_choices_are_nearly_even(weights: tuple[int, ...], seed: int) -> None:
    """No server has much more than its share; one choice would give three times it."""
    candidates = servers(*weights)
    selector = RandomOfTwo(random.Random(seed))
    for n in range(20 * sum(weights)):
        selector.choose(candidates, asked(n)).began()  # type: ignore[union-attr]
    assert max(each.sessions / each.weight for each in candidates) <= 26


def test_each_random_selector_has_its_own_numbers() -> None:
    candidates = servers(*[1] * 100)
    one, two = RandomOfTwo(), RandomOfTwo()
    assert chosen(one, candidates, 20) != chosen(two, candidates, 20)


class Highest(random.Random):
    """Always the highest number that there is, which rounding may make a whole one."""

    def random(self) -> float:
        return 1 - 2**-53


@given(WEIGHTS)
def test_no_number_is_too_high(weights: list[int]) -> None:
    candidates = servers(*weights)
    assert RandomOfTwo(Highest()).choose(candidates, asked()) in candidates


# -- first


def test_the_first_is_filled_up_to_its_limit() -> None:
    one, two, three = servers(1, 1, 1, max_sessions=2)
    pool = Pool([one, two, three], First())
    names = []
    for n in range(6):
        server: Any = pool.choose(asked(n))
        server.began()
        names.append(server.name)
    assert names == ["s0", "s0", "s1", "s1", "s2", "s2"]
    assert pool.choose(asked()) is None
    two.closed()
    assert pool.choose(asked()) is two
    one.closed()
    assert pool.choose(asked()) is one


# -- one of several pools


def test_turns_of_one_of_several_pools() -> None:
    """Every second session is another pool's: its number says nothing here."""
    pool = Pool(servers(1, 1))
    pool.be_one_of_several()
    found = []
    for ordinal in range(0, 12, 2):
        assert pool.foretell(asked(ordinal)) is pool.foretell(asked(ordinal))
        foretold = pool.foretell(asked(ordinal))
        chosen_now = pool.choose(asked(ordinal))
        assert chosen_now is foretold
        found.append(getattr(chosen_now, "name", None))
    assert found == ["s0", "s1"] * 3
    # It stays so, and others that have no numbers to go by are as they are.
    pool.be_one_of_several()
    assert getattr(pool.choose(asked()), "name", None) == "s0"
    least = Pool(servers(1, 1), LeastSessions())
    selector = least.selector
    least.be_one_of_several()
    assert least.selector is selector


def test_those_that_are_full_are_passed_over_there_too() -> None:
    """As it learns of them, and not only as it looks."""
    pool = Pool(servers(1, 1, 1, max_sessions=1))
    pool.be_one_of_several()
    names = []
    for _ in range(3):
        server: Any = pool.choose(asked())
        server.began()
        names.append(server.name)
    assert sorted(names) == ["s0", "s1", "s2"]
    assert pool.choose(asked()) is None
    pool.servers[1].closed()
    assert pool.choose(asked()) is pool.servers[1]


@given(WEIGHTS, st.lists(st.booleans(), max_size=40))
def test_its_shares_are_those_of_a_pool_alone(
    weights: list[int], comes: list[bool]
) -> None:
    """Whichever sessions come to it, in whatever order."""
    alone, own = RoundRobin(), OwnTurns()
    there = servers(*weights)
    ours = [ordinal for ordinal, is_ours in enumerate(comes) if is_ours]
    expected = [alone.choose(there, asked(n)) for n in range(len(ours))]
    assert [own.choose(there, asked(n)) for n in ours] == expected
