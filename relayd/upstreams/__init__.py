"""Pools: which server a session goes to."""

from relayd.net.upstream import Upstream
from relayd.upstreams.pool import Pool, RoundRobin

__all__ = ["Pool", "RoundRobin", "Upstream"]
