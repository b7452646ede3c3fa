"""Name look-ups: shared, few at a time, bounded, dropped when nobody waits."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionRefusedError, DNSLookupError
from twisted.python.failure import Failure

from relayd.net import happy_eyeballs
from relayd.net.fair_queue import OWNERS_WORKERS, WORKERS, WORKERS_PER_OWNER
from relayd.net.happy_eyeballs import NameEndpoint
from relayd.net.resolving import MAX_QUEUE, MAX_QUEUE_PER_OWNER, Resolver
from tests.support.contracts import Recorder, turns, until
from tests.support.ports import free_port


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
async def test_families_alternate_and_the_systems_choice_comes_first() -> None:
    answer = found("2001:db8::1", "2001:db8::2", "192.0.2.1", "2001:db8::1")
    resolver = Resolver(reactor, lambda _: answer)
    assert await resolver.addresses("a.example", 80) == [
        (socket.AF_INET6, ("2001:db8::1", 80, 0, 0)),
        (socket.AF_INET, ("192.0.2.1", 80)),
        (socket.AF_INET6, ("2001:db8::2", 80, 0, 0)),
    ]


@pytest_twisted.ensureDeferred
async def test_callers_with_the_same_name_wait_for_one_look_up() -> None:
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
async def test_running_look_ups_are_limited_and_cancelled_ones_not_started() -> None:
    slow = Slow()
    resolver = Resolver(reactor, slow)
    waiting = [resolver.addresses(f"{n}.example", 80) for n in range(WORKERS + 3)]
    await until(lambda: len(slow.asked) == WORKERS)
    await turns()
    assert len(slow.asked) == WORKERS
    # One in the queue leaves, and one that is being looked up.
    for gone in (waiting[WORKERS], waiting[0]):
        gone.addErrback(lambda reason: reason.trap(CancelledError))
        gone.cancel()
    slow.answer.set()
    for each in waiting:
        await each
    await until(lambda: len(slow.asked) == WORKERS + 2)
    assert f"{WORKERS}.example" not in slow.asked


@pytest_twisted.ensureDeferred
async def test_a_callback_may_cancel_another_caller() -> None:
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
async def test_the_queue_is_limited() -> None:
    slow = Slow()
    resolver = Resolver(reactor, slow)
    waiting = [
        resolver.addresses(f"{n}.example", 80) for n in range(WORKERS + MAX_QUEUE)
    ]
    with pytest.raises(DNSLookupError, match="too many"):
        await resolver.addresses("one.too.many.example", 80)
    assert resolver.refused == 1
    # A name that is in the queue already costs nothing more.
    waiting.append(resolver.addresses("5.example", 80))
    for each in waiting:
        each.addErrback(lambda reason: reason.trap(CancelledError))
        each.cancel()
    slow.answer.set()
    await until(lambda: not resolver._names)
    assert len(slow.asked) == WORKERS


@pytest_twisted.ensureDeferred
async def test_one_owner_leaves_capacity_for_others() -> None:
    slow = Slow()
    resolver = Resolver(reactor, slow)
    waiting = [
        resolver.addresses(f"{n}.example", 80, "192.0.2.1")
        for n in range(WORKERS_PER_OWNER + MAX_QUEUE_PER_OWNER)
    ]
    with pytest.raises(DNSLookupError, match="too many"):
        await resolver.addresses("one.too.many.example", 80, "192.0.2.1")
    assert resolver.refused == 1
    waiting.append(resolver.addresses("other.example", 80, "192.0.2.2"))
    waiting.append(resolver.addresses("the.operators.example", 80))
    await until(lambda: len(slow.asked) == WORKERS_PER_OWNER + 2)
    assert {"other.example", "the.operators.example"} <= set(slow.asked)
    slow.answer.set()
    for each in waiting:
        await each
    assert not resolver._owned
    assert not resolver._queue._owners.keys() - {""}


@pytest_twisted.ensureDeferred
async def test_names_that_never_resolve_block_only_their_owner() -> None:
    """Two of them had all workers.  More of them leave the operator's, and no other."""
    slow = Slow()
    quick = "quick.example"

    def look_up(host: str) -> list[Any]:
        return found("192.0.2.9") if quick in host else slow(host)

    resolver = Resolver(reactor, look_up)
    waiting = [
        resolver.addresses(f"{n}.of.{each}.example", 80, each)
        for n in range(30)
        for each in ("192.0.2.1", "192.0.2.2")
    ]
    for owner in ("198.51.100.1", "198.51.100.2", "198.51.100.1", ""):
        assert await resolver.addresses(f"{owner}.{quick}", 80, owner)
    # Its threads take their time to ask.
    await until(lambda: len(slow.asked) == OWNERS_WORKERS - 1)
    waiting.append(resolver.addresses("never.example", 80, "192.0.2.3"))
    late = resolver.addresses(f"late.{quick}", 80, "198.51.100.1")
    assert await resolver.addresses(quick, 80)
    assert not late.called
    slow.answer.set()
    for each in waiting:
        await each
    assert await late
    assert resolver.refused == 0


def ask(
    resolver: Resolver, names: int, owner: str, told: list[str]
) -> list[Deferred[Any]]:
    """Look up so many names of an owner; those that fail are `told`."""

    def failed(_: Failure, host: str) -> None:
        told.append(host)

    waiting = []
    for number in range(names):
        host = f"{number}.of.{owner}.example"
        waiting.append(resolver.addresses(host, 80, owner).addErrback(failed, host))
    return waiting


async def empty(resolver: Resolver, slow: Slow, waiting: list[Deferred[Any]]) -> None:
    """Nobody waits any longer, and nothing is left of anybody."""
    for each in waiting:
        each.cancel()
    slow.answer.set()
    await until(lambda: not resolver._names)
    assert not resolver._owned
    assert not resolver._queue._owners.keys() - {""}
    assert not resolver._queue.running


@pytest_twisted.ensureDeferred
async def test_a_queue_full_of_clients_look_ups_admits_the_operators() -> None:
    """With one look-up for each client, a new client's is refused."""
    slow, told = Slow(), list[str]()
    resolver = Resolver(reactor, slow)
    waiting = []
    for number in range(WORKERS + MAX_QUEUE):
        waiting += ask(resolver, 1, f"192.0.2.{number}", told)
    waiting += ask(resolver, 1, "198.51.100.1", told)
    assert told == ["0.of.198.51.100.1.example"]
    waiting += ask(resolver, 1, "", told)
    await until(lambda: "0.of..example" in slow.asked)
    assert resolver.refused == 1
    await empty(resolver, slow, waiting)


@pytest_twisted.ensureDeferred
async def test_clients_that_fill_the_queue_are_evicted_for_others() -> None:
    """Four could fill it, and stop every other client's names."""
    slow, told = Slow(), list[str]()
    resolver = Resolver(reactor, slow)
    waiting = []
    for owner, count in (("a", 256), ("b", 260), ("c", 256), ("d", 260)):
        waiting += ask(resolver, count, owner, told)
    assert len(resolver._names) == WORKERS + MAX_QUEUE
    assert told == []
    # Of d's, none has a worker.
    waiting += ask(resolver, 2, "victim", told)
    assert told == ["259.of.d.example", "258.of.d.example"]
    # Whoever has the most gets nothing back by asking again.
    told.clear()
    waiting += ask(resolver, 3, "another", told)
    waiting.append(resolver.addresses("again.example", 80, "b"))
    waiting[-1].addErrback(lambda _: told.append("again"))
    assert told == [
        *("259.of.b.example", "257.of.d.example", "258.of.b.example", "again")
    ]
    assert resolver.refused == 6
    assert len(resolver._names) == WORKERS + MAX_QUEUE
    await empty(resolver, slow, waiting)


@pytest_twisted.ensureDeferred
async def test_a_name_with_several_owners_is_not_evicted() -> None:
    slow, told = Slow(), list[str]()
    resolver = Resolver(reactor, slow)
    waiting = []
    for owner in "bcda":
        waiting += ask(resolver, 258, owner, told)
    # The operator's own worker is not idle either.
    waiting += ask(resolver, 1, "", told)
    shared = [
        resolver.addresses("257.of.a.example", 80, "other"),
        resolver.addresses("256.of.a.example", 80),
    ]
    waiting += ask(resolver, 1, "victim", told)
    assert told == ["255.of.a.example"]
    assert not any(each.called for each in shared)
    for each in shared:
        each.addErrback(lambda reason: reason.trap(CancelledError))
    await empty(resolver, slow, waiting + shared)


@pytest_twisted.ensureDeferred
async def test_an_evicted_caller_may_ask_again_at_once() -> None:
    slow, told = Slow(), list[str]()
    resolver = Resolver(reactor, slow)
    waiting = []
    for owner, count in (("b", 258), ("c", 258), ("d", 258), ("a", 257)):
        waiting += ask(resolver, count, owner, told)
    first, second = (resolver.addresses("last.example", 80, "a") for _ in range(2))

    def again(_: Failure) -> None:
        second.cancel()
        waiting.append(resolver.addresses("last.example", 80, "z"))

    first.addErrback(again)
    second.addErrback(lambda reason: reason.trap(CancelledError))
    waiting += ask(resolver, 1, "victim", told)
    assert first.called
    assert not waiting[-1].called
    assert resolver._names["last.example"].queued
    assert len(resolver._names) == WORKERS + MAX_QUEUE
    for each in waiting[-2:]:
        each.addErrback(lambda reason: reason.trap(CancelledError))
    await empty(resolver, slow, waiting)


@pytest_twisted.ensureDeferred
async def test_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up fails then, as any other, and leaves its worker to the next."""
    refused = RuntimeError("can't start new thread")

    def start(_: object) -> None:
        raise refused

    resolver = Resolver(reactor, lambda _: found("192.0.2.1"))
    told: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        waiting = ask(resolver, WORKERS, "", told)
        for owner in "abcdefghij":
            waiting += ask(resolver, 200, owner, told)
        with pytest.raises(DNSLookupError, match=r"a\.example: can't start new"):
            await resolver.addresses("a.example", 80)
        await until(lambda: not resolver._names)
        assert len(told) == len(waiting)
    assert not resolver._queue.running
    assert resolver._pool is not None
    assert not resolver._pool.threads, "not kept"
    assert await resolver.addresses("a.example", 80, "a")


@pytest_twisted.ensureDeferred
async def test_a_name_waits_in_the_queue_of_each_owner() -> None:
    """Whoever asked first: who has much in the queue keeps nobody else waiting."""
    slow = Slow()
    resolver = Resolver(reactor, slow)
    greedy = [resolver.addresses(f"{n}.example", 80, "a") for n in range(20)]
    await until(lambda: len(slow.asked) == WORKERS_PER_OWNER)
    assert "19.example" not in slow.asked
    modest = resolver.addresses("19.example", 80, "b")
    await until(lambda: "19.example" in slow.asked)
    # Who has left waits in nobody's turn.
    gone = resolver.addresses("18.example", 80, "c")
    assert resolver._queue.running == WORKERS_PER_OWNER + 2
    assert resolver.addresses("17.example", 80)
    await until(lambda: "17.example" in slow.asked)
    for each in (gone, greedy[16], modest):
        each.addErrback(lambda reason: reason.trap(CancelledError))
        each.cancel()
    slow.answer.set()
    for each in greedy:
        await each
    assert "16.example" not in slow.asked
    await until(lambda: not resolver._names)
    assert not resolver._queue._owners.keys() - {""}


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
    monkeypatch.setattr(happy_eyeballs, "HEAD_START", 0.05)
    port = free_port()
    with socket.create_server(("127.0.0.2", port), backlog=0):
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


def test_names_are_looked_up_after_a_chroot() -> None:
    """The codec of names is imported with relayd, and not by the first look-up."""
    look = "import sys, relayd; sys.exit('encodings.idna' not in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look], check=False).returncode == 0
