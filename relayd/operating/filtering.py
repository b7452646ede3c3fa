"""Makes the filters of relays from their settings.

A relay that changes keeps the filters that are as they were: what they have in hand, an
open capture or the sessions that they are on, goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from relayd.configuring.config import AnyRelay
from relayd.core.errors import ConfigError
from relayd.core.filter_spec import FilterSpec
from relayd.core.setting_types import Kind
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
    if problems:
        raise ConfigError("\n".join(problems))
    return tuple(made)


def check_filter(spec: FilterSpec, kind: Kind) -> None:
    """Whether a filter can be made for a relay of a kind.

    :raises ConfigError: it can't: one line.
    """
    from relayd.filters.loading import filter_of

    filter_of(spec, kind)
