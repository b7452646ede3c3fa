"""Has the servers of all relays checked, as `--check` says.

One checker for the process (:mod:`relayd.upstreams.checks`): it begins before the first
listener is opened, and stops when the last session has drained.  A process in which no
server is checked has none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import attrs
from twisted.application.service import Service

from relayd.configuring.address_grammar import (
    DatagramServer,
    HostPort,
    OriginalAddress,
    StreamAddress,
    StreamServer,
    UnixPath,
    dialled_host,
)
from relayd.configuring.config import ServerChecks
from relayd.configuring.endpoint_strings import host_in
from relayd.core.check_grammar import Check
from relayd.core.process_settings import Transport
from relayd.datagrams.sockets import flow_opener, udp_socket
from relayd.net.dial_options import DialOptions
from relayd.net.tls import ascii_name
from relayd.net.upstream import Upstream
from relayd.operating.endpoints import dialing_endpoint
from relayd.preludes.proxy_protocol import nobody
from relayd.upstreams.check_kinds import Target, asks, function_of
from relayd.upstreams.checks import Checker
from relayd.upstreams.flow_server import FlowServer
from relayd.upstreams.judging import Schedule

__all__ = ["ServerCheckService", "function_of"]


class ServerCheckService(Service):
    """The checks of a process.

    :param transport: of connections to servers.

    :ivar checker: has the servers.
    :ivar added: those since the last change of settings that was made.
    """

    def __init__(self, reactor: Any, transport: Transport) -> None:
        self._reactor = reactor
        self._transport = transport
        self.checker = Checker(reactor)
        self.added: list[Any] = []

    def startService(self) -> None:
        super().startService()
        self.checker.start()

    def stopService(self) -> None:
        super().stopService()
        self.checker.stop()

    def add(
        self,
        settings: ServerChecks,
        dialing: DialOptions | None,
        send_proxy: str | None,
        address: StreamServer,
        server: Upstream,
    ) -> None:
        """Check a server of connections, if its settings or its destination say so.

        :param settings: of its relay.
        :param dialing: of its relay's sockets; its endpoint has its own.
        :param send_proxy: the version of the header that it is told if it has none of
            its own.
        :raises ConfigError: a check in Python can't be imported.
        """
        own = address.options
        check = own.check or settings.check
        if check is None or isinstance(address, OriginalAddress):
            return
        host, dialing = _host_of(address), own.dialing(dialing)
        endpoint = server.endpoint
        if dialing is not None and dialing.transparent:
            dialing = _its_own(dialing)
            endpoint = dialing_endpoint(
                address, self._reactor, self._transport, dialing
            )
        target = Target(
            server=server,
            endpoint=endpoint,
            endpoint_at=self._dials(host, dialing) if host else None,
            host=_in_url(host),
            port=address.port if isinstance(address, HostPort) else None,
            identity=server.identity,
            preamble=nobody(own.send_proxy or send_proxy),
        )
        self._add(server, check, settings, target)

    def add_datagrams(
        self,
        settings: ServerChecks,
        dialing: DialOptions | None,
        address: DatagramServer,
        server: FlowServer,
    ) -> None:
        """The same for a server of datagrams.

        :raises ConfigError: a check in Python can't be imported.
        """
        own = address.options
        check = own.check or settings.check
        if check is None or isinstance(address, OriginalAddress):
            return
        host, dialing = dialled_host(address.host), _its_own(own.dialing(dialing))
        target = Target(
            server=server,
            endpoint_at=self._dials(host, dialing),
            host=_in_url(host),
            port=address.port,
            open_socket=flow_opener(udp_socket, dialing),
            address=partial(getattr, server.endpoint, "end"),
        )
        self._add(server, check, settings, target)

    def _add(
        self, server: Any, check: Check, settings: ServerChecks, target: Target
    ) -> None:
        schedule = Schedule(
            every=settings.check_every,
            timeout=settings.check_timeout,
            rise=settings.rise,
            fall=settings.fall,
        )
        self.checker.add(server, asks(check, target, self._reactor), schedule)
        self.added.append(server)

    def _dials(self, host: str, dialing: DialOptions | None) -> Callable[[int], Any]:
        """How to dial a port of a host; each is found once."""
        return cache(
            lambda port: dialing_endpoint(
                HostPort(host, port), self._reactor, self._transport, dialing
            )
        )


def _its_own(dialing: DialOptions | None) -> DialOptions | None:
    """How a server is dialled for nobody: from an address of this machine."""
    return None if dialing is None else attrs.evolve(dialing, transparent=False)


def _host_of(address: StreamAddress) -> str:
    """The host of a server; empty if it has none, or none that is known."""
    if isinstance(address, HostPort):
        return dialled_host(address.host)
    return "" if isinstance(address, UnixPath) else host_in(address.text, listens=False)


def _in_url(host: str) -> str:
    """A host as a URL has it."""
    bare = host.partition("%")[0]
    if ":" in bare:
        return f"[{bare}]"
    try:
        return ascii_name(bare) or "localhost"
    except UnicodeError:
        # Of an endpoint string; nobody can dial it.
        return "localhost"
