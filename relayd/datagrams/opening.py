"""Opening flows: admitting clients, evicting a flow from a full table, sockets.

A gate (:class:`relayd.core.interfaces.IGate`) is asked about each client that has no
flow, for each datagram of a client that it refuses; what it gives is given back when
the flow ends.  Datagrams don't wait, so a gate that takes its time refuses.

Who is let in and has no server may wait for one (:mod:`relayd.datagrams.standby`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs
from twisted.logger import Logger

from relayd.core.addresses import client_key, socket_name
from relayd.core.filtering import IFilterFactory
from relayd.core.flows import NewFlow
from relayd.core.hops import datagrams as hops
from relayd.core.interfaces import IGate, ILease
from relayd.core.leases import give_back
from relayd.core.pacing import FlowBandwidth
from relayd.datagrams.dialing import FlowDialer
from relayd.datagrams.filter_chain import FILTER_FAILED
from relayd.datagrams.filtered import FilterFailed, filter_flow
from relayd.datagrams.flow import ClientFlow
from relayd.datagrams.gating import FlowGate
from relayd.datagrams.interfaces import Ends, FlowListener, FlowRelay
from relayd.datagrams.ledger import Ledger
from relayd.datagrams.limited import flow_of
from relayd.datagrams.listener import DatagramListener, datagram_listener
from relayd.datagrams.loops import LoopGuard
from relayd.datagrams.preamble import Preamble
from relayd.datagrams.refusals import SHORTAGE
from relayd.datagrams.servers import Server, ServerPool
from relayd.datagrams.standby import NO_SERVER, FlowStandBy, WaitingClient
from relayd.datagrams.table import TableFull
from relayd.datagrams.watching import READABLE, Watcher
from relayd.net.log_throttle import LogThrottle

log = Logger(namespace="relayd.datagrams")

#: Seconds for which a client that is held waits at most.
HELD = 600.0

#: How many flows are read for a pending answer before one is evicted.
MAX_READ = 8


@attrs.frozen(eq=False, kw_only=True)
class Ingredients:
    """What the flows of a relay are made of.

    :ivar pool: the servers.
    :ivar dialer: makes the sockets.
    :ivar gate: decides which clients get a flow; all do, unless given.
    :ivar preamble: what servers are told of flows; unless they have their own.
    :ivar bandwidth: limits what flows pass on; nothing does, unless given.
    :ivar filters: of the datagrams, the one nearest to the source first.
    :ivar listener: makes the relay's listeners, of a ledger, the relay, a watcher and a
        bound socket.
    :ivar cut: flows of a server that goes down are taken to another one at once, or end
        if there is none.
    :ivar wait_for_server: seconds for which new clients wait while no server can be
        chosen; 0: they are refused.
    """

    pool: ServerPool
    dialer: FlowDialer
    gate: IGate | None = None
    preamble: Preamble | None = None
    bandwidth: FlowBandwidth | None = None
    filters: Sequence[IFilterFactory] = ()
    listener: Callable[..., DatagramListener] = datagram_listener
    cut: bool = False
    wait_for_server: float = attrs.field(default=0.0, validator=attrs.validators.ge(0))


#: Why datagrams go round, or would: they come from this relay; or to its listener,
#: which is to know where they were meant to go.
_LEADS_BACK = "lead back to their own relay"
_NOT_BROUGHT = "are for the listener itself, or come by NAT, and not by TPROXY"


class FlowOpener:
    """Makes the flows of one relay.

    :param relay: ends the flows that are evicted.
    :param made_of: see there.

    :ivar room: where clients wait for a server, or until they are not held any more.
    :ivar held: none gets a flow for now.
    """

    def __init__(
        self,
        ledger: Ledger[ClientFlow],
        relay: FlowRelay,
        made_of: Ingredients,
        *,
        loops: LoopGuard,
        watcher: Watcher,
    ) -> None:
        self._ledger = ledger
        self._bandwidth = made_of.bandwidth
        self._filters = made_of.filters
        self._preamble = made_of.preamble
        self._table = ledger.table
        self._relay = relay
        self._pool = made_of.pool
        self._dialer = made_of.dialer
        self._dialer.shed = self.shed
        self._loops = loops
        self._watcher = watcher
        gate = made_of.gate
        self._gate = None if gate is None else FlowGate(gate, ledger)
        self.ordinals = itertools.count()
        #: One for each reason: whoever comes with an address that can't be had must not
        #: keep it out of the log that the table is full.
        self._throttles = {
            each: LogThrottle(ledger.clock) for each in ("no_flow", "no_source", "loop")
        }
        self._server_throttle = LogThrottle(ledger.clock)
        self._wait = made_of.wait_for_server
        self.room = FlowStandBy(ledger, self._wait, self)
        self.held = False

    @property
    def standby(self) -> FlowStandBy | None:
        """Where they wait, if they do."""
        return self.room if self._wait or self.held or len(self.room) else None

    def hold(self, held: bool) -> None:
        """Give nobody a flow for now, or again those that have waited, and others."""
        if held is self.held:
            return
        self.held = held
        self.room.wait_for(max(self._wait, HELD) if held else self._wait)

    def open(
        self, listener: DatagramListener, key: Any, data: Any
    ) -> ClientFlow | None:
        """See :meth:`relayd.datagrams.interfaces.FlowRelay.admit`."""
        dropped = self._ledger.counters.dropped
        if listener.retired:
            dropped["stopped"] += 1
            return None
        source, to = listener.client(key)
        if to is None:
            dropped["no_local_address"] += 1
            return None
        if source[1] == 0:
            # Port 0 can't be answered.
            dropped["source_port_0"] += 1
            return None
        if self._loops.leads_back(source):
            dropped["source_loops"] += 1
            return None
        port = listener.port
        if listener.redirected:
            port = to.original[1]
            if self._loops.listens_at(to.original):
                self._drop_loop(listener.name(key), _NOT_BROUGHT)
                return None
        if hops.hops and self._loops.is_loop(source, port):
            self._drop_loop(listener.name(key))
            return None
        if len(self.room) and self.room.add((listener.number, key), data):
            return None
        lease = asked = None
        if self._gate is not None or self._pool.balance is not None:
            asked = self.asked(listener, key, source)
            if self._gate is not None:
                lease = self._gate.enter(asked)
                if lease is None:
                    return None
        client, flow, waits = (key, source, to), None, False
        try:
            server = None if self.held else self._pool.choose(asked)
            if server is None and not self._relay.draining:
                waits = self._waits(listener, client, asked, lease, data)
            else:
                flow = self._admitted(listener, client, asked, server)
        finally:
            if lease is not None and not waits:
                _keep_lease(lease, flow)
        return flow

    def _drop_loop(self, listener: str, why: str = _LEADS_BACK) -> None:
        dropped = self._ledger.counters.dropped
        dropped["loop"] += 1
        if self._throttles["loop"].is_due():
            log.warn(
                "datagrams to {listener} {why}: they are dropped ({count} so far)",
                listener=listener,
                why=why,
                count=dropped["loop"],
            )

    def _waits(
        self,
        listener: DatagramListener,
        client: tuple[Any, Any, Any],
        asked: NewFlow | None,
        lease: ILease | None,
        data: Any,
    ) -> bool:
        """No server can be chosen for a client: whether it waits for one."""
        source = client[1]
        if self._wait or self.held:
            host = client_key(source[0])
            waiting = WaitingClient(listener, client, host, asked, lease)
            return self.room.begin(waiting, data)
        dropped = self._ledger.counters.dropped
        dropped[NO_SERVER] += 1
        if self._server_throttle.is_due():
            log.warn(
                "{relay}: no flow for {client}: no server can be chosen ({count}"
                " datagrams dropped for that reason so far)",
                relay=self._ledger.name,
                client=socket_name(source),
                count=dropped[NO_SERVER],
            )
        return False

    # -- of a client that waits

    def server_for(self, waiting: WaitingClient) -> Server | None:
        """See :meth:`relayd.datagrams.standby.Opener.server_for`."""
        return None if self.held else self._pool.choose(waiting.asked)

    def open_for(self, waiting: WaitingClient, server: Server) -> ClientFlow | None:
        """See :meth:`relayd.datagrams.standby.Opener.open_for`."""
        flow, listener = None, waiting.listener
        try:
            flow = self._admitted(listener, waiting.client, waiting.asked, server)
        finally:
            if waiting.lease is not None:
                _keep_lease(waiting.lease, flow)
        return flow

    # -- the gate

    def asked(self, listener: FlowListener, key: Any, source: Any) -> NewFlow:
        """What a gate and a pool are asked about."""
        client, name = socket_name(source), listener.name(key)
        return NewFlow(client, client, name, self._ledger.name, next(self.ordinals))

    def _admitted(
        self,
        listener: DatagramListener,
        client: tuple[Any, Any, Any],
        asked: NewFlow | None,
        server: Server | None,
    ) -> ClientFlow | None:
        """Open the flow of a client that the gate has admitted.

        :param client: its key at the listener, its address, where to reply to.
        :param server: None in a drain only.
        """
        dropped = self._ledger.counters.dropped
        key, source, _ = client
        try:
            self._evict_for(client_key(source[0]), source)
            flow = None
            if server is not None:
                flow = self._open_flow(listener, client, server, asked)
            if flow is None:
                dropped["draining"] += 1
                return None
        except TableFull as problem:
            self._refuse(str(problem))
            return None
        except FilterFailed:
            dropped[FILTER_FAILED] += 1
            return None
        except OSError as problem:
            reason = getattr(problem, "reason", "no_flow")
            why = f"no socket for a flow of {source[0]}: {problem.strerror}"
            self._refuse(why, reason)
            return None
        self._table.add(flow)
        listener.flows[key] = flow
        self._relay.keep_time()
        self._loops.note(flow)
        return flow

    def _evict_for(self, host: str, source: Any) -> None:
        """Evict a flow, if the table is full for `host`.

        :param source: the client that needs a flow.
        :raises TableFull: none may be evicted.
        """
        table = self._table
        if self._relay.draining or table.to_evict(host) is None:
            return
        table.note_hit(host)
        if not self._evict(lambda: table.to_evict(host), source):
            raise table.full(host)

    def _evict(self, candidate: Callable[[], ClientFlow | None], source: Any) -> bool:
        """Evict a flow.

        :param candidate: returns the flow to evict now; None if none need be evicted.
        :return: False if all flows that were read are in use now.
        """
        for left in reversed(range(MAX_READ)):
            flow = candidate()
            if flow is None:
                return True
            # An answer may be pending.  It is passed on, and then another flow may be
            # the one that was idle longest.
            flow.read_all()
            if not flow.in_use and (not left or candidate() is flow):
                self._relay.end(flow, "evicted", socket_name(source))
                return True
        return False

    def _open_flow(
        self,
        listener: DatagramListener,
        client: tuple[Any, Any, Any],
        server: Server,
        asked: NewFlow | None,
    ) -> ClientFlow | None:
        """A flow with its socket, watched; None if the relay accepts none any more.

        :raises OSError: no socket can be opened.
        """
        # An observer that was notified of a flow's end may have closed the relay, and
        # even have opened it again.
        if not self._is_open(listener):
            return None
        try:
            return self._try_flow(listener, client, server, asked)
        except OSError as problem:
            # Not the table is full: this process or machine has no more sockets.
            idlest = self._table.idlest
            if problem.errno not in SHORTAGE or idlest() is None:
                raise
            if not self._evict(idlest, client[1]):
                raise
        if not self._is_open(listener):
            return None
        return self._try_flow(listener, client, server, asked)

    def shed(self, ends: Ends) -> bool:
        """End another flow than this one, which is to have one more socket.

        :return: whether one was ended.
        """
        listener, (key, source, _) = ends
        sender = self._table.flows.get((listener.number, key))
        another = partial(self._table.idlest, sender)
        return another() is not None and self._evict(another, source)

    def _is_open(self, listener: DatagramListener) -> bool:
        return not (self._relay.draining or listener.closed or listener.retired)

    def _try_flow(
        self,
        listener: DatagramListener,
        client: tuple[Any, Any, Any],
        server: Server,
        asked: NewFlow | None,
    ) -> ClientFlow:
        connected = self._dialer.dial_any(server, (listener, client), asked)
        sock, limits, flow = connected.sock, None, None
        try:
            if self._bandwidth is not None:
                limits = self._bandwidth.limits_of(socket_name(client[1]))
            flow = flow_of(
                self._preamble,
                self._preamble is not None or self._pool.tells,
                limits,
                *(self._ledger, self._relay, listener, client, connected),
            )
            if self._filters:
                filter_flow(flow, self._filters)
            self._watcher.watch(sock.fileno(), flow, READABLE)
        except Exception:
            if flow is not None and flow.filtered:
                flow.close_filters()
            sock.close()
            listener.gone(client[2])
            if limits is not None:
                limits.release()
            raise
        state = connected.server.state
        if state is not None:
            state.began()
        return flow

    def _refuse(self, why: str, reason: str = "no_flow") -> None:
        if reason not in self._throttles:
            # Other errors have something else by that name, such as those of TLS.
            reason = "no_flow"
        self._ledger.counters.dropped[reason] += 1
        if not self._throttles[reason].is_due():
            return
        log.warn(
            "{why} ({count} datagrams dropped without a flow so far)",
            why=why,
            count=self._ledger.counters.dropped[reason],
        )


def _keep_lease(lease: ILease, flow: ClientFlow | None) -> None:
    """What the gate gave is the flow's, or is given back if there is none."""
    if flow is None:
        give_back(lease)
    else:
        flow.lease = lease
