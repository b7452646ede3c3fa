"""The stages of a session: the table, and that sessions keep to it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.task import Clock

from relayd.core.session import Ending, Session
from relayd.core.stage import NEXT, Stage
from relayd.net.upstream import Upstream
from relayd.tcp import RelayFactory
from relayd.upstreams.pool import Pool
from tests.support.fakes import FakeEndpoint, FakeTransport
from tests.support.relays import Witness


def test_every_stage_has_its_row_and_can_end() -> None:
    assert set(NEXT) == set(Stage)
    for stage, following in NEXT.items():
        assert (Stage.OVER in following) is (stage is not Stage.OVER)


def test_nothing_follows_the_end_and_nothing_leads_back_to_the_beginning() -> None:
    assert not NEXT[Stage.OVER]
    assert not any(Stage.ACCEPTED in following for following in NEXT.values())
    assert NEXT[Stage.RELAYING] == {Stage.DIALING, Stage.OVER}


class Visited(Witness):
    """Notes the stage in which a session is at each event."""

    def __init__(self) -> None:
        super().__init__()
        self.stages: list[Stage] = []

    def opened(self, session: Session) -> None:
        self.stages.append(session.stage)

    def dialing(self, session: Session) -> None:
        self.stages.append(session.stage)

    def connected(self, session: Session) -> None:
        self.stages.append(session.stage)

    def closed(self, session: Session) -> None:
        self.stages.append(session.stage)


def relay(**options: Any) -> tuple[RelayFactory, FakeEndpoint, Visited, Clock]:
    server, heard, clock = FakeEndpoint(), Visited(), Clock()
    made = RelayFactory(
        Upstream(server, "server:80"), clock=clock, observer=heard, **options
    )
    return made, server, heard, clock


def client_of(factory: RelayFactory) -> FakeTransport:
    transport = FakeTransport()
    return transport.connect(factory.buildProtocol(transport.peer))


def test_the_way_of_a_session() -> None:
    factory, server, heard, _ = relay()
    client = client_of(factory)
    [protocol] = factory.sessions.values()
    assert protocol.session.stage is Stage.DIALING
    upstream = server.dial.connect()
    assert protocol.session.stage is Stage.RELAYING
    client.lose()
    upstream.lose()
    assert heard.stages == [
        *(Stage.ACCEPTED, Stage.DIALING, Stage.DIALING, Stage.OVER),
    ]


def test_a_session_that_ends_early_is_closing_until_its_client_is_gone() -> None:
    factory, server, heard, clock = relay(connect_timeout=1)
    client_of(factory)
    [protocol] = factory.sessions.values()
    protocol.transport.loseConnection = lambda: None  # a client that stays
    clock.pump([0.25] * 6)
    assert protocol.session.ending is Ending.CONNECT_TIMEOUT
    assert protocol.session.stage is Stage.CLOSING
    protocol.end(Ending.NO_UPSTREAM)
    assert protocol.session.ending is Ending.CONNECT_TIMEOUT, "it ends once"
    clock.pump([0.25] * 24)
    assert heard.stages[-1] is Stage.OVER
    assert server.cancelled == 1
    factory.stopFactory()


@given(st.sampled_from(Stage), st.sampled_from(Stage))
def test_what_the_table_does_not_have_is_refused(before: Stage, after: Stage) -> None:
    factory, _, _, _ = relay()
    protocol = factory.buildProtocol(FakeTransport().peer)
    protocol.session.stage = before
    if after in NEXT[before]:
        protocol.enter(after)
        assert protocol.session.stage is after
    else:
        with pytest.raises(RuntimeError, match="can't go from"):
            protocol.enter(after)


def test_a_pool_s_turns_are_those_of_the_clients_that_are_let_in() -> None:
    """With every second client refused, two servers still have as many each."""
    first, second = FakeEndpoint(), FakeEndpoint()

    class EverySecond:
        asked = 0

        def enter(self, session: Session) -> EverySecond:
            from relayd.core.errors import Refused

            self.asked += 1
            if self.asked % 2:
                raise Refused("not this one")
            return self

        def release(self) -> None:
            pass

    gate: Any = EverySecond()
    factory = RelayFactory(
        Pool([Upstream(first, "one:80"), Upstream(second, "two:80")]),
        clock=Clock(),
        observer=Witness(),
        gate=gate,
    )
    clients = [client_of(factory) for _ in range(20)]
    assert (len(first.dials), len(second.dials)) == (5, 5)
    ordinals = [each.session.ordinal for each in factory.sessions.values()]
    assert ordinals == list(range(10))
    for client in clients:
        client.lose()
    factory.stopFactory()
