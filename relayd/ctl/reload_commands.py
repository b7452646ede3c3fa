"""The commands about a running relayd's file and log, and what it would decide."""

from __future__ import annotations

from typing import Any

import click

from relayd.ctl.amounts import printable
from relayd.ctl.asking import (
    Duration,
    complete_relay,
    control_option,
    json_option,
    running_relayd,
)
from relayd.ctl.exits import CommandFailed, Exit

_LEVELS = ("debug", "info", "warn", "error", "critical")

#: How many keys with secrets are named.
_NAMED = 5


@click.command(short_help="Read the file again, and apply what differs.")
@click.option("--discard", is_flag=True, help="Drop what was changed at run time.")
@click.option(
    "--confirm",
    metavar="SECONDS",
    type=Duration(never=False),
    help="Go back after that time, unless relayctl confirm is given.",
)
@json_option
@control_option()
def reload(discard: bool, confirm: float | None, as_json: bool) -> None:
    """Read the file again, and apply what differs in one step: relays that are new are
    started, others are changed in place, and their sessions go on. Of those that are
    gone, sessions that have not ended within drain_timeout are reset, and clients that
    a pause holds at once. A file with any error changes nothing, and the problems are
    printed (exit code 5). All problems of settings are told at once; those of filters,
    routes and the machine, once there are no others. What needs a restart is named.

    Changes of run time stay on top of the file, unless --discard is given.

    \b
    Example:  relayctl reload
    Example:  relayctl reload --confirm 60     (then: relayctl confirm)
    """
    from relayd.ctl import views
    from relayd.ctl.tables import report

    body: dict[str, Any] = {"discard": discard}
    if confirm is not None:
        body["confirm"] = confirm
    answer = running_relayd().change("POST", "/v1/reload", body)
    report(answer, views.reloaded, as_json=as_json)


@click.command(short_help="Keep what reload --confirm has changed.")
@json_option
@control_option()
def confirm(as_json: bool) -> None:
    """Keep what relayctl reload --confirm has changed. Without it, relayd goes back to
    what it had before, once the time is over.

    \b
    Example:  relayctl confirm
    """
    from relayd.ctl import views
    from relayd.ctl.tables import report

    answer = running_relayd().change("POST", "/v1/confirm", {})
    report(answer, views.confirmed, as_json=as_json)


@click.command(short_help="Print what is in effect, as a file.")
@click.option(
    "--to",
    metavar="FILE",
    type=click.Path(readable=False),
    help="Write it into FILE, in one step; mode and owner of FILE stay.",
)
@json_option
@control_option()
def save(to: str | None, as_json: bool) -> None:
    """Print as a file what is in effect in a running relayd: what its file says, and
    what was changed at run time; or write it. Comments are not in it, nor `env`,
    `${NAME}` and `[defaults]`: the values of variables, and of `[defaults]`, are
    written out.

    A FILE that is new can be read by its owner alone. If values of the environment, or
    of secret settings, are in it in clear, a line on standard error names their keys,
    and a FILE that others can read is not written.

    \b
    Example:  relayctl save | diff /etc/relayd/relayd.toml -
    Example:  relayctl save --to /etc/relayd/relayd.toml
    """
    answer = running_relayd().get("/v1/merged")
    text = answer.get("toml")
    if not isinstance(text, str):
        raise CommandFailed(Exit.UNREACHABLE, "what answers is not relayd: no file")
    secrets = answer.get("in_clear") or []
    if to is not None:
        from relayd.ctl.saving import write

        write(to, text, secret=bool(secrets))
        click.echo(
            f"{printable(to)} is written. Once it is relayd's own file, relayctl reload"
            " --discard reads it, and drops the run-time changes that are in it now.",
            err=True,
        )
    if secrets:
        more = f" and {len(secrets) - _NAMED} more" if len(secrets) > _NAMED else ""
        click.echo(
            "It has values of the environment, or of secret settings, in clear:"
            f" {', '.join(map(str, secrets[:_NAMED]))}{more}",
            err=True,
        )
    if as_json:
        from relayd.ctl.tables import report

        report(answer, str, as_json=True)
    elif to is None:
        click.echo(text, nl=False)


@click.command(short_help="Say whether a client would be served, and why.")
@click.option(
    "--relay",
    metavar="NAME",
    shell_complete=complete_relay,
    help="The relay that it comes to; a file that has one only needs none.",
)
@click.option("--client", metavar="ADDRESS", required=True, help="Its address.")
@click.option(
    "--at",
    metavar="TIME",
    help="When it comes, such as 2026-12-24T03:00; now, unless given.",
)
@click.option(
    "--dest", metavar="ADDRESS", help="Where it wants to go, of a SOCKS4 client."
)
@click.option(
    "--first",
    metavar="TEXT",
    help="What it sends first, for a route; with the escapes \\n, \\r, \\t, \\0, \\\\"
    " and \\xHH.",
)
@click.option(
    "--sni", metavar="NAME", help="The server name that it asks for, by TLS (SNI)."
)
@click.option(
    "--file",
    metavar="FILE",
    type=click.Path(allow_dash=True, readable=False),
    help="Ask a configuration file, and no running relayd.",
)
@json_option
@control_option()
def explain(
    relay: str | None,
    client: str,
    at: str | None,
    dest: str | None,
    first: str | None,
    sni: str | None,
    file: str | None,
    as_json: bool,
) -> None:
    """Say whether a client would be served, and why, without connecting to anything:
    what the rules, hours and limits say of it, and which server it would get.

    If the relay has a route, it is run, and what it does beside deciding happens. A
    running relayd waits for it, as long as a client would, 10 seconds at most; of a
    file, what a route waits for is not known.

    \b
    Example:  relayctl explain --relay web --client 10.0.0.5 --at 2026-12-24T03:00
    Example:  relayctl explain --relay web --client 10.0.0.5 --file relayd.toml
    Example:  relayctl explain --relay tls --client 10.0.0.5 --sni www.example.com
    """
    from relayd.ctl import views
    from relayd.ctl.tables import show

    given = {"at": at, "dest": dest, "first": first, "sni": sni}

    def ask() -> dict[str, Any]:
        if file is not None:
            return _explain_file(file, relay, client, given)
        if relay is None:
            raise click.UsageError("say which: --relay NAME")
        asked = {"relay": relay, "client": client, **given}
        body = {key: each for key, each in asked.items() if each is not None}
        return running_relayd().change("POST", "/v1/explain", body)

    show(ask, views.explained, as_json=as_json)


def _explain_file(
    file: str, relay: str | None, client: str, given: dict[str, Any]
) -> dict[str, Any]:
    """What a file says, without a running relayd.

    :param given: of the client, by option.
    """
    from relayd.configuring.written import named
    from relayd.core.errors import ConfigError
    from relayd.ctl.checking import read
    from relayd.operating.explaining import explain as explained

    layers, config = read(file)
    names = [name for name, _ in named(layers)]
    if relay is None and len(names) == 1:
        relay = names[0]
    if relay not in names:
        there = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        wanted = f"there is no relay {relay!r}" if relay else "say which: --relay NAME"
        code = Exit.NOT_FOUND if relay else Exit.USAGE
        raise CommandFailed(code, f"{file}: {wanted}; it has {there or 'none'}")
    found = config.relays[names.index(relay)]
    try:
        return explained(found, client, **given).as_json
    except ConfigError as problem:
        raise CommandFailed(Exit.INVALID, *str(problem).splitlines()) from None


@click.group(short_help="Show or change what is logged, and how much.")
def log() -> None:
    """Show or change how much a running relayd logs.

    \b
    Example:  relayctl log levels
    Example:  relayctl log level relayd.stream debug
    """


@log.command("levels", short_help="Show the level of each namespace.")
@json_option
@control_option()
def log_levels(as_json: bool) -> None:
    """Show the level of each namespace of the log that has one: what is less severe is
    not written. `default` is for all others.

    \b
    Example:  relayctl log levels
    """
    from relayd.ctl import views
    from relayd.ctl.tables import show

    asked = running_relayd()
    show(lambda: asked.get("/v1/log-levels"), views.levels, as_json=as_json)


@log.command("level", short_help="Change the level of a namespace.")
@click.argument("namespace", metavar="NAMESPACE")
@click.argument("level", type=click.Choice(_LEVELS))
@json_option
@control_option()
def log_level(namespace: str, level: str, as_json: bool) -> None:
    """Change the level of a namespace of the log, and of those below it, until relayd
    ends. The namespace `default` is for all that have none of their own. Lines about
    sessions and flows are always written.

    \b
    Example:  relayctl log level relayd.stream debug
    Example:  relayctl log level default warn
    """
    from relayd.ctl import views
    from relayd.ctl.control_client import route
    from relayd.ctl.tables import show

    path = route("log-levels", namespace)
    body = {"level": level}
    asked = running_relayd()
    show(lambda: asked.change("PUT", path, body), views.levels, as_json=as_json)
