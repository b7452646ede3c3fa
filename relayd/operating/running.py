"""The running service: it opens listeners, serves, changes, and drains as it stops.

:class:`RelayService` opens all its listeners as it starts, or none and raises one clear
error.  A stop goes through these steps:

    stopping   for `shutdown_delay` seconds clients are accepted as before, while
               whoever balances between relays learns that this one is about to stop
    draining   the listeners are closed; sessions may finish within `drain_timeout`
    the end    when no session is left, or LAST seconds after the drain timeout: what
               can't be closed must not keep the process

:meth:`RelayService.change` has other listeners from one moment to the next, while
it runs: it opens what is new, or changes nothing and raises; then hands the sockets of
those that stay to whoever serves their clients now, and closes the others.

:meth:`RelayService.stop_now` skips what is left of the first two.  A stop needs a
running reactor; a start that fails does not, and closes what it opened at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import (
    Deferred,
    gatherResults,
    inlineCallbacks,
    maybeDeferred,
)
from twisted.internet.interfaces import IListeningPort, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from relayd.core import process_settings
from relayd.core.addresses import address_name
from relayd.core.errors import CannotStart
from relayd.net.monotonic import monotonic
from relayd.operating.patience import Wait
from relayd.operating.rebinding import Rebinding
from relayd.operating.standing import (
    Listening,
    Served,
    Standing,
    close,
    has_flows,
    why_not,
)

log = Logger(namespace="relayd.service")

#: Seconds after the drain timeout at which a stop waits for nothing any more: sessions
#: were aborted then, which takes a turn of the reactor.
LAST = 5.0


class RelayService(Service):
    """Opens listeners, and drains their sessions when it stops.

    :param listenings: the listeners to be opened, in this order.
    :param drain_timeout: seconds that sessions have to finish; 0 aborts them.
    :param clock: of the delay, and of the end that always comes.
    :param command: its name, with which errors begin.
    :param shutdown_delay: seconds for which clients are accepted once it is stopped.

    :ivar command: see above.
    :ivar stopping: it was told to stop, and may accept clients still.
    :ivar draining: it accepts no clients any more.
    """

    def __init__(
        self,
        listenings: Sequence[Listening],
        drain_timeout: float,
        clock: IReactorTime,
        command: str = "relayd",
        shutdown_delay: float = process_settings.SHUTDOWN_DELAY.default,
    ) -> None:
        self.listenings = listenings
        self.drain_timeout = drain_timeout
        self.shutdown_delay = shutdown_delay
        self._clock = monotonic(clock)
        self.command = command
        self._open: list[Standing] = []
        #: Those that serve sessions of before a change, and no client any more.
        self._former: list[Served] = []
        #: Of UDP relays: closed to new clients, until their flows have ended.
        self._retired: list[Standing] = []
        #: The relays whose clients are held.
        self.held: set[str] = set()
        self.stopping = self.draining = False
        #: It was told to stop at once.
        self._in_haste = False
        #: What a stop waits for now.
        self._delay: Wait | None = None
        self._drain: Wait | None = None
        #: Opening has begun; some listeners may open later.
        self._listening = False

    @property
    def served(self) -> tuple[Served, ...]:
        """Those that serve the listeners' clients, each once, and the former ones."""
        serving = [each.factory for each in self.listenings]
        return tuple(dict.fromkeys([*serving, *self.former]))

    @property
    def former(self) -> list[Served]:
        """Those that have sessions from before a change, and get no others."""
        self._former = [each for each in self._former if len(each.registry)]
        return self._former

    @property
    def sessions(self) -> int:
        """How many sessions and flows there are."""
        return sum(len(each.registry) for each in self.served)

    @property
    def counts(self) -> tuple[int, int]:
        """How many sessions of streams there are, and how many flows."""
        flows = sum(len(each.registry) for each in self.served if has_flows(each))
        return self.sessions - flows, flows

    @property
    def ports(self) -> list[IListeningPort]:
        """The open listeners."""
        return [each.port for each in self._open]

    @property
    def standing(self) -> set[Listening]:
        """Those whose listener is open."""
        return {each.listening for each in self._open}

    @property
    def all_listening(self) -> bool:
        """Whether every listener stands that is to."""
        return len(self._open) == sum(each.enabled for each in self.listenings)

    def addresses(self, relay: str) -> list[str]:
        """Where a relay listens, as text."""
        return [
            address_name(each)
            for one in self._open
            if one.listening.factory.name == relay
            for each in one.addresses
        ]

    def privilegedStartService(self) -> None:
        """Listen while this process may still open low ports.

        :raises CannotStart: one of the listeners can't be opened; the others
            have been closed again.
        """
        super().privilegedStartService()
        self._listen()

    def startService(self) -> None:
        super().startService()
        # `twist` starts services without the privileged step.
        self._listen()

    def _listen(self) -> None:
        self.stopping = self._in_haste = False
        if self._listening:
            # If it was to stop and accepts clients still, it goes on doing so.
            if self._delay is not None:
                self._delay.end()
            return
        self._listening, self.draining = True, False
        stopped = [each for each in self.listenings if not each.enabled]
        for name in dict.fromkeys(each.factory.name for each in stopped):
            log.info("relay {relay} is stopped", relay=name)
        try:
            self._open_all([each for each in self.listenings if each.enabled])
        except CannotStart:
            self._listening = False
            raise

    def _open_all(self, listenings: Iterable[Listening]) -> None:
        """Open all of these, or none.

        :raises CannotStart: one of them can't be opened.
        """
        problems: list[CannotStart] = []
        before = len(self._open)
        at_once = True

        def not_opened(reason: Failure, listening: Listening) -> None:
            if at_once:
                problems.append(why_not(reason, listening, self.command))
            else:
                # An endpoint that opens later, while others serve already.
                log.critical("{why}", why=why_not(reason, listening, self.command))

        for each in listenings:
            factory: Any = each.factory
            listening = each.endpoint.listen(factory)
            listening.addCallback(self._opened, each)
            listening.addErrback(not_opened, each)
            if problems:
                break
        at_once = False
        if problems:
            self.close_now(before)
            raise problems[0]

    def close_now(self, first: int = 0) -> None:
        """Close listeners, from this one on: the reactor may never run."""
        while len(self._open) > first:
            self._open.pop().close_now()

    def _opened(self, port: IListeningPort, listening: Listening) -> None:
        if self.draining or listening not in self.listenings:
            # It opened later, and is not wanted any more.
            port.stopListening()
            return
        one = Standing(listening, port)
        self._open.append(one)
        if listening.factory.name in self.held:
            one.hold()
        for each in one.addresses:
            log.info(
                "listening on {address}, relay={relay}, {purpose}",
                address=address_name(each),
                relay=listening.factory.name,
                purpose=listening.purpose,
            )

    # -- while it runs

    def change(self, listenings: Sequence[Listening]) -> None:
        """Have these listeners from now on, in one step.

        A listener that stays keeps its socket, with the clients in its queue, whoever
        serves them now; so do two that change places.  Sessions go on.  Those of a
        relay that is not among these any more may finish within the drain timeout; of
        one that is, by others or stopped, as long as they last.

        :raises CannotStart: one can't be opened; nothing has changed.
        """
        before, self.listenings = self.listenings, listenings
        if not self._listening:
            # It is not started yet, or has stopped.
            return
        wanted = [each for each in listenings if each.enabled]
        # What was given away comes last: whoever got it may have it still.
        self._retired = [each for each in self._retired if each.is_open]
        self._retired.sort(key=lambda each: each.is_given_away)
        moving = Rebinding.of((*self._open, *self._retired), wanted)
        try:
            if problem := moving.prepare():
                raise why_not(*problem, self.command)
            self._open_in_place(moving)
        except CannotStart:
            moving.give_up()
            self.listenings = before
            raise
        left = moving.hand_over()
        for one, _ in moving.handed:
            if one in self._retired:
                self._retired.remove(one)
                self._open.append(one)
        self._retired += left
        self._leave([each for each in moving.spared if each in self._open], before)
        self._serve_again(wanted)

    def _open_in_place(self, moving: Rebinding) -> None:
        """Open listeners, before those close whose place they take.

        One that is in the way, as that of all addresses is in that of one of them, is
        closed before, in the same turn of the reactor, but for one that has flows.

        :raises CannotStart: one can't be opened; all is as it was.
        """
        try:
            self._open_all(moving.new)
            return
        except CannotStart as problem:
            if not (closing := moving.in_the_way()):
                raise moving.advised(problem) from None
        again = [each.listening for each in closing if each in self._open]
        self._open = [each for each in self._open if each not in closing]
        for one in closing:
            one.close_now()
        try:
            self._open_all(moving.new)
        except CannotStart as problem:
            wanted, self.listenings = self.listenings, again
            self._open_all(again)
            self.listenings = wanted
            raise moving.advised(problem) from None

    def _serve_again(self, wanted: Iterable[Listening]) -> None:
        """Hold clients of paused relays only; drains of those that listen are over."""
        enabled = {each.factory.name for each in wanted}
        # Whoever stops a relay has no clients to be served later.
        self.held &= enabled
        for factory in self.served:
            if has_flows(factory):
                relay: Any = factory
                relay.hold(relay.name in self.held)
            if factory.name in enabled:
                factory.reopen()
        for one in self._open:
            if not one.listening.flows:
                name = one.listening.factory.name
                (one.hold if name in self.held else one.release)()

    def _leave(self, closing: Sequence[Standing], before: Sequence[Listening]) -> None:
        """Close listeners, and let go of those that serve no client any more."""
        self._open = [each for each in self._open if each not in closing]
        serving = {each.factory for each in self.listenings}
        names = {each.name for each in serving}
        gone = [each for each in self._all_of(before) if each not in serving]
        self._former += gone
        removed = {each.name for each in gone} - names
        # With those from before an earlier change.
        for each in self._former:
            if each.name in removed:
                self.held.discard(each.name)
                if each.sessions:
                    log.info(
                        "{relay} is no more: {count} sessions may finish within"
                        " {timeout:g} s",
                        relay=each.name,
                        count=len(each.sessions),
                        timeout=self.drain_timeout,
                    )
                # Before its listeners, as in a stop.
                each.drain(self.drain_timeout)
        for one in closing:
            log.info(
                "no longer listening on {address}, relay={relay}",
                address=", ".join(map(address_name, one.addresses)),
                relay=one.listening.factory.name,
            )
            one.retire()
            if one.listening.flows and one.is_open:
                self._retired.append(one)

    def _all_of(self, listenings: Iterable[Listening]) -> list[Served]:
        return list(dict.fromkeys(each.factory for each in listenings))

    def renew(self, factories: Mapping[Listening, Any]) -> None:
        """Have Twisted's ports serve their clients with what was read anew.

        :param factories: see :meth:`Listening.port_factory`.
        """
        for one in self._open:
            if one.listening in factories:
                one.renew(factories[one.listening])

    def hold(self, relay: str) -> None:
        """Let a relay's new clients wait, unread, until :meth:`release`."""
        self.held.add(relay)
        for each in self._open:
            if each.listening.factory.name == relay:
                each.hold()

    def release(self, relay: str) -> None:
        """Serve the clients that wait, and those that come."""
        self.held.discard(relay)
        for each in self._open:
            if each.listening.factory.name == relay:
                each.release()

    @inlineCallbacks
    def stopService(self) -> Any:
        """Wait for `shutdown_delay`; close the listeners, and drain the sessions.

        :return: a Deferred that fires when no session is left, or LAST seconds after
            the drain timeout.
        """
        self.stopping = True
        yield maybeDeferred(super().stopService)
        if self.shutdown_delay and self._listening and not self._in_haste:
            log.info(
                "clients are accepted for {delay:g} s more", delay=self.shutdown_delay
            )
            self._delay = Wait(self._clock, self.shutdown_delay)
            yield self._delay.over
            self._delay = None
            if not self.stopping:
                # It was started again.
                return
        self.draining, self._listening = True, False
        timeout = 0.0 if self._in_haste else self.drain_timeout
        ports, self._open = self.ports, []
        sessions = self.sessions
        # Before the ports: a UDP relay's stays open for replies while it drains.
        drained = [each.drain(timeout) for each in self.served]
        closed = list(map(close, ports))
        if sessions:
            log.info(
                "{count} sessions may finish within {timeout:g} s",
                count=sessions,
                timeout=timeout,
            )
        done: Deferred[Any] = gatherResults([*closed, *drained], consumeErrors=True)
        if not done.called:
            drain = self._drain = Wait(self._clock, timeout + LAST)
            done.addBoth(lambda _: drain.end())
            in_time = yield drain.over
            if not in_time:
                log.warn(
                    "stopping, though {count} sessions have not ended, or a listener"
                    " has not closed",
                    count=self.sessions,
                )

    def stop_now(self) -> None:
        """Abort all sessions; as it stops, accept and wait no longer."""
        self._in_haste = True
        for each in self.served:
            each.abort_all()
        if self._delay is not None:
            self._delay.end()
        elif self._drain is not None:
            self._drain.shorten(LAST)
