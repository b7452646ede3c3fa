"""The operator's page: its commands, run in their order, print what it shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ports import free_port

PAGE = (Path(__file__).parents[2] / "docs" / "operating.md").read_text()

#: The ports that it shows.
PORTS = ("8080", "8000", "5300", "5301", "1080", "9100")

#: The longest that the whole of it may take, in seconds.
PATIENCE = 60

#: Stands between the outputs of two commands.
MARK = "-- next --"


def blocks(kind: str) -> list[str]:
    """The blocks of a kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """Each command, and what it prints."""
    found: list[tuple[str, str]] = []
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output))
    return found


def pattern(output: str) -> re.Pattern[str]:
    """What is shown, in which `...` stands for anything within a line, or for lines."""
    lines = [
        r"(?:.*\n)*?"
        if line == "..."
        else re.escape(line).replace(r"\.\.\.", ".*") + "\n"
        for line in output.splitlines()
    ]
    return re.compile("".join(lines))


@pytest.mark.system
def test_the_page_is_true(tmp_path: Path) -> None:
    there = {port: str(free_port()) for port in PORTS}

    def moved(text: str) -> str:
        return re.sub(rf"\b({'|'.join(PORTS)})\b", lambda m: there[m[1]], text)

    def typed(command: str) -> str:
        # A session is logged once both have closed, which curl does not wait for.
        before = "sleep 0.5; " if command.startswith("grep session=") else ""
        return before + moved(command)

    (tmp_path / "relayd.toml").write_text(moved(blocks("toml")[0]))
    shown = commands()
    assert len(shown) > 12
    script = tmp_path / "commands"
    # With job control, as in a terminal: %1, %2.
    script.write_text(
        "set -m\n"
        + "".join(f"{typed(command)}\necho '{MARK}'\n" for command, _ in shown)
    )
    bin_ = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", str(script)],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{bin_}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    parts = done.stdout.split(f"{MARK}\n")
    log = tmp_path / "relayd.log"
    assert len(parts) == len(shown) + 1, done.stdout
    for (command, output), printed in zip(shown, parts, strict=False):
        # What bash says of its jobs is its own.
        said = re.sub(r"^\[\d\].*\n", "", printed, flags=re.MULTILINE)
        assert pattern(moved(output)).fullmatch(said), (
            f"{command}\n{said}\n{log.read_text() if log.exists() else ''}"
        )


def test_all_blocks_are_read() -> None:
    assert len(blocks("toml")) == 1
    assert PAGE.count("\n```") == 2 * sum(
        len(blocks(kind)) for kind in ("toml", "console", "yaml")
    )
