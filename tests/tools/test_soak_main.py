"""The soak's command line."""

from __future__ import annotations

import pytest

from soak.__main__ import parse_arguments


def test_the_defaults_are_those_of_the_long_soak() -> None:
    options = parse_arguments([])
    assert (options.minutes, options.connections) == (10, 2000)
    assert (options.transport, options.reactor, options.seed) == ("both", "epoll", None)
    assert (options.flows, options.stop, options.step) == (200, 10, 3)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--minutes", "0"],
        ["--minutes", "nan"],
        ["--minutes", "x"],
        ["--connections", "0"],
        ["--flows", "-1"],
        ["--stop", "16"],
        ["--stop", "-1"],
        ["--step", "nan"],
        ["--transport", "pigeon"],
    ],
)
def test_bad_arguments(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(arguments)
    assert arguments[0] in capsys.readouterr().err
