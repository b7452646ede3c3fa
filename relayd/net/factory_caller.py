"""What dials for a program that has a factory, and waits for a Deferred.

A dial asks its caller (:class:`relayd.core.interfaces.ICaller`); here the factory
answers, as far as it can: one of a relay's can (:mod:`relayd.stream.server_attempt`).
"""

from __future__ import annotations

import errno
import socket
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IProtocol, IProtocolFactory
from zope.interface import implementer

from relayd.core.interfaces import ICaller, IHopListener, IOnBehalf

#: Why a dial that asks about its client can't be made.
NO_CLIENT = "it is dialled for no client"


@implementer(ICaller, IHopListener, IOnBehalf)
class FactoryCaller:
    """Fires a Deferred with the outcome of a dial."""

    def __init__(self, factory: IProtocolFactory, done: Deferred[IProtocol]) -> None:
        self._factory = factory
        self.build_leg = factory.buildProtocol
        self.leg_connected = done.callback
        self.dial_failed = done.errback

    def speaks_first(self) -> bool:
        asked = getattr(self._factory, "speaks_first", None)
        return asked is not None and bool(asked())

    def dial_started(self, sock: socket.SocketType, address: Any) -> bool:
        listener = IHopListener(self._factory, None)
        return listener is not None and bool(listener.dial_started(sock, address))

    # -- IOnBehalf

    def client_host(self) -> str:
        """See :meth:`IOnBehalf.client_host`.

        :raises OSError: EADDRNOTAVAIL: the factory is for no client.
        """
        return str(self._on_behalf().client_host())

    def original(self) -> tuple[int, Any]:
        """See :meth:`IOnBehalf.original`."""
        found: tuple[int, Any] = self._on_behalf().original()
        return found

    def goes_to(self, endpoint: object) -> None:
        """See :meth:`IOnBehalf.goes_to`."""
        self._on_behalf().goes_to(endpoint)

    def _on_behalf(self) -> Any:
        on_behalf = IOnBehalf(self._factory, None)
        if on_behalf is None:
            raise OSError(errno.EADDRNOTAVAIL, NO_CLIENT)
        return on_behalf
