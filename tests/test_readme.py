"""What the README and the help promise: their command lines, their tables."""

from __future__ import annotations

import re
import shlex
import socket
from pathlib import Path

import pytest

from relayd.bridge import Timeouts
from relayd.session import Ending
from relayd.socks4_wire import Code, Command, write_reply, write_request
from relayd.tap import relayd, socks4
from relayd.tap.relayd import Options
from tests.process import PATIENCE, Server, connect, read_all, relay

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


def defaults(text: str) -> dict[str, str]:
    """The defaults that a part of the README names."""
    return dict(re.findall(r"^\| `--([a-z-]+)` \| (\w+) \|", text, re.MULTILINE))


def test_the_options_table_has_the_defaults() -> None:
    rows = defaults(README[: README.index("## The SOCKS4 proxy")])
    # What these are by default is not a number.
    rows |= {"max-flows": "", "max-flows-per-client": ""}
    options = Options()
    options.parseOptions(["-l", "1", "-d", "1"])
    assert rows == {
        name: options[name] or ""
        for name in options.defaults
        if name not in ("demo", "quiet", "verbose", "no-refresh-inbound")
    }
    assert float(rows["stall-timeout"]) == Timeouts().stall


def test_the_socks4_table_has_the_rest_of_the_defaults() -> None:
    rows = defaults(README[README.index("## The SOCKS4 proxy") :])
    options = socks4.Options()
    options.parseOptions([])
    common = set(Options().defaults)
    assert rows == {
        name: value
        for name, value in options.items()
        if name not in common and isinstance(value, str)
    }
    assert RULES
    for line in RULES:
        socks4.Options().parseOptions(shlex.split(line))


def test_the_endings_table_is_whole() -> None:
    table = README[README.index("| ending | code |") : README.index("### Signals")]
    named: dict[str, set[str]] = {}
    for words, codes in re.findall(r"^\| (`.+?) \| (`.+?) \|", table, re.MULTILINE):
        for word in re.findall(r"`(\w+)`", words):
            named[word] = set(re.findall(r"`(..)`", codes))
    assert set(named) == {ending.word for ending in Ending}
    for ending in Ending:
        assert ending.code in named[ending.word]
