"""Public names: what a program imports to make endpoints of addresses as people write
them."""

from relayd.configuring.address_grammar import (
    Address,
    EndpointString,
    HostPort,
    OriginalAddress,
    StreamAddress,
    UdpAddress,
    UnixPath,
    dialled_host,
    parse_destination,
    parse_listener,
)
from relayd.core.process_settings import Transport
from relayd.net.dial_options import DialOptions
from relayd.net.keepalive import Keepalive
from relayd.net.original import OriginalEndpoint, OriginalNameEndpoint
from relayd.operating.endpoints import (
    dialer,
    dialing_endpoint,
    listening_endpoint,
    on_plane,
    server_identity,
    watcher,
)

__all__ = [
    "Address",
    "DialOptions",
    "EndpointString",
    "HostPort",
    "Keepalive",
    "OriginalAddress",
    "OriginalEndpoint",
    "OriginalNameEndpoint",
    "StreamAddress",
    "Transport",
    "UdpAddress",
    "UnixPath",
    "dialer",
    "dialing_endpoint",
    "dialled_host",
    "listening_endpoint",
    "on_plane",
    "parse_destination",
    "parse_listener",
    "server_identity",
    "watcher",
]
