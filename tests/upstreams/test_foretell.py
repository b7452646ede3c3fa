"""A selector foretells what it chooses next, and nobody has had a turn by that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from relayd.upstreams.client_hash import ClientHash
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server
from tests.support.shares import SELECTORS

FORETOLD = [name for name in SELECTORS if name != "random"]

SERVERS = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from([None, 1, 2])), min_size=1, max_size=6
)

#: A session comes (and stays or goes), a server goes down or comes up, or nothing.
EVENTS = st.lists(
    st.tuples(st.sampled_from(["come", "stay", "turn"]), st.integers(0, 5)), max_size=40
)


def pool_of(name: str, said: list[tuple[int, int | None]]) -> Pool:
    """Servers of these weights and limits."""
    nowhere: Any = SimpleNamespace()
    servers = [
        Server(nowhere, f"s{n}", weight=weight, max_sessions=limit)
        for n, (weight, limit) in enumerate(said)
    ]
    return Pool(servers, SELECTORS[name]())


def asked(number: int) -> Any:
    return SimpleNamespace(client=f"10.0.{number}.7:1", ordinal=number)


@given(st.sampled_from(FORETOLD), SERVERS, EVENTS)
def test_what_is_foretold_is_chosen(
    name: str, said: list[tuple[int, int | None]], events: list[tuple[str, int]]
) -> None:
    """Against a twin that nobody asks what it would choose."""
    pool, twin = pool_of(name, said), pool_of(name, said)
    for number, (event, which) in enumerate(events):
        if event == "turn":
            for each in (pool, twin):
                server = each.servers[which % len(said)]
                server.checked(up=not server.checked_up, why="so")
            continue
        foretold = [pool.foretell(asked(number)) for _ in range(2)]
        chosen, same = pool.choose(asked(number)), twin.choose(asked(number))
        assert foretold == [chosen, chosen]
        assert (chosen and chosen.name) == (same and same.name)
        for server in (chosen, same):
            if isinstance(server, Server):
                server.began()
                if event == "come":
                    server.closed()


def test_chance_is_not_foretold() -> None:
    pool = pool_of("random", [(1, None), (1, None)])
    assert pool.foretell(asked(0)) is None
    assert len(pool.candidates) == 2
    alone = pool_of("random", [(1, None), (0, None)])
    assert alone.foretell(asked(0)) is alone.upstreams[0]


def test_many_servers_by_client_hash() -> None:
    """More than are asked one by one; a server that has left is in the table still."""
    nowhere: Any = SimpleNamespace()
    servers = [Server(nowhere, f"s{n}", weight=1 + n % 3) for n in range(80)]
    pool = Pool(servers, ClientHash())
    for number in range(60):
        if number % 20 == 19:
            servers[number].checked(up=False, why="so")
        assert pool.foretell(asked(number)) is pool.choose(asked(number))


def test_a_selector_of_ones_own_does_not_foretell() -> None:
    class Last:
        def choose(self, candidates: Any, session: Any) -> Any:
            return candidates[-1]

    nowhere: Any = SimpleNamespace()
    selector: Any = Last()
    pool = Pool([Server(nowhere, "a"), Server(nowhere, "b")], selector)
    assert pool.foretell(asked(0)) is None
