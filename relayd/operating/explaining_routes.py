"""What a route, or the table of server names, makes of a client that is explained.

A route is run as it is: what it does beside deciding happens, too.  Of settings that
nobody runs there is no reactor, so that what it waits for is not known.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import attrs
from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure

from relayd.configuring import endpoint_strings
from relayd.configuring.address_grammar import EndpointString, HostPort, PortRange
from relayd.configuring.config import Relay, Socks4Relay
from relayd.configuring.pools_of_relay import sni_table
from relayd.core.errors import ConfigError
from relayd.core.escapes import read_escapes
from relayd.core.names import host_port
from relayd.core.prelude import BadRequest
from relayd.core.routing import NO_LIMITS, Decision, RouteFailed, RouteLimits
from relayd.core.session import Session
from relayd.core.stage import Stage
from relayd.net.monotonic import monotonic
from relayd.operating.explanation import (
    REFUSED,
    UNKNOWN,
    PassingClock,
    Step,
    meet,
    place_of,
)
from relayd.preludes.client_hello import HelloReader, hello_of
from relayd.socks.session import Socks4Session
from relayd.upstreams.server_names import ServerNames

#: The most characters of a reply, or of an error, that a step has.
SHOWN = 200

#: The most seconds for which a route may wait here; and for a client's bytes, of which
#: no more come: so long, it may be that something else comes first.
LONGEST, PATIENCE = 10.0, 1.0


class NotKnown(Exception):
    """A route has not decided, as it waits for what there is not here."""


@attrs.frozen(kw_only=True)
class Said:
    """What a client says first.

    :ivar first: its bytes; empty: they are not known.
    :ivar name: the server name that it asks for by TLS; None: it is not known.
    """

    first: bytes = b""
    name: str | None = None

    @classmethod
    def of(cls, first: bytes | str | None, name: str | None) -> Said:
        """The same of what was given.

        :param first: text has escapes (:mod:`relayd.core.escapes`).
        :raises ConfigError: it is not valid.
        """
        try:
            data = read_escapes(first) if isinstance(first, str) else first or b""
        except ValueError as problem:
            raise ConfigError(f"bad first bytes {first!r}: {problem}") from None
        if name is not None:
            try:
                HelloReader()(hello_of(name))
            except (ValueError, BadRequest):
                raise ConfigError(
                    f"bad server name {name!r}: expected a name such as www.example.com"
                ) from None
        return cls(first=data, name=name)

    @property
    def data(self) -> bytes:
        """All that is known of what it sends."""
        return self.first if self.name is None else hello_of(self.name)


@attrs.frozen(kw_only=True)
class Asked:
    """What a route is asked.

    :ivar router: asks it.
    :ivar listener: an address where the relay listens, as text; empty: not known.
    :ivar requested: of a proxy: where the client wants to go.
    :ivar counts: how many sessions there are of each key that a route has limited.
    """

    relay: Relay | Socks4Relay
    router: Any
    client: str
    said: Said
    listener: str = ""
    requested: str | None = None
    user: str = ""
    counts: Mapping[str, int] = attrs.field(factory=dict)

    @property
    def data(self) -> bytes:
        """What is known of its bytes: behind TLS, if its listener ends that."""
        return self.said.first if ends_tls(self.relay) else self.said.data

    @property
    def session(self) -> Session:
        """A record of the client's, as that of one that has just come."""
        facts: dict[str, Any] = {
            "id": 0,
            "client": self.client,
            "peer": self.client,
            "listener": asked_for(self.relay)
            or self.listener
            or _address_of(self.relay),
            "opened_at": 0.0,
            "relay": self.relay.name or "",
            "ordinal": 0,
        }
        if not isinstance(self.relay, Socks4Relay):
            return Session(**facts, stage=Stage.DECIDING)
        return Socks4Session(
            **facts,
            stage=Stage.DECIDING,
            command="connect",
            user_id=self.user.encode(),
            requested=self.requested or "-",
        )


def asked_for(relay: Relay | Socks4Relay) -> str:
    """What clients ask for that are brought to a relay, by the first intercept of one
    address and port, as text; empty: there is none.
    """
    for each in relay.intercepts if isinstance(relay, Relay) else ():
        network, ports = each.network, each.ports
        if network is not None and network.num_addresses == 1 and len(ports) == 1:
            [(low, high)] = ports
            if low == high:
                return host_port(str(network.network_address), low)
    return ""


def _address_of(relay: Relay | Socks4Relay) -> str:
    """The first listener of a relay, as text with a host."""
    first = relay.listeners[0]
    listen = first.first if isinstance(first, PortRange) else first
    if isinstance(listen, HostPort):
        return host_port(listen.host or "0.0.0.0", listen.port)
    return str(listen)


def ends_tls(relay: Relay | Socks4Relay) -> bool:
    """Whether a relay's first listener ends TLS: a route is asked behind it."""
    listen = relay.listeners[0]
    return isinstance(listen, EndpointString) and endpoint_strings.ends_tls(listen.text)


@attrs.define(eq=False)
class _Client:
    """A client about which a route is asked: see `Arriving`.

    Nothing more comes from it than what is known; whether it would is not known.
    """

    session: Any
    clock: Any
    data: bytes
    server_name: str | None
    ended: bool = False

    @property
    def original(self) -> str:
        raise NotKnown("it asks where the client meant to go")

    def more(self) -> Deferred[None]:
        return Deferred()


#: Has a route decide; raises :class:`NotKnown`, or :class:`Failed`.
Decide = Callable[[Asked], Awaitable[Decision]]


class Failed(Exception):
    """A route has failed; says why, in a line."""


@attrs.define(eq=False)
class _Run:
    """A route that is asked about a client.

    :ivar conn: what it was given.
    :ivar found: what it has decided, or why it has failed; None: it waits.
    """

    asked: Asked
    clock: Any
    conn: Any = attrs.field(init=False)
    found: Decision | Failure | None = None
    _answer: Deferred[Any] = attrs.field(init=False)
    _woken: Deferred[None] | None = None

    def __attrs_post_init__(self) -> None:
        # Imports what most relays do not need.
        from relayd.routing.connection import Connection

        asked = self.asked
        tls_name = asked.said.name or "" if ends_tls(asked.relay) else None
        client = _Client(asked.session, self.clock, asked.data, tls_name)
        self.conn = Connection(client, asked.router)
        self._answer = asked.router.run(self.conn)
        self._answer.addBoth(self._decided)

    def _decided(self, found: Decision | Failure) -> None:
        self.found = found
        woken, self._woken = self._woken, None
        if woken is not None:
            woken.callback(None)

    async def wait(self, seconds: float) -> None:
        """Until it has decided, or so long."""
        if self.found is None and seconds > 0:
            woken = self._woken = Deferred()
            try:
                await woken.addTimeout(seconds, self.clock, lambda _, __: None)
            finally:
                self._woken = None

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self._answer.cancel()

    def over(self, else_: Exception) -> Decision:
        """What it has decided, and if it has not, it is to wait no longer.

        :param else_: raised, if it waits for something that is not its client's.
        :raises NotKnown: it waits for bytes of its client, or asks for what there is
            not here.
        :raises Failed: it has failed.
        """
        found = self.found
        if isinstance(found, Decision):
            return found
        if found is not None:
            if isinstance(found.value, NotKnown):
                raise found.value
            raise Failed(_line_of(found))
        waits_for, given = self.conn.waits_for, len(self.asked.data)
        self._answer.cancel()
        if not waits_for:
            raise else_
        raise NotKnown(
            f"it waits for {waits_for} of the client, of which {given} bytes are known:"
            " give more with --first"
        )


async def without_reactor(asked: Asked) -> Decision:
    """What a route decides that is asked where no reactor is.

    The time for which it waits for its client is over at once.
    """
    passing = PassingClock()
    run = _Run(asked, passing)
    passing.pass_while(lambda: run.found is None, _limit_of(asked.relay))
    return run.over(
        NotKnown("it waits for what only a reactor brings: ask a relayd that runs")
    )


async def not_run(asked: Asked) -> Decision:
    """What there is for who may change nothing: a route may, and so it is not run."""
    raise NotKnown("it is run for those only who may change relays (--control-uid)")


def on_reactor(reactor: Any) -> Decide:
    """Has routes decide on a reactor: they may wait."""
    clock = monotonic(reactor)

    async def decide(asked: Asked) -> Decision:
        run = _Run(asked, clock)
        limit = _limit_of(asked.relay)
        end = clock.seconds() + limit
        try:
            await run.wait(min(PATIENCE, limit))
            if not run.conn.waits_for:
                await run.wait(end - clock.seconds())
        except CancelledError:
            run.cancel()
            raise
        return run.over(Failed(f"it has not decided in {limit:g} s"))

    return decide


def _limit_of(relay: Relay | Socks4Relay) -> float:
    """How many seconds a route may take about a client."""
    return min(relay.stream.handshake_timeout or LONGEST, LONGEST)


# -- server names


def pool_of_name(steps: list[Step], relay: Relay, said: Said) -> str | None:
    """The pool that a relay has for what a client asks for; None: it is not known.

    :raises GetsNoFurther: there is none.
    """
    data = said.data
    if not data:
        why = "the name that it asks for is not known: give it with --sni"
        meet(steps, "sni", UNKNOWN, why)
        return None
    try:
        found = HelloReader()(data)
    except BadRequest as problem:
        meet(steps, "sni", REFUSED, f"no ClientHello: {problem}")
        return None
    if found is None:
        why = f"the {len(data)} bytes that it sends first are no whole ClientHello"
        meet(steps, "sni", UNKNOWN, why)
        return None
    name = found[0].server_name
    table = sni_table(relay)
    pattern = ServerNames({each: each for each in table}).find(name)
    what = "no name" if name is None else repr(name)
    if pattern is None:
        meet(steps, "sni", REFUSED, f"no server for {what}: no --sni is about it")
        return None
    why = f"it asks for {what}: --sni {pattern}="
    meet(steps, "sni", f"pool {table[pattern]}", why)
    return table[pattern]


# -- routes


async def decision_of(
    steps: list[Step], asked: Asked, decide: Decide
) -> Decision | None:
    """What a route decides; None: it is not known.

    :raises GetsNoFurther: it refuses the client, or fails.
    """
    spec = asked.relay.route
    try:
        decision = await decide(asked)
    except NotKnown as problem:
        meet(steps, "route", UNKNOWN, f"{spec}: {problem}")
        return None
    except Failed as problem:
        meet(steps, "route", REFUSED, f"{spec}: {problem}")
        return None
    _meet_beside(steps, asked, decision)
    if decision.refused is not None:
        told = f"; it is told {decision.reply!r}"[:SHOWN] if decision.reply else ""
        meet(steps, "route", REFUSED, f"{spec}: {decision.refused}{told}")
    where = f"pool {decision.pool}"
    if decision.server is not None:
        where = f"server {server_name(asked, decision)}"
    meet(steps, "route", where, str(spec))
    return decision


def server_name(asked: Asked, decision: Decision) -> str:
    """What the log calls the server that a route has named."""
    name: str = asked.router.upstream(decision.server).name
    return name


def _meet_beside(steps: list[Step], asked: Asked, decision: Decision) -> None:
    """What a route has said of the session, beside where it goes."""
    if decision.facts:
        facts = ", ".join(f"{name}={each}" for name, each in decision.facts.items())
        meet(steps, "route_facts", "noted", facts)
    limits = decision.limits
    if limits != NO_LIMITS:
        now = asked.counts.get(limits.key, 0)
        full = limits.sessions is not None and now >= limits.sessions
        result = REFUSED if full else "limited"
        meet(steps, "route_limits", result, _limits(limits, now))
    if decision.filters:
        names = [
            getattr(each, "name", "") or type(each).__name__
            for each in decision.filters
        ]
        meet(steps, "route_filters", "see its bytes", ", then ".join(names))


def _limits(limits: RouteLimits, now: int) -> str:
    said = []
    if limits.bandwidth is not None:
        said.append(f"bandwidth {limits.bandwidth}")
    if limits.max_age is not None:
        said.append(f"max_age {limits.max_age:g}")
    if limits.sessions is not None:
        of = f" of {limits.key!r}" if limits.key else ""
        said.append(f"at most {limits.sessions} sessions{of}: {now} now")
    return ", ".join(said)


def _line_of(reason: Failure) -> str:
    """Why a route has failed, and where, in a line."""
    problem = reason.value
    said = " ".join(str(problem).split())[:SHOWN]
    if isinstance(problem, BadRequest):
        return f"bad request: {said}"
    if isinstance(problem, RouteFailed):
        return said
    line = f"it has failed: {type(problem).__name__}: {said}".removesuffix(": ")
    return f"{line} ({where})" if (where := place_of(reason)) else line
