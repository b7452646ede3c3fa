"""What a UDP relay asks of a pool whose servers have state.

UDP relays know no pools (:mod:`relayd.upstreams.pool`): these few calls are what they
make.  A server is told of its flows as :class:`relayd.core.interfaces.ICounted` says:
an attempt begins with a flow, and has succeeded with the first answer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, runtime_checkable


class CountedServer(Protocol):
    """A server of such a pool (:class:`relayd.upstreams.flow_server.FlowServer`).

    :ivar endpoint: where it is (:class:`relayd.datagrams.servers.Server`).
    :ivar name: with what its operator calls it.
    :ivar draining: it has left its pool.
    :ivar is_down: its checks find it down, or its operator says so.
    :ivar reason: why it is as it is, in words.
    :ivar passive: what judges it by its flows, if anything does.
    """

    endpoint: Any
    name: str
    draining: bool
    passive: Any

    @property
    def is_down(self) -> bool: ...

    @property
    def reason(self) -> str: ...

    @property
    def up(self) -> bool:
        """Nothing is known against it."""

    def changed(self) -> None:
        """It has an address now, or has none any more."""

    def began(self) -> None:
        """See :meth:`relayd.core.interfaces.ICounted.began`; so the others."""

    def connected(self) -> None: ...

    def failed(self, ending: Any, detail: str) -> None: ...

    def cancelled(self) -> None: ...

    def closed(self) -> None: ...

    def count_flows(self, more: int) -> None:
        """So many flows are here now that were counted at the same one of another
        pool; or are counted there, if it is less than 0."""


@runtime_checkable
class FlowPool(Protocol):
    """Chooses the servers of flows.

    :ivar listeners: called with a server that has changed, joined or left.
    """

    listeners: list[Callable[[Any], object]]

    @property
    def upstreams(self) -> Sequence[Any]:
        """Its servers; another object when others have joined or left."""

    def choose(self, session: Any, tried: Collection[Any] = ()) -> Any | None:
        """The server for a flow, or None.

        :param session: a :class:`relayd.core.flows.NewFlow`.
        :param tried: those that have failed it.
        """
