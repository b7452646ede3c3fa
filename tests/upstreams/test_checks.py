"""When servers are checked, and what follows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.task import Clock
from twisted.logger import LogLevel, capturedLogs, formatEvent, globalLogPublisher

from relayd.upstreams.checks import OUTDATED, Checker
from relayd.upstreams.judging import CannotCheck, Schedule, Verdict

UP, DOWN = Verdict(True, "fine"), Verdict(False, "broken")


class FakeServer:
    """Notes what it is told, and is checked by hand."""

    def __init__(self, name: str = "a", weight: int = 10) -> None:
        self.name = name
        self.weight = weight
        self.told: list[tuple[bool, str, int | None]] = []
        #: What each check gives; Deferreds are kept here.
        self.answer: Callable[[], Any] = lambda: succeed(UP)
        self.asked: list[float] = []

    def checked(self, up: bool, why: str, weight: int | None = None) -> None:
        self.told.append((up, why, weight))


class DownAtFirst(FakeServer):
    """One that its maker wants to be seen up."""

    checked_up = False


class Bench:
    """A checker, on a clock of its own."""

    def __init__(self, at_once: int = 4, chance: float = 0.5) -> None:
        self.clock = Clock()
        self.checker = Checker(self.clock, at_once, lambda: chance)

    def add(self, server: FakeServer, **schedule: Any) -> FakeServer:
        def check() -> Any:
            server.asked.append(self.clock.seconds())
            return server.answer()

        self.checker.add(server, check, Schedule(**schedule))
        return server

    def pass_time(self, seconds: float, step: float = 0.125) -> None:
        for _ in range(int(seconds / step)):
            self.clock.advance(step)


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """The warnings that a test has logged."""
    found: list[str] = []

    def note(event: Any) -> None:
        if event["log_level"] is LogLevel.warn:
            found.append(event["log_format"].format(**event))

    globalLogPublisher.addObserver(note)
    yield found
    globalLogPublisher.removeObserver(note)


def silent() -> Deferred[Verdict]:
    return Deferred()


def stubborn(*_: object) -> Deferred[Verdict]:
    """Does not end when it is cancelled."""
    never: Deferred[Verdict] = Deferred()
    never.cancel = lambda: None  # type: ignore[method-assign]
    return never


# -- rise and fall


def test_a_server_that_is_up_is_told_nothing(bench: Bench) -> None:
    server = bench.add(FakeServer())
    bench.checker.start()
    bench.pass_time(60)
    assert len(server.asked) == pytest.approx(12, abs=1)
    assert server.told == []
    bench.checker.stop()


def test_the_first_check_decides_alone(bench: Bench) -> None:
    server = bench.add(FakeServer(), fall=3)
    server.answer = lambda: succeed(DOWN)
    bench.checker.start()
    bench.pass_time(1)
    assert server.told == [(False, "broken", None)]
    bench.pass_time(60)
    assert len(server.told) == 1, "a change is told once"


def test_a_server_that_is_down_until_it_is_checked(bench: Bench) -> None:
    server = bench.add(DownAtFirst(), rise=3)
    bench.checker.start()
    bench.pass_time(1)
    assert server.told == [(True, "fine", None)]
    bench.checker.stop()


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 4))
def test_rise_and_fall(outcomes: list[bool], rise: int) -> None:
    """As said: so many in a row, but for the first."""
    fall = rise + 1
    bench = Bench()
    left = list(outcomes)
    server = bench.add(FakeServer(), every=1.0, rise=rise, fall=fall)
    server.answer = lambda: succeed(UP if (not left or left.pop(0)) else DOWN)
    bench.checker.start()
    bench.pass_time(2 * len(outcomes) + 2)
    up, expected = True, []
    for i, outcome in enumerate(outcomes):
        needed = 1 if i == 0 else (rise if outcome else fall)
        recent = outcomes[max(0, i + 1 - needed) : i + 1]
        if outcome is not up and recent == [outcome] * needed:
            up = outcome
            expected.append(up)
    told = [each[0] for each in server.told]
    assert told[: len(expected)] == expected
    assert all(each != other for each, other in itertools.pairwise(told))
    bench.checker.stop()


def test_weights(bench: Bench) -> None:
    """A change is told, and the server's own weight comes back."""
    server = bench.add(FakeServer(weight=10), every=1.0, rise=1, fall=1)
    answers = [None, 50, 50, 0, None, "down", 50]
    server.answer = lambda: succeed(
        DOWN if (said := answers.pop(0)) == "down" else Verdict(True, "fine", said)
    )
    bench.checker.start()
    while answers:
        bench.pass_time(0.125)
    assert server.told == [
        (True, "fine", 50),
        (True, "fine", 0),
        (True, "fine", 10),
        (False, "broken", None),
        (True, "fine", 50),
    ]
    bench.checker.stop()


# -- when


def test_checks_are_spread() -> None:
    """All within the first second, and then over the period."""
    bench = Bench()
    servers = [bench.add(FakeServer(str(i)), every=10.0) for i in range(100)]
    bench.checker.start()
    bench.pass_time(1, 1 / 64)
    assert [len(each.asked) for each in servers] == [1] * 100
    bench.pass_time(29, 1 / 64)
    for begin in (5, 15):
        within = [
            sum(
                begin + i <= at < begin + i + 1 for each in servers for at in each.asked
            )
            for i in range(10)
        ]
        assert within == pytest.approx([10] * 10, abs=1)
    bench.checker.stop()


@settings(max_examples=25)
@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=50, max_size=50))
def test_periods_differ_by_a_tenth(chances: list[float]) -> None:
    clock = Clock()
    checker = Checker(clock, chance=lambda: chances.pop() if chances else 0.5)
    asked: list[float] = []

    def check() -> Any:
        asked.append(clock.seconds())
        return succeed(UP)

    checker.add(FakeServer(), check, Schedule(every=8.0))
    checker.start()
    for _ in range(800):
        clock.advance(0.125)
    first, *others = [later - before for before, later in itertools.pairwise(asked)]
    # The second comes when its place in the period is.
    assert 0.4 * 8 - 1.125 <= first <= 1.6 * 8
    assert all(0.9 * 8 - 0.25 <= each <= 1.1 * 8 + 0.25 for each in others)
    checker.stop()


def test_one_timer_for_all(bench: Bench) -> None:
    for i in range(50):
        server = bench.add(FakeServer(str(i)))
        server.answer = silent if i % 2 else server.answer
    bench.checker.start()
    for _ in range(200):
        bench.clock.advance(0.125)
        assert len(bench.clock.getDelayedCalls()) == 1
    bench.checker.stop()
    assert bench.clock.getDelayedCalls() == []


def test_what_is_outdated_does_not_stay(bench: Bench) -> None:
    """Checks that end at once leave their deadline in the heap: not for ever."""
    pending: list[Deferred[Verdict]] = []

    def ask() -> Deferred[Verdict]:
        pending.append(Deferred())
        return pending[-1]

    server = bench.add(FakeServer(), every=0.25, timeout=1e6)
    server.answer = ask
    bench.checker.start()
    for _ in range(4000):
        bench.clock.advance(0.125)
        while pending:
            pending.pop().callback(UP)
    assert len(server.asked) > 1000
    assert len(bench.checker._heap) <= OUTDATED + 2
    bench.checker.stop()


# -- those that take long


def test_a_check_that_does_not_answer_is_cancelled(bench: Bench) -> None:
    server = bench.add(FakeServer(), every=5.0, timeout=2.0)
    runs: list[Deferred[Verdict]] = []

    def ask() -> Deferred[Verdict]:
        runs.append(Deferred())
        return runs[-1]

    server.answer = ask
    bench.checker.start()
    bench.pass_time(2)
    assert server.told == []
    bench.pass_time(1)
    assert server.told == [(False, "no answer in 2 s", None)]
    assert runs[0].called
    assert (bench.checker.running, bench.checker.overdue) == (0, 1)
    bench.pass_time(8)
    assert len(server.asked) == 3, "its next ones come as ever"
    bench.checker.stop()
    assert bench.checker.running == 0
    assert all(each.called for each in runs)


def test_a_check_that_is_cancelled_may_give_a_verdict(bench: Bench) -> None:
    server = bench.add(FakeServer(), timeout=2.0)
    server.answer = lambda: Deferred(lambda run: run.callback(Verdict(False, "half")))
    bench.checker.start()
    bench.pass_time(3)
    assert server.told == [(False, "half", None)]
    assert (bench.checker.count, bench.checker.overdue) == (1, 0)
    bench.checker.stop()


def test_a_check_that_does_not_end_is_not_asked_again(bench: Bench) -> None:
    """But it fails; and it holds no place."""
    server = bench.add(FakeServer(), every=1.0, timeout=0.5, rise=1)
    never = stubborn()
    server.answer = lambda: never
    bench.checker.start()
    bench.pass_time(10)
    assert len(server.asked) == 1
    assert server.told == [(False, "no answer in 0.5 s", None)]
    assert bench.checker.running == 0
    assert bench.checker.count > 5
    server.answer = lambda: succeed(UP)
    # Nobody believes what it says so late.
    never.callback(DOWN)
    bench.pass_time(2)
    assert len(server.asked) == 3
    assert server.told[1:] == [(True, "fine", None)]
    bench.checker.stop()


def test_checks_at_once_are_limited(warnings: list[str]) -> None:
    """Those that wait are each in the queue once, and begin in order."""
    bench = Bench(at_once=2)
    servers = [bench.add(FakeServer(str(i)), every=1.0, timeout=1.0) for i in range(10)]
    for each in servers:
        each.answer = silent
    bench.checker.start()
    for _ in range(400):
        bench.clock.advance(0.125)
        assert bench.checker.running <= 2
        assert len(bench.checker._queue) <= 10
    counts = [len(each.asked) for each in servers]
    assert max(counts) - min(counts) <= 1, "nobody starves"
    assert min(counts) >= 8
    assert bench.checker.late > 10
    assert "servers wait for 2 checks at once" in warnings[0]
    assert len(warnings) <= 51, "a line a second"
    bench.checker.stop()


def test_many_that_answer_at_once_do_not_recurse(bench: Bench) -> None:
    bench = Bench(at_once=1)
    held: Deferred[Verdict] = Deferred()
    first = bench.add(FakeServer("first"), timeout=1e6)
    first.answer = lambda: held
    others = [bench.add(FakeServer(str(i))) for i in range(5000)]
    bench.checker.start()
    bench.clock.advance(1.0)
    assert not any(each.asked for each in others)
    held.callback(UP)
    assert all(len(each.asked) == 1 for each in others)
    bench.checker.stop()


def test_one_that_takes_longer_than_a_period(bench: Bench) -> None:
    server = bench.add(FakeServer(), every=1.0, timeout=10.0)
    pending: list[Deferred[Verdict]] = []

    def ask() -> Deferred[Verdict]:
        pending.append(Deferred())
        return pending[-1]

    server.answer = ask
    bench.checker.start()
    bench.pass_time(8)
    assert len(server.asked) == 1
    pending[0].callback(UP)
    bench.pass_time(0.5)
    assert len(server.asked) == 1, "a period passes first"
    bench.pass_time(0.75)
    assert len(server.asked) == 2
    bench.checker.stop()


# -- defects


@pytest.mark.parametrize("seconds", [0.5, 60.0])
def test_a_check_that_raises(
    bench: Bench, logged_failures: Any, seconds: float
) -> None:
    server = bench.add(FakeServer(), every=0.125, fall=1)

    def defective() -> Any:
        raise LookupError("no such role\n")

    server.answer = defective
    bench.checker.start()
    bench.pass_time(seconds)
    [(up, why, _)] = server.told
    assert (up, why) == (False, "its check raised LookupError: no such role\\n")
    found = [each for each in logged_failures if "the check of a failed" in each]
    assert 1 <= len(found) <= max(1, seconds), "a traceback a second"
    logged_failures.clear()
    bench.checker.stop()


def test_a_check_that_gives_no_verdict(bench: Bench, logged_failures: Any) -> None:
    server = bench.add(FakeServer())
    server.answer = lambda: succeed("up")
    bench.checker.start()
    bench.pass_time(1)
    assert server.told[0][1].startswith("its check raised TypeError: a check gave")
    logged_failures.take("not a Verdict")
    bench.checker.stop()


def test_what_is_not_the_server_s_fault(bench: Bench, warnings: list[str]) -> None:
    """Without descriptors, no server goes down."""
    server = bench.add(FakeServer(), every=0.25, fall=1)
    server.answer = lambda: fail(CannotCheck("Too many open files"))
    bench.checker.start()
    bench.pass_time(3)
    assert server.told == []
    assert bench.checker.unable > 5
    assert bench.checker.count == 0
    assert warnings[0] == "a server can't be checked: Too many open files"
    assert len(warnings) <= 4
    server.answer = lambda: succeed(DOWN)
    bench.pass_time(1)
    assert [each[0] for each in server.told] == [False]
    bench.checker.stop()


def test_a_server_that_can_t_be_told(bench: Bench, logged_failures: Any) -> None:
    server = bench.add(FakeServer(), every=1.0)
    server.answer = lambda: succeed(DOWN)
    server.checked = lambda *_: 1 / 0  # type: ignore[assignment]
    bench.checker.start()
    bench.pass_time(5)
    assert len(server.asked) >= 4
    logged_failures.take("a server could not be told of its check")
    bench.checker.stop()


def test_a_canceller_that_raises(bench: Bench, logged_failures: Any) -> None:
    server = bench.add(FakeServer(), timeout=0.5)
    server.answer = lambda: Deferred(lambda _: 1 / 0)
    bench.checker.start()
    bench.pass_time(3)
    assert server.told == [(False, "no answer in 0.5 s", None)]
    bench.checker.stop()
    logged_failures.take("a check could not be cancelled")


# -- servers that come and go


def test_servers_come_and_go(bench: Bench) -> None:
    bench.checker.start()
    assert bench.clock.getDelayedCalls() == []
    server = bench.add(FakeServer())
    bench.pass_time(1)
    assert len(server.asked) == 1
    runs: list[Deferred[Verdict]] = []

    def ask() -> Deferred[Verdict]:
        runs.append(Deferred())
        return runs[-1]

    server.answer = ask
    while not runs:
        bench.pass_time(0.125)
    with pytest.raises(ValueError, match="checked already"):
        bench.add(server)
    bench.checker.remove(server)
    bench.checker.remove(server)
    assert runs[0].called
    assert bench.checker.running == len(bench.checker) == 0
    bench.pass_time(20)
    assert (len(server.asked), server.told) == (2, [])
    # It comes back: nothing of the past is left.
    server.answer = lambda: succeed(DOWN)
    bench.add(server)
    bench.pass_time(1)
    assert (len(server.asked), len(server.told)) == (3, 1)
    bench.checker.stop()


def test_one_that_is_removed_as_it_is_told(bench: Bench) -> None:
    server = bench.add(FakeServer())
    server.answer = lambda: succeed(DOWN)
    server.checked = lambda *_: bench.checker.remove(server)  # type: ignore[assignment]
    bench.checker.start()
    bench.pass_time(20)
    assert len(server.asked) == 1
    assert bench.clock.getDelayedCalls() == []


def test_it_is_started_again(bench: Bench) -> None:
    server = bench.add(FakeServer())
    for count in (1, 2):
        bench.checker.start()
        bench.checker.start()
        bench.pass_time(1)
        assert len(server.asked) == count
        bench.checker.stop()
        bench.pass_time(20)
        assert len(server.asked) == count


@pytest.mark.parametrize(
    "wrong", [{"every": 0.0}, {"timeout": -1.0}, {"rise": 0}, {"fall": 0}]
)
def test_no_such_schedule(wrong: Any) -> None:
    with pytest.raises(ValueError, match="more than 0|at least 1"):
        Schedule(**wrong)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["advance", "add", "remove", "answer", "restart"]),
            st.integers(0, 7),
            st.sampled_from([UP, DOWN, "stuck"]),
        ),
        max_size=60,
    )
)
def test_whatever_happens(steps: list[tuple[str, int, Any]]) -> None:
    """One check of a server at a time, so many in all, one timer, nothing left."""
    bench = Bench(at_once=2)
    servers = [FakeServer(str(i)) for i in range(8)]
    open_runs: dict[FakeServer, list[Deferred[Verdict]]] = {s: [] for s in servers}
    stuck: set[FakeServer] = set()

    def ask(server: FakeServer) -> Deferred[Verdict]:
        assert not open_runs[server], "two checks of one server"
        run = stubborn() if server in stuck else silent()
        open_runs[server].append(run)
        run.addBoth(lambda result: open_runs[server].remove(run) or result)
        return run

    for each in servers:
        each.answer = lambda each=each: ask(each)  # type: ignore[misc]
    bench.checker.start()
    for what, number, how in steps:
        server = servers[number]
        if what == "advance":
            bench.pass_time((number + 1) / 4, 0.25)
        elif what == "add" and server not in bench.checker._targets:
            if not open_runs[server]:
                (stuck.add if how == "stuck" else stuck.discard)(server)
                bench.add(server, every=1.0, timeout=0.5)
        elif what == "remove":
            bench.checker.remove(server)
        elif what == "answer" and open_runs[server]:
            open_runs[server][0].callback(UP if how == "stuck" else how)
        elif what == "restart" and not any(open_runs[each] for each in stuck):
            bench.checker.stop()
            bench.checker.start()
        assert 0 <= bench.checker.running <= 2
        assert len(bench.clock.getDelayedCalls()) <= 1
        assert len(set(bench.checker._queue)) == len(bench.checker._queue)
        for each in servers:
            told = [up for up, _, _ in each.told]
            assert told[:1] in ([], [False])
    bench.checker.stop()
    assert bench.checker.running == 0
    assert bench.clock.getDelayedCalls() == []
    assert not any(open_runs[each] for each in servers if each not in stuck)


def test_who_wants_to_know_is_told_of_each_check(bench: Bench) -> None:
    """At the level of debug, which a log shows when it is told to."""
    server = bench.add(FakeServer())
    server.answer = lambda: succeed(DOWN)
    with capturedLogs() as events:
        bench.checker.start()
        bench.pass_time(1)
    [told] = events
    assert told["log_level"] is LogLevel.debug
    assert told["log_namespace"] == "relayd.checks"
    assert formatEvent(told) == "check of a: down: broken"
    bench.checker.stop()
