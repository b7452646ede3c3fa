"""The ClientHello: real ones in any pieces and records, hostile ones, what it costs."""

from __future__ import annotations

import ssl
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from OpenSSL import SSL

from relayd.core.prelude import BadRequest
from relayd.preludes import client_hello
from relayd.preludes.client_hello import (
    HELLO,
    LONGEST,
    UNRECOGNIZED_NAME,
    ClientHello,
    HelloReader,
    hello_of,
)
from tests.support import hellos
from tests.support.hellos import CAPTURED, Hello, dissected, is_grease, record, vector

captured = st.sampled_from(sorted(CAPTURED)).map(CAPTURED.__getitem__)
some_cuts = st.lists(st.integers(1, 2000), max_size=8)

WWW = hellos.server_name(b"www.example.com")
H2 = (hellos.ALPN, vector(vector(b"h2", 1), 2))


def named(*extensions: tuple[int, bytes]) -> bytes:
    """A ClientHello with these extensions."""
    return Hello(extensions=extensions).data()


def read(data: bytes, cuts: Sequence[int] = ()) -> ClientHello | None:
    """What a reader has found when all has come, cut at these places."""
    reader = HelloReader()
    for arrived in hellos.pieces(data, cuts):
        found = reader(arrived)
        if found is not None:
            said, length = found
            assert length == 0
            assert isinstance(said, ClientHello)
            assert all(type(each) is bytes for each in said.alpn)
            return said
    return None


def outcome(data: bytes, cuts: Sequence[int] = ()) -> ClientHello | str | None:
    """The same, or `refused`."""
    try:
        return read(data, cuts)
    except BadRequest as problem:
        message = str(problem)
        assert message.isprintable()
        assert message.isascii()
        assert 0 < len(message) < 200
        return "refused"


def refusal(data: bytes) -> str:
    assert outcome(data) == "refused"
    with pytest.raises(BadRequest) as caught:
        read(data)
    return str(caught.value)


# -- real ones


@pytest.mark.parametrize("name", CAPTURED)
def test_what_clients_send(name: str) -> None:
    """It is known with its last byte, whatever follows, and not before."""
    one = CAPTURED[name]
    meant = ClientHello(one.server_name, one.alpn, one.ech)
    for count in range(len(one.data)):
        assert HelloReader()(one.data[:count]) is None
    assert read(one.data) == meant
    assert read(one.data + b"\x14\3\3\0\1\1" + b"\x17" * 70_000) == meant


@pytest.mark.parametrize("name", CAPTURED)
def test_one_byte_in_each_segment_and_in_each_record(name: str) -> None:
    one = CAPTURED[name]
    data = hellos.in_records_of(one.data, 1)
    assert len(data) == 6 * (len(one.data) - 5)
    reader = HelloReader()
    for count in range(len(data)):
        assert reader(data[:count]) is None
    found = reader(data)
    assert found == (ClientHello(one.server_name, one.alpn, one.ech), 0)


@given(captured, some_cuts, some_cuts, st.binary(max_size=50))
def test_any_split_gives_the_same(
    one: hellos.Captured, sizes: list[int], cuts: list[int], behind: bytes
) -> None:
    data = hellos.records(one.data[5:], sizes)
    found = read(data + behind, cuts)
    assert found == ClientHello(one.server_name, one.alpn, one.ech)


def test_the_corpus_has_what_makes_it_hard() -> None:
    """Post-quantum keys that span segments, values without a meaning, ECH, versions."""
    whole = {name: dissected(one.data) for name, one in CAPTURED.items()}
    for name in ("chromium_1", "chromium_2", "firefox_1", "firefox_2", "openssl_4"):
        assert (hellos.MLKEM, hellos.MLKEM_SIZE) in whole[name].key_shares
        assert len(CAPTURED[name].data) > 1460
    for name in ("chromium_1", "chromium_2"):
        hello = whole[name]
        kinds = [kind for kind, _ in hello.extensions or ()]
        for values in (hello.suites, kinds, hello.groups, hello.versions):
            assert any(map(is_grease, values))
        assert hellos.ECH in kinds
    orders = {
        tuple(kind for kind, _ in whole[name].extensions or () if not is_grease(kind))
        for name in ("chromium_1", "chromium_2")
    }
    assert len(orders) == 2
    assert hellos.ECH in dict(whole["firefox_1"].extensions or ())
    assert hellos.VERSIONS not in dict(whole["openssl_tls1"].extensions or ())
    assert any(len(one.data) == 517 for one in CAPTURED.values())


@given(st.sampled_from(["chromium_1", "firefox_1"]), st.randoms(), st.data())
def test_browsers_in_any_order_and_with_other_values_without_a_meaning(
    name: str, shuffled: Any, data: st.DataObject
) -> None:
    """What Chromium does for each connection, to what it has once sent.

    BoringSSL shuffles all extensions but a pre-shared key (`ssl_setup_extension_
    permutation`), and draws the values of GREASE and how long the payload of ECH is.
    """
    hello = dissected(CAPTURED[name].data)
    extensions = []
    for kind, content in hello.extensions or ():
        if kind == hellos.ECH:
            length = data.draw(st.sampled_from([144, 176, 208, 240]))
            enc = content[:6] + vector(bytes(32), 2)
            extensions.append((kind, enc + vector(bytes(length), 2)))
        elif is_grease(kind):
            other = data.draw(st.integers(0, 15)) * 0x1010 + 0x0A0A
            extensions.append((other, content))
        else:
            extensions.append((kind, content))
    shuffled.shuffle(extensions)
    meant = ClientHello("www.example.com", (b"h2", b"http/1.1"), True)
    again = Hello(
        hello.version,
        hello.random,
        hello.session_id,
        hello.suites,
        hello.compression,
        tuple(extensions),
    )
    assert read(again.data()) == meant


# -- names


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        (b"www.example.com", "www.example.com"),
        (b"WWW.Example.COM", "www.example.com"),
        (b"www.example.com.", "www.example.com"),
        (b"localhost", "localhost"),
        (b"a", "a"),
        (b"_dns.x-y_z.test", "_dns.x-y_z.test"),
        (b"-.-", "-.-"),
        (b"xn--mnchen-3ya.de", "xn--mnchen-3ya.de"),
        (b"192.0.2.1", "192.0.2.1"),
        (b"a" * 255, "a" * 255),
        (b"1." * 127 + b"1", "1." * 127 + "1"),
    ],
)
def test_server_names(sent: bytes, meant: str) -> None:
    assert read(named(hellos.server_name(sent))) == ClientHello(meant)


@pytest.mark.parametrize(
    "sent",
    [
        *(b"", b".", b"..", b".a", b"a..b", b"a..", b"a b", b"a\0", b"\0", b"a\n"),
        *(b"www.example.com:443", b"[::1]", b"::1", b"*.test", b"a/b", b"a%", b'"'),
        *("é.test".encode(), b"\xff", b"a" * 256, b"a." * 128, b"a" * 4000),
    ],
)
def test_what_is_no_server_name(sent: bytes) -> None:
    assert "a server name" in refusal(named(hellos.server_name(sent)))


def test_a_bad_name_is_quoted_in_part() -> None:
    message = refusal(named(hellos.server_name(b"a\n\xff" + b"x" * 200)))
    assert r"a\n\xffxxxx" in message


def test_what_a_hello_without_a_name_may_be() -> None:
    assert read(Hello().data()) == ClientHello()
    assert read(named()) == ClientHello()
    assert read(named(H2)) == ClientHello(None, (b"h2",))
    # SSL 3.0, and a version that is not known yet: the server's business.
    assert read(Hello(version=0x0300).data()) == ClientHello()
    assert read(Hello(version=0x7F7F, session_id=bytes(32)).data()) == ClientHello()
    assert read(b"\x16\3\4" + Hello().data()[3:]) == ClientHello()


# -- hostile ones


def body(content: bytes) -> bytes:
    """A record with this as the body of a ClientHello."""
    return record(b"\1" + vector(content, 3))


START = b"\3\3" + bytes(32)
#: Up to where the extensions begin.
BEFORE = START + b"\0" + b"\0\2\x13\1" + b"\1\0"


def extension(kind: int, data: bytes) -> bytes:
    return body(BEFORE + vector(kind.to_bytes(2) + vector(data, 2), 2))


NAME = vector(b"\0" + vector(b"a.test", 2), 2)

HOSTILE = {
    # Other protocols, and other records.
    "an SSLv2 ClientHello": b"\x80\x2e\1\0\2\0\x15\0\0\0\x10",
    "an HTTP request, not TLS": b"GET / HTTP/1.1\r\n\r\n",
    "an SSH greeting, not TLS": b"SSH-2.0-OpenSSH_9.2\r\n",
    "a SOCKS5 greeting, not TLS": b"\5\1\0",
    "a SOCKS4 request, not TLS": b"\4\1\0\x50\xc0\0\2\1\0",
    "a PROXY header, not TLS": b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n",
    "not TLS: the first byte is 0x00": b"\0\0\0\x2f\xfeSMB",
    "not TLS: the first byte is 0xff": b"\xff",
    "a TLS record of type 21, not a handshake": b"\x15\3\1\0\2\2\x28",
    "a TLS record of version 2, not 3": b"\x16\2\0\0\x40\1",
    "an empty TLS record": record(b"") + WWW[1],
    "a TLS handshake of type 2 first": record(b"\2\0\0\0"),
    "a TLS record of type 20 in a ClientHello": (
        record(b"\1\0\0") + record(b"\1", 20) + record(b"\x29")
    ),
    # Lengths.
    f"a ClientHello of more than {LONGEST} bytes": b"\x16\3\1\x40\0\1\0\0\0",
    "a ClientHello of 16777215 bytes": record(b"\1\xff\xff\xff\3\3"),
    "1 bytes behind the ClientHello": record(b"\1" + vector(BEFORE, 3) + b"\1"),
    "a ClientHello that is cut off": body(b""),
    "a session id of 33 bytes in a ClientHello": body(START + vector(bytes(33), 1)),
    "cipher suites of 0 bytes in a ClientHello": body(START + b"\0\0\0\1\0"),
    "cipher suites of 3 bytes in a ClientHello": body(START + b"\0\0\3abc\1\0"),
    "no compression method in a ClientHello": body(START + b"\0\0\2\x13\1\0"),
    "extensions of 4 bytes, of 5, in a ClientHello": body(BEFORE + b"\0\4\0\1\0\0!"),
    "extensions of 6 bytes, of 5, in a ClientHello": body(BEFORE + b"\0\6\0\1\0\0!"),
    "the last extension has 1 bytes too many": body(BEFORE + b"\0\5\0\1\0\2!"),
    # What a server might read in another way.
    "two extensions server_name in a ClientHello": named(WWW, H2, WWW),
    "two extensions ALPN in a ClientHello": named(H2, WWW, H2),
    "two extensions encrypted_client_hello": named((0xFE0D, b""), (0xFE0D, b"")),
    "an extension ALPN of a wrong length": extension(16, b"\0\0"),
    "an extension ALPN with a protocol of a wrong length": extension(16, b"\0\1\0"),
    "an extension server_name without one host name": extension(0, b"\0\0"),
}
#: Others of the same errors.
MORE = [
    *(
        b"\xe0",
        b"\x80\x2e\2",
        b"HTTP",
        b"\x16\3\1\xff\xff",
        b"\x16\4",
        b"\x14\3\3",
        b"\x18\3\3",
    ),
    *(b"\x16\3\1\0\1\1\x17", b"\x16\3\1\0\1\1\x16\2", record(b"\1") + record(b"")),
    *(b"\x17\3\3\0\1a", record(b"\0\0\0\0"), record(b"\1\0") + record(b"\0\0\0")),
    *(body(START[:cut]) for cut in range(len(START))),
    *(body(BEFORE[:cut]) for cut in range(len(START), len(BEFORE))),
    *(body(BEFORE + cut) for cut in (b"\0", b"\0\1", b"\0\1\0", b"\0\3\0\0\0")),
    body(START + b"\0" + b"\xff\xfe" + bytes(100)),
    body(START + b"\0" + b"\0\2\x13\1" + b"\xff\0"),
    # server_name: two names, another type, none, bytes behind it, lengths.
    extension(0, vector(NAME[2:] + NAME[2:], 2)),
    named(hellos.server_name(b"a.test", 1)),
    *(extension(0, data) for data in (b"", b"\0", NAME + b"\0", NAME[:-1], b"\0\1\0")),
    extension(0, b"\0\x09\0\0\7a.test"),
    extension(0, b"\0\x0a\0\0\6a.test"),
    *(extension(16, data) for data in (b"", b"\0", b"\0\1a", b"\0\1\2h2", b"\0\2\2h")),
]


@pytest.mark.parametrize("message", HOSTILE)
def test_why_a_hello_is_refused(message: str) -> None:
    assert refusal(HOSTILE[message]) == message


@pytest.mark.parametrize("data", MORE, ids=bytes.hex)
def test_what_else_is_refused(data: bytes) -> None:
    assert outcome(data) == "refused"


@pytest.mark.parametrize("data", [*HOSTILE.values(), *MORE], ids=bytes.hex)
def test_what_is_refused_is_refused_in_any_pieces(data: bytes) -> None:
    assert outcome(data, range(len(data))) == "refused"


def test_it_ends_within_its_limit() -> None:
    """The last byte may be the 16,384th on the wire; headers of records count."""
    padding = LONGEST - len(named(WWW, (21, b"")))
    assert len(named(WWW, (21, bytes(padding)))) == LONGEST
    assert read(named(WWW, (21, bytes(padding)))) == ClientHello("www.example.com")
    assert outcome(named(WWW, (21, bytes(padding + 1)))) == "refused"
    # One record more has five bytes more.
    message = named(WWW, (21, bytes(padding - 5)))[5:]
    parted = hellos.records(message, [9000])
    assert len(parted) == LONGEST
    assert read(parted, range(0, LONGEST, 100)) == ClientHello("www.example.com")
    message = named(WWW, (21, bytes(padding - 4)))[5:]
    parted = hellos.records(message, [9000])
    assert outcome(parted) == "refused"
    # It is known when the first record has come.
    assert outcome(parted[:9004]) is None
    assert outcome(parted[:9005]) == "refused"
    # In records of one byte it is refused as soon as it is seen that it won't end.
    reader, message = HelloReader(), Hello(extensions=((21, bytes(2700)),)).message()
    data = hellos.records(message, [1] * 4)
    assert len(message) * 6 > LONGEST
    assert reader(data[:24]) is None
    data = hellos.records(message, [1] * len(message))
    assert outcome(data, range(len(data))) == "refused"


@given(st.binary(max_size=200), some_cuts)
def test_any_bytes(data: bytes, cuts: list[int]) -> None:
    outcome(data, cuts)
    outcome(b"\x16\3\1" + data, cuts)
    outcome(body(data), cuts)
    outcome(body(BEFORE + vector(data, 2)), cuts)
    for kind in (0, 16, 0xFE0D):
        outcome(extension(kind, data), cuts)


fragments = st.lists(st.binary(min_size=1, max_size=3000), min_size=6, max_size=60)


@given(fragments)
def test_no_bytes_are_waited_for_without_end(some: list[bytes]) -> None:
    some[0] = b"\1" + some[0]
    data = b"".join(map(record, some))
    while len(data) < LONGEST:
        data += data
    assert outcome(data) is not None


# -- beside OpenSSL


def by_openssl(data: bytes) -> str | None:
    """The server name that a server with OpenSSL is asked for.

    :return: empty: for none; None: it has not come so far.
    """
    asked: list[str] = []

    def ask(connection: SSL.Connection) -> None:
        name = connection.get_servername() or b""
        asked.append(name.decode("latin-1").lower().removesuffix("."))

    context = SSL.Context(SSL.TLS_SERVER_METHOD)
    context.set_tlsext_servername_callback(ask)
    server = SSL.Connection(context, None)
    server.set_accept_state()
    server.bio_write(data)
    with suppress(SSL.Error):
        server.do_handshake()
    return asked[0] if asked else None


def test_openssl_finds_the_same_names() -> None:
    # Its servers refuse these: old versions, and an extension that is not for TCP.
    refused = {"openssl_tls1", "openssl_tls1_1", "openssl_all"}
    for name in CAPTURED.keys() - refused:
        one = CAPTURED[name]
        assert by_openssl(one.data) == (one.server_name or ""), one.client


@st.composite
def spoilt(draw: st.DrawFn) -> bytes:
    """A hello with some bytes that are not as they were; more often near its name."""
    name = draw(st.sampled_from(["python", "openssl_tls1_2", "chromium_1"]))
    data = bytearray(CAPTURED[name].data)
    begin = data.index(b"www.example.com") - 9
    near = st.integers(begin, begin + 24)
    places = st.one_of(near, near, st.integers(0, len(data) - 1))
    for place in draw(st.lists(places, min_size=1, max_size=3)):
        data[place] = draw(st.sampled_from([0, 1, 16, 46, 255]) | st.integers(0, 255))
    return bytes(data)


@given(spoilt(), some_cuts)
def test_what_is_read_is_read_the_same_by_openssl(
    data: bytes, sizes: list[int]
) -> None:
    """Or it is refused: no client gets to one server by what another one reads."""
    ours = outcome(data)
    theirs = by_openssl(data)
    if theirs is not None:
        assert ours is not None
        assert isinstance(ours, str) or (ours.server_name or "") == theirs
    if data[:3] == b"\x16\3\1" and data[3:5] == (len(data) - 5).to_bytes(2):
        assert outcome(hellos.records(data[5:], sizes)) == ours


# -- what it costs


class Sliced(bytes):
    """Bytes that count how many of them are copied."""

    copied = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        if isinstance(found, bytes):
            type(self).copied += len(found)
        return found


@contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """Counts the lines of the module that are run, and the bytes that it copies."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != client_hello.__file__:
            return None
        lines += event == "line"
        return trace

    before = sys.gettrace()
    Sliced.copied = 0
    sys.settrace(trace)
    try:
        yield lambda: lines + Sliced.copied
    finally:
        sys.settrace(before)


def work(data: bytes, cuts: Sequence[int]) -> int:
    """How much is done to read this."""
    arrived = [Sliced(each) for each in hellos.pieces(data, cuts)]
    reader = HelloReader()
    with counted() as done, suppress(BadRequest):
        for each in arrived:
            if reader(each) is not None:
                break
    return done()


#: Lines run and bytes copied for each byte that came, at most: a call for a byte that
#: ends a record runs 25 lines.
MOST_WORK = 30


@pytest.mark.cost
def test_each_byte_is_read_once() -> None:
    """One in each segment, and one in each record: four times as many, four times."""
    some = [named(WWW, (21, bytes(size))) for size in (500, 2300)]
    short, long = (hellos.in_records_of(data, 1) for data in some)
    assert 14_000 < len(long) < LONGEST
    works = [work(data, range(len(data))) for data in (short, long)]
    assert works[0] < len(short) * MOST_WORK
    assert works[1] / works[0] < 1.1 * len(long) / len(short)


@pytest.mark.cost
@given(st.one_of(spoilt(), st.binary(max_size=400)), st.integers(1, 50), some_cuts)
@example(Hello(extensions=((0, b""),) * 3000).data(), 50, [])
@example(named(*[(kind, b"") for kind in range(1, 4000)]), 16_384, [])
@example(named((16, vector(vector(b"h", 1) * 8000, 2))), 16_384, [])
@example(named(hellos.server_name(b"1." * 127 + b"1.")), 16_384, [])
def test_any_bytes_take_no_more(data: bytes, size: int, cuts: list[int]) -> None:
    for sent in (data, b"\x16\3\1" + data, body(data)):
        assert work(sent, cuts) < (len(sent) + 20) * MOST_WORK
    parted = hellos.records(data[5:], [size] * (len(data) // size))
    some = range(0, len(parted), 1 + len(parted) // 500)
    assert work(parted, some) < (len(parted) + 20) * MOST_WORK


@pytest.mark.cost
def test_what_comes_at_once_is_read_by_few_lines() -> None:
    """A browser's hello: 20 extensions, six lines each, of which three are known."""
    for name in ("python", "chromium_1", "firefox_1"):
        data = CAPTURED[name].data
        assert work(data, ()) < 240 + 2 * len(data)


# -- what relayd writes


names = st.from_regex(r"[a-z0-9_-]{1,20}(\.[a-z0-9_-]{1,20}){0,5}", fullmatch=True)
protocols = st.lists(st.binary(min_size=1, max_size=30), max_size=5).map(tuple)


@given(st.none() | names, protocols, st.booleans(), st.integers(1, 500))
def test_what_is_written_is_read(
    name: str | None, alpn: tuple[bytes, ...], ech: bool, size: int
) -> None:
    data = hello_of(name, alpn=alpn, ech=ech, record=size)
    assert read(data) == ClientHello(name, alpn, ech)
    assert read(hello_of(name, extensions=())) == ClientHello(name)


def test_a_server_understands_what_is_written() -> None:
    for ech in (False, True):
        data = hello_of("www.example.com", alpn=[b"h2"], ech=ech)
        assert by_openssl(data) == "www.example.com"
        hello = dissected(data)
        assert hello.versions == [0x0304, 0x0303]
    assert dissected(hello_of(None, random=b"r" * 32)).random == b"r" * 32


def test_clients_understand_the_alert() -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    client = context.wrap_bio(incoming, outgoing, server_hostname="www.example.com")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    assert read(outgoing.read()) == ClientHello("www.example.com")
    incoming.write(UNRECOGNIZED_NAME)
    with pytest.raises(ssl.SSLError) as caught:
        client.do_handshake()
    assert caught.value.reason == "TLSV1_UNRECOGNIZED_NAME"


def test_each_client_has_a_reader_of_its_own() -> None:
    assert HELLO.read is None
    assert HELLO.start is HelloReader
