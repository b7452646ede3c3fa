"""The clock on real reactors, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_reactors import REACTORS

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="timerfd(2) is Linux's")

#: What runs in a process of its own: the reactor is the argument.
SCRIPT = """
import sys, time
real, step = time.time, [0.0]
time.time = lambda: real() + step[0]
from twisted.application.reactors import installReactor
reactor = installReactor(sys.argv[1])
import relayd.net.timers as module
if sys.argv[2] == "thread":
    def refuse(*_):
        raise OSError(38, "no")
    module.timerfd_create = refuse
import json, os, signal
from relayd.net.monotonic import monotonic

clock = monotonic(reactor)
made, begin = [], time.monotonic()

def note(name):
    made.append((name, time.monotonic() - begin))

def back():
    # With what the reactor opens as it begins.
    global before
    before = len(os.listdir("/dev/fd"))
    note("begin")
    # All of these are asked for before the machine's clock is set back by a day, and
    clock.callLater(0, note, "zero")
    clock.callLater(0, clock.callLater, 0, note, "zero twice")
    # in the order in which they are due, whatever time passes between two of them.
    clock.callLater(0.05, note, "never").cancel()
    clock.callLater(5, note, "sooner").reset(0.05)
    clock.callLater(0.05, note, "after 0.05").reset(0.1)
    clock.callLater(0.15, note, "after 0.15")
    step[0] -= 86400
    clock.callLater(0.2, forth)

def forth():
    # And this one before it is set forward by two.
    clock.callLater(0.1, note, "after another 0.1")
    step[0] += 2 * 86400
    clock.callLater(0.12, end)

def end():
    note("end")
    assert not clock.getDelayedCalls()
    reactor.callLater(0, stop)

def stop():
    left = [repr(each) for each in reactor.getReaders() if "relayd" in repr(each)]
    print(json.dumps([made, left, len(os.listdir("/dev/fd")) - before]))
    # Pending as the reactor stops.
    clock.callLater(60, note, "never")
    reactor.stop()

# Before the reactor runs; and the child of a fork knows nothing of it.
reactor.callWhenRunning(clock.callLater, 0, back)
reactor.run()
"""


@LINUX
@pytest.mark.parametrize("how", ["timerfd", "thread"])
@pytest.mark.parametrize("name", REACTORS)
def test_it_runs_on_every_reactor_however_the_machines_clock_steps(
    name: str, how: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", SCRIPT, name, how],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd=Path(__file__).parent.parent.parent,
    )
    assert done.stderr == ""
    made, left, opened = json.loads(done.stdout)
    times = dict(made)
    assert list(times) == [
        *("begin", "zero", "zero twice", "sooner", "after 0.05", "after 0.15"),
        *("after another 0.1", "end"),
    ]
    for call, least in (
        ("zero twice", 0),
        ("sooner", 0.05),
        ("after 0.05", 0.1),
        ("after 0.15", 0.15),
        ("after another 0.1", 0.3),
        ("end", 0.32),
    ):
        assert least <= times[call] < least + 5
    assert times["zero"] < 5
    assert (left, opened) == ([], 0)


#: A clock that was made before a fork, and asked after it.
FORKED = """
import os, time
from twisted.internet import reactor
from relayd.net.monotonic import monotonic
clock = monotonic(reactor)
if os.fork():
    _, status = os.wait()
    raise SystemExit(os.waitstatus_to_exitcode(status))
clock.callLater(0.01, reactor.stop)
reactor.run()
print("done")
"""


def test_a_fork_before_the_first_call_is_harmless() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        cwd=Path(__file__).parent.parent.parent,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
