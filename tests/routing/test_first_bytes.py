"""What a route sees of a client's first bytes, however they come."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, DeferredList, race
from twisted.python.failure import Failure

from relayd.core.prelude import BadRequest
from relayd.core.routing import Decision
from relayd.preludes.client_hello import hello_of
from relayd.routing.connection import Connection
from relayd.routing.first_bytes import MOST_LOOKS, MOST_PEEKED, ConnectionOver
from relayd.routing.router import Router
from tests.support.arriving import Arrived, ask

Look = Callable[[Connection], Any]


class Asked:
    """A route that looks at a client, and what it has seen."""

    def __init__(self, arrived: Arrived, look: Look, **options: Any) -> None:
        self.seen: list[Any] = []

        async def route(conn: Connection) -> Any:
            try:
                self.seen.append(await look(conn))
            except (BadRequest, ValueError) as problem:
                self.seen.append(f"{type(problem).__name__}: {problem}")
            return conn.pool()

        self.answer = ask(Router(route, **options), arrived)

    @property
    def result(self) -> Any:
        (result,) = self.seen
        assert self.answer.result == Decision(pool="default")
        return result


def seen(arrived: Arrived, look: Look, **options: Any) -> Any:
    """What a route sees at once."""
    return Asked(arrived, look, **options).result


def pieces(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    at = [0, *sorted({each % (len(data) + 1) for each in cuts}), len(data)]
    return [data[i:j] for i, j in itertools.pairwise(at) if i < j]


CUTS = st.lists(st.integers(0, 5000), max_size=8)
HELLO = hello_of("www.example.com", record=100)


@given(data=st.binary(max_size=40), n=st.integers(0, 50), cuts=CUTS)
def test_a_peek_is_the_same_however_the_bytes_come(
    data: bytes, n: int, cuts: list[int]
) -> None:
    arrived = Arrived()
    asked = Asked(arrived, lambda conn: conn.peek(n))
    for piece in pieces(data, cuts):
        assert bool(asked.seen) == (len(arrived.data) >= n)
        arrived.send(piece)
    assert bool(asked.seen) == (len(data) >= n)
    arrived.end()
    assert asked.result == data[:n]
    assert arrived.data == data


@given(
    before=st.binary(max_size=20),
    after=st.binary(max_size=5),
    mark=st.sampled_from([b"\n", b"\r\n", b"aab", b"aaaa"]),
    cuts=CUTS,
)
def test_what_is_before_a_mark_is_the_same_however_it_comes(
    before: bytes, after: bytes, mark: bytes, cuts: list[int]
) -> None:
    data = before + mark + after
    end = data.index(mark) + len(mark)
    arrived = Arrived()
    asked = Asked(arrived, lambda conn: conn.until(mark, 40))
    for piece in pieces(data, cuts):
        assert bool(asked.seen) == (len(arrived.data) >= end)
        arrived.send(piece)
    assert asked.result == data[:end]


@given(cuts=CUTS, tail=st.binary(max_size=10))
def test_a_server_name_is_the_same_however_it_comes(
    cuts: list[int], tail: bytes
) -> None:
    arrived = Arrived()
    asked = Asked(arrived, lambda conn: conn.sni())
    for piece in pieces(HELLO + tail, cuts):
        assert bool(asked.seen) == (len(arrived.data) >= len(HELLO))
        arrived.send(piece)
    assert asked.result == "www.example.com"


@given(data=st.binary(max_size=60), cuts=CUTS)
def test_nothing_that_a_client_sends_raises_anything_of_another_kind(
    data: bytes, cuts: list[int]
) -> None:
    arrived = Arrived()

    async def look(conn: Connection) -> list[Any]:
        found: list[Any] = []
        for each in (conn.sni(), conn.until(b"\r\n", 30), conn.peek(50), conn.sni()):
            try:
                found.append(await each)
            except BadRequest as problem:
                found.append(str(problem))
        return found

    asked = Asked(arrived, look)
    for piece in pieces(data, cuts):
        arrived.send(piece)
    arrived.end()
    name, _, first, again = asked.result
    assert first == data[:50]
    assert name == again


# -- what is at once


def test_what_has_come_is_seen_at_once_and_nothing_is_asked_for() -> None:
    arrived = Arrived(HELLO)
    assert seen(arrived, lambda conn: conn.peek(3)) == b"\x16\x03\x01"
    assert seen(arrived, lambda conn: conn.sni()) == "www.example.com"
    assert arrived.asked == 0


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n", b"\x16\x02", b"SSH-2.0-x"])
def test_what_is_no_tls_has_no_server_name(data: bytes) -> None:
    assert seen(Arrived(data), lambda conn: conn.sni()) is None


def test_a_hello_without_a_name_has_none() -> None:
    assert seen(Arrived(hello_of(None)), lambda conn: conn.sni()) is None


def test_what_begins_as_tls_and_is_none_is_a_bad_request_each_time() -> None:
    async def twice(conn: Connection) -> list[str]:
        said = []
        for _ in range(2):
            with pytest.raises(BadRequest) as raised:
                await conn.sni()
            said.append(str(raised.value))
        return said

    first, second = seen(Arrived(b"\x16\x03\x01\0\0"), twice)
    assert first == second == "an empty TLS record"


def test_a_hello_that_its_client_does_not_end_is_a_bad_request() -> None:
    found = seen(Arrived(HELLO[:-1], ended=True), lambda conn: conn.sni())
    assert found == "BadRequest: the client ended its side within its ClientHello"


def test_a_client_that_ends_without_a_byte_has_no_name() -> None:
    assert seen(Arrived(ended=True), lambda conn: conn.sni()) is None


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a.example", "a.example"),
        ("A.Example.", "a.example"),
        ("", None),
        (r"\xff", r"BadRequest: a server name that is none: '\\xff'"),
        ("a b", "BadRequest: a server name that is none: 'a b'"),
    ],
)
def test_the_name_of_a_handshake_that_the_listener_has_done(
    name: str, found: str | None
) -> None:
    """It is what it would be if the relay had read it."""
    arrived = Arrived()
    arrived.server_name = name
    assert seen(arrived, lambda conn: conn.sni()) == found
    assert arrived.asked == 0


def test_the_name_of_a_handshake_that_has_not_begun() -> None:
    """Of TLS below a wrapper nobody tells when it is done."""
    arrived = Arrived()

    async def look(conn: Connection) -> list[Any]:
        return [await conn.sni(wait=0), await conn.sni()]

    asked = Asked(arrived, look)
    assert not asked.seen
    arrived.server_name = "a.example"
    arrived.send(b"GET /")
    assert asked.result == [None, "a.example"]


def test_where_the_server_speaks_first_there_is_nothing_to_see() -> None:
    async def look(conn: Connection) -> list[Any]:
        return [await conn.peek(5), await conn.until(b"\n"), await conn.sni()]

    arrived = Arrived(HELLO)
    assert seen(arrived, look, server_speaks_first=True) == [b"", b"", None]
    assert arrived.asked == 0


# -- what is too much


@pytest.mark.parametrize("n", [-1, MOST_PEEKED + 1, 5.0, True, "5"])
def test_too_much_is_not_peeked_at(n: Any) -> None:
    found = seen(Arrived(), lambda conn: conn.peek(n))
    assert found.startswith("ValueError: n is a number of bytes from 0 to 65536, not")


def test_all_that_a_relay_keeps_can_be_peeked_at() -> None:
    data = bytes(MOST_PEEKED)
    assert seen(Arrived(data), lambda conn: conn.peek(MOST_PEEKED)) == data


@pytest.mark.parametrize(
    ("mark", "most"), [(b"", 5), ("x", 5), (b"ab", 1), (b"a", MOST_PEEKED + 1)]
)
def test_a_mark_that_can_not_be(mark: Any, most: int) -> None:
    found = seen(Arrived(), lambda conn: conn.until(mark, most))
    assert found.startswith("ValueError: ")


def test_a_mark_is_within_the_bytes_that_a_route_says() -> None:
    assert seen(Arrived(b"abc\r\n"), lambda conn: conn.until(b"\r\n", 5)) == b"abc\r\n"
    found = seen(Arrived(b"abcd\r\n"), lambda conn: conn.until(b"\r\n", 5))
    assert found == r"BadRequest: no b'\r\n' in the first 5 bytes"


def test_a_client_that_ends_before_the_mark_has_sent_a_bad_request() -> None:
    found = seen(Arrived(b"abc", ended=True), lambda conn: conn.until(b"\n"))
    assert found == r"BadRequest: no b'\n' came"


def test_bytes_that_come_one_by_one_are_no_loop() -> None:
    arrived = Arrived()
    asked = Asked(arrived, lambda conn: conn.peek(MOST_LOOKS + 5))
    for _ in range(MOST_LOOKS + 5):
        arrived.send(b"x")
    assert len(asked.result) == MOST_LOOKS + 5


def test_a_route_that_tries_again_whatever_happens_ends() -> None:
    """The client has left, and so the mark never comes: all others would wait."""
    tries = 0

    async def route(conn: Connection) -> Any:
        nonlocal tries
        while True:
            try:
                await conn.until(b"\n")
            except Exception:
                tries += 1

    answer = ask(Router(route), Arrived(ended=True))
    failed: list[Failure] = []
    answer.addErrback(failed.append)
    assert failed[0].check(ConnectionOver)
    assert tries == MOST_LOOKS


# -- time


@pytest.mark.parametrize(
    ("look", "found"),
    [
        (lambda conn: conn.peek(5, wait=2), b"abc"),
        (lambda conn: conn.until(b"\n", wait=2), r"BadRequest: no b'\n' came"),
    ],
)
def test_a_wait_that_is_over(look: Look, found: object) -> None:
    arrived = Arrived(b"a")
    asked = Asked(arrived, look)
    arrived.clock.advance(1)
    arrived.send(b"bc")
    arrived.clock.advance(0.99)
    assert not asked.seen
    arrived.clock.advance(0.01)
    assert asked.result == found
    assert not arrived.clock.getDelayedCalls()


def test_a_name_that_does_not_come_in_time_can_be_waited_for_again() -> None:
    async def twice(conn: Connection) -> list[str | None]:
        return [await conn.sni(wait=1), await conn.sni()]

    arrived = Arrived(HELLO[:60])
    asked = Asked(arrived, twice)
    arrived.clock.advance(1)
    arrived.send(HELLO[60:])
    assert asked.result == [None, "www.example.com"]


@pytest.mark.parametrize("wait", [-1, float("nan"), "2"])
def test_a_wait_that_can_not_be(wait: Any) -> None:
    looks: list[Look] = [
        lambda conn: conn.peek(5, wait),
        lambda conn: conn.until(b"b", wait=wait),
        lambda conn: conn.sni(wait),
    ]
    for look in looks:
        # Whether there is something to wait for or not.
        for arrived in (Arrived(), Arrived(b"abcdef")):
            found = seen(arrived, look)
            assert found.startswith("ValueError: wait is in seconds, not")


@pytest.mark.parametrize(
    "look", [lambda conn: conn.peek(500), lambda conn: conn.until(b"zz")]
)
def test_who_waits_keeps_no_copy_of_what_has_come(look: Look) -> None:
    """It would be as much again as the relay keeps, for each client that waits."""
    arrived, looks = Arrived(b"x" * 100), list[Any]()

    def begun(conn: Connection) -> Any:
        looks.append(look(conn))
        return looks[0]

    Asked(arrived, begun)
    for _ in range(2):
        kept = [each for each in looks[0].cr_frame.f_locals.values() if each != b"zz"]
        assert not [each for each in kept if isinstance(each, bytes)]
        arrived.send(b"y")


def test_a_wait_of_nothing_looks_at_what_has_come() -> None:
    arrived = Arrived(b"ab")
    assert seen(arrived, lambda conn: conn.peek(5, wait=0)) == b"ab"
    assert arrived.asked == 0


def test_no_timer_is_left_of_a_wait_that_was_not_needed() -> None:
    arrived = Arrived()
    asked = Asked(arrived, lambda conn: conn.peek(2, wait=5))
    arrived.send(b"ab")
    assert asked.result == b"ab"
    assert not arrived.clock.getDelayedCalls()


# -- several at once


def started(coroutine: Any) -> Deferred[Any]:
    return Deferred.fromCoroutine(coroutine)


def test_several_wait_at_once_and_the_client_is_asked_once() -> None:
    async def look(conn: Connection) -> list[Any]:
        waiting = [started(conn.peek(n)) for n in (1, 3, 2)]
        waiting += [started(conn.sni()), started(conn.sni())]
        return [result for _, result in await DeferredList(waiting)]

    arrived = Arrived()
    asked = Asked(arrived, look)
    assert arrived.asked == 1
    for count, byte in enumerate(HELLO, 1):
        arrived.send(bytes((byte,)))
        assert arrived.asked <= 1 + count
    name = "www.example.com"
    assert asked.result == [HELLO[:1], HELLO[:3], HELLO[:2], name, name]


def test_one_of_several_is_cancelled_and_the_others_go_on() -> None:
    async def look(conn: Connection) -> list[Any]:
        one, two = started(conn.peek(1)), started(conn.peek(2))
        one.addErrback(lambda _: "cancelled")
        one.cancel()
        return [await one, await two]

    arrived = Arrived()
    asked = Asked(arrived, look)
    arrived.send(b"ab")
    assert asked.result == ["cancelled", b"ab"]


def test_who_is_woken_first_may_cancel_the_next() -> None:
    async def look(conn: Connection) -> Any:
        return await race([started(conn.peek(1)), started(conn.peek(2))])

    arrived = Arrived()
    asked = Asked(arrived, look)
    arrived.send(b"ab")
    assert asked.result == (0, b"a")


def test_what_waits_when_the_route_has_decided_is_cancelled() -> None:
    left: list[Failure] = []

    async def look(conn: Connection) -> None:
        started(conn.peek(5)).addErrback(left.append)
        started(conn.peek(6, wait=9)).addErrback(left.append)

    arrived = Arrived()
    assert seen(arrived, look) is None
    assert len(left) == 2
    assert not arrived.waiting
    assert not arrived.clock.getDelayedCalls()


def test_a_connection_that_is_decided_about_is_looked_at_no_more() -> None:
    kept: list[Connection] = []

    async def look(conn: Connection) -> None:
        kept.append(conn)

    seen(Arrived(b"abc"), look)
    (conn,) = kept
    for each in (conn.peek(1), conn.until(b"c"), conn.sni()):
        with pytest.raises(ConnectionOver, match="has decided"):
            each.send(None)
    assert str(conn.client) == "192.0.2.1:40000"


def test_what_is_waited_for_is_said_in_words() -> None:
    arrived = Arrived()
    conn = Connection(arrived, Router(lambda _: None))  # type: ignore[arg-type,return-value]
    assert conn.waits_for == ""
    waiting = started(conn.until(b"\r\n"))
    assert conn.waits_for == r"b'\r\n'"
    waiting.addErrback(lambda _: None).cancel()
    assert conn.waits_for == ""
    started(conn.peek(5, wait=1))
    assert conn.waits_for == ""
    started(conn.peek(7))
    assert conn.waits_for == "7 bytes"
    arrived.send(b"1234567")
    assert conn.waits_for == ""
