"""Which server."""

from relayd.net.upstream import Upstream
from relayd.upstreams.pool import Pool, RoundRobin

__all__ = ["Pool", "RoundRobin", "Upstream"]
