"""A real `twistd relayd` to test, and plain sockets to test it with.

The relay runs in a process of its own, so that a test can use blocking sockets
and read from top to bottom.  Its listeners take port 0; the log says which they
got.

RELAYD_TEST_REACTOR names the reactor of these processes, as `twistd --reactor` has
it; without it they get Twisted's choice.  `transport` chooses their connections.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

#: Seconds after which a test gives up on something that should have happened.
PATIENCE = 10.0

#: Seconds that an interpreter may take to start, beside others that do.
START = 60.0

#: The `twistd` of the environment that runs the tests.
TWISTD = str(Path(sys.executable).parent / "twistd")

#: The other runner that Twisted has.
TWIST = str(Path(sys.executable).parent / "twist")

#: The kinds of connections that a relay can be told to use here.
TRANSPORTS = ("plane", "twisted") if sys.platform == "linux" else ("twisted",)

#: What comes before a test's own arguments of `twistd relayd`.
_defaults: list[str] = []


@contextmanager
def transport(name: str) -> Iterator[None]:
    """Relays that are started in this block use these connections."""
    before, _defaults[:] = _defaults[:], ["--transport", name]
    try:
        yield
    finally:
        _defaults[:] = before


def command(reactor: str | None = None) -> tuple[str, ...]:
    """`twistd` up to the plugin's name, with this reactor."""
    reactor = reactor or os.environ.get("RELAYD_TEST_REACTOR")
    chosen = [f"--reactor={reactor}"] if reactor else []
    return (TWISTD, *chosen, "-n", "--pidfile=")


@functools.cache
def _nursery() -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The process that forks ours (`nursery`), and where to ask it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "tests.support.nursery", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            cwd=Path(__file__).parent.parent.parent,
        )
    kept.add(ours.fileno())
    # It ends when nobody can ask it any more.
    atexit.register(process.wait)
    atexit.register(ours.close)
    return process, ours


#: Descriptors that outlast a test.
kept: set[int] = set()


class _Forked:
    """A process from the nursery; what `RelayProcess` needs of `subprocess.Popen`."""

    def __init__(
        self,
        argv: Sequence[str],
        env: dict[str, str],
        refusing: dict[str, int],
        namespace: str,
        cwd: str | Path,
    ) -> None:
        _, asked = _nursery()
        reading, output = os.pipe()
        self._news, news = os.pipe()
        request = {
            "argv": argv,
            "env": env,
            "cwd": os.path.abspath(cwd),
            "refusing": refusing,
            "namespace": namespace,
        }
        socket.send_fds(asked, [json.dumps(request).encode()], [output, news])
        os.close(output)
        os.close(news)
        self.stdout = os.fdopen(reading)
        self.returncode: int | None = None
        self.pid = int(self._line())

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            part = os.read(self._news, 1)
            assert part, "the nursery has failed"
            line += part
        return line

    def _ended(self, timeout: float) -> bool:
        if self.returncode is None and select.select([self._news], [], [], timeout)[0]:
            self.returncode = int(self._line())
            os.close(self._news)
        return self.returncode is not None

    def poll(self) -> int | None:
        self._ended(0)
        return self.returncode

    def wait(self, timeout: float) -> int:
        assert self._ended(timeout), f"it has not ended after {timeout:g} seconds"
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _may_fork(argv: Sequence[str], env: dict[str, str], popen: dict[str, Any]) -> bool:
    """Whether the nursery has such a process: no other program, no other locale."""
    return (
        sys.platform == "linux"
        and argv[0] in {TWISTD, TWIST}
        and not popen.keys() - {"cwd"}
        and not [name for name in env if name.startswith(("LC_", "PYTHON"))]
    )


_LISTENING = re.compile(r"listening on (\S+), ")
_FIELD = re.compile(r"(\w+)=(\S+)")


class RelayProcess:
    """A relay in a process of its own.

    It is forked from the nursery, unless only a process that is started from nothing
    can have what it is to have.

    :param args: what follows `twistd -n relayd`.
    :param twistd: the command up to the plugin's name, if not `command()`.
    :param env: variables beyond this process's own.
    :param fresh: it is started from nothing, in any case.
    :param refusing: of one that is forked, the system calls that fail, and with what
        errno (:func:`sandbox.refuse`),
    :param namespace: and the name of its network namespace, if not this one.
    """

    def __init__(
        self,
        *args: str,
        twistd: Sequence[str] = (),
        plugin: str = "relayd",
        env: dict[str, str] | None = None,
        fresh: bool = False,
        refusing: dict[str, int] | None = None,
        namespace: str = "",
        **popen: Any,
    ) -> None:
        self.lines: list[str] = []
        self._news = threading.Condition()
        self.process: Any
        argv = [*(twistd or command()), plugin, *_defaults, *args]
        # A name server that doesn't answer would keep a look-up, and its socket, for
        # ten seconds: as long as anything here is waited for.
        names = {"RES_OPTIONS": "timeout:1 attempts:1"}
        own = env or {}
        env = {**os.environ, **names, **own, "PYTHONUNBUFFERED": "1"}
        if not fresh and _may_fork(argv, own, popen):
            self.process = _Forked(
                argv, env, refusing or {}, namespace, popen.get("cwd", ".")
            )
        else:
            assert refusing is None
            assert not namespace
            self.process = subprocess.Popen(
                argv,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=env,
                **popen,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def wait_for(
        self, pattern: str, count: int = 1, patience: float = PATIENCE
    ) -> list[re.Match[str]]:
        """Wait until `count` lines of the log match, and return the matches."""
        found: list[re.Match[str]] = []

        def there() -> bool:
            found[:] = [m for line in self.lines if (m := re.search(pattern, line))]
            return len(found) >= count

        with self._news:
            done = self._news.wait_for(
                lambda: there() or not self._reader.is_alive(), patience
            )
            done = done and there()
        assert done, (
            f"the log has {len(found)} of {count} lines like {pattern!r}:\n"
            + "\n".join(self.lines[-30:])
        )
        return found

    def listening(self, count: int = 1) -> list[str]:
        """The addresses it listens on, in the order of the log."""
        return [m[1] for m in self.wait_for(_LISTENING.pattern, count, START)]

    @property
    def port(self) -> int:
        """The port of its first listener."""
        return int(self.listening()[0].rpartition(":")[2])

    def sessions(self, count: int = 1) -> list[dict[str, str]]:
        """The fields of the first `count` session lines."""
        lines = self.wait_for(r"\[relayd\.session#info\] (session=.*)", count)
        return [dict(_FIELD.findall(m[1])) for m in lines]

    def ended(self, ending: str, count: int = 1) -> list[dict[str, str]]:
        """Wait until `count` sessions have ended this way; their fields."""
        lines = self.wait_for(rf"\] (session=.* ending={ending} .*)", count)
        return [dict(_FIELD.findall(m[1])) for m in lines]

    def forget_sessions(self) -> None:
        """Drop their lines: of a relay that tests share, a client's port may return."""
        with self._news:
            self.lines[:] = [each for each in self.lines if "] session=" not in each]

    def flows(self, count: int = 1, like: str = "") -> list[dict[str, str]]:
        """The fields of the first `count` lines of UDP flows that say `like`."""
        lines = self.wait_for(rf"\[relayd\.flow#info\] flow (.*{like}.*)", count)
        return [dict(_FIELD.findall(m[1])) for m in lines]

    def running(self) -> bool:
        """Whether its reactor runs: it handles SIGCHLD, and sleeps.

        That is the last signal which Twisted asks for, after SIGTERM, and after the
        pipe that it opens for it: a count of descriptors would miss that pipe.  Then
        relayd puts its own handlers back, before the reactor first waits for events: a
        SIGTERM in between is Twisted's, after which the process dies of it.
        """
        assert self._reader.is_alive(), "it has ended:\n" + "\n".join(self.lines[-30:])
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
        except FileNotFoundError:
            # Just now: its last words are on their way.
            return False
        asleep = re.search(r"State:\s+S", status)
        caught = re.search(r"SigCgt:\s+(\w+)", status)
        if asleep is None or caught is None:
            return False
        return bool(int(caught[1], 16) >> (signal.SIGCHLD - 1) & 1)

    @property
    def descriptors(self) -> int:
        """How many file descriptors it has open.

        But for the timer, which it has while a deadline is to be kept, and for what it
        reads of itself now and then (:mod:`relayd.operating.huge_pages`).
        """
        count = 0
        for each in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed just now
                what = os.readlink(each)
                count += what != "anon_inode:[timerfd]" and not what.startswith("/proc")
        return count

    @property
    def cpu(self) -> float:
        """The seconds of CPU that it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2]
        user, system = fields.split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    @property
    def rss(self) -> int:
        """Its resident memory in bytes: of one that was started from nothing.

        Of one that was forked, it grows with what it shares, as that is used.
        """
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found
        return int(found[1]) * 1024

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, patience: float = START) -> int:
        """Wait for its end; the exit status."""
        status = self.process.wait(patience)
        self._reader.join(PATIENCE)
        return status

    def stop(self) -> None:
        """End it, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextmanager
def relay(*args: str, **options: Any) -> Iterator[RelayProcess]:
    """A relay that is listening, for the length of a block."""
    running = RelayProcess(*args, **options)
    try:
        running.listening()
        eventually(running.running, "the reactor runs")
        yield running
    finally:
        running.stop()


class Server:
    """A listening socket that hands out the connections it gets."""

    def __init__(self, family: int = socket.AF_INET, address: Any = None) -> None:
        self.socket = socket.socket(family)
        if address is None:
            address = ("::1" if family == socket.AF_INET6 else "127.0.0.1", 0)
        self.socket.bind(address)
        self.socket.listen(1024)
        self.socket.settimeout(PATIENCE)

    @property
    def address(self) -> str:
        """What a relay's --dest calls it."""
        name = self.socket.getsockname()
        if self.socket.family == socket.AF_UNIX:
            return f"unix:{name}"
        return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"

    def accept(self) -> socket.socket:
        """The next connection."""
        connection, _ = self.socket.accept()
        connection.settimeout(PATIENCE)
        return connection

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


#: Larger than any datagram.
DATAGRAM = 1 << 16

#: What the sockets of these tests keep unread, in bytes, so that a burst is not lost.
UNREAD = 4 << 20


class UdpServer:
    """A socket that gets a relay's datagrams and answers them.

    :param host: an address; "" is all of this machine's, of both families.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in host or not host else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UNREAD)
        if not host:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.socket.bind((host, port))
        self.socket.settimeout(PATIENCE)
        self.port: int = self.socket.getsockname()[1]
        #: What a relay's --dest calls it.
        self.address = f"udp:[{host}]:{self.port}"
        if family == socket.AF_INET:
            self.address = f"udp:{host}:{self.port}"

    def receive(self) -> tuple[bytes, Any]:
        """The next datagram, and the relay's address that it came from."""
        return self.socket.recvfrom(DATAGRAM)

    def send(self, data: bytes, peer: Any) -> None:
        self.socket.sendto(data, peer)

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def udp_client(
    port: int, host: str = "127.0.0.1", own: tuple[str, int] | None = None
) -> socket.socket:
    """A client of a UDP relay: connected, so it hears that very address only."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    client = socket.socket(family, socket.SOCK_DGRAM)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UNREAD)
    if own is not None:
        client.bind(own)
    client.connect((host, port))
    client.settimeout(PATIENCE)
    return client


def own_host() -> str:
    """A loopback address that no other process of the tests uses.

    A port of 127.0.0.1 that was free a moment ago may be another one's by now: every
    connection there takes one.
    """
    high, low = divmod(os.getpid() % (250 << 16), 1 << 16)
    return f"127.{high + 2}.{low >> 8}.{low & 255}"


def connect(port: int, host: str = "127.0.0.1") -> socket.socket:
    """A client of the relay."""
    connection = socket.create_connection((host, port), PATIENCE)
    connection.settimeout(PATIENCE)
    return connection


def reset(connection: socket.socket) -> None:
    """Close with a reset instead of an end of data."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def read_all(connection: socket.socket) -> bytes:
    """Everything until the end of data."""
    parts = []
    while part := connection.recv(1 << 20):
        parts.append(part)
    return b"".join(parts)


def read_exactly(connection: socket.socket, count: int) -> bytes:
    """The next `count` bytes."""
    data = bytearray()
    while len(data) < count:
        part = connection.recv(count - len(data))
        assert part, f"the data ended after {len(data)} of {count} bytes"
        data += part
    return bytes(data)


def fill(connection: socket.socket, limit: int = 1 << 30) -> int:
    """Send until nothing is taken for a third of a second; return how much was."""
    sent = 0
    connection.settimeout(0.3)
    chunk = bytes(65536)
    try:
        while sent < limit:
            sent += connection.send(chunk)
    except TimeoutError:
        pass
    connection.settimeout(PATIENCE)
    return sent


def eventually(condition: Any, what: str = "", patience: float = PATIENCE) -> None:
    """Wait until `condition()` is true."""
    limit = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < limit, f"never happened: {what or condition}"
        time.sleep(0.02)
