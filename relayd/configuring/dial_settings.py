"""The rows of the table of settings for how servers are dialled.

What they set on sockets: :mod:`relayd.net.dial_options`, :mod:`relayd.net.keepalive`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import attrs

from relayd.core.setting_types import ALL_KINDS, STREAMS, Count, Setting, Written
from relayd.core.settings import ADDRESSES, TIMEOUTS
from relayd.net.dial_options import (
    EXPECTED_INTERFACE,
    EXPECTED_SOURCE,
    MAX_MARK,
    check_interface,
    check_source,
)
from relayd.net.keepalive import EXPECTED_KEEPALIVE, Keepalive, parse_keepalive


@attrs.frozen
class Mark(Count):
    """A firewall mark: a number, which may be hexadecimal, as in `ip rule`."""

    maximum: int = MAX_MARK
    placeholder: ClassVar[str] = "MARK"

    def parse(self, text: str) -> int:
        digits = text.lower().removeprefix("0x")
        if digits != text.lower() and digits.isascii() and digits.isalnum():
            # Of so few digits that reading them takes no time.
            try:
                return self._checked(int(digits, 16) if len(digits) <= 8 else 0)
            except ValueError:
                raise ValueError(f"expected {self.describe()}") from None
        return super().parse(text)


SOURCE = Setting[tuple[str, ...]](
    name="source",
    type=Written("ADDRESS", check_source, EXPECTED_SOURCE),
    default=(),
    help="Dial servers from this address; may be given for IPv4 and for IPv6. If it is"
    " for one of them, servers of the other are not dialled.",
    kinds=ALL_KINDS,
    group=ADDRESSES,
    field="sources",
    repeatable=True,
)
INTERFACE = Setting[str | None](
    name="interface",
    type=Written("NAME", check_interface, EXPECTED_INTERFACE),
    default=None,
    otherwise="as the routes say",
    help="Dial servers by this interface only (SO_BINDTODEVICE).",
    kinds=ALL_KINDS,
    group=ADDRESSES,
)
MARK = Setting[int | None](
    name="mark",
    type=Mark(),
    default=None,
    otherwise="none",
    help="Firewall mark of connections and flows to servers (SO_MARK), as ip rule's"
    " fwmark, also 0x1f; takes CAP_NET_ADMIN.",
    kinds=ALL_KINDS,
    group=ADDRESSES,
)
KEEPALIVE = Setting[Keepalive | None](
    name="keepalive",
    type=Written("IDLE,INTERVAL,COUNT", parse_keepalive, EXPECTED_KEEPALIVE),
    default=None,
    otherwise=str(Keepalive()),
    help="TCP keepalive of both connections of a session: seconds without data before"
    " the first probe, seconds between probes, and unanswered probes after which a peer"
    " is lost.",
    kinds=STREAMS,
    group=TIMEOUTS,
)

#: All of them, in the order of the help.
TABLE: tuple[Setting[Any], ...] = (SOURCE, INTERFACE, MARK, KEEPALIVE)
