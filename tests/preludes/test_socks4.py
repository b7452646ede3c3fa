"""SOCKS4 on the wire: requests in any pieces, garbage, limits, and what is no name."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from relayd.core.names import is_address, is_name
from relayd.preludes.socks4 import (
    MAX_HOST,
    MAX_REQUEST,
    MAX_USER_ID,
    REPLY_SIZE,
    BadRequest,
    Code,
    Command,
    Reply,
    Request,
    read_reply,
    read_request,
    write_reply,
    write_request,
)

#: A request up to its user id, to 192.0.2.1, port 80; and the same with 4a's mark.
START = b"\4\1\0\x50\xc0\0\2\1"
NAMED = b"\4\1\0\x50\0\0\0\1"

commands = st.sampled_from(Command)
ports = st.integers(1, 65535)
user_ids = st.lists(st.integers(1, 255), max_size=MAX_USER_ID).map(bytes)

_labels = st.from_regex(r"[A-Za-z0-9_-]{1,22}", fullmatch=True)
_last = st.from_regex(r"-?[A-Za-z]([A-Za-z0-9-]{0,20}[A-Za-z-])?\.?", fullmatch=True)
names = st.builds(
    lambda labels, last: ".".join([*labels, last]), st.lists(_labels, max_size=6), _last
)
addresses = st.ip_addresses().map(str)


def is_mark(address: str) -> bool:
    """Whether 4a's mark looks like this address: 0.0.0.x, with x not 0."""
    return address.startswith("0.0.0.") and address != "0.0.0.0"


plain_addresses = (
    st.ip_addresses(v=4).map(str).filter(lambda address: not is_mark(address))
)


def on_wire(
    command: int, port: int, packed: bytes, user_id: bytes, host: bytes | None = None
) -> bytes:
    """A request, by the memo and not by the module."""
    head = bytes([4, command, port // 256, port % 256]) + packed + user_id + b"\0"
    return head if host is None else head + host + b"\0"


@st.composite
def requests(draw: st.DrawFn) -> tuple[bytes, Request]:
    """A valid request, and what it means."""
    command, port, user_id = draw(commands), draw(ports), draw(user_ids)
    if draw(st.booleans()):
        host = draw(names | addresses)
        mark = bytes([0, 0, 0, draw(st.integers(1, 255))])
        data = on_wire(command, port, mark, user_id, host.encode())
        return data, Request(command, port, "", host, user_id)
    address = draw(plain_addresses)
    data = on_wire(command, port, socket.inet_aton(address), user_id)
    return data, Request(command, port, address, "", user_id)


def refusal(data: bytes) -> str:
    """Why this is no request; fit for the log."""
    with pytest.raises(BadRequest) as caught:
        read_request(data)
    message = str(caught.value)
    assert message.isprintable()
    return message


def outcome(data: bytes) -> tuple[Request, int] | str | None:
    """What has become of it: a request, a refusal, or not known yet."""
    try:
        return read_request(data)
    except BadRequest as problem:
        assert str(problem).isprintable()
        return "refused"


# -- requests


@given(requests(), st.binary(max_size=40))
@example((START + b"\0", Request(Command.CONNECT, 80, "192.0.2.1")), b"\0\0\0")
@example((NAMED + b"\0x\0", Request(Command.CONNECT, 80, "", "x")), b"\0x\0")
def test_any_split_gives_the_same_request(
    sent: tuple[bytes, Request], payload: bytes
) -> None:
    """All that has arrived is read, so that each length is a split.

    Short of its last byte a request goes on; from there on it is the same, of the
    same length, whatever the client sends after it.
    """
    data, meant = sent
    for count in range(len(data)):
        assert read_request(data[:count]) is None
    for count in range(len(payload) + 1):
        assert read_request(data + payload[:count]) == (meant, len(data))


def test_the_mark_of_4a() -> None:
    """0.0.0.x for each x but 0; any other 0 is an address's own."""
    for x in range(1, 256):
        data = on_wire(1, 80, bytes([0, 0, 0, x]), b"", b"example.com")
        assert read_request(data[:9]) is None
        assert read_request(data) == (
            Request(Command.CONNECT, 80, "", "example.com"),
            len(data),
        )
    for address in ("0.0.0.0", "0.0.1.0", "0.0.1.1", "0.1.0.1", "1.0.0.1", "1.0.0.0"):
        data = on_wire(2, 80, socket.inet_aton(address), b"joe")
        assert read_request(data + b"more") == (
            Request(Command.BIND, 80, address, "", b"joe"),
            len(data),
        )


def test_what_was_requested_as_text() -> None:
    """The host or the address, and the port; an IPv6 address in brackets."""
    for address, host, text in (
        ("192.0.2.1", "", "192.0.2.1:80"),
        ("", "example.com", "example.com:80"),
        ("", "192.0.2.1", "192.0.2.1:80"),
        ("", "2001:db8::1", "[2001:db8::1]:80"),
    ):
        assert Request(Command.CONNECT, 80, address, host).requested == text


# -- limits


def test_a_user_id_has_at_most_255_bytes() -> None:
    """The 256th is refused as it comes, whether the request ends there or not."""
    assert MAX_USER_ID == 255
    longest = b"u" * 255
    assert read_request(START + longest) is None
    assert read_request(START + longest + b"\0") == (
        Request(Command.CONNECT, 80, "192.0.2.1", "", longest),
        264,
    )
    for end in (b"", b"\0", b"u" * 10_000):
        assert refusal(START + longest + b"u" + end) == (
            "a user id of more than 255 bytes"
        )


def test_a_host_name_has_at_most_255_bytes() -> None:
    """Of which a name that can be looked up has 253, and its last dot."""
    assert MAX_HOST == 255
    name = ".".join(["a" * 61] * 4) + ".aaaaa"
    assert len(name) == 253
    for host in (name, name + "."):
        data = NAMED + b"\0" + host.encode() + b"\0"
        assert read_request(data) == (
            Request(Command.CONNECT, 80, "", host),
            len(data),
        )
    longest = b"a" * 255
    assert read_request(NAMED + b"\0" + longest) is None
    assert "is not a host name" in refusal(NAMED + b"\0" + longest + b"\0")
    for end in (b"", b"\0", b"a" * 10_000):
        assert refusal(NAMED + b"\0" + longest + b"a" + end) == (
            "a host name of more than 255 bytes"
        )


def test_the_longest_that_goes_on() -> None:
    """One byte less than the longest request; with the next it is decided."""
    assert MAX_REQUEST == 520
    data = NAMED + b"u" * 255 + b"\0" + b"a" * 255
    assert len(data) == MAX_REQUEST - 1
    assert read_request(data) is None
    for last in range(256):
        assert outcome(data + bytes([last])) == "refused"


# -- what is no request


def test_port_0() -> None:
    """Is refused as soon as it is there, but for BIND, which need not know one."""
    for rest in (b"", b"\xc0", b"\xc0\0\2\1\0", b"\0\0\0\1\0x\0"):
        assert refusal(b"\4\1\0\0" + rest) == "port 0"
    assert read_request(b"\4\2\0\0") is None
    data = b"\4\2\0\0\xc0\0\2\1\0"
    assert read_request(data) == (Request(Command.BIND, 0, "192.0.2.1"), 9)
    assert write_request(Command.BIND, "192.0.2.1", 0) == data
    data = b"\4\2\0\0\0\0\0\1\0x\0"
    assert read_request(data) == (Request(Command.BIND, 0, "", "x"), 11)
    assert refusal(b"\4\3\0\0") == "unknown command 3"
    assert read_request(b"\4\1\0") is None
    assert read_request(b"\4\1\1\0") is None
    assert read_request(b"\4\1\0\1") is None


def test_every_other_version_and_command() -> None:
    """By the first byte, and the second."""
    assert read_request(b"") is None
    assert read_request(b"\4") is None
    for number in range(256):
        if number != 4:
            for rest in (b"", b"\1\0\x50", b"\1\0\x50\xc0\0\2\1\0"):
                assert refusal(bytes([number]) + rest)
        if number not in (1, 2):
            for rest in (b"", b"\0\x50", b"\0\x50\xc0\0\2\1\0"):
                assert refusal(bytes([4, number]) + rest) == f"unknown command {number}"
    assert refusal(b"\0") == "version 0, not 4"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\5", "a SOCKS5 greeting, not SOCKS4"),
        (b"\5\1\0", "a SOCKS5 greeting, not SOCKS4"),
        (b"\5\2\0\2" + bytes(20), "a SOCKS5 greeting, not SOCKS4"),
        (b"\x16\3\1\2\0\1\0\1\xfc\3\3", "a TLS handshake, not SOCKS4"),
        (b"GET / HTTP/1.1\r\n\r\n", "an HTTP request, not SOCKS4"),
        (b"POST /x HTTP/1.1\r\n", "an HTTP request, not SOCKS4"),
        (b"HEAD / HTTP/1.0\r\n", "an HTTP request, not SOCKS4"),
        (b"CONNECT example.com:443 HTTP/1.1\r\n", "an HTTP request, not SOCKS4"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "an SSH greeting, not SOCKS4"),
        (b"GET", "version 71, not 4"),
        (b"\x16", "version 22, not 4"),
    ],
)
def test_other_protocols_are_named(data: bytes, why: str) -> None:
    """For the log of those who mistook the port."""
    assert refusal(data) == why


@pytest.mark.parametrize(
    ("host", "why"),
    [
        (b"", "an empty host name"),
        (b"ex\xc3\xa4mple.com", "a host name that is not ASCII"),
        (b"\xff", "a host name that is not ASCII"),
        # What a resolver reads as 127.0.0.1.
        (b"2130706433", "'2130706433' is not a host name"),
        (b"127.1", "'127.1' is not a host name"),
        (b"127.0.1", "'127.0.1' is not a host name"),
        (b"0x7f.1", "'0x7f.1' is not a host name"),
        (b"0x7f000001", "'0x7f000001' is not a host name"),
        (b"0X7F.0.0.0X1", "'0X7F.0.0.0X1' is not a host name"),
        (b"0177.0.0.1", "'0177.0.0.1' is not a host name"),
        (b"127.0.0.01", "'127.0.0.01' is not a host name"),
        (b"127.0.0.1.", "'127.0.0.1.' is not a host name"),
        (b"0", "'0' is not a host name"),
        (b"0x", "'0x' is not a host name"),
        (b"256.0.0.1", "'256.0.0.1' is not a host name"),
        (b"1.2.3.4.5", "'1.2.3.4.5' is not a host name"),
        (b"fe80::1%eth0", "'fe80::1%eth0' is not a host name"),
        (b"[::1]", "'[::1]' is not a host name"),
        (b"10.0.0.0/8", "'10.0.0.0/8' is not a host name"),
        (b"::1/128", "'::1/128' is not a host name"),
        (b"example.com:80", "'example.com:80' is not a host name"),
        (b" example.com", "' example.com' is not a host name"),
        (b"example.com ", "'example.com ' is not a host name"),
        (b"127.0.0.1 ", "'127.0.0.1 ' is not a host name"),
        (b"127.0.0.1\n", "'127.0.0.1\\n' is not a host name"),
        (b"example.com\n", "'example.com\\n' is not a host name"),
        (b"a\r\nsession=1", "'a\\r\\nsession=1' is not a host name"),
        (b"\x1b[2J", "'\\x1b[2J' is not a host name"),
        (b".", "'.' is not a host name"),
        (b"..", "'..' is not a host name"),
        (b".example.com", "'.example.com' is not a host name"),
        (b"example..com", "'example..com' is not a host name"),
        (b"example.com..", "'example.com..' is not a host name"),
        # Nor what it might take for a number with a sign.
        (b"-1", "'-1' is not a host name"),
        (b"127.-1", "'127.-1' is not a host name"),
        (b"-0x7f000001", "'-0x7f000001' is not a host name"),
        (b"127.0.0.1-", "'127.0.0.1-' is not a host name"),
        (b"*.example.com", "'*.example.com' is not a host name"),
    ],
)
def test_what_is_no_host_name(host: bytes, why: str) -> None:
    """Numbers above all, which a resolver would look up without being asked."""
    data = NAMED + b"\0" + host
    assert read_request(data) is None
    assert refusal(data + b"\0") == why
    assert refusal(data + b"\0payload") == why


@pytest.mark.parametrize(
    "host", ["-example.com", "example-.com", "example.com-", "r3---sn-.x", "a.-b", "-"]
)
def test_whether_a_name_with_a_hyphen_at_an_end_exists_the_resolver_says(
    host: str,
) -> None:
    """They are in use; and the C library raises nothing else but that it has none."""
    found = read_request(NAMED + b"\0" + host.encode() + b"\0")
    assert found is not None
    assert found[0].host == host
    with suppress(socket.gaierror):
        socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)
        pytest.fail("it is read as a number")


def test_a_label_has_at_most_63_characters() -> None:
    """As in the DNS."""
    for label, taken in (("a" * 63, True), ("a" * 64, False)):
        for name in (label, f"{label}.com", f"www.{label}"):
            assert is_name(name) is taken


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "0.0.0.0",
        "0.0.0.5",
        "255.255.255.255",
        "::",
        "::1",
        "2001:DB8::1",
        "::ffff:127.0.0.1",
        "64:ff9b::7f00:1",
        "localhost",
        "x",
        "1and1.com",
        "0x7f.example",
        "127.0.0.1.example",
        "7.7.7.com.",
        "_service._tcp.example.com",
        "xn--bcher-kva.example",
    ],
)
def test_addresses_and_names_are_hosts(host: str) -> None:
    """As they were sent; what they are allowed to reach is not decided here."""
    data = NAMED + b"\0" + host.encode() + b"\0"
    assert read_request(data) == (Request(Command.CONNECT, 80, "", host), len(data))
    assert is_address(host) != is_name(host)


# Valid beginnings, so that what follows is looked at at all.
_STARTS = [b"", b"\4", b"\4\1", b"\4\2\0\x50", START, NAMED, NAMED + b"\0"]
_hostnames = st.binary(max_size=300) | st.text(
    "0123456789abcdefxX.-_:%[]/ \n", max_size=40
).map(str.encode)
garbage = st.builds(
    lambda *parts: b"".join(parts),
    st.sampled_from(_STARTS),
    st.binary(max_size=20) | st.binary(min_size=240, max_size=300) | _hostnames,
    st.sampled_from([b"", b"\0"]),
    _hostnames,
    st.sampled_from([b"", b"\0"]),
)


@given(garbage | st.binary(max_size=2 * MAX_REQUEST))
@settings(max_examples=300)
def test_any_bytes_go_on_or_end_for_good(data: bytes) -> None:
    """Nothing but a request, a refusal or waiting for more; and once decided, decided.

    A refusal never becomes a request by what follows, and a request never changes:
    of the lengths of what arrives, those that go on come first, and all the others
    are alike.
    """
    outcomes = [outcome(data[:count]) for count in range(len(data) + 1)]
    undecided = outcomes.count(None)
    assert outcomes[:undecided] == [None] * undecided
    assert undecided <= MAX_REQUEST
    decided = outcomes[undecided:]
    assert all(each == decided[0] for each in decided)
    if decided and not isinstance(decided[0], str):
        assert decided[0] is not None
        request, length = decided[0]
        assert length == undecided <= MAX_REQUEST
        assert (request.command is not Command.BIND) <= request.port <= 65535
        assert len(request.user_id) <= MAX_USER_ID
        assert b"\0" not in request.user_id
        assert bool(request.host) != bool(request.address)
        # One line, that names one thing.
        assert f"{request.requested}".isprintable()
        assert " " not in request.requested


@given(
    st.text("0123456789abcdefxX.-+ \t\n", max_size=20)
    | st.lists(
        st.sampled_from(["0x", "0X", "0", "1", "127", "0177", "f", ".", "-", "e"]),
        max_size=9,
    ).map("".join)
)
@example("0x7f.1")
@example("0x.0x.0x.0x")
@example("00000000017700000001")
@settings(max_examples=500)
def test_no_name_is_a_number_to_the_resolver(host: str) -> None:
    """What the C library reads as an IPv4 address is none of our names."""
    try:
        socket.inet_aton(host)
    except OSError:
        return
    assert not is_name(host)


@given(st.text(max_size=20) | addresses | names)
def test_an_address_is_what_ipaddress_says(host: str) -> None:
    """And no name is one."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        assert not is_address(host)
    else:
        assert is_address(host) == (getattr(address, "scope_id", None) is None)
        assert not is_name(host)


# -- for those who are a client


@given(commands, names | addresses, ports, user_ids)
@example(Command.CONNECT, "0.0.0.5", 80, b"")
@example(Command.BIND, "0.0.0.0", 80, b"")
def test_what_is_written_is_read(
    command: Command, host: str, port: int, user_id: bytes
) -> None:
    """An IPv4 address as one, unless 4a's mark looks like it; all else as a host."""
    data = write_request(command, host, port, user_id)
    by_number = "." in host and ":" not in host and is_address(host)
    by_number = by_number and not is_mark(host)
    meant = (host, "") if by_number else ("", host)
    assert read_request(data + b"first data") == (
        Request(command, port, *meant, user_id),
        len(data),
    )


def test_written_as_in_the_memos() -> None:
    """The bytes themselves."""
    assert write_request(Command.CONNECT, "192.0.2.1", 80) == START + b"\0"
    assert write_request(Command.BIND, "192.0.2.1", 0x1234, b"joe") == (
        b"\4\2\x12\x34\xc0\0\2\1joe\0"
    )
    assert (
        write_request(Command.CONNECT, "x.org", 80, b"joe") == NAMED + b"joe\0x.org\0"
    )
    assert write_request(Command.CONNECT, "::1", 80) == NAMED + b"\0::1\0"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("192.0.2.1", 0), "a port is 1 to 65535, not 0"),
        (("192.0.2.1", 65536), "a port is 1 to 65535, not 65536"),
        (("192.0.2.1", -1), "a port is 1 to 65535, not -1"),
        (("192.0.2.1", 80, b"u" * 256), "not a user id: b'uuu"),
        (("192.0.2.1", 80, b"u\0v"), "not a user id: b'u\\x00v'"),
        (("", 80), "not a host name: ''"),
        (("127.1", 80), "not a host name: '127.1'"),
        (("a\0b", 80), "not a host name: 'a\\x00b'"),
        (("bücher.example", 80), "not a host name: 'bücher.example'"),
        (("fe80::1%eth0", 80), "not a host name: 'fe80::1%eth0'"),
        (("a" * 256, 80), "not a host name: 'aaa"),
    ],
)
def test_what_can_not_be_asked_for(arguments: tuple[Any, ...], why: str) -> None:
    """A ValueError says which field it is; nothing half right is sent."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        write_request(Command.CONNECT, *arguments)
    assert str(caught.value).startswith(why)


@given(st.text(max_size=300), st.integers(), st.binary(max_size=300))
def test_any_request_is_written_or_a_value_error(
    host: str, port: int, user_id: bytes
) -> None:
    """And what is written is a whole request."""
    try:
        data = write_request(Command.BIND, host, port, user_id)
    except ValueError:
        return
    found = read_request(data)
    assert found is not None
    assert found[1] == len(data) <= MAX_REQUEST


# -- replies


@given(st.sampled_from(Code), st.ip_addresses(v=4), st.integers(0, 65535))
def test_a_reply_is_read_as_it_was_written(code: Code, address: Any, port: int) -> None:
    """In eight bytes, of which seven go on."""
    data = write_reply(code, str(address), port)
    assert len(data) == REPLY_SIZE == 8
    for count in range(REPLY_SIZE):
        assert read_reply(data[:count]) is None
    for more in (b"", b"\0", b"data"):
        assert read_reply(data + more) == Reply(code, str(address), port)


def test_replies_as_in_the_memo() -> None:
    """The bytes themselves; a refusal names nothing."""
    assert write_reply(Code.GRANTED, "192.0.2.1", 80) == b"\0\x5a\0\x50\xc0\0\2\1"
    assert write_reply(Code.REJECTED) == b"\0\x5b" + bytes(6)
    assert write_reply(Code.NO_IDENT) == b"\0\x5c" + bytes(6)
    assert write_reply(Code.WRONG_IDENT) == b"\0\x5d" + bytes(6)


@given(st.ip_addresses(v=6))
def test_a_reply_says_nothing_of_ipv6(address: ipaddress.IPv6Address) -> None:
    """But for IPv4 within it; and however the kernel writes it, it is no error."""
    mapped = address.ipv4_mapped
    packed = mapped.packed if mapped else bytes(4)
    shown = socket.inet_ntop(socket.AF_INET6, address.packed)
    assert write_reply(Code.GRANTED, shown, 80) == b"\0\x5a\0\x50" + packed


@pytest.mark.parametrize(
    ("address", "packed"),
    [
        ("", bytes(4)),
        ("::1", bytes(4)),
        ("::ffff:192.0.2.1", b"\xc0\0\2\1"),
        # How the C library writes an address of 96 zeros.
        ("::192.0.2.1", bytes(4)),
    ],
)
def test_a_reply_with_no_plain_address(address: str, packed: bytes) -> None:
    """A UNIX server's is empty."""
    assert write_reply(Code.GRANTED, address, 80) == b"\0\x5a\0\x50" + packed


@given(st.binary(max_size=20))
def test_any_bytes_are_a_reply_or_refused(data: bytes) -> None:
    """What another proxy sends; codes that we don't know are kept as they are."""
    if data[:1] not in (b"", b"\0"):
        with pytest.raises(BadRequest, match=r"^a reply of version \d+, not 0$"):
            read_reply(data)
    elif len(data) < REPLY_SIZE:
        assert read_reply(data) is None
    else:
        assert read_reply(data) == Reply(
            data[1], socket.inet_ntoa(data[4:8]), data[2] * 256 + data[3]
        )


def test_requests_and_replies_do_not_change() -> None:
    """Those who were shown one can rely on it."""
    frozen: list[tuple[object, Callable[[Any], object]]] = [
        (Request(Command.BIND, 1), lambda it: setattr(it, "port", 2)),
        (Reply(90, "", 1), lambda it: setattr(it, "port", 2)),
    ]
    for each, change in frozen:
        with pytest.raises(AttributeError):
            change(each)
