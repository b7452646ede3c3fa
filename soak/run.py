"""One soak: a relay is started, put under load, stopped, and checked.

There is load twice: a warm-up, in which the relay's allocator grows, and then the time
asked for.  The relay's descriptors and memory are read when there are no sessions:
before the first, after the warm-up, and at the end.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from soak.echoes import LISTENERS, Echoes, flow_options
from soak.ends import Where
from soak.flows import Flows
from soak.kernel import Drops
from soak.log import RelayLog, SessionLine
from soak.relay import MIB, Reading, Relay, RelayFailed
from soak.servers import Servers, listener_hosts, relay_options
from soak.stops import EVERY, Stops, stop_now_and_then
from soak.timeouts import IDLE, SLACK, STALL
from soak.traffic import Traffic
from soak.verdict import Datagrams, Outcome, failures
from soak.violations import Violations

#: Seconds of traffic before the first comparison; less when the soak is shorter.
WARM_UP = 30.0

#: Seconds between two lines of figures.
INTERVAL = 10.0

#: Seconds between the end of the last session and a reading.
CALM = 2.0

#: Seconds between two settings of the relay's wall clock, and between two floods, plus
#: or minus a half; more often when the soak is short.
CLOCK_EVERY, FLOOD_EVERY = 7.0, 25.0

#: Seconds within which the relay must listen.
STARTING = 15.0

#: Seconds of lateness of this process from which the summary warns.
LATE = 1.0


class Soak:
    """One relay, its traffic, and the outcome.

    :param transport: the relay's `--transport`.
    :param seconds: of load, without the warm-up and the readings.
    :param flows: UDP flows to keep open.
    :param stop: seconds for which the relay is stopped; 0: never.
    :param step: the largest error of its wall clock, in hours; 0: never set.
    """

    def __init__(
        self,
        *,
        transport: str,
        reactor: str,
        connections: int,
        flows: int,
        seconds: float,
        stop: float,
        step: float,
        seed: int,
    ) -> None:
        self._connections = connections
        self._flow_count = flows
        self._seconds = seconds
        self._stop = stop
        self._step = step
        self._log = RelayLog()
        self._violations = Violations(self._print_violation)
        self._stops = Stops()
        self._drops = Drops()
        self._servers = Servers()
        self._echoes = Echoes()
        options = relay_options(transport, self._servers)
        if flows:
            options += flow_options(self._echoes.addresses, flows)
        clock_every = min(CLOCK_EVERY, seconds / 5)
        clock = [f"{seed}", f"{clock_every:g}", f"{step:g}"]
        self._relay = Relay(clock, reactor, options)
        self._seed = seed
        self._dice = random.Random(seed)  # noqa: S311 - to be repeated
        self._began_at = time.monotonic()
        self._traffic: Traffic | None = None
        self._flows: Flows | None = None
        #: How late this process was at most, in seconds, since the last line of figures
        #: and in all: if it is late, the relay may seem late.
        self._late = self._latest = 0.0
        #: When the last line of figures was printed, and the relay's CPU time then.
        self._shown = self._began_at, 0.0
        self._quiet: list[Reading] = []
        self._load: list[Reading] = []

    async def run(self) -> bool:
        """Run, and print what happens; whether the relay passed.

        :raises CancelledError: interrupted; the summary so far has been printed.
        """
        print(f"seed {self._seed}: {' '.join(self._relay.command)}", flush=True)
        watching = asyncio.create_task(self._watch())
        found: list[str] = []
        interrupted = False
        try:
            await self._soak()
        except asyncio.CancelledError:
            interrupted = True
        except RelayFailed as problem:
            found.append(str(problem))
        finally:
            watching.cancel()
            self._take_lines()
            for traffic in (self._traffic, self._flows):
                if traffic is not None:
                    await traffic.close()
            status, stopping = self._relay.end()
            self._servers.close()
            self._echoes.close()
        self._take_lines()
        self._summarize()
        if interrupted:
            print("interrupted: no verdict")
            raise asyncio.CancelledError
        found = found or failures(self._outcome(status))
        for line in found:
            print(f"FAILED: {line}")
        if not found:
            print(f"passed; the relay stopped within {stopping:.1f} s")
        return not found

    async def _soak(self) -> None:
        streams, datagrams = await self._listening()
        common = self._violations, self._stops
        traffic = Traffic(self._seed, self._servers, streams, *common, self._drops)
        self._traffic = traffic
        if datagrams:
            self._flows = Flows(self._seed, self._echoes, datagrams, *common)
        self._quiet.append(self._show("start"))
        await self._put_load(traffic, min(WARM_UP, self._seconds))
        self._load.clear()
        await self._settle(traffic, "after the warm-up")
        await self._put_load(traffic, self._seconds)
        await self._settle(traffic, "at the end")

    async def _listening(
        self,
    ) -> tuple[dict[Where, list[tuple[str, int]]], list[tuple[str, int]]]:
        """The relay's listeners, once all are open: for streams, and for datagrams."""
        expected = listener_hosts()
        count = len(expected) + (LISTENERS if self._flow_count else 0)
        until = time.monotonic() + STARTING
        while len(self._log.listeners) < count:
            self._relay.read()
            if time.monotonic() > until:
                raise RelayFailed(f"the relay did not listen within {STARTING:g} s")
            await asyncio.sleep(0.05)
        found: dict[Where, list[tuple[str, int]]] = {}
        addresses = [
            (host, int(port))
            for host, _, port in (each.rpartition(":") for each in self._log.listeners)
        ]
        for (where, _), address in zip(expected, addresses, strict=False):
            found.setdefault(where, []).append(address)
        return found, addresses[len(expected) :]

    async def _put_load(self, traffic: Traffic, seconds: float) -> None:
        until = time.monotonic() + seconds
        async with in_background(self._disturbances(seconds)):
            while (left := until - time.monotonic()) > 0:
                await traffic.keep(
                    self._connections, self._connections / 4, min(INTERVAL, left)
                )
                self._load.append(self._show("load"))

    def _disturbances(self, seconds: float) -> list[Coroutine[Any, Any, None]]:
        """What runs during the load; none of it ends by itself."""
        found: list[Coroutine[Any, Any, None]] = []
        if self._stop:
            found.append(
                stop_now_and_then(
                    self._stops,
                    self._dice,
                    every=min(EVERY, seconds / 4),
                    seconds=self._stop,
                    suspend=self._relay.suspend,
                    resume=self._relay.resume,
                )
            )
        if self._flows is not None:
            count = self._flow_count
            flood_every = min(FLOOD_EVERY, seconds / 4)
            found += [
                self._flows.keep(count, count / 4),
                self._flows.flood_now_and_then(count, self._dice, flood_every),
            ]
        return found

    async def _settle(self, traffic: Traffic, when: str) -> None:
        """Wait until no session is left, and the relay has closed its sockets.

        A relay that does not is found by the verdict.
        """
        await traffic.over()
        if self._flows is not None:
            await self._flows.over()
        until = time.monotonic() + STALL + IDLE + SLACK
        while time.monotonic() < until:
            if self._relay.read().sockets <= self._quiet[0].sockets:
                break
            await asyncio.sleep(0.25)
        await asyncio.sleep(CALM)
        self._take_lines()
        traffic.miss_lines()
        if self._flows is not None:
            self._flows.forget_all()
        self._quiet.append(self._show(f"quiet {when}"))

    async def _watch(self) -> None:
        """Read the relay's log, and measure how late this process is."""
        check_at = 0.0
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.05)
            now = time.monotonic()
            self._late = max(self._late, now - before - 0.05)
            self._stops.was_late(before + 0.05, now)
            if now >= check_at:
                check_at = now + 1
                self._drops.check(now)
            self._take_lines()

    def _take_lines(self) -> None:
        while self._relay.lines:
            line = self._log.add(self._relay.lines.popleft())
            if isinstance(line, SessionLine):
                if self._traffic is not None:
                    self._traffic.check_line(line)
            elif line is not None and self._flows is not None:
                self._flows.check_line(line)

    def _print_violation(self, text: str) -> None:
        seconds = time.monotonic() - self._began_at
        print(f"{seconds:4.0f} s violation: {text}", flush=True)

    def _show(self, what: str) -> Reading:
        """Print a line of figures; returns the reading."""
        traffic, flows = self._traffic, self._flows
        reading = self._relay.read()
        now = time.monotonic()
        busy = (reading.cpu - self._shown[1]) / max(now - self._shown[0], 0.001)
        self._shown = now, reading.cpu
        counts = ""
        if traffic is not None:
            counts = (
                f" alive {traffic.alive}, opened {traffic.opened},"
                f" moved {traffic.moved / MIB:.0f} MiB,"
            )
        if flows is not None:
            counts += (
                f" flows {flows.alive}, opened {flows.opened},"
                f" received {flows.tally.received},"
            )
        print(
            f"{now - self._began_at:4.0f} s {what}:{counts}"
            f" violations {self._violations.count}; {reading},"
            f" cpu {busy:.0%}; late {self._late:.2f} s",
            flush=True,
        )
        self._latest = max(self._latest, self._late)
        self._late = 0.0
        return reading

    def _summarize(self) -> None:
        flows, log, violations = self._flows, self._log, self._violations
        for what, traffic in (("sessions", self._traffic), ("flows", flows)):
            if traffic is not None:
                print(f"{what} by the ending in the relay's log:")
                for ending, count in traffic.endings.most_common():
                    print(f"  {count:8}  {ending}")
        print(
            f"the relay was stopped {self._stops.count} times,"
            f" its wall clock set {log.steps} times"
        )
        if self._drops.count:
            print(
                f"the kernel dropped {self._drops.count} TCP segments for want of"
                " memory (net.ipv4.tcp_mem, or a full receive buffer)"
            )
        if self._traffic is not None:
            for why, count in self._traffic.excused.items():
                print(f"{count} timeouts that were not due do not count: {why}")
        if flows is not None:
            tally = flows.tally
            print(
                f"datagrams: {tally.sent} sent, {tally.flooded} more in"
                f" {flows.floods} floods, {tally.received} received, {tally.lost} lost,"
                f" {tally.strays} met a new flow of the same port"
            )
            for line in log.datagrams:
                print(f"  {line.listener}: {line.counters}")
        if violations.count:
            print("violations by script, and the first of them:")
            for script, count in violations.scripts.most_common():
                print(f"  {count:8}  {script}")
            for text in violations.lines():
                print(f"  {text}")
        if log.remarks:
            print("the last lines of the relay's log that are more than information:")
            for text in log.remarks:
                print(f"  {text}")
        if self._latest > LATE:
            print(
                f"this process was late by up to {self._latest:.1f} s, so some"
                " violations may be its own;"
                " give it less to do (--connections) or more CPU"
            )

    def _outcome(self, status: int | None) -> Outcome:
        traffic, flows, log = self._traffic, self._flows, self._log
        start, baseline, final = self._quiet
        datagrams = None
        if flows is not None:
            datagrams = Datagrams(flows.tally, log.datagrams, LISTENERS)
        return Outcome(
            start=start,
            baseline=baseline,
            load=self._load,
            final=final,
            violations=self._violations.count,
            troubles=log.troubles,
            failed=traffic.endings["failed"] if traffic else 0,
            status=status,
            datagrams=datagrams,
            steps=log.steps if self._step else None,
        )


@asynccontextmanager
async def in_background(
    work: Sequence[Coroutine[Any, Any, None]],
) -> AsyncIterator[None]:
    """Run coroutines that never end while a block runs, and cancel them after it."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            done, _ = await asyncio.wait(tasks)
            problems = [each.exception() for each in done if not each.cancelled()]
            for problem in filter(None, problems):
                raise problem
