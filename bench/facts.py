"""What the figures of a run depend on: the machine, the programs, other load."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from attrs import field, frozen

from bench.children import PACKAGES, CannotMeasure, program
from bench.pythons import other_python, this_python

#: The option for a program's version, if it isn't `--version`.
_VERSION_OPTIONS = {
    "danted": "-v",
    "haproxy": "-v",
    "ip": "-V",
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
    #: About how long each load lasted that was measured once in a round, in seconds.
    seconds: float
    #: How many windows a round has, and about how long they are, in seconds.
    windows: int
    window: float
    #: The share of the machine's CPU that was in use before it began.
    busy: float
    #: Facts about the machine, by name.
    machine: dict[str, str]
    #: Versions of the programs, by name.
    versions: dict[str, str]
    #: Relays that were left out, by title, and why.
    lacking: dict[str, str] = field(factory=dict)


def machine_facts() -> dict[str, str]:
    """Facts in which machines differ."""
    return {
        "processor": processor(Path("/proc/cpuinfo").read_text()),
        "cores": str(os.cpu_count()),
        "kernel": f"{platform.system()} {platform.release()}",
        "system": platform.freedesktop_os_release().get("PRETTY_NAME", "unknown"),
    }


def processor(text: str) -> str:
    """The processor's name, and its family and model, which tell its generation.

    Virtual machines often shorten the name.

    :param text: of /proc/cpuinfo.
    """
    found: dict[str, str] = dict(
        re.findall(r"^([\w ]+?)\s*: (.+)$", text, re.MULTILINE)
    )
    name = found.get("model name", platform.machine())
    if "cpu family" in found and "model" in found:
        name += f" (family {found['cpu family']}, model {found['model']})"
    return name


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
        "prometheus_client": version("prometheus_client"),
        "Python": str(this_python()),
    }
    with suppress(CannotMeasure):
        found["other Python"] = str(other_python())
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
