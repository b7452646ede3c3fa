"""The table of settings: each has one row, and its default stands nowhere else.

Those of relays are here, those of the whole process in
:mod:`relayd.core.process_settings`, and those whose values have a grammar of addresses,
networks or rules in :mod:`relayd.configuring.address_settings`, which has them all.

Whatever needs a default takes it from here (`IDLE_TIMEOUT.default`): the keywords of
the relays' factories, the settings' classes (:mod:`relayd.configuring.config`), the
benchmark.  The command lines, their help and what a file may have are made from the
rows, and README's tables are tested against them.

A new option is a row here, and a field of a class of :mod:`relayd.configuring.config`.
"""

from __future__ import annotations

from typing import Any

from relayd.core.setting_types import (
    ALL_KINDS,
    STREAMS,
    Count,
    Flag,
    IPv4,
    Ratio,
    Seconds,
    Setting,
    Size,
    Switch,
    rows_in,
)

#: The largest backlog; the kernel caps it further (net.core.somaxconn).
BACKLOG_LIMIT = 65535

#: The largest receive buffer, in bytes: the kernel doubles it, in an int.
RECEIVE_BUFFER_LIMIT = (1 << 30) - 1

#: The most handshakes, in all and of one client, unless more are asked for.
DEFAULT_HANDSHAKES, DEFAULT_HANDSHAKES_PER_CLIENT = 4096, 1024


#: The headings of the help, in its order.
ADDRESSES, SERVERS, ROUTES, ACCESS, TIMEOUTS, UDP, BINDS, LIMITS, *_ = GROUPS = (
    *("Addresses", "Servers", "Routes", "Access", "Timeouts (0 is never)", "UDP flows"),
    *("BIND", "Limits", "Filters", "Process", "Log", "Metrics and health", "Control"),
)
FILTERS = GROUPS[-5]
PROCESS, LOG, METRICS, CONTROL = GROUPS[-4:]

ENABLED = Setting[bool](
    name="enabled",
    type=Switch(),
    default=True,
    help="Whether the relay listens once the process runs; if not, it is stopped until"
    " somebody starts it.",
    kinds=ALL_KINDS,
    group=ADDRESSES,
)
HANDSHAKE_TIMEOUT = Setting[float](
    name="handshake-timeout",
    type=Seconds(),
    default=30.0,
    help="Time for a client to complete its handshake: PROXY header, TLS, SOCKS4"
    " request. No server is dialled before.",
    kinds=STREAMS,
    group=TIMEOUTS,
)
CONNECT_TIMEOUT = Setting[float](
    name="connect-timeout",
    type=Seconds(),
    default=10.0,
    help="Time to connect to a server, TLS handshake included.",
    kinds=STREAMS,
    group=TIMEOUTS,
)
STALL_TIMEOUT = Setting[float](
    name="stall-timeout",
    type=Seconds(),
    default=10.0,
    help="Abort a session when a peer takes none of the data that waits for it, or does"
    " not answer, for this time. A slow reader with a large receive buffer gets up to"
    " 25 seconds more.",
    kinds=STREAMS,
    group=TIMEOUTS,
)
IDLE_TIMEOUT = Setting[float](
    name="idle-timeout",
    type=Seconds(),
    default=3600.0,
    help="Idle timeout: abort a session after this time without data in either"
    " direction.",
    kinds=STREAMS,
    group=TIMEOUTS,
)
HALF_CLOSE_TIMEOUT = Setting[float](
    name="half-close-timeout",
    type=Seconds(),
    default=300.0,
    help="Idle timeout of a half-closed session: one side has ended its data, the other"
    " has not.",
    kinds=STREAMS,
    group=TIMEOUTS,
)
HALF_CLOSE = Setting[bool](
    name="half-close",
    type=Switch(),
    default=True,
    help="When one side ends its data, pass that on and relay the other direction until"
    " its own end; off: the first end closes both connections, once what was read is"
    " delivered.",
    kinds=STREAMS,
    group=TIMEOUTS,
)
USER_TIMEOUT = Setting[float](
    name="user-timeout",
    type=Seconds(),
    default=0.0,
    help="Have the kernel end a connection when data stays unacknowledged, or waits for"
    " a peer that takes none, for this time (TCP_USER_TIMEOUT); longer than"
    " --stall-timeout, which notices it first.",
    kinds=STREAMS,
    group=TIMEOUTS,
)
BIND_TIMEOUT = Setting[float](
    name="bind-timeout",
    type=Seconds(),
    default=120.0,
    help="Time for the peer of a BIND to connect.",
    kinds=("socks4",),
    group=TIMEOUTS,
)

UDP_TIMEOUT = Setting[float](
    name="udp-timeout",
    type=Seconds(never=False),
    default=300.0,
    help="Idle timeout of a UDP flow in use: datagrams went both ways, one of them more"
    " than 2 seconds after the first.",
    kinds=("udp",),
    group=UDP,
    field="timeout",
)
UDP_UNREPLIED_TIMEOUT = Setting[float](
    name="udp-unreplied-timeout",
    type=Seconds(never=False),
    default=30.0,
    help="Idle timeout of a UDP flow that is not in use; if it was answered, the"
    " shorter of the two timeouts.",
    kinds=("udp",),
    group=UDP,
    field="unreplied_timeout",
)
REFRESH_INBOUND = Setting[bool](
    name="refresh-inbound",
    type=Flag(),
    default=True,
    help="A server's datagrams restart the idle timeout of their flow, too.",
    off="Only a client's datagrams restart the idle timeout of a flow, not its"
    " server's.",
    kinds=("udp",),
    group=UDP,
)
MAX_FLOWS = Setting[int | None](
    name="max-flows",
    type=Count(),
    default=None,
    otherwise="what the limit of open files allows, and the kernel's range of ports"
    " unless the relay is transparent; 65,536 at most; shared by the UDP listeners",
    help="Limit of a listener's flows; at the limit, the flow that is not in use and"
    " was idle longest is evicted.",
    kinds=("udp",),
    group=UDP,
)
MAX_FLOWS_PER_CLIENT = Setting[int | None](
    name="max-flows-per-client",
    type=Count(),
    default=None,
    otherwise="half of --max-flows",
    help="Limit of the flows of one client address (IPv4 address or IPv6 /64).",
    kinds=("udp",),
    group=UDP,
)
REPLY_CAP = Setting[float](
    name="reply-cap",
    type=Ratio(),
    default=0.0,
    help="Limit of a flow's reply bytes, as a multiple of the bytes its client sent,"
    " against amplification; 0 is no limit.",
    kinds=("udp",),
    group=UDP,
)
UDP_RCVBUF = Setting[int](
    name="udp-rcvbuf",
    type=Size(RECEIVE_BUFFER_LIMIT),
    default=4 << 20,
    help="Receive buffer of a UDP listener; the kernel may grant less.",
    kinds=("udp",),
    group=UDP,
    field="receive_buffer",
)

OPEN = Setting[bool](
    name="open",
    type=Flag(),
    default=False,
    help="Serve every client that can reach the listener.",
    kinds=("socks4",),
    group=ACCESS,
)
IDENT = Setting[bool](
    name="ident",
    type=Flag(),
    default=False,
    help="Ask the client's host for its user id (RFC 1413), and refuse a client that"
    " sends another.",
    kinds=("socks4",),
    group=ACCESS,
)

BIND = Setting[bool](
    name="bind",
    type=Flag(),
    default=True,
    help="Serve BIND, with which a client waits for a server to connect to it (as FTP"
    " does).",
    off="Refuse BIND.",
    kinds=("socks4",),
    group=BINDS,
)
BIND_ANY = Setting[bool](
    name="bind-any",
    type=Flag(),
    default=False,
    help="Allow BIND for any peer (destination 0.0.0.0).",
    kinds=("socks4",),
    group=BINDS,
)
BIND_ADDRESS = Setting[str | None](
    name="bind-address",
    type=IPv4(),
    default=None,
    otherwise="this machine's address on the route to the peer",
    help="IPv4 address that BIND listens on.",
    kinds=("socks4",),
    group=BINDS,
)
EXTERNAL_ADDRESS = Setting[str | None](
    name="external-address",
    type=IPv4(),
    default=None,
    otherwise="the address that BIND listens on",
    help="IPv4 address that BIND's reply names, for peers behind address translation.",
    kinds=("socks4",),
    group=BINDS,
)

MAX_HANDSHAKES = Setting[int | None](
    name="max-handshakes",
    type=Count(),
    default=None,
    otherwise=f"a quarter of the limit of open files, at most {DEFAULT_HANDSHAKES}",
    help="Limit of clients in the handshake; at the limit, the oldest handshake is"
    " evicted.",
    kinds=("socks4",),
    group=LIMITS,
)
MAX_HANDSHAKES_PER_CLIENT = Setting[int | None](
    name="max-handshakes-per-client",
    type=Count(),
    default=None,
    otherwise=f"a quarter of --max-handshakes, at most {DEFAULT_HANDSHAKES_PER_CLIENT}",
    help="Limit of the handshakes of one client address (IPv4 address or IPv6 /64).",
    kinds=("socks4",),
    group=LIMITS,
)
MAX_BINDS = Setting[int](
    name="max-binds",
    type=Count(),
    default=256,
    help="Limit of clients that wait for the peer of a BIND; more are refused.",
    kinds=("socks4",),
    group=LIMITS,
)
MAX_BINDS_PER_CLIENT = Setting[int](
    name="max-binds-per-client",
    type=Count(),
    default=8,
    help="Limit of the clients of one address (IPv4 address or IPv6 /64) that wait for"
    " the peer of a BIND.",
    kinds=("socks4",),
    group=LIMITS,
)

MAX_DECIDING = Setting[int | None](
    name="max-deciding",
    type=Count(),
    default=None,
    otherwise=f"a quarter of the limit of open files, at most {DEFAULT_HANDSHAKES}",
    help="Limit of clients that a route has not decided about, or whose server name has"
    " not come; a quarter of it for one client address. At the limit, the one that"
    " waits longest is evicted.",
    kinds=("tcp",),
    group=LIMITS,
)
SERVER_SPEAKS_FIRST = Setting[bool](
    name="server-speaks-first",
    type=Flag(),
    default=False,
    help="The servers speak first (SMTP, MySQL), and clients say nothing before: a"
    " route is given no first bytes, and no server name.",
    kinds=("tcp",),
    group=ROUTES,
)

BACKLOG = Setting[int](
    name="backlog",
    type=Count(BACKLOG_LIMIT),
    default=4096,
    help="Limit of connections waiting to be accepted; the kernel may lower it"
    " (net.core.somaxconn).",
    kinds=STREAMS,
    group=PROCESS,
)

#: All rows that need no grammar but their own, in the order of the help.
TABLE: tuple[Setting[Any], ...] = rows_in(globals())
