"""Public names: what a program imports to look names up."""

from relayd.net.resolving import Resolver, SocketAddress

__all__ = ["Resolver", "SocketAddress"]
