"""The HTTP server of the control socket: who is served, and within which bounds.

Whoever can connect may be hostile.  The kernel says who it is (`control/peers`); of
those who may nothing, a few are told so.  There are :data:`MAX_CLIENTS`, and places of
their own for those who may only see; one more is told that they are too many, and
closed at once.  A request has :data:`TIMEOUT` seconds to arrive in whole, whatever
comes in the meantime, and its client as many to take the answer, unless that goes on
(`control/streaming`); as long may a connection be idle.  A request's head is at most
:data:`MAX_HEAD` bytes, its body :data:`MAX_BODY`, and it says how long it is.

What becomes of a request is in `control/exchange`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from http import HTTPStatus
from typing import Any

from twisted.internet.interfaces import IHalfCloseableProtocol, IReactorTime
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from twisted.web.resource import Resource
from zope.interface import implementer

from relayd.control.exchange import Exchange, Exchanges
from relayd.control.peers import Right, Rights, peer_of
from relayd.control.steering import Asker, Json, Steering
from relayd.control.streaming import MOST_STREAMS
from relayd.net.http_site import BoundedChannel, BoundedRequest, BoundedSite

#: Connections at once: of those who may change things, of those who may see them, and
#: of those who may nothing.  None of them is in another one's way.
MAX_CLIENTS, MAX_READERS, MAX_STRANGERS = 64, 32, 16

_PLACES: Mapping[Right, int] = {
    "change": MAX_CLIENTS,
    "read": MAX_READERS,
    "": MAX_STRANGERS,
}

#: Seconds for a request to arrive, for its answer to be taken, and to be idle.
TIMEOUT = 10.0

#: Bytes of a request: its line and headers together, and its body.
MAX_HEAD, MAX_BODY = 8192, 1 << 16


class _Request(BoundedRequest):
    """A request that has arrived in whole."""

    channel: _Channel

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        """Called by the channel."""
        # Twisted's reads forms and cookies, and finds a resource.
        self.method, self.uri, self.clientproto = command, path, version
        self.path, self.args = path, {}
        self.site = self.channel.site
        channel = self.channel
        Exchange(channel.site.exchanges, self, channel.asker, channel.right).begin()


@implementer(IHalfCloseableProtocol)
class _Channel(BoundedChannel):
    """A connection.

    :ivar asker: who has connected, and what they may do.
    """

    site: ControlSite
    asker: Asker
    right: Right = ""

    MAX_LENGTH = maxHeaders = MAX_HEAD

    #: Some of a request has come.
    _arriving = False
    #: Bytes of its head.
    _head = 0

    def connectionMade(self) -> None:
        try:
            self.asker = self.site.peer(self.transport)
        except OSError:
            self.transport.abortConnection()
            return
        self.right = self.site.rights.of(self.asker)
        super().connectionMade()
        if not self.site.has_place_for(self):
            self.site.refused[self.right] += 1
            self.refuse(503, "there are too many clients: try again later")

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        # None: it could not be told who it is.
        if self in self.site.channels:
            super().connectionLost(reason)

    # -- a client that ends its side

    def readConnectionLost(self) -> None:
        """It has what it wants of an answer that goes on; of others, it has left."""
        self.persistent = False
        if not self.site.exchanges.streams.end_for(self):
            self.transport.connectionLost(Failure(connectionDone.value))

    def writeConnectionLost(self) -> None:
        """See :class:`IHalfCloseableProtocol`; nothing here half-closes."""

    # -- the time for a request to arrive

    def resetTimeout(self) -> None:
        """Called for whatever comes."""
        # Twisted's would let a client send a byte every nine seconds.
        if not self._arriving:
            self._arriving = True
            super().resetTimeout()

    def requestDone(self, request: Any) -> None:
        self._arriving = False
        super().requestDone(request)

    def timeoutConnection(self) -> None:
        # Else it was idle.
        self.site.timeouts += self._arriving or self.closing
        super().timeoutConnection()

    # -- how long it may be

    def lineReceived(self, line: bytes) -> None:
        self._head += len(line) + 2
        if self._head > MAX_HEAD:
            self._too_long()
        else:
            super().lineReceived(line)

    def lineLengthExceeded(self, line: bytes) -> None:
        self._too_long()

    def _too_long(self) -> None:
        # The channel makes a request of the first line.
        if self.requests:
            self.refuse(431, f"the headers are too long: {MAX_HEAD} bytes at most")
        else:
            self.refuse(414, f"the path is too long: {MAX_HEAD} bytes at most")

    def allHeadersReceived(self) -> None:
        self._head = 0
        if self.length is None:
            self.refuse(411, "the body has no Content-Length: give it")
        elif self.length > MAX_BODY:
            self.refuse(413, f"the body is too long: {MAX_BODY} bytes at most")
        else:
            super().allHeadersReceived()

    def _respondToBadRequestAndDisconnect(self) -> None:
        self.refuse(400, "the request is not HTTP/1.1")

    def refuse(self, status: int, why: str) -> None:
        """Answer what has not become a request, and close."""
        if self.closing:
            return
        body = json.dumps({"problems": [why]}) + "\n"
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
            "Content-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        self.transport.write((head + body).encode())
        self.loseConnection()


class ControlSite(BoundedSite):
    """Serves the control socket.

    :param steering: answers.
    :param clock: of timeouts and slices.
    :param rights: who may do what.
    :param peer: says who has connected; raises OSError if nobody knows.
    :param secrets: the keys of settings whose values are not logged.

    :ivar refused: how many clients were too many, by what they may do.
    :ivar timeouts: how many clients took too long to ask, or to take the end of an
        answer.
    """

    protocol: Any = _Channel

    def __init__(
        self,
        steering: Steering,
        clock: IReactorTime,
        rights: Rights,
        *,
        peer: Callable[[Any], Asker] = peer_of,
        secrets: Collection[str] = (),
    ) -> None:
        super().__init__(Resource(), clock, TIMEOUT, _Request)
        self.exchanges = Exchanges(steering, clock, TIMEOUT, secrets, self.limits)
        self.rights = rights
        self.peer = peer
        self.refused = Counter[Right]()
        self.timeouts = 0

    def has_place(self) -> bool:
        """It is judged once it is known who it is."""
        return True

    def has_place_for(self, channel: _Channel) -> bool:
        """Whether a connection is served."""
        own = [
            each
            for each in self.channels
            if each.right == channel.right and not each.closing
        ]
        return len(own) <= _PLACES[channel.right]

    def limits(self) -> list[Json]:
        """Where its own bounds stand, as /v1/limits has them."""
        now = Counter(each.right for each in self.channels)
        streams = self.exchanges.streams
        slow = self.exchanges.answers.slow + streams.slow + self.timeouts
        strangers = self.exchanges.strangers
        rows = (
            ("control_clients", MAX_CLIENTS, now["change"], self.refused["change"]),
            ("control_readers", MAX_READERS, now["read"], self.refused["read"]),
            ("control_strangers", MAX_STRANGERS, now[""], self.refused[""]),
            ("control_refused_uids", None, 0, strangers),
            ("control_captures", MOST_STREAMS, len(streams.under_way), streams.refused),
            ("control_timeout", round(TIMEOUT), 0, slow),
        )
        return [
            {"what": what, "relay": None, "limit": limit, "now": count, "hits": hits}
            for what, limit, count, hits in rows
        ]

    def close(self) -> None:
        """Close all connections."""
        self.exchanges.streams.close()
        self.exchanges.answers.close()
        super().close()
