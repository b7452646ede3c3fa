"""A reactor that stands still, with a plane: a test takes its turns."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from twisted.internet.task import Clock

from relayd.plane.poller import Plane
from tests.support.process import PATIENCE


class Still(Clock):
    """A reactor that stands still: a test takes its turns, and sees what it watches."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: set[Any] = set()

    def addReader(self, reader: Any) -> None:
        self.readers.add(reader)

    def removeReader(self, reader: Any) -> None:
        self.readers.discard(reader)

    def turn(self) -> None:
        """What is readable is read, and what was to be called now is called."""
        for reader in list(self.readers):
            reader.doRead()
        self.call_due()

    def call_due(self) -> None:
        """Call what is due, but not what is asked for meanwhile, unlike `advance`."""
        for call in [each for each in self.calls if each.getTime() <= self.rightNow]:
            if call.active():
                self.calls.remove(call)
                call.called = 1
                call.func(*call.args, **call.kw)

    def until(self, condition: Callable[[], object], what: str = "") -> None:
        """Take turns until `condition()` is true."""
        limit = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < limit, f"never happened: {what or condition}"
            self.turn()
            time.sleep(0.0002)

    def settle(self, turns: int = 5) -> None:
        """Turns enough for what was to happen to have happened."""
        for _ in range(turns):
            self.turn()
            time.sleep(0.001)


@pytest.fixture
def still() -> Iterator[Still]:
    """A reactor whose plane must hold nothing when the test is over."""
    standing = Still()
    yield standing
    plane = Plane.of(standing)
    # Pipes were given back; those that are kept were closed.
    assert (plane.pipes.users, plane.pipes.in_use) == (0, 0)
    assert not standing.readers
    assert plane.fileno() == -1
    assert not standing.getDelayedCalls()


def refuse(number: int) -> Callable[..., Any]:
    """What fails with this errno whenever it is called."""

    def refused(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refused
