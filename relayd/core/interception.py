"""What the kernel is to bring to a relay, as an operator writes it.

A relay on a gateway accepts connections, or datagrams, that were meant for others.
An :class:`Intercept` says which: by the address and the port that they are sent to,
and, if need be, by the network that they are from and the interface they arrive at:

    192.0.2.1:80                        of one address, one port
    10.0.0.0/8:80,443,8000-8999         of a network, several ports
    [2001:db8::/32]:443                 IPv6, in brackets
    :80                                 of any address, IPv4 and IPv6
    [::/0]:*                            all of IPv6
    :53,from=10.1.0.0/16,interface=eth1,by=tproxy

Rules for nftables are made of it, which rewrite the destination (`by=redirect`:
REDIRECT or DNAT, which connection tracking remembers), or leave it as it is
(`by=tproxy`: TPROXY; Documentation/networking/tproxy.rst of Linux).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import attrs

from relayd.core.names import check_interface
from relayd.core.networks import BeyondPrefix, Ip, Network, parse_network

EXPECTED_INTERCEPT = (
    "an address or a network, with ports, such as 192.0.2.1:80, 10.0.0.0/8:80,443,"
    " [2001:db8::/32]:1-1023, :80 or :*, and ,from=NETWORK ,interface=NAME"
    " ,by=redirect or ,by=tproxy behind it"
)

#: The most ports and ranges of ports that one may list.
MAX_RANGES = 64

#: The interface of loopback.
LOOPBACK = "lo"

#: All ports, as they are written.
_ALL = "*"

_PORTS = re.compile(r"[0-9]{1,5}(?:-[0-9]{1,5})?(?:,[0-9]{1,5}(?:-[0-9]{1,5})?)*")
_OPTION = re.compile(r",(?=[a-z])")
_WAYS = {"redirect": False, "tproxy": True}

#: What ends or changes the name of an interface in the language of nftables.
_SPECIAL = frozenset('*"\\')

#: What stands before the name of a set there.
_SET = "@"


@attrs.frozen
class Intercept:
    """Connections, or datagrams, that the kernel is to bring to a relay.

    :ivar network: where they are sent to; None: anywhere, by IPv4 and IPv6.
    :ivar ports: the ranges of ports that they are sent to, ends included, in order and
        apart from each other; none: any port.
    :ivar source: where they are from; None: anywhere.
    :ivar interface: which they arrive at; None: any but that of loopback.
    :ivar tproxy: whether it is done by TPROXY; None: nobody said.
    """

    network: Network | None
    ports: tuple[tuple[int, int], ...]
    source: Network | None = None
    interface: str | None = None
    tproxy: bool | None = None

    @property
    def families(self) -> tuple[int, ...]:
        """The versions of IP that it is about: 4, 6 or both."""
        networks = (self.network, self.source)
        versions = {each.version for each in networks if each is not None}
        return tuple(sorted(versions)) or (4, 6)

    def about(self, host: Ip | None, port: int) -> bool:
        """Whether it may be about an address and a port.

        :param host: None: it is not known.
        """
        if self.ports and not any(low <= port <= high for low, high in self.ports):
            return False
        return host is None or self.network is None or host in self.network

    def meets(self, other: Intercept) -> bool:
        """Whether something may be for both: it is sent so that each of them has it."""
        named = {self.interface, other.interface} - {None}
        return (
            len(named) < 2
            and bool(set(self.families) & set(other.families))
            and _overlap(self.network, other.network)
            and _overlap(self.source, other.source)
            and self.meets_ports(other)
        )

    def meets_ports(self, other: Intercept) -> bool:
        """Whether they have a port in common."""
        # Of two ranges that overlap, one begins within the other.
        return (
            not (self.ports and other.ports)
            or any(other.about(None, low) for low, _ in self.ports)
            or any(self.about(None, low) for low, _ in other.ports)
        )

    def __str__(self) -> str:
        parts = [f"{_host(self.network)}:{_ports(self.ports)}"]
        if self.source is not None:
            parts.append(f"from={_bare(self.source)}")
        if self.interface is not None:
            parts.append(f"interface={self.interface}")
        if self.tproxy is not None:
            parts.append(f"by={'tproxy' if self.tproxy else 'redirect'}")
        return ",".join(parts)


def parse_intercept(text: str) -> Intercept:
    """What is written so; ports in order, and those that touch as one range.

    :raises ValueError: it is none; the message says what is expected.
    """
    where, *options = _OPTION.split(text)
    host, colon, ports = where.rpartition(":")
    if not colon:
        raise ValueError(f"expected {EXPECTED_INTERCEPT}")
    said: dict[str, str] = {}
    for each in options:
        name, equals, value = each.partition("=")
        if not equals or name not in ("from", "interface", "by"):
            raise ValueError(f"expected {EXPECTED_INTERCEPT}")
        if name in said:
            raise ValueError(f"{name} is given twice")
        said[name] = value
    found = Intercept(
        _parse_host(host),
        _parse_ports(ports),
        _parse_network(said["from"]) if "from" in said else None,
        _parse_interface(said["interface"]) if "interface" in said else None,
        _parse_way(said["by"]) if "by" in said else None,
    )
    if len(found.families) == 2 and (found.network or found.source):
        raise ValueError("it is from IPv4 to IPv6, or the other way: give one of them")
    near = any(each.is_loopback for each in (found.network, found.source) if each)
    if near and found.interface != LOOPBACK:
        raise ValueError(
            "what is for loopback, or from it, arrives there alone: add"
            f" interface={LOOPBACK},by=tproxy"
        )
    return found


def _parse_host(text: str) -> Network | None:
    if not text:
        return None
    inner = text.removeprefix("[").removesuffix("]")
    if text != inner and text != f"[{inner}]":
        raise ValueError(f"expected {EXPECTED_INTERCEPT}")
    if ":" in inner and inner == text:
        raise ValueError("write IPv6 in brackets, such as [2001:db8::1]:443")
    if ":" not in inner and inner != text:
        raise ValueError(f"expected {EXPECTED_INTERCEPT}")
    return _parse_network(inner)


def _parse_network(text: str) -> Network:
    try:
        network = parse_network(text)
    except BeyondPrefix:
        raise
    except ValueError:
        raise ValueError(
            f"{text!r} is no address and no network; expected {EXPECTED_INTERCEPT}"
        ) from None
    first = network.network_address
    if first.is_multicast or str(first) == "255.255.255.255":
        raise ValueError(f"{network} is not for one host: multicast and broadcast stay")
    if first.is_unspecified and _is_address(network):
        raise ValueError(
            f"{text!r} is no address of a host: write {first}/0 for all of them"
        )
    return network


def _parse_ports(text: str) -> tuple[tuple[int, int], ...]:
    if text == _ALL:
        return ()
    ranges = []
    if _PORTS.fullmatch(text):
        for part in text.split(","):
            low, _, high = part.partition("-")
            ranges.append((int(low), int(high or low)))
    if not ranges or not all(1 <= low <= high <= 65535 for low, high in ranges):
        raise ValueError(
            f"{text!r} is not a list of ports such as 443, 80,443 or 8000-8999, and"
            f" not {_ALL} for all"
        )
    if len(ranges) > MAX_RANGES:
        raise ValueError(f"more than {MAX_RANGES} ports: give ranges, or another one")
    return _merged(ranges)


def _merged(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges in order, of which none overlaps another or touches it."""
    found: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if found and low <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(high, found[-1][1])
        else:
            found.append((low, high))
    return tuple(found) if found != [(1, 65535)] else ()


def _parse_interface(text: str) -> str:
    check_interface(text)
    if _SPECIAL & set(text) or text.startswith(_SET):
        raise ValueError(f"no rule can name the interface {text!r}")
    return text


def _parse_way(text: str) -> bool:
    if text not in _WAYS:
        raise ValueError("expected by=redirect or by=tproxy")
    return _WAYS[text]


def _host(network: Network | None) -> str:
    if network is None:
        return ""
    return f"[{_bare(network)}]" if network.version == 6 else _bare(network)


def _overlap(one: Network | None, other: Network | None) -> bool:
    """Whether two networks have an address in common; None: it is all of them."""
    return one is None or other is None or one.overlaps(other)


def _bare(network: Network) -> str:
    """A network, or the address that it is alone."""
    return str(network.network_address if _is_address(network) else network)


def _is_address(network: Network) -> bool:
    return network.prefixlen == network.max_prefixlen


def _ports(ranges: tuple[tuple[int, int], ...]) -> str:
    return (
        ",".join(f"{low}-{high}" if high > low else f"{low}" for low, high in ranges)
        or _ALL
    )
