"""Asks a route about each client, and makes decisions of what it says.

A route is a coroutine function; it is given a :class:`.connection.Connection`, awaits
Deferreds and coroutines, and returns what `conn.pool()` or `conn.server()` has given
it, or refuses the client.  Whatever else it does is a failure of that one client.

    router = Router(route, server=maker)
    router.ask(arriving).addCallbacks(go, failed)

Nothing that a route raises gets further than that, SystemExit included.  Who asked may
cancel it at any time, and is rid of it at once; a route that then goes on, to give back
what it has taken, may do so for a while (:data:`MOST_LEAVING`).
"""

from __future__ import annotations

import functools
import reprlib
from collections.abc import Callable, Collection, Coroutine, Mapping
from contextlib import suppress
from contextvars import Context, copy_context
from types import CoroutineType, MappingProxyType
from typing import Any, Final
from weakref import WeakValueDictionary

from twisted.internet.defer import CancelledError, Deferred, fail, succeed
from twisted.internet.interfaces import IReactorTime, IStreamClientEndpoint
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.core.errors import ConfigError, Refused
from relayd.core.filter_spec import FilterSpec
from relayd.core.filtering import check_factories
from relayd.core.prelude import BadRequest
from relayd.core.routing import MOST_LEAVING, Arriving, Decision, IRouter, RouteFailed
from relayd.core.setting_types import Kind
from relayd.core.settings import SERVER_SPEAKS_FIRST
from relayd.filters.loading import filter_of
from relayd.net.log_throttle import FailureLog
from relayd.net.upstream import Upstream
from relayd.routing.connection import Choice, Connection
from relayd.routing.first_bytes import ConnectionOver

log = Logger(namespace="relayd.routing")

_NO_FACTS: Mapping[str, str] = MappingProxyType({})

#: A coroutine function of an operator's own.
Route = Callable[[Connection], Coroutine[Any, Any, Choice]]

#: The most servers that are kept which routes have named as text.
MOST_SERVERS: Final = 1024

#: The most decisions that are kept which say nothing but the name of a pool.
MOST_PLAIN: Final = 256


@implementer(IRouter)
class Router:
    """A relay's route.

    :param server: makes an :class:`relayd.net.upstream.Upstream` of a destination as
        one writes it; None: routes name none in this way.
    :param kind: of the relay.
    :param server_speaks_first: clients say nothing before: a route does not wait for
        it.
    :param pools: the names of the relay's pools, as they are at any time; None: any
        name is one.

    :ivar route: may be replaced: clients that come later are decided by that.
    :ivar closed: how many were closed that went on after their clients had left.
    """

    def __init__(
        self,
        route: Route,
        *,
        server: Callable[[str], Any] | None = None,
        kind: Kind = "tcp",
        server_speaks_first: bool = SERVER_SPEAKS_FIRST.default,
        pools: Collection[str] | None = None,
    ) -> None:
        self.route = route
        self.pools = pools
        self.server_speaks_first = server_speaks_first
        self._kind: Kind = kind
        self._server = server and functools.lru_cache(MOST_SERVERS)(server)
        self._filters: WeakValueDictionary[Any, Any] = WeakValueDictionary()
        #: The decisions that say nothing but the name of a pool.
        self._plain: dict[str, Decision] = {}
        self._leaving: dict[_Asking, None] = {}
        self.closed = 0
        self._failures: FailureLog | None = None

    def ask(self, arriving: Arriving) -> Decision | Deferred[Decision]:
        """See :meth:`relayd.core.routing.IRouter.ask`."""
        return self._ask(Connection(arriving, self))

    def run(self, conn: Connection) -> Deferred[Decision]:
        """Ask about a client, as its route knows it."""
        said = self._ask(conn)
        return succeed(said) if isinstance(said, Decision) else said

    def _ask(self, conn: Connection) -> Decision | Deferred[Decision]:
        context = copy_context()
        try:
            # The first step is done by hand: most routes need no other.
            coroutine = self.route(conn)
            if type(coroutine) is not CoroutineType:
                _check_coroutine(coroutine)
            awaited = context.run(coroutine.send, None)
        except StopIteration as stop:
            conn.close()
            return _at_once(self._decision(conn, stop.value))
        except BaseException:
            # It stands in no variable: this frame is in its traceback.
            conn.close()
            return _at_once(self._failed(conn, Failure()))
        asking = _Asking(self, conn, coroutine, context)
        asking.wait(awaited)
        return asking.answer

    def decision(self, conn: Connection, said: Any) -> Decision | Failure:
        """What a route has decided that is over.

        :param said: what it has returned, in a tuple; or why it has failed.
        """
        if isinstance(said, Failure):
            return self._failed(conn, said)
        return self._decision(conn, said[0])

    def _decision(self, conn: Connection, returned: Any) -> Decision | Failure:
        if conn.refusal is not None:
            return _refused(conn, conn.refusal)
        if type(returned) is Choice and returned.by is conn:
            pool = returned.pool
            if pool is None or conn.has_more:
                return Decision(pool=pool, server=returned.server, **conn.said())
            if (plain := self._plain.get(pool)) is None:
                plain = Decision(pool=pool, facts=_NO_FACTS)
                if len(self._plain) < MOST_PLAIN:
                    self._plain[pool] = plain
            return plain
        return Failure(RouteFailed(self._nonsense(returned)))

    def _nonsense(self, returned: Any) -> str:
        try:
            what = "nothing" if returned is None else reprlib.repr(returned)
            if type(returned) is Choice:
                what += " of another connection"
        except BaseException:
            # What an operator's own `repr` raises goes no further, either.
            what = f"an object of the type {type(returned).__name__}"
        return (
            f"the route {name_of(self.route)} has returned {what}: it is to return"
            " conn.pool(...) or conn.server(...), or to call conn.refuse(...)"
        )

    def _failed(self, conn: Connection, reason: Failure) -> Decision | Failure:
        if conn.refusal is not None:
            return _refused(conn, conn.refusal)
        if isinstance(reason.value, Refused):
            return _refused(conn, reason.value.why)
        return reason

    # -- routes that go on when nobody waits for them

    @property
    def leaving(self) -> int:
        """How many go on after their clients have left."""
        return len(self._leaving)

    def leave(self, asking: _Asking) -> None:
        """One goes on after its client has left."""
        if len(self._leaving) >= MOST_LEAVING:
            oldest = next(iter(self._leaving))
            del self._leaving[oldest]
            self.closed += 1
            oldest.close()
        self._leaving[asking] = None

    def left(self, asking: _Asking, said: Any, clock: IReactorTime) -> None:
        """One has ended whose client has left."""
        self._leaving.pop(asking, None)
        if isinstance(said, Failure) and not said.check(*_LEFT):
            self.log_failure("a route failed after its client had left", clock, said)

    def log_failure(
        self, what: str, clock: IReactorTime, reason: Failure | None = None
    ) -> None:
        """Log what a route does wrong as clients leave, who may do that at any rate."""
        if self._failures is None:
            self._failures = FailureLog(log, clock)
        self._failures.add(what, reason)

    # -- of the connection

    def check_pool(self, name: str) -> None:
        """Whether there is such a pool.

        :raises ValueError: there is none.
        """
        pools = self.pools
        if pools is not None and name not in pools:
            there = ", ".join(pools) or "none"
            raise ValueError(f"no pool {name!r:.60}; there are {there}")

    def upstream(self, where: Any) -> Any:
        """See :meth:`relayd.core.routing.IRouter.upstream`."""
        if isinstance(where, str):
            if self._server is None:
                raise ConfigError(
                    f"the server {where!r:.60}: this relay reads no destinations; give"
                    " an Upstream or an endpoint"
                )
            return self._server(where)
        if isinstance(where, Upstream):
            return where
        if IStreamClientEndpoint.providedBy(where):
            # Its address is known once it is connected.
            return Upstream(where, type(where).__name__)
        raise ConfigError(
            f"a server is a destination as text, an Upstream or an endpoint, not"
            f" {reprlib.repr(where)}"
        )

    def filter_of(self, wanted: Any, options: Mapping[str, Any]) -> Any:
        """The filter that a route names; one that others have said in the same words.

        :raises relayd.core.errors.ConfigError: there is none, or it can't be made.
        :raises ValueError: a factory of filters for UDP, or options with one.
        :raises TypeError: neither a name nor a factory.
        """
        if not isinstance(wanted, str):
            check_factories([wanted], datagrams=False)
            if options:
                raise ValueError("a factory of filters has its options already")
            return wanted
        if ":" in wanted:
            raise ConfigError(
                f"filter {wanted!r:.60}: a name alone; its options follow as keywords,"
                " such as conn.filter('latency', latency='100ms')"
            )
        key = (wanted, *sorted((k, type(v), v) for k, v in options.items()))
        try:
            made = self._filters.get(key)
        except TypeError:
            # Of a value that no option can have.
            return filter_of(FilterSpec(wanted, options), self._kind)
        if made is None:
            made = filter_of(FilterSpec(wanted, options), self._kind)
            with suppress(TypeError):
                # A package's own may take no weak references.
                self._filters[key] = made
        return made


#: How routes end whose clients have left.
_LEFT = (CancelledError, ConnectionOver, Refused, BadRequest)


class _Asking:
    """A route that takes its time about one client: its steps.

    They are done as Twisted does those of a coroutine (`Deferred.fromCoroutine`), but
    nothing of it is left in a cycle, and a route that waits once costs a half of that.
    """

    __slots__ = (
        *("_awaits", "_clock", "_conn", "_context", "_coroutine", "_gone"),
        *("_is_adding", "_outcome", "_result", "_router", "answer"),
    )

    def __init__(
        self,
        router: Router,
        conn: Connection,
        coroutine: Coroutine[Any, Any, Any],
        context: Context,
    ) -> None:
        self._router = router
        self._conn = conn
        self._coroutine: Coroutine[Any, Any, Any] | None = coroutine
        self._context = context
        self._clock = conn.clock
        self._awaits: Deferred[Any] | None = None
        self._is_adding = False
        self._result: tuple[Any] | None = None
        #: What the route has returned, in a tuple; or why it has failed.
        self._outcome: Any = None
        #: Nobody waits for it any more.
        self._gone = False
        self.answer: Deferred[Decision] = Deferred(self._cancel)

    def wait(self, awaited: Any) -> None:
        """Go on when something has fired; what has fired already, in a loop."""
        wrong = 0
        while awaited is not _OVER:
            if not isinstance(awaited, Deferred):
                wrong += 1
                awaited = self._step(Failure(_not_awaited(awaited, wrong)))
                continue
            self._awaits = awaited
            self._is_adding = True
            awaited.addBoth(self._came)
            self._is_adding = False
            if self._result is None:
                return
            (result,), self._result = self._result, None
            awaited = self._step(result)

    def _came(self, result: Any) -> None:
        if self._is_adding:
            self._result = (result,)
        elif (awaited := self._step(result)) is not _OVER:
            self.wait(awaited)

    def _step(self, result: Any) -> Any:
        """Do the next step.

        :return: what the route awaits; or _OVER.
        """
        coroutine = self._coroutine
        if coroutine is None:
            # It was closed.
            return _OVER
        try:
            if isinstance(result, Failure):
                # In no variable: this frame will be in its traceback.
                thrown: list[Any] = [result.value]
                del result
                throw: Callable[[BaseException], Any] = coroutine.throw
                return self._context.run(throw, thrown.pop())
            return self._context.run(coroutine.send, result)
        except StopIteration as stop:
            self._outcome = (stop.value,)
        except BaseException as problem:
            # The failure has the traceback, whose frames have those that called them,
            # and so the client; Twisted's have the error: that would be a cycle.
            self._outcome = Failure()
            problem.__traceback__ = None
        self._end()
        return _OVER

    def _end(self) -> None:
        said, self._outcome = self._outcome, None
        self._coroutine = self._awaits = None
        if self._gone:
            self._router.left(self, said, self._clock)
            return
        self._conn.close()
        self.answer.callback(self._router.decision(self._conn, said))

    def _cancel(self, _: object) -> None:
        self._gone, conn = True, self._conn
        conn.leave()
        if self._awaits is not None:
            try:
                self._awaits.cancel()
            except BaseException:
                what = "what a route awaits can't be cancelled"
                self._router.log_failure(what, self._clock)
        conn.close()
        if self._coroutine is not None:
            self._router.leave(self)

    def close(self) -> None:
        """It has gone on for too long."""
        coroutine, self._coroutine, self._awaits = self._coroutine, None, None
        if coroutine is not None:
            try:
                coroutine.close()
            except BaseException:
                # It ignores that, too, or runs at this moment.
                what = "a route can't be closed whose client has left"
                self._router.log_failure(what, self._clock)


#: What a route awaits that is over.
_OVER: Final = object()


def _not_awaited(found: Any, times: int) -> BaseException:
    why = (
        f"a route awaits Deferreds and coroutines, not {type(found).__name__}; what is"
        " asyncio's, by from_asyncio(...)"
    )
    # A route that tries again whatever happens would never stop.
    return TypeError(why) if times == 1 else ConnectionOver(why)


def _check_coroutine(found: Any) -> None:
    """Whether a route is one.

    :raises RouteFailed: it is none.
    """
    if not isinstance(found, Coroutine):
        raise RouteFailed(
            f"a route is a coroutine function (async def), and returns no"
            f" {type(found).__name__} when it is called"
        )


def _refused(conn: Connection, why: str) -> Decision:
    return Decision(refused=why, reply=conn.last_words, **conn.said())


def _at_once(said: Decision | Failure) -> Decision | Deferred[Decision]:
    return fail(said) if isinstance(said, Failure) else said


def name_of(route: Any) -> str:
    """What a route is called: `MODULE:FUNCTION`."""
    name = getattr(route, "__qualname__", "") or type(route).__qualname__
    return f"{getattr(route, '__module__', '')}:{name}"
