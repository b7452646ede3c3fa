"""The kernel module's gateway: the file, and the page that says what became of it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from relayd.configuring.config import Relay, UdpRelay
from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.ctl.commands import relayctl

ROOT = Path(__file__).parents[2]
FILE = ROOT / "contrib" / "krelay.toml"
PAGE = (ROOT / "docs" / "krelay.md").read_text()


def test_its_defaults_are_the_modules() -> None:
    config = configure(read_layers(str(FILE)))
    assert config.control is not None
    kinds = {each.name: type(each) for each in config.relays}
    assert kinds == {"krelay": Relay, "krelay-udp": UdpRelay}
    for relay in config.relays:
        assert not relay.enabled
        assert isinstance(relay, Relay | UdpRelay)
        [listen] = relay.listeners
        [server] = relay.destinations
        assert str(listen).rpartition(":")[2] == "16000"
        assert str(server).removeprefix("udp:") == "192.168.0.10:original"
        # The server sees the client.
        assert relay.dialing.transparent
    # As long as it runs.
    assert config.manage_netfilter


def test_relayctl_has_nothing_against_it() -> None:
    done = CliRunner().invoke(relayctl, ["check", str(FILE)])
    assert done.exit_code == 0, done.output
    assert "2 relays, no problems" in done.output


COMMANDS = sorted(set(re.findall(r"`relayctl ([^`]+)`", PAGE)))


@pytest.mark.parametrize("line", COMMANDS)
def test_each_command_of_the_page_is_one(line: str) -> None:
    """Its options and the number of its arguments are right."""
    name, *args = shlex.split(line)
    command = relayctl.get_command(click.Context(relayctl), name)
    assert command is not None, line
    command.make_context(name, args)


def test_the_page_says_all_of_the_modules_settings() -> None:
    for each in ("gport", "real_ip", "/sys/module/krelay/parameters/start"):
        assert each in PAGE
    assert "getsockopt" in PAGE
