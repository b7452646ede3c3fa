"""The UDP load: what its program prints, and what counts as an error."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.children import CannotMeasure
from bench.datagrams import (
    Moved,
    bursts_in_turn,
    delivered,
    new_flows,
    read_moved,
    round_trips,
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the datagrams' counts are unreadable: ''"),
        ("7 seven 1.0\n", "the datagrams' counts are unreadable: '7 seven 1.0"),
        ("32 0 0.5\n", "no datagram came back"),
    ],
)
def test_unreadable_counts_of_datagrams_are_errors(text: str, message: str) -> None:
    with pytest.raises(CannotMeasure, match=re.escape(message)):
        read_moved(text)


def test_counts_of_datagrams_are_read() -> None:
    assert read_moved("1000 999 0.400012\n") == Moved(1000, 999, 0.400012)


@contextmanager
def instead_of_datagrams(
    script: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """A shell script instead of the compiled program."""
    program = folder / "datagrams"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setattr("bench.datagrams.built", lambda: str(program))
        yield


def test_round_trips_begin_when_they_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read before them counts nothing of them; and they can be repeated."""
    script = f"""\
echo ready
while read -r line; do echo >> "{tmp_path}/loaded"; echo 320 $5 1.0; done"""
    with instead_of_datagrams(script, tmp_path, monkeypatch):
        with round_trips(20000, 1, 320, 1.0) as load:
            time.sleep(0.1)
            assert not (tmp_path / "loaded").exists()
            for number in (1, 2):
                assert load() == 320
                assert (tmp_path / "loaded").stat().st_size == number


def test_new_flows_are_as_many_each_time_and_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = """\
[ "$1 $3 $4" = "new 20000 500" ] || exit 1
echo ready
read -r line; echo 500 500 1.0
read -r line; echo 500 499 1.0"""
    with instead_of_datagrams(script, tmp_path, monkeypatch):
        with new_flows(20000, 500) as load:
            assert load() == 500
            with pytest.raises(CannotMeasure, match="1 datagrams were lost of 0 under"):
                load()


def test_a_load_of_datagrams_that_ends_early_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "echo ready; exec 0<&-; echo it broke >&2; exit 1"
    with instead_of_datagrams(script, tmp_path, monkeypatch):
        with round_trips(20000, 1, 320, 1.0) as load:
            time.sleep(0.1)
            with pytest.raises(CannotMeasure, match="ended with status 1: it broke"):
                load()


def test_with_bursts_in_turn_only_some_flows_have_one_pending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of these may be lost."""
    for lost in (20, 21):
        script = (
            'echo ready; read -r line; [ "$1 $4 $5 $6" = "turns 5000 50 4" ] || exit 1'
        )
        script += f"; echo 9000 {9000 - lost} 1.0"
        with instead_of_datagrams(script, tmp_path, monkeypatch):
            with bursts_in_turn(20000, 5000, 1.0) as load:
                if lost == 20:
                    assert load() == 8980
                    continue
                with pytest.raises(CannotMeasure, match="21 datagrams .* of 200 under"):
                    load()


def test_many_lost_round_trips_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a tenth of what is under way, it is another load."""
    for lost, fails in ((10, False), (11, True)):
        script = f"echo ready; read -r line; echo 1000 {1000 - lost} 1.0"
        with instead_of_datagrams(script, tmp_path, monkeypatch):
            with round_trips(20000, 50, 2, 1.0) as load:
                if not fails:
                    assert load() == 990
                    continue
                with pytest.raises(
                    CannotMeasure, match="11 datagrams were lost of 100 under way"
                ):
                    load()


def test_a_flow_that_is_not_answered_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "echo 3 of 5 flows were answered >&2; exit 1"
    with instead_of_datagrams(script, tmp_path, monkeypatch):
        with pytest.raises(CannotMeasure, match="status 1: 3 of 5 flows were answered"):
            with round_trips(20000, 5, 1, 1.0):
                pass


def test_delivered_is_a_percentage_of_what_was_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with instead_of_datagrams("echo 10000 9990 1.0", tmp_path, monkeypatch):
        assert delivered(20000, 1.0) == pytest.approx(99.9)


def test_datagrams_that_were_not_sent_in_time_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with instead_of_datagrams("echo 10000 9990 1.26", tmp_path, monkeypatch):
        with pytest.raises(
            CannotMeasure, match="10000 datagrams were sent in 1.26 s, not 1.0"
        ):
            delivered(20000, 1.0)
