"""Long work in a thread, beside a reactor that goes on.

Threads of Python take turns.  One that computes gives way after 5 ms, and a request
that goes through a relay takes several turns of the reactor, so that it would wait
that long several times.  While there is such work, turns are shorter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool

#: Seconds after which a thread gives way.
TURN = 0.0005


class _Turns:
    """How threads take turns: as the process has it, but for such work.

    :ivar works: how much of it is under way.
    """

    def __init__(self) -> None:
        self.works = 0
        self._turn = 0.0

    def begin(self) -> None:
        self.works += 1
        if self.works == 1:
            self._turn = sys.getswitchinterval()
            sys.setswitchinterval(min(self._turn, TURN))

    def end(self, result: Any) -> Any:
        self.works -= 1
        if not self.works:
            sys.setswitchinterval(self._turn)
        return result


_turns = _Turns()


def aside(reactor: Any, work: Callable[[], Any]) -> Deferred[Any]:
    """Do something in a thread of the reactor's pool.

    :return: its result, or what it has raised.
    """
    _turns.begin()
    done: Deferred[Any] = deferToThreadPool(reactor, reactor.getThreadPool(), work)
    return done.addBoth(_turns.end)
