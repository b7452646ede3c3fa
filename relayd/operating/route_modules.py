"""The routes of a process, as they were imported: which function each one is.

A relay is built with the function that its route was when the process started, or when
its settings were last read again: a change of other settings imports nothing.  A reload
imports all of them anew (:meth:`Routes.anew`), aside from what is in use; once all that
is to be changed can be, it is put in their place (:meth:`Routes.commit`).
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

from relayd.core.errors import ConfigError
from relayd.core.route_spec import RouteSpec


class Routes:
    """The functions of routes, by where they are.

    :param fresh: of modules that are executed anew, whatever was imported before.
    """

    def __init__(self, *, fresh: bool = False) -> None:
        #: What executes modules anew, until these are in use; None: as ever.
        self._loader: Any = None
        self._fresh = fresh
        self._found: dict[RouteSpec, Any] = {}
        #: Modules of routes, by name, as they are while these are in use.
        self._modules: dict[str, Any] = {}
        #: The pools that each function names literally, and where.
        self._pools: dict[RouteSpec, Mapping[str, str]] = {}

    @property
    def read(self) -> tuple[str, ...]:
        """Those that were asked for, as they are written."""
        return tuple(map(str, self._found))

    def function(self, spec: RouteSpec) -> Any:
        """The function of a route.

        :raises ConfigError: there is none; one line.
        """
        if spec not in self._found:
            # Imports what most relays do not need.
            from relayd.routing.loading import Loader

            if not self._fresh:
                loader = Loader()
                self._found[spec] = loader.load(spec)
                loader.commit()
                self._note_modules()
            else:
                # What two relays have is executed once.
                self._loader = self._loader or Loader(fresh=True)
                self._found[spec] = self._loader.load(spec)
        return self._found[spec]

    def pools(self, spec: RouteSpec) -> Mapping[str, str]:
        """The pools that a route names literally, each with the place where it does.

        Its source is read once, however many relays have it.

        :raises ConfigError: see :meth:`function`.
        """
        if spec not in self._pools:
            from relayd.routing.loading import literal_pools

            self._pools[spec] = literal_pools(self.function(spec))
        return self._pools[spec]

    def anew(self) -> Routes:
        """None yet: what is asked of these is imported anew."""
        return Routes(fresh=True)

    def commit(self) -> None:
        """They are in use from now on; also once they were not, for a while."""
        if self._loader is not None:
            self._loader.commit()
        # What is asked for from now on is imported as ever.
        self._fresh, self._loader = False, None
        sys.modules.update(self._modules)
        self._note_modules()

    def _note_modules(self) -> None:
        for each in self._found:
            if each.module in sys.modules:
                self._modules[each.module] = sys.modules[each.module]


def check_pools(spec: RouteSpec, routes: Routes, pools: Collection[str]) -> None:
    """Whether a relay has the pools that its route names literally.

    :param pools: the names of those that it has.
    :raises ConfigError: it has not; one line.
    """
    for name, where in routes.pools(spec).items():
        if name not in pools:
            there = ", ".join(pools)
            has = f"its pools are {there}" if pools else "it has none"
            raise ConfigError(
                f"route {spec}: conn.pool({name!r}) ({where}): there is no such pool of"
                f" this relay: {has}"
            )
