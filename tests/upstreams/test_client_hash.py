"""The same server for the same client, and who moves when servers come and go."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.upstreams import client_hash, rendezvous
from relayd.upstreams.balance import RoundRobin
from relayd.upstreams.client_hash import ClientHash
from relayd.upstreams.pool import Pool
from relayd.upstreams.rendezvous import SLOTS, Members, tables
from relayd.upstreams.server import Server
from tests.support.shares import is_by_chance


def server(name: str, weight: int = 1) -> Server:
    return Server(SimpleNamespace(), name, weight=weight)  # type: ignore[arg-type]


def servers(*weights: int) -> tuple[Server, ...]:
    return tuple(server(f"10.0.0.{n}:80", weight) for n, weight in enumerate(weights))


def of(client: str, ordinal: int = 0) -> Any:
    return SimpleNamespace(client=client, ordinal=ordinal)


#: Those that are looked at: as many as any, and a fourth of the time.
SOME = range(0, SLOTS, 4)


def owners(candidates: tuple[Server, ...]) -> list[Server]:
    """The servers of slots."""
    members = Members(candidates, {})
    return [members.owner(slot) for slot in SOME]


class Slots(ClientHash):
    """Asked for slots, which the session is."""

    def slot_of(self, session: Any) -> int:
        return int(session)


# -- clients


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("192.0.2.1:1", "192.0.2.1:65535"),
        ("192.0.2.1:1", "[::ffff:192.0.2.1]:1"),
        ("[2001:db8::1]:1", "[2001:db8::ffff:ffff:ffff:1]:2"),
        ("[fe80::1%eth0]:1", "[fe80::1]:1"),
    ],
)
def test_what_is_one_client(one: str, other: str) -> None:
    selector = ClientHash()
    assert selector.slot_of(of(one)) == selector.slot_of(of(other))


def test_clients_are_told_apart_by_their_prefixes() -> None:
    ipv4 = [f"192.0.2.{n}:1" for n in range(100)]
    ipv6 = [f"[2001:db8:0:{n}::1]:1" for n in range(100)]
    slots = {ClientHash().slot_of(of(client)) for client in ipv4 + ipv6}
    assert len(slots) > 195
    for wide, clients in ((ClientHash(ipv4=24), ipv4), (ClientHash(ipv6=48), ipv6)):
        assert len({wide.slot_of(of(client)) for client in clients}) == 1
        assert len({ClientHash().slot_of(of(client)) for client in clients}) > 95


@pytest.mark.parametrize("prefixes", [(0, 64), (33, 64), (32, 0), (32, 129)])
def test_prefixes_that_there_are_not(prefixes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="prefixes are 1 to 32 and 1 to 128"):
        ClientHash(*prefixes)


def test_every_start_and_every_machine_agree() -> None:
    """The figures are part of what a new version must not change."""
    selector, candidates = ClientHash(), servers(1, 2, 3)
    clients = ["192.0.2.1:1", "198.51.100.7:1", "[2001:db8::1]:1", "somewhere:1"]
    assert [selector.slot_of(of(client)) for client in clients] == SLOTS_OF_CLIENTS
    found = [selector.choose(candidates, of(client)) for client in clients]
    assert [each.name for each in found] == SERVERS_OF_CLIENTS  # type: ignore[union-attr]


#: As they were first.
SLOTS_OF_CLIENTS = [43904, 33939, 56841, 5096]
SERVERS_OF_CLIENTS = ["10.0.0.2:80", "10.0.0.0:80", "10.0.0.2:80", "10.0.0.2:80"]


def test_clients_without_an_address_have_turns() -> None:
    candidates = servers(1, 1, 2)
    selector = ClientHash()
    shares = Counter(
        selector.choose(candidates, of("unix:", n)).name  # type: ignore[union-attr]
        for n in range(4000)
    )
    assert [shares[each.name] for each in candidates] == pytest.approx(
        [1000, 1000, 2000], rel=0.1
    )


@given(st.text(max_size=50))
def test_any_name_of_a_client_has_a_slot(client: str) -> None:
    assert 0 <= ClientHash().slot_of(of(client)) < SLOTS


# -- shares


@pytest.mark.parametrize(
    "weights",
    [(1, 1), (1,) * 10, (3, 1), (5, 1, 1, 3), (256, 16, 1)],
    ids=["two", "ten", "3 to 1", "of four", "far apart"],
)
def test_slots_are_shared_by_weight(weights: tuple[int, ...]) -> None:
    candidates = servers(*weights)
    shares = Counter(each.name for each in owners(candidates))
    assert is_by_chance(
        [shares[each.name] for each in candidates],
        [len(SOME) * weight / sum(weights) for weight in weights],
    )


def test_shares_are_even_whatever_the_names() -> None:
    """Of many pools of two servers, none is far from even: the spread is chance's."""
    numbers = random.Random(19)
    for _ in range(50):
        pair = server(f"db{numbers.random()}"), server(f"db{numbers.random()}")
        members = Members(pair, {})
        slots = numbers.sample(range(SLOTS), 1000)
        share = sum(members.owner(slot) is pair[0] for slot in slots)
        assert abs(share - 500) < 4.5 * (1000 / 4) ** 0.5


def test_clients_are_shared_by_weight() -> None:
    """Clients of one network, as many as may be behind a balancer."""
    candidates = servers(2, 1, 1)
    selector = ClientHash()
    shares = Counter(
        selector.choose(candidates, of(f"10.1.{n >> 8}.{n & 255}:1")).name  # type: ignore[union-attr]
        for n in range(20_000)
    )
    counts = [shares[each.name] for each in candidates]
    assert is_by_chance(counts, [10_000, 5000, 5000])


# -- who moves


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (3, 1, 2, 1)])
def test_a_server_that_goes_moves_its_own_clients_only(
    weights: tuple[int, ...],
) -> None:
    """They are shared by all that stay, by weight; the same one returns to its own."""
    candidates = servers(*weights)
    before, gone = owners(candidates), candidates[0]
    after = owners(candidates[1:])
    moved = [new for old, new in zip(before, after, strict=True) if old is not new]
    assert len(moved) == before.count(gone)
    assert all(
        old is gone for old, new in zip(before, after, strict=True) if old is not new
    )
    rest = sum(weights[1:])
    assert is_by_chance(
        [moved.count(each) for each in candidates[1:]],
        [len(moved) * weight / rest for weight in weights[1:]],
    )


@pytest.mark.parametrize("count", [1, 4, 9])
def test_a_server_that_comes_moves_its_share_and_nothing_else(count: int) -> None:
    """1/N of all slots, from all the others alike."""
    candidates = servers(*[1] * (count + 1))
    new = candidates[-1]
    before, after = owners(candidates[:-1]), owners(candidates)
    pairs = list(zip(before, after, strict=True))
    moved = [old for old, now in pairs if old is not now]
    assert all(now is new for old, now in pairs if old is not now)
    share = len(SOME) / (count + 1)
    assert is_by_chance(
        [len(moved), len(SOME) - len(moved)], [share, len(SOME) - share]
    )
    if count > 1:
        losses = [moved.count(each) for each in candidates[:-1]]
        assert is_by_chance(losses, [len(moved) / count] * count)


def test_a_weight_that_grows_takes_and_gives_nothing() -> None:
    one, two, three = servers(1, 1, 1)
    before = owners((one, two, three))
    three.weight = 2
    after = owners((one, two, three))
    changed = [now for old, now in zip(before, after, strict=True) if old is not now]
    assert set(changed) == {three}
    # From a third to a half.
    assert len(changed) == pytest.approx(len(SOME) / 6, rel=0.05)


def test_the_order_of_servers_is_no_matter() -> None:
    candidates = servers(*[1] * 20)
    mixed = random.Random(1).sample(candidates, len(candidates))
    one, other = Members(candidates, {}), Members(tuple(mixed), {})
    assert all(one.owner(slot) is other.owner(slot) for slot in range(0, SLOTS, 9))


def test_servers_of_one_name_are_two() -> None:
    candidates = server("web"), server("web")
    shares = Counter(id(each) for each in owners(candidates))
    assert len(shares) == 2
    assert is_by_chance(list(shares.values()), [len(SOME) / 2, len(SOME) / 2])


# -- many servers


def many(count: int, *weights: int) -> tuple[Server, ...]:
    return servers(*[weights[n % len(weights)] for n in range(count)])


def test_the_table_finds_what_asking_everybody_would() -> None:
    """While it is filled, when it is full, and after servers have come and gone."""
    numbers = random.Random(19)
    everyone = list(many(200, 1, 2, 5))
    selector = Slots()
    for _ in range(3):
        candidates = tuple(numbers.sample(everyone, 150))
        members = Members(candidates, {})
        for slot in numbers.sample(range(SLOTS), 400):
            assert selector.choose(candidates, slot) is members.owner(slot)
        numbers.choice(everyone).weight = numbers.randint(1, 9)
        everyone += [server(f"new{numbers.random()}", 3)]
    assert not selector._lacking
    assert selector._near is not None


def test_equal_scores_are_found_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """As scores have so few values that most slots have several least ones."""
    whole = tables()
    scores = array("d", [each // 0.01 * 0.01 for each in whole.scores])
    coarse = whole._replace(scores=scores)
    for module in (client_hash, rendezvous):
        monkeypatch.setattr(module, "tables", lambda: coarse)
    candidates = many(100, 1)
    selector, members = Slots(), Members(candidates, {})
    mixed = Members(candidates[::-1], {})
    counts: Counter[Any] = Counter()
    for slot in range(0, SLOTS, 64):
        found = selector.choose(candidates, slot)
        assert found is members.owner(slot) is mixed.owner(slot)
        counts[found] += 1
    # Nobody gains by it.
    assert is_by_chance([counts[each] for each in candidates], [10.24] * 100)


def test_the_table_is_bounded_while_names_move() -> None:
    """New servers all the time, as of a name with answers that are never the same."""
    selector = Slots()
    most = client_hash.NEAR * SLOTS * 4 * 1.01
    for turn in range(6):
        candidates = tuple(server(f"{turn}.{n}") for n in range(60))
        for slot in range(70):
            selector.choose(candidates, slot)
        near: Any = selector._near
        assert len(near.entries) == len(near.nexts) <= most
        assert len(selector._orders) == 60
        assert len(selector._present) <= 60 * 4
    few = candidates[:10]
    assert {selector.choose(few, 1) for _ in range(2)} == {Members(few, {}).owner(1)}
    assert selector._near is None


def test_a_server_that_grows_slowly_has_its_part_of_a_large_pool() -> None:
    candidates = many(100, 1)
    candidates[0].share = 0.1
    selector = Slots()
    for share in (0.1, 0.5, 1.0):
        candidates[0].share = share
        again = tuple(candidates)[:50] + tuple(candidates)[50:]
        members = Members(again, {})
        for slot in range(0, SLOTS, 331):
            assert selector.choose(again, slot) is members.owner(slot)


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=9),
    st.lists(st.integers(0, SLOTS - 1), min_size=3),
)
def test_what_is_left_for_a_retry_is_not_taken_for_the_pool(
    weights: list[int], slots: list[int]
) -> None:
    """It is found all the same, and what is known of the others stays."""
    selector, before = Slots(), servers(1, 2)
    selector.choose(before, 1)
    candidates = servers(*weights)
    for slot in slots:
        first: Any = selector.choose(candidates, slot)
        assert first is Members(candidates, {}).owner(slot)
        rest = tuple(each for each in candidates if each is not first)
        assert selector.choose(rest, slot) is Members(rest, {}).owner(slot)
    assert selector._known is candidates


@pytest.mark.cost
def test_few_are_asked_for_their_scores_of_a_thousand() -> None:
    """Once the table is filled: of each hundred slots, all servers for one at most."""
    candidates, selector = many(1000, 1), Slots()
    asked = 0

    class Counts(Members):
        def owner(self, slot: int, among: Any = None) -> Any:
            nonlocal asked
            asked += 1
            return Members.owner(self, slot, among)

    for slot in range(300):
        selector.choose(candidates, slot)
    assert not selector._lacking
    selector._members = Counts(candidates, {})
    for slot in range(300, 3300):
        selector.choose(candidates, slot)
    assert asked <= 30


@pytest.mark.parametrize("count", [3, 200])
def test_a_pool_that_is_prepared_chooses_the_same(count: int) -> None:
    """And its first client does not wait for the table."""
    candidates = many(count, 1)
    selector = Slots()
    pool = Pool(candidates, selector)
    pool.prepare()
    assert not selector._lacking
    near, members = selector._near, Members(candidates, {})
    assert (near is None) is (count == 3)
    entries = len(near.entries) if near is not None else 0
    for slot in range(0, SLOTS, 997):
        assert pool.choose(slot) is members.owner(slot)
    assert selector._near is near
    assert entries == (len(near.entries) if near is not None else 0)


def test_a_pool_of_nobody_has_nothing_to_prepare() -> None:
    for selector in (Slots(), RoundRobin()):
        pool = Pool([], selector)
        pool.prepare()
        assert pool.choose(1) is None
