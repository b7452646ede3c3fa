"""Packets as a TCP connection would have sent them, made up around relayed bytes.

A relay sees bytes, not packets: two connections end in it, and what the kernel did with
either is over.  For a capture the session is one connection between its client and its
server: a :class:`TcpStream` makes the IP and TCP headers of each packet, with sequence
numbers and checksums that agree.

Segments are as long as what is relayed in one piece, up to 32 KiB: a capture on a
machine whose network card cuts and joins segments looks the same.  Each is acknowledged
at once: to its sender, the kernel that received it has done so.

Sources: RFC 9293 (TCP), RFC 7323 (window scale), RFC 791 and RFC 8200 (IP), RFC 1071
(the checksum).
"""

from __future__ import annotations

import ipaddress
import struct
import zlib
from typing import NamedTuple

from relayd.core.filtering import Course

#: Bytes of one segment.  IP has a length for little less than 64 KiB, which is what is
#: read at once, mostly: in two halves, and not in one segment and a crumb.
LONGEST_SEGMENT = 1 << 15

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16

#: Of addresses that are made up: of clients that have none, and of servers (RFC 2544,
#: benchmarks; no host has them).
CLIENTS = ipaddress.ip_network("198.18.0.0/16")
SERVERS = ipaddress.ip_network("198.19.0.0/16")

# Both ends can take a gigabyte, so that no window is ever full: window scale 14.
_WINDOW = 65535
_OFFERS = struct.pack(">BBHBBBB", 2, 4, LONGEST_SEGMENT, 1, 3, 3, 14)

_WHOLE = (1 << 32) - 1

#: Bytes that are summed up at once: longer numbers take longer for each of their bytes.
_PIECE = 4096

_pack_ipv4 = struct.Struct(">HHIHH").pack
_pack_ipv6 = struct.Struct(">IHH").pack
_pack_tcp = struct.Struct(">HHIIHHHH").pack


class End(NamedTuple):
    """One end of a connection.

    :ivar host: an IPv4 or IPv6 address, packed.
    :ivar port: from 0 to 65535.
    """

    host: bytes
    port: int


def client_end(text: str, number: int) -> End:
    """The end of a client, whose address relayd writes as `text`.

    That of a UNIX socket, or of none, is made up.

    :param number: its session's, from 1 up: each has another address or port.
    """
    found = _parse(text)
    return made_up_client(number) if found is None else found


def made_up_client(number: int) -> End:
    """The end of a client that has no address."""
    page, port = divmod(number, 60000)
    return End((CLIENTS[1 + page % 65534]).packed, 1024 + port)


def server_end(text: str) -> End:
    """The end of a server, by its name or address as an operator writes it.

    A host's name gets a made-up address, always the same; what has no port gets one,
    too.
    """
    found = _parse(text)
    if found is not None:
        return found
    host, _, port = text.rpartition(":")
    number = _port(port)
    digest = zlib.crc32((text if number is None else host).encode("utf-8", "replace"))
    made_up = 1024 + digest % 60000
    return End(
        SERVERS[1 + digest % 65534].packed, made_up if number is None else number
    )


def _parse(text: str) -> End | None:
    """An end of an address and a port; None if it is none."""
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]").partition("%")[0]
    number = _port(port)
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        return None
    return None if number is None else End(address.packed, number)


def _port(text: str) -> int | None:
    # Of so few digits that reading them takes no time.
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        return None
    number = int(text)
    return number if number <= 65535 else None


def first_numbers(number: int) -> tuple[int, int]:
    """The sequence numbers that the two sides of a connection begin with.

    :param number: one that other connections between the same ends do not have; theirs
        are far away, so that a reader takes none for a part of another (RFC 6528).
    """
    scattered = number * 0x9E3779B97F4A7C15
    return scattered >> 32 & _WHOLE, scattered >> 24 & _WHOLE


def words_sum(data: bytes) -> int:
    """The sum of the 16-bit words of data, modulo 65535 (RFC 1071).

    That is the one's complement sum.  As 2**16 is 1 modulo 65535, a number of any
    length is the sum of its words, which Python's numbers are good at; the order of
    the bytes in a word makes no other difference than to swap those of the sum.
    """
    if len(data) <= _PIECE:
        total = int.from_bytes(data, "little")
    else:
        total, number = 0, int.from_bytes
        for at in range(0, len(data), _PIECE):
            total += number(data[at : at + _PIECE], "little")
    return (total % 65535 << 8) % 65535


class _Side:
    """One side of the connection, and the headers of what it sends.

    :ivar sequence: the number of the next byte that it sends.
    """

    def __init__(self, source: End, sink: End, sequence: int) -> None:
        self.sequence = sequence
        self._ports = source.port, sink.port
        self._hosts = source.host + sink.host
        # What each of its packets has in its checksums: addresses, ports, protocol 6.
        hosts = words_sum(self._hosts)
        self._tcp = hosts + 6 + source.port + sink.port + _WINDOW
        # The first words of an IPv4 header: version, "don't fragment", 64 hops, TCP.
        self._ipv4 = hosts + 0x4500 + 0x4000 + 0x4006
        self._is_ipv4 = len(source.host) == 4

    def headers(
        self, acked: int, flags: int, payload: bytes = b"", options: bytes = b""
    ) -> bytes:
        """Those of the next packet.

        :param acked: the next byte that is expected from the other side.
        """
        sequence = self.sequence
        flags |= 20 + len(options) << 10
        length = 20 + len(options) + len(payload)
        total = self._tcp + sequence + acked + flags + length
        if payload:
            total += words_sum(payload)
        if options:
            total += words_sum(options)
        tcp = _pack_tcp(
            *self._ports, sequence, acked, flags, _WINDOW, -total % 65535, 0
        )
        if self._is_ipv4:
            length += 20
            checksum = -(self._ipv4 + length) % 65535
            ip = _pack_ipv4(0x4500, length, 0x4000, 0x4006, checksum)
        else:
            ip = _pack_ipv6(0x60000000, length, 0x0640)
        return b"".join((ip, self._hosts, tcp, options))


class TcpStream:
    """The packets of one connection, in the order in which it is told what happens.

    :param client: where it comes from.
    :param server: where it leads to.  An IPv4 address on one side only is written as
        an IPv6 one (`::ffff:192.0.2.1`, RFC 4291).
    :param first: the number of the first byte of each side; see `first_numbers`.
    """

    def __init__(self, client: End, server: End, first: tuple[int, int]) -> None:
        if len(client.host) != len(server.host):
            client, server = _as_ipv6(client), _as_ipv6(server)
        self._up = _Side(client, server, first[0])
        self._down = _Side(server, client, first[1])

    def handshake(self) -> list[bytes]:
        """The three packets that it begins with."""
        up, down = self._up, self._down
        asked = up.headers(0, SYN, b"", _OFFERS)
        up.sequence = up.sequence + 1 & _WHOLE
        taken = down.headers(up.sequence, SYN | ACK, b"", _OFFERS)
        down.sequence = down.sequence + 1 & _WHOLE
        return [asked, taken, up.headers(down.sequence, ACK)]

    def segment(self, course: Course, payload: bytes) -> tuple[bytes, bytes]:
        """The headers of a segment, and the packet that acknowledges it.

        :param payload: at most LONGEST_SEGMENT bytes.
        """
        return self._sent(course, PSH | ACK, len(payload), payload)

    def finish(self, course: Course) -> tuple[bytes, bytes]:
        """A side has ended: that packet, and the one that acknowledges it."""
        return self._sent(course, FIN | ACK, 1)

    def reset(self, course: Course) -> bytes:
        """A side has reset the connection."""
        source, sink = self._both(course)
        return source.headers(sink.sequence, RST | ACK)

    def _both(self, course: Course) -> tuple[_Side, _Side]:
        up, down = self._up, self._down
        return (up, down) if course == "up" else (down, up)

    def _sent(
        self, course: Course, flags: int, length: int, payload: bytes = b""
    ) -> tuple[bytes, bytes]:
        source, sink = self._both(course)
        headers = source.headers(sink.sequence, flags, payload)
        source.sequence = source.sequence + length & _WHOLE
        return headers, sink.headers(source.sequence, ACK)


def _as_ipv6(end: End) -> End:
    if len(end.host) == 16:
        return end
    return End(bytes(10) + b"\xff\xff" + end.host, end.port)
