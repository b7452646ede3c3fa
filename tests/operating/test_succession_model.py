"""Limits of sessions change in whatever order, while clients come, wait and leave.

A model has the clients of one relay in plain lists, and the limits as numbers.  The
relay, on fakes, has factories as a change makes them.  Its clients are behind a
balancer, and so may have connected long before their gate is asked.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import attrs
from hypothesis import Phase, settings
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

from relayd.admission.gates import parts_of
from relayd.admission.per_client import ClientPrefix, ConnectRate
from relayd.admission.session_limits import SessionLimits
from relayd.configuring.config import Admission
from relayd.core.stage import Stage
from relayd.net.upstream import Upstream
from relayd.operating.admission import Admitting
from relayd.operating.standing import Listening
from relayd.operating.succession import succeed
from relayd.tcp import RelayFactory
from tests.support.fakes import FakeEndpoint, FakeTransport
from tests.support.relays import Witness

#: Two of one network, and one of another.
HOSTS = ("198.51.100.1", "198.51.100.2", "203.0.113.1")

#: None, in all, of one client, and both; with a queue, and without; and beside another
#: gate, or alone.
RATE = st.sampled_from([None, ConnectRate(10**6, 1)])
LIMITS = st.one_of(
    st.just(Admission()),
    st.builds(
        Admission,
        max_connects_per_client=RATE,
        max_sessions=st.none() | st.integers(1, 4),
        max_sessions_per_client=st.none() | st.integers(1, 3),
        client_prefix=st.sampled_from([ClientPrefix(), ClientPrefix(24, 56)]),
    ),
    st.builds(
        Admission,
        max_connects_per_client=RATE,
        max_sessions=st.integers(1, 3),
        max_sessions_per_client=st.none() | st.integers(1, 3),
        queue=st.integers(1, 3),
        queue_timeout=st.sampled_from([5.0, 20.0]),
    ),
)


@attrs.define(eq=False)
class Client:
    """One behind a balancer.

    :ivar until: when it has waited for too long.
    """

    host: str
    transport: FakeTransport
    session: Any
    until: float = 0.0

    @property
    def is_served(self) -> bool:
        return self.session.ordinal >= 0 and self.session.stage is Stage.DIALING


class Model(RuleBasedStateMachine):
    """The same is done to a relay and to lists."""

    @initialize(limits=LIMITS)
    def begin(self, limits: Admission) -> None:
        self.clock = Clock()
        self.limits = limits
        self.admitting = Admitting.of(limits, self.clock)
        self.made: list[Any] = []
        self.listenings = self.generation()
        self.last = 0
        #: Of whom the gate has not been asked, who wait, and who are served.
        self.new: list[Client] = []
        self.waiting: list[Client] = []
        self.served: list[Client] = []

    def generation(self) -> list[Listening]:
        """What serves the two ports of the relay from now on."""
        listenings = []
        for port in ("80", "81"):
            factory = RelayFactory(
                Upstream(FakeEndpoint(self.clock), "server:80"),
                clock=self.clock,
                observer=Witness(),
                gate=self.admitting.gate,
                accept_proxy=["192.0.2.1"],
                handshake_timeout=0,
                connect_timeout=0,
                name="web",
            )
            self.made.append(factory)
            listenings.append(Listening(None, factory, port, ""))  # type: ignore[arg-type]
        return listenings

    # -- what the model knows

    def key(self, host: str) -> str:
        """What a client counts for."""
        bits = self.limits.client_prefix.ipv4 if self.limits.client_prefix else 32
        return host.rpartition(".")[0] if bits == 24 else host

    @property
    def counts(self) -> Counter[str]:
        """What each client has, or waits for."""
        return Counter(self.key(each.host) for each in [*self.served, *self.waiting])

    def refusal(self, host: str) -> str:
        """Why the next client is refused; empty: it is not."""
        own = self.limits.max_sessions_per_client
        if own is not None and self.counts[self.key(host)] >= own:
            return "max_sessions_per_client"
        if self.is_full:
            if not self.limits.queue:
                return "max_sessions"
            if len(self.waiting) >= self.limits.queue:
                return "queue"
        return ""

    @property
    def is_full(self) -> bool:
        most = self.limits.max_sessions
        return most is not None and len(self.served) >= most

    def fill(self) -> None:
        """Whoever waits has what is free, in order."""
        while self.waiting and not self.is_full:
            self.served.append(self.waiting.pop(0))

    # -- what happens

    @rule(host=st.sampled_from(HOSTS), port=st.integers(0, 1))
    def connect(self, host: str, port: int) -> None:
        """Its header is not there yet."""
        transport = FakeTransport(clock=self.clock)
        factory: Any = self.listenings[port].factory
        protocol = factory.buildProtocol(transport.peer)
        transport.connect(protocol)
        self.new.append(Client(host, transport, protocol.session))

    @precondition(lambda self: self.new)
    @rule(data=st.data())
    def introduce(self, data: st.DataObject) -> None:
        """The gate is asked, by the factory of whenever it has connected."""
        client = data.draw(st.sampled_from(self.new))
        self.new.remove(client)
        refused, waits = self.refusal(client.host), self.is_full
        self.last += 1
        header = f"PROXY TCP4 {client.host} 192.0.2.2 {self.last} 80\r\n"
        client.transport.receive(header.encode())
        assert client.session.reason == refused
        if refused:
            return
        if waits:
            client.until = self.clock.seconds() + self.limits.queue_timeout
        (self.waiting if waits else self.served).append(client)

    @precondition(lambda self: self.new or self.waiting or self.served)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        here = [*self.new, *self.waiting, *self.served]
        client = data.draw(st.sampled_from(here))
        for each in (self.new, self.waiting, self.served):
            if client in each:
                each.remove(client)
        client.transport.lose()
        self.fill()

    @rule(seconds=st.sampled_from([1.0, 4.0, 16.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.advance(seconds)
        now = self.clock.seconds()
        for each in list(self.waiting):
            if each.until <= now:
                self.waiting.remove(each)
                assert each.session.reason == "queue_timeout"

    @rule(limits=LIMITS, again=st.booleans())
    def change(self, limits: Admission, again: bool) -> None:
        """Other limits; or there is no relay for a moment.

        :param again: it was removed, and is back before all of its sessions are over.
        """
        before = self.listenings
        self.admitting = Admitting.of(limits, self.clock, self.admitting)
        self.listenings = self.generation()
        were = {each.factory for each in before}
        if again:
            were, before = set(), []
        latest = [each.factory for each in self.listenings]
        former = [
            each
            for each in self.made
            if each not in latest and (each in were or len(each.registry))
        ]
        succeed(self.listenings, before, former)
        now, was = self.clock.seconds(), self.limits
        more = max(limits.queue_timeout - was.queue_timeout, 0)
        for each in self.waiting:
            each.until = min(each.until + more, now + limits.queue_timeout)
        self.limits = limits
        self.fill()
        self.clock.advance(0)

    # -- what is so at any time

    @property
    def gate(self) -> SessionLimits | None:
        found = [
            each
            for each in parts_of(self.admitting.gate)
            if isinstance(each, SessionLimits)
        ]
        return found[0] if found else None

    @invariant()
    def who_is_served_is_served(self) -> None:
        assert all(each.is_served for each in self.served)
        for each in self.waiting:
            assert each.session.stage is Stage.WAITING
        for each in self.new:
            assert each.session.stage is Stage.HEADER
        living = sum(len(each.sessions) for each in self.made)
        assert living == len(self.served) + len(self.waiting) + len(self.new)

    @invariant()
    def all_are_counted_once(self) -> None:
        if self.gate is None:
            assert not self.waiting
            return
        assert self.gate.sessions == len(self.served)
        assert self.gate.waiting == len(self.waiting)
        if self.limits.max_sessions_per_client is None:
            assert self.gate.clients == 0
            return
        assert self.gate.clients == len(self.counts)
        assert self.gate.most_of_one == max(self.counts.values(), default=0)
        for host in HOSTS:
            assert self.gate.sessions_of(f"{host}:1") == self.counts[self.key(host)]

    def teardown(self) -> None:
        """When all have left, nothing is counted, and no timer is left."""
        if not hasattr(self, "clock"):
            return
        for each in [*self.new, *self.waiting[::-1], *self.served]:
            each.transport.lose()
        if self.gate is not None:
            gate = self.gate
            assert (gate.sessions, gate.waiting, gate.clients) == (0, 0, 0)
        for each in self.made:
            each.stopFactory()
        self.clock.advance(100)
        assert not self.clock.getDelayedCalls()


def test_limits_that_change_count_who_is_there() -> None:
    """With any changes in any order."""
    run_state_machine_as_test(
        Model,
        settings=settings(
            max_examples=80,
            stateful_step_count=40,
            deadline=None,
            # To shrink one takes minutes.
            phases=[Phase.generate],
        ),
    )
