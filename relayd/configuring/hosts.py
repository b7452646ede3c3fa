"""The hosts in addresses: names, and addresses of one host.

What is refused is told with the whole address in which it stands.
"""

from __future__ import annotations

import ipaddress

from relayd.core.errors import ConfigError
from relayd.core.names import is_name, is_number
from relayd.core.networks import unmapped
from relayd.net.broadcast import BROADCAST, is_broadcast


def is_ipv6(host: str) -> bool:
    """Whether a host is an IPv6 address, which may have a scope."""
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def ipv6_host(host: str, text: str) -> str:
    """The IPv6 address that stands in brackets in an address.

    :param text: the whole, for an error.
    :raises ConfigError: it is none, or not of one host.
    """
    if not is_ipv6(host):
        raise ConfigError(f"bad address {text!r}: {host!r} is not an IPv6 address")
    address = ipaddress.IPv6Address(host)
    mapped = address.ipv4_mapped
    _check_one_host(mapped or address, text)
    # That of IPv4 has no scope.
    if mapped is None and address.is_link_local and address.scope_id is None:
        port = text.rpartition(":")[2]
        raise ConfigError(
            f"bad address {text!r}: a link-local address needs its interface: write"
            f" [{host}%eth0]:{port}, with eth0 as this machine calls it"
        )
    return host


def _check_one_host(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, text: str
) -> None:
    if address.is_multicast:
        what = "a multicast group"
    elif str(address) == "255.255.255.255":
        what = "the broadcast address"
    else:
        return
    raise ConfigError(
        f"bad address {text!r}: {address} is {what}, which relayd neither listens on"
        " nor sends to: write the address of one host"
    )


def check_host(host: str, text: str) -> None:
    """Refuse multicast and broadcast addresses, also of this machine's networks.

    :param host: an address; a name, or "", is not checked.
    :raises ConfigError: it is not the address of one host.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return
    _check_one_host(unmapped(address), text)
    if is_broadcast(host):
        raise ConfigError(f"bad address {text!r}: {BROADCAST}")


def named_host(host: str, text: str) -> str:
    """The name, or the IPv4 address, that stands before the port in an address.

    :param text: the whole, for an error.
    :raises ConfigError: it is neither, or not of one host.
    """
    if is_number(host):
        try:
            address = ipaddress.IPv4Address(host)
        except ValueError:
            raise ConfigError(
                f"bad address {text!r}: {host!r} is not an IPv4 address"
            ) from None
        _check_one_host(address, text)
        return str(address)
    if not is_name(host):
        raise ConfigError(
            f"bad address {text!r}: {host!r} is not a host name"
            " (write an international name in its xn-- form)"
        )
    return host
