"""What an idle pair takes: the fields that its objects have.

Each is eight bytes of each of thousands of pairs, and a few that came one by one have
made a pair a tenth larger before.  `make bench` measures the bytes.
"""

from __future__ import annotations

from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor

from relayd.configuring.address_grammar import parse_destination, parse_listener
from relayd.operating.endpoints import dialing_endpoint, listening_endpoint
from relayd.tcp import RelayFactory
from tests.conftest import pause
from tests.support.process import TRANSPORTS, Server, connect


def slots(thing: object) -> int:
    """How many it has, with those of its base classes."""
    return sum(len(each.__dict__.get("__slots__", ())) for each in type(thing).__mro__)


@pytest.mark.cost
@pytest.mark.skipif("plane" not in TRANSPORTS, reason="Linux's")
@pytest_twisted.ensureDeferred
async def test_the_fields_of_an_idle_pair() -> None:
    """On the plane, after its first check; what few need is not in all."""
    kind: Any = "plane"
    with Server() as server:
        endpoint = dialing_endpoint(parse_destination(server.address), reactor, kind)
        factory = RelayFactory(endpoint, stall_timeout=0.1, clock=reactor)
        where = parse_listener("127.0.0.1:0")
        listening = await listening_endpoint(where, reactor, transport=kind).listen(
            factory
        )
        with connect(listening.getHost().port):
            while not (
                factory.sessions
                and (joined := next(iter(factory.sessions.values()))).bridge is not None
                and joined.bridge.was_checked
            ):
                await pause(0.001)
            up = joined.bridge.upstream
            assert slots(joined.transport) == slots(up.transport) <= 22
            assert slots(joined.session) <= 20
            assert joined.session.rare is None
            assert slots(joined.direction) == slots(up.direction) <= 4
            assert slots(joined.bridge) <= 12
            assert len(vars(joined)) <= 13
            assert len(vars(up)) <= 8
        server.accept().close()
        await listening.stopListening()
        await factory.drain(0)
