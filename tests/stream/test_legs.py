"""A leg alone: what Twisted's protocols promise, and what it keeps."""

from __future__ import annotations

from typing import Any

import pytest

from relayd.core.session import Direction
from relayd.stream.attempt import UpstreamLeg
from relayd.stream.legs import HOLD_LIMIT, Leg
from relayd.testing import FakeTransport


def upstream_leg() -> Leg:
    return UpstreamLeg(Direction())


@pytest.mark.parametrize("make", [lambda: Leg(Direction()), upstream_leg])
def test_it_is_connected_as_every_protocol_of_twisteds(make: Any) -> None:
    """And its `connectionMade` is called, with its transport in place."""
    leg, transport = make(), FakeTransport()
    made: list[Any] = []
    leg.connectionMade = lambda: made.append((leg.transport, leg.alive))
    assert not leg.connected
    transport.connect(leg)
    assert leg.connected
    assert made == [(transport, True)]


def test_what_it_reads_is_kept_and_counted_until_it_is_joined() -> None:
    leg, transport = Leg(Direction()), FakeTransport()
    transport.connect(leg)
    transport.receive(b"early ")
    transport.receive(b"data")
    assert leg.held == b"early data"
    assert (leg.direction.read, leg.direction.written) == (10, 0)
    transport.receive(bytes(HOLD_LIMIT))
    assert not transport.reading
