"""A name's servers join and leave its pool as its answers change."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from relayd.net.dns import Answer, Found, LookUpFailed
from relayd.upstreams.names import Follower
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server
from tests.conftest import LoggedFailures

ONE, TWO, THREE = (Found(f"10.0.0.{number}", 80) for number in (1, 2, 3))


class Followed:
    """A name that is followed, on a clock; the test answers for its name server."""

    def __init__(self, every: float | None = None, grace: float = 60.0) -> None:
        self.clock = Clock()
        self.asked: list[Deferred[Answer]] = []
        self.pool = Pool([Server(SimpleNamespace(), "fixed")])  # type: ignore[arg-type]
        self.follower = Follower(
            *("dns:db:80", self.pool, self._look_up, self._make),
            clock=self.clock,
            every=every,
            grace=grace,
            chance=lambda: 0.5,
        )

    def _look_up(self) -> Deferred[Answer]:
        self.asked.append(Deferred())
        return self.asked[-1]

    def _make(self, found: Found) -> Server:
        return Server(SimpleNamespace(), found.address)  # type: ignore[arg-type]

    def answer(self, *found: Found, ttl: float = 30.0, why: str = "") -> None:
        self.asked[-1].callback(Answer(found, ttl, why))

    def fail(self, problem: Exception) -> None:
        self.asked[-1].errback(problem)

    @property
    def names(self) -> list[str]:
        """Those in the pool, and may be chosen."""
        return [each.name for each in self.pool.upstreams if each.usable]

    def stop(self) -> None:
        self.follower.stop()
        assert not self.clock.getDelayedCalls()


def test_servers_join_and_leave_with_the_answers() -> None:
    followed = Followed()
    assert followed.pool.pending == 1
    assert followed.pool.names == "fixed, dns:db:80"
    followed.follower.start()
    followed.follower.start()
    assert len(followed.asked) == 1
    followed.answer(ONE, TWO, ttl=10)
    assert followed.pool.pending == 0
    assert followed.names == ["fixed", "10.0.0.1", "10.0.0.2"]
    stays = followed.pool.servers[2]
    leaves = followed.pool.servers[1]
    followed.clock.advance(9.9)
    assert len(followed.asked) == 1
    followed.clock.advance(0.2)
    followed.answer(TWO, THREE)
    assert followed.names == ["fixed", "10.0.0.3", "10.0.0.2"]
    assert followed.pool.servers[2] is stays
    assert leaves.draining
    followed.stop()


@pytest.mark.parametrize(("ttl", "waits"), [(0, 1), (5, 5), (100_000, 3600)])
def test_an_answer_is_asked_for_again_when_it_holds_no_longer(
    ttl: float, waits: float
) -> None:
    followed = Followed()
    followed.follower.start()
    followed.answer(ONE, ttl=ttl)
    [call] = followed.clock.getDelayedCalls()
    assert call.getTime() == waits
    followed.stop()


def test_an_interval_is_for_every_answer() -> None:
    followed = Followed(every=7)
    followed.follower.start()
    followed.answer(ONE, ttl=1000)
    [call] = followed.clock.getDelayedCalls()
    assert call.getTime() == 7
    followed.stop()


def test_silence_changes_nothing() -> None:
    followed = Followed()
    followed.follower.start()
    followed.answer(ONE, ttl=10)
    followed.clock.advance(10)
    for _ in range(100):
        followed.fail(LookUpFailed("db: the name servers don't answer"))
        followed.clock.advance(5)
    assert followed.names == ["fixed", "10.0.0.1"]
    assert followed.follower.failures == 100
    followed.stop()


def test_where_one_family_is_known_the_servers_of_the_other_stay() -> None:
    """Some name servers fail for AAAA, always: a name has servers all the same."""
    six = Found("2001:db8::1", 80)

    def half(*found: Found) -> LookUpFailed:
        failed = LookUpFailed("db: the name servers have failed")
        failed.half = found
        return failed

    followed = Followed()
    followed.follower.start()
    followed.fail(half(ONE))
    assert followed.pool.pending == 0
    assert followed.names == ["fixed", "10.0.0.1"]
    followed.clock.advance(5)
    followed.answer(ONE, six, ttl=5)
    for found, names in (
        (TWO, ["10.0.0.2", "2001:db8::1"]),
        (THREE, ["10.0.0.3", "2001:db8::1"]),
    ):
        followed.clock.advance(5)
        followed.fail(half(found))
        assert {*followed.names[1:]} == {*names}
    followed.clock.advance(5)
    followed.fail(LookUpFailed("db: the name servers don't answer"))
    assert len(followed.names) == 3
    assert followed.follower.failures == 4
    followed.stop()


@pytest.mark.parametrize("why", ["there is no such name", "it has no address"])
def test_servers_stay_for_the_grace_where_the_name_has_none(why: str) -> None:
    followed = Followed(grace=60)
    followed.follower.start()
    followed.answer(ONE, ttl=10)
    followed.clock.advance(10)
    followed.answer(why=why)
    followed.clock.advance(30)
    assert followed.names == ["fixed", "10.0.0.1"]
    followed.answer(why=why)
    followed.clock.advance(30)
    followed.answer(why=why)
    assert followed.names == ["fixed"]
    followed.clock.advance(30)
    followed.answer(TWO)
    assert followed.names == ["fixed", "10.0.0.2"]
    followed.stop()


def test_a_name_without_servers_is_looked_up_soon_again() -> None:
    followed = Followed(grace=60)
    followed.follower.start()
    followed.answer(ONE, ttl=10)
    followed.clock.advance(10)
    for _ in range(14):
        # In the grace, and after it.
        followed.answer(why="there is no such name", ttl=600)
        [call] = followed.clock.getDelayedCalls()
        assert call.getTime() - followed.clock.seconds() == 5
        followed.clock.advance(5)
    followed.answer(TWO)
    assert followed.names == ["fixed", "10.0.0.2"]
    followed.stop()


def test_an_answer_within_the_grace_begins_a_new_one() -> None:
    followed = Followed(every=40, grace=60)
    followed.follower.start()
    for found in ([ONE], [], [ONE], [], [ONE]):
        followed.answer(*found)
        assert followed.names == ["fixed", "10.0.0.1"]
        followed.clock.advance(40)
    followed.stop()


def test_a_server_of_another_weight_or_priority_stays_the_same() -> None:
    followed = Followed(every=10)
    followed.follower.start()
    followed.answer(ONE, TWO)
    stays = followed.pool.servers[1:]
    stays[0].began()
    stays[0].ejected = True
    stays[1].tier += 1000
    followed.clock.advance(10)
    followed.answer(Found("10.0.0.1", 80, weight=7), Found("10.0.0.2", 80, tier=2))
    assert followed.pool.servers[1:] == stays
    assert [(each.weight, each.tier) for each in stays] == [(7, 0), (1, 1002)]
    assert (stays[0].sessions, stays[0].ejected) == (1, True)
    followed.stop()


def test_a_server_that_is_found_twice_is_one() -> None:
    followed = Followed(every=10)
    followed.follower.start()
    followed.answer(Found("10.0.0.1", 80, tier=1, weight=5), Found("10.0.0.1", 80))
    [_, server] = followed.pool.servers
    followed.clock.advance(10)
    followed.answer(Found("10.0.0.1", 80), Found("10.0.0.1", 80, tier=1, weight=5))
    assert followed.pool.servers[1] is server
    assert followed.pool.servers[1].tier == 0
    followed.stop()


def test_what_ends_on_a_server_that_has_left_says_nothing_of_its_successor() -> None:
    followed = Followed(every=10, grace=0)
    heard: list[Server] = []
    followed.pool.listeners.append(heard.append)
    followed.follower.start()
    followed.answer(ONE)
    left = followed.pool.servers[1]
    left.max_sessions = 1
    left.began()
    for found in ([TWO], [ONE]):
        followed.clock.advance(10)
        followed.answer(*found)
    heard.clear()
    left.closed()
    assert left.sessions == 0
    assert heard == []
    followed.stop()


def test_a_name_that_never_had_servers() -> None:
    followed = Followed()
    followed.follower.start()
    followed.fail(LookUpFailed("db: the name servers don't answer"))
    assert followed.pool.pending == 1
    followed.clock.advance(5)
    followed.answer(why="there is no such name", ttl=3)
    assert followed.pool.pending == 0
    assert followed.names == ["fixed"]
    followed.clock.advance(3)
    assert len(followed.asked) == 3
    followed.stop()


def test_a_defect_does_not_end_it(logged_failures: LoggedFailures) -> None:
    followed = Followed()
    followed.follower.start()
    followed.fail(ZeroDivisionError())
    assert "the look-up of dns:db:80 failed" in logged_failures.take("ZeroDivision")
    followed.clock.advance(5)
    followed.answer(ONE)
    assert followed.names == ["fixed", "10.0.0.1"]
    followed.stop()


def test_what_is_asked_when_it_stops_is_cancelled() -> None:
    followed = Followed()
    followed.follower.start()
    followed.follower.stop()
    assert followed.asked[0].called
    followed.follower.start()
    followed.answer(ONE)
    assert followed.names == ["fixed", "10.0.0.1"]
    followed.stop()


@given(st.lists(st.lists(st.sampled_from([ONE, TWO, THREE])), max_size=10))
def test_the_pool_has_what_the_last_answer_has(answers: list[list[Found]]) -> None:
    followed = Followed(every=10, grace=0)
    followed.follower.start()
    counted: dict[str, Any] = {}
    for found in answers:
        followed.answer(*found)
        assert followed.names[0] == "fixed"
        assert set(followed.names[1:]) == {each.address for each in found}
        for each in followed.pool.servers:
            assert counted.setdefault(each.name, each) is each
        counted = {each.name: each for each in followed.pool.servers}
        followed.clock.advance(10)
    followed.stop()
