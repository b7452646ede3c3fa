"""The PROXY protocol on the wire: bytes to headers, addresses to bytes.  No I/O.

A balancer says with a header, before all else, whose connection it passes on.
Version 1 is a line, at most 107 bytes with its end::

    PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\n        (or TCP6, or UNKNOWN)

Version 2 is binary::

    signature:12  version:4 command:4  family:4 protocol:4  length:2
    source, destination: addresses, then ports (216 bytes of paths for UNIX sockets)
    type:1 length:2 value, as often as it fits: TLVs

Source: https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt, section 2.

:func:`read_header` is given all that has arrived so far, and returns a header, asks for
more, or refuses.  A header that names nobody (LOCAL, UNKNOWN, a family or a protocol
that is not a stream's) stands for the peer itself.  :func:`write_version_1` and
:func:`write_version_2` are what a relay says to its servers.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs

from relayd.core.addresses import host_of, socket_name
from relayd.core.escapes import one_word
from relayd.core.names import host_port
from relayd.core.networks import Network
from relayd.core.peers import Peers
from relayd.core.prelude import BadRequest, Introduction, Prelude

#: The most bytes of a header of version 1, with the end of its line.
LONGEST_1 = 107

#: The most bytes of TLVs.
LONGEST_TLVS = 4096

_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"

#: Before the addresses: the signature, two bytes, and the length of the rest.
_FIXED = 16

#: The commands: the balancer speaks for itself (a health check), or for a client.
_LOCAL, _PROXY = 0x20, 0x21

_UNSPECIFIED, _INET, _INET6, _UNIX = range(4)
_STREAM, _DATAGRAM = 1, 2

#: The most bytes of a path.
_PATH = 108

#: Bytes of addresses, by family.
_ADDRESSES = (0, 12, 36, 2 * _PATH)

#: The longest header.
LONGEST_2 = _FIXED + _ADDRESSES[_UNIX] + LONGEST_TLVS

# Types of TLVs (section 2.2).
_AUTHORITY, _CRC32C, _UNIQUE_ID, _NETNS = 0x02, 0x03, 0x05, 0x30

#: The most bytes of a unique id (section 2.2.5).
_LONGEST_ID = 128

_FAMILIES = {b"TCP4": socket.AF_INET, b"TCP6": socket.AF_INET6}


@attrs.frozen
class ProxyHeader:
    """What a header says.

    :ivar source: the client's address, as text; empty: the peer speaks for itself.
    :ivar destination: the address that the client reached; empty likewise.
    :ivar authority: the host that the client asked the balancer for (SNI).
    :ivar unique_id: what the balancer calls the connection, up to 128 bytes.
    :ivar netns: the namespace in which the balancer accepted it.
    """

    source: str = ""
    destination: str = ""
    authority: bytes = b""
    unique_id: bytes = b""
    netns: bytes = b""

    @property
    def facts(self) -> Mapping[str, object]:
        """What the log says of it besides the addresses, each without blanks."""
        return {
            name: shown(value)
            for name in ("authority", "unique_id", "netns")
            if (value := getattr(self, name))
        }


def shown(value: bytes) -> str:
    """Bytes that came from elsewhere as one word: as they are, or quoted.

    Those that are no text, as ids may be, are written as Python's bytes, so that they
    can be told from text and read back.
    """
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        return repr(value).replace(" ", "\\x20")
    return one_word(text, " '\"\\")


def read_header(data: bytes) -> tuple[ProxyHeader, int] | None:
    """Parse what has arrived from a balancer.

    :param data: everything since it connected.
    :return: the header and its length in bytes, or None: it is incomplete.
    :raises BadRequest: it is no header, and can't become one.
    """
    if data[:12] == _SIGNATURE:
        return _read_version_2(data)
    if data[:6] == b"PROXY ":
        return _read_version_1(data)
    if _SIGNATURE.startswith(data) or b"PROXY ".startswith(data):
        return None
    raise BadRequest("no PROXY header")


def _read_version_1(data: bytes) -> tuple[ProxyHeader, int] | None:
    end = data.find(b"\r\n", 0, LONGEST_1)
    if end < 0:
        if len(data) >= LONGEST_1:
            raise BadRequest(f"a PROXY header of more than {LONGEST_1} bytes")
        return None
    fields = data[:end].split(b" ")
    if fields[1] == b"UNKNOWN":
        # Whatever follows the word is to be ignored.
        return ProxyHeader(), end + 2
    family = _FAMILIES.get(fields[1])
    if family is None:
        raise BadRequest("a PROXY header that is not TCP4, TCP6 or UNKNOWN")
    if len(fields) != 6:
        raise BadRequest(
            "a PROXY header that is not two addresses and two ports, with one blank"
            " before each"
        )
    _, _, source, destination, source_port, destination_port = fields
    return (
        ProxyHeader(
            _name(family, _packed(family, source), _port(source_port)),
            _name(family, _packed(family, destination), _port(destination_port)),
        ),
        end + 2,
    )


def _packed(family: int, host: bytes) -> bytes:
    try:
        # It takes no leading zeros, no scope, and nothing but the whole address.
        return socket.inet_pton(family, host.decode("ascii"))
    except (OSError, ValueError):
        raise BadRequest(f"no address in its PROXY header: {host!r}") from None


def _port(digits: bytes) -> int:
    plain = (
        digits.isdigit() and len(digits) <= 5 and (digits[:1] != b"0" or digits == b"0")
    )
    if not plain or int(digits) > 65535:
        raise BadRequest(f"no port in its PROXY header: {digits!r}")
    return int(digits)


_MAPPED = bytes(10) + b"\xff\xff"


def _name(family: int, packed: bytes, port: int) -> str:
    """An address as text; an IPv4 one that is mapped into IPv6 is the former."""
    if packed.startswith(_MAPPED) and len(packed) == 16:
        family, packed = socket.AF_INET, packed[12:]
    return host_port(socket.inet_ntop(family, packed), port)


def _read_version_2(data: bytes) -> tuple[ProxyHeader, int] | None:
    if len(data) < _FIXED:
        return None
    command, kind, length = data[12], data[13], int.from_bytes(data[14:16])
    if command not in (_LOCAL, _PROXY):
        raise BadRequest(f"a PROXY header with version and command {command:#04x}")
    family, protocol = kind >> 4, kind & 15
    if command == _LOCAL:
        # Whatever family it names: that is to be ignored, too.
        family = _UNSPECIFIED
    elif family > _UNIX or protocol > _DATAGRAM:
        raise BadRequest(f"a PROXY header with family and protocol {kind:#04x}")
    begin = _FIXED + _ADDRESSES[family]
    end = _FIXED + length
    if end > (begin + LONGEST_TLVS if family else LONGEST_2):
        raise BadRequest(f"a PROXY header of {end} bytes")
    if len(data) < end:
        return None
    if not family or protocol != _STREAM:
        # The whole block is to be ignored.
        return ProxyHeader(), end
    if end < begin:
        raise BadRequest("a PROXY header that is too short for its addresses")
    source, destination = _addresses(family, data[_FIXED:begin])
    facts = _read_tlvs(data[:end], begin) if begin < end else {}
    return ProxyHeader(source, destination, **facts), end


def _addresses(family: int, block: bytes) -> tuple[str, str]:
    """Source and destination, as text."""
    if family == _UNIX:
        return socket_name(_path(block[:_PATH])), socket_name(_path(block[_PATH:]))
    kind, size = (socket.AF_INET, 4) if family == _INET else (socket.AF_INET6, 16)
    ports = 2 * size
    return (
        _name(kind, block[:size], int.from_bytes(block[ports : ports + 2])),
        _name(kind, block[size:ports], int.from_bytes(block[ports + 2 :])),
    )


def _path(field: bytes) -> bytes:
    """A socket's path; an abstract one begins with NUL (unix(7))."""
    return field.rstrip(b"\0") if field[:1] == b"\0" else field.partition(b"\0")[0]


_NAMES = {_AUTHORITY: "authority", _UNIQUE_ID: "unique_id", _NETNS: "netns"}


def _read_tlvs(header: bytes, begin: int) -> dict[str, bytes]:
    """The facts in a header's TLVs; those of types that say nothing here are skipped.

    :param begin: where they begin.
    """
    facts: dict[str, bytes] = {}
    checked = False
    while begin < len(header):
        value = begin + 3
        end = value + int.from_bytes(header[begin + 1 : value])
        if end > len(header):
            raise BadRequest("a PROXY header with a TLV beyond its end")
        kind = header[begin]
        if kind in _NAMES:
            facts[_NAMES[kind]] = header[value:end]
        elif kind == _CRC32C:
            if checked or end - value != 4:
                raise BadRequest("a PROXY header with no proper checksum")
            checked = True
            blank = header[:value] + bytes(4) + header[end:]
            if crc32c(blank) != int.from_bytes(header[value:end]):
                raise BadRequest("a PROXY header with a wrong checksum")
        begin = end
    if len(facts.get("unique_id", b"")) > _LONGEST_ID:
        raise BadRequest(f"a PROXY header with an id of more than {_LONGEST_ID} bytes")
    return facts


def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC = _crc_table()


def crc32c(data: bytes) -> int:
    """The checksum of RFC 4960, appendix B (Castagnoli)."""
    value = 0xFFFFFFFF
    for byte in data:
        value = value >> 8 ^ _CRC[(value ^ byte) & 255]
    return value ^ 0xFFFFFFFF


# -- what a relay expects of balancers, and says to its servers

#: What a balancer says first.
HEADER = Prelude("PROXY header", read_header)


def introduced_by(peers: Iterable[Network | str]) -> Introduction | None:
    """What is expected of these peers, whose clients a relay serves; None if of none.

    :param peers: networks or addresses; `unix` for those of UNIX sockets.
    :raises ValueError: one is neither.
    """
    found = Peers(peers)
    return Introduction(found, HEADER) if found else None


def preamble_of(version: str | None) -> Callable[[Any], bytes] | None:
    """What makes the header of a session for its server; None for no version.

    :raises ValueError: there is no such version.
    """
    if version is None:
        return None
    if version not in _WRITERS:
        raise ValueError(f"send_proxy is v1 or v2, not {version!r}")
    write = _WRITERS[version]

    def preamble(session: Any) -> bytes:
        header = session.header
        reached = "" if header is None else header.destination
        return write(session.client, reached or session.listener)

    return preamble


def nobody(version: str | None) -> bytes:
    """The header of a connection that is no client's: UNKNOWN, or LOCAL.

    :param version: `v1` or `v2`; None: no header.
    """
    return b"" if version is None else _WRITERS[version]("", "")


def write_version_1(client: str, reached: str) -> bytes:
    """A header of version 1.

    :param client: an address of a stream, as text (:mod:`relayd.core.addresses`).
    :param reached: the one that it connected to.
    :return: UNKNOWN where the two have no IP addresses.
    """
    family, source, destination = _common(client, reached)
    if not family:
        return b"PROXY UNKNOWN\r\n"
    ports = client.rpartition(":")[2], reached.rpartition(":")[2]
    line = f"PROXY TCP{4 if family == _INET else 6} {source} {destination}"
    return f"{line} {ports[0]} {ports[1]}\r\n".encode("ascii")


def write_version_2(client: str, reached: str, *, datagrams: bool = False) -> bytes:
    """A header of version 2.

    :param client: its address as text.
    :param reached: the one that it sent to.
    :param datagrams: they are addresses of datagrams.
    :return: LOCAL where the two have no IP addresses, as HAProxy does: the paths of
        UNIX sockets, or PROXY with no family, end the connection at HAProxy (2.6).
    """
    family, source, destination = _common(client, reached)
    if not family:
        return _SIGNATURE + bytes((_LOCAL, 0, 0, 0))
    kind = socket.AF_INET if family == _INET else socket.AF_INET6
    block = b"".join(
        (
            socket.inet_pton(kind, source),
            socket.inet_pton(kind, destination),
            int(client.rpartition(":")[2]).to_bytes(2),
            int(reached.rpartition(":")[2]).to_bytes(2),
        )
    )
    protocol = _DATAGRAM if datagrams else _STREAM
    kind_byte = family << 4 | protocol
    return _SIGNATURE + bytes((_PROXY, kind_byte)) + len(block).to_bytes(2) + block


_WRITERS: Mapping[str, Callable[[str, str], bytes]] = {
    "v1": write_version_1,
    "v2": write_version_2,
}


def _common(client: str, reached: str) -> tuple[int, str, str]:
    """A family of IP that both addresses have, and their hosts in it."""
    source, destination = host_of(client), host_of(reached)
    if not (source and destination):
        return _UNSPECIFIED, "", ""
    if ":" in source or ":" in destination:
        return _INET6, _as_ipv6(source), _as_ipv6(destination)
    return _INET, source, destination


def _as_ipv6(host: str) -> str:
    return host if ":" in host else f"::ffff:{host}"
