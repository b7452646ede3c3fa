"""Servers at their limits: chosen by nobody, found by nobody's search of them all."""

from __future__ import annotations

from collections import Counter
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relayd.upstreams.balance import LeastSessions, RandomOfTwo, RoundRobin
from relayd.upstreams.client_hash import FEW, ClientHash
from relayd.upstreams.pool import Pool
from relayd.upstreams.rendezvous import Members
from relayd.upstreams.server import Server
from relayd.upstreams.turns import Turns, weight_of
from relayd.upstreams.vacancies import Sums, Vacancies
from tests.support.shares import SELECTORS, is_by_chance


def server(name: str, **options: Any) -> Server:
    return Server(SimpleNamespace(), name, **options)  # type: ignore[arg-type]


def asked(ordinal: int) -> Any:
    client = f"10.0.{ordinal >> 8 & 255}.{ordinal & 255}:1"
    return SimpleNamespace(ordinal=ordinal, client=client)


class ByTurns:
    """Goes through all candidates each time: whose turn is due first."""

    def __init__(self, *, least: bool) -> None:
        self._least = least
        self._turns = Turns()
        self._known: Any = None

    def choose(self, everyone: Any, free: Any) -> Any:
        if everyone != self._known:
            self._known = everyone
            self._turns.change(everyone)
        dues = self._turns.dues
        ranked = [
            (each.sessions / weight_of(each) if self._least else 0, dues[n], n)
            for n, each in enumerate(everyone)
            if each in free
        ]
        _, _, index = min(ranked)
        self._turns.take(index)
        return everyone[index]


def expected(name: str, everyone: Any, free: list[Server], slow: Any, n: int) -> Any:
    """Which of the servers of a tier is to be chosen; None: any of those free."""
    if name == "first":
        return free[0]
    if name == "client-hash":
        return Members(free, {}).owner(ClientHash().slot_of(asked(n)))
    if name.startswith("least-sessions") or (
        name == "round-robin" and len({each.weight for each in everyone}) > 1
    ):
        return slow.choose(everyone, free)
    return None


@settings(max_examples=150)
@given(
    st.sampled_from(sorted(SELECTORS)),
    st.lists(
        st.tuples(st.integers(1, 3), st.none() | st.integers(1, 2)),
        min_size=1,
        max_size=7,
    ),
    st.lists(st.integers(0, 999), max_size=80),
)
def test_each_choice_is_what_a_search_of_all_would_find(
    name: str, options: list[tuple[int, int | None]], steps: list[int]
) -> None:
    everyone = tuple(
        server(f"s{n}", weight=weight, max_sessions=most)
        for n, (weight, most) in enumerate(options)
    )
    pool = Pool(everyone, SELECTORS[name]())
    slow, live = ByTurns(least=name.startswith("least-sessions")), list[Server]()
    for n, step in enumerate(steps):
        if live and step % 3 == 0:
            live.pop(step % len(live)).closed()
            continue
        free = [each for each in everyone if not each.is_full]
        chosen: Any = pool.choose(asked(n))
        if not free:
            assert chosen is None
            continue
        assert chosen in free
        assert chosen is (expected(name, everyone, free, slow, n) or chosen)
        chosen.began()
        live.append(chosen)


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(SELECTORS)),
    st.lists(st.tuples(st.integers(0, 2), st.none() | st.integers(1, 2))),
    st.lists(st.integers(0, 999), max_size=60),
    st.booleans(),
)
def test_the_best_tier_that_has_room_is_chosen(
    name: str, options: list[tuple[int, int | None]], steps: list[int], down: bool
) -> None:
    """Whoever is down comes last, where all are tried."""
    everyone = [
        server(f"s{n}", tier=tier, max_sessions=most)
        for n, (tier, most) in enumerate(options)
    ]
    pool = Pool(everyone, SELECTORS[name](), try_all=True)
    if down and everyone:
        everyone[0].checked(False, "no answer")
    live: list[Server] = []
    for n, step in enumerate(steps):
        if live and step % 5 < 2:
            live.pop(step % len(live)).closed()
            continue
        free = [each for each in everyone if not each.is_full]
        chosen: Any = pool.choose(asked(n))
        best = min([(not each.up, each.tier) for each in free], default=None)
        assert best == (chosen and (not chosen.up, chosen.tier))
        if chosen is not None:
            assert not chosen.is_full
            chosen.began()
            live.append(chosen)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often servers were asked whether they may be chosen."""
    counts: Counter[str] = Counter()
    for name in ("usable", "is_full"):
        getter: Any = vars(Server)[name].fget

        def ask(self: Server, name: str = name, getter: Any = getter) -> bool:
            counts[name] += 1
            return bool(getter(self))

        monkeypatch.setattr(Server, name, property(ask))
    return counts


@pytest.mark.parametrize("weights", [(1,), (1, 2, 3)], ids=["even", "weighted"])
@pytest.mark.parametrize("name", sorted({*SELECTORS} - {"client-hash"}))
def test_nobody_goes_through_all_of_them_for_a_session(
    name: str, weights: tuple[int, ...], looks: Counter[str]
) -> None:
    everyone = [
        server(f"s{n}", weight=weights[n % len(weights)], max_sessions=2)
        for n in range(300)
    ]
    pool = Pool(everyone, SELECTORS[name]())
    live: list[Any] = []
    for n in range(600):
        live.append(pool.choose(asked(n)))
        live[-1].began()
    assert pool.choose(asked(0)) is None
    looks.clear()
    chance, rounds = Random(20), 500
    for n in range(rounds):
        live.pop(chance.randrange(len(live))).closed()
        live.append(pool.choose(asked(n)))
        live[-1].began()
        assert pool.choose(asked(n)) is None
    assert looks["usable"] == 0
    assert looks["is_full"] <= 12 * rounds


def test_clients_of_full_servers_have_the_next_one_of_their_slot() -> None:
    """Of many servers, by the table or without it, as few or most of them are full."""
    everyone = [server(f"s{n}", max_sessions=1) for n in range(3 * FEW)]
    selector = ClientHash()
    pool, live = Pool(everyone, selector), list[Server]()
    chance = Random(20)
    for n in range(1500):
        if len(live) > min(n // 8, len(everyone) - 1):
            live.pop(chance.randrange(len(live))).closed()
        free = [each for each in everyone if not each.is_full]
        chosen: Any = pool.choose(asked(n))
        assert chosen is Members(free, {}).owner(selector.slot_of(asked(n)))
        chosen.began()
        live.append(chosen)
    assert selector._near is not None
    assert not selector._lacking


@pytest.mark.parametrize("weights", [(1,) * 6, (1, 2, 3, 4, 5, 6)])
def test_random_shares_among_those_that_have_room(weights: tuple[int, ...]) -> None:
    everyone = [
        server(f"s{n}", weight=weight, max_sessions=5)
        for n, weight in enumerate(weights)
    ]
    pool = Pool(everyone, RandomOfTwo(Random(7)))
    assert pool.choose(asked(0)) is not None
    for each in (everyone[1], everyone[4]):
        for _ in range(5):
            each.began()
    count, shares = 20_000, Counter[str]()
    for n in range(count):
        chosen: Any = pool.choose(asked(n))
        chosen.began()
        chosen.closed()
        shares[chosen.name] += 1
    left = [each for each in everyone if each not in (everyone[1], everyone[4])]
    total = sum(each.weight for each in left)
    assert sum(shares.values()) == sum(shares[each.name] for each in left)
    assert is_by_chance(
        [shares[each.name] for each in left],
        [count * each.weight / total for each in left],
    )


def test_a_selector_that_does_not_know_full_servers_is_not_given_any() -> None:
    class Own(LeastSessions):
        def choose(self, candidates: Any, session: Any) -> Any:
            given.append(candidates)
            return candidates[-1] if candidates else None

    class Alone:
        def choose(self, candidates: Any, session: Any) -> Any:
            given.append(candidates)
            return candidates[-1] if candidates else None

    placed = RoundRobin()
    placed.choose = Alone().choose  # type: ignore[method-assign]
    for selector in (Own(), Alone(), placed):
        given: list[Any] = []
        one, two = server("a", max_sessions=1), server("b", max_sessions=1)
        pool: Any = Pool([one, two], selector)
        for _ in range(2):
            pool.choose(asked(0)).began()
        assert pool.choose(asked(0)) is None
        one.closed()
        assert pool.choose(asked(0)) is one
        assert given == [(one, two), (one,), (), (one,)]


def test_listeners_hear_that_there_is_room_again() -> None:
    """As those do who have clients that wait for a server."""
    heard: list[bool] = []
    one = server("a", max_sessions=1)
    Pool([one]).listeners.append(lambda each: heard.append(each.is_full))
    one.began()
    one.closed()
    assert heard == [True, False]


# -- what it is made of


@given(
    st.lists(st.booleans(), max_size=8),
    st.lists(st.tuples(st.integers(0, 7), st.booleans())),
)
def test_vacancies(full: list[bool], changes: list[tuple[int, bool]]) -> None:
    vacancies = Vacancies([SimpleNamespace(is_full=each) for each in full])
    for place, now in changes:
        if place < len(full):
            full[place] = now
            vacancies.change(place, now)
        there = [n for n, each in enumerate(full) if not each]
        assert sorted(vacancies.free) == there


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=9),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 9)), max_size=5),
)
def test_sums(weights: list[int], changes: list[tuple[int, int]]) -> None:
    sums = Sums(weights)
    for place, weight in changes:
        if place < len(weights):
            weights[place] = weight
            sums.change(place, weight)
    total = sum(weights)
    assert sums.total == total
    found = Counter(sums.find(number)[0] for number in range(total))
    assert found == Counter({n: weight for n, weight in enumerate(weights) if weight})
    # Rounding may make a number as large as the total.
    if total:
        assert weights[sums.find(total)[0]]
    for number in range(total):
        place, within = sums.find(number)
        assert number - within == sum(weights[:place])
