"""What the settings of a relay say of clients that meant to go elsewhere.

Whatever depends on it asks here: what its listeners are made as, which rules of
netfilter it needs, and to which of its listeners they lead.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from relayd.configuring.address_grammar import (
    HostPort,
    OriginalAddress,
    UdpAddress,
    dialled_host,
)
from relayd.configuring.config import AnyRelay, Relay, UdpRelay
from relayd.configuring.ends import EVERY, address_of, sockets_of
from relayd.configuring.pools_of_relay import servers_of
from relayd.configuring.server_grammar import ServersOf
from relayd.core.interception import Intercept


def takes_original(relay: AnyRelay) -> bool:
    """Whether a relay sends clients where they meant to go, or may: a route decides."""
    if not isinstance(relay, Relay | UdpRelay):
        return False
    if any(isinstance(each, OriginalAddress) for each in servers_of(relay)):
        return True
    return isinstance(relay, Relay) and bool(relay.route and relay.intercepts)


def by_tproxy(relay: Relay | UdpRelay, intercept: Intercept) -> bool:
    """Whether a relay's clients are brought to it by TPROXY; else by NAT.

    Unless somebody said, by NAT, which takes no right of the relay.
    """
    if intercept.tproxy is not None:
        return intercept.tproxy
    return needs_tproxy(relay, intercept)


def needs_tproxy(relay: Relay | UdpRelay, intercept: Intercept) -> bool:
    """Whether TPROXY alone will do for what a relay intercepts.

    - Datagrams that go where they were meant to: by NAT they lose their destination.
      A listener that is told of it takes none without.
    - What a transparent relay dials may be where its clients meant to go.  Such a dial
      has the client's address, and may have the port of another connection of that
      client; that of a datagram has the client's own port always.  Connection tracking
      would take the one for the other, and bring the dial to the listener: a connection
      would hang, a datagram go round for ever.
    """
    if isinstance(relay, UdpRelay):
        # All of them come to the same listener.
        return takes_original(relay) or any(
            each.tproxy or _meets_own_dials(relay, each) for each in relay.intercepts
        )
    return _meets_own_dials(relay, intercept)


def _meets_own_dials(relay: Relay | UdpRelay, intercept: Intercept) -> bool:
    return relay.dialing.transparent and (
        takes_original(relay)
        or any(leads_there(each, intercept) for each in servers_of(relay))
    )


def leads_there(server: Any, intercept: Intercept) -> bool:
    """Whether a server may be at an address that clients are intercepted on.

    :param server: of one port: rules lead to no range.
    """
    if isinstance(server, ServersOf):
        # A service says its port as it is looked up.
        return not server.port or intercept.about(None, server.port)
    if not isinstance(server, HostPort | UdpAddress):
        return False
    host = address_of(dialled_host(server.host))
    return intercept.about(host, server.port)


def uses_tproxy(relay: AnyRelay) -> bool:
    """Whether something is brought to a relay by TPROXY."""
    return isinstance(relay, Relay | UdpRelay) and any(
        by_tproxy(relay, each) for each in relay.intercepts
    )


def listens_for_others(relay: AnyRelay) -> bool:
    """Whether the sockets of a relay's listeners take what is for other addresses."""
    return takes_original(relay) or uses_tproxy(relay)


def listener_for(
    listeners: Iterable[Any], version: int
) -> tuple[str | None, int] | None:
    """Where rules can bring what is intercepted of a version of IP.

    :return: the address and the port of the first listener that has them: no name, no
        range, no link-local address, no socket that somebody else opens; one of
        loopback if there is no other.
        None for the address: all of them.
    """
    near = None
    for each in listeners:
        if isinstance(each, HostPort | UdpAddress) and each.port:
            for own, address in sockets_of(each.host):
                # A rule has no word for the interface of a link-local address.
                if own == version and "%" not in address:
                    found = (None if address == EVERY else address), each.port
                    if not is_near(found[0]):
                        return found
                    near = near or found
    return near


def is_near(host: str | None) -> bool:
    """Whether a listener's address is one of loopback; None: it has all of them."""
    address = None if host is None else address_of(host)
    return address is not None and address.is_loopback
