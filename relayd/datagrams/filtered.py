"""Flows with filters: what a client or its server sends goes through them, one by one.

Where they stand.  What is read goes through the filters first.  What comes out of them
is what is sent, and so what is limited (`bandwidth`, `reply_cap`), counted as the
flow's, and sent again to another server.  A PROXY header is put before that; filters
don't see it.  What is read keeps a flow alive, whatever becomes of it.

Filters stay with their flow when it moves to another server: what they keep back then
goes there.  What they keep when the flow ends is dropped.

How.  A flow with filters is of another class, a mixin over each class without
(:data:`_FILTERED`), so a flow without pays nothing.  The classes have the same slots:
filters can be put on a flow that lives, and taken off, by changing its class.  Its
`send`, which listeners call, gives the datagram to the filters; what comes out is sent
by the class below, whose calls of `send` go to the socket meanwhile (`beyond`).

A filter that has failed ends its flow, when the call that was under way is over: a
class below must not go on with a socket that is closed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf
from typing import Any

from twisted.internet.interfaces import IDelayedCall

from relayd.core.filtering import Course, IFilterFactory
from relayd.datagrams.dialing import Connected
from relayd.datagrams.filter_chain import FILTER_FAILED, Chain
from relayd.datagrams.flow import ClientFlow
from relayd.datagrams.interfaces import FlowRelay
from relayd.datagrams.ledger import Ledger
from relayd.datagrams.limited import LimitedFlow, LimitedPreambledFlow
from relayd.datagrams.preamble import PreambledFlow
from relayd.datagrams.sockets import fits

#: Flows whose filters are changed in one turn of the reactor.
AT_ONCE = 256


class FilterFailed(Exception):
    """A new flow's filters could not be made, which is logged."""


class _Taken(OSError):
    """The filters have the datagram: there is no more to do with it."""


class _Filtered(ClientFlow):
    """What all kinds of flows with filters do."""

    __slots__ = ()

    chain: Chain

    @property
    def filtered(self) -> Sequence[str]:  # type: ignore[override]
        """The names of its filters."""
        return self.chain.names

    @property
    def kept(self) -> int:  # type: ignore[override]
        """How many datagrams its filters keep back."""
        return sum(way.kept for way in self.chain)

    def use(self, connected: Connected) -> None:
        super().use(connected)
        self.chain.transmit = self.send
        self.aim()

    def aim(self) -> None:
        """Have `send` lead into the filters, if there are any of that direction."""
        self.send = self.enter if self.chain.up.ways else self.chain.transmit

    def close_filters(self) -> None:
        """The flow is over."""
        chain = self.chain
        chain.close()
        # No cycle of references is left.
        self.send = chain.transmit
        # A batch that is under way need tell nobody of it any more.
        self.due, self.awaits = inf, False

    def guarded(self, work: Callable[..., None], *args: Any) -> None:
        """See :meth:`relayd.datagrams.filter_chain.Filterable.guarded`."""
        chain = self.chain
        chain.depth += 1
        try:
            work(*args)
        finally:
            chain.depth -= 1
        if chain.failed and not chain.depth:
            self.relay.end(self, FILTER_FAILED)

    def emit(self, course: Course, datagrams: Sequence[bytes]) -> None:
        """See :meth:`relayd.datagrams.filter_chain.Filterable.emit`."""
        if course == "up":
            self._forward_all(datagrams, self.ledger.now())
        else:
            self._reply_all(datagrams)

    # -- to the server

    def enter(self, data: bytes) -> Any:
        """What `send` is: the way through the filters, and the one behind them."""
        chain = self.chain
        if chain.beyond:
            return chain.transmit(data)
        self.guarded(self._through, (data,))
        raise _Taken

    def forward(self, run: Sequence[bytes], now: float) -> None:
        if not self.chain.up.ways:
            # Or it has ended in the middle of its listener's batch.
            self.guarded(super().forward, run, now)
            return
        self.guarded(self._through, run)
        if now < self.due:
            self.seen = now
        else:
            self.client_sent(run, now)

    def _through(self, run: Sequence[bytes]) -> None:
        # Copies: the next batch overwrites the buffers.
        out = self.chain.up.through([bytes(data) for data in run])
        self._forward_all(out, self.ledger.now())

    def _forward_all(self, datagrams: Sequence[bytes], now: float) -> None:
        """Send the server what has come out of the filters."""
        chain = self.chain
        before, chain.beyond = chain.beyond, True
        try:
            for run in _runs(datagrams, len(datagrams)):
                super().forward(run, now)
        finally:
            chain.beyond = before

    def send_again(self) -> None:
        chain = self.chain
        before, chain.beyond = chain.beyond, True
        try:
            super().send_again()
        finally:
            chain.beyond = before

    def forward_after_error(self, data: bytes, problem: OSError) -> None:
        if not isinstance(problem, _Taken):
            super().forward_after_error(data, problem)

    def client_sent(self, run: Sequence[bytes], now: float) -> None:
        if self.chain.beyond or not self.chain.up.ways:
            super().client_sent(run, now)
        else:
            # What may have to be sent again is what came out.
            self.ledger.table.outbound(self, now)

    # -- to the client

    def ready(self, mask: int) -> None:
        # Not into the batch of the listener, which knows no filters.
        try:
            self._read_some()
        except Exception:
            self.relay.fail(self)

    def _read_batch(self, most: int, refusal: OSError | None = None) -> None:
        self.guarded(super()._read_batch, most, refusal)

    def _reply(self, run: Sequence[bytes]) -> None:
        self._reply_all(self.chain.down.through(run))

    def _reply_all(self, datagrams: Sequence[bytes]) -> None:
        """Send the client what has come out of the filters."""
        capped = self.ledger.reply_cap
        for run in _runs(datagrams, 1 if capped else len(datagrams)):
            # It was within the cap when it came; others may have been sent since.
            if capped and not self._within_reply_cap(len(run[0])):
                self._drop_reply(len(run[0]))
            else:
                super()._reply(run)


def _runs(datagrams: Sequence[bytes], most: int) -> Iterator[Sequence[bytes]]:
    """Datagrams of one size that follow each other, so many at most."""
    run: list[bytes] = []
    for data in datagrams:
        if run and (
            len(run) == most or len(data) != len(run[0]) or not fits(run, len(data))
        ):
            yield run
            run = []
        run.append(data)
    if run:
        yield run


#: The class of a flow with filters, by that of the same without.
_FILTERED: dict[type[ClientFlow], Any] = {
    plain: type(f"Filtered{plain.__name__}", (_Filtered, plain), {"__slots__": ()})
    for plain in (ClientFlow, PreambledFlow, LimitedFlow, LimitedPreambledFlow)
}
_PLAIN = {filtered: plain for plain, filtered in _FILTERED.items()}


def filter_flow(flow: Any, factories: Sequence[IFilterFactory]) -> None:
    """Put a new flow's filters on it.

    :raises FilterFailed: one of the factories has failed.
    """
    if factories:
        chain = _change(flow, (), factories)
        if chain.failed:
            flow.close_filters()
            raise FilterFailed


def _change(
    flow: Any, gone: Sequence[IFilterFactory], new: Sequence[IFilterFactory]
) -> Chain:
    """Take filters off a flow, and put others on it."""
    if flow.filtered:
        chain: Chain = flow.chain
    else:
        # The batch of the listener may have a reply of it.
        flow.replies.flush()
        chain = Chain(flow, flow.send)
        flow.chain = chain
        flow.__class__ = _FILTERED[type(flow)]
    chain.remove(gone)
    chain.add(new)
    flow.aim()
    if not chain.names and not chain.failed and not chain.depth:
        # As one that never had any.
        flow.send = chain.transmit
        flow.__class__ = _PLAIN[type(flow)]
        chain.flow = None
        del flow.chain
    return chain


def changed(
    before: Iterable[IFilterFactory], after: Iterable[IFilterFactory]
) -> tuple[list[IFilterFactory], list[IFilterFactory]]:
    """Which filters of flows that live are gone, and which are new.

    Of those that may join flows that live; the others are for new flows.
    """
    gone = [each for each in before if each.joins]
    new: list[IFilterFactory] = []
    for each in after:
        if each in gone:
            gone.remove(each)
        elif each.joins:
            new.append(each)
    return gone, new


class FilterChanges:
    """Changes the filters of one relay's flows: many of them in several turns."""

    def __init__(self, ledger: Ledger[Any], relay: FlowRelay) -> None:
        self._ledger = ledger
        self._relay = relay
        #: The flows, and what is gone and new.
        self._waiting: deque[tuple[Any, Any, Any]] = deque()
        self._timer: IDelayedCall | None = None

    def change(
        self, gone: Sequence[IFilterFactory], new: Sequence[IFilterFactory]
    ) -> None:
        """Take filters off the flows that live now, and put others on them."""
        if gone or new:
            self._waiting += [(flow, gone, new) for flow in self._ledger.table]
            if self._timer is None:
                self._change_some()

    def stop(self) -> None:
        """The relay closes, and so its flows end."""
        self._waiting.clear()
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _change_some(self) -> None:
        self._timer = None
        for _ in range(min(AT_ONCE, len(self._waiting))):
            flow, gone, new = self._waiting.popleft()
            if self._ledger.table.flows.get(flow.key) is not flow:
                continue
            if _change(flow, gone, new).failed:
                self._relay.end(flow, FILTER_FAILED)
        if self._waiting:
            self._timer = self._ledger.clock.callLater(0, self._change_some)
