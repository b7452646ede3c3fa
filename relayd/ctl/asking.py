"""What the commands share that talk to a running relayd: their options and arguments.

`--control` may stand before the command or behind it; the latter wins.  This imports
click and no more; what a command works with, it imports itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from relayd.ctl.exits import CommandFailed
from relayd.ctl.places import UNIX, VARIABLE

if TYPE_CHECKING:
    from relayd.ctl.control_client import ControlClient

    _ParamType = click.ParamType[float]
else:
    # Not generic in the oldest click.
    _ParamType = click.ParamType

_KEY = "relayd.ctl.control"

F = TypeVar("F", bound=Callable[..., Any])


class Shared(click.Option):
    """An option that many commands have; the manual explains it once."""


class Duration(_ParamType):
    """A time as relayd's files have it: 90, 90s, 5m, 1h.

    :ivar never: 0 is one.
    """

    name = "seconds"

    def __init__(self, *, never: bool = True) -> None:
        self.never = never

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        from relayd.core.setting_types import Seconds

        if isinstance(value, float):
            return value
        try:
            return Seconds(never=self.never).parse(str(value))
        except ValueError as problem:
            self.fail(f"{value!r}: {problem}", param, ctx)


class Number(click.IntRange):
    """A whole number; what is none is called that."""

    name = "whole number"


class Bytes(_ParamType):
    """How many bytes, 1 or more, as relayd's files have it: 5000, 64KiB, 10MB."""

    name = "bytes"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        from relayd.core.setting_types import Size

        try:
            return Size(9_999_999_999).parse(str(value))
        except ValueError as problem:
            self.fail(f"{value!r}: {problem}", param, ctx)


def _remember(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        if not value.removeprefix(UNIX):
            raise click.BadParameter("expected a path, or unix:PATH", ctx)
        ctx.meta[_KEY] = value


def control_option(*, variable: bool = False) -> Callable[[F], F]:
    """The option --control, of relayctl (which reads the variable) or of a command."""
    return click.option(
        "--control",
        cls=Shared,
        metavar="ADDRESS",
        envvar=VARIABLE if variable else None,
        expose_value=False,
        callback=_remember,
        help="The control socket of relayd: its path, or unix:PATH.",
    )


json_option = click.option(
    "--json", "as_json", cls=Shared, is_flag=True, help="Print the answer as JSON."
)

watch_option = click.option(
    "--watch",
    cls=Shared,
    type=Duration(never=False),
    metavar="[SECONDS]",
    is_flag=False,
    flag_value=2.0,
    help="Show it again every SECONDS (2), until Ctrl-C.",
)


def running_relayd() -> ControlClient:
    """The one that --control names, as the command that runs asks it."""
    from relayd.ctl.control_client import ControlClient

    return ControlClient(click.get_current_context().meta.get(_KEY))


def _quickly(path: str, query: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a running relayd says, for a completion: nothing, if not at once."""
    from relayd.ctl.control_client import AT_ONCE

    try:
        return running_relayd().get(path, query, within=AT_ONCE)
    except CommandFailed:
        return {}


def _names(path: str, key: str, query: dict[str, Any] | None = None) -> list[str]:
    """The names in an answer: of relays, or of servers."""
    from relayd.ctl.tables import rows_of
    from relayd.ctl.views import called

    names = [called(each) for each in rows_of(_quickly(path, query), key)]
    return [each for each in names if isinstance(each, str)]


def complete_relay(
    ctx: click.Context, _: click.Parameter, begun: str
) -> list[CompletionItem]:
    with ctx.scope(cleanup=False):
        names = _names("/v1/relays", "relays")
    return [CompletionItem(each) for each in names if each.startswith(begun)]


def complete_server(
    ctx: click.Context, param: click.Parameter, begun: str
) -> list[CompletionItem]:
    """NAME/SERVER: relays first, then the servers of the one that is named."""
    relay, slash, server = begun.partition("/")
    if not slash:
        return [
            CompletionItem(f"{each.value}/")
            for each in complete_relay(ctx, param, relay)
        ]
    with ctx.scope(cleanup=False):
        names = _names("/v1/servers", "servers", {"relay": relay})
    return [
        CompletionItem(f"{relay}/{each}") for each in names if each.startswith(server)
    ]


def complete_either(
    ctx: click.Context, param: click.Parameter, begun: str
) -> list[CompletionItem]:
    """NAME, or NAME/SERVER."""
    if "/" in begun:
        return complete_server(ctx, param, begun)
    return complete_relay(ctx, param, begun)


def complete_filter(
    _: click.Context, __: click.Parameter, begun: str
) -> list[CompletionItem]:
    """The names of the filters that there are here; their options are not completed."""
    from relayd.operating.filtering import filter_names

    return [CompletionItem(each) for each in filter_names() if each.startswith(begun)]


def complete_own_filter(
    ctx: click.Context, _: click.Parameter, begun: str
) -> list[CompletionItem]:
    """The filters of the relay that is named before."""
    from relayd.ctl.control_client import route
    from relayd.ctl.filters import filters_in, text_of

    with ctx.scope(cleanup=False):
        found = filters_in(_quickly(route("relays", ctx.params["name"])))
    texts = map(text_of, found or ())
    return [CompletionItem(each) for each in texts if each.startswith(begun)]


relay_argument = click.argument("name", metavar="NAME", shell_complete=complete_relay)

relay_option = click.option(
    "--relay", metavar="NAME", shell_complete=complete_relay, help="Of this relay only."
)

client_option = click.option(
    "--client",
    metavar="NET",
    help="Of this client only: an address, or a network such as 10.0.0.0/8.",
)

server_option = click.option(
    "--server",
    metavar="SERVER",
    help="With this server only: its name, its label or its address.",
)
