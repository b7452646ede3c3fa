"""Who may read the metrics: other machines, only if that is meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from relayd.configuring.address_grammar import parse_listener
from relayd.configuring.config import Config
from relayd.core.errors import CannotStart
from relayd.tap.relayd import Options
from tests.support.files import RELAY, config_of, problems


def configured(*words: str) -> Config:
    """The settings of a command line."""
    options = Options()
    options.parseOptions(["-l", "1", "-d", "2", *words])
    return options.config


def refusal(*words: str) -> str:
    """What is wrong with one."""
    with pytest.raises(CannotStart) as caught:
        configured(*words)
    return str(caught.value).removeprefix("relayd: ")


@pytest.mark.parametrize(
    "where",
    ["127.0.0.1:9100", "[::1]:9100", "localhost:9100", "unix:/run/m", "127.1.2.3:3"],
)
def test_metrics_that_only_this_machine_can_read(where: str) -> None:
    made = configured("--metrics", where)
    assert made.metrics == parse_listener(where)
    assert not made.metrics_open


@pytest.mark.parametrize(
    "where", ["9100", ":9100", "0.0.0.0:9100", "[::]:9100", "10.0.0.1:9100", "tcp:9100"]
)
def test_metrics_that_others_can_read_must_be_meant(where: str) -> None:
    """How much is relayed, and to whom, is not for everybody."""
    assert refusal("--metrics", where) == (
        f"--metrics {where!r} can be reached by other machines: give an address of"
        " loopback such as 127.0.0.1:9100, or unix:PATH, or add --metrics-open"
    )
    assert configured("--metrics", where, "--metrics-open").metrics_open


def test_the_same_in_a_file(tmp_path: Path) -> None:
    file, relay = tmp_path / "relayd.toml", f"[tcp.web]\n{RELAY}"
    [problem] = problems(file, f'metrics = "0.0.0.0:9100"\n{relay}')
    assert problem == (
        "metrics: metrics = '0.0.0.0:9100' can be reached by other machines: give an"
        " address of loopback such as 127.0.0.1:9100, or unix:PATH, or add"
        " metrics_open = true"
    )
    opened = config_of(file, f'metrics = "[::]:1"\nmetrics_open = true\n{relay}')
    assert opened.metrics_open


def test_metrics_are_not_for_datagrams() -> None:
    assert refusal("--metrics", "udp:9100") == (
        "bad --metrics 'udp:9100': HTTP is not for datagrams"
    )
