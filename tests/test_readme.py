"""What the README and the help promise: their command lines, their tables."""

from __future__ import annotations

import re
import shlex
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from twisted.logger import capturedLogs, formatEvent

from relayd.configuring.address_settings import RELAYD, SOCKS4
from relayd.core.flows import Counters, Flow, FlowFacts
from relayd.core.session import Ending, Session
from relayd.core.setting_types import Setting
from relayd.core.settings import GROUPS
from relayd.flow_log import FlowLog
from relayd.observing.session_log import SessionLog
from relayd.preludes.socks4 import Code, Command, write_reply, write_request
from relayd.tap import relayd, socks4
from tests.support.files import config_of
from tests.support.process import PATIENCE, Server, connect, read_all, relay

PROJECT = Path(__file__).parent.parent
README = (PROJECT / "README.md").read_text()

#: The line of each row of the table of other relays, and of that of other proxies.
ROW = r"^\| .* \| `twistd -n --pidfile= %s (.+?)` \|$"
LINES = re.findall(ROW % "relayd", README, re.MULTILINE)
PROXIES = re.findall(ROW % "socks4", README, re.MULTILINE)

#: Other files that show how one is started.
SHOWING = [
    *(PROJECT / name for name in ("Makefile", "CONTRIBUTING.md", "ARCHITECTURE.md")),
    *sorted((PROJECT / "examples").glob("*.py")),
]

#: The examples of destination rules.
RULES = re.findall(r"^\| `(--(?:allow|deny)-dest .+?)` \|", README, re.MULTILINE)


def test_the_table_of_other_relays_is_found() -> None:
    assert len(LINES) == 8
    assert len(PROXIES) == 1
    # Those wait for whoever stops reading; relayd has to be told to.
    assert all("--stall-timeout" in line for line in LINES + PROXIES)


@pytest.mark.parametrize("line", LINES)
def test_a_line_for_another_relays_users_relays(line: str, tmp_path: Path) -> None:
    """Run as written, but on free ports and sockets of the test's own."""
    path = tmp_path / "s"
    with Server() as one, Server() as two:
        here = {
            "10.0.0.5:80": one.address,
            "10.0.0.6:80": two.address,
            "unix:/run/web.sock": f"unix:{path}",
        }
        args = [
            here.get(word, re.sub(r"\b(8080|9999|1080)$", "0", word))
            for word in shlex.split(line)
        ]
        with relay(*args) as running:
            for server in [one, two] if "10.0.0.6:80" in line else [one]:
                if "unix:" in line:
                    client = socket.socket(socket.AF_UNIX)
                    client.settimeout(PATIENCE)
                    client.connect(str(path))
                else:
                    client = connect(running.port)
                with client, server.accept() as upstream:
                    client.sendall(b"question")
                    client.shutdown(socket.SHUT_WR)
                    assert read_all(upstream) == b"question"
                    upstream.sendall(b"answer")
                    upstream.shutdown(socket.SHUT_WR)
                    assert read_all(client) == b"answer"
            running.ended("done")


@pytest.mark.parametrize("line", PROXIES)
def test_a_line_for_another_proxys_users_serves(line: str) -> None:
    """Everybody, but not what only its own machine can reach."""
    args = [re.sub(r"\b1080$", "0", word) for word in shlex.split(line)]
    with relay(*args, plugin="socks4") as running:
        assert running.listening(2)[1] == f"[::]:{running.port}"
        with connect(running.port) as client:
            client.sendall(write_request(Command.CONNECT, "127.0.0.1", 80))
            assert read_all(client) == write_reply(Code.REJECTED)
        running.wait_for("127.0.0.1 is loopback: it takes --allow-dest")


def test_no_example_writes_a_pid_file() -> None:
    """It would keep a second relay out of the folder, and a container from its restart.

    And what starts a relay without one is found, wherever it is shown.
    """
    shown = [README, relayd.EXAMPLES, socks4.EXAMPLES, *map(Path.read_text, SHOWING)]
    commands = [
        command
        for text in shown
        for command in re.findall(r"twistd (?:-\S+ )+(?:relayd|socks4)\b", text)
    ]
    assert len(commands) > 20
    assert [each for each in commands if "--pidfile=" not in each] == []


def line_of(row: Setting[Any]) -> str:
    """What README's table says of a setting."""
    short = f", `-{row.short}`" if row.short else ""
    default = row.shown_default
    # Options, addresses and other words of a command line are code.
    code = re.compile(r"(--[a-z0-9-]+|\b[\w.]+:\d+\b|\bnet\.core\.\w+)")
    default, text = (code.sub(r"`\1`", each) for each in (default, row.option_help))
    return f"| `--{row.option}`{short} | {default} | {text} |"


def lines_of(rows: Iterable[Setting[Any]]) -> list[str]:
    """Those of several, in the order of the help."""
    return [line_of(row) for group in GROUPS for row in rows if row.group == group]


def table(section: str) -> list[str]:
    """The lines of the table of options in a section of README."""
    text = README[README.index(f"\n{section}\n") :]
    head = "| option | default | |\n| --- | --- | --- |\n"
    return text[text.index(head) + len(head) :].split("\n\n", 1)[0].splitlines()


@pytest.mark.parametrize(
    ("section", "rows"),
    [
        ("### Options", [row for row in RELAYD if "tcp" in row.kinds]),
        ("## Datagrams", [row for row in RELAYD if "tcp" not in row.kinds]),
        ("## The SOCKS4 proxy", [row for row in SOCKS4 if "tcp" not in row.kinds]),
    ],
)
def test_a_table_of_options_is_what_the_settings_say(
    section: str, rows: list[Setting[Any]]
) -> None:
    """All of them, with defaults and help; a failure shows what is missing."""
    assert rows
    assert table(section) == lines_of(rows)


def test_the_examples_of_rules_are_understood() -> None:
    assert RULES
    for line in RULES:
        socks4.Options().parseOptions(shlex.split(line))


FILES = re.findall(r"^```toml\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", FILES, ids=range(len(FILES)))
def test_the_examples_of_files_are_understood(text: str, tmp_path: Path) -> None:
    """And what they limit is in the settings of their relays."""
    config = config_of(tmp_path / "relayd.toml", text)
    assert config.relays
    if "bandwidth" in text:
        [relay] = config.relays
        admission = relay.admission
        assert str(admission.bandwidth) == "100MB"
        assert str(admission.bandwidth_per_client) == "up=1MB,down=10MB"


def keys(line: str) -> list[str]:
    """The names of the fields of a line of the log."""
    return re.findall(r"(\w+)=", line)


def sample(begin: str) -> str:
    """The line of the log that README shows, by its beginning."""
    [line] = re.findall(rf"^    ({begin} .*)$", README, re.MULTILINE)
    return str(line)


def test_the_log_has_the_fields_of_the_samples() -> None:
    session = Session(17, "192.0.2.7:51514", "192.0.2.1:8080", 0.0, "relay1")
    counters = Counters()
    facts = FlowFacts("relay1", "a", "b", "c", "d", 1.0, "expired")
    with capturedLogs() as events:
        SessionLog().closed(session)
        FlowLog().ended(Flow(1, "a", 0.0), facts)
        FlowLog().closed("relay1", "192.0.2.1:53", counters)
    for begin, event in zip((r"session=\d+", "flow", "datagrams"), events, strict=True):
        assert keys(formatEvent(event)) == keys(sample(begin))


def test_the_endings_table_is_whole() -> None:
    table = README[README.index("| ending | code |") : README.index("### Signals")]
    named: dict[str, set[str]] = {}
    for words, codes in re.findall(r"^\| (`.+?) \| (`.+?) \|", table, re.MULTILINE):
        for word in re.findall(r"`(\w+)`", words):
            named[word] = set(re.findall(r"`(..)`", codes))
    assert set(named) == {ending.word for ending in Ending}
    for ending in Ending:
        assert ending.code in named[ending.word]
