"""Sockets of transports that relayd has not made."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.protocol import Factory

from relayd.net.foreign_transports import is_self_connected, lent_socket
from tests.support.contracts import Recorder, until


class Descriptor:
    """What has one, if of something else."""

    def __init__(self, number: object) -> None:
        self.fileno = lambda: number


@pytest.mark.parametrize("number", [-1, None, "x", 1 << 30])
def test_a_transport_without_a_descriptor_lends_no_socket(number: object) -> None:
    for each in (Descriptor(number), object()):
        with lent_socket(each) as sock:
            assert sock is None
        assert not is_self_connected(each)


def test_a_descriptor_of_something_else_is_left_alone() -> None:
    reading, writing = os.pipe()
    try:
        for end in (reading, writing):
            with lent_socket(Descriptor(end)) as sock:
                assert sock is None
            os.fstat(end)
    finally:
        os.close(reading)
        os.close(writing)


def test_a_lent_socket_stays_open_when_the_block_fails() -> None:
    one, other = socket.socketpair()
    with one, other:
        with pytest.raises(ZeroDivisionError), lent_socket(one) as sock:
            assert sock is not None
            raise ZeroDivisionError
        other.sendall(b"x")
        assert one.recv(1) == b"x"


def test_a_unix_socket_without_a_name_is_not_self_connected() -> None:
    one, other = socket.socketpair()
    with one, other:
        assert one.getsockname() == one.getpeername()
        assert not is_self_connected(one)


@pytest_twisted.ensureDeferred
async def test_a_twisted_endpoint_that_is_self_connected() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        there = free.getsockname()
    endpoint = TCP4ClientEndpoint(reactor, *there, bindAddress=there)
    factory: Any = Factory.forProtocol(Recorder)
    protocol: Any = await endpoint.connect(factory)
    assert is_self_connected(protocol.transport)
    protocol.transport.abortConnection()
    await until(lambda: "lost" in protocol.events)
