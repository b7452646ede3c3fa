"""A client about which a route decides, without a relay."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.task import Clock

from relayd.core.session import Session

CLIENT, PEER, LISTENER = "192.0.2.1:40000", "198.51.100.7:5000", "192.0.2.254:443"


class Arrived:
    """See :class:`relayd.core.routing.Arriving`; what comes is said by a test."""

    def __init__(
        self, data: bytes = b"", *, ended: bool = False, session: Any = None
    ) -> None:
        self.session = session or Session(1, CLIENT, LISTENER, 0.0, peer=PEER)
        self.data = data
        self.ended = ended
        self.server_name: str | None = None
        self.original = "203.0.113.9:443"
        self.clock = Clock()
        #: How often more was asked for; and who waits.
        self.asked = 0
        self.waiting: list[Deferred[None]] = []

    def more(self) -> Deferred[None]:
        self.asked += 1
        waiting: Deferred[None] = Deferred(self.waiting.remove)
        self.waiting.append(waiting)
        return waiting

    def send(self, data: bytes) -> None:
        self.data += data
        self._wake()

    def end(self) -> None:
        self.ended = True
        self._wake()

    def _wake(self) -> None:
        waiting, self.waiting = self.waiting, []
        for each in waiting:
            each.callback(None)


def ask(router: Any, arrived: Arrived) -> Deferred[Any]:
    """What a router says of a client, at once or later."""
    said = router.ask(arrived)
    return said if isinstance(said, Deferred) else succeed(said)
