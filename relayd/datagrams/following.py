"""Has flows follow their servers, when the relay gets other objects for the same ones.

A change of settings makes new servers, and a name that is followed makes one for an
address that is back.  One that is where another was, is dialled in the same way and, if
there are several, has the same name, is the same to a flow, which has the new one from
then on: it hears what its checks say, goes where its name leads, and counts there.  Its
socket stays, and so do its client's port and what it has heard.

A server that is none of the relay's any more keeps its flows as long as it answers them
(:attr:`relayd.datagrams.servers.Server.left`).

The flows are gone through once for each change that brings such servers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any
from weakref import WeakSet

from relayd.datagrams.ledger import Ledger
from relayd.datagrams.servers import Server
from relayd.net.dial_options import DialOptions


class FlowFollowing:
    """Of the flows of one relay.

    :ivar left: servers that it has no more, as long as flows have them.
    """

    def __init__(self, ledger: Ledger[Any]) -> None:
        self._ledger = ledger
        self._servers: tuple[Server, ...] = ()
        self._dialing: DialOptions | None = None
        self.left: WeakSet[Server] = WeakSet()

    def follow(self, servers: tuple[Server, ...], dialing: DialOptions | None) -> None:
        """These are the relay's servers now; nothing is done if they were before.

        :param dialing: how those are dialled that have nothing of their own.
        """
        if servers is self._servers:
            return
        gone = {*self._servers, *self.left}.difference(servers)
        for each in gone:
            if not each.left:
                each.left = each.moves = True
                # What the relay says is for others from now on.
                each.dialing = _dialled(each, self._dialing)
        for each in servers:
            each.left = False
        self._servers, self._dialing = servers, dialing
        heirs = _heirs(gone, servers, dialing)
        self.left = WeakSet(gone.difference(heirs))
        if heirs:
            self._go(heirs)

    def _go(self, heirs: Mapping[Server, Server]) -> None:
        """Give flows their servers of now."""
        for before, server in heirs.items():
            server.take_after(before)
        moved = dict.fromkeys(heirs, 0)
        for flow in self._ledger.table:
            before = flow.server
            if before in heirs:
                moved[before] += 1
                flow.follow(heirs)
        for before, count in moved.items():
            if count and before.state is not None:
                before.state.count_flows(-count)
            state = heirs[before].state
            if state is not None:
                state.count_flows(count)
        # When all is counted: it may be down, and be left at once.
        for state in {heirs[before].state for before, count in moved.items() if count}:
            if state is not None:
                state.changed()


def _heirs(
    gone: Iterable[Server], servers: Iterable[Server], dialing: DialOptions | None
) -> dict[Server, Server]:
    """Which of the servers are the same as some of before."""
    by_place: dict[Hashable, Server] = {}
    by_name: dict[Hashable, Server] = {}
    for each in servers:
        place = _place(each, dialing)
        by_place.setdefault(place, each)
        by_name.setdefault((_name(each), place), each)
    heirs = {}
    for each in gone:
        place = _place(each, None)
        same = by_name.get((_name(each), place)) or by_place.get(place)
        if same is not None:
            heirs[each] = same
    return heirs


def _name(server: Server) -> str:
    return server.name if server.state is None else server.state.name


def _place(server: Server, dialing: DialOptions | None) -> Hashable:
    """Where a server is, and how it is dialled."""
    return type(server), server.host, server.port, _dialled(server, dialing)


def _dialled(server: Server, dialing: DialOptions | None) -> DialOptions:
    own = dialing if server.dialing is None else server.dialing
    return DialOptions() if own is None else own
