"""The benchmark's command line."""

from __future__ import annotations

import pytest

from bench import __main__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--workload", "bulk"],
            "argument --workload: 'bulk' is no workload; there are bulk-1, ",
        ),
        (["--only", "nginx,"], "argument --only: '' is no relay; there are relayd-"),
        (["--rounds", "0"], "argument --rounds: '0' is not a number from 1 to 100"),
        (["--seconds", "x"], "argument --seconds: 'x' is not a number from 0.5 to 60"),
        (["--seconds", "nan"], "'nan' is not a number from 0.5 to 60"),
        (["check", "--only", "nginx"], "check takes neither --only nor --workload"),
        (["quick", "--output", "x"], "quick writes no files: --output is for full"),
        (["slow"], "argument mode: invalid choice: 'slow'"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        __main__.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_nothing_to_measure_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["quick", "--workload", "memory", "--only", "socat"]) == 1
    told = capsys.readouterr().err
    assert told == (
        "bench: none of these relays is measured at any of these workloads\n"
    )
