"""Gates: those that count nobody, those that count, and several as one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from twisted.internet.address import UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from zope.interface.verify import verifyObject

from relayd.admission.client_rules import parse_client_rule
from relayd.admission.connect_rates import ConnectRates
from relayd.admission.gates import Gates, HoursGate, RulesGate
from relayd.admission.hours import OpeningHours, parse_hours
from relayd.admission.lifetimes import Lifetime
from relayd.admission.per_client import (
    ClientPrefix,
    ConnectRate,
    parse_prefix,
    parse_rate,
)
from relayd.admission.session_limits import SessionLimits
from relayd.core.addresses import address_name
from relayd.core.errors import REASONS, Refused
from relayd.core.interfaces import IGate, ILease
from relayd.core.leases import FREE
from relayd.core.session import Ending, Session
from tests.admission.test_hours import Wall, at


def session(client: str = "192.0.2.1:50000", number: int = 1) -> Session:
    """Of a client by this name."""
    return Session(number, client, "192.0.2.2:1080", 0.0)


def refusal(gate: Any, client: str = "192.0.2.1:50000") -> tuple[str, str] | None:
    """Why a client is refused, or None; what it holds is given back."""
    try:
        lease = gate.enter(session(client))
    except Refused as refused:
        assert refused.reason in REASONS
        return refused.reason, refused.why
    assert verifyObject(ILease, lease)
    lease.release()
    return None


def rules_gate(*rules: str) -> RulesGate:
    """Of rules as a file has them."""
    return RulesGate(
        parse_client_rule(rule, allow=word == "allow")
        for word, rule in (each.split() for each in rules)
    )


# -- rules


@pytest.mark.parametrize(
    ("client", "inside"),
    [
        ("192.0.2.0:1", True),
        ("192.0.2.255:65535", True),
        ("192.0.1.255:1", False),
        ("192.0.3.0:1", False),
        ("198.51.100.7:1", True),
        ("198.51.100.8:1", False),
        ("127.0.0.1:1", False),
        ("[2001:db8::1]:50000", True),
        ("[2001:db9::1]:50000", False),
        ("[fe80::1%eth0]:50000", True),
        ("[fe80::1]:50000", True),
        ("[::1]:50000", False),
        # Only what the kernel itself says of an IPv4 client counts as IPv4.
        ("[::ffff:c000:201]:50000", True),
        ("[::192.0.2.1]:50000", False),
        ("[64:ff9b::192.0.2.1]:50000", False),
        ("[2002:c000:201::1]:50000", False),
    ],
)
def test_clients_by_their_network(client: str, inside: bool) -> None:
    networks = ("192.0.2.0/24", "198.51.100.7", "2001:db8::/32", "fe80::/10")
    gate = rules_gate(*(f"allow {each}" for each in networks))
    assert verifyObject(IGate, gate)
    why = ("client", "no --allow-client names this client")
    assert refusal(gate, client) == (None if inside else why)


def test_a_client_is_told_from_a_rule_that_denies_it() -> None:
    gate = rules_gate("allow 192.0.2.7", "deny 192.0.2.0/24", "deny unix")
    assert refusal(gate, "192.0.2.7:1") is None
    assert refusal(gate, "192.0.2.8:1") == ("client", "--deny-client 192.0.2.0/24")
    assert refusal(gate, "unix:/s") == ("client", "--deny-client unix")
    assert refusal(rules_gate("deny 192.0.2.0/24"), "192.0.3.1:1") is None


def test_clients_of_unix_sockets_are_named_by_a_rule_of_their_own() -> None:
    paths = (b"/run/proxy", b"@192.0.2.1", b"", None)
    names = [address_name(UNIXAddress(path)) for path in paths]
    for name in names:
        assert refusal(rules_gate("allow unix"), name) is None
        assert refusal(rules_gate("deny 0.0.0.0/0"), name) is None
        assert refusal(rules_gate("allow 0.0.0.0/0"), name) is not None


def test_who_can_not_be_identified_is_refused() -> None:
    """No listener of ours has such clients; an endpoint of somebody else's might."""
    for client in (address_name(None), "", "somebody", "somebody:5"):
        for rule in ("allow unix", "allow 0.0.0.0/0", "deny 192.0.2.1"):
            assert refusal(rules_gate(rule), client) == ("client", "it has no address")


# -- hours, and how long sessions last


def test_hours_of_a_gate() -> None:
    clock, wall = Clock(), Wall("2026-11-30 07:59")
    hours = OpeningHours([parse_hours("08:00-18:00")], clock, wall)
    gate = HoursGate(hours)
    assert verifyObject(IGate, gate)
    assert refusal(gate) == ("hours", "outside --hours 08:00-18:00")
    lifetime = Lifetime(0, hours)
    assert lifetime.over(session(), 1e9) == (
        *(Ending.HOURS, "outside --hours 08:00-18:00"),
    )
    assert lifetime.flows_end()
    wall.moment = at("2026-11-30 08:00")
    clock.advance(1)
    assert refusal(gate) is None
    assert lifetime.over(session(), 1e9) is None
    assert not lifetime.flows_end()


def test_sessions_of_one_age_end_one_after_the_other() -> None:
    """Within a tenth of their time, evenly; none lasts longer than it may."""
    lifetime = Lifetime(100)
    ages = sorted(lifetime.age_of(session(number=n)) for n in range(1000))
    assert 90 <= ages[0] < 90.1
    assert 99.9 < ages[-1] <= 100
    assert max(b - a for a, b in pairwise(ages)) < 0.05
    one = session(number=17)
    age = lifetime.age_of(one)
    assert lifetime.over(one, age - 0.001) is None
    assert lifetime.over(one, age) == (Ending.MAX_AGE, "--max-age 100")
    assert not lifetime.flows_end()
    # What it waited, in a queue or for its server, is not taken off.
    one.connected_at = 50.0
    assert lifetime.over(one, 50 + age - 0.001) is None
    assert lifetime.over(one, 50 + age) is not None
    assert Lifetime().over(one, 1e9) is None
    with pytest.raises(ValueError, match="negative"):
        Lifetime(-1)


# -- what is said of one client


def test_rates_and_prefixes_are_read() -> None:
    assert parse_rate("10/60") == parse_rate("10/1m") == ConnectRate(10, 60.0)
    assert str(parse_rate("10/0.5")) == "10/0.5"
    assert parse_prefix("24,56") == ClientPrefix(24, 56)
    assert str(ClientPrefix()) == "32,64"
    for text in ("", "10", "10/", "/1", "0/1", "1/0", "-1/1", "1/-1", "1/1/1", "x/y"):
        with pytest.raises(ValueError, match="such as 10/1"):
            parse_rate(text)
    for text in ("", "24", "24,", ",56", "0,1", "33,64", "1,129", "-1,1", "24,56,1"):
        with pytest.raises(ValueError, match="such as 24,56"):
            parse_prefix(text)


def test_a_client_may_come_so_often() -> None:
    clock = Clock()
    rates = ConnectRates(ConnectRate(3, 6.0), clock)
    assert verifyObject(IGate, rates)
    why = ("max_connects_per_client", "--max-connects-per-client 3/6")
    # As many at once; a second later, not yet; then one each two seconds.
    expected: list[Any] = [None, None, None, why]
    assert [refusal(rates) for _ in range(4)] == expected
    # Another client, and one that nothing tells apart from others.
    assert refusal(rates, "192.0.2.2:1") is None
    assert [refusal(rates, "unix:/s") for _ in range(9)] == [None] * 9
    clock.advance(1.9)
    assert refusal(rates) == why
    clock.advance(0.1)
    assert [refusal(rates), refusal(rates)] == [None, why]
    clock.advance(1000)
    assert [refusal(rates) for _ in range(4)] == expected


def test_who_counts_as_one_client() -> None:
    def same(one: str, other: str, prefix: ClientPrefix | None = None) -> bool:
        rates = ConnectRates(ConnectRate(1, 60.0), Clock(), prefix)
        assert refusal(rates, one) is None
        return refusal(rates, other) is not None

    assert same("192.0.2.1:1", "192.0.2.1:2")
    assert same("192.0.2.1:1", "[::ffff:192.0.2.1]:2")
    assert not same("192.0.2.1:1", "192.0.2.2:1")
    assert same("[2001:db8::1]:1", "[2001:db8::2]:1")
    assert not same("[2001:db8::1]:1", "[2001:db8:0:1::1]:1")
    wide = ClientPrefix(24, 56)
    assert same("192.0.2.1:1", "192.0.2.255:1", wide)
    assert not same("192.0.2.1:1", "192.0.3.1:1", wide)
    assert same("[2001:db8::1]:1", "[2001:db8:0:ff::1]:1", wide)
    assert not same("[2001:db8::1]:1", "[2001:db8:0:100::1]:1", wide)
    # ::192.0.2.1 has the number of 192.0.2.1.
    assert not same("192.0.2.1:1", "[::192.0.2.1]:1", ClientPrefix(32, 128))
    # Whoever has no address, counts as one with others like it.
    assert same("-", "somebody:5")


def test_the_table_of_clients_has_a_limit() -> None:
    """Who has been away longest is forgotten; those whose bucket is full are nobody."""
    clock = Clock()
    rates = ConnectRates(ConnectRate(1, 10.0), clock, max_clients=3)
    for n in (1, 2, 3, 1):
        refusal(rates, f"192.0.2.{n}:1")
        clock.advance(1)
    assert len(rates) == 3
    # 2 came before 1 did for the second time, though that was refused.
    assert refusal(rates, "192.0.2.4:1") is None
    assert (len(rates), rates.evicted) == (3, 1)
    assert refusal(rates, "192.0.2.1:1") is not None
    clock.advance(60)
    for n in range(10, 20):
        assert refusal(rates, f"192.0.2.{n}:1") is None
        clock.advance(10)
    assert (len(rates), rates.evicted) == (3, 1)
    with pytest.raises(ValueError, match="more than 0"):
        ConnectRates(ConnectRate(0, 1.0), clock)


# -- how many at once


def test_so_many_sessions_at_once() -> None:
    limits = SessionLimits(3, 2)
    assert verifyObject(IGate, limits)
    held = [limits.enter(session()) for _ in range(2)]
    assert refusal(limits) == ("max_sessions_per_client", "--max-sessions-per-client 2")
    held.append(limits.enter(session("192.0.2.2:1")))
    assert refusal(limits, "192.0.2.3:1") == ("max_sessions", "--max-sessions 3")
    assert (limits.sessions, limits.clients) == (3, 2)
    held[0].release()
    held[0].release()
    assert limits.sessions == 2, "a place is given back once"
    assert refusal(limits) is None
    for each in held[1:]:
        each.release()
    assert (limits.sessions, limits.clients) == (0, 0)
    # Nothing tells clients of UNIX sockets apart.
    many = [limits.enter(session("unix:/s")) for _ in range(3)]
    assert refusal(limits, "unix:/s") == ("max_sessions", "--max-sessions 3")
    assert len(many) == 3
    for wrong in ((0, None), (None, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            SessionLimits(*wrong)


def waiting(limits: SessionLimits, client: str) -> tuple[Deferred[Any], list[Any]]:
    """A client that waits, and what it is told."""
    told: list[Any] = []
    answer = limits.enter(session(client))
    answer.addBoth(told.append)
    return answer, told


def test_who_comes_to_a_full_relay_waits_in_order() -> None:
    clock = Clock()
    limits = SessionLimits(1, queue=2, queue_timeout=10, clock=clock)
    first = limits.enter(session())
    _, one = waiting(limits, "192.0.2.2:1")
    _, two = waiting(limits, "192.0.2.3:1")
    assert refusal(limits) == ("queue", "--queue 2, with --max-sessions 1")
    first.release()
    assert len(one) == 1
    assert not two
    assert (limits.sessions, limits.waiting) == (1, 1)
    one[0].release()
    two[0].release()
    assert (limits.sessions, limits.waiting) == (0, 0)
    assert not clock.getDelayedCalls()


def test_who_leaves_the_queue_is_forgotten() -> None:
    clock = Clock()
    limits = SessionLimits(1, 1, queue=2, queue_timeout=10, clock=clock)
    first = limits.enter(session())
    answer, one = waiting(limits, "192.0.2.2:1")
    assert refusal(limits, "192.0.2.2:2") is not None, "who waits counts, too"
    _, two = waiting(limits, "192.0.2.3:1")
    answer.cancel()
    assert limits.waiting == 1
    first.release()
    [place] = two
    place.release()
    assert (limits.sessions, limits.clients, limits.waiting) == (0, 0, 0)
    assert len(one) == 1
    assert not clock.getDelayedCalls()


def test_who_has_waited_for_too_long_is_refused() -> None:
    clock = Clock()
    limits = SessionLimits(1, 5, queue=9, queue_timeout=10, clock=clock)
    first = limits.enter(session())
    _, one = waiting(limits, "192.0.2.2:1")
    clock.advance(5)
    _, two = waiting(limits, "192.0.2.2:1")
    clock.advance(5)
    assert one[0].value.reason == "queue_timeout"
    assert one[0].value.why == "--queue-timeout 10"
    assert not two
    clock.advance(5)
    assert two[0].value.reason == "queue_timeout"
    assert limits.clients == 1
    first.release()
    assert (limits.sessions, limits.clients, limits.waiting) == (0, 0, 0)
    assert not clock.getDelayedCalls()


def test_a_long_queue_whose_members_leave_at_once_is_no_recursion() -> None:
    limits = SessionLimits(1, queue=5000, queue_timeout=10, clock=Clock())
    first = limits.enter(session())
    left = []

    def leave(lease: Any) -> None:
        lease.release()
        left.append(lease)

    for _ in range(5000):
        limits.enter(session()).addCallback(leave)
    first.release()
    assert len(left) == 5000
    assert (limits.sessions, limits.waiting) == (0, 0)


def test_what_a_queue_takes() -> None:
    for wrong in (
        {"queue": 1},
        {"queue": 1, "max_sessions": 1},
        {"queue": 1, "clock": Clock()},
        {"queue": -1, "max_sessions": 1, "clock": Clock()},
        {"queue_timeout": 0},
    ):
        with pytest.raises(ValueError, match="queue"):
            SessionLimits(**wrong)  # type: ignore[arg-type]


# -- several


class Door:
    """A gate that the test opens and closes, and that counts."""

    def __init__(self) -> None:
        self.answer: Any = None
        self.inside = self.asked = 0

    def enter(self, _: object) -> Any:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer is not None:
            return self.answer
        self.inside += 1
        return self

    def release(self) -> None:
        self.inside -= 1


def test_all_of_several_admit() -> None:
    doors = [Door(), Door(), Door()]
    gates = Gates([rules_gate("deny 10.0.0.1"), *doors])
    assert verifyObject(IGate, gates)
    lease = gates.enter(session())
    assert [door.inside for door in doors] == [1, 1, 1]
    lease.release()
    lease.release()
    assert [door.inside for door in doors] == [0, 0, 0]
    assert Gates([rules_gate("deny 10.0.0.1")]).enter(session()) is FREE
    assert refusal(gates, "10.0.0.1:1") is not None
    assert doors[0].asked == 1, "later ones are not asked"


@pytest.mark.parametrize("problem", [Refused("no", "hours"), ZeroDivisionError("x")])
def test_what_was_given_is_given_back_if_a_later_one_refuses(
    problem: Exception,
) -> None:
    doors = [Door(), Door(), Door()]
    doors[2].answer = problem
    with pytest.raises(type(problem)):
        Gates(doors).enter(session())
    assert [door.inside for door in doors] == [0, 0, 0]


def test_one_of_several_takes_its_time() -> None:
    doors = [Door(), Door(), Door()]
    for ends in ("admits", "refuses", "later refuses", "cancelled"):
        later: Deferred[Any] = Deferred()
        doors[1].answer = later
        doors[2].answer = Refused("no") if ends == "later refuses" else None
        told: list[Any] = []
        answer: Deferred[Any] = Deferred.fromCoroutine(Gates(doors).enter(session()))
        answer.addBoth(told.append)
        assert [door.inside for door in doors] == [1, 0, 0]
        doors[1].inside += ends != "refuses"
        if ends == "refuses":
            later.errback(Refused("no"))
        elif ends == "cancelled":
            answer.cancel()
            # It has no canceller, and comes all the same.
            later.callback(doors[1])
        else:
            later.callback(doors[1])
        if ends == "admits":
            assert [door.inside for door in doors] == [1, 1, 1]
            told[0].release()
        else:
            assert told[0].check(Exception)
        assert [door.inside for door in doors] == [0, 0, 0]


def test_who_is_refused_by_another_limit_has_not_come() -> None:
    """At once, or later; what it may come by in a while is as it was."""
    clock = Clock()
    rates = ConnectRates(ConnectRate(2, 60.0), clock)
    limits = SessionLimits(1, queue=1, queue_timeout=5, clock=clock)
    gates = Gates([rates, limits])
    inside = limits.enter(session("192.0.2.9:1"))
    waits: Deferred[Any] = Deferred.fromCoroutine(gates.enter(session()))
    told: list[Any] = []
    waits.addBoth(told.append)
    for _ in range(5):
        reason, _ = refusal(gates) or ("", "")
        assert reason == "queue"
    clock.advance(5)
    assert told.pop().value.reason == "queue_timeout"
    # Who leaves has come: or the queue could be joined and left as often as one likes.
    leaves: Deferred[Any] = Deferred.fromCoroutine(gates.enter(session()))
    leaves.addErrback(lambda _: None)
    leaves.cancel()
    assert limits.waiting == 0
    inside.release()
    assert refusal(gates) is None
    why = refusal(gates)
    assert why is not None
    assert why[0] == "max_connects_per_client"
    # Whom it has refused itself, it gives nothing.
    assert refusal(gates) == why


def test_hours_are_asked_again_of_who_had_to_wait() -> None:
    clock, wall = Clock(), Wall("2026-01-05 17:59:59")
    hours = HoursGate(OpeningHours([parse_hours("08:00-18:00")], clock, wall))
    limits = SessionLimits(1, queue=2, queue_timeout=60, clock=clock)
    door = Door()
    gates = Gates([door, hours, limits])
    inside = gates.enter(session())
    told: list[Any] = []
    for _ in range(2):
        waits: Deferred[Any] = Deferred.fromCoroutine(gates.enter(session()))
        waits.addBoth(told.append)
    assert (limits.waiting, door.inside) == (2, 3)
    wall.moment = at("2026-01-05 18:00:00")
    clock.advance(1)
    inside.release()
    # None of them has a place, and each made room for the next.
    assert [each.value.reason for each in told] == ["hours", "hours"]
    assert (limits.waiting, limits.sessions, door.inside) == (0, 0, 0)
    assert door.asked == 3, "what does not change is not asked again"


@pytest.mark.parametrize("lifted", [False, True])
def test_who_had_to_wait_is_asked_about_the_hours_that_there_are(lifted: bool) -> None:
    """They have changed twice since it came; or there are none any more."""
    clock, wall = Clock(), Wall("2026-01-05 17:59:59")
    texts = ("08:00-18:00", "08:00-17:00", "08:00-22:00")
    gates = [HoursGate(OpeningHours([parse_hours(x)], clock, wall)) for x in texts]
    limits = SessionLimits(1, queue=2, queue_timeout=60, clock=clock)
    inside = limits.enter(session())
    told: list[Any] = []
    waits: Deferred[Any]
    waits = Deferred.fromCoroutine(Gates([gates[0], limits]).enter(session()))
    waits.addBoth(told.append)
    gates[1].succeed(gates[0])
    if lifted:
        gates[1].lift()
    else:
        gates[2].succeed(gates[1])
    wall.moment = at("2026-01-05 18:00:00")
    clock.advance(1)
    inside.release()
    told[0].release()
    assert limits.sessions == 0


def test_a_queue_among_several_has_its_time() -> None:
    limits = SessionLimits(1, queue=1, queue_timeout=7, clock=Clock())
    assert Gates([Door(), limits]).patience == 7
    assert Gates([Door(), SessionLimits(1)]).patience == 0


def test_reasons_are_few() -> None:
    assert Refused("x").reason == Refused("x", "my own word").reason == "gate"
    assert len(set(REASONS)) == len(REASONS)
