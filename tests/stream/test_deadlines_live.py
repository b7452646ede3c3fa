"""A Watch of two real connections, one of which is lost while it is not read."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from relayd.core.session import Ending, Session
from relayd.net.tcp_info import was_reset
from relayd.plane.connection_base import EDGE_BOTH
from relayd.plane.poller import Plane
from relayd.stream.bridge import RESET_POLL_LAST, Bridge, Leg, Timeouts
from tests.support.pumping import NOISE, Scripted, Side, sockets
from tests.support.standing import Still, still

__all__ = ["still"]


def narrow() -> list[socket.socket]:
    """Two ends of a connection: ours, and one whose kernel takes little."""
    far = socket.socket()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        far.connect(listening.getsockname())
        return [listening.accept()[0], far]


def test_a_server_that_is_lost_while_its_client_is_full_is_told_as_lost(
    still: Still,
) -> None:
    """What it has said is delivered, then the client is reset.

    The kernel tells of its error once, to the Watch; nobody reads the connection then.
    """
    plane = Plane.of(still)
    session = Session(1, "client", "listener", 0.0)
    downstream, upstream = Leg(session.up), Leg(session.down)
    over: list[Ending | None] = []
    downstream.over = lambda: over.append(session.ending)  # type: ignore[method-assign]
    client = Side(plane, sockets("tcp"), downstream, kind=Scripted)
    server = Side(plane, narrow(), upstream)
    bridge = Bridge(session, downstream, upstream, Timeouts(), still)
    bridge.start()
    # The server takes nothing: the rest stays with our kernel.
    client.peer.socket.send(NOISE[:30_000])
    still.until(lambda: session.up.read == 30_000)
    assert server.transport.clear
    # Nor does the client, for whom something waits.
    client.transport.getHandle().script = [errno.EAGAIN] * 2
    server.peer.socket.send(b"an answer")
    still.until(lambda: server.transport.blocked)
    handle = server.transport.getHandle()
    handle.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 50)
    still.until(lambda: was_reset(server.transport))
    still.settle()
    assert session.ending is None
    bridge.check(still.seconds())
    assert session.ending is Ending.UPSTREAM_LOST
    assert session.detail == os.strerror(errno.ETIMEDOUT)
    still.settle()
    assert not upstream.alive
    assert downstream.alive
    # The kernel, which has room, did not say so, as it did not refuse.
    client.transport.getHandle().script.clear()
    plane.change_mask(client.transport.fileno(), EDGE_BOTH)
    still.until(lambda: client.peer.take() or client.peer.data)
    assert client.peer.data == b"an answer"
    still.until(lambda: still.advance(RESET_POLL_LAST) or over)
    assert over == [Ending.UPSTREAM_LOST]
    with pytest.raises(ConnectionResetError):
        client.peer.take()
    client.peer.socket.close()
    server.peer.socket.close()
