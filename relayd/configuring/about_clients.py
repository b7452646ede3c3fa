"""Checks of who may be served: what contradicts itself, and what does nothing.

Each is a generator of problems, one line each, as all of
:mod:`relayd.configuring.configure`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from relayd.configuring import dial_settings
from relayd.configuring.address_grammar import EndpointString, UnixPath
from relayd.configuring.address_settings import (
    ACCEPT_PROXY,
    ALLOW_CLIENT,
    CLIENT_PREFIX,
    HOURS,
    INSTEAD,
    LISTEN,
    MAX_CONNECTS_PER_CLIENT,
    SOCKS4_LISTENER,
)
from relayd.configuring.bandwidth_settings import BANDWIDTH_PER_CLIENT
from relayd.configuring.config import is_local
from relayd.configuring.control_settings import CONTROL
from relayd.configuring.given import Given, Layers, RelaySection
from relayd.configuring.pools_of_relay import servers_given
from relayd.configuring.route_settings import ROUTE, SNI
from relayd.configuring.server_grammar import options_of
from relayd.core import admission_settings, pool_settings, settings
from relayd.core.setting_types import Setting

#: Settings that do nothing without another one, or without any of several.
NEEDS: Sequence[tuple[Setting[Any], *tuple[Setting[Any], ...]]] = (
    (admission_settings.HOURS_END, HOURS),
    (admission_settings.QUEUE, admission_settings.MAX_SESSIONS),
    (admission_settings.QUEUE_TIMEOUT, admission_settings.QUEUE),
    (
        CLIENT_PREFIX,
        admission_settings.MAX_SESSIONS_PER_CLIENT,
        MAX_CONNECTS_PER_CLIENT,
        BANDWIDTH_PER_CLIENT,
        pool_settings.BALANCE,
    ),
    (settings.MAX_DECIDING, ROUTE, SNI),
    (settings.SERVER_SPEAKS_FIRST, ROUTE),
    *(
        (row, pool_settings.CHECK)
        for row in (
            pool_settings.CHECK_EVERY,
            pool_settings.CHECK_TIMEOUT,
            pool_settings.RISE,
            pool_settings.FALL,
        )
    ),
)

#: The same of a command line; a file may be a program's that steers its relays itself.
NEEDS_OF_COMMAND_LINE: Sequence[tuple[Setting[Any], *tuple[Setting[Any], ...]]] = (
    # An operator may say that a server is down.
    (pool_settings.ON_DOWN, pool_settings.CHECK, CONTROL),
)

#: Of those that others need, what has one value with which they do something.
_VALUES: Mapping[str, str] = {pool_settings.BALANCE.key: "client-hash"}

#: What is told to contradict another, and so not to do nothing.
_CONTRADICTS: Mapping[str, Setting[Any]] = {settings.SERVER_SPEAKS_FIRST.key: SNI}

#: Others that are not for datagrams.
_OF_STREAMS = (
    admission_settings.QUEUE.key,
    admission_settings.QUEUE_TIMEOUT.key,
    ACCEPT_PROXY.key,
    dial_settings.KEEPALIVE.key,
    settings.USER_TIMEOUT.key,
    settings.HALF_CLOSE.key,
    ROUTE.key,
    settings.MAX_DECIDING.key,
    settings.SERVER_SPEAKS_FIRST.key,
)


def contradiction(one: Given, other: Given) -> str:
    """The line for two of which only one may be given."""
    names = [each.place.option(each.setting) for each in (one, other)]
    where = one.place.prefix or other.place.prefix
    return f"{where}{names[0]} and {names[1]} contradict each other: give one"


def allowed_clients(section: RelaySection) -> list[Given]:
    """The rules that allow clients, and so exclude others."""
    rules = section.all(ALLOW_CLIENT.key)
    return [each for each in rules if each.setting is ALLOW_CLIENT]


def about_admission(section: RelaySection) -> Iterator[str]:
    """What is wrong with who is served by one relay."""
    place = section.place
    rules = section.all(ALLOW_CLIENT.key)
    for listener in section.all(LISTEN.key):
        address = listener.value
        text = address.text if isinstance(address, EndpointString) else ""
        unix = isinstance(address, UnixPath) or text.startswith("unix:")
        # Behind a balancer, clients have addresses.
        unix = unix and not section.all(ACCEPT_PROXY.key)
        if unix and allowed_clients(section) and not any(r.value.unix for r in rules):
            advice = rules[-1].place.example(ALLOW_CLIENT, "unix")
            yield (
                f"{place.prefix}{listener} would serve nobody: no rule is about clients"
                f" of UNIX sockets. Give {advice}, too"
            )


def does_nothing(
    sections: Sequence[RelaySection],
    needs: Sequence[tuple[Setting[Any], *tuple[Setting[Any], ...]]] = NEEDS,
) -> Iterator[str]:
    """Settings that need another one, and have it in no relay for which they are.

    So `[defaults]` may have one of which some relays make use.
    """
    for row, *others in needs:
        lonely: dict[Any, Given] = {}
        served: set[Any] = set()
        for section in sections:
            given = _given(section, row)
            if given is None:
                continue
            # One of the command line, or of `[defaults]`, is in many sections.  Written
            # as a file, the former is in the table of each relay, of whatever kind.
            lonely[id(given) if _is_alike(section, others) else given.value] = given
            if _is_served(section, row, others):
                served |= {id(given), given.value}
        alone = [given for key, given in lonely.items() if key not in served]
        for given in dict.fromkeys(alone):
            place = given.place
            # Those that its relays can have.
            kinds = {each.kind for each in sections if each.one(row) is given}
            names = [
                place.example(each, _VALUES[each.key])
                if each.key in _VALUES
                else place.option(each)
                for each in others
                if kinds & {*each.kinds}
            ]
            missing = " or ".join(names)
            yield f"{place.prefix}{given} does nothing alone: give {missing}, too"


def useless_in(section: RelaySection) -> frozenset[str]:
    """The keys of what does nothing in one relay, and may in others.

    Said of all of them, it is no mistake; in the table of this one it would be.
    """
    return frozenset(
        row.key
        for row, *others in NEEDS
        if _given(section, row)
        and _is_alike(section, others)
        and not _is_served(section, row, others)
    )


def _is_alike(section: RelaySection, others: Sequence[Setting[Any]]) -> bool:
    """Whether a relay can have all of them."""
    return all(section.kind in other.kinds for other in others)


def _given(section: RelaySection, row: Setting[Any]) -> Given | None:
    """What is given of a setting; None: nothing but its default."""
    given = section.one(row)
    if given is None or given.value in (None, row.default):
        # A file may have the defaults, too.
        return None
    return given


def _is_served(
    section: RelaySection, row: Setting[Any], others: Sequence[Setting[Any]]
) -> bool:
    """Whether a relay has what a setting needs, or is told that it contradicts it."""
    told = [_CONTRADICTS[row.key]] if row.key in _CONTRADICTS else []
    return any(_is_on(section, other) for other in (*others, *told))


def _is_on(section: RelaySection, row: Setting[Any]) -> bool:
    given = section.one(row)
    if row is pool_settings.CHECK:
        # Of a server's own as well.
        servers = servers_given(section)
        if any(options_of(each.value).check is not None for each in servers):
            return True
    if given is None or given.value in (None, False):
        return False
    return row.key not in _VALUES or given.value == _VALUES[row.key]


def open_proxy(section: RelaySection) -> Iterator[str]:
    """A proxy that everybody can use, though nobody said that they may.

    `open` is given with clients that are allowed; or neither is, and other machines can
    reach a listener, directly or through a balancer.  Rules that deny some clients
    don't say who may come.
    """
    if {ALLOW_CLIENT.key, settings.OPEN.key} & set(section.faulty):
        return
    where, place = section.place.prefix, section.place
    clients, opened = allowed_clients(section), section.one(settings.OPEN)
    is_open = opened is not None and opened.value
    if clients and is_open and opened:
        yield contradiction(opened, clients[0])
    given = section.all(LISTEN.key)
    listeners: list[tuple[Any, Any]] = [(each, each.value) for each in given]
    for listener, address in listeners or [(SOCKS4_LISTENER, SOCKS4_LISTENER)]:
        is_near = is_local(address) and not section.all(ACCEPT_PROXY.key)
        if not (clients or is_open or is_near):
            wide = place.example(ALLOW_CLIENT, "192.168.0.0/16")
            advice = f"{wide} for" if place.file else "--allow-client CIDR for"
            such = "" if place.file else f" (such as {wide})"
            yield (
                f"{where}{listener} would be an open proxy, for everybody who can"
                f" reach it. Add {advice} your clients{such}, or"
                f" {place.example(settings.OPEN)}"
            )


def without_relays(layers: Layers) -> Iterator[str]:
    """Options for streams, where all relays are for datagrams."""
    kinds = {each.kind for each in layers.relays}
    for each in layers.every:
        if kinds == {"udp"} and each.setting.key in (*INSTEAD, *_OF_STREAMS):
            other = INSTEAD.get(each.setting.key)
            instead = f": a UDP relay has --{other.option}" if other else ""
            yield f"{each.place.prefix}{each} is not for datagrams{instead}"
