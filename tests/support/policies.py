"""Policies of proxies, and addresses to try them with."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from relayd.core.errors import Refused
from relayd.core.networks import Ip
from relayd.core.session import Session
from relayd.socks.destinations import ProxyPolicy
from relayd.socks.rules import Rule, parse_rule

SESSION = Session(1, "203.0.113.1:50000", "203.0.113.2:1080", 0.0)

#: No special address of any kind; nobody's guard.
ANYWHERE = "8.8.8.8"


def nobody(address: Ip) -> bool:
    """A machine without addresses, as which test machine it is must not matter."""
    return False


def rules_of(*texts: str) -> list[Rule]:
    """Rules; `+` allows and `-` denies."""
    return [
        parse_rule("--allow-dest", text[1:], allow=True)
        if text[0] == "+"
        else parse_rule("--deny-dest", text[1:], allow=False)
        for text in texts
    ]


def policy(
    *texts: str, guarded: bool = True, own: Callable[[Ip], bool] = nobody
) -> ProxyPolicy:
    """A policy with these rules."""
    return ProxyPolicy(rules_of(*texts), guarded=guarded, own=own)


def refusal(judge: ProxyPolicy, address: str, port: int = 80, name: str = "") -> str:
    """Why the policy is against it, in one line; empty if it is not."""
    try:
        judge.permit(address, port, name, SESSION)
    except Refused as refused:
        assert refused.why.isprintable()
        assert refused.why
        return refused.why
    return ""


#: By the requirements and IANA's registries, not by the module.
GUARDS = {
    "127.0.0.0/8": "loopback",
    "::1/128": "loopback",
    "169.254.0.0/16": "link-local",
    "fe80::/10": "link-local",
    "10.0.0.0/8": "private",
    "172.16.0.0/12": "private",
    "192.168.0.0/16": "private",
    "100.64.0.0/10": "private",
    "192.0.0.0/24": "private",
    "198.18.0.0/15": "private",
    "fc00::/7": "private",
    "fec0::/10": "private",
    "2001:db8::/32": "private",
    "169.254.169.254/32": "cloud metadata",
    "100.100.100.200/32": "cloud metadata",
    "168.63.129.16/32": "cloud metadata",
    "fd00:ec2::254/128": "cloud metadata",
    "fd20:ce::254/128": "cloud metadata",
}

NEVER = {
    "0.0.0.0/8": "unspecified",
    "::/128": "unspecified",
    "224.0.0.0/4": "multicast",
    "ff00::/8": "multicast",
    "240.0.0.0/4": "reserved",
}


def some_of(text: str) -> Iterator[Ip]:
    """The first and last address of a network, and one in its middle."""
    network = ipaddress.ip_network(text)
    yield from {network[0], network[-1], network[network.num_addresses // 2]}


def around(text: str) -> Iterator[Ip]:
    """The addresses right before a network and right after it."""
    network = ipaddress.ip_network(text)
    kind: Any = type(network[0])
    for number in (int(network[0]) - 1, int(network[-1]) + 1):
        if 0 <= number < 2**network.max_prefixlen:
            yield kind(number)


#: How an IPv6 address carries an IPv4 address: RFC 4291 (two), 6052, 8215, 3056.
STAND_INS: dict[str, Callable[[int], int]] = {
    "mapped": lambda ip: 0xFFFF << 32 | ip,
    "compatible": lambda ip: ip,
    "NAT64": lambda ip: 0x64FF9B << 96 | ip,
    "local NAT64": lambda ip: 0x64FF9B0001 << 80 | ip,
    "6to4": lambda ip: 0x2002 << 112 | ip << 80 | 0x1,
}


def stand_ins(address: str) -> dict[str, IPv6Address]:
    """All of them, but for those that are something else: `::` and `::1`."""
    number = int(IPv4Address(address))
    made = {kind: IPv6Address(make(number)) for kind, make in STAND_INS.items()}
    return {
        k: ip for k, ip in made.items() if ip not in (IPv6Address(0), IPv6Address(1))
    }
