"""What a server takes over from the same one of the pool before."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from relayd.core.session import Ending
from relayd.net.upstream import Upstream
from relayd.upstreams.balance import LeastSessions
from relayd.upstreams.judging import Schedule, Verdict, Watched
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server
from tests.support.fakes import FakeEndpoint
from tests.upstreams.test_names import ONE, TWO, Followed


def server(name: str, **settings: Any) -> Server:
    return Server(SimpleNamespace(), name, **settings)  # type: ignore[arg-type]


def pools(count: int, **settings: Any) -> Iterator[Pool]:
    """Each takes the place of the one before."""
    before = None
    for _ in range(count):
        servers = [server(name, **settings) for name in ("a", "b")]
        pool = Pool(servers, LeastSessions())
        if before is not None:
            pool.succeed(before)
        yield pool
        before = pool


def choice(pool: Pool) -> str:
    found: Any = pool.choose(SimpleNamespace(ordinal=0, client="c"))
    return str(found.name)


def test_the_one_with_the_fewest_sessions_of_all_generations_is_chosen() -> None:
    going = pools(3)
    a, _ = next(going).servers
    for _ in range(2):
        a.began()
    _, b = next(going).servers
    b.began()
    third = next(going)
    assert [each.sessions for each in third.servers] == [2, 1]
    assert choice(third) == "b"
    # Dialled again, by what it has begun with: the new one hears of it later.
    a.began()
    a.closed()
    assert [each.sessions for each in third.servers] == [2, 1]
    for _ in range(2):
        a.closed()
    assert [each.sessions for each in third.servers] == [0, 1]
    assert choice(third) == "a"


def test_one_that_is_full_has_room_when_an_older_session_is_over() -> None:
    going = pools(3, max_sessions=1)
    first = next(going)
    a, b = first.servers
    for each in (a, b):
        each.began()
    next(going)
    third = next(going)
    assert third.choose(SimpleNamespace(ordinal=0)) is None
    b.closed()
    assert choice(third) == "b"


@given(
    st.lists(
        st.one_of(
            st.just("change"),
            st.tuples(st.just("begin"), st.integers(0, 9)),
            st.tuples(st.just("end"), st.integers(0, 9)),
        ),
        max_size=40,
    )
)
def test_sessions_are_counted_once_whatever_happens(steps: list[Any]) -> None:
    """The last pool has the sessions of all."""
    going = pools(50)
    generations = [next(going).servers[0]]
    living: list[Server] = []
    for step in steps:
        if step == "change":
            generations.append(next(going).servers[0])
        elif step[0] == "begin":
            # Old ones get none: but a session of theirs may be dialled again.
            one = generations[-1]
            one.began()
            living.append(one)
        elif living:
            living.pop(step[1] % len(living)).closed()
        last = generations[-1]
        assert last.sessions == len(living)
        own = living.count(last)
        assert sum(last.inherited.values()) == len(living) - own
        assert set(last.inherited) == set(living) - {last}


def test_what_checks_have_found_is_known_if_there_are_checks() -> None:
    before, checked, unchecked = (server("a") for _ in range(3))
    for each in (before, checked):
        each.has_checks = True
    before.noted(1.0, False, "no answer")
    before.checked(False, "no answer")
    known = Pool([checked])
    known.succeed(Pool([before]))
    assert (checked.state, checked.reason) == ("down", "no answer")
    Pool([unchecked]).succeed(known)
    assert (unchecked.state, unchecked.reason) == ("up", "")


def test_a_change_does_not_hurry_its_checks() -> None:
    """As many as ever take it down, and bring it back."""
    before, now = server("a"), server("a")
    before.has_checks = now.has_checks = True
    before.noted(1.0, True, "ok")
    # It is watched before it takes the place of the other.
    watched = Watched(now, lambda: None, Schedule(rise=2, fall=3), 1)
    pool = Pool([now])
    pool.succeed(Pool([before]))
    states = []
    for up in (False, False, False, True, True):
        watched.judge(Verdict(up, "so"))
        states.append(now.state)
    assert states == ["up", "up", "down", "down", "up"]
    after = server("a")
    after.has_checks = True
    now.noted(1.0, False, "so")
    now.checked(False, "so")
    watched = Watched(after, lambda: None, Schedule(rise=2, fall=3), 1)
    Pool([after]).succeed(pool)
    watched.judge(Verdict(True, "so"))
    assert after.state == "down"
    watched.judge(Verdict(True, "so"))
    assert after.state == "up"


def test_the_operators_word_stays() -> None:
    before, now = server("a"), server("a")
    before.operate("drain")
    before.operate_weight(7)
    Pool([now]).succeed(Pool([before]))
    assert (now.state, now.weight) == ("drain", 7)


def _followed() -> Followed:
    made = Followed()
    made.pool.tasks.append(made.follower)
    return made


def test_names_that_were_found_are_there_at_once() -> None:
    """And looked up again; sessions with them count."""
    old, new = _followed(), _followed()
    old.follower.start()
    old.answer(ONE, TWO)
    one = old.pool.servers[1]
    one.began()
    new.pool.succeed(old.pool)
    assert new.names == ["fixed", "10.0.0.1", "10.0.0.2"]
    assert new.pool.pending == 0
    assert new.pool.servers[1].sessions == 1
    new.follower.start()
    assert len(new.asked) == 1
    new.answer(TWO)
    assert new.names == ["fixed", "10.0.0.2"]
    one.closed()
    assert one.on_over is None
    old.stop()
    new.stop()


def test_names_that_are_found_later() -> None:
    """They take the places of those of before, whose sessions count."""
    old, new = _followed(), _followed()
    old.follower.start()
    old.answer(ONE)
    old.pool.servers[1].began()
    # Of the new pool, the name is another: it does not begin with what is known.
    new.follower.name = "dns:other:80"
    new.pool.succeed(old.pool)
    assert new.names == ["fixed"]
    new.follower.start()
    new.answer(ONE)
    assert new.pool.servers[1].sessions == 1
    old.pool.servers[1].closed()
    assert new.pool.servers[1].sessions == 0
    old.stop()
    new.stop()


# -- the sessions of a pool that another has succeeded


class Judge:
    """Hears what becomes of sessions."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *said: self.heard.append((name, *said))


def test_whoever_chooses_still_gets_a_server_of_the_last_pool() -> None:
    """Which is full, is known there; and which are up."""
    going = pools(3, max_sessions=1)
    first, second, third = going
    assert first.latest is second.latest is third.latest is third
    found = first.choose(SimpleNamespace(ordinal=0, client="c"))
    assert found in third.servers
    found.began()
    for other in (first, second, third):
        assert choice(other) != found.name
    [left] = [each for each in third.servers if each is not found]
    left.operate("down")
    assert first.choose(SimpleNamespace(ordinal=0)) is None


def test_the_only_server_of_a_pool_is_followed_as_well() -> None:
    before, now = Pool([Upstream(FakeEndpoint(), "a")]), Pool([server("b")])
    assert choice(before) == "a"
    now.succeed(before)
    assert choice(before) == "b"


def test_a_server_that_was_tried_has_been_tried_in_the_pools_that_follow() -> None:
    first, second = pools(2)
    a, b = first.servers
    session = SimpleNamespace(ordinal=0, client="c")
    assert first.choose(session, [a]) is second.servers[1]
    assert first.choose(session, [second.servers[0]]) is second.servers[1]
    assert first.choose(session, [second.servers[0], b]) is None
    # One that is none of its servers any more hides nobody.
    assert first.choose(session, [server("c")]) in second.servers


def test_who_follows_a_pool_hears_of_the_servers_of_the_next_the_oldest_first() -> None:
    going = pools(3)
    first = next(going)
    heard: list[Any] = []
    first.followers.append(lambda each: heard.append(("first", each)))
    second = next(going)
    second.followers.append(lambda each: heard.append(("second", each)))
    third = next(going)
    heard.clear()
    [one, _] = third.servers
    one.operate("down")
    assert heard == [("first", one), ("second", one)]
    assert not first.followers
    assert not second.followers


def test_what_becomes_of_older_sessions_is_judged_by_the_last_pool() -> None:
    going = pools(3)
    first = next(going)
    a = first.servers[0]
    old = a.passive = Judge()
    for _ in range(4):
        a.began()
    next(going)
    now = next(going).servers[0]
    judge = now.passive = Judge()
    a.failed(Ending.CONNECT_REFUSED, "refused")
    a.reset("reset", True)
    a.cancelled()
    now.doubted = a.doubted = True
    a.closed()
    assert judge.heard == [
        ("failed", now, "refused"),
        ("reset", now, "reset", True),
        ("served", now),
    ]
    assert (now.fails, now.doubted, now.sessions) == (2, False, 0)
    assert not old.heard


def test_an_older_session_ends_no_trial() -> None:
    first, second = pools(2)
    del second
    a = first.servers[0]
    a.began()
    third = Pool([server("a")])
    third.succeed(first)
    [now] = third.servers
    judge = now.passive = Judge()
    now.ejected = True
    a.failed(Ending.CONNECT_REFUSED, "refused")
    assert (now.fails, now.ejected, judge.heard) == (1, True, [])
