"""From settings to a running relay, and back to nothing.

:class:`RelayService` opens the listeners as it starts: all of them, or none and
one clear error.  As it stops it closes them, and waits for the sessions.  The signals
(:mod:`relayd.operating.signals`) are heard before it starts.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import attrs
from twisted.application.service import IServiceCollection, MultiService, Service
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

from relayd.admission.policy import ClientGate
from relayd.core import settings
from relayd.core.addresses import address_name
from relayd.core.errors import CannotStart, ConfigError, ListenError
from relayd.core.relay_names import relay_name, relay_names
from relayd.datagrams.endpoint import UdpListener
from relayd.datagrams.sockets import default_max_flows
from relayd.net.broadcast import BROADCAST, is_broadcast
from relayd.net.listener import Listeners
from relayd.net.own_addresses import is_own
from relayd.net.upstream import Upstream
from relayd.observing.flow_lines import FlowLog, QuietFlowLog
from relayd.observing.session_log import QuietSessionLog, SessionLog, VerboseSessionLog
from relayd.operating.config import (
    DEMO_LISTENER,
    Common,
    Config,
    Relay,
    Socks4Config,
    UdpRelay,
    is_local,
)
from relayd.operating.cycles import refuse_cycles
from relayd.operating.endpoints import (
    HostPort,
    StreamAddress,
    dialer,
    dialing_endpoint,
    dialled_host,
    listening_endpoint,
    server_identity,
    watcher,
)
from relayd.operating.log_file import AnyLogFile, attach
from relayd.operating.signals import Signals
from relayd.socks.destinations import ProxyPolicy
from relayd.socks4 import Socks4Factory
from relayd.tcp import RelayFactory
from relayd.udp_nat import Server, UdpNat
from relayd.upstreams.pool import Pool

log = Logger(namespace="relayd.service")


class Served(Protocol):
    """Serves the clients of a listener: a factory, or a UDP relay."""

    @property
    def name(self) -> str:
        """What the log calls the relay."""

    @property
    def sessions(self) -> Mapping[Any, Any]:
        """The sessions, or flows, that have not ended."""

    def drain(self, timeout: float = settings.DRAIN_TIMEOUT.default) -> Deferred[None]:
        """Serve no new client, and wait for those to end."""

    def abort_all(self) -> None:
        """Abort them now."""


@attrs.frozen(eq=False)
class Listening:
    """A listener to be opened.

    :ivar endpoint: where it listens.
    :ivar factory: who serves its clients.
    :ivar name: its address, as it was given.
    :ivar purpose: what it does, for the log.
    """

    endpoint: IStreamServerEndpoint
    factory: Served
    name: str
    purpose: str


class RelayService(Service):
    """Opens listeners, and drains their sessions when it stops.

    :param listenings: what to open.
    :param drain_timeout: seconds that sessions have to finish; 0 aborts them.
    :param command: what its errors begin with.
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
        #: The listeners were told to open; some may take their time.
        self._listening = False

    @property
    def sessions(self) -> int:
        """How many sessions and flows there are."""
        return sum(len(each.factory.sessions) for each in self.listenings)

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
                # An endpoint that takes its time; the others serve already.
                log.critical("{why}", why=_why(reason, listening, self._command))

        for each in self.listenings:
            serves: Any = each.factory
            listening = each.endpoint.listen(serves)
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
        living = self.sessions
        # Before the ports: that of a UDP relay stays open for the replies.
        drained = [each.factory.drain(self.drain_timeout) for each in self.listenings]
        closed = [
            # What goes wrong with a listener must not cost a session its drain.
            maybeDeferred(port.stopListening).addErrback(
                lambda reason: log.failure("a listener could not be closed", reason)
            )
            for port in ports
        ]
        if living:
            log.info(
                "{count} sessions may finish within {timeout:g} s",
                count=living,
                timeout=self.drain_timeout,
            )
        yield gatherResults([*closed, *drained])

    def stop_now(self) -> None:
        """Abort all sessions."""
        for each in self.listenings:
            each.factory.abort_all()


def _close_now(port: IListeningPort) -> None:
    """Close a listener at once: the reactor of this process does not turn again."""
    if isinstance(port, tcp.Port):
        # Twisted's own close in the next turn, and remove a socket file then.
        port.stopReading()
        port.connectionLost(Failure(CONNECTION_DONE))
    else:
        port.stopListening()


def _why(reason: Failure, listening: Listening, command: str) -> CannotStart:
    """One line for whoever starts the relay: which address, and what is wrong."""
    problem = reason.value
    if isinstance(problem, ListenError):
        return CannotStart(f"{command}: {problem}")
    # Twisted's CannotListenError keeps the system's own error within.
    cause = getattr(problem, "socketError", problem)
    why = getattr(cause, "strerror", None) or str(cause)
    if named := getattr(cause, "filename", None):
        # Twisted's listeners open /dev/null, which a jail may lack.
        why = f"{named}: {why}"
    return CannotStart(f"{command}: can't listen on {listening.name}: {why}")


class Whole(MultiService):
    """All that one command runs.

    :param command: what its errors begin with.
    :param parts: in the order in which they start.
    :param log_file: what the command logs to, if it is a file.
    """

    def __init__(
        self, command: str, parts: Sequence[Service], log_file: AnyLogFile | None
    ) -> None:
        super().__init__()
        for part in parts:
            part.setServiceParent(self)
        self._command = command
        self._log_file = log_file

    def setServiceParent(self, parent: IServiceCollection) -> None:
        """Be a part of an application, which is to log to our file.

        :raises CannotStart: it can't be opened.
        """
        super().setServiceParent(parent)
        if self._log_file is not None:
            attach(self._log_file, parent, self._command)


def relay_listening(relay: Relay, config: Config, reactor: Any) -> Listening:
    """One listener with the relay behind it.

    :raises ConfigError: Twisted can't use one of the endpoint strings.
    """
    pool = Pool(
        [
            Upstream(
                dialing_endpoint(address, reactor, config.transport),
                _shown(address),
                server_identity(address),
            )
            for address in relay.destinations
        ]
    )
    return _listening(relay.listen, pool, config, reactor, relay.name)


def udp_listening(relay: UdpRelay, config: Config, reactor: Any) -> Listening:
    """One address for datagrams with the relay behind it.

    :raises ConfigError: the transport can't be had, or a server's interface, or so
        many flows.
    """
    # They have the same descriptors and ports to share.
    sharing = sum(isinstance(each, UdpRelay) for each in config.relays) or 1
    most, affordable = config.udp.max_flows, default_max_flows() // sharing or 1
    if most is None:
        most = affordable
    elif most > affordable:
        each = f" for each of {sharing} listeners" if sharing > 1 else ""
        raise ConfigError(
            f"--max-flows {most} is more than this process can have, which is"
            f" {affordable}{each}: raise the limit of open files (ulimit -n), or the"
            " kernel's range of ports (net.ipv4.ip_local_port_range)"
        )
    servers = []
    for server in relay.destinations:
        try:
            host = dialled_host(server.host)
            servers.append(Server(host, server.port))
            if not servers[-1].named and is_broadcast(host):
                raise OSError(errno.EACCES, BROADCAST)
        except OSError as problem:
            # An IPv6 address has a scope that this machine lacks.
            raise ConfigError(f"can't use {server}: {problem.strerror}") from problem
    nat = UdpNat(
        reactor,
        servers,
        watcher=watcher(reactor, config.transport),
        observer=QuietFlowLog() if config.quiet else FlowLog(),
        name=relay.name,
        **attrs.asdict(attrs.evolve(config.udp, max_flows=most)),
    )
    names = ", ".join(server.name for server in servers)
    return Listening(
        UdpListener(relay.listen.host, relay.listen.port),
        nat,
        str(relay.listen),
        f"relaying datagrams to {names}",
    )


def _listening(
    listen: StreamAddress,
    pool: Pool,
    config: Config,
    reactor: Any,
    name: str | None = None,
) -> Listening:
    factory = RelayFactory(
        pool,
        clock=reactor,
        observer=_session_log(config),
        name=name,
        **attrs.asdict(config.stream),
    )
    return Listening(
        listening_endpoint(listen, reactor, config.backlog, config.transport),
        factory,
        str(listen),
        f"relaying to {pool.names}",
    )


def _session_log(config: Common) -> SessionLog:
    if config.verbose:
        return VerboseSessionLog()
    return QuietSessionLog() if config.quiet else SessionLog()


def socks4_factory(
    listen: StreamAddress, config: Socks4Config, reactor: Any
) -> Socks4Factory:
    """The proxy behind one listener.

    :raises ConfigError: its transport can't be had.
    """
    external = config.socks4.external_address
    return Socks4Factory(
        reactor,
        dialer=dialer(reactor, config.transport),
        listener=lambda host: listening_endpoint(
            # One peer is expected.
            HostPort(host, 0),
            reactor,
            1,
            config.transport,
        ),
        policy=ProxyPolicy(
            config.rules,
            guarded=not is_local(listen),
            user_ids=config.user_ids or None,
            own=lambda address: str(address) == external or is_own(address),
        ),
        observer=_session_log(config),
        gate=ClientGate(config.clients) if config.clients else None,
        name=config.name,
        **attrs.asdict(config.stream),
        **attrs.asdict(config.socks4),
    )


def can_listen_on(address: str) -> bool:
    """Whether a listener can be opened on an IPv4 address, now."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _whose(listen: StreamAddress, config: Socks4Config) -> str:
    if config.clients:
        return ", ".join(map(str, config.clients))
    return "this machine" if is_local(listen) else "everybody"


def _shown(address: StreamAddress) -> str:
    if isinstance(address, HostPort) and address.host is None:
        return f"127.0.0.1:{address.port}"
    return str(address)


def _named(relay: Relay | UdpRelay, name: str) -> Relay | UdpRelay:
    return attrs.evolve(relay, name=name)


def make_service(
    config: Config, reactor: Any, log_file: AnyLogFile | None = None
) -> MultiService:
    """Everything that one `twistd relayd` runs.

    :param log_file: what it logs to, if it is a file.
    :raises ConfigError: a relay leads back to itself, or Twisted can't use one of the
        endpoint strings.
    """
    refuse_cycles(config.relays)
    parts: list[Service] = []
    if config.demo:
        # Brings twisted.web, which no other relay needs to load.
        from relayd.operating.demo import DemoInvitation, DemoSite

        site = DemoSite(reactor)
        parts.append(site)
        pool = Pool([Upstream(site, "the demo's file server")])
        listenings = [_listening(DEMO_LISTENER, pool, config, reactor)]
    else:
        names = relay_names([each.name for each in config.relays])
        relays = map(_named, config.relays, names)
        listenings = [
            udp_listening(each, config, reactor)
            if isinstance(each, UdpRelay)
            else relay_listening(each, config, reactor)
            for each in relays
        ]
    service = RelayService(listenings, config.drain_timeout)
    parts.append(service)
    if config.demo:
        parts.append(DemoInvitation())
    signals = Signals(reactor, service.stop_now, log_file)
    return Whole("relayd", [signals, *parts], log_file)


def make_socks4_service(
    config: Socks4Config, reactor: Any, log_file: AnyLogFile | None = None
) -> MultiService:
    """Everything that one `twistd socks4` runs.

    :param log_file: what it logs to, if it is a file.
    :raises ConfigError: Twisted can't use one of the endpoint strings.
    """
    address = config.socks4.bind_address
    if address and not can_listen_on(address):
        raise ConfigError(
            f"bad --bind-address {address!r}: it is no address of this machine"
        )
    # One proxy, however many listeners it has.
    config = attrs.evolve(config, name=relay_name(config.name))
    factories = [socks4_factory(each, config, reactor) for each in config.listeners]
    for other in factories[1:]:
        # The bounds are on clients in all, whichever listener they came by.
        other.handshakes, other.binds = factories[0].handshakes, factories[0].binds
    listenings = [
        Listening(
            listening_endpoint(listen, reactor, config.backlog, config.transport),
            factory,
            str(listen),
            f"a SOCKS4 proxy for {_whose(listen, config)}",
        )
        for listen, factory in zip(config.listeners, factories, strict=True)
    ]
    proxies = RelayService(listenings, config.drain_timeout, "socks4")
    signals = Signals(reactor, proxies.stop_now, log_file)
    return Whole("socks4", [signals, proxies], log_file)
