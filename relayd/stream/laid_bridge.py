"""Which way each direction of a session with filters goes.

Through its chain, or spliced by itself, or as in a plain bridge.  When to change that
is decided in :mod:`relayd.stream.filtered_bridge`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from relayd.core.filtering import IFilterFactory, name_of
from relayd.core.interfaces import ISpliceable
from relayd.core.pauses import ALLOWANCE, BEFORE_JOINING, PEER_FULL
from relayd.core.session import Ending
from relayd.stream.bridge import Bridge
from relayd.stream.chain import Chain
from relayd.stream.legs import Leg
from relayd.stream.paced_reads import PacedReads

log = Logger(namespace="relayd.filters")

#: Characters of an error that the session's line tells.
MOST_TOLD = 200


class LaidBridge(Bridge):
    """A bridge whose directions may go different ways; made as any.

    The legs have the chains.
    """

    __slots__ = ()

    #: What it is without filters.
    plain: type[Bridge] = Bridge

    @property
    def clock(self) -> IReactorTime:
        """For the timers of filters."""
        return self._clock

    @property
    def legs(self) -> tuple[Leg, Leg]:
        """The client's first, as its direction is asked first."""
        return self.downstream, self.upstream

    def _add(
        self,
        factories: Sequence[IFilterFactory],
        legs: Sequence[Leg],
        *,
        own: bool = False,
    ) -> bool:
        """Ask for filters of these directions.

        :param own: they are of this session alone.
        :return: whether all could be made; if not, the session has failed.
        """
        for factory in factories:
            shared: dict[str, Any] = {}
            for leg in legs:
                chain: Chain | None = leg.chain
                if chain is None:
                    chain = Chain(self, leg)
                    chain.write = self._write_of(leg.peer.transport)
                elif chain.is_ending:
                    continue
                try:
                    chain.add(factory, shared, own=own)
                except Exception:
                    # What was made is closed with it.
                    leg.chain = chain
                    self.filter_failed(factory, Failure())
                    return False
                if len(chain):
                    leg.chain = chain
        return True

    def _write_of(self, transport: Any) -> Any:
        """What a chain writes to a transport with."""
        if self._way and ISpliceable.providedBy(transport):
            return transport.write_on
        return transport.write

    def _lay(self, leg: Leg) -> None:
        """Have what a leg reads go where it is to go."""
        peer, chain, direction = leg.peer, leg.chain, leg.direction
        if chain is None and self._splices(leg):
            leg.spliced, leg.sink = True, None
            if direction.pace is not None:
                direction.pace.follow(leg)
                leg.transport.keep_pace(direction)
                leg.resume(ALLOWANCE)
            return
        if chain is not None and self._way and ISpliceable.providedBy(leg.transport):
            # The server's may be of another kind, as an endpoint of Twisted's makes it.
            leg.transport.read_much()
        sink = peer.transport.write if chain is None else chain
        if direction.pace is not None:
            sink = PacedReads(leg, direction.pace, sink)
        leg.sink = sink
        if peer.alive and not (direction.eof and chain is None):
            peer.transport.registerProducer(leg if chain is None else chain, True)

    def _splices(self, leg: Leg) -> bool:
        """Splice this direction, if that can be; whether it is."""
        ours, others = leg.transport, leg.peer.transport
        return bool(
            self._way
            and ISpliceable.providedBy(ours)
            and not leg.direction.eof
            and ours.splice_one_way(others, leg.direction, self)
        )

    def _lift(self, leg: Leg) -> None:
        """Undo that."""
        if leg.spliced:
            leg.transport.unsplice()
            leg.spliced = False
        elif leg.peer.alive:
            leg.peer.transport.unregisterProducer()
        leg.sink = None

    def _unlay(self, leg: Leg) -> None:
        """Nothing more is passed on by its chain, or spliced."""
        self._drop_chain(leg)
        if leg.spliced:
            leg.transport.unsplice()
            leg.spliced = False

    def _become_plain(self) -> None:
        """Go on as a relay that has no filters."""
        down, up = legs = self.legs
        for leg in legs:
            if leg.spliced or leg.sink is not None:
                self._lift(leg)
        spliced = False
        if self._way and down.alive and up.alive:
            spliced = down.transport.splice(
                up.transport, down.direction, up.direction, self
            )
        down.spliced = up.spliced = spliced
        for leg in legs:
            pace = leg.direction.pace
            if spliced and pace is not None:
                pace.follow(leg)
                leg.transport.keep_pace(leg.direction)
            elif not spliced and leg.alive and leg.peer.alive:
                self._lay_plainly(leg)
        self.__class__ = self.plain  # type: ignore[assignment]
        for leg in legs:
            leg.resume(PEER_FULL | ALLOWANCE if spliced else PEER_FULL)

    def _lay_plainly(self, leg: Leg) -> None:
        """Bytes go through the legs; the other direction's, too."""
        sink, pace = leg.peer.transport.write, leg.direction.pace
        leg.sink = sink if pace is None else PacedReads(leg, pace, sink)
        if not leg.direction.eof:
            leg.peer.transport.registerProducer(leg, True)

    def _drop_chain(self, leg: Leg) -> None:
        chain, leg.chain = leg.chain, None
        if chain is not None:
            chain.close()

    def filter_failed(self, factory: IFilterFactory, reason: Failure) -> None:
        """A filter has raised: its session ends, and nothing else."""
        name = f"filter {name_of(factory)}"
        log.failure(
            "{name} of session {id} failed", reason, name=name, id=self.session.id
        )
        # It may quote what it was given.
        why = reason.getErrorMessage()[:MOST_TOLD]
        self.abort(Ending.FILTER_FAILED, f"{name}: {why}")


def flow(leg: Leg) -> None:
    """Write what a leg has held, and read on."""
    if leg.paused:
        leg.resume(BEFORE_JOINING)
    held, leg.held = leg.held, None
    if held is not None and leg.peer is not None:
        leg.direction.kept -= len(held)
        sink = leg.peer.transport.write if leg.sink is None else leg.sink
        sink(bytes(held))


def dropping(leg: Leg) -> Callable[[bytes], object]:
    """What drops what a leg reads, at its pace; it counts as if it was not read."""
    direction = leg.direction

    def drop(data: bytes) -> None:
        direction.read -= len(data)

    return drop if direction.pace is None else PacedReads(leg, direction.pace, drop)
