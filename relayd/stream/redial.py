"""The way back: a server that resets its connection at once is replaced by another.

A connection that stands is no service yet: a proxy in front of a server that is gone
accepts, and resets.  Nothing has happened then that the client could notice, so its
session goes back from RELAYING to DIALING, as if the dial had failed
(:mod:`relayd.stream.retries`), if

- the server's side has ended by an error.  An end of data is an answer, also of a
  server that has said nothing;
- nothing was read from the server;
- none of the client's bytes was taken by the kernel for the server.  What it has taken
  may have been acted upon, and is never sent again, whether it has arrived or not;
- the client was told nothing.  A SOCKS client knows that it is connected, and that may
  be done for it once;
- no filter has seen a byte;
- the client is there, and has not ended its side without a word: then it has most
  likely left;
- retries and time are left: the time of all attempts counts from the first.

What was read from the client and was refused by the kernel goes to the next server.
Twisted's transports keep it in their buffers; the plane's hand it on with the loss
(:class:`relayd.net.transports.WriteRefused`).  It is never in a pipe of splice(2): the
plane splices after two full reads that were passed on.  TLS has made something else of
it: such a session ends, as does one whose transport does not tell.  A PROXY header is
not the client's: each server gets its own.

The same session counts against the server if it can't be retried
(:func:`relayd.stream.losses.tell_server`).
"""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import INegotiated
from twisted.logger import Logger
from twisted.python.failure import Failure

from relayd.core.interfaces import ISpliceable
from relayd.core.pauses import HOLDING, PEER_FULL
from relayd.core.session import Ending
from relayd.core.stage import Stage
from relayd.net.transports import WriteRefused
from relayd.stream.attempt import Attempt
from relayd.stream.legs import HOLD_LIMIT, Leg
from relayd.stream.limitable import Limitable
from relayd.stream.losses import Loss
from relayd.stream.server_attempt import ServerAttempt

log = Logger(namespace="relayd.stream")

#: What a server's loss is called when the attempt is to have failed by it.
_AS_FAILED = {
    Ending.UPSTREAM_RESET: Ending.UPSTREAM_RESET,
    Ending.UPSTREAM_WRITE_FAILED: Ending.UPSTREAM_RESET,
    # By the TLS of somebody else's endpoint.
    Ending.CONNECT_FAILED: Ending.CONNECT_FAILED,
}

#: Of a session that was dialled again, for the log of its server.
RESET_DETAIL = "connected, and reset before anything was said"


class Redialing(Limitable):
    """A client's leg that may lose its server, and get another.

    :ivar preamble_size: bytes of what its server was told first, beside the client's.
    """

    preamble_size = 0

    def write_preamble(self, leg: Leg, preamble: bytes) -> None:
        """Tell the server what it is to know before the client's first byte."""
        self.preamble_size = len(preamble)
        if self.held is not None and not self.filters:
            # In one segment with it.
            self.held[:0] = preamble
        else:
            self.direction.kept -= len(preamble)
            leg.transport.write(preamble)

    def attempt_failed(self, attempt: Attempt) -> None:
        """There is no server's connection."""
        raise NotImplementedError

    def tries_again(self, leg: Leg, loss: Loss, reason: Failure | None) -> bool:
        """See :meth:`Leg.tries_again`."""
        bridge, retries = self.bridge, self.factory.retries
        ending = None if loss.ending is None else _AS_FAILED.get(loss.ending)
        if ending is None or retries is None or not retries.has_more(self):
            return False
        up, down = self.session.up, self.session.down
        if (
            (down.read or down.eof)
            or self.replies
            or not self.alive
            or bridge.first is not None
            or (up.eof and not up.read)
            # They may have left, and have changed what was refused.
            or (up.read and (self.filters or not bridge.resends))
        ):
            return False
        # Of what was written, the preamble came first.
        count = max(up.written - self.preamble_size, 0)
        refused = refused_bytes(leg.transport, reason) if count else b""
        if len(refused) < count:
            return False
        try:
            bridge.part()
            self._hold_again(refused[len(refused) - count :])
            self._dial_again(ending, loss.detail or RESET_DETAIL)
        except Exception:
            self.failed(Failure())
        return True

    def _hold_again(self, data: bytes) -> None:
        """Be as before the two were joined."""
        self.session.up.written = 0
        self.preamble_size = 0
        if data:
            # With a limit of its bandwidth it is counted twice.
            self.held = bytearray(data)
            if len(data) >= HOLD_LIMIT:
                self.pause(HOLDING)
        self.resume(PEER_FULL)

    def _dial_again(self, ending: Ending, detail: str) -> None:
        session = self.session
        self.enter(Stage.DIALING)
        session.connected_at = None
        place, self.place = self.place, None
        if place is not None:
            place.reset(detail, provoked=False)
        client: Any = self
        lost = ServerAttempt(client, session.server)
        # Its outcome is told as that of any dial that fails.
        lost.failed(ending, detail)


def refused_bytes(transport: Any, reason: Failure | None) -> bytes:
    """What was written to a lost connection and was not taken by the kernel.

    In order, and without a gap at the end.

    :param reason: what it was lost with.
    :return: empty if that can't be told.
    """
    problem = None if reason is None else reason.value
    if isinstance(problem, WriteRefused):
        return problem.data
    if (
        ISpliceable.providedBy(transport)
        or INegotiated.providedBy(transport)
        or getattr(transport, "TLS", False)
        # A wrapper passes attributes through, and may change what is written.
        or not (hasattr(type(transport), "dataBuffer") or _has(transport, "dataBuffer"))
    ):
        return b""
    waiting = bytes(transport.dataBuffer[transport.offset :])
    return waiting + b"".join(getattr(transport, "_tempDataBuffer", ()))


def _has(thing: object, name: str) -> bool:
    """Whether it has this attribute itself."""
    return name in getattr(thing, "__dict__", ())
