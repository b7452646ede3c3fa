"""Reads captures: a small parser of pcapng and of TCP, which shares nothing with ours.

It is strict: what a reader might forgive is an error here.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Any

import attrs

FIN, SYN, RST, ACK = 1, 2, 4, 16


def blocks_of(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The kinds and the bodies of a capture's blocks."""
    at = 0
    while at < len(data):
        kind, length = struct.unpack_from("<II", data, at)
        assert length % 4 == 0
        assert 12 <= length <= len(data) - at
        assert struct.unpack_from("<I", data, at + length - 4) == (length,)
        yield kind, data[at + 8 : at + length - 4]
        at += length


def options_of(data: bytes) -> dict[int, bytes]:
    """The options at the end of a block."""
    found: dict[int, bytes] = {}
    at = 0
    while at < len(data):
        code, length = struct.unpack_from("<HH", data, at)
        at += 4
        if not code:
            assert not length
            assert at == len(data)
            return found
        found[code] = data[at : at + length]
        padded = length + -length % 4
        assert not any(data[at + length : at + padded])
        at += padded
    assert not found, "options without their end"
    return found


@attrs.define
class Packet:
    """A packet.

    :ivar when: microseconds since the epoch.
    :ivar ends: source and sink: hosts and ports.
    """

    when: int
    comment: str
    ends: tuple[tuple[str, int], tuple[str, int]]
    sequence: int
    acked: int
    flags: int
    window: int
    payload: bytes


@attrs.define
class Section:
    """A section, with what it has.

    :ivar statistics: the options of its last Interface Statistics Block, and its
        `time`.
    """

    application: str = ""
    description: str = ""
    packets: list[Packet] = attrs.field(factory=list)
    statistics: dict[Any, Any] = attrs.field(factory=dict)


def sections_of(data: bytes) -> list[Section]:
    """The sections of a capture of raw IP packets."""
    found: list[Section] = []
    interfaces = 0
    for kind, body in blocks_of(data):
        if kind == 0x0A0D0D0A:
            assert body[:16] == struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1)
            found.append(Section(options_of(body[16:])[4].decode()))
            interfaces = 0
        elif kind == 1:
            interfaces += 1
            assert body[:8] == struct.pack("<HHI", 101, 0, 65535)
            found[-1].description = options_of(body[8:])[3].decode()
        elif kind == 5:
            assert body[:4] == bytes(4)
            found[-1].statistics = {
                "time": _time(body[4:]),
                **options_of(body[12:]),
            }
        else:
            assert kind == 6
            assert interfaces == 1
            found[-1].packets.append(_packet(body))
    return found


def _time(data: bytes) -> int:
    high, low = struct.unpack_from("<II", data)
    return int(high) << 32 | int(low)


def _packet(body: bytes) -> Packet:
    number, _, _, kept, whole = struct.unpack_from("<IIIII", body)
    assert not number
    assert kept == whole <= 65535
    data, rest = body[20 : 20 + kept], body[20 + kept + -kept % 4 :]
    comment = options_of(rest).get(1, b"").decode()
    if data[0] >> 4 == 4:
        assert struct.unpack_from(">H", data, 2) == (len(data),)
        assert data[8] > 1
        assert data[9] == 6
        assert _summed(data[:20]) == 0xFFFF
        hosts, tcp = data[12:20], data[20:]
    else:
        assert data[0] >> 4 == 6
        assert struct.unpack_from(">H", data, 4) == (len(data) - 40,)
        assert data[6] == 6
        hosts, tcp = data[8:40], data[40:]
    assert _summed(hosts + struct.pack(">II", 6, len(tcp)) + tcp) == 0xFFFF
    source, sink, sequence, acked, flags, window = struct.unpack_from(">HHIIHH", tcp)
    half = len(hosts) // 2
    ends = (
        (_shown(hosts[:half]), source),
        (_shown(hosts[half:]), sink),
    )
    payload = tcp[(flags >> 12) * 4 :]
    when = _time(body[4:])
    return Packet(when, comment, ends, sequence, acked, flags & 63, window, payload)


def _shown(host: bytes) -> str:
    """An address as text, v4-mapped ones the same on every Python."""
    family = socket.AF_INET if len(host) == 4 else socket.AF_INET6
    return socket.inet_ntop(family, host)


def _summed(data: bytes) -> int:
    """The one's complement sum, word by word."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@attrs.define
class Stream:
    """A connection as its packets tell it.

    :ivar client: the end that has begun it; the other one is its server.
    :ivar up: what the client has sent, and `down`, the server: pieces of bytes, and
        None for bytes that are missing.
    :ivar finished: the directions that have ended, in their order.
    :ivar reset: the direction of its RST; empty: there is none.
    :ivar comments: of its packets.
    """

    client: tuple[str, int]
    server: tuple[str, int]
    up: list[bytes | None] = attrs.field(factory=list)
    down: list[bytes | None] = attrs.field(factory=list)
    finished: list[str] = attrs.field(factory=list)
    reset: str = ""
    comments: list[str] = attrs.field(factory=list)
    times: list[int] = attrs.field(factory=list)
    #: The next byte of either side, and what the other one has acknowledged of it.
    next: dict[str, int] = attrs.field(factory=dict)
    acked: dict[str, int] = attrs.field(factory=dict)

    @property
    def said(self) -> tuple[bytes, bytes]:
        """What both have sent; nothing is missing."""
        return b"".join(self.up), b"".join(self.down)  # type: ignore[arg-type]

    def add(self, packet: Packet) -> None:
        assert not self.reset, "a packet behind the reset"
        self.times.append(packet.when)
        if packet.comment:
            self.comments.append(packet.comment)
        course = "up" if packet.ends[0] == self.client else "down"
        other = "down" if course == "up" else "up"
        if packet.flags & SYN:
            assert course not in self.next
            assert not packet.payload
            self.next[course] = packet.sequence + 1 & 0xFFFFFFFF
        gap = packet.sequence - self.next[course] & 0xFFFFFFFF
        said: list[bytes | None] = getattr(self, course)
        if not packet.flags & SYN and gap:
            assert gap < 1 << 31, "bytes that were sent already"
            said.append(None)
        if packet.payload:
            assert course not in self.finished
            said.append(packet.payload)
        if packet.flags & ACK:
            self.acked[other] = packet.acked
            assert packet.acked - self.next[other] & 0xFFFFFFFF < 1 << 31
        if not packet.flags & SYN:
            length = len(packet.payload) + (packet.flags & FIN)
            self.next[course] = packet.sequence + length & 0xFFFFFFFF
        if packet.flags & FIN:
            self.finished.append(course)
        if packet.flags & RST:
            self.reset = course


def streams_of(section: Section) -> list[Stream]:
    """The connections of a section, in the order in which they begin."""
    found: list[Stream] = []
    living: dict[Any, Stream] = {}
    for packet in section.packets:
        source, sink = packet.ends
        if packet.flags & (SYN | ACK) == SYN:
            stream = Stream(source, sink)
            living[source, sink] = living[sink, source] = stream
            found.append(stream)
        living[packet.ends].add(packet)
    return found
