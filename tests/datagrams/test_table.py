"""The table of flows: against a naive one, and expiry to the step."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from relayd.core.flows import Flow
from relayd.datagrams.table import IN_USE_AFTER, NatTable, TableFull

Table = NatTable[Flow]


def table_of(max_flows: int = 1, max_flows_per_client: int = 1, **given: Any) -> Table:
    """A table with the timeouts that relays have unless given."""
    settings = {"timeout": 300.0, "unreplied_timeout": 30.0, "refresh_inbound": True}
    return NatTable(max_flows, max_flows_per_client, **{**settings, **given})


hosts = st.sampled_from(["192.0.2.1", "192.0.2.2", "2001:db8::1"])
#: Binary fractions, so that sums of them are exact.
lifetimes = st.integers(1, 40).map(lambda n: n / 4)


class Model(RuleBasedStateMachine):
    """The same is done to a table and to a plain list, the longest quiet first."""

    @initialize(
        max_flows=st.integers(1, 7),
        max_flows_per_client=st.integers(1, 4),
        timeout=lifetimes,
        unreplied_timeout=lifetimes,
        refresh=st.booleans(),
        start=st.integers(0, 9).map(lambda n: n / 4) | st.just(1.7e9),
    )
    def begin(
        self,
        max_flows: int,
        max_flows_per_client: int,
        timeout: float,
        unreplied_timeout: float,
        refresh: bool,
        start: float,
    ) -> None:
        self.max_flows, self.max_flows_per_client = max_flows, max_flows_per_client
        self.timeout, self.unreplied_timeout = timeout, unreplied_timeout
        self.refresh = refresh
        self.table: Table = NatTable(
            max_flows,
            max_flows_per_client,
            timeout=timeout,
            unreplied_timeout=unreplied_timeout,
            refresh_inbound=refresh,
        )
        self.now = start
        #: Flows with when they were last alive.
        self.list: list[Flow] = []
        self.seen: dict[Flow, float] = {}
        #: Those that were answered, with when they were first.
        self.answered: dict[Flow, float] = {}
        #: When something had moved as they got their places in the list.
        self.placed: dict[Flow, float] = {}
        #: When the last datagram of any kind was.
        self.moved: dict[Flow, float] = {}
        self.last = self.evicted = self.refused = 0

    def forget(self, flow: Flow) -> None:
        self.list.remove(flow)
        del self.seen[flow]
        self.answered.pop(flow, None)
        self.placed.pop(flow, None)
        del self.moved[flow]

    def in_use(self, flow: Flow) -> bool:
        late = self.moved[flow] > flow.began + IN_USE_AFTER
        return flow in self.answered and late

    def ends(self, flow: Flow) -> float:
        lives = self.unreplied_timeout
        if self.in_use(flow):
            lives = self.timeout
        elif flow in self.answered:
            lives = min(lives, self.timeout)
        return self.seen[flow] + lives

    def refresh_now(self, flow: Flow) -> None:
        self.seen[flow] = self.now

    @rule(host=hosts)
    def new_client(self, host: str) -> None:
        own = [each for each in self.list if each.host == host]
        among = None
        if len(own) >= self.max_flows_per_client:
            among = own
        elif len(self.list) >= self.max_flows:
            among = self.list
        if among is not None:
            waiting = [each for each in among if not self.in_use(each)]
            while waiting and self.seen[waiting[0]] > self.placed[waiting[0]]:
                # It has moved since it got its place: it gets another.
                moved = waiting.pop(0)
                self.placed[moved] = self.seen[moved]
                waiting.append(moved)
                self.list.remove(moved)
                self.list.append(moved)
            if not waiting:
                self.refused += 1
                with pytest.raises(
                    TableFull, match="the flow table is full: no flow for"
                ):
                    self.table.to_evict(host)
                return
            assert self.table.to_evict(host) is waiting[0]
            self.table.remove(waiting[0], evicted=True)
            self.evicted += 1
            self.forget(waiting[0])
        assert self.table.to_evict(host) is None
        self.last += 1
        flow = Flow(self.last, host, self.now)
        self.table.add(flow)
        self.list.append(flow)
        self.seen[flow] = self.moved[flow] = self.placed[flow] = self.now

    @precondition(lambda self: self.list)
    @rule(data=st.data())
    def client_sends(self, data: st.DataObject) -> None:
        flow = data.draw(st.sampled_from(self.list))
        self.table.outbound(flow, self.now)
        self.moved[flow] = self.now
        self.refresh_now(flow)

    @precondition(lambda self: self.list)
    @rule(data=st.data())
    def server_answers(self, data: st.DataObject) -> None:
        flow = data.draw(st.sampled_from(self.list))
        self.table.inbound(flow, self.now)
        first = flow not in self.answered
        self.answered.setdefault(flow, self.now)
        self.moved[flow] = self.now
        if self.refresh:
            self.refresh_now(flow)
            if first:
                self.placed[flow] = self.now
                self.list.remove(flow)
                self.list.append(flow)

    @precondition(lambda self: self.list)
    @rule(data=st.data())
    def flow_fails(self, data: st.DataObject) -> None:
        flow = data.draw(st.sampled_from(self.list))
        self.table.remove(flow)
        self.forget(flow)

    @rule(
        seconds=st.integers(1, 16).map(lambda n: n / 8) | st.sampled_from([9.5, 1e4]),
        keep=st.booleans(),
    )
    def time_passes(self, seconds: float, keep: bool) -> None:
        """The look comes when it comes; each flow is in time for it."""
        self.now += seconds
        expired = self.table.expire(self.now)
        assert len(set(expired)) == len(expired)
        for flow in self.list:
            if flow in expired:
                assert self.ends(flow) <= self.now, "it was alive"
            else:
                # An answer that shortens its life may come when that is over.
                over = max(self.ends(flow), self.answered.get(flow, 0.0))
                assert over > self.now - self.table.step, "it is late"
        for flow in expired:
            if keep:
                # Something has come for it in the last moment.
                self.table.outbound(flow, self.now)
                self.moved[flow] = self.now
                self.refresh_now(flow)
            else:
                self.table.remove(flow)
                self.forget(flow)

    @invariant()
    def they_agree(self) -> None:
        table = self.table
        assert set(table._evictable) == {
            each for each in self.list if not self.in_use(each)
        }
        assert all(each.in_use == self.in_use(each) for each in self.list)
        assert all(table.expires_at(each) == self.ends(each) for each in self.list)
        assert set(table.flows.values()) == set(self.list)
        assert all(table.flows[each.key] is each for each in self.list)
        assert len(table) == len(self.list) <= self.max_flows
        assert (table.evicted, table.refused) == (self.evicted, self.refused)
        # Nothing is remembered of who is gone, and nobody is to be looked at twice.
        assert set(table._hosts) == {each.host for each in self.list}
        for own, spare in table._hosts.values():
            assert 0 < len(own) <= self.max_flows_per_client
            assert set(spare) == {each for each in table._evictable if each in own}
        scheduled = [flow for bucket in table._buckets.values() for flow in bucket]
        assert len(scheduled) == len(self.list)
        assert set(scheduled) == set(self.list)
        assert all(table._buckets.values())

    def teardown(self) -> None:
        if not hasattr(self, "table"):
            return
        for flow in list(self.table.flows.values()):
            self.table.remove(flow)
        assert not self.table._hosts
        assert not self.table._buckets
        assert not self.table._evictable


def test_the_table_behaves_like_a_limited_list_that_expires() -> None:
    """Whatever is done in whatever order."""
    run_state_machine_as_test(
        Model,
        settings=settings(max_examples=120, stateful_step_count=40, deadline=None),
    )


@given(
    lifetimes,
    lifetimes,
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from("cs.")), max_size=15),
    st.integers(0, 3),
)
def test_expiry_with_a_check_at_each_step(
    timeout: float, unreplied: float, history: list[tuple[int, str]], began: int
) -> None:
    """Looked at where steps begin, a flow ends in the first look after its time."""
    table = table_of(9, 9, timeout=timeout, unreplied_timeout=unreplied)
    assert table.step <= min(timeout, unreplied) / 20
    now = moved = began / 4
    flow = Flow("a", "192.0.2.1", now)
    table.add(flow)
    answered, grain = False, min(0.25, table.step)

    def lives() -> float:
        if not answered:
            return unreplied
        return timeout if moved > began / 4 + 2 else min(timeout, unreplied)

    for quarters, who in [*history, (1000, ".")]:
        for _ in range(round(quarters / 4 / grain)):
            now += grain
            if now % table.step:
                continue
            expired = table.expire(now)
            assert expired == ([flow] if moved + lives() <= now else [])
            if expired:
                assert now - (moved + lives()) < table.step
                return
        if who == "c":
            table.outbound(flow, now)
            moved = now
        elif who == "s":
            table.inbound(flow, now)
            moved, answered = now, True
    raise AssertionError("it has not expired")


def test_the_first_reply_may_shorten_the_timeout() -> None:
    """Those who set the timeouts that way get it to the step, in use or not."""
    for replies in ([1.0], [0.5, 1.0], [5.0]):
        table = table_of(1, 1, timeout=2, unreplied_timeout=30)
        flow = Flow("a", "192.0.2.1", 0.0)
        table.add(flow)
        for now in replies:
            table.inbound(flow, now)
        assert flow.in_use == (replies == [5.0])
        assert not table.expire(replies[-1] + 1)
        assert table.expire(replies[-1] + 2) == [flow]


@pytest.mark.parametrize(
    ("history", "in_use"),
    [
        # However often a client asks: nobody has answered.
        ("c0 c1 c3 c9", False),
        # An answer, and a whole exchange, in the first two seconds.
        ("c0 s1", False),
        ("c0 s1 c1 s2 c2", False),
        # Later: either side's datagram shows that it goes on.
        ("c0 s1 c3", True),
        # One that has subscribed.
        ("c0 s1 s3", True),
        ("c0 s0 s1 s2", False),
        # The answer itself.
        ("c0 s3", True),
    ],
)
@pytest.mark.parametrize("refresh", [True, False])
def test_when_a_flow_is_in_use(history: str, in_use: bool, refresh: bool) -> None:
    """Traffic both ways, and more of it after two seconds."""
    table = table_of(1, 1, refresh_inbound=refresh)
    flow = Flow("a", "192.0.2.1", 0.0)
    table.add(flow)
    for event in history.split():
        move = table.outbound if event[0] == "c" else table.inbound
        move(flow, float(event[1:]))
    assert flow.in_use == in_use
    assert table.expires_at(flow) - flow.seen == (300 if in_use else 30)
    assert table.idlest() is (None if in_use else flow)


def test_the_longest_idle_flow_is_to_evict() -> None:
    """What a server sends counts, if it keeps a flow alive at all."""
    for refresh in (True, False):
        table = table_of(2, 2, refresh_inbound=refresh)
        first, second = (Flow(key, "192.0.2.1", 0.0) for key in "ab")
        table.add(first)
        table.add(second)
        table.inbound(first, 1.0)
        assert table.to_evict("192.0.2.1") is (second if refresh else first)
        assert table.to_evict("192.0.2.2") is (second if refresh else first)


@pytest.mark.parametrize(
    ("shortest", "step"),
    [
        (300, 1),
        (30, 1),
        (20, 1),
        (19, 0.5),
        (1, 1 / 32),
        (0.5, 1 / 64),
        (1e-6, 1 / 128),
    ],
)
def test_a_step_is_a_part_of_the_shorter_timeout(shortest: float, step: float) -> None:
    """A twentieth or less, and no more than a second."""
    for one, other in ((shortest, 1000.0), (1000.0, shortest)):
        table = table_of(1, 1, timeout=one, unreplied_timeout=other)
        assert table.step == step


@pytest.mark.cost
def test_a_busy_flow_is_checked_once_in_its_timeout() -> None:
    """A test of cost.  The cost of a datagram is none of the buckets'."""
    table = table_of(1, 1, timeout=100)
    flow = Flow("a", "192.0.2.1", 0.0)
    table.add(flow)
    table.inbound(flow, 0.0)
    moves = 0
    for now in range(1, 1000):
        table.outbound(flow, now)
        before = flow.bucket
        assert not table.expire(now)
        moves += flow.bucket != before
    assert moves <= 12


def test_a_kept_flow_is_checked_in_the_next_step() -> None:
    """And comes back, if nothing has moved."""
    table = table_of(1, 1, unreplied_timeout=2)
    flow = Flow("a", "192.0.2.1", 0.5)
    table.add(flow)
    assert not table.expire(2.25)
    for now in (2.75, 2.875, 5.75):
        assert table.expire(now) == [flow]


def test_a_clock_that_goes_back_ends_nothing() -> None:
    """Nor does it make the table forget what it had to look at."""
    table = table_of(2, 2, unreplied_timeout=5)
    first = Flow("a", "192.0.2.1", 100.0)
    table.add(first)
    assert not table.expire(102.0)
    second = Flow("b", "192.0.2.1", 50.0)
    table.add(second)
    assert not table.expire(51.0)
    assert table.expire(103.0) == [second]
    table.remove(second)
    assert table.expire(105.0) == [first]


def test_an_empty_table_has_nothing_to_expire() -> None:
    """At any time."""
    assert not table_of().expire(1e9)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_flows": 0},
        {"max_flows_per_client": 0},
        {"timeout": 0},
        {"unreplied_timeout": -1},
        {"timeout": float("nan")},
    ],
)
def test_impossible_settings(settings: dict[str, float]) -> None:
    """A table without room or time is a mistake."""
    with pytest.raises(ValueError, match="at least one flow|must be more than 0"):
        table_of(**settings)  # type: ignore[arg-type]
