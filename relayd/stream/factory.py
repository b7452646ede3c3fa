"""Stream relays as Twisted has them: a factory whose protocols are sessions.

:class:`StreamFactory` makes one :class:`relayd.stream.session.StreamProtocol` for each
client.  A relay is a subclass of each: the protocol decides what to dial.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory, Protocol
from zope.interface import implementer

from relayd.core.addresses import address_name
from relayd.core.hooks import overrides
from relayd.core.interfaces import INamedClients
from relayd.stream.relay import StreamRelay
from relayd.stream.session import StreamProtocol

__all__ = ["StreamFactory", "StreamProtocol"]


class Unserved(Protocol):
    """A client that comes in a drain: its connection is closed at once.

    Not None, which Twisted's wrapping factories (TLS, PROXY, timeouts) take for a
    protocol: such a client would stay, and each would be a traceback in the log.
    """

    def connectionMade(self) -> None:
        transport: Any = self.transport
        transport.loseConnection()


@implementer(INamedClients)
class StreamFactory(StreamRelay, Factory):
    """The sessions of one relay, and what they share.

    :cvar protocol: serves one client: made with the factory and the client's name.
    """

    noisy = False
    protocol: Any = StreamProtocol

    def takes_names(self) -> bool:
        """See :meth:`INamedClients.takes_names`."""
        # Whoever has a buildProtocol of their own means to see each client's address,
        # and may do anything with the protocol; so may a function in a class's place.
        has_own = overrides(self, StreamFactory, "buildProtocol")
        return not has_own and isinstance(self.protocol, type)

    def build_named(self, client: str) -> StreamProtocol | None:
        """See :meth:`INamedClients.build_named`."""
        # None closes the connection: it was in the backlog when we shut down.
        if self.registry.draining:
            return None
        protocol: StreamProtocol | None = self.protocol(self, client)
        if protocol is not None:
            protocol.is_foreign = False
        return protocol

    def buildProtocol(self, addr: IAddress | None) -> Any:
        protocol = self.build_named(address_name(addr))
        if protocol is not None:
            protocol.is_foreign = True
        elif self.registry.draining:
            return Unserved()
        return protocol

    def doStart(self) -> None:
        """A listener opens, maybe after a drain: that is over now.

        Not in `startFactory`, which is for the first only: another may be open yet, or
        be closing.
        """
        super().doStart()
        self.reopen()

    def stopFactory(self) -> None:
        """The last listener closed: don't keep a timer for sessions to come."""
        self.wheel.settle()
