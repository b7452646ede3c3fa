"""Checks of transparent relaying: what can't be intercepted, or dialled for a client.

Each is a generator of problems, one line each, as all of
:mod:`relayd.configuring.configure`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from relayd.configuring.about_clients import contradiction
from relayd.configuring.about_dialing import is_unix
from relayd.configuring.address_grammar import OriginalAddress
from relayd.configuring.address_settings import ACCEPT_PROXY, LISTEN
from relayd.configuring.config import Relay, UdpRelay
from relayd.configuring.dial_settings import INTERCEPT, MARK, SOURCE, TRANSPARENT
from relayd.configuring.given import Given, Layers, RelaySection
from relayd.configuring.interceptions import (
    by_tproxy,
    is_near,
    listener_for,
    listens_for_others,
    needs_tproxy,
)
from relayd.configuring.pools_of_relay import servers_given
from relayd.configuring.server_grammar import options_of
from relayd.core.interception import LOOPBACK, Intercept
from relayd.core.pool_settings import UDP_BALANCE
from relayd.core.process_settings import NETFILTER_MARK


def about_transparent(section: RelaySection) -> Iterator[str]:
    """What is wrong with how one relay dials for its clients, and goes where they meant
    to go.
    """
    transparent = section.one(TRANSPARENT)
    if transparent is not None and not transparent.value:
        transparent = None
    original = next(filter(_is_original, servers_given(section)), None)
    sources = section.all(SOURCE.key)
    if transparent is not None and sources:
        yield contradiction(transparent, sources[0])
    balance = section.one(UDP_BALANCE)
    by_datagram = balance is not None and balance.value == "datagram"
    for given in filter(None, (transparent, original)):
        where = given.place.prefix
        if by_datagram:
            yield (
                f"{where}{given} is not for {balance}: each client has a socket of its"
                " own; leave that out"
            )
        unix = _unix_listeners(section)
        if unix and (given is original or len(unix) == len(section.all(LISTEN.key))):
            of = "meant to go nowhere else" if given is original else "have no address"
            yield (
                f"{where}{given} is not possible at {unix[0]}: clients of UNIX sockets"
                f" {of}; leave it out"
            )


def _is_original(server: Given) -> bool:
    return isinstance(server.value, OriginalAddress)


def _unix_listeners(section: RelaySection) -> list[Given]:
    """Listeners on UNIX sockets, unless a balancer says there who its clients are."""
    if section.all(ACCEPT_PROXY.key):
        return []
    return list(filter(is_unix, section.all(LISTEN.key)))


def about_intercepts(section: RelaySection, relay: Relay | UdpRelay) -> Iterator[str]:
    """What can't be brought to the listeners of one relay.

    :param relay: what was given for it.
    """
    listeners = section.all(LISTEN.key)
    if not listeners:
        # Which is told.
        return
    for given in section.all(INTERCEPT.key):
        where, intercept = f"{given.place.prefix}{given}", given.value
        ends = [
            end
            for version in intercept.families
            if (end := listener_for(relay.listeners, version)) is not None
        ]
        if not ends:
            kinds = intercept.families
            of = f" of IPv{kinds[0]}" if len(kinds) == 1 else ""
            yield (
                f"{where} is not possible at {listeners[0]}: rules can lead to a"
                f" listener{of} that is one port, or an address and a port; give one,"
                " such as 16000"
            )
        elif not by_tproxy(relay, intercept):
            yield from _by_nat(where, relay, intercept, [host for host, _ in ends])


def _by_nat(
    where: str,
    relay: Relay | UdpRelay,
    intercept: Intercept,
    hosts: Iterable[str | None],
) -> Iterator[str]:
    """What can't be done by NAT."""
    if any(map(is_near, hosts)):
        yield (
            f"{where} is not possible by redirect: the kernel drops what is redirected"
            " to loopback from elsewhere; give a listener without an address, or"
            " by=tproxy"
        )
    if intercept.interface == LOOPBACK:
        yield (
            f"{where} is not possible by redirect: the kernel redirects nothing that"
            f" arrives at {LOOPBACK}; give by=tproxy"
        )
    if not needs_tproxy(relay, intercept):
        return
    udp = isinstance(relay, UdpRelay)
    if udp and listens_for_others(relay):
        yield (
            f"{where} is not possible by redirect: datagrams lose where their client"
            " meant to go; leave out by=redirect"
        )
    else:
        what = "datagrams" if udp else "connections"
        yield (
            f"{where} is not possible by redirect for a transparent relay that goes"
            " where its clients meant to go: connection tracking would take its dials"
            f" for their {what}; leave out by=redirect"
        )


def intercepted_twice(sections: Sequence[RelaySection]) -> Iterator[str]:
    """What two relays are to be brought, or one of them twice.

    The kernel goes through the rules of relays in an order that changes as they start
    and stop: either might have it.
    """
    taken: dict[str, list[tuple[int, Given]]] = {}
    for number, section in enumerate(sections):
        before = taken.setdefault(section.kind, [])
        for given in section.all(INTERCEPT.key):
            for whose, other in before:
                if _is_same(given.value, other.value, one_relay=whose == number):
                    where = f" ({other.place})" if other.place.file else ""
                    yield (
                        f"{given.place.prefix}{given} is intercepted already, by"
                        f" {other}{where}: give each its own"
                    )
                    break
            before.append((number, given))


def _is_same(one: Intercept, other: Intercept, *, one_relay: bool) -> bool:
    """Whether one has something that the other has as well.

    :param one_relay: they are of one relay, which may be brought parts of the same by
        two rules.
    """
    if not one_relay:
        return one.meets(other)
    whom, others = (
        (each.network, each.source, each.interface) for each in (one, other)
    )
    return whom == others and one.meets_ports(other)


def about_marks(layers: Layers, sections: Sequence[RelaySection]) -> Iterator[str]:
    """Marks of dials that have the bit by which rules deliver packets here.

    What is sent with it would not leave this machine.
    """
    if not any(map(_may_have_rules, sections)):
        return
    own = layers.of_process.one(NETFILTER_MARK)
    bit = NETFILTER_MARK.default if own is None else own.value
    for section in sections:
        given = section.one(MARK)
        marks = [(given, given.value)] if given is not None else []
        marks += [
            (each, options_of(each.value).mark) for each in servers_given(section)
        ]
        for each, mark in marks:
            if mark is not None and mark & bit:
                place = own.place if own is not None else each.place
                yield (
                    f"{each.place.prefix}{each} has the bit of"
                    f" {place.option(NETFILTER_MARK)}, which is"
                    f" {NETFILTER_MARK.type.show(bit)}: give another of them"
                )


def _may_have_rules(section: RelaySection) -> bool:
    given = section.one(TRANSPARENT)
    return bool(section.all(INTERCEPT.key)) or (given is not None and given.value)
