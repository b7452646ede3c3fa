"""A server to relay to, for a first try.

`twistd relayd --demo` relays to a file server of the current folder, which runs in the
same process and listens on loopback only.
"""

from __future__ import annotations

import socket
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import (
    IListeningPort,
    IProtocol,
    IProtocolFactory,
    IStreamClientEndpoint,
)
from twisted.logger import Logger
from twisted.web.server import Site
from twisted.web.static import File
from zope.interface import implementer

from relayd.configuring.config import DEMO_LISTENER, Relay, each_port
from relayd.core.route_spec import DEFAULT
from relayd.net.dialing import SocketEndpoint
from relayd.net.listening import TCPListenerEndpoint
from relayd.net.upstream import Upstream
from relayd.operating.admission import Admitting
from relayd.operating.filtering import made_filters
from relayd.operating.relays import pool_part
from relayd.operating.units import Unit, Workshop
from relayd.upstreams.pool import Pool

log = Logger(namespace="relayd.demo")


@implementer(IStreamClientEndpoint)
class DemoSite(Service):
    """A file server of `folder` on a free loopback port, and its client endpoint."""

    def __init__(self, reactor: Any, folder: str = ".") -> None:
        self._reactor = reactor
        self._site = Site(File(folder))
        self._site.noisy = False
        self._port: IListeningPort | None = None

    def startService(self) -> None:
        super().startService()
        TCPListenerEndpoint(self._reactor, "127.0.0.1", 0, 128).listen(
            self._site
        ).addCallback(self._listening)

    def _listening(self, port: IListeningPort) -> None:
        self._port = port

    def stopService(self) -> Deferred[Any]:
        super().stopService()
        port, self._port = self._port, None
        return maybeDeferred(port.stopListening if port else bool)

    def connect(self, factory: IProtocolFactory) -> Deferred[IProtocol]:
        """See `IStreamClientEndpoint.connect`."""
        if self._port is None:
            raise RuntimeError("the demo's file server is not running")
        where: Any = self._port.getHost()
        address = (where.host, where.port)
        return SocketEndpoint(self._reactor, socket.AF_INET, address).connect(factory)


def demo_unit(relay: Relay, shop: Workshop) -> tuple[DemoSite, Unit]:
    """The file server of a demo, and its relay.

    :raises ConfigError: its filters can't be made.
    """
    site = DemoSite(shop.reactor)
    pool = Pool([Upstream(site, "the demo's file server")])
    [(listeners, _)] = each_port(relay)
    admitting = Admitting.of(relay.admission, shop.reactor)
    filters = made_filters(relay)
    part = pool_part(listeners, {DEFAULT: pool}, relay, shop, admitting, filters)
    return site, Unit(relay, admitting, [part], filters)


class DemoInvitation(Service):
    """Logs what to try, once the demo runs."""

    def startService(self) -> None:
        super().startService()
        log.info("the demo serves the current folder; Ctrl-C ends it.  Try:")
        log.info("    curl http://{where}/", where=DEMO_LISTENER)
