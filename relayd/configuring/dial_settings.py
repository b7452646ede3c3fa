"""The rows of the table of settings for how servers are dialled, and what is brought
to a relay to be.

What they set on sockets: :mod:`relayd.net.dial_options`, :mod:`relayd.net.keepalive`.
What is brought: :mod:`relayd.core.interception`.
"""

from __future__ import annotations

from typing import Any

from relayd.core.interception import EXPECTED_INTERCEPT, Intercept, parse_intercept
from relayd.core.names import EXPECTED_INTERFACE, check_interface
from relayd.core.number_types import Mark
from relayd.core.setting_types import (
    ALL_KINDS,
    STREAMS,
    Flag,
    Setting,
    Written,
    rows_in,
)
from relayd.core.settings import ADDRESSES, TIMEOUTS
from relayd.net.dial_options import EXPECTED_SOURCE, check_source
from relayd.net.keepalive import EXPECTED_KEEPALIVE, Keepalive, parse_keepalive

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
TRANSPARENT = Setting[bool](
    name="transparent",
    type=Flag(),
    default=False,
    help="Dial servers from the client's own address, and for UDP from its port, too."
    " Their answers must come by this machine, and rules of netfilter deliver them here"
    " (relayctl netfilter, or --manage-netfilter). Takes CAP_NET_RAW.",
    kinds=("tcp", "udp"),
    group=ADDRESSES,
)
_REST = (
    ", by rules of netfilter (relayctl netfilter shows and applies them, or"
    " --manage-netfilter does). A network, or nothing, may stand for the address, ports"
    " and ranges, or *, for the port. Behind it ,from=NETWORK and ,interface=NAME leave"
    " other clients out; ,by=redirect or ,by=tproxy says by which kind of rule. May be"
    " repeated."
)
INTERCEPT = Setting[tuple[Intercept, ...]](
    name="intercept",
    type=Written("WHAT", parse_intercept, EXPECTED_INTERCEPT),
    default=(),
    help="Have the kernel bring to the --listen before it what clients send to this"
    f" address and port, such as 192.0.2.1:80{_REST}",
    in_file="Have the kernel bring to the listener what clients send to this address"
    f" and port, such as 192.0.2.1:80{_REST}",
    kinds=("tcp", "udp"),
    group=ADDRESSES,
    field="intercepts",
    repeatable=True,
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
TABLE: tuple[Setting[Any], ...] = rows_in(globals())
