"""Writes a capture of a living session to standard output, as it comes.

Each block is written at once, for who reads along (`wireshark -k -i -`).  The capture
ends with the session or after as many bytes as were asked for; Ctrl-C (or SIGTERM, as
timeout(1) sends it) and a reader that leaves end it as well: relayd is told that no
more is wanted, and what it has left to say is written.  How it ended, and how much is
missing, is in the last block (:class:`Ending`), and goes to standard error.
"""

from __future__ import annotations

import select
import signal
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import UnsupportedOperation
from typing import Any, BinaryIO

import click

from relayd.ctl.amounts import counted, printable
from relayd.ctl.control_client import GoingOn

#: Milliseconds between two looks whether the capture is over.
_LOOK = 200

# pcapng: draft-ietf-opsawg-pcapng, sections 4.1, 4.5 and 3.5.
_SECTION, _STATISTICS = 0x0A0D0D0A, 5
_BYTE_ORDER = 0x1A2B3C4D
_COMMENT, _DROPPED = 1, 5

#: The longest block that is looked into.
_LONGEST = 1 << 16


class Ending:
    """What the blocks of a capture say of its end: of pcapng, the interface statistics.

    :ivar why: it ended, in relayd's words; empty if they say nothing.
    :ivar dropped: how many packets are missing; None likewise.
    """

    def __init__(self) -> None:
        self.why = ""
        self.dropped: int | None = None
        self._order = "<"
        self._block = b""
        #: Bytes of a block that are of no interest, and have not come yet.
        self._skip = 0

    def feed(self, data: bytes) -> None:
        """Some more, in whatever pieces."""
        while data:
            if self._skip:
                gone = min(self._skip, len(data))
                data, self._skip = data[gone:], self._skip - gone
                continue
            wanted = self._wanted() - len(self._block)
            self._block += data[:wanted]
            data = data[wanted:]
            self._look()

    def _wanted(self) -> int:
        """How much of a block has to be there."""
        head = self._block
        if len(head) < 12:
            # Of the shortest block there is, its head and its length again.
            return 12
        return int(self._unpack("I", head, 4))

    def _look(self) -> None:
        block = self._block
        if len(block) < 12:
            return
        kind = self._unpack("I", block, 0)
        if kind == _SECTION:
            self._order = "<" if block[8:12] == struct.pack("<I", _BYTE_ORDER) else ">"
        length = self._unpack("I", block, 4)
        if kind != _STATISTICS or not 24 <= length <= _LONGEST:
            self._block, self._skip = b"", max(length - len(block), 0)
        elif len(block) == length:
            self._block = b""
            self._read(block[20:-4])

    def _read(self, options: bytes) -> None:
        while len(options) >= 4:
            code, length = self._unpack("H", options, 0), self._unpack("H", options, 2)
            value = options[4 : 4 + length]
            options = options[4 + length + -length % 4 :]
            if code == _COMMENT:
                self.why = printable(value.decode("utf-8", "replace"))
            elif code == _DROPPED and len(value) == 8:
                self.dropped = self._unpack("Q", value, 0)

    def _unpack(self, kind: str, data: bytes, at: int) -> int:
        [found] = struct.unpack_from(self._order + kind, data, at)
        return int(found)

    @property
    def words(self) -> str:
        """Both, for people."""
        words = "the capture has ended"
        if self.why:
            words += f": {self.why}"
        if self.dropped is not None:
            missing = (
                "no packet" if not self.dropped else counted(self.dropped, "packet")
            )
            words += f"; {missing} dropped"
        return words


def write(blocks: GoingOn, output: BinaryIO) -> None:
    """Write a capture, and say how it ended.

    :raises CommandFailed: it was cut off.
    :raises OSError: it can't be written, as the disk is full.
    """
    ending = Ending()
    unread = False
    with _ended_by_signals(blocks.end), _watched(output, blocks.end):
        for block in blocks:
            ending.feed(block)
            if not unread:
                unread = not _written(block, output)
                if unread:
                    blocks.end()
    why = "; nobody reads it any more" if unread else ""
    click.echo(f"{ending.words}{why}", err=True)


def _written(block: bytes, output: BinaryIO) -> bool:
    """Whether somebody reads it."""
    # Past its buffer, of which nothing may be left as this process ends.
    raw: Any = getattr(output, "raw", output)
    left = memoryview(block)
    try:
        while left:
            left = left[raw.write(left) :]
    except BrokenPipeError:
        return False
    return True


@contextmanager
def _ended_by_signals(end: Callable[[], object]) -> Iterator[None]:
    """The first SIGINT or SIGTERM ends the capture; a second one, this process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)

    def first(*_: Any) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        end()

    before = {each: signal.signal(each, first) for each in signals}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def _watched(output: BinaryIO, end: Callable[[], object]) -> Iterator[None]:
    """End the capture when nobody reads a pipe, though nothing is to be written."""
    try:
        descriptor = output.fileno()
    except (OSError, UnsupportedOperation):
        yield
        return
    over = threading.Event()

    def watch() -> None:
        poll = select.poll()
        poll.register(descriptor, 0)
        while not over.is_set():
            # Asked for nothing, it tells of errors, and of a hang-up.
            if poll.poll(_LOOK):
                end()
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
