"""One server: how to dial it, and its name in the log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import attrs
from twisted.internet.interfaces import IStreamClientEndpoint

from relayd.core.hooks import implementers
from relayd.core.interfaces import IDialer
from relayd.core.session import Session
from relayd.net.tls import ServerIdentity

#: Whether a class of endpoints is dialled as an IDialer.
_dials = implementers(IDialer)


@attrs.define(eq=False)
class Upstream:
    """One server: how to dial it, and its name in the log.

    :ivar endpoint: dialled once for each session.
    :ivar name: the server's address as the operator wrote it.
    :ivar identity: the name that its certificate must have.  Unless given, the name
        that a TLS connection asks for (SNI); where it asks for none, as with an IP
        address, the endpoint checks or does not.
    :ivar preamble: makes the first bytes of each connection, of the session that it is
        for; they are not counted as the client's.  Within TLS, if the endpoint has it.
    :ivar pool: the name of its pool, which says so
        (:class:`relayd.upstreams.pool.Pool`); empty for none, and for `default`.
    :ivar dials: the endpoint is dialled as an
        :class:`~relayd.core.interfaces.IDialer`.
    :cvar counted: its sessions are: it is a :class:`relayd.core.interfaces.ICounted`.
    :cvar tier: whether it is a server of the first choice, 0, or a backup.
    :cvar usable: it may be chosen for a new session, unless it is full.
    :cvar is_full: it has as many sessions as it may have.
    """

    counted: ClassVar[bool] = False
    tier: ClassVar[int] = 0
    usable: ClassVar[bool] = True
    is_full: ClassVar[bool] = False

    endpoint: IStreamClientEndpoint
    name: str
    identity: ServerIdentity | None = None
    preamble: Callable[[Session], bytes] | None = None
    pool: str = attrs.field(default="", init=False)
    dials: bool = attrs.field(init=False)

    @dials.default
    def _find_dials(self) -> bool:
        kind: Any = type(self.endpoint)
        # With TLS the endpoint is a wrapper, and not one of our sockets.
        return self.identity is None and _dials[kind]
