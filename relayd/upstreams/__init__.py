"""Pools: which server a session goes to."""

from relayd.net.upstream import Upstream
from relayd.upstreams.balance import RoundRobin
from relayd.upstreams.pool import Pool

__all__ = ["Pool", "RoundRobin", "Upstream"]
