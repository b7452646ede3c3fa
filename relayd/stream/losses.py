"""How the loss of a leg's connection is read: as what, and what follows from it.

Twisted reports a reset and a failed write with the same ConnectionLost.  A leg that was
being read learns of a reset by reading; one that was not, as the other side's buffer is
full or its own end of data was read, can only have learnt of it by writing.  So the
first is a reset, behind which what was read is delivered, and the second a failed
write, which ends both connections at once.  Pauses for any other reason say nothing
about that (:mod:`relayd.core.pauses`).

A transport that is told of a reset by the kernel says so (PeerReset), and what was read
is delivered: it is a failed write if something that was written to the peer had not
arrived, and else a reset.
"""

from __future__ import annotations

from typing import Any

import attrs
from twisted.internet.error import ConnectionClosed, ConnectionDone
from twisted.internet.interfaces import INegotiated
from twisted.python.failure import Failure

from relayd.core.interfaces import ICounted
from relayd.core.session import Ending, Session
from relayd.net.tls import error_line, is_openssl_error
from relayd.net.transports import PeerReset, PeerVanished
from relayd.stream.legs import Leg

_DONE = Ending.DONE

#: Endings that speak against a server which has said nothing.
_SILENT_FAILURES = frozenset(
    {
        Ending.UPSTREAM_RESET,
        Ending.UPSTREAM_WRITE_FAILED,
        # TLS below a wrapper, whose handshake has failed, or was never done.
        Ending.CONNECT_FAILED,
        Ending.CONNECT_TIMEOUT,
    }
)

#: What becomes of the other leg: nothing; it gets an end of data; it is reset once what
#: was read is delivered; it is reset now.
NOTHING, END, RESET_WHEN_DELIVERED, ABORT = range(4)


@attrs.frozen
class Loss:
    """What a lost connection means.

    :ivar then: what becomes of the other leg.
    :ivar ending: the session's, if that is decided by it.
    :ivar detail: the session's.
    """

    then: int
    ending: Ending | None = None
    detail: str = ""


def judge(leg: Leg, reason: Failure, *, is_client: bool, closing: bool) -> Loss:
    """What it means that the connection of a joined `leg` is lost.

    :param reason: what its transport says.
    :param is_client: the leg is the downstream one.
    :param closing: both directions have ended, and both connections are being closed.
    """
    error: Any = reason.value
    if isinstance(error, ConnectionDone):
        return Loss(END)
    if isinstance(error, PeerVanished):
        return Loss(RESET_WHEN_DELIVERED, lost_ending(is_client), str(error))
    if INegotiated.providedBy(leg.transport) and leg.peer.direction.eof:
        # It was told that the other side has ended, and closed its own without the
        # goodbye that TLS asks for, as most clients do.
        return Loss(NOTHING if closing else END)
    if _is_tls(error) and not is_client and not leg.direction.read:
        return Loss(ABORT, Ending.CONNECT_FAILED, f"TLS: {error_line(error)}")
    if not isinstance(error, ConnectionClosed | OSError) and not _is_tls(error):
        return Loss(ABORT, Ending.FAILED, repr(error))
    if isinstance(error, PeerReset):
        return Loss(RESET_WHEN_DELIVERED, reset_ending(is_client, error.undelivered))
    if closing or leg.waits_for_peer or leg.direction.eof:
        return Loss(ABORT, reset_ending(is_client, 1))
    detail = _tls_detail(leg, error)
    return Loss(RESET_WHEN_DELIVERED, reset_ending(is_client, 0), detail)


def reset_ending(is_client: bool, undelivered: int) -> Ending:
    """A reset that cost `undelivered` bytes written to the peer is a failed write."""
    if is_client:
        resets = Ending.DOWNSTREAM_RESET, Ending.DOWNSTREAM_WRITE_FAILED
    else:
        resets = Ending.UPSTREAM_RESET, Ending.UPSTREAM_WRITE_FAILED
    return resets[undelivered > 0]


def lost_ending(is_client: bool) -> Ending:
    """The peer does not answer any more."""
    return Ending.DOWNSTREAM_LOST if is_client else Ending.UPSTREAM_LOST


def tell_server(place: ICounted, session: Session) -> None:
    """A session is over: tell its server, and whether that speaks against it.

    That is if its connection was reset and nothing was read from it, unless the client
    had ended its side before, without a word: whoever answers that by a reset may be as
    well as anybody.
    """
    ending, up = session.ending, session.up
    if (
        ending is _DONE
        or ending not in _SILENT_FAILURES
        or session.down.read
        or (up.eof and not up.read)
    ):
        place.closed()
    else:
        why = session.detail or "reset without a word"
        place.reset(f"connected, {why}", provoked=bool(up.read))


def _is_tls(error: BaseException) -> bool:
    """A failed TLS handshake.  Asked by name: TLS is an optional dependency."""
    by_name = type(error).__module__.partition(".")[0] == "service_identity"
    return by_name or is_openssl_error(error)


def _tls_detail(leg: Leg, error: BaseException) -> str:
    """What to add to a TLS connection's reset."""
    if _is_tls(error):
        return f"TLS: {error_line(error)}"
    return "TLS without close_notify" if INegotiated.providedBy(leg.transport) else ""
