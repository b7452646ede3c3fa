"""Reads again what one of Twisted's listeners has read as it opened: its certificate.

An endpoint that is made of a string reads its files as it is made, and gives them to
the reactor as it listens.  Here it listens by something that takes the place of a
reactor, and opens nothing: what it would have served its clients with is given to the
port that stands.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.endpoints import serverFromString

from relayd.core.errors import ConfigError
from relayd.operating.tls_listening import negotiate_nothing


class _Taker:
    """Takes what listens, in a reactor's place.

    :ivar factory: what a port would serve its clients with.
    """

    factory: Any = None

    def listenTCP(self, port: int, factory: Any, *_: object, **__: object) -> _Taker:
        self.factory = factory
        return self

    def listenUNIX(
        self, address: str, factory: Any, *_: object, **__: object
    ) -> _Taker:
        self.factory = factory
        return self

    def listenSSL(
        self,
        port: int,
        factory: Any,
        contextFactory: Any,  # noqa: N803
        *_: object,
        **__: object,
    ) -> _Taker:
        from twisted.protocols.tls import TLSMemoryBIOFactory

        negotiate_nothing(contextFactory)
        # As Twisted's reactors do.
        self.factory = TLSMemoryBIOFactory(contextFactory, False, factory)
        return self


def port_factory(text: str, factory: Any) -> Any:
    """What one of Twisted's ports serves its clients with.

    :param text: an endpoint string.
    :param factory: of the relay.
    :return: the factory, as the endpoint wraps it.
    :raises ConfigError: it can't be made, as its certificate can't be read.
    """
    taker = _Taker()
    try:
        serverFromString(taker, text).listen(factory)
    except Exception as problem:
        # Endpoint parsers raise exceptions of any kind.
        why = getattr(problem, "strerror", None) or str(problem) or repr(problem)
        raise ConfigError(f"bad endpoint {text!r}: {why}") from problem
    if taker.factory is None:
        raise ConfigError(f"bad endpoint {text!r}: it can't be read again")
    return taker.factory
