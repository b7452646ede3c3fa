"""Makes a :class:`~relayd.configuring.config.Config` of what was given, and checks it.

A value is checked by its row of the table as it is read.  What concerns several of them
is checked here: which contradict each other, which relays would listen on one address,
or lead back to themselves, who could use a proxy.  Each check is a generator of
problems, one line each, so that all of a file are told at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from relayd.configuring import config
from relayd.configuring.about_checks import about_checks
from relayd.configuring.about_clients import (
    NEEDS_OF_COMMAND_LINE,
    about_admission,
    contradiction,
    does_nothing,
    open_proxy,
    without_relays,
)
from relayd.configuring.about_control import about_control
from relayd.configuring.about_dialing import about_dialing, dials_no_socket
from relayd.configuring.about_interception import (
    about_intercepts,
    about_marks,
    about_transparent,
    intercepted_twice,
)
from relayd.configuring.about_proxy_headers import about_proxy_headers
from relayd.configuring.about_routes import about_routes
from relayd.configuring.about_servers import about_balance, about_servers
from relayd.configuring.address_grammar import PortRange
from relayd.configuring.address_settings import (
    DEST,
    LISTEN,
    METRICS_ADDRESS,
    METRICS_OPEN,
)
from relayd.configuring.clashes import clashes
from relayd.configuring.config import (
    AnyRelay,
    Config,
    Relay,
    Socks4Relay,
    UdpRelay,
    fill,
    is_local,
)
from relayd.configuring.control_settings import CONTROL
from relayd.configuring.cycles import cycles
from relayd.configuring.dial_settings import INTERCEPT
from relayd.configuring.filter_settings import about_filters
from relayd.configuring.given import Given, Layers, Place, RelaySection
from relayd.configuring.route_settings import ROUTE, SNI
from relayd.core import pool_settings, process_settings, settings
from relayd.core.errors import ConfigError
from relayd.core.networks import Ip
from relayd.core.setting_types import Kind, Setting
from relayd.net.own_addresses import is_own

#: The class of each kind of relay.
KINDS: Mapping[Kind, type[AnyRelay]] = {
    "tcp": Relay,
    "udp": UdpRelay,
    "socks4": Socks4Relay,
}


def configure(layers: Layers, own: Callable[[Ip], bool] = is_own) -> Config:
    """The settings of a process.

    :param own: whether an address is this machine's.
    :raises ConfigError: something is wrong: a line for each problem.
    """
    found = list(layers.problems)
    process = list(layers.of_process.effective)
    values = {**values_of(process), **lists_of(process)}
    sections = layers.sections
    found += _about_process(layers)
    found += about_control(layers.of_process)
    for section in sections:
        found += _about_relay(section)
    found += does_nothing(sections)
    if not _can_be_steered(layers):
        found += does_nothing(sections, NEEDS_OF_COMMAND_LINE)
    found += dials_no_socket(sections)
    found += without_relays(layers)
    found += _about_names(sections)
    # What is stopped is in nobody's way; a change that starts it is checked, too.
    enabled = [each for each in sections if each.enabled]
    others = [each for each in process if each.setting in (METRICS_ADDRESS, CONTROL)]
    found += clashes(enabled, others)
    found += cycles(enabled, own)
    found += intercepted_twice(enabled)
    found += about_marks(layers, sections)
    if not (layers.relays or values.get(process_settings.DEMO.field) or found):
        where = Place(layers.source)
        advice = (
            "a relay, such as [tcp.web] with its listen and dest"
            if layers.source
            else "--listen and --dest, or try --demo (see --help)"
        )
        found.append(f"{where.prefix}nothing to relay: give {advice}")
    found += _about_stopped(layers, sections)
    if found:
        raise ConfigError("\n".join(found))
    relays: list[AnyRelay] = [relay_of(each) for each in sections]
    if values.get(process_settings.DEMO.field):
        # To a server that the service makes.
        demo = relay_of(layers.whole(RelaySection("tcp", None, [])))
        relays = [attrs.evolve(demo, listeners=(config.DEMO_LISTENER,))]
    return fill(Config, {**values, "relays": relays})


def values_of(given: Sequence[Given]) -> dict[str, Any]:
    """The values that have the say, by field name."""
    return {
        each.setting.field: each.value for each in given if not each.setting.repeatable
    }


def lists_of(given: Sequence[Given]) -> dict[str, list[Any]]:
    """The same of settings that may be repeated."""
    lists: dict[str, list[Any]] = {}
    for each in given:
        if each.setting.repeatable:
            lists.setdefault(_list_field(each.setting), []).append(each.value)
    return lists


def relay_of(section: RelaySection) -> AnyRelay:
    """The settings of one relay."""
    effective = list(section.effective)
    values = values_of(effective)
    lists = lists_of(effective)
    if section.kind != "socks4":
        lists = {"listeners": [], "destinations": [], **lists}
    return fill(KINDS[section.kind], {**values, **lists, "name": section.name})


def _list_field(setting: Setting[Any]) -> str:
    if setting is LISTEN:
        return "listeners"
    return "destinations" if setting is DEST else setting.field


# -- what is wrong


def _about_process(layers: Layers) -> Iterator[str]:
    said = {each.setting.name: each for each in layers.process}
    verbose, quiet = (
        said.get(row.name) for row in (process_settings.VERBOSE, process_settings.QUIET)
    )
    if verbose and quiet and verbose.value and quiet.value:
        yield contradiction(verbose, quiet)
    metrics, opened = (said.get(row.name) for row in (METRICS_ADDRESS, METRICS_OPEN))
    if metrics and not (opened and opened.value) and not is_local(metrics.value):
        place = metrics.place
        yield (
            f"{place.prefix}{metrics} can be reached by other machines: give an address"
            " of loopback such as 127.0.0.1:9100, or unix:PATH, or add"
            f" {place.example(METRICS_OPEN)}"
        )
    demo = said.get(process_settings.DEMO.name)
    if demo and demo.value and not layers.relays:
        whole = layers.whole(RelaySection("tcp", None, []))
        rows: tuple[Setting[Any], ...] = (pool_settings.CHECK, ROUTE, SNI)
        for each in filter(None, map(whole.one, rows)):
            yield f"{each.place.prefix}{each} is not for {demo}: leave it out"
    if demo and demo.value and layers.relays:
        first = layers.relays[0]
        what = first.place.path or next(iter(first.given), None)
        yield (
            f"{demo.place.prefix}{demo} brings its own listener and destination: leave"
            f" out {what}"
        )


def _can_be_steered(layers: Layers) -> bool:
    """Whether somebody may change what runs.

    A file can be read again, or is a program's, which steers its relays itself; or it
    is only to be written.
    """
    steered = (process_settings.PRINT_CONFIG, CONTROL)
    return bool(layers.source) or any(
        each.setting in steered for each in layers.process
    )


def _about_stopped(layers: Layers, sections: Sequence[RelaySection]) -> Iterator[str]:
    """All relays are stopped, and nobody could start one."""
    demo = layers.whole(RelaySection("tcp", None, []))
    relays = sections or [demo]
    if _can_be_steered(layers) or any(each.enabled for each in relays):
        return
    given = relays[0].one(settings.ENABLED)
    yield (
        f"{given} leaves every relay stopped, and nobody could start one: leave it out,"
        f" or give --{CONTROL.option}"
    )


def _about_relay(section: RelaySection) -> Iterator[str]:
    """What is wrong with one relay."""
    yield from about_admission(section)
    yield from about_proxy_headers(section)
    yield from about_dialing(section)
    yield from about_filters(section)
    if section.kind == "socks4":
        yield from open_proxy(section)
        yield from _about_bind(section)
        return
    listeners, destinations = section.all(LISTEN.key), section.all(DEST.key)
    where = section.place.prefix
    if not listeners and LISTEN.key not in section.faulty:
        yield f"{where}no listener: give {section.place.example(LISTEN, '8080')}"
    # Those of server names are some, and a route may make its own.
    rows: tuple[Setting[Any], ...] = (DEST, SNI, ROUTE)
    if not any(section.all(row.key) or row.key in section.faulty for row in rows):
        yield _no_destination(section, listeners)
    if listeners:
        yield from _about_ranges(listeners, destinations)
    yield from about_servers(section)
    yield from about_balance(section)
    yield from about_checks(section)
    yield from about_routes(section)
    yield from about_transparent(section)
    if section.all(INTERCEPT.key):
        relay: Any = relay_of(section)
        yield from about_intercepts(section, relay)


def _no_destination(section: RelaySection, listeners: Sequence[Given]) -> str:
    place = section.place
    if listeners and not place.file:
        return f"{listeners[0]} has no --{DEST.name}: say where to relay to"
    advice = place.example(DEST, "10.0.0.5:80")
    return f"{place.prefix}no destination: give {advice}"


def _about_ranges(
    listeners: Sequence[Given], destinations: Sequence[Given]
) -> Iterator[str]:
    ranges = [each for each in listeners if isinstance(each.value, PortRange)]
    length = len(ranges[0].value) if ranges else 1
    for each in (*ranges, *destinations):
        if isinstance(each.value, PortRange) and len(each.value) != length:
            yield (
                f"{each.place.prefix}{each} has {len(each.value)} ports, and"
                f" {ranges[0] if ranges else listeners[0]} has {length}: give as many"
            )
    if ranges and len(ranges) < len(listeners):
        single = next(each for each in listeners if each not in ranges)
        yield (
            f"{single.place.prefix}{single} has one port, and {ranges[0]} has {length}:"
            " give it a relay of its own"
        )


def _about_bind(section: RelaySection) -> Iterator[str]:
    bind = section.one(settings.BIND)
    if bind is not None and not bind.value:
        rows: tuple[Setting[Any], ...] = (
            settings.BIND_ANY,
            settings.BIND_ADDRESS,
            settings.EXTERNAL_ADDRESS,
        )
        for other in map(section.one, rows):
            if other is not None and other.value:
                yield contradiction(bind, other)
    external = section.one(settings.EXTERNAL_ADDRESS)
    if external is not None and external.value == "0.0.0.0":
        yield (
            f"{external.place.prefix}bad {external}: expected the address that BIND's"
            " peers connect to"
        )


def _about_names(sections: Sequence[RelaySection]) -> Iterator[str]:
    taken: dict[str, RelaySection] = {}
    for each in sections:
        if each.name is None:
            continue
        if each.name in taken:
            yield (
                f"{each.place.prefix}bad name {each.name!r}: another relay has it"
                f" already ({taken[each.name].place}); give each relay its own name"
            )
        taken.setdefault(each.name, each)
