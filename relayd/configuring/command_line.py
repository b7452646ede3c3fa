"""Options of a command line, put into the sections of relays.

Destinations, those of server names, and what is intercepted belong to the listener
before them, a name to the listener after it.  If there is one listener only, they may
stand anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from relayd.configuring.address_settings import DEST, LISTEN, NAME, SOCKS4_NAME
from relayd.configuring.dial_settings import INTERCEPT
from relayd.configuring.given import Given, RelaySection
from relayd.configuring.route_settings import SNI
from relayd.configuring.server_grammar import is_udp
from relayd.core.errors import ConfigError
from relayd.core.setting_types import Kind

#: The options that belong to one relay, by where they stand; others are for all.
OF_ONE_RELAY = (LISTEN, DEST, SNI, INTERCEPT, NAME)


def relay_sections(given: Sequence[Given]) -> list[RelaySection]:
    """The relays of `twistd relayd`.

    :param given: listeners and what belongs to them, in the order of the command line.
    :raises ConfigError: a destination or a name has no listener; a listener and its
        destination are of different kinds; a listener has two names; two relays have
        the same name.
    """
    listeners = [each for each in given if each.setting is LISTEN]
    if given and not listeners:
        raise ConfigError(f"{given[0]} has no --listen: say where clients connect")
    names: list[Given] = []
    alone = len(listeners) == 1
    owned: dict[Given, list[Given]] = {each: [] for each in listeners}
    named: dict[Given, list[Given]] = {each: [] for each in listeners}
    owner = listeners[0] if alone else None
    for each in given:
        if each.setting is LISTEN:
            owner = each
            named[owner] += names
            names = []
        elif each.setting is NAME:
            names.append(each)
        elif owner is None:
            raise ConfigError(
                f"{each} stands before the first of several --listen: put each"
                f" --{each.setting.name} after the --listen that it belongs to"
            )
        else:
            owned[owner].append(each)
    if names and alone:
        named[listeners[0]] += names
    elif names:
        raise ConfigError(
            f"{names[0]} stands after the last of several --listen: put each"
            f" --{NAME.name} before the --listen that it belongs to"
        )
    _check_names([each for of_one in named.values() for each in of_one])
    return [_section(each, owned[each], named[each]) for each in listeners]


def socks4_section(given: Sequence[Given]) -> RelaySection:
    """The proxy of `twistd socks4`."""
    name = next((each.value for each in given if each.setting is SOCKS4_NAME), None)
    return RelaySection(
        "socks4", name, [each for each in given if each.setting is not SOCKS4_NAME]
    )


def _section(
    listener: Given,
    owned: Sequence[Given],
    names: Sequence[Given],
) -> RelaySection:
    if len(names) > 1:
        raise ConfigError(
            f"{listener} has two names, {names[0].text!r} and {names[1].text!r}: give"
            " one"
        )
    kind: Kind = "udp" if _is_udp(listener) else "tcp"
    for each in owned:
        if each.setting is SNI:
            if kind == "udp":
                raise ConfigError(
                    f"{each} is not for {listener}: datagrams have no server name"
                )
        elif each.setting is DEST and _is_udp(each) != (kind == "udp"):
            raise ConfigError(
                f"{listener} can't be relayed to {each}: datagrams go to datagrams,"
                " write udp: before both or neither"
            )
    name = names[0].value if names else None
    return RelaySection(kind, name, [listener, *owned])


def _is_udp(given: Given) -> bool:
    return is_udp(given.value)


def _check_names(names: Sequence[Given]) -> None:
    for number, each in enumerate(names):
        if each.value in [other.value for other in names[:number]]:
            raise ConfigError(
                f"bad --{NAME.name} {each.text!r}: another relay has it already; give"
                " each relay its own name"
            )
