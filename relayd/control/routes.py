"""The table of routes: all that can be asked for.

The site reads requests by it, and the description (`control/openapi`) is made from it.
"""

from __future__ import annotations

from collections.abc import Sequence

from relayd.control.commands import COMMANDS
from relayd.control.routing import Route
from relayd.control.views import VIEWS

ROUTES: tuple[Route, ...] = (*VIEWS, *COMMANDS)


def find(parts: Sequence[str]) -> dict[str, tuple[Route, dict[str, str]]]:
    """The routes of a path, by method, each with the named parts of it."""
    return {
        route.method: (route, found)
        for route in ROUTES
        if (found := route.match(parts)) is not None
    }
