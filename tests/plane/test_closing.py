"""Joined connections that end in one batch of events, or both at once."""

from __future__ import annotations

import gc
import select
import socket
import time
import weakref
from contextlib import suppress
from typing import Any

import pytest
from twisted.internet.error import ConnectionAborted, ConnectionDone
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure

from relayd.core.session import Direction, Ending, Session
from relayd.plane.poller import Plane
from relayd.plane.transport import PlaneTransport
from relayd.stream.bridge import Bridge, Leg, Timeouts
from tests.conftest import LoggedFailures
from tests.support.contracts import Producer
from tests.support.process import PATIENCE
from tests.support.pumping import Pump, Side, small, sockets, tcp
from tests.support.standing import Still, still

__all__ = ["still", "tcp"]


# -- one batch


@pytest.mark.parametrize("how", ["abort", "close"])
@pytest.mark.parametrize("first", ["client", "server"])
def test_a_side_that_the_other_one_ends_in_the_same_batch(
    first: str, how: str, tcp: Pump
) -> None:
    """Its own event is in the batch as well, and comes to nothing."""
    pair = tcp.client, tcp.server
    for side, other in (pair, pair[::-1]):

        def end(other: Side = other) -> None:
            if how == "abort":
                other.transport.abortConnection()
            else:
                other.transport.loseConnection()

        side.protocol.on["lost"] = end
        side.transport.pauseProducing()
    ready = pair if first == "client" else pair[::-1]
    for side in ready:
        side.peer.socket.send(b"x")
        tcp.settle()
        side.peer.reset()
        tcp.settle()
        side.transport.resumeProducing()
    tcp.settle()
    assert [side.events for side in pair] == [["lost"], ["lost"]]


def test_a_pair_that_ends_within_one_event(tcp: Pump) -> None:
    """The second end of data closes both, while the other has an event behind it."""
    client, server = tcp.client, tcp.server
    tcp.bridge()
    client.peer.socket.send(b"request")
    client.peer.end()
    assert tcp.take(server, 7) == b"request"
    tcp.until(server.peer.take)
    server.peer.socket.send(b"response")
    server.peer.end()
    # Its event is in the batch too.
    client.peer.socket.shutdown(socket.SHUT_RD)
    tcp.until(lambda: client.protocol.lost and server.protocol.lost)
    for side in (client, server):
        assert side.events.count("lost") == 1
        assert side.why is ConnectionDone


def test_an_abort_is_not_undone_by_writability_in_the_same_batch(still: Still) -> None:
    """Nothing is sent any more, and the peer learns of a reset."""
    plane = Plane.of(still)
    other = Side(plane, sockets("unix"))
    side = Side(plane, sockets("tcp", small()))
    while not side.transport.unsent:
        side.transport.write(bytes(4096))
        still.settle(1)
    # So little that it would all go at once.
    other.protocol.on["data"] = side.transport.abortConnection
    # First this event, then room for the rest; both are there before the turn.
    other.peer.socket.send(b"now")

    def room() -> bool:
        with suppress(BlockingIOError):
            side.peer.socket.recv(1 << 20)
        return bool(select.select([], [side.transport], [], 0)[1])

    limit = time.monotonic() + PATIENCE
    while not room():
        assert time.monotonic() < limit
    still.turn()
    still.settle()
    assert side.why is ConnectionAborted
    with pytest.raises(ConnectionResetError):
        while side.peer.socket.recv(1 << 20):
            pass
    side.peer.socket.close()
    other.peer.socket.close()
    still.until(lambda: "eof" in other.events)
    other.transport.loseConnection()


# -- both at once


def joined_legs(
    still: Still, client: type[Leg] = Leg, server: type[Leg] = Leg
) -> tuple[Session, list[Leg], list[Side], list[int]]:
    """Two legs on a Bridge, whose sides are spliced; and what counts its end."""
    plane, session, over = Plane.of(still), Session(1, "", "", 0.0), list[int]()
    legs = [client(session.up), server(session.down)]
    sides = [Side(plane, sockets("tcp"), leg) for leg in legs]
    legs[0].over = lambda: over.append(1)  # type: ignore[method-assign]
    Bridge(session, *legs, Timeouts(), still).start()
    assert all(leg.spliced for leg in legs)
    return session, legs, sides, over


def end_both(still: Still, sides: list[Side]) -> None:
    """Each far end says its last word, and hears the other's."""
    one, other = sides
    one.peer.socket.send(b"question")
    one.peer.end()
    still.until(other.peer.take)
    assert other.peer.data == b"question"
    other.peer.socket.send(b"answer")
    other.peer.end()
    still.until(one.peer.take)
    assert one.peer.data == b"answer"
    for side in sides:
        side.peer.socket.close()


def test_a_pair_whose_both_ends_have_come_is_closed_at_once(
    still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a word to the legs: the Bridge knows, and tells them."""
    told: list[object] = []
    monkeypatch.setattr(
        PlaneTransport, "connectionLost", lambda *args: told.append(args)
    )
    session, legs, sides, over = joined_legs(still)
    end_both(still, sides)
    still.until(lambda: over)
    assert over == [1]
    assert session.ending is Ending.DONE
    assert not told
    for leg, side in zip(legs, sides, strict=True):
        assert not leg.alive
        assert leg.bridge is leg.peer is None
        assert not side.transport.connected
        assert side.transport.disconnecting
        assert side.transport.fileno() == -1
        # What comes too late finds nobody.
        side.transport.write(b"late")
        side.transport.resumeProducing()
        side.transport.abortConnection()
        side.transport.proceed()
    still.settle()
    assert over == [1]


class Mourner(Leg):
    """A leg that wants to hear of its loss."""

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.reason = reason
        super().connectionLost(reason)


@pytest.mark.cost
def test_what_was_closed_at_once_is_freed_at_once(still: Still) -> None:
    """A test of cost.

    Nothing is left for the collector, whose work would cost each session a tenth.
    """
    gc.collect()
    gc.disable()
    try:
        session, legs, sides, over = joined_legs(still)
        end_both(still, sides)
        still.until(lambda: over)
        left = [weakref.ref(leg) for leg in legs]
        del session, legs, sides
        assert [leg() for leg in left] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("which", [0, 1])
def test_a_leg_with_a_loss_of_its_own_hears_of_it(which: int, still: Still) -> None:
    kinds: list[type[Leg]] = [Leg, Leg]
    kinds[which] = Mourner
    session, legs, sides, over = joined_legs(still, *kinds)
    end_both(still, sides)
    still.until(lambda: over)
    mourner: Any = legs[which]
    assert mourner.reason.type is ConnectionDone
    assert over == [1]
    assert session.ending is Ending.DONE


@pytest.mark.parametrize("which", ["client", "server"])
def test_an_aborted_side_is_not_closed_as_if_it_were_not(which: str, tcp: Pump) -> None:
    """It is a reset, as was asked for."""
    client, server = tcp.client, tcp.server
    for side in (client, server):
        side.peer.end()
    tcp.until(lambda: client.events == server.events == ["eof"])
    aborted = client if which == "client" else server
    aborted.transport.abortConnection()
    assert not client.transport.close_both(client.protocol, server.protocol)
    tcp.until(lambda: aborted.protocol.lost)
    assert aborted.why is ConnectionAborted
    tcp.other(aborted).transport.loseConnection()


def test_a_splicer_that_fails_costs_nobody_else_anything(
    tcp: Pump, logged_failures: LoggedFailures
) -> None:
    def fail(direction: Direction, sink: Any) -> None:
        raise RuntimeError("the splicer fails")

    tcp.ended = fail  # type: ignore[method-assign]
    tcp.client.peer.end()
    tcp.until(lambda: tcp.client.protocol.lost)
    logged_failures.take("the end of data of")
    assert tcp.client.why is RuntimeError
    assert tcp.server.transport.connected


def test_what_can_not_be_closed_at_once(tcp: Pump) -> None:
    """Another's connection, one that has not ended, one that is laden, a lost one."""
    client, server = tcp.client, tcp.server
    protocols = client.protocol, server.protocol
    assert not client.transport.close_both(*protocols)  # nothing has ended
    client.peer.end()
    tcp.until(lambda: client.events == ["eof"])
    assert not client.transport.close_both(*protocols)
    assert not server.transport.close_both(*protocols[::-1])
    server.peer.end()
    tcp.until(lambda: server.events == ["eof"])
    assert not client.transport.close_both(server.protocol, client.protocol)
    assert not client.transport.close_both(client.protocol, object())
    producer = Producer()
    server.transport.registerProducer(producer, True)
    assert not client.transport.close_both(*protocols)
    assert not server.transport.close_both(*protocols[::-1])
    server.transport.unregisterProducer()
    client.transport.loseConnection()
    assert client.protocol.lost
    assert not client.transport.close_both(*protocols)
    assert not server.transport.close_both(*protocols[::-1])
    server.transport.loseConnection()
    assert server.protocol.lost
