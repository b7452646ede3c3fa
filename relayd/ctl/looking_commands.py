"""The commands that show what a running relayd does, and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from relayd.ctl.asking import (
    client_option,
    complete_relay,
    control_option,
    json_option,
    relay_option,
    running_relayd,
    server_option,
    watch_option,
)

F = TypeVar("F", bound=Callable[..., Any])


def _listing(command: F) -> F:
    """The options of what lists: which, in what order, how many."""
    for option in (
        control_option(),
        watch_option,
        json_option,
        click.option(
            "--limit",
            metavar="NUMBER",
            type=click.IntRange(1, 100_000),
            help="List that many at most; 1000, unless given.",
        ),
        click.option(
            "--sort",
            type=click.Choice(["bytes", "age", "rate"]),
            help="The largest first: bytes both ways, the age, or bytes a second.",
        ),
        server_option,
        client_option,
        relay_option,
    ):
        command = option(command)
    return command


def _show(
    path: str,
    name: str,
    query: dict[str, Any],
    as_json: bool,
    watch: float | None,
) -> None:
    from relayd.ctl import views
    from relayd.ctl.tables import show

    asked = running_relayd()
    show(
        lambda: asked.get(path, query),
        getattr(views, name),
        as_json=as_json,
        every=watch,
    )


@click.command(short_help="Show how a running relayd is doing.")
@json_option
@watch_option
@control_option()
def status(as_json: bool, watch: float | None) -> None:
    """Show how a running relayd is doing: since when it runs, with which file, how many
    relays, sessions and flows it has, and what the last reload has done.

    \b
    Example:  relayctl status --watch 5
    """
    _show("/v1/status", "status", {}, as_json, watch)


@click.command(short_help="Show the relays, or the settings of one.")
@click.argument("name", metavar="[NAME]", required=False, shell_complete=complete_relay)
@json_option
@watch_option
@control_option()
def relays(name: str | None, as_json: bool, watch: float | None) -> None:
    """Show each relay: its state, where it listens, where it leads, its sessions and
    bytes. With a NAME, show that one, with its settings and where each comes from.

    `older` counts the sessions that began before the last change of their relay: they
    keep the settings that they began with. `refused` counts clients that were refused.

    \b
    Example:  relayctl relays
    Example:  relayctl relays web
    """
    if name is None:
        _show("/v1/relays", "relays", {}, as_json, watch)
        return
    from relayd.ctl.control_client import route

    _show(route("relays", name), "relay", {}, as_json, watch)


@click.command(short_help="List the sessions (TCP, SOCKS4).")
@_listing
def sessions(as_json: bool, watch: float | None, **query: Any) -> None:
    """List the sessions: TCP connections, and those of SOCKS4 clients.

    The number in the first column is what relayctl kill takes. Up is what the client
    has sent, down is what it was sent; rate is bytes a second over the session's age.

    \b
    Example:  relayctl sessions --relay web --sort rate --limit 20
    Example:  relayctl sessions --client 10.0.0.0/8 --json
    """
    _show("/v1/sessions", "sessions", query, as_json, watch)


@click.command(short_help="List the flows (UDP).")
@_listing
def flows(as_json: bool, watch: float | None, **query: Any) -> None:
    """List the flows: a UDP client, and the port of the relay that stands for it.

    Sent counts datagrams of the client, replies those that it was sent; up and down are
    their bytes.

    \b
    Example:  relayctl flows --relay dns --sort age
    """
    _show("/v1/flows", "flows", query, as_json, watch)


@click.command(short_help="List the NAT table, TCP and UDP.")
@_listing
def nat(as_json: bool, watch: float | None, **query: Any) -> None:
    """List the NAT table: every session and flow, TCP and UDP, with the client, the
    address that it came to, the relay's own address and port towards the server, and
    the server.

    \b
    Example:  relayctl nat --watch
    Example:  relayctl nat --server 192.168.0.10 --json
    """
    _show("/v1/nat", "nat", query, as_json, watch)


@click.command(short_help="List the servers, and whether each is usable.")
@relay_option
@json_option
@watch_option
@control_option()
def servers(relay: str | None, as_json: bool, watch: float | None) -> None:
    """List the servers of all relays: the state of each and why, its weight, sessions,
    recent failures, and what its last check found.

    \b
    Example:  relayctl servers --relay web --watch
    """
    _show("/v1/servers", "servers", {"relay": relay}, as_json, watch)


@click.command(short_help="Show each limit, and how much of it is in use.")
@json_option
@watch_option
@control_option()
def limits(as_json: bool, watch: float | None) -> None:
    """Show everything that is limited: sessions, queues, flows, descriptors and so on;
    how many there are now, how many there may be, and how often the limit was hit.

    \b
    Example:  relayctl limits
    """
    _show("/v1/limits", "limits", {}, as_json, watch)


@click.command(short_help="Show what was changed at run time.")
@json_option
@control_option()
def diff(as_json: bool) -> None:
    """Show what was changed while relayd runs, and differs from its file: by set,
    start, stop, drain and server. relayctl save writes it into a file; relayctl reload
    --discard drops it.

    \b
    Example:  relayctl diff
    """
    _show("/v1/diff", "diff", {}, as_json, None)
