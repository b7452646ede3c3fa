"""The relay's wall clock that is set, in its own process."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from soak.clock import SteppingClock
from tests.support.process import eventually

ROOT = Path(__file__).parent.parent.parent


class Elapsed:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def errors(seed: int, every: float, most: float, count: int) -> list[float]:
    """By how much a clock is wrong, a second later each."""
    elapsed = Elapsed()
    clock = SteppingClock(seed, every, most, lambda: 1e9 + elapsed.now, elapsed)
    found = []
    for _ in range(count):
        found.append(clock.seconds() - (1e9 + elapsed.now))
        elapsed.now += 1
    return found


def test_a_wall_clock_is_set_forward_and_back() -> None:
    found = errors(1, 7, 3600, 1000)
    assert found[0] == 0
    steps = [after - before for before, after in itertools.pairwise(found)]
    changes = [step for step in steps if abs(step) > 1]
    assert 1000 / 10.5 - 1 <= len(changes) <= 1000 / 3.5 + 1
    assert min(changes) < -1800
    assert max(changes) > 1800
    assert max(map(abs, found)) <= 3600


def test_a_seed_sets_the_clock_again() -> None:
    assert errors(1, 7, 3600, 100) == errors(1, 7, 3600, 100)
    assert errors(1, 7, 3600, 100) != errors(2, 7, 3600, 100)


def test_a_clock_that_is_never_set() -> None:
    assert set(errors(1, 7, 0, 100)) == {0.0}


def test_a_clock_in_nanoseconds() -> None:
    clock = SteppingClock(1, 7, 0, lambda: 1.5)
    assert clock.nanoseconds() == 1_500_000_000


SPY = """
import sys, time, types
real = time.time
def run():
    from twisted.internet import reactor
    steps = []
    for _ in range(20):
        time.sleep(0.002)
        steps.append(abs(reactor.seconds() - real()) > 60)
    print(sum(steps), *sys.argv)
sys.modules["twisted.scripts.twistd"] = types.SimpleNamespace(run=run)
from soak.clock import main
main(["1", "0.001", "3", "-n", "relayd"])
"""


def test_twisted_has_the_clock_that_is_set() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SPY],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    steps, *argv = done.stdout.split()
    assert int(steps) > 10, done.stderr
    assert argv == ["twistd", "-n", "relayd"]


PARENT = """
import subprocess, sys, time
child = "import time; from soak.clock import end_with_parent; end_with_parent();"
child += "print(flush=True); time.sleep(60)"
started = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
started.stdout.readline()
print(started.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_a_soak_that_is_killed_leaves_no_stopped_relay() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        os.kill(child, signal.SIGSTOP)
        assert has_ended(child) is False
        parent.kill()
    eventually(lambda: has_ended(child), "the relay ends")


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits for somebody to hear of its end."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return status == "Z"
