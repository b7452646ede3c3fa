"""Several addresses of one server: the first that answers is kept."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import error, reactor
from twisted.internet.address import IPv4Address
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.main import CONNECTION_DONE
from twisted.python.failure import Failure
from zope.interface.verify import verifyObject

from relayd.net.happy_eyeballs import HEAD_START, NameEndpoint, dial_first
from relayd.net.resolving import Resolver
from tests.conftest import descriptors
from tests.support.contracts import Recorder
from tests.support.dials import (
    StillReactor,
    closed_server,
    failed,
    making,
    over,
    problem_of,
)
from tests.support.process import Server, read_all

#: Where a dial is to be watched while it waits.
pytestmark = pytest.mark.usefixtures("far")


@contextmanager
def a_race(*servers: Server) -> Iterator[tuple[StillReactor, Recorder, Deferred[Any]]]:
    """A dial to several servers, on a reactor that stands still."""
    clock, protocol = StillReactor(), Recorder()
    before = descriptors()
    found = [(each.socket.family, each.socket.getsockname()) for each in servers]
    dialing = dial_first(clock, found, making(protocol))
    yield clock, protocol, dialing
    if protocol.transport is not None:
        protocol.transport.connectionLost(Failure(CONNECTION_DONE))
    clock.advance(0)
    assert not clock.getDelayedCalls()
    assert (clock.readers, clock.writers) == (set(), set())
    assert descriptors() == before


def test_the_first_address_that_answers_in_time_is_the_only_one() -> None:
    """The others are not dialled at all."""
    with Server() as first, Server() as second:
        with a_race(first, second) as (clock, protocol, dialing):
            [descriptor] = clock.writers
            descriptor.doWrite()
            assert dialing.result is protocol
            assert not clock.getDelayedCalls()
        second.socket.settimeout(0)
        with pytest.raises(BlockingIOError):
            second.accept()
        first.accept().close()


def test_an_address_that_does_not_answer_is_overtaken() -> None:
    """After a head start the next is tried as well; who connects first has won."""
    with Server() as slow, Server() as quick:
        with a_race(slow, quick) as (clock, protocol, dialing):
            [waiting] = clock.writers
            clock.advance(HEAD_START * 0.99)
            assert clock.writers == {waiting}
            clock.advance(HEAD_START * 0.02)
            [overtaking] = clock.writers - {waiting}
            overtaking.doWrite()
            assert dialing.result is protocol
            port = quick.socket.getsockname()[1]
            assert protocol.transport.getPeer().port == port
        with slow.accept() as left:
            assert read_all(left) == b""
        quick.accept().close()


def test_an_earlier_address_may_still_connect_first() -> None:
    """The later one is given up."""
    with Server() as first, Server() as second:
        with a_race(first, second) as (clock, protocol, dialing):
            [waiting] = clock.writers
            clock.advance(HEAD_START)
            waiting.doWrite()
            assert dialing.result is protocol
            port = first.socket.getsockname()[1]
            assert protocol.transport.getPeer().port == port
        with second.accept() as left:
            assert read_all(left) == b""
        first.accept().close()


def test_after_a_refusal_the_next_address_is_tried_at_once() -> None:
    """No head start for one that has failed."""
    with (
        Server() as second,
        a_race(closed_server(), second) as (clock, protocol, dialing),
    ):
        [descriptor] = clock.writers
        descriptor.doWrite()
        [descriptor] = clock.writers
        assert not dialing.called
        descriptor.doWrite()
        assert dialing.result is protocol
        second.accept().close()


def test_after_a_failure_within_the_call_the_next_is_tried_too() -> None:
    """A link-local address without its interface is refused by the kernel itself."""
    bad: Any = (socket.AF_INET6, ("fe80::1", 9, 0, 0))
    clock, protocol = StillReactor(), Recorder()
    with Server() as server:
        good = (socket.AF_INET, server.socket.getsockname())
        dialing = dial_first(clock, [bad, bad, good], making(protocol))
        [descriptor] = clock.writers
        descriptor.doWrite()
        assert dialing.result is protocol
        protocol.transport.connectionLost(Failure(CONNECTION_DONE))
    problem = problem_of(dial_first(clock, [bad, bad], making(protocol)))
    assert problem.osError == errno.EINVAL
    clock.advance(0)
    assert not clock.getDelayedCalls()


def test_the_last_failure_is_the_dials() -> None:
    """When no address is left."""
    with a_race(closed_server(), closed_server()) as (clock, _, dialing):
        clock.advance(HEAD_START)
        for descriptor in list(clock.writers):
            assert not dialing.called
            descriptor.doWrite()
        assert type(problem_of(dialing)) is error.ConnectionRefusedError


def test_a_cancelled_dial_of_several_addresses_closes_them_all() -> None:
    """Those under way, and the timer of those to come."""
    with Server() as first, Server() as second, Server() as third:
        with a_race(first, second, third) as (clock, _, dialing):
            clock.advance(HEAD_START)
            assert len(clock.writers) == 2
            dialing.cancel()
            assert isinstance(problem_of(dialing), CancelledError)


@pytest_twisted.ensureDeferred
async def test_a_name_is_dialled_at_its_addresses() -> None:
    """They are looked up for this connection; the first here is nobody's."""
    asked: list[str] = []
    with Server() as server, Server() as closed:
        port = server.socket.getsockname()[1]
        closed.close()

        def look_up(host: str) -> list[Any]:
            asked.append(host)
            kind = (socket.SOCK_STREAM, 0, "")
            return [
                (socket.AF_INET6, *kind, ("::1", 0, 0, 0)),
                (socket.AF_INET, *kind, ("127.0.0.1", 0)),
            ]

        where = NameEndpoint(reactor, "db.example", port, Resolver(reactor, look_up))
        assert verifyObject(IStreamClientEndpoint, where)
        for _ in range(2):
            protocol: Any = await where.connect(making(Recorder()))
            assert protocol.transport.getPeer() == IPv4Address("TCP", "127.0.0.1", port)
            await over(protocol)
    assert asked == ["db.example", "db.example"]


@pytest_twisted.ensureDeferred
async def test_a_name_without_addresses_is_a_failed_look_up() -> None:
    """Named, with what the resolver said."""

    def look_up(host: str) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    where = NameEndpoint(reactor, "no.example", 80, Resolver(reactor, look_up))
    problem = await failed(where.connect(making(Recorder())))
    assert isinstance(problem, error.DNSLookupError)
    assert "no.example: Name or service not known" in str(problem)
