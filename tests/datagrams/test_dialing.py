"""The sockets of flows."""

from __future__ import annotations

import socket
from contextlib import closing
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.logger import capturedLogs, formatEvent

from relayd.datagrams.dialing import SELF_TRIES
from relayd.datagrams.sockets import (
    bind_udp,
)
from relayd.udp_nat import Server, UdpNat
from tests.support.ports import free_port


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("unlucky", [1, SELF_TRIES, 1000])
def test_a_socket_that_is_connected_to_itself_is_no_flow(
    host: str, unlucky: int
) -> None:
    """The kernel may hand out the very port that is called, if nobody has it."""
    live: Any = reactor
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened: list[Any] = []
    port = free_port()

    def open_socket(family: int) -> Any:
        sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        if len(opened) < unlucky:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
        opened.append(sock)
        return sock

    with closing(socket.socket(family, socket.SOCK_DGRAM)) as client:
        client.bind((host, 0))
        nat = UdpNat(live, [Server(host, port)], open_socket=open_socket)
        listener = bind_udp(host, 0)
        nat.listen([listener])
        client.sendto(b"hello?", listener.getsockname())
        with capturedLogs() as events:
            assert nat.listeners[0].read() is not None
        if unlucky < SELF_TRIES:
            assert len(nat.table) == 1
            assert len(opened) == unlucky + 1
        else:
            assert not nat.table.flows
            assert nat.counters.dropped == {"no_flow": 1}
            assert len(opened) == SELF_TRIES
            assert f":{port} but its own socket (1 datagrams" in formatEvent(events[0])
        nat.close()
    assert all(each.fileno() < 0 for each in opened)
