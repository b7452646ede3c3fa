"""What a connection of the plane does for programs, beside `contracts.py`.

What it does for any protocol is in `tests/support/contracts.py`, by way of
`tests/plane/test_contract.py`.
"""

from __future__ import annotations

import errno
import gc
import weakref
from contextlib import suppress

import pytest
from twisted.internet.main import CONNECTION_LOST
from twisted.python.failure import Failure

from relayd.core.session import Ending, Session
from relayd.plane.connection import READ_SIZE
from relayd.plane.poller import Plane
from relayd.plane.writing import BUFFER_LIMIT
from relayd.stream.bridge import Bridge, Leg, Timeouts
from tests.conftest import LoggedFailures
from tests.support.contracts import Producer, Recorder
from tests.support.pumping import (
    LOTS,
    NOISE,
    Scripted,
    Side,
    pump,
    pumping,
    sockets,
    tcp,
)
from tests.support.standing import Still, still

__all__ = ["pump", "still", "tcp"]


# -- what the kernel is short of


@pytest.mark.parametrize("count", [100, BUFFER_LIMIT])
def test_a_kernel_without_memory_is_asked_again(
    count: int, still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOBUFS says nothing about the connection, and no edge says when it is over."""
    side = Side(Plane.of(still), sockets("unix"), kind=Scripted)
    monkeypatch.setattr(Scripted, "script", [errno.ENOBUFS] * 3)
    side.transport.write(NOISE[:count])
    assert side.transport.unsent == count
    side.transport.write(b"!")
    still.until(lambda: side.peer.take() or len(side.peer.data) > count)
    assert side.peer.data == NOISE[:count] + b"!"
    assert Scripted.script == []
    assert side.events == []
    side.peer.socket.close()
    still.until(lambda: "eof" in side.events)
    side.transport.loseConnection()


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.EPIPE])
def test_a_relay_to_a_kernel_without_memory_goes_on(
    number: int, still: Still, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost but what can't be sent to a peer that is gone."""
    plane = Plane.of(still)
    sides = [Side(plane, sockets("tcp"), kind=Scripted) for _ in range(2)]
    with pumping(still, *sides) as pump:
        monkeypatch.setattr(Scripted, "script", [number] * 2)
        sides[0].peer.socket.send(b"data")
        if number == errno.ENOBUFS:
            assert pump.take(sides[1], 4) == b"data"
            assert sides[1].events == []
        else:
            pump.until(lambda: sides[1].protocol.lost)
            assert sides[1].transport.unsent == 0
        assert sides[0].told.read == 4
        assert sides[0].events == []


# -- what programs may do besides


def test_a_producer_that_fails_ends_its_own_connection(
    still: Still, logged_failures: LoggedFailures
) -> None:
    """When it is resumed from the plane; the other connections go on."""

    def fail() -> None:
        raise ZeroDivisionError

    side = Side(Plane.of(still), sockets("unix"))
    producer = Producer(resume=fail)
    side.transport.registerProducer(producer, True)
    side.transport.write(bytes(BUFFER_LIMIT + 1))
    assert producer.asked == ["pause"]
    still.until(lambda: side.peer.take() or side.protocol.lost)
    assert producer.asked == ["pause", "resume", "stop"]
    assert side.why is ZeroDivisionError
    logged_failures.take("resumeProducing of the producer")
    side.peer.socket.close()


def test_a_protocol_that_fails_behind_its_abort_is_closed(
    still: Still, logged_failures: LoggedFailures
) -> None:
    """As Twisted's are: the exception is the reason, and the close an orderly one."""

    def fail() -> None:
        side.transport.abortConnection()
        raise ZeroDivisionError

    side = Side(Plane.of(still), sockets("tcp"), Recorder(data=fail))
    side.peer.socket.send(b"data")
    still.until(lambda: side.protocol.lost)
    assert side.why is ZeroDivisionError
    still.until(side.peer.take)
    logged_failures.take("dataReceived of")
    side.peer.socket.close()
    still.settle()


def test_what_fails_as_a_connection_ends_is_logged(
    still: Still, logged_failures: LoggedFailures
) -> None:
    """Producer and protocol are each told, whatever the other does."""

    def fail() -> None:
        raise ZeroDivisionError

    side = Side(Plane.of(still), sockets("unix"), Recorder(lost=fail))
    side.transport.registerProducer(Producer(stop=fail), True)
    side.transport.abortConnection()
    still.settle()
    assert side.events == ["lost"]
    logged_failures.take("stopProducing of")
    logged_failures.take("connectionLost of")
    side.peer.socket.close()


def test_a_connection_that_is_lost_is_lost_once(still: Still) -> None:
    """Whoever says it again: the reactor that stops, or the plane."""
    side = Side(Plane.of(still), sockets("unix"))
    reason = Failure(CONNECTION_LOST)
    side.transport.connectionLost(reason)
    side.transport.connectionLost(reason)
    assert side.events == ["lost"]
    assert side.protocol.reason is reason
    assert side.peer.take()
    side.peer.socket.close()


def test_a_connection_says_what_it_is(still: Still) -> None:
    """In a log, and to a program that asks."""
    side = Side(Plane.of(still), sockets("tcp"))
    transport = side.transport
    assert repr(transport).startswith(f"<PlaneTransport {transport.fileno()} of ")
    assert transport.logPrefix() == "Recorder"
    assert transport.reactor is still
    assert transport.getHandle().fileno() == transport.fileno()
    assert (transport.connected, transport.disconnected) == (True, False)
    assert transport.TLS is transport.streamingProducer is False
    side.peer.socket.close()
    still.until(lambda: "eof" in side.events)
    transport.loseConnection()
    assert (transport.connected, transport.disconnected) == (False, True)
    assert transport.fileno() == -1


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_read_is_no_larger_than_twisteds(kind: str, still: Still) -> None:
    """A protocol gets as much at once as it would get from Twisted, and all of it."""
    protocol, largest = Recorder(), 0
    received = protocol.dataReceived

    def note(data: bytes) -> None:
        nonlocal largest
        largest = max(largest, len(data))
        received(data)

    protocol.dataReceived = note  # type: ignore[method-assign]
    side = Side(Plane.of(still), sockets(kind), protocol)
    view = memoryview(NOISE)[: 4 << 20]

    def sent() -> bool:
        nonlocal view
        with suppress(BlockingIOError):
            view = view[side.peer.socket.send(view) :]
        return not view and len(protocol.data) == 4 << 20

    still.until(sent)
    assert protocol.data == NOISE[: 4 << 20]
    assert largest == READ_SIZE
    side.peer.end()
    still.until(lambda: side.events == ["eof"])
    side.transport.loseConnection()
    side.peer.socket.close()


def a_session(still: Still) -> list[weakref.ref[Leg]]:
    """Relay much both ways, each end in turn; return the two legs' references."""
    plane, session, over = Plane.of(still), Session(1, "", "", 0.0), []
    legs = Leg(session.up), Leg(session.down)
    client, server = (Side(plane, sockets("tcp"), leg) for leg in legs)
    legs[0].over = lambda: over.append(1)  # type: ignore[method-assign]
    Bridge(session, *legs, Timeouts(), still).start()
    assert legs[0].spliced
    assert legs[1].spliced
    for one, other in ((client, server), (server, client)):
        view = memoryview(NOISE)

        def sent(one: Side = one, other: Side = other) -> bool:
            nonlocal view
            with suppress(BlockingIOError):
                view = view[one.peer.socket.send(view) :]
            other.peer.take()
            return not view

        still.until(sent)
        one.peer.end()
        still.until(other.peer.take)
        assert other.peer.data == NOISE
    still.until(lambda: over)
    assert over == [1]
    assert session.ending is Ending.DONE
    assert (session.up.read, session.down.read) == (LOTS, LOTS)
    for side in (client, server):
        side.peer.socket.close()
    return [weakref.ref(leg) for leg in legs]


@pytest.mark.cost
def test_a_session_over_the_plane_ends_as_any_other(still: Still) -> None:
    """A test of cost.  And leaves nothing for the collector: it is freed as it ends."""
    gc.collect()
    gc.disable()
    try:
        assert [leg() for leg in a_session(still)] == [None, None]
    finally:
        gc.enable()
