"""relayctl(1), made from the commands' help."""

from __future__ import annotations

import inspect
import re

import click

from relayd.ctl.commands import COMMANDS, relayctl
from relayd.ctl.exits import MEANING
from relayd.ctl.roff import Page

#: Options, names of files and commands, in the text of a help.
_CODE = re.compile(
    r"(?<![\w-])(--[a-z-]+|relayctl [a-z]+[^.,:;]*?\.toml|userid_file)\b"
)


def relayctl_page() -> Page:
    page = Page("relayctl", 1, "check, show and write configuration files of relayd")
    context = click.Context(relayctl, info_name="relayctl")
    commands = [relayctl.get_command(context, name) for name in COMMANDS]
    found = [each for each in commands if each is not None]
    page.section("Synopsis")
    for each in found:
        page.text(_usage(each))
    page.section("Description")
    page.text(
        "`relayctl` works with the configuration files of relayd, relayd.toml(5). It"
        " starts nothing, opens no listener, and connects to nobody.",
        "Data goes to standard output, messages to standard error.",
    )
    page.section("Commands")
    for each in found:
        page.heading(_usage(each))
        _explain(page, each)
    page.section("Options")
    page.item("`-h`, `--help`", "Show the help, of `relayctl` or of a command.")
    page.item("`-V`, `--version`", "Show the version.")
    page.section("Exit status")
    page.items((f"`{code.value}`", text) for code, text in MEANING.items())
    page.section("Environment")
    page.item("`NO_COLOR`", "If it is set, there are no colours.")
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
    page.section("See also")
    page.text("relayd(8), relayd.toml(5)")
    return page


def _usage(command: click.Command) -> str:
    words = [f"`relayctl {command.name}`"]
    for each in command.params:
        if isinstance(each, click.Option):
            words.append(f"[`{each.opts[0]}`]")
        elif isinstance(each.type, click.Choice):
            words.append("|".join(f"`{one}`" for one in each.type.choices))
        else:
            words.append(f"*{each.human_readable_name}*")
    return " ".join(words)


def _explain(page: Page, command: click.Command) -> None:
    """Its help: paragraphs, of which those with a backspace keep their lines."""
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith("\b\n"):
            page.example(paragraph.removeprefix("\b\n"))
        else:
            page.text(_marked(" ".join(paragraph.split())))
    for each in command.params:
        if isinstance(each, click.Option):
            page.item(f"`{each.opts[0]}`", _marked(each.help or ""))


def _marked(text: str) -> str:
    # What is code in the help already stays so.
    pieces = re.split(r"(`[^`]+`)", text)
    marked = [each if each[:1] == "`" else _CODE.sub(r"`\1`", each) for each in pieces]
    return re.sub(r"\bFILE\b", "*FILE*", "".join(marked))
