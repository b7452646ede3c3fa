"""What embedders import to open a UDP listener, by the name that they know it by."""

from relayd.datagrams.sockets import bind_udp

__all__ = ["bind_udp"]
