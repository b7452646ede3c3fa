"""Twisted's TLS listeners, for clients that offer protocols (ALPN, RFC 7301).

A relay does not know what its servers speak, so it negotiates no protocol: a client
that offers some is answered as by a server that does not know ALPN, and goes on.
Twisted 26.10's answer is none that OpenSSL accepts: such a handshake fails, which is
that of each browser, and of curl.

An endpoint that is made of a string gives its context to the reactor as it listens:
:class:`ListensForAll` stands in the reactor's place for that.
"""

from __future__ import annotations

from typing import Any


class ListensForAll:
    """A reactor whose TLS listeners negotiate no protocol; in all else the reactor.

    :param reactor: listens.
    """

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)

    def listenSSL(
        self,
        port: int,
        factory: Any,
        contextFactory: Any,  # noqa: N803
        *more: Any,
        **named: Any,
    ) -> Any:
        """See `IReactorSSL.listenSSL`."""
        negotiate_nothing(contextFactory)
        return self._reactor.listenSSL(port, factory, contextFactory, *more, **named)


def negotiate_nothing(context_factory: Any) -> None:
    """Have a context, before its first connection, choose none of what clients offer.

    :param context_factory: of a listener, such as `CertificateOptions`.
    """
    from OpenSSL.SSL import NO_OVERLAPPING_PROTOCOLS

    context_factory.getContext().set_alpn_select_callback(
        lambda connection, offered: NO_OVERLAPPING_PROTOCOLS
    )
