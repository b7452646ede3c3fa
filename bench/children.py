"""Child processes of the benchmark: started, always stopped, and measured.

Every child leads its own process group, which is killed when the `with` block ends,
however it ends.  Readings come from the kernel: CPU from the process's clock, in
nanoseconds, which counts all threads, also those that have ended; memory as its
anonymous pages.
"""

from __future__ import annotations

import itertools
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from attrs import frozen

#: Seconds to wait for a condition.
PATIENCE = 15.0

#: Programs by the Debian package that has them.
PACKAGES = {
    "curl": "curl",
    "danted": "dante-server",
    "gcc": "gcc",
    "h2load": "nghttp2-client",
    "haproxy": "haproxy",
    "ip": "iproute2",
    "iperf3": "iperf3",
    "nft": "nftables",
    "nginx": "nginx",
    "openssl": "openssl",
    "proxychains4": "proxychains4",
    "socat": "socat",
    "wrk": "wrk",
}

#: Listening ports, each used once in a run, so that none has connections in TIME_WAIT.
#: They are below the kernel's ephemeral ports.  Another run may look for some at the
#: same time, and would take one of its own that is there for one that it waits for.
_first = random.SystemRandom().randrange(10_000, 20_000)
_ports = itertools.chain(range(_first, 20_000), range(10_000, _first))

_TICKS = os.sysconf("SC_CLK_TCK")


class CannotMeasure(Exception):
    """The benchmark can't go on; the message is one line."""


def program(name: str) -> str:
    """The path of a program from a Debian package.

    :raises CannotMeasure: it is not installed.
    """
    # /usr/sbin has nginx, HAProxy and Dante, and is not on everyone's path.
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    found = shutil.which(name, path=places)
    if found is None:
        raise CannotMeasure(
            f"{name} is not installed: it is in Debian's package {PACKAGES[name]};"
            " `make system-deps` installs it"
        )
    return found


def beside_python(name: str) -> str:
    """The path of a program of this environment.

    :raises CannotMeasure: it is not installed.
    """
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise CannotMeasure(
            f"{name} is not in this Python's environment; `make bench` sets one up"
        )
    return str(path)


def allow_descriptors(needed: int) -> None:
    """Raise this process's limit of open files, which children inherit.

    :raises CannotMeasure: the hard limit is below `needed`.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise CannotMeasure(
            f"this needs {needed} open files in a process, and the hard limit is"
            f" {hard}; raise it (`ulimit -Hn {needed}`, as root)"
        )
    # Not unlimited: some programs allocate memory for the limit.
    wanted = needed if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def free_port() -> int:
    """A free loopback port that this run has not used."""
    for port in _ports:
        # Free for both TCP and UDP: the caller may need either.
        with socket.socket() as one, socket.socket(type=socket.SOCK_DGRAM) as other:
            with suppress(OSError):
                one.bind(("127.0.0.1", port))
                other.bind(("127.0.0.1", port))
                return port
    raise CannotMeasure("no port from 10000 to 19999 is free")


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait until `condition()` holds.

    :raises CannotMeasure: it does not within `PATIENCE`.
    """
    limit = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > limit:
            raise CannotMeasure(f"{what}: not within {PATIENCE:.0f} seconds")
        time.sleep(0.01)


@frozen
class Child:
    """A process that runs for the length of a `with` block."""

    name: str
    process: subprocess.Popen[str]
    #: Its standard error.
    errors: IO[str]

    @property
    def pid(self) -> int:
        return self.process.pid

    def failure(self) -> str:
        """How it ended, and the last line of its standard error."""
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()]
        last = f": {lines[-1]}" if lines else ""
        return f"{self.name} ended with status {self.process.poll()}{last}"

    def listening(self, *ports: int, udp: bool = False) -> None:
        """Wait until the ports are listened on.

        :param udp: they are ports of UDP.
        :raises CannotMeasure: it ended before that, or was too slow.
        """

        def there() -> bool:
            if self.process.poll() is not None:
                raise CannotMeasure(self.failure())
            find = bound_udp if udp else listeners
            try:
                return find(self.pid) >= set(ports)
            except FileNotFoundError:  # it has just ended, which is told next
                return False

        eventually(there, f"{self.name} listens")

    def line(self) -> str:
        """The next line of its output, without the line end.

        :raises CannotMeasure: it ended instead.
        """
        pipe = self.process.stdout
        line = pipe.readline() if pipe is not None else ""
        if not line:
            self.process.wait()
            raise CannotMeasure(self.failure())
        return line.rstrip("\n")

    def tell(self) -> None:
        """Write an empty line to its standard input."""
        pipe = self.process.stdin
        if pipe is not None:
            with suppress(BrokenPipeError):  # it has ended: what it says next tells
                pipe.write("\n")
                pipe.flush()

    def output(self, seconds: float, *, failed: bool = False) -> str:
        """Its output until it ends by itself.

        Its standard input, if it has one, ends now.

        :param failed: a failure is no error here: its output has the reason.
        :raises CannotMeasure: it failed, or took longer than `seconds`.
        """
        try:
            text, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise CannotMeasure(
                f"{self.name} did not end within {seconds:.0f} seconds"
            ) from None
        if self.process.returncode and not failed:
            lines = text.strip().splitlines()
            raise CannotMeasure(
                f"{self.failure()} (its output ends: {lines[-1] if lines else '-'})"
            )
        return text


@contextmanager
def child(
    name: str,
    argv: Sequence[str],
    folder: Path,
    *,
    read: bool = False,
    waits: bool = False,
) -> Iterator[Child]:
    """Run a program for the length of a block.

    :param name: its name in errors.
    :param folder: its current folder, which also gets its standard error.
    :param read: its standard output is read; otherwise it goes to /dev/null.
    :param waits: it waits for what is written to its standard input; otherwise that
        is /dev/null.
    """
    with (folder / "stderr").open("w+") as errors:
        process = subprocess.Popen(  # noqa: S603
            argv,
            cwd=folder,
            stdin=subprocess.PIPE if waits else subprocess.DEVNULL,
            stdout=subprocess.PIPE if read else subprocess.DEVNULL,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        try:
            yield Child(name, process, errors)
        finally:
            # No child has state to save, and some would wait for their clients to end.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(BrokenPipeError):  # it didn't read the rest
                        pipe.close()


def listeners(pid: int) -> set[int]:
    """The IPv4 TCP ports with a listener, in the network of a process."""
    found = set()
    with Path(f"/proc/{pid}/net/tcp").open() as table:
        next(table)
        for line in table:
            _, local, _, state, *_ = line.split()
            # The kernel lists the listening sockets first, and there may be tens
            # of thousands of others.
            if state != "0A":
                break
            found.add(int(local.rpartition(":")[2], 16))
    return found


def bound_udp(pid: int) -> set[int]:
    """The IPv4 UDP ports that are bound, and not connected, likewise."""
    found = set()
    with Path(f"/proc/{pid}/net/udp").open() as table:
        next(table)
        for line in table:
            _, local, _, state, *_ = line.split()
            # The sockets of a relay's flows are connected: 01.
            if state == "07":
                found.add(int(local.rpartition(":")[2], 16))
    return found


def udp_addresses(pid: int) -> set[str]:
    """The addresses of IPv4 UDP sockets, in the network of a process."""
    lines = Path(f"/proc/{pid}/net/udp").read_text().splitlines()[1:]
    # In the machine's own order of bytes.
    hosts = {int(line.split()[1].partition(":")[0], 16) for line in lines}
    return {socket.inet_ntoa(host.to_bytes(4, sys.byteorder)) for host in hosts}


def children_of(pid: int) -> list[int]:
    """The live children of a process (of its first thread)."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(word) for word in text.split()]


def cpu(pid: int, *, forks: bool = False) -> float:
    """Seconds of CPU that a process has used, user and system.

    :param forks: add its children's, the live and the ended.
    """
    used = _clock(pid)
    if forks:
        # After the command's name in brackets; man 5 proc counts from 1.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ended = int(fields[16 - 3]) + int(fields[17 - 3])
        used += ended / _TICKS
        for one in children_of(pid):
            with suppress(OSError):  # it has just ended
                used += _clock(one)
    return used


def _clock(pid: int) -> float:
    # What clock_getcpuclockid(3) computes: the CPU clock of another process.
    return time.clock_gettime_ns((~pid << 3) | 2) / 1e9


def memory(pid: int) -> int:
    """Bytes of a process's own memory: its anonymous pages.

    Pages of programs and libraries are left out: they are shared with other processes,
    and a process's part of them changes when another one starts or ends.
    """
    words = Path(f"/proc/{pid}/smaps_rollup").read_text().split()
    return int(words[words.index("Anonymous:") + 1]) * 1024


def time_wait() -> int:
    """How many closed connections the kernel keeps in TIME_WAIT."""
    words = Path("/proc/net/sockstat").read_text().split()
    return int(words[words.index("tw") + 1])
