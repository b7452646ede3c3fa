"""relayctl(1), made from the commands' help."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click

from relayd.ctl.asking import Shared
from relayd.ctl.commands import SECTIONS, relayctl
from relayd.ctl.exits import MEANING
from relayd.ctl.places import OF_THE_MACHINE, VARIABLE
from relayd.ctl.roff import Page

#: Options, names of files and commands, in the text of a help.
_CODE = re.compile(
    r"(?<![\w-])(--[a-z-]+|relayctl [a-z]+[^.,:;]*?\.toml|userid_file)\b"
)


def commands() -> Iterator[tuple[str, str, click.Command]]:
    """Each command: the heading that it is below, its name, and itself.

    Of those that have commands of their own, these: `log level`.
    """
    context = click.Context(relayctl, info_name="relayctl")
    for heading, names in SECTIONS.items():
        for name in names:
            command = relayctl.get_command(context, name)
            if isinstance(command, click.Group):
                for each in command.commands.values():
                    yield heading, f"{name} {each.name}", each
            elif command is not None:
                yield heading, name, command


def relayctl_page() -> Page:
    page = Page(
        "relayctl",
        1,
        "check, show and write configuration files of relayd; steer one that runs",
    )
    found = list(commands())
    page.section("Synopsis")
    for _, name, each in found:
        page.text(_usage(name, each))
    page.section("Description")
    page.text(
        "`relayctl` works with the configuration files of relayd, relayd.toml(5), and"
        " with a running relayd, relayd(8), which it reaches over its control socket.",
        "Of files, it starts nothing, opens no listener, and connects to nobody. A"
        " running relayd is asked by HTTP and JSON over a UNIX socket, which"
        " `relayd --control` opens; it serves root and the user that relayd runs as.",
        "Data goes to standard output, messages to standard error.",
    )
    heading = ""
    for section, name, each in found:
        if section != heading:
            page.section(section)
            heading = section
        page.heading(_usage(name, each))
        _explain(page, each)
    page.section("Options")
    page.text("Several commands have these:")
    shared = {
        option.opts[0]: option
        for _, _, each in found
        for option in each.params
        if isinstance(option, Shared)
    }
    for option in shared.values():
        page.item(_named(option), _marked(option.help or ""))
    page.item("`-h`, `--help`", "Show the help, of `relayctl` or of a command.")
    page.item("`-V`, `--version`", "Show the version.")
    page.text(
        "A time is a number of seconds, or one with a unit: 250ms, 90s, 5m, 1h."
        " `--control` may stand before the command or behind it; it is of those that"
        " talk to a running relayd."
    )
    page.section("Exit status")
    page.items((f"`{code.value}`", text) for code, text in MEANING.items())
    page.section("Environment")
    page.item("`NO_COLOR`", "If it is set, there are no colours.")
    page.item(f"`{VARIABLE}`", "The control socket, where `--control` is not given.")
    page.item(
        "`XDG_RUNTIME_DIR`",
        "The folder in which the socket is looked for, below `relayd`, where neither is"
        f" given and there is no `{OF_THE_MACHINE}`.",
    )
    page.section("Files")
    page.item(f"`{OF_THE_MACHINE}`", "The control socket of a service of the machine.")
    _examples(page)
    page.section("See also")
    page.text("relayd(8), relayd.toml(5)")
    return page


def _examples(page: Page) -> None:
    page.section("Examples")
    page.text("Write a file, edit it, check it, and start relayd with it:")
    page.example(
        "relayctl example > relayd.toml\n"
        "relayctl check relayd.toml\n"
        "twistd -n --pidfile= relayd --config relayd.toml"
    )
    page.text("See which relays do not have the default of a setting:")
    page.example("relayctl show relayd.toml | grep idle_timeout | grep -v default$")
    page.text("Have an editor complete and check a file, with taplo's language server:")
    page.example(
        "relayctl schema > relayd.schema.json\n"
        "echo '#:schema ./relayd.schema.json' | cat - relayd.toml"
    )
    page.text("Check what a program has made:")
    page.example("make-relays | relayctl check --json -")
    page.text("Change the file of a running relayd, and go back unless all is well:")
    page.example(
        "relayctl check /etc/relayd/relayd.toml\n"
        "relayctl reload --confirm 60\n"
        "relayctl status\n"
        "relayctl confirm"
    )
    page.text("Exchange a server, and refuse nobody:")
    page.example(
        "relayctl server web/10.0.0.5:80 drain --within 5m\n"
        "relayctl servers --relay web --watch\n"
        "relayctl server web/10.0.0.5:80 auto"
    )
    page.text("Move a relay to another server, now and in its file:")
    page.example(
        "relayctl set web dest=10.0.0.6:80\n"
        "relayctl save --to /etc/relayd/relayd.toml\n"
        "relayctl reload --discard"
    )


def _usage(name: str, command: click.Command) -> str:
    words = [f"`relayctl {name}`"]
    for each in command.params:
        if each.name == "control":
            # All have it that talk to a running relayd, and relayctl itself.
            continue
        if isinstance(each, click.Option):
            named = _named(each)
            words.append(named if each.required else f"[{named}]")
        elif isinstance(each.type, click.Choice):
            words.append("|".join(f"`{one}`" for one in each.type.choices))
        else:
            words.append(_value(each.metavar or each.human_readable_name))
    return " ".join(words)


def _value(placeholder: str) -> str:
    """What stands for a value: words in capitals are italic, others are as typed."""
    placed = re.sub(r"\b[A-Z]+\b", r"*\g<0>*", placeholder)
    return re.sub(r"\b[a-z]+\b=?", r"`\g<0>`", placed)


def _named(option: click.Option) -> str:
    """An option, and what stands for its value."""
    if option.is_flag:
        return f"`{option.opts[0]}`"
    kind = option.type
    if isinstance(kind, click.Choice):
        placeholder = "|".join(f"`{each}`" for each in kind.choices)
    else:
        placeholder = _value(option.metavar or "VALUE")
    return f"`{option.opts[0]}` {placeholder}"


def _explain(page: Page, command: click.Command) -> None:
    """Its help: paragraphs, of which those with a backspace keep their lines."""
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith("\b\n"):
            page.example(re.sub("(?m)^Example:  ", "", paragraph.removeprefix("\b\n")))
        else:
            page.text(_marked(" ".join(paragraph.split())))
    for each in command.params:
        if isinstance(each, click.Option) and not isinstance(each, Shared):
            page.item(_named(each), _marked(each.help or ""))


def _marked(text: str) -> str:
    # What is code in the help already stays so.
    pieces = re.split(r"(`[^`]+`)", text)
    marked = [each if each[:1] == "`" else _CODE.sub(r"`\1`", each) for each in pieces]
    return re.sub(r"\b(FILE|KEY|VALUE|SERVER)\b", r"*\1*", "".join(marked))
