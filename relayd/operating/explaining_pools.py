"""Which server of a pool a client would get, and why not the others.

The pool is a running one, or made of settings for the purpose, with the same code; its
servers are never dialled, nor their names looked up.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from relayd.configuring.address_grammar import DatagramServer, StreamServer
from relayd.configuring.config import Relay, UdpRelay, each_port
from relayd.configuring.pools_of_relay import pools_of
from relayd.configuring.server_options import ServerOptions
from relayd.core.flows import NewFlow
from relayd.core.route_spec import DEFAULT
from relayd.net.upstream import Upstream
from relayd.operating.explanation import UNIX_CLIENT, Step, StillClock
from relayd.operating.flow_pools import FlowMaker, flow_servers
from relayd.operating.pools import stream_pool
from relayd.operating.servers import Maker
from relayd.udp_nat import Server as FlowAddress
from relayd.upstreams.pool import Pool
from relayd.upstreams.server import Server

#: A reactor that does nothing, for what is made and never started.
_CLOCK: Any = StillClock()

#: How many of the servers that can't be chosen are named.
MOST = 20


class _Maker(Maker):
    """Makes servers that are never dialled."""

    def _endpoint(self, address: StreamServer, options: ServerOptions) -> Any:
        return None


class _FlowMaker(FlowMaker):
    """Makes servers of datagrams, of which all names have an address."""

    def plain(self, address: DatagramServer) -> FlowAddress:
        made = super().plain(address)
        if made.address is None:
            made.address = socket.AF_INET, (made.host, made.port)
        return made


def unused_maker() -> Maker:
    """Makes servers that are never dialled."""
    return _Maker(_CLOCK, "twisted")


def pool_of(relay: Relay | UdpRelay, name: str = DEFAULT) -> Pool:
    """A pool of a relay's first port, as it is when nothing has happened yet.

    :param name: of the pool; one that the relay does not have is empty.
    :raises ConfigError: this machine can't send to one of the servers.
    """
    _, destinations = next(each_port(relay))
    prefix, clock = relay.admission.client_prefix, _CLOCK
    if isinstance(relay, Relay):
        made = _Maker(clock, "twisted", pool=name)
        own = pools_of(destinations, relay.sni).get(name, [])
        return stream_pool(own, relay.pool, clock, made, prefix, name)
    flows = flow_servers(destinations, relay.pool, clock, _FlowMaker(), prefix)
    if isinstance(flows, Pool):
        return flows
    return Pool([Upstream(_nowhere(), each.name) for each in flows])


def _nowhere() -> Any:
    """The endpoint of a server that is never dialled."""


def why_not(upstream: Upstream, candidates: Sequence[Upstream]) -> str:
    """Why a server is not chosen; empty if it may be.

    :param candidates: those that may be.
    """
    if upstream in candidates:
        return ""
    if isinstance(upstream, Server):
        if not upstream.usable:
            return _word(upstream)
        if upstream.is_full:
            limit = f"max={upstream.max_sessions}"
            return f"it has as many sessions as it may have: {limit}"
        if upstream.tier:
            return "it is a backup, and one before it can be chosen"
    return "it can't be chosen now"


def _word(server: Server) -> str:
    """How a server is that can't be used."""
    state, reason = server.state, server.reason
    if state == "up":
        return reason or "its name has no address"
    return f"it is {state}: {reason}" if reason not in ("", state) else f"it is {state}"


@attrs.frozen
class Choice:
    """What becomes of a client in a pool.

    :ivar server: the name of the one that it gets; None: none, or it is not known yet.
    :ivar refused: it gets none.
    """

    steps: Sequence[Step]
    server: str | None = None
    refused: bool = False


def choice_of(
    pool: Pool, relay: Relay | UdpRelay, client: str, ordinal: int | None
) -> Choice:
    """What a client meets in its pool.

    :param ordinal: the sequence number that it would have; None: that is not known, nor
        whose turn it is.
    """
    steps = list(_servers(pool, relay))
    if pool.pending:
        names = ", ".join(pool.followed)
        why = f"{names}: not looked up, so that not all servers are known"
        return Choice([*steps, Step("server", "not known", why)])
    if not pool.candidates:
        return _none(relay, steps)
    datagram = isinstance(relay, UdpRelay) and relay.udp.udp_balance == "datagram"
    if datagram and len(pool.upstreams) > 1:
        why = "--udp-balance datagram: each datagram has its own"
        return Choice([*steps, Step("server", "one of these", why)])
    name, why = _chosen(pool, relay.pool.balance, client, ordinal)
    return Choice([*steps, Step("server", name or "one of these", why)], name)


def _servers(pool: Pool, relay: Relay | UdpRelay) -> Iterator[Step]:
    """Which may be chosen, and which not."""
    candidates = pool.candidates
    names = ", ".join(each.name for each in candidates[:MOST]) or "none"
    if len(candidates) > MOST:
        names += f" and {len(candidates) - MOST} more"
    several = sum(1 for _ in each_port(relay))
    ports = f"; likewise for each of its {several} ports" if several > 1 else ""
    of = f"{len(candidates)} of {len(pool.upstreams)}"
    yield Step("pool", f"{of} can be chosen", f"{relay.pool.balance}: {names}{ports}")
    out = [
        f"{each.name}: {why}"
        for each in pool.upstreams
        if (why := why_not(each, candidates))
    ]
    for each in out[:MOST]:
        yield Step("pool", "not chosen", each)
    if len(out) > MOST:
        yield Step("pool", "not chosen", f"{len(out) - MOST} more")


def _none(relay: Relay | UdpRelay, steps: Sequence[Step]) -> Choice:
    """No server can be chosen."""
    if not isinstance(relay, Relay):
        return Choice([*steps, Step("server", "refused", "there is none")], None, True)
    when_none = relay.pool.when_none
    waits = when_none.what == "wait"
    result, why = (
        ("waits", "until there is one") if waits else ("refused", "there is none")
    )
    step = Step("server", result, f"{why}: --when-none {when_none}")
    return Choice([*steps, step], None, refused=not waits)


def _chosen(
    pool: Pool, balance: str, client: str, ordinal: int | None
) -> tuple[str | None, str]:
    """The name of the server that is chosen, if that can be told; and why."""
    if len(pool.candidates) == 1:
        return pool.candidates[0].name, "no other can be chosen"
    by_hash = balance == "client-hash" and client != UNIX_CLIENT
    if ordinal is None and not by_hash and balance in TURNS:
        return None, f"{balance}: whose turn it is can't be told before"
    chosen = pool.foretell(NewFlow(client, client, "", pool.relay, ordinal or 0))
    if chosen is None:
        return None, f"{balance}: chance decides"
    if by_hash:
        return chosen.name, f"{balance}: the same for this client, while it is usable"
    if balance == "first":
        return chosen.name, f"{balance}: before the others, in their order"
    return chosen.name, f"{balance}: its turn is next"


#: Where turns decide; by client-hash, among clients of UNIX sockets.
TURNS = ("round-robin", "least-sessions", "client-hash")
