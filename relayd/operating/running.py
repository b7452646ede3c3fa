"""The running service: it opens listeners, serves, and drains as it stops.

:class:`RelayService` opens all its listeners as it starts, or none and raises one clear
error.  A stop goes through these steps:

    stopping   for `shutdown_delay` seconds clients are accepted as before, while
               whoever balances between relays learns that this one is about to stop
    draining   the listeners are closed; sessions may finish within `drain_timeout`
    the end    when no session is left, or LAST seconds after the drain timeout: what
               can't be closed must not keep the process

:meth:`RelayService.stop_now` skips what is left of the first two.  A stop needs a
running reactor; a start that fails does not, and closes what it opened at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import attrs
from twisted.application.service import Service
from twisted.internet import tcp
from twisted.internet.defer import (
    Deferred,
    gatherResults,
    inlineCallbacks,
    maybeDeferred,
)
from twisted.internet.interfaces import (
    IListeningPort,
    IReactorTime,
    IStreamServerEndpoint,
)
from twisted.internet.main import CONNECTION_DONE
from twisted.logger import Logger
from twisted.python.failure import Failure

from relayd.core import process_settings, settings
from relayd.core.addresses import address_name
from relayd.core.errors import CannotStart, ListenError
from relayd.net.listener import Listeners
from relayd.net.monotonic import monotonic

log = Logger(namespace="relayd.service")

#: Seconds after the drain timeout at which a stop waits for nothing any more: sessions
#: were aborted then, which takes a turn of the reactor.
LAST = 5.0


class Served(Protocol):
    """Serves the clients of a listener: a factory, or a UDP relay."""

    @property
    def name(self) -> str:
        """The name of the relay in the log."""

    @property
    def sessions(self) -> Mapping[Any, Any]:
        """The sessions, or flows, that have not ended."""

    def drain(
        self, timeout: float = process_settings.DRAIN_TIMEOUT.default
    ) -> Deferred[None]:
        """Serve no new client, and wait for the sessions to end."""

    def abort_all(self) -> None:
        """Abort the sessions now."""


@attrs.frozen(eq=False)
class Listening:
    """A listener to be opened.

    :ivar endpoint: opens it.
    :ivar factory: serves its clients.
    :ivar name: its address, as it was given.
    :ivar purpose: what it does, for the log.
    :ivar flows: its sessions are flows of datagrams.
    :ivar enabled: it is to be opened; if not, its relay is stopped.
    """

    endpoint: IStreamServerEndpoint
    factory: Served
    name: str
    purpose: str
    flows: bool = False
    enabled: bool = settings.ENABLED.default


class RelayService(Service):
    """Opens listeners, and drains their sessions when it stops.

    :param listenings: the listeners to be opened, in this order.
    :param drain_timeout: seconds that sessions have to finish; 0 aborts them.
    :param clock: of the delay, and of the end that always comes.
    :param command: its name, with which errors begin.
    :param shutdown_delay: seconds for which clients are accepted once it is stopped.

    :ivar command: see above.
    :ivar standing: those whose listener is open.
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
        #: Those that serve the listeners' clients; several listeners may share one.
        self.served = tuple(dict.fromkeys(each.factory for each in listenings))
        self.drain_timeout = drain_timeout
        self.shutdown_delay = shutdown_delay
        self._clock = monotonic(clock)
        self.command = command
        self.ports: list[IListeningPort] = []
        self.standing: set[Listening] = set()
        self.stopping = self.draining = False
        #: It was told to stop at once.
        self._in_haste = False
        #: What a stop waits for now.
        self._delay: _Wait | None = None
        self._drain: _Wait | None = None
        #: Opening has begun; some listeners may open later.
        self._listening = False

    @property
    def sessions(self) -> int:
        """How many sessions and flows there are."""
        return sum(len(each.sessions) for each in self.served)

    @property
    def counts(self) -> tuple[int, int]:
        """How many sessions of streams there are, and how many flows."""
        flowing = {each.factory for each in self.listenings if each.flows}
        flows = sum(len(each.sessions) for each in flowing)
        return self.sessions - flows, flows

    @property
    def all_listening(self) -> bool:
        """Whether every listener stands that is to."""
        return len(self.ports) == sum(each.enabled for each in self.listenings)

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
        problems: list[CannotStart] = []
        starting = True

        def not_opened(reason: Failure, listening: Listening) -> None:
            if starting:
                problems.append(_why(reason, listening, self.command))
            else:
                # An endpoint that opens later, while others serve already.
                log.critical("{why}", why=_why(reason, listening, self.command))

        stopped = [each for each in self.listenings if not each.enabled]
        for name in dict.fromkeys(each.factory.name for each in stopped):
            log.info("relay {relay} is stopped", relay=name)
        for each in self.listenings:
            if not each.enabled:
                continue
            factory: Any = each.factory
            listening = each.endpoint.listen(factory)
            listening.addCallback(self._opened, each)
            listening.addErrback(not_opened, each)
            if problems:
                break
        starting = False
        if problems:
            for port in self.ports:
                _close_now(port)
            self.ports.clear()
            self.standing.clear()
            self._listening = False
            raise problems[0]

    def _opened(self, port: IListeningPort, listening: Listening) -> None:
        if self.draining:
            port.stopListening()
            return
        self.ports.append(port)
        self.standing.add(listening)
        for one in port.ports if isinstance(port, Listeners) else [port]:
            log.info(
                "listening on {address}, relay={relay}, {purpose}",
                address=address_name(one.getHost()),
                relay=listening.factory.name,
                purpose=listening.purpose,
            )

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
            self._delay = _Wait(self._clock, self.shutdown_delay)
            yield self._delay.over
            self._delay = None
            if not self.stopping:
                # It was started again.
                return
        self.draining, self._listening = True, False
        timeout = 0.0 if self._in_haste else self.drain_timeout
        ports, self.ports = self.ports, []
        self.standing.clear()
        sessions = self.sessions
        # Before the ports: a UDP relay's stays open for replies while it drains.
        drained = [each.drain(timeout) for each in self.served]
        closed = [
            # A listener that fails to close must not keep sessions from draining.
            maybeDeferred(port.stopListening).addErrback(
                lambda reason: log.failure("a listener could not be closed", reason)
            )
            for port in ports
        ]
        if sessions:
            log.info(
                "{count} sessions may finish within {timeout:g} s",
                count=sessions,
                timeout=timeout,
            )
        done: Deferred[Any] = gatherResults([*closed, *drained], consumeErrors=True)
        if not done.called:
            drain = self._drain = _Wait(self._clock, timeout + LAST)
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


class _Wait:
    """Waits for something, and for a time at most.

    :ivar over: fires with whether it came in time.
    """

    def __init__(self, clock: IReactorTime, seconds: float) -> None:
        self.over: Deferred[bool] = Deferred()
        self._limit = clock.callLater(seconds, self.over.callback, False)

    def end(self) -> None:
        """It has come."""
        if self._limit.active():
            self._limit.cancel()
            self.over.callback(True)

    def shorten(self, seconds: float) -> None:
        """Wait for no more than so long from now."""
        if self._limit.active():
            self._limit.reset(seconds)


def _close_now(port: IListeningPort) -> None:
    """Close a listener at once: the reactor of this process may never run."""
    if isinstance(port, tcp.Port):
        # Twisted's ports close, and remove a socket file, in the next turn.
        port.stopReading()
        port.connectionLost(Failure(CONNECTION_DONE))
    else:
        port.stopListening()


def _why(reason: Failure, listening: Listening, command: str) -> CannotStart:
    """The error of a start: one line, with the address and the reason."""
    problem = reason.value
    if isinstance(problem, ListenError):
        return CannotStart(f"{command}: {problem}")
    # Twisted's CannotListenError wraps the system's error.
    cause = getattr(problem, "socketError", problem)
    why = getattr(cause, "strerror", None) or str(cause)
    if named := getattr(cause, "filename", None):
        # Twisted's listeners open /dev/null, which a chroot may lack.
        why = f"{named}: {why}"
    return CannotStart(f"{command}: can't listen on {listening.name}: {why}")
