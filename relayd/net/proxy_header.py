"""Listeners behind a balancer that sends PROXY headers (`haproxy:`).

Twisted reads the header, but connects the protocol before that.  A relay must not dial
before the header was read.  So :class:`Header` is between the connection and Twisted's
wrapper, finds the end of the header, and notifies the relay.

The header: https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt, section 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import (
    IAddress,
    IListeningPort,
    IProtocolFactory,
    IStreamServerEndpoint,
)
from twisted.protocols.haproxy import proxyEndpoint
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from zope.interface import implementer

from relayd.core.names import is_address

#: The signature of version 2, and the size of its fixed part: the signature, two bytes,
#: and the length of the rest.
_VERSION_2 = b"\r\n\r\n\0\r\nQUIT\n"
_FIXED = 16

#: The most bytes of a header of version 1, with the end of its line.
_LONGEST_VERSION_1 = 107


def header_end(start: bytes | bytearray) -> int:
    """The length of the header that a connection begins with; 0: not known yet."""
    if start.startswith(_VERSION_2):
        if len(start) < _FIXED:
            return 0
        return _FIXED + int.from_bytes(start[_FIXED - 2 : _FIXED], "big")
    is_version_1 = start.startswith(b"PROXY") and b"\r\n" in start
    return start.find(b"\r\n") + 2 if is_version_1 else 0


def may_begin_header(start: bytes | bytearray) -> bool:
    """Whether a header may begin with these bytes, of which no end is known yet."""
    if _VERSION_2.startswith(start[: len(_VERSION_2)]):
        return True
    return b"PROXY ".startswith(start[:6]) and len(start) < _LONGEST_VERSION_1


def names_address(address: IAddress) -> bool:
    """Whether a header's address is one: Twisted takes any words for it."""
    if not isinstance(address, IPv4Address | IPv6Address):
        return True
    host = address.host
    if isinstance(address, IPv6Address):
        # A balancer's own, if the header names none, may have a scope.
        host = host.partition("%")[0]
    is_port = address.type == "TCP" and 0 <= address.port <= 65535
    return is_port and is_address(host)


class Header(ProtocolWrapper):
    """Waits for the whole header; Twisted's wrapper, above it, parses the header.

    In one piece: Twisted takes a short first piece for no header.

    :ivar is_bad: the connection is closed, as the header is invalid.
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
        if self.is_bad:
            return
        start += data
        end = header_end(start)
        if not end and not may_begin_header(start):
            self.is_bad = True
            super().loseConnection()
        elif 0 < end <= len(start) and self._parse(bytes(start[:end])):
            self._start = None
            on_end, self.on_end = self.on_end, None
            if on_end is not None:
                on_end()
            # The callback may have ended the session.
            if end < len(start) and self.wrappedProtocol is not None:
                self.wrappedProtocol.dataReceived(bytes(start[end:]))

    def _parse(self, header: bytes) -> bool:
        """Hand the header to Twisted's wrapper; whether it is valid."""
        if header == b"PROXY UNKNOWN\r\n":
            # Twisted wants something between the word and the end of the line.
            header = b"PROXY UNKNOWN \r\n"
        self._is_reading = True
        try:
            self.wrappedProtocol.dataReceived(header)
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
