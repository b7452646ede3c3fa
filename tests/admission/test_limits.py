"""Limits on those who wait: against a list of them, and one by one."""

from __future__ import annotations

import errno

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from twisted.internet.task import Clock
from twisted.logger import capturedLogs

from relayd.admission.limits import (
    Waiting,
    default_max_handshakes,
    default_max_handshakes_per_client,
)
from relayd.core.errors import Refused
from tests.support.standing import refuse

clients = st.sampled_from(["192.0.2.1", "192.0.2.2", "2001:db8::1", ""])


class Model(RuleBasedStateMachine):
    """The same things are done to a Waiting and to a plain list, oldest first."""

    @initialize(most=st.integers(1, 6), max_per_client=st.integers(1, 4))
    def begin(self, most: int, max_per_client: int) -> None:
        self.clock = Clock()
        self.most, self.max_per_client = most, max_per_client
        self.waiting: Waiting[int] = Waiting("things", most, max_per_client, self.clock)
        self.list: list[tuple[int, str]] = []
        self.last = 0
        self.hits = 0
        self.logged_at: float | None = None

    def next(self) -> int:
        """Somebody who never was here."""
        self.last += 1
        return self.last

    def of(self, client: str) -> list[tuple[int, str]]:
        """Those of one client."""
        return [each for each in self.list if each[1] == client]

    def hit(self, lines: int) -> None:
        """A limit was reached, and the log has `lines` of it."""
        self.hits += 1
        now = self.clock.seconds()
        due = self.logged_at is None or now - self.logged_at >= 1
        assert lines == due
        if due:
            self.logged_at = now

    @rule(client=clients)
    def add(self, client: str) -> None:
        item = self.next()
        full = len(self.list) >= self.most
        with capturedLogs() as events:
            if full or len(self.of(client)) >= self.max_per_client:
                with pytest.raises(Refused) as caught:
                    self.waiting.add(item, client)
                most = self.most if full else self.max_per_client
                assert caught.value.why.startswith(f"{most} things ")
                assert ("of this client" in caught.value.why) is not full
                self.hit(len(events))
                return
            self.waiting.add(item, client)
        assert not events
        self.list.append((item, client))

    @rule(client=clients)
    def push(self, client: str) -> None:
        item = self.next()
        gone = None
        if len(self.of(client)) >= self.max_per_client:
            gone = self.of(client)[0]
        elif len(self.list) >= self.most:
            gone = self.list[0]
        with capturedLogs() as events:
            assert self.waiting.push(item, client) == (gone[0] if gone else None)
        if gone:
            self.list.remove(gone)
            self.hit(len(events))
        else:
            assert not events
        self.list.append((item, client))

    @precondition(lambda self: self.list)
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        each = data.draw(st.sampled_from(self.list))
        self.waiting.discard(each[0])
        self.list.remove(each)

    @rule()
    def discard_whoever_is_gone_or_never_was(self) -> None:
        here = {item for item, _ in self.list}
        for item in range(-1, self.last + 2):
            if item not in here:
                self.waiting.discard(item)

    @rule(seconds=st.sampled_from([0.25, 0.5, 1.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @invariant()
    def they_agree(self) -> None:
        assert len(self.waiting) == len(self.list) <= self.most
        here = {item for item, _ in self.list}
        for item in range(self.last + 2):
            assert (item in self.waiting) == (item in here)
        for _, client in self.list:
            assert len(self.of(client)) <= self.max_per_client
        assert self.waiting.hits == self.hits
        # Nothing is remembered of clients who are gone: there may be millions.
        assert set(self.waiting._by_client) == {client for _, client in self.list}
        assert not self.clock.getDelayedCalls()


def test_the_table_behaves_like_a_limited_list() -> None:
    """With any calls in any order."""
    run_state_machine_as_test(
        Model, settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )


def wait_for(
    most: int, max_per_client: int, clock: Clock | None = None
) -> Waiting[str]:
    """An empty one."""
    return Waiting("handshakes", most, max_per_client, clock or Clock())


def test_a_client_over_its_limit_is_refused() -> None:
    """In words for the log that say which bound it was; nobody else is hurt."""
    waiting = wait_for(3, 2)
    waiting.add("a", "192.0.2.1")
    waiting.add("b", "192.0.2.1")
    with pytest.raises(Refused) as caught:
        waiting.add("c", "192.0.2.1")
    assert caught.value.why == "2 handshakes of this client wait already"
    waiting.add("d", "192.0.2.2")
    with pytest.raises(Refused) as caught:
        waiting.add("e", "192.0.2.3")
    assert caught.value.why == "3 handshakes wait already"
    assert [each for each in "abcde" if each in waiting] == ["a", "b", "d"]
    waiting.discard("a")
    waiting.add("e", "192.0.2.3")
    assert "e" in waiting


def test_the_oldest_is_evicted() -> None:
    """Of the client's own, if it has too many; so that it can push out nobody else."""
    waiting = wait_for(4, 2)
    assert waiting.push("a", "192.0.2.1") is None
    assert waiting.push("b", "192.0.2.2") is None
    assert waiting.push("c", "192.0.2.2") is None
    assert waiting.push("d", "192.0.2.2") == "b"
    assert waiting.push("e", "192.0.2.3") is None
    assert len(waiting) == 4
    assert waiting.push("f", "192.0.2.2") == "c"
    assert waiting.push("g", "192.0.2.3") == "a"
    assert [each for each in "abcdefg" if each in waiting] == ["d", "e", "f", "g"]


def test_the_log_has_at_most_one_line_a_second() -> None:
    """With the limit that it was, and how often one was reached."""
    clock = Clock()
    waiting = wait_for(2, 1, clock)
    with capturedLogs() as events:
        waiting.push("a", "192.0.2.1")
        assert not events
        for item in ("b", "c", "d"):
            waiting.push(item, "192.0.2.1")
        clock.advance(0.75)
        waiting.push("e", "192.0.2.1")
        clock.advance(0.25)
        waiting.push("f", "")
        waiting.push("g", "192.0.2.2")
        clock.advance(1)
        waiting.push("h", "192.0.2.2")
    assert waiting.hits == 6
    said = [(event["log_namespace"], event["log_level"].name) for event in events]
    assert said == [("relayd.limits", "warn")] * 3
    assert [event["log_format"].format(**event) for event in events] == [
        "1 handshakes of 192.0.2.1 wait, which is the limit (reached 1 times so far)",
        "2 handshakes in all wait, which is the limit (reached 5 times so far)",
        "1 handshakes of 192.0.2.2 wait, which is the limit (reached 6 times so far)",
    ]


def test_a_client_without_an_address() -> None:
    """All of a UNIX socket's count as one."""
    waiting = wait_for(9, 1)
    waiting.add("a", "")
    with capturedLogs() as events, pytest.raises(Refused):
        waiting.add("b", "")
    assert events[0]["whose"] == "of one client"


def test_the_oldest_in_order() -> None:
    """Of all clients together; reading changes nothing."""
    waiting: Waiting[int] = Waiting("things", 9, 9, Clock())
    for number in range(4):
        waiting.push(number, "192.0.2.1" if number % 2 else "192.0.2.2")
    waiting.discard(1)
    assert [waiting.oldest(2), waiting.oldest(9)] == [[0, 2], [0, 2, 3]]
    assert len(waiting) == 3


@pytest.mark.parametrize(
    ("limit", "most", "each"),
    [
        (1 << 20, 4096, 1024),
        (16384, 4096, 1024),
        (1024, 256, 64),
        (3, 1, 1),
        (-1, 4096, 1024),
    ],
)
def test_the_default_of_handshakes_depends_on_the_limit_of_open_files(
    limit: int, most: int, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of them, and a quarter of those for one client; -1 is no limit."""
    monkeypatch.setattr("resource.getrlimit", lambda _: (limit, limit))
    assert default_max_handshakes() == most
    assert default_max_handshakes_per_client(most) == each
    assert default_max_handshakes_per_client(1 << 20) == 1024


def test_an_unknown_limit_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """getrlimit(2) is refused, by a sandbox: as many as with a high one."""
    monkeypatch.setattr("resource.getrlimit", refuse(errno.EPERM))
    assert default_max_handshakes() == 4096
