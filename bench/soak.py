"""The soak: thousands of connections that misbehave, and a relay that must not care.

    python -m bench.soak --minutes 10 --connections 2000 --transport both

starts a real `twistd relayd` with short timeouts and keeps about so many sessions
going through it, each of which follows a script drawn at random: it asks and is
answered, moves bulk data, half-closes, resets, stalls, idles, leaves while the
server is dialled (`bench/soak_scripts.py`).  What each end sees is checked, and so
is the relay's log line about each session (`bench/soak_traffic.py`).

The relay must end with what it began with.  Its descriptors and its memory, from
/proc, are compared at quiet moments, when no session is left: before the first; after
a warm-up with the same traffic, which lets its allocator's arenas grow; at the end.
The rules are in `bench/soak_verdict.py`.

Everything is on loopback, in two processes, this one and the relay; both need
about two descriptors for each connection.  The seed that is printed repeats the
sessions that are drawn, though not their timing.  Ctrl-C stops both, with the
summary so far.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import resource
import signal
import sys
import time
from collections.abc import Sequence

from bench.soak_ends import CONNECT, HALF_CLOSE, IDLE, SLACK, STALL
from bench.soak_log import RelayLog
from bench.soak_relay import MIB, Reading, Relay, RelayFailed
from bench.soak_scripts import Where
from bench.soak_traffic import HOSTS, Servers, Traffic
from bench.soak_verdict import Outcome, failures

#: Seconds of traffic before the first comparison; less when the soak is shorter.
WARM_UP = 30.0

#: Seconds between two lines of figures.
INTERVAL = 10.0

#: Seconds between the last session's end and a reading in quiet.
CALM = 2.0

#: Seconds in which the relay must listen.
STARTING = 15.0

#: Seconds that this process may be late before that is worth a word.
LATE = 1.0

#: Descriptors that this process and the relay need beside their connections'.
SPARE = 300


def relay_options(transport: str, servers: Servers) -> list[str]:
    """The relay's command line: a listener for each thing that clients may meet.

    The ordinary servers have one on each loopback address, and each of those
    relays takes its turns with all of the servers.
    """
    options = [
        *("--transport", transport),
        *("--connect-timeout", f"{CONNECT:g}"),
        *("--stall-timeout", f"{STALL:g}"),
        *("--idle-timeout", f"{IDLE:g}"),
        *("--half-close-timeout", f"{HALF_CLOSE:g}"),
        *("--drain-timeout", "1"),
    ]
    for where, host in listener_hosts():
        options += ["--listen", f"{host}:0"]
        for server in servers.addresses[where]:
            options += ["--dest", server]
    return options


def listener_hosts() -> list[tuple[Where, str]]:
    """The relay's listeners, in order: what is behind each, and its host."""
    others = (Where.GREETER, Where.CLOSED, Where.DARK)
    return [
        *((Where.SERVER, host) for host in HOSTS),
        *((where, HOSTS[0]) for where in others),
    ]


class Soak:
    """One relay, its traffic, and what came of it.

    :param transport: the relay's `--transport`.
    :param seconds: of traffic, without the warm-up and the quiet moments.
    """

    def __init__(
        self,
        *,
        transport: str,
        reactor: str,
        connections: int,
        seconds: float,
        seed: int,
    ) -> None:
        self._connections = connections
        self._seconds = seconds
        self._log = RelayLog()
        self._servers = Servers()
        self._relay = Relay(reactor, relay_options(transport, self._servers))
        self._seed = seed
        self._began_at = time.monotonic()
        self._traffic: Traffic | None = None
        #: How late this process itself was, at most, in seconds, since the last line
        #: of figures and in all: where it is late, the relay may look late.
        self._late = self._latest = 0.0
        #: When the last line of figures was printed, and the relay's CPU time then.
        self._shown = self._began_at, 0.0
        self._quiet: list[Reading] = []
        self._load: list[Reading] = []

    async def run(self) -> bool:
        """Soak, and print what happens; whether everything held.

        :raises CancelledError: interrupted; the summary so far has been printed.
        """
        print(f"seed {self._seed}: {' '.join(self._relay.command)}", flush=True)
        attending = asyncio.create_task(self._attend())
        found: list[str] = []
        interrupted = False
        try:
            await self._soak()
        except asyncio.CancelledError:
            interrupted = True
        except RelayFailed as problem:
            found.append(str(problem))
        finally:
            attending.cancel()
            self._take_lines()
            if self._traffic is not None:
                await self._traffic.close()
            status, stopping = self._relay.stop()
            self._servers.close()
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
        traffic = Traffic(self._seed, self._servers, await self._listening())
        self._traffic = traffic
        self._quiet.append(self._show("start"))
        await self._put_load(traffic, min(WARM_UP, self._seconds))
        self._load.clear()
        await self._settle(traffic, "after the warm-up")
        await self._put_load(traffic, self._seconds)
        await self._settle(traffic, "at the end")

    async def _listening(self) -> dict[Where, list[tuple[str, int]]]:
        """The relay's listeners, once all of them are open."""
        expected = listener_hosts()
        until = time.monotonic() + STARTING
        while len(self._log.listeners) < len(expected):
            self._relay.read()
            if time.monotonic() > until:
                raise RelayFailed(f"the relay did not listen within {STARTING:g} s")
            await asyncio.sleep(0.05)
        found: dict[Where, list[tuple[str, int]]] = {}
        for (where, _), listener in zip(expected, self._log.listeners, strict=True):
            host, _, port = listener.rpartition(":")
            found.setdefault(where, []).append((host, int(port)))
        return found

    async def _put_load(self, traffic: Traffic, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            await traffic.keep(
                self._connections, self._connections / 4, min(INTERVAL, left)
            )
            self._load.append(self._show("load"))

    async def _settle(self, traffic: Traffic, when: str) -> None:
        """Wait until no session is left, and the relay holds what it began with.

        A relay that does not get there keeps its descriptors; that is for the
        verdict to say.
        """
        await traffic.over()
        until = time.monotonic() + STALL + IDLE + SLACK
        while time.monotonic() < until:
            if self._relay.read().sockets <= self._quiet[0].sockets:
                break
            await asyncio.sleep(0.25)
        await asyncio.sleep(CALM)
        self._take_lines()
        traffic.miss_lines()
        self._quiet.append(self._show(f"quiet {when}"))

    async def _attend(self) -> None:
        """Take what the relay logs, and see how late this process is."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.05)
            self._late = max(self._late, time.monotonic() - before - 0.05)
            self._take_lines()

    def _take_lines(self) -> None:
        while self._relay.lines:
            session = self._log.hear(self._relay.lines.popleft())
            if session is not None and self._traffic is not None:
                self._traffic.hear(session)

    def _show(self, what: str) -> Reading:
        """Print a line of figures; the reading in it."""
        traffic, reading = self._traffic, self._relay.read()
        now = time.monotonic()
        busy = (reading.cpu - self._shown[1]) / max(now - self._shown[0], 0.001)
        self._shown = now, reading.cpu
        counts = ""
        if traffic is not None:
            counts = (
                f" alive {traffic.alive}, opened {traffic.opened},"
                f" moved {traffic.moved / MIB:.0f} MiB,"
                f" violations {traffic.violations.count};"
            )
        print(
            f"{now - self._began_at:4.0f} s {what}:{counts} {reading},"
            f" cpu {busy:.0%}; late {self._late:.2f} s",
            flush=True,
        )
        self._latest = max(self._latest, self._late)
        self._late = 0.0
        return reading

    def _summarize(self) -> None:
        traffic, log = self._traffic, self._log
        if traffic is not None:
            print("sessions by the ending in the relay's log:")
            for ending, count in traffic.endings.most_common():
                print(f"  {count:8}  {ending}")
            violations = traffic.violations
            if violations.count:
                print("violations by script, and the first of them:")
                for script, count in violations.scripts.most_common():
                    print(f"  {count:8}  {script}")
                for line in violations.lines():
                    print(f"  {line}")
        if log.remarks:
            print("the last lines of the relay's log that are more than information:")
            for line in log.remarks:
                print(f"  {line}")
        if self._latest > LATE:
            print(
                f"this process was late by up to {self._latest:.1f} s, so some"
                " violations may be its own;"
                " give it less to do (--connections) or more CPU"
            )

    def _outcome(self, status: int | None) -> Outcome:
        traffic = self._traffic
        start, baseline, final = self._quiet
        return Outcome(
            start=start,
            baseline=baseline,
            load=self._load,
            final=final,
            violations=traffic.violations.count if traffic else 0,
            troubles=self._log.troubles,
            failed=traffic.endings["failed"] if traffic else 0,
            status=status,
        )


# -- the command line


def raise_descriptor_limit(connections: int) -> None:
    """Let this process, and the relay, have as many descriptors as they may.

    :raises SystemExit: that is too few.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    needed = 2 * connections + SPARE
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SystemExit(
            f"soak: {connections} connections need {needed} descriptors, and"
            f" `ulimit -Hn` is {hard}"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line.

    :raises SystemExit: it can't be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak",
        description="Soak a relay in connections that misbehave; status 0 if it holds.",
    )
    parser.add_argument(
        "--minutes",
        type=_positive,
        default=10.0,
        help="of traffic for each transport, beside the warm-up and the quiet moments"
        " (default: 10)",
    )
    parser.add_argument(
        "--connections",
        type=int,
        choices=range(1, 100_001),
        metavar="N",
        default=2000,
        help="to keep alive, about (default: 2000)",
    )
    parser.add_argument(
        "--transport",
        choices=("plane", "twisted", "both"),
        default="both",
        help="the relay's --transport; both: one after the other (default)",
    )
    parser.add_argument(
        "--reactor", default="epoll", help="the relay's (default: epoll)"
    )
    parser.add_argument(
        "--seed", type=int, help="draw the sessions of an earlier soak again"
    )
    return parser.parse_args(arguments)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"bad {text!r}: expected a number above 0")
    return value


async def _run(options: argparse.Namespace, transport: str, seed: int) -> bool:
    running = asyncio.current_task()
    if running is not None:
        # Ctrl-C does the same.
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    soak = Soak(
        transport=transport,
        reactor=options.reactor,
        connections=options.connections,
        seconds=options.minutes * 60,
        seed=seed,
    )
    return await soak.run()


def main() -> int:
    """Soak each transport; the exit status."""
    options = parse_arguments()
    raise_descriptor_limit(options.connections)
    seed = options.seed
    if seed is None:
        seed = random.SystemRandom().randrange(1 << 32)
    held = True
    try:
        for transport in (
            ("plane", "twisted")
            if options.transport == "both"
            else (options.transport,)
        ):
            held = asyncio.run(_run(options, transport, seed)) and held
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 1
    except RelayFailed as problem:
        raise SystemExit(f"soak: {problem}") from problem
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
