"""Where a proxy's clients may be relayed to: rules, and guards.

The first rule that matches decides (:mod:`relayd.socks.rules`); what none matches is
allowed.

A guarded proxy, which is any that clients of other machines can reach, is not for
reaching what only its own machine can reach.  The *guards* are networks that it
refuses unless an allow rule names that very network or a part of it.
`0.0.0.0/0` does not count, and neither does a name, whose address is whatever its
owner says.  Some addresses nobody is relayed to, whatever the rules say.

An IPv6 address that stands for an IPv4 address
(:func:`relayd.core.networks.stands_for`) is also judged as that one.

Sources: the IANA special-purpose address registries (RFC 6890); the metadata services
of the large clouds.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from zope.interface import implementer

from relayd.core.errors import Refused
from relayd.core.interfaces import IProxyPolicy
from relayd.core.networks import Ip, Network, stands_for
from relayd.core.session import Session
from relayd.net.own_addresses import is_own
from relayd.socks.rules import Rule
from relayd.socks.rules import parse_rule as parse_rule

#: Addresses of which it is remembered what they are.
_REMEMBERED = 1024


def _networks(*texts: str) -> tuple[Network, ...]:
    return tuple(map(ipaddress.ip_network, texts))


#: Nobody is relayed there: it is no address of one machine.
_NEVER = {
    "unspecified": _networks("0.0.0.0/8", "::/128"),
    "multicast": _networks("224.0.0.0/4", "ff00::/8"),
    "reserved": _networks("240.0.0.0/4"),
}

_GUARDS = {
    "loopback": _networks("127.0.0.0/8", "::1/128"),
    "link-local": _networks("169.254.0.0/16", "fe80::/10"),
    "cloud metadata": _networks(
        "169.254.169.254/32",
        "100.100.100.200/32",
        "168.63.129.16/32",
        "fd00:ec2::254/128",
        "fd20:ce::254/128",
    ),
    "private": _networks(
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "100.64.0.0/10",
        "192.0.0.0/24",
        "198.18.0.0/15",
        "fc00::/7",
        "fec0::/10",
        # Teredo: an IPv4 host behind whatever address.
        "2001::/32",
        "2001:db8::/32",
        # NAT64 of a network's own (RFC 8215), which may carry the IPv4 address in other
        # places than the one that stands_for knows.
        "64:ff9b:1::/48",
    ),
}


@implementer(IProxyPolicy)
class ProxyPolicy:
    """What the clients of a proxy may do: rules, guards, and users.

    :param rules: about destinations, in order.
    :param guarded: whether the guards stand.  A proxy for this machine's own
        programs, which reach all that without it, needs none.
    :param user_ids: the users that are served; None is all.  A user id is what the
        client says, and proves nothing.
    :param own: tells the addresses of this machine.
    """

    def __init__(
        self,
        rules: Iterable[Rule] = (),
        *,
        guarded: bool = True,
        user_ids: Iterable[bytes] | None = None,
        own: Callable[[Ip], bool] = is_own,
    ) -> None:
        self.rules = tuple(rules)
        self.guarded = guarded
        self.user_ids = None if user_ids is None else frozenset(user_ids)
        self._own = own

    def admit(self, user_id: bytes, session: Session) -> None:
        """See :meth:`IProxyPolicy.admit`."""
        if self.user_ids is not None and user_id not in self.user_ids:
            raise Refused("no --userid names this user")

    def permit(self, address: str, port: int, name: str, session: Session) -> None:
        """See :meth:`IProxyPolicy.permit`."""
        self.judge(address, port, name)

    def judge(self, address: str, port: int, name: str) -> Rule | None:
        """Whether a client may go there, and which rule says so.

        :return: the rule that allows it; None: no rule is about it.
        :raises Refused: it may not.
        """
        ip, never, guards, inner = _about(address)
        if never:
            raise Refused(f"{address} is {never}")
        if not (self.rules or self.guarded):
            return None
        wanted = name.lower().removesuffix(".")
        rule = self._judge(ip, guards, port, wanted, address)
        if inner:
            # It has passed as what it is; now as what it stands for.
            ip, never, guards, _ = _about(inner)
            shown = f"{address} stands for {inner}, which"
            rule = self._judge(ip, guards, port, wanted, shown)
        return rule

    def _judge(
        self,
        ip: Ip,
        guards: Sequence[tuple[str, Network]],
        port: int,
        name: str,
        shown: str,
    ) -> Rule | None:
        if not self.guarded:
            guards = ()
        elif all(kind != "loopback" for kind, _ in guards) and (
            getattr(ip, "ipv4_mapped", None) is None and self._own(ip)
        ):
            # Loopback addresses are its own as well, but that guard speaks for them;
            # what is mapped is asked about as the IPv4 address that it is.
            guards = (*guards, ("this machine's own", ipaddress.ip_network(ip)))
        for rule in self.rules:
            if not rule.about(ip, name, port):
                continue
            if not rule.allow:
                raise Refused(f"{shown} is denied by --deny-dest {rule.text}")
            if all(_lifts(rule, network) for _, network in guards):
                return rule
        if guards:
            kind, network = max(guards, key=lambda guard: guard[1].prefixlen)
            raise Refused(f"{shown} is {kind}: it takes --allow-dest {network}")
        return None


def _lifts(rule: Rule, guard: Network) -> bool:
    """Whether an allow rule is about this very network, or a part of it."""
    network: Any = rule.network
    return (
        network is not None
        and network.version == guard.version
        and bool(network.subnet_of(guard))
    )


@functools.lru_cache(maxsize=_REMEMBERED)
def _about(address: str) -> tuple[Ip, str, tuple[tuple[str, Network], ...], str]:
    """What is always true of an address.

    :return: the address; why nobody is relayed there, or empty; the guards that it is
        behind; the IPv4 address that it stands for, or empty.
    """
    ip = ipaddress.ip_address(address)
    inner = stands_for(ip)
    never = ""
    for each in (ip, inner):
        for kind, networks in _NEVER.items():
            if each is not None and any(each in network for network in networks):
                never = kind
    guards = tuple(
        (kind, network)
        for kind, networks in _GUARDS.items()
        for network in networks
        if ip in network
    )
    return ip, never, guards, str(inner) if inner is not None else ""
