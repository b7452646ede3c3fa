"""Resets the sessions of a server that goes down, so that clients look for another.

Without this they go on: a server that does not pass its check may well finish what it
has begun.

A session whose dial is under way was not served yet, and looks for another server now
instead of when its attempt has had its time (:mod:`relayd.stream.retries`).
"""

from __future__ import annotations

from typing import Any

from relayd.core.session import Ending
from relayd.core.stage import Stage
from relayd.stream.attempt import Attempt
from relayd.stream.relay import StreamRelay


class Cutting:
    """Hears of the servers of one relay.

    :param relay: whose sessions are reset.
    """

    def __init__(self, relay: StreamRelay) -> None:
        self._relay = relay
        #: Those whose sessions were reset, and that are not up again.
        self._down: set[Any] = set()

    def server_changed(self, server: Any) -> None:
        """Its checks, or its operator, have changed their mind, or something else has.

        :param server: a :class:`relayd.upstreams.server.Server`; None: another pool has
            taken the place of theirs, which says nothing of any.
        """
        if server is None:
            return
        if server.draining or not server.is_down:
            self._down.discard(server)
        elif server not in self._down:
            self._down.add(server)
            why = f"{server.name} is down: {server.reason}"
            # Those of before a change are with the same one of another pool.
            for each in self._relay.registry.living():
                session = each.session
                dialled = session.server
                if dialled is not server and dialled not in server.inherited:
                    continue
                if session.stage is not Stage.DIALING:
                    each.abort_session(Ending.UPSTREAM_DOWN, why)
                elif isinstance(each.pending, Attempt):
                    # That is known without this dial, which says nothing more.
                    each.pending.is_ours = True
                    each.pending.failed(Ending.UPSTREAM_DOWN, why)
