"""The benchmark's scrapes of many relays, and its checks of their file."""

from __future__ import annotations

import stat
import sys
import threading
import tomllib
from pathlib import Path

import pytest

from bench.children import CannotMeasure
from bench.relays import RELAYS
from bench.scrapes import begin_check, longest_while, scrape, write_file
from tests.support.process import PATIENCE


def test_the_file_has_a_relay_for_each_port(tmp_path: Path) -> None:
    write_file(tmp_path, [20_001, 20_002], 20_003, 20_004)
    assert tomllib.loads((tmp_path / "relayd.toml").read_text()) == {
        "metrics": "127.0.0.1:20004",
        "tcp": {
            f"r{number}": {"listen": f"127.0.0.1:{port}", "dest": "127.0.0.1:20003"}
            for number, port in enumerate((20_001, 20_002))
        },
    }


def test_a_check_is_measured_in_seconds_of_wall_and_cpu() -> None:
    with begin_check(2, RELAYS["relayd-plane"], 0.5) as measure:
        readings = measure()
    assert readings.keys() == {"check-2", "check-2-cpu"}
    assert all(value > 0 for value in readings.values())


def test_a_file_that_relayctl_refuses_is_not_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(folder: Path, *_: object) -> None:
        (folder / "relayd.toml").write_text("[tcp.web]\n")

    monkeypatch.setattr("bench.scrapes.write_file", wrong)
    with pytest.raises(CannotMeasure, match="relayctl check ended with status 5"):
        with begin_check(1, RELAYS["relayd-plane"], 0.5):
            pass


def curl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Have a program in Python instead of curl."""
    program = tmp_path / "curl"
    program.write_text(f"#!{sys.executable}\nimport sys\n{text}\n")
    program.chmod(stat.S_IRWXU)
    monkeypatch.setattr("bench.scrapes.program", lambda _: str(program))


def test_a_scrape_takes_what_curl_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves the metrics in the folder; it asks as Prometheus does."""
    said = "open('metrics', 'w').write(' '.join(sys.argv)); print('0.125000')"
    curl(tmp_path, monkeypatch, said)
    assert scrape(20_000, tmp_path) == 0.125
    asked = (tmp_path / "metrics").read_text()
    assert asked.endswith(" http://127.0.0.1:20000/metrics")
    assert "--header Accept: application/openmetrics-text;version=1.0.0 " in asked
    assert "--fail --output metrics " in asked


def test_a_scrape_that_fails_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curl(tmp_path, monkeypatch, "print('0.1'); sys.exit('curl: (22) error: 404')")
    with pytest.raises(CannotMeasure) as caught:
        scrape(20_000, tmp_path)
    assert str(caught.value).startswith(
        "curl ended with status 1: curl: (22) error: 404"
    )


def test_the_longest_of_each_load_is_told() -> None:
    """The work lasts until each has been made three times, one of which waits."""
    made = {"one": 0, "two": 0}
    slow, often = threading.Event(), threading.Event()

    def load(name: str) -> None:
        made[name] += 1
        if name == "one" and made[name] == 2:
            slow.wait(0.05)
        if min(made.values()) >= 3:
            often.set()

    def work() -> str:
        assert often.wait(PATIENCE)
        return "done"

    loads = {"one": lambda: load("one"), "two": lambda: load("two")}
    result, longest = longest_while(work, loads)
    assert result == "done"
    assert longest["one"] >= 0.05
    assert longest.keys() == loads.keys()


def test_a_load_that_fails_is_an_error() -> None:
    def fail() -> None:
        raise CannotMeasure("a short connection failed")

    with pytest.raises(CannotMeasure, match="a short connection failed"):
        longest_while(lambda: None, {"short": fail})


def test_work_that_fails_ends_the_loads() -> None:
    def fail() -> None:
        raise CannotMeasure("curl ended")

    before = set(threading.enumerate())
    with pytest.raises(CannotMeasure, match="curl ended"):
        longest_while(fail, {"short": lambda: None})
    assert set(threading.enumerate()) == before
