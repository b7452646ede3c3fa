"""What a route may do, of which nothing goes further than its one client."""

from __future__ import annotations

import asyncio
import functools
import gc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import pytest
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.python.failure import Failure

from relayd.core.errors import ConfigError, Refused
from relayd.core.prelude import BadRequest
from relayd.core.routing import MOST_LEAVING, Decision, RouteFailed
from relayd.net.upstream import Upstream
from relayd.routing.connection import Connection
from relayd.routing.router import MOST_PLAIN, Router
from tests.support.arriving import Arrived, ask
from tests.support.fakes import FakeEndpoint


async def to_ssh(conn: Connection) -> Any:
    return conn.pool("ssh")


def asked(route: Any, arrived: Arrived | None = None, **options: Any) -> Deferred[Any]:
    return ask(Router(route, **options), arrived or Arrived())


def result(route: Any, arrived: Arrived | None = None, **options: Any) -> Any:
    """What a route decides at once, or the failure."""
    found: list[Any] = []
    asked(route, arrived, **options).addBoth(found.append)
    return found.pop()


def failure(route: Any, **options: Any) -> BaseException:
    found = result(route, **options)
    assert isinstance(found, Failure)
    return found.value


class Later:
    """A route that awaits a Deferred first; each test is of both kinds."""

    def __init__(self, route: Callable[[Connection], Awaitable[Any]]) -> None:
        self.waiting: Deferred[None] = Deferred()
        self._route = route

    async def __call__(self, conn: Connection) -> Any:
        await self.waiting
        return await self._route(conn)


def at_once_and_later(route: Any, **options: Any) -> Iterator[Any]:
    yield result(route, **options)
    later, found = Later(route), list[Any]()
    asked(later, **options).addBoth(found.append)
    assert not found
    later.waiting.callback(None)
    yield found.pop()


# -- answers


def test_a_pool() -> None:
    for decision in at_once_and_later(to_ssh, pools=["default", "ssh"]):
        assert decision == Decision(pool="ssh")


def test_the_pool_of_which_nothing_is_said() -> None:
    async def route(conn: Connection) -> Any:
        return conn.pool()

    assert result(route) == Decision(pool="default")


def test_clients_of_one_pool_have_one_decision_and_facts_are_of_one_client() -> None:
    async def route(conn: Connection) -> Any:
        if await conn.peek(1) == b"x":
            conn.facts["tenant"] = "x"
        return conn.pool("ssh")

    router = Router(route)
    one, two, three = (ask(router, Arrived(data)).result for data in (b"a", b"x", b"b"))
    assert one is three
    assert (dict(one.facts), dict(two.facts)) == ({}, {"tenant": "x"})


def test_decisions_that_are_kept_have_a_limit() -> None:
    async def route(conn: Connection) -> Any:
        return conn.pool((await conn.peek(9)).decode())

    router = Router(route)
    for number in range(MOST_PLAIN + 10):
        data = b"%09d" % number
        assert ask(router, Arrived(data)).result == Decision(pool=data.decode())
    assert len(router._plain) == MOST_PLAIN


def test_choices_are_shown_as_they_are_written() -> None:
    shown: list[str] = []

    async def route(conn: Connection) -> Any:
        shown.extend((repr(conn.pool("ssh")), repr(conn.server("10.0.0.5:80"))))
        return conn.pool()

    result(route, server=lambda text: text)
    assert shown == ["conn.pool('ssh')", "conn.server('10.0.0.5:80')"]


def test_a_pool_that_there_is_not() -> None:
    problem = failure(to_ssh, pools=["default", "web"])
    assert isinstance(problem, ValueError)
    assert str(problem) == "no pool 'ssh'; there are default, web"
    assert str(failure(to_ssh, pools=[])) == "no pool 'ssh'; there are none"


def test_servers() -> None:
    upstream, endpoint = Upstream(FakeEndpoint(), "mine"), FakeEndpoint()
    made: list[str] = []

    def make(text: str) -> Upstream:
        made.append(text)
        if text == "nonsense":
            raise ConfigError("bad address 'nonsense'")
        return Upstream(FakeEndpoint(), text)

    said: list[Any] = []

    async def route(conn: Connection) -> Any:
        return conn.server(said[-1])

    router = Router(route, server=make)
    for where in ("10.0.0.5:80", upstream, endpoint, "10.0.0.5:80"):
        said.append(where)
        assert ask(router, Arrived()).result == Decision(server=where)
    assert made == ["10.0.0.5:80"]
    assert router.upstream("10.0.0.5:80") is router.upstream("10.0.0.5:80")
    assert router.upstream(upstream) is upstream
    assert router.upstream(endpoint).endpoint is endpoint
    assert router.upstream(endpoint).name == "FakeEndpoint"
    for bad in ("nonsense", 80, None):
        said.append(bad)
        failed: list[Failure] = []
        ask(router, Arrived()).addErrback(failed.append)
        assert failed.pop().check(ConfigError)


def test_a_router_that_reads_no_destinations_says_so() -> None:
    async def route(conn: Connection) -> Any:
        return conn.server("10.0.0.5:80")

    assert "this relay reads no destinations" in str(failure(route))


def test_a_route_is_replaced() -> None:
    async def other(conn: Connection) -> Any:
        return conn.pool("other")

    router, later = Router(to_ssh), Later(to_ssh)
    router.route = later
    under_way = ask(router, Arrived())
    router.route = other
    assert ask(router, Arrived()).result == Decision(pool="other")
    later.waiting.callback(None)
    assert under_way.result == Decision(pool="ssh")


# -- refusals


def test_a_refusal() -> None:
    async def route(conn: Connection) -> Any:
        conn.facts["list"] = "drop"
        conn.reply(b"554 ")
        conn.reply(b"no\r\n")
        conn.refuse("banned")

    expected = Decision(refused="banned", reply=b"554 no\r\n", facts={"list": "drop"})
    for decision in at_once_and_later(route):
        assert decision == expected


def test_what_a_route_raises_as_a_gate_does_is_a_refusal() -> None:
    async def route(conn: Connection) -> Any:
        raise Refused("banned")

    for decision in at_once_and_later(route):
        assert decision == Decision(refused="banned")


async def refused_and_then_a_pool(conn: Connection) -> Any:
    try:
        conn.refuse("banned")
    except Exception:
        return conn.pool()


async def refused_and_then_another_error(conn: Connection) -> Any:
    try:
        conn.refuse("banned")
    except Exception:
        raise KeyError("x") from None


async def refused_and_then_nothing(conn: Connection) -> Any:
    with suppress(BaseException):
        conn.refuse("banned")


async def refused_twice(conn: Connection) -> Any:
    try:
        conn.refuse("banned")
    except Exception:
        conn.refuse("another")


@pytest.mark.parametrize(
    "route",
    [
        *(refused_and_then_a_pool, refused_and_then_another_error),
        *(refused_and_then_nothing, refused_twice),
    ],
)
def test_nothing_undoes_a_refusal(route: Any) -> None:
    for decision in at_once_and_later(route):
        assert decision == Decision(refused="banned")


def test_a_reply_is_for_who_is_refused() -> None:
    async def route(conn: Connection) -> Any:
        conn.reply(b"no")
        return conn.pool()

    assert result(route).reply == b""


# -- failures


@pytest.mark.parametrize(
    "problem",
    [
        *(KeyError("x"), BadRequest("x"), CancelledError(), StopAsyncIteration()),
        *(SystemExit(3), KeyboardInterrupt(), GeneratorExit(), MemoryError()),
    ],
)
def test_whatever_a_route_raises_ends_there(problem: BaseException) -> None:
    async def route(conn: Connection) -> Any:
        raise problem

    for failed in at_once_and_later(route):
        assert failed.value is problem
        assert "test_router.py" in failed.getTraceback()


def test_what_iteration_ends_with_is_an_error() -> None:
    async def route(conn: Connection) -> Any:
        raise StopIteration

    for failed in at_once_and_later(route):
        assert failed.check(RuntimeError)


def test_recursion_without_an_end() -> None:
    async def route(conn: Connection) -> Any:
        return await route(conn)

    for failed in at_once_and_later(route):
        assert failed.check(RecursionError)


class Unshowable:
    def __repr__(self) -> str:
        raise SystemExit("never")


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        *((None, "nothing"), ("ssh", "'ssh'"), (b"x" * 500, "b'xxx"), (7, "7")),
        *((Deferred(), "<Deferred"), (succeed(1), "<Deferred"), ((), "()")),
    ],
)
def test_nonsense_is_told_what_is_expected(returned: Any, shown: str) -> None:
    async def route(conn: Connection) -> Any:
        return returned

    for failed in at_once_and_later(route):
        assert failed.check(RouteFailed)
        said = str(failed.value)
        begin = f"the route {__name__}:test_nonsense_is_told_what_is_expected.<locals>."
        assert said.startswith(f"{begin}route has returned {shown}") or "Later" in said
        assert said.endswith(
            "it is to return conn.pool(...) or conn.server(...), or to call"
            " conn.refuse(...)"
        )
        assert len(said) < 400


def test_nonsense_that_can_not_even_be_shown() -> None:
    async def route(conn: Connection) -> Any:
        return Unshowable()

    for failed in at_once_and_later(route):
        assert failed.check(RouteFailed)
        assert "Unshowable" in str(failed.value)


def test_the_choice_of_another_connection() -> None:
    kept: list[Any] = []

    async def route(conn: Connection) -> Any:
        kept.append(conn.pool())
        return kept[0]

    router = Router(route)
    assert ask(router, Arrived()).result == Decision(pool="default")
    failed: list[Failure] = []
    ask(router, Arrived()).addErrback(failed.append)
    assert "conn.pool('default') of another connection" in str(failed[0].value)


def no_coroutine(conn: Connection) -> Any:
    return conn.pool()


def deferred(conn: Connection) -> Any:
    return succeed(conn.pool())


def raises(conn: Connection) -> Any:
    raise SystemExit


async def generates(conn: Connection) -> Any:
    yield conn.pool()


def takes_nothing() -> Any:
    """What is called with a connection fails."""


@pytest.mark.parametrize(
    ("route", "problem"),
    [
        (no_coroutine, RouteFailed),
        (deferred, RouteFailed),
        (raises, SystemExit),
        (generates, RouteFailed),
        (takes_nothing, TypeError),
        (None, TypeError),
    ],
)
def test_what_is_no_coroutine_function(route: Any, problem: Any) -> None:
    assert isinstance(failure(route), problem)


def test_what_is_asyncios_takes_a_word() -> None:
    class Future:
        def __await__(self) -> Any:
            yield self

    async def route(conn: Connection) -> Any:
        await Future()

    for failed in at_once_and_later(route):
        assert failed.check(TypeError)
        assert "from_asyncio" in str(failed.value)


def test_a_route_that_tries_that_again_ends() -> None:
    async def route(conn: Connection) -> Any:
        while True:
            with suppress(Exception):
                await asyncio.sleep(0)

    for failed in at_once_and_later(route):
        assert "from_asyncio" in str(failed.value)


class Fired:
    """Awaits a Deferred that has fired; Twisted's own would not."""

    def __await__(self) -> Any:
        return (yield succeed(1))


def test_what_has_fired_is_awaited_without_recursion() -> None:
    async def route(conn: Connection) -> Any:
        count = 0
        for _ in range(5000):
            count += await Fired()
        return conn.pool(f"p{count}")

    for decision in at_once_and_later(route):
        assert decision == Decision(pool="p5000")


def test_each_route_has_a_context_of_its_own() -> None:
    who: ContextVar[str] = ContextVar("who", default="nobody")
    waiting: Deferred[None] = Deferred()

    async def route(conn: Connection) -> Any:
        name = (await conn.peek(1)).decode()
        who.set(name)
        await waiting
        assert who.get() == name
        return conn.pool(name)

    router = Router(route)
    answers = [ask(router, Arrived(data)) for data in (b"a", b"b")]
    assert who.get() == "nobody"
    waiting.callback(None)
    assert [each.result.pool for each in answers] == ["a", "b"]
    assert who.get() == "nobody"


def test_what_can_not_be_cancelled_is_logged(logged_failures: list[Any]) -> None:
    def cancel(_: object) -> None:
        raise KeyError("x")

    async def route(conn: Connection) -> Any:
        await Deferred[None](cancel)

    router = Router(route)
    failed: list[Failure] = []
    for _ in range(3):
        ask(router, Arrived()).addErrback(failed.append).cancel()
    assert failed[0].check(CancelledError)
    # One a second: clients may leave at any rate.
    [line] = logged_failures
    assert "what a route awaits can't be cancelled" in line
    logged_failures.clear()
    assert router.leaving == 3


def test_objects_and_partials_are_routes() -> None:
    class Route:
        async def __call__(self, conn: Connection) -> Any:
            return conn.pool("a")

    async def route(name: str, conn: Connection) -> Any:
        return conn.pool(name)

    assert result(Route()) == Decision(pool="a")
    assert result(functools.partial(route, "b")) == Decision(pool="b")


# -- a client that leaves


def cancelled(route: Any) -> tuple[Router, Deferred[Any], Arrived]:
    """Ask, and then nobody waits any more."""
    arrived, router = Arrived(), Router(route)
    answer = ask(router, arrived)
    failed: list[Failure] = []
    answer.addBoth(failed.append)
    assert not failed
    answer.cancel()
    assert failed[0].check(CancelledError)
    assert not arrived.waiting
    assert not arrived.clock.getDelayedCalls()
    return router, answer, arrived


@pytest.mark.parametrize(
    "look",
    [
        *(lambda conn: conn.peek(5), lambda conn: conn.peek(5, wait=1)),
        *(lambda conn: conn.until(b"\n"), lambda conn: conn.sni()),
        lambda conn: Deferred(),
    ],
)
def test_a_client_that_leaves_cancels_what_is_awaited(look: Any) -> None:
    seen: list[str] = []

    async def route(conn: Connection) -> Any:
        try:
            await look(conn)
        except CancelledError:
            seen.append("cancelled")
            raise
        finally:
            seen.append("cleaned")

    router, _, _ = cancelled(route)
    assert seen == ["cancelled", "cleaned"]
    assert router.leaving == 0


def test_a_route_that_goes_on_has_no_client_any_more() -> None:
    """It may give back what it has; of its client there is nothing more."""
    given_back: Deferred[None] = Deferred()
    seen: list[str] = []

    async def route(conn: Connection) -> Any:
        try:
            await conn.peek(5)
        except CancelledError:
            await given_back
            seen.append("given back")
        while True:
            try:
                await conn.peek(5)
            except Exception:
                seen.append("never")

    router, _, _ = cancelled(route)
    assert router.leaving == 1
    given_back.callback(None)
    assert seen == ["given back"]
    assert router.leaving == 0


def test_a_route_that_fails_then_is_logged(logged_failures: list[Any]) -> None:
    async def route(conn: Connection) -> Any:
        try:
            await conn.peek(5)
        finally:
            raise KeyError("x")

    cancelled(route)
    assert "a route failed after its client had left" in logged_failures.pop()


def test_routes_that_go_on_have_a_limit() -> None:
    """The oldest is closed; it gets no further."""
    seen: list[int] = []
    waiting: Deferred[None] = Deferred()

    async def route(conn: Connection) -> Any:
        try:
            await conn.peek(5)
        except CancelledError:
            number = len(seen)
            seen.append(number)
            try:
                await waiting
            except GeneratorExit:
                seen[number] = -1
                raise

    router = Router(route)
    for _ in range(MOST_LEAVING + 2):
        ask(router, Arrived()).addErrback(lambda _: None).cancel()
    assert (router.leaving, router.closed) == (MOST_LEAVING, 2)
    assert seen[:3] == [-1, -1, 2]
    waiting.callback(None)
    assert router.leaving == 0


def test_one_that_can_not_be_closed_is_logged(logged_failures: list[Any]) -> None:
    async def route(conn: Connection) -> Any:
        try:
            await conn.peek(5)
        except CancelledError:
            try:
                await Deferred[None]()
            except GeneratorExit:
                await Deferred[None]()

    router = Router(route)
    for _ in range(MOST_LEAVING + 3):
        ask(router, Arrived()).addErrback(lambda _: None).cancel()
    assert router.closed == 3
    [line] = logged_failures
    assert "can't be closed" in line
    del router, _
    gc.collect()
    logged_failures.clear()


def test_a_client_that_leaves_because_of_its_own_route() -> None:
    """The route runs as it is cancelled."""
    answers: list[Deferred[Any]] = []
    seen: list[str] = []

    async def route(conn: Connection) -> Any:
        await conn.peek(1)
        answers[0].cancel()
        seen.append("on")
        return conn.pool()

    arrived, router = Arrived(), Router(route)
    answers.append(ask(router, arrived))
    failed: list[Failure] = []
    answers[0].addBoth(failed.append)
    arrived.send(b"x")
    assert failed[0].check(CancelledError)
    assert seen == ["on"]
    assert router.leaving == 0
