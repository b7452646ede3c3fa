"""Passive health: who is taken out for failed dials, for how long, and who returns."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from twisted.internet.task import Clock

from relayd.core.session import Ending
from relayd.upstreams.passive import Ejector, FailLimits
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server
from tests.support.shares import SELECTORS

REFUSED = Ending.CONNECT_REFUSED


def server(name: str, **options: Any) -> Server:
    return Server(SimpleNamespace(), name, **options)  # type: ignore[arg-type]


def asked(ordinal: int = 0) -> Any:
    return SimpleNamespace(ordinal=ordinal, client=f"10.0.0.{ordinal}:1")


class Judged:
    """A pool of servers a, b and so on, and what judges them."""

    def __init__(self, count: int = 3, **limits: Any) -> None:
        self.clock = Clock()
        self.servers = [server("abcdefghij"[n]) for n in range(count)]
        self.pool = Pool(self.servers)
        self.ejector = Ejector(self.pool, self.clock, FailLimits(**limits))

    def usable(self) -> str:
        """The names of those that are chosen."""
        found = {self.pool.choose(asked(n)) for n in range(60)} - {None}
        return "".join(sorted(each.name for each in found))  # type: ignore[union-attr]

    def fail(self, one: Server, times: int = 1, apart: float = 0.0) -> None:
        for _ in range(times):
            self.clock.advance(apart)
            one.began()
            one.failed(REFUSED, "")


def test_so_many_failed_dials_eject_a_server() -> None:
    judged = Judged()
    a = judged.servers[0]
    judged.fail(a, 2, apart=4)
    assert judged.usable() == "abc"
    judged.fail(a)
    assert judged.usable() == "bc"
    assert a.why == "3 dials have failed, the last one: connect_refused; out for 10 s"
    assert (judged.ejector.ejections, judged.ejector.out) == (1, [a])
    judged.ejector.stop()


def test_they_count_for_the_fail_time() -> None:
    judged = Judged()
    a = judged.servers[0]
    judged.fail(a, 20, apart=5.1)
    assert judged.usable() == "abc"
    judged.fail(a, 1, apart=4.8)
    assert judged.usable() == "bc"
    judged.ejector.stop()


def test_one_failure_may_be_enough() -> None:
    judged = Judged(max_fails=1, fail_time=0.5)
    judged.servers[1].began()
    judged.servers[1].failed(REFUSED, "no route")
    assert judged.usable() == "ac"
    assert judged.servers[1].why == (
        "a dial has failed, the last one: no route; out for 0.5 s"
    )
    judged.ejector.stop()


def test_what_says_nothing_about_a_server_does_not_count() -> None:
    """A client that leaves, and a want of descriptors or ports here."""
    judged = Judged(max_fails=1)
    for one in judged.servers:
        one.began()
        one.cancelled()
        one.began()
        one.failed(None, "no descriptor is left")
        one.began()
        one.connected()
        one.closed()
    assert judged.usable() == "abc"
    assert not judged.ejector._records


def test_one_session_decides_about_the_return() -> None:
    judged = Judged()
    a = judged.servers[0]
    a.began()  # from before; it goes on
    judged.fail(a, 3)
    judged.clock.advance(9.9)
    assert judged.usable() == "bc"
    judged.clock.advance(0.1)
    assert judged.usable() == "abc"
    assert a.why == "one session may try it"
    a.began()
    assert judged.usable() == "bc"
    judged.clock.advance(100)
    assert judged.usable() == "bc"
    a.connected()
    assert judged.usable() == "abc"
    assert not a.ejected
    assert a.why == "it is connected again"
    assert not judged.clock.getDelayedCalls()


def test_checks_that_have_found_it_down_and_up_end_its_ejection() -> None:
    judged = Judged()
    a = judged.servers[0]
    judged.fail(a, 3)
    # They have not found it down: sessions may fail where checks succeed.
    a.checked(True, "connected")
    assert judged.usable() == "bc"
    a.checked(False, "refused")
    assert judged.usable() == "bc"
    a.checked(True, "connected")
    assert judged.usable() == "abc"
    assert not judged.clock.getDelayedCalls()
    # Soon after, it is out for longer.
    judged.fail(a, 3)
    assert a.why.endswith("out for 20 s")
    judged.ejector.stop()


def test_checks_that_find_it_up_during_its_trial() -> None:
    judged = Judged()
    a = judged.servers[0]
    judged.fail(a, 3)
    a.checked(False, "refused")
    judged.clock.advance(10)
    a.checked(True, "connected")
    assert judged.usable() == "abc"
    assert not a.on_trial
    judged.ejector.stop()


def test_a_trial_that_its_client_leaves_is_for_the_next_one() -> None:
    judged = Judged()
    a = judged.servers[0]
    judged.fail(a, 3)
    judged.clock.advance(10)
    a.began()
    a.cancelled()
    assert judged.usable() == "abc"
    a.began()
    assert judged.usable() == "bc"
    a.connected()
    assert judged.usable() == "abc"


def out_for(judged: Judged) -> float:
    """How long the server that has just been ejected is out."""
    [call] = judged.clock.getDelayedCalls()
    return call.getTime() - judged.clock.seconds()


def test_the_time_doubles_up_to_a_limit() -> None:
    judged = Judged(fail_max=300)
    a = judged.servers[0]
    judged.fail(a, 3)
    for seconds in (10, 20, 40, 80, 160, 300, 300):
        assert out_for(judged) == seconds
        judged.clock.advance(seconds)
        judged.fail(a)
    assert a.why == "its trial has failed: connect_refused; out for 300 s"
    judged.ejector.stop()


@pytest.mark.parametrize(("back", "seconds"), [(39, 80), (40, 10)])
def test_the_time_is_the_first_one_again_after_a_while(
    back: float, seconds: float
) -> None:
    """Once it has been back for as long as it was out."""
    judged = Judged()
    a = judged.servers[0]
    judged.fail(a, 3)
    judged.clock.advance(10)
    judged.fail(a)
    judged.clock.advance(20)
    judged.fail(a)
    judged.clock.advance(40)
    a.began()
    a.connected()
    judged.clock.advance(back)
    judged.fail(a, 3)
    assert out_for(judged) == seconds
    judged.ejector.stop()


def test_dials_from_before_do_not_matter() -> None:
    judged = Judged()
    a = judged.servers[0]
    for _ in range(4):
        a.began()
    judged.fail(a, 3)
    for late in (lambda: a.failed(REFUSED, ""), a.connected, a.cancelled):
        late()
        assert judged.usable() == "bc"
        assert out_for(judged) == 10
    judged.clock.advance(10)
    # Nobody has tried it yet.
    a.failed(REFUSED, "")
    assert judged.usable() == "abc"


@pytest.mark.parametrize(
    ("count", "percent", "most"),
    [(2, 50, 1), (3, 50, 1), (4, 50, 2), (10, 50, 5), (10, 100, 9), (5, 0, 1)],
)
def test_a_share_of_the_pool_is_out_at_most(
    count: int, percent: int, most: int
) -> None:
    judged = Judged(count, eject_most=percent)
    for _ in range(3):
        for one in judged.servers:
            judged.fail(one)
    names = [each.name for each in judged.servers]
    assert judged.usable() == "".join(names[most:])
    judged.ejector.stop()


def test_the_last_one_is_never_ejected() -> None:
    judged = Judged(2)
    a, b = judged.servers
    b.checked(False, "no answer")
    judged.fail(a, 10)
    assert judged.usable() == "a"
    b.checked(True, "connected")
    judged.fail(a)
    assert judged.usable() == "b"
    judged.ejector.stop()


def test_one_that_is_disabled_while_it_is_out_counts() -> None:
    judged = Judged(4, max_fails=1, eject_most=25)
    a, b = judged.servers[:2]
    judged.fail(a)
    a.disabled = True
    a.changed()
    judged.fail(b)
    a.disabled = False
    a.changed()
    assert judged.usable() == "bcd"
    judged.ejector.stop()


def test_a_backup_is_a_server_that_is_left() -> None:
    clock = Clock()
    one, spare = server("a"), server("b", tier=1)
    pool = Pool([one, spare])
    ejector = Ejector(pool, clock, FailLimits(max_fails=1))
    one.began()
    one.failed(REFUSED, "")
    assert pool.choose(asked()) is spare
    ejector.stop()


@pytest.mark.parametrize("what", ["checked", "disabled", "weight", "draining"])
def test_who_is_out_is_back_when_the_others_go(what: str) -> None:
    judged = Judged(2)
    a, b = judged.servers
    judged.fail(a, 3)
    assert judged.usable() == "b"
    if what == "checked":
        b.checked(False, "no answer")
    elif what == "weight":
        b.checked(True, "busy", 0)
    else:
        setattr(b, what, True)
        b.changed()
    assert judged.usable() == "a"
    assert a.why == "no other server is left"
    assert not judged.clock.getDelayedCalls()
    # What it has failed before counts no more.
    c = server("c")
    judged.pool.replace([], [c])
    judged.fail(a, 2)
    assert judged.usable() == "ac"


def test_a_trial_that_fails_when_no_other_is_left() -> None:
    """It stays in, and the next client tries it as well."""
    judged = Judged(2)
    a, b = judged.servers
    judged.fail(a, 3)
    judged.clock.advance(10)
    a.began()
    b.checked(False, "no answer")
    assert judged.usable() == "a"
    a.failed(REFUSED, "")
    assert judged.usable() == "a"
    assert not judged.clock.getDelayedCalls()


def test_servers_that_join_are_judged_and_those_that_leave_are_forgotten() -> None:
    judged = Judged(2)
    a = judged.servers[0]
    judged.fail(a, 3)
    c = server("c")
    judged.pool.replace([a], [c])
    assert not judged.clock.getDelayedCalls()
    assert a not in judged.ejector._records
    judged.fail(a, 3)
    assert a not in judged.ejector._records
    judged.fail(c, 3)
    assert judged.usable() == "b"
    judged.ejector.stop()


# -- sessions that are reset without a word


def reset(one: Server, times: int = 1, *, provoked: bool = True) -> None:
    before = one.sessions
    for _ in range(times):
        one.began()
        one.connected()
        one.reset("connected, reset without a word", provoked)
        assert one.sessions == before


@pytest.mark.parametrize("provoked", [True, False])
def test_a_reset_counts_as_a_failed_dial(provoked: bool) -> None:
    judged = Judged()
    a = judged.servers[0]
    judged.fail(a, 1)
    reset(a, provoked=provoked)
    assert judged.usable() == "abc"
    reset(a, provoked=provoked)
    assert judged.usable() == "bc"
    assert a.why == (
        "3 dials have failed, the last one: connected, reset without a word;"
        " out for 10 s"
    )
    judged.ejector.stop()


def test_what_a_client_may_have_provoked_counts_in_a_row() -> None:
    """Or else a stranger who sends what it does not like could take a server out."""
    judged = Judged()
    a = judged.servers[0]
    for _ in range(10):
        reset(a, 2)
        a.began()
        a.connected()
        a.closed()
    assert judged.usable() == "abc"
    assert not a.doubted
    reset(a, 3)
    assert judged.usable() == "bc"
    judged.ejector.stop()


def test_what_nobody_can_have_provoked_is_not_wiped_out() -> None:
    judged = Judged()
    a = judged.servers[0]
    for _ in range(3):
        assert judged.usable() == "abc"
        reset(a, provoked=False)
        a.began()
        a.connected()
        a.closed()
    assert judged.usable() == "bc"
    judged.ejector.stop()


@pytest.mark.parametrize("provoked", [True, False])
def test_a_trial_that_is_reset_has_failed(provoked: bool) -> None:
    judged = Judged()
    a = judged.servers[0]
    reset(a, 3)
    for seconds in (10, 20, 40):
        assert out_for(judged) == seconds
        judged.clock.advance(seconds)
        reset(a, provoked=provoked)
        assert judged.usable() == "bc"
    assert a.why.startswith("its trial has failed: connected, reset")
    judged.ejector.stop()


@pytest.mark.parametrize("after", ["a session", "a while", "its last"])
def test_a_trial_that_has_not_failed(after: str) -> None:
    judged = Judged(2)
    a, b = judged.servers
    judged.fail(a, 3)
    judged.clock.advance(10)
    a.began()
    a.connected()
    assert a.doubted
    if after == "a session":
        a.closed()
        assert not a.doubted
    elif after == "a while":
        judged.clock.advance(10.5)
    else:
        b.checked(False, "no answer")
    reset(a, 1)
    assert "a" in judged.usable()
    judged.ejector.stop()


def test_a_session_that_is_older_than_the_ejection_does_not_matter() -> None:
    judged = Judged()
    a = judged.servers[0]
    for _ in range(3):
        a.began()
        a.connected()
    judged.fail(a, 3)
    a.reset("late", False)
    assert out_for(judged) == 10
    judged.clock.advance(10)
    a.reset("during its trial", True)
    assert judged.usable() == "abc"
    judged.ejector.stop()
    a.reset("with nothing known of it", True)
    assert judged.usable() == "abc"


def test_a_server_that_goes_is_not_judged() -> None:
    judged = Judged(2)
    a = judged.servers[0]
    a.began()
    judged.pool.replace([a], [server("c")])
    a.reset("late", True)
    assert a not in judged.ejector._records
    # Nor one that nobody judges.
    one = server("d")
    reset(one, 5)
    assert one.usable


def test_a_relay_that_stops_forgets() -> None:
    judged = Judged()
    judged.ejector.start()
    judged.fail(judged.servers[0], 3)
    judged.ejector.stop()
    assert judged.usable() == "abc"
    assert not judged.clock.getDelayedCalls()
    assert not judged.ejector._records


@pytest.mark.parametrize(
    "limits",
    [{"max_fails": 0}, {"fail_time": 0}, {"fail_max": -1}, {"eject_most": 101}],
)
def test_limits_that_make_no_sense(limits: Any) -> None:
    with pytest.raises(ValueError, match="are more than 0|is 0 to 100 percent"):
        FailLimits(**limits)


def _might_serve(each: Server) -> bool:
    """Whether it could have sessions, if its dials say nothing against it."""
    if each.operator is not None:
        return each.operator == "up" and each.weight > 0
    return each.checked_up and each.weight > 0 and not each.disabled


class PoolState(RuleBasedStateMachine):
    """Sessions come and go, dials fail, checks, operators and time change servers."""

    @initialize(
        weights=st.lists(st.integers(0, 5), min_size=1, max_size=6),
        limits=st.lists(st.none() | st.integers(1, 3), min_size=6, max_size=6),
        tiers=st.lists(st.integers(0, 1), min_size=6, max_size=6),
        selector=st.sampled_from(sorted(SELECTORS)),
        percent=st.integers(0, 100),
    )
    def begin(
        self, weights: Any, limits: Any, tiers: Any, selector: str, percent: int
    ) -> None:
        self.clock = Clock()
        self.servers = [
            server(f"s{n}", weight=weight, max_sessions=most, tier=tier)
            for n, (weight, most, tier) in enumerate(
                zip(weights, limits, tiers, strict=False)
            )
        ]
        self.pool = Pool(self.servers, SELECTORS[selector]())
        self.percent = percent
        self.ejector = Ejector(
            self.pool, self.clock, FailLimits(max_fails=2, eject_most=percent)
        )
        self.dialing: list[Server] = []
        self.relaying: list[Server] = []
        self.ordinal = 0

    def _choose(self, tried: list[Server]) -> None:
        self.ordinal += 1
        left = [each for each in self.servers if each not in tried]
        usable = [each for each in left if each.usable and not each.is_full]
        trials = [each for each in usable if each.on_trial]
        chosen = self.pool.choose(asked(self.ordinal), tried)
        if not usable:
            assert chosen is None
            return
        assert isinstance(chosen, Server)
        assert chosen in usable
        assert chosen.tier == min(each.tier for each in usable)
        # An ejected one is chosen for its one trial only.
        assert not chosen.ejected or chosen in trials
        chosen.began()
        assert not chosen.on_trial
        self.dialing.append(chosen)

    @rule()
    def comes(self) -> None:
        self._choose([])

    @precondition(lambda self: self.dialing)
    @rule(which=st.integers(0), retries=st.booleans())
    def fails(self, which: int, retries: bool) -> None:
        one = self.dialing.pop(which % len(self.dialing))
        one.failed(REFUSED, "")
        if retries:
            self._choose([one])

    @precondition(lambda self: self.dialing)
    @rule(which=st.integers(0))
    def leaves(self, which: int) -> None:
        self.dialing.pop(which % len(self.dialing)).cancelled()

    @precondition(lambda self: self.dialing)
    @rule(which=st.integers(0))
    def connects(self, which: int) -> None:
        one = self.dialing.pop(which % len(self.dialing))
        one.connected()
        self.relaying.append(one)

    @precondition(lambda self: self.relaying)
    @rule(which=st.integers(0))
    def ends(self, which: int) -> None:
        self.relaying.pop(which % len(self.relaying)).closed()

    @precondition(lambda self: self.relaying)
    @rule(which=st.integers(0), provoked=st.booleans(), retries=st.booleans())
    def is_reset(self, which: int, provoked: bool, retries: bool) -> None:
        one = self.relaying.pop(which % len(self.relaying))
        one.reset("without a word", provoked)
        if retries:
            self._choose([one])

    @rule(which=st.integers(0), up=st.booleans(), weight=st.none() | st.integers(0, 5))
    def is_checked(self, which: int, up: bool, weight: int | None) -> None:
        self.servers[which % len(self.servers)].checked(up, "a check", weight)

    @rule(which=st.integers(0))
    def is_disabled(self, which: int) -> None:
        one = self.servers[which % len(self.servers)]
        one.disabled = not one.disabled
        one.changed()

    @rule(which=st.integers(0), word=st.sampled_from([None, "up", "down", "drain"]))
    def has_a_word(self, which: int, word: Any) -> None:
        self.servers[which % len(self.servers)].operate(word)

    @rule(which=st.integers(0), weight=st.none() | st.integers(0, 5))
    def is_weighed(self, which: int, weight: int | None) -> None:
        self.servers[which % len(self.servers)].operate_weight(weight)

    @rule(which=st.integers(0))
    def is_replaced(self, which: int) -> None:
        gone = self.servers[which % len(self.servers)]
        self.ordinal += 1
        new = server(f"n{self.ordinal}", weight=gone.weight or 1)
        self.servers[self.servers.index(gone)] = new
        self.pool.replace([gone], [new])

    @rule(seconds=st.sampled_from([1, 5, 10, 40]))
    def passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @invariant()
    def counts_are_right(self) -> None:
        if not hasattr(self, "servers"):
            return
        under_way = self.dialing + self.relaying
        for each in {*self.servers, *under_way}:
            assert each.sessions == under_way.count(each)
            assert each.max_sessions is None or each.sessions <= each.max_sessions
        assert self.pool.servers == self.servers

    @invariant()
    def some_are_left(self) -> None:
        """Of those that might serve, some are in; and no more are out than may be."""
        if not hasattr(self, "servers"):
            return
        might = [each for each in self.servers if _might_serve(each)]
        assert not might or not all(each.ejected for each in might)
        assert set(self.ejector.out) == {each for each in self.servers if each.ejected}
        assert len(self.ejector.out) <= max(len(self.servers) * self.percent // 100, 1)
        assert len(self.clock.getDelayedCalls()) <= len(self.ejector.out)

    @invariant()
    def the_operators_word_stands(self) -> None:
        for each in getattr(self, "servers", ()):
            if each.operator == "up":
                assert each.usable is (each.weight > 0)
                assert each.up
                assert not each.ejected
            elif each.operator is not None:
                assert not each.usable
            if each.operator_weight is not None:
                assert each.weight == each.operator_weight

    def teardown(self) -> None:
        if not hasattr(self, "servers"):
            return
        for each in self.dialing:
            each.cancelled()
        for each in self.relaying:
            each.closed()
        self.ejector.stop()
        assert not any(each.sessions or each.ejected for each in self.servers)
        assert not self.clock.getDelayedCalls()


TestPoolState = PoolState.TestCase
TestPoolState.settings = settings(max_examples=40, stateful_step_count=40)
