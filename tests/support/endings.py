"""Processes that end by themselves: what they say, under `twistd` and `twist`."""

from __future__ import annotations

import pytest

from tests.support.process import START, TWIST, TWISTD, RelayProcess

#: The two runners, each writing its log as text and no file at all.
RUNNERS = {
    "twistd": (TWISTD, "-n", "--pidfile="),
    "twist": (TWIST, "--log-format=text"),
}


runners = pytest.mark.parametrize("runner", RUNNERS.values(), ids=RUNNERS.keys())


def ending(process: RelayProcess) -> tuple[int, list[str]]:
    """The exit status of a process that ends by itself, and what it wrote."""
    try:
        return process.wait(START), process.lines
    finally:
        process.stop()


def one_line(lines: list[str]) -> str:
    """What the process says for itself, without what is said of its start."""
    assert not [line for line in lines if "Traceback" in line]
    # The last is how Twisted's own ports say that they open and close.
    others = ("UnixAppLogger", "listening on", " [-] ")
    said = [line for line in lines if not any(other in line for other in others)]
    assert len(said) == 1, "\n".join(lines)
    return said[0]
