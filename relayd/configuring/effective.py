"""The settings that are in effect, with where each comes from.

Of the process and of every relay: what was given has its place, everything else is a
default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from relayd.configuring.file_values import Rows
from relayd.configuring.given import Given, Layers, RelaySection, key_of
from relayd.configuring.readable import default_of
from relayd.configuring.sections import PROCESS_KEYS, RELAY_KEYS
from relayd.configuring.written import named, values
from relayd.core.setting_types import Kind

#: Where a setting comes from that nobody has given.
DEFAULT = "default"


@attrs.frozen
class Effective:
    """One setting.

    :ivar key: in the file; with `_file` if its values come from a file of their own.
    :ivar rows: of the table of settings, which share the key.
    :ivar value: as a file has it; None for a default that only words can say.
    :ivar source: `default`, or a file and the table in it.
    """

    key: str
    rows: Rows
    value: Any
    source: str


@attrs.frozen
class Table:
    """The settings of one relay, or of the process.

    :ivar kind: of the relay; empty for the process.
    :ivar name: of the relay.
    """

    kind: Kind | None
    name: str
    settings: Sequence[Effective]

    @property
    def path(self) -> str:
        """Of the table in a file."""
        return f"{self.kind}.{self.name}" if self.kind else ""


def effective(layers: Layers) -> list[Table]:
    """All settings: first the process's, then those of each relay."""
    found = [
        Table(
            None, "", _settings(PROCESS_KEYS, list(layers.of_process.effective), None)
        )
    ]
    for name, relay in named(layers):
        found.append(Table(relay.kind, name, effective_of(relay)))
    return found


def effective_of(relay: RelaySection) -> list[Effective]:
    """All settings of one relay.

    :param relay: with all that was given for it.
    """
    return _settings(RELAY_KEYS[relay.kind], list(relay.effective), relay.kind)


def _settings(
    keys: Mapping[str, Rows], given: Sequence[Given], kind: Kind | None
) -> list[Effective]:
    by_key: dict[str, list[Given]] = {}
    for each in given:
        by_key.setdefault(key_of(each.setting), []).append(each)
    found = []
    for key, rows in keys.items():
        own = by_key.get(key, [])
        if own:
            [(written, value)] = values(own, kind or "")
            source = _source(own[-1])
        else:
            written, value, source = key, default_of(rows[0]), DEFAULT
        found.append(Effective(written, rows, value, source))
    return found


def _source(given: Given) -> str:
    """The file, and the table in it."""
    place = given.place
    # It is shown in a line, and stands in a comment.
    file = place.file if place.file.isprintable() else repr(place.file)
    table = place.path.rpartition(".")[0]
    return f"{file}: {table}" if table else file
