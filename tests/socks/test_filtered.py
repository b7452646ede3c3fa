"""Proxies with filters: they see what is relayed, and no request or reply."""

from __future__ import annotations

import pytest

from relayd.core.session import Ending
from relayd.preludes.socks4 import Code, write_reply
from tests.support.own_filters import Keeps, Makes, Marks
from tests.support.proxies import BIND, CONNECT, GRANTED, SERVER, Proxy


def test_connect() -> None:
    proxy = Proxy(filters=[Makes(Marks, b".")])
    client = proxy.client(CONNECT + b"early")
    server = proxy.server.dial.connect()
    client.receive(b"more")
    server.receive(b"answer")
    server.take()
    client.take()
    assert server.taken == b"early.more."
    assert client.taken == GRANTED + b"answer."
    client.receive_eof()
    server.receive_eof()
    proxy.over(Ending.DONE)


@pytest.mark.parametrize("held", [False, True])
def test_bind(held: bool) -> None:
    keeps = Makes(Keeps, course="up")
    proxy = Proxy(bind_address="192.0.2.2", filters=[keeps, Makes(Marks, b".")])
    client = proxy.client(BIND + b"early")
    peer = proxy.port.accept(SERVER, 20)
    peer.receive(b"a file")
    client.take()
    replies = [("192.0.2.2", 7000), (SERVER, 20)]
    granted = b"".join(write_reply(Code.GRANTED, *each) for each in replies)
    assert client.taken == granted + b"a file."
    peer.take()
    assert peer.taken == b""
    client.receive_eof()
    if held:
        keeps.of("up").let_go()
        peer.take()
        assert peer.taken == b"early."
        assert peer.write_shut
        peer.receive_eof()
    else:
        [protocol] = proxy.factory.sessions.values()
        protocol.abort_session(Ending.KILLED)
        proxy.clock.advance(0)
    proxy.over(Ending.DONE if held else Ending.KILLED)
    assert keeps.closed_once()
