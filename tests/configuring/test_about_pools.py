"""Settings of pools that do nothing alone are told in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from relayd.configuring.configure import configure
from relayd.configuring.file import read_layers
from relayd.tap import relayd
from tests.configuring.test_about_clients import TCP, in_file, refusal


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (
            ("--client-prefix", "24,56", "--balance", "least-sessions"),
            (
                "--client-prefix '24,56' does nothing alone: give"
                " --max-sessions-per-client or --max-connects-per-client or"
                " --bandwidth-per-client or --balance client-hash, too"
            ),
        ),
        *(
            (
                (f"--{name}", value),
                f"--{name} {value!r} does nothing alone: give --check, too",
            )
            for name, value in (
                *(("rise", "5"), ("fall", "5")),
                *(("check-every", "9"), ("check-timeout", "9")),
            )
        ),
        (
            ("--on-down", "cut"),
            "--on-down 'cut' does nothing alone: give --check or --control, too",
        ),
    ],
)
def test_what_is_refused(words: tuple[str, ...], why: str) -> None:
    assert refusal(*TCP, *words) == why


@pytest.mark.parametrize(
    "words",
    [
        ("--client-prefix", "24,56", "--balance", "client-hash"),
        ("--on-down", "cut", "--check", "tcp"),
        ("--on-down", "cut", "-d", "10.0.0.6:80,check=tcp"),
        ("--on-down", "cut", "--control", "unix:/run/relayd.sock"),
        ("--on-down", "keep", "--rise", "2"),
    ],
)
def test_what_is_not(words: tuple[str, ...]) -> None:
    relayd.Options().parseOptions([*TCP, *words])


@pytest.mark.parametrize("udp", ["", "udp:"])
def test_of_connections_and_of_datagrams(udp: str) -> None:
    options = relayd.Options()
    args = f"-l {udp}1 -d {udp}2 --check python:json:loads --on-down cut"
    options.parseOptions([*args.split(), "--when-none", "wait=1.5m"])
    [one] = options.config.relays
    pool: Any = one
    assert pool.pool.on_down == "cut"
    assert (pool.pool.when_none.what, pool.pool.when_none.limit) == ("wait", 90.0)


def test_in_a_file(tmp_path: Path) -> None:
    table = '[tcp.a]\nlisten="1"\ndest="2"\n'
    assert in_file(tmp_path, f"{table}rise=5").endswith(
        "does nothing alone: give check, too"
    )
    # A program that embeds its relays may say how a server is.
    (tmp_path / "f.toml").write_text(f'{table}on_down="cut"')
    [relay] = configure(read_layers(str(tmp_path / "f.toml"))).relays
    assert relay.pool.on_down == "cut"  # type: ignore[union-attr]
