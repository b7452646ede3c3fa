"""Which sessions a drain ends before its limit: those that are idle, and no other."""

from __future__ import annotations

from typing import Any

import pytest

from relayd.core.session import Ending
from relayd.net.tcp_info import SinceData
from relayd.stream import deadlines
from tests.support.pairs import Pair, joined, no_kernel, reset_unread
from tests.support.relays import Relay

__all__ = ["no_kernel", "reset_unread"]


Told = dict[Any, SinceData]


@pytest.fixture(autouse=True)
def data(monkeypatch: pytest.MonkeyPatch) -> Told:
    """What the kernel says of each connection."""
    told: Told = {}
    monkeypatch.setattr(deadlines, "since_data", told.get)
    return told


def quiet() -> Pair:
    """A session in which nothing has moved for ten seconds."""
    pair = joined()
    pair.down.receive(b"question")
    pair.up.take()
    pair.up.receive(b"answer")
    pair.down.take()
    pair.wait(11)
    assert pair.bridge.idle_since() == 1
    return pair


def test_one_that_was_answered_is_idle(data: Told) -> None:
    """Since the server's last word: by the client's connection, or the server's."""
    pair = quiet()
    data[pair.down] = SinceData(10, 10.1, 10)
    assert pair.bridge.idle_for() == 10
    # A client on a UNIX socket.
    data.clear()
    data[pair.up] = SinceData(10.1, 10, 10)
    assert pair.bridge.idle_for() == 10
    pair.abort()


def test_one_that_waits_for_an_answer_is_in_use(data: Told) -> None:
    pair = quiet()
    data[pair.down] = SinceData(12, 10, 10)
    assert pair.bridge.idle_for() == 0
    data.clear()
    data[pair.up] = SinceData(10, 12, 10)
    assert pair.bridge.idle_for() == 0
    # Both fall together in the one, and not in the other.
    data[pair.down] = SinceData(10, 10, 9)
    assert pair.bridge.idle_for() == 0
    data[pair.up] = SinceData(10.1, 10, 10)
    assert pair.bridge.idle_for() == 10
    pair.abort()


@pytest.mark.parametrize(
    ("client", "server", "answered"),
    [
        # It has acknowledged the answer, and nothing was asked since.
        (9.96, 10, True),
        (9.96, None, True),
        # The server has acknowledged the question, which is not answered yet.
        (10, 9.96, False),
        # Nobody knows: both at once; or both have answered probes since then.
        (10, 10, None),
        (10, None, None),
        (2, 2, None),
        (None, 10, None),
        (None, 9.96, False),
    ],
)
def test_what_falls_into_one_tick_of_the_kernel(
    data: Told, client: float | None, server: float | None, answered: bool | None
) -> None:
    """Whoever said something last has heard of it, by an acknowledgement alone."""
    pair = quiet()
    for transport, acknowledged in ((pair.down, client), (pair.up, server)):
        if acknowledged is not None:
            data[transport] = SinceData(10, 10, acknowledged)
    assert pair.bridge.idle_for() == (10 if answered else 0)
    # In doubt, by what the relay has seen itself.
    now = pair.clock.seconds()
    in_doubt = 0 if answered is False else now - 1 if answered is None else 10
    assert pair.bridge.idle_for(now) == in_doubt
    pair.abort()


def test_one_who_has_asked_nothing_waits_for_nothing(data: Told) -> None:
    """A connection kept for later, or one that is only spoken to."""
    pair = joined()
    data[pair.down] = SinceData(10, 10, 10)
    pair.wait(11)
    assert pair.bridge.idle_for() == 10
    pair.abort()


def test_where_the_kernel_tells_nothing_it_is_in_use_unless_in_doubt() -> None:
    pair = quiet()
    assert pair.bridge.idle_for() == 0
    now = pair.clock.seconds()
    assert pair.bridge.idle_for(now) == now - 1
    pair.abort()


def test_what_moves_or_waits_is_in_use(
    data: Told,
    no_kernel: dict[Any, int],
    reset_unread: dict[Any, int],
) -> None:
    """In our buffers, in the kernel's, or sent and not read yet."""
    pair = quiet()
    data[pair.down] = SinceData(10, 10.1, 10)
    reset_unread[pair.up] = 1
    assert pair.bridge.idle_for() == 0
    del reset_unread[pair.up]
    assert pair.bridge.idle_for() == 10
    pair.up.receive(b"more")
    assert pair.bridge.idle_for() == 0
    pair.down.take()
    pair.wait(1)
    # It has moved since the check before.
    assert pair.bridge.idle_since() is None
    no_kernel[pair.down] = 4
    pair.wait(3)
    assert pair.bridge.idle_since() is None
    no_kernel.clear()
    pair.wait(3)
    assert pair.bridge.idle_since() is not None
    pair.abort()
    assert pair.bridge.idle_since() is None


def test_one_that_has_ended_its_data_waits_for_the_rest(
    data: Told,
) -> None:
    pair = quiet()
    data[pair.down] = SinceData(10, 10.1, 10)
    pair.down.receive_eof()
    pair.wait(3)
    assert pair.bridge.idle_since() is None
    assert pair.bridge.idle_for() == 0
    pair.abort()


# -- a relay's drain


def test_a_drain_ends_idle_sessions_little_by_little(
    data: Told,
) -> None:
    """By a reset; one that waits, and one that is dialled still, have until the end."""
    relay = Relay(connect_timeout=0)
    clients = [relay.client() for _ in range(6)]
    for client, dial in zip(clients[:5], list(relay.server.dials), strict=False):
        server = dial.connect()
        client.receive(b"question")
        server.take()
        data[client] = SinceData(20, 25, 20)
    waits, dialled = clients[4:]
    data[waits] = SinceData(25, 20, 20)
    relay.clock.pump([1] * 20)
    done: list[None] = []
    relay.factory.drain(10).addCallback(done.append)
    open_at = []
    for _ in range(3):
        relay.clock.pump([0.1] * 33)
        open_at.append(sum(client.connected for client in clients))
    assert open_at == [5, 3, 2]
    assert waits.connected
    assert dialled.connected
    assert {each.ending for each in relay.witness.sessions[:4]} == {Ending.DRAINED}
    assert relay.witness.sessions[0].detail == "nothing moved for 20.0 s"
    assert [client.log[-1] for client in clients[:4]] == ["abort"] * 4
    assert not done
    relay.clock.pump([0.1] * 2)
    assert done == [None]
