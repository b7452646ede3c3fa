"""A server of datagrams in a pool.

Its sessions are flows.  It may be chosen while its name has an address.
"""

from __future__ import annotations

from typing import Any, Protocol

import attrs

from relayd.upstreams.server import Server


class Where(Protocol):
    """Where it is (:class:`relayd.udp_nat.Server`)."""

    name: str
    address: Any


@attrs.define(eq=False, on_setattr=attrs.setters.NO_OP)
class FlowServer(Server):
    """One server; `endpoint` is where it is, which no other pool has."""

    @classmethod
    def at(cls, where: Where, **settings: Any) -> FlowServer:
        """A server there.

        :param settings: `weight`, `tier` and the others of
            :class:`~relayd.upstreams.server.Server`; the label goes before its name.
        """
        label = settings.get("label")
        name = f"{label}/{where.name}" if label else where.name
        endpoint: Any = where
        return cls(endpoint, name, **settings)

    @property
    def takes_sessions(self) -> bool:
        """See :class:`~relayd.upstreams.server.Server`."""
        where: Any = self.endpoint
        return where.address is not None and super().takes_sessions

    def count_flows(self, more: int) -> None:
        """See :meth:`relayd.core.flow_pools.CountedServer.count_flows`.

        Nobody has chosen it for them, and none of them is over: that says nothing of
        it.  Whoever calls this says that it has changed.
        """
        self.sessions += more
        if more < 0 and self.on_over is not None:
            # It may be what counts them for its heir.
            self.on_over(self)
