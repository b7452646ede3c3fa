"""How a check of a server is written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.core.check_grammar import (
    MAX_TEXT,
    MAX_URL,
    Check,
    HttpCheck,
    PythonCheck,
    TcpCheck,
    UdpCheck,
    parse_check,
)


@pytest.mark.parametrize(
    ("text", "check"),
    [
        ("tcp", TcpCheck(text="")),
        (" tcp  port=8008 ", TcpCheck(text="", port=8008)),
        (
            r'tcp send="PING\r\n" expect="+PONG"',
            TcpCheck(text="", send=b"PING\r\n", expect=b"+PONG"),
        ),
        ('tcp expect="220 "', TcpCheck(text="", expect=b"220 ")),
        ("tcp expect=a=b", TcpCheck(text="", expect=b"a=b")),
        (r'tcp expect="\"\\\x00\0"', TcpCheck(text="", expect=b'"\\\0\0')),
        ("tcp expect=é", TcpCheck(text="", expect="é".encode())),
        (
            r"udp port=53 send=\x01\x02 expect=ok",
            UdpCheck(text="", port=53, send=b"\x01\x02", expect=b"ok"),
        ),
        ("http://:8008/primary", HttpCheck(text="", port=8008, path="/primary")),
        ("http://", HttpCheck(text="")),
        (
            'http:///up?a=1 expect="all is well"',
            HttpCheck(text="", path="/up?a=1", expect=b"all is well"),
        ),
        (
            "http://Db.Example:80/",
            HttpCheck(text="", host="db.example", port=80),
        ),
        ("http://[::1]:80", HttpCheck(text="", host="[::1]", port=80)),
        (
            "python:my.checks:Role.is_up",
            PythonCheck(text="", module="my.checks", function="Role.is_up"),
        ),
    ],
)
def test_what_is_written(text: str, check: Check) -> None:
    found = parse_check(text)
    assert found == check
    assert str(found) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "expected tcp, "),
        ("tcp:80", "expected tcp, "),
        ("ping", "expected tcp, "),
        ("tcp up", "'up' is none of port=, send="),
        ("tcp port=80 send", "'send' is none of"),
        ("tcp status=200", "'status=200' is none of"),
        ('tcp send="a" expect="b', "'expect=\"b' is none of"),
        ('tcp expect="a"b', "is none of"),
        ("tcp " + "x" * 5000, r"x{40}…' is none of"),
        ("tcp port=0", "port=0 is no port: expected 1 to 65535"),
        ("tcp port=65536", "port=65536 is no port"),
        ("tcp port=\u0661", "port=\u0661 is no port"),
        ("tcp port=1 port=2", "port= is given twice"),
        ("tcp send=PING", "says nothing without an expect="),
        (r"tcp expect=\q", r"\\q is no escape: expected \\n, "),
        (r"tcp expect=\x1", r"\\x is no escape"),
        ('tcp expect=""', "expect= is 1 to 1024 bytes, not 0"),
        ("tcp expect=" + "a" * 1025, "expect= is 1 to 1024 bytes, not 1025"),
        ("udp", "needs a send="),
        ("http:/x", "expected a URL such as"),
        ("http://a:b/", "expected a URL such as"),
        ("http://:0/", "expected a URL such as"),
        ("http://[::1/", "expected a URL such as"),
        ("http://me:secret@:80/", "without a user"),
        ("http://:80/#top", "without a fragment"),
        ("http://:80/ü", "in ASCII"),
        ("http://:80/a\r\nX-Evil:", "is none of|in ASCII"),
        ("http://:80/" + "a" * MAX_URL, "up to 2048 characters"),
        ("http://:80/ send=x", "'send=x' is none of expect="),
        ("https://:80/", "https is not checked: .* python: check"),
        ("python:module", "expected python:MODULE:FUNCTION"),
        ("python::f", "expected python:MODULE:FUNCTION"),
        ("python:../m:f", "expected python:MODULE:FUNCTION"),
        ("python:m:f x", "expected tcp, "),
    ],
)
def test_what_is_not_understood(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_check(text)


def quoted(data: bytes) -> str:
    """Any bytes, as they may be written."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in data) + '"'


@given(st.binary(min_size=1, max_size=MAX_TEXT), st.binary(min_size=1, max_size=50))
def test_any_bytes_can_be_written(send: bytes, expect: bytes) -> None:
    found = parse_check(f"tcp send={quoted(send)} expect={quoted(expect)}")
    assert found == TcpCheck(text="", send=send, expect=expect)


@given(st.sampled_from(["", "tcp ", "udp ", "http://", "python:"]), st.text())
def test_nothing_else_is_raised(head: str, text: str) -> None:
    try:
        parse_check(head + text)
    except ValueError as problem:
        assert "\n" not in str(problem)
