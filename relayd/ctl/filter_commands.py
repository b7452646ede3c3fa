"""The commands about the bytes of sessions: to see them, and what is done to them."""

from __future__ import annotations

import sys
from typing import Any

import click

from relayd.ctl.asking import (
    Bytes,
    Number,
    complete_filter,
    complete_own_filter,
    control_option,
    json_option,
    relay_argument,
    running_relayd,
)
from relayd.ctl.exits import CommandFailed, Exit


@click.command(short_help="Write what a session says, for wireshark.")
@click.argument("session", metavar="SESSION", type=Number(0))
@click.option(
    "--bytes",
    "most",
    metavar="BYTES",
    type=Bytes(),
    help="End after so many bytes of each direction.",
)
@control_option()
def capture(session: int, most: int | None) -> None:
    """Write what a session (TCP, SOCKS4) says from now on to standard output, as
    pcapng, until it ends or Ctrl-C is pressed; SESSION is the number that relayctl
    sessions shows. Who reads too slowly misses packets: the session waits for nobody.
    How it ended, and how many are missing, goes to standard error.

    \b
    Example:  relayctl capture 17 | wireshark -k -i -
    Example:  relayctl capture 17 --bytes 1MB > session.pcapng
    """
    if sys.stdout.isatty():
        raise CommandFailed(
            Exit.USAGE,
            "a capture is nothing for a terminal: pipe it to `wireshark -k -i -`, or"
            " into a file",
        )
    from relayd.ctl.capturing import write
    from relayd.ctl.control_client import route

    path = route("sessions", str(session), "capture")
    with running_relayd().going_on(path, {"bytes": most}) as blocks:
        write(blocks, sys.stdout.buffer)


@click.group("filter", short_help="List, add or remove the filters of a relay.")
def filter_() -> None:
    """List, add or remove the filters of a relay: what may see, change, delay or end
    the bytes of its sessions.

    New sessions have the filters that a relay has then. Faults, such as latency, are
    put on those that go on, too, and taken off them. The change lasts as one of
    relayctl set does; relayctl diff and save have it.

    \b
    Example:  relayctl filter add web latency:100ms
    Example:  relayctl filter remove web latency
    """


@filter_.command("list", short_help="List the filters of a relay, in order.")
@relay_argument
@json_option
@control_option()
def list_filters(name: str, as_json: bool) -> None:
    """List the filters of a relay, one a line, the nearest to the source first.

    \b
    Example:  relayctl filter list web
    """
    from relayd.ctl.filters import read

    _tell(read(running_relayd(), name).filters, as_json)


@filter_.command("add", short_help="Add filters to a relay.")
@relay_argument
@click.argument(
    "filters",
    metavar="FILTER...",
    nargs=-1,
    required=True,
    shell_complete=complete_filter,
)
@json_option
@control_option()
def add_filters(name: str, filters: tuple[str, ...], as_json: bool) -> None:
    """Add filters to a relay, behind those that it has. A FILTER is written as behind
    --filter: its name, and its options. What the relay has then is listed.

    \b
    Example:  relayctl filter add web latency:latency=100,jitter=10
    Example:  relayctl filter add web 'replace:old=a,new=b' first:64
    """
    from relayd.ctl.filters import change, read

    asked = running_relayd()
    found = read(asked, name)
    _tell(change(asked, found, [*found.filters, *filters]), as_json)


@filter_.command("remove", short_help="Remove a filter from a relay.")
@relay_argument
@click.argument("filter_", metavar="NAME|FILTER", shell_complete=complete_own_filter)
@json_option
@control_option()
def remove_filter(name: str, filter_: str, as_json: bool) -> None:
    """Remove a filter from a relay: by its name, if there is one of that name, or as
    relayctl filter list shows it. What the relay has then is listed.

    \b
    Example:  relayctl filter remove web latency
    Example:  relayctl filter remove web latency:latency=100,jitter=10
    """
    from relayd.ctl.filters import change, read, without

    asked = running_relayd()
    found = read(asked, name)
    _tell(change(asked, found, without(found, filter_)), as_json)


def _tell(filters: list[Any], as_json: bool) -> None:
    import json

    from relayd.ctl.filters import text_of

    if as_json:
        click.echo(json.dumps({"filters": filters}, indent=2))
        return
    for each in filters:
        click.echo(text_of(each))
    if not filters:
        click.echo("no filters", err=True)
