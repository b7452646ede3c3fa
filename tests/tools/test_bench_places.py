"""Where the benchmark's programs run; see also tests/system/test_bench.py."""

from __future__ import annotations

import os
import subprocess

import pytest

from bench import places
from bench.children import CannotMeasure
from bench.places import HERE, Place, no_namespaces


def test_on_this_machine_programs_run_as_they_are() -> None:
    argv = ["nginx", "-g", "daemon off;"]
    assert HERE.relay.runs(argv) == argv
    before = os.readlink("/proc/thread-self/ns/net")
    with HERE.client.inside():
        assert os.readlink("/proc/thread-self/ns/net") == before


def test_in_a_namespace_they_are_run_by_ip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.places.program", lambda name: f"/sbin/{name}")
    place = Place("10.0.0.1", "one")
    assert place.runs(["nginx", "-h"]) == [
        *("/sbin/ip", "netns", "exec", "one"),
        *("nginx", "-h"),
    ]


def test_without_root_there_are_no_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert no_namespaces() == "network namespaces take root"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What `ip` is told, which succeeds unless it is to make what is `refused`."""
    said: list[list[str]] = []

    def run(argv: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        said.append(argv[1:])
        refused = argv[-1].endswith("-server") and "add" in argv
        return subprocess.CompletedProcess(argv, int(refused), "", "not here\n")

    monkeypatch.setattr("bench.places.program", lambda name: name)
    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    return said


def test_root_may_be_refused_namespaces(
    told: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert no_namespaces() is None
    # It has tried.
    [made, _, deleted] = told
    assert (made[:2], deleted[:2]) == (["netns", "add"], ["netns", "delete"])
    assert made[2] == deleted[2]

    def refuse(*words: str) -> None:
        raise CannotMeasure("ip netns add x: Operation not permitted")

    monkeypatch.setattr(places, "_ip", refuse)
    assert no_namespaces() == "ip netns add x: Operation not permitted"


def test_what_was_made_is_removed_if_the_rest_fails(told: list[list[str]]) -> None:
    with pytest.raises(CannotMeasure, match=r"ip netns add .*-server: not here"):
        with places.in_a_row():
            pass
    made = [words[2] for words in told if words[:2] == ["netns", "add"]]
    gone = [words[2] for words in told if words[:2] == ["netns", "delete"]]
    assert gone == made[1::-1]
