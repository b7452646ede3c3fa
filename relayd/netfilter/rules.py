"""Which rules of netfilter a relay needs, by its settings; nothing is asked or changed.

A relay that has `intercept` takes what is meant for others.  Its *intakes* bring that
to its listener: by NAT, which changes the destination (`redirect`, `dnat`), or by
TPROXY, which does not.  One that is transparent has sockets with its clients' addresses
towards its servers.  What the servers send is for those addresses, so the kernel would
forward it: a rule marks what a transparent socket of this machine waits for, and a
routing rule has what is marked delivered here.  What comes in by TPROXY needs the same.

Of datagrams, only what comes from a relay's servers is marked.  A socket that replies
to a client from where the client meant to go is bound to that address and to nobody in
particular: a rule for all datagrams would find it for those of other clients to the
same server, whom this relay may not serve at all.

:mod:`relayd.netfilter.documents` writes all this as nft(8) takes it.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import attrs

from relayd.configuring.address_grammar import (
    HostPort,
    OriginalAddress,
    PortRange,
    UdpAddress,
    dialled_host,
)
from relayd.configuring.config import Relay, UdpRelay
from relayd.configuring.ends import address_of
from relayd.configuring.interceptions import by_tproxy, listener_for, takes_original
from relayd.configuring.pools_of_relay import servers_of
from relayd.configuring.server_grammar import ServersOf, options_of
from relayd.core.interception import Intercept
from relayd.core.networks import Network

Protocol = Literal["tcp", "udp"]

#: Ranges of them, ends included; none: all.
Ports = tuple[tuple[int, int], ...]

#: The versions of IP.
VERSIONS = (4, 6)


@attrs.frozen
class Intake:
    """What is brought to a listener, and how.

    :ivar version: of IP, 4 or 6.
    :ivar network: where it was to go; None: anywhere.
    :ivar ports: likewise.
    :ivar source: where it comes from; None: from anywhere.
    :ivar interface: which one it comes in by; None: any but loopback.
    :ivar tproxy: by TPROXY; else by NAT.
    :ivar host: the listener's own address; None: it has all of them.
    :ivar port: the listener's.
    """

    version: int
    network: Network | None
    ports: Ports
    source: Network | None
    interface: str | None
    tproxy: bool
    host: str | None
    port: int


@attrs.frozen
class Answers:
    """What servers send.

    :ivar version: of IP; None: either.
    :ivar network: where the servers are; None: anywhere.
    :ivar ports: where they send from; empty: from any port.
    """

    version: int | None = None
    network: Network | None = None
    ports: Ports = ()


@attrs.frozen
class RelayRules:
    """What the kernel is to do for one relay.

    :ivar name: the relay's.
    :ivar diverts: what its transparent sockets wait for is delivered to them.
    :ivar answers: what servers send to them; of TCP, only the versions of IP are said.
    :ivar translated: connections that NAT has brought to it go on.
    :ivar marked: so do those that TPROXY has brought, where NAT brings others.
    """

    name: str
    protocol: Protocol
    intakes: tuple[Intake, ...]
    diverts: bool
    answers: tuple[Answers, ...]
    translated: bool = False
    marked: bool = False

    @property
    def versions(self) -> frozenset[int]:
        """The versions of IP of which packets are marked: those need a route."""
        found = {each.version for each in self.intakes if each.tproxy}
        if self.diverts:
            for each in self.answers:
                found.update(VERSIONS if each.version is None else (each.version,))
        return frozenset(found)

    @property
    def has_nat(self) -> bool:
        """Whether something is brought to it by NAT."""
        return not all(each.tproxy for each in self.intakes)

    @property
    def has_tproxy(self) -> bool:
        """Whether something is brought to it by TPROXY."""
        return any(each.tproxy for each in self.intakes)

    def keeping(self, before: RelayRules) -> RelayRules:
        """The same, and what the sessions need that began by the rules of before.

        Their clients are not brought here any more; what is under way is delivered.
        """
        answers: Iterable[Answers] = ()
        if before.diverts and self.protocol == "udp":
            answers = before.answers
        elif before.diverts:
            answers = (Answers(each) for each in sorted(before.versions))
        by_nat = before.translated or before.has_nat
        by_tproxy = before.marked or before.has_tproxy
        return attrs.evolve(
            self,
            diverts=self.diverts or before.diverts,
            answers=tuple(dict.fromkeys((*self.answers, *answers))),
            translated=self.translated or (by_nat and not self.has_nat),
            marked=self.marked or (by_tproxy and self.has_nat),
        )

    def closed(self) -> RelayRules | None:
        """What the sessions need that began by these rules, and no new client; None:
        nothing.
        """
        nothing = RelayRules(self.name, self.protocol, (), False, ())
        left = nothing.keeping(self)
        return None if left == nothing else left


def rules_of(relay: Relay | UdpRelay, called: str = "") -> RelayRules | None:
    """What a relay needs of the kernel; None: nothing.

    :param relay: with settings that were checked.
    :param called: what it is called, if its settings don't say.
    """
    protocol: Protocol = "udp" if isinstance(relay, UdpRelay) else "tcp"
    intakes = tuple(dict.fromkeys(_intakes(relay)))
    transparent = relay.dialing.transparent
    # A connection that came by TPROXY has a transparent socket, too, which outlives the
    # rule that brought it.  Datagrams come by that rule, each of them.
    tproxy = protocol == "tcp" and any(each.tproxy for each in intakes)
    answers = tuple(dict.fromkeys(_answers(relay))) if transparent else ()
    diverts = bool(answers) or tproxy
    if not (intakes or diverts):
        return None
    return RelayRules(relay.name or called, protocol, intakes, diverts, answers)


# -- to listeners


def _intakes(relay: Relay | UdpRelay) -> Iterator[Intake]:
    for each in relay.intercepts:
        tproxy = by_tproxy(relay, each)
        for version in each.families:
            target = listener_for(relay.listeners, version)
            if target is not None:
                yield Intake(
                    *(version, each.network, each.ports, each.source, each.interface),
                    *(tproxy, *target),
                )


# -- from servers


def _answers(relay: Relay | UdpRelay) -> Iterator[Answers]:
    """What the servers of a relay send to its clients' own addresses."""
    if isinstance(relay, Relay) and (relay.route or _told_by_balancers(relay)):
        # That may lead anywhere.
        yield Answers()
        return
    for server in servers_of(relay):
        # One with a source of its own does not see them.
        if options_of(server).source is None:
            for each in _answers_of(server, relay.intercepts):
                if isinstance(relay, UdpRelay):
                    yield each
                else:
                    yield Answers(each.version)


def _told_by_balancers(relay: Relay) -> bool:
    """Whether PROXY headers may say where its clients meant to go."""
    return bool(relay.stream.accept_proxy) and takes_original(relay)


def _answers_of(server: Any, intercepts: Sequence[Intercept]) -> Iterator[Answers]:
    last = None
    if isinstance(server, PortRange):
        server, last = server.first, server.last
    if isinstance(server, OriginalAddress):
        yield from _of_original(server.host, intercepts)
    elif isinstance(server, ServersOf):
        yield Answers(ports=((server.port, server.port),) if server.port else ())
    elif isinstance(server, HostPort | UdpAddress):
        ports = ((server.port, last or server.port),)
        yield _from_host(dialled_host(server.host), ports)


def _of_original(
    host: str | None, intercepts: Sequence[Intercept]
) -> Iterator[Answers]:
    """Of those that clients meant."""
    if not intercepts:
        # Somebody else's rules bring them, from wherever those say.
        yield Answers() if host is None else _from_host(host, ())
    for each in intercepts:
        if host is not None:
            yield _from_host(host, each.ports)
        else:
            for version in each.families:
                yield Answers(version, each.network, each.ports)


def _from_host(host: str, ports: Ports) -> Answers:
    """What a host sends; a name may have any address."""
    address = address_of(host.partition("%")[0])
    if address is None:
        return Answers(ports=ports)
    return Answers(address.version, ipaddress.ip_network(address), ports)
