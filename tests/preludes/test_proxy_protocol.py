"""PROXY headers, byte by byte: what is one, what is none, and what is written."""

from __future__ import annotations

import ipaddress
import socket
import struct
from ast import literal_eval
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proxyprotocol.result import (
    ProxyResultIPv4,
    ProxyResultIPv6,
    ProxyResultLocal,
)
from proxyprotocol.tlv import ProxyProtocolTLV
from proxyprotocol.v1 import ProxyProtocolV1
from proxyprotocol.v2 import ProxyProtocolV2

from relayd.core.names import host_port
from relayd.core.prelude import BadRequest
from relayd.preludes.proxy_protocol import (
    LONGEST_1,
    LONGEST_2,
    LONGEST_TLVS,
    ProxyHeader,
    crc32c,
    introduced_by,
    nobody,
    preamble_of,
    read_header,
    shown,
    write_version_1,
    write_version_2,
)

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"

V1 = b"PROXY TCP4 192.0.2.9 192.0.2.10 1234 80\r\n"
V1_6 = b"PROXY TCP6 2001:db8::9 2001:DB8:0::a 1234 80\r\n"
NAMED = ProxyHeader("192.0.2.9:1234", "192.0.2.10:80")
NAMED_6 = ProxyHeader("[2001:db8::9]:1234", "[2001:db8::a]:80")


def version_2(kind: int, block: bytes, command: int = 0x21) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, kind, len(block)) + block


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


INET = socket.inet_aton("192.0.2.9") + socket.inet_aton("192.0.2.10") + b"\x04\xd2\0P"
INET6 = (
    socket.inet_pton(socket.AF_INET6, "2001:db8::9")
    + socket.inet_pton(socket.AF_INET6, "2001:db8::a")
    + b"\x04\xd2\0P"
)
UNIX = b"/run/client".ljust(108, b"\0") + b"/run/x y".ljust(108, b"\0")

#: Headers, and what they say.
HEADERS = [
    (V1, NAMED),
    (V1_6, NAMED_6),
    (b"PROXY TCP6 ::ffff:192.0.2.9 ::ffff:192.0.2.10 1234 80\r\n", NAMED),
    (
        b"PROXY TCP4 0.0.0.0 255.255.255.255 0 65535\r\n",
        ProxyHeader("0.0.0.0:0", "255.255.255.255:65535"),
    ),
    (b"PROXY UNKNOWN\r\n", ProxyHeader()),
    (b"PROXY UNKNOWN what ever\r\n", ProxyHeader()),
    (b"PROXY UNKNOWN " + b"x" * 91 + b"\r\n", ProxyHeader()),
    (version_2(0x11, INET), NAMED),
    (version_2(0x21, INET6), NAMED_6),
    (version_2(0x31, UNIX), ProxyHeader("unix:/run/client", "unix:/run/x\\x20y")),
    (
        version_2(0x31, b"\0name".ljust(216, b"\0")),
        ProxyHeader("unix:\\x00name", "unix:"),
    ),
    # It speaks for itself, whatever the block says.
    (version_2(0x11, INET, 0x20), ProxyHeader()),
    (version_2(0x00, b"", 0x20), ProxyHeader()),
    (version_2(0x11, b"short", 0x20), ProxyHeader()),
    (version_2(0xFF, b"whatever", 0x20), ProxyHeader()),
    (version_2(0x00, bytes(LONGEST_2 - 16), 0x20), ProxyHeader()),
    # No family, no stream: as if nothing was said.
    (version_2(0x00, b"whatever"), ProxyHeader()),
    (version_2(0x12, INET), ProxyHeader()),
    (version_2(0x10, INET), ProxyHeader()),
    (
        version_2(
            0x11, INET + tlv(2, b"example.com") + tlv(5, b"id 1") + tlv(4, b"--")
        ),
        ProxyHeader("192.0.2.9:1234", "192.0.2.10:80", b"example.com", b"id 1"),
    ),
    (
        version_2(0x21, INET6 + tlv(0x30, b"ns1") + tlv(0xEA, b"\0") + tlv(2, b"")),
        ProxyHeader("[2001:db8::9]:1234", "[2001:db8::a]:80", netns=b"ns1"),
    ),
    (version_2(0x11, INET + tlv(0x04, bytes(LONGEST_TLVS - 3))), NAMED),
    (version_2(0x31, UNIX + tlv(0x04, bytes(LONGEST_TLVS - 3))), None),
]

NOT_FOUR = (
    "a PROXY header that is not two addresses and two ports, with one blank before each"
)

#: What is none, and the reason that the log gives.
WRONG = [
    (b"GET / HTTP/1.0\r\n\r\n", "no PROXY header"),
    (b"PROXT", "no PROXY header"),
    (b"proxy TCP4 ", "no PROXY header"),
    (SIGNATURE[:11] + b"x", "no PROXY header"),
    (b"\n", "no PROXY header"),
    (b"PROXY TCP9 a\r\n", "a PROXY header that is not TCP4, TCP6 or UNKNOWN"),
    (b"PROXY \r\n", "a PROXY header that is not TCP4, TCP6 or UNKNOWN"),
    (
        b"PROXY TCP4 192.0.2.9 192.0.2.10 1234\r\n",
        NOT_FOUR,
    ),
    (
        b"PROXY TCP4 192.0.2.9 192.0.2.10 1234 80 \r\n",
        NOT_FOUR,
    ),
    (b"PROXY UNKNOWN " + b"x" * 93, "a PROXY header of more than 107 bytes"),
    (b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n", "a PROXY header of more than 107 bytes"),
    (
        b"PROXY TCP4 a.b 192.0.2.10 1234 80\r\n",
        "no address in its PROXY header: b'a.b'",
    ),
    (b"PROXY TCP4  192.0.2.10 1234 80\r\n", "no address in its PROXY header: b''"),
    (b"PROXY TCP4 192.0.2.9  192.0.2.10 1234 80\r\n", NOT_FOUR),
    (
        b"PROXY  TCP4 192.0.2.9 192.0.2.10 1234 80\r\n",
        "a PROXY header that is not TCP4, TCP6 or UNKNOWN",
    ),
    (
        b"PROXY TCP4 192.0.2.010 192.0.2.10 1234 80\r\n",
        "no address in its PROXY header: b'192.0.2.010'",
    ),
    (
        b"PROXY TCP4 192.0.2 192.0.2.10 1234 80\r\n",
        "no address in its PROXY header: b'192.0.2'",
    ),
    (b"PROXY TCP4 192.0.2.9 ::1 1234 80\r\n", "no address in its PROXY header: b'::1'"),
    (
        b"PROXY TCP6 fe80::1%lo ::1 1234 80\r\n",
        "no address in its PROXY header: b'fe80::1%lo'",
    ),
    (b"PROXY TCP6 \xff ::1 1234 80\r\n", "no address in its PROXY header: b'\\xff'"),
    (
        b"PROXY TCP4 192.0.2.9 192.0.2\0.1 1 80\r\n",
        "no address in its PROXY header: b'192.0.2\\x00.1'",
    ),
    (
        b"PROXY TCP4 192.0.2.9 192.0.2.10 65536 80\r\n",
        "no port in its PROXY header: b'65536'",
    ),
    (
        b"PROXY TCP4 192.0.2.9 192.0.2.10 1234 -80\r\n",
        "no port in its PROXY header: b'-80'",
    ),
    (
        b"PROXY TCP4 192.0.2.9 192.0.2.10 1234 080\r\n",
        "no port in its PROXY header: b'080'",
    ),
    (
        b"PROXY TCP4 192.0.2.9 192.0.2.10 99999999999 80\r\n",
        "no port in its PROXY header: b'99999999999'",
    ),
    (version_2(0x11, INET, 0x11), "a PROXY header with version and command 0x11"),
    (version_2(0x11, INET, 0x22), "a PROXY header with version and command 0x22"),
    (version_2(0x41, INET), "a PROXY header with family and protocol 0x41"),
    (version_2(0x13, INET), "a PROXY header with family and protocol 0x13"),
    (version_2(0x11, INET[:-1]), "a PROXY header that is too short for its addresses"),
    (version_2(0x21, INET), "a PROXY header that is too short for its addresses"),
    (version_2(0x31, UNIX[1:]), "a PROXY header that is too short for its addresses"),
    (SIGNATURE + b"\x21\x11\xff\xff", f"a PROXY header of {16 + 65535} bytes"),
    (
        SIGNATURE + b"\x20\0" + (LONGEST_2 - 16 + 1).to_bytes(2),
        f"a PROXY header of {LONGEST_2 + 1} bytes",
    ),
    (version_2(0x11, INET + b"\x02"), "a PROXY header with a TLV beyond its end"),
    (version_2(0x11, INET + b"\x02\0"), "a PROXY header with a TLV beyond its end"),
    (
        version_2(0x11, INET + b"\x02\0\5four"),
        "a PROXY header with a TLV beyond its end",
    ),
    (
        version_2(0x11, INET + tlv(5, bytes(129))),
        "a PROXY header with an id of more than 128 bytes",
    ),
    (version_2(0x11, INET + tlv(3, bytes(4))), "a PROXY header with a wrong checksum"),
    (
        version_2(0x11, INET + tlv(3, bytes(3))),
        "a PROXY header with no proper checksum",
    ),
]


def said(data: bytes) -> ProxyHeader:
    """What a whole header says."""
    found = read_header(data)
    assert found is not None
    assert found[1] == len(data)
    return found[0]


@pytest.mark.parametrize(("header", "says"), HEADERS)
def test_a_header_in_any_pieces(header: bytes, says: ProxyHeader | None) -> None:
    for length in range(len(header)):
        assert read_header(header[:length]) is None
    found = read_header(header)
    assert found == read_header(header + b"PROXY and more")
    assert found is not None
    assert found[1] == len(header) <= LONGEST_2
    if says is not None:
        assert found[0] == says


@pytest.mark.parametrize(("start", "why"), WRONG)
def test_what_is_no_header(start: bytes, why: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read_header(start)
    assert str(caught.value) == why
    with pytest.raises(BadRequest):
        read_header(start + b"\r\n more")


def with_checksum(block: bytes, wrong: int = 0) -> bytes:
    """A header whose last TLV is its checksum."""
    blank = version_2(0x11, block + tlv(3, bytes(4)))
    return blank[:-4] + (crc32c(blank) ^ wrong).to_bytes(4)


def test_a_checksum_is_checked() -> None:
    header = with_checksum(INET + tlv(2, b"example.com"))
    assert said(header).authority == b"example.com"
    for place in range(len(SIGNATURE) + 4, len(header) - 7):
        broken = bytearray(header)
        broken[place] ^= 1
        with pytest.raises(BadRequest):
            read_header(bytes(broken))
    with pytest.raises(BadRequest, match="wrong checksum"):
        read_header(with_checksum(INET, 1))
    twice = with_checksum(INET + tlv(3, bytes(4)))
    with pytest.raises(BadRequest):
        read_header(twice)


def test_the_checksum_is_that_of_its_standard() -> None:
    """RFC 3720, appendix B.4."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


@given(st.binary(max_size=300), st.sampled_from([b"", b"PROXY ", SIGNATURE, V1[:30]]))
def test_any_bytes_are_a_header_or_none_or_not_enough(
    data: bytes, start: bytes
) -> None:
    """And whatever they are, more bytes don't change it."""
    data = start + data
    try:
        found = read_header(data)
    except BadRequest as problem:
        assert str(problem).isprintable()
        with pytest.raises(BadRequest):
            read_header(data + b"more")
        return
    if found is not None:
        assert 0 < found[1] <= len(data)
        assert read_header(data + b"more") == found
    else:
        limit = LONGEST_1 if data.startswith(b"PROXY") else LONGEST_2
        assert len(data) < limit


@given(
    st.binary(min_size=16, max_size=400),
    st.sampled_from([0x20, 0x21]),
    st.sampled_from([0x11, 0x21, 0x31]),
)
def test_any_block_of_version_2(block: bytes, command: int, kind: int) -> None:
    header = version_2(kind, block, command)
    try:
        found = read_header(header)
    except BadRequest:
        return
    assert found is not None
    assert found[1] == len(header)
    assert all(map(str.isprintable, (found[0].source, found[0].destination)))


# -- beside another implementation

addresses_4 = st.tuples(st.ip_addresses(v=4), st.integers(0, 65535))
addresses_6 = st.tuples(st.ip_addresses(v=6), st.integers(0, 65535))


def name(address: Any) -> str:
    host, port = address
    return host_port(str(getattr(host, "ipv4_mapped", None) or host), port)


@given(
    st.one_of(st.tuples(addresses_4, addresses_4), st.tuples(addresses_6, addresses_6)),
    st.booleans(),
)
def test_what_another_implementation_writes_is_read(ends: Any, binary: bool) -> None:
    kind: Any = ProxyResultIPv4 if ends[0][0].version == 4 else ProxyResultIPv6
    other: Any = ProxyProtocolV2() if binary else ProxyProtocolV1()
    more: dict[str, Any] = {}
    if binary:
        facts = ProxyProtocolTLV(authority="a.example", unique_id=b"7")
        more = {"protocol": socket.SOCK_STREAM, "tlv": facts}
    header = said(other.pack(kind(*ends, **more)))
    assert (header.source, header.destination) == tuple(map(name, ends))
    assert (header.authority, header.unique_id) == (
        (b"a.example", b"7") if binary else (b"", b"")
    )


def test_what_another_implementation_says_of_itself_is_read() -> None:
    assert said(ProxyProtocolV2().pack(ProxyResultLocal())) == ProxyHeader()


@given(
    st.one_of(st.tuples(addresses_4, addresses_4), st.tuples(addresses_6, addresses_6)),
    st.booleans(),
)
def test_what_is_written_is_read_by_both(ends: Any, binary: bool) -> None:
    source, destination = map(name, ends)
    write = write_version_2 if binary else write_version_1
    header = write(source, destination)
    assert said(header) == ProxyHeader(source, destination)
    other: Any = ProxyProtocolV2() if binary else ProxyProtocolV1()
    found = other.unpack(header)
    assert tuple(map(name, (found.source, found.dest))) == (source, destination)


@given(st.binary(max_size=120))
def test_what_is_read_is_read_the_same_by_another(data: bytes) -> None:
    """In version 1, where it refuses less than the specification asks for."""
    line = b"PROXY TCP4 " + data + b"\r\n"
    try:
        found = read_header(line)
    except BadRequest:
        return
    if found is not None:
        other: Any = ProxyProtocolV1().unpack(line[: found[1]])
        assert name(other.source) == found[0].source


# -- writing


@pytest.mark.parametrize(
    ("client", "reached", "first", "second"),
    [
        ("192.0.2.9:1234", "192.0.2.10:80", V1, version_2(0x11, INET)),
        (
            "[2001:db8::9]:1234",
            "[2001:db8::a]:80",
            b"PROXY TCP6 2001:db8::9 2001:db8::a 1234 80\r\n",
            version_2(0x21, INET6),
        ),
        (
            "unix:/run/client",
            "unix:/run/x y",
            b"PROXY UNKNOWN\r\n",
            version_2(0, b"", 0x20),
        ),
        ("unix:", "192.0.2.10:80", b"PROXY UNKNOWN\r\n", version_2(0, b"", 0x20)),
        ("192.0.2.9:1", "unix:/x", b"PROXY UNKNOWN\r\n", version_2(0, b"", 0x20)),
        ("-", "192.0.2.10:80", b"PROXY UNKNOWN\r\n", version_2(0, b"", 0x20)),
        (
            "192.0.2.9:1234",
            "[2001:db8::a]:80",
            b"PROXY TCP6 ::ffff:192.0.2.9 2001:db8::a 1234 80\r\n",
            None,
        ),
        (
            "[fe80::9%eth0]:1234",
            "[fe80::a%eth0]:80",
            b"PROXY TCP6 fe80::9 fe80::a 1234 80\r\n",
            None,
        ),
    ],
)
def test_what_a_server_is_told(
    client: str, reached: str, first: bytes, second: bytes | None
) -> None:
    assert write_version_1(client, reached) == first
    written = write_version_2(client, reached)
    assert second is None or written == second
    assert said(first).source == ("" if b"UNKNOWN" in first else said(written).source)


def test_datagrams_have_headers_of_their_own() -> None:
    header = write_version_2("192.0.2.9:1234", "192.0.2.10:80", datagrams=True)
    assert header == version_2(0x12, INET)
    assert write_version_2("[::1]:1", "[::1]:2", datagrams=True)[13] == 0x22


class Told:
    """What a header is made of."""

    client, listener, header = "192.0.2.9:1234", "192.0.2.10:80", None


def test_the_address_that_is_told_is_the_one_that_the_client_reached() -> None:
    write = preamble_of("v1")
    assert write is not None
    told: Any = Told()
    assert write(told) == V1
    told.header = ProxyHeader("192.0.2.9:1234", "203.0.113.1:443")
    assert write(told) == b"PROXY TCP4 192.0.2.9 203.0.113.1 1234 443\r\n"
    told.header = ProxyHeader()
    assert write(told) == V1


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_connection_that_is_no_client_s(version: str) -> None:
    """A check: the server is to take it for the relay's own."""
    found = read_header(nobody(version))
    assert found is not None
    assert (found[0].source, found[1]) == ("", len(nobody(version)))
    assert nobody(None) == b""


def test_versions_that_there_are() -> None:
    assert preamble_of(None) is None
    with pytest.raises(ValueError, match="v1 or v2, not 'v3'"):
        preamble_of("v3")


def test_nobody_introduces_anybody_unless_told() -> None:
    assert introduced_by([]) is None
    found = introduced_by(["192.0.2.0/24", ipaddress.ip_network("10.0.0.0/8")])
    assert found is not None
    assert "192.0.2.9:1234" in found.peers
    assert "10.1.2.3:1" in found.peers
    assert "192.0.3.9:1234" not in found.peers


# -- the log


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"example.com", "example.com"),
        (b"", ""),
        (b"two words", "'two\\x20words'"),
        (b"line\n", "'line\\n'"),
        (b"\xff \0\xc3\xa9", "b'\\xff\\x20\\x00\\xc3\\xa9'"),
        ("ü".encode(), "'\\xfc'"),
        (b"'", '"\'"'),
    ],
)
def test_a_fact_is_one_word(value: bytes, text: str) -> None:
    assert shown(value) == text


@given(st.binary(max_size=50))
def test_any_fact_is_one_word(value: bytes) -> None:
    text = shown(value)
    assert text.isprintable()
    assert " " not in text
    meant = literal_eval(text) if text[-1:] in ("'", '"') else text
    assert meant == value or meant == value.decode()


def test_the_facts_that_there_are() -> None:
    assert ProxyHeader("192.0.2.9:1", "192.0.2.10:80").facts == {}
    header = ProxyHeader(authority=b"a", unique_id=b"b", netns=b"c")
    assert header.facts == {"authority": "a", "unique_id": "b", "netns": "c"}
