"""One server: how to dial it, and its name in the log."""

from __future__ import annotations

from typing import Any

import attrs
from twisted.internet.interfaces import IStreamClientEndpoint

from relayd.core.hooks import implementers
from relayd.core.interfaces import IDialer
from relayd.net.tls import ServerIdentity

#: Whether a class of endpoints is dialled as an IDialer.
_dials = implementers(IDialer)


@attrs.define(eq=False)
class Upstream:
    """One server: how to dial it, and its name in the log.

    :ivar endpoint: dialled once for each session.
    :ivar name: the server's address as the operator wrote it.
    :ivar identity: whose certificate it must show.  Unless given, that of the name
        which a TLS connection asks for (SNI); one that asks for none, as for an IP
        address, is left to the endpoint.
    :ivar dials: the endpoint is an :class:`~relayd.core.interfaces.IDialer`, and is
        dialled as one.
    """

    endpoint: IStreamClientEndpoint
    name: str
    identity: ServerIdentity | None = None
    dials: bool = attrs.field(init=False)

    @dials.default
    def _find_dials(self) -> bool:
        kind: Any = type(self.endpoint)
        # What has a certificate to show is no socket of ours.
        return self.identity is None and _dials[kind]
