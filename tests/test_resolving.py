"""Name look-ups: shared, few at a time, bounded, dropped when nobody waits."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionRefusedError, DNSLookupError

from relayd import dialing
from relayd.dialing import NameEndpoint
from relayd.resolving import LINE, OWN_LINE, OWN_WORKERS, WORKERS, Resolver
from tests.contracts import Recorder, turns, until


def found(*addresses: str) -> list[Any]:
    """What getaddrinfo says."""
    return [
        (
            socket.AF_INET6 if ":" in each else socket.AF_INET,
            socket.SOCK_STREAM,
            6,
            "",
            (each, 0, 0, 0) if ":" in each else (each, 0),
        )
        for each in addresses
    ]


class Slow:
    """A look-up that answers when it is told to."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer = threading.Event()

    def __call__(self, host: str) -> list[Any]:
        self.asked.append(host)
        assert self.answer.wait(10)
        return found("192.0.2.1")


@pytest_twisted.ensureDeferred
async def test_families_take_turns_and_the_systems_choice_comes_first() -> None:
    answer = found("2001:db8::1", "2001:db8::2", "192.0.2.1", "2001:db8::1")
    resolver = Resolver(reactor, lambda _: answer)
    assert await resolver.addresses("a.example", 80) == [
        (socket.AF_INET6, ("2001:db8::1", 80, 0, 0)),
        (socket.AF_INET, ("192.0.2.1", 80)),
        (socket.AF_INET6, ("2001:db8::2", 80, 0, 0)),
    ]


@pytest_twisted.ensureDeferred
async def test_those_who_want_the_same_name_share_a_look_up() -> None:
    slow = Slow()
    resolver = Resolver(reactor, slow)
    waiting = [resolver.addresses("a.example", port) for port in (1, 2, 3)]
    slow.answer.set()
    answers = [await each for each in waiting]
    assert slow.asked == ["a.example"]
    assert [answer[0][1][1] for answer in answers] == [1, 2, 3]
    # Nothing is remembered.
    await resolver.addresses("a.example", 4)
    assert len(slow.asked) == 2


@pytest_twisted.ensureDeferred
async def test_few_run_at_a_time_and_the_departed_are_not_looked_up() -> None:
    slow = Slow()
    resolver = Resolver(reactor, slow)
    waiting = [resolver.addresses(f"{n}.example", 80) for n in range(WORKERS + 3)]
    await until(lambda: len(slow.asked) == WORKERS)
    await turns()
    assert len(slow.asked) == WORKERS
    # One in the line leaves, and one that is being looked up.
    for gone in (waiting[WORKERS], waiting[0]):
        gone.addErrback(lambda reason: reason.trap(CancelledError))
        gone.cancel()
    slow.answer.set()
    for each in waiting:
        await each
    await until(lambda: len(slow.asked) == WORKERS + 2)
    assert f"{WORKERS}.example" not in slow.asked


@pytest_twisted.ensureDeferred
async def test_one_that_is_told_may_cancel_another() -> None:
    slow = Slow()
    resolver = Resolver(reactor, slow)
    first, second, third = (resolver.addresses("a.example", 80) for _ in range(3))
    first.addCallback(lambda _: second.cancel())
    second.addErrback(lambda reason: reason.trap(CancelledError))
    slow.answer.set()
    assert await third
    await second
    assert not resolver._names


@pytest_twisted.ensureDeferred
async def test_the_line_is_bounded() -> None:
    slow = Slow()
    resolver = Resolver(reactor, slow)
    waiting = [resolver.addresses(f"{n}.example", 80) for n in range(WORKERS + LINE)]
    with pytest.raises(DNSLookupError, match="too many"):
        await resolver.addresses("one.too.many.example", 80)
    assert resolver.refused == 1
    # A name that is in the line already costs nothing more.
    waiting.append(resolver.addresses("5.example", 80))
    for each in waiting:
        each.addErrback(lambda reason: reason.trap(CancelledError))
        each.cancel()
    slow.answer.set()
    await until(lambda: not resolver._names)
    assert len(slow.asked) == WORKERS


@pytest_twisted.ensureDeferred
async def test_one_owner_leaves_room_for_others() -> None:
    slow = Slow()
    resolver = Resolver(reactor, slow)
    waiting = [
        resolver.addresses(f"{n}.example", 80, "192.0.2.1")
        for n in range(OWN_WORKERS + OWN_LINE)
    ]
    with pytest.raises(DNSLookupError, match="too many"):
        await resolver.addresses("one.too.many.example", 80, "192.0.2.1")
    assert resolver.refused == 1
    waiting.append(resolver.addresses("other.example", 80, "192.0.2.2"))
    waiting.append(resolver.addresses("the.operators.example", 80))
    await until(lambda: len(slow.asked) == OWN_WORKERS + 2)
    assert {"other.example", "the.operators.example"} <= set(slow.asked)
    slow.answer.set()
    for each in waiting:
        await each
    assert not resolver._owned
    assert not resolver._owners_running


@pytest_twisted.ensureDeferred
async def test_a_name_without_an_address_says_why() -> None:
    def unknown(_: str) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.raises(DNSLookupError, match="b.example: Name or service not known"):
        await Resolver(reactor, unknown).addresses("b.example", 80)
    with pytest.raises(DNSLookupError, match="b.example: no address"):
        await Resolver(reactor, lambda _: []).addresses("b.example", 80)


def test_a_reactor_has_one_resolver() -> None:
    assert Resolver.of(reactor) is Resolver.of(reactor)


@pytest_twisted.ensureDeferred
async def test_the_systems_resolver_is_asked() -> None:
    answer = await Resolver(reactor).addresses("localhost", 80)
    assert (socket.AF_INET, ("127.0.0.1", 80)) in answer


# -- dialling the addresses of a name


class _Factory:
    def __init__(self) -> None:
        self.protocol = Recorder()

    def buildProtocol(self, _: object) -> Recorder:
        return self.protocol


def endpoint(port: int, *addresses: str) -> NameEndpoint:
    resolver = Resolver(reactor, lambda _: found(*addresses))
    return NameEndpoint(reactor, "name.example", port, resolver)


async def closed(protocol: Recorder) -> None:
    protocol.transport.abortConnection()
    await until(lambda: "lost" in protocol.events)


@pytest_twisted.ensureDeferred
async def test_the_next_address_is_tried_when_one_refuses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        factory = _Factory()
        dial = endpoint(server.getsockname()[1], "::1", "127.0.0.2", "127.0.0.1")
        assert await dial.connect(factory) is factory.protocol
        assert factory.protocol.transport.getPeer().host == "127.0.0.1"
        await closed(factory.protocol)


@pytest_twisted.ensureDeferred
async def test_the_next_address_is_tried_when_one_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dialing, "HEAD_START", 0.05)
    with socket.create_server(("127.0.0.2", 0), backlog=0) as silent:
        port = silent.getsockname()[1]
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.2", port))
            fillers.append(filler)
        with socket.create_server(("127.0.0.1", port)):
            factory = _Factory()
            dial = endpoint(port, "127.0.0.2", "127.0.0.1")
            await dial.connect(factory)
            assert factory.protocol.transport.getPeer().host == "127.0.0.1"
            await closed(factory.protocol)
        for filler in fillers:
            filler.close()


@pytest_twisted.ensureDeferred
async def test_it_fails_as_the_last_address_does() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            await endpoint(port, "127.0.0.2", "127.0.0.1").connect(_Factory())


@pytest_twisted.ensureDeferred
async def test_a_cancelled_dial_leaves_nothing() -> None:
    with socket.create_server(("127.0.0.2", 0), backlog=0) as silent:
        port = silent.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.2", port))
        dial: Deferred[Any] = endpoint(port, "127.0.0.2", "127.0.0.2").connect(
            _Factory()
        )
        await turns(5)
        dial.cancel()
        with pytest.raises(CancelledError):
            await dial
        for filler in fillers:
            filler.close()


@pytest_twisted.ensureDeferred
async def test_cancelling_during_the_look_up() -> None:
    slow = Slow()
    resolver = Resolver(reactor, slow)
    dial = NameEndpoint(reactor, "slow.example", 80, resolver).connect(_Factory())
    dial.cancel()
    with pytest.raises(CancelledError):
        await dial
    slow.answer.set()
    await until(lambda: not resolver._names)
