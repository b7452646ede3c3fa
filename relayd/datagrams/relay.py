"""The UDP relay: opens listeners, ends and expires flows, and drains.

The state that its listeners and flows share is in its ledger; the opener makes flows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall

from relayd.core import process_settings
from relayd.core.addresses import socket_name
from relayd.core.counts import FlowCounts
from relayd.core.filtering import IFilterFactory
from relayd.core.flow_pools import FlowPool
from relayd.core.flows import Counters, FlowFacts, FlowObserver
from relayd.core.hops import datagrams as hops
from relayd.core.leases import give_back
from relayd.core.pacing import FlowBandwidth
from relayd.core.registry import Registry
from relayd.datagrams.filtered import FilterChanges, changed
from relayd.datagrams.flow import ClientFlow
from relayd.datagrams.following import FlowFollowing
from relayd.datagrams.guarded import FailSafeObserver
from relayd.datagrams.ledger import Ledger
from relayd.datagrams.listener import DatagramListener, done_with, open_listeners
from relayd.datagrams.loops import LoopGuard
from relayd.datagrams.making import FlowMaking
from relayd.datagrams.opening import Ingredients
from relayd.datagrams.servers import Server
from relayd.datagrams.standby import FlowStandBy
from relayd.datagrams.table import NatTable
from relayd.datagrams.watching import Watcher

#: Seconds without a datagram after which a drain ends a flow that was answered.
QUIET_AFTER = 1.0


class DatagramRelay:
    """Relays datagrams between clients and servers.

    :param ledger: the state that the parts share.
    :param made_of: what its flows are made of.
    :param loops: finds loops.
    :param watcher: watches the sockets.
    :param observer: notified of each flow that has ended.
    :param receive_buffer: of a listener in the kernel, in bytes.
    :param closes: tells about once a second whether all flows are to end now, with the
        ending `hours`; unless given, they are not.

    :ivar listeners: the open listeners.
    :ivar observer: calls the observer that was given, until it raises.
    :ivar registry: the open flows, by key; drains them.
    """

    def __init__(
        self,
        ledger: Ledger[ClientFlow],
        *,
        made_of: Ingredients,
        loops: LoopGuard,
        watcher: Watcher,
        observer: FlowObserver,
        receive_buffer: int,
        closes: Callable[[], bool] | None = None,
    ) -> None:
        self.ledger = ledger
        self.clock = ledger.clock
        self.loops = loops
        self.watcher = watcher
        self.receive_buffer = receive_buffer
        self.listeners: list[DatagramListener] = []
        self.registry: Registry[Hashable, ClientFlow] = Registry(
            ledger.table,
            self.clock,
            id_of=lambda flow: flow.key,
            abort=lambda flow: self.end(flow, "drained"),
            drained=self.close,
        )
        self.observer = FailSafeObserver(observer)
        self.closes = closes
        self._making = self._use(made_of)
        self._timer: IDelayedCall | None = None
        #: The time up to which flows expire, once all datagrams from before are read.
        self._expire_to: float | None = None
        self._filters = FilterChanges(ledger, self)
        self._following = FlowFollowing(ledger)
        self._ends_changed()

    def _use(self, made_of: Ingredients) -> FlowMaking:
        self.made_of, self.pool = made_of, made_of.pool
        self.pool.changed = self._ends_changed
        made_of.dialer.serve(self)
        return FlowMaking(self.ledger, self, made_of, self.loops, self.watcher)

    def start_choosing(self, balance: FlowPool) -> None:
        """Have a pool choose among the servers that there are."""
        self.pool.have_state(balance)
        self._making.hear(balance)

    @property
    def standby(self) -> FlowStandBy | None:
        """Where its new clients wait for a server, if they do."""
        return self._making.standby

    def hold(self, held: bool) -> None:
        """Let new clients wait, ten minutes at most; or serve them again."""
        self._making.hold(held)

    @property
    def bandwidth(self) -> FlowBandwidth | None:
        """What limits its flows, if anything does."""
        return self.made_of.bandwidth

    def become(self, other: DatagramRelay) -> None:
        """Make new flows as another relay would.

        Flows keep their server, and hear of it as it is now; timeouts, limits, the cap
        of replies and filters that may join are those of the other one, for them, too.

        :param other: has no listeners, and is not used any more.
        """
        before, making = self.pool, self._making
        filters = changed(self.made_of.filters, other.made_of.filters)
        self.receive_buffer = other.receive_buffer
        self.table.change(other.table)
        self.ledger.reply_cap = other.ledger.reply_cap
        for each in self.listeners:
            each.settings_changed(self.receive_buffer)
        self.closes = other.closes
        other._making.leave()
        self._making = self._use(other.made_of)
        self._making.succeed(making)
        if self.pool is not before:
            before.changed = lambda: None
            before.stop()
            self.pool.learn(before)
        self.change_filters(*filters)
        self._ends_changed()
        if self.listeners:
            self.pool.start()

    def change_filters(
        self, gone: Sequence[IFilterFactory], new: Sequence[IFilterFactory]
    ) -> None:
        """Take filters off the flows that live now, and put others on them, last."""
        self._filters.change(gone, new)

    @property
    def name(self) -> str:
        """The relay's name in the log."""
        return self.ledger.name

    @property
    def counters(self) -> Counters:
        """The counters of datagrams, by outcome."""
        return self.ledger.counters

    @property
    def counts(self) -> FlowCounts:
        """What else is counted."""
        return self.ledger.counts

    @property
    def table(self) -> NatTable[ClientFlow]:
        """The open flows."""
        return self.ledger.table

    @property
    def servers(self) -> tuple[Server, ...]:
        """The servers of new flows, round robin.

        May be set at any time; names are looked up at once.  Flows keep their server.
        """
        return self.pool.servers

    @servers.setter
    def servers(self, servers: Iterable[Server]) -> None:
        self.pool.servers = tuple(servers)

    # -- listening

    def listen(self, sockets: Sequence[Any]) -> list[DatagramListener]:
        """Serve the clients of bound, non-blocking sockets, from now on.

        :return: the listener of each.
        :raises OSError: the kernel can't watch them.
        """
        parts = self.ledger, self, self.watcher, sockets, self.receive_buffer
        opened = open_listeners(*parts, self.made_of.listener)
        if not self.listeners:
            self.reopen()  # It may have been drained and closed before.
        self.listeners += opened
        for listener in opened:
            hops.listens(listener.port)
        self._ends_changed()
        self.pool.start()
        return opened

    def retire(self, listeners: Iterable[DatagramListener]) -> None:
        """Have some listeners admit no new client; they close once they have no flow.

        The flows that they have go on (:func:`relayd.datagrams.listener.done_with`).
        """
        for each in listeners:
            each.retired = True
        self._close_retired()

    def _close_retired(self) -> None:
        done = done_with(self.listeners)
        if done and len(done) == len(self.listeners):
            self.close()
        elif done:
            self.listeners = [each for each in self.listeners if each not in done]
            self._close_all(done)

    def _close_all(self, listeners: Iterable[DatagramListener]) -> None:
        self._ends_changed()
        for listener in listeners:
            self.ledger.count_drops(listener)
            hops.closes(listener.port)
            listener.close()

    def _ends_changed(self) -> None:
        listeners = [each.address for each in self.listeners]
        self.loops.update(listeners, self.pool.servers)
        self._making.ends_changed()
        self._following.follow(self.pool.servers, self.made_of.dialer.dialing)

    # -- flows

    def admit(
        self, listener: DatagramListener, key: Any, data: Any
    ) -> ClientFlow | None:
        """See :meth:`relayd.datagrams.interfaces.FlowRelay.admit`."""
        return self._making.open(listener, key, data)

    def keep_time(self) -> None:
        """See :meth:`relayd.datagrams.interfaces.FlowRelay.keep_time`."""
        if self._timer is None:
            self._tick_later()

    def redial(self, flow: ClientFlow, problem: OSError) -> bool:
        """See :meth:`relayd.datagrams.interfaces.FlowRelay.redial`."""
        return self._making.redial(flow, problem)

    def send_away(self, flow: ClientFlow, problem: OSError) -> bool:
        """See :meth:`relayd.datagrams.interfaces.FlowRelay.send_away`."""
        return self._making.send_away(flow, problem)

    def end(self, flow: ClientFlow, ending: str, by: str = "") -> None:
        """See :meth:`relayd.datagrams.interfaces.FlowRelay.end`."""
        if self.table.flows.get(flow.key) is not flow:
            return
        # The batch may have a reply of this flow.
        flow.replies.flush()
        self.table.remove(flow, evicted=ending == "evicted")
        del flow.listener.flows[flow.here]
        flow.listener.gone(flow.to)
        if flow.hop:
            self.loops.forget(flow)
        self.ledger.count_drops(flow)
        if flow.server.moves:
            self.ledger.unanswered.forget(flow)
            flow.over(unanswered=ending == "unreplied")
        self.watcher.unwatch_and_close(flow.sock)
        if flow.filtered:
            flow.close_filters()
        self.ledger.counts.close(flow)
        lease, flow.lease = flow.lease, None
        for each in (lease, flow.limits):
            if each:
                give_back(each)
        self.observer.ended(flow, self.facts(flow, ending, by))

    def facts(self, flow: ClientFlow, ending: str = "", by: str = "") -> FlowFacts:
        """What is reported of a flow; `ending` is empty while it is open."""
        return FlowFacts(
            relay=self.name,
            client=socket_name(flow.source),
            listener=flow.listener.name(flow.here),
            port=socket_name(flow.ours),
            server=flow.server.name_at(flow.tried[-1]),
            age=self.ledger.now() - flow.began,
            ending=ending,
            by=by,
        )

    def fail(self, flow: ClientFlow) -> None:
        """See :meth:`relayd.datagrams.interfaces.FlowRelay.fail`."""
        what = f"the flow of {socket_name(flow.source)} failed and is ended"
        self.ledger.log_failure(what)
        self.ledger.balance()
        self.end(flow, "failed")

    # -- time

    def _tick(self) -> None:
        self._timer = None
        try:
            self._check()
        except Exception:
            # If it got out, no flow would ever expire again.
            self.ledger.log_failure("the check of flows failed")
        # Reading may have admitted a client, and so have set the timer.
        if len(self.table) and self._timer is None:
            self._tick_later()

    def _check(self) -> None:
        # A datagram that has arrived keeps its flow alive, even if it was not read yet:
        # in a flood, reading takes until the next tick.
        now = self.ledger.now()
        if self._expire_to is None:
            self._expire_to = now
            for listener in self.listeners:
                # The most that the socket's queue holds: the kernel doubles the buffer
                # that is set, and counts at least 512 bytes for a datagram.
                listener.owed = 2 * self.receive_buffer // 512
        for listener in self.listeners:
            listener.read()
        if all(listener.owed <= 0 for listener in self.listeners):
            now, self._expire_to = self._expire_to, None
            for flow in self.table.expire(now):
                flow.read_all()
                # A reply may just have been read.
                if self.table.expires_at(flow) <= now:
                    self.end(flow, "expired" if flow.replied else "unreplied")
        self._making.check(self.ledger.now(), left=bool(self._following.left))
        if self.closes is not None and self.closes():
            for flow in list(self.table):
                self.end(flow, "hours")
        self.count_kernel_drops()
        self._close_retired()
        if self.draining:
            self._end_quiet(self.ledger.now())
            self.registry.check()

    def _tick_later(self) -> None:
        # When a step of the table begins; else flows would expire two steps late.
        step = self.table.step
        later = step - self.ledger.now() % step
        self._timer = self.clock.callLater(later, self._tick)

    def count_kernel_drops(self) -> None:
        """Update `counters.kernel_dropped` for the listeners and some of the flows."""
        self.ledger.count_some_drops(self.listeners)

    # -- the end

    @property
    def draining(self) -> bool:
        """It accepts no new client."""
        return self.registry.draining

    @property
    def sessions(self) -> dict[Hashable, ClientFlow]:
        """The open flows, by key; a new dict each time."""
        return self.registry.by_id()

    def drain(
        self, timeout: float = process_settings.DRAIN_TIMEOUT.default
    ) -> Deferred[None]:
        """Accept no new client; let the flows that are being answered finish.

        A flow is finished when it has had an answer for each of its datagrams and
        nothing has moved for :data:`QUIET_AFTER` seconds.  A later call does not change
        the limit, except that 0 ends all flows now.

        :param timeout: seconds; 0 ends all now.
        :return: fires with None when no flow is left, and the listeners are closed.
        """
        self._making.admit_no_more()
        done = self.registry.drain(timeout)
        # An observer may have opened the relay again.
        if self.draining:
            self._end_quiet(self.ledger.now())
            self.registry.check()
        return done

    def reopen(self) -> None:
        """Accept clients again; a drain that is under way is over."""
        self.registry.reopen()

    def abort_all(self) -> None:
        """End every flow now, and so a drain."""
        self.registry.abort_all()

    def _end_quiet(self, now: float) -> None:
        """End the flows that a drain need not wait for."""
        for flow in list(self.table):
            # A flow that is owed an answer, or by its filters, has until the limit.
            owed = flow.down_datagrams < flow.up_datagrams or flow.kept
            if owed or now - flow.seen < QUIET_AFTER:
                continue
            # More may be pending.
            flow.read_all()
            if now - flow.seen >= QUIET_AFTER:
                self.end(flow, "drained")

    def close(self) -> None:
        """Close the listeners, and end all flows."""
        for flow in list(self.table):
            self.end(flow, "drained")
        self._making.stop()
        self._filters.stop()
        self.count_kernel_drops()
        closed, self.listeners = self.listeners, []
        self.pool.stop()
        timer, self._timer = self._timer, None
        if timer is not None and timer.active():
            timer.cancel()
        self._close_all(closed)
        if closed:
            where = ",".join(socket_name(each.address) for each in closed)
            # The observer may listen again at once.
            self.observer.closed(self.name, where, self.counters)
        self.registry.check()
