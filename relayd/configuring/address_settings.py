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

from relayd.admission.client_rules import (
    EXPECTED_RULE,
    ClientRule,
    parse_client_rule,
)
from relayd.admission.hours import EXPECTED as EXPECTED_HOURS
from relayd.admission.hours import Hours, parse_hours
from relayd.admission.per_client import (
    EXPECTED_PREFIX,
    EXPECTED_RATE,
    ClientPrefix,
    ConnectRate,
    parse_prefix,
    parse_rate,
)
from relayd.configuring import (
    bandwidth_settings,
    control_settings,
    dial_settings,
    filter_settings,
    route_settings,
)
from relayd.configuring.address_grammar import (
    Address,
    HostPort,
    PortRange,
    StreamAddress,
    UdpAddress,
    parse_listener,
    parse_range,
)
from relayd.configuring.server_grammar import load_server, parse_server
from relayd.configuring.server_options import SendProxy
from relayd.core import (
    admission_settings,
    pool_settings,
    process_settings,
    settings,
)
from relayd.core.networks import UNIX, BeyondPrefix, Network, parse_network
from relayd.core.relay_names import EXPECTED, check_name
from relayd.core.setting_types import Choice, Flag, Setting, Written
from relayd.core.settings import ACCESS, ADDRESSES, LIMITS, METRICS, TABLE
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


class _Destination(Written[Any]):
    """A server's address, with options; in a file it may be a table."""

    def load(self, value: object) -> Any:
        if isinstance(value, dict):
            return load_server(value)
        return Written.load(self, value)


_PEERS = f"an address, a network such as 192.168.0.0/16, or {UNIX}"


def _peers(text: str) -> Network | str:
    try:
        return UNIX if text == UNIX else parse_network(text)
    except BeyondPrefix:
        raise
    except ValueError as problem:
        raise ValueError(f"{problem}; expected {_PEERS}") from None


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
    type=_Destination("ADDRESS", parse_server, "an address to connect to"),
    default=(),
    short="d",
    help="Server of the relay that the --listen before it opens; several are used in"
    " turn. original is where the client meant to go, as the kernel tells, and"
    " HOST:original that host, on the port that the client asked for.",
    in_file="The server to relay to, or a list of servers, which are used in turn."
    " original is where the client meant to go, as the kernel tells, and HOST:original"
    " that host, on the port that the client asked for.",
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
SEND_PROXY = Setting[SendProxy | None](
    name="send-proxy",
    type=Choice[SendProxy | None](SendProxy),
    default=None,
    otherwise="none",
    help="Tell servers first, with a PROXY header of this version, who the client is"
    " (v1, v2); of UDP, in each datagram (v2) or in the first of a flow (v2-first). A"
    " --dest can have its own: ,send-proxy=v2 behind its address.",
    kinds=("tcp", "udp", "socks4"),
    group=ADDRESSES,
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
ALLOW_CLIENT = Setting[tuple[ClientRule, ...]](
    name="allow-client",
    type=Written("RULE", partial(parse_client_rule, allow=True), EXPECTED_RULE),
    default=(),
    help="Serve these clients: an address, a network, the networks of @FILE (one a"
    " line, # begins a comment), or unix. With --deny-client, the first rule that"
    " matches decides; a client that none matches is served unless there is an"
    " --allow-client, as whoever says who may come means nobody else (--allow-dest"
    " lifts guards, and excludes nothing). May be repeated.",
    in_file="Rules for clients: allow or deny, and an address, a network, the networks"
    " of @FILE (one a line, # begins a comment), or unix. The first that matches"
    " decides; a client that none matches is served unless there is one that allows.",
    kinds=("tcp", "udp", "socks4"),
    group=ACCESS,
    field="clients",
    repeatable=True,
    key="clients",
    word="allow",
)
DENY_CLIENT = Setting[tuple[ClientRule, ...]](
    name="deny-client",
    type=Written("RULE", partial(parse_client_rule, allow=False), EXPECTED_RULE),
    default=(),
    help="Refuse these clients; may be repeated.",
    kinds=("tcp", "udp", "socks4"),
    group=ACCESS,
    field="clients",
    repeatable=True,
    key="clients",
    word="deny",
)
HOURS = Setting[tuple[Hours, ...]](
    name="hours",
    type=Written("HOURS", parse_hours, EXPECTED_HOURS),
    default=(),
    help="Serve new clients only then: days, times and a time zone, such as 'Mon-Fri"
    " 08:00-18:00 Europe/Berlin'; without days every day, without a zone UTC."
    " 22:00-06:00 goes over midnight. May be repeated: any of them will do.",
    kinds=("tcp", "udp", "socks4"),
    group=ACCESS,
    repeatable=True,
)
MAX_CONNECTS_PER_CLIENT = Setting[ConnectRate | None](
    name="max-connects-per-client",
    type=Written("NUMBER/SECONDS", parse_rate, EXPECTED_RATE),
    default=None,
    otherwise="none",
    help="Limit of the new sessions, or UDP flows, of one client address in so many"
    " seconds, such as 100/60; so many may come at once. See --client-prefix.",
    kinds=("tcp", "udp", "socks4"),
    group=LIMITS,
)
CLIENT_PREFIX = Setting[ClientPrefix | None](
    name="client-prefix",
    type=Written("BITS,BITS", parse_prefix, EXPECTED_PREFIX),
    default=None,
    otherwise=str(ClientPrefix()),
    help="How many bits of an IPv4 and of an IPv6 address tell clients apart, for"
    " --max-sessions-per-client, --max-connects-per-client and --bandwidth-per-client.",
    kinds=("tcp", "udp", "socks4"),
    group=LIMITS,
)
ACCEPT_PROXY = Setting[tuple[Network | str, ...]](
    name="accept-proxy",
    type=Written("NETWORK", _peers, _PEERS),
    default=(),
    help="Expect a PROXY header, version 1 or 2, from peers of this address or network"
    " (unix: of UNIX sockets), and serve the client that it names; others are served as"
    " themselves. May be repeated.",
    kinds=("tcp", "socks4"),
    group=ACCESS,
    repeatable=True,
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
    *(LISTEN, DEST, NAME, SEND_PROXY, SOCKS4_LISTEN, SOCKS4_NAME),
    *(ALLOW_CLIENT, DENY_CLIENT, ACCEPT_PROXY, ALLOW_DEST, DENY_DEST, USERID),
    *(HOURS, MAX_CONNECTS_PER_CLIENT, CLIENT_PREFIX, METRICS_ADDRESS, METRICS_OPEN),
    *pool_settings.TABLE,
    *admission_settings.TABLE,
    *bandwidth_settings.TABLE,
    *route_settings.TABLE,
    *TABLE,
    *dial_settings.TABLE,
    *filter_settings.TABLE,
    *process_settings.TABLE,
    *control_settings.TABLE,
)

#: What UDP relays have in place of a setting that is not for datagrams, by its key.
INSTEAD: dict[str, Setting[Any]] = {
    admission_settings.MAX_SESSIONS.key: settings.MAX_FLOWS,
    admission_settings.MAX_SESSIONS_PER_CLIENT.key: settings.MAX_FLOWS_PER_CLIENT,
    admission_settings.MAX_AGE.key: settings.UDP_TIMEOUT,
}

#: The settings of `twistd relayd`, and of `twistd socks4`.
RELAYD = tuple(row for row in ALL if {"tcp", "udp"} & set(row.kinds))
SOCKS4 = tuple(row for row in ALL if "socks4" in row.kinds)
