"""SOCKS4 and 4a on the wire: bytes to requests, replies to bytes.  No I/O.

A request, and what 4a adds to it when the address is 0.0.0.x with x not 0::

    04 CD port:2 address:4 USERID 00          CD: 1 CONNECT, 2 BIND
    04 CD port:2 00 00 00 x USERID 00 HOSTNAME 00

A reply, of which BIND has two::

    00 CODE port:2 address:4

Sources: the memo "SOCKS: A protocol for TCP proxy across firewalls" (SOCKS4.protocol)
and its extension "SOCKS 4A: A Simple Extension to SOCKS 4 Protocol".

:func:`read_request` is given all that has arrived so far, and returns a request, asks
for more, or refuses.  It reads at most :data:`MAX_REQUEST` bytes, and refuses at the
first wrong byte.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
from enum import IntEnum
from typing import NamedTuple

from relayd.core.names import is_address, is_name
from relayd.core.prelude import BadRequest
from relayd.preludes.spoken import protocol_of

#: The longest user id, and host name, in bytes.
MAX_USER_ID = 255
MAX_HOST = 255

#: The longest request, in bytes.
MAX_REQUEST = 8 + MAX_USER_ID + 1 + MAX_HOST + 1

REPLY_SIZE = 8


class Command(IntEnum):
    """What a client asks for."""

    CONNECT = 1
    BIND = 2


class Code(IntEnum):
    """What a reply says."""

    GRANTED = 90
    REJECTED = 91
    #: The client's host has no identd that answers.
    NO_IDENT = 92
    #: Its identd names another user.
    WRONG_IDENT = 93


class Request(NamedTuple):
    """What a client asked for.

    :ivar port: 1 to 65535, or 0 for BIND.
    :ivar address: dotted, or empty when there is a host name.
    :ivar host: 4a's host name as it was sent (ASCII, 1 to 255 characters), or empty.
        Either a valid name, or an IP address as text.
    :ivar user_id: up to 255 bytes, any but 0.
    """

    command: Command
    port: int
    address: str = ""
    host: str = ""
    user_id: bytes = b""

    @property
    def requested(self) -> str:
        """The host or address and the port, as text."""
        host = self.host or self.address
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


class Reply(NamedTuple):
    """A server's reply.  The code may be one that :class:`Code` lacks."""

    code: int
    address: str
    port: int


_COMMANDS = {command.value: command for command in Command}


def read_request(data: bytes) -> tuple[Request, int] | None:
    """Parse what has arrived from a client.

    :param data: everything since it connected.
    :return: the request and its length in bytes, or None: it is incomplete.
    :raises BadRequest: it is no request, and can't become one.
    """
    end = data.find(0, 8, 8 + MAX_USER_ID + 1)
    request = _read_start(data[:end]) if end >= 0 else None
    if request is None:
        # Wrong, or incomplete, when it may be wrong already.
        _check_start(data)
        if len(data) > 8 + MAX_USER_ID:
            raise BadRequest(f"a user id of more than {MAX_USER_ID} bytes")
        return None
    if request.address:
        return request, end + 1
    begin = end + 1
    end = data.find(0, begin, begin + MAX_HOST + 1)
    if end < 0:
        if len(data) > begin + MAX_HOST:
            raise BadRequest(f"a host name of more than {MAX_HOST} bytes")
        return None
    host = _host(data[begin:end])
    return request._replace(host=host), end + 1


# The same is asked for again and again: 7,000 of 224,000 instructions of a session.
@functools.lru_cache(maxsize=1024)
def _read_start(data: bytes) -> Request | None:
    """A request up to the end of its user id.

    :param data: without the 0 behind that.
    :return: it has neither address nor host if a host name follows; None: it is wrong.
    """
    command = _COMMANDS.get(data[1])
    port = data[2] << 8 | data[3]
    if data[0] != 4 or command is None or (not port and command is Command.CONNECT):
        return None
    packed = data[4:8]
    named = packed[:3] == b"\0\0\0" and packed[3] > 0
    address = "" if named else socket.inet_ntoa(packed)
    return Request(command, port, address, "", data[8:])


def _check_start(data: bytes) -> None:
    """Refuse a wrong byte among the first four, as far as they have arrived."""
    if data[:1] not in (b"", b"\x04"):
        if name := protocol_of(data):
            raise BadRequest(f"{name}, not SOCKS4")
        raise BadRequest(f"version {data[0]}, not 4")
    if len(data) > 1 and data[1] not in _COMMANDS:
        raise BadRequest(f"unknown command {data[1]}")
    # BIND may have port 0: the peer's port need not be known.
    if data[1:4] == b"\1\0\0":
        raise BadRequest("port 0")


def _host(name: bytes) -> str:
    if not name:
        raise BadRequest("an empty host name")
    if not name.isascii():
        raise BadRequest("a host name that is not ASCII")
    host = name.decode("ascii")
    if not (is_name(host) or is_address(host)):
        raise BadRequest(f"{host!r} is not a host name")
    return host


def write_reply(code: int, address: str = "0.0.0.0", port: int = 0) -> bytes:
    """The bytes of a reply.

    :param code: a :class:`Code`.
    :param address: an IPv4 address, which may be mapped into IPv6; other IPv6, which a
        reply can't contain, becomes 0.0.0.0.
    """
    numbers = address.removeprefix("::ffff:").split(".")
    # The kernel writes some other IPv6 addresses with dots too: ::192.0.2.1.
    dotted = len(numbers) == 4 and ":" not in numbers[0]
    packed = bytes(map(int, numbers)) if dotted else b"\0\0\0\0"
    return bytes((0, code)) + port.to_bytes(2) + packed


def write_request(
    command: Command, host: str, port: int, user_id: bytes = b""
) -> bytes:
    """The bytes of a request, for a client of another proxy.

    :param host: an IPv4 address, or, with 4a, a name or an IPv6 address.
    :param port: 1 to 65535; for BIND, the peer's port, which may be 0.
    :raises ValueError: a field can't be sent.
    """
    lowest = 0 if command == Command.BIND else 1
    if not lowest <= port <= 65535:
        raise ValueError(f"a port is {lowest} to 65535, not {port}")
    if len(user_id) > MAX_USER_ID or b"\0" in user_id:
        raise ValueError(f"not a user id: {user_id!r}")
    start = bytes((4, command)) + port.to_bytes(2)
    try:
        packed = ipaddress.IPv4Address(host).packed
    except ValueError:
        packed = b""
    # 0.0.0.x would mark a request of 4a.
    if packed and (packed[:3] != b"\0\0\0" or not packed[3]):
        return start + packed + user_id + b"\0"
    if not (is_name(host) or is_address(host)) or len(host) > MAX_HOST:
        raise ValueError(f"not a host name: {host!r}")
    return start + b"\0\0\0\x01" + user_id + b"\0" + host.encode("ascii") + b"\0"


def read_reply(data: bytes) -> Reply | None:
    """Parse the first :data:`REPLY_SIZE` bytes of what a proxy sent.

    :return: the reply, or None: it is incomplete.
    :raises BadRequest: it is no reply.
    """
    if data[:1] not in (b"", b"\0"):
        raise BadRequest(f"a reply of version {data[0]}, not 0")
    if len(data) < REPLY_SIZE:
        return None
    return Reply(data[1], socket.inet_ntoa(data[4:8]), int.from_bytes(data[2:4]))
