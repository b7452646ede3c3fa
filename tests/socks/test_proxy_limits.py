"""The SOCKS4 proxy on fakes: its limits on clients, and who makes room for whom."""

from __future__ import annotations

from typing import Any

import pytest
from twisted.internet.interfaces import IAddress, IProtocolFactory
from zope.interface.verify import verifyObject

from relayd.core.interfaces import IShedsClients
from relayd.core.session import Ending
from relayd.socks4 import LONG_HANDSHAKE, SHED_AT_ONCE, Socks4Factory
from tests.support.proxies import BIND, CONNECT, SERVER, Proxy, refused


def test_the_oldest_handshake_of_a_client_makes_room_for_its_next() -> None:
    proxy = Proxy(max_handshakes_per_client=2)
    other = proxy.client(host="192.0.2.200")
    first, second = proxy.client(CONNECT[:4]), proxy.client()
    third = proxy.client()
    refused(first)
    assert proxy.witness.sessions[1].ending is Ending.EVICTED
    assert [each.connected for each in (other, second, third)] == [True] * 3
    assert len(proxy.factory.handshakes) == 3
    third.receive(CONNECT)
    assert len(proxy.factory.handshakes) == 2, "its handshake is over"
    proxy.client()
    assert second.connected
    for each in (other, second, third):
        each.lose()


def test_the_oldest_handshake_of_all_makes_room_for_the_next() -> None:
    proxy = Proxy(max_handshakes=2)
    first = proxy.client(host="192.0.2.201")
    second = proxy.client(host="192.0.2.202")
    third = proxy.client(host="192.0.2.203")
    refused(first)
    assert second.connected
    assert third.connected
    second.lose()
    fourth = proxy.client(host="192.0.2.204")
    assert third.connected
    third.lose()
    fourth.lose()
    proxy.nothing_left()


def test_one_whose_identd_is_asked_can_be_evicted() -> None:
    proxy = Proxy(ident=True, max_handshakes=1)
    first = proxy.client(CONNECT)
    second = proxy.client()
    refused(first)
    assert proxy.clock.connectors[0].stoppedConnecting
    second.lose()
    proxy.nothing_left()


def test_without_descriptors_those_go_who_are_long_in_their_handshake() -> None:
    """So many at once; not who has just come, nor who is dialled for."""
    proxy = Proxy()
    assert verifyObject(IShedsClients, proxy.factory)
    served = proxy.client(CONNECT)
    mute = [
        proxy.client(host=f"192.0.2.{number}") for number in range(SHED_AT_ONCE + 2)
    ]

    def shed_clients() -> None:
        # Two listeners may ask in one turn.
        proxy.factory.shed_clients()
        proxy.factory.shed_clients()
        proxy.clock.advance(0)

    proxy.clock.advance(LONG_HANDSHAKE - 0.01)
    shed_clients()
    assert all(client.connected for client in mute)
    late = proxy.client(CONNECT[:4])
    proxy.clock.advance(0.01)
    shed_clients()
    for client in mute[:SHED_AT_ONCE]:
        refused(client)
    assert proxy.witness.sessions[1].ending is Ending.EVICTED
    assert all(client.connected for client in mute[SHED_AT_ONCE:])
    shed_clients()
    for client in mute[SHED_AT_ONCE:]:
        refused(client)
    late.receive(CONNECT[4:])
    assert len(proxy.servers) == 2
    for client in (served, late):
        client.lose()
    proxy.nothing_left()


def test_whose_request_has_arrived_by_then_makes_no_room() -> None:
    """A proxy that was stopped meanwhile has not read it yet."""
    proxy = Proxy()
    speaks, mute = proxy.client(), proxy.client()
    proxy.clock.advance(LONG_HANDSHAKE)
    proxy.factory.shed_clients()
    speaks.receive(CONNECT)
    proxy.clock.advance(0)
    refused(mute)
    assert len(proxy.servers) == 1
    speaks.lose()
    proxy.nothing_left()


def test_a_proxy_with_protocols_of_its_own_sheds_clients_as_well() -> None:
    class Own(Socks4Factory):
        def buildProtocol(self, addr: IAddress | None) -> Any:
            return super().buildProtocol(addr)

    assert IShedsClients.implementedBy(Own)
    assert IProtocolFactory.implementedBy(Own)
    proxy = Proxy()
    own = Own(proxy.clock, dialer=proxy._dialer, listener=proxy._listener)
    assert proxy.factory.takes_names()
    assert not own.takes_names()


def test_those_who_are_dialled_for_shed_for_nobody() -> None:
    proxy = Proxy(max_handshakes=1, max_handshakes_per_client=1)
    clients = [proxy.client(CONNECT) for _ in range(5)]
    assert all(client.connected for client in clients)
    for client in clients:
        client.lose()
    proxy.nothing_left()


@pytest.mark.parametrize("bound", ["max_binds", "max_binds_per_client"])
def test_more_binds_than_may_wait_are_refused(bound: str) -> None:
    options: dict[str, Any] = {bound: 2}
    proxy = Proxy(**options)
    waiting = [proxy.client(BIND), proxy.client(BIND)]
    late = proxy.client(BIND)
    refused(late)
    assert len(proxy.listeners) == 2
    assert proxy.witness.sessions[2].ending is Ending.REFUSED
    assert "2 BINDs" in proxy.witness.sessions[2].detail
    elsewhere = proxy.client(BIND, "192.0.2.200")
    assert elsewhere.disconnecting == (bound == "max_binds")
    # One that was served waits no longer, and nor does one that left.
    proxy.ports[0].accept(SERVER)
    waiting[1].lose()
    again = [proxy.client(BIND), proxy.client(BIND)]
    assert not any(client.disconnecting for client in again)
    for client in (waiting[0], late, elsewhere, *again):
        client.take()
        client.lose()
    proxy.nothing_left()
