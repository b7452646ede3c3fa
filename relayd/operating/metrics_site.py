"""The HTTP server of metrics and health: a few resources, for readers of any kind.

============== =======================================================================
/metrics       the metrics, for Prometheus and others
/livez         200 as long as the reactor turns
/readyz        200 if clients are served, else 503; `?verbose` says it of each relay
/readyz/NAME   the same of one relay
============== =======================================================================

Whoever can connect may be hostile, and may not disturb the relays.  GET and HEAD are
served, and a request with a body is reset.  There are :data:`MAX_CONNECTIONS`; for one
more, the oldest is closed that is not being served.  A connection on which nothing
comes for :data:`IDLE` seconds is closed.  A scrape is made a :data:`SLICE` at a time,
one slice of one scrape in each turn of the reactor, and only as fast as it is read;
there are :data:`MAX_SCRAPES` at once, each with :data:`SCRAPE_TIMEOUT` seconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any
from urllib.parse import unquote

from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IPushProducer,
    IReactorTime,
)
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http import HTTPChannel
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request, Site
from zope.interface import implementer

from relayd.operating.health import Health

log = Logger(namespace="relayd.metrics")

#: Connections at once.
MAX_CONNECTIONS = 32

#: Seconds for which a connection may be idle; scrapers come every minute, or oftener.
IDLE = 75.0

#: Seconds of work on a scrape in one turn of the reactor.
SLICE = 0.002

#: Scrapes at once, and seconds that each may take, slow readers included.
MAX_SCRAPES = 4
SCRAPE_TIMEOUT = 30.0

#: Makes the text for an Accept header: its content type, and its pieces.
Expose = Callable[[str], tuple[str, Iterator[bytes]]]

_PLAIN = "text/plain; charset=utf-8"


class _Request(Request):
    """A request, which may have no body."""

    def gotLength(self, length: int | None) -> None:
        """See :meth:`twisted.web.iweb.IRequest`; called by the channel."""
        # Twisted would keep a body, in a file if it is large.
        self.content = BytesIO()
        if length != 0:
            transport: Any = self.channel.transport
            transport.abortConnection()

    def handleContentChunk(self, data: bytes) -> None:
        """What has come with the headers, in one segment, is dropped."""


class _Channel(HTTPChannel):
    """A connection."""

    site: MetricsSite
    transport: Any

    def connectionMade(self) -> None:
        self.site.channels[self] = None
        super().connectionMade()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.site.channels.pop(self, None)
        super().connectionLost(reason)

    def timeoutConnection(self) -> None:
        # Twisted's logs a line, which a stranger could have it do for ever.
        self.transport.abortConnection()


class MetricsSite(Site):
    """Serves the resources.

    :param expose: makes the text of the metrics.
    :param health: of the relays.
    :param clock: of the connections' timeouts, and of slices.

    :ivar channels: the connections, the oldest first.
    """

    noisy = False
    displayTracebacks = False
    protocol: Any = _Channel

    def __init__(self, expose: Expose, health: Health, clock: IReactorTime) -> None:
        self.scrapes = Scrapes(expose, clock)
        super().__init__(
            Resources(self.scrapes, health),
            requestFactory=_Request,
            reactor=clock,
            timeout=IDLE,
        )
        self.channels: dict[_Channel, None] = {}

    def buildProtocol(self, addr: IAddress | None) -> Any:
        if len(self.channels) >= MAX_CONNECTIONS:
            served = {each.channel for each in self.scrapes.under_way}
            idle = [each for each in self.channels if each not in served]
            if not idle:
                return None
            del self.channels[idle[0]]
            idle[0].transport.abortConnection()
        return super().buildProtocol(addr)

    def startFactory(self) -> None:
        """Nothing: Twisted's keeps the time of day for a log of requests."""

    def stopFactory(self) -> None:
        """Nothing, likewise."""

    def log(self, request: Any) -> None:
        """Requests are not logged."""

    def close(self) -> None:
        """Close all connections."""
        self.scrapes.close()
        for each in list(self.channels):
            each.transport.loseConnection()


class Resources(Resource):
    """What is served.

    :param scrapes: makes the metrics.
    :param health: of the relays.
    """

    isLeaf = True

    def __init__(self, scrapes: Scrapes, health: Health) -> None:
        super().__init__()
        self._scrapes = scrapes
        self._health = health

    def render(self, request: Any) -> Any:
        request.setHeader("server", "relayd")
        request.setHeader("content-type", _PLAIN)
        request.setHeader("cache-control", "no-store")
        request.setHeader("x-content-type-options", "nosniff")
        if request.method not in (b"GET", b"HEAD"):
            request.setHeader("allow", "GET, HEAD")
            return _answer(request, 405, "only GET and HEAD are served")
        path = unquote(request.path.decode("ascii", "replace"))
        if path == "/metrics":
            return self._scrapes.begin(request)
        if path == "/livez":
            return _answer(request, 200, "ok")
        if path == "/readyz":
            return self._readyz(request)
        if path.startswith("/readyz/"):
            why = self._health.why_not_each().get(path.removeprefix("/readyz/"))
            if why is not None:
                return _answer(request, 503 if why else 200, why or "ok")
        return _answer(request, 404, "not found: there are /metrics, /livez, /readyz")

    def _readyz(self, request: Any) -> bytes:
        why = self._health.why_not()
        lines = []
        # Twisted leaves out what has no value.
        asked = request.uri.partition(b"?")[2].split(b"&")
        if any(each.partition(b"=")[0] == b"verbose" for each in asked):
            for relay, problem in self._health.why_not_each().items():
                sign = "-" if problem else "+"
                lines.append(f"[{sign}] {relay}: {problem or 'ok'}")
        return _answer(request, 503 if why else 200, *lines, why or "ok")


def _answer(request: Any, code: int, *lines: str) -> bytes:
    request.setResponseCode(code)
    body = "".join(f"{line}\n" for line in lines).encode()
    if request.method != b"HEAD":
        return body
    # Of a body, Twisted would log a line, as often as a stranger likes.
    request.setHeader("content-length", str(len(body)))
    return b""


class Scrapes:
    """Those who read the metrics, each as fast as it reads.

    :param expose: makes the text of the metrics.
    :param clock: of slices.

    :ivar under_way: the scrapes that are not over.
    """

    def __init__(self, expose: Expose, clock: IReactorTime) -> None:
        self._expose = expose
        self._clock = clock
        self.under_way: set[_Scrape] = set()
        #: Those that can go on, the next first.
        self._queue: deque[_Scrape] = deque()
        self._turn: IDelayedCall | None = None

    def begin(self, request: Any) -> Any:
        """Answer a request."""
        if len(self.under_way) >= MAX_SCRAPES:
            request.setHeader("retry-after", "1")
            return _answer(request, 503, f"{MAX_SCRAPES} scrapes are under way")
        # Not `getHeader`, which takes no header that is not UTF-8.
        raw = request.requestHeaders.getRawHeaders(b"accept") or [b""]
        accept = raw[-1].decode("latin-1")
        try:
            content_type, pieces = self._expose(accept)
        except (TypeError, ValueError):
            # Of its versions that are no numbers, some or all of their parts.
            content_type, pieces = self._expose("")
        request.setHeader("content-type", content_type)
        if request.method == b"HEAD":
            return b""
        scrape = _Scrape(self, request, pieces, self._clock)
        self.under_way.add(scrape)
        request.notifyFinish().addBoth(lambda _: self.ended(scrape))
        request.registerProducer(scrape, True)
        self.go_on(scrape)
        return NOT_DONE_YET

    def go_on(self, scrape: _Scrape) -> None:
        """A scrape can go on."""
        if scrape in self.under_way and scrape not in self._queue:
            self._queue.append(scrape)
            if self._turn is None:
                self._turn = self._clock.callLater(0, self._work)

    def _work(self) -> None:
        self._turn = None
        scrape = self._queue.popleft()
        try:
            if not scrape.paused:
                scrape.work()
        except Exception:
            log.failure("a scrape failed")
            scrape.abort()
        if not scrape.paused:
            self.go_on(scrape)
        if self._queue and self._turn is None:
            self._turn = self._clock.callLater(0, self._work)

    def ended(self, scrape: _Scrape) -> None:
        """A scrape is over, or its reader has left."""
        self.under_way.discard(scrape)
        scrape.forget()
        if scrape in self._queue:
            self._queue.remove(scrape)
        if not self._queue and self._turn is not None:
            self._turn.cancel()
            self._turn = None

    def close(self) -> None:
        """End those that are under way."""
        for each in list(self.under_way):
            each.abort()


@implementer(IPushProducer)
class _Scrape:
    """One reader of the metrics.

    :ivar channel: its connection.
    :ivar paused: it does not take more now.
    """

    def __init__(
        self,
        scrapes: Scrapes,
        request: Any,
        pieces: Iterator[bytes],
        clock: IReactorTime,
    ) -> None:
        self._scrapes = scrapes
        self._request = request
        self._pieces = pieces
        self._now = clock.seconds
        self.channel = request.channel
        self.paused = False
        self._limit = clock.callLater(SCRAPE_TIMEOUT, self.abort)

    def work(self) -> None:
        """Make some of the text."""
        until = self._now() + SLICE
        made = []
        for piece in self._pieces:
            made.append(piece)
            if self._now() >= until:
                self._request.write(b"".join(made))
                return
        self._request.write(b"".join(made))
        self._request.unregisterProducer()
        self._request.finish()

    def forget(self) -> None:
        """It is over."""
        self.paused = True
        if self._limit.active():
            self._limit.cancel()

    def abort(self) -> None:
        """Reset its connection: what it has had is not all."""
        self._scrapes.ended(self)
        transport = self.channel.transport
        if transport is not None:
            transport.abortConnection()

    # -- IPushProducer

    def pauseProducing(self) -> None:
        self.paused = True

    def resumeProducing(self) -> None:
        self.paused = False
        self._scrapes.go_on(self)

    def stopProducing(self) -> None:
        self._scrapes.ended(self)
