"""curl downloads through the relay, and the relay's log agrees with curl's count.

curl reports for each transfer how many bytes of request, header and body went
over its connection.  Nothing else does, so the `up` and `down` of a session
must be exactly their sums: a byte lost, added or counted twice shows.
"""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import attrs
import pytest

from tests.support.process import RelayProcess, eventually, relay
from tests.system.programs import (
    LIMIT,
    WebServer,
    http_server,
    program,
    run,
    twisted_server,
)

pytestmark = pytest.mark.system

MIB = 1 << 20

#: What curl prints for each transfer: the fields of `Transfer`, in their order.
_REPORT = (
    r"%{http_code} %{num_connects} %{size_request} %{size_header} %{size_download}\n"
)


@attrs.frozen
class Transfer:
    """What curl says of one transfer.

    :ivar connects: connections made for it; 0 when an earlier one was used again.
    :ivar request: bytes sent.
    :ivar header: bytes of header received.
    :ivar body: bytes of body received.
    """

    status: int
    connects: int
    request: int
    header: int
    body: int

    @property
    def carried(self) -> tuple[int, int]:
        """The bytes that a relay has seen of it, up and down."""
        return self.request, self.header + self.body


def command(*args: str | Path) -> list[str | Path]:
    """curl, bounded, and deaf to the settings of whoever runs the tests."""
    return [
        program("curl"),
        "--disable",
        *("--noproxy", "*"),
        *("--silent", "--show-error", "--fail"),
        *("--max-time", f"{LIMIT / 2:g}"),
        *("--write-out", _REPORT),
        *args,
    ]


def transfers(report: str) -> list[Transfer]:
    """What curl printed, in the order in which the transfers ended."""
    return [Transfer(*map(int, line.split())) for line in report.splitlines()]


def curl(*args: str | Path) -> list[Transfer]:
    """Run curl; every transfer must succeed."""
    return transfers(run(*command(*args)))


@contextmanager
def curling(*args: str | Path) -> Iterator[subprocess.Popen[str]]:
    """curl, at work for the length of a block."""
    with subprocess.Popen(command(*args), stdout=subprocess.PIPE, text=True) as client:
        try:
            yield client
        finally:
            client.kill()


def noise(path: Path, size: int) -> Path:
    """Make a file of random bytes, the same ones for a name whenever it is made."""
    path.write_bytes(random.Random(path.name).randbytes(size))
    return path


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def url(port: int, name: str) -> str:
    return f"http://127.0.0.1:{port}/{name}"


def relayed(server: WebServer, *args: str) -> AbstractContextManager[RelayProcess]:
    """A relay to a web server, on a free port."""
    return relay("--listen", "127.0.0.1:0", "--dest", server.address, *args)


def assert_all_done(running: RelayProcess, carried: list[tuple[int, int]]) -> None:
    """These were the relay's sessions, by bytes up and down, and all ended well.

    Stops the relay: what it has not logged by then it never will, so no session
    but these goes unnoticed.
    """
    running.ended("done", len(carried))
    running.signal()
    assert running.wait() == 0
    sessions = running.sessions(len(carried))
    assert {(each["ending"], each["code"]) for each in sessions} == {("done", "--")}
    counted = Counter((int(each["up"]), int(each["down"])) for each in sessions)
    assert counted == Counter(carried)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the web server serves."""
    path = tmp_path / "served"
    path.mkdir()
    return path


def test_large_file(folder: Path, tmp_path: Path) -> None:
    """64 MiB arrive unchanged, and the log names and counts what went where."""
    served, got = noise(folder / "large", 64 * MIB), tmp_path / "got"
    with http_server(folder) as server, relayed(server) as running:
        [transfer] = curl("--output", got, url(running.port, "large"))
        assert (transfer.status, transfer.body) == (200, 64 * MIB)
        assert sha256(got) == sha256(served)
        [session] = running.sessions()
        assert session["listener"] == f"127.0.0.1:{running.port}"
        assert session["upstream"] == server.address
        assert_all_done(running, [transfer.carried])


def test_keep_alive(folder: Path, tmp_path: Path) -> None:
    """Two requests on one connection are one session, with the bytes of both."""
    names = ["first", "second"]
    for number, name in enumerate(names, start=1):
        noise(folder / name, number * MIB)
    with http_server(folder, "HTTP/1.1") as server, relayed(server) as running:
        both = curl(
            *("--output", tmp_path / "first", "--output", tmp_path / "second"),
            *(url(running.port, name) for name in names),
        )
        assert [transfer.connects for transfer in both] == [1, 0]
        for name in names:
            assert sha256(tmp_path / name) == sha256(folder / name)
        up, down = zip(*(transfer.carried for transfer in both), strict=True)
        assert_all_done(running, [(sum(up), sum(down))])


def test_parallel_downloads(folder: Path, tmp_path: Path) -> None:
    """50 files come over 50 connections at once, and none gets another's bytes."""
    names = [f"file-{number:02}" for number in range(50)]
    for name in names:
        noise(folder / name, MIB // 2)
    with twisted_server(folder) as server, relayed(server, "--verbose") as running:
        # A server that does nothing yet keeps every client waiting, so that all
        # of them are there at the same time.
        server.process.signal(signal.SIGSTOP)
        with curling(
            *("--parallel", "--parallel-immediate", "--parallel-max", "50"),
            *("--output", tmp_path / "file-#1"),
            url(running.port, "file-[00-49]"),
        ) as client:
            running.wait_for(r"\] connected session=", len(names))
            server.process.signal(signal.SIGCONT)
            report, _ = client.communicate(timeout=LIMIT)
            assert client.returncode == 0
        got = {name: sha256(tmp_path / name) for name in names}
        assert got == {name: sha256(folder / name) for name in names}
        assert len(set(got.values())) == len(names)
        assert_all_done(running, [each.carried for each in transfers(report)])


def test_range_requests(folder: Path, tmp_path: Path) -> None:
    """Parts of a file: its first byte, its last ones, some between, and to the end."""
    whole = noise(folder / "whole", MIB).read_bytes()
    ranges = {
        "0-0": whole[:1],
        "1000-1999": whole[1000:2000],
        "-500": whole[-500:],
        "1048575-": whole[-1:],
        "65535-": whole[65535:],
    }
    carried = []
    with twisted_server(folder) as server, relayed(server) as running:
        for wanted, part in ranges.items():
            got = tmp_path / f"got{wanted}"
            [transfer] = curl(
                "--range", wanted, "--output", got, url(running.port, "whole")
            )
            assert transfer.status == 206
            assert got.read_bytes() == part
            carried.append(transfer.carried)
        assert_all_done(running, carried)


def test_interrupted_download_is_resumed(folder: Path, tmp_path: Path) -> None:
    """A client that is killed is told from one that is done; the next gets the rest."""
    size = 64 * MIB
    served, got = noise(folder / "large", size), tmp_path / "got"
    with twisted_server(folder) as server, relayed(server) as running:
        large = url(running.port, "large")
        with curling("--limit-rate", "4M", "--output", got, large) as client:
            eventually(lambda: got.exists() and got.stat().st_size >= MIB)
            client.kill()
        had = got.stat().st_size
        assert MIB <= had < size
        [cut] = running.sessions()
        assert cut["code"] == "CD"
        # The relay has not read on for a client that is gone.
        assert had <= int(cut["down"]) < size

        [transfer] = curl("--continue-at", "-", "--output", got, large)
        assert transfer.status == 206
        assert transfer.body == size - had
        assert sha256(got) == sha256(served)
        [_, rest] = running.sessions(2)
        assert (rest["ending"], rest["code"]) == ("done", "--")
        assert (int(rest["up"]), int(rest["down"])) == transfer.carried


def test_unix_socket(folder: Path, tmp_path: Path, tmp_socket: Path) -> None:
    """A relay on a UNIX socket, and another that has it for its server."""
    served, got = noise(folder / "large", 8 * MIB), tmp_path / "got"
    where = f"unix:{tmp_socket}"
    with (
        http_server(folder) as server,
        relay(
            *("--listen", where, "--dest", server.address),
            *("--listen", "127.0.0.1:0", "--dest", where),
        ) as running,
    ):
        [direct] = curl(
            *("--unix-socket", tmp_socket, "--output", got),
            "http://localhost/large",
        )
        assert sha256(got) == sha256(served)
        [session] = running.sessions()
        assert (session["client"], session["listener"]) == ("unix:", where)

        got.unlink()
        port = int(running.listening(2)[1].rpartition(":")[2])
        [through] = curl("--output", got, url(port, "large"))
        assert sha256(got) == sha256(served)
        assert_all_done(running, [direct.carried, through.carried, through.carried])
        assert sum(each["upstream"] == where for each in running.sessions(3)) == 1
    assert not tmp_socket.exists()
