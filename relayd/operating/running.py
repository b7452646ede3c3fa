"""The running service: it opens listeners, serves, and drains as it stops.

:class:`RelayService` opens all its listeners as it starts, or none and raises one clear
error.  As it stops it closes them, and waits for the sessions.  A stop needs a running
reactor; a start that fails does not, and closes what it opened at once.
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
from twisted.internet.interfaces import IListeningPort, IStreamServerEndpoint
from twisted.internet.main import CONNECTION_DONE
from twisted.logger import Logger
from twisted.python.failure import Failure

from relayd.core import settings
from relayd.core.addresses import address_name
from relayd.core.errors import CannotStart, ListenError
from relayd.net.listener import Listeners

log = Logger(namespace="relayd.service")


class Served(Protocol):
    """Serves the clients of a listener: a factory, or a UDP relay."""

    @property
    def name(self) -> str:
        """The name of the relay in the log."""

    @property
    def sessions(self) -> Mapping[Any, Any]:
        """The sessions, or flows, that have not ended."""

    def drain(self, timeout: float = settings.DRAIN_TIMEOUT.default) -> Deferred[None]:
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
    """

    endpoint: IStreamServerEndpoint
    factory: Served
    name: str
    purpose: str
    flows: bool = False


class RelayService(Service):
    """Opens listeners, and drains their sessions when it stops.

    :param listenings: the listeners to be opened, in this order.
    :param drain_timeout: seconds that sessions have to finish; 0 aborts them.
    :param command: its name, with which errors begin.
    """

    def __init__(
        self,
        listenings: Sequence[Listening],
        drain_timeout: float,
        command: str = "relayd",
    ) -> None:
        self.listenings = listenings
        self.drain_timeout = drain_timeout
        self._command = command
        self.ports: list[IListeningPort] = []
        self._stopped = False
        #: Opening has begun; some listeners may open later.
        self._listening = False

    @property
    def sessions(self) -> int:
        """How many sessions and flows there are."""
        return sum(len(each.factory.sessions) for each in self.listenings)

    @property
    def counts(self) -> tuple[int, int]:
        """How many sessions of streams there are, and how many flows."""
        flows = sum(
            len(each.factory.sessions) for each in self.listenings if each.flows
        )
        return self.sessions - flows, flows

    @property
    def all_listening(self) -> bool:
        """Whether every listener stands."""
        return len(self.ports) == len(self.listenings)

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
        if self._listening:
            return
        self._listening, self._stopped = True, False
        problems: list[CannotStart] = []
        starting = True

        def not_opened(reason: Failure, listening: Listening) -> None:
            if starting:
                problems.append(_why(reason, listening, self._command))
            else:
                # An endpoint that opens later, while others serve already.
                log.critical("{why}", why=_why(reason, listening, self._command))

        for each in self.listenings:
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
            self._listening = False
            raise problems[0]

    def _opened(self, port: IListeningPort, listening: Listening) -> None:
        if self._stopped:
            port.stopListening()
            return
        self.ports.append(port)
        for one in port.ports if isinstance(port, Listeners) else [port]:
            log.info(
                "listening on {address}, relay={relay}, {purpose}",
                address=address_name(one.getHost()),
                relay=listening.factory.name,
                purpose=listening.purpose,
            )

    @inlineCallbacks
    def stopService(self) -> Any:
        """Close the listeners; wait for the sessions, for `drain_timeout` at most.

        :return: a Deferred that fires when no session is left.
        """
        self._stopped, self._listening = True, False
        yield maybeDeferred(super().stopService)
        ports, self.ports = self.ports, []
        sessions = self.sessions
        # Before the ports: a UDP relay's stays open for replies while it drains.
        drained = [each.factory.drain(self.drain_timeout) for each in self.listenings]
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
                timeout=self.drain_timeout,
            )
        yield gatherResults([*closed, *drained])

    def stop_now(self) -> None:
        """Abort all sessions."""
        for each in self.listenings:
            each.factory.abort_all()


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
