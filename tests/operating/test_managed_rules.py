"""Rules of netfilter follow the relays of a process; a fake has the kernel's part."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relayd.configuring.address_grammar import HostPort
from relayd.configuring.config import Relay, ServerDialing, Socks4Relay
from relayd.core.errors import CannotStart
from relayd.core.interception import parse_intercept
from relayd.netfilter.rules import rules_of
from relayd.observing.readings import RuleCounts
from relayd.operating.managed_rules import KEPT, LOOK, RETRY
from tests.conftest import LoggedFailures
from tests.support.managed import (
    DNS,
    LISTENER,
    OWN,
    PLAIN,
    WEB,
    Process,
    Served,
    Unit,
    dns,
    web,
)
from tests.support.steered import result


@pytest.fixture
def started(request: pytest.FixtureRequest) -> Any:
    """Starts a process of these relays, and stops it after the test."""
    begun: list[Process] = []

    def start(*relays: Any) -> Process:
        process = Process(*relays)
        begun.append(process)
        process.rules.startService()
        process.kernel.did()
        return process

    yield start
    for each in begun:
        each.kernel.refuses.clear()
        result(each.rules.stopService())
        assert each.kernel.has == {}
        assert each.reactor.getDelayedCalls() == []
        assert each.reactor.readers == set()
        assert not each.watch.is_on


Start = Callable[..., Process]


# -- start and stop


def test_all_are_applied_at_once_and_removed_at_once() -> None:
    process = Process(web(), dns())
    process.rules.startService()
    assert process.kernel.did() == ["apply dns web"]
    assert process.has(web())
    assert process.has(dns())
    assert process.rules.shown() == {
        "relays": [DNS, WEB],
        "failures": 0,
        "lost": 0,
        "problems": [],
    }
    result(process.rules.stopService())
    assert process.kernel.did() == ["remove dns web"]
    assert process.rules.shown()["relays"] == []


@pytest.mark.parametrize(
    "relay",
    [
        Relay([HostPort(LISTENER, 80)], [HostPort("192.0.2.9", 80)], name=WEB),
        Socks4Relay(name=WEB),
        web(enabled=False),
    ],
)
def test_who_needs_none_needs_no_program_that_changes_rules(
    relay: Any, started: Start
) -> None:
    process = started(relay)
    result(process.rules.follow())
    result(process.rules.stopService())
    assert process.kernel.did() == []


def test_a_start_that_may_not_leaves_none() -> None:
    process = Process(web())
    process.kernel.refuses = {"apply", "remove"}
    with pytest.raises(CannotStart) as caught:
        process.rules.startService()
    assert caught.value.code == (
        f"relayd: --manage-netfilter: netfilter rules of {WEB} not applied: it takes"
        " CAP_NET_ADMIN"
    )
    # Of what was begun; and not a second time.
    assert process.kernel.did() == ["apply web", "remove web"]
    process.rules.close()
    assert process.kernel.did() == []
    # Another may have them.
    process.kernel.refuses.clear()
    process.rules.startService()
    process.rules.close()
    assert process.kernel.did() == ["apply web", "remove web"]


def test_what_a_crash_has_left_of_a_relay_that_needs_none(started: Start) -> None:
    """It goes; that of others' relays stays."""
    before = Process(web())
    for name in (WEB, "other"):
        before.kernel.has[name] = attrs.evolve(rules_of(web()), name=name)  # type: ignore[type-var]
    before.units[WEB] = Unit(web(intercepts=[], dialing=PLAIN), Served(WEB))
    before.rules.startService()
    assert before.kernel.did() == ["list", "remove web"]
    assert {*before.kernel.has} == {"other"}
    result(before.rules.stopService())


def test_it_is_another_processs_or_can_t_be_listed(started: Start) -> None:
    """A relay that needs none starts all the same."""
    theirs = started(web())
    idle = web(intercepts=[], dialing=PLAIN)
    for refused in (set[str](), {"relays_there"}):
        ours = Process(idle)
        ours.kernel.has = theirs.kernel.has
        ours.kernel.refuses = refused
        ours.rules.startService()
        result(ours.rules.stopService())
        assert ours.kernel.did() == ["list"]


def test_another_user_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(web())
    process.kernel.refuses = {"apply"}
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    with pytest.raises(CannotStart, match=r"\(as the user that it has become\)$"):
        process.rules.startService()


def test_one_process_alone_has_the_rules_of_a_name(
    started: Start, logged_failures: LoggedFailures
) -> None:
    first = started(web())
    second = Process(web())
    with pytest.raises(CannotStart, match="another process manages the rules of a"):
        second.rules.startService()
    # What is there is the other's.
    assert second.kernel.did() == []
    result(first.rules.stopService())
    second.rules.startService()
    assert second.kernel.did() == ["apply web"]
    # One that comes later is not touched either.
    third = started(dns())
    assert len(result(third.change(web()))) == 1
    logged_failures.take("another process manages the rules")
    third.reactor.advance(RETRY)
    assert third.kernel.did() == []
    result(second.rules.stopService())
    assert result(third.rules.follow()) == []
    assert third.kernel.did() == ["apply web"]


def test_a_part_that_cannot_start_has_them_removed_at_once(started: Start) -> None:
    process = started(web())
    process.rules.close()
    assert process.kernel.did() == ["remove web"]
    assert process.reactor.getDelayedCalls() == []


# -- cautions


def test_what_may_keep_rules_from_doing_something_is_told(
    started: Start,
) -> None:
    """At the start, after changes of ours and of others, and once."""
    process = started(web())
    assert process.rules.shown()["problems"] == []
    process.kernel.warns = ["a rule of others comes first"]
    process.watch.look()
    assert process.rules.shown()["problems"] == ["a rule of others comes first"]
    assert result(process.change(dns())) == []
    assert process.rules.shown()["problems"] == ["a rule of others comes first"]
    process.kernel.refuses = {"cautions"}
    process.kernel.warns = []
    process.watch.look()
    assert process.rules.shown()["problems"] == ["a rule of others comes first"]
    process.kernel.refuses.clear()
    process.watch.look()
    assert process.rules.shown()["problems"] == []


# -- changes


def test_one_that_is_stopped_has_none(started: Start) -> None:
    process = started(web(), dns())
    assert result(process.change(web(enabled=False))) == []
    assert process.kernel.did() == ["remove web"]
    assert result(process.change(web())) == []
    assert process.kernel.did() == ["apply web"]


def test_one_whose_rules_are_the_same_is_left_alone(started: Start) -> None:
    process = started(web())
    result(process.change(web(backlog=7)))
    assert process.kernel.did() == []


def test_what_others_have_removed_is_there_after_a_reload(started: Start) -> None:
    process = started(web(), dns())
    process.units[WEB].served.registry.append("a session")
    result(process.change(web(enabled=False)))
    process.kernel.did()
    process.kernel.has.clear()
    assert result(process.rules.follow(anew=True)) == []
    assert process.kernel.did() == ["apply dns", "apply web"]
    assert process.has(dns())
    rules = rules_of(web())
    assert rules is not None
    assert process.kernel.has[WEB] == rules.closed()


def test_one_that_changes_gets_others(started: Start) -> None:
    process = started(web())
    other = web(intercepts=[parse_intercept(":8000-8999")])
    result(process.change(other, dns()))
    assert process.kernel.did() == ["apply dns web"]
    assert process.has(other)
    process.drop(DNS)
    assert process.kernel.did() == ["remove dns"]


def test_what_comes_is_there_before_anything_goes(started: Start) -> None:
    process = started(web())
    result(process.change(web(enabled=False), web(name=f"{OWN}-new")))
    assert process.kernel.did() == ["apply new", "remove web"]


@pytest.mark.parametrize("gone", [False, True])
@pytest.mark.parametrize("transparent", [False, True])
def test_sessions_of_one_that_was_stopped_keep_what_they_need(
    gone: bool, transparent: bool, started: Start
) -> None:
    relay = web(dialing=ServerDialing(transparent=transparent))
    process = started(relay)
    served = process.units[WEB].served
    served.registry.append("a session")
    if gone:
        process.drop(WEB)
    else:
        result(process.change(attrs.evolve(relay, enabled=False)))
    assert process.kernel.did() == ["apply web"]
    left = process.kernel.has[WEB]
    assert (left.intakes, left.diverts, left.translated) == ((), transparent, True)
    process.reactor.pump([LOOK] * 3)
    assert process.kernel.did() == []
    served.registry.clear()
    process.reactor.advance(LOOK)
    assert process.kernel.did() == ["remove web"]
    assert process.reactor.getDelayedCalls() == []


def test_one_that_is_started_again_meanwhile_gets_all(started: Start) -> None:
    process = started(web())
    process.units[WEB].served.registry.append("a session")
    result(process.change(web(enabled=False)))
    result(process.change(web()))
    assert process.kernel.did() == ["apply web", "apply web"]
    assert process.has(web())
    assert process.reactor.getDelayedCalls() == []


@pytest.mark.parametrize("gone", [False, True])
def test_flows_keep_all_rules(gone: bool, started: Start) -> None:
    process = started(dns())
    served = process.units[DNS].served
    served.registry.append("a flow")
    if gone:
        process.drop(DNS)
    else:
        result(process.change(dns(enabled=False)))
    process.reactor.pump([LOOK] * 3)
    assert process.kernel.did() == []
    served.registry.clear()
    process.reactor.advance(LOOK)
    assert process.kernel.did() == ["remove dns"]


def test_flows_of_one_that_needs_none_any_more(started: Start) -> None:
    """New clients must not be brought to it, though it serves."""
    process = started(dns(intercepts=[parse_intercept("192.0.2.2:53")]))
    served = process.units[DNS].served
    served.registry.append("a flow")
    result(process.change(dns(dialing=PLAIN)))
    assert process.kernel.did() == ["apply dns"]
    assert process.kernel.has[DNS].intakes == ()
    served.registry.clear()
    process.reactor.advance(LOOK)
    assert process.kernel.did() == ["remove dns"]


def test_one_that_is_transparent_no_longer(started: Start) -> None:
    process = started(web())
    former = process.units[WEB].served
    former.registry.append("a session")
    result(process.change(web(dialing=PLAIN)))
    assert process.kernel.has[WEB].diverts
    # Its own sessions do not need them.
    process.units[WEB].served.registry.append("a session")
    process.reactor.advance(LOOK)
    assert process.kernel.did() == []
    former.registry.clear()
    process.reactor.advance(LOOK)
    assert process.kernel.did() == ["apply web"]
    assert process.has(web(dialing=PLAIN))
    assert process.reactor.getDelayedCalls() == []


def test_answers_of_servers_of_before_find_their_flows(started: Start) -> None:
    process = started(dns())
    process.units[DNS].served.registry.append("a flow")
    for last in range(2 * KEPT):
        result(process.change(dns(f"192.0.2.{last}")))
    answers = process.kernel.has[DNS].answers
    # The latest.
    assert [str(each.network) for each in answers] == [
        f"192.0.2.{last}/32" for last in range(2 * KEPT - 1, KEPT - 2, -1)
    ]
    process.units[DNS].served.registry.clear()
    process.reactor.advance(LOOK)
    assert process.has(dns(f"192.0.2.{2 * KEPT - 1}"))


# -- what others do


def test_what_others_remove_is_applied_again(started: Start) -> None:
    process = started(web(), dns())
    assert process.watch.is_on
    del process.kernel.has[DNS]
    process.watch.look()
    assert process.kernel.did() == ["lost dns web", "apply dns"]
    assert process.has(dns())
    assert process.rules.counts() == RuleCounts(failed=0, lost=1)
    assert process.rules.shown()["lost"] == 1
    assert process.watch.misses == 1


def test_what_others_leave_is_left_alone(started: Start) -> None:
    process = started(web())
    process.watch.look()
    assert process.kernel.did() == ["lost web"]
    assert process.rules.counts() == RuleCounts(failed=0, lost=0)
    assert process.watch.misses == 0


def test_only_who_has_rules_is_told_of_others(started: Start) -> None:
    process = started(web(dialing=PLAIN, intercepts=[]))
    assert not process.watch.is_on
    result(process.change(web()))
    assert process.watch.is_on
    result(process.change(web(enabled=False)))
    assert not process.watch.is_on
    process.kernel.did()
    process.watch.look()
    assert process.kernel.did() == []


def test_a_word_about_others_comes_late(started: Start) -> None:
    """It stops meanwhile, and has removed its rules itself."""
    process = started(web())
    look = process.watch.look
    result(process.rules.stopService())
    process.kernel.did()
    look()
    assert process.kernel.did() == []


def test_what_can_t_be_applied_again(
    started: Start, logged_failures: LoggedFailures
) -> None:
    process = started(web())
    process.kernel.has.clear()
    process.kernel.refuses = {"apply"}
    process.watch.look()
    logged_failures.take("not applied")
    assert process.rules.counts() == RuleCounts(failed=1, lost=1)
    process.kernel.refuses.clear()
    process.reactor.advance(RETRY)
    assert process.has(web())


def test_rules_that_can_t_be_seen(
    started: Start, logged_failures: LoggedFailures
) -> None:
    """They are applied again, which does no harm; and once more, if that fails."""
    process = started(web())
    process.kernel.refuses = {"lost"}
    process.kernel.has.clear()
    process.watch.look()
    assert process.kernel.did() == ["lost web", "apply web"]
    assert process.has(web())
    assert process.rules.counts() == RuleCounts(failed=0, lost=0)
    process.kernel.has.clear()
    process.kernel.refuses = {"lost", "apply"}
    process.watch.look()
    logged_failures.take("not applied")
    assert len(process.rules.shown()["problems"]) == 1
    process.kernel.refuses.clear()
    process.reactor.advance(RETRY)
    assert process.has(web())


def test_a_system_that_tells_nobody(started: Start) -> None:
    """The status says so, and the rules are there all the same."""
    process = started()
    process.watch.why_not = "Operation not permitted"
    why = "changes by others are not noticed: Operation not permitted"
    for relay in (web(), dns()):
        assert result(process.change(relay)) == []
        assert process.rules.shown()["problems"] == [why]
        assert process.has(relay)
    for name in (WEB, DNS):
        process.drop(name)
    # Nobody needs to be told of any.
    assert process.rules.shown()["problems"] == []


# -- failures


def test_what_fails_is_told_and_tried_again(
    started: Start, logged_failures: LoggedFailures
) -> None:
    process = started(web())
    process.kernel.refuses = {"apply"}
    other = web(intercepts=[parse_intercept(":81")])
    why = f"netfilter rules of {WEB} not applied: it takes CAP_NET_ADMIN"
    assert result(process.change(other)) == [why]
    assert process.rules.shown()["problems"] == [why]
    process.reactor.advance(RETRY - 1)
    assert process.kernel.did() == ["apply web"]
    process.reactor.advance(1)
    assert process.kernel.did() == ["apply web"]
    assert process.rules.counts() == RuleCounts(failed=2, lost=0)
    # Once.
    logged_failures.take(why)
    process.kernel.refuses.clear()
    process.reactor.advance(RETRY)
    assert process.kernel.did() == ["apply web"]
    assert process.has(other)
    assert process.rules.shown()["problems"] == []
    assert process.reactor.getDelayedCalls() == []


def test_nobody_knows_what_a_failure_has_left(
    started: Start, logged_failures: LoggedFailures
) -> None:
    """What was there before is applied again."""
    process = started(web())
    process.kernel.refuses = {"apply"}
    result(process.change(web(intercepts=[parse_intercept(":81")])))
    logged_failures.take("not applied")
    process.kernel.refuses.clear()
    assert result(process.change(web())) == []
    assert process.kernel.did() == ["apply web", "apply web"]


def test_one_failure_does_not_keep_others_from_being_done(
    started: Start, logged_failures: LoggedFailures
) -> None:
    process = started(web(), dns())
    process.kernel.refuses = {"apply"}
    new = web(name=f"{OWN}-new")
    [why] = result(process.change(new, dns(enabled=False)))
    assert why.startswith(f"netfilter rules of {OWN}-new not applied")
    logged_failures.take(why)
    assert process.kernel.did() == ["apply new", "remove dns"]


def test_a_stop_waits_for_the_change_that_is_under_way(started: Start) -> None:
    process = started(web())
    process.reactor.threads.busy = True
    changing = process.change(web(name=f"{OWN}-new"))
    stopping = process.rules.stopService()
    assert not stopping.called
    process.reactor.threads.go_on()
    assert result(changing) == []
    result(stopping)
    assert process.kernel.did() == ["apply new", "remove new web"]


def test_rules_that_stay_are_told_as_it_stops(
    started: Start, logged_failures: LoggedFailures
) -> None:
    process = started(web())
    process.kernel.refuses = {"remove"}
    result(process.rules.stopService())
    assert process.rules.shown()["problems"] == [
        f"netfilter rules of {WEB} not removed: it takes CAP_NET_ADMIN"
    ]
    logged_failures.take("not removed")
    assert process.reactor.getDelayedCalls() == []


# -- whatever happens

RELAYS: list[Any] = [
    web(),
    web(enabled=False),
    web(dialing=PLAIN),
    web(intercepts=()),
    web(intercepts=(), dialing=PLAIN),
    dns(),
    dns("192.0.2.54"),
    dns(enabled=False),
    dns(dialing=PLAIN),
]
STEPS = st.one_of(
    st.tuples(st.just("change"), st.sampled_from(RELAYS)),
    st.tuples(st.sampled_from(["drop", "begin", "end"]), st.sampled_from([WEB, DNS])),
    st.tuples(st.just("fail"), st.sets(st.sampled_from(["apply", "remove"]))),
    st.tuples(st.just("wait"), st.sampled_from([LOOK, RETRY])),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=12))
def test_in_the_end_the_kernel_has_what_is_needed(
    logged_failures: LoggedFailures, steps: list[tuple[str, Any]]
) -> None:
    process = Process(web(), dns())
    process.rules.startService()
    every = [each.served for each in process.units.values()]
    for what, of in steps:
        if what == "change":
            result(process.change(of))
            every = list(dict.fromkeys([*every, *process.served]))
        elif what == "drop" and of in process.units:
            process._former.append(process.units.pop(of).served)
            result(process.rules.follow())
        elif what == "begin" and of in process.units:
            process.units[of].served.registry.append("one")
        elif what == "end":
            for each in every:
                if each.name == of:
                    each.registry.clear()
        elif what == "fail":
            process.kernel.refuses = of
        elif what == "wait":
            process.reactor.advance(of)
        if not process.kernel.refuses and not process.rules.shown()["problems"]:
            # Whoever serves has all that it needs, whatever else is there.
            for unit in process.units.values():
                rules = rules_of(unit.settings)
                if unit.settings.enabled and rules is not None:
                    there = process.kernel.has[unit.name]
                    assert there.intakes == rules.intakes
                    assert there.diverts or not rules.diverts
                    assert {*rules.answers} <= {*there.answers}
    process.kernel.refuses = set()
    for each in every:
        each.registry.clear()
    process.reactor.pump([RETRY, LOOK])
    needed = {
        unit.name: rules
        for unit in process.units.values()
        if unit.settings.enabled and (rules := rules_of(unit.settings)) is not None
    }
    assert process.kernel.has == needed
    assert process.reactor.getDelayedCalls() == []
    result(process.rules.stopService())
    assert process.kernel.has == {}
    logged_failures.clear()
