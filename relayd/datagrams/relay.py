"""The relay: opens listeners, ends flows, watches the time, and drains.

What its listeners and flows share is in its ledger; the opener makes flows.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall

from relayd.core import settings
from relayd.core.addresses import socket_name
from relayd.core.flows import Counters, FlowFacts, FlowObserver
from relayd.core.hops import datagrams as hops
from relayd.core.registry import Registry
from relayd.datagrams.dialing import FlowDialer
from relayd.datagrams.flow import ClientFlow
from relayd.datagrams.guarded import FailSafeObserver
from relayd.datagrams.ledger import Ledger
from relayd.datagrams.listener import DatagramListener, datagram_listener
from relayd.datagrams.loops import LoopGuard
from relayd.datagrams.opening import FlowOpener
from relayd.datagrams.servers import Server, ServerPool
from relayd.datagrams.sockets import raise_buffer
from relayd.datagrams.table import NatTable
from relayd.datagrams.watching import Watcher

#: Flows that are asked in one step what the kernel has dropped of theirs.
DROP_CHECKS = 256

#: Seconds without a datagram after which a drain ends a flow that was answered.
QUIET_AFTER = 1.0


class DatagramRelay:
    """Relays datagrams between clients and servers.

    :param ledger: what the parts share.
    :param pool: where new flows go.
    :param dialer: makes their sockets.
    :param loops: knows what would lead back here.
    :param watcher: watches the sockets.
    :param observer: is notified of each flow that has ended.
    :param receive_buffer: bytes that the kernel may keep unread for a listener.

    :ivar listeners: those that are open.
    :ivar observer: passes on to the one that was given.
    :ivar registry: the flows that live, by key; how they are drained.
    """

    def __init__(
        self,
        ledger: Ledger[ClientFlow],
        *,
        pool: ServerPool,
        dialer: FlowDialer,
        loops: LoopGuard,
        watcher: Watcher,
        observer: FlowObserver,
        receive_buffer: int,
    ) -> None:
        self.ledger = ledger
        self.clock = ledger.clock
        self.pool = pool
        self.loops = loops
        self.watcher = watcher
        self.receive_buffer = receive_buffer
        self.listeners: list[DatagramListener] = []
        self.registry: Registry[Hashable, ClientFlow] = Registry(
            ledger.table,
            self.clock,
            id_of=lambda flow: flow.key,
            abort=self._abort,
            drained=self.close,
        )
        self._opener = FlowOpener(
            ledger, self, pool=pool, dialer=dialer, loops=loops, watcher=watcher
        )
        self.observer = FailSafeObserver(observer)
        self._timer: IDelayedCall | None = None
        #: Up to when flows may expire, as soon as what came before has been read.
        self._expire_to: float | None = None
        #: Which flow is the next to be asked what the kernel has dropped.
        self._next_look = 0
        pool.changed = self._ends_changed
        self._ends_changed()

    @property
    def name(self) -> str:
        """What the log calls this relay."""
        return self.ledger.name

    @property
    def counters(self) -> Counters:
        """What has become of datagrams."""
        return self.ledger.counters

    @property
    def table(self) -> NatTable[ClientFlow]:
        """The flows that live."""
        return self.ledger.table

    @property
    def servers(self) -> tuple[Server, ...]:
        """Where new flows go, round robin.

        May be set at any time; names are looked up at once.  Flows keep their server.
        """
        return self.pool.servers

    @servers.setter
    def servers(self, servers: Iterable[Server]) -> None:
        self.pool.servers = tuple(servers)

    # -- listening

    def listen(self, sockets: Sequence[Any]) -> None:
        """Serve the clients of bound, non-blocking sockets, from now on.

        :raises OSError: the kernel can't watch them.
        """
        opened: list[DatagramListener] = []
        try:
            for sock in sockets:
                raise_buffer(sock, self.receive_buffer)
                listener = datagram_listener(self.ledger, self, self.watcher, sock)
                listener.watch()
                opened.append(listener)
        except OSError:
            # All or none: what is watched can't be closed by the caller.
            for listener in opened:
                listener.close()
            raise
        if not self.listeners:
            # It may have been closed before, after a drain.
            self.registry.reopen()
        self.listeners += opened
        for listener in opened:
            hops.listens(listener.port)
        self._ends_changed()
        self.pool.start()

    def _ends_changed(self) -> None:
        listeners = [each.address for each in self.listeners]
        self.loops.update(listeners, self.pool.servers)

    # -- flows

    def admit(self, listener: DatagramListener, key: Any) -> ClientFlow | None:
        """See :meth:`relayd.datagrams.interfaces.FlowRelay.admit`."""
        flow = self._opener.open(listener, key)
        if flow is not None and self._timer is None:
            self._tick_later()
        return flow

    def redial(self, flow: ClientFlow, problem: OSError) -> bool:
        """See :meth:`relayd.datagrams.interfaces.FlowRelay.redial`."""
        return self._opener.redial(flow, problem)

    def end(self, flow: ClientFlow, ending: str, by: str = "") -> None:
        """See :meth:`relayd.datagrams.interfaces.FlowRelay.end`."""
        if self.table.flows.get(flow.key) is not flow:
            return
        # A reply of its own may be among them.
        flow.replies.flush()
        self.table.remove(flow, evicted=ending == "evicted")
        del flow.listener.flows[flow.here]
        self.loops.forget(flow)
        self.ledger.count_drops(flow)
        if flow.server.named:
            self.ledger.unanswered.forget(flow)
        self.watcher.unwatch_and_close(flow.sock)
        facts = FlowFacts(
            relay=self.name,
            client=socket_name(flow.source),
            listener=flow.listener.name(flow.here),
            port=socket_name(flow.ours),
            server=flow.server.name,
            age=self.ledger.now() - flow.began,
            ending=ending,
            by=by,
        )
        self.observer.ended(flow, facts)

    def fail(self, flow: ClientFlow) -> None:
        """See :meth:`relayd.datagrams.interfaces.FlowRelay.fail`."""
        client = socket_name(flow.source)
        self.ledger.log_failure(f"the flow of {client} failed and is ended")
        self.counters.balance()
        self.end(flow, "failed")

    # -- time

    def _tick(self) -> None:
        self._timer = None
        try:
            self._check()
        except Exception:
            # No flow would expire ever after.
            self.ledger.log_failure("the check of flows failed")
        # Reading may have admitted a client, and so have set the timer.
        if len(self.table) and self._timer is None:
            self._tick_later()

    def _check(self) -> None:
        # What has arrived by now keeps its flow alive, even if it was not read yet: in
        # a flood, that takes until the next tick.
        now = self.ledger.now()
        if self._expire_to is None:
            self._expire_to = now
            for listener in self.listeners:
                # The queue holds no more: the kernel counts 512 bytes at least for
                # each, of twice what it was asked for.
                listener.owed = 2 * self.receive_buffer // 512
        for listener in self.listeners:
            listener.read()
        if all(listener.owed <= 0 for listener in self.listeners):
            now, self._expire_to = self._expire_to, None
            for flow in self.table.expire(now):
                flow.read_all()
                # The last of its replies may have come just now.
                if self.table.expires_at(flow) <= now:
                    self.end(flow, "expired" if flow.replied else "unreplied")
        self.count_kernel_drops()
        if self.draining:
            self._end_quiet(self.ledger.now())
            self.registry.check()

    def _tick_later(self) -> None:
        # Where the table's steps begin, or flows would be two steps late.
        step = self.table.step
        later = step - self.ledger.now() % step
        self._timer = self.clock.callLater(later, self._tick)

    def count_kernel_drops(self) -> None:
        """Bring `counters.kernel_dropped` up to now, for the listeners and some flows.

        All flows have had their turn after so many calls as there are
        :data:`DROP_CHECKS` of them.
        """
        for listener in self.listeners:
            self.ledger.count_drops(listener)
        first = self._next_look
        for flow in itertools.islice(self.table, first, first + DROP_CHECKS):
            self.ledger.count_drops(flow)
        self._next_look = (
            first + DROP_CHECKS if first + DROP_CHECKS < len(self.table) else 0
        )

    # -- the end

    @property
    def draining(self) -> bool:
        """It takes no new client."""
        return self.registry.draining

    @property
    def sessions(self) -> dict[Hashable, ClientFlow]:
        """The flows that live, by key; made for each that asks."""
        return self.registry.by_id()

    def drain(self, timeout: float = settings.DRAIN_TIMEOUT.default) -> Deferred[None]:
        """Take no new client; let the flows that are being answered finish.

        A flow is finished when it has had an answer for each of its datagrams and
        nothing has moved for :data:`QUIET_AFTER` seconds.  A later call does not change
        the time that flows have, but 0 ends it.

        :param timeout: seconds; 0 ends all now.
        :return: fires with None when no flow is left, and the listeners are closed.
        """
        done = self.registry.drain(timeout)
        # An observer may have opened it again.
        if self.draining:
            self._end_quiet(self.ledger.now())
            self.registry.check()
        return done

    def abort_all(self) -> None:
        """End every flow, now; a drain that is under way is over."""
        self.registry.abort_all()

    def _abort(self, flow: ClientFlow) -> None:
        self.end(flow, "drained")

    def _end_quiet(self, now: float) -> None:
        """End the flows that a drain need not wait for."""
        for flow in list(self.table):
            # A server that still owes an answer has until the time limit.
            if flow.down_datagrams < flow.up_datagrams or now - flow.seen < QUIET_AFTER:
                continue
            # What comes next may have come, and not been read yet.
            flow.read_all()
            if now - flow.seen >= QUIET_AFTER:
                self.end(flow, "drained")

    def close(self) -> None:
        """Close the listeners, and end whatever is left."""
        for flow in list(self.table):
            self.end(flow, "drained")
        self.count_kernel_drops()
        closed, self.listeners = self.listeners, []
        self._ends_changed()
        self.pool.stop()
        timer, self._timer = self._timer, None
        if timer is not None and timer.active():
            timer.cancel()
        for listener in closed:
            hops.closes(listener.port)
            listener.close()
        if closed:
            where = ",".join(socket_name(each.address) for each in closed)
            # Which may listen again at once.
            self.observer.closed(self.name, where, self.counters)
        self.registry.check()
