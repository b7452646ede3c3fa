"""How answers are shown: on a terminal, elsewhere, once and again and again."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from relayd.ctl import tables, views
from relayd.ctl.exits import Exit
from relayd.ctl.main import main
from tests.support.control import FakeRelayd, cells, raw_server, run
from tests.support.control_answers import FLOW, RELAY, SERVER, SESSION, STATUS

Captured = pytest.CaptureFixture[str]

VIEWS = [
    *(views.status, views.relays, views.relay, views.sessions, views.flows),
    *(views.nat, views.servers, views.limits, views.diff, views.explained),
    views.levels,
]
LINE_VIEWS = [
    *(views.reloaded, views.confirmed, views.changed_relay, views.changed_server),
    views.killed,
]
ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["at", "ok", "why", "value"]), inner)
    ),
    max_leaves=6,
)
ROW_KEYS = sorted({*RELAY, *SERVER, *SESSION, *FLOW, *STATUS, "limit", "now", "hits"})
ROWS = st.lists(ODD | st.dictionaries(st.sampled_from(ROW_KEYS), ODD), max_size=3)
LISTS = ["relays", "sessions", "flows", "entries", "servers", "limits", "changes"]
ANSWERS = st.dictionaries(
    st.sampled_from([*ROW_KEYS, *LISTS, "settings", "levels", "steps", "admitted"]),
    ODD | ROWS,
)


@given(ANSWERS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
def test_no_answer_breaks_a_table(answer: dict[str, Any]) -> None:
    """And none has what a terminal would act on."""
    lines = [view(answer) for view in LINE_VIEWS]
    for view in VIEWS:
        for each in view(answer):
            if isinstance(each, str):
                lines.append(each)
            else:
                lines += tables.lines_of(each)
                tables.rich_table(each, 80)
    assert all(each.isprintable() for line in lines for each in line.split("\n"))


def test_a_terminal_has_tables(
    relayd: FakeRelayd, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    answer = {"servers": [SERVER]}
    run(relayd, "GET /v1/servers", answer, "servers")
    said = capsys.readouterr().out
    assert "\x1b[31mdown" in said
    assert "─" in said
    monkeypatch.setenv("NO_COLOR", "1")
    run(relayd, "GET /v1/servers", answer, "servers")
    assert "\x1b[31m" not in capsys.readouterr().out


@pytest.mark.parametrize("width", [40, 80, 95, 110, 200])
def test_a_terminal_that_is_narrow_goes_without_some_columns(
    relayd: FakeRelayd, capsys: Captured, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """An address stands on one line, whatever the width."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    run(relayd, "GET /v1/sessions", {"sessions": [SESSION, SESSION]}, "sessions")
    said = capsys.readouterr()
    lines = click.unstyle(said.out).splitlines()
    assert [cells(line)[:4] for line in lines[-3:-1]] == [
        ["17", "web", "10.0.0.9:4000", "10.0.0.5:80"]
    ] * 2
    assert width < 80 or max(map(len, lines)) <= width
    left = {
        40: "stage, idle, rate, tries, older, filters",
        80: "stage, idle, tries, older, filters",
        95: "tries, older, filters",
        110: "filters",
    }
    if left.get(width):
        assert (
            said.err == f"Left out, for want of room: {left[width]}; --json has all\n"
        )
    else:
        assert said.err == ""


def test_words_fold_and_the_longest_are_torn() -> None:
    rows = [{"key": "dest", "value": "x " * 30 + "y" * 500, "source": "run time"}]
    table = tables.Table(views._SETTINGS, rows)
    console = Console(width=60, file=io.StringIO())
    console.print(tables.rich_table(table, 60))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) == 60
    assert sum(line.count("y") for line in lines) == 500


def watched(relayd: FakeRelayd, times: int) -> None:
    """Answers, and says Ctrl-C at the next question; there is none after that."""
    left = iter(range(times + 1))

    def answer() -> tuple[int, Any]:
        number = next(left, None)
        if number == times:
            os.kill(os.getpid(), signal.SIGINT)
        return (404 if number is None else 200), {"servers": [SERVER]}

    relayd.answers["GET /v1/servers"] = answer


def test_watching(
    relayd: FakeRelayd, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(tables, "_wait", waited.append)
    watched(relayd, 3)
    assert main(["servers", "--watch"]) == Exit.INTERRUPTED
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[:2] == lines[2:4] == lines[4:]
    watched(relayd, 2)
    assert main(["servers", "--watch", "5", "--json"]) == Exit.INTERRUPTED
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line) for line in lines] == [{"servers": [SERVER]}] * 2
    assert waited == [2.0] * 3 + [5.0] * 2


def test_watching_on_a_terminal(
    relayd: FakeRelayd, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(tables, "_wait", lambda _: None)
    watched(relayd, 3)
    assert main(["servers", "--watch=1"]) == Exit.INTERRUPTED
    said = capsys.readouterr().out
    # The other screen, and back.
    assert said.count("\x1b[?1049h") == said.count("\x1b[?1049l") == 1
    assert said.count("10.0.0.5:80") == 3


def test_watching_ends_when_relayd_does(
    relayd: FakeRelayd, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_wait", lambda _: relayd.answers.clear())
    relayd.answers["GET /v1/limits"] = (200, {})
    assert main(["limits", "--watch"]) == Exit.NOT_FOUND
    assert capsys.readouterr().err == "no GET /v1/limits\n"


def test_what_is_below_the_end_of_the_screen_is_not_drawn(
    relayd: FakeRelayd, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LINES", "10")
    monkeypatch.setattr(tables, "_wait", lambda _: signal.raise_signal(signal.SIGINT))
    drawn: list[int] = []
    really = tables.rich_table

    def counted(table: tables.Table, width: int) -> Any:
        drawn.append(len(table.rows))
        return really(table, width)

    monkeypatch.setattr(tables, "rich_table", counted)
    relayd.answers["GET /v1/sessions"] = (200, {"sessions": [SESSION] * 50})
    assert main(["sessions", "--watch"]) == Exit.INTERRUPTED
    assert drawn == [10]
    assert capsys.readouterr().out.count("10.0.0.5:80") <= 10


def test_a_long_table_is_lines_on_a_terminal_too(
    relayd: FakeRelayd, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(tables, "_DRAWN", 2)
    run(relayd, "GET /v1/sessions", {"sessions": [SESSION] * 3}, "sessions")
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 4
    assert "\x1b" not in said.out
    assert said.err == ""


PROGRAM = "import sys; from relayd.ctl.main import main; sys.exit(main())"


def test_ctrl_c_while_it_waits(relayd: FakeRelayd) -> None:
    relayd.answers["GET /v1/servers"] = (200, {"servers": [SERVER]})
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "servers", "--json", "--watch", "1h"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as watching:
        assert watching.stdout is not None
        # What was printed is there at once, though it is no terminal.
        assert json.loads(watching.stdout.readline()) == {"servers": [SERVER]}
        watching.send_signal(signal.SIGINT)
        _, said = watching.communicate()
    assert watching.returncode == Exit.INTERRUPTED
    assert said.strip() == b""


def test_ctrl_c_while_relayd_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c"
    asked = threading.Event()
    with raw_server(path, hold=True, asked=asked):
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "servers", "--control", str(path)],
            stderr=subprocess.PIPE,
        ) as asking:
            asked.wait()
            asking.send_signal(signal.SIGINT)
            _, said = asking.communicate()
    assert asking.returncode == Exit.INTERRUPTED
    assert said.strip() == b""


def test_a_reader_that_leaves(relayd: FakeRelayd) -> None:
    relayd.answers["GET /v1/servers"] = (200, {"servers": [SERVER] * 10_000})
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "servers", "--watch", "0.001"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline().startswith(b"RELAY ")
        watching.stdout.close()
        assert watching.stderr is not None
        said = watching.stderr.read()
    assert (watching.returncode, said) == (Exit.FAILED, b"")
