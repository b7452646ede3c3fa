"""What a route decides, without a socket: for tests of routes.

    from relayd.testing import decide
    from myroutes import route

    def test_ssh_goes_to_its_own_pool() -> None:
        assert decide(route, first=b"SSH-2.0-OpenSSH_9.6").pool == "ssh"

`decide` needs no reactor.  Time that a route waits for its client passes at once, and
nothing more comes than `first`.  :func:`decide_later` is the same for routes that await
what takes a reactor: a database, a thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine
from typing import TYPE_CHECKING, Any

import attrs
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import Clock
from twisted.python.failure import Failure

from relayd.core.errors import RelayError
from relayd.core.names import host_port, is_address
from relayd.core.session import Session
from relayd.core.settings import SERVER_SPEAKS_FIRST
from relayd.preludes.client_hello import hello_of
from relayd.routing.connection import Connection
from relayd.routing.router import Router, name_of
from relayd.testing.suite import pause

if TYPE_CHECKING:
    from relayd.core.routing import Decision

#: Seconds between two looks at a route that takes a reactor.
_LOOK = 0.001

#: The port of a client of which only the address is said.
_PORT = 40_000


@attrs.define(eq=False)
class _Asked(Session):
    """The session of a SOCKS4 proxy's client."""

    requested: str = "-"
    user_id: bytes = b""


@attrs.frozen
class _Client:
    """A client that has sent something, and sends no more."""

    session: Session
    data: bytes
    ended: bool
    clock: IReactorTime
    server_name: str | None = None
    original: str = ""

    def more(self) -> Deferred[None]:
        return Deferred()


def decide(
    route: Callable[[Connection], Coroutine[Any, Any, Any]],
    *,
    client: str = "192.0.2.1:40000",
    first: bytes = b"",
    ended: bool = False,
    listener: str = "192.0.2.254:443",
    original: str | None = None,
    peer: str | None = None,
    requested: str | None = None,
    user_id: bytes = b"",
    sni: str | None = None,
    pools: Collection[str] | None = None,
    server_speaks_first: bool = SERVER_SPEAKS_FIRST.default,
) -> Decision:
    """What a route decides about a client.

    Servers are not made, and their text is checked; filters are made.

    :param client: its address, with or without a port.
    :param first: what it sends.
    :param ended: it ends its side then.
    :param listener: what it has connected to.
    :param original: where it meant to go; unless given, there.
    :param peer: who has connected for it; unless given, the client.
    :param requested: of a SOCKS4 proxy: what it asks for, `HOST:PORT`.
    :param user_id: and its user id.
    :param sni: it begins TLS, and asks for this server name, before `first`.
    :param pools: the names of the relay's pools; None: any name is one.
    :param server_speaks_first: as the option of that name says.
    :return: a :class:`relayd.routes.Decision`.
    :raises BadRequest: what it sends is not valid, as the route has found.
    :raises relayd.errors.RelayError: the route waits for bytes that do not come, or for
        what takes a reactor; or it has returned something else.

    What the route raises is raised.
    """
    clock = Clock()
    said = _client(clock, client, first, ended, listener, peer, requested, user_id, sni)
    said = attrs.evolve(said, original=_meant(original or listener))
    conn, asked = _ask(route, said, pools, server_speaks_first)
    outcome: list[Any] = []
    asked.addBoth(outcome.append)
    while not outcome and (timers := clock.getDelayedCalls()):
        due: float = min(each.getTime() for each in timers)
        clock.advance(max(0.0, due - clock.seconds()))
    if not outcome:
        why = _unanswered(route, conn, said.data) or (
            f"the route {name_of(route)} awaits something that takes a reactor:"
            " `await decide_later(...)`"
        )
        asked.cancel()
        raise RelayError(why)
    return _decision(outcome.pop())


async def decide_later(
    route: Callable[[Connection], Coroutine[Any, Any, Any]],
    *,
    client: str = "192.0.2.1:40000",
    first: bytes = b"",
    ended: bool = False,
    listener: str = "192.0.2.254:443",
    original: str | None = None,
    peer: str | None = None,
    requested: str | None = None,
    user_id: bytes = b"",
    sni: str | None = None,
    pools: Collection[str] | None = None,
    server_speaks_first: bool = SERVER_SPEAKS_FIRST.default,
) -> Decision:
    """As :func:`decide`, of a route that takes a reactor; time passes as it does."""
    from twisted.internet import reactor

    clock: Any = reactor
    said = _client(clock, client, first, ended, listener, peer, requested, user_id, sni)
    said = attrs.evolve(said, original=_meant(original or listener))
    conn, asked = _ask(route, said, pools, server_speaks_first)
    outcome: list[Any] = []
    asked.addBoth(outcome.append)
    try:
        while not outcome:
            if why := _unanswered(route, conn, said.data):
                raise RelayError(why)
            await pause(_LOOK)
    finally:
        asked.cancel()
    return _decision(outcome.pop())


def _client(
    clock: IReactorTime,
    client: str,
    first: bytes,
    ended: bool,
    listener: str,
    peer: str | None,
    requested: str | None,
    user_id: bytes,
    sni: str | None,
) -> _Client:
    if not isinstance(first, bytes):
        raise TypeError(f"first is bytes, as from a socket, not {first!r:.60}")
    client, peer = _address(client), _address(peer or client)
    session: Session = Session(1, client, _address(listener), 0.0, peer=peer)
    if requested is not None:
        session = _Asked(1, client, _address(listener), 0.0, peer=peer)
        session.requested, session.user_id = requested, user_id
    if sni is not None:
        first = hello_of(sni) + first
    return _Client(session, first, ended, clock)


def _address(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"an address is text, such as '192.0.2.7', not {text!r:.60}")
    bare = text.strip("[]")
    if is_address(bare):
        return host_port(bare, _PORT)
    host, _, port = text.rpartition(":")
    has_port = is_address(host.strip("[]")) and port.isdecimal()
    if not (has_port or text.startswith("unix:")):
        raise ValueError(
            f"bad address {text!r:.60}: expected one such as 192.0.2.7,"
            " 192.0.2.7:40000, [2001:db8::1]:443 or unix:/run/x"
        )
    return text


def _meant(original: str) -> str:
    """Where a client meant to go; empty: nowhere else than to a UNIX socket."""
    return "" if original.startswith("unix:") else _address(original)


def _ask(
    route: Callable[[Connection], Coroutine[Any, Any, Any]],
    client: _Client,
    pools: Collection[str] | None,
    server_speaks_first: bool,
) -> tuple[Connection, Deferred[Decision]]:
    router = Router(
        route,
        server=_check_server,
        kind="socks4" if isinstance(client.session, _Asked) else "tcp",
        server_speaks_first=server_speaks_first,
        pools=pools,
    )
    conn = Connection(client, router)
    return conn, router.run(conn)


def _check_server(text: str) -> str:
    # Tests of transports need nothing of this.
    from relayd.operating.routing import server_address

    server_address(text)
    return text


def _unanswered(route: Any, conn: Connection, data: bytes) -> str:
    """Why there will be no decision; empty if there may be one."""
    if not conn.waits_for:
        return ""
    return (
        f"the route {name_of(route)} waits for {conn.waits_for}, and {len(data)} bytes"
        " have come: say first=..., or ended=True"
    )


def _decision(outcome: Any) -> Decision:
    if isinstance(outcome, Failure):
        outcome.raiseException()
    decision: Decision = outcome
    return decision
