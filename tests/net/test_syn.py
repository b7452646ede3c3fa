"""The timestamps of SYNs, which tell connections with the same ends apart."""

from __future__ import annotations

import socket
import struct
import sys
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.core.hops import EARLIER, LATER, NO_STAMP
from relayd.net import syn
from relayd.net.syn import (
    is_marked,
    mark_syn,
    save_syn,
    stamp_in,
    stamp_of_client,
    stamp_of_dial,
)
from tests.support.process import Server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="of Linux")

IPV4, IPV6 = socket.AF_INET, socket.AF_INET6


def tcp(options: bytes) -> bytes:
    """A header of TCP."""
    options += bytes(-len(options) % 4)
    length = (20 + len(options)) // 4 << 4
    return bytes(12) + bytes([length]) + bytes(7) + options


def ip4(extra: int = 0) -> bytes:
    """A header of IPv4, with so many words of options."""
    return bytes([0x45 + extra]) + bytes(19 + extra * 4)


def ip6(*extensions: tuple[int, int]) -> bytes:
    """A header of IPv6, with extensions: what each is, and its field of length."""
    kinds = [kind for kind, _ in extensions] + [6]
    header = b"\x60" + bytes(5) + bytes([kinds[0]]) + bytes(33)
    for (kind, length), then in zip(extensions, kinds[1:], strict=True):
        size = 8 if kind == 44 else (length + 1) * 8
        header += bytes([then, length]) + bytes(size - 2)
    return header


def stamp(value: int) -> bytes:
    """The option, RFC 7323."""
    return b"\x08\x0a" + struct.pack("!II", value, 0)


#: What Linux sends: MSS, SACK, timestamps, and the scale of the window.
LINUX = b"\x02\x04\x05\xb4\x04\x02%s\x01\x03\x03\x07"


HEADERS = [
    *(ip4(), ip4(10), ip6()),
    *(ip6((0, 0)), ip6((0, 1), (43, 0), (60, 2)), ip6((44, 99))),
]


@given(header=st.sampled_from(HEADERS), value=st.integers(0, 2**32 - 1))
def test_it_is_found(header: bytes, value: int) -> None:
    assert stamp_in(header + tcp(LINUX % stamp(value))) == value
    assert stamp_in(header + tcp(stamp(value))) == value


@pytest.mark.parametrize(
    "options",
    [
        b"",
        b"\x02\x04\x05\xb4\x01\x03\x03\x08\x01\x01\x04\x02",  # as Windows sends
        b"\x00" + stamp(1),
        b"\x08",
        b"\x08\x0a\x00",
        b"\x08\x00" + bytes(10),
        b"\x08\x01" + bytes(10),
        b"\x08\x06" + bytes(4),
        b"\xfe\xff" + stamp(1),
    ],
)
def test_there_may_be_none(options: bytes) -> None:
    assert stamp_in(ip4() + tcp(options)) is None


@given(data=st.binary(max_size=200))
def test_nothing_is_raised_whatever_it_is(data: bytes) -> None:
    for begin in (b"", ip4(), ip6((0, 3)), b"\x60" + bytes(5) + b"\x2c"):
        found = stamp_in(begin + data)
        assert found is None or 0 <= found < 2**32


@pytest.mark.parametrize("family", [IPV4, IPV6])
def test_both_ends_have_the_same(family: int) -> None:
    with Server(family) as server, socket.socket(family) as client:
        save_syn(server.socket)
        mark_syn(client)
        client.setblocking(False)
        began = monotonic()
        client.connect_ex(server.socket.getsockname())
        ours = stamp_of_dial(client)
        took = monotonic() - began
        with server.accept() as accepted:
            theirs = stamp_of_client(accepted)
            assert ours is not None
            assert theirs is not None
            # In milliseconds, each rounded; the scheduler may come between two calls.
            assert -LATER <= ours - theirs <= took * 1000 + EARLIER
            # It is kept no longer.
            assert stamp_of_client(accepted) is None


def test_of_a_listener_that_saves_none() -> None:
    with Server() as server, socket.socket() as client:
        client.connect(server.socket.getsockname())
        with server.accept() as accepted:
            assert stamp_of_client(accepted) is None


def test_of_other_sockets() -> None:
    one, other = socket.socketpair()
    with one, other:
        save_syn(one)
        assert stamp_of_client(one) is None
        assert stamp_of_dial(one) is None
    assert stamp_of_client(one) is None
    assert stamp_of_client(object()) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [("1\n", NO_STAMP), ("2\n", NO_STAMP), ("0\n", None), (None, NO_STAMP)],
)
def test_a_syn_without_one(
    text: str | None, found: int | None, tmp_path: Path, monkeypatch: Any
) -> None:
    """Says that it is not of this machine, if those have one."""
    sysctl = tmp_path / "tcp_timestamps"
    if text is not None:
        sysctl.write_text(text)
    monkeypatch.setattr(syn, "SYSCTL", str(sysctl))
    monkeypatch.setattr(syn, "stamp_in", lambda _: None)
    with Server() as server, socket.socket() as client:
        save_syn(server.socket)
        mark_syn(client)
        client.connect(server.socket.getsockname())
        with server.accept() as accepted:
            assert stamp_of_client(accepted) == found


@pytest.mark.parametrize("family", [IPV4, IPV6])
@pytest.mark.parametrize("again", [False, True], ids=["never", "no-longer"])
def test_one_that_is_not_marked_is_not_the_relays(family: int, again: bool) -> None:
    """Whatever its timestamp is: it may be of this machine's clock."""
    with Server(family) as server, socket.socket(family) as client:
        save_syn(server.socket)
        if again:
            mark_syn(client)
            mark_syn(client, marked=False)
        client.connect(server.socket.getsockname())
        with server.accept() as accepted:
            assert stamp_of_client(accepted) == NO_STAMP


@given(st.binary(max_size=60))
def test_anything_is_marked_or_not(data: bytes) -> None:
    assert not is_marked(data[:1])
    assert is_marked(b"\x45\x2c" + data)
    assert not is_marked(b"\x45\x00" + data)
    assert is_marked(b"\x62\xc0" + data)
    assert not is_marked(b"\x60\x00" + data)


def test_a_socket_that_is_closed_can_be_marked() -> None:
    closed = socket.socket()
    closed.close()
    mark_syn(closed)
