"""`relayctl capture`: blocks go to standard output as they come, and how they ended."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayd.ctl import capturing, control_client
from relayd.ctl.capturing import Ending
from relayd.ctl.control_client import ControlClient
from relayd.ctl.exits import CommandFailed, Exit
from relayd.ctl.main import main
from relayd.ctl.places import VARIABLE
from relayd.filters.pcapng import beginning, packet, statistics
from tests.support.control import FakeRelayd, raw_server
from tests.support.process import PATIENCE

Captured = pytest.CaptureFixture[str]
CapturedBytes = pytest.CaptureFixture[bytes]

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"

BEGINNING = beginning("session 17")
PACKET = packet(10**15, b"x" * 40, b"hello")


def last(dropped: int = 0, said: str = "ending=done") -> bytes:
    return statistics(10**15, 10**15, 5, dropped, said)


def chunk(block: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(block), block)


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "c"
    monkeypatch.setenv(VARIABLE, f"unix:{path}")
    return path


# -- what the blocks say of the end


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (last(), "the capture has ended: ending=done; no packet dropped"),
        (last(1), "the capture has ended: ending=done; 1 packet dropped"),
        (last(12, "x\x1b"), "the capture has ended: x\\x1b; 12 packets dropped"),
        (last(0, ""), "the capture has ended; no packet dropped"),
        (b"", "the capture has ended"),
    ],
)
def test_how_it_ended(block: bytes, words: str) -> None:
    ending = Ending()
    ending.feed(BEGINNING + PACKET + block)
    assert ending.words == words


@given(st.lists(st.integers(1, 60)), st.lists(st.sampled_from([PACKET, BEGINNING])))
def test_in_whatever_pieces(cuts: list[int], blocks: list[bytes]) -> None:
    whole = b"".join([BEGINNING, *blocks, last(7)])
    ending = Ending()
    for cut in cuts:
        ending.feed(whole[:cut])
        whole = whole[cut:]
    ending.feed(whole)
    assert (ending.why, ending.dropped) == ("ending=done", 7)


def test_of_the_other_order_of_bytes() -> None:
    """As a relayd of another machine may write it."""
    # A section of 28 bytes; statistics of 36, with the number that was dropped.
    section = "0a0d0d0a 0000001c 1a2b3c4d 0001 0000 ffffffffffffffff 0000001c"
    said = "00000005 00000028 00000000 0000000000000000 00050008 0000000000000009"
    ending = Ending()
    ending.feed(bytes.fromhex(section + said + "00000000 00000028"))
    assert ending.dropped == 9


@given(st.binary(max_size=200), st.integers(0, 60))
def test_of_rubbish_nothing_is_said(rubbish: bytes, cut: int) -> None:
    """And nothing grows."""
    ending = Ending()
    ending.feed(BEGINNING[:cut] + rubbish)
    assert ending.words.startswith("the capture has ended")


# -- the command


def test_blocks_are_written_and_the_end_is_told(
    path: Path, capfdbinary: CapturedBytes
) -> None:
    blocks = [BEGINNING, PACKET, last(3)]
    with raw_server(path, HEAD, *map(chunk, blocks), END):
        assert main(["capture", "17", "--bytes", "100"]) == Exit.DONE
    said = capfdbinary.readouterr()
    assert said.out == b"".join(blocks)
    assert said.err == b"the capture has ended: ending=done; 3 packets dropped\n"


def test_what_is_asked_for(relayd: FakeRelayd, capsys: Captured) -> None:
    asked = "GET /v1/sessions/17/capture"
    for status, code in ((404, Exit.NOT_FOUND), (409, Exit.REFUSED)):
        relayd.answers[asked] = (status, {"problems": ["a line"]})
        assert main(["capture", "17", "--bytes", "100"]) == code
        said = capsys.readouterr()
        assert (said.out, said.err) == ("", "a line\n")
    assert relayd.last[1] == "/v1/sessions/17/capture?bytes=100"
    relayd.answers[asked] = (201, {})
    assert main(["capture", "17"]) == Exit.UNREACHABLE
    assert relayd.last[1] == "/v1/sessions/17/capture"


def test_bytes_are_written_as_in_a_file(relayd: FakeRelayd) -> None:
    asked = "GET /v1/sessions/17/capture"
    relayd.answers[asked] = (404, {"problems": ["a line"]})
    assert main(["capture", "17", "--bytes", "64KiB"]) == Exit.NOT_FOUND
    assert relayd.last[1] == "/v1/sessions/17/capture?bytes=65536"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["dns"], "'SESSION': 'dns' is not a valid whole number."),
        (["17", "--bytes", "0"], "'--bytes': '0': expected 1 to "),
        (["17", "--bytes", "many"], "'--bytes': 'many': expected 1 to "),
    ],
)
def test_what_is_no_number(arguments: list[str], says: str, capsys: Captured) -> None:
    assert main(["capture", *arguments]) == Exit.USAGE
    assert f"Error: Invalid value for {says}" in capsys.readouterr().err


def test_a_terminal_gets_none(
    relayd: FakeRelayd, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is asked for."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["capture", "17"]) == Exit.USAGE
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("pipe it to `wireshark -k -i -`, or into a file")
    assert not relayd.asked


@pytest.mark.parametrize(
    "pieces", [(b"",), (chunk(PACKET),), (chunk(PACKET)[:-9],), (b"7",), (b"x\r\n",)]
)
def test_one_that_is_cut_off(
    path: Path, capfdbinary: CapturedBytes, pieces: tuple[bytes, ...]
) -> None:
    with raw_server(path, HEAD, *pieces):
        assert main(["capture", "17"]) == Exit.FAILED
    assert capfdbinary.readouterr().err == (
        b"it was cut off: relayd has closed the connection, or has ended\n"
    )


def test_no_answer_in_time(
    path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only its head has a time."""
    monkeypatch.setattr(control_client, "QUESTION", 0.05)
    with raw_server(path, HEAD[:9], hold=True):
        assert main(["capture", "17"]) == Exit.UNREACHABLE
    assert "no answer within 0.05 s" in capsys.readouterr().err


class Reader:
    """Where a capture goes, whose reader does what it is told to.

    :ivar wrote: the blocks.
    """

    def __init__(self, *wrote: Callable[[], object]) -> None:
        self.wrote: list[bytes] = []
        self._then = list(wrote)

    def write(self, block: memoryview) -> int:
        if self._then:
            self._then.pop(0)()
        # As a pipe does: not all at once.
        part = bytes(block[:50])
        self.wrote.append(part)
        return len(part)

    def fileno(self) -> int:
        raise io.UnsupportedOperation


class Relayd:
    """Says what it is to say, and the end once the client has ended its side."""

    def __init__(self, path: Path, *blocks: bytes) -> None:
        import socket

        self.ended = threading.Event()
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._blocks = blocks
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listening.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(HEAD + b"".join(map(chunk, self._blocks)))
            connection.settimeout(PATIENCE)
            if connection.recv(1) == b"":
                self.ended.set()
                with suppress(OSError):  # who has had enough may be gone
                    connection.sendall(chunk(last(2, "the session goes on")) + END)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self._listening.close()


def written(path: Path, output: Any) -> None:
    client = ControlClient(str(path))
    with client.going_on("/v1/sessions/17/capture") as blocks:
        capturing.write(blocks, output)


@pytest.fixture
def signals() -> Iterator[None]:
    """Those of this process are as they were."""
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(each) for each in kinds]
    yield
    assert [signal.getsignal(each) for each in kinds] == before


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_all_that_is_left(
    path: Path, capsys: Captured, number: signal.Signals
) -> None:
    reader = Reader(lambda: signal.raise_signal(number))
    with Relayd(path, BEGINNING, PACKET) as relayd:
        written(path, reader)
    assert relayd.ended.is_set()
    assert b"".join(reader.wrote).endswith(PACKET + last(2, "the session goes on"))
    assert capsys.readouterr().err == (
        "the capture has ended: the session goes on; 2 packets dropped\n"
    )


@pytest.mark.usefixtures("signals")
def test_a_second_signal_ends_the_command(path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with Relayd(path, BEGINNING), pytest.raises(KeyboardInterrupt):
        written(path, Reader(twice))


@pytest.mark.usefixtures("signals")
def test_a_relayd_that_says_no_end_is_not_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_client, "TAIL", 0.02)
    reader = Reader(lambda: signal.raise_signal(signal.SIGINT))
    with (
        raw_server(path, HEAD + chunk(PACKET), chunk(PACKET), hold=True),
        pytest.raises(CommandFailed) as caught,
    ):
        written(path, reader)
    assert caught.value.exit == Exit.FAILED


def test_nobody_reads_it_any_more(path: Path, capsys: Captured) -> None:
    def gone() -> None:
        raise BrokenPipeError

    reader = Reader(lambda: None, gone)
    with Relayd(path, BEGINNING, PACKET) as relayd:
        written(path, reader)
    assert relayd.ended.is_set()
    assert capsys.readouterr().err == (
        "the capture has ended: the session goes on; 2 packets dropped; nobody reads"
        " it any more\n"
    )


def test_a_reader_that_leaves_is_noticed_while_nothing_comes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wireshark is closed, and the session is idle: it shall splice again."""
    ends, start = os.pipe()
    with Relayd(path, BEGINNING) as relayd, os.fdopen(start, "wb", 0) as output:
        threading.Timer(0.02, os.close, [ends]).start()
        written(path, output)
    assert relayd.ended.is_set()


def test_a_disk_that_is_full_is_one_line(path: Path) -> None:
    """And the session goes on without."""
    program = "from relayd.ctl.main import main; raise SystemExit(main())"
    words = [sys.executable, "-c", program, "capture", "17"]
    with open("/dev/full", "wb") as full, raw_server(path, HEAD, chunk(PACKET), END):
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == Exit.FAILED
    assert done.stderr == b"relayctl: No space left on device\n"


def test_a_pipe_without_a_reader_is_no_failure(path: Path) -> None:
    """Also as the process ends, with whatever it has not written."""
    program = "from relayd.ctl.main import main; raise SystemExit(main())"
    words = [sys.executable, "-c", program, "capture", "17"]
    ends, start = os.pipe()
    os.close(ends)
    with Relayd(path, BEGINNING, PACKET), os.fdopen(start, "wb") as output:
        done = subprocess.run(words, stdout=output, stderr=subprocess.PIPE, check=False)
    assert done.returncode == Exit.DONE
    assert done.stderr.endswith(b"; nobody reads it any more\n")
