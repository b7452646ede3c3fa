"""What the README promises: its command lines, its tables."""

from __future__ import annotations

import re
import shlex
import socket
from pathlib import Path

import pytest

from relayd.bridge import Timeouts
from relayd.session import Ending
from relayd.tap import socks4
from relayd.tap.relayd import Options
from tests.process import PATIENCE, Server, connect, read_all, relay

README = Path(__file__).parent.parent.joinpath("README.md").read_text()

#: The relayd line of each row of the table of other relays.
LINES = re.findall(r"^\| .* \| `twistd -n relayd (.+?)` \|$", README, re.MULTILINE)

#: The examples of destination rules.
RULES = re.findall(r"^\| `(--(?:allow|deny)-dest .+?)` \|", README, re.MULTILINE)


def test_the_table_of_other_relays_is_found() -> None:
    assert len(LINES) == 6


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
            here.get(word, re.sub(r"\b8080$", "0", word)) for word in shlex.split(line)
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
