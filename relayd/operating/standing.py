"""Listeners: one that is to be opened, and one that stands.

A listener that stands can be handed to another factory, from one client to the next: it
keeps its socket, and so the clients in its queue.  How depends on whose it is: relayd's
own take another factory; Twisted's ports have it as an attribute, and what wraps it for
TLS is made anew (:mod:`relayd.operating.renewing`); a UDP relay gives a duplicate of
its socket to another one, as its flows go on replying by their own.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence, Sized
from typing import Any, Protocol

import attrs
from twisted.internet import tcp
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import (
    IAddress,
    IListeningPort,
    IStreamServerEndpoint,
)
from twisted.internet.main import CONNECTION_DONE
from twisted.logger import Logger
from twisted.python.failure import Failure

from relayd.core import process_settings, settings
from relayd.core.addresses import address_name
from relayd.core.errors import CannotStart, ListenError
from relayd.datagrams.endpoint import AdoptedUdpListener, UdpPort
from relayd.datagrams.relay import DatagramRelay
from relayd.net.listener import Listener, sockets_of
from relayd.operating.renewing import port_factory

log = Logger(namespace="relayd.service")


class Served(Protocol):
    """Serves the clients of a listener: a factory, or a UDP relay."""

    @property
    def name(self) -> str:
        """The name of the relay in the log."""

    @property
    def registry(self) -> Sized:
        """What lives in it."""

    @property
    def sessions(self) -> Mapping[Any, Any]:
        """The sessions, or flows, that have not ended."""

    def drain(
        self, timeout: float = process_settings.DRAIN_TIMEOUT.default
    ) -> Deferred[None]:
        """Serve no new client, and wait for the sessions to end."""

    def reopen(self) -> None:
        """Serve clients again: a drain that is under way is over."""

    def abort_all(self) -> None:
        """Abort the sessions now."""


def has_flows(served: Served) -> bool:
    """Whether its sessions are flows of datagrams."""
    return isinstance(served, DatagramRelay)


@attrs.frozen(eq=False)
class Listening:
    """A listener to be opened.

    :ivar endpoint: opens it.
    :ivar factory: serves its clients.
    :ivar name: its address, as it was given.
    :ivar purpose: what it does, for the log.
    :ivar flows: its sessions are flows of datagrams.
    :ivar enabled: it is to be opened; if not, its relay is stopped.
    :ivar backlog: how many clients may wait in its queue; None: its endpoint says it.
    :ivar text: the endpoint string, of one of Twisted's; it can have a certificate.
    """

    endpoint: IStreamServerEndpoint
    factory: Served
    name: str
    purpose: str
    flows: bool = False
    enabled: bool = settings.ENABLED.default
    backlog: int | None = None
    text: str = ""

    def port_factory(self) -> Any:
        """What one of Twisted's ports serves its clients with, read anew.

        :raises ConfigError: its certificate can't be read.
        """
        return port_factory(self.text, self.factory)

    @property
    def key(self) -> Hashable:
        """What two listeners have in common that could be one socket."""
        # Free ports are not the same, unless they are one relay's.
        is_any = self.name.endswith(":0") or self.name == "0"
        return self.name, self.flows, self.factory.name if is_any else ""


@attrs.define(eq=False)
class Standing:
    """A listener that is open."""

    listening: Listening
    port: IListeningPort

    @property
    def sockets(self) -> Sequence[Any]:
        """Its ports, one for each address."""
        return sockets_of(self.port)

    @property
    def addresses(self) -> list[IAddress]:
        """Where it listens."""
        return [each.getHost() for each in self.sockets]

    def prepare(self, listening: Listening) -> Deferred[Any] | None:
        """Have what it takes to hand it over, if that may fail.

        :return: what is to be given to :meth:`hand_to`: copies of a UDP relay's
            sockets, which serve already; what a port of Twisted's serves clients with.
        """
        if listening.factory is self.listening.factory:
            return None
        if not self.listening.flows:
            own = all(isinstance(each, Listener) for each in self.sockets)
            return None if own else maybeDeferred(listening.port_factory)
        given = [each.descriptor for each in self.sockets]
        factory: Any = listening.factory
        return AdoptedUdpListener(given, listening.name).listen(factory)

    def hand_to(self, listening: Listening, prepared: Any = None) -> None:
        """Serve its clients as another one does, from now on.

        :param prepared: see :meth:`prepare`.
        """
        before, self.listening = self.listening, listening
        served: Any = listening.factory
        if served.name != before.factory.name:
            log.info(
                "{address} is relay={relay}'s now, {purpose}",
                address=", ".join(map(address_name, self.addresses)),
                relay=served.name,
                purpose=listening.purpose,
            )
        if served is before.factory:
            for each in self.sockets:
                if isinstance(each, UdpPort):
                    each.return_to_service()
            return
        if before.flows:
            for each in self.sockets:
                each.give_away()
            retire(self.port)
            self.port = prepared
        elif prepared is not None:
            self.renew(prepared)
        else:
            for each in self.sockets:
                each.serve(served, listening.backlog)

    def renew(self, factory: Any) -> None:
        """Have one of Twisted's ports serve its clients with this.

        :param factory: see :meth:`Listening.port_factory`.
        """
        port: Any = self.port
        factory.doStart()
        before, port.factory = port.factory, factory
        before.doStop()

    @property
    def is_open(self) -> bool:
        """Whether its socket can be handed to another."""
        return all(getattr(each, "is_open", True) for each in self.sockets)

    @property
    def is_idle(self) -> bool:
        """Whether what it has brought goes on when it closes.

        The sessions of streams do; flows share the socket of their listener.
        """
        return all(getattr(each, "is_idle", True) for each in self.sockets)

    @property
    def is_given_away(self) -> bool:
        """Whether it serves flows of before, by a socket that another has as well."""
        return any(getattr(each, "is_given_away", False) for each in self.sockets)

    def hold(self) -> None:
        """Accept nobody: clients wait in the kernel's queue."""
        for each in self.sockets:
            hold = getattr(each, "hold", None) or each.stopReading
            hold()

    def release(self) -> None:
        """Accept clients again."""
        for each in self.sockets:
            release = getattr(each, "release", None) or each.startReading
            release()

    def retire(self) -> None:
        """Close it.  What it has brought goes on."""
        retire(self.port)

    def close_now(self) -> None:
        """Close it at once: the reactor of this process may never run."""
        if self.listening.flows:
            # Its relay may have other addresses.
            self.retire()
        elif isinstance(self.port, tcp.Port):
            # Twisted's ports close, and remove a socket file, in the next turn.
            self.port.stopReading()
            self.port.connectionLost(Failure(CONNECTION_DONE))
        else:
            self.port.stopListening()


def retire(port: IListeningPort) -> None:
    """Close a listener; what it has brought goes on."""
    for each in sockets_of(port):
        if isinstance(each, UdpPort):
            each.retire()
        else:
            close(each)


def close(port: IListeningPort) -> Deferred[Any]:
    """Stop listening.  One that fails is logged: it must keep no other from closing."""
    return maybeDeferred(port.stopListening).addErrback(
        lambda reason: log.failure("a listener could not be closed", reason)
    )


def why_not(reason: Failure, listening: Listening, command: str) -> CannotStart:
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
