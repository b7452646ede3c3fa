"""What a client says before it is relayed, and how that is read.

A :class:`Prelude` is a pure parser with a name: it is given all that has arrived and
either understands it, or asks for more, or rejects it.  A relay has any number of
them, one after the other (:attr:`relayd.stream.relay.StreamRelay.preludes`); what the
last one has not read is the first that is relayed.

A new protocol that has something to say first (SOCKS5, HTTP CONNECT) is a Prelude and a
decision: a subclass of :class:`relayd.stream.factory.StreamProtocol` whose `decide` is
given what the preludes have read.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import attrs

from relayd.core.errors import RelayError


class BadRequest(RelayError):
    """What a client has sent can't become what is expected."""


#: Is given all that has arrived; returns what it says and how many bytes of that are
#: read, or None if more is needed.  Raises :class:`BadRequest` as soon as it is wrong,
#: and so at the latest when it is too long.
Reader = Callable[[bytes], tuple[Any, int] | None]


@attrs.frozen
class Prelude:
    """How to read what a client says first.

    One of `read` and `start` is given.

    :ivar name: what it says, for the log: `request`.
    :ivar read: reads it, of any client.
    :ivar start: makes what reads it, of one client: a reader that remembers how far it
        has come, where to begin anew with each piece would take too long.
    """

    name: str
    read: Reader | None = None
    start: Callable[[], Reader] | None = None


@attrs.frozen
class Introduction:
    """What some peers say before all else: for whom they speak.

    :ivar peers: who is to say it, by :attr:`relayd.core.session.Session.peer`; whoever
        else connects is served as itself.
    :ivar prelude: reads it, as an object with `source`, the client's address as text,
        which is empty if the peer speaks for itself; see
        :class:`relayd.preludes.proxy_protocol.ProxyHeader`.
    """

    peers: Container[str]
    prelude: Prelude
