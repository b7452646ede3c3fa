"""What a relay does when it is sent a signal: on fakes, and as a real process."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import socket
import subprocess
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent

from relayd.operating import signals
from relayd.operating.signals import CLOSING, Signals, catch_early_sigterm
from tests.conftest import LoggedFailures
from tests.support.process import (
    START,
    TWIST,
    TWISTD,
    RelayProcess,
    Server,
    command,
    connect,
    eventually,
    read_all,
    read_exactly,
    relay,
    reset,
)

STOPPING = {signal.SIGTERM, signal.SIGINT}
ALL = STOPPING | {signal.SIGHUP, signal.SIGUSR1}


class FakeReactor(Clock):
    """Remembers what it is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.starting: list[Any] = []
        self.threads: list[Any] = []
        self.stops = 0

    def callWhenRunning(self, call: Any) -> None:
        self.starting.append(call)

    def callFromThread(self, call: Any, *args: Any) -> None:
        self.threads.append((call, args))

    def stop(self) -> None:
        self.stops += 1

    def turn(self) -> None:
        """Do what was asked from a signal handler."""
        calls, self.threads = self.threads, []
        for call, args in calls:
            call(*args)


class FakeLogFile:
    """Counts how often it is opened anew, or can't be."""

    path = "/var/log/relayd.log"
    problem: OSError | None = None

    def __init__(self) -> None:
        self.times = 0

    def reopen(self) -> None:
        self.times += 1
        if self.problem is not None:
            raise self.problem


class Handled:
    """A service for signals on fakes, and what it was made of.

    :ivar installed: its handlers, without being installed.
    :ivar blocked: those that it keeps from being delivered, likewise.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, ignored: frozenset[int] = frozenset()
    ) -> None:
        self.installed: dict[int, Any] = {}
        self.blocked: set[int] = set()
        self.terminal = signals.errno.ENXIO
        self.reactor = FakeReactor()
        self.log_file: FakeLogFile | None = FakeLogFile()
        self.cuts = 0
        self.reload: Any = None
        monkeypatch.setattr(signal, "signal", self.installed.__setitem__)
        monkeypatch.setattr(
            signal,
            "getsignal",
            lambda number: signal.SIG_IGN if number in ignored else signal.SIG_DFL,
        )
        monkeypatch.setattr(signals, "_terminal_error", lambda: self.terminal)
        monkeypatch.setattr(signal, "pthread_sigmask", self._mask)

    def _mask(self, how: int, numbers: Any) -> None:
        if how == signal.SIG_BLOCK:
            self.blocked |= set(numbers)
        else:
            self.blocked -= set(numbers)

    def _cut(self) -> None:
        self.cuts += 1

    def start(self) -> None:
        files = [] if self.log_file is None else [self.log_file]
        service = Signals(self.reactor, self._cut, files, self.reload)
        service.privilegedStartService()
        service.startService()

    def send(self, number: int) -> list[str]:
        """What the log says of a signal."""
        with capturedLogs() as events:
            self.installed[number](number, None)
            stops, cuts = self.reactor.stops, self.cuts
            assert not events, "nothing happens inside the handler itself"
            assert (stops, cuts) == (self.reactor.stops, self.cuts)
            self.reactor.turn()
        return [str(formatEvent(event)) for event in events]


@pytest.fixture
def handled(monkeypatch: pytest.MonkeyPatch) -> Handled:
    """With no terminal, and nothing ignored."""
    return Handled(monkeypatch)


@pytest.mark.parametrize("second", STOPPING, ids=lambda number: number.name)
def test_the_first_signal_stops_and_the_second_ends(
    handled: Handled, second: signal.Signals
) -> None:
    """Whichever they are."""
    handled.start()
    assert handled.send(signal.SIGTERM) == ["SIGTERM: stopping"]
    assert (handled.reactor.stops, handled.cuts) == (1, 0)
    for cuts in (1, 2):
        assert handled.send(second) == [f"{second.name} again: ending at once"]
        assert (handled.reactor.stops, handled.cuts) == (1, cuts)


def test_signals_before_the_reactor_runs_are_handled(handled: Handled) -> None:
    """And again once it does, as it installs its own; both runners."""
    service = Signals(handled.reactor, list, None)
    service.privilegedStartService()
    assert set(handled.installed) == ALL
    handled.installed.clear()
    service.startService()
    assert handled.installed == {}
    [running] = handled.reactor.starting
    running()
    assert set(handled.installed) == ALL
    handled.installed.clear()
    # `twist` has no privileged step.
    Signals(handled.reactor, list, None).startService()
    assert set(handled.installed) == ALL


def test_none_gets_to_the_handlers_of_the_reactor(handled: Handled) -> None:
    """It has its own for a moment, which answer the second with a traceback."""
    service = Signals(handled.reactor, list, None)
    service.privilegedStartService()
    assert not handled.blocked
    service.startService()
    assert handled.blocked == ALL
    [running] = handled.reactor.starting
    running()
    assert not handled.blocked
    never_ran = Signals(handled.reactor, list, None)
    never_ran.startService()
    never_ran.stopService()
    assert not handled.blocked


def test_sighup_ends_nothing(handled: Handled) -> None:
    """Neither a daemon's, nor one in a terminal that stays."""
    for handled.terminal in (signals.errno.ENXIO, 0, signals.errno.EMFILE):
        handled.start()
        assert handled.send(signal.SIGHUP) == [
            "SIGHUP: going on, there is nothing to reload"
        ]
        handled.reactor.advance(2 * CLOSING)
        assert not handled.reactor.getDelayedCalls()
    assert (handled.reactor.stops, handled.cuts) == (0, 0)


class Reloads:
    """Counts them; each is done when the test says so."""

    def __init__(self) -> None:
        self.begun: list[Deferred[None]] = []

    def __call__(self) -> Deferred[None]:
        self.begun.append(Deferred())
        return self.begun[-1]


RELOADS = "SIGHUP: reading the settings again"


def test_sighup_reads_the_settings_again(handled: Handled) -> None:
    """One at a time; those that come meanwhile make one more, whatever came of it."""
    handled.reload = reloads = Reloads()
    handled.start()
    assert handled.send(signal.SIGHUP) == [RELOADS]
    reloads.begun[0].callback(None)
    assert handled.send(signal.SIGHUP) == [RELOADS]
    for _ in range(3):
        assert handled.send(signal.SIGHUP) == [RELOADS]
    assert len(reloads.begun) == 2
    reloads.begun[1].callback(None)
    assert len(reloads.begun) == 3
    reloads.begun[2].callback(None)
    assert len(reloads.begun) == 3
    assert (handled.reactor.stops, handled.cuts) == (0, 0)


@pytest.mark.parametrize("later", [False, True])
def test_a_reload_that_fails(
    handled: Handled, logged_failures: LoggedFailures, later: bool
) -> None:
    """By a bug: what is refused is told by who reads it.  The next one is tried."""
    begun: list[Deferred[None]] = []

    def reload() -> Deferred[None]:
        begun.append(Deferred())
        if not later:
            raise ZeroDivisionError
        return begun[-1]

    handled.reload = reload
    handled.start()
    for _ in range(2):
        handled.send(signal.SIGHUP)
        if later:
            begun[-1].errback(ZeroDivisionError())
        assert "ZeroDivisionError" in logged_failures.take("could not be read again")
    assert len(begun) == 2


def test_nothing_is_reloaded_as_it_stops(handled: Handled) -> None:
    """Nor what was asked for before."""
    handled.reload = reloads = Reloads()
    handled.start()
    handled.send(signal.SIGHUP)
    handled.send(signal.SIGHUP)
    handled.send(signal.SIGTERM)
    assert handled.send(signal.SIGHUP) == ["SIGHUP: stopping already"]
    reloads.begun[0].callback(None)
    assert len(reloads.begun) == 1


def test_a_terminal_that_closes_reloads_nothing(handled: Handled) -> None:
    """And one that closes after the signal still stops."""
    handled.reload = reloads = Reloads()
    handled.terminal = 0
    handled.start()
    assert handled.send(signal.SIGHUP) == [RELOADS]
    handled.terminal = signals.errno.ENXIO
    handled.send(signal.SIGHUP)
    assert (len(reloads.begun), handled.reactor.stops) == (1, 1)
    handled.terminal = 0
    handled.start()
    handled.send(signal.SIGHUP)
    handled.terminal = signals.errno.ENXIO
    handled.reactor.advance(CLOSING)
    assert handled.reactor.stops == 2


@pytest.mark.parametrize("problem", [0, signals.errno.EMFILE, signals.errno.EACCES])
def test_only_one_errno_says_that_the_terminal_is_gone(
    handled: Handled, problem: int
) -> None:
    """What can't be told ends nothing."""
    handled.terminal = 0
    handled.start()
    handled.terminal = problem
    assert handled.send(signal.SIGHUP) == [
        "SIGHUP: going on, there is nothing to reload"
    ]
    assert handled.reactor.stops == 0


def test_a_terminal_that_closes_stops(handled: Handled) -> None:
    """Once, however many signals one closing sends; and a SIGTERM is the second."""
    handled.terminal = 0
    handled.start()
    handled.terminal = signals.errno.ENXIO
    said = handled.send(signal.SIGHUP)
    assert said == ["SIGHUP, the terminal is gone: stopping"]
    assert (handled.reactor.stops, handled.cuts) == (1, 0)
    assert handled.send(signal.SIGHUP) == ["SIGHUP: stopping already"]
    assert (handled.reactor.stops, handled.cuts) == (1, 0)
    handled.send(signal.SIGTERM)
    assert (handled.reactor.stops, handled.cuts) == (1, 1)


def test_a_terminal_that_closes_after_the_signal_stops(handled: Handled) -> None:
    """Some programs, and shells, send it first."""
    handled.terminal = 0
    handled.start()
    handled.send(signal.SIGHUP)
    handled.terminal = signals.errno.ENXIO
    assert handled.reactor.stops == 0
    handled.reactor.advance(CLOSING)
    assert handled.reactor.stops == 1


def test_a_terminal_that_closes_during_a_drain_aborts_nothing(handled: Handled) -> None:
    """Control-C, and then the window's cross: the sessions keep their time."""
    handled.terminal = 0
    handled.start()
    handled.send(signal.SIGINT)
    handled.terminal = signals.errno.ENXIO
    assert handled.send(signal.SIGHUP) == []
    assert handled.send(signal.SIGHUP) == ["SIGHUP: stopping already"]
    assert (handled.reactor.stops, handled.cuts) == (1, 0)


def test_an_ignored_sighup_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """`nohup` says so by what it leaves to us."""
    handled = Handled(monkeypatch, frozenset({signal.SIGHUP}))
    handled.start()
    assert set(handled.installed) == ALL - {signal.SIGHUP}


def test_the_log_file_is_reopened(handled: Handled) -> None:
    """Or a line says why not; nothing stops."""
    handled.start()
    log_file = handled.log_file
    assert log_file is not None
    [said] = handled.send(signal.SIGUSR1)
    assert said == "SIGUSR1: the log goes on in /var/log/relayd.log"
    assert log_file.times == 1
    log_file.problem = PermissionError(13, "Permission denied")
    [said] = handled.send(signal.SIGUSR1)
    assert said == (
        "SIGUSR1: can't open /var/log/relayd.log: Permission denied; the log stays in"
        " the old file"
    )
    handled.log_file = None
    handled.start()
    assert handled.send(signal.SIGUSR1) == ["SIGUSR1: no log file to reopen"]
    assert (handled.reactor.stops, handled.cuts) == (0, 0)


# -- as a container's first process


@pytest.fixture
def first_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, Any]]:
    """This process believes to be number 1; what it installs, without doing so."""
    installed: dict[int, Any] = {}
    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)
    monkeypatch.setattr(signal, "signal", installed.__setitem__)
    yield installed
    signals._early.clear()


def test_process_1_keeps_an_early_sigterm(
    first_process: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until there is something to stop."""
    catch_early_sigterm()
    assert set(first_process) == {signal.SIGTERM}
    for _ in range(3):
        first_process[signal.SIGTERM](signal.SIGTERM, None)
    handled = Handled(monkeypatch)
    handled.start()
    with capturedLogs() as events:
        handled.reactor.turn()
    assert [formatEvent(event) for event in events] == ["SIGTERM: stopping"]
    assert (handled.reactor.stops, handled.cuts) == (1, 0)
    handled.start()
    assert not handled.reactor.threads


def test_other_processes_get_no_early_handler(
    first_process: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process, another thread, a program with a handler of its own."""
    thread = threading.Thread(target=catch_early_sigterm)
    thread.start()
    thread.join()
    with monkeypatch.context() as patched:
        patched.setattr(signal, "getsignal", lambda number: print)
        catch_early_sigterm()
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: 2)
        catch_early_sigterm()
    assert first_process == {}


# -- real processes


def goes_on(port: int, server: Server) -> None:
    """It relays."""
    with connect(port) as client, server.accept() as upstream:
        client.sendall(b"up")
        assert read_exactly(upstream, 2) == b"up"
        client.shutdown(socket.SHUT_WR)
        upstream.shutdown(socket.SHUT_WR)
        assert read_all(client) == b""


NO_RELOAD = "SIGHUP: going on, there is nothing to reload"


def test_sighup_without_a_terminal(server: Server) -> None:
    """As under a supervisor, with -n; during a drain it cuts nothing."""
    args = ("-l", "127.0.0.1:0", "-d", server.address, "--drain-timeout", "60")
    with relay(*args, start_new_session=True) as running:
        running.signal(signal.SIGHUP)
        running.wait_for(NO_RELOAD)
        goes_on(running.port, server)
        with connect(running.port) as client, server.accept() as upstream:
            running.signal(signal.SIGTERM)
            running.wait_for("may finish")
            running.signal(signal.SIGHUP)
            running.wait_for("SIGHUP: stopping already")
            client.sendall(b"still here")
            assert read_exactly(upstream, 10) == b"still here"
        assert running.wait() == 0


def test_sighup_under_nohup(server: Server) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    args = ("-l", "127.0.0.1:0", "-d", server.address)
    with relay(*args, preexec_fn=ignore) as running:
        running.signal(signal.SIGHUP)
        goes_on(running.port, server)
        running.signal(signal.SIGTERM)
        assert running.wait() == 0
        assert not any("SIGHUP" in line for line in running.lines)


class Terminal:
    """A relay in the foreground of a terminal, and the terminal."""

    def __init__(self, *args: str) -> None:
        self.master, slave = pty.openpty()

        def take() -> None:
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [*command(), "relayd", *args],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            preexec_fn=take,
        )
        os.close(slave)
        self.shown = ""
        self._thread = threading.Thread(target=self._read)
        self._closing = threading.Event()
        self._thread.start()

    def _read(self) -> None:
        # EIO when nobody has it open any more.
        with suppress(OSError):
            while not self._closing.is_set():
                self.shown += os.read(self.master, 4096).decode()

    def shows(self, pattern: str) -> re.Match[str]:
        """Wait until it does."""
        limit = time.monotonic() + START
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < limit, self.shown
            time.sleep(0.02)
        return found

    def close(self, how: str) -> None:
        """Close the window, for which a line has to come yet.

        :param how: what makes the relay write one.
        """
        self._closing.set()
        os.kill(self.process.pid, getattr(signal, how))
        self._thread.join()
        os.close(self.master)


@contextmanager
def in_terminal(*args: str) -> Iterator[Terminal]:
    """For the length of a block."""
    terminal = Terminal(*args)
    try:
        yield terminal
    finally:
        terminal.process.kill()
        terminal.process.wait()
        if not terminal._closing.is_set():
            terminal._closing.set()
            terminal._thread.join()
            os.close(terminal.master)


def test_sighup_with_a_terminal_and_with_a_closed_one(server: Server) -> None:
    """The first is no reason to stop.  The second is as SIGTERM: a drain, status 0."""
    args = ("-l", "127.0.0.1:0", "-d", server.address, "--drain-timeout", "60")
    with in_terminal(*args) as terminal:
        port = int(terminal.shows(r"listening on 127\.0\.0\.1:(\d+), ")[1])
        # Its own and the library's.
        eventually(lambda: _catches(terminal.process.pid, signal.SIGCHLD))
        os.kill(terminal.process.pid, signal.SIGHUP)
        terminal.shows(NO_RELOAD)
        goes_on(port, server)
        terminal.shows("ending=done")
        with connect(port) as client, server.accept() as upstream:
            terminal.close("SIGUSR1")
            eventually(lambda: _refused(port), "it stops")
            # The session has its time, and ends with a line that nobody reads.
            client.sendall(b"goodbye")
            assert read_exactly(upstream, 7) == b"goodbye"
            assert terminal.process.poll() is None
        assert terminal.process.wait(START) == 0


def test_a_terminal_that_closes_in_a_drain(server: Server) -> None:
    """Control-C, and then the window: no second signal."""
    args = ("-l", "127.0.0.1:0", "-d", server.address, "--drain-timeout", "60")
    with in_terminal(*args) as terminal:
        port = int(terminal.shows(r"listening on 127\.0\.0\.1:(\d+), ")[1])
        eventually(lambda: _catches(terminal.process.pid, signal.SIGCHLD))
        with connect(port) as client, server.accept() as upstream:
            terminal.close("SIGINT")
            eventually(lambda: _refused(port), "it stops")
            client.sendall(b"goodbye")
            assert read_exactly(upstream, 7) == b"goodbye"
        assert terminal.process.wait(START) == 0


def _catches(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = re.search(r"SigCgt:\s+(\w+)", status)
    return bool(caught and int(caught[1], 16) >> (number - 1) & 1)


def _refused(port: int) -> bool:
    try:
        # With a session that does not wait for its server.
        reset(connect(port))
    except ConnectionResetError:
        # In the queue of the listener as that was closed.
        return False
    except ConnectionRefusedError:
        return True
    return False


def logged(path: Path, pattern: str) -> re.Match[str]:
    """Wait for a line of a log file."""
    found: list[re.Match[str]] = []

    def there() -> bool:
        text = path.read_text() if path.exists() else ""
        found[:] = [m for m in [re.search(pattern, text)] if m]
        return bool(found)

    eventually(there, f"{pattern!r} in {path}")
    return found[0]


def rotated(pid: int, log: Path, server: Server) -> None:
    """What logrotate does to a relay, and what becomes of its lines."""
    port = int(logged(log, r"listening on 127\.0\.0\.1:(\d+), ")[1])
    eventually(lambda: _catches(pid, signal.SIGCHLD))
    goes_on(port, server)
    logged(log, "session=1 ")
    mode = log.stat().st_mode
    old = log.rename(log.with_name("log.old"))
    os.kill(pid, signal.SIGUSR1)
    logged(log, f"SIGUSR1: the log goes on in {log}")
    goes_on(port, server)
    logged(log, "session=2 ")
    assert "session=2 " not in old.read_text()
    assert log.stat().st_mode == mode
    # Its own folder is not one that it may write to any longer: a folder is there.
    log.rename(log.with_name("log.older"))
    log.mkdir()
    os.kill(pid, signal.SIGUSR1)
    logged(log.with_name("log.older"), f"can't open {log}: Is a directory")
    goes_on(port, server)
    logged(log.with_name("log.older"), "session=3 ")
    log.rmdir()
    os.kill(pid, signal.SIGHUP)
    logged(log.with_name("log.older"), NO_RELOAD)
    names = {path.name for path in log.parent.iterdir()}
    assert names <= {"log.old", "log.older", "pid"}, "nothing is rotated by itself"
    os.kill(pid, signal.SIGTERM)


@pytest.mark.parametrize(
    "runner",
    [
        (TWISTD, "-n", "--pidfile=", "--logfile=log"),
        (TWIST, "--log-file=log", "--log-format=text"),
    ],
    ids=["twistd", "twist"],
)
def test_a_log_file_that_was_renamed(
    runner: tuple[str, ...], tmp_path: Path, server: Server
) -> None:
    args = ("-l", "127.0.0.1:0", "-d", server.address)
    running = RelayProcess(
        *args, twistd=runner, cwd=tmp_path, umask=0o027, start_new_session=True
    )
    try:
        rotated(running.process.pid, tmp_path / "log", server)
        assert running.wait() == 0
        assert running.lines == []
    finally:
        running.stop()


@pytest.mark.parametrize("named", [True, False], ids=["named", "default"])
def test_a_daemons_log_file_that_was_renamed(
    tmp_path: Path, server: Server, named: bool
) -> None:
    """And its terminal is no terminal of its own: a hang-up ends nothing."""
    log = tmp_path / ("log" if named else "twistd.log")
    daemon = [TWISTD, f"--pidfile={tmp_path}/pid", *["--logfile=log"] * named]
    subprocess.run(
        [*daemon, "relayd", "-l", "127.0.0.1:0", "-d", server.address],
        cwd=tmp_path,
        check=True,
        timeout=START,
    )
    pid = int((tmp_path / "pid").read_text())
    try:
        rotated(pid, log, server)
        logged(tmp_path / "log.older", "Server Shut Down")
        eventually(lambda: not (tmp_path / "pid").exists(), "it ends")
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_without_a_log_file_nothing_is_reopened(server: Server) -> None:
    """Nobody dies of it."""
    with relay("-l", "127.0.0.1:0", "-d", server.address) as running:
        running.signal(signal.SIGUSR1)
        running.wait_for("SIGUSR1: no log file to reopen")
        goes_on(running.port, server)
        running.signal()
        assert running.wait() == 0


def test_a_signal_that_comes_while_it_starts(tmp_path: Path) -> None:
    """Sent again and again from the first moment: status 0, or it dies of it.

    Whatever it was at, no socket file is left.
    """
    for _ in range(3):
        running = RelayProcess("-l", f"unix:{tmp_path}/s", "-d", "80")
        try:
            time.sleep(0.1)
            while running.process.poll() is None:
                running.signal()
                time.sleep(0.01)
            assert running.wait() in (0, -signal.SIGTERM)
            assert not any("Traceback" in line for line in running.lines)
        finally:
            running.stop()
        assert list(tmp_path.iterdir()) == []
