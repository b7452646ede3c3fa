"""What an operator says of a server while its relay runs, and what that overrules."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from twisted.internet.defer import succeed
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent

from relayd.core.session import Ending
from relayd.net.dns import Found
from relayd.upstreams.checks import Checker
from relayd.upstreams.flow_server import FlowServer
from relayd.upstreams.judging import Schedule, Verdict
from relayd.upstreams.names import _revise
from relayd.upstreams.passive import Ejector, FailLimits
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import LastCheck, Server, Word
from relayd.upstreams.slow_start import STEPS, SlowStart
from tests.support.shares import SELECTORS


def server(name: str = "a", **settings: Any) -> Server:
    return Server(SimpleNamespace(), name, **settings)  # type: ignore[arg-type]


def chosen(pool: Pool, count: int = 40) -> str:
    """The names of those that get sessions."""
    found = {
        pool.choose(SimpleNamespace(ordinal=n, client=f"10.0.{n}.1:1"))
        for n in range(count)
    }
    return "".join(sorted(each.name for each in found - {None}))  # type: ignore[union-attr]


@pytest.mark.parametrize("selector", sorted(SELECTORS))
@pytest.mark.parametrize("word", ["down", "drain"])
def test_what_is_taken_out_gets_no_session(word: Word, selector: str) -> None:
    one, two = server("a"), server("b")
    pool = Pool([one, two], SELECTORS[selector]())
    pool.choose(SimpleNamespace(ordinal=0, client="10.0.0.1:1"))
    one.operate(word)
    assert chosen(pool) == "b"
    assert one.state == word
    assert one.offered_weight == 0
    one.operate(None)
    assert pool._untried(()) == (one, two)
    assert one.state == "up"


def test_what_is_down_is_not_chosen_though_all_others_are() -> None:
    """`try-all` tries those that checks find down, not what its operator took out."""
    one, two = server("a"), server("b")
    pool = Pool([one, two], try_all=True)
    one.operate("down")
    two.checked(False, "refused")
    assert chosen(pool) == "b"
    assert pool.can_serve
    two.operate("drain")
    assert chosen(pool) == ""
    assert not pool.can_serve


def test_what_is_up_is_chosen_whatever_its_checks_say() -> None:
    one, two = server("a"), server("b")
    pool = Pool([one, two])
    for each in (one, two):
        each.checked(False, "refused")
    assert not pool.can_serve
    one.operate("up")
    assert chosen(pool) == "a"
    assert pool.can_serve
    assert (one.state, one.up, one.is_down) == ("up", True, False)
    assert one.reason == "its operator says that it is up; refused"
    one.checked(False, "no answer", 0)
    # A weight of 0 is a check's way to say that there is to be no session.
    assert (chosen(pool), one.weight) == ("a", 1)
    one.operate(None)
    assert (chosen(pool), one.weight, one.state) == ("", 0, "down")


def test_what_is_up_is_chosen_though_its_settings_disable_it() -> None:
    one = server("a", disabled=True)
    pool = Pool([one])
    assert (one.state, one.reason) == ("disabled", "disabled")
    one.operate("up")
    assert chosen(pool) == "a"
    one.operate(None)
    assert chosen(pool) == ""


def test_what_has_left_its_pool_does_not_return() -> None:
    one, two = server("a"), server("b")
    pool = Pool([one, two])
    one.operate("up")
    pool.replace([one], [])
    assert chosen(pool) == "b"
    assert one.state == "draining"
    assert one.reason == "it is none of its pool's servers any more"
    assert not one.usable


def test_its_limit_and_a_weight_of_0_still_hold() -> None:
    one = server("a", max_sessions=1)
    pool = Pool([one])
    one.operate("up")
    one.began()
    assert (chosen(pool), one.filled) == ("", 1)
    one.closed()
    one.operate_weight(0)
    assert chosen(pool) == ""
    assert one.reason == "its operator says that it is up; its weight is 0"


def test_its_weight_stands_over_that_of_checks_and_names() -> None:
    one, two = server("a", weight=2), server("b", weight=2)
    pool = Pool([one, two])
    one.operate_weight(6)
    shares = Counter(
        pool.choose(SimpleNamespace(ordinal=n)).name  # type: ignore[union-attr]
        for n in range(80)
    )
    assert shares == {"a": 60, "b": 20}
    one.checked(True, "fine", 1)
    assert one.weight == 6
    one.operate_weight(None)
    assert one.weight == 1
    one.operate_weight(5)
    found = Found("192.0.2.1", 1, 0, 2)
    _revise(one, found, Found("192.0.2.1", 1, 0, 9))
    assert one.weight == 5
    one.operate_weight(None)
    assert one.weight == 9
    one.checked(True, "fine", 3)
    assert one.weight == 3


@pytest.mark.parametrize("weight", [-1, 257])
def test_a_weight_out_of_range_changes_nothing(weight: int) -> None:
    one = server("a", weight=3)
    with pytest.raises(ValueError, match=f"weight is 0 to 256, not {weight}"):
        one.operate_weight(weight)
    assert (one.weight, one.operator_weight) == (3, None)


def test_a_check_goes_back_to_the_servers_own_weight() -> None:
    """Not to that of its operator, which was there when its checks began."""
    clock, answers = Clock(), [50, None]
    one = server("a", weight=7)
    one.operate_weight(2)
    checker = Checker(clock, chance=lambda: 0.5)
    checker.add(
        one, lambda: succeed(Verdict(True, "fine", answers.pop(0))), Schedule(every=1)
    )
    checker.start()
    clock.advance(0.5)
    assert (one.checked_weight, one.weight) == (50, 2)
    clock.advance(1)
    one.operate_weight(None)
    assert one.weight == 7
    checker.stop()


def test_the_last_check_is_known_if_it_changes_nothing() -> None:
    clock = Clock()
    one = server("a")
    verdicts = [Verdict(True, "fine"), Verdict(False, "slow"), Verdict(True, "fine")]
    checker = Checker(clock, chance=lambda: 0.5)
    checker.add(one, lambda: succeed(verdicts.pop(0)), Schedule(every=2, fall=3))
    assert one.last_check is None
    checker.start()
    seen = []
    for _ in range(3):
        clock.advance(2)
        seen.append(one.last_check)
    assert [(each.up, each.why) for each in seen if each] == [
        *((True, "fine"), (False, "slow"), (True, "fine"))
    ]
    assert isinstance(seen[1], LastCheck)
    assert seen[1].at == 4.0
    assert one.checked_up
    checker.stop()


# -- with what judges servers by their dials


def judged(count: int = 3, **limits: Any) -> tuple[Clock, list[Server], Pool, Ejector]:
    clock = Clock()
    servers = [server(name) for name in "abcd"[:count]]
    pool = Pool(servers)
    return clock, servers, pool, Ejector(pool, clock, FailLimits(**limits))


def fail(one: Server, times: int = 1) -> None:
    for _ in range(times):
        one.began()
        one.failed(Ending.CONNECT_REFUSED, "refused")


def test_one_that_is_out_is_back_when_its_operator_says_so() -> None:
    clock, (a, *_), pool, _ = judged()
    fail(a, 3)
    assert (chosen(pool), a.state, a.fails) == ("bc", "ejected", 3)
    a.operate("up")
    assert (chosen(pool), a.state, a.ejected) == ("abc", "up", False)
    assert not clock.getDelayedCalls()
    assert a.reason == "its operator says that it is up"
    # And stays, as long as that stands.
    fail(a, 20)
    assert (chosen(pool), a.fails) == ("abc", 23)
    a.operate(None)
    assert (a.state, a.reason) == ("up", "")
    fail(a, 2)
    assert chosen(pool) == "abc"
    fail(a)
    assert chosen(pool) == "bc"
    clock.advance(1e6)
    a.operate("drain")
    assert chosen(pool) == "bc"


@pytest.mark.parametrize("word", ["down", "drain"])
def test_who_is_out_is_back_when_the_operator_takes_the_others(word: Word) -> None:
    clock, (a, b), pool, _ = judged(2)
    fail(a, 3)
    assert chosen(pool) == "b"
    b.operate(word)
    assert (chosen(pool), a.why) == ("a", "no other server is left")
    assert not clock.getDelayedCalls()
    # Of what is left, nobody is ejected.
    fail(a, 9)
    assert chosen(pool) == "a"


def test_what_is_drained_does_not_come_back_as_the_last() -> None:
    clock, (a, b), pool, ejector = judged(2)
    fail(a, 3)
    a.operate("drain")
    b.operate("down")
    assert chosen(pool) == ""
    a.operate(None)
    # It is the only one that is left.
    assert chosen(pool) == "a"
    ejector.stop()
    assert not clock.getDelayedCalls()


def test_one_that_is_taken_back_starts_slowly() -> None:
    clock = Clock()
    one, two = server("a", weight=100), server("b", weight=100)
    pool = Pool([one, two])
    slow = SlowStart(pool, 10, clock)
    one.operate("drain")
    assert one.share == 1
    one.operate(None)
    assert one.share == 1 / STEPS
    clock.advance(10)
    assert one.share == 1
    one.checked(False, "refused")
    one.operate("up")
    assert one.share == 1 / STEPS
    # It is up already.
    clock.pump([1] * 10)
    one.checked(True, "connected")
    assert one.share == 1
    slow.stop()


def test_a_server_of_datagrams_hears_its_operator() -> None:
    where = SimpleNamespace(name="ns:53", address=("inet", ("192.0.2.1", 53)))
    one = FlowServer.at(where, label="dns")
    pool = Pool([one])
    assert chosen(pool, 1) == "dns/ns:53"
    one.operate("down")
    assert (chosen(pool, 1), one.up) == ("", False)
    one.checked(False, "refused")
    one.operate("up")
    assert (chosen(pool, 1), one.up) == ("dns/ns:53", True)
    where.address = None
    one.changed()
    assert chosen(pool, 1) == ""


def test_the_log_says_what_an_operator_changes() -> None:
    with capturedLogs() as events:
        one = server("a")
        Pool([one]).belong_to("web")
        one.operate("drain")
        one.operate("drain")
        one.operate_weight(3)
        one.operate_weight(3)
        one.checked(False, "refused")
        one.operate(None)
        one.operate_weight(None)
    assert [formatEvent(each) for each in events] == [
        "web: a: its operator drains it",
        "web: a: its weight is 3, as its operator says",
        "web: a is down: refused; but its operator drains it",
        "web: a: its operator says nothing any more",
        "web: a: its weight is 1",
    ]


def test_nothing_is_told_that_is_no_change() -> None:
    one = server("a")
    told: list[Server] = []
    pool = Pool([one])
    pool.listeners.append(told.append)
    one.operate(None)
    one.operate_weight(None)
    assert not told
    one.operate("up")
    one.operate("up")
    assert told == [one]
