"""What a change of the relays of a process has done, and how it is told."""

from __future__ import annotations

import attrs

from relayd.control.steering import Json


@attrs.frozen
class Difference:
    """What a change has done.

    :ivar added: names of relays,
    :ivar removed: whose sessions are drained,
    :ivar changed: in place.
    :ivar unchanged: how many others there are.
    :ivar needs_restart: keys of settings that are as they were until a restart.
    :ivar routes: that were read anew, as they are written.
    :ivar unfinished: what should have followed, and has not: a line for each.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    unchanged: int = 0
    needs_restart: tuple[str, ...] = ()
    routes: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()

    def in_words(self, overlay: int, dropped: int) -> str:
        """The same, for the log.

        :param overlay: how many run-time changes stay over the file, and
        :param dropped: how many are gone.
        """
        found = [
            f"{what} {', '.join(names)}"
            for what, names in (
                ("added", self.added),
                ("removed", self.removed),
                ("changed", self.changed),
                ("read anew: the routes", self.routes),
            )
            if names
        ]
        said = found or ["nothing has changed"]
        if overlay:
            said.append(f"{overlay} run-time changes stay over the file")
        if dropped:
            said.append(f"{dropped} run-time changes are gone")
        if self.needs_restart:
            said.append(f"takes a restart: {', '.join(self.needs_restart)}")
        return "; ".join(said)

    def as_json(self, overlay: int, dropped: int) -> Json:
        """The same, for whoever has asked for it."""
        return {
            "added": list(self.added),
            "removed": list(self.removed),
            "changed": list(self.changed),
            "unchanged": self.unchanged,
            "needs_restart": list(self.needs_restart),
            "routes": list(self.routes),
            "overlay": overlay,
            "dropped": dropped,
        }
