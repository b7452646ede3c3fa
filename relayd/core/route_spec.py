"""A route as its operator writes it, `MODULE:FUNCTION`; and the names of pools."""

from __future__ import annotations

import attrs

from relayd.core.names import ORIGINAL
from relayd.core.relay_names import MAX_LENGTH, check_name

#: The name of the pool of a relay's servers of which nothing else is said.
DEFAULT = "default"

#: What the name of a pool is, for an error.
EXPECTED_POOL = (
    f"1 to {MAX_LENGTH} small letters, digits, '-' or '_', of which the first is a"
    f" letter; and not {ORIGINAL}, which is a destination"
)


def parse_pool(text: str) -> str:
    """The name of a pool: that of a relay, and nothing that is a destination.

    :raises ValueError: it can't be one; the message says what is expected.
    """
    try:
        check_name(text)
    except ValueError:
        raise ValueError(f"expected {EXPECTED_POOL}") from None
    if not text[0].isalpha() or text == ORIGINAL:
        raise ValueError(f"expected {EXPECTED_POOL}")
    return text


@attrs.frozen
class RouteSpec:
    """Where a route is: `MODULE:FUNCTION`.

    :ivar function: its name, with dots if it is within something.
    """

    module: str
    function: str

    def __str__(self) -> str:
        return f"{self.module}:{self.function}"
