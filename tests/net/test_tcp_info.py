"""What the kernel tells of connections: real sockets, and things that are none."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import Mock

import pytest

from relayd.net import tcp_info as module
from relayd.net.tcp_info import (
    TcpInfo,
    ended_unread,
    has_ended,
    is_dead,
    parse,
    since_data,
    take_error,
    tcp_info,
    unacknowledged,
    unread,
    was_reset,
)
from tests.support.process import eventually, reset

linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems don't tell")

FAMILIES = [socket.AF_INET, socket.AF_INET6]


@contextmanager
def connected(family: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection."""
    with socket.socket(family) as listener:
        listener.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        listener.listen()
        with socket.create_connection(listener.getsockname()[:2]) as one:
            other, _ = listener.accept()
            with other:
                yield one, other


def quiet(sock: socket.socket) -> float:
    """Seconds without data."""
    told = since_data(sock)
    assert told is not None
    return min(told.sent, told.arrived)


class NoSocket:
    """What has a descriptor, but of something else."""

    def __init__(self, number: object) -> None:
        self.fileno = lambda: number


@linux
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tcp_info_of_a_connection(family: int) -> None:
    with connected(family) as (one, other):
        info = tcp_info(one)
        assert info is not None
        assert info.window >= 4096
        assert (info.retransmits, info.probes) == (0, 0)
        assert 0 <= info.since_heard < 5
        one.sendall(b"hello")
        eventually(lambda: unread(other) == 5)
        eventually(lambda: unacknowledged(one) == 0)
        assert unread(one) == 0
        assert not is_dead(one)
        # It was lent, and is still its owner's.
        assert other.recv(9) == b"hello"


@linux
@pytest.mark.parametrize("family", FAMILIES)
def test_who_had_the_last_word(family: int) -> None:
    """A question was sent after the answer before it, and then it is the other way."""
    with connected(family) as (client, server):
        for sender, receiver, asks in ((client, server, True), (server, client, False)):
            # So that the two do not fall into one tick of the kernel.
            eventually(lambda: quiet(server) >= 0.02)
            sender.sendall(b"word")
            assert receiver.recv(9) == b"word"
            told = since_data(server)
            assert told is not None
            assert (told.arrived < told.sent) is asks


@linux
def test_an_answer_is_acknowledged_alone() -> None:
    """Where nothing is asked at once, and after the first two or three exchanges."""
    with connected(socket.AF_INET) as (client, server):
        for each in (client, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for sender, receiver in ((client, server), (server, client)) * 8:
            sender.sendall(b"word")
            assert receiver.recv(9) == b"word"
        eventually(lambda: quiet(server) >= 0.2)
        told = since_data(server)
        assert told is not None
        assert told.acknowledged < told.arrived


@linux
def test_a_peer_that_does_not_read_closes_its_window() -> None:
    with connected(socket.AF_INET) as (one, _):
        one.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                one.send(bytes(65536))
        eventually(lambda: (info := tcp_info(one)) is not None and not info.window)
        assert unacknowledged(one) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reset_of_a_connection_that_is_not_read(family: int) -> None:
    with connected(family) as (one, other):
        assert not was_reset(one)
        other.sendall(b"before")
        reset(other)
        eventually(lambda: was_reset(one))
        assert is_dead(one)
        if sys.platform == "linux":
            assert unread(one) == 6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_of_a_connection_that_is_not_read_is_told_once(family: int) -> None:
    with connected(family) as (one, other):
        assert take_error(one) == 0
        reset(other)
        eventually(lambda: was_reset(one))
        assert take_error(one) == errno.ECONNRESET
        assert take_error(one) == 0
        assert not was_reset(one)


@linux
def test_the_error_of_a_peer_that_is_lost() -> None:
    with connected(socket.AF_INET) as (one, _):
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 50)
        one.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                one.send(bytes(65536))
        eventually(lambda: was_reset(one))
        assert take_error(one) == errno.ETIMEDOUT


@pytest.mark.parametrize("family", FAMILIES)
def test_an_end_of_data_is_no_reset(family: int) -> None:
    with connected(family) as (one, other):
        other.close()
        eventually(lambda: one.recv(1, socket.MSG_PEEK) == b"")
        assert not was_reset(one)
        assert not is_dead(one)


def test_a_unix_socket() -> None:
    """It has no tcp_info; and one that was closed has sent what it sent."""
    one, other = socket.socketpair()
    with one:
        with other:
            assert tcp_info(one) is since_data(one) is None
            other.sendall(b"before")
            assert unread(one) == 6
        assert not was_reset(one)
        assert is_dead(one)
        assert one.recv(9) == b"before"


@pytest.mark.parametrize("number", [-1, None, "x", 1 << 30])
def test_a_transport_without_a_descriptor(number: object) -> None:
    """As if everything were in order."""
    for each in (NoSocket(number), object()):
        assert tcp_info(each) is since_data(each) is None
        assert unacknowledged(each) == unread(each) == 0
    assert not is_dead(object())


def test_a_descriptor_of_something_else_is_left_alone() -> None:
    reading, writing = os.pipe()
    try:
        for end in (reading, writing):
            assert tcp_info(NoSocket(end)) is None
            os.fstat(end)
    finally:
        os.close(reading)
        os.close(writing)


def test_a_system_without_tcp_info(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TCP_INFO", None)
    monkeypatch.setattr(module, "SIOCOUTQ", None)
    with connected(socket.AF_INET) as (one, _):
        assert tcp_info(one) is since_data(one) is None
        assert unacknowledged(one) == 0


def test_a_sandbox_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever errno it has for that."""

    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    with connected(socket.AF_INET) as (one, _):
        monkeypatch.setattr(module, "TCP_INFO", 1 << 20)
        assert tcp_info(one) is since_data(one) is None
        monkeypatch.setattr(module.fcntl, "ioctl", refuse)
        assert unacknowledged(one) == unread(one) == 0
        refusing = Mock(getsockopt=refuse)
        monkeypatch.setattr(module, "lent_socket", lambda _: nullcontext(refusing))
        assert take_error(one) == 0


def test_older_kernels_report_less() -> None:
    """struct tcp_info grows at its end: what is missing is not made up."""
    whole = bytearray(280)
    whole[2], whole[3] = 5, 6
    whole[44:48] = (1500).to_bytes(4, sys.byteorder)
    whole[56:60] = (2500).to_bytes(4, sys.byteorder)
    whole[228:232] = (70000).to_bytes(4, sys.byteorder)
    assert parse(bytes(whole)) == TcpInfo(70000, 5, 6, 1.5, 2.5)
    assert parse(bytes(whole[:224])) == TcpInfo(0, 5, 6, 1.5, 2.5)
    assert parse(bytes(whole[:56])) is None
    assert parse(b"") is None


@linux
@pytest.mark.parametrize("unix", [False, True])
def test_an_end_behind_what_is_unread(unix: bool) -> None:
    """Which a read, or a look at what there is, does not show."""
    with ExitStack() as held:
        if unix:
            one, other = map(held.enter_context, socket.socketpair())
        else:
            one, other = held.enter_context(connected(socket.AF_INET))
        other.send(b"unread")
        eventually(lambda: unread(one) == 6)
        assert not has_ended(one)
        other.shutdown(socket.SHUT_WR)
        eventually(lambda: has_ended(one))
        assert not ended_unread(one)
        assert one.recv(9) == b"unread"
        assert has_ended(one)
        eventually(lambda: ended_unread(one))


def test_an_end_where_poll_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ENDED", 0)
    one, other = socket.socketpair()
    with one, other:
        assert not has_ended(one)
        other.close()
        assert has_ended(one)
