"""Outlets: each kind of descriptor is written without waiting, and none is changed."""

from __future__ import annotations

import os
import pty
import select
import socket
import stat
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from relayd.operating import outlets
from relayd.operating.outlets import (
    ClosedOutlet,
    FifoOutlet,
    Outlet,
    ThreadOutlet,
    open_to_append,
    outlet_of,
)
from tests.support.process import START, eventually

LINE = b"a line of a log, of some length\n" * 4


@contextmanager
def descriptors(kind: str) -> Iterator[tuple[int, int]]:
    """Where to write, and where it is read: nobody does, or the terminal is stopped."""
    with ExitStack() as after:
        if kind == "socket":
            ends = socket.socketpair()
            for end in ends:
                after.callback(end.close)
            yield ends[0].fileno(), ends[1].fileno()
            return
        if kind == "terminal":
            reader, writer = pty.openpty()
            termios.tcflow(writer, termios.TCOOFF)
        elif kind == "named pipe":
            path = Path(after.enter_context(TemporaryDirectory())) / "fifo"
            os.mkfifo(path)
            reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            writer = os.open(path, os.O_WRONLY)
        else:
            reader, writer = os.pipe()
        after.callback(os.close, reader)
        after.callback(os.close, writer)
        yield writer, reader


@pytest.mark.parametrize("how", ["as it is", "no RWF_NOWAIT", "no /proc either"])
@pytest.mark.parametrize("kind", ["pipe", "named pipe", "socket", "terminal"])
def test_a_write_does_not_wait(
    kind: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it takes no more; and the inherited descriptor is as it was."""
    if how != "as it is":
        monkeypatch.setattr(outlets, "_pipes_need_not_wait", lambda: False)
    if how == "no /proc either":
        monkeypatch.setattr(outlets, "_PROC", "/nowhere/{}")
    with descriptors(kind) as (writer, reader):
        outlet = outlet_of(writer)
        by_thread = how == "no /proc either" and kind != "socket"
        assert isinstance(outlet, ThreadOutlet) is by_thread
        # A thread takes all that it is given: more than fits into a pipe.
        many = 1_000 if by_thread else 1
        taken = 0
        with pytest.raises(BlockingIOError):
            while True:
                taken += outlet.write(LINE * many)
        assert os.get_blocking(writer)
        if kind == "terminal":
            # Stopped, it takes nothing at all; a thread waits for it.
            assert taken in (0, len(LINE) * many)
            termios.tcflow(writer, termios.TCOON)
        os.set_blocking(reader, False)
        got = b""

        def all_read() -> bool:
            nonlocal got
            with suppress(BlockingIOError):
                got += os.read(reader, 1 << 16)
            return len(got.replace(b"\r", b"")) >= taken and not outlet.unwritten

        eventually(all_read, "all of it is read")
        assert got.replace(b"\r", b"") == (LINE * (taken // len(LINE) + 1))[:taken]
        outlet.close()
        eventually(lambda: threads() == 0, "its thread ends")


def threads() -> int:
    """How many threads of outlets there are."""
    return sum(each.name == "relayd log" for each in threading.enumerate())


def test_a_file_is_written_as_it_is(tmp_path: Path) -> None:
    """Behind what others have written by the same open file."""
    with (tmp_path / "log").open("wb", buffering=0) as file:
        outlet = outlet_of(file.fileno())
        file.write(b"one\n")
        assert outlet.write(b"two\n") == 4
        file.write(b"three\n")
        outlet.close()
    assert (tmp_path / "log").read_bytes() == b"one\ntwo\nthree\n"


def test_what_is_not_open_takes_nothing() -> None:
    closed = ClosedOutlet()
    with pytest.raises(OSError, match="Bad file descriptor"):
        closed.write(LINE)
    closed.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        outlet_of(-1)


def test_a_thread_tries_again_what_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlets, "_AGAIN", 0.01)
    refusals = [OSError(28, "No space left on device")]
    really, ends = os.write, os.pipe()

    def write(descriptor: int, data: bytes) -> int:
        if refusals:
            raise refusals.pop()
        return really(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    outlet = ThreadOutlet(ends[1])
    assert outlet.write(LINE) == len(LINE)
    assert os.read(ends[0], 1000) == LINE
    eventually(lambda: not outlet.unwritten, "it is written")
    outlet.close()
    os.close(ends[0])
    eventually(lambda: threads() == 0, "its thread ends")


def test_a_thread_that_waits_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its outlet, which another one replaces."""
    monkeypatch.setattr(outlets, "_AGAIN", 0.01)
    reader, writer = os.pipe()
    os.close(reader)
    outlet = ThreadOutlet(writer)
    outlet.write(LINE)
    outlet.close()
    eventually(lambda: threads() == 0, "its thread ends")
    assert outlet.unwritten == LINE
    # One that was never needed.
    ThreadOutlet(os.dup(2)).close()


def test_a_thread_writes_nothing_by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reader has left in a pipe is known, however much it is given at once."""
    reader, writer = os.pipe()
    outlet = ThreadOutlet(writer)
    data = b"x" * outlet.first
    outlet.write(data)
    eventually(lambda: not outlet.unwritten, "the pipe is full")
    outlet.write(data)
    os.read(reader, select.PIPE_BUF)
    eventually(lambda: len(outlet.unwritten) == len(data) - select.PIPE_BUF, "a part")
    outlet.close()
    os.close(reader)
    eventually(lambda: threads() == 0, "its thread ends")


def test_a_thread_that_can_not_be_had_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of them, or the end of the interpreter: no exception that is not ours."""
    reader, writer = os.pipe()
    outlet = ThreadOutlet(writer)

    def start(thread: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        for _ in range(2):
            with pytest.raises(BlockingIOError, match="can't start new thread"):
                outlet.write(LINE)
    assert outlet.unwritten == b""
    assert outlet.write(LINE) == len(LINE)
    assert os.read(reader, 1000) == LINE
    outlet.close()
    os.close(reader)
    eventually(lambda: threads() == 0, "its thread ends")


def test_a_pipe_without_rwf_nowait_goes_on_by_a_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that has a name, or was opened by /proc: a write shows it."""
    monkeypatch.setattr(outlets, "_PROC", "/nowhere/{}")
    with descriptors("pipe") as (writer, reader):
        again = os.open(f"/proc/self/fd/{writer}", os.O_WRONLY)
        outlet = outlet_of(again)
        os.close(again)
        first = outlet.first
        # More than fits.
        assert outlet.write(LINE * 1_000) == len(LINE) * 1_000
        with pytest.raises(BlockingIOError):
            outlet.write(LINE)
        assert outlet.unwritten
        assert outlet.first > first
        os.set_blocking(reader, False)

        def all_read() -> bool:
            with suppress(BlockingIOError):
                os.read(reader, 1 << 16)
            return not outlet.unwritten

        eventually(all_read, "it is written")
        outlet.close()
        eventually(lambda: threads() == 0, "its thread ends")


FORKS = """
import os
from relayd.operating.outlets import ThreadOutlet

outlet = ThreadOutlet(1)
outlet.write(b"parent\\n")
while outlet.unwritten:
    pass
if os.fork() == 0:
    outlet.write(b"child\\n")
    while outlet.unwritten:
        pass
    os._exit(0)
os.wait()
"""


def test_a_process_that_was_forked_has_a_thread_of_its_own() -> None:
    """As a daemon is."""
    ran = subprocess.run(
        [sys.executable, "-c", FORKS], stdout=subprocess.PIPE, check=True, timeout=START
    )
    assert ran.stdout == b"parent\nchild\n"


def test_a_fifo_is_opened_without_a_reader(tmp_path: Path) -> None:
    """It takes what fits, and loses nothing while its reader is away."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    outlet = Outlet(open_to_append(str(path)))
    assert outlet.write(b"one\n") == 4
    for text in (b"one\n", b"two\n"):
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
            assert reader.readline() == text
        outlet.write(b"two\n")
    with pytest.raises(BlockingIOError):
        while True:
            outlet.write(LINE)
    outlet.close()


def test_what_a_fifo_holds_is_lost_without_a_reader(tmp_path: Path) -> None:
    """At the end of the process; with one it is not, nor is what comes after that."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    outlet = FifoOutlet(open_to_append(str(path)))
    taken = 0
    with pytest.raises(BlockingIOError):
        while True:
            taken += outlet.write(LINE)
    assert outlet.unwritten == b""
    assert len(outlet.abandon()) == taken
    with pytest.raises(BrokenPipeError):
        outlet.write(LINE)
    assert outlet.abandon() == b""
    outlet.close()

    outlet = FifoOutlet(open_to_append(str(path)))
    outlet.write(LINE)
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
        assert outlet.abandon() == b""
        outlet.write(LINE)
        outlet.close()
        assert reader.read() == LINE * 2


def test_a_fifo_of_another_user_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outlets, "_PROC", "/nowhere/{}")
    path = tmp_path / "fifo"
    os.mkfifo(path)
    outlet = FifoOutlet(open_to_append(str(path)))
    outlet.write(LINE)
    assert outlet.abandon() == b""
    assert outlet.write(LINE) == len(LINE)
    outlet.close()


def test_a_file_is_made_and_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for _ in range(2):
        outlet = Outlet(open_to_append(str(path)))
        outlet.write(LINE)
        outlet.close()
    assert path.read_bytes() == LINE * 2
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    with pytest.raises(OSError, match="Is a directory"):
        open_to_append(str(tmp_path))
    with pytest.raises(OSError, match="No such file"):
        open_to_append(str(tmp_path / "none" / "log"))
