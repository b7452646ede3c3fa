"""What a service manager is told: on fakes, and by a real relay."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.testing import MemoryReactorClock
from twisted.logger import capturedLogs

from relayd.operating.notify import EXTENSION, INTERVAL, SOON, Notifier
from relayd.operating.running import LAST
from tests.support.process import PATIENCE, Server, connect, eventually, relay


class Relays:
    """Stands in for a RelayService whose stop takes twelve seconds."""

    def __init__(self) -> None:
        self.shutdown_delay, self.drain_timeout = 4.0, 8.0 - LAST
        self.draining = False
        self.counts = (0, 0)
        self.all_listening = True


@contextmanager
def manager(address: str) -> Iterator[socket.socket]:
    """A manager's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + address[1:] if address.startswith("@") else address)
        sock.setblocking(False)
        yield sock


def told(sock: socket.socket) -> list[str]:
    """What it was told since the last time."""
    lines = []
    try:
        while True:
            lines += sock.recv(4096).decode().split("\n")
    except BlockingIOError:
        return lines


class Bench:
    """A notifier on fakes; `environ` is what the manager has set."""

    def __init__(self, address: str, **environ: str) -> None:
        self.reactor: Any = MemoryReactorClock()
        self.relays: Any = Relays()
        made = Notifier.of(
            self.reactor, self.relays, {"NOTIFY_SOCKET": address, **environ}
        )
        assert made is not None
        self.notifier = made
        # It runs when the reactor does.
        made.startService()

    def run(self) -> None:
        for call, args, keywords in self.reactor.whenRunningHooks:
            call(*args, **keywords)

    def end(self) -> None:
        for call, args, keywords in self.reactor.triggers["after"]["shutdown"]:
            call(*args, **keywords)
        assert self.reactor.getDelayedCalls() == []


@pytest.mark.parametrize("address", ["path", "@relayd-test-{}"])
def test_what_is_told_from_start_to_end(address: str, tmp_path: Path) -> None:
    """Ready when all listeners stand and it runs; then what changes."""
    name = str(tmp_path / "n") if address == "path" else address.format(os.getpid())
    with manager(name) as sock:
        bench = Bench(name)
        bench.relays.all_listening = False
        assert told(sock) == []
        bench.run()
        assert told(sock) == ["STATUS=0 sessions, 0 flows"]
        bench.relays.all_listening = True
        bench.reactor.advance(SOON)
        assert told(sock) == ["READY=1"]
        bench.reactor.advance(INTERVAL)
        assert told(sock) == []
        bench.relays.counts = (3, 2)
        bench.reactor.advance(INTERVAL)
        assert told(sock) == ["STATUS=3 sessions, 2 flows"]
        bench.notifier.stopService()
        extend = f"EXTEND_TIMEOUT_USEC={int(EXTENSION * 1e6)}"
        status = "STATUS=3 sessions, 2 flows"
        assert told(sock) == ["STOPPING=1", extend, f"{status}, stopping"]
        # Twelve seconds of delay, drain and a last moment: then it is the manager's
        # turn.
        bench.relays.draining = True
        bench.reactor.pump([INTERVAL] * 6)
        assert told(sock) == [extend, f"{status}, draining", extend]
        bench.end()


def test_a_reload(tmp_path: Path) -> None:
    """Begun and over, each in one datagram; what came of it stays in the status."""
    name = str(tmp_path / "n")
    with manager(name) as sock:
        bench = Bench(name)
        bench.run()
        told(sock)
        bench.reactor.advance(2.5)
        bench.notifier.reloading()
        assert sock.recv(4096) == b"RELOADING=1\nMONOTONIC_USEC=2500000"
        bench.notifier.reloaded()
        assert sock.recv(4096) == b"READY=1"
        bench.notifier.reloading()
        bench.notifier.reloaded("the last reload was refused:\nREADY=0")
        why = "the last reload was refused: READY=0"
        assert told(sock) == [
            "RELOADING=1",
            "MONOTONIC_USEC=2500000",
            "READY=1",
            f"STATUS=0 sessions, 0 flows; {why}",
        ]
        bench.relays.counts = (1, 0)
        bench.reactor.advance(INTERVAL)
        assert told(sock) == [f"STATUS=1 sessions, 0 flows; {why}"]
        bench.notifier.reloaded("x" * 10_000)
        [_, status] = told(sock)
        assert len(status) < 300
        bench.notifier.reloaded()
        assert told(sock) == ["READY=1", "STATUS=1 sessions, 0 flows"]
        bench.notifier.stopService()
        bench.end()


def test_a_reload_while_it_starts_or_stops(tmp_path: Path) -> None:
    """It is not said: the manager waits for another READY=1, or for the end."""
    name = str(tmp_path / "n")
    with manager(name) as sock:
        bench = Bench(name)
        bench.relays.all_listening = False
        bench.run()
        assert told(sock) == ["STATUS=0 sessions, 0 flows"]
        bench.notifier.reloading()
        bench.notifier.reloaded("refused")
        assert told(sock) == []
        bench.relays.all_listening = True
        bench.reactor.advance(SOON)
        assert told(sock) == ["READY=1", "STATUS=0 sessions, 0 flows; refused"]
        bench.notifier.stopService()
        assert told(sock)[0] == "STOPPING=1"
        bench.notifier.reloading()
        bench.notifier.reloaded()
        assert told(sock) == []
        bench.end()


def test_the_time_of_a_reload_is_the_managers(tmp_path: Path) -> None:
    """CLOCK_MONOTONIC: systemd compares it with when it has sent the signal."""
    name = str(tmp_path / "n")
    relays: Any = Relays()
    with manager(name) as sock:
        notifier = Notifier(reactor, name, relays)
        # As it is once it runs and has told that it is ready.
        notifier._ready = True
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        notifier.reloading()
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        [_, line] = told(sock)
        assert before <= int(line.removeprefix("MONOTONIC_USEC=")) <= after


def test_the_watchdog_hears_of_it(tmp_path: Path) -> None:
    """Twice in the time; a time of another process is not ours."""
    name = str(tmp_path / "n")
    with manager(name) as sock:
        for pid, count in ((os.getpid(), 4), (1, 0)):
            bench = Bench(name, WATCHDOG_USEC="2000000", WATCHDOG_PID=str(pid))
            bench.run()
            told(sock)
            bench.reactor.pump([0.5] * 8)
            assert told(sock) == ["WATCHDOG=1"] * count
            bench.end()
        # A time that is no time, and one that nobody could keep.
        for text in ("soon", "1"):
            bench = Bench(name, WATCHDOG_USEC=text)
            bench.run()
            told(sock)
            bench.reactor.pump([SOON / 2] * 4)
            assert len(told(sock)) == 2 * (text == "1")
            bench.end()


def test_a_manager_that_does_not_listen_stops_nothing(tmp_path: Path) -> None:
    """It is said once."""
    bench = Bench(str(tmp_path / "none"))
    with capturedLogs() as events:
        bench.run()
        bench.relays.counts = (1, 0)
        bench.reactor.advance(INTERVAL)
    [event] = events
    assert (event["what"], event["why"]) == ("READY=1", "No such file or directory")
    bench.end()


def test_without_a_manager_nobody_is_told() -> None:
    relays: Any = Relays()
    for address in ("", "vsock:2:1"):
        assert Notifier.of(None, relays, {"NOTIFY_SOCKET": address}) is None
    assert Notifier.of(None, relays, {}) is None


def test_a_relay_that_is_ready_serves(tmp_path: Path) -> None:
    """And one that is stopped says so before its sessions end."""
    name = str(tmp_path / "n")
    heard: list[str] = []
    with manager(name) as sock, Server() as server:

        def hears(pattern: str) -> None:
            def there() -> bool:
                heard.extend(told(sock))
                return any(re.fullmatch(pattern, each) for each in heard)

            eventually(there, f"it tells {pattern}")

        options = ("-l", "127.0.0.1:0", "-d", server.address, "--shutdown-delay=0.2")
        environ = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "200000"}
        with relay(*options, env=environ) as running:
            hears("READY=1")
            with connect(running.port) as client, server.accept():
                hears("STATUS=1 sessions, 0 flows")
                heard.clear()
                hears("WATCHDOG=1")
                running.signal(signal.SIGTERM)
                hears("STOPPING=1")
                hears(r"EXTEND_TIMEOUT_USEC=\d+")
                hears("STATUS=1 sessions, 0 flows, stopping")
                hears("STATUS=1 sessions, 0 flows, draining")
                client.close()
            assert running.wait(PATIENCE) == 0
