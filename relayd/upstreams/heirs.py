"""What a server takes over from the same one of the pool before.

When what is said about the servers of a relay changes, it gets another pool.  Sessions
that began with the one before stay with its servers, which nobody chooses any more; but
they are the same machines, so their sessions count for the new ones, until they end.
However often that happens, each of the old ones has one heir, the last.
"""

from __future__ import annotations

from functools import partial

from relayd.upstreams.server import Server


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
