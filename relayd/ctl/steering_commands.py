"""The commands that change what a running relayd does: relays, servers, sessions."""

from __future__ import annotations

import re
from typing import Any

import click

from relayd.ctl.asking import (
    Duration,
    Number,
    client_option,
    complete_either,
    complete_server,
    control_option,
    json_option,
    relay_argument,
    relay_option,
    running_relayd,
    server_option,
)

_STATES = ("up", "down", "drain", "auto")


def _report(answer: dict[str, Any], view: str, as_json: bool) -> None:
    from relayd.ctl import views
    from relayd.ctl.tables import report

    report(answer, getattr(views, view), as_json=as_json)


def _change_relay(
    name: str, verb: str, body: dict[str, Any], as_json: bool, takes: float = 0.0
) -> None:
    from relayd.ctl.control_client import route

    answer = running_relayd().change(
        "POST", route("relays", name, verb), body, takes=takes
    )
    _report(answer, "changed_relay", as_json)


def _change_server(
    name: str, body: dict[str, Any], as_json: bool, within: float | None
) -> None:
    from relayd.ctl.assignments import server_name
    from relayd.ctl.control_client import route

    try:
        relay, server = server_name(name)
    except ValueError as problem:
        raise click.UsageError(str(problem)) from None
    if within is not None:
        body["within"] = within
    path = route("relays", relay, "servers", server)
    answer = running_relayd().change("PATCH", path, body, takes=within or 0.0)
    _report(answer, "changed_server", as_json)


@click.command(short_help="Start a relay that is stopped.")
@relay_argument
@json_option
@control_option()
def start(name: str, as_json: bool) -> None:
    """Start a relay that is stopped: by relayctl stop or drain, or by its file, which
    may say enabled = false.

    \b
    Example:  relayctl start web
    """
    _change_relay(name, "start", {}, as_json)


@click.command(short_help="Stop a relay; its sessions go on, unless cut.")
@relay_argument
@click.option("--cut", is_flag=True, help="End its sessions and flows, too, at once.")
@json_option
@control_option()
def stop(name: str, cut: bool, as_json: bool) -> None:
    """Stop a relay: it takes no new clients. Sessions under way go on until they end,
    unless --cut is given. relayctl drain ends them after a time.

    \b
    Example:  relayctl stop web
    Example:  relayctl stop web --cut
    """
    _change_relay(name, "stop", {"cut": cut}, as_json)


@click.command("set", short_help="Change settings of a relay.")
@relay_argument
@click.argument("settings", metavar="KEY=VALUE...", nargs=-1, required=True)
@json_option
@control_option()
def set_(name: str, settings: tuple[str, ...], as_json: bool) -> None:
    """Change settings of a relay: any key that its table in the file may have,
    relayd.toml(5). All of them are changed in one step, or none.

    The next connections use the new settings; those under way keep theirs. A new
    address is listened on before the old one is closed. The change lasts until relayd
    ends, or relayctl reload --discard; relayctl save writes it into a file.

    A VALUE is written as in the file or as on the command line. A key that is given
    several times has a list; KEY= with nothing goes back to what the file says.

    \b
    Example:  relayctl set web dest=10.0.0.6:80 idle_timeout=5m
    Example:  relayctl set web dest=10.0.0.5:80 dest=10.0.0.6:80
    Example:  relayctl set web 'clients=["allow 10.0.0.0/8"]'
    Example:  relayctl set web idle_timeout=
    """
    from relayd.ctl.assignments import settings as read
    from relayd.ctl.control_client import route

    try:
        body = {"settings": read(settings)}
    except ValueError as problem:
        raise click.UsageError(str(problem)) from None
    answer = running_relayd().change("PATCH", route("relays", name), body)
    _report(answer, "changed_relay", as_json)


@click.command(short_help="Take a server out of use or back, or change its weight.")
@click.argument("name", metavar="NAME/SERVER", shell_complete=complete_server)
@click.argument("change", metavar="up|down|drain|auto|weight=NUMBER")
@click.option(
    "--within",
    metavar="SECONDS",
    type=Duration(),
    help="With drain: end the sessions that are left after that time.",
)
@json_option
@control_option()
def server(name: str, change: str, within: float | None, as_json: bool) -> None:
    """Change a server of a relay, NAME/SERVER: what follows the first slash is the
    server's name or its label, as relayctl servers shows it; that of a pool other than
    the default one begins with the name of the pool.

    `up`: it is used, whatever its checks say. `drain`: it gets no new sessions, and
    those that it has go on. `down`: the same, but its setting on_down says whether its
    sessions go on or are cut. `auto`: its checks decide again. `weight=NUMBER`: its
    share of new sessions, compared with the weights of the other servers.

    \b
    Example:  relayctl server web/10.0.0.5:80 drain --within 60
    Example:  relayctl server web/10.0.0.5:80 auto
    Example:  relayctl server web/blue weight=10
    Example:  relayctl server web/ssh/10.0.0.7:22 drain
    """
    key, _, number = change.partition("=")
    if change in _STATES:
        body: dict[str, Any] = {"state": change}
    elif key == "weight" and re.fullmatch("[0-9]{1,9}", number):
        body = {"weight": int(number)}
    else:
        raise click.UsageError(
            f"{change!r}: expected {', '.join(_STATES)} or weight=NUMBER"
        )
    if within is not None and change != "drain":
        raise click.UsageError("--within goes with drain only")
    _change_server(name, body, as_json, within)


@click.command(short_help="End sessions and flows at once.")
@click.argument("ids", metavar="[SESSION]...", nargs=-1, type=Number(0))
@client_option
@server_option
@relay_option
@json_option
@control_option()
def kill(
    ids: tuple[int, ...],
    client: str | None,
    server: str | None,
    relay: str | None,
    as_json: bool,
) -> None:
    """End sessions at once: those with the numbers that relayctl sessions shows, or all
    sessions and flows that match --client, --server and --relay together.

    \b
    Example:  relayctl kill 17 23
    Example:  relayctl kill --client 10.0.0.0/8 --relay web
    """
    given = {"client": client, "server": server, "relay": relay}
    body: dict[str, Any] = {key: each for key, each in given.items() if each}
    if ids:
        body["sessions"] = list(ids)
    if not body:
        raise click.UsageError(
            "say which: the numbers of sessions, --client, --server or --relay"
        )
    answer = running_relayd().change("POST", "/v1/kill", body)
    _report(answer, "killed", as_json)


@click.command(short_help="Take no new clients, and let sessions finish.")
@click.argument("name", metavar="NAME|NAME/SERVER", shell_complete=complete_either)
@click.option(
    "--within",
    metavar="SECONDS",
    type=Duration(),
    help="End the sessions that are left after that time. Unless given: of a relay,"
    " after drain_timeout; of a server, none.",
)
@json_option
@control_option()
def drain(name: str, within: float | None, as_json: bool) -> None:
    """Take no new clients, and let the sessions under way finish: those of a relay, or
    of one of its servers. Idle sessions of a relay are ended little by little until the
    time is over, as at SIGTERM; of a server, none is ended before. To go back: relayctl
    start NAME, with which the sessions that are left go on, too, or relayctl server
    NAME/SERVER auto.

    \b
    Example:  relayctl drain web --within 5m
    Example:  relayctl drain web/10.0.0.5:80
    """
    if "/" in name:
        _change_server(name, {"state": "drain"}, as_json, within)
    else:
        body = {} if within is None else {"within": within}
        _change_relay(name, "drain", body, as_json, within or 0.0)


@click.command(short_help="Hold new clients of a relay, for a fail-over.")
@relay_argument
@click.option(
    "--for",
    "seconds",
    metavar="SECONDS",
    type=Duration(never=False),
    help="Resume by itself after that time.",
)
@json_option
@control_option()
def pause(name: str, seconds: float | None, as_json: bool) -> None:
    """Hold the new clients of a relay: as many as may wait are accepted, and nothing is
    read from them until relayctl resume. Sessions under way go on. So a server can be
    replaced without refusing clients. relayctl stop ends a pause: who waits is refused.

    \b
    Example:  relayctl pause web --for 30
    """
    body = {} if seconds is None else {"seconds": seconds}
    _change_relay(name, "pause", body, as_json)


@click.command(short_help="Serve the clients that a pause has held.")
@relay_argument
@json_option
@control_option()
def resume(name: str, as_json: bool) -> None:
    """End a pause: the clients that were held are served, and new ones, too.

    \b
    Example:  relayctl resume web
    """
    _change_relay(name, "resume", {}, as_json)
