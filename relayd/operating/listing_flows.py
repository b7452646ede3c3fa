"""What a running relay tells of its flows, and the NAT table.

The table has an entry for each client that is relayed: of UDP a flow, of TCP and SOCKS4
a session that is joined.  It says what the relay's own address towards the server is,
which for TCP the kernel is asked as the table is read, and not before.

See :mod:`relayd.operating.listing` for how a list is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from relayd.control.steering import FlowQuery, Work
from relayd.core.addresses import address_name, socket_name
from relayd.operating.listing import (
    Shown,
    Source,
    StreamSource,
    Wanted,
    listed,
    relays_of,
)


class FlowSource:
    """The flows of one UDP relay."""

    def __init__(self, relay: str, factory: Any) -> None:
        self.living: Sequence[Any] = factory.registry.living()
        self._relay = relay
        self._factory = factory
        self._open = factory.table.flows
        self._now: float = factory.ledger.now()

    def lives(self, member: Any) -> bool:
        """See :class:`relayd.operating.listing.Source`; so the others."""
        return self._open.get(member.key) is member

    def matches(self, member: Any, wanted: Wanted) -> bool:
        if wanted.ids is not None:
            return False
        if wanted.server is not None and not _is_at(member, wanted.server):
            return False
        return wanted.peers is None or wanted.is_of(socket_name(member.source))

    def figures(self, member: Any) -> tuple[int, int, float, int]:
        return member.up_bytes, member.down_bytes, self._now - member.began, 0

    def row(self, member: Any, up: int, down: int, age: float) -> dict[str, Any] | None:
        if not self.lives(member):
            return None
        facts = self._factory.facts(member)
        return {
            "relay": self._relay,
            "client": facts.client,
            "listener": facts.listener,
            "port": facts.port,
            "server": facts.server,
            "age": age,
            "idle": max(self._factory.ledger.now() - member.seen, 0.0),
            "datagrams_up": member.up_datagrams,
            "datagrams_down": member.down_datagrams,
            "bytes_up": up,
            "bytes_down": down,
            "replied": member.replied,
            "filters": list(member.filtered),
        }


def _is_at(flow: Any, text: str) -> bool:
    """Whether a flow's server has this name, label or address."""
    server, state = flow.server, flow.server.state
    if text == server.name or (state is not None and text in (state.name, state.label)):
        return True
    return bool(flow.tried) and text == socket_name(flow.tried[-1][1])


class TranslatedFlows(FlowSource):
    """The same, as entries of the NAT table."""

    def row(self, member: Any, up: int, down: int, age: float) -> dict[str, Any] | None:
        row = super().row(member, up, down, age)
        if row is not None:
            del row["replied"], row["filters"]
            row = {"protocol": "udp", **row}
        return row


class TranslatedSessions(StreamSource):
    """Sessions of streams, likewise."""

    def lives(self, member: Any) -> bool:
        return member.bridge is not None

    def row(self, member: Any, up: int, down: int, age: float) -> dict[str, Any] | None:
        bridge, session = member.bridge, member.session
        if bridge is None:
            return None
        return {
            "protocol": "tcp",
            "relay": self._relay,
            "client": session.client,
            "listener": session.listener,
            "port": _own_address(bridge.upstream),
            "server": session.upstream,
            "age": age,
            "idle": self.idle(member),
            "bytes_up": up,
            "bytes_down": down,
            "datagrams_up": None,
            "datagrams_down": None,
        }


def _own_address(leg: Any) -> str | None:
    """The local address of a server's connection; None if it is gone."""
    if not leg.alive:
        return None
    try:
        return address_name(leg.transport.getHost())
    except OSError:
        # Closed, but nobody was told yet.
        return None


def flow_sources(
    shown: Iterable[Shown], kind: type[FlowSource] = FlowSource
) -> list[FlowSource]:
    """The flows of UDP relays."""
    return [
        kind(relay.name, factory)
        for relay in shown
        if relay.kind == "udp"
        for factory, _ in relay.generations
    ]


def flows(shown: Iterable[Shown], query: FlowQuery) -> Work:
    """The flows of datagrams.

    :return: `{flows: […], matched, total}`, the last of the relays that were asked for.
    :raises Unknown: there is no such relay.
    :raises Invalid: the client is no address and no network.
    """
    wanted = Wanted.of(query.client, query.server)
    sources = flow_sources(relays_of(shown, query.relay))
    return (yield from listed("flows", sources, wanted, query))


def nat(shown: Iterable[Shown], query: FlowQuery) -> Work:
    """The NAT table: who is relayed, through which address of the relay's own.

    :return: `{entries: […], matched, total}`, the last of the relays that were asked
        for.
    :raises Unknown: there is no such relay.
    :raises Invalid: the client is no address and no network.
    """
    wanted = Wanted.of(query.client, query.server)
    chosen = relays_of(shown, query.relay)
    sources: list[Source] = []
    for relay in chosen:
        if relay.kind == "udp":
            sources += flow_sources([relay], TranslatedFlows)
        else:
            sources += [
                TranslatedSessions(relay.name, factory, older)
                for factory, older in relay.generations
            ]
    return (yield from listed("entries", sources, wanted, query))
