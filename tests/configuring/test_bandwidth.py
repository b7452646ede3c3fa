"""Bandwidth as it is given: on a command line, in a file, and written back."""

from __future__ import annotations

from pathlib import Path

import pytest

from relayd.admission.rates import EXPECTED_RATES, Rates
from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.configuring.written import as_toml
from relayd.core.errors import CannotStart
from relayd.tap import relayd, socks4
from tests.support.files import RELAY, config_of, problems

OPTIONS = ("bandwidth", "bandwidth-per-client", "bandwidth-per-session")

FILE = """
[defaults]
bandwidth = 1000

[tcp.a]
listen = "1"
dest = "2"
bandwidth_per_client = "up=1Mbit"
bandwidth_per_session = { up = 5, down = "1kB" }

[udp.b]
listen = "1"
dest = "2"
bandwidth = "512KiB"

[socks4.c]
"""


def test_a_file(tmp_path: Path) -> None:
    config = config_of(tmp_path / "relayd.toml", FILE)
    tcp, udp, socks = (each.admission for each in config.relays)
    assert tcp.bandwidth == socks.bandwidth == Rates(1000, 1000)
    assert tcp.bandwidth_per_client == Rates(125_000, None)
    assert tcp.bandwidth_per_session == Rates(5, 1000)
    assert udp.bandwidth == Rates(524_288, 524_288)
    assert udp.bandwidth_per_session is None


def test_it_is_written_as_it_was_given(tmp_path: Path) -> None:
    path, again = tmp_path / "relayd.toml", tmp_path / "again.toml"
    path.write_text(FILE)
    layers = read_layers(str(path))
    again.write_text(as_toml(layers))
    assert configure(read_layers(str(again))) == configure(layers)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("text", ["0", "-1", "fast", "up=0", "up=1,up=2", "1Mb/s"])
def test_a_bad_option_is_one_line(option: str, text: str) -> None:
    for command, words in (
        (relayd.Options(), ("-l", "8080", "-d", "80")),
        (relayd.Options(), ("-l", "udp:53", "-d", "udp:54")),
        (socks4.Options(), ()),
    ):
        with pytest.raises(CannotStart) as caught:
            command.parseOptions([*words, f"--{option}={text}"])
        line = str(caught.value).partition(": ")[2]
        assert line == f"bad --{option} {text!r}: expected {EXPECTED_RATES}"


@pytest.mark.parametrize(
    ("value", "shown"),
    [("0", "0"), ("true", "true"), ('"1 Mb"', "'1 Mb'"), ("{ left = 1 }", "a table")],
)
def test_a_bad_value_of_a_file(tmp_path: Path, value: str, shown: str) -> None:
    assert problems(
        tmp_path / "relayd.toml", f"[tcp.web]\n{RELAY}bandwidth = {value}\n"
    ) == [f"tcp.web.bandwidth: found {shown}, expected {EXPECTED_RATES}"]
