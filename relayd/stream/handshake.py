"""What a client's connection begins with, below the relay: TLS, or a PROXY header.

Twisted connects a protocol before either is complete; a relay waits until it is.
:class:`ClientHandshake` says what is awaited, whether it has come further, and what it
means when the client is lost in the middle of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet import error
from twisted.python.failure import Failure

from relayd.core.session import Ending
from relayd.net.tls import has_begun, notifies_handshake, stage, why_failed


class ClientHandshake:
    """The TLS handshake or the PROXY header of one client.

    :param transport: its connection.
    :param header: what reads its PROXY header
        (:class:`relayd.net.proxy_header.Header`); None: it is TLS.

    :ivar is_done: it was complete before the client was admitted.
    """

    is_done = False

    def __init__(self, transport: Any, header: Any) -> None:
        self._transport = transport
        self.header = header
        self._progress: Any = None
        self.comes_on()

    @classmethod
    def of(cls, transport: Any, done: Callable[[], object]) -> ClientHandshake | None:
        """What a connection begins with, or None: nothing.

        :param done: called when its PROXY header is complete.  Of TLS, Twisted tells
            the protocol (`IHandshakeListener`).
        """
        header = getattr(transport, "proxy_header", None)
        if header is not None:
            header.on_end = done
        elif not notifies_handshake(transport):
            return None
        return cls(transport, header)

    @property
    def name(self) -> str:
        """What is awaited, for the log."""
        return "TLS handshake" if self.header is None else "PROXY header"

    @property
    def has_begun(self) -> bool:
        """Whether the client has sent any of it; of TLS, a whole message."""
        header = self.header
        return has_begun(self._transport) if header is None else header.stage > 0

    def comes_on(self) -> bool:
        """Whether it has come further since the last time this was called."""
        header = self.header
        now = stage(self._transport) if header is None else header.stage
        before, self._progress = self._progress, now
        return bool(now != before)

    def judge(self, reason: Failure) -> tuple[Ending, str]:
        """How a session ends whose client is gone in the middle, and the detail."""
        if self.header is not None:
            if self.header.is_bad:
                said = "it did not begin with a PROXY header"
                return Ending.BAD_REQUEST, said
            return Ending.CLIENT_LEFT, "before its PROXY header"
        if isinstance(reason.value, error.ConnectionClosed | OSError):
            return Ending.CLIENT_LEFT, "in the middle of its TLS handshake"
        said = why_failed(reason, "the client")
        return Ending.BAD_REQUEST, f"TLS handshake: {said}"
