"""A router that answers when the test says so, and a relay on fakes that asks it."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, succeed
from zope.interface import implementer

from relayd.core.errors import ConfigError
from relayd.core.routing import Arriving, Decision, IRouter
from relayd.net.upstream import Upstream
from tests.support.fakes import FakeEndpoint


@implementer(IRouter)
class FakeRouter:
    """Answers what it is told, at once or later.

    :param answer: of every client; None: later, by `asked`.

    :ivar asked: who was asked about, and the answer that is awaited.
    :ivar cancelled: how many answers are not awaited any more.
    """

    def __init__(self, answer: Decision | None = None) -> None:
        self._answer = answer
        self.asked: list[tuple[Arriving, Deferred[Decision]]] = []
        self.cancelled = 0
        self.servers: dict[Any, Upstream] = {}

    def ask(self, arriving: Arriving) -> Deferred[Decision]:
        if self._answer is not None:
            return succeed(self._answer)
        answer: Deferred[Decision] = Deferred(self._cancel)
        self.asked.append((arriving, answer))
        return answer

    def _cancel(self, _: object) -> None:
        self.cancelled += 1

    def upstream(self, where: Any) -> Upstream:
        if where not in self.servers:
            raise ConfigError(f"no server: {where!r}")
        return self.servers[where]

    def add(self, where: str, clock: Any) -> FakeEndpoint:
        """A server that may be named."""
        endpoint = FakeEndpoint(clock)
        self.servers[where] = Upstream(endpoint, where)
        return endpoint

    @property
    def arriving(self) -> Arriving:
        """The client that was asked about last."""
        return self.asked[-1][0]

    @property
    def answer(self) -> Deferred[Decision]:
        """What is awaited about it."""
        return self.asked[-1][1]

    def decide(self, **decision: Any) -> None:
        """Decide about it."""
        self.answer.callback(Decision(**decision))
