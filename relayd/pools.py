"""Pools of servers, how one is chosen and whether each is up, for programs."""

from relayd.core.check_grammar import (
    Check,
    HttpCheck,
    PythonCheck,
    TcpCheck,
    UdpCheck,
    parse_check,
)
from relayd.core.interfaces import ICounted, ISelector
from relayd.net.from_asyncio import from_asyncio
from relayd.net.upstream import Upstream
from relayd.stream.attempt import Attempt
from relayd.upstreams.balance import First, LeastSessions, RandomOfTwo, RoundRobin
from relayd.upstreams.check_kinds import Target, asks
from relayd.upstreams.checks import Checker
from relayd.upstreams.client_hash import ClientHash
from relayd.upstreams.flow_server import FlowServer
from relayd.upstreams.judging import CannotCheck, Schedule, Verdict
from relayd.upstreams.passive import Ejector, FailLimits
from relayd.upstreams.pool import Pool, Task
from relayd.upstreams.server import Server
from relayd.upstreams.slow_start import SlowStart

__all__ = [
    "Attempt",
    "CannotCheck",
    "Check",
    "Checker",
    "ClientHash",
    "Ejector",
    "FailLimits",
    "First",
    "FlowServer",
    "HttpCheck",
    "ICounted",
    "ISelector",
    "LeastSessions",
    "Pool",
    "PythonCheck",
    "RandomOfTwo",
    "RoundRobin",
    "Schedule",
    "Server",
    "SlowStart",
    "Target",
    "Task",
    "TcpCheck",
    "UdpCheck",
    "Upstream",
    "Verdict",
    "asks",
    "from_asyncio",
    "parse_check",
]
