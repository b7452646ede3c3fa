"""Pools of servers, how one is chosen and whether each is up, for programs."""

from relayd.core.interfaces import ICounted, ISelector
from relayd.net.upstream import Upstream
from relayd.stream.attempt import Attempt
from relayd.upstreams.balance import First, LeastSessions, RandomOfTwo, RoundRobin
from relayd.upstreams.checks import Checker
from relayd.upstreams.client_hash import ClientHash
from relayd.upstreams.flow_server import FlowServer
from relayd.upstreams.judging import Schedule, Verdict
from relayd.upstreams.passive import Ejector, FailLimits
from relayd.upstreams.pool import Pool, Task
from relayd.upstreams.server import Server
from relayd.upstreams.slow_start import SlowStart

__all__ = [
    "Attempt",
    "Checker",
    "ClientHash",
    "Ejector",
    "FailLimits",
    "First",
    "FlowServer",
    "ICounted",
    "ISelector",
    "LeastSessions",
    "Pool",
    "RandomOfTwo",
    "RoundRobin",
    "Schedule",
    "Server",
    "SlowStart",
    "Task",
    "Upstream",
    "Verdict",
]
