"""Long work beside a reactor that goes on."""

from __future__ import annotations

import sys
import threading

import pytest
import pytest_twisted
from twisted.internet import reactor

from relayd.operating.aside import TURN, aside


@pytest_twisted.ensureDeferred
async def test_turns_are_short_while_there_is_such_work() -> None:
    """And as they were, once the last of it is over, or has failed."""
    before = sys.getswitchinterval()
    goes_on = threading.Event()

    def first() -> float:
        assert goes_on.wait(10)
        return sys.getswitchinterval()

    one = aside(reactor, first)
    with pytest.raises(ZeroDivisionError):
        await aside(reactor, lambda: 1 / 0)
    assert sys.getswitchinterval() == pytest.approx(TURN)
    goes_on.set()
    assert await one == pytest.approx(TURN)
    assert sys.getswitchinterval() == before
