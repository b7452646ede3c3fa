"""The commands that talk to a running relayd: what each asks, and what it prints."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from relayd.ctl.commands import SECTIONS
from relayd.ctl.exits import Exit
from relayd.ctl.main import main
from relayd.ctl.manual_of_command import commands
from relayd.ctl.places import VARIABLE
from tests.support.control import FakeRelayd, cells, run
from tests.support.control_answers import FLOW, RELAY, SERVER, SESSION, STATUS, STOPPED

Captured = pytest.CaptureFixture[str]


def test_status(relayd: FakeRelayd, capsys: Captured) -> None:
    run(relayd, "GET /v1/status", STATUS, "status")
    said = capsys.readouterr()
    assert [cells(line) for line in said.out.splitlines()] == [
        ["state", "running"],
        ["version", "2.0"],
        ["pid", "77"],
        ["up for", "1d02h, since 2026-11-29T16:40:12Z"],
        ["configuration", "/etc/relayd.toml"],
        ["loaded", "2026-11-29T16:40:12Z"],
        ["relays", "2"],
        ["sessions", "12"],
        ["flows", "1"],
        ["run-time changes", "3"],
        ["last reload", "2026-11-29T17:00:00Z: not in effect"],
        ["a b"],
        ["needs a restart", "transport"],
        ["netfilter rules", "of dns, web"],
        ["netfilter rules of web not applied"],
        ["to be confirmed", "goes back in 1m00s: relayctl confirm"],
    ]
    assert said.err == ""


def test_status_of_one_without_a_file(relayd: FakeRelayd, capsys: Captured) -> None:
    """It has a command line, or is part of another program."""
    run(relayd, "GET /v1/status", {**STATUS, "config": None}, "status")
    found = [cells(line) for line in capsys.readouterr().out.splitlines()]
    assert ["configuration", "no file"] in found


@pytest.mark.parametrize(
    ("netfilter", "shown"),
    [
        (None, None),
        ({"managed": False, "relays": []}, None),
        ({"managed": True, "relays": []}, "of no relay"),
        (
            {"managed": True, "relays": [*"abcdefghijkl"]},
            "of a, b, c, d, e, f, g, h, i, j and 2 more",
        ),
        (
            {"managed": True, "relays": ["a"], "lost": 2},
            "of a; changed by others 2 times",
        ),
    ],
)
def test_status_of_netfilter_rules(
    netfilter: Any, shown: str | None, relayd: FakeRelayd, capsys: Captured
) -> None:
    """An older relayd has none; one that leaves them to others does not speak of it."""
    run(relayd, "GET /v1/status", {**STATUS, "netfilter": netfilter}, "status")
    rows = [cells(line) for line in capsys.readouterr().out.splitlines()]
    found = dict(each for each in rows if len(each) == 2)
    assert found.get("netfilter rules") == shown


def test_relays(relayd: FakeRelayd, capsys: Captured) -> None:
    run(relayd, "GET /v1/relays", {"relays": [RELAY, STOPPED]}, "relays")
    head, web, dns = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["RELAY", "KIND", "STATE", "LISTEN"]
    assert cells(web) == [
        *("web", "tcp", "running", "0.0.0.0:8080", "10.0.0.5:80, 10.0.0.6:80"),
        *("12/100", "2", "3", "0", "12.3 MiB", "-"),
    ]
    assert cells(dns)[2:4] == ["stopped", "-"]


def test_one_relay_and_its_settings(relayd: FakeRelayd, capsys: Captured) -> None:
    found = {"idle_timeout": {"value": "5m", "source": "run time"}}
    answer = {**RELAY, "name": "a/b", "settings": found}
    run(relayd, "GET /v1/relays/a%2Fb", answer, "relays", "a/b")
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "SETTING       VALUE  SOURCE",
        'idle_timeout  "5m"   run time',
    ]


def test_sessions(relayd: FakeRelayd, capsys: Captured) -> None:
    answer = {"sessions": [SESSION], "matched": 20, "total": 30}
    options = ("--relay", "web", "--client", "10.0.0.0/8", "--server", "a:1")
    more = ("--sort", "rate", "--limit", "1")
    asked = run(relayd, "GET /v1/sessions", answer, "sessions", *options, *more)
    assert asked == "relay=web&client=10.0.0.0%2F8&server=a%3A1&sort=rate&limit=1"
    said = capsys.readouterr()
    assert cells(said.out.splitlines()[1]) == [
        *("17", "web", "10.0.0.9:4000", "10.0.0.5:80", "RELAYING", "4m05s", "0.2s"),
        *("500 B", "12.3 MiB", "50.8 KiB/s", "1", "older", "latency, capture"),
    ]
    assert said.err == "1 of 20 sessions that match; --limit lists more\n"
    assert run(relayd, "GET /v1/sessions", {"sessions": []}, "sessions") == ""
    said = capsys.readouterr()
    assert (len(said.out.splitlines()), said.err) == (1, "")


def test_flows(relayd: FakeRelayd, capsys: Captured) -> None:
    answer = {"flows": [FLOW], "matched": 1, "total": 1}
    assert run(relayd, "GET /v1/flows", answer, "flows", "--sort=age") == "sort=age"
    assert cells(capsys.readouterr().out.splitlines()[1]) == [
        *("dns", "10.0.0.9:5000", "10.0.0.1:53", "10.0.0.1:40000", "9.9.9.9:53"),
        *("1.0s", "1.0s", "3", "2", "90 B", "2.0 KiB", "yes"),
        "latency",
    ]


def test_nat(relayd: FakeRelayd, capsys: Captured) -> None:
    tcp = {**FLOW, "protocol": "tcp", "datagrams_up": None, "datagrams_down": None}
    answer = {"entries": [tcp, {**FLOW, "protocol": "udp"}], "matched": 3}
    run(relayd, "GET /v1/nat", answer, "nat")
    said = capsys.readouterr()
    rows = [cells(line) for line in said.out.splitlines()]
    assert [row[0] for row in rows] == ["PROTO", "tcp", "udp"]
    assert [row[-2:] for row in rows[1:]] == [["-", "-"], ["3", "2"]]
    assert said.err == "2 of 3 entries that match; --limit lists more\n"


def test_servers(relayd: FakeRelayd, capsys: Captured) -> None:
    more = {"label": None, "operator": "drain", "backup": True, "checked": False}
    answer = {"servers": [SERVER, {**SERVER, **more}]}
    options = ("--relay", "web")
    assert run(relayd, "GET /v1/servers", answer, "servers", *options) == "relay=web"
    _, blue, other = capsys.readouterr().out.splitlines()
    assert cells(blue) == [
        *("web", "blue", "10.0.0.5:80", "down", "2 checks failed", "1", "4", "2"),
        "refused, 2026-11-29T16:40:12Z",
    ]
    assert cells(other)[1] == "10.0.0.5:80"
    assert cells(other)[4] == "2 checks failed; backup"
    assert cells(other)[-1] == "-"


def test_servers_of_several_pools(relayd: FakeRelayd, capsys: Captured) -> None:
    """Each is called as `relayctl server` takes it."""
    own = {**SERVER, "pool": "ssh", "name": "ssh/blue/10.0.0.7:22"}
    plain = {**own, "label": None, "name": "ssh/10.0.0.8:22"}
    answer = {"servers": [{**SERVER, "pool": "default"}, own, plain]}
    run(relayd, "GET /v1/servers", answer, "servers")
    _, *rows = capsys.readouterr().out.splitlines()
    assert [cells(row)[1] for row in rows] == ["blue", "ssh/blue", "ssh/10.0.0.8:22"]


def test_where_clients_go_by_name_or_by_a_route(
    relayd: FakeRelayd, capsys: Captured
) -> None:
    one = {**RELAY, "dest": ["a:1"], "sni": ["*.b=c:2"], "route": None}
    other = {**RELAY, "dest": [], "sni": [], "route": "routes:tenant"}
    run(relayd, "GET /v1/relays", {"relays": [one, other]}, "relays")
    _, *rows = capsys.readouterr().out.splitlines()
    assert [cells(row)[4] for row in rows] == ["a:1, *.b=c:2", "route routes:tenant"]


def test_limits(relayd: FakeRelayd, capsys: Captured) -> None:
    rows = [
        {"what": "max_sessions", "relay": "web", "limit": 200, "now": 50, "hits": 2},
        {"what": "descriptors", "relay": None, "limit": None, "now": 5, "hits": None},
    ]
    run(relayd, "GET /v1/limits", {"limits": rows}, "limits")
    _, one, other = capsys.readouterr().out.splitlines()
    assert cells(one) == ["max_sessions", "web", "50", "200", "25%", "2"]
    assert cells(other) == ["descriptors", "-", "5", "-", "-", "-"]


def test_diff(relayd: FakeRelayd, capsys: Captured) -> None:
    change = {"relay": "web", "server": None, "key": "dest", "file": None}
    answer = {"changes": [{**change, "now": ["a:1"]}]}
    run(relayd, "GET /v1/diff", answer, "diff")
    row = cells(capsys.readouterr().out.splitlines()[1])
    assert row == ["web", "-", "dest", "-", '["a:1"]']
    run(relayd, "GET /v1/diff", {"changes": []}, "diff")
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "No run-time changes since the settings were read.\n"


@pytest.mark.parametrize(
    ("words", "verb", "body"),
    [
        (["start", "web"], "start", {}),
        (["stop", "web"], "stop", {"cut": False}),
        (["stop", "web", "--cut"], "stop", {"cut": True}),
        (["drain", "web"], "drain", {}),
        (["drain", "web", "--within", "5m"], "drain", {"within": 300}),
        (["drain", "web", "--within", "0"], "drain", {"within": 0}),
        (["pause", "web"], "pause", {}),
        (["pause", "web", "--for", "1.5"], "pause", {"seconds": 1.5}),
        (["resume", "web"], "resume", {}),
    ],
)
def test_relays_are_changed(
    relayd: FakeRelayd, capsys: Captured, words: list[str], verb: str, body: Any
) -> None:
    asked = f"POST /v1/relays/web/{verb}"
    assert run(relayd, asked, {**RELAY, "state": "paused"}, *words) == body
    said = capsys.readouterr().out
    assert said == (
        "web is paused, with 12 sessions, 2 of them under earlier settings\n"
    )


def test_set(relayd: FakeRelayd, capsys: Captured) -> None:
    words = ("set", "web", "dest=a:1", "dest=b:2", "idle-timeout=", "max_sessions=9")
    assert run(relayd, "PATCH /v1/relays/web", RELAY, *words) == {
        "settings": {"dest": ["a:1", "b:2"], "idle_timeout": None, "max_sessions": 9}
    }
    assert capsys.readouterr().out.startswith("web is running, ")
    assert main(["set", "web", "dest"]) == Exit.USAGE
    assert main(["set", "web"]) == Exit.USAGE
    assert "'dest': expected key=value" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "body"),
    [
        (["server", "web/unix:/a/b", "up"], {"state": "up"}),
        (["server", "web/unix:/a/b", "down"], {"state": "down"}),
        (["server", "web/unix:/a/b", "auto"], {"state": "auto"}),
        (["server", "web/unix:/a/b", "weight=10"], {"weight": 10}),
        (
            ["server", "web/unix:/a/b", "drain", "--within", "60"],
            {"state": "drain", "within": 60},
        ),
        (
            ["drain", "web/unix:/a/b", "--within", "60"],
            {"state": "drain", "within": 60},
        ),
    ],
)
def test_servers_are_changed(
    relayd: FakeRelayd, capsys: Captured, words: list[str], body: Any
) -> None:
    asked = "PATCH /v1/relays/web/servers/unix%3A%2Fa%2Fb"
    assert run(relayd, asked, SERVER, *words) == body
    said = capsys.readouterr().out
    assert said == "web/blue: down (2 checks failed), weight 1, with 4 sessions\n"


@pytest.mark.parametrize(
    "words",
    [
        *(["server", "web", "up"], ["server", "web/", "up"], ["server", "a/b", "on"]),
        *(["server", "a/b", "weight"], ["server", "a/b", "weight=-1"]),
        *(["server", "a/b", "weight=" + "9" * 5000], ["drain", "/b"]),
        ["server", "a/b", "up", "--within", "5"],
        *(["drain", "a", "--within", "soon"], ["pause", "a", "--for", "0"]),
        *(["kill"], ["kill", "x"], ["kill", "-1"], ["sessions", "--limit", "0"]),
        *(["sessions", "--sort", "name"], ["status", "--watch", "0"]),
        *(["log", "level", "x", "loud"], ["explain", "--relay", "web"]),
        *(["--control", "", "status"], ["status", "--control", "unix:"]),
        *(["capture"], ["capture", "x"], ["capture", "-1"]),
        *(["capture", "1", "--bytes", "0"], ["filter", "add", "web"]),
        *(["filter", "remove", "web"], ["filter", "list"]),
    ],
    ids=" ".join,
)
def test_wrong_command_lines(
    relayd: FakeRelayd, capsys: Captured, words: list[str]
) -> None:
    assert main(words) == Exit.USAGE
    assert relayd.asked == []
    said = capsys.readouterr()
    assert said.out == ""
    assert "Error: " in said.err


@pytest.mark.parametrize(
    ("words", "body"),
    [
        (["17", "23"], {"sessions": [17, 23]}),
        (["--client", "10.0.0.0/8"], {"client": "10.0.0.0/8"}),
        (["--server", "a:1", "--relay", "web"], {"server": "a:1", "relay": "web"}),
    ],
)
def test_kill(
    relayd: FakeRelayd, capsys: Captured, words: list[str], body: Any
) -> None:
    assert run(relayd, "POST /v1/kill", {"killed": 2}, "kill", *words) == body
    assert capsys.readouterr().out == "killed: 2\n"


def test_reload(relayd: FakeRelayd, capsys: Captured) -> None:
    answer = {
        "added": ["a", "b"],
        "removed": [],
        "changed": ["c"],
        "unchanged": 1,
        "needs_restart": ["transport"],
        "routes": ["myroutes:route"],
        "overlay": 2,
        "dropped": 0,
        "confirm_within": 60,
    }
    asked = "POST /v1/reload"
    body = run(relayd, asked, answer, "reload", "--discard", "--confirm", "1m")
    assert body == {"discard": True, "confirm": 60}
    assert capsys.readouterr().out.splitlines() == [
        "added: a, b",
        "changed: c",
        "unchanged: 1 relay",
        "kept: 2 run-time changes",
        "read anew: myroutes:route",
        "needs a restart: transport",
        "It goes back in 1m00s, unless you say: relayctl confirm",
    ]
    assert run(relayd, asked, {"unchanged": 3}, "reload") == {"discard": False}
    assert capsys.readouterr().out == "unchanged: 3 relays\n"
    assert run(relayd, "POST /v1/confirm", {"confirmed": True}, "confirm") == {}
    assert capsys.readouterr().out == "The reload is confirmed, and stays.\n"


def test_a_broken_file(relayd: FakeRelayd, capsys: Captured) -> None:
    problems = ["x.toml: tcp.web.dest: bad", "x.toml: tcp.dns: no listener"]
    relayd.answers["POST /v1/reload"] = (422, {"problems": problems})
    assert main(["reload"]) == Exit.INVALID
    said = capsys.readouterr()
    assert (said.out, said.err.splitlines()) == ("", problems)


def test_save(relayd: FakeRelayd, capsys: Captured, tmp_path: Path) -> None:
    answer = {"toml": '[tcp.web]\ndest = "é"\n'}
    run(relayd, "GET /v1/merged", answer, "save")
    assert capsys.readouterr().out == answer["toml"]
    path = tmp_path / "new.toml"
    run(relayd, "GET /v1/merged", answer, "save", "--to", str(path))
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"{path} is written. ")
    assert path.read_text(encoding="utf-8") == answer["toml"]
    run(relayd, "GET /v1/merged", {"toml": 5}, "save", code=Exit.UNREACHABLE)


def test_save_with_secrets(
    relayd: FakeRelayd, capsys: Captured, tmp_path: Path
) -> None:
    """They are told of, and others can't read them."""
    keys = [f"tcp.web{number}.check" for number in range(7)]
    answer = {"toml": "secret", "in_clear": keys[:1]}
    line = "It has values of the environment, or of secret settings, in clear: "
    run(relayd, "GET /v1/merged", answer, "save")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("secret", f"{line}tcp.web0.check\n")
    path = tmp_path / "relayd.toml"
    path.write_text("old")
    path.chmod(0o644)
    run(
        *(relayd, "GET /v1/merged", answer, "save", "--to", str(path)),
        code=Exit.FAILED,
    )
    assert "others can read it" in capsys.readouterr().err
    assert path.read_text() == "old"
    path.chmod(0o600)
    answer["in_clear"] = keys
    run(relayd, "GET /v1/merged", answer, "save", "--to", str(path))
    assert path.read_text() == "secret"
    assert capsys.readouterr().err.endswith(
        f"\n{line}{', '.join(keys[:5])} and 2 more\n"
    )


STEPS = {
    "admitted": True,
    "steps": [
        {"step": "rules", "result": "allowed", "why": "allow 10.0.0.0/8"},
        {"step": "hours", "result": "open", "why": None},
    ],
    "server": "10.0.0.5:80",
}


def test_explain(relayd: FakeRelayd, capsys: Captured) -> None:
    words = ("explain", "--relay", "web", "--client", "10.0.0.5", "--at", "2026-12-24")
    assert run(relayd, "POST /v1/explain", STEPS, *words) == {
        "relay": "web",
        "client": "10.0.0.5",
        "at": "2026-12-24",
    }
    assert [cells(line) for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["rules", "allowed", "allow 10.0.0.0/8"],
        ["hours", "open", "-"],
        ["in the end", "admitted, to 10.0.0.5:80", "-"],
    ]
    more = ("--first", "SSH-2.0\\r\\n", "--sni", "www.example.com")
    asked = run(relayd, "POST /v1/explain", STEPS, *words, *more)
    assert (asked["first"], asked["sni"]) == ("SSH-2.0\\r\\n", "www.example.com")
    capsys.readouterr()
    run(relayd, "POST /v1/explain", {"admitted": False}, *words)
    assert "in the end  refused" in capsys.readouterr().out
    run(relayd, "POST /v1/explain", {"admitted": True}, *words)
    assert "in the end  admitted" in capsys.readouterr().out


def test_log(relayd: FakeRelayd, capsys: Captured) -> None:
    answer = {"levels": {"relayd": "info", "relayd.tcp": "debug"}}
    run(relayd, "GET /v1/log-levels", answer, "log", "levels")
    asked = "PUT /v1/log-levels/relayd.tcp"
    body = run(relayd, asked, answer, "log", "level", "relayd.tcp", "debug")
    assert body == {"level": "debug"}
    said = "NAMESPACE   LEVEL\nrelayd      info\nrelayd.tcp  debug\n"
    assert capsys.readouterr().out == 2 * said


#: A command line for each command that asks a running relayd.
LINES = [
    *(["status"], ["relays"], ["relays", "web"], ["sessions"], ["flows"], ["nat"]),
    *(["servers"], ["limits"], ["explain", "--relay", "web", "--client", "10.0.0.5"]),
    *(["start", "web"], ["stop", "web"], ["set", "web", "x=1"], ["resume", "web"]),
    *(["server", "web/a:1", "up"], ["kill", "1"], ["drain", "web"], ["pause", "web"]),
    *(["log", "levels"], ["log", "level", "x", "info"], ["reload"], ["confirm"]),
    *(["diff"], ["save"]),
]

#: Those whose answer is not printed as it is.
OTHERS = [
    *(["capture", "1"], ["filter", "list", "web"], ["filter", "add", "web", "first"]),
    *(["filter", "remove", "web", "first"], ["netfilter", "show"]),
    *(["netfilter", "apply"], ["netfilter", "remove", "web"]),
]


def test_there_is_a_line_for_each_command() -> None:
    files = {"check", "show", "example", "schema", "completion"}
    names = {name for _, name, _ in commands()} - files
    lines = [*LINES, *OTHERS]
    assert {name for name in names if any(_is(line, name) for line in lines)} == names


def _is(line: list[str], name: str) -> bool:
    return line[: len(name.split())] == name.split()


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_json_is_what_relayd_says(
    line: list[str], relayd: FakeRelayd, capsys: Captured
) -> None:
    answer = {"toml": "", "anything": [1, None, "é"]}

    class AnyAnswer(dict[str, Any]):
        def get(self, *_: object) -> Any:
            return 200, answer

    relayd.answers = AnyAnswer()
    assert main([*line, "--json"]) == Exit.DONE
    said = capsys.readouterr()
    assert json.loads(said.out) == answer
    # And whatever else it may say, some table comes of it.
    assert main(line) == Exit.DONE


@pytest.mark.parametrize("line", [*LINES, *OTHERS], ids=" ".join)
def test_each_says_that_it_is_refused(
    line: list[str], relayd: FakeRelayd, capsys: Captured
) -> None:
    assert main(line) == Exit.NOT_FOUND
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("no ")


@pytest.mark.parametrize("line", [*LINES, *OTHERS], ids=" ".join)
def test_each_says_that_relayd_can_t_be_reached(
    line: list[str], tmp_path: Path, capsys: Captured
) -> None:
    path = str(tmp_path / "none")
    for words in ([*line, "--control", path], ["--control", path, *line]):
        assert main(words) == Exit.UNREACHABLE
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith(f"relayd can't be reached at {path}: ")


def test_the_nearest_control_is_used(relayd: FakeRelayd, tmp_path: Path) -> None:
    """That of the command, then of relayctl, then of the environment."""
    relayd.answers["GET /v1/limits"] = (200, {})
    path = os.environ[VARIABLE]
    none = str(tmp_path / "none")
    assert main(["limits"]) == Exit.DONE
    assert main(["--control", none, "limits"]) == Exit.UNREACHABLE
    assert main(["--control", none, "limits", "--control", path]) == Exit.DONE
    assert main(["--control", path, "limits", "--control", none]) == Exit.UNREACHABLE


def test_help_has_an_example_of_each(capsys: Captured) -> None:
    for _, name, command in commands():
        if name in SECTIONS["Configuration files"] or name == "completion":
            continue
        # Of a docstring, which has its indentation before Python 3.13.
        written = inspect.cleandoc(command.help or "")
        assert f"\nExample:  relayctl {name}" in written
        assert main([*name.split(), "--help"]) == Exit.DONE
        said = capsys.readouterr().out
        assert f"\n  Example:  relayctl {name}" in said
        assert "--control ADDRESS" in said
        assert "--json" in said or name == "capture"


def test_the_help_of_reload_says_whom_it_ends(capsys: Captured) -> None:
    """As tests/operating/test_changes_live.py has it of a relay that is gone."""
    assert main(["reload", "--help"]) == Exit.DONE
    said = " ".join(capsys.readouterr().out.split())
    assert "sessions that have not ended within drain_timeout are reset" in said
    assert "Nobody is cut off" not in said


@pytest.mark.parametrize("name", [name for _, name, _ in commands()])
def test_examples_are_command_lines(name: str) -> None:
    """click takes each of them."""
    import shlex

    command = {each: found for _, each, found in commands()}[name]
    for line in (command.help or "").splitlines():
        _, begun, example = line.partition(f"Example:  relayctl {name}")
        if begun:
            [alone, *_] = re.split("  | [|>] ", example)
            words = shlex.split(alone)
            command.make_context(name, words)


def test_asking_imports_neither_twisted_nor_settings(relayd: FakeRelayd) -> None:
    program = (
        "import sys; from relayd.ctl.main import main\n"
        "out, sys.stdout = sys.stdout, sys.stderr\n"
        "main(['limits']); print(*sys.modules, file=out)"
    )
    relayd.answers["GET /v1/limits"] = (200, {})
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    found = set(done.stdout.split())
    assert "relayd.ctl.views" in found
    assert not {"twisted", "attrs", "relayd.configuring", "rich.live"} & found
