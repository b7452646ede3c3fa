"""Gives flows another socket: to another address of their server, or another server.

When that is done says :mod:`relayd.datagrams.moving`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from relayd.core.flows import NewFlow
from relayd.datagrams.dialing import Connected, FlowDialer
from relayd.datagrams.flow import ClientFlow
from relayd.datagrams.ledger import Ledger
from relayd.datagrams.loops import LoopGuard
from relayd.datagrams.moving import MAX_SERVERS
from relayd.datagrams.servers import Server, ServerPool
from relayd.datagrams.watching import READABLE, Watcher


class FlowMover:
    """Moves the flows of one relay.

    :param asked: what a pool is asked about, of a listener, a client's key there, and
        its address.
    """

    def __init__(
        self,
        ledger: Ledger[ClientFlow],
        *,
        pool: ServerPool,
        dialer: FlowDialer,
        loops: LoopGuard,
        watcher: Watcher,
        asked: Callable[[Any, Any, Any], NewFlow],
    ) -> None:
        self._ledger = ledger
        self._pool = pool
        self._dialer = dialer
        self._loops = loops
        self._watcher = watcher
        self._asked = asked

    def redial(self, flow: ClientFlow, problem: OSError) -> bool:
        """See :meth:`relayd.datagrams.interfaces.FlowRelay.redial`."""
        server = flow.server
        self._dialer.refused(server, flow.tried[-1], problem)
        if server.named and not flow.stranded:
            try:
                connected = self._watched(
                    flow, self._dialer.dial(server, flow.ends, flow.tried)
                )
            except OSError:
                pass
            else:
                self._go(flow, connected)
                return True
        if server.state is None and not server.left:
            return False
        return self._to_another(flow, problem)

    def _to_another(self, flow: ClientFlow, problem: OSError) -> bool:
        """Connect a flow to another server of its pool, if it may try one."""
        tried = flow.tried_servers()
        if len(tried) > MAX_SERVERS:
            flow.left_for(None, problem)
            return False
        return self.send_away(flow, problem, tried)

    def send_away(
        self, flow: ClientFlow, problem: OSError, tried: Sequence[Server] = ()
    ) -> bool:
        """See :meth:`relayd.datagrams.interfaces.FlowRelay.send_away`.

        :param tried: servers not to choose; unless given, its own.
        """
        connected = self._another(flow, tried or (flow.server,))
        if connected is None:
            flow.left_for(None, problem)
            return False
        flow.left_for(connected.server, problem)
        self._go(flow, connected)
        return True

    def _another(self, flow: ClientFlow, tried: Sequence[Server]) -> Connected | None:
        """A socket that is connected to another server, if there is one."""
        asked = self._asked(flow.listener, flow.here, flow.source)
        server = self._pool.choose(asked, tried)
        if server is None:
            return None
        try:
            connected = self._dialer.dial_any(server, flow.ends, asked, tried)
            return self._watched(flow, connected)
        except OSError:
            return None

    def _watched(self, flow: ClientFlow, connected: Connected) -> Connected:
        """Watch a flow's next socket.

        :raises OSError: that is not possible, and the socket is closed.
        """
        try:
            self._watcher.watch(connected.sock.fileno(), flow, READABLE)
        except OSError:
            connected.sock.close()
            raise
        return connected

    def _go(self, flow: ClientFlow, connected: Connected) -> None:
        """Give a flow another socket, which is watched."""
        self._ledger.count_drops(flow)
        self._watcher.unwatch_and_close(flow.sock)
        flow.move(connected)
        self._loops.note(flow)
