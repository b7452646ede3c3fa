"""The manual pages: they are what the table of settings and the help say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from relayd.configuring.address_settings import ALL, RELAYD, SOCKS4
from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.configuring.server_options import TYPES
from relayd.ctl.commands import COMMANDS, relayctl
from relayd.ctl.exits import Exit
from relayd.ctl.manual import pages, write
from relayd.ctl.manual_of_file import EXAMPLE, OF_A_SERVER
from relayd.ctl.manual_of_service import EXAMPLES
from relayd.ctl.roff import Page, line
from relayd.ctl.texts import explained
from relayd.tap import relayd, socks4

MAN = Path(__file__).parents[2] / "man"

PAGES = {page.file: str(page) for page in pages()}


def words(page: str) -> str:
    """What a page says, without its roff."""
    text = re.sub(r"^\.[A-Z]+ ?", "", PAGES[page], flags=re.MULTILINE)
    text = re.sub(r"\\f[BIR]|\\&", "", text)
    for roff, said in (
        *((r"\-", "-"), (r"\(aq", "'"), (r"\(ti", "~"), (r"\(ga", "`")),
        *((r"\(ha", "^"), (r"\e", "\\")),
    ):
        text = text.replace(roff, said)
    return text


@pytest.mark.parametrize("name", PAGES)
def test_it_is_what_would_be_made_now(name: str) -> None:
    """Or else: `make man`."""
    assert (MAN / name).read_text() == PAGES[name]


def test_no_other_pages_are_kept(tmp_path: Path) -> None:
    assert {each.name for each in MAN.iterdir()} == set(PAGES)
    write(tmp_path / "new")
    assert {each.name for each in (tmp_path / "new").iterdir()} == set(PAGES)


def test_every_option_of_a_server_is_in_the_manual_of_the_file() -> None:
    """As behind an address, and as a key of a table."""
    assert OF_A_SERVER.keys() == TYPES.keys()
    _, _, text = words("relayd.toml.5").partition("\nSERVERS\n")
    for name in TYPES:
        assert re.search(rf"^{name}$", text, re.MULTILINE), name


def test_every_option_is_in_the_manual_of_the_service() -> None:
    text = words("relayd.8")
    own, _, socks = text.partition("OPTIONS OF SOCKS4")
    for row in RELAYD:
        assert re.search(rf"^(-\w, )?--{row.option}\b", own, re.MULTILINE), row.option
        assert row.option_help in own
    for row in SOCKS4:
        assert re.search(rf"(^|[ ,])--{row.option}\b", socks, re.MULTILINE), row.option
        assert row.option_help in text


def test_every_key_is_in_the_manual_of_the_file() -> None:
    text = words("relayd.toml.5")
    for row in ALL:
        if row.key:
            assert re.search(rf"^{row.key}\b", text, re.MULTILINE), row.key
            assert (
                re.search(rf"^{row.key}_file\b", text, re.MULTILINE) or not row.secret
            )
            if row.word != "deny":
                assert explained(row) in text


def test_every_command_and_code_is_in_the_manual_of_relayctl() -> None:
    text = words("relayctl.1")
    context = click.Context(relayctl)
    for name in COMMANDS:
        assert text.count(f"relayctl {name}") >= 2
        command = relayctl.get_command(context, name)
        assert command is not None
        for option in command.params:
            assert option.opts[0] in text or option.human_readable_name in text
    for code in Exit:
        assert re.search(rf"^{code.value}$", text, re.MULTILINE)


def test_the_examples_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "relayd.toml"
    path.write_text(EXAMPLE)
    assert len(configure(read_layers(str(path))).relays) == 3
    assert EXAMPLE in words("relayd.toml.5")
    for _, example in EXAMPLES:
        command, *options = shlex.split(example.partition("--pidfile= ")[2])
        if "--config" not in options:
            plugin = relayd if command == "relayd" else socks4
            plugin.Options().parseOptions(options)


def test_text_is_no_request() -> None:
    r"""A line that begins with a dot is text, and a backslash is one."""
    assert line(".SH x") == r"\&.SH x"
    assert line("'x") == r"\&'x"
    assert line(r"a \n") == r"a \en"
    assert line("`--a-b` *FILE*") == r"\fB\-\-a\-b\fR \fIFILE\fR"
    page = Page("x", 1, "y")
    page.example(".a\n'b")
    assert str(page).endswith(".EX\n\\&.a\n\\(aqb\n.EE\n.RE\n")
