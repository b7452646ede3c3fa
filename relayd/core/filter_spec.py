"""A filter as its operator writes it: `NAME[:VALUE][,key=value…]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs


@attrs.frozen
class FilterSpec:
    """Which filter, with its options; nothing is known of what they mean.

    :ivar name: of the filter, such as `replace`.
    :ivar options: by key, with underscores: text as it was written, or what a file has
        (a string, a number, a boolean).  The key of a value without one is empty.
    """

    name: str
    options: Mapping[str, Any] = attrs.field(factory=dict)
