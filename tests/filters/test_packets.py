"""Made-up packets: headers byte by byte, sums, sequence numbers, ends."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.filters import pcapng
from relayd.filters.packets import (
    LONGEST_SEGMENT,
    End,
    TcpStream,
    client_end,
    first_numbers,
    made_up_client,
    server_end,
    words_sum,
)
from tests.support.captures import Packet, Section, Stream, sections_of, streams_of

A = End(bytes([192, 0, 2, 1]), 1000)
B = End(bytes([192, 0, 2, 2]), 80)
A6 = End(ipaddress.IPv6Address("2001:db8::1").packed, 1000)


def read(*packets: bytes | tuple[bytes, bytes]) -> Section:
    """What a reader finds, which checks lengths and checksums."""
    blocks = [
        pcapng.packet(0, *((each,) if isinstance(each, bytes) else each))
        for each in packets
    ]
    [section] = sections_of(pcapng.beginning("x") + b"".join(blocks))
    return section


def one(*packets: bytes | tuple[bytes, bytes]) -> Stream:
    [stream] = streams_of(read(*packets))
    return stream


def test_the_first_packet_byte_by_byte() -> None:
    [asked, _, _] = TcpStream(A, B, (0x01020304, 5)).handshake()
    assert asked == bytes.fromhex(
        # IPv4: 48 bytes, not to be fragmented, 64 hops, TCP; checksum, addresses.
        "45 00 0030 0000 4000 40 06 b6c4 c0000201 c0000202"
        # TCP: ports, sequence, nothing acknowledged, SYN, window, checksum.
        "03e8 0050 01020304 00000000 7002 ffff 7d83 0000"
        # The longest segment; a window scale of 14.
        "0204 8000 01 03030e"
    ), asked.hex()


def test_a_handshake() -> None:
    asked, taken, last = read(*TcpStream(A, B, (7, 90)).handshake()).packets
    there = (("192.0.2.1", 1000), ("192.0.2.2", 80))
    assert asked == Packet(0, "", there, 7, 0, 2, 65535, b"")
    assert taken == Packet(0, "", there[::-1], 90, 8, 18, 65535, b"")
    assert last == Packet(0, "", there, 8, 91, 16, 65535, b"")


def test_ipv6() -> None:
    stream = TcpStream(A6, A6._replace(port=80), (7, 90))
    sent = stream.handshake()
    headers, acknowledged = stream.segment("up", b"abc")
    found = one(*sent, (headers, b"abc"), acknowledged)
    assert found.client == ("2001:db8::1", 1000)
    assert found.said == (b"abc", b"")


@pytest.mark.parametrize(("client", "server"), [(A, A6), (A6, A)])
def test_addresses_of_two_kinds(client: End, server: End) -> None:
    found = one(*TcpStream(client, server, (7, 90)).handshake())
    assert {found.client, found.server} == {
        ("::ffff:192.0.2.1", 1000),
        ("2001:db8::1", 1000),
    }


def test_data_is_acknowledged_and_a_side_that_has_ended_is_answered() -> None:
    stream = TcpStream(A, B, (7, 90))
    sent: list[bytes | tuple[bytes, bytes]] = [*stream.handshake()]
    for course, data in ("up", b"question"), ("down", b"answer"):
        headers, acknowledged = stream.segment(course, data)  # type: ignore[arg-type]
        sent += [(headers, data), acknowledged]
    sent += stream.finish("up")
    headers, acknowledged = stream.segment("down", b", and more")
    sent += [(headers, b", and more"), acknowledged, *stream.finish("down")]
    found = one(*sent)
    assert found.said == (b"question", b"answer, and more")
    assert found.finished == ["up", "down"]
    assert found.acked == found.next
    flags = [each.flags for each in read(*sent).packets]
    assert flags == [2, 18, 16, 24, 16, 24, 16, 17, 16, 24, 16, 17, 16]


@pytest.mark.parametrize("course", ["up", "down"])
def test_a_reset(course: str) -> None:
    stream = TcpStream(A, B, (7, 90))
    found = one(*stream.handshake(), stream.reset(course))  # type: ignore[arg-type]
    assert found.reset == course


@pytest.mark.parametrize("before", range(6))
def test_sequence_numbers_wrap(before: int) -> None:
    """Wherever 2**32 falls: in the handshake, in data, at the end."""
    first = (1 << 32) - 1 - before, (1 << 32) - 2 - before
    stream = TcpStream(A, B, first)
    sent: list[bytes | tuple[bytes, bytes]] = [*stream.handshake()]
    for _ in range(2):
        for course in ("up", "down"):
            headers, acknowledged = stream.segment(course, b"ab")
            sent += [(headers, b"ab"), acknowledged]
    found = one(*sent, *stream.finish("down"), *stream.finish("up"))
    assert found.said == (b"abab", b"abab")
    assert found.acked == found.next == {"up": 5 - before, "down": 4 - before} or (
        before == 5 and found.next == {"up": 0, "down": (1 << 32) - 1}
    )


def test_the_longest_segment() -> None:
    data = bytes(range(256)) * (LONGEST_SEGMENT // 256)
    for ends in (A, B), (A6, B):
        stream = TcpStream(*ends, (7, 90))
        sent = stream.handshake()
        headers, acknowledged = stream.segment("down", data)
        assert one(*sent, (headers, data), acknowledged).said == (b"", data)


# -- sums


def naive(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    return total % 65535


@given(st.binary(max_size=300), st.integers(0, 9000))
def test_sums_are_those_of_the_words(data: bytes, zeros: int) -> None:
    """Of any length, odd ones as well, and of several pieces."""
    for each in (data, data + bytes(zeros) + data, b"\xff" * zeros + data):
        assert words_sum(each) == naive(each)


def test_a_sum_of_nothing_but_ones() -> None:
    """The one case in which 0 and 65535 are to be told apart: a reader takes both."""
    stream = TcpStream(A, B, (7, 90))
    sent = stream.handshake()
    for ends in range(0x10000):
        # Some of these make the sum a multiple of 65535.
        data = struct.pack(">H", ends)
        if ends % 4099 == 0:
            headers, acknowledged = stream.segment("up", data)
            sent += [headers + data, acknowledged]
    assert one(*sent).said[0]


# -- ends


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("192.0.2.7:80", "192.0.2.7", 80),
        ("[2001:db8::7]:443", "2001:db8::7", 443),
        ("[fe80::1%eth0]:22", "fe80::1", 22),
        ("192.0.2.7:0", "192.0.2.7", 0),
    ],
)
def test_ends_that_are_addresses(text: str, host: str, port: int) -> None:
    end = End(ipaddress.ip_address(host).packed, port)
    assert server_end(text) == client_end(text, 1) == end


@pytest.mark.parametrize(
    "text",
    [
        *("", "-", ":", "unix:", "unix:/run/x", "unix:192.0.2.1:99999", "[::1]"),
        *("192.0.2.7", "192.0.2.7:", "192.0.2.7:-1", "192.0.2.7:65536"),
        *("192.0.2.7:\u0661", "192.0.2.7:" + "1" * 5000, "db.example:5432", "\udcff:1"),
        *("1.2.3:4", "tls:db.example:5432"),
    ],
)
def test_ends_that_are_made_up(text: str) -> None:
    client, server = client_end(text, 1), server_end(text)
    assert client == made_up_client(1) == End(bytes([198, 18, 0, 1]), 1025)
    assert server == server_end(text)
    assert server.host[:2] == bytes([198, 19])
    assert 0 < server.port < 65536


def test_a_name_keeps_its_port_and_two_names_are_two_hosts() -> None:
    assert server_end("db.example:5432").port == 5432
    assert server_end("db.example:5432").host != server_end("web.example:5432").host
    assert server_end("db.example:5432").host == server_end("db.example:1").host


def test_made_up_clients_differ() -> None:
    numbers = [*range(1, 70_000), 60_000 * 65_533, 1 << 31]
    ends = {made_up_client(each) for each in numbers}
    assert len(ends) == len(numbers)
    assert all(each.port >= 1024 for each in ends)


def test_first_numbers_are_far_from_each_other() -> None:
    """A reader tells connections between the same ends apart by them."""
    found = [
        first_numbers((1_700_000_000_000_000 + each << 20) + each)
        for each in range(500)
    ]
    for side in 0, 1:
        ordered = sorted(each[side] for each in found)
        assert len(set(ordered)) == len(ordered)
        assert ordered[-1] - ordered[0] > 1 << 31
