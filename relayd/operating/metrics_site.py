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
comes for :data:`IDLE` seconds is closed.  A scrape is made in slices, and only as fast
as it is read (:mod:`relayd.net.http_answers`); there are :data:`MAX_SCRAPES` at once,
each with :data:`SCRAPE_TIMEOUT` seconds for its reader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET

from relayd.net.http_answers import Answers
from relayd.net.http_site import BoundedRequest, BoundedSite
from relayd.operating.health import Health

log = Logger(namespace="relayd.metrics")

#: Connections at once.
MAX_CONNECTIONS = 32

#: Seconds for which a connection may be idle; scrapers come every minute, or oftener.
IDLE = 75.0

#: Scrapes at once, and seconds for which each waits for its reader, in all.
MAX_SCRAPES = 4
SCRAPE_TIMEOUT = 30.0

#: Makes the text for an Accept header: its content type, and its pieces.
Expose = Callable[[str], tuple[str, Iterator[bytes]]]

_PLAIN = "text/plain; charset=utf-8"


class _Request(BoundedRequest):
    """A request, which may have no body."""

    def gotLength(self, length: int | None) -> None:
        """See :meth:`twisted.web.iweb.IRequest`; called by the channel."""
        super().gotLength(length)
        if length != 0:
            transport: Any = self.channel.transport
            transport.abortConnection()

    def handleContentChunk(self, data: bytes) -> None:
        """What has come with the headers, in one segment, is dropped."""


class MetricsSite(BoundedSite):
    """Serves the resources.

    :param expose: makes the text of the metrics.
    :param health: of the relays.
    :param clock: of the connections' timeouts, and of slices.

    :ivar refused: how many connections were too many, or closed for another.
    """

    refused = 0

    def __init__(self, expose: Expose, health: Health, clock: IReactorTime) -> None:
        self.scrapes = Answers(clock, SCRAPE_TIMEOUT, log, "scrape")
        resources = Resources(self.scrapes, expose, health)
        super().__init__(resources, clock, IDLE, _Request)

    def has_place(self) -> bool:
        if len(self.channels) >= MAX_CONNECTIONS:
            self.refused += 1
            served = {each.channel for each in self.scrapes.under_way}
            idle = [each for each in self.channels if each not in served]
            if not idle:
                return False
            del self.channels[idle[0]]
            idle[0].transport.abortConnection()
        return True

    def limits(self) -> list[dict[str, Any]]:
        """Where its bounds stand (:mod:`relayd.operating.limits_listing`)."""
        return [
            {
                "what": "metrics_connections",
                "relay": None,
                "limit": MAX_CONNECTIONS,
                "now": len(self.channels),
                "hits": self.refused,
            }
        ]

    def close(self) -> None:
        """Close all connections."""
        self.scrapes.close()
        super().close()


class Resources(Resource):
    """What is served.

    :param scrapes: those who read the metrics.
    :param expose: makes their text.
    :param health: of the relays.
    """

    isLeaf = True

    def __init__(self, scrapes: Answers, expose: Expose, health: Health) -> None:
        super().__init__()
        self._scrapes = scrapes
        self._expose = expose
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
            return self._scrape(request)
        if path == "/livez":
            return _answer(request, 200, "ok")
        if path == "/readyz":
            return self._readyz(request)
        if path.startswith("/readyz/"):
            why = self._health.why_not_each().get(path.removeprefix("/readyz/"))
            if why is not None:
                return _answer(request, 503 if why else 200, why or "ok")
        return _answer(request, 404, "not found: there are /metrics, /livez, /readyz")

    def _scrape(self, request: Any) -> Any:
        if len(self._scrapes.under_way) >= MAX_SCRAPES:
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
        self._scrapes.begin(request, pieces)
        return NOT_DONE_YET

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
