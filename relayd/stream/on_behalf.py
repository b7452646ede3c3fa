"""What an attempt says of its client to an endpoint that asks.

Dials from the client's own address ask who it is (:mod:`relayd.net.transparent`), those
to where it meant to go ask that (:mod:`relayd.net.original`).  The client chooses where
these lead, so their failures are not counted against the server that they stand for:
anybody could have it taken out, for all.

A server that is dialled from the client's address may answer the client, and not this
machine: to one in its own network it has another way.  So could such clients have every
server taken out that all others reach.  That a dial has had no answer counts only if no
other one has had any meanwhile.
"""

from __future__ import annotations

from typing import Any

from zope.interface import implementer

from relayd.core.errors import LeadsBack
from relayd.core.interfaces import ICounted
from relayd.core.session import Ending
from relayd.stream.attempt import LOOP_DETAIL, Attempt

#: The detail of a session whose client asked for the listener itself.
NOT_REDIRECTED = "it came to the listener itself, and was not redirected"


@implementer(ICounted)
class Unjudged:
    """A server whose sessions are counted, and say nothing about it.

    :param server: is told.
    """

    def __init__(self, server: Any) -> None:
        self._server = server
        self.label: str = server.label
        self.began, self.connected = server.began, server.connected
        self.cancelled = server.cancelled
        self.closed = server.closed

    def failed(self, ending: Any, detail: str) -> None:
        """See :meth:`ICounted.failed`."""
        self._server.failed(None, detail)

    def reset(self, why: str, provoked: bool) -> None:
        """See :meth:`ICounted.reset`."""
        self._server.closed()


@implementer(ICounted)
class AsClient:
    """A server of which an attempt from its client's address is to say whether it
    answers.

    :param server: is told; a :class:`relayd.upstreams.server.Server`.
    """

    def __init__(self, server: Any) -> None:
        self._server = server
        self._answers = server.answers_to_clients
        self.label: str = server.label
        self.began, self.cancelled = server.began, server.cancelled
        self.closed, self.reset = server.closed, server.reset

    def connected(self) -> None:
        """See :meth:`ICounted.connected`."""
        self._server.answers_to_clients += 1
        self._server.connected()

    def failed(self, ending: Any, detail: str) -> None:
        """See :meth:`ICounted.failed`."""
        server = self._server
        others = server.answers_to_clients != self._answers
        if others and ending is Ending.CONNECT_TIMEOUT:
            ending = None
        server.failed(ending, detail)


class OnBehalf(Attempt):
    """An attempt that is asked on behalf of which client it is.

    :ivar anywhere: its client chooses where it leads.
    """

    anywhere = False
    upstream: Any

    def client_host(self) -> str:
        """See :meth:`IOnBehalf.client_host`."""
        place = self.place
        # It is asked for each address of a name.
        if place is not None and place is self.upstream:
            self.place = AsClient(place)
        client = self.client.session.client
        if client.startswith("unix:"):
            return ""
        # With its scope, unlike `host_of`; empty if it has no port.
        host: str = client.rpartition(":")[0].strip("[]")
        return host

    def original(self) -> tuple[int, Any]:
        """See :meth:`IOnBehalf.original`."""
        # Most relays do not need it.
        from relayd.net.original import original_of

        client = self.client
        self.anywhere = self.leads_here = True
        if self.place is not None:
            self.place = Unjudged(self.place)
        where = original_of(client.session, client.transport)
        host, port = where[1][:2]
        if self._is_own_listener(host, port):
            raise LeadsBack(NOT_REDIRECTED)
        return where

    def _is_own_listener(self, host: str, port: int) -> bool:
        factory = self.client.factory
        own = factory.intercepts
        return own is not None and own.has(host, port, factory.is_own)

    def goes_to(self, endpoint: Any) -> None:
        """See :meth:`IOnBehalf.goes_to`.

        :raises LeadsBack: that is a listener of the relay's.
        """
        peer = getattr(endpoint, "peer", None)
        if peer is not None and self._is_own_listener(peer.host, peer.port):
            raise LeadsBack(LOOP_DETAIL)
        self.name = getattr(endpoint, "peer_name", "")
        if self.name:
            label = self.place.label if self.place is not None else ""
            name = f"{label}/{self.name}" if label else self.name
            self.client.session.upstream = name

    def stamp(self, sock: Any) -> int | None:
        """The timestamp of the SYN of its connection, if it takes that to recognize it.

        :param sock: its socket, or None.
        """
        if not self.anywhere or sock is None:
            return None
        from relayd.net.syn import stamp_of_dial

        return stamp_of_dial(sock)
