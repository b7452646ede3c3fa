"""The table of settings: each has one row, and its default stands nowhere else.

Whatever needs a default takes it from here (`IDLE_TIMEOUT.default`): the keywords of
the relays' factories, the settings' classes (:mod:`relayd.configuring.config`), the
benchmark.  What needs all rows reads :data:`TABLE`: the command lines and their help
are made from it, and README's tables are tested against it.

A new option is a row here, and a field of a class of :mod:`relayd.configuring.config`.
"""

from __future__ import annotations

from typing import Any, Literal

from relayd.core.setting_types import (
    Choice,
    Count,
    Flag,
    IPv4,
    Kind,
    Ratio,
    Seconds,
    Setting,
    Size,
    Written,
)

#: Whose connections the short forms of addresses get: the plane's, Twisted's own, or
#: the plane's where it can be had.
Transport = Literal["auto", "plane", "twisted"]

#: What a line of the log looks like.
LogFormat = Literal["text", "json"]

#: The largest backlog; the kernel caps it further (net.core.somaxconn).
BACKLOG_LIMIT = 65535

#: The largest receive buffer, in bytes: the kernel doubles it, in an int.
RECEIVE_BUFFER_LIMIT = (1 << 30) - 1

#: The most handshakes, in all and of one client, unless more are asked for.
DEFAULT_HANDSHAKES, DEFAULT_HANDSHAKES_PER_CLIENT = 4096, 1024

_STREAMS: tuple[Kind, ...] = ("tcp", "socks4")
_ALL: tuple[Kind, ...] = ("tcp", "udp", "socks4")

#: The headings of the help, in its order.
ADDRESSES, ACCESS, TIMEOUTS, UDP, BINDS, LIMITS, PROCESS, LOG, METRICS = GROUPS = (
    *("Addresses", "Access", "Timeouts (0 is never)", "UDP flows", "BIND", "Limits"),
    *("Process", "Log", "Metrics and health"),
)

#: What an access log is, for an error.
LOG_PATH = "a path, or - for standard output"


def _path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("expected a path, or -")
    return text


HANDSHAKE_TIMEOUT = Setting[float](
    name="handshake-timeout",
    type=Seconds(),
    default=30.0,
    help="Time for a client to complete its handshake: PROXY header, TLS, SOCKS4"
    " request. No server is dialled before.",
    kinds=_STREAMS,
    group=TIMEOUTS,
)
CONNECT_TIMEOUT = Setting[float](
    name="connect-timeout",
    type=Seconds(),
    default=10.0,
    help="Time to connect to a server, TLS handshake included.",
    kinds=_STREAMS,
    group=TIMEOUTS,
)
STALL_TIMEOUT = Setting[float](
    name="stall-timeout",
    type=Seconds(),
    default=10.0,
    help="Abort a session when a peer takes none of the data that waits for it, or does"
    " not answer, for this time. A slow reader with a large receive buffer gets up to"
    " 25 seconds more.",
    kinds=_STREAMS,
    group=TIMEOUTS,
)
IDLE_TIMEOUT = Setting[float](
    name="idle-timeout",
    type=Seconds(),
    default=3600.0,
    help="Idle timeout: abort a session after this time without data in either"
    " direction.",
    kinds=_STREAMS,
    group=TIMEOUTS,
)
HALF_CLOSE_TIMEOUT = Setting[float](
    name="half-close-timeout",
    type=Seconds(),
    default=300.0,
    help="Idle timeout of a half-closed session: one side has ended its data, the other"
    " has not.",
    kinds=_STREAMS,
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
DRAIN_TIMEOUT = Setting[float](
    name="drain-timeout",
    type=Seconds(),
    default=10.0,
    help="Time for sessions to finish when the relay stops, in which idle ones are"
    " ended little by little; 0 aborts all at once.",
    kinds=_ALL,
    group=TIMEOUTS,
    process=True,
)
SHUTDOWN_DELAY = Setting[float](
    name="shutdown-delay",
    type=Seconds(),
    default=0.0,
    help="Time for which a relay that was told to stop still accepts clients, so that"
    " balancers learn of it first; then sessions are drained.",
    kinds=_ALL,
    group=TIMEOUTS,
    process=True,
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
    otherwise="what the limit of open files and the kernel's range of ports allow,"
    " shared by the UDP listeners",
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

BACKLOG = Setting[int](
    name="backlog",
    type=Count(BACKLOG_LIMIT),
    default=4096,
    help="Limit of connections waiting to be accepted; the kernel may lower it"
    " (net.core.somaxconn).",
    kinds=_STREAMS,
    group=PROCESS,
)
MAX_DESCRIPTORS = Setting[int | None](
    name="max-descriptors",
    type=Count(1_000_000_000),
    default=None,
    otherwise="the hard limit",
    help="Limit of open files of the process (its soft limit): two for a session, one"
    " for a flow.",
    kinds=_ALL,
    group=PROCESS,
    process=True,
)
TRANSPORT = Setting[Transport](
    name="transport",
    type=Choice[Transport](Transport),
    default="auto",
    help="Implementation of connections: plane (relayd's own, Linux only, half the"
    " CPU), twisted, or auto (plane if it is available). Endpoint strings always have"
    " Twisted's.",
    kinds=_ALL,
    group=PROCESS,
    process=True,
)
CONFIG = Setting[str | None](
    name="config",
    type=Written("FILE", _path, "a file, a folder, or - for standard input"),
    default=None,
    otherwise="none",
    short="c",
    help="Read settings and relays from this TOML file, from the *.toml of this folder"
    " in the order of their names, or as JSON from standard input (-). Other options"
    " override what it says.",
    kinds=("tcp", "udp"),
    group=PROCESS,
    process=True,
    key="",
)
PRINT_CONFIG = Setting[bool](
    name="print-config",
    type=Flag(),
    default=False,
    help="Print what the command line says as a configuration file, and exit.",
    kinds=_ALL,
    group=PROCESS,
    process=True,
    key="",
)
DEMO = Setting[bool](
    name="demo",
    type=Flag(),
    default=False,
    help="Relay 127.0.0.1:8080 to a file server of the current folder.",
    kinds=("tcp",),
    group=PROCESS,
    process=True,
)

VERBOSE = Setting[bool](
    name="verbose",
    type=Flag(),
    default=False,
    short="v",
    help="Also log when a session opens, dials and connects, and those that end without"
    " a byte, by their clients alone: health checks.",
    kinds=_STREAMS,
    group=LOG,
    process=True,
)
QUIET = Setting[bool](
    name="quiet",
    type=Flag(),
    default=False,
    short="q",
    help="Log only sessions and flows that ended abnormally.",
    kinds=_ALL,
    group=LOG,
    process=True,
)
ACCESS_LOG = Setting[str | None](
    name="access-log",
    type=Written("PATH", _path, LOG_PATH),
    default=None,
    otherwise="where the log goes",
    help="Write the lines of sessions and flows to this file; - is standard output."
    " Reopened on SIGUSR1.",
    kinds=_ALL,
    group=LOG,
    process=True,
)
LOG_FORMAT = Setting[LogFormat](
    name="log-format",
    type=Choice[LogFormat](LogFormat),
    default="text",
    help="Format of the log and the access log: text, or json, an object on each line"
    " with the keys of ECS and OpenTelemetry.",
    kinds=_ALL,
    group=LOG,
    process=True,
)
LOG_INTERVAL = Setting[float](
    name="log-interval",
    type=Seconds(),
    default=0.0,
    help="Also log sessions and flows that go on, with their totals so far, each time"
    " that they have lasted so long again; 0 is off.",
    kinds=_ALL,
    group=LOG,
    process=True,
)


#: All rows that need no grammar but their own, in the order of the help.
TABLE: tuple[Setting[Any], ...] = tuple(
    each for each in list(globals().values()) if isinstance(each, Setting)
)
