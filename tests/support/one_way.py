"""Two connections of the plane, of which one way is spliced.

What the client sends is moved to the server by their transports; what the server sends
is given to its protocol, which writes it to the client's transport, as the filters of
that direction would.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from relayd.plane.poller import Plane
from relayd.testing import Producer
from tests.support.contracts import Recorder
from tests.support.pumping import KINDS, Pump, Side, small, sockets
from tests.support.standing import Still, still

__all__ = ["still"]


class Through(Recorder):
    """Passes what it reads to a sink, as long as it has one."""

    sink: Any = None

    def dataReceived(self, data: bytes) -> None:
        super().dataReceived(data)
        if self.sink is not None:
            self.sink.write(data)


class OneWay(Pump):
    """A pump of which one way is spliced; the server's protocol passes on the other."""

    def _join(self) -> None:
        self.splice_one_way(self.client)
        self.pass_through(self.server)

    def pass_through(self, side: Side) -> None:
        """What this side reads goes through its protocol, which the sink may pause."""
        sink = self.other(side).transport
        side.protocol.sink = sink
        side.protocol.on["eof"] = lambda: self._end_through(sink)
        sink.registerProducer(
            Producer(
                pause=side.transport.pauseProducing,
                resume=side.transport.resumeProducing,
            ),
            True,
        )

    def _end_through(self, sink: Any) -> None:
        sink.unregisterProducer()
        self._pass_end(sink)

    def stop_passing(self, side: Side) -> None:
        """What this side reads does not go through its protocol any more."""
        side.protocol.sink = None
        side.protocol.on.clear()
        self.other(side).transport.unregisterProducer()
        side.transport.resumeProducing()

    def splice_one_way(self, side: Side) -> None:
        """What this side reads is moved from now on."""
        sink = self.other(side).transport
        assert side.transport.splice_one_way(sink, side.told, self)


@contextmanager
def relaying(still: Still, *sides: Side) -> Iterator[OneWay]:
    """Such a pump; when it ends, so have both sides."""
    pump = OneWay(still, *sides)
    try:
        yield pump
    finally:
        for side in sides:
            side.peer.socket.close()
            side.transport.abortConnection()
        pump.settle(2)
    assert [side.events.count("lost") for side in sides] == [1, 1]


def sides_of(still: Still, kinds: str, **how: Any) -> list[Side]:
    plane = Plane.of(still)
    return [Side(plane, sockets(kind, **how), Through()) for kind in kinds.split()]


@pytest.fixture
def tcp(still: Still) -> Iterator[OneWay]:
    """Two TCP connections whose kernel buffers are small."""
    plane = Plane.of(still)
    sides = [Side(plane, sockets("tcp", small()), Through()) for _ in range(2)]
    with relaying(still, *sides) as pump:
        yield pump


@pytest.fixture(params=KINDS)
def pump(request: pytest.FixtureRequest, still: Still) -> Iterator[OneWay]:
    """Each kind of connection with each."""
    with relaying(still, *sides_of(still, request.param)) as made:
        yield made
