"""The commands about what the kernel must do for relays: rules, and routes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from relayd.ctl.asking import (
    complete_relay,
    control_option,
    json_option,
    running_relayd,
)
from relayd.ctl.exits import CommandFailed, Exit

T = TypeVar("T")

_relays = click.argument(
    "relays", metavar="[RELAY]...", nargs=-1, shell_complete=complete_relay
)

_config = click.option(
    "--config",
    "file",
    metavar="FILE",
    type=click.Path(allow_dash=True, readable=False),
    help="The relays of this file (or folder, or - for JSON on standard input), and not"
    " those of a running relayd.",
)


@click.group(short_help="Show, apply or remove the rules that relays need.")
def netfilter() -> None:
    """Show, apply or remove what the kernel must do for relays that are transparent, or
    that intercept: rules of nftables, all in one table, inet relayd, and a routing rule
    and a route for what these rules mark. Nothing else is touched.

    To change them takes root, or CAP_NET_ADMIN. relayd --manage-netfilter does it by
    itself; these commands are for a relayd that is to have no such right.

    \b
    Example:  relayctl netfilter show --config /etc/relayd/relayd.toml
    Example:  relayctl netfilter apply
    """


@netfilter.command("show", short_help="Print the rules that relays need.")
@_relays
@_config
@json_option
@control_option()
def show_rules(relays: tuple[str, ...], file: str | None, as_json: bool) -> None:
    """Print the rules that relays need, as nft lists them once they are applied, and
    the commands of ip as comments. Nothing is asked of the kernel. nft -f takes it
    where there is no table inet relayd yet; what is printed with --json, nft -j -f
    takes at any time. Of all relays unless some are named; those that are stopped only
    if they are named.

    \b
    Example:  relayctl netfilter show web
    Example:  relayctl netfilter show --config relayd.toml --json
    """
    import json

    from relayd.ctl.netfilter import find
    from relayd.netfilter.documents import as_json as in_json
    from relayd.netfilter.documents import as_text

    found = find(relays, file, running_relayd(), stopped=False)
    rules = found.rules
    if as_json:
        click.echo(json.dumps(in_json(rules, found.mark), indent=2))
    elif rules:
        click.echo(as_text(rules, found.mark), nl=False)
    _tell_others(found)


@netfilter.command("apply", short_help="Install the rules that relays need.")
@_relays
@_config
@json_option
@control_option()
def apply_rules(relays: tuple[str, ...], file: str | None, as_json: bool) -> None:
    """Install the rules that relays need, in place of those that they have; what a
    relay needs no more is removed. It may be done again at any time. Of all relays
    unless some are named; those that are stopped only if they are named.

    Relays that are no more keep their rules: remove takes their names. Sessions that
    have begun by rules that are replaced may end; with relayd --manage-netfilter they
    go on.

    \b
    Example:  relayctl netfilter apply --config /etc/relayd/relayd.toml
    """
    from relayd.ctl.netfilter import find
    from relayd.netfilter.applying import apply

    found = find(relays, file, running_relayd(), stopped=False)
    _do(apply, found.rules, found.mark)
    _tell("applied", [each.name for each in found.rules], as_json)
    _tell_others(found)
    if found.rules:
        _do(_tidy, found, not relays)
    elif found.relays:
        _tidy_if_possible(found, not relays)


def _tidy(found: Any, all_of_them: bool) -> None:
    """Remove what relays need no more; tell of what is left, and of what comes first.

    :raises NetfilterError: nobody can tell.
    """
    from relayd.netfilter.applying import cautions, relays_there, remove

    remove([each.name for each in found.relays if each.rules is None], found.mark)
    for said in cautions(found.rules, found.mark):
        click.echo(f"warning: {said}", err=True)
    if all_of_them:
        for name in sorted(relays_there() - {each.name for each in found.relays}):
            click.echo(f"{name}: has rules, and is none of these relays", err=True)


def _tidy_if_possible(found: Any, all_of_them: bool) -> None:
    """The same where nothing had to be applied: that takes no right, in a unit, say."""
    from relayd.core.errors import NetfilterError

    try:
        _tidy(found, all_of_them)
    except NetfilterError as problem:
        click.echo(f"rules of before were not looked for: {problem}", err=True)


@netfilter.command("remove", short_help="Remove the rules of relays.")
@_relays
@_config
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Remove the whole table of relayd, whichever relays have rules in it, of"
    " whichever process; no file is read, and no relayd is asked.",
)
@json_option
@control_option()
def remove_rules(
    relays: tuple[str, ...], file: str | None, everything: bool, as_json: bool
) -> None:
    """Remove the rules of relays, whether or not they have any. With the last of them
    go the table, the routing rules and the route. Of all relays unless some are named;
    a name that has rules need be nobody's.
    A relayd with --manage-netfilter applies those of its relays again: have it stop
    these instead (relayctl stop).

    \b
    Example:  relayctl netfilter remove web
    Example:  relayctl netfilter remove --all
    """
    from relayd.core.process_settings import NETFILTER_MARK
    from relayd.ctl.netfilter import find
    from relayd.netfilter.applying import relays_there, remove, remove_all

    if everything:
        if relays or file is not None:
            raise click.UsageError("--all goes with no RELAY and no --config")
        _do(remove_all, NETFILTER_MARK.default)
        _tell("removed", ["all"], as_json)
        return
    if relays and file is None and _do(relays_there).issuperset(relays):
        # Whoever they were: the kernel knows them by name.
        names, mark = [*relays], NETFILTER_MARK.default
    else:
        found = find(relays, file, running_relayd(), stopped=True)
        names, mark = [each.name for each in found.relays], found.mark
    _do(remove, names, mark)
    _tell("removed", names, as_json)


def _do(change: Callable[..., T], *args: Any) -> T:
    from relayd.core.errors import NetfilterError

    try:
        return change(*args)
    except NetfilterError as problem:
        raise CommandFailed(Exit.FAILED, str(problem)) from None


def _tell(done: str, names: list[str], as_json: bool) -> None:
    """What has been done, of which relays."""
    if as_json:
        import json

        click.echo(json.dumps({done: names}, indent=2))
        return
    for name in names:
        click.echo(f"{name}: {done}")


def _tell_others(found: Any) -> None:
    """Which relays need nothing."""
    for each in found.relays:
        if each.rules is None:
            click.echo(f"{each.name}: needs no rules", err=True)
    if not found.relays:
        click.echo("no relay that runs may have rules", err=True)
