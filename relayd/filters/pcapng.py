"""pcapng: the blocks that a capture is made of, for Wireshark and its kin.

A capture is a section: a Section Header Block, an Interface Description Block, and then
a block for each packet.  Sections may follow each other in one file.  Everything here
is pure: from values to the bytes of one block, little-endian.

The packets begin with their IP header (LINKTYPE_RAW); times are microseconds since the
epoch, which is what readers take unless told otherwise.

Source: draft-ietf-opsawg-pcapng (the numbers in brackets are its sections); the link
type: https://www.tcpdump.org/linktypes.html.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import relayd

#: The link type of packets that begin with an IPv4 or IPv6 header.
LINKTYPE_RAW = 101

#: The longest packet: what IP has a length for.
LONGEST_PACKET = 65535

#: Bytes of the text of an option; a longer one is cut.
LONGEST_TEXT = 2048

# Block types.  That of a section reads the same in both byte orders.
SECTION, INTERFACE, STATISTICS, PACKET = 0x0A0D0D0A, 1, 5, 6

_BYTE_ORDER = 0x1A2B3C4D
_UNKNOWN_LENGTH = -1

# Options [3.5]: of any block, of a section, an interface, its statistics.
_END, _COMMENT = 0, 1
_APPLICATION = 4
_NAME, _DESCRIPTION = 2, 3
_STARTED, _ENDED, _RECEIVED, _DROPPED = 2, 3, 4, 5

_pack_head = struct.Struct("<II").pack
_pack_packet = struct.Struct("<IIIIIII").pack
_pack_length = struct.Struct("<I").pack
_pack_option = struct.Struct("<HH").pack
_PADS = (b"", b"\0\0\0", b"\0\0", b"\0")
_NO_OPTIONS = b""


def beginning(about: str) -> bytes:
    """What a capture of this program begins with: a section, and its interface.

    :param about: what is captured, in a line.
    """
    return section(f"relayd {relayd.__version__}") + interface("relayd", about)


def section(application: str) -> bytes:
    """A Section Header Block [4.1].

    :param application: what has written it, such as `relayd 1.0`.
    """
    head = struct.pack("<IHHq", _BYTE_ORDER, 1, 0, _UNKNOWN_LENGTH)
    return _block(SECTION, head, _options((_APPLICATION, _text(application))))


def interface(name: str, description: str) -> bytes:
    """An Interface Description Block [4.2]; the packets that follow are of it."""
    head = struct.pack("<HHI", LINKTYPE_RAW, 0, LONGEST_PACKET)
    options = _options((_NAME, _text(name)), (_DESCRIPTION, _text(description)))
    return _block(INTERFACE, head, options)


def packet(when: int, headers: bytes, payload: bytes = b"", comment: str = "") -> bytes:
    """An Enhanced Packet Block [4.3], of interface 0.

    :param when: microseconds since the epoch.
    :param headers: the first bytes of the packet.
    :param payload: those that follow.
    :param comment: what is shown with it.
    """
    size = len(headers) + len(payload)
    pad = _PADS[size & 3]
    options = _options((_COMMENT, _text(comment))) if comment else _NO_OPTIONS
    total = 32 + size + len(pad) + len(options)
    head = _pack_packet(PACKET, total, 0, when >> 32, when & 0xFFFFFFFF, size, size)
    return b"".join((head, headers, payload, pad, options, _pack_length(total)))


def statistics(
    when: int, started: int, received: int, dropped: int, comment: str = ""
) -> bytes:
    """An Interface Statistics Block [4.6], of interface 0.

    :param when: the time, and the end of the capture: microseconds since the epoch.
    :param started: when the capture began.
    :param received: how many packets there were.
    :param dropped: how many of these are missing.
    :param comment: what is shown with it.
    """
    options = _options(
        *([(_COMMENT, _text(comment))] if comment else []),
        (_STARTED, _time(started)),
        (_ENDED, _time(when)),
        (_RECEIVED, struct.pack("<Q", received)),
        (_DROPPED, struct.pack("<Q", dropped)),
    )
    return _block(STATISTICS, _pack_length(0) + _time(when), options)


def is_capture(head: bytes) -> bool:
    """Whether a file that begins so is a pcapng capture.

    :param head: its first four bytes.
    """
    return head == _pack_length(SECTION)


def ends_whole(size: int, read: Callable[[int, int], bytes]) -> bool:
    """Whether a capture ends with a whole block, of either byte order.

    One whose writer was killed may not; what is written behind it can't be read.  A
    block has its length at both ends.

    :param size: bytes of the capture.
    :param read: returns bytes of it: how many, and from where.
    """
    if size < 12 or size & 3:
        return False
    tail = read(4, size - 4)
    if len(tail) < 4:
        # Somebody has made it shorter.
        return False
    for order in "<>":
        (length,) = struct.unpack(f"{order}I", tail)
        if 12 <= length <= size and read(4, size - length + 4) == tail:
            return True
    return False


def _block(kind: int, head: bytes, options: bytes) -> bytes:
    total = 12 + len(head) + len(options)
    return _pack_head(kind, total) + head + options + _pack_length(total)


def _options(*options: tuple[int, bytes]) -> bytes:
    parts: list[bytes] = []
    for code, value in options:
        parts += (_pack_option(code, len(value)), value, _PADS[len(value) & 3])
    return b"".join((*parts, _pack_option(_END, 0)))


def _text(text: str) -> bytes:
    """UTF-8, of whole characters, and printable whatever it is."""
    shown = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
    cut = shown.encode("utf-8", "backslashreplace")[:LONGEST_TEXT]
    return cut.decode("utf-8", "ignore").encode()


def _time(when: int) -> bytes:
    return _pack_head(when >> 32, when & 0xFFFFFFFF)
