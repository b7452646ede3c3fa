"""A relay to the primary of a PostgreSQL cluster, wherever Patroni has it now.

Patroni answers `GET /primary` at port 8008 of each server: 200 on the primary, 503 on a
replica.  The relay asks every second, sends new clients to the primary, and cuts off
the sessions of one that is it no longer; clients that come during a fail-over wait::

    python examples/patroni.py 127.0.0.1:5432 db1:5432@8008 db2:5432@8008

`twistd relayd --check http://:8008/primary --on-down cut --when-none wait=30` does the
same; here the check is a function, which may ask whatever it likes.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from twisted.internet import reactor as installed_reactor
from twisted.internet.defer import gatherResults, inlineCallbacks
from twisted.python.failure import Failure
from twisted.web.client import Agent

from relayd.endpoints import (
    HostPort,
    dialing_endpoint,
    listening_endpoint,
    parse_destination,
    parse_listener,
)
from relayd.errors import ConfigError
from relayd.pools import Checker, Pool, Schedule, Server, Verdict
from relayd.tcp import RelayFactory


async def is_primary(http: Agent, url: bytes) -> Verdict:
    """Ask Patroni for the role of a server."""
    try:
        answer = await http.request(b"GET", url)
    except Exception as problem:
        return Verdict(False, f"Patroni does not answer: {problem}")
    role = "the primary" if answer.code == 200 else f"not the primary ({answer.code})"
    return Verdict(answer.code == 200, role)


@inlineCallbacks
def serve(reactor: Any, listen: str, *addresses: str) -> Any:
    """Serve until the reactor stops."""
    checker, http, servers = Checker(reactor), Agent(reactor, connectTimeout=1), []
    for each in addresses:
        text, at, port = each.rpartition("@")
        to = parse_destination(text) if at and port.isdigit() else None
        if not isinstance(to, HostPort):
            raise ConfigError(f"{each}: expected HOST:PORT@PORT, Patroni's port last")
        server = Server(dialing_endpoint(to, reactor), str(to))
        url = f"http://{to.host}:{port}/primary".encode()
        # Nobody is the primary until Patroni says so.
        server.checked_up = False
        schedule = Schedule(every=1, timeout=1, rise=1, fall=2)
        checker.add(server, partial(is_primary, http, url), schedule)
        servers.append(server)
    relay = RelayFactory(Pool(servers), clock=reactor, cut=True, wait_for_server=30)
    listening = listening_endpoint(parse_listener(listen), reactor)  # type: ignore[arg-type]
    port = yield listening.listen(relay)
    checker.start()
    print(f"listening on port {port.getHost().port}", flush=True)

    def shut_down() -> Any:
        checker.stop()
        # Stop accepting, then wait up to five seconds for the sessions.
        return gatherResults([port.stopListening(), relay.drain(5)])

    reactor.addSystemEventTrigger("before", "shutdown", shut_down)


def main() -> str | None:
    """Run; an error at the start is returned as one line."""
    if len(sys.argv) < 3:
        return "usage: patroni.py LISTEN HOST:PORT@PORT..."
    reactor: Any = installed_reactor
    problems: list[str] = []

    def failed(reason: Failure) -> None:
        problems.append(f"patroni: {reason.getErrorMessage()}")
        reactor.callWhenRunning(reactor.stop)

    serve(reactor, *sys.argv[1:]).addErrback(failed)
    reactor.run()
    return problems[0] if problems else None


if __name__ == "__main__":
    sys.exit(main())
