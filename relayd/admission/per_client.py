"""How limits of one client are written: who counts as one, and rates.

A host has a whole /64 of IPv6 to choose its addresses from (RFC 4291), so what is
counted are addresses, or networks of a size that can be chosen.
"""

from __future__ import annotations

import attrs

from relayd.core.setting_types import Count, Seconds

EXPECTED_PREFIX = "the lengths of two prefixes, of IPv4 and of IPv6, such as 24,56"

EXPECTED_RATE = "a number and seconds, such as 10/1, 100/60 or 1000/1h"


@attrs.frozen
class ClientPrefix:
    """The bits of an address that tell clients apart.

    :ivar ipv4: of an IPv4 address, 1 to 32.
    :ivar ipv6: of an IPv6 address, 1 to 128.
    """

    ipv4: int = 32
    ipv6: int = 64

    def __str__(self) -> str:
        return f"{self.ipv4},{self.ipv6}"


@attrs.frozen
class ConnectRate:
    """So many in so many seconds.

    :ivar count: at least 1.
    :ivar period: seconds, more than 0.
    """

    count: int
    period: float

    def __str__(self) -> str:
        return f"{self.count}/{Seconds().show(self.period)}"


def parse_prefix(text: str) -> ClientPrefix:
    """Two lengths.

    :raises ValueError: it is something else.
    """
    parts = text.split(",")
    if len(parts) == 2 and all(
        part.isascii() and part.isdigit() and len(part) <= 3 for part in parts
    ):
        ipv4, ipv6 = map(int, parts)
        if 1 <= ipv4 <= 32 and 1 <= ipv6 <= 128:
            return ClientPrefix(ipv4, ipv6)
    raise ValueError(f"expected {EXPECTED_PREFIX}")


def parse_rate(text: str) -> ConnectRate:
    """A number and seconds.

    :raises ValueError: it is something else, or one of them is not more than 0.
    """
    count, slash, period = text.partition("/")
    try:
        if slash:
            return ConnectRate(Count().parse(count), Seconds(never=False).parse(period))
    except ValueError:
        pass
    raise ValueError(f"expected {EXPECTED_RATE}; neither of them 0")
