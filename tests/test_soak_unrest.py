"""What the soak does to the relay's clock, and to the relay: the pure parts."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.soak_clock import SteppingClock
from bench.soak_stops import REMEMBERED, Stops, stop_now_and_then
from tests.process import eventually

ROOT = Path(__file__).parent.parent

# -- the wall clock


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
from bench.soak_clock import main
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
child = "import time; from bench import soak_clock; soak_clock.end_with_parent();"
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


# -- the stops

times = st.integers(min_value=0, max_value=60)


@given(
    marks=st.lists(times, unique=True, max_size=12).map(sorted),
    since=times,
    length=times,
)
def test_the_time_in_which_the_relay_was_stopped(
    marks: list[int], since: int, length: int
) -> None:
    stops = Stops()
    for number, mark in enumerate(marks):
        (stops.end if number % 2 else stops.begin)(mark)
    until = since + length
    stopped = set()
    for began, ended in zip(marks[::2], [*marks[1::2], until], strict=False):
        stopped |= set(range(began, ended))
    assert stops.within(since, until) == len(stopped & set(range(since, until)))
    assert stops.count == (len(marks) + 1) // 2


def test_the_stops_that_are_remembered_are_bounded() -> None:
    stops = Stops()
    for number in range(10 * REMEMBERED):
        stops.begin(2 * number)
        stops.end(2 * number + 1)
    assert stops.within(0, 1e9) == REMEMBERED


def test_who_waits_does_not_count_the_time_in_which_the_relay_is_stopped() -> None:
    async def run() -> tuple[bool, float]:
        stops = Stops()
        began_at = time.monotonic()
        stops.begin(began_at)
        asyncio.get_running_loop().call_later(0.1, lambda: stops.end(time.monotonic()))
        came = await stops.wait(asyncio.Event(), 0.05)
        return came, time.monotonic() - began_at

    came, waited = asyncio.run(run())
    assert not came
    assert waited >= 0.15


def test_who_waits_is_told() -> None:
    async def run() -> bool:
        event = asyncio.Event()
        asyncio.get_running_loop().call_soon(event.set)
        return await Stops().wait(event, 60)

    assert asyncio.run(run())


@pytest.mark.parametrize("seconds", [0.01, 60])
def test_a_relay_that_is_stopped_always_goes_on(seconds: float) -> None:
    said: list[str] = []

    async def run() -> Stops:
        stops = Stops()
        stopping = asyncio.ensure_future(
            stop_now_and_then(
                stops,
                random.Random(1),
                every=0.001,
                seconds=seconds,
                suspend=lambda: said.append("stop"),
                resume=lambda: said.append("go"),
            )
        )
        await asyncio.sleep(0.05)
        stopping.cancel()
        await asyncio.wait([stopping])
        return stops

    stops = asyncio.run(run())
    assert stops.count >= 1
    assert said == ["stop", "go"] * stops.count
    now = time.monotonic()
    assert stops.within(now, now + 1) == 0
