"""A filter as its operator writes it: `NAME[:VALUE][,key=value…]`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

#: What has to be escaped in a value: a comma, and a backslash before what would make it
#: an escape.
_ESCAPED = re.compile(r",|\\(?=[\\,]|\Z)")


@attrs.frozen
class FilterSpec:
    """Which filter, with its options; nothing is known of what they mean.

    :ivar name: of the filter, such as `replace`.
    :ivar options: by key, with underscores: text as it was written, or what a file has
        (a string, a number, a boolean).  The key of a value without one is empty.
    """

    name: str
    options: Mapping[str, Any] = attrs.field(factory=dict)

    def __str__(self) -> str:
        """As one would write it behind `--filter`."""
        written = ",".join(self._parts())
        return f"{self.name}:{written}" if written else self.name

    def _parts(self) -> Iterator[str]:
        for key, value in self.options.items():
            text = ("on" if value else "off") if isinstance(value, bool) else str(value)
            text = _ESCAPED.sub(lambda found: f"\\{found[0]}", text)
            yield f"{key}={text}" if key else text
