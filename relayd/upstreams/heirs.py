"""What a server takes over from the same one of the pool before.

When what is said about the servers of a relay changes, it gets another pool.  Sessions
that began with the one before stay with its servers, which nobody chooses any more; but
they are the same machines, so their sessions count for the new ones, until they end,
and so does what becomes of them.  However often that happens, each of the old ones has
one heir, the last.
"""

from __future__ import annotations

from functools import partial

import attrs

from relayd.upstreams.server import Server


@attrs.frozen(eq=False)
class _Heir:
    """Judges the one that has taken a server's place, by sessions of before.

    As :class:`relayd.upstreams.server.Passive`.  A trial of the heir is its own: nobody
    of before ends it.
    """

    server: Server

    def connected(self, _: Server) -> None:
        """A dial of before has succeeded."""

    def failed(self, _: Server, why: str) -> None:
        """A dial of before has failed."""
        self.server.fails += 1
        if self.server.passive is not None and not self.server.ejected:
            self.server.passive.failed(self.server, why)

    def reset(self, _: Server, why: str, provoked: bool) -> None:
        """A session of before was reset without a word."""
        self.server.fails += 1
        if self.server.passive is not None:
            self.server.passive.reset(self.server, why, provoked)

    def served(self, _: Server) -> None:
        """A session of before has ended in another way."""
        self.server.doubted = False
        if self.server.passive is not None:
            self.server.passive.served(self.server)

    def came_up(self, _: Server) -> None:
        """Checks judge the heir itself."""

    def cancelled(self, _: Server) -> None:
        """A dial of before was given up, which says nothing."""


def take_place(server: Server, before: Server) -> None:
    """Have a server go on where the same one of the pool before was.

    What is known of its health stays known if it is checked, and what its operator says
    of it is still said.
    """
    # Its own sessions are its own again.
    before.sessions -= sum(before.inherited.values())
    olders, before.inherited = list(before.inherited), {}
    for each in (*olders, before):
        each.leave_pool()
        if each.sessions:
            server.sessions += each.sessions
            server.inherited[each] = each.sessions
            each.on_over = partial(_has_left, server)
            each.passive = _Heir(server)
    server.inherit(before)


def _has_left(server: Server, before: Server) -> None:
    """A session is over that an older one has had."""
    server.sessions += before.sessions - server.inherited[before]
    server.inherited[before] = before.sessions
    if not before.sessions:
        del server.inherited[before]
        before.leave_pool()
    if server.on_over is not None:
        server.on_over(server)
    if server.max_sessions is not None:
        server.changed()
