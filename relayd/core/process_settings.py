"""The rows of the table of settings that are about the whole process.

See :mod:`relayd.core.settings`.  In a configuration file their keys stand at the top.
"""

from __future__ import annotations

from typing import Any, Literal

from relayd.core.number_types import MarkBit
from relayd.core.setting_types import (
    ALL_KINDS,
    STREAMS,
    Choice,
    Flag,
    OpenFiles,
    Seconds,
    Setting,
    Written,
    rows_in,
)
from relayd.core.settings import LOG, PROCESS, TIMEOUTS

#: Whose connections the short forms of addresses get: the plane's, Twisted's own, or
#: the plane's where it can be had.
Transport = Literal["auto", "plane", "twisted"]

#: What a line of the log looks like.
LogFormat = Literal["text", "json"]


#: What an access log is, for an error.
LOG_PATH = "a path, or - for standard output"


def _path(text: str) -> str:
    if not text or "\0" in text:
        raise ValueError("expected a path, or -")
    return text


DRAIN_TIMEOUT = Setting[float](
    name="drain-timeout",
    type=Seconds(),
    default=10.0,
    help="Time for sessions to finish when the relay stops, in which idle ones are"
    " ended little by little; 0 aborts all at once.",
    kinds=ALL_KINDS,
    group=TIMEOUTS,
    process=True,
)
SHUTDOWN_DELAY = Setting[float](
    name="shutdown-delay",
    type=Seconds(),
    default=0.0,
    help="Time for which a relay that was told to stop still accepts clients, so that"
    " balancers learn of it first; then sessions are drained.",
    kinds=ALL_KINDS,
    group=TIMEOUTS,
    process=True,
)
MAX_DESCRIPTORS = Setting[int | None](
    name="max-descriptors",
    type=OpenFiles(),
    default=None,
    otherwise="the hard limit",
    help="Limit of open files of the process (its soft limit); a session takes two, a"
    " flow one.",
    kinds=ALL_KINDS,
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
    kinds=ALL_KINDS,
    group=PROCESS,
    process=True,
)
MANAGE_NETFILTER = Setting[bool](
    name="manage-netfilter",
    type=Flag(),
    default=False,
    help="Install the rules of nftables, ip rules and routes that the relays need (see"
    " --intercept and --transparent), and remove them when they stop. Takes"
    " CAP_NET_ADMIN.",
    kinds=("tcp", "udp"),
    group=PROCESS,
    process=True,
)
NETFILTER_MARK = Setting[int](
    name="netfilter-mark",
    type=MarkBit(),
    default=0x1000,
    help="The bit of the firewall mark by which those rules know packets that are for"
    " this machine whatever their address; also the number of the routing table for"
    " them.",
    kinds=("tcp", "udp"),
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
    kinds=ALL_KINDS,
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
    help="Also log when a session opens, dials and connects, and sessions that their"
    " clients close before a byte has moved (health checks).",
    kinds=STREAMS,
    group=LOG,
    process=True,
)
QUIET = Setting[bool](
    name="quiet",
    type=Flag(),
    default=False,
    short="q",
    help="Log only sessions and flows that ended abnormally.",
    kinds=ALL_KINDS,
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
    kinds=ALL_KINDS,
    group=LOG,
    process=True,
)
LOG_FORMAT = Setting[LogFormat](
    name="log-format",
    type=Choice[LogFormat](LogFormat),
    default="text",
    help="Format of the log and the access log: text, or json, an object on each line"
    " with the keys of ECS and OpenTelemetry.",
    kinds=ALL_KINDS,
    group=LOG,
    process=True,
)
LOG_INTERVAL = Setting[float](
    name="log-interval",
    type=Seconds(),
    default=0.0,
    help="Also log sessions and flows that go on, with their totals so far, each time"
    " this interval has passed; 0 is off.",
    kinds=ALL_KINDS,
    group=LOG,
    process=True,
)

#: All of them, in the order of the help.
TABLE: tuple[Setting[Any], ...] = rows_in(globals())
