"""`relayctl explain --file`: what a file says of a client, without a running relayd."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from relayd.ctl.exits import Exit
from relayd.ctl.main import main
from relayd.ctl.places import VARIABLE
from tests.support.route_modules import RouteModules, route_modules

__all__ = ["route_modules"]

Captured = pytest.CaptureFixture[str]

WEB = """\
[tcp.web]
listen = "8080"
dest = "10.0.0.5:80"
clients = ["deny 10.0.0.66", "allow 10.0.0.0/8"]
hours = "Mon-Fri 08:00-18:00"
"""
OFFICE = '[socks4.office]\nlisten = "1080"\nopen = true\ndestinations = ["deny *:25"]\n'


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No relayd can be reached."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none"))


@pytest.fixture
def path(tmp_path: Path) -> str:
    path = tmp_path / "relayd.toml"
    path.write_text(WEB + OFFICE)
    return str(path)


def explained(capsys: Captured, *words: str) -> dict[str, Any]:
    assert main(["explain", *words, "--json"]) == Exit.DONE
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    ("client", "at", "admitted"),
    [
        ("10.0.0.5", "2026-12-23T09:00", True),
        ("10.0.0.5", "2026-12-23T19:00", False),
        ("10.0.0.66", "2026-12-23T09:00", False),
        ("192.0.2.1", "2026-12-23T09:00", False),
    ],
)
def test_a_client(
    path: str, capsys: Captured, client: str, at: str, admitted: bool
) -> None:
    words = ("--file", path, "--relay", "web", "--client", client, "--at", at)
    found = explained(capsys, *words)
    assert found["admitted"] is admitted
    assert (found["server"] is not None) is admitted
    assert main(["explain", *words]) == Exit.DONE
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("in the end ")
    assert ("admitted, to 10.0.0.5:80" in last) is admitted
    assert ("refused" in last) is not admitted


def test_a_destination(path: str, capsys: Captured) -> None:
    words = ("--file", path, "--relay", "office", "--client", "10.0.0.5", "--dest")
    assert explained(capsys, *words, "192.0.2.1:80")["admitted"]
    assert not explained(capsys, *words, "192.0.2.1:25")["admitted"]


NAMES = """\
[tcp.tls]
listen = "8443"
sni = ["www.example.com=10.0.0.5:443", "*.example.com=10.0.0.6:443"]
"""
ROUTED = """\
[tcp.first]
listen = "8022"
dest = ["10.0.0.5:80", "10.0.0.6:22,pool=ssh"]
route = "myroutes:route"
"""


def test_a_server_name(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "names.toml"
    path.write_text(NAMES)
    words = ("--file", str(path), "--client", "10.0.0.5", "--sni")
    assert explained(capsys, *words, "a.example.com")["server"] == (
        "*.example.com/10.0.0.6:443"
    )
    assert not explained(capsys, *words, "example.org")["admitted"]
    assert main(["explain", *words, "a b"]) == Exit.INVALID
    assert "bad server name 'a b'" in capsys.readouterr().err


def test_a_route(tmp_path: Path, capsys: Captured, route_modules: RouteModules) -> None:
    """It may wait for more than is known of what the client sends."""
    path = tmp_path / "routed.toml"
    path.write_text(ROUTED)
    route_modules.write(
        'return conn.pool("ssh" if await conn.peek(4) == b"\\x00SSH" else "default")'
    )
    words = ("--file", str(path), "--client", "10.0.0.5")
    first = ("--first", "\\x00SSH-2.0\\r\\n")
    assert explained(capsys, *words, *first)["server"] == "ssh/10.0.0.6:22"
    assert explained(capsys, *words, "--first", "GET ")["server"] == "10.0.0.5:80"
    assert main(["explain", *words]) == Exit.DONE
    said = capsys.readouterr().out
    assert "not known" in said
    assert "4 bytes of the client, of which 0 bytes are known" in said
    for wrong, why in (
        (("--first", "\\q"), "is no escape"),
        ((*first, "--sni", "a.example"), "or the server name"),
    ):
        assert main(["explain", *words, *wrong]) == Exit.INVALID
        assert why in capsys.readouterr().err
    route_modules.forget()
    route_modules.write("import nothing_at_all\n")
    assert main(["explain", *words]) == Exit.INVALID
    [line] = capsys.readouterr().err.splitlines()
    assert "nothing_at_all" in line


def test_one_relay_needs_no_name(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "one.toml"
    path.write_text(WEB)
    assert explained(capsys, "--file", str(path), "--client", "10.0.0.5")["steps"]
    # Standard input has JSON.
    text = '{"tcp": {"web": {"listen": "8080", "dest": "10.0.0.5:80"}}}'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert explained(capsys, "--file", "-", "--client", "10.0.0.5")["steps"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--relay", "none", "--client", "10.0.0.5"], Exit.NOT_FOUND, "'none'; it has"),
        (["--client", "10.0.0.5"], Exit.USAGE, "--relay NAME; it has web, office"),
        (["--relay", "web", "--client", "x y"], Exit.INVALID, "x y"),
        (["--relay", "web", "--client", "10.0.0.5", "--at", "noon"], Exit.INVALID, ""),
        (
            ["--relay", "web", "--client", "10.0.0.5", "--dest", "a:1"],
            Exit.INVALID,
            "SOCKS4",
        ),
    ],
)
def test_what_can_t_be_explained(
    path: str, capsys: Captured, words: list[str], code: Exit, said: str
) -> None:
    assert main(["explain", "--file", path, *words]) == code
    found = capsys.readouterr()
    assert found.out == ""
    [line] = found.err.splitlines()
    assert said in line


def test_a_file_that_is_wrong(tmp_path: Path, capsys: Captured) -> None:
    words = ["explain", "--relay", "web", "--client", "10.0.0.5", "--file"]
    assert main([*words, str(tmp_path / "none.toml")]) == Exit.NOT_FOUND
    path = tmp_path / "wrong.toml"
    path.write_text("[tcp.web]\nlisten = 5\n")
    capsys.readouterr()
    assert main([*words, str(path)]) == Exit.INVALID
    assert "tcp.web.listen: found 5" in capsys.readouterr().err


def test_without_a_file_a_relay_is_named(capsys: Captured) -> None:
    assert main(["explain", "--client", "10.0.0.5"]) == Exit.USAGE
    assert "say which: --relay NAME" in capsys.readouterr().err


def test_it_never_imports_the_global_reactor(path: str) -> None:
    program = (
        "import sys; from relayd.ctl.main import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "assert 'twisted.internet.reactor' not in sys.modules\n"
    )
    words = ["explain", "--file", path, "--relay", "web", "--client", "10.0.0.5"]
    subprocess.run(
        [sys.executable, "-c", program, *words], check=True, capture_output=True
    )
