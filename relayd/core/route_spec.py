"""A route as its operator writes it: `MODULE:FUNCTION`."""

from __future__ import annotations

import attrs

#: The name of the pool of a relay's servers of which nothing else is said.
DEFAULT = "default"


@attrs.frozen
class RouteSpec:
    """Where a route is: `MODULE:FUNCTION`.

    :ivar function: its name, with dots if it is within something.
    """

    module: str
    function: str

    def __str__(self) -> str:
        return f"{self.module}:{self.function}"
