"""Public names: what embedders import to open a UDP listener, and for servers that
clients choose themselves.
"""

from relayd.datagrams.original import OriginalServer
from relayd.datagrams.sockets import bind_udp

__all__ = ["OriginalServer", "bind_udp"]
