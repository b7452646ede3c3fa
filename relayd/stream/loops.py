"""Finds out whether a client's connection is one of its own relay's.

Connections to this process are noted as they are made, and looked up as they are
accepted (:mod:`relayd.core.hops`), by their two ends.  Of a relay that is given what
was meant for others (`StreamRelay.translated`) one of them is where the client meant to
go, as its sessions have it: rules may have changed that on the way.
"""

from __future__ import annotations

import functools
from contextlib import suppress
from typing import Any

from relayd.core.addresses import socket_name
from relayd.core.hops import Hop, between, streams
from relayd.core.session import Session
from relayd.stream.legs import Leg
from relayd.stream.relay import StreamRelay

#: Destinations whose text is kept once.
REMEMBERED = 1024


@functools.lru_cache(maxsize=REMEMBERED)
def _same(name: str) -> str:
    """The same text in thousands of sessions, kept once.

    Clients choose it: Python 3.12 would keep each that is interned for ever.
    """
    return name


class LoopGuard(Leg):
    """A client's leg that knows by which connections it came, and which it has made."""

    session: Session
    factory: StreamRelay

    #: Connections to this process, by what they are called at both ends.
    _hops: dict[str, Hop] | None = None
    #: How its client came, if that had to be found out.
    _came_by: tuple[str, int | None] | None = None

    def asked_for(self, transport: Any) -> str:
        """Where the client meant to go; the address that it has come to, if the kernel
        can't tell: by a UNIX socket, or it has left.
        """
        # Most relays do not need it.
        from relayd.net.original import destination_of

        with suppress(OSError):
            return _same(socket_name(destination_of(transport)[1]))
        return self.factory.host_name(transport.getHost())

    @property
    def _hop(self) -> tuple[str, int | None]:
        """What the client's connection is, if it is another relay's of this process.

        :return: its name, and the timestamp of its SYN, if that is known.
        """
        if self.factory.intercepts is None:
            return between(self.session.peer, self.session.listener), None
        if self._came_by is None:
            self._came_by = self._found()
        return self._came_by

    def _found(self) -> tuple[str, int | None]:
        # Most relays do not need it.
        from relayd.net.syn import stamp_of_client

        name = between(self.session.peer, self.session.listener)
        return name, stamp_of_client(self.transport)

    def leads_back(self) -> bool:
        """Whether this relay is on the way by which the client came."""
        name, stamp = self._hop
        return streams.is_loop(name, self.factory, stamp)

    def note_hop(self, name: str, stamp: int | None = None) -> None:
        """A connection to this process was made; kept until the session is over.

        :param stamp: see :class:`relayd.core.hops.Hop`.
        """
        if self._hops is None:
            self._hops = {}
        if name not in self._hops:
            before, came = self._hop
            self._hops[name] = streams.add(name, self.factory, before, stamp, came)
