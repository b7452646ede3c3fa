"""The rows of the table of settings for addresses and access, and the whole table.

Their grammars (endpoint addresses, networks, rules) are not part of the core, so they
are here and not in :mod:`relayd.core.settings`.  Most may be repeated, and their order
matters: the first rule that matches decides, and servers belong to the listener before
them.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from relayd.configuring.address_grammar import (
    Address,
    HostPort,
    PortRange,
    StreamAddress,
    UdpAddress,
    parse_destination,
    parse_listener,
    parse_range,
)
from relayd.core import process_settings
from relayd.core.networks import Network, parse_network
from relayd.core.relay_names import EXPECTED, check_name
from relayd.core.setting_types import Flag, Setting, Written
from relayd.core.settings import ACCESS, ADDRESSES, METRICS, TABLE
from relayd.preludes.socks4 import MAX_USER_ID
from relayd.socks.rules import Rule, parse_rule

#: What `twistd socks4` listens on by default.
SOCKS4_LISTENER = HostPort("127.0.0.1", 1080)


def _name(text: str) -> str:
    try:
        return check_name(text)
    except ValueError:
        raise ValueError(f"expected {EXPECTED}") from None


def _stream_listener(text: str, what: str = "SOCKS4") -> StreamAddress:
    where = parse_listener(text)
    if isinstance(where, UdpAddress):
        raise ValueError(f"{what} is not for datagrams")
    return where


def _listener(text: str) -> Address | PortRange:
    return parse_range(text, parse_listener)


def _destination(text: str) -> Address | PortRange:
    return parse_range(text, parse_destination)


_NETWORK = "an address or a network such as 192.168.0.0/16"


def _network(text: str) -> Network:
    try:
        return parse_network(text)
    except ValueError as problem:
        raise ValueError(f"{problem}; expected {_NETWORK}") from None


_USER_ID = f"1 to {MAX_USER_ID} bytes, none of them 0"


def _user_id(text: str) -> bytes:
    """A user id, as bytes for the wire."""
    encoded = os.fsencode(text)
    if not 0 < len(encoded) <= MAX_USER_ID or b"\0" in encoded:
        raise ValueError(f"expected {_USER_ID}")
    return encoded


_RULE = "CIDR or NAME, with :PORTS if it is about some ports only"

LISTEN = Setting[tuple[Address | PortRange, ...]](
    name="listen",
    type=Written("ADDRESS", _listener, "an address to listen on"),
    default=(),
    short="l",
    help="Address to listen on. Each opens a relay.",
    in_file="Where clients connect: an address, or a list of addresses.",
    kinds=("tcp", "udp"),
    group=ADDRESSES,
    field="relays",
    repeatable=True,
)
DEST = Setting[tuple[Address | PortRange, ...]](
    name="dest",
    type=Written("ADDRESS", _destination, "an address to connect to"),
    default=(),
    short="d",
    help="Server of the relay that the --listen before it opens; several are used in"
    " turn.",
    in_file="The server to relay to, or a list of servers, which are used in turn.",
    kinds=("tcp", "udp"),
    group=ADDRESSES,
    field="relays",
    repeatable=True,
)
NAME = Setting[tuple[str, ...]](
    name="name",
    type=Written("NAME", _name, EXPECTED),
    default=(),
    otherwise="relay1, relay2, ...",
    help="Name of the relay that the --listen after it opens.",
    kinds=("tcp", "udp"),
    group=ADDRESSES,
    field="relays",
    key="",
    repeatable=True,
)
SOCKS4_LISTEN = Setting[tuple[StreamAddress, ...]](
    name="listen",
    type=Written("ADDRESS", _stream_listener, "an address to listen on"),
    default=(SOCKS4_LISTENER,),
    otherwise=str(SOCKS4_LISTENER),
    short="l",
    help="Address to listen on; may be repeated.",
    in_file="Where clients connect: an address, or a list of addresses.",
    kinds=("socks4",),
    group=ADDRESSES,
    field="listeners",
    repeatable=True,
)
SOCKS4_NAME = Setting[str | None](
    name="name",
    type=Written("NAME", _name, EXPECTED),
    default=None,
    otherwise="relay1",
    help="Name of the proxy.",
    kinds=("socks4",),
    group=ADDRESSES,
    key="",
)
ALLOW_CLIENT = Setting[tuple[Network, ...]](
    name="allow-client",
    type=Written("CIDR", _network, _NETWORK),
    default=(),
    help="Serve clients of this address or network, and no others; may be repeated.",
    in_file="Serve the clients of these addresses and networks, and no others.",
    kinds=("socks4",),
    group=ACCESS,
    field="clients",
    repeatable=True,
    key="clients",
    word="allow",
)
ALLOW_DEST = Setting[tuple[Rule, ...]](
    name="allow-dest",
    type=Written("RULE", partial(parse_rule, "--allow-dest", allow=True), _RULE),
    default=(),
    help="Allow these destinations. With --deny-dest, the first rule that matches"
    " decides; may be repeated.",
    in_file="Rules for where clients may connect to. The first that matches decides; a"
    " destination that none matches is allowed.",
    kinds=("socks4",),
    group=ACCESS,
    field="rules",
    repeatable=True,
    key="destinations",
    word="allow",
)
DENY_DEST = Setting[tuple[Rule, ...]](
    name="deny-dest",
    type=Written("RULE", partial(parse_rule, "--deny-dest", allow=False), _RULE),
    default=(),
    help="Refuse these destinations; may be repeated.",
    kinds=("socks4",),
    group=ACCESS,
    field="rules",
    repeatable=True,
    key="destinations",
    word="deny",
)
USERID = Setting[tuple[bytes, ...]](
    name="userid",
    type=Written("NAME", _user_id, _USER_ID),
    default=(),
    help="Serve clients that send this user id, and no others; may be repeated. It"
    " proves nothing.",
    in_file="Serve clients that send one of these user ids, and no others. A user id"
    " proves nothing.",
    kinds=("socks4",),
    group=ACCESS,
    field="user_ids",
    repeatable=True,
    secret=True,
)

METRICS_ADDRESS = Setting[StreamAddress | None](
    name="metrics",
    type=Written(
        "ADDRESS", partial(_stream_listener, what="HTTP"), "an address to listen on"
    ),
    default=None,
    otherwise="none",
    help="Serve metrics (/metrics) and health (/livez, /readyz) by HTTP on this address"
    " of loopback, or unix:PATH.",
    kinds=("tcp", "udp", "socks4"),
    group=METRICS,
    process=True,
)

METRICS_OPEN = Setting[bool](
    name="metrics-open",
    type=Flag(),
    default=False,
    help="Let other machines reach --metrics.",
    kinds=("tcp", "udp", "socks4"),
    group=METRICS,
    process=True,
)

#: All settings.
ALL: tuple[Setting[Any], ...] = (
    *(LISTEN, DEST, NAME, SOCKS4_LISTEN, SOCKS4_NAME),
    *(ALLOW_CLIENT, ALLOW_DEST, DENY_DEST, USERID),
    *(METRICS_ADDRESS, METRICS_OPEN),
    *TABLE,
    *process_settings.TABLE,
)

#: The settings of `twistd relayd`, and of `twistd socks4`.
RELAYD = tuple(row for row in ALL if {"tcp", "udp"} & set(row.kinds))
SOCKS4 = tuple(row for row in ALL if "socks4" in row.kinds)
