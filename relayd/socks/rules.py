"""Rules about destinations, as an operator writes them.

Rules are read in order and the first that matches decides; what none matches is
allowed.  A rule names a network or a host name, and ports if it is about some only.
A rule with a name is about requests for that name; a rule with a network is about
each address, however it was asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import attrs

from relayd.core.errors import ConfigError
from relayd.core.names import is_name
from relayd.core.networks import Ip, Network, parse_network

_PORTS = re.compile(r"[0-9]{1,5}(-[0-9]{1,5})?(,[0-9]{1,5}(-[0-9]{1,5})?)*")

_EXPECTED = (
    "expected CIDR[:PORTS] or NAME[:PORTS], such as 10.0.0.0/8 or *.example.com:443"
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
