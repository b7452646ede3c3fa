"""Explains what becomes of a client: which rule, hours, limits, which server, and why.

Nothing is connected, looked up or changed, but for what a route of the relay's operator
does (:mod:`relayd.operating.explaining_routes`).  What decides is what decides in a
relay: the gate, the pool and the policy are built of the relay's settings as ever, or
are those of a running relay, and are asked by methods that count nobody.  So is what
refuses to dial for a client (:mod:`relayd.operating.explaining_transparent`).
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import Any

import attrs

from relayd.admission.hours import utc_now
from relayd.configuring.config import (
    AnyRelay,
    Config,
    Relay,
    Socks4Relay,
    UdpRelay,
)
from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.configuring.server_grammar import parse_server
from relayd.configuring.written import named
from relayd.core.errors import ConfigError
from relayd.core.route_spec import DEFAULT
from relayd.operating.admission import Admitting
from relayd.operating.explaining_gates import meet_bandwidth, meet_gates
from relayd.operating.explaining_pools import choice_of, pool_of, unused_maker
from relayd.operating.explaining_proxies import meet_rules, meet_users
from relayd.operating.explaining_routes import (
    Asked,
    Decide,
    Said,
    decision_of,
    ends_tls,
    pool_of_name,
    server_name,
    without_reactor,
)
from relayd.operating.explaining_transparent import (
    chosen_for,
    meet_dialing,
    servers_in,
)
from relayd.operating.explanation import (
    OK,
    REFUSED,
    UNKNOWN,
    Explanation,
    GetsNoFurther,
    Instant,
    Step,
    StillClock,
    client_of,
    instant_of,
    meet,
)
from relayd.operating.route_modules import Routes
from relayd.operating.routing import router_of
from relayd.preludes.proxy_protocol import introduced_by
from relayd.upstreams.pool import Pool


@attrs.frozen(kw_only=True)
class State:
    """What is known of a relay that runs.

    :ivar gate: its gate; None: it has none.
    :ivar pool: of its first port; None: as its settings say; a proxy has none.
    :ivar pools: all that it has, by name, likewise.
    :ivar router: asks its route; None: as its settings say.
    :ivar listener: an address where it listens; empty: as its settings say.
    :ivar own_counts: how many sessions there are of each key that its route limits.
    :ivar ordinal: the sequence number of its next session; None: that is not known.
    :ivar stopped: it does not serve new clients: why.
    :ivar held: new clients are held, until an operator has them served.
    """

    gate: Any = None
    pool: Pool | None = None
    pools: Mapping[str, Pool] = attrs.field(factory=dict)
    router: Any = None
    listener: str = ""
    own_counts: Mapping[str, int] = attrs.field(factory=dict)
    ordinal: int | None = None
    stopped: str = ""
    held: bool = False

    def pool_of(self, name: str, relay: Relay | UdpRelay) -> Pool:
        """One of its pools."""
        pool = self.pools.get(name, self.pool if name == DEFAULT else None)
        return pool_of(relay, name) if pool is None else pool

    @classmethod
    def before(cls, relay: AnyRelay) -> State:
        """That of one that starts."""
        stopped = "" if relay.enabled else "it is stopped at start: enabled = false"
        gate = Admitting.of(relay.admission, StillClock()).gate
        return cls(gate=gate, stopped=stopped)

    @classmethod
    def of(cls, factory: Any, stopped: str = "") -> State:
        """That of a stream relay (:class:`relayd.stream.relay.StreamRelay`)."""
        pools = getattr(factory, "pools", {})
        own = getattr(factory, "own_limits", None)
        return cls(
            gate=factory.gate,
            pool=getattr(factory, "pool", None),
            pools={name: each.pool for name, each in pools.items()},
            ordinal=factory.ordinals.following,
            stopped=stopped,
            own_counts={} if own is None else own.counts,
        )


def explain(
    relay: AnyRelay,
    client: str,
    *,
    at: Instant | None = None,
    dest: str | None = None,
    user: str = "",
    first: bytes | str | None = None,
    sni: str | None = None,
    state: State | None = None,
) -> Explanation:
    """What becomes of a client of a relay.

    What a route of it waits for is not known: there is no reactor.

    :param relay: its settings, which are valid.
    :param client: an address, with or without a port, or `unix`.
    :param at: when it comes, of the hours' clocks unless it names a zone; unless given,
        now.  Rates and limits are always as of now.
    :param dest: for a proxy: `HOST:PORT` that the client asks for.
    :param user: for a proxy: the user id that it gives.
    :param first: what it sends first, for a route; text has escapes.
    :param sni: the server name that it asks for by TLS.
    :param state: of the running relay; unless given, nobody has come yet.
    :raises ConfigError: an argument is not valid; or a route can't be imported.
    """
    said = Said.of(first, sni)
    explaining = explained(
        *(relay, client, without_reactor),
        at=at,
        dest=dest,
        user=user,
        said=said,
        state=state,
    )
    return _at_once(explaining)


def _at_once(explaining: Coroutine[Any, Any, Explanation]) -> Explanation:
    """What a coroutine returns that waits for nothing."""
    try:
        explaining.send(None)
    except StopIteration as done:
        found: Explanation = done.value
        return found
    explaining.close()
    raise RuntimeError("an explanation has waited for something")


async def explained(
    relay: AnyRelay,
    client: str,
    decide: Decide,
    *,
    at: Instant | None = None,
    dest: str | None = None,
    user: str = "",
    said: Said | None = None,
    state: State | None = None,
) -> Explanation:
    """The same of a relay whose route may wait.

    :param decide: has its route decide.
    :param said: by the client.
    """
    client, said = client_of(client), said or Said()
    proxied = isinstance(relay, Socks4Relay)
    if (dest is not None or user) and not proxied:
        raise ConfigError(
            "a destination and a user are for SOCKS4 proxies: the servers of this"
            " relay are in its settings"
        )
    routed = not isinstance(relay, UdpRelay) and relay.route is not None
    named = isinstance(relay, Relay) and bool(relay.sni)
    if said.data and not routed and not named:
        raise ConfigError(
            "what a client sends first, or the server name that it asks for, decides"
            " nothing: this relay has no route and no --sni"
        )
    tls = not isinstance(relay, UdpRelay) and ends_tls(relay)
    if said.first and said.name is not None and not tls:
        raise ConfigError(
            "give either what the client sends first, or the server name that it asks"
            " for: a name makes its first bytes a ClientHello"
        )
    moment = utc_now() if at is None else instant_of(at, relay.admission.hours)
    steps: list[Step] = []
    known = State.before(relay) if state is None else state
    try:
        if known.stopped:
            meet(steps, "state", REFUSED, known.stopped)
        if known.held:
            meet(steps, "state", "waits", "it is paused: until relayctl resume")
        _accept_proxy(steps, relay, client)
        meet_gates(steps, relay, known.gate, client, moment)
        meet_bandwidth(steps, relay.admission)
        if relay.filters:
            what = "datagrams" if isinstance(relay, UdpRelay) else "bytes"
            each = ", then ".join(f"--filter {str(one)!r}" for one in relay.filters)
            meet(steps, "filters", f"see its {what}", each)
        if isinstance(relay, Socks4Relay):
            meet_users(steps, relay, user)
            if dest is None:
                why = "none given: CONNECT needs one"
                meet(steps, "destination", UNKNOWN, why)
                return Explanation(True, steps, None)
        name: str | None = DEFAULT
        if isinstance(relay, Relay) and relay.sni:
            name = pool_of_name(steps, relay, said)
        elif not isinstance(relay, UdpRelay) and relay.route is not None:
            asked = Asked(
                relay=relay,
                router=known.router or router_of(relay, Routes(), unused_maker()),
                client=client,
                said=said,
                listener=known.listener,
                requested=dest,
                user=user,
                counts=known.own_counts,
            )
            decision = await decision_of(steps, asked, decide)
            if decision is None or decision.server not in (None, dest):
                where = None if decision is None else server_name(asked, decision)
                if decision is not None and isinstance(relay, Relay):
                    named_by_route = [parse_server(decision.server or "")]
                    meet_dialing(steps, relay, named_by_route, client)
                return Explanation(True, steps, where)
            name = decision.pool
        if isinstance(relay, Socks4Relay):
            meet_rules(steps, relay, dest or "")
            return Explanation(True, steps, dest)
        if name is None:
            return Explanation(True, steps, None)
        refused = meet_dialing(steps, relay, servers_in(relay, name), client)
        choice = choice_of(known.pool_of(name, relay), relay, client, known.ordinal)
        choice = chosen_for(choice, refused)
        steps += choice.steps
        return Explanation(not choice.refused, steps, choice.server)
    except GetsNoFurther:
        return Explanation(False, steps, None)


def _accept_proxy(steps: list[Step], relay: AnyRelay, client: str) -> None:
    if isinstance(relay, UdpRelay):
        return
    trusted = introduced_by(relay.stream.accept_proxy)
    if trusted is None:
        why = "no --accept-proxy: who connects is the client"
        meet(steps, "accept_proxy", OK, why)
    elif client in trusted.peers:
        meet(
            steps,
            "accept_proxy",
            "a header is expected",
            "--accept-proxy names this peer: it has to send a PROXY header, and what"
            " follows is about the client that the header names, or about this peer if"
            " it speaks for itself",
        )
    else:
        why = "--accept-proxy does not name this peer: it is the client itself"
        meet(steps, "accept_proxy", OK, why)


# -- files


def explain_file(
    path: str,
    relay: str | None,
    client: str,
    at: Instant | None = None,
    dest: str | None = None,
    user: str = "",
) -> dict[str, Any]:
    """The same of a file, as JSON has it (:attr:`Explanation.as_json`).

    :param path: of a file or a folder; `-` is standard input.
    :param relay: the name of one of its relays; None: it has one only.
    :raises ConfigError: the file is not valid, a line for each problem; or an argument.
    """
    found = relay_of_file(path, relay)
    return explain(found, client, at=at, dest=dest, user=user).as_json


def relay_of_file(path: str, relay: str | None = None) -> AnyRelay:
    """The settings of one relay of a file; see :func:`explain_file`."""
    layers = read_layers(path)
    config = configure(layers)
    names = [name for name, _ in named(layers)]
    return _one_of(dict(zip(names, config.relays, strict=True)), relay, f"{path}: ")


def relay_of(config: Config, relay: str | None = None) -> AnyRelay:
    """The settings of one relay of a process; see :func:`explain_file`.

    Relays without a name are `relay1` and so on here, in their order.
    """
    given = {each.name for each in config.relays}
    free = (name for n in range(1, 1 << 30) if (name := f"relay{n}") not in given)
    return _one_of({each.name or next(free): each for each in config.relays}, relay)


def _one_of(
    relays: dict[str, AnyRelay], name: str | None, prefix: str = ""
) -> AnyRelay:
    if name is None and len(relays) == 1:
        return next(iter(relays.values()))
    if name in relays:
        return relays[name]
    names = ", ".join(list(relays)[:10])
    more = f" and {len(relays) - 10} more" if len(relays) > 10 else ""
    what = "which relay" if name is None else f"there is no relay {name!r}"
    raise ConfigError(f"{prefix}{what}: there are {names or 'none'}{more}")
