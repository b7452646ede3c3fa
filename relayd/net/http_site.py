"""What the HTTP servers of relayd have in common: few connections, none for ever.

Whoever can connect may be hostile.  Nothing that a stranger does writes a line of the
log or keeps a connection: one on which nothing comes is reset, and so is one whose last
bytes nobody takes.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

from twisted.internet.interfaces import IAddress, IReactorTime
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web.http import HTTPChannel
from twisted.web.resource import Resource
from twisted.web.server import Request, Site


class BoundedRequest(Request):
    """A request whose body, if it has one, is in memory."""

    def gotLength(self, length: int | None) -> None:
        """See :meth:`twisted.web.iweb.IRequest`; called by the channel."""
        # Twisted's is a file if it is large.
        self.content = BytesIO()


class BoundedChannel(HTTPChannel):
    """A connection.

    :ivar full: what waits to be sent is as much as may.
    :ivar closing: it is closed once that is sent.
    """

    site: BoundedSite
    transport: Any
    full = False
    closing = False

    def connectionMade(self) -> None:
        self.site.channels[self] = None
        super().connectionMade()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.site.channels.pop(self, None)
        super().connectionLost(reason)

    def headerReceived(self, line: bytes) -> bool:
        try:
            return bool(super().headerReceived(line))
        except ValueError:
            # A Content-Length of some thousand digits, which Python does not read.
            self._respondToBadRequestAndDisconnect()
            return False

    def pauseProducing(self) -> None:
        self.full = True
        super().pauseProducing()

    def resumeProducing(self) -> None:
        self.full = False
        super().resumeProducing()

    def loseConnection(self) -> None:
        if not self.closing:
            self.closing = True
            # Twisted's would wait for ever until all is sent.
            self.setTimeout(self.site.timeOut)
            super().loseConnection()

    def timeoutConnection(self) -> None:
        # Twisted's logs a line, which a stranger could have it do for ever.
        self.transport.abortConnection()


class BoundedSite(Site):
    """Serves a resource.

    :param clock: of the connections' timeouts.
    :param timeout: seconds for which nothing need come on a connection.

    :ivar channels: the connections, the oldest first.
    """

    noisy = False
    displayTracebacks = False
    protocol: Any = BoundedChannel

    def __init__(
        self,
        resource: Resource,
        clock: IReactorTime,
        timeout: float,
        request: Callable[..., Any] = BoundedRequest,
    ) -> None:
        super().__init__(
            resource, requestFactory=request, reactor=clock, timeout=timeout
        )
        self.channels: dict[Any, None] = {}

    def has_place(self) -> bool:
        """Whether one connection more is served; called for each."""
        raise NotImplementedError

    def buildProtocol(self, addr: IAddress | None) -> Any:
        return super().buildProtocol(addr) if self.has_place() else None

    def startFactory(self) -> None:
        """Nothing: Twisted's keeps the time of day for a log of requests."""

    def stopFactory(self) -> None:
        """Nothing, likewise."""

    def log(self, request: Any) -> None:
        """Requests are not logged."""

    def close(self) -> None:
        """Close all connections."""
        for each in list(self.channels):
            each.loseConnection()
