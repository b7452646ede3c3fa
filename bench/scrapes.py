"""Measurements of operating many relays: a scrape of metrics, a check of a file.

Both are times on the wall, which only a quiet machine has.  Each window is one scrape,
so the median is of the scrapes, and with it that of the longest delay in each: a single
long one may be the machine's.

The metrics are fetched by curl, in a process of its own, so that reading them holds up
nothing here.  Meanwhile there are requests on a kept connection through one of the
relays, and short sessions through the same, each one after the other with a pause; and
then, for as long, the same without a scrape.
"""

from __future__ import annotations

import re
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import TypeVar

from bench.children import (
    PATIENCE,
    CannotMeasure,
    beside_python,
    child,
    free_port,
    program,
)
from bench.connections import idle_pairs, short_connections
from bench.origins import site
from bench.relays import Measure, Readings, Relay

#: Seconds between requests, and between short sessions: the relay is not busy.
PAUSE = 0.002

#: What Prometheus asks for.
HEADERS = (
    "Accept: application/openmetrics-text;version=1.0.0",
    "Accept-Encoding: gzip",
)

#: The file's name, in a folder of its own.
_FILE = "relayd.toml"

#: A relay that had a session, in the metrics.
_OPENED = re.compile(
    r'^relayd_sessions_opened_total\{relay="r\d+"\} [1-9]', re.MULTILINE
)

Result = TypeVar("Result")


def write_file(
    folder: Path, ports: Sequence[int], destination: int, metrics: int
) -> None:
    """A file with a relay for each port, `r0` and so on, and metrics."""
    relays = [
        f'[tcp.r{number}]\nlisten = "127.0.0.1:{port}"\n'
        f'dest = "127.0.0.1:{destination}"\n'
        for number, port in enumerate(ports)
    ]
    text = "\n".join([f'metrics = "127.0.0.1:{metrics}"\n', *relays])
    (folder / _FILE).write_text(text)


@contextmanager
def begin_scrape(relays: int, _: Relay, __: float) -> Iterator[Measure]:
    """Milliseconds of a scrape with so many relays, and of the longest meanwhile."""
    with site() as origin, tempfile.TemporaryDirectory(prefix="relayd-bench-") as name:
        folder = Path(name)
        ports = [free_port() for _ in range(relays)]
        metrics = free_port()
        write_file(folder, ports, origin.port, metrics)
        argv = [beside_python("twistd"), "-n", "--pidfile=", "--reactor=epoll"]
        argv += ["relayd", "--config", _FILE]
        with child("relayd", argv, folder) as running:
            running.listening(*ports, metrics)
            # Each relay has a session to tell of.
            for port in ports:
                short_connections(port, 1, "client")
            scrape(metrics, folder)
            told = len(_OPENED.findall((folder / "metrics").read_text()))
            if told != relays:
                raise CannotMeasure(f"a scrape tells of {told} relays, not {relays}")
            with idle_pairs(ports[0], 1) as pairs:
                loads = {
                    "request": partial(pairs.take_turns, 1),
                    "short": partial(short_connections, ports[0], 1, "client"),
                }
                yield partial(_measure_scrape, relays, loads, metrics, folder)


def _measure_scrape(
    relays: int, loads: Mapping[str, Callable[[], None]], metrics: int, folder: Path
) -> Readings:
    took, scraped = longest_while(partial(scrape, metrics, folder), loads)
    _, alone = longest_while(partial(time.sleep, took), loads)
    name = f"scrape-{relays}"
    readings = {name: took * 1e3}
    for load in loads:
        readings[f"{name}-{load}"] = scraped[load] * 1e3
        readings[f"{name}-{load}-without"] = alone[load] * 1e3
    return readings


def scrape(port: int, folder: Path) -> float:
    """Fetch the metrics, into the file `metrics`; the seconds that it took.

    :raises CannotMeasure: they were not to be had.
    """
    argv = [
        *(program("curl"), "--silent", "--show-error", "--fail"),
        *("--output", "metrics", "--write-out", "%{time_total}"),
        *(word for header in HEADERS for word in ("--header", header)),
        f"http://127.0.0.1:{port}/metrics",
    ]
    # relayd's standard error is in the folder itself.
    with tempfile.TemporaryDirectory(dir=folder) as own:
        with child("curl", argv, Path(own), read=True) as running:
            took = float(running.output(PATIENCE))
        (Path(own) / "metrics").replace(folder / "metrics")
    return took


def longest_while(
    work: Callable[[], Result], loads: Mapping[str, Callable[[], None]]
) -> tuple[Result, dict[str, float]]:
    """Make each load, again and again, while `work()` is done.

    :returns: its result, and the most seconds that each of the loads took once.
    """
    done = Event()

    def longest(load: Callable[[], None]) -> float:
        most = 0.0
        while True:
            begin = time.perf_counter()
            load()
            most = max(most, time.perf_counter() - begin)
            if done.wait(PAUSE):
                return most

    with ThreadPoolExecutor(len(loads)) as threads:
        under_way = {
            name: threads.submit(longest, load) for name, load in loads.items()
        }
        try:
            result = work()
        finally:
            done.set()
        return result, {name: one.result() for name, one in under_way.items()}


@contextmanager
def begin_check(relays: int, _: Relay, __: float) -> Iterator[Measure]:
    """Seconds of `relayctl check` of a file with so many relays: wall, and CPU."""
    with tempfile.TemporaryDirectory(prefix="relayd-bench-") as name:
        folder = Path(name)
        # Nothing listens there.
        write_file(folder, range(10_000, 10_000 + relays), 8_080, 9_100)
        argv = [beside_python("relayctl"), "check", _FILE]

        def measure() -> Readings:
            used, begin = _cpu_of_ended(), time.perf_counter()
            with child("relayctl check", argv, folder, read=True) as running:
                running.output(PATIENCE)
                took = time.perf_counter() - begin
            return {
                f"check-{relays}": took,
                f"check-{relays}-cpu": _cpu_of_ended() - used,
            }

        measure()
        yield measure


def _cpu_of_ended() -> float:
    """Seconds of CPU that the ended children of this process have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
