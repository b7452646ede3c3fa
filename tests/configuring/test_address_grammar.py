"""Addresses as people write them: what is understood, and what is refused."""

from __future__ import annotations

import re
import socket
from contextlib import closing, suppress
from typing import Any

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from twisted.internet import reactor

from relayd.configuring.address_grammar import (
    Address,
    EndpointString,
    HostPort,
    OriginalAddress,
    PortRange,
    UdpAddress,
    UnixPath,
    dialled_host,
    parse_destination,
    parse_listener,
    parse_range,
)
from relayd.core.errors import ConfigError
from relayd.operating.endpoints import dialing_endpoint, listening_endpoint

PARSERS = [parse_listener, parse_destination]

#: The longest name that DNS has: 253 characters in labels of at most 63.
LONGEST_NAME = ".".join(["a" * 63, "b" * 63, "c" * 63, "d" * 61])


def outcome(parse: Any, text: str) -> Any:
    """The address, or what its refusal says once it has quoted the text, in a line."""
    try:
        return parse(text)
    except ConfigError as problem:
        message = str(problem)
        named = f"bad address {text!r}: "
        assert message.startswith(named)
        assert message.isprintable()
        return message.removeprefix(named)


def refused(parse: Any, text: str, why: str) -> bool:
    """Whether `text` is refused for that reason."""
    says = outcome(parse, text)
    return isinstance(says, str) and why in says


# -- short forms


SHORT_FORMS = {
    "8080": HostPort(None, 8080),
    ":8080": HostPort(None, 8080),
    "1": HostPort(None, 1),
    "65535": HostPort(None, 65535),
    "00080": HostPort(None, 80),
    "127.0.0.1:8080": HostPort("127.0.0.1", 8080),
    "0.0.0.0:80": HostPort("0.0.0.0", 80),
    "[::1]:8080": HostPort("::1", 8080),
    "[::]:80": HostPort("::", 80),
    "[2001:DB8::1]:80": HostPort("2001:DB8::1", 80),
    "[::ffff:192.0.2.1]:80": HostPort("::ffff:192.0.2.1", 80),
    "[fe80::1%eth0]:80": HostPort("fe80::1%eth0", 80),
    "[fe80::1%3]:80": HostPort("fe80::1%3", 80),
    "localhost:8080": HostPort("localhost", 8080),
    "db:5432": HostPort("db", 5432),
    "example.com:80": HostPort("example.com", 80),
    "example.com.:80": HostPort("example.com.", 80),
    "EXAMPLE.com:80": HostPort("EXAMPLE.com", 80),
    "my_service_1:80": HostPort("my_service_1", 80),
    "_sip._tcp.example.com:80": HostPort("_sip._tcp.example.com", 80),
    "xn--bcher-kva.example:80": HostPort("xn--bcher-kva.example", 80),
    "3com.com:80": HostPort("3com.com", 80),
    "10.in-addr:80": HostPort("10.in-addr", 80),
    f"{LONGEST_NAME}:80": HostPort(LONGEST_NAME, 80),
}


def test_a_host_and_port() -> None:
    """Every short form with a port, to listen on and to connect to."""
    for parse in PARSERS:
        assert {text: outcome(parse, text) for text in SHORT_FORMS} == SHORT_FORMS


def test_a_unix_path() -> None:
    """`unix:` and an absolute path is a short form, whatever else is in the path."""
    for parse in PARSERS:
        assert parse("unix:/run/x.sock") == UnixPath("/run/x.sock")
        assert parse("unix:/a b=c@d[1]é") == UnixPath("/a b=c@d[1]é")


def test_the_length_of_a_unix_path_is_counted_in_bytes() -> None:
    """107 bytes fit into the kernel's structure with its NUL, 108 do not."""
    fits = "/" + "x" * 104 + "é"
    for parse in PARSERS:
        assert parse(f"unix:{fits}") == UnixPath(fits)
        assert refused(parse, "unix:", "expected a path")
        assert refused(parse, "unix::mode=660", "expected a path")
        assert refused(parse, f"unix:{fits}x", "at most 107 bytes, this one 108")


def test_the_limit_of_a_unix_path_is_the_kernels() -> None:
    """What the grammar lets through, bind(2) does not find too long."""
    with closing(socket.socket(socket.AF_UNIX)) as sock:
        with pytest.raises(FileNotFoundError):
            sock.bind("/nowhere/" + "x" * 98)
        with pytest.raises(OSError, match="too long"):
            sock.bind("/nowhere/" + "x" * 99)


def test_port_0_is_for_listeners() -> None:
    """A listener may ask for any free port; nobody can connect to port 0."""
    assert parse_listener("0") == HostPort(None, 0)
    assert parse_listener("[::1]:0") == HostPort("::1", 0)
    for text in ("0", ":0", "127.0.0.1:0", "[::1]:0", "example.com:0"):
        assert refused(parse_destination, text, "a port here is 1 to 65535, not 0")


def test_an_address_for_datagrams() -> None:
    """By port, or host and port; without `udp:` it is TCP's, and `str` reads back."""
    for text, where in (
        ("udp:53", UdpAddress(None, 53)),
        ("udp::53", UdpAddress(None, 53)),
        ("udp:127.0.0.1:53", UdpAddress("127.0.0.1", 53)),
        ("udp:[::]:53", UdpAddress("::", 53)),
        ("udp:[fe80::1%3]:53", UdpAddress("fe80::1%3", 53)),
        ("udp:example.com:53", UdpAddress("example.com", 53)),
        ("53", HostPort(None, 53)),
    ):
        for parse in PARSERS:
            assert parse(text) == where
            assert parse(str(where)) == where
    assert parse_listener("udp:0") == UdpAddress(None, 0)


def test_datagram_sockets_that_systemd_passes_on() -> None:
    """A listener's, by their name; nobody sends to one."""
    for name in ("dns", "relayd.socket", "a-b_c", "é"):
        where = parse_listener(f"udp:systemd:{name}")
        assert where == UdpAddress(None, 0, name)
        assert str(where) == f"udp:systemd:{name}"
        assert parse_listener(f"systemd:{name}") == EndpointString(f"systemd:{name}")
        assert refused(parse_destination, f"udp:systemd:{name}", "is not a port")
    for text in ("udp:systemd:", "udp:systemd:a:b", "udp:systemd:domain=INET:index=0"):
        assert refused(parse_listener, text, "")
    assert refused(parse_destination, "udp:0", "a port here is 1 to 65535, not 0")
    for text, why in (
        ("udp:", "expected a port"),
        ("udp:x", "'x' is not a port"),
        ("udp:unix:/s", "expected udp:host:port or udp:port"),
        ("udp:udp:53", "expected udp:host:port or udp:port"),
        ("udp:tcp:x:53", "unknown endpoint type 'tcp'"),
        ("udp:::1", "write an IPv6 address in brackets"),
    ):
        assert all(refused(parse, text, why) for parse in PARSERS)


def test_where_the_client_meant_to_go() -> None:
    """A destination, and no listener; `str` reads back."""
    for text, where in (
        ("original", OriginalAddress()),
        ("192.168.0.10:original", OriginalAddress("192.168.0.10")),
        ("[2001:db8::1]:original", OriginalAddress("2001:db8::1")),
        ("[fe80::1%3]:original", OriginalAddress("fe80::1%3")),
        ("db.example.com:original", OriginalAddress("db.example.com")),
        ("udp:original", OriginalAddress(udp=True)),
        ("udp:192.168.0.10:original", OriginalAddress("192.168.0.10", udp=True)),
        ("udp:[2001:db8::1]:original", OriginalAddress("2001:db8::1", udp=True)),
        # A host may be called so.
        ("original:80", HostPort("original", 80)),
        ("unix:/run/original", UnixPath("/run/original")),
        ("tcp:host=db:port=original", EndpointString("tcp:host=db:port=original")),
        ("tcp:db:original", EndpointString("tcp:db:original")),
    ):
        assert parse_destination(text) == where
        assert parse_destination(str(where)) == where
        if isinstance(where, OriginalAddress):
            assert refused(parse_listener, text, "a destination: give a listener its")
    for text, why in (
        (":original", "write original alone, or a host before it"),
        ("udp::original", "write original alone, or a host before it"),
        ("udp:db.example.com:original", "write the address of the host"),
        ("2001:db8::1:original", "write an IPv6 address in brackets"),
        ("[x]:original", "'x' is not an IPv6 address"),
        ("224.0.0.1:original", "a multicast group"),
        ("10.0.0.1.2:original", "is not an IPv4 address"),
        ("[fe80::1]:original", "its interface: write [fe80::1%eth0]:original, with"),
        ("a b:original", "is not a host name"),
        ("original ", "expected a port"),
        ("Original", "is not a port"),
    ):
        assert refused(parse_destination, text, why)


# -- ranges


def test_a_range_of_ports() -> None:
    """Of either form with a port; each port is an address, and `str` reads back."""
    for text, first, last in (
        ("5000-5100", HostPort(None, 5000), 5100),
        (":5000-5100", HostPort(None, 5000), 5100),
        ("10.0.0.1:1-65535", HostPort("10.0.0.1", 1), 65535),
        ("[::1]:5-6", HostPort("::1", 5), 6),
        ("db-1:5-6", HostPort("db-1", 5), 6),
        ("udp:5-6", UdpAddress(None, 5), 6),
        ("udp:[fe80::1%lo]:5-6", UdpAddress("fe80::1%lo", 5), 6),
    ):
        for parse in PARSERS:
            found: Any = parse_range(text, parse)
            assert found == PortRange(first, last)
            assert parse_range(str(found), parse) == found
            assert len(found) == last - first.port + 1
            assert found[0] == first
            assert found[len(found) - 1] == attrs.evolve(first, port=last)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("5-5", "expected a range of ports such as 5000-5100"),
        ("6-5", "expected a range of ports such as 5000-5100"),
        ("udp:6-5", "expected a range of ports such as 5000-5100"),
        ("0-5", ""),
        ("5-65536", "a port here is"),
        ("999999-9999999", "a port here is"),
        ("5-", "'5-' is not a port"),
        ("-5", "'-5' is not a port"),
        ("1-2-3", "'1-2-3' is not a port"),
        ("host:1-2-3", "'1-2-3' is not a port"),
        ("5 - 6", "'5 - 6' is not a port"),
        ("256.0.0.1:5-6", "'256.0.0.1' is not an IPv4 address"),
        ("::1:5-6", "write an IPv6 address in brackets"),
        ("9" * 5000 + "-" + "9" * 5001, "a port here is"),
    ],
)
def test_what_is_no_range(text: str, why: str) -> None:
    """The refusal quotes all of it."""
    for parse in PARSERS:
        with pytest.raises(ConfigError) as caught:
            parse_range(text, parse)
        assert str(caught.value).startswith(f"bad address {text!r}: {why}")
        assert str(caught.value).isprintable()


def test_what_looks_like_a_range_and_is_none() -> None:
    for text in ("unix:/run/5-6", "tcp:5-6", "db5-6:80", "[fe80::1%5-6]:80"):
        assert parse_range(text, parse_listener) == parse_listener(text)


@given(st.text() | st.from_regex(r"(udp:)?([a-z.]*:|\[::1\]:)?[0-9]{1,6}-[0-9]{1,6}"))
def test_any_text_is_a_range_or_an_address_or_refused(text: str) -> None:
    for parse in PARSERS:
        try:
            found = parse_range(text, parse)
        except ConfigError as problem:
            assert str(problem).startswith("bad address ")
            assert str(problem).isprintable()
        else:
            assert parse_range(str(found), parse) == found


# -- refusals


REFUSED = {
    "": "expected a port, host:port",
    " 80": "expected a port, host:port",
    "80 ": "expected a port, host:port",
    "80\n": "expected a port, host:port",
    "a\tb:80": "expected a port, host:port",
    "\x0080": "expected a port, host:port",
    "a\u2028b:80": "expected a port, host:port",
    "unix:/run/\udcff": "expected a port, host:port",
    "unix:/run/x ": "expected a port, host:port",
    ":": "'' is not a port",
    "host": "'host' is not a port",
    "127.0.0.1": "'127.0.0.1' is not a port",
    "127.0.0.1:": "'' is not a port",
    "host:http": "'http' is not a port",
    "http://example.com": "unknown endpoint type 'http'",
    "-1": "'-1' is not a port",
    "+80": "'+80' is not a port",
    "8_0": "'8_0' is not a port",
    "80.0": "'80.0' is not a port",
    "٨٠": "'٨٠' is not a port",
    "[::1]:": "'' is not a port",
    "65536": "to 65535, not 65536",
    "host:99999": "to 65535, not 99999",
    "000080": "to 65535, not 000080",
    "9" * 5000: "to 65535, not 999",
    "host:80:90": "unknown endpoint type 'host'",
    "http://example.com:80": "unknown endpoint type 'http'",
    "tpc:8080:interface=::1": "unknown endpoint type 'tpc'",
    "::1": "write an IPv6 address in brackets, [::1]:8080",
    "::1:8080": "write an IPv6 address in brackets, [::1]:8080",
    "fe80::1:8080": "write an IPv6 address in brackets, [::1]:8080",
    "[]:80": "'' is not an IPv6 address",
    "[localhost]:80": "'localhost' is not an IPv6 address",
    "[127.0.0.1]:80": "'127.0.0.1' is not an IPv6 address",
    "[::1%]:80": "'::1%' is not an IPv6 address",
    "[::12345]:80": "'::12345' is not an IPv6 address",
    "256.0.0.1:80": "'256.0.0.1' is not an IPv4 address",
    "1.2.3.4.5:80": "'1.2.3.4.5' is not an IPv4 address",
    "1.2.3.4.:80": "'1.2.3.4.' is not an IPv4 address",
    "example.123:80": "'example.123' is not an IPv4 address",
    ".:80": "'.' is not a host name",
    "..:80": "'..' is not a host name",
    "a..b:80": "'a..b' is not a host name",
    ".a:80": "'.a' is not a host name",
    "a.b..:80": "'a.b..' is not a host name",
    "*:80": "'*' is not a host name",
    "a b:80": "'a b' is not a host name",
    "user@host:80": "'user@host' is not a host name",
    "-1:80": "'-1' is not an IPv4 address",
    "127.0.0.1-:80": "'127.0.0.1-' is not an IPv4 address",
    "bücher.example:80": "write an international name in its xn-- form",
    f"{'a' * 64}.b:80": "is not a host name",
    f"a{LONGEST_NAME}:80": "is not a host name",
    f"{LONGEST_NAME}e:80": "is not a host name",
}


def test_what_is_no_address_is_refused() -> None:
    """The refusal quotes what was written and says what is wrong with it."""
    for parse in PARSERS:
        otherwise = {
            text: outcome(parse, text)
            for text, why in REFUSED.items()
            if not refused(parse, text, why)
        }
        assert not otherwise


def test_a_bracket_does_not_open_an_endpoint_type() -> None:
    """An IPv6 address that lacks its port or bracket is told so."""
    for text in ("[::1]", "[::1", "[::1]8080", "[fe80::1%eth0]"):
        for parse in PARSERS:
            assert "endpoint type" not in outcome(parse, text)


@pytest.mark.parametrize("prefix", ["", "udp:"])
def test_multicast_and_broadcast_addresses_are_refused(prefix: str) -> None:
    """Neither to listen on nor to dial, TCP or UDP, in every spelling."""
    groups = ("224.0.0.1", "239.255.255.255", "[ff02::1]", "[ff02::1%eth0]")
    for host in (*groups, "[::ffff:224.0.0.251]"):
        why = "is a multicast group, which relayd neither listens on nor sends to"
        for parse in PARSERS:
            assert refused(parse, f"{prefix}{host}:5353", why)
    for host in ("255.255.255.255", "[::ffff:255.255.255.255]"):
        for parse in PARSERS:
            why = "255.255.255.255 is the broadcast address, which relayd neither"
            assert refused(parse, f"{prefix}{host}:5353", why)
    for host in ("223.255.255.255", "240.0.0.1", "[fec0::1]", "255.255.255.254"):
        for parse in PARSERS:
            assert not isinstance(outcome(parse, f"{prefix}{host}:53"), str)


BROADCAST = "it is a broadcast address of this machine's networks, and not one host's"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("127.255.255.255:80", BROADCAST),
        ("[::ffff:127.255.255.255]:80", BROADCAST),
        ("tcp:127.255.255.255:80", BROADCAST),
        ("tcp:port=80:host=127.255.255.255", BROADCAST),
        ("SSL:127.255.255.255:443", BROADCAST),
        ("tls:example.com:443:endpoint=tcp\\:127.255.255.255\\:80", BROADCAST),
        ("tcp:255.255.255.255:80", "255.255.255.255 is the broadcast address"),
        ("tcp:239.1.1.1:80", "239.1.1.1 is a multicast group"),
        ("tls:239.1.1.1:443", "239.1.1.1 is a multicast group"),
        ("tls:a:443:endpoint=tcp\\:ff02\\\\\\:\\\\\\:1\\:80", "ff02::1 is a multicast"),
    ],
)
def test_a_destination_that_is_not_one_host(text: str, why: str) -> None:
    """In every spelling; some are known when the endpoint is made."""
    with pytest.raises(ConfigError) as caught:
        dialing_endpoint(parse_destination(text), reactor)
    assert why in str(caught.value)
    assert repr(text) in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("tcp:80:interface=127.255.255.255", BROADCAST),
        ("tcp:80:127.255.255.255", BROADCAST),
        ("tcp:80:interface=239.1.1.1", "239.1.1.1 is a multicast group"),
        ("tcp:80:interface=ff02\\:\\:1", "ff02::1 is a multicast group"),
    ],
)
def test_a_listener_that_is_not_one_host(text: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        listening_endpoint(parse_listener(text), reactor)
    assert why in str(caught.value)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *("tcp:127.0.0.1:80", "tcp:name.invalid:80", "tcp:host=\\:\\:1:port=80"),
        *("tls:name.invalid:443", "unix:/run/239.1.1.1", "ssl:9.9.9.9:443"),
    ],
)
def test_other_strings_are_left_alone(text: str) -> None:
    dialing_endpoint(parse_destination(text), reactor)


@pytest.mark.parametrize("prefix", ["", "udp:"])
@pytest.mark.parametrize("host", ["fe80::1", "FE80::abcd", "febf::1"])
def test_a_link_local_address_without_its_interface(prefix: str, host: str) -> None:
    """The kernel would say 'Invalid argument'."""
    why = f"a link-local address needs its interface: write [{host}%eth0]:53, with"
    for parse in PARSERS:
        text = f"{prefix}[{host}]:53"
        assert refused(parse, text, why)
        assert not isinstance(outcome(parse, f"{prefix}[{host}%lo]:53"), str)
        # IPv4's own have no interface.
        assert not isinstance(outcome(parse, f"{prefix}[::ffff:169.254.1.1]:53"), str)


def test_the_wildcard_as_a_destination_is_this_machine() -> None:
    """On Linux it would be in any case; on others it is an error."""
    for written, host in (
        ("80", "127.0.0.1"),
        ("0.0.0.0:80", "127.0.0.1"),
        ("[::]:80", "::1"),
        ("[0:0::0]:80", "::1"),
        ("[::ffff:0.0.0.0]:80", "127.0.0.1"),
        ("127.0.0.9:80", "127.0.0.9"),
        ("[fe80::1%lo]:80", "fe80::1%lo"),
        ("localhost:80", "localhost"),
    ):
        for text in (written, f"udp:{written}"):
            address: Any = parse_destination(text)
            assert dialled_host(address.host) == host
        if host != "localhost":
            endpoint: Any = dialing_endpoint(parse_destination(written), reactor)
            assert endpoint.address[0] == host.partition("%")[0]


def test_another_way_to_write_an_ipv4_address_is_no_name() -> None:
    """What the resolver would read as an address must not pass for a name."""
    hosts = ["127.1", "2130706433", "127.0.1", "0177.0.0.1", "127.0.0.01", "0x7f.1"]
    hosts += ["0x7f000001", "0X7F000001", "127.0.0.0x1", "0x7f.0x1"]
    assert {socket.inet_aton(host) for host in hosts} == {b"\x7f\0\0\1"}
    for parse in PARSERS:
        assert not [
            host for host in hosts if not refused(parse, f"{host}:80", "is not")
        ]


# -- Twisted's endpoint strings


def test_a_server_endpoint_string_is_passed_on() -> None:
    """Twisted's own types, of its core and of its plugins, are not looked into."""
    for text in (
        "tcp:8080",
        "tcp:8080:interface=127.0.0.1",
        "TCP:8080",
        "tcp:",
        "tcp:99999",
        "tcp6:8080",
        "ssl:8443:privateKey=key.pem:certKey=crt.pem",
        "systemd:domain=INET:index=0",
        "unix:/run/x.sock:mode=600",
        "unix:/run/a\\:b",
        "unix:/run/a\\b",
        "unix:relative",
    ):
        assert outcome(parse_listener, text) == EndpointString(text)


def test_a_client_endpoint_string_is_passed_on() -> None:
    """The same for those that connect."""
    for text in (
        "tcp:example.com:80",
        "tcp:host=example.com:port=80:timeout=3",
        "tls:example.com:443",
        "ssl:example.com:443",
        "unix:/run/x.sock:timeout=3",
        "unix:path=/run/x.sock",
    ):
        assert outcome(parse_destination, text) == EndpointString(text)


def test_each_side_has_its_own_endpoint_types() -> None:
    """Nobody dials systemd; the refusal says that the type is not known here."""
    text = "systemd:domain=INET:index=0"
    assert refused(parse_destination, text, "unknown endpoint type 'systemd'")


# -- any text at all

# Mostly pieces of addresses, so that most texts come near to one.
_PIECES = st.sampled_from(
    [*":[]%/\\=.-_ \né", "unix:", "tcp:", "::1", "0", "80", "65536", "127", "0x7f"]
)
ANYTHING = st.text() | st.lists(_PIECES, max_size=9).map("".join)


@given(ANYTHING)
@example("[fe80::1%a]b:c]:80")
@example("unix:/" + "é" * 54)
@example("[::1%a b]:80")
def test_any_text_is_understood_or_refused(text: str) -> None:
    """Never another error, never a message of two lines, and `str` reads back."""
    for parse in PARSERS:
        try:
            where: Address | OriginalAddress = parse(text)
        except ConfigError as problem:
            message = str(problem)
            assert repr(text) in message
            assert message.isprintable()
        else:
            assert parse(str(where)) == where


_NUMBERS = st.integers(0, 2**32).flatmap(
    lambda n: st.sampled_from([str(n), hex(n), f"0{n:o}", hex(n).upper()])
)


@given(
    st.lists(
        st.integers(0, 300).flatmap(
            lambda n: st.sampled_from([str(n), hex(n), f"0{n:o}"])
        )
        | _NUMBERS,
        min_size=1,
        max_size=5,
    ).map(".".join)
)
def test_a_number_is_an_address_or_refused(host: str) -> None:
    """Of all that the resolver reads as an IPv4 address, one form is let in."""
    packed = None
    with suppress(OSError):
        packed = socket.inet_aton(host)
    with suppress(ConfigError):
        where = parse_destination(f"{host}:80")
        if packed is not None:
            assert where == HostPort(socket.inet_ntoa(packed), 80)
            assert re.fullmatch(r"\d+(\.\d+){3}", host)
