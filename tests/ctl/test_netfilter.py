"""`relayctl netfilter`: which relays are meant, and what becomes of their rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from relayd.ctl.exits import Exit
from relayd.ctl.main import main
from relayd.netfilter import ip_routes, programs
from tests.support.control import FakeRelayd
from tests.support.control_answers import RELAY, STATUS
from tests.support.kernel import FakeKernel

Captured = pytest.CaptureFixture[str]

FILE = """\
netfilter_mark = 0x2000

[tcp.web]
listen = "16000"
dest = "192.168.0.1:80"
transparent = true
intercept = "192.168.0.2:80"

[tcp.plain]
listen = "16001"
dest = "192.168.0.1:80"

[udp.dns]
enabled = false
listen = "16000"
dest = "192.168.0.1:53"
transparent = true

[socks4.proxy]
listen = "127.0.0.1:1080"
"""

#: The chains of web, and of dns.
WEB = {"divert-web", "redirect-web"}
DNS = {"divert-dns"}


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "relayd.toml"
    path.write_text(FILE)
    return str(path)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    made = FakeKernel()
    made.install(monkeypatch)
    monkeypatch.setattr(ip_routes, "is_here", lambda version: True)
    return made


def chains(kernel: FakeKernel) -> set[str]:
    return set(kernel.tables.get(("inet", "relayd"), {}))


def runs(relayd: FakeRelayd) -> None:
    """A relayd has these relays, and this mark."""
    relayd.answers["GET /v1/status"] = (
        200,
        {**STATUS, "netfilter": {"managed": False, "mark": 0x2000}},
    )
    said: dict[str, dict[str, Any]] = {
        "web": {
            "listen": ["0.0.0.0:16000", "[::]:16000"],
            "dest": {"address": "192.168.0.1:80", "weight": 2},
            "transparent": True,
            "intercept": "192.168.0.2:80",
            "filter": "***",
            "route": None,
        },
        "plain": {"listen": "16001", "dest": "192.168.0.1:80", "intercept": []},
        "dns": {
            "listen": "16000",
            "dest": "192.168.0.1:53",
            "transparent": True,
            "enabled": False,
        },
    }
    rows = []
    for name, settings in said.items():
        kind = "udp" if name == "dns" else "tcp"
        rows.append({**RELAY, "name": name, "kind": kind})
        found = {
            key: {"value": value, "source": "x"} for key, value in settings.items()
        }
        relayd.answers[f"GET /v1/relays/{name}"] = (
            200,
            {**rows[-1], "settings": found},
        )
    rows.append({**RELAY, "name": "proxy", "kind": "socks4"})
    relayd.answers["GET /v1/relays"] = (200, {"relays": rows})


@pytest.fixture(params=["of a file", "that run"])
def where(request: pytest.FixtureRequest, file: str, relayd: FakeRelayd) -> list[str]:
    """The options that say which relays are meant: they are the same ones."""
    runs(relayd)
    return ["--config", file] if request.param == "of a file" else []


def test_they_are_shown(where: list[str], kernel: FakeKernel, capsys: Captured) -> None:
    assert main(["netfilter", "show", *where]) == Exit.DONE
    said = capsys.readouterr()
    assert said.out.startswith("table inet relayd {\n\tchain divert-web {\n")
    assert "tcp dport 80 redirect to :16000" in said.out
    assert "lookup 8192\n" in said.out
    # What is stopped has none, unless it is named.
    assert "dns" not in said.out
    assert said.err == "plain: needs no rules\n"
    assert main(["netfilter", "show", "dns", *where]) == Exit.DONE
    said = capsys.readouterr()
    assert "\tchain divert-dns {\n" in said.out
    assert "web" not in said.out
    assert said.err == ""
    assert kernel.asked == []


@pytest.mark.parametrize(
    "settings",
    [
        {"dest": "original", "transparent": True, "accept_proxy": ["10.0.0.9"]},
        {"dest": "original", "transparent": True},
        {"dest": "10.0.0.1:80", "sni": ["b.c=[fd00::2]:90", "=default"]},
        {"dest": "10.0.0.1:80", "route": "routes:web", "transparent": True},
        {"dest": "192.168.0.2:80", "transparent": True},
        {"dest": "10.0.0.1:80,source=10.0.0.9", "transparent": True},
        {"dest": ["10.0.0.1:80", "dns:db:81"], "intercept": [":80", "[fd00::/8]:1-9"]},
    ],
)
def test_what_runs_has_the_rules_of_its_file(
    settings: dict[str, Any], tmp_path: Path, relayd: FakeRelayd, capsys: Captured
) -> None:
    table = {"listen": "16000", "intercept": "192.168.0.2:80", **settings}
    runs(relayd)
    said = {key: {"value": value, "source": "x"} for key, value in table.items()}
    relayd.answers["GET /v1/relays/web"] = (200, {**RELAY, "settings": said})
    path = tmp_path / "f.toml"
    path.write_text(
        "netfilter_mark = 0x2000\n[tcp.web]\n"
        + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
    )
    found = []
    for where in ([], ["--config", str(path)]):
        assert main(["netfilter", "show", "web", *where]) == Exit.DONE
        found.append(capsys.readouterr().out)
    assert found[0] == found[1]
    assert "redirect to :16000" in found[0] or "tproxy" in found[0]


def test_they_are_shown_as_json(
    where: list[str], kernel: FakeKernel, capsys: Captured
) -> None:
    assert main(["netfilter", "show", "--json", "dns", *where]) == Exit.DONE
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"nftables", "ip"}
    assert found["ip"][0][:3] == ["ip", "-4", "rule"]
    assert main(["netfilter", "show", "--json", "plain", *where]) == Exit.DONE
    assert json.loads(capsys.readouterr().out) == {"nftables": [], "ip": []}


def test_nothing_is_shown_of_one_that_needs_none(
    where: list[str], capsys: Captured
) -> None:
    assert main(["netfilter", "show", "plain", *where]) == Exit.DONE
    assert capsys.readouterr() == ("", "plain: needs no rules\n")


def test_they_are_applied_and_removed(
    where: list[str], kernel: FakeKernel, capsys: Captured
) -> None:
    before = kernel.all
    assert main(["netfilter", "apply", *where]) == Exit.DONE
    assert capsys.readouterr() == ("web: applied\n", "plain: needs no rules\n")
    assert chains(kernel) == WEB
    assert main(["netfilter", "apply", "--json", "dns", *where]) == Exit.DONE
    assert json.loads(capsys.readouterr().out) == {"applied": ["dns"]}
    assert chains(kernel) == WEB | DNS
    # Those that are stopped, too.
    assert main(["netfilter", "remove", "web", *where]) == Exit.DONE
    assert capsys.readouterr() == ("web: removed\n", "")
    assert chains(kernel) == DNS
    assert main(["netfilter", "remove", "--json", *where]) == Exit.DONE
    found = json.loads(capsys.readouterr().out)
    assert sorted(found["removed"]) == ["dns", "plain", "web"]
    assert kernel.all == before


def test_what_is_needed_no_more_goes(
    where: list[str], kernel: FakeKernel, tmp_path: Path, capsys: Captured
) -> None:
    """Of relays that are no more, it is said; remove takes the name of anybody."""
    path = tmp_path / "before.toml"
    path.write_text(
        f"netfilter_mark = 0x2000\n{OLD.format('plain', 88)}{OLD.format('gone', 89)}"
    )
    before = kernel.all
    assert main(["netfilter", "apply", "--config", str(path)]) == Exit.DONE
    assert chains(kernel) == {"redirect-plain", "redirect-gone"}
    capsys.readouterr()
    assert main(["netfilter", "apply", *where]) == Exit.DONE
    assert capsys.readouterr() == (
        "web: applied\n",
        "plain: needs no rules\ngone: has rules, and is none of these relays\n",
    )
    assert chains(kernel) == {*WEB, "redirect-gone"}
    assert main(["netfilter", "remove", "gone"]) == Exit.DONE
    assert capsys.readouterr() == ("gone: removed\n", "")
    assert chains(kernel) == WEB
    assert main(["netfilter", "remove", *where]) == Exit.DONE
    assert kernel.all == before


OLD = """
[tcp.{0}]
listen = "0.0.0.0:{1}"
dest = "192.168.0.1:80"
intercept = "192.168.0.2:{1}"
"""


def test_who_needs_no_rules_needs_no_right(
    file: str,
    kernel: FakeKernel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    """What there may be of before is not known then, and that is said."""

    def refuses(*words: str, given: str = "") -> programs.Ended:
        return programs.Ended("", "Operation not permitted (you must be root)")

    monkeypatch.setattr(programs, "run", refuses)
    assert main(["netfilter", "apply", "plain", "--config", file]) == Exit.DONE
    said = capsys.readouterr()
    assert said.out == ""
    first, second = said.err.splitlines()
    assert first == "plain: needs no rules"
    assert second.startswith("rules of before were not looked for: ")
    assert main(["netfilter", "apply", "--config", file]) == Exit.FAILED


def test_a_rule_that_comes_first_is_warned_of(
    where: list[str], kernel: FakeKernel, capsys: Captured
) -> None:
    kernel.rules[4].append(["pref", "4094", "not", "fwmark", "0xca6c", "lookup", "51"])
    assert main(["netfilter", "apply", *where]) == Exit.DONE
    assert capsys.readouterr().err == (
        "plain: needs no rules\n"
        "warning: routing rules of others (ip -4 rule: pref 4094) come before relayd's"
        " (4096), and what they match goes their way: give them a pref beyond 4097\n"
    )


def test_all_are_removed(
    file: str, tmp_path: Path, kernel: FakeKernel, capsys: Captured
) -> None:
    """Without a file, and without a relayd that runs."""
    before = kernel.all
    assert main(["netfilter", "apply", "--config", file]) == Exit.DONE
    capsys.readouterr()
    words = ["netfilter", "remove", "--all"]
    assert main([*words, "--control", str(tmp_path / "none")]) == Exit.DONE
    assert capsys.readouterr() == ("all: removed\n", "")
    assert kernel.all == before
    assert main([*words, "--json"]) == Exit.DONE
    assert json.loads(capsys.readouterr().out) == {"removed": ["all"]}
    for more in (["web"], ["--config", file]):
        assert main([*words, *more]) == Exit.USAGE
        assert "--all goes with no RELAY and no --config" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["show", "apply", "remove"])
def test_a_relay_that_there_is_not(
    where: list[str], kernel: FakeKernel, capsys: Captured, command: str
) -> None:
    """A SOCKS proxy is none that may have rules."""
    for name in ("nope", "proxy"):
        assert main(["netfilter", command, "web", name, *where]) == Exit.NOT_FOUND
        said = capsys.readouterr()
        assert said.out == ""
        assert f": there is no relay {name!r} that may have rules; there is" in said.err
        assert len(said.err.splitlines()) == 1
    assert kernel.changes == 0


@pytest.mark.parametrize("command", ["show", "apply", "remove"])
def test_a_file_that_is_not_valid(
    tmp_path: Path, capsys: Captured, command: str
) -> None:
    path = tmp_path / "x.toml"
    assert main(["netfilter", command, "--config", str(path)]) == Exit.NOT_FOUND
    path.write_text("[tcp.web]\nlisten = 8\n")
    assert main(["netfilter", command, "--config", str(path)]) == Exit.INVALID
    assert capsys.readouterr().out == ""


def test_a_file_without_such_relays(
    tmp_path: Path, kernel: FakeKernel, capsys: Captured
) -> None:
    """Nothing is asked of anybody: the demo, and a proxy."""
    path = tmp_path / "x.toml"
    for text in ("demo = true\n", '[socks4.proxy]\nlisten = "127.0.0.1:1080"\n'):
        path.write_text(text)
        for command in ("show", "apply"):
            assert main(["netfilter", command, "--config", str(path)]) == Exit.DONE
            said = capsys.readouterr()
            assert said == ("", "no relay that runs may have rules\n")
        assert main(["netfilter", "remove", "--config", str(path)]) == Exit.DONE
        assert capsys.readouterr() == ("", "")
    assert kernel.asked == []


def test_what_the_kernel_refuses_is_said(
    file: str, kernel: FakeKernel, capsys: Captured
) -> None:
    kernel.refuses = lambda _: "Too much"
    assert main(["netfilter", "apply", "--config", file]) == Exit.FAILED
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("the kernel refuses a rule for relay web (meta l4proto")
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("GET /v1/status", {"version": "2.0"}),
        ("GET /v1/status", {"netfilter": 5}),
        ("GET /v1/status", {"netfilter": {"mark": 3}}),
        ("GET /v1/status", {"netfilter": {"mark": [1]}}),
        ("GET /v1/relays", {"relays": [{"name": "../x", "kind": "tcp"}]}),
        ("GET /v1/relays", {"relays": [{"name": 5, "kind": "tcp"}]}),
        ("GET /v1/relays", {"relays": [{"name": [], "kind": "tcp"}, {"kind": {}}, 1]}),
        ("GET /v1/relays/web", {"settings": {"listen": {"value": {"a": 1}}}}),
        ("GET /v1/relays/web", {"settings": {"intercept": {"value": 'x" drop'}}}),
        ("GET /v1/relays/web", {"settings": {"enabled": {"value": []}, "dest": 5}}),
        ("GET /v1/relays/web", {"settings": [5]}),
        ("GET /v1/relays/web", {}),
    ],
)
def test_no_answer_is_applied_unread(
    relayd: FakeRelayd, kernel: FakeKernel, asked: str, answer: Any
) -> None:
    """Whoever answers may be somebody else's: no rule is made of what means none."""
    runs(relayd)
    relayd.answers[asked] = (200, answer)
    assert main(["netfilter", "apply"]) in (Exit.UNREACHABLE, Exit.DONE, Exit.NOT_FOUND)
    assert kernel.tables == {}
