"""Where a proxy's clients may be relayed to.

Rules are read in order and the first that matches decides; what none matches is
allowed.  A rule names a network or a host name, and ports if it is about some only.
A rule with a name is about requests for that name; a rule with a network is about
each address, however it was asked for.

A guarded proxy, which is any that clients of other machines can reach, is not for
reaching what only its own machine can reach.  The *guards* are networks that it
refuses unless an allow rule speaks of them: of that very network or a part of it.
`0.0.0.0/0` speaks of none, and neither does a name, whose address is whatever its
owner says.  Some addresses nobody is relayed to, whatever the rules say.

An IPv6 address that stands for an IPv4 address (mapped, compatible, NAT64, 6to4) is
also judged as that one.

Sources: the IANA special-purpose address registries (RFC 6890), RFC 6052 (NAT64),
RFC 3056 (6to4); the metadata services of the large clouds.
"""

from __future__ import annotations

import errno
import functools
import ipaddress
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any

import attrs
from zope.interface import implementer

from relayd.errors import ConfigError, Refused
from relayd.interfaces import IProxyPolicy
from relayd.names import is_address, is_name
from relayd.session import Session

Ip = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

#: bind(2): no interface has this address, or none has addresses of this family.  The
#: only ways in which the kernel says that an address is another machine's.
_NOT_OWN = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

#: ip(7), Linux: bind the address alone, and choose a port when it is needed.
_BIND_NO_PORT = getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24)

#: Addresses of which it is remembered what they are.
_REMEMBERED = 1024

_PORTS = re.compile(r"[0-9]{1,5}(-[0-9]{1,5})?(,[0-9]{1,5}(-[0-9]{1,5})?)*")

_EXPECTED = (
    "expected CIDR[:PORTS] or NAME[:PORTS], such as 10.0.0.0/8 or *.example.com:443"
)


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

#: The prefix that v4-mapped addresses have in common, in bits (RFC 4291).
_MAPPED = 96

_LOOPBACK6 = IPv6Address("::1")

#: IPv6 networks whose addresses stand for an IPv4 address, and where it is in them:
#: bits from the right.
_STAND_INS = (
    (IPv6Network("::ffff:0:0/96"), 0),
    (IPv6Network("::/96"), 0),
    # SIIT, RFC 7915.
    (IPv6Network("::ffff:0:0:0/96"), 0),
    (IPv6Network("64:ff9b::/96"), 0),
    (IPv6Network("64:ff9b:1::/48"), 0),
    (IPv6Network("2002::/16"), 80),
)


@attrs.frozen
class Rule:
    """Allows, or denies, some destinations.

    :ivar network: the addresses that it is about, or None: a name's.
    :ivar name: a host name in small letters; `*.example.com` is every name that ends
        in `.example.com`; `*` is every destination, named or not.
    :ivar ports: the ranges that it is about, ends included; none is all.
    :ivar text: the rule as the operator wrote it.
    """

    allow: bool
    network: Network | None
    name: str
    ports: Sequence[tuple[int, int]]
    text: str

    def about(self, address: Ip, name: str, port: int) -> bool:
        """Whether it matches; `name` is the one that was asked for, or empty."""
        if self.ports and not any(low <= port <= high for low, high in self.ports):
            return False
        if self.network is not None:
            return address in self.network
        if self.name == "*":
            return True
        if self.name.startswith("*."):
            return name.endswith(self.name[1:])
        return bool(name) and name == self.name


def parse_network(text: str) -> Network:
    """A network, or a single address; v4-mapped ones are those of IPv4.

    :raises ValueError: it is neither, or has bits beyond its prefix.
    """
    if "%" in text:
        raise ValueError(f"{text!r} has a scope")
    host, colon, port = text.rpartition(":")
    if colon and port.isdigit() and is_address(host):
        raise ValueError(
            f"{text!r} may be an address, or one with a port: write brackets"
        )
    network = ipaddress.ip_network(text, strict=False)
    if network.version == 6:
        mapped = ipaddress.IPv6Interface(text).ip.ipv4_mapped
        if mapped is not None:
            length = network.prefixlen - _MAPPED
            if length < 0:
                raise ValueError(
                    f"{text!r} is v4-mapped, which takes a prefix from {_MAPPED} to"
                    " 128: write the IPv4 network"
                )
            return ipaddress.IPv4Network((mapped, length))
    # Strictly: bits beyond the prefix are a mistake.
    return ipaddress.ip_network(text)


def parse_rule(option: str, text: str, *, allow: bool) -> Rule:
    """A rule as it is written on a command line: CIDR or NAME, and maybe :PORTS.

    An IPv6 network with ports stands in brackets: `[2001:db8::/32]:443`.

    :raises ConfigError: it is none.
    """
    where, ports = text, ""
    if text.startswith("["):
        where, closed, ports = text[1:].partition("]")
        if not closed or (ports and not ports.startswith(":")) or "]" in ports:
            raise ConfigError(f"bad {option} {text!r}: {_EXPECTED}")
        with_ports, ports = bool(ports), ports[1:]
    elif text.count(":") == 1:
        where, _, ports = text.partition(":")
        with_ports = True
    else:
        with_ports = False
    ranges = _port_ranges(option, text, ports) if with_ports else ()
    try:
        return Rule(allow, parse_network(where), "", ranges, text)
    except ValueError as problem:
        why = problem
    digits = where.replace(".", "").isdigit()
    if text.startswith("[") or "/" in where or ":" in where or digits:
        raise ConfigError(f"bad {option} {text!r}: {why}")
    # A number that looks like a name, such as 0x7f.1, is none that clients can ask for.
    if where != "*" and not is_name(where.removeprefix("*.")):
        raise ConfigError(f"bad {option} {text!r}: {_EXPECTED}")
    return Rule(allow, None, where.lower().removesuffix("."), ranges, text)


def _port_ranges(option: str, text: str, ports: str) -> tuple[tuple[int, int], ...]:
    ranges = []
    if _PORTS.fullmatch(ports):
        for part in ports.split(","):
            low, _, high = part.partition("-")
            ranges.append((int(low), int(high or low)))
    if not ranges or not all(1 <= low <= high <= 65535 for low, high in ranges):
        raise ConfigError(
            f"bad {option} {text!r}: {ports!r} is not a list of ports such as 443,"
            " 80,443 or 8000-8999"
        )
    return tuple(ranges)


#: For so many seconds, and of so many hosts, `OwnHosts` knows what they are.
OWN_FOR, _OWN_HOSTS = 5.0, 1024


def stands_for(address: Ip) -> IPv4Address | None:
    """The IPv4 address that an IPv6 address carries, or None."""
    if address.version == 4 or address == _LOOPBACK6 or not int(address):
        return None
    for network, shift in _STAND_INS:
        if address in network:
            return IPv4Address(int(address) >> shift & 0xFFFFFFFF)
    return None


def is_own(address: Ip) -> bool:
    """Whether this machine has this address, now.

    Asked by binding to it, which the kernel allows for no other; but for a kernel
    that was told to allow it (`net.ipv4.ip_nonlocal_bind`), where the address counts
    as own if the way to it starts from itself.

    A guard must not fall because the kernel can't be asked: whatever it says but that
    it has no such address, the address counts as own.  No descriptor may be left for
    the question, no port (no port is bound where the kernel can do without), or a
    sandbox may be against it.
    """
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            with suppress(OSError):  # the kernel may be older, or not Linux
                probe.setsockopt(socket.IPPROTO_IP, _BIND_NO_PORT, 1)
            probe.bind((str(address), 0))
    except OSError as problem:
        return problem.errno not in _NOT_OWN
    if not _binds_anything(address.version):
        return True
    try:
        return str(address) == address_towards(address)
    except OSError as problem:
        # There always is a way to an address of one's own.
        return problem.errno != errno.ENETUNREACH


class OwnHosts:
    """Whether hosts are this machine, remembered for :data:`OWN_FOR` seconds.

    :param now: tells the time in seconds.
    :param own: tells the addresses of this machine.
    """

    def __init__(
        self, now: Callable[[], float], own: Callable[[Ip], bool] = is_own
    ) -> None:
        self._now = now
        self._own = own
        #: What was found, and until when it holds.
        self._known: dict[str, tuple[bool, float]] = {}

    def __call__(self, host: str) -> bool:
        """Ask for an address as text; what is none counts as own."""
        now = self._now
        known = self._known.get(host)
        if known is not None and now() < known[1]:
            return known[0]
        if len(self._known) >= _OWN_HOSTS:
            # The clients of a proxy may ask for any.
            self._known.clear()
        found = self._find(host)
        self._known[host] = found, now() + OWN_FOR
        return found

    def _find(self, host: str) -> bool:
        try:
            address = ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            return True
        address = getattr(address, "ipv4_mapped", None) or address
        # connect(2) takes an unspecified one for this machine.
        return address.is_loopback or address.is_unspecified or self._own(address)


def _binds_anything(version: int) -> bool:
    setting = f"/proc/sys/net/ipv{version}/ip_nonlocal_bind"
    try:
        return Path(setting).read_text().strip() != "0"
    except OSError:
        return False


def address_towards(address: Ip) -> str:
    """This machine's address on the way to another; nothing is sent.

    :raises OSError: there is no way.
    """
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        # The port is of no importance.
        probe.connect((str(address), 9))
        return str(probe.getsockname()[0])


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
        ip, never, guards, inner = _about(address)
        if never:
            raise Refused(f"{address} is {never}")
        if not (self.rules or self.guarded):
            return
        wanted = name.lower().removesuffix(".")
        self._judge(ip, guards, port, wanted, address)
        if inner:
            # It has passed as what it is; now as what it stands for.
            ip, never, guards, _ = _about(inner)
            self._judge(
                ip, guards, port, wanted, f"{address} stands for {inner}, which"
            )

    def _judge(
        self,
        ip: Ip,
        guards: Sequence[tuple[str, Network]],
        port: int,
        name: str,
        shown: str,
    ) -> None:
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
            if all(_speaks_of(rule, network) for _, network in guards):
                return
        if guards:
            kind, network = max(guards, key=lambda guard: guard[1].prefixlen)
            raise Refused(f"{shown} is {kind}: it takes --allow-dest {network}")


def _speaks_of(rule: Rule, guard: Network) -> bool:
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
