"""Checks of routes and server names: which contradict each other, or lead nowhere.

Each is a generator of problems, one line each, as all of
:mod:`relayd.configuring.configure`.  Whether a route can be imported is found as it is
made (:mod:`relayd.operating`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from relayd.configuring.about_clients import contradiction
from relayd.configuring.address_grammar import EndpointString
from relayd.configuring.address_settings import DEST, LISTEN
from relayd.configuring.endpoint_strings import ends_tls
from relayd.configuring.given import Given, RelaySection
from relayd.configuring.pools_of_relay import servers_given
from relayd.configuring.route_settings import ROUTE, SNI
from relayd.configuring.server_grammar import options_of
from relayd.core.check_grammar import TcpCheck
from relayd.core.pool_settings import CHECK
from relayd.core.route_spec import DEFAULT
from relayd.core.settings import SERVER_SPEAKS_FIRST


def about_routes(section: RelaySection) -> Iterator[str]:
    """What is wrong with how one relay decides about its clients."""
    if section.kind != "tcp":
        return
    route, sni = section.one(ROUTE), section.all(SNI.key)
    if route is not None and sni:
        yield contradiction(route, sni[0])
        return
    if sni:
        yield from _about_names(sni)
        yield from _about_tls(section, sni[0])
        yield from _about_first_words(section, sni[0])
    if not {DEST.key, ROUTE.key, SNI.key} & set(section.faulty):
        yield from _about_pools(section, route, sni)


def _about_tls(section: RelaySection, sni: Given) -> Iterator[str]:
    """Listeners that end TLS, behind which there is no ClientHello."""
    for listener in section.all(LISTEN.key):
        address = listener.value
        if isinstance(address, EndpointString) and ends_tls(address.text):
            yield (
                f"{listener.place.prefix}{sni} is not possible at {listener}, which"
                " ends TLS itself: listen without it; or ask for the name in a route"
            )


def _about_first_words(section: RelaySection, sni: Given) -> Iterator[str]:
    """Servers that speak first, to whose clients nobody listens before."""
    speaks = section.one(SERVER_SPEAKS_FIRST)
    if speaks is not None and speaks.value:
        yield contradiction(speaks, sni)
    given = section.one(CHECK)
    own = [options_of(each.value).check for each in servers_given(section)]
    # There is no server for it if each has its own.
    if given is not None and _expects_first(given.value) and not all(own):
        yield _speaks_first(given, str(given), sni)
    for server, check in zip(servers_given(section), own, strict=True):
        if _expects_first(check):
            yield _speaks_first(server, f"{server}: check={check}", sni)


def _expects_first(check: object) -> bool:
    """Whether a server is to speak first, at the port to which clients come."""
    return (
        isinstance(check, TcpCheck)
        and check.port is None
        and bool(check.expect)
        and not check.send
    )


def _speaks_first(given: Given, what: str, sni: Given) -> str:
    option = sni.place.option(SNI)
    return (
        f"{given.place.prefix}{what} says that servers speak first, and {option} is for"
        " TLS, where clients do: leave one of them out"
    )


def _about_names(sni: Sequence[Given]) -> Iterator[str]:
    """Names of which several things are said."""
    first: dict[str, Given] = {}
    for each in sni:
        other = first.setdefault(each.value.pattern, each)
        both = (each.value.target, other.value.target)
        if other is not each and any(isinstance(target, str) for target in both):
            yield (
                f"{each.place.prefix}{each} and {other} are about the same name: give"
                " it one pool, or addresses only"
            )


def _about_pools(
    section: RelaySection, route: Given | None, sni: Sequence[Given]
) -> Iterator[str]:
    """Pools that there are not, and those that nobody would use."""
    pools: dict[str, Given] = {}
    for each in section.all(DEST.key):
        pools.setdefault(options_of(each.value).pool or DEFAULT, each)
    if sni:
        yield from _about_names_of_pools(pools, sni)
        used = {each.value.pool for each in sni}
    elif route is not None:
        return
    else:
        used = {DEFAULT}
    for name, server in pools.items():
        if name not in used:
            yield _nobody_uses(name, server, sni)


def _nobody_uses(name: str, server: Given, sni: Sequence[Given]) -> str:
    place = server.place
    such = place.example(SNI, f"={name}" if sni else f"www.example.com={name}")
    other = "leave it out" if sni else place.example(ROUTE, "MODULE:FUNCTION")
    return (
        f"{place.prefix}nothing leads to {server}, which is of the pool {name!r}: give"
        f" {such}, or {other}"
    )


def _about_names_of_pools(
    pools: Mapping[str, Given], sni: Sequence[Given]
) -> Iterator[str]:
    """Pools that there are not, and two of one name."""
    for each in sni:
        where, name = f"{each.place.prefix}{each}", each.value.pool
        if isinstance(each.value.target, str):
            if name not in pools:
                of = "" if name == DEFAULT else f",pool={name}"
                such = each.place.example(DEST, f"10.0.0.5:443{of}")
                yield (
                    f"{where}: there is no pool {name!r}: give {such}, or an address in"
                    " its place"
                )
        elif name == DEFAULT:
            yield (
                f"{where}: its pool would be called {name!r}, as the relay's own: give"
                f" its servers a pool= of another name, and"
                f" {each.place.example(SNI, f'{name}=NAME')}"
            )
        elif name in pools:
            yield (
                f"{where}: its pool would be called {name!r}, as that of {pools[name]}:"
                " give that one another name"
            )
