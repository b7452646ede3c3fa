"""A change whose rules can't follow stands, and says so; and who is told of rules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred, succeed
from twisted.logger import capturedLogs, formatEvent

from relayd.configuring.source import Source
from relayd.control.steering import Unfinished
from relayd.core.errors import CannotStart
from relayd.observing.readings import RuleCounts
from relayd.operating.logs import Logs
from relayd.operating.managed_rules import ManagedRules
from relayd.operating.metrics_service import MetricsService
from relayd.operating.running import RelayService
from relayd.operating.service import CommandService, make_service
from tests.support.files import config_of, layers_of
from tests.support.steered import ME, Relayd, at, result, running

WHY = "netfilter rules of a not applied: it takes CAP_NET_ADMIN"


def tables(**more: Any) -> dict[str, Any]:
    relays = {"a": {"listen": at(20001), "dest": "127.0.0.1:9", **more}}
    return {"transport": "twisted", "tcp": relays}


@pytest.fixture
def relayd(tmp_path: Path) -> Iterator[Relayd]:
    """One whose rules can't follow."""
    with running(tmp_path, tables()) as started:
        started.steered.afterwards = lambda anew: succeed([WHY])
        yield started


@pytest.mark.parametrize(
    ("what", "state"), [("stop", "stopped"), ("drain", "stopped"), ("pause", "paused")]
)
def test_a_change_stands(relayd: Relayd, what: str, state: str) -> None:
    """Those who hold clients have no rules that follow."""
    if what == "pause":
        relayd.do(what, "a")
    else:
        with pytest.raises(Unfinished) as caught:
            relayd.do(what, "a")
        assert caught.value.problems == ["a is changed, and stays so, but:", WHY]
        assert caught.value.status == 500
    assert relayd.state("a") == state


def test_what_belongs_to_a_change_is_done(relayd: Relayd) -> None:
    with pytest.raises(Unfinished):
        relayd.do("drain", "a")
    registry = relayd.served("a").registry
    assert registry.draining
    with pytest.raises(Unfinished):
        relayd.do("start", "a")
    assert relayd.state("a") == "running"
    with pytest.raises(Unfinished):
        result(relayd.steered.stop("a", True, ME))
    with pytest.raises(Unfinished):
        relayd.set("a", idle_timeout="5s")
    assert len(relayd.steered.overlay) == 2


def test_a_reload_stands(relayd: Relayd) -> None:
    told: list[str] = []
    relayd.steered.reloaded = told.append
    relayd.write(tables(idle_timeout="7s"))
    with pytest.raises(Unfinished) as caught:
        relayd.reload(confirm=5)
    assert caught.value.problems == ["reloaded: changed a; but:", WHY]
    assert told == [WHY]
    status = relayd.steered.status()
    assert status["last_reload"]["ok"]
    # It can be confirmed, or goes back.
    assert status["confirm"]["seconds_left"] == 5
    relayd.reactor.advance(5)
    assert not relayd.steered.status()["last_reload"]["ok"]


def test_a_reload_by_signal_stands(relayd: Relayd) -> None:
    relayd.write(tables(idle_timeout="7s"))
    with capturedLogs() as logged:
        result(relayd.steered.reload_by_signal())
    assert [formatEvent(each) for each in logged] == ["reloaded: changed a"]


def test_the_next_change_waits_for_what_follows(relayd: Relayd) -> None:
    waits: Deferred[Sequence[str]] = Deferred()
    relayd.steered.afterwards = lambda anew: waits
    first = relayd.steered.set("a", {"idle_timeout": "5s"}, ME)
    second = relayd.steered.set("a", {"idle_timeout": "6s"}, ME)
    assert not first.called
    relayd.steered.afterwards = lambda anew: succeed([])
    waits.callback([])
    assert result(first)["settings"]["idle_timeout"]["value"]
    assert result(second)["name"] == "a"


def test_what_follows_a_reload_is_told_of_it(relayd: Relayd) -> None:
    """All is applied again."""
    told: list[bool] = []

    def follow(anew: bool) -> Deferred[Sequence[str]]:
        told.append(anew)
        return succeed([])

    relayd.steered.afterwards = follow
    relayd.set("a", idle_timeout="5s")
    relayd.reload()
    assert told == [False, True]


def test_one_that_manages_none_says_so(relayd: Relayd) -> None:
    assert relayd.steered.status()["netfilter"] == {
        "managed": False,
        "mark": 0x1000,
        "relays": [],
        "failures": 0,
        "lost": 0,
        "problems": [],
    }


# -- the service of a command

TEXT = '[tcp.a]\nlisten = "127.0.0.1:0"\ndest = "127.0.0.1:9"\n'
MANAGED = f'manage_netfilter = true\nmetrics = "127.0.0.1:0"\n{TEXT}'


def service_of(path: Path, text: str) -> CommandService:
    layers = layers_of(path, text)
    source = Source(layers, layers)
    logs = Logs(reactor, "relayd")
    config = config_of(path, text)
    made: Any = make_service(config, reactor, logs=logs, source=source)
    return made


def test_rules_are_there_until_the_relays_have_drained(tmp_path: Path) -> None:
    """Parts stop the last first."""
    kinds = [type(each) for each in service_of(tmp_path / "f.toml", MANAGED)]
    assert kinds.index(ManagedRules) == kinds.index(RelayService) - 1
    kinds = [type(each) for each in service_of(tmp_path / "f.toml", TEXT)]
    assert ManagedRules not in kinds


def test_metrics_say_what_happens_to_them(tmp_path: Path) -> None:
    service = service_of(tmp_path / "f.toml", MANAGED)
    [rules] = [each for each in service if isinstance(each, ManagedRules)]
    [metrics] = [each for each in service if isinstance(each, MetricsService)]
    assert metrics.rules is not None
    assert metrics.rules() == RuleCounts(failed=0, lost=0)
    rules._failures, rules._lost = 3, 2
    assert metrics.rules() == RuleCounts(failed=3, lost=2)


def test_a_part_that_cannot_start_has_the_rules_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket = tmp_path / "web.sock"
    listen = f'listen = ["127.0.0.1:0", "unix:{socket}"]'
    text = f"manage_netfilter = true\n{TEXT}".replace('listen = "127.0.0.1:0"', listen)
    service = service_of(tmp_path / "f.toml", text)
    [rules] = [each for each in service if isinstance(each, ManagedRules)]
    closed: list[str] = []
    monkeypatch.setattr(rules, "close", lambda: closed.append("rules"))
    there: list[bool] = []

    def cannot() -> None:
        there.append(socket.exists())
        raise CannotStart("no")

    monkeypatch.setattr(list(service)[-1], "startService", cannot)
    service.privilegedStartService()
    with pytest.raises(CannotStart):
        service.startService()
    assert closed == ["rules"]
    # Nor are listeners left, nor files of theirs.
    assert there == [True]
    assert not socket.exists()
