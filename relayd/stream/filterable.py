"""Filters of one session: of its own, and those put on and taken off as it goes on.

Toxiproxy's users know it: a fault is added to a proxy, and its living connections feel
it.  An operator who looks into a session does the same with a capture.

A route may give a session filters of its own (:meth:`Filterable.filter_alone`), which
stand behind those of its relay, and stay when those change.
"""

from __future__ import annotations

from collections.abc import Sequence

from relayd.core.errors import ConfigError, RelayError
from relayd.core.filtering import IFilterFactory, check_factories, clashes
from relayd.core.stage import Stage
from relayd.stream.bridge import Bridge
from relayd.stream.filtered_bridge import FilteredBridge
from relayd.stream.filtering import change_filters, with_filters
from relayd.stream.lifecycle import Lifecycle


class NotRelayed(RelayError):
    """A session has no bytes that filters could see."""


class Filterable(Lifecycle):
    """A client's leg whose session may have filters.

    :ivar own_filters: who is asked for filters of its own.
    :ivar own_bridge: joins its two legs, if there are any.
    """

    own_bridge: type[Bridge] | None = None

    @property
    def filters(self) -> Sequence[IFilterFactory]:
        """Those of its relay, and then its own."""
        own, shared = self.own_filters, self.factory.filters
        return (*shared, *own) if own else shared

    def filter_alone(self, factories: Sequence[IFilterFactory]) -> None:
        """Have filters see the bytes of this session alone, behind those of its relay.

        To be called before it is relayed; a later call replaces the filters.

        :raises RuntimeError: it is relayed already.
        :raises TypeError: its bridge is one of a program's own, which has no filters;
            or one is no factory of filters.
        :raises ValueError: one is for datagrams only.
        :raises relayd.core.errors.ConfigError: they do not go together, or not with
            those of its relay.
        """
        if self.bridge is not None:
            raise RuntimeError(f"session {self.session.id} is relayed already")
        own = tuple(factories)
        check_factories(own, datagrams=False)
        for problem in clashes((*self.factory.filters, *own), "a session"):
            raise ConfigError(problem)
        self.own_bridge = with_filters(self.factory.bridge) if own else None
        self.own_filters = own

    def change_filters(
        self, gone: Sequence[IFilterFactory], new: Sequence[IFilterFactory]
    ) -> None:
        """Take filters off, and put others on, behind those that there are.

        Its own stay, also where they are equal to one that goes.

        :raises NotRelayed: its two connections are not joined, or it is ending.
        :raises TypeError: they are joined in a way of the program's own.
        """
        session, bridge = self.session, self.bridge
        if bridge is None or session.ending is not None or bridge.closing:
            how = "is ending" if session.stage is Stage.RELAYING else "is not relayed"
            raise NotRelayed(f"session {session.id} {how}")
        change_filters(bridge, gone, new)

    @property
    def filtered(self) -> Sequence[str]:
        """The names of the filters that see its bytes now."""
        bridge = self.bridge
        return bridge.filtered if isinstance(bridge, FilteredBridge) else ()
