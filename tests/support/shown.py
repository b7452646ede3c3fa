"""Relays that run, for what tells of them; and how to make a list as a whole."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from types import SimpleNamespace
from typing import Any

from relayd.core.registry import Registry
from relayd.core.session import Session
from relayd.core.stage import Stage
from relayd.operating.listing import Shown


def whole(work: Generator[None, None, Any]) -> Any:
    """The answer, once all parts are made."""
    while True:
        try:
            next(work)
        except StopIteration as done:
            return done.value


def steps(work: Generator[None, None, Any]) -> int:
    """In how many parts it is made."""
    return sum(1 for _ in work) + 1


class Records:
    """A stream relay of nothing but records, at second 100."""

    def __init__(self, sessions: Sequence[Session] = ()) -> None:
        self.name = "web"
        self.protocols: dict[int, Any] = {}
        self.clock = SimpleNamespace(callLater=None, seconds=lambda: 100.0)
        self.registry: Any = Registry(
            self.protocols.values(),  # type: ignore[arg-type]
            self.clock,
            id_of=lambda each: each.session.id,
            abort=lambda each: None,
        )
        for each in sessions:
            self.add(each)

    def now(self) -> float:
        return 100.0

    def add(self, session: Session) -> None:
        self.protocols[session.id] = SimpleNamespace(
            session=session, bridge=None, place=None, pending=None, filtered=()
        )

    def end(self, ident: int) -> None:
        self.protocols.pop(ident).session.stage = Stage.OVER


def shown(*factories: Any, name: str = "web", **more: Any) -> Shown:
    """A TCP relay."""
    pools = [each.pool for each in factories if hasattr(each, "pool")]
    return Shown(name, more.pop("kind", "tcp"), factories, pools=pools, **more)
