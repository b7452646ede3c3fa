"""What a route is written with, for those who write one."""

from relayd.core.errors import Refused
from relayd.core.prelude import BadRequest
from relayd.core.routing import Decision
from relayd.net.from_asyncio import from_asyncio
from relayd.routing.connection import Connection
from relayd.routing.router import Router

__all__ = [
    "BadRequest",
    "Connection",
    "Decision",
    "Refused",
    "Router",
    "from_asyncio",
]
