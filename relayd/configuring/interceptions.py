"""What the settings of a relay say of clients that meant to go elsewhere.

Whatever depends on it asks here: what its listeners are made as, and which rules of
netfilter it needs.
"""

from __future__ import annotations

from relayd.configuring.address_grammar import OriginalAddress
from relayd.configuring.config import AnyRelay, Relay, UdpRelay
from relayd.configuring.pools_of_relay import servers_of


def takes_original(relay: AnyRelay) -> bool:
    """Whether a relay sends clients where they meant to go, or may: a route decides."""
    if not isinstance(relay, Relay | UdpRelay):
        return False
    if any(isinstance(each, OriginalAddress) for each in servers_of(relay)):
        return True
    return isinstance(relay, Relay) and bool(relay.route and relay.intercepts)


def uses_tproxy(relay: AnyRelay) -> bool:
    """Whether something is brought to a relay by TPROXY."""
    if not isinstance(relay, Relay | UdpRelay):
        return False
    original, udp = takes_original(relay), isinstance(relay, UdpRelay)
    return any(each.by_tproxy(original=original, udp=udp) for each in relay.intercepts)


def listens_for_others(relay: AnyRelay) -> bool:
    """Whether the sockets of a relay's listeners take what is for other addresses."""
    return takes_original(relay) or uses_tproxy(relay)
