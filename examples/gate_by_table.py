"""A relay that asks a database who may come.

The database is SQLite, asked in a thread by `twisted.enterprise.adbapi`; the relay goes
on meanwhile, and reads nothing from the client that waits.  Its table has the addresses
that may come, and how many sessions each may have at once::

    sqlite3 clients.db "create table clients (host text primary key, sessions int)"
    sqlite3 clients.db "insert into clients values ('127.0.0.1', 2)"
    python examples/gate_by_table.py 127.0.0.1:8080 127.0.0.1:80 clients.db

The table is asked for each client, so that a change of it is seen by the next one.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from twisted.enterprise.adbapi import ConnectionPool
from twisted.internet import reactor as installed_reactor
from twisted.internet.defer import gatherResults, inlineCallbacks
from twisted.python.failure import Failure
from zope.interface import implementer

from relayd.endpoints import (
    UdpAddress,
    dialing_endpoint,
    listening_endpoint,
    parse_destination,
    parse_listener,
)
from relayd.errors import ConfigError, Refused
from relayd.interfaces import IGate, ILease
from relayd.tcp import RelayFactory


@implementer(ILease)
class Place:
    """One session of a client."""

    def __init__(self, inside: Counter[str], host: str) -> None:
        self._inside, self._host = inside, host
        inside[host] += 1

    def release(self) -> None:
        """The session has ended."""
        self._inside[self._host] -= 1
        if not self._inside[self._host]:
            del self._inside[self._host]


@implementer(IGate)
class TableGate:
    """Admits the clients of a table."""

    def __init__(self, database: ConnectionPool) -> None:
        self._database = database
        self._inside: Counter[str] = Counter()

    async def enter(self, session: Any) -> Place:
        """Ask the table; the client waits, for the handshake timeout at most."""
        host = session.client.rpartition(":")[0]
        rows = await self._database.runQuery(
            "select sessions from clients where host = ?", (host,)
        )
        if not rows:
            raise Refused("it is not in the table")
        # After the last `await`: a place that is taken before may never be given back.
        if self._inside[host] >= rows[0][0]:
            raise Refused(f"{rows[0][0]} sessions, the limit of its row")
        return Place(self._inside, host)


@inlineCallbacks
def serve(reactor: Any, listen: str, server: str, path: str) -> Any:
    """Serve until the reactor stops."""
    where, to = parse_listener(listen), parse_destination(server)
    if isinstance(where, UdpAddress) or isinstance(to, UdpAddress):
        raise ConfigError("this example relays streams")
    # One thread: SQLite's connections belong to the one that has opened them.
    database = ConnectionPool("sqlite3", path, cp_max=1, check_same_thread=False)
    yield database.runQuery("select host, sessions from clients limit 1")
    relay = RelayFactory(
        dialing_endpoint(to, reactor),
        clock=reactor,
        gate=TableGate(database),
    )
    port = yield listening_endpoint(where, reactor).listen(relay)
    print(f"listening on port {port.getHost().port}", flush=True)

    def shut_down() -> Any:
        # Stop accepting, then wait up to five seconds for the sessions.
        return gatherResults([port.stopListening(), relay.drain(5)])

    reactor.addSystemEventTrigger("before", "shutdown", shut_down)


def main() -> str | None:
    """Run; an error at the start is returned as one line."""
    if len(sys.argv) != 4:
        return "usage: gate_by_table.py LISTEN SERVER DATABASE"
    reactor: Any = installed_reactor
    problems: list[str] = []

    def failed(reason: Failure) -> None:
        problems.append(f"gate_by_table: {reason.getErrorMessage()}")
        reactor.callWhenRunning(reactor.stop)

    serve(reactor, *sys.argv[1:]).addErrback(failed)
    reactor.run()
    return problems[0] if problems else None


if __name__ == "__main__":
    sys.exit(main())
