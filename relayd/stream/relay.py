"""What the stream sessions of one relay share: the relay itself.

Its name, its clock, its timeouts, who hears of sessions and who may come in; the
sessions that live, and how the others have ended.  It knows no protocol, and serves no
client: :class:`relayd.stream.session.StreamProtocol` does, one for each, and
:class:`relayd.stream.factory.StreamFactory` makes these.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from relayd.core import process_settings, settings
from relayd.core.addresses import address_name
from relayd.core.counts import SessionCounts
from relayd.core.filtering import IFilterFactory, check_factories
from relayd.core.interfaces import IGate, ILease, IObserver
from relayd.core.observers import Observers
from relayd.core.ordinals import Ordinals
from relayd.core.own_listeners import OwnListeners
from relayd.core.prelude import Introduction, Prelude
from relayd.core.registry import Registry
from relayd.core.relay_names import relay_name
from relayd.core.routing import IRouter
from relayd.core.session import Ending, Session
from relayd.core.spreading import Idleness
from relayd.core.stage import Stage
from relayd.net.keepalive import KEEPALIVE
from relayd.net.log_throttle import FailureLog
from relayd.net.monotonic import monotonic
from relayd.net.own_addresses import OwnHosts
from relayd.net.wheel import DeadlineWheel
from relayd.stream.bridge import Bridge
from relayd.stream.deadlines import Timeouts
from relayd.stream.filtering import with_filters
from relayd.stream.retries import Retries
from relayd.stream.totals import Totals

log = Logger(namespace="relayd.stream")


def _last_name() -> Callable[[IAddress | None], str]:
    """What makes the text of an address, once while it is asked for the same object."""
    last: IAddress | None = None
    name = "-"

    def name_of(address: IAddress | None) -> str:
        nonlocal last, name
        if address is not last:
            last = address
            # The same text in thousands of sessions is kept once.
            name = sys.intern(address_name(address))
        return name

    return name_of


class Queue(Protocol):
    """Those who wait, of whom the one that has waited longest is evicted."""

    def push(self, item: Any, client: str) -> Any | None:
        """Add one; returns the one that has to go, or None."""

    def discard(self, item: Any) -> None:
        """It waits no longer, if it did."""

    def __contains__(self, item: Any) -> bool:
        """Whether it waits."""


class Lifetime(Protocol):
    """How long sessions may last."""

    def over(self, session: Session, now: float) -> tuple[Ending, str] | None:
        """Asked about once a tick: whether a session is to end, how and why.

        :param now: seconds on the relay's clock.
        """


class Bandwidth(Protocol):
    """How many bytes of sessions may pass in a second."""

    @property
    def waits(self) -> int:
        """How often a session had to wait."""

    def enter(self, session: Session) -> ILease:
        """A session was admitted: set the `pace` of its directions.

        :return: what is to be released when it is over.
        """


class OwnLimits(Protocol):
    """What limits single sessions, each by what is said of it."""

    @property
    def bandwidth(self) -> Bandwidth:
        """For sessions that nothing else limits; it limits nothing by itself.

        What its `enter` returns has `add(session, rates)`, as that of a relay's own
        has, if its sessions are to be limited further: the pace of each direction has
        these rates as well, until it is released.
        """

    def enter(self, key: str, most: int) -> ILease:
        """Count a session that has a key.

        :param most: how many there may be of that key.
        :raises Refused: there are so many.
        """

    def lifetime(self, max_age: float) -> Lifetime:
        """For a session that may last so many seconds; 0 is for ever."""


class StreamRelay:
    """One relay of streams.

    :ivar name: what the log calls it.
    :ivar introduction: what some peers say before all else: whose connection it is;
        the gate is asked then.
    :ivar preludes: what a client says before it is relayed, in order.
    :ivar preamble: makes what each server is told first, of the session that it is
        for; unless its :class:`relayd.net.upstream.Upstream` has one.
    :ivar retries: what follows a dial that has failed, if anything does.
    :ivar bridge: joins the two legs of its sessions.
    :ivar filters: see their bytes, if there are any.
    :ivar router: decides where they go, if anything does.
    :ivar handshakes: those whose handshake or prelude is under way, if there is a limit
        of them.
    :ivar own_limits: makes what limits one session alone, if anything may.
    :ivar keepalive: the probes of both connections of a session that lasts,
    :ivar user_timeout: and their user timeout in seconds; 0 is none.
    :ivar wheel: the sessions that live stand on it.
    :ivar refusals: how many clients a gate has refused, by its word for it
        (:data:`relayd.core.errors.REASONS`).
    :ivar endings: how many sessions have ended in each way, by its word; those that
        ended `done` are left out.
    :ivar totals: has these two, and what else is counted, however often a factory
        succeeds another one.
    :ivar translated: rules of the kernel's bring it clients that meant to go elsewhere:
        `listener` of its sessions is where.
    :ivar intercepts: its listeners, if they are given what was meant for others, and
        take what the kernel has not translated, too; set it before the first opens.
    :ivar counts: what is counted of its sessions, if somebody wants to know; set it
        before the first.
    """

    #: One of its sessions has dialled, and found that this led back to it.
    found_loop = False
    introduction: Introduction | None = None
    preludes: tuple[Prelude, ...] = ()
    preamble: Callable[[Session], bytes] | None = None
    retries: Retries | None = None
    handshakes: Queue | None = None
    filters: Sequence[IFilterFactory] = ()
    own_limits: OwnLimits | None = None
    translated = False
    intercepts: OwnListeners | None = None
    router: IRouter | None = None
    #: Whether its route has looked at what the last client had sent as it was asked.
    looks_first = False
    keepalive = KEEPALIVE
    user_timeout = settings.USER_TIMEOUT.default

    def __init__(
        self,
        *,
        timeouts: Timeouts,
        clock: IReactorTime,
        observer: IObserver,
        gate: IGate | None,
        lifetime: Lifetime | None = None,
        bandwidth: Bandwidth | None = None,
        name: str | None = None,
        tick: float | None = None,
    ) -> None:
        self.name = relay_name(name)
        self.timeouts = timeouts
        clock = monotonic(clock)
        self.clock = clock
        #: The time in seconds.
        self.now: Callable[[], float] = clock.seconds
        self.host_name, self.peer_name = _last_name(), _last_name()
        #: Tells this machine's addresses.
        self.is_own: Callable[[str], bool] = OwnHosts(clock.seconds)
        #: Lets everyone in if there is none.  It is another one after a change of
        #: settings, for clients that are asked about then, as their PROXY header comes.
        self.gate = gate
        #: Ends sessions that are relayed; none lasts too long if there is none.
        self.lifetime = lifetime
        #: Limits the bytes of sessions; nothing does if there is none.
        self.bandwidth = bandwidth
        #: Of the instance, where the interpreter finds it faster.
        self.bridge: type[Bridge] = Bridge
        self.observer = Observers(observer)
        self.wheel: DeadlineWheel[Any] = DeadlineWheel(
            clock, timeouts.tick if tick is None else tick
        )
        self.totals = Totals(getattr(bandwidth, "tally", None))
        # Of the instance as well, where the interpreter finds them faster.
        self.endings, self.refusals = self.totals.endings, self.totals.refusals
        self.counts: SessionCounts | None = None
        self._failures = FailureLog(log, clock)
        #: The sequence numbers of the clients that are admitted.
        self.ordinals = Ordinals()
        #: The sessions that live, by id; how they are drained.
        self.registry: Registry[int, Any] = Registry(
            self.wheel,
            clock,
            id_of=_id_of,
            abort=_abort,
            idleness=Idleness(_idle_since, _end_idle),
        )

    def filter_by(self, filters: Sequence[IFilterFactory]) -> None:
        """Have filters see the bytes of the sessions to come.

        :raises TypeError: its bridge is one of your own, which has no filters; or one
            is no factory of filters.
        :raises ValueError: one is for datagrams only.
        """
        check_factories(filters, datagrams=False)
        if filters:
            self.bridge = with_filters(self.bridge)
        else:
            self.bridge = getattr(self.bridge, "plain", self.bridge)
        self.filters = tuple(filters)

    @property
    def silent(self) -> int:
        """How many sessions have ended without a byte (:attr:`Session.is_silent`).

        Those that did not end `done` are in `endings`, too.
        """
        return self.totals.silent

    def share_totals(self, other: StreamRelay) -> None:
        """Count together with another factory of the same relay, from now on.

        Sessions of one key are limited together, too.

        Nothing may have been counted here.
        """
        ours, totals = self.totals, other.totals
        if totals.waited is None:
            totals.waited = ours.waited
        elif ours.waited is not None:
            bandwidth: Any = self.bandwidth
            bandwidth.tally = totals.waited
        self.totals = totals
        self.endings, self.refusals = totals.endings, totals.refusals
        if self.retries is not None:
            self.retries.count_in(totals.retried)
        self._failures = other._failures
        self.counts = other.counts
        self.own_limits = other.own_limits

    def succeed(self, other: StreamRelay) -> None:
        """Serve the clients that another factory of the same relay has served so far.

        Call it before the first.  What the other one has counted is counted on, and so
        are its sequence numbers; its sessions stay its own.
        """
        self.share_totals(other)
        self.ordinals = other.ordinals

    @property
    def failures(self) -> int:
        """How often a client could not be admitted for an error, as of its gate."""
        return self._failures.count

    def log_failure(self, what: str, session: Session, reason: Failure) -> None:
        """Log an error that has kept a client out, once a second at most.

        A gate that fails does so for each client, and they may come as a flood.
        """
        self._failures.add(f"session {session.id}: {what}", reason)

    def drain(
        self, timeout: float = process_settings.DRAIN_TIMEOUT.default
    ) -> Deferred[None]:
        """Serve no new client, and wait for the sessions that live.

        Stop listening first, or at the same time: a client that connects after
        this is closed at once, until a listener is opened again.  A later call does
        not change the time that sessions have, but to end it with 0.

        :param timeout: seconds, over which sessions that are idle are reset little by
            little; what has not ended by then is reset.  0 resets everything now.
        :return: fires with None when the last session has ended.
        """
        self.wheel.settle()
        for each in self.wheel:
            if each.session.stage in (Stage.HEADER, Stage.WAITING):
                # It is a new client.
                each.abort_session(Ending.DRAINED, "before it was admitted")
        return self.registry.drain(timeout)

    def reopen(self) -> None:
        """Serve new clients again; a drain that is under way is over."""
        self.registry.reopen()

    def abort_all(self) -> None:
        """Reset every session that lives, now."""
        self.registry.abort_all()

    @property
    def sessions(self) -> dict[int, Any]:
        """The sessions that live, by id, the oldest first; made for each that asks."""
        return dict(sorted(self.registry.by_id().items()))


def _id_of(protocol: Any) -> int:
    return int(protocol.session.id)


def _idle_since(protocol: Any) -> float | None:
    """Before the two are joined, a session is in use."""
    bridge = protocol.bridge
    since: float | None = None if bridge is None else bridge.idle_since()
    return since


def _end_idle(protocol: Any, idle_after: float, in_doubt: bool) -> bool:
    """End a session in a drain, if it is idle, or `in_doubt` if it may be.

    By a reset, as a session that is idle for too long: to its client an end of data
    might be the end of an answer, which it may not be.  Nothing is lost by it, as
    nothing is under way.
    """
    seconds = 0.0
    if protocol.bridge is not None:
        seconds = protocol.bridge.idle_for(protocol.factory.now() if in_doubt else None)
    if seconds < idle_after:
        return False
    protocol.abort_session(Ending.DRAINED, f"nothing moved for {seconds:.1f} s")
    return True


def _abort(protocol: Any) -> None:
    """Its drain has had its time."""
    protocol.abort_session(Ending.DRAINED)
