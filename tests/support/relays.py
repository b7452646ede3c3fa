"""A TCP relay on fakes: its clock, its server, its gate, and what it says."""

from __future__ import annotations

from typing import Any

from twisted.internet.task import Clock
from twisted.protocols.policies import WrappingFactory
from zope.interface import implementer

from relayd.core.interfaces import IGate, ILease
from relayd.core.observers import Observer
from relayd.core.session import Session
from relayd.net.upstream import Upstream
from relayd.tcp import RelayFactory
from tests.support.fakes import FakeEndpoint, FakeTLSTransport, FakeTransport


class Witness(Observer):
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.sessions: list[Session] = []

    def opened(self, session: Session) -> None:
        self.heard.append("opened")
        self.sessions.append(session)

    def dialing(self, session: Session) -> None:
        self.heard.append(f"dialing {session.upstream}")

    def connected(self, session: Session) -> None:
        self.heard.append(f"connected {session.upstream}")

    def closed(self, session: Session) -> None:
        assert session.ending is not None
        self.heard.append(f"closed {session.ending.word}")

    def refused(self, session: Session, why: str) -> None:
        self.heard.append(f"refused {why}")
        self.sessions.append(session)


@implementer(IGate, ILease)
class Turnstile:
    """Counts those inside, and refuses when told to."""

    def __init__(self) -> None:
        self.inside = 0
        self.problem: Exception | None = None

    def enter(self, session: Session) -> ILease:
        if self.problem is not None:
            raise self.problem
        self.inside += 1
        return self

    def release(self) -> None:
        self.inside -= 1


class Relay:
    """A relay on fakes."""

    def __init__(self, **options: Any) -> None:
        self.clock = Clock()
        self.server = FakeEndpoint(self.clock)
        self.witness = Witness()
        self.gate = Turnstile()
        self.factory = RelayFactory(
            Upstream(self.server, "server:80"),
            clock=self.clock,
            observer=self.witness,
            gate=self.gate,
            **options,
        )

    def client(self) -> FakeTransport:
        """A client connects."""
        transport = FakeTransport(clock=self.clock)
        protocol = self.factory.buildProtocol(transport.peer)
        assert protocol is not None
        return transport.connect(protocol)

    @property
    def session(self) -> Session:
        [session] = self.witness.sessions
        return session

    def over(self, *heard: str) -> None:
        """The observer heard this, and nothing is left."""
        assert self.witness.heard == list(heard)
        assert not self.factory.sessions
        assert self.gate.inside == 0
        assert len(self.factory.wheel) == 0
        self.factory.stopFactory()
        assert not self.clock.getDelayedCalls()


def secret_client(relay: Relay, wrapper: Any = None) -> FakeTLSTransport:
    """A client with TLS connects; `wrapper` stands between TLS and the relay."""
    transport = FakeTLSTransport(clock=relay.clock)
    protocol: Any = relay.factory.buildProtocol(transport.peer)
    if wrapper is not None:
        protocol = wrapper(WrappingFactory(relay.factory), protocol)
    transport.connect(protocol)
    return transport
