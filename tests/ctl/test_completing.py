"""Completion of the names of relays and servers, by the running relayd."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from relayd.ctl import control_client
from relayd.ctl.commands import relayctl
from relayd.ctl.places import VARIABLE
from tests.support.control import fake_relayd, raw_server


def completed(*words: str) -> list[str]:
    """What the shell offers for the last word, which has begun."""
    shell = ShellComplete(relayctl, {}, "relayctl", "_RELAYCTL_COMPLETE")
    return [each.value for each in shell.get_completions(list(words[:-1]), words[-1])]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "control.sock"
    monkeypatch.setenv(VARIABLE, str(path))
    return path


def test_relays_and_servers(path: Path) -> None:
    relays = [{"name": "web"}, {"name": "wiki"}, {"name": "dns"}, {"name": 5}, 7]
    servers = [
        {"name": "10.0.0.5:80", "label": "blue"},
        {"name": "unix:/a", "label": None},
        {"name": "10.0.0.6:80", "label": "black"},
        {"name": "ssh/blue/10.0.0.7:22", "label": "blue", "pool": "ssh"},
        {"name": "ssh/10.0.0.8:22", "label": None, "pool": "ssh"},
    ]
    with fake_relayd(path) as relayd:
        relayd.answers["GET /v1/relays"] = (200, {"relays": relays})
        relayd.answers["GET /v1/servers"] = (200, {"servers": servers})
        for command in ("start", "stop", "set", "pause", "resume", "drain", "relays"):
            assert completed(command, "w") == ["web", "wiki"]
        assert completed("sessions", "--relay", "") == ["web", "wiki", "dns"]
        assert completed("explain", "--relay", "d") == ["dns"]
        assert completed("server", "w") == ["web/", "wiki/"]
        assert completed("server", "web/b") == ["web/blue", "web/black"]
        assert relayd.last[1] == "/v1/servers?relay=web"
        assert completed("server", "web/ssh/") == [
            "web/ssh/blue",
            "web/ssh/10.0.0.8:22",
        ]
        assert completed("drain", "web/u") == ["web/unix:/a"]
        # What is asked is the relayd that is named.
        assert completed("--control", "/none", "start", "w") == []
        assert completed("start", "--control", f"unix:{path}", "w") == ["web", "wiki"]


def test_filters(path: Path) -> None:
    """Those that there are, to be added; those of the relay, to be removed."""
    assert completed("filter", "add", "web", "la") == ["latency"]
    assert completed("filter", "add", "web", "latency:5", "re") == [
        *("replace", "reset_peer", "reorder")
    ]
    assert completed("filter", "remove", "web", "la") == []
    value = ["latency:5", {"name": "latency", "latency": 7}, "first:9"]
    with fake_relayd(path) as relayd:
        for settings, found in (
            ({"filter": {"value": value}}, ["latency:5", "latency:latency=7"]),
            ({"filter": {"value": "latency"}}, ["latency"]),
            ({"filter": {"value": 5}}, []),
            ({"filter": 5}, []),
            (5, []),
        ):
            answer = {"name": "web", "settings": settings}
            relayd.answers["GET /v1/relays/web"] = (200, answer)
            assert completed("filter", "remove", "web", "la") == found


@pytest.mark.parametrize("command", ["start", "server", "drain"])
def test_nothing_if_relayd_can_t_be_reached(
    path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    assert completed(command, "web/b") == []
    assert completed(command, "w") == []
    monkeypatch.setattr(control_client, "AT_ONCE", 0.02)
    with raw_server(path, b"H", hold=True):
        assert completed(command, "w") == []


def test_rubbish_completes_nothing(path: Path) -> None:
    with fake_relayd(path) as relayd:
        for rubbish in ({"relays": 5}, {"relays": {"a": 1}}, {}, [], {"relays": None}):
            relayd.answers["GET /v1/relays"] = (200, rubbish)
            assert completed("start", "w") == []
        relayd.answers["GET /v1/relays"] = (500, {"problems": ["x"]})
        assert completed("start", "w") == []
