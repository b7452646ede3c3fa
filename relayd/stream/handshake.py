"""A client's TLS handshake, below the relay.

Twisted connects a protocol before it is complete; a relay waits until it is.
:class:`ClientHandshake` says whether it has come further, and what it means when the
client is lost in the middle of it.
"""

from __future__ import annotations

from typing import Any

from twisted.internet import error
from twisted.python.failure import Failure

from relayd.core.session import Ending
from relayd.net.tls import has_begun, notifies_handshake, stage, why_failed


class ClientHandshake:
    """The TLS handshake of one client.

    :param transport: its connection.

    :ivar is_done: it was complete before the client was admitted.
    """

    #: What is awaited, for the log.
    name = "TLS handshake"
    is_done = False

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._progress: Any = None
        self.comes_on()

    @classmethod
    def of(cls, transport: Any) -> ClientHandshake | None:
        """What a connection begins with, or None: nothing.

        Twisted tells the protocol of its end (`IHandshakeListener`).
        """
        return cls(transport) if notifies_handshake(transport) else None

    @property
    def has_begun(self) -> bool:
        """Whether the client has sent any of it: a whole message."""
        return has_begun(self._transport)

    def comes_on(self) -> bool:
        """Whether it has come further since the last time this was called."""
        before, self._progress = self._progress, stage(self._transport)
        return bool(self._progress != before)

    def judge(self, reason: Failure) -> tuple[Ending, str]:
        """How a session ends whose client is gone in the middle, and the detail."""
        if isinstance(reason.value, error.ConnectionClosed | OSError):
            return Ending.CLIENT_LEFT, "in the middle of its TLS handshake"
        said = why_failed(reason, "the client")
        return Ending.BAD_REQUEST, f"TLS handshake: {said}"
