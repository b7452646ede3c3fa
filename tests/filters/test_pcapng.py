"""Blocks of pcapng, byte by byte, as draft-ietf-opsawg-pcapng draws them."""

from __future__ import annotations

import struct

import pytest

import relayd
from relayd.filters import pcapng
from tests.support.captures import blocks_of, options_of, sections_of

WHEN = 1_700_000_000_123_456
HIGH, LOW = bytes.fromhex("240a0600"), bytes.fromhex("40222018")


def test_the_time_of_these_tests() -> None:
    assert struct.pack("<I", WHEN >> 32) == HIGH
    assert struct.pack("<I", WHEN & 0xFFFFFFFF) == LOW


def test_a_section() -> None:
    assert pcapng.section("abcde") == bytes.fromhex(
        "0a0d0d0a 2c000000"
        "4d3c2b1a 0100 0000 ffffffffffffffff"
        "0400 0500 6162636465 000000"
        "0000 0000"
        "2c000000"
    )


def test_an_interface() -> None:
    assert pcapng.interface("ab", "abcd") == bytes.fromhex(
        "01000000 28000000"
        "6500 0000 ffff0000"
        "0200 0200 6162 0000"
        "0300 0400 61626364"
        "0000 0000"
        "28000000"
    )


@pytest.mark.parametrize(
    ("headers", "payload", "size", "pad"),
    [
        (b"1234", b"", 4, b""),
        (b"1234", b"5", 5, bytes(3)),
        (b"1234", b"56", 6, bytes(2)),
        (b"123", b"4567", 7, bytes(1)),
    ],
)
def test_a_packet(headers: bytes, payload: bytes, size: int, pad: bytes) -> None:
    total = struct.pack("<I", 32 + size + len(pad))
    length = struct.pack("<I", size)
    assert pcapng.packet(WHEN, headers, payload) == b"".join(
        [
            bytes.fromhex("06000000") + total,
            bytes(4) + HIGH + LOW + length + length,
            headers + payload + pad,
            total,
        ]
    )


def test_a_packet_with_a_comment() -> None:
    assert pcapng.packet(WHEN, b"12345", b"", "abc") == b"".join(
        [
            bytes.fromhex("06000000 34000000"),
            bytes(4) + HIGH + LOW + bytes.fromhex("05000000 05000000"),
            b"12345" + bytes(3),
            bytes.fromhex("0100 0300 616263 00 0000 0000"),
            bytes.fromhex("34000000"),
        ]
    )


def test_statistics() -> None:
    started = bytes(4) + bytes.fromhex("07000000")
    assert pcapng.statistics(WHEN, 7, 300, 2, "ab") == b"".join(
        [
            bytes.fromhex("05000000 54000000 00000000") + HIGH + LOW,
            bytes.fromhex("0100 0200 6162 0000"),
            bytes.fromhex("0200 0800") + started,
            bytes.fromhex("0300 0800") + HIGH + LOW,
            bytes.fromhex("0400 0800 2c01000000000000"),
            bytes.fromhex("0500 0800 0200000000000000"),
            bytes.fromhex("0000 0000"),
            bytes.fromhex("54000000"),
        ]
    )
    [(kind, body)] = blocks_of(pcapng.statistics(WHEN, 7, 300, 2))
    assert kind == 5
    assert 1 not in options_of(body[12:])


def test_the_beginning_says_what_has_written_it() -> None:
    [section] = sections_of(pcapng.beginning("two words"))
    assert section.application == f"relayd {relayd.__version__}"
    assert section.description == "two words"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\x00\x1b[31m", "a\\nb\\x00\\x1b[31m"),
        ("é€", "é€"),
        ("\udcff", "\\udcff"),
        ("x" * 5000, "x" * pcapng.LONGEST_TEXT),
        # Never half a character.
        ("é" * 5000, "é" * (pcapng.LONGEST_TEXT // 2)),
        ("x" + "é" * 5000, "x" + "é" * (pcapng.LONGEST_TEXT // 2 - 1)),
    ],
)
def test_texts_are_printable_and_bounded(text: str, shown: str) -> None:
    [(_, body)] = blocks_of(pcapng.packet(0, b"1234", b"", text))
    assert options_of(body[24:])[1].decode() == shown


def test_a_capture_is_known_by_its_first_bytes() -> None:
    assert pcapng.is_capture(pcapng.section("x")[:4])
    assert not pcapng.is_capture(b"")
    assert not pcapng.is_capture(b"\xd4\xc3\xb2\xa1")  # an older format, libpcap's


def whole(data: bytes) -> bool:
    return pcapng.ends_whole(len(data), lambda count, at: data[at : at + count])


def test_a_capture_that_ends_in_a_block_is_told_from_a_whole_one() -> None:
    first = pcapng.beginning("x")
    data = first + pcapng.packet(WHEN, b"1234567890", b"", "comment")
    assert whole(data)
    for end in range(len(data)):
        ends = {0, len(pcapng.section(f"relayd {relayd.__version__}")), len(first)}
        assert whole(data[:end]) == (end in ends - {0}), end


def test_a_capture_of_the_other_byte_order_is_whole_as_well() -> None:
    total = struct.pack(">I", 28)
    head = b"\x0a\x0d\x0d\x0a" + total + struct.pack(">IHHq", 0x1A2B3C4D, 1, 0, -1)
    assert whole(head + total)
    assert not whole(head + total[::-1])


def test_one_that_gets_shorter_meanwhile_is_not_whole() -> None:
    assert not pcapng.ends_whole(64, lambda count, at: b"")
    data = pcapng.section("x")
    assert not pcapng.ends_whole(
        len(data), lambda count, at: data[at : at + count] if at > 20 else b""
    )
