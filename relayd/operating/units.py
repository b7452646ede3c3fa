"""One relay as it was built from its settings, to be compared with another.

A relay that changes is built anew.  What it shares with the one before stays: each
pool, if nothing was said about its servers; what admits its clients, if nothing was
said about them, and the sessions that are counted in any case.  Nothing that serves is
touched while it is built: :mod:`relayd.operating.changing` does that, in one step, or
forgets what was built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import attrs

from relayd.configuring.address_grammar import PortRange, UdpAddress, dialled_host
from relayd.configuring.config import (
    AnyRelay,
    Config,
    Relay,
    Socks4Relay,
    UdpRelay,
    each_port,
)
from relayd.configuring.interceptions import listens_for_others
from relayd.configuring.pools_of_relay import pools_of
from relayd.configuring.server_grammar import options_of
from relayd.core.route_spec import DEFAULT
from relayd.core.setting_types import Kind
from relayd.datagrams.sockets import MOST_BY_DEFAULT, possible_flows
from relayd.datagrams.spreading import sockets_to
from relayd.net.dial_options import DialOptions
from relayd.observing.line_log import LineLog
from relayd.observing.session_log import QuietSessionLog, SessionLog, VerboseSessionLog
from relayd.operating.admission import Admitting
from relayd.operating.checks import ServerCheckService
from relayd.operating.route_modules import Routes
from relayd.operating.standing import Listening
from relayd.udp_nat import UdpNat
from relayd.upstreams.pool import Pool


@attrs.frozen
class FlowLimit:
    """How the UDP relays of a process divide its descriptors and ports.

    :ivar tables: the tables of flows: one for each relay, and each port of a range.
    :ivar each: the flows that each of them can have, by descriptors.  Those of a relay
        that replies from other addresses take one more each; those whose datagrams go
        to one server after the other, one for each family and way of dialling.
    :ivar on_ports: the tables whose flows take ephemeral ports.
    :ivar each_on_ports: the flows that each of these can have, by both.
    """

    tables: int
    each: int
    on_ports: int
    each_on_ports: int

    @classmethod
    def of(cls, config: Config) -> FlowLimit:
        tables = descriptors = on_ports = ports = 0
        for relay in config.relays:
            if not isinstance(relay, UdpRelay):
                continue
            count, sockets = sum(1 for _ in each_port(relay)), sockets_of_flow(relay)
            tables += count
            descriptors += count * (sockets + listens_for_others(relay))
            if takes_ports(relay):
                on_ports += count
                ports += count * sockets
        each = possible_flows(ephemeral=False) // (descriptors or 1) or 1
        by_ports = possible_flows() // (ports or 1) or 1
        return cls(tables, each, on_ports, min(each, by_ports))

    @property
    def most_by_default(self) -> int:
        """The flows that each table has unless somebody said."""
        return max(1, MOST_BY_DEFAULT // (self.tables or 1))


def sockets_of_flow(relay: UdpRelay) -> int:
    """How many sockets a flow of a relay can have to its servers."""
    if relay.udp.udp_balance == "flow":
        return 1
    of_relay = relay.dialing.options
    places: list[tuple[str | None, DialOptions | None]] = []
    for each in relay.destinations:
        where = each.first if isinstance(each, PortRange) else each
        # What stands for several servers may have some of both families.
        host = dialled_host(where.host) if isinstance(where, UdpAddress) else None
        places.append((host, where.options.dialing(of_relay)))
    return sockets_to(places)


def takes_ports(relay: UdpRelay) -> bool:
    """Whether flows of a relay take ephemeral ports, or may.

    Transparent ones do not: each has its client's port.  One to a server that has a
    source of its own is not transparent.
    """
    return not relay.dialing.transparent or any(
        options_of(each).source is not None for each in relay.destinations
    )


@attrs.define(eq=False, slots=False)
class Workshop:
    """What the relays of a process are built with.

    :ivar config: the settings of the process.
    :ivar lines: for the lines of sessions and flows.
    :ivar checks: what checks the servers; unless given, nobody does.
    :ivar routes: the functions of routes.
    """

    config: Config
    reactor: Any
    lines: LineLog
    checks: ServerCheckService | None = None
    routes: Routes = attrs.field(factory=Routes)

    @cached_property
    def flows(self) -> FlowLimit:
        """How many flows UDP relays can have."""
        return FlowLimit.of(self.config)

    @cached_property
    def unused(self) -> ServerCheckService:
        """What is asked to check the servers of relays that are stopped: it does not.

        So a check that can't be made is found all the same.
        """
        return ServerCheckService(self.reactor, self.config.transport)

    def admitting(self, relay: AnyRelay, before: Unit | None) -> Admitting:
        """What admits the clients of a relay.

        :param before: the relay that it is to follow.
        """
        shared = None if before is None else before.admitting
        return Admitting.of(relay.admission, self.reactor, shared)

    def checks_of(self, relay: AnyRelay) -> ServerCheckService | None:
        """What checks the servers of a relay."""
        return self.checks if relay.enabled or self.checks is None else self.unused


@attrs.frozen(eq=False)
class Part:
    """What serves the listeners of one port of a relay.

    :ivar served: a factory, or a UDP relay.
    :ivar listenings: its listeners.
    :ivar pools: its servers, by the names of their pools; none if they have no state.
    :ivar hears: what `served` has its pools call of servers that have changed.
    :ivar built: a UDP relay that `served` is to become; itself, if it is new.
    """

    served: Any
    listenings: Sequence[Listening]
    pools: Mapping[str, Pool] = attrs.field(factory=dict)
    hears: Sequence[Callable[[Any], object]] = ()
    built: UdpNat | None = None

    @property
    def pool(self) -> Pool | None:
        """The pool of the servers of which no other is said."""
        return self.pools.get(DEFAULT)

    def let_go(self) -> None:
        """It serves nobody: its pools, which another may have, call it no more."""
        for pool in self.pools.values():
            for told in (pool.listeners, pool.latest.followers):
                for each in self.hears:
                    if each in told:
                        told.remove(each)


@attrs.frozen(eq=False)
class Unit:
    """One relay.

    :ivar settings: it was built of these; they have its name.
    :ivar admitting: what its parts share.
    :ivar parts: one, or one for each port of a range, or each listener of a proxy.
    :ivar filters: that its parts share: one for each of the settings'.
    :ivar router: that asks its route; None: it has none.
    """

    settings: AnyRelay
    admitting: Admitting
    parts: Sequence[Part]
    filters: Sequence[Any] = ()
    router: Any = None

    @property
    def name(self) -> str:
        """What it is called."""
        return self.settings.name or ""

    @property
    def kind(self) -> Kind:
        """What it relays."""
        return kind_of(self.settings)

    @property
    def listenings(self) -> list[Listening]:
        """Its listeners."""
        return [each for part in self.parts for each in part.listenings]

    @property
    def pools(self) -> list[Pool]:
        """The pools of its servers."""
        return [pool for each in self.parts for pool in each.pools.values()]

    def kept(self, settings: AnyRelay) -> list[dict[str, Pool]]:
        """Of each part, the pools that another relay can have as they are.

        :param settings: of the other one.
        """
        were, said = said_of_servers(self.settings), said_of_servers(settings)
        return [
            {
                name: pool
                for name, pool in part.pools.items()
                if name in were and were[name] == said.get(name)
            }
            for part in self.parts
        ]


def kind_of(settings: AnyRelay) -> Kind:
    """What a relay with these settings relays."""
    if isinstance(settings, UdpRelay):
        return "udp"
    return "socks4" if isinstance(settings, Socks4Relay) else "tcp"


def said_of_servers(settings: AnyRelay) -> Mapping[str, Any]:
    """All that the servers of each pool of a relay are made of."""
    if not isinstance(settings, Relay | UdpRelay):
        return {}
    stream = isinstance(settings, Relay)
    of_all = (
        type(settings),
        settings.enabled,
        settings.pool,
        settings.dialing,
        settings.admission.client_prefix,
        settings.stream.send_proxy if stream else None,  # type: ignore[union-attr]
    )
    sni = settings.sni if isinstance(settings, Relay) else ()
    pools = pools_of(settings.destinations, sni)
    return {name: (servers, of_all) for name, servers in pools.items()}


def share_totals(parts: Sequence[Part]) -> None:
    """Have the factories of one relay count together."""
    first, *others = (each.served for each in parts)
    for other in others:
        other.share_totals(first)


def session_log(shop: Workshop) -> SessionLog:
    """What writes the lines of sessions."""
    if shop.config.verbose:
        return VerboseSessionLog(shop.lines)
    return QuietSessionLog(shop.lines) if shop.config.quiet else SessionLog(shop.lines)
