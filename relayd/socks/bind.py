"""BIND: a listener for the one peer that a client expects.

A :class:`BindAttempt` is to BIND what a dial is to CONNECT: one try to get the other
connection, with one outcome.  It listens on an address of this machine, tells the
client where, and takes the first connection; the listener closes then.

Source: the memo "SOCKS: A protocol for TCP proxy across firewalls", BIND.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Any

from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IAddress, IListeningPort
from twisted.internet.protocol import Factory
from twisted.python.failure import Failure

from relayd.core.addresses import address_name
from relayd.core.errors import Refused, RelayError
from relayd.core.session import Ending
from relayd.core.stage import Stage
from relayd.net.foreign_transports import set_options
from relayd.net.own_addresses import address_towards
from relayd.stream.attempt import Attempt, UpstreamLeg

#: No address: any of this machine's, or whichever peer comes.
ANYONE = "0.0.0.0"


class BindAttempt(Attempt):
    """One peer that is waited for.

    :param client: a :class:`relayd.socks.session.Socks4Protocol`.
    :param peers: the addresses that it may come from; None is any.
    """

    client: Any

    def __init__(self, client: Any, peers: Sequence[str] | None) -> None:
        Attempt.__init__(self, client)
        self._peers = peers
        self._listener: _OnePeer | None = None

    def start(self) -> None:
        """Listen."""
        client, peers = self.client, self._peers
        factory = client.factory
        try:
            factory.binds.add(client, client.key)
        except Refused as refusal:
            self.failed(Ending.REFUSED, refusal.why)
            return
        client.begin_attempt(Stage.LISTENING, factory.bind_timeout)
        try:
            host = factory.bind_address or (
                ANYONE
                if peers is None
                else address_towards(ipaddress.ip_address(peers[0]))
            )
        except OSError as problem:
            self.failed(Ending.CONNECT_FAILED, f"no way to {peers}: {problem.strerror}")
            return
        listener = self._listener = _OnePeer(self)
        listening = factory.listener(host).listen(listener)
        listening.addCallbacks(listener.listens, self._not_bound)
        listening.addErrback(client.failed)

    def _not_bound(self, reason: Failure) -> None:
        # The last is what Twisted's own endpoints say.
        reason.trap(RelayError, OSError, CannotListenError)
        self.failed(Ending.CONNECT_FAILED, str(reason.value))

    def stop(self) -> None:
        self.client.factory.binds.discard(self.client)
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()

    def overdue(self) -> None:
        limit = self.client.factory.bind_timeout
        self.failed(Ending.BIND_TIMEOUT, f"nobody came in {limit:g} s")

    def build_leg(self, address: Any) -> Any:
        """Somebody has connected to the listener, which is closed by now."""
        client, session = self.client, self.client.session
        # The two hold each other.
        self._listener = None
        client.factory.binds.discard(client)
        if self.is_over:
            return None
        if self._peers is not None and address.host not in self._peers:
            session.upstream = address_name(address)
            self.failed(
                Ending.WRONG_PEER,
                f"{address_name(address)} came instead of {', '.join(self._peers)}",
            )
            return None
        if self._peers is None:
            # Whoever comes is judged when it has come.
            try:
                client.factory.policy.permit(
                    address.host, client.request.port, "", session
                )
            except Refused as refusal:
                session.upstream = address_name(address)
                self.failed(Ending.DENIED, refusal.why)
                return None
        leg = _PeerLeg(session.down)
        leg.attempt = self
        return leg


class _OnePeer(Factory):
    """A listener for one peer, which it closes when somebody has come."""

    noisy = False

    def __init__(self, attempt: BindAttempt) -> None:
        self._attempt = attempt
        self._port: IListeningPort | None = None
        self._over = False

    def listens(self, port: IListeningPort) -> None:
        """It is open."""
        if self._over:
            port.stopListening()
            return
        self._port = port
        here: Any = port.getHost()
        self._attempt.client.bound_to(here.host, here.port)

    def close(self) -> None:
        """Nobody is expected any longer."""
        self._over = True
        port, self._port = self._port, None
        if port is not None:
            port.stopListening()

    def buildProtocol(self, addr: IAddress | None) -> Any:
        if self._over:
            return None
        self.close()
        try:
            return self._attempt.build_leg(addr)
        except Exception:
            # The listener is gone: its client would wait for nobody.
            self._attempt.client.failed(Failure())
            return None


class _PeerLeg(UpstreamLeg):
    """The connection of whoever a client has waited for."""

    was_dialled = False

    def makeConnection(self, transport: Any) -> None:
        attempt = self.attempt
        UpstreamLeg.makeConnection(self, transport)
        if self.alive:
            set_options(transport)
        if attempt is not None:
            attempt.leg_connected(self)
