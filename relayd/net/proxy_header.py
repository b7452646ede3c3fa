"""Listeners behind a balancer that sends PROXY headers (`haproxy:`).

Twisted reads the header, but connects the protocol before that.  A relay must not dial
before the header was read.  So :class:`Header` is between the connection and Twisted's
wrapper, finds the end of the header, and notifies the relay.

The header: https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt, section 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import (
    IListeningPort,
    IProtocolFactory,
    IStreamServerEndpoint,
)
from twisted.protocols.haproxy import proxyEndpoint
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from zope.interface import implementer

#: The signature of version 2, and the size of its fixed part: the signature, two bytes,
#: and the length of the rest.
_VERSION_2 = b"\r\n\r\n\0\r\nQUIT\n"
_FIXED = 16


def header_end(start: bytes | bytearray) -> int:
    """The length of the header that a connection begins with; 0: not known yet."""
    if start.startswith(_VERSION_2):
        if len(start) < _FIXED:
            return 0
        return _FIXED + int.from_bytes(start[_FIXED - 2 : _FIXED], "big")
    is_version_1 = start.startswith(b"PROXY") and b"\r\n" in start
    return start.find(b"\r\n") + 2 if is_version_1 else 0


class Header(ProtocolWrapper):
    """Finds the header's end; Twisted's wrapper, above it, parses the header.

    :ivar is_bad: the wrapper has closed the connection, as the header is invalid.
    :ivar on_end: called once, at the end of the header and before the data behind it.
    """

    is_bad = False
    on_end: Callable[[], object] | None = None

    def __init__(self, factory: Any, wrapped: Any) -> None:
        super().__init__(factory, wrapped)
        self._start: bytearray | None = bytearray()
        self._is_reading = False

    @property
    def proxy_header(self) -> Header:
        """The relay gets it through the wrapper, which passes attributes on."""
        return self

    @property
    def stage(self) -> int:
        """How many bytes of the header have arrived; 0 once it has ended."""
        return 0 if self._start is None else len(self._start)

    def dataReceived(self, data: bytes) -> None:
        start = self._start
        if start is None:
            self.wrappedProtocol.dataReceived(data)
            return
        before = len(start)
        start += data
        end = header_end(start)
        if not 0 < end <= len(start):
            self._pass_on(data)
            return
        if self._pass_on(data[: end - before]):
            self._start = None
            on_end, self.on_end = self.on_end, None
            if on_end is not None:
                on_end()
            # The callback may have ended the session.
            if end < len(start) and self.wrappedProtocol is not None:
                self.wrappedProtocol.dataReceived(data[end - before :])

    def _pass_on(self, data: bytes) -> bool:
        """Pass data on; whether it may be a header so far."""
        self._is_reading = True
        try:
            self.wrappedProtocol.dataReceived(data)
        except Exception:
            # Twisted's parsers let some errors out, such as a port that is no number.
            self.loseConnection()
        finally:
            self._is_reading = False
        return not self.is_bad

    def loseConnection(self) -> None:
        # While the header is read, the only caller is the wrapper.
        self.is_bad = self._is_reading
        super().loseConnection()


class _HeaderFactory(WrappingFactory):
    protocol = Header
    noisy = False

    def buildProtocol(self, addr: Any) -> Any:
        wrapped: Any = self.wrappedFactory.buildProtocol(addr)
        # Twisted's factory wraps None if the relay serves no client any longer.
        return None if wrapped.wrappedProtocol is None else Header(self, wrapped)


@implementer(IStreamServerEndpoint)
class _HeaderEndpoint:
    def __init__(self, endpoint: IStreamServerEndpoint) -> None:
        self._endpoint = endpoint

    def listen(self, factory: IProtocolFactory) -> Deferred[IListeningPort]:
        return self._endpoint.listen(_HeaderFactory(factory))


def behind_balancer(endpoint: IStreamServerEndpoint) -> IStreamServerEndpoint:
    """A listener whose clients begin with a PROXY header."""
    made: IStreamServerEndpoint = proxyEndpoint(_HeaderEndpoint(endpoint))
    return made
