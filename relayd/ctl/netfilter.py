"""Finds the relays whose rules `relayctl netfilter` shows, applies or removes.

They are those of a file, or of a running relayd.  What the latter says are settings,
as a file has them, and they are read and checked as those of a file: whoever runs this
as root lets no relayd decide which rules there are beyond what its settings mean.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import attrs

from relayd.configuring.address_settings import ACCEPT_PROXY, DEST, LISTEN
from relayd.configuring.config import Relay, UdpRelay
from relayd.configuring.configure import relay_of
from relayd.configuring.dial_settings import INTERCEPT, TRANSPARENT
from relayd.configuring.given import Place, RelaySection
from relayd.configuring.route_settings import ROUTE, SNI
from relayd.configuring.sections import read_settings
from relayd.configuring.written import named
from relayd.core.names import first_of
from relayd.core.process_settings import NETFILTER_MARK
from relayd.core.relay_names import check_name
from relayd.core.settings import ENABLED
from relayd.ctl.checking import read
from relayd.ctl.control_client import ControlClient, route
from relayd.ctl.exits import CommandFailed, Exit
from relayd.ctl.tables import rows_of
from relayd.netfilter.rules import RelayRules, rules_of

#: The settings of a relay by which its rules are decided.
_NEEDED = (
    *(LISTEN, DEST, SNI, ROUTE),
    *(INTERCEPT, TRANSPARENT, ACCEPT_PROXY, ENABLED),
)


@attrs.frozen
class Wanted:
    """A relay.

    :ivar rules: None: it needs none.
    :ivar enabled: it runs; else it is stopped.
    """

    name: str
    rules: RelayRules | None
    enabled: bool


@attrs.frozen
class Found:
    """The relays that are meant.

    :ivar mark: with which their rules mark packets.
    """

    relays: Sequence[Wanted]
    mark: int

    @property
    def rules(self) -> list[RelayRules]:
        """Of those that need some."""
        return [each.rules for each in self.relays if each.rules is not None]


def find(
    names: Collection[str], file: str | None, running: ControlClient, *, stopped: bool
) -> Found:
    """The relays of these names; without names, all of them.

    :param file: with their settings; None: they are those that run.
    :param stopped: without names, those that are stopped are meant, too.
    :raises CommandFailed: there is no such file or relay, the file is not valid, or
        relayd does not answer.
    """
    wanted = frozenset(names)
    found = _in_file(file, wanted) if file is not None else _of(running, wanted)
    if not names and not stopped:
        return attrs.evolve(found, relays=[e for e in found.relays if e.enabled])
    return found


def _check_known(wanted: Collection[str], there: Iterable[str], where: str) -> None:
    """:raises CommandFailed: one of the names is not among those that there are."""
    known = list(there)
    for name in wanted:
        if name not in known:
            raise CommandFailed(
                Exit.NOT_FOUND,
                f"{where}: there is no relay {name!r} that may have rules; there is"
                f" {first_of(known) or 'none'}",
            )


def _in_file(file: str, wanted: Collection[str]) -> Found:
    layers, config = read(file)
    relays = []
    if not config.demo:
        for (name, _), relay in zip(named(layers), config.relays, strict=True):
            if isinstance(relay, Relay | UdpRelay):
                relays.append(Wanted(name, rules_of(relay, name), relay.enabled))
    _check_known(wanted, [each.name for each in relays], file)
    meant = [each for each in relays if not wanted or each.name in wanted]
    return Found(meant, config.netfilter_mark)


def _of(running: ControlClient, wanted: Collection[str]) -> Found:
    mark = _mark_of(running.get("/v1/status"))
    kinds = {
        str(each.get("name")): each.get("kind")
        for each in rows_of(running.get("/v1/relays"), "relays")
        if each.get("kind") in ("tcp", "udp")
    }
    _check_known(wanted, kinds, "relayd")
    return Found(
        [
            _running_one(running, name, kind)
            for name, kind in kinds.items()
            if not wanted or name in wanted
        ],
        mark,
    )


def _mark_of(status: dict[str, Any]) -> int:
    """The mark that a running relayd has."""
    said = status.get("netfilter")
    mark = said.get("mark") if isinstance(said, dict) else None
    try:
        return NETFILTER_MARK.type.load(mark)
    except ValueError as problem:
        raise _nonsense(f"its mark for netfilter: {problem}") from None


def _running_one(running: ControlClient, name: str, kind: Any) -> Wanted:
    """One that runs.

    :param kind: `tcp` or `udp`.
    """
    try:
        check_name(name)
    except ValueError as problem:
        raise _nonsense(str(problem)) from None
    said = running.get(route("relays", name)).get("settings")
    settings = said if isinstance(said, dict) else {}
    table = dict(_needed_of(settings))
    place = Place("relayd", f"{kind}.{name}")
    given, problems = read_settings(kind, table, place)
    if problems:
        raise _nonsense(problems[0])
    relay: Any = relay_of(RelaySection(kind, name, given, place))
    return Wanted(name, rules_of(relay), relay.enabled)


def _needed_of(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for row in _NEEDED:
        said = settings.get(row.key)
        value = said.get("value") if isinstance(said, dict) else None
        if value is not None and value != []:
            yield row.key, value


def _nonsense(why: str) -> CommandFailed:
    return CommandFailed(
        Exit.UNREACHABLE, f"what answers is not a relayd of this version: {why}"
    )
