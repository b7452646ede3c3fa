"""The SOCKS4 proxy on fakes, at every moment before a client is joined to a server.

The MOMENTS are the stages that a client goes through until then, each with what is
under way: a side leaves, time is up, the relay stops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest
from twisted.internet.address import IPv4Address

from relayd.core.session import Ending
from relayd.preludes.socks4 import Code, write_reply
from relayd.stream.bridge import HOLD_LIMIT
from relayd.stream.factory import Unserved
from relayd.stream.lifecycle import LEFT_GRACE
from tests.support.fakes import FakeTransport
from tests.support.proxies import (
    BIND,
    BIND_BY_NAME,
    CONNECT,
    CONNECT_BY_NAME,
    SERVER,
    Proxy,
    refused,
)

# -- at every moment before the Bridge: each side leaves, time is up, the relay stops


@attrs.frozen
class Moment:
    """A client in some stage.

    :ivar name: for the test's.
    :ivar reach: brings a new client there; returns it.
    :ivar released: whether what was under way then has been given up.
    :ivar overdue: how the stage ends when its time is up.
    :ivar code: what the client is told then.
    :ivar replies: what it has been told before.
    """

    name: str
    options: dict[str, Any]
    reach: Callable[[Proxy], FakeTransport]
    released: Callable[[Proxy], bool]
    overdue: Ending
    code: Code = Code.REJECTED
    replies: bytes = b""


def _to_ident(proxy: Proxy) -> FakeTransport:
    client = proxy.client(CONNECT)
    [_] = proxy.clock.connectors
    return client


#: Before it has said what it wants.
DEFAULT_HANDSHAKES = [
    Moment(
        "before a byte",
        {},
        lambda proxy: proxy.client(),
        lambda _: True,
        Ending.HANDSHAKE_TIMEOUT,
    ),
    Moment(
        "in the handshake",
        {},
        lambda proxy: proxy.client(CONNECT[:-1]),
        lambda _: True,
        Ending.HANDSHAKE_TIMEOUT,
    ),
]


#: After that, and before it is joined.
MOMENTS = [
    Moment(
        "identd is being asked",
        {"ident": True},
        _to_ident,
        lambda proxy: proxy.clock.connectors[0].stoppedConnecting,
        Ending.IDENT_FAILED,
        Code.NO_IDENT,
    ),
    Moment(
        "the name is looked up",
        {},
        lambda proxy: proxy.client(CONNECT_BY_NAME),
        lambda proxy: proxy.resolver.cancelled == 1,
        Ending.CONNECT_TIMEOUT,
    ),
    Moment(
        "the server is dialled",
        {},
        lambda proxy: proxy.client(CONNECT),
        lambda proxy: proxy.server.cancelled == 1,
        Ending.CONNECT_TIMEOUT,
    ),
    Moment(
        "the name of BIND is looked up",
        {},
        lambda proxy: proxy.client(BIND_BY_NAME),
        lambda proxy: proxy.resolver.cancelled == 1,
        Ending.CONNECT_TIMEOUT,
    ),
    Moment(
        "BIND's listener is opened",
        {"opens": False},
        lambda proxy: proxy.client(BIND),
        lambda proxy: not proxy.listeners[0].open().is_open,
        Ending.BIND_TIMEOUT,
    ),
    Moment(
        "BIND waits",
        {"bind_address": "192.0.2.2"},
        lambda proxy: proxy.client(BIND),
        lambda proxy: not proxy.port.is_open,
        Ending.BIND_TIMEOUT,
        replies=write_reply(Code.GRANTED, "192.0.2.2", 7000),
    ),
]


def _name(moment: Moment) -> str:
    return moment.name


at_every_moment = pytest.mark.parametrize(
    "moment", DEFAULT_HANDSHAKES + MOMENTS, ids=_name
)


at_every_moment_after = pytest.mark.parametrize("moment", MOMENTS, ids=_name)


def reached(moment: Moment, **options: Any) -> tuple[Proxy, FakeTransport]:
    """A proxy, and its client at that moment."""
    proxy = Proxy(**(moment.options | options))
    client = moment.reach(proxy)
    client.take()
    assert client.taken == moment.replies
    client.taken = b""
    assert client.connected
    return proxy, client


@at_every_moment
def test_the_client_resets(moment: Moment) -> None:
    proxy, client = reached(moment)
    client.lose()
    assert moment.released(proxy)
    assert proxy.session.up.read == 0
    proxy.over(Ending.CLIENT_LEFT)


@pytest.mark.parametrize("moment", DEFAULT_HANDSHAKES, ids=_name)
def test_the_client_ends_its_side_in_the_handshake(moment: Moment) -> None:
    proxy, client = reached(moment)
    client.receive_eof()
    refused(client)
    assert proxy.session.up.read == 0
    assert (
        proxy.session.detail
        == {
            "before a byte": "said nothing",
            "in the handshake": "in the middle of its request",
        }[moment.name]
    )
    proxy.over(Ending.CLIENT_LEFT)


@at_every_moment_after
def test_the_client_ends_its_side_with_nothing_sent(moment: Moment) -> None:
    proxy, client = reached(moment)
    client.receive_eof()
    proxy.clock.advance(LEFT_GRACE / 2)
    assert client.connected
    proxy.clock.pump([0.2] * 10)
    assert moment.released(proxy)
    refused(client)
    proxy.over(Ending.CLIENT_LEFT)


@at_every_moment_after
def test_the_client_ends_its_side_with_the_data_sent(moment: Moment) -> None:
    proxy, client = reached(moment)
    client.receive(b"all that I have")
    client.receive_eof()
    proxy.clock.pump([0.5] * int(LEFT_GRACE * 4))
    assert client.connected, "it waits for its answer"
    server = _go_on(proxy)
    server.take()
    assert server.taken == b"all that I have"
    assert server.write_shut
    server.receive(b"the answer")
    server.receive_eof()
    client.take()
    assert client.taken.endswith(b"the answer")
    proxy.over(Ending.DONE)


def _go_on(proxy: Proxy) -> FakeTransport:
    """What is under way comes to its end; the other side's connection."""
    if proxy.factory.ident:
        proxy.identd()[0].dataReceived(b"50000, 80 : USERID : UNIX : joe\r\n")
    if proxy.resolver.asked:
        proxy.resolver.answer(SERVER)
    if proxy.servers:
        return proxy.server.dial.connect()
    port = proxy.ports[0] if proxy.ports else proxy.listeners[0].open()
    transport = port.accept(SERVER)
    assert not port.is_open
    return transport


@pytest.mark.parametrize("request_", [CONNECT, BIND])
def test_a_client_that_left_during_ident_has_no_more_time_afterwards(
    request_: bytes,
) -> None:
    proxy = Proxy(ident=True)
    client = proxy.client(request_)
    client.receive_eof()
    proxy.clock.advance(LEFT_GRACE / 2)
    proxy.identd()[0].dataReceived(b"50000, 80 : USERID : UNIX : joe\r\n")
    proxy.clock.pump([0.2] * 10)
    client.take()
    proxy.over(Ending.CLIENT_LEFT)


def test_a_client_that_left_during_a_look_up_gets_no_listener_for_long() -> None:
    proxy = Proxy()
    client = proxy.client(BIND_BY_NAME)
    client.receive_eof()
    proxy.clock.advance(LEFT_GRACE / 2)
    proxy.resolver.answer(SERVER)
    assert proxy.port.is_open
    proxy.clock.pump([0.2] * 10)
    client.take()
    proxy.over(Ending.CLIENT_LEFT)


@pytest.mark.parametrize("request_", [CONNECT, BIND])
def test_a_client_that_sent_its_data_during_ident_has_its_time(request_: bytes) -> None:
    proxy = Proxy(ident=True)
    client = proxy.client(request_ + b"data")
    client.receive_eof()
    proxy.identd()[0].dataReceived(b"50000, 80 : USERID : UNIX : joe\r\n")
    proxy.clock.pump([0.5] * int(LEFT_GRACE * 8))
    assert client.connected
    client.lose()
    proxy.over(Ending.CLIENT_LEFT)


TIMES: dict[str, Any] = {
    "handshake_timeout": 3.0,
    "connect_timeout": 4.0,
    "bind_timeout": 5.0,
}


NEVER: dict[str, Any] = dict.fromkeys(TIMES, 0.0)


#: Which of them it is that a session of this ending has run out of.
LIMITS = {
    Ending.HANDSHAKE_TIMEOUT: 3.0,
    Ending.IDENT_FAILED: 3.0,
    Ending.CONNECT_TIMEOUT: 4.0,
    Ending.BIND_TIMEOUT: 5.0,
}


@at_every_moment
def test_its_time_is_up(moment: Moment) -> None:
    proxy, client = reached(moment, **TIMES)
    limit = LIMITS[moment.overdue]
    proxy.clock.pump([0.25] * int(4 * limit - 1))
    assert not client.disconnecting
    proxy.clock.pump([0.25] * 4)
    assert moment.released(proxy)
    refused(client, moment.code)
    assert proxy.session.reply == moment.code
    assert f"{limit:g} s" in proxy.session.detail
    proxy.over(moment.overdue)


def test_a_slow_client_gets_no_more_time_for_each_byte() -> None:
    proxy = Proxy(**TIMES)
    client = proxy.client()
    for byte in CONNECT[:5]:
        client.receive(bytes([byte]))
        proxy.clock.pump([0.25] * 2)
    proxy.clock.pump([0.25] * 4)
    refused(client)
    proxy.over(Ending.HANDSHAKE_TIMEOUT)


@at_every_moment
def test_no_timeout_means_never(moment: Moment) -> None:
    proxy, client = reached(moment, **NEVER)
    # ident's own is not among them.
    proxy.clock.pump([1] * (9 if proxy.factory.ident else 500))
    assert client.connected
    client.lose()
    proxy.over(Ending.CLIENT_LEFT)


@at_every_moment
def test_a_client_that_does_not_take_its_refusal_is_reset(moment: Moment) -> None:
    proxy, client = reached(moment, **TIMES)
    proxy.clock.pump([0.25] * int(4 * LIMITS[moment.overdue] + 3))
    assert client.connected
    assert client.dataBuffer == write_reply(moment.code)
    # It takes no place of those who still may become something.
    assert not len(proxy.factory.handshakes)
    assert not len(proxy.factory.binds)
    proxy.clock.pump([0.25] * 24)
    assert client.log[-1] == "abort"
    proxy.over(moment.overdue)


@at_every_moment
def test_a_drain_waits_and_then_aborts(moment: Moment) -> None:
    proxy, client = reached(moment)
    done: list[None] = []
    proxy.factory.drain(5).addCallback(done.append)
    late = proxy.factory.buildProtocol(IPv4Address("TCP", "192.0.2.1", 1))
    assert isinstance(late, Unserved)
    proxy.clock.advance(4.9)
    assert not done
    assert client.connected
    proxy.clock.advance(0.2)
    assert done == [None]
    assert client.log[-1] == "abort"
    assert moment.released(proxy)
    proxy.over(Ending.DRAINED)


@at_every_moment_after
def test_a_drain_lets_it_finish(moment: Moment) -> None:
    proxy, client = reached(moment)
    done: list[None] = []
    proxy.factory.drain(5).addCallback(done.append)
    server = _go_on(proxy)
    client.receive(b"last words")
    client.receive_eof()
    server.take()
    assert server.taken == b"last words"
    assert not done
    server.receive_eof()
    client.take()
    assert done == [None]
    proxy.over(Ending.DONE)


@at_every_moment_after
def test_what_a_client_sends_meanwhile_is_bounded(moment: Moment) -> None:
    proxy, client = reached(moment)
    sent = 0
    while client.reading:
        client.receive(bytes(10_000))
        sent += 10_000
    assert HOLD_LIMIT <= sent < HOLD_LIMIT + 10_000
    server = _go_on(proxy)
    server.take()
    assert server.taken == bytes(sent)
    assert client.reading, "it is read again"
    client.lose()
    server.take()


# -- each side leaves after they were joined


@pytest.mark.parametrize("by", ["connect", "bind"])
@pytest.mark.parametrize(
    ("who", "ending"),
    [
        ("client", Ending.DOWNSTREAM_RESET),
        ("server", Ending.UPSTREAM_RESET),
    ],
)
def test_a_reset_is_passed_on(by: str, who: str, ending: Ending) -> None:
    proxy = Proxy()
    if by == "connect":
        client, server = proxy.joined()
    else:
        client, port = proxy.bound()
        server = port.accept(SERVER)
        client.take()
    one, other = (client, server) if who == "client" else (server, client)
    one.receive(b"last words")
    other.take()
    one.lose()
    assert other.taken.endswith(b"last words")
    assert other.log[-1] == "abort"
    proxy.over(ending)
