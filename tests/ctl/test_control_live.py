"""relayctl and the control socket's own site: what one says, the other understands.

The site is real and listens; what it steers is a stand-in.  The commands run in a
thread, as they block.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.threads import deferToThread

from relayd.control.peers import Rights
from relayd.control.site import ControlSite
from relayd.ctl.exits import Exit
from relayd.ctl.main import main
from relayd.ctl.places import VARIABLE
from relayd.net.monotonic import monotonic
from tests.control.fake_steering import FakeSteering

Captured = pytest.CaptureFixture[str]

#: Each command that asks, with all that it can be given, and what is then asked for:
#: its name, and its values, but for who asks.
CHANGES: list[tuple[list[str], tuple[Any, ...]]] = [
    (["start", "dns"], ("start", "dns")),
    (["stop", "web"], ("stop", "web", False)),
    (["stop", "web", "--cut"], ("stop", "web", True)),
    (["drain", "web"], ("drain", "web", None)),
    (["drain", "web", "--within", "1m"], ("drain", "web", 60.0)),
    (["pause", "web"], ("pause", "web", None)),
    (["pause", "web", "--for", "1.5"], ("pause", "web", 1.5)),
    (["resume", "web"], ("resume", "web")),
    (
        ["set", "web", "dest=a:1", "dest=b:2", "max_sessions=", "half_close=off"],
        (
            *("set", "web"),
            {"dest": ["a:1", "b:2"], "max_sessions": None, "half_close": False},
        ),
    ),
    (
        ["server", "web/db/1", "drain", "--within", "5"],
        ("set_server", "web", "db/1", "drain", None, 5.0),
    ),
    (["server", "web/db/1", "up"], ("set_server", "web", "db/1", "up", None, None)),
    (["server", "web/db/1", "auto"], ("set_server", "web", "db/1", "auto", None, None)),
    (
        ["server", "web/db/1", "weight=3"],
        ("set_server", "web", "db/1", None, 3, None),
    ),
    (["drain", "web/db/1"], ("set_server", "web", "db/1", "drain", None, None)),
    (["kill", "1", "2"], ("kill", "", [1, 2], None, None, None)),
    (
        ["kill", "--client", "10.0.0.0/8", "--server", "a", "--relay", "web"],
        ("kill", "", None, "10.0.0.0/8", "a", "web"),
    ),
    (["reload"], ("reload", "", False, None)),
    (["reload", "--discard", "--confirm", "1m"], ("reload", "", True, 60.0)),
    (["confirm"], ("confirm", "")),
    (
        ["log", "level", "relayd.udp", "debug"],
        ("set_log_level", "", "relayd.udp", "debug"),
    ),
]

QUESTIONS = [
    *(["status"], ["relays"], ["relays", "web"], ["servers", "--relay", "web"]),
    *(["servers"], ["limits"], ["diff"], ["save"], ["log", "levels"]),
    *(
        [each, "--relay", "web", "--limit", "2"]
        for each in ("sessions", "flows", "nat")
    ),
    *([each, "--client", "10.0.0.0/8"] for each in ("sessions", "flows", "nat")),
    *([each, "--server", "a", "--sort", "age"] for each in ("sessions", "flows")),
    ["filter", "list", "web"],
    ["explain", "--relay", "web", "--client", "10.0.0.1", "--at", "2026-12-24T03:00"],
]


@pytest.fixture
def steering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSteering]:
    path = str(tmp_path / "control.sock")
    monkeypatch.setenv(VARIABLE, path)
    live: Any = reactor
    made = FakeSteering()
    site = ControlSite(made, monotonic(live), Rights())
    port = live.listenUNIX(path, site)
    yield made
    pytest_twisted.blockon(port.stopListening())


@pytest_twisted.ensureDeferred
async def test_every_change_is_understood(
    steering: FakeSteering, capsys: Captured
) -> None:
    steering.waits = True
    for words, asked in CHANGES:
        assert await deferToThread(main, words) == Exit.DONE, capsys.readouterr()
        *said, _ = steering.calls[-1]
        assert tuple(said) == asked
        said_out = capsys.readouterr()
        assert said_out.out
        assert said_out.err == ""
        if words[0] != "confirm":
            assert await deferToThread(main, [*words, "--json"]) == Exit.DONE
            assert isinstance(json.loads(capsys.readouterr().out), dict)


@pytest_twisted.ensureDeferred
async def test_every_question_is_understood(
    steering: FakeSteering, capsys: Captured
) -> None:
    for words in QUESTIONS:
        assert await deferToThread(main, words) == Exit.DONE, capsys.readouterr()
        capsys.readouterr()
        assert await deferToThread(main, [*words, "--json"]) == Exit.DONE
        assert isinstance(json.loads(capsys.readouterr().out), dict)
    assert steering.calls == []


@pytest_twisted.ensureDeferred
async def test_many_are_listed(steering: FakeSteering, capsys: Captured) -> None:
    steering.count = 5000
    assert await deferToThread(main, ["sessions", "--limit", "4000"]) == Exit.DONE
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 4001
    assert said.err == "4000 of 5000 sessions that match; --limit lists more\n"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["start", "none"], Exit.NOT_FOUND, "there is no relay 'none': there are "),
        (["relays", "none"], Exit.NOT_FOUND, "there is no relay 'none': there are "),
        (["server", "web/none", "up"], Exit.NOT_FOUND, "web has no server 'none'"),
        (["sessions", "--client", "x"], Exit.INVALID, ""),
        (["confirm"], Exit.REFUSED, ""),
    ],
)
@pytest_twisted.ensureDeferred
async def test_what_is_refused(
    steering: FakeSteering, capsys: Captured, words: list[str], code: Exit, said: str
) -> None:
    assert await deferToThread(main, words) == code
    found = capsys.readouterr()
    assert found.out == ""
    [line] = found.err.splitlines()
    assert line.startswith(said)
    assert len(line) > 5
