"""What the figures of a run depend on: the machine, the programs, other load."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from attrs import frozen

from bench.children import PACKAGES, CannotMeasure, program

#: The option for a program's version, if it isn't `--version`.
_VERSION_OPTIONS = {
    "danted": "-v",
    "haproxy": "-v",
    "nginx": "-v",
    "socat": "-V",
    "wrk": "-v",
}


@frozen
class Run:
    """A run: when, how long, on which machine, with which programs."""

    #: The day, as 2026-01-31.
    date: str
    rounds: int
    #: About how long each load lasted.
    seconds: float
    #: The share of the machine's CPU that was in use before it began.
    busy: float
    #: Facts about the machine, by name.
    machine: dict[str, str]
    #: Versions of the programs, by name.
    versions: dict[str, str]


def machine_facts() -> dict[str, str]:
    """Facts in which machines differ."""
    model = re.search(
        r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
    )
    return {
        "processor": model[1] if model else platform.machine(),
        "cores": str(os.cpu_count()),
        "kernel": f"{platform.system()} {platform.release()}",
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", "unknown"),
    }


def busy(seconds: float = 1.0) -> float:
    """The share of the machine's CPU in use, measured for so many seconds."""

    def read() -> tuple[int, int]:
        ticks = [int(word) for word in Path("/proc/stat").read_text().split()[1:9]]
        return sum(ticks), ticks[3] + ticks[4]  # idle, and waiting for a disk

    every, idle = read()
    time.sleep(seconds)
    later, later_idle = read()
    return 1 - (later_idle - idle) / max(1, later - every)


def versions() -> dict[str, str]:
    """Versions of all programs that are installed."""
    found = {
        "relayd": version("relayd"),
        "Twisted": version("twisted"),
        "Python": platform.python_version()
        + (" (the system's)" if sys.base_prefix == "/usr" else ""),
    }
    for name in PACKAGES:
        try:
            path = program(name)
        except CannotMeasure:
            continue
        shown = subprocess.run(  # noqa: S603
            [path, _VERSION_OPTIONS.get(name, "--version")],
            capture_output=True,
            text=True,
            check=False,  # wrk exits with 1
        )
        if number := re.search(r"\d+\.\d[\w.+~-]*", shown.stdout + shown.stderr):
            found[name] = number[0].rstrip(".")  # Dante's is followed by a full stop
    return found
