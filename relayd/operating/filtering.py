"""Makes the filters of relays from their settings.

A relay that changes keeps the filters that are as they were: what they have in hand, an
open capture or the sessions that they are on, goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from relayd.configuring.config import AnyRelay, Relay
from relayd.core.errors import ConfigError
from relayd.core.filter_spec import FilterSpec
from relayd.core.filtering import clashes, speaks_first
from relayd.core.setting_types import ALL_KINDS, Kind
from relayd.operating.units import Unit, kind_of


def made_filters(relay: AnyRelay, before: Unit | None = None) -> Sequence[Any]:
    """The filters of a relay, as its settings say.

    :param before: the relay that it is to follow.
    :return: factories: those of before, wherever they are the same; both if they are
        written so, and if they are equal.
    :raises ConfigError: some can't be made: a line for each.
    """
    if not relay.filters:
        return ()
    # Imports what most relays do not need.
    from relayd.filters.loading import filter_of

    kind = kind_of(relay)
    left: list[tuple[FilterSpec, Any]] = []
    if before is not None and before.kind == kind:
        left = list(zip(before.settings.filters, before.filters, strict=True))
    made, problems = [], []
    for spec in relay.filters:
        same = next((each for each in left if each[0] == spec), None)
        try:
            factory = filter_of(spec, kind) if same is None else same[1]
        except ConfigError as problem:
            problems.append(str(problem))
            continue
        if same is None:
            same = next((each for each in left if each[1] == factory), None)
        if same is not None:
            left.remove(same)
            factory = same[1]
        made.append(factory)
    problems += clashes(made)
    if isinstance(relay, Relay) and relay.sni:
        problems += [
            f"filter {each.name}: it says that servers speak first, and sni is for TLS,"
            " where clients do: leave one of them out"
            for each in made
            if speaks_first(each)
        ]
    if problems:
        raise ConfigError("\n".join(problems))
    return tuple(made)


#: The options that all faults have.
OF_FAULTS = frozenset({"direction", "toxicity", "seed"})


@attrs.frozen
class Described:
    """What there is to say of a filter that comes with relayd.

    :ivar usage: how it is written, with its options, but for those of all faults.
    :ivar kinds: of relays that may have it.
    :ivar said: what it does.
    :ivar examples: as one would write it.
    """

    usage: str
    kinds: Sequence[Kind]
    said: str
    examples: Sequence[str]


def described_filters() -> Iterator[Described]:
    """All filters that come with relayd."""
    from relayd.filters.built_in import BUILT_IN
    from relayd.filters.loading import own_kind

    for name, each in BUILT_IN.items():
        found = own_kind(name)
        kinds = [kind for kind in ALL_KINDS if found.serves(kind)]
        names = {option.name for option in found.parameters}
        but = OF_FAULTS if names >= OF_FAULTS else ()
        yield Described(found.usage(but), kinds, each.said, each.examples)


def filter_names() -> Sequence[str]:
    """The names of all filters that there are here."""
    from relayd.filters.loading import names

    return names()


def check_filter(spec: FilterSpec, kind: Kind) -> None:
    """Whether a filter can be made for a relay of a kind.

    :raises ConfigError: it can't: one line.
    """
    from relayd.filters.loading import filter_of

    filter_of(spec, kind)
