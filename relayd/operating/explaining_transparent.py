"""Whether servers can be dialled for a client: as it, or where it meant to go.

The functions that refuse a client's address as a server is dialled are asked here, too.
They ask the kernel which addresses are this machine's own, and which are broadcast
ones; nothing is sent.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Sequence
from typing import Any

from relayd.configuring.address_grammar import (
    EndpointString,
    HostPort,
    OriginalAddress,
    UdpAddress,
    UnixPath,
    dialled_host,
)
from relayd.configuring.config import Relay, UdpRelay, each_port
from relayd.configuring.ends import address_of
from relayd.configuring.pools_of_relay import pools_of
from relayd.configuring.server_grammar import options_of
from relayd.core.names import host_port
from relayd.operating.explaining_pools import MOST, Choice
from relayd.operating.explanation import REFUSED, UNIX_CLIENT, Step, meet


def meet_dialing(
    steps: list[Step], relay: Relay | UdpRelay, servers: Sequence[Any], client: str
) -> Collection[str]:
    """What a client meets as one of these servers is dialled for it.

    :return: the names of servers that it can't get, as others can be dialled for it.
    """
    _meet_intercepts(steps, relay, servers, client)
    if not relay.dialing.transparent:
        return ()
    found = [(_name(each), _why_not(relay, each, client)) for each in servers]
    refused = {name: why for name, why in found if why}
    if servers and all(why for _, why in found):
        why = "; ".join(dict.fromkeys(refused.values()))
        meet(steps, "transparent", REFUSED, f"--transparent: {why}")
    for name, why in list(refused.items())[:MOST]:
        meet(steps, "transparent", "not to all", f"{name}: {why}")
    if len(refused) > MOST:
        meet(steps, "transparent", "not to all", f"{len(refused) - MOST} more")
    what = "address and port" if isinstance(relay, UdpRelay) else "address"
    why = f"--transparent: a server is dialled from the client's own {what}"
    meet(steps, "transparent", "its own", why)
    return refused


def chosen_for(choice: Choice, refused: Collection[str]) -> Choice:
    """What becomes of a client that its pool would have sent to one of these servers.

    :param refused: see :func:`meet_dialing`.
    """
    if choice.server is None or choice.server.rpartition("/")[2] not in refused:
        return choice
    why = f"{choice.server} can't be dialled from the client's address: another is"
    return Choice([*choice.steps, Step("server", "one of the others", why)])


def servers_in(relay: Relay | UdpRelay, pool: str) -> Sequence[Any]:
    """The servers of a pool that are dialled for clients, of a relay's first port.

    :return: as the settings have them; none if its clients do not matter.
    """
    if not (relay.dialing.transparent or relay.intercepts):
        return ()
    _, destinations = next(each_port(relay))
    sni = relay.sni if isinstance(relay, Relay) else ()
    return pools_of(destinations, sni).get(pool, [])


def _meet_intercepts(
    steps: list[Step], relay: Relay | UdpRelay, servers: Sequence[Any], client: str
) -> None:
    """Who goes where it meant to go is brought here, or named by a balancer."""
    named = isinstance(relay, Relay) and relay.stream.accept_proxy
    original = servers and all(isinstance(each, OriginalAddress) for each in servers)
    if not relay.intercepts or named or not original or client == UNIX_CLIENT:
        return
    version = 6 if ":" in _ends_of(client)[0] else 4
    if not any(version in each.families for each in relay.intercepts):
        why = f"--intercept brings no IPv{version} clients: it came to the listener"
        meet(steps, "intercept", REFUSED, f"{why} itself, and was not redirected")


def _ends_of(client: str) -> tuple[str, int]:
    """The host of a client, with its scope, and its port; none of a UNIX socket's."""
    if client == UNIX_CLIENT:
        return "", 0
    host, _, port = client.rpartition(":")
    return host.strip("[]"), int(port)


def _name(server: Any) -> str:
    """What a pool calls a server, but for its label."""
    if isinstance(server, HostPort | UdpAddress):
        return host_port(dialled_host(server.host), server.port)
    return str(server).removeprefix("udp:")


def _why_not(relay: Relay | UdpRelay, server: Any, client: str) -> str:
    """Why a server can't be dialled from a client's address; empty if it may be.

    What a name is, or where clients meant to go, is not known.
    """
    if isinstance(server, UnixPath | EndpointString) or options_of(server).source:
        # Not from there.
        return ""
    # Relays that are not transparent need none of it.
    from relayd.net import transparent

    host, port = _ends_of(client)
    try:
        where = _where(server, port)
        if where is None or not host:
            transparent.check_host(host, ":" in host)
        elif isinstance(relay, UdpRelay):
            from relayd.datagrams.transparent import check_source

            check_source(_socket_address(host, port), where)
        else:
            transparent.source_for(where, host)
    except OSError as problem:
        why = problem.strerror or str(problem)
        return why.removeprefix("transparent: ")
    return ""


def _where(server: Any, port: int) -> Any:
    """The socket address of a server; None: it is not known.

    :param port: of the client.
    """
    if isinstance(server, HostPort | UdpAddress):
        host, its_port = dialled_host(server.host), server.port
    elif isinstance(server, OriginalAddress) and server.host:
        # Whoever asks for a port of that host may ask for any but its own.
        host, its_port = dialled_host(server.host), port ^ 1
    else:
        return None
    if address_of(host.partition("%")[0]) is None:
        return None
    return _socket_address(host, its_port)


def _socket_address(host: str, port: int) -> Any:
    """As the socket module has it.

    :raises OSError: its scope does not exist.
    """
    flags = socket.AI_NUMERICHOST
    found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM, flags=flags)
    return found[0][4]
