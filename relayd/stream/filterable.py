"""Filters on sessions that go on: put on and taken off while their bytes move.

Toxiproxy's users know it: a fault is added to a proxy, and its living connections feel
it.  An operator who looks into a session does the same with a capture.
"""

from __future__ import annotations

from collections.abc import Sequence

from relayd.core.errors import RelayError
from relayd.core.filtering import IFilterFactory
from relayd.core.stage import Stage
from relayd.stream.filtered_bridge import FilteredBridge
from relayd.stream.filtering import change_filters
from relayd.stream.redial import Redialing


class NotRelayed(RelayError):
    """A session has no bytes that filters could see."""


class Filterable(Redialing):
    """A client's leg whose session may get filters, and lose them."""

    def change_filters(
        self, gone: Sequence[IFilterFactory], new: Sequence[IFilterFactory]
    ) -> None:
        """Take filters off, and put others on, behind those that there are.

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
